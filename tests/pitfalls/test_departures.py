"""Pitfalls 26 to 29: clients and callers that leave, seen or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse

from asgi_metering import (
    billable,
    metered_app,
)
from asgi_metering.rules.operations import Admit
from tests.harness.drive import Drive, http_scope
from tests.pitfalls.stage import PAYER, StuckAt, staged, within
from tests.pitfalls.streams import plain, starlette


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
    """Pitfall 29, S3.30: cancelled between the question to the store and its answer, the hold is released by its id."""

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


@pytest.mark.parametrize(("has_left", "outcome", "basis"), [(True, "client_gone", ("hold",)), (False, "aborted", ())])
def test_client_that_left_before_its_handler_was_cancelled(has_left: bool, outcome: str, basis: tuple[str]) -> None:
    """Whom daphne cancels since it has not looked for ten seconds after its client left, no server has ended."""
    says = asyncio.Queue[Any]()

    @billable(2, on_abort="none", on_disconnect="hold")
    async def endpoint(_request: Request) -> JSONResponse:
        if has_left:
            says.put_nowait({"type": "http.disconnect"})
        raise asyncio.CancelledError

    async def server_send(_message: Any) -> None:
        raise AssertionError("There is nothing to be said.")

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            with pytest.raises(asyncio.CancelledError):
                await stage.app(http_scope("/"), says.get, server_send)
            await stage.booked()
            assert await stage.outcomes() == [outcome]
            assert await stage.basis() == basis

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
