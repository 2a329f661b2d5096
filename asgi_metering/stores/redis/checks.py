"""Checks at startup: whether the server is one that money can be kept on. Decides nothing later on."""

from __future__ import annotations

import logging

from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.redis.link import Link, Reply

__all__ = ["check_server"]

log = logging.getLogger("asgi_metering.stores")

OLDEST = (6, 2)
"""Earlier servers do not know ``ZADD LT``."""


async def check_server(link: Link) -> None:
    """
    Look at version, eviction and persistence, and load the scripts.

    Raises:
        ConfigurationError: The server is too old, or evicts keys when its memory is full.
        StoreUnavailableError: It cannot be reached.
    """
    info, eviction, appendonly, save = await link.exchange(
        [("INFO",), *(("CONFIG", "GET", name) for name in ("maxmemory-policy", "appendonly", "save"))]
    )
    known = _fields(info)
    version = known.get("redis_version", "0")
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ConfigurationError(f"The Redis server is version {version}. The store needs 6.2 or later, or Valkey.")
    policy = _setting(eviction) or known.get("maxmemory_policy")
    if policy is not None and policy != "noeviction":
        raise ConfigurationError(
            f"The Redis server evicts keys when its memory is full (maxmemory-policy {policy}): balances would be "
            f"lost. Set maxmemory-policy noeviction."
        )
    if isinstance(appendonly, Exception):
        log.warning(
            "The Redis server does not tell its settings (%s). See to it that it persists and never evicts.", appendonly
        )
    elif _setting(appendonly) == "no":
        log.warning(
            "The Redis server %s: what was acknowledged last is lost when it ends. Set appendonly yes.",
            "only takes snapshots" if _setting(save) else "persists nothing",
        )


def _fields(info: Reply) -> dict[str, str]:
    if isinstance(info, Exception):
        return {"redis_version": ".".join(map(str, OLDEST))}
    lines = (line.partition(":") for line in info.decode().splitlines() if ":" in line)
    return {name: value for name, _, value in lines}


def _setting(reply: Reply) -> str | None:
    """A setting's value; None where the server does not tell it."""
    if isinstance(reply, Exception) or len(reply) < 2:
        return None
    value: str = reply[1].decode()
    return value
