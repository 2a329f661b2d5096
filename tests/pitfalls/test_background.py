"""Pitfalls 30 to 33: what works beside the requests, and what a shutdown and a kill leave to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from decimal import Decimal
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from asgi_metering import (
    Caller,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    billable,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.opening import CURRENT
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Emit, End, WalletSource
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock
from tests.harness.drive import Drive, drive, http_scope, lifespan, status
from tests.pitfalls.stage import PAYER, StuckAt, staged, within
from tests.pitfalls.streams import delta, events, plain, sse, starlette


def test_background_tasks_do_not_inherit_a_requests_variables() -> None:
    """Pitfall 30: a worker started by a request knows nothing of that request, or it would keep it alive."""
    seen: list[Any] = []

    class Asking(MemoryStore):
        """Notes in whose context free work is reported: the worker does that."""

        def run_now(self, operation: Any) -> Any:
            if isinstance(operation, Emit):
                seen.append(CURRENT.get())
            return super().run_now(operation)

    async def play() -> None:
        # Nothing has used this metering before: the requests themselves start its background.
        sinks = [CallbackSink(lambda _events: None)]
        metering = Metering(Asking(), identify=lambda _connection: Caller(PAYER), sinks=sinks)
        free = metered_app(plain(answering), rate_limited("10/minute"), billable(0))
        app = MeteringMiddleware(free, metering=metering)
        for _ in range(2):
            await drive(app, http_scope("/"))
        await within(5, lambda: len(seen) == 2)
        assert seen == [None, None]
        await metering.stop()

    asyncio.run(play())


WHERE: ContextVar[str] = ContextVar("WHERE", default="nowhere")


class Noting:
    """A price that notes which task asks for it, and what that task knows."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def cost(self, usage: TokenUsage) -> Decimal:
        """One unit a token."""
        task = asyncio.current_task()
        self.asked.append(("" if task is None else task.get_name(), WHERE.get()))
        return Decimal(usage.output or 0)

    def affordable(self, _kind: str, units: Decimal, _used: TokenUsage) -> int:
        """As many tokens as units."""
        return int(units)


def test_looks_at_a_call_do_not_inherit_its_variables() -> None:
    """Pitfall 30: the tasks that look at what a call has used know nothing of whoever runs it."""
    price = Noting()

    def looks() -> list[str]:
        return [known for task, known in price.asked if task.startswith("asgi_metering growth")]

    async def play() -> None:
        async with Metering(MemoryStore(), sinks=()) as metering:
            await metering.grant(PAYER, 100, id="g")
            WHERE.set("request")
            async with metering.charge(payer=PAYER, line="job", price=price, hold=slices(9)) as call:
                call.record(TokenUsage(output=1))
                await within(5, looks)
        assert set(looks()) == {"nowhere"}
        assert WHERE.get() == "request"

    asyncio.run(play())


