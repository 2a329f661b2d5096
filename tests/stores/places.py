"""
Places: a store by its URL, as the tests of all stores make it.

The one module of these tests that knows how each kind is constructed: a new one is one line in `_MAKERS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import urlsplit

from asgi_metering.stores.contract import Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.redis import RedisStore, ServerPlace
from asgi_metering.stores.sqlite import SQLiteStore

__all__ = ["PATIENT_S", "Clock", "store_at"]

Clock: TypeAlias = Callable[[], float]

PATIENT_S = 60.0
"""What a store waits for others: tests share two busy cores, and only broken code may run into it."""


def store_at(url: str, clock: Clock | None = None, *, migrate: bool = False) -> Store:
    """
    A patient store at *url*, not opened yet.

    Args:
        url: ``memory://``, ``sqlite:////file.db``, ``postgresql://...?namespace=schema``, or
            ``redis://...?namespace=name``.
        clock: What it reads the time from; the store's own by default.
        migrate: Make its tables at `open`, where it does not do so by itself.
    """
    return _MAKERS[urlsplit(url).scheme](url, clock, migrate)


def _memory(url: str, clock: Clock | None, migrate: bool) -> Store:
    return MemoryStore(clock=clock or time.time)


def _sqlite(url: str, clock: Clock | None, migrate: bool) -> Store:
    # A killed process loses nothing, whatever a commit waits for; a power cut is played nowhere here.
    path = urlsplit(url).path[1:]
    return SQLiteStore(path, synchronous="OFF", clock=clock or time.time, busy_timeout_s=PATIENT_S)


def _postgres(url: str, clock: Clock | None, migrate: bool) -> Store:
    address, _, schema = url.partition("?namespace=")
    return PostgresStore(
        address,
        namespace=schema,
        clock=clock,
        busy_timeout_s=PATIENT_S,
        answer_within_s=1.5 * PATIENT_S,
        migrate=migrate,
    )


def _redis(url: str, clock: Clock | None, migrate: bool) -> Store:
    address, _, namespace = url.partition("?namespace=")
    parts = urlsplit(address)
    place = ServerPlace({"host": parts.hostname, "port": parts.port}, PATIENT_S)
    return RedisStore(place, namespace=namespace, timeout_s=PATIENT_S, clock=clock)


_MAKERS: dict[str, Callable[[str, Clock | None, bool], Store]] = {
    "memory": _memory,
    "sqlite": _sqlite,
    "postgresql": _postgres,
    "redis": _redis,
}
