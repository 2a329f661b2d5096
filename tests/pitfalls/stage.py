"""
What the pitfall tests play on: a metering in memory with a rich payer, behind the middleware, and what it booked.

Everything is real but the network: the app is driven message by message.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import ASGIApp

from asgi_metering import Caller, Metering, MeteringMiddleware
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.receipts import Entry, EntryKind
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.stores.contract import AccountRows, EverythingKept
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import Drive, drive, http_scope, lifespan

__all__ = ["PAYER", "Stage", "StuckAt", "staged", "within"]

PAYER = "ada"
GRANTED = 1_000


class Stage:
    """
    One app behind the middleware, and its books.

    Attributes:
        app: The middleware, ready to be driven.
        metering: Behind it.
        events: Usage events that were delivered.
    """

    def __init__(self, app: ASGIApp, metering: Metering, events: list[Any], **options: Any) -> None:
        self.app: ASGIApp = MeteringMiddleware(app, metering=metering, **options)  # type: ignore[assignment]
        self.metering = metering
        self.events = events

    async def drive(self, path: str = "/", method: str = "GET", **options: Any) -> Drive:
        """Run one request to its end and wait until its call is booked."""
        scope_options = {key: options.pop(key) for key in ("spec_version", "headers", "extensions") if key in options}
        ended = await drive(self.app, http_scope(path, method, **scope_options), **options)
        await self.booked()
        return ended

    async def booked(self) -> None:
        """Wait until nothing is in flight and every end is in the books."""
        async with asyncio.timeout(10):
            while self.metering.runtime().in_flight or self.metering.runtime().busy or await self.metering.holds():
                await asyncio.sleep(0.001)

    async def charges(self) -> list[Entry]:
        """The payer's charges, oldest first; the books are proven on the way."""
        _, rows = await self.metering.store.read(AccountRows(PAYER, "credits"))
        key = (PAYER, "credits")
        grants = [*rows.grants.get(key, {}).values(), *rows.closed_grants.get(key, {}).values()]
        assert discrepancies(rows.accounts[key], grants, rows.holds.values()) == []
        return [entry async for entry in self.metering.statement(PAYER) if entry.kind is not EntryKind.GRANT]

    async def basis(self) -> tuple[str, ...]:
        """The basis of each charge."""
        return tuple([str(entry.basis) for entry in await self.charges()])

    async def outcomes(self) -> list[str]:
        """The outcomes that usage events reported, in order of their delivery; nothing is left in the outbox."""
        async with asyncio.timeout(10):
            while (await self.metering.store.read(EverythingKept())).state.events:
                await asyncio.sleep(0.001)
        return [event.outcome for event in self.events]


@asynccontextmanager
async def staged(
    app: ASGIApp, *, with_lifespan: bool = True, layer: dict[str, Any] | None = None, **options: Any
) -> AsyncIterator[Stage]:
    """
    Put *app* behind the middleware, with credits for `PAYER`; its lifespan runs around the block.

    Args:
        app: Any ASGI app.
        with_lifespan: False leaves the lifespan out, as daphne does.
        layer: Arguments of the middleware.
        options: Arguments of the metering.
    """
    events: list[Any] = []
    sinks = [CallbackSink(events.extend)]
    metering = Metering(**{"identify": _who, "sinks": sinks, "store": "memory://", **options})
    stage = Stage(app, metering, events, **(layer or {}))
    if with_lifespan:
        async with lifespan(stage.app):
            await metering.grant(PAYER, GRANTED, id="g")
            yield stage
    else:
        await metering.grant(PAYER, GRANTED, id="g")
        try:
            yield stage
        finally:
            await metering.stop()


def _who(_connection: Any) -> Caller:
    return Caller(PAYER)


def within(seconds: float, fact: Callable[[], bool]) -> Any:
    """Await until *fact* holds."""

    async def wait() -> None:
        async with asyncio.timeout(seconds):
            while not fact():
                await asyncio.sleep(0.001)

    return wait()


class StuckAt(MemoryStore):
    """A store that answers operations of one kind only when it is let."""

    immediate = False

    def __init__(self, kind: type) -> None:
        super().__init__()
        self._kind = kind
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        self.answered = asyncio.Event()

    async def run(self, operations: Any) -> Any:
        stuck = any(isinstance(operation, self._kind) for operation in operations)
        if stuck:
            self.asked.set()
            await self.answer.wait()
        answers = await super().run(operations)
        if stuck:
            self.answered.set()
        return answers
