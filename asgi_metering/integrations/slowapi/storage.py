"""
Storage: from where slowapi keeps its counts to a metering of ours that counts there.

Knows URLs of `limits` and ours. Opens nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from limits.strategies import STRATEGIES as THEIRS
from slowapi.extension import C

from asgi_metering.errors import ConfigurationError
from asgi_metering.integrations.slowapi.rules import STRATEGIES
from asgi_metering.metering import Metering
from asgi_metering.policies import RatesDown
from asgi_metering.rates import STRATEGIES as OURS
from asgi_metering.rates import Strategy
from asgi_metering.stores.memory import MemoryStore

if TYPE_CHECKING:
    from slowapi import Limiter

__all__ = ["metering_for", "storage_of", "strategy_of", "without_store"]

SCHEMES = {
    "memory": "memory",
    "async+memory": "memory",
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "redis+sentinel": "redis+sentinel",
    "valkey+sentinel": "redis+sentinel",
    "redis+cluster": "redis+cluster",
    "valkey+cluster": "redis+cluster",
    "sqlite": "sqlite",
    "postgresql": "postgresql",
    "postgres": "postgres",
}
"""Schemes of storage URLs by those of our stores."""


def storage_of(limiter: Limiter) -> str:
    """The URL at which *limiter* keeps its counts, from its argument or its settings."""
    return str(limiter._storage_uri or limiter.get_app_config(C.STORAGE_URL, "memory://"))


def metering_for(limiter: Limiter) -> Metering:
    """
    A metering that counts rates where *limiter* keeps its counts.

    Raises:
        ConfigurationError: No store of ours is there, or its options cannot be told in a URL.
        MissingExtraError: The driver is not installed.
    """
    uri = storage_of(limiter)
    parts = urlsplit(uri)
    scheme = SCHEMES.get(parts.scheme)
    if scheme is None:
        raise ConfigurationError(
            f"slowapi's storage {parts.scheme + '://'!r} is none that asgi_metering has a store for. Pass a Metering "
            f"of your own: adopt(limiter, Metering('redis://host')), or on memory://, sqlite:///file.db or "
            f"postgresql://host/database."
        )
    options = dict(limiter._storage_options)
    for name, value in options.items():
        if not isinstance(value, str | int | float) or scheme == "memory":
            raise ConfigurationError(
                f"storage_options has {name}={type(value).__name__}(...), which cannot stand in the URL of a store. "
                f"Pass a Metering of your own: adopt(limiter, Metering(...))."
            )
    if scheme == "memory":
        return Metering(MemoryStore(_now), sinks=())
    query = "&".join(each for each in (parts.query, urlencode(options)) if each)
    return Metering(urlunsplit(parts._replace(scheme=scheme, query=query)), sinks=())


def _now() -> float:
    """By the name that it has now, as `limits` asks: applications move the time in their tests by another function."""
    return time.time()


def strategy_of(limiter: Limiter) -> Strategy:
    """How its windows move; raises `ConfigurationError` for a strategy that we do not have."""
    kind = type(limiter._limiter)
    name = next((name for name, strategy in THEIRS.items() if strategy is kind), kind.__name__)
    strategy = STRATEGIES.get(name)
    if strategy not in OURS:
        known = [repr(name) for name, strategy in STRATEGIES.items() if strategy in OURS]
        raise ConfigurationError(f"The strategy {name!r} is not known. Use one of {', '.join(known)} in the Limiter.")
    found: Strategy = strategy
    return found


def without_store(limiter: Any) -> RatesDown:
    """
    What its limits do while the store is down.

    ``in_memory_fallback`` counts in this process, ``swallow_errors`` lets requests pass; with neither, slowapi answers
    500, and we 503.
    """
    if limiter._in_memory_fallback_enabled:
        return "local"
    return "allow" if limiter._swallow_errors else "deny"
