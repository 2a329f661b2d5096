"""Handlers that go on for a client that left: what they are shown, how far they may go, and what it costs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket

from asgi_metering import Caller, Drain, Idempotency, billable, current_call, metered_app, slices
from asgi_metering.asgi.body import may_have_body
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices import per_token
from asgi_metering.rules.ending import EndPolicy, Situation
from tests.harness.drive import Drive, body, http_scope
from tests.pitfalls.stage import PAYER, staged, within
from tests.pitfalls.streams import delta, events, plain, starlette

PER_TOKEN = per_token(input=1, output=1)
WORDS = ("a", "b", "c")
USED = 11 * 1_000_000
"""What the usage at the end of the stream costs: 9 tokens in, 2 out."""

SPECS = pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
"""A disconnect is a message of `receive`, or an `OSError` of `send`."""


def drained(**options: Any) -> Any:
    """A chat stream whose route lets it finish."""

    @billable(PER_TOKEN, hold=100, line="chat", **{"on_disconnect": "drain", **options})
    async def chat(_request: Request) -> StreamingResponse:
        return StreamingResponse(events(*WORDS), media_type="text/event-stream")

    return starlette(chat)


async def left(request: Request, left: asyncio.Event) -> None:
    """Hear the whole request, and wait for its client to leave, which is not shown."""
    await request.receive()
    hears = asyncio.ensure_future(request.receive())
    await left.wait()
    await asyncio.wait([hears], timeout=0.01)
    assert not hears.done()
    hears.cancel()


async def leave(stage: Any, gone: asyncio.Event) -> Drive:
    """A request whose client leaves before the response; *gone* is set then."""
    async with Drive(stage.app, http_scope("/")) as run:
        await within(5, lambda: bool(run.received))
        run.disconnect()
        await within(5, lambda: stage.metering.runtime().draining == 1)
        gone.set()
        await run.ended()
        await stage.booked()
        return run


def play(app: Any, test: Callable[[Any], Any], **options: Any) -> None:
    """Run *test* on a stage with *app*."""

    async def run() -> None:
        async with staged(app, **options) as stage:
            await test(stage)

    asyncio.run(run())


@SPECS
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_charge_what_a_handler_used_that_went_on(spec_version: str, at: int) -> None:
    """
    Wherever the client leaves, before the start or between any two events, the stream runs to its usage, and that is
    charged as if the client had stayed; the event says that it did not.
    """

    async def test(stage: Any) -> None:
        ended = await stage.drive(spec_version=spec_version, disconnect_at=at)
        assert ended.outcome == "returned"
        (charge,) = await stage.charges()
        assert (str(charge.basis), charge.amount) == ("usage", USED)
        assert await stage.outcomes() == ["client_gone"]
        assert stage.events[0].reason == "completed, usage reported"
        assert stage.metering.runtime().draining == 0

    play(drained(), test)


@SPECS
def test_send_nothing_to_a_client_that_left(spec_version: str) -> None:
    """What the handler sends behind the disconnect is not handed to the server."""

    async def test(stage: Any) -> None:
        ended = await stage.drive(spec_version=spec_version, disconnect_at=2)
        # A server that raises from `send` is how the disconnect was seen.
        assert len(ended.log) == (3 if spec_version == "2.4" else 2)

    play(drained(), test)


def test_show_no_disconnect_while_a_handler_goes_on() -> None:
    """`is_disconnected` answers no, and whoever waits for the disconnect goes on waiting, until the handler is done."""
    seen: list[bool] = []

    async def words(request: Request) -> AsyncIterator[bytes]:
        yield delta("a")
        for _ in range(10):
            await asyncio.sleep(0)
        seen.append(await request.is_disconnected())
        async for event in events("b"):
            yield event

    @billable(PER_TOKEN, hold=100, on_disconnect="drain")
    async def chat(request: Request) -> StreamingResponse:
        return StreamingResponse(words(request), media_type="text/event-stream")

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=2)
        assert seen == [False]
        assert await stage.basis() == ("usage",)

    play(starlette(chat), test)


def test_observe_what_a_handler_did_that_went_on_for_too_long() -> None:
    """Beyond its time the disconnect is shown: the stream ends as without draining, and what passed is observed."""

    async def endless() -> AsyncIterator[bytes]:
        yield delta("a")
        await asyncio.Event().wait()

    @billable(PER_TOKEN, hold=100, on_disconnect=Drain(within_s=0.05))
    async def chat(_request: Request) -> StreamingResponse:
        return StreamingResponse(endless(), media_type="text/event-stream")

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=2)
        assert await stage.basis() == ("observed",)
        assert await stage.outcomes() == ["client_gone"]
        assert stage.events[0].reason == "client gone after the first byte"
        assert stage.metering.runtime().draining == 0

    play(starlette(chat), test)


def test_observe_what_a_handler_did_that_sent_too_much() -> None:
    """Beyond its bytes `send` raises as for a client that left, which the server does not hear of."""
    sent = 0

    @plain
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            try:
                await send({"type": "http.response.body", "body": b"x" * 1_000, "more_body": True})
            except OSError as told:
                # As a framework does.
                raise ClientDisconnect from told
            sent += 1

    async def test(stage: Any) -> None:
        ended = await stage.drive(spec_version="2.4", disconnect_at=2)
        assert ended.outcome == "returned"
        # Two more than fit: the one that arrived, and the one that showed that the client had left.
        assert sent == 13
        # Of a fixed price a byte went out.
        assert await stage.basis() == ("observed",)

    play(metered_app(app, billable(2, on_disconnect=Drain(most_bytes=11_000))), test)


def test_charge_nothing_for_a_handler_that_failed_before_anybody_got_a_byte() -> None:
    """An exception behind the disconnect is the client's having left: before the first byte nothing was observed."""
    gone = asyncio.Event()

    @billable(2, on_disconnect="drain")
    async def broken(request: Request) -> Response:
        await left(request, gone)
        raise RuntimeError("no answer")

    async def test(stage: Any) -> None:
        await leave(stage, gone)
        assert await stage.charges() == []
        assert await stage.outcomes() == ["client_gone"]

    play(starlette(broken), test)