async def answering(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that answers nothing."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


def test_shutdown_waits_for_a_stream_in_flight() -> None:
    """Pitfall 31: the app hears of its shutdown only when the calls in flight have ended: its pools are open still."""
    free = asyncio.Event()
    closed_while_streaming: list[bool] = []

    @asynccontextmanager
    async def pools(_app: Any) -> AsyncIterator[None]:
        yield
        closed_while_streaming.append(not free.is_set())

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            await free.wait()
            yield b"b"

        return StreamingResponse(body())

    async def play() -> None:
        async with staged(Starlette(routes=[Route("/", endpoint)], lifespan=pools)) as stage:
            run = Drive(stage.app, http_scope("/"))
            await run.__aenter__()
            await within(5, lambda: len(run.log) >= 2)
            asyncio.get_running_loop().call_later(0.05, free.set)
        assert closed_while_streaming == [False]
        assert await run.ended() == "returned"
        assert await stage.basis() == ("usage",)
        await run.__aexit__()

    asyncio.run(play())


@pytest.mark.parametrize("other", ["application", "application that broke", "block"])
def test_other_users_of_a_metering_leave_the_calls_of_an_application_alone(other: str) -> None:
    """Pitfall 31: another application's shutdown, or a block inside of this one, ends and stops nothing of it."""
    free = asyncio.Event()

    @rate_limited(concurrency=1)
    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            await free.wait()
            yield b"b"

        return StreamingResponse(body())

    async def use(metering: Metering) -> None:
        if other == "block":
            async with metering:
                return
        second = starlette(endpoint) if other == "application" else plain(answering)
        with suppress(LookupError):
            async with lifespan(MeteringMiddleware(second, metering=metering)):
                if other != "application":
                    raise LookupError("The server goes down at once.")

    async def play() -> None:
        async with staged(starlette(endpoint), drain_s=0.05) as stage:
            async with Drive(stage.app, http_scope("/")) as run:
                await within(5, lambda: len(run.log) >= 2)
                await use(stage.metering)
                assert len(await stage.metering.holds()) == 1
                assert status((await drive(stage.app, http_scope("/"))).log) == 429
                free.set()
                assert await run.ended() == "returned"
            await stage.booked()
            assert await stage.basis() == ("usage",)
            assert stage.metering.runtime().managed

        runtime = stage.metering.runtime()
        assert (runtime.managed, runtime.lifespans, runtime.blocks) == (False, 0, 0)

    asyncio.run(play())


def test_the_last_block_of_a_metering_stops_it() -> None:
    """Of blocks at once each may end before the others, whose calls go on; the last one waits for its own end."""

    async def play() -> None:
        metering = Metering(sinks=(), drain_s=0.05)
        async with metering:
            await metering.grant(PAYER, 5, id="g")
            async with metering.charge(payer=PAYER, line="work", price=per_token(output=1), hold=2) as call:
                async with metering:
                    pass
                call.record(TokenUsage(output=1))
            assert call.receipt is not None
            assert (call.receipt.amount, call.receipt.basis) == (1_000_000, Basis.USAGE)

    asyncio.run(play())


def test_shutdown_ends_what_does_not_end_by_itself() -> None:
    """Pitfall 31: the wait is bounded; a stream that never ends is aborted, and charged as its policy says."""

    @billable(2, on_abort="hold")
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            await asyncio.Event().wait()

        return StreamingResponse(body())

    async def play() -> None:
        async with staged(starlette(endpoint), drain_s=0.05) as stage:
            run = Drive(stage.app, http_scope("/"))
            await run.__aenter__()
            await within(5, lambda: len(run.log) >= 2)
        assert await stage.outcomes() == ["aborted"]
        assert await stage.basis() == ("hold",)
        await run.__aexit__()

    asyncio.run(play())


def test_without_a_lifespan_the_request_waits_for_its_own_end() -> None:
    """Pitfall 32: where no lifespan comes (daphne), nobody holds a shutdown, so the app returns only when booked."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        return sse(events("a"))

    async def play() -> None:
        store = StuckAt(End)
        async with staged(starlette(endpoint), with_lifespan=False, store=store) as stage:
            async with Drive(stage.app, http_scope("/")) as run:
                await store.asked.wait()
                assert run.complete.is_set()
                assert run.outcome is None
                store.answer.set()
                assert await run.ended() == "returned"
            assert await stage.basis() == ("usage",)

    asyncio.run(play())


def test_killed_process_leaves_a_hold_that_expires_and_is_ended_by_its_policy() -> None:
    """Pitfall 33: nothing runs after kill -9; the hold goes in doubt by time, and the next admission ends it."""
    clock = FakeClock(1_000.0)

    @billable(2, on_abort="hold", ttl_s=60, grace_s=30)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({})

    async def play() -> None:
        store = MemoryStore(clock)
        async with staged(starlette(endpoint), store=store) as stage:
            dead = Admit("dead", PAYER, "credits", 7, 7, (WalletSource(),), in_doubt=Basis.HOLD, ttl_s=60, grace_s=30)
            await store.admit([dead])
            clock.advance(91)
            await stage.drive()
            assert [(entry.amount, str(entry.basis)) for entry in await stage.charges()] == [
                (7, "hold"),
                (2_000_000, "usage"),
            ]

    asyncio.run(play())


def test_heartbeats_keep_the_hold_of_a_long_stream() -> None:
    """Pitfall 33: a stream longer than its hold's life is renewed while it runs, and carries what was observed."""

    @billable(per_token(output="0.01"), hold=5, ttl_s=0.3, grace_s=60)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield delta("one two three")
            await free.wait()

        return sse(body())

    free = asyncio.Event()

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage, Drive(stage.app, http_scope("/")) as run:
            await within(5, lambda: len(run.log) >= 2)
            (hold,) = await stage.metering.holds()
            async with asyncio.timeout(5):
                while not (now := (await stage.metering.holds())[0]).observed:
                    await asyncio.sleep(0.01)
            assert now.expires_at > hold.expires_at
            assert now.observed == 30_000
            free.set()
            await run.ended()
            await stage.booked()

    asyncio.run(play())
