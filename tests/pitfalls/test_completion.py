"""Pitfalls 22 to 33, 35, 36 and 38: how a call ends, what it costs then, and that it costs it once."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

from asgi_metering import (
    Caller,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
)
from asgi_metering.call import CURRENT
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, Emit, End, WalletSource
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock
from tests.harness.drive import Drive, drive, http_scope
from tests.pitfalls.stage import PAYER, staged, within

USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}}


def starlette(endpoint: Any, *middleware: Any) -> Starlette:
    """An application with one endpoint."""
    app = Starlette(routes=[Route("/", endpoint, methods=["GET", "POST"])])
    for layer in middleware:
        app.add_middleware(layer)
    return app


class Passing(BaseHTTPMiddleware):
    """A middleware of the kind that fabricates ends."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        """Pass on."""
        return await call_next(request)


def delta(text: str) -> bytes:
    """One event of a chat stream."""
    chunk = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def plain(app: Any) -> Any:
    """*app* as an ASGI app that knows HTTP only, as small apps do."""

    async def only_http(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(f"Unknown scope {scope['type']!r}.")
        await app(scope, receive, send)

    return only_http


async def events(*texts: str, usage: bool = True) -> AsyncIterator[bytes]:
    """A chat stream."""
    for text in texts:
        yield delta(text)
    if usage:
        yield b"data: " + json.dumps(USAGE).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"


def sse(body: AsyncIterator[bytes], **options: Any) -> StreamingResponse:
    """A response of server-sent events."""
    return StreamingResponse(body, media_type="text/event-stream", **options)


def test_settles_a_stream_that_starlette_cancels_behind_its_last_message() -> None:
    """Pitfall 22: a StreamingResponse's task group is cancelled the moment its end is out; the call is booked still."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        return sse(events("a", "b"))

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert ended.outcome == "returned"
            assert await stage.basis() == ("usage",)
            assert await stage.outcomes() == ["completed"]

    asyncio.run(play())


def test_settles_a_file(tmp_path: Path) -> None:
    """Pitfall 22: a FileResponse is charged when its last piece is out."""
    (tmp_path / "report").write_bytes(b"x" * 200_000)

    @billable(2)
    async def endpoint(_request: Request) -> FileResponse:
        return FileResponse(tmp_path / "report")

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert [entry.amount for entry in await stage.charges()] == [2_000_000]

    asyncio.run(play())


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


def test_never_awaits_the_ledger_in_send() -> None:
    """Pitfall 22: while the store is stuck with a call's end, the client has its whole response and the app returns."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        return sse(events("a"))

    async def play() -> None:
        store = StuckAt(End)
        async with staged(starlette(endpoint), store=store) as stage:
            ended = await drive(stage.app, http_scope("/"))
            assert ended.outcome == "returned"
            assert ended.complete.is_set()
            assert await stage.charges() == []
            store.answer.set()
            await stage.booked()
            assert await stage.basis() == ("usage",)

    asyncio.run(play())


@pytest.mark.parametrize("disconnect_at", [1, 2, 3])
def test_first_cause_wins_and_settles_once(disconnect_at: int) -> None:
    """Pitfall 23: whichever way a call ends, by message, exception or return, it ends once."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            yield b"b"
            raise RuntimeError("The model broke.")

        return StreamingResponse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=disconnect_at)
            assert len(await stage.outcomes()) == 1

    asyncio.run(play())


