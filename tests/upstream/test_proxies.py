"""Proxies of the environment."""

from __future__ import annotations

import httpx2
import pytest
from httpx2._utils import get_environment_proxies

from asgi_metering.upstream.proxies import environment_proxies

NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"http_proxy": "http://one.test:8080", "https_proxy": "two.test", "all_proxy": "socks5://three.test"},
        {"https_proxy": "http://p.test", "no_proxy": "*"},
        {"https_proxy": "http://p.test", "no_proxy": "a.test,*,b.test"},
        {"all_proxy": "http://p.test", "no_proxy": "localhost, LOCALHOST,127.0.0.1,::1,[::1]:80"},
        {"all_proxy": "http://p.test", "no_proxy": "192.168.0.0/16,fe80::/10,example.com/path,,"},
        {"all_proxy": "http://p.test", "no_proxy": "example.com,.example.com,*.example.com,*.a.test/x"},
        {"all_proxy": "http://p.test", "no_proxy": "https://direct.test,http://[::1,https://x.test:port,[x]:80"},
        {"no_proxy": "example.com"},
    ],
)
def test_environment_proxies_are_those_of_the_library(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the library would mount by itself, had it not been given a transport, is what we mount."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert environment_proxies(httpx2) == get_environment_proxies()
