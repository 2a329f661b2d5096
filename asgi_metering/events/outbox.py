"""
The outbox, seen from the exporter: what is claimed, acknowledged and counted there.

Knows the store's operations for events and the form of a stored event. Never knows a sink.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import repeat
from operator import contains, methodcaller
from typing import Any, Final, NamedTuple, TypeAlias, cast

from asgi_metering.errors import StoreUnavailableError, UsageError
from asgi_metering.events.conventions import CORRECTS
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Acknowledge, Claim, Operation
from asgi_metering.rules.state import Event
from asgi_metering.stores.contract import PendingEvents, Query, Snapshot
from asgi_metering.usage.event import UsageEvent, ordinary_events

__all__ = [
    "COUNTED",
    "Backlog",
    "Dropped",
    "OnDrop",
    "Outbox",
    "Read",
    "Submit",
    "read_event",
    "read_events",
    "tell_of_drop",
]

log = logging.getLogger("asgi_metering.events")

COUNTED: Final = 1_000
"""Events that a look at the backlog counts at most."""

Submit: TypeAlias = Callable[[Operation], Awaitable[Answer]]
"""Runs an operation on the store: the pump's `submit`."""

Read: TypeAlias = Callable[[Query], Awaitable[Snapshot]]
"""Reads rows of the store: its `read`."""


class Dropped(NamedTuple):
    """
    A usage event that is given up: what ``Metering(on_event_dropped=)`` gets, the last chance to keep it elsewhere.

    Attributes:
        id: The event's id.
        payload: As it was in the outbox, or the event's `to_dict`.
        cause: ``"undecodable"``; ``"rejected"`` by one sink while that sink took others; or ``"unwritable"``: the store
            took the charge without it, and the payload is what the end would have said.
        sink: The sink that does not get it; None if none does.
    """

    id: str
    payload: Mapping[str, Any]
    cause: str
    sink: str | None = None


OnDrop: TypeAlias = Callable[[Dropped], object]
"""Called, or awaited, with each event that is given up."""


async def tell_of_drop(on_drop: OnDrop | None, dropped: Dropped, timeout_s: float) -> None:
    """Hand *dropped* to *on_drop*, which may break nothing: what it raises, or takes too long for, is logged."""
    if on_drop is None:
        return
    try:
        answer = on_drop(dropped)
        if inspect.isawaitable(answer):
            async with asyncio.timeout(timeout_s):
                await answer
    except Exception:
        log.exception("on_event_dropped failed for the usage event %r.", dropped.id)


class Backlog(NamedTuple):
    """
    What waits in the outbox.

    Attributes:
        events: How many, counted up to `COUNTED`.
        lag_s: Age of the oldest, by the store's clock; 0 when nothing waits.
    """

    events: int
    lag_s: float


_OWN_ID = methodcaller("get", "id")


def read_event(row: Event) -> UsageEvent:
    """
    Read the usage event of an outbox row.

    The end of a call that comes after its automatic end is an event of its own, whose amount is the difference alone,
    of either sign; its ``attributes["metering.corrects"]`` names the call.

    Raises:
        UsageError: The payload is no event.
    """
    return UsageEvent.from_dict(_told(row.id, row.payload))


def read_events(rows: Sequence[Event]) -> tuple[list[UsageEvent], list[tuple[Event, Exception]]]:
    """Read the usage events of outbox rows, as `read_event`; rows that nobody can read come with the reason."""
    try:
        return _together(rows), []
    except Exception as error:  # noqa: BLE001 -- whatever is wrong with one of them, it must not block the others
        if len(rows) == 1:
            return [], [(rows[0], error)]
    # By halves, the others of the batch are still read together.
    half = len(rows) // 2
    events, unreadable = read_events(rows[:half])
    more_events, more_unreadable = read_events(rows[half:])
    return events + more_events, unreadable + more_unreadable


def _together(rows: Sequence[Event]) -> list[UsageEvent]:
    """Read rows at the price of a few of them; UsageError where one is not as nearly all are."""
    if len(rows) < 2:
        return [read_event(row) for row in rows]
    ids, _, payloads, _, _ = zip(*rows, strict=True)
    # Most are told as they are kept.
    if tuple(map(_OWN_ID, payloads)) != ids or any(map(contains, payloads, repeat("event_of"))):
        payloads = tuple(map(_told, ids, payloads))
    events = ordinary_events(payloads)
    if events is None:
        raise UsageError("One of the stored events takes a closer look.")
    return events


def _told(key: str, payload: Mapping[str, Any]) -> dict[str, Any]:
    told = {**payload, "id": key}
    if "event_of" in payload:
        told["attributes"] = {**payload.get("attributes", {}), CORRECTS: payload["event_of"]}
    return told


class Outbox:
    """
    The operations of one store that concern events.

    Args:
        submit: Runs an operation.
        read: Reads rows; without it the backlog is not known.
        timeout_s: For each answer.
    """

    def __init__(self, submit: Submit, read: Read | None, *, timeout_s: float) -> None:
        self._submit = submit
        self._read = read
        self._timeout_s = timeout_s

    async def claim(self, limit: int, lease_s: float) -> tuple[Event, ...]:
        """
        Take up to *limit* events for *lease_s* seconds.

        Raises:
            StoreUnavailableError: No answer came; what was claimed all the same comes back when its lease ends.
        """
        return cast("tuple[Event, ...]", await self._ask(Claim(limit, lease_s)))

    async def acknowledge(self, ids: tuple[str, ...]) -> int:
        """
        Say that events were delivered, and return how many of them still waited.

        Raises:
            StoreUnavailableError: No answer came; asking again is safe.
        """
        return cast("int", await self._ask(Acknowledge(ids)))

    async def backlog(self) -> Backlog | None:
        """
        Look at what waits, claimed events included; None where rows cannot be read.

        Raises:
            StoreUnavailableError: No answer came.
        """
        if self._read is None:
            return None
        snapshot = await self._read(PendingEvents(COUNTED))
        rows = snapshot.state.events.values()
        oldest = min((row.at for row in rows), default=snapshot.now)
        return Backlog(len(rows), max(0.0, snapshot.now - oldest))

    async def _ask(self, operation: Operation) -> Answer:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                return await self._submit(operation)
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise StoreUnavailableError(
                f"The store did not answer {type(operation).__name__} within {self._timeout_s} s. It is asked again."
            ) from error
