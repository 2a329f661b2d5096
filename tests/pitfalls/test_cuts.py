"""Calls whose hold cannot grow any more: what the client gets, what stops the app, and what is charged (DESIGN 4)."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse
from starlette.responses import JSONResponse, Response, StreamingResponse

from asgi_metering import CallCut, TokenUsage, billable, current_call, metered_app, slices
from asgi_metering.asgi import cutting
from asgi_metering.holding import Slices
from asgi_metering.prices import per_token
from asgi_metering.rules.operations import Grow
from tests.harness.drive import Drive, body, drive, http_scope, status
from tests.pitfalls.stage import PAYER, Stage, StuckAt, staged, within
from tests.pitfalls.streams import Passing, delta, plain, sse, starlette

PRICE = per_token(output=50)
"""Twenty tokens are all that the stage's payer can pay."""

TOKENS = 20
SPREAD = 8
"""Tokens of an event or two, by which a burst may overshoot."""

chat = billable(PRICE, hold=slices(TokenUsage(output=5)), line="chat", errors="openai")


class Upstream:
    """Words without end, and whether somebody let them go."""

    def __init__(self, form: Callable[[str], bytes] = delta, *, silent_after: int | None = None) -> None:
        self.closed = asyncio.Event()
        self._form = form
        self._silent_after = silent_after

    async def words(self) -> AsyncIterator[bytes]:
        """The stream."""
        try:
            for number in itertools.count():
                if number == self._silent_after:
                    await asyncio.Event().wait()
                yield self._form(" word")
                await asyncio.sleep(0)
        finally:
            self.closed.set()


async def charged(stage: Stage) -> int:
    """Tokens that the one call, which was cut, was charged for."""
    (charge,) = await stage.charges()
    assert (str(charge.basis), await stage.outcomes()) == ("observed", ["cut"])
    assert stage.metering.meters.totals("cuts") == {(("metering.line", charge.line),): 1}
    assert TOKENS * 50_000_000 <= charge.amount <= (TOKENS + SPREAD) * 50_000_000
    return charge.amount // 50_000_000


def told(ended: Drive) -> bytes:
    """The last message of an answer that came to a clean end, behind chunks that passed as they were."""
    *_, last = ended.delivered
    assert (ended.exception, last.get("more_body", False)) == (None, False)
    assert all(message["more_body"] for message in ended.delivered[1:-1])
    return bytes(last["body"])


# -- in-band -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "errors", "name", "find"),
    [
        ("2.3", "openai", b"", lambda told: told["error"]["code"] == "insufficient_quota"),
        ("2.4", "anthropic", b"event: error\n", lambda told: told["error"]["type"] == "billing_error"),
        ("2.3", "problem", b"event: error\n", lambda told: told["code"] == "insufficient_credits"),
    ],
    ids=["openai", "anthropic", "problem"],
)
def test_end_a_stream_of_events_with_the_error_of_the_route(
    version: str, errors: Any, name: bytes, find: Callable[[Any], bool]
) -> None:
    """What was paid for passes, then the error in the route's shape and a clean end; the upstream is let go."""

    async def play() -> None:
        upstream = Upstream()

        @billable(PRICE, hold=slices(TokenUsage(output=5)), errors=errors)
        async def endpoint(request: Any) -> Response:
            return sse(upstream.words())

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive(spec_version=version)
            error = told(ended)
            assert await charged(stage) == len(ended.delivered) - 2
            assert error.startswith(name + b"data: ")
            told_of = json.loads(error.partition(b"data: ")[2])
            assert find(told_of)
            assert "1000 credits that could be held for it" in str(told_of)
            assert "Retry in" not in str(told_of)
            await asyncio.wait_for(upstream.closed.wait(), 10)

    asyncio.run(play())


def test_end_a_stream_of_lines_with_a_line() -> None:
    """A stream of JSON lines ends with the error as a line of its own."""

    async def play() -> None:
        upstream = Upstream(lambda text: delta(text)[6:-1])

        @chat
        async def endpoint(request: Any) -> Response:
            return StreamingResponse(upstream.words(), media_type="application/x-ndjson")

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert json.loads(told(ended))["error"]["code"] == "insufficient_quota"
            assert len(body(ended.delivered).splitlines()) == await charged(stage) + 1

    asyncio.run(play())


def test_end_an_event_that_was_cut_before_the_error() -> None:
    """Where the last chunk was half an event, that is ended first."""

    async def play() -> None:
        upstream = Upstream(lambda text: b"\n\n" + delta(text)[:-2])

        @chat
        async def endpoint(request: Any) -> Response:
            return sse(upstream.words())

        async with staged(starlette(endpoint)) as stage:
            assert told(await stage.drive()).startswith(b'\n\ndata: {"error"')
            await charged(stage)

    asyncio.run(play())