def test_disconnect_before_the_end_beats_a_completion() -> None:
    """Pitfall 23: an app that finishes its answer after the client left was not completed."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.body", "body": b"end"})

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            await stage.drive(disconnect_at=2)
            assert await stage.outcomes() == ["client_gone"]
            assert await stage.basis() == ("observed",)

    asyncio.run(play())


def test_disconnect_after_the_end_is_a_completion() -> None:
    """Pitfall 23: servers report a disconnect after every response; it takes nothing back."""

    @billable(2, on_disconnect="none")
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive(disconnect_at=2)
            assert ended.complete.is_set()
            assert await stage.outcomes() == ["completed"]

    asyncio.run(play())


def test_error_that_base_http_middleware_hides_behind_a_clean_end_is_an_error() -> None:
    """Pitfall 24: BaseHTTPMiddleware sends a clean last message when the app breaks; the exception follows."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"a"
            raise RuntimeError("The model broke.")

        return StreamingResponse(body())

    async def play() -> None:
        async with staged(starlette(endpoint, Passing)) as stage:
            ended = await stage.drive()
            assert ended.exception is not None
            assert await stage.outcomes() == ["error"]
            assert await stage.charges() == []

    asyncio.run(play())


def test_background_task_does_not_delay_the_end() -> None:
    """Pitfall 24: a long background task runs on, while its call is booked after the grace."""
    free = asyncio.Event()

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({}, background=BackgroundTask(free.wait))

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage, Drive(stage.app, http_scope("/")) as run:
            await run.complete.wait()
            await stage.booked()
            assert run.outcome is None
            assert await stage.basis() == ("usage",)
            free.set()
            assert await run.ended() == "returned"

    asyncio.run(play())


def test_end_does_not_delay_the_background_task() -> None:
    """Pitfall 24: the background task starts before its call is booked."""
    seen: list[int] = []

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            stages.append(stage)
            await stage.drive()
            assert seen == [0]

    stages: list[Any] = []

    async def background() -> None:
        seen.append(len(await stages[0].charges()))

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({}, background=BackgroundTask(background))

    asyncio.run(play())


@pytest.mark.parametrize("gone", [True, False])
def test_return_without_an_end_is_no_success(gone: bool) -> None:
    """Pitfall 25: an app that returns without a last message was left by its client, or stopped by its server."""

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        if gone:
            await receive()

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2, on_disconnect="none", on_abort="hold"))) as stage:
            await stage.drive(disconnect_at=2 if gone else None)
            assert await stage.outcomes() == ["client_gone" if gone else "aborted"]
            assert await stage.basis() == (() if gone else ("hold",))

    asyncio.run(play())


def test_return_without_a_start_is_no_success() -> None:
    """Pitfall 25: Quart and Django cancel an endpoint whose client left and return without any message."""

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        await receive()
        await receive()

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            await stage.drive(disconnect_at=0)
            assert await stage.outcomes() == ["client_gone"]
            assert await stage.charges() == []

    asyncio.run(play())


def test_burst_that_never_waits_lets_others_notice_the_client_that_left() -> None:
    """Pitfall 26: a burst gives the loop a turn every 256 KiB, so that a listener sees the disconnect in its midst."""
    sent = 0

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await receive()
        listener = asyncio.create_task(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1_000):
            if listener.done():
                return
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            sent += 1

    async def server_send(_message: Any) -> None:
        """A server's `send` that never waits."""

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            messages = [{"type": "http.request", "body": b""}]

            async def receive() -> Any:
                return messages.pop() if messages else {"type": "http.disconnect"}

            await stage.app(http_scope("/"), receive, server_send)
            await stage.booked()
            assert sent < 10
            assert await stage.outcomes() == ["client_gone"]

    asyncio.run(play())


def test_send_that_never_returns_is_ended_by_its_age() -> None:
    """Pitfall 27: hypercorn's HTTP/2 may never return from `send`; the call is ended when it is too old."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({})

    async def play() -> None:
        async with (
            staged(starlette(endpoint), max_call_s=0.2) as stage,
            Drive(stage.app, http_scope("/"), hang_at=1) as run,
        ):
            assert await run.ended() == "hung"
            await stage.booked()
            assert await stage.outcomes() == ["aborted"]
            assert await stage.charges() == []

    asyncio.run(play())


def test_watch_sees_the_client_leave_an_app_that_never_looks() -> None:
    """Pitfall 27: with stop_on_disconnect the disconnect is seen although the app never asks for it."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        await _request.body()
        return JSONResponse({})

    async def play() -> None:
        async with (
            staged(starlette(endpoint), layer={"stop_on_disconnect": True}) as stage,
            Drive(stage.app, http_scope("/", "POST"), body=b"{}", hang_at=1) as run,
        ):
            assert await run.ended() == "hung"
            run.disconnect()
            call = next(iter(stage.metering.runtime().in_flight.values()))
            await within(5, lambda: call.cause is not None)
            assert str(call.cause) == "client_gone"

    asyncio.run(play())


