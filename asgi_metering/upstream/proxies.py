"""
The proxies that the environment asks for, as mounts of an HTTP client.

A client that is given a transport no longer looks for them itself, so whoever gives it one has to. Knows the
rules of ``HTTP_PROXY``, ``HTTPS_PROXY``, ``ALL_PROXY`` and ``NO_PROXY`` as httpx2 2.16 reads them. Never knows
a transport.
"""

from __future__ import annotations

import ipaddress
from types import ModuleType
from urllib.request import getproxies

__all__ = ["environment_proxies"]


def environment_proxies(library: ModuleType) -> dict[str, str | None]:
    """
    Return URL patterns and the proxy for each; `None` means: directly.

    Args:
        library: httpx2 or httpx. An entry of ``NO_PROXY`` that it cannot parse is left out, as curl does,
            instead of breaking the client's construction.

    Source: ``httpx2._utils.get_environment_proxies``, which is private; a test compares the two.
    """
    found = getproxies()
    mounts: dict[str, str | None] = {}
    for scheme in ("http", "https", "all"):
        if address := found.get(scheme):
            mounts[f"{scheme}://"] = address if "://" in address else f"http://{address}"
    for host in (entry.strip() for entry in found.get("no", "").split(",")):
        if host == "*":
            return {}
        pattern = _direct(host)
        if pattern is not None and _parses(pattern, library):
            mounts[pattern] = None
    return mounts


def _direct(host: str) -> str | None:
    """Return the pattern of the hosts that one ``NO_PROXY`` entry exempts, `None` if it names none."""
    if "://" in host:
        return host
    address, slash, _ = host.partition("/")
    version = _ip_version(host)
    if version == 6:
        return f"all://[{address}]{host[len(address) :]}"
    if version == 4 or host.lower() == "localhost" or host.startswith("["):
        return f"all://{host}"
    if slash or not host:
        return None
    # "example.com" exempts itself and its subdomains; ".example.com" and "*.example.com" only the latter.
    return f"all://{host}" if host.startswith("*.") else f"all://*{host}"


def _ip_version(host: str) -> int | None:
    try:
        return ipaddress.ip_network(host, strict=False).version
    except ValueError:
        return None


def _parses(pattern: str, library: ModuleType) -> bool:
    try:
        library.URL(pattern)
    except library.InvalidURL:
        return False
    return True