# -- where nothing can be said in-band ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"content-encoding": "gzip"}, {"content-length": "1000000"}, {"content-type": "text/plain"}],
    ids=["compressed", "sized", "text"],
)
def test_break_the_connection_where_a_body_has_no_place_for_the_error(fields: dict[str, str]) -> None:
    """A body that is compressed, has a length or is plain text is left without an end, and the server hears why."""
    form = gzip.compress if "content-encoding" in fields else bytes

    async def play() -> None:
        upstream = Upstream(lambda text: form(delta(text)))

        @chat
        async def endpoint(request: Any) -> Response:
            headers = {"content-type": "text/event-stream", **fields}
            return StreamingResponse(upstream.words(), headers=headers)

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert isinstance(ended.exception, CallCut)
            assert ended.log[-1]["more_body"]
            assert await stage.outcomes() == ["cut"]
            await asyncio.wait_for(upstream.closed.wait(), 10)

    asyncio.run(play())


def test_break_the_connection_of_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that the server does not take within a bound is given up, and the call is charged meanwhile."""
    monkeypatch.setattr(cutting, "TELL_S", 0.01)

    async def play() -> None:
        @chat
        async def endpoint(request: Any) -> Response:
            return sse(Upstream(lambda text: delta(text * 60)).words())

        async with staged(starlette(endpoint)) as stage:
            async with Drive(stage.app, http_scope(), hang_at=3) as run:
                await run.ended()
                await within(10, lambda: stage.metering.meters.totals("cuts") != {})
                await stage.booked()
                await within(10, lambda: run.exception is not None)
            assert isinstance(run.exception, CallCut)
            assert await stage.outcomes() == ["cut"]

    asyncio.run(play())


def test_tell_nobody_who_has_left() -> None:
    """A client that leaves at the error changes nothing of the cut, and the server hears of no exception."""

    async def play() -> None:
        @chat
        async def endpoint(request: Any) -> Response:
            return sse(Upstream(lambda text: delta(text * 60)).words())

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive(raise_at=3)
            assert ended.exception is None
            assert await stage.outcomes() == ["cut"]

    asyncio.run(play())


# -- before the first byte ---------------------------------------------------------------------------------


def spent(tokens: int) -> None:
    """Report usage."""
    current_call().record(TokenUsage(input=0, output=tokens))


@pytest.mark.parametrize("stream", [False, True])
def test_answer_402_where_nothing_was_sent_yet(stream: bool) -> None:
    """Work that is cut before its answer began is answered as what cannot be paid, and charged as observed."""

    async def play() -> None:
        @chat
        async def endpoint(request: Any) -> Response:
            spent(TOKENS)
            await within(10, lambda: current_call().lack is not None)
            if not stream:
                spent(1)
            return sse(Upstream().words())

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert (status(ended.log), ended.exception) == (402, None)
            assert json.loads(body(ended.log))["error"]["code"] == "insufficient_quota"
            assert await charged(stage) == TOKENS + (not stream)

    asyncio.run(play())


@pytest.mark.parametrize("notices", [False, True])
def test_send_an_answer_that_is_there_as_a_whole(notices: bool) -> None:
    """An answer of known length is sent although nothing more can be held: the work is done, and is paid in full."""

    async def play() -> None:
        @chat
        async def endpoint(request: Any) -> Response:
            spent(TOKENS)
            await within(10, lambda: current_call().lack is not None)
            if notices:
                with pytest.raises(CallCut):
                    spent(2)
            return JSONResponse({"so far": "so good"})

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert (status(ended.log), body(ended.log)) == (200, b'{"so far":"so good"}')
            (charge,) = await stage.charges()
            assert charge.amount == (TOKENS + 2 * notices) * 50_000_000
            assert await stage.outcomes() == ["cut" if notices else "completed"]

    asyncio.run(play())


def test_let_a_stream_end_that_is_over() -> None:
    """A stream of which only the end is left when its hold is used up has completed."""

    async def play() -> None:
        async def words() -> AsyncIterator[bytes]:
            yield delta(" word" * 60)

        @chat
        async def endpoint(request: Any) -> Response:
            return sse(words())

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert (told(ended), await stage.outcomes()) == (b"", ["completed"])

    asyncio.run(play())


# -- who is silent -----------------------------------------------------------------------------------------


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a silent app no longer than for a turn of the loop."""
    monkeypatch.setattr(cutting, "SILENT_S", 0.01)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize(("version", "layers"), [("2.3", ()), ("2.4", (Passing,))])