def test_watch_gives_the_app_every_message_in_order() -> None:
    """Pitfall 27: a server whose messages come once each gives every one of them to the app, read ahead or not."""
    received: list[str] = []

    async def play() -> None:
        server: asyncio.Queue[Any] = asyncio.Queue()

        async def app(_scope: Any, receive: Any, send: Any) -> None:
            received.extend([(await receive())["type"], (await receive())["type"]])
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            server.put_nowait({"type": "http.disconnect"})
            # Whoever reads ahead has read it by now.
            for _ in range(5):
                await asyncio.sleep(0)
            received.append((await receive())["type"])

        async def send(_message: Any) -> None:
            await asyncio.sleep(0)

        async with staged(metered_app(plain(app), billable(2)), layer={"stop_on_disconnect": True}) as stage:
            server.put_nowait({"type": "http.request", "body": b"one", "more_body": True})
            server.put_nowait({"type": "http.request", "body": b"two", "more_body": False})
            async with asyncio.timeout(5):
                await stage.app(http_scope("/", "POST"), server.get, send)
            assert received == ["http.request", "http.request", "http.disconnect"]

    asyncio.run(play())


def test_endless_stream_is_stopped_once_the_client_has_left() -> None:
    """Pitfall 28: an app that never listens goes on for ever, unless `send` raises once the client is gone."""
    stopped: list[Exception] = []

    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        try:
            while True:
                await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        except OSError as failure:
            stopped.append(failure)
            raise

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2)), layer={"stop_on_disconnect": True}) as stage:
            ended = await stage.drive(disconnect_at=5)
            assert len(stopped) == 1
            assert len(ended.log) < 50
            # The server has seen the client leave itself; an error from us would only fill its log.
            assert ended.outcome == "returned"
            assert await stage.outcomes() == ["client_gone"]

    asyncio.run(play())


@pytest.mark.parametrize("kind", ["starlette", "grouped", "its own"])
def test_only_the_departure_is_kept_from_the_server(kind: str) -> None:
    """Pitfall 28: what frameworks make of our `OSError` ends here, and an application's own failure rises."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def ticks() -> AsyncIterator[bytes]:
            while True:
                yield b"tick"

        if kind == "grouped":
            async with anyio.create_task_group() as group:
                group.start_soon(StreamingResponse(ticks()), scope, _never, send)
            return
        try:
            await StreamingResponse(ticks())({**scope, "asgi": {"spec_version": "2.4"}}, receive, send)
        except ClientDisconnect as departure:
            if kind == "its own":
                raise RuntimeError("The application's own cleanup failed.") from departure
            raise

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2)), layer={"stop_on_disconnect": True}) as stage:
            ended = await stage.drive(disconnect_at=5)
            assert ended.outcome == ("raised" if kind == "its own" else "returned")
            assert await stage.outcomes() == ["client_gone"]

    asyncio.run(play())


async def _never() -> Any:
    await asyncio.Event().wait()


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
def test_client_gone_by_message_or_by_os_error(spec_version: str) -> None:
    """Both ways in which servers show a client that left lead to the same end (ASGI below and from 2.4)."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            while True:
                yield b"tick"

        return StreamingResponse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=3, spec_version=spec_version)
            assert await stage.outcomes() == ["client_gone"]
            assert await stage.basis() == ("observed",)

    asyncio.run(play())