def test_charge_a_fixed_price_for_work_that_was_finished_for_nobody() -> None:
    """A client that left before the first byte pays the price, once the handler has done its work."""
    gone = asyncio.Event()

    @billable(2, on_disconnect="drain")
    async def slow(request: Request) -> Response:
        await left(request, gone)
        return JSONResponse({})

    async def test(stage: Any) -> None:
        ended = await leave(stage, gone)
        assert ended.log == []
        assert [charge.amount for charge in await stage.charges()] == [2_000_000]

    play(starlette(slow), test)


def test_stop_one_handler_too_many() -> None:
    """Of more handlers that would go on than may, the others are shown the disconnect, and counted."""

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=2)
        assert await stage.basis() == ("observed",)
        assert sum(stage.metering.meters.totals("drains_refused").values()) == 1

    play(drained(), test, max_draining=0)


def test_stop_watching_for_what_is_known() -> None:
    """Behind a layer that raises `OSError` for a client that left, a route that drains goes on all the same."""

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=2)
        assert await stage.basis() == ("usage",)

    play(drained(), test, layer={"stop_on_disconnect": True})


def test_drain_late_and_not_early() -> None:
    """What a client pays that left before the first byte may be another choice than that of one that left later."""

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=0, spec_version="2.4")
        await stage.drive(disconnect_at=3)
        assert await stage.basis() == ("usage",)

    play(drained(on_early_disconnect="none"), test)


def test_let_nobody_go_on_who_pays_nothing() -> None:
    """A caller who is exempt has no charge that could be finished: the disconnect is shown as on any other route."""

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=3)
        await within(5, lambda: bool(stage.events))
        assert (stage.events[0].outcome, stage.events[0].reason) == ("client_gone", "client gone after the first byte")

    play(drained(), test, identify=lambda _: Caller(PAYER, exempt=True))


def test_show_the_disconnect_to_who_waits_for_the_rest_of_a_request() -> None:
    """A handler that has not heard all of the request cannot finish it, and is not kept waiting for the rest."""

    @billable(2, on_disconnect="drain")
    async def upload(request: Request) -> Response:
        return JSONResponse({"size": len(await request.body())})

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=0, headers=[("content-length", "5")])
        assert await stage.charges() == []
        async with Drive(stage.app, http_scope("/"), messages=[{"type": "http.request", "more_body": True}]) as run:
            await within(5, lambda: bool(run.received))
            run.disconnect()
            await run.ended()
        await stage.booked()
        assert await stage.charges() == []
        assert await stage.outcomes() == ["client_gone", "client_gone"]

    play(starlette(upload), test)