def test_cancel_an_app_that_is_silent(version: str, layers: tuple[Any, ...]) -> None:
    """A generator that waits for its upstream is cancelled, its client is told, and the server sees no cancellation."""

    async def play() -> None:
        upstream = Upstream(silent_after=TOKENS)

        @chat
        async def endpoint(request: Any) -> Response:
            return sse(upstream.words())

        async with staged(starlette(endpoint, *layers)) as stage:
            async with Drive(stage.app, http_scope(spec_version=version)) as run:
                assert await run.ended() == "returned"
                assert run.task is not None
                assert run.task.cancelling() == 0
            assert b"insufficient_quota" in told(run)
            assert upstream.closed.is_set()
            await stage.booked()
            assert await charged(stage) == TOKENS

    asyncio.run(play())


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("layers", [(), (Passing,)])
@pytest.mark.parametrize("begins", [False, True])
def test_cancel_a_handler_that_made_the_first_slices(
    begins: bool, layers: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    Slices that are first made inside of a handler, by the explicit gate, cut its own call as well, also a silent one.

    Until then this process had none, and prepared no request for a cut.
    """

    async def play() -> None:
        upstream = Upstream(silent_after=TOKENS)

        async def endpoint(request: Any) -> Response:
            monkeypatch.setattr(Slices, "in_use", True)
            await current_call().admit(billable(PRICE, hold=slices(TokenUsage(output=5)), errors="openai"))
            if begins:
                return sse(upstream.words())
            spent(TOKENS)
            await asyncio.Event().wait()
            raise AssertionError("Nobody wakes it.")

        async with staged(starlette(endpoint, *layers)) as stage:
            monkeypatch.setattr(Slices, "in_use", False)
            async with Drive(stage.app, http_scope()) as run:
                assert await run.ended() == "returned"
                assert run.task is not None
                assert run.task.cancelling() == 0
            assert status(run.log) == (200 if begins else 402)
            if begins:
                assert b"insufficient_quota" in told(run)
            await stage.booked()
            assert await charged(stage) == TOKENS

    asyncio.run(play())


@pytest.mark.usefixtures("_impatient")
def test_cancel_a_handler_before_its_answer() -> None:
    """A handler that is silent before its answer begins is cancelled as well, and answered with 402."""

    async def play() -> None:
        @chat
        async def endpoint(request: Any) -> Response:
            spent(TOKENS)
            await asyncio.Event().wait()
            raise AssertionError("Nobody wakes it.")

        async with staged(starlette(endpoint)) as stage:
            ended = await stage.drive()
            assert (status(ended.log), ended.outcome) == (402, "returned")
            assert await charged(stage) == TOKENS

    asyncio.run(play())


@pytest.mark.usefixtures("_impatient")
def test_tell_the_client_of_an_app_that_swallows_its_end() -> None:
    """An app that catches the cancellation and just returns leaves a clean end with the error behind."""

    async def raw(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": delta(" word" * 60), "more_body": True})
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()

    async def play() -> None:
        async with staged(plain(metered_app(raw, chat))) as stage:
            ended = await stage.drive()
            assert b"insufficient_quota" in told(ended)
            assert await stage.outcomes() == ["cut"]

    asyncio.run(play())


@pytest.mark.usefixtures("_impatient")
def test_let_the_server_cancel_what_is_cut() -> None:
    """A cancellation by the server rises as one, also while a call is being cut; the call is charged once."""

    async def play() -> None:
        waiting = asyncio.Event()

        @chat
        async def endpoint(request: Any) -> Response:
            spent(TOKENS)
            try:
                await asyncio.Event().wait()
            finally:
                waiting.set()
                await asyncio.sleep(60)
            raise AssertionError("Nobody wakes it.")

        async with staged(starlette(endpoint)) as stage:
            async with Drive(stage.app, http_scope()) as run:
                await asyncio.wait_for(waiting.wait(), 10)
                assert run.task is not None
                run.task.cancel()
                assert await run.ended() == "cancelled"
            await stage.booked()
            assert await charged(stage) == TOKENS

    asyncio.run(play())


def test_see_a_client_that_left_first() -> None:
    """Of a client that left and a hold that is used up later, the client came first."""

    async def play() -> None:
        @billable(PRICE, hold=slices(TokenUsage(input=0, output=5)))
        async def endpoint(request: Any) -> Response:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            spent(TOKENS)
            await within(10, lambda: current_call().lack is not None)
            return JSONResponse({})

        async with staged(starlette(endpoint)) as stage:
            await stage.drive(disconnect_at=0)
            assert await stage.outcomes() == ["client_gone"]
            assert stage.metering.meters.totals("cuts") == {}

    asyncio.run(play())


# -- frameworks --------------------------------------------------------------------------------------------


def through_base_http_middleware(upstream: Upstream) -> Any:
    """A stream behind a middleware that relays it."""

    @chat
    async def endpoint(request: Any) -> Response:
        return sse(upstream.words())

    return starlette(endpoint, Passing)


def from_a_thread(upstream: Upstream) -> Any:
    """A stream that a thread makes."""

    def words() -> Iterator[bytes]:
        try:
            while True:
                yield delta(" word")
        finally:
            upstream.closed.set()

    @chat
    def endpoint(request: Any) -> Response:
        return StreamingResponse(words(), media_type="text/event-stream")

    return starlette(endpoint)


def from_a_generator_endpoint(upstream: Upstream) -> Any:
    """FastAPI's own server-sent events."""
    app = FastAPI()

    @app.get("/", response_class=EventSourceResponse)
    @chat
    async def endpoint() -> AsyncIterator[dict[str, Any]]:
        chunk = json.loads(delta(" word")[6:])
        try:
            while True:
                yield chunk
                await asyncio.sleep(0)
        finally:
            upstream.closed.set()

    return app


def from_no_framework(upstream: Upstream) -> Any:
    """A plain app."""

    async def raw(scope: Any, receive: Any, send: Any) -> None:
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        try:
            async for chunk in upstream.words():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except OSError:
            # As an app does that knows what an OSError from `send` means.
            return

    return plain(metered_app(raw, chat))


@pytest.mark.parametrize(
    "make", [through_base_http_middleware, from_a_thread, from_a_generator_endpoint, from_no_framework]
)
def test_cut_whatever_streams(make: Callable[[Upstream], Any]) -> None:
    """Relayed, from a thread, from a generator endpoint or by hand: the error ends the stream, and its source stops."""

    async def play() -> None:
        upstream = Upstream()
        async with staged(make(upstream)) as stage:
            ended = await stage.drive()
            assert b"insufficient_quota" in told(ended)
            assert await stage.outcomes() == ["cut"]
            await asyncio.wait_for(upstream.closed.wait(), 10)

    asyncio.run(play())


def test_cut_behind_a_relaying_middleware() -> None:
    """A middleware outside of ours that relays what passes hands the error on, and ends as it should."""

    async def play() -> None:
        @chat
        async def endpoint(request: Any) -> Response:
            return sse(Upstream().words())

        async with staged(starlette(endpoint)) as stage:
            outside = Passing(stage.app)
            ended = await drive(outside, http_scope())
            assert ended.exception is None
            assert b"insufficient_quota" in body(ended.delivered)
            assert ended.complete.is_set()
            await stage.booked()
            await charged(stage)

    asyncio.run(play())


def test_show_a_bug_in_the_clean_up() -> None:
    """An exception of the app's own while it is stopped is told to the server, behind the client's clean end."""

    async def play() -> None:
        async def raw(scope: Any, receive: Any, send: Any) -> None:
            head = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            try:
                while True:
                    await send({"type": "http.response.body", "body": delta(" word"), "more_body": True})
            finally:
                raise KeyError("bug")

        async with staged(plain(metered_app(raw, chat))) as stage:
            ended = await stage.drive()
            assert isinstance(ended.exception, KeyError)
            assert b"insufficient_quota" in ended.delivered[-1]["body"]
            assert await stage.outcomes() == ["cut"]

    asyncio.run(play())


# -- races -------------------------------------------------------------------------------------------------


def test_end_while_the_hold_grows() -> None:
    """A call that ends while its growth is on its way to the store gives all of it back: nothing stays held."""

    async def play() -> None:
        store = StuckAt(Grow)

        async def words() -> AsyncIterator[bytes]:
            yield delta(" word" * 4)
            await store.asked.wait()
            yield b"data: [DONE]\n\n"

        @chat
        async def endpoint(request: Any) -> Response:
            return sse(words())

        async with staged(starlette(endpoint), store=store) as stage:
            async with Drive(stage.app, http_scope()) as run:
                assert await run.ended() == "returned"
                assert stage.metering.runtime().busy
                store.answer.set()
                await stage.booked()
            (charge,) = await stage.charges()
            balance = await stage.metering.balance(PAYER)
            assert (charge.amount, balance.held) == (4 * 50_000_000, 0)
            assert balance.settled == charge.amount

    asyncio.run(play())