def test_admission_whose_caller_was_cancelled_is_given_back() -> None:
    """Pitfall 29: cancelled between the question to the store and its answer, the hold is released by its id."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        raise AssertionError("The endpoint must not run.")

    async def play() -> None:
        store = StuckAt(Admit)
        async with staged(starlette(endpoint), store=store) as stage, Drive(stage.app, http_scope("/")) as run:
            await store.asked.wait()
            assert run.task is not None
            run.task.cancel()
            await run.ended()
            store.answer.set()
            await store.answered.wait()
            await stage.booked()
            balance = await stage.metering.balance(PAYER)
            assert (balance.held, balance.settled) == (0, 0)

    asyncio.run(play())


def test_ends_survive_the_cancellation_of_their_request() -> None:
    """Pitfall 30: a request that is cancelled in its last message, twice, is booked by tasks that are not its own."""

    @billable(2, on_abort="hold")
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            while True:
                yield b"tick"

        return StreamingResponse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive(cancel_at=4)
            assert ended.outcome == "cancelled"
            assert await stage.outcomes() == ["aborted"]
            assert await stage.basis() == ("hold",)

    asyncio.run(play())


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


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_reads_usage_from_a_compressed_body(encoding: str) -> None:
    """Pitfall 35: GZip inside of the metering hides nothing: compressed usage is read."""
    text = json.dumps({"object": "chat.completion", **USAGE, "choices": [{}]}).encode()
    packed = gzip.compress(text) if encoding == "gzip" else zlib.compress(text)

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-encoding", encoding.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for byte in packed[:-1]:
            await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
        await send({"type": "http.response.body", "body": packed[-1:]})

    async def play() -> None:
        price = per_token(input=1, output=10)
        async with staged(metered_app(plain(app), billable(price, hold=100))) as stage:
            await stage.drive()
            assert [entry.amount for entry in await stage.charges()] == [29_000_000]

    asyncio.run(play())


def test_file_by_path_is_the_end_and_counts_as_sent() -> None:
    """Pitfall 36: `http.response.pathsend` is one message, the whole body and the end of the response."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
        await send({"type": "http.response.pathsend", "path": "/tmp/report"})

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            await stage.drive(extensions={"http.response.pathsend": {}})
            assert await stage.outcomes() == ["completed"]
            assert await stage.basis() == ("usage",)

    asyncio.run(play())


def test_trailers_end_the_response_that_announced_them() -> None:
    """Pitfall 36: with trailers announced, the last body message is not the end; the last trailers are."""

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [], "trailers": True})
        await send({"type": "http.response.body", "body": b"a"})
        if trailers:
            await send({"type": "http.response.trailers", "headers": [], "more_trailers": False})

    async def play() -> str:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            await stage.drive(extensions={"http.response.trailers": {}})
            return (await stage.outcomes())[0]

    trailers = True
    assert asyncio.run(play()) == "completed"
    trailers = False
    assert asyncio.run(play()) == "aborted"


def test_head_is_free_and_counts_no_bytes() -> None:
    """Pitfall 36: a HEAD request runs the endpoint of GET and is neither held, charged nor reported."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({"body": "that is not sent"})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive(method="HEAD")
            assert ended.outcome == "returned"
            assert await stage.charges() == []
            assert await stage.outcomes() == []

    asyncio.run(play())


def test_settles_although_the_generators_finally_never_ran() -> None:
    """Pitfall 38: an abandoned generator's `finally` may run much later or never; the end does not wait for it."""
    kept: list[Any] = []

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"tick"
            finally:
                finished.append(True)

        generator = body()
        kept.append(generator)
        return StreamingResponse(generator)

    finished: list[bool] = []

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=3)
            assert await stage.basis() == ("observed",)
            assert finished == []
            await kept[0].aclose()

    asyncio.run(play())