@pytest.mark.parametrize("framed", [[], [("content-length", "0")]])
def test_go_on_for_who_left_before_anything_was_heard(framed: Any) -> None:
    """
    A request without a body is heard as a whole before anybody asks for it: who left while its endpoint worked, which
    never asked, is shown to nobody, and pays.
    """
    gone = asyncio.Event()

    @billable(PER_TOKEN, hold=100, on_disconnect="drain")
    async def slow() -> StreamingResponse:
        await gone.wait()
        return StreamingResponse(events(*WORDS), media_type="text/event-stream")

    app = FastAPI()
    app.get("/")(slow)

    async def test(stage: Any) -> None:
        async with Drive(stage.app, http_scope("/", headers=framed)) as run:
            await within(5, lambda: bool(stage.metering.runtime().in_flight))
            run.disconnect()
            gone.set()
            assert await run.ended() == "returned"
        await stage.booked()
        assert [charge.amount for charge in await stage.charges()] == [USED]

    play(app, test)


@pytest.mark.parametrize(
    ("scope", "says"),
    [
        ({"headers": [(b"content-length", b"5")]}, True),
        ({"headers": [(b"transfer-encoding", b"chunked")]}, True),
        ({"headers": [(b"content-length", b"0")], "http_version": "2", "method": "POST"}, False),
        ({"headers": [], "http_version": "2", "method": "POST"}, True),
        ({"headers": [], "http_version": "2", "method": "GET"}, False),
        ({"headers": [], "http_version": "1.1", "method": "POST"}, False),
        ({}, False),
    ],
)
def test_tell_a_request_that_may_have_a_body(scope: Any, says: bool) -> None:
    """By its fields; over HTTP/2 a body comes without any, but not where the method has none by custom."""
    assert may_have_body(scope) is says


def test_go_on_although_the_server_says_it_twice() -> None:
    """The disconnect is heard while a message waits in `send`, which then raises: both say that one client has left."""
    heard = asyncio.Event()

    @plain
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        hears = asyncio.ensure_future(receive())
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body", "body": b"x"})
        hears.cancel()

    async def test(stage: Any) -> None:
        messages = [{"type": "http.request"}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await heard.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                heard.set()
                await within(5, lambda: stage.metering.runtime().draining == 1)
                raise OSError("The client has gone.")

        await stage.app(http_scope("/"), receive, send)
        await stage.booked()
        assert await stage.basis() == ("usage",)

    play(metered_app(app, billable(2, on_disconnect="drain")), test)


def test_keep_the_listener_of_a_layer_that_watches() -> None:
    """Whoever waits for the disconnect, which the layer's watch hears first, goes on waiting, and is not cancelled."""
    heard: list[bool] = []

    @plain
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        hears = asyncio.ensure_future(receive())
        for _ in range(5):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await asyncio.wait([hears], timeout=0.01)
        heard.append(hears.done())
        await send({"type": "http.response.body", "body": b"x"})
        hears.cancel()

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=3)
        assert heard == [False]
        assert await stage.outcomes() == ["client_gone"]
        assert await stage.basis() == ("usage",)

    play(metered_app(app, billable(2, on_disconnect="drain")), test, layer={"stop_on_disconnect": True})


def test_go_on_from_a_message_that_the_server_never_takes() -> None:
    """Behind a layer that watches, a `send` that does not return for a client that left holds no handler up."""

    async def test(stage: Any) -> None:
        async with Drive(stage.app, http_scope("/"), hang_at=3) as run:
            await run.hung.wait()
            run.hung.clear()
            run.disconnect()
            assert await run.ended() == "returned"
        await stage.booked()
        assert await stage.basis() == ("usage",)

    play(drained(), test, layer={"stop_on_disconnect": True})


