"""
Processes that are killed between two steps of one transaction: deeper than the published points reach.

Knows how each driver is called: a statement of SQLite's, before it runs; a trip to PostgreSQL, before it is sent and
while its answer is awaited.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from typing import Any

from asgi_metering.stores.postgres.link import Link
from asgi_metering.testing.faults import kill
from tests.stores.crashes.house import Plan, burn
from tests.stores.places import store_at

__all__ = ["end", "migrate"]


class _Steps:
    """Counts steps from `begin` on, and kills this process before the one with this number, from 0 up."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._counts = False

    def begin(self) -> None:
        self._counts = True

    def step(self, *_: object) -> None:
        if self._counts:
            if not self._number:
                kill()
            self._number -= 1


def _watch(steps: _Steps) -> None:
    """Have each step of either driver counted."""
    connect = sqlite3.connect

    def connected(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **named)
        connection.set_trace_callback(steps.step)
        return connection

    sqlite3.connect = connected
    trip, woken = Link.trip, Link._woken
    Link.trip = _stepping(trip, steps)  # type: ignore[method-assign]
    Link._woken = _stepping(woken, steps)  # type: ignore[method-assign]


def _stepping(function: Callable[..., Any], steps: _Steps) -> Any:
    async def counted(*arguments: Any, **named: Any) -> Any:
        steps.step()
        return await function(*arguments, **named)

    return counted


async def end(plan: Plan, number: int) -> None:
    """Be killed before that step of the transaction that ends the call of *plan*; behind its last, at its point."""
    steps = _Steps(number)
    _watch(steps)
    await burn(plan, {"end.before": steps.begin})


def migrate(url: str, number: int) -> None:
    """Be killed before that step of making the tables at *url*; behind the last one, when they are made."""
    steps = _Steps(number)
    _watch(steps)
    steps.begin()
    asyncio.run(_open(url))
    kill()


async def _open(url: str) -> None:
    await store_at(url, migrate=True).open()
