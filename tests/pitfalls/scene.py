"""
A scene for tests of the gate: books that remember what they were asked, two callers, and one way to visit.

`ann` has 100 credits, `poor` has none; a request without a caller's key has nobody behind it. Everything runs in one
event loop, in process, with the lifespan of the application around it.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_metering import Caller, Metering
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.receipts import Balance
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Declare, Emit, End, Operation, PostGrant
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.usage import TokenUsage, UsageEvent
from tests.harness.drive import Drive, body, drive, headers, http_scope, lifespan

__all__ = ["ANN", "CREDIT", "POOR", "TOKENS", "Books", "Scene", "SlowBooks", "Visit", "field_of", "visit"]

ANN = "ann"
POOR = "poor"
CREDIT = 1_000_000
"""Smallest parts of one credit."""

TOKENS = TokenUsage(input=1, output=1)

Result = TypeVar("Result")


class Books(MemoryStore):
    """A memory store that remembers, in order, what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Operation] = []

    def run_now(self, operation: Operation) -> Answer:
        if not isinstance(operation, Declare):
            # Told once at the start, by whoever starts.
            self.asked.append(operation)
        return super().run_now(operation)

    @property
    def admissions(self) -> list[Admit]:
        return [asked for asked in self.asked if isinstance(asked, Admit)]

    @property
    def ends(self) -> list[End]:
        return [asked for asked in self.asked if isinstance(asked, End)]

    @property
    def emitted(self) -> list[Emit]:
        return [asked for asked in self.asked if isinstance(asked, Emit)]


class SlowBooks(Books):
    """Books of a store with round trips: nothing is answered before the test opens the door."""

    immediate = False

    def __init__(self) -> None:
        super().__init__()
        self.door = asyncio.Event()
        self.asked_once = asyncio.Event()

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        if all(isinstance(operation, Declare) for operation in operations):
            # Part of starting, which is not what is slow here.
            return await super().run(operations)
        self.asked_once.set()
        await self.door.wait()
        return await super().run(operations)


@dataclass(frozen=True)
class Visit:
    """One request to make."""

    path: str = "/"
    method: str = "GET"
    caller: str | None = ANN
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    spec_version: str = "2.3"

    def scope(self) -> Any:
        fields = list(self.headers)
        if self.caller is not None:
            fields.append(("x-api-key", self.caller))
        return http_scope(self.path, self.method, query=self.query, headers=fields, spec_version=self.spec_version)


def identify(connection: HTTPConnection) -> Caller | None:
    key = connection.headers.get("x-api-key")
    return Caller(key) if key else None


@dataclass
class Scene:
    """
    A metering over `Books`, with ann's credits in them.

    With ``tells`` its usage events come into `told`, and the books are asked for them now and then.
    """

    books: Books = field(default_factory=Books)
    tells: bool = False
    told: list[UsageEvent] = field(default_factory=list)
    metering: Metering = field(init=False)

    def __post_init__(self) -> None:
        sinks = (CallbackSink(self._take, "told"),) if self.tells else ()
        self.metering = Metering(self.books, identify=identify, sinks=sinks)
        self.grant(ANN, 100)

    async def _take(self, events: Sequence[UsageEvent]) -> None:
        self.told.extend(events)

    def grant(self, payer: str, amount: int) -> None:
        MemoryStore.run_now(self.books, PostGrant(f"for-{payer}", payer, "credits", amount * CREDIT))

    async def balance(self, payer: str = ANN) -> Balance:
        return await self.metering.balance(payer)

    def settled(self, payer: str = ANN) -> int:
        """Whole credits that *payer* has spent; nothing may be held any more."""
        balance = asyncio.run(self._balance_once(payer))
        assert balance.held == 0, f"{balance.held} smallest parts are still held."
        return balance.settled // CREDIT

    async def _balance_once(self, payer: str) -> Balance:
        async with self.metering:
            return await self.metering.balance(payer)


async def make(app: ASGIApp, visits: Sequence[Visit]) -> list[Drive]:
    return [await drive(app, each.scope(), body=each.body) for each in visits]


def visit(app: ASGIApp, *visits: Visit) -> list[Drive]:
    """Make *visits* one after the other, inside the lifespan of *app*, and return them as they ended."""

    async def story() -> list[Drive]:
        async with lifespan(app):
            return await make(app, visits)

    return asyncio.run(story())


def http_only(app: ASGIApp) -> ASGIApp:
    """Let a plain application of a few lines say that it has no lifespan."""

    @functools.wraps(app)
    async def without_lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError("This application has no lifespan.")
        await app(scope, receive, send)

    return without_lifespan


def field_of(ended: Drive, name: str) -> str | None:
    """The one header field *name* of a response."""
    found = [value for key, value in headers(ended.log) if key == name]
    assert len(found) <= 1, f"{name} comes {len(found)} times."
    return found[0] if found else None


def problem(ended: Drive) -> dict[str, Any]:
    """The problem details of a refusal."""
    assert field_of(ended, "content-type") == "application/problem+json"
    return dict(json.loads(body(ended.log)))
