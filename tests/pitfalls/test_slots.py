"""Slots of calls that run: taken before the work, free on every path that ends it, and by nothing after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_metering import billable, current_call, rate_limited
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, drive, http_scope, status
from tests.pitfalls.stage import Stage, staged, within

SLOTS = 2


class Streams:
    """Endpoints whose streams go on until they are let, one of which only reads."""

    def __init__(self, ending: str) -> None:
        self.go_on = asyncio.Event()
        self.ending = ending
        self.metering: Any = None

    @rate_limited(key="address", concurrency=SLOTS)
    async def stream(self, _request: Request) -> Response:
        """Stream until it is let, and end as the test says."""

        async def body() -> AsyncIterator[bytes]:
            yield b"one"
            await self.go_on.wait()
            if self.ending == "raises":
                raise LookupError("no model")
            if self.ending == "fails":
                current_call().fail("overloaded")
            yield b"two"

        return StreamingResponse(body())

    @rate_limited(key="address", concurrency=SLOTS)
    async def broken(self, _request: Request) -> Response:
        """Raise before the first byte, once it is let."""
        await self.go_on.wait()
        raise LookupError("no model")

    async def look(self, _request: Request) -> Response:
        """Read, and take nothing."""
        return JSONResponse({"calls": len(await self.metering.holds())})

    def app(self) -> Starlette:
        """The application."""
        paths = {"/": self.stream, "/broken": self.broken, "/look": self.look}
        return Starlette(routes=[Route(path, endpoint) for path, endpoint in paths.items()])


async def asked(stage: Stage, path: str = "/", address: str = "10.0.0.1") -> Drive:
    """One request of *address*, to its end."""
    return await drive(stage.app, http_scope(path, client=(address, 1)))


async def slots(stage: Stage) -> int:
    """How many are taken."""
    _, state = await stage.metering.store.read(EverythingKept())
    return sum(map(len, state.leases.values()))


@pytest.mark.parametrize("ending", ["completes", "raises", "fails", "breaks early", "client leaves", "server cancels"])
def test_free_a_slot_however_its_call_ends(ending: str) -> None:
    """S0.56, S3.46: of an address two streams run at once and a third is refused, until one of them ends, somehow."""

    async def play() -> None:
        streams = Streams(ending)
        path = "/broken" if ending == "breaks early" else "/"
        async with staged(streams.app()) as stage:
            streams.metering = stage.metering
            begun = [Drive(stage.app, http_scope(path, client=("10.0.0.1", 1))) for _ in range(SLOTS)]
            async with begun[0] as first, begun[1] as second:
                async with asyncio.timeout(5):
                    while await slots(stage) < SLOTS:
                        await asyncio.sleep(0)
                assert status((await asked(stage, path)).log) == 429
                assert status((await asked(stage, "/look")).log) == 200
                if ending == "client leaves":
                    first.disconnect()
                elif ending == "server cancels":
                    assert first.task is not None
                    first.task.cancel()
                else:
                    streams.go_on.set()
                await first.ended()
                streams.go_on.set()
                await second.ended()
            await stage.booked()
            assert await slots(stage) == 0
            assert status((await asked(stage, path)).log) == (500 if path == "/broken" else 200)

    asyncio.run(play())


def test_keep_the_slot_of_a_call_that_waits_for_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    """S0.48: a call that does nothing, as for an approval, keeps its slot over many lives of a lease, and no longer."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        approved = asyncio.Event()

        @rate_limited(concurrency=1)
        async def endpoint(_request: Request) -> Response:
            await approved.wait()
            return Response()

        async with staged(Starlette(routes=[Route("/", endpoint)]), ttl_s=0.2) as stage:
            lease = stage.metering.store
            async with Drive(stage.app, http_scope("/", client=("10.0.0.1", 1))) as waiting:

                async def expires_at() -> float:
                    _, state = await lease.read(EverythingKept())
                    return max((each.expires_at for rows in state.leases.values() for each in rows.values()), default=0)

                async with asyncio.timeout(10):
                    while not (first := await expires_at()):
                        await asyncio.sleep(0)
                    while await expires_at() < first + 0.6:
                        await asyncio.sleep(0.001)
                assert status((await asked(stage)).log) == 429
                approved.set()
                await waiting.ended()
            await stage.booked()
            assert status((await asked(stage)).log) == 200

    asyncio.run(play())


def test_occupy_no_slot_with_what_comes_after_the_answer() -> None:
    """S0.55: whoever takes the usage events may be slow: the slot is free as soon as the call has ended."""

    async def play() -> None:
        taken, free = asyncio.Event(), asyncio.Event()

        async def slow(_events: Any) -> None:
            taken.set()
            await free.wait()

        @rate_limited(concurrency=1)
        @billable(1)
        async def endpoint(_request: Request) -> Response:
            return Response()

        app = Starlette(routes=[Route("/", endpoint)])
        async with staged(app, sinks=[CallbackSink(slow, "slow")]) as stage:
            assert status((await asked(stage)).log) == 200
            await within(5, taken.is_set)
            for _ in range(2):
                assert status((await asked(stage)).log) == 200
                await stage.booked()
            assert await slots(stage) == 0
            free.set()

    asyncio.run(play())