# -- what an end costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "usage", "left_at", "policy", "basis", "amount"),
    [
        pytest.param(("one two",), True, None, {}, "usage", 9 + 2 * 10, id="reported"),
        pytest.param(("one two",), False, None, {}, "estimate", 3 + 8 * 10, id="missing: estimate by default"),
        pytest.param(
            ("one two",), False, None, {"on_missing_usage": "observed"}, "observed", 3 + 2 * 10, id="observed"
        ),
        pytest.param(("one two",), False, None, {"on_missing_usage": "hold"}, "hold", 83, id="missing: hold"),
        pytest.param(("one two",), False, None, {"on_missing_usage": "none"}, None, 0, id="missing: none"),
        pytest.param(("one two", " three"), True, 2, {}, "observed", 3 + 2 * 10, id="left after one event"),
        pytest.param(("one two", " three"), True, 2, {"on_disconnect": "none"}, None, 0, id="left: none"),
        pytest.param(("one two", " three"), True, 2, {"on_disconnect": "hold"}, "hold", 83, id="left: hold"),
        pytest.param(("one two", " three"), True, 2, {"on_disconnect": "usage"}, "estimate", 83, id="left: usage"),
        pytest.param(("one",), True, 1, {}, None, 0, id="left before the first byte"),
        pytest.param(("one",), True, 1, {"on_early_disconnect": "hold"}, "hold", 83, id="left early: hold"),
    ],
)
def test_charges_what_the_routes_policy_says(
    texts: tuple[str, ...],
    usage: bool,
    left_at: int | None,
    policy: dict[str, Any],
    basis: str | None,
    amount: int,
) -> None:
    """Each way to end a token-priced stream is charged on the basis that its route chose (DESIGN, end of call)."""

    def estimate() -> Any:
        return TokenUsage(input=3, output=8)

    @rate_limited("1000/minute of tokens")
    @billable(per_token(input=1, output=10), hold=estimate, **policy)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            async for event in events(*texts, usage=usage):
                yield event
                if left_at is not None:
                    await asyncio.sleep(0.05)

        return sse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=left_at)
            charges = await stage.charges()
            assert [(entry.amount, str(entry.basis)) for entry in charges] == (
                [] if basis is None else [(amount * 1_000_000, basis)]
            )

    asyncio.run(play())


def test_in_band_failure_is_not_charged() -> None:
    """A stream that ends well but was marked as failed by the application costs nothing (S4.9, S4.10)."""

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b'data: {"error": "overloaded"}\n\n'
            current_call().fail("provider_overloaded")
            yield b"data: [DONE]\n\n"

        return sse(body())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert ended.complete.is_set()
            assert await stage.charges() == []
            assert await stage.outcomes() == ["error"]

    asyncio.run(play())


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_failed_answers_are_not_charged(status: int) -> None:
    """An answer of 400 or above costs nothing by default (X.3)."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({}, status)

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.charges() == []
            assert (await stage.metering.balance(PAYER)).held == 0

    asyncio.run(play())


def test_reported_zero_is_charged_as_zero() -> None:
    """A handler that reports zero tokens is charged zero, and not the estimate (S2.41)."""

    @billable(per_token(input=1, output=1), hold=50)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(input=0, output=0))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.charges() == []
            assert (await stage.metering.balance(PAYER)).held == 0

    asyncio.run(play())


def test_usage_beyond_the_hold_posts_in_full() -> None:
    """A call that used more than it held is charged for all of it, into debt if need be (S3.7)."""

    @billable(per_token(output=1), hold=5)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(output=1_500))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            balance = await stage.metering.balance(PAYER)
            assert (balance.settled, balance.available, balance.debt) == (1_500_000_000, -500_000_000, 500_000_000)

    asyncio.run(play())


def test_absurd_usage_never_stops_a_settlement() -> None:
    """Usage that no account could pay is refused to the hold, with an alarm, and the call ends all the same (S3.21)."""

    @billable(per_token(output=1_000_000_000), hold=5)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(output=10**12))
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            assert await stage.basis() == ("hold",)

    asyncio.run(play())