def test_charge_what_was_finished_in_time_however_long_its_tasks_run() -> None:
    """The time ends with the last message: what runs behind it changes nothing."""
    gone = asyncio.Event()
    running: Any = None

    async def behind() -> None:
        await within(5, lambda: not running.in_flight)

    @billable(2, on_disconnect=Drain(within_s=1.0))
    async def slow(request: Request) -> Response:
        nonlocal running
        running = current_call().metering.runtime()
        await left(request, gone)
        return JSONResponse({}, background=BackgroundTask(behind))

    async def test(stage: Any) -> None:
        await leave(stage, gone)
        assert await stage.basis() == ("usage",)

    play(starlette(slow), test)


def test_count_a_handler_too_many_once() -> None:
    """A handler that may not go on is told so by each of its messages, and counts once."""

    @plain
    async def app(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(5):
            with suppress(OSError):
                await send({"type": "http.response.body", "body": b"x", "more_body": True})

    async def test(stage: Any) -> None:
        await stage.drive(disconnect_at=2, spec_version="2.4")
        assert sum(stage.metering.meters.totals("drains_refused").values()) == 1

    play(metered_app(app, billable(2, on_disconnect="drain")), test, max_draining=0)


def test_keep_the_whole_answer_for_who_asks_again() -> None:
    """Whoever lost the connection and repeats the request with its key gets all of the answer, at no further charge."""

    async def test(stage: Any) -> None:
        key = [("idempotency-key", "k")]
        await stage.drive(disconnect_at=2, headers=key)
        again = await stage.drive(headers=key)
        assert body(again.log) == b"".join([event async for event in events(*WORDS)])
        assert [charge.amount for charge in await stage.charges()] == [USED]

    play(drained(idempotency=Idempotency(store_body=65_536)), test)


def test_end_what_the_server_cancels() -> None:
    """A server that cancels the handler, as some do for a client that left, is not withstood."""

    async def endless() -> AsyncIterator[bytes]:
        yield delta("a")
        await asyncio.Event().wait()

    @billable(PER_TOKEN, hold=100, on_disconnect="drain")
    async def chat(_request: Request) -> StreamingResponse:
        return StreamingResponse(endless(), media_type="text/event-stream")

    async def test(stage: Any) -> None:
        async with Drive(stage.app, http_scope("/"), disconnect_at=2) as run:
            await within(5, lambda: stage.metering.runtime().draining == 1)
            assert run.task is not None
            run.task.cancel()
            assert await run.ended() == "cancelled"
        await stage.booked()
        assert await stage.basis() == ("observed",)
        assert stage.metering.runtime().draining == 0

    play(starlette(chat), test)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_disconnect": "drown"}, "'drown' is no policy .* Choose one of 'observed', .*'hold', 'drain'"),
        ({"on_disconnect": Drain, "hold": 5}, "is no policy"),
        ({"on_error": "drain"}, "'drain' is no policy"),
        ({"on_disconnect": "drain", "hold": slices("1")}, "lets a handler finish on what it holds"),
    ],
)
def test_refuse_what_cannot_be_drained(options: Any, says: str) -> None:
    """A choice that does not exist, or that nothing could be drained with, is refused at import."""
    with pytest.raises(ConfigurationError, match=says):
        billable(PER_TOKEN, **options)


@pytest.mark.parametrize(
    "bounds",
    [{"within_s": 0}, {"within_s": True}, {"within_s": "1"}, {"within_s": 1e9}, {"most_bytes": 0}, {"most_bytes": 1.5}],
)
def test_refuse_bounds_that_are_none(bounds: Any) -> None:
    """Seconds above 0 and up to an hour, and bytes from 1 up."""
    with pytest.raises(ConfigurationError, match=next(iter(bounds))):
        Drain(**bounds)


def test_refuse_to_drain_what_no_client_leaves() -> None:
    """Only for a client that left is there anything to drain."""
    with pytest.raises(ConfigurationError, match="Nothing can be drained of a call that ends as 'cut'"):
        EndPolicy({}, {Situation.CUT: Drain()})


def test_refuse_to_drain_a_websocket() -> None:
    """Nothing goes on over a WebSocket that is closed: the route is refused at startup, with the mend."""

    @billable(2, on_disconnect="drain")
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()

    async def test(_stage: Any) -> None:
        raise AssertionError("it has started")

    with pytest.raises(RuntimeError, match=r"nothing goes on over a WebSocket that is closed\. Leave it out"):
        play(Starlette(routes=[WebSocketRoute("/", talk)]), test)
