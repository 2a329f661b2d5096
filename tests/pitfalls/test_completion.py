"""Pitfalls 22 to 25: when a response has ended, and how."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, StreamingResponse

from asgi_metering import (
    TokenUsage,
    billable,
    metered_app,
)
from asgi_metering.asgi import exchange
from asgi_metering.prices import per_token
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import End, Operation
from asgi_metering.stores.memory import MemoryStore
from tests.harness.drive import SEND_YIELDS, Drive, body, drive, http_scope
from tests.pitfalls.stage import StuckAt, staged
from tests.pitfalls.streams import USAGE, Passing, events, plain, sse, starlette


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


def test_breaks_no_stream_whose_end_cannot_be_booked() -> None:
    """S3.43: a store that breaks when a call ends breaks no response: the client has all of it, and a proper end."""

    class Broken(MemoryStore):
        """A store that cannot write any end."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, End):
                raise LookupError("gone")
            return super().run_now(operation)

    @billable(2)
    async def endpoint(_request: Request) -> StreamingResponse:
        return sse(events("a", "b"))

    async def play() -> None:
        async with staged(starlette(endpoint)) as whole:
            expected = await whole.drive()
        async with staged(starlette(endpoint), store=Broken()) as stage:
            ended = await drive(stage.app, http_scope("/"))
            assert (ended.outcome, ended.complete.is_set()) == ("returned", True)
            assert body(ended.delivered) == body(expected.delivered)
            assert await stage.charges() == []

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


class SlowReader:
    """
    A server whose `send` of the last message returns, or fails, only when the test says so.

    Attributes:
        asked: Set when the last message has come.
        answer: What the test says.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def receive(self) -> Any:
        return {"type": "http.request", "body": b""}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.asked.set()
            await self.answer


MEASURED = billable(per_token(input=1, output=10), hold=100)


async def reported(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that answers usage in one message."""
    text = json.dumps({"object": "chat.completion", **USAGE, "choices": [{}]}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": text})


@pytest.mark.parametrize("leaves", [False, True])
def test_grace_begins_when_the_server_has_the_last_message(leaves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 24: a client that reads slowly is charged by what it read, and one that leaves instead has left."""
    monkeypatch.setattr(exchange, "GRACE_S", 0.0)

    async def play() -> None:
        async with staged(metered_app(plain(reported), MEASURED)) as stage:
            server = SlowReader()
            run = asyncio.ensure_future(stage.app(http_scope("/"), server.receive, server.send))
            await server.asked.wait()
            await asyncio.sleep(0.01)
            assert len(stage.metering.runtime().in_flight) == 1
            if leaves:
                server.answer.set_exception(OSError("The client has left."))
            else:
                server.answer.set_result(None)
            await asyncio.gather(run, return_exceptions=True)
            await stage.booked()
            assert await stage.outcomes() == ["client_gone" if leaves else "completed"]
            assert [entry.amount for entry in await stage.charges()] == ([] if leaves else [29_000_000])

    asyncio.run(play())


def test_last_send_that_never_returns_is_ended_by_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 27: where nothing more is heard of the last message, its body is read all the same, and it completed."""
    monkeypatch.setattr(exchange, "LAST_SEND_S", 0.01)

    async def play() -> None:
        async with staged(metered_app(plain(reported), MEASURED)) as stage:
            server = SlowReader()
            run = asyncio.ensure_future(stage.app(http_scope("/"), server.receive, server.send))
            await server.asked.wait()
            await stage.booked()
            assert not run.done()
            assert await stage.outcomes() == ["completed"]
            server.answer.set_result(None)
            await run
            assert [entry.amount for entry in await stage.charges()] == [29_000_000]

    asyncio.run(play())


async def broken_task() -> None:
    """A background task that fails."""
    raise RuntimeError("Analytics broke.")


async def in_pieces(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that says how long its answer is, sends all of it, and breaks."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"Content-Length", b"2")]})
    for piece, more in ((b"a", True), (b"b", True), (b"", False)):
        await send({"type": "http.response.body", "body": piece, "more_body": more})
    raise RuntimeError("It broke.")


async def hurried(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that loses patience while the loop gets its turn, after a long piece that was taken, and goes on."""
    long = b"a" * exchange.CHECKPOINT_BYTES
    await send({"type": "http.response.start", "status": 200, "headers": sized(3, long)})
    await send({"type": "http.response.body", "body": long, "more_body": True})
    for _ in range(2):
        sending = asyncio.ensure_future(send({"type": "http.response.body", "body": long, "more_body": True}))
        for _ in range(SEND_YIELDS + 1):
            await asyncio.sleep(0)
        assert not sending.done()
        sending.cancel()
        await asyncio.wait([sending])
    await send({"type": "http.response.body"})
    raise RuntimeError("It broke.")


async def abreast(_scope: Any, _receive: Any, send: Any) -> None:
    """An app whose tasks send side by side, long pieces and short ones."""
    long = b"a" * exchange.CHECKPOINT_BYTES
    await send({"type": "http.response.start", "status": 200, "headers": sized(5, long)})
    await send({"type": "http.response.body", "body": long, "more_body": True})
    message = {"type": "http.response.body", "body": long, "more_body": True}
    await asyncio.gather(*[send(message) for _ in range(4)])
    await send({"type": "http.response.body"})
    raise RuntimeError("It broke.")


def sized(pieces: int, piece: bytes) -> list[tuple[bytes, bytes]]:
    """Fields that say how long so many pieces are."""
    return [(b"content-length", b"%d" % (pieces * len(piece)))]


async def short(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that breaks before its announced length, behind a layer that ends the body for it."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
    await send({"type": "http.response.body", "body": b"a", "more_body": True})
    await send({"type": "http.response.body"})
    raise RuntimeError("It broke.")


async def unsized(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that sends one message without a length, and breaks."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"all"})
    raise RuntimeError("It broke.")


async def by_path(_scope: Any, _receive: Any, send: Any) -> None:
    """An app that sends a file, and breaks."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"x")]})
    await send({"type": "http.response.pathsend", "path": "/tmp/report"})
    raise RuntimeError("It broke.")


@pytest.mark.parametrize(
    ("app", "outcome"),
    [
        (in_pieces, "completed"),
        (hurried, "completed"),
        (abreast, "completed"),
        (unsized, "completed"),
        (by_path, "completed"),
        (short, "error"),
    ],
    ids=["sized", "hurried", "abreast", "one-message", "file", "short"],
)
def test_whole_response_is_charged_whatever_breaks_behind_it(app: Any, outcome: str) -> None:
    """Pitfall 24: what no layer fabricates is a completed answer; an end that could be fabricated is an error."""

    async def play() -> None:
        async with staged(metered_app(plain(app), billable(2))) as stage:
            ended = await stage.drive(extensions={"http.response.pathsend": {}})
            assert ended.outcome == "raised"
            assert await stage.outcomes() == [outcome]

    asyncio.run(play())


@pytest.mark.parametrize(
    "part", [billable(2), billable(per_token(output=1), hold=TokenUsage(output=9))], ids=["counted", "kept"]
)
@pytest.mark.parametrize("cancelled", [0, 2])
def test_bytes_of_a_cancelled_send_are_the_servers(cancelled: int, part: Any) -> None:
    """Pitfall 24: a piece whose sender was cancelled while the server took it counts towards the announced length."""
    piece = b"abc"

    async def impatient(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": sized(4, piece)})
        for number in range(4):
            sending = asyncio.ensure_future(send({"type": "http.response.body", "body": piece, "more_body": True}))
            if number == cancelled:
                # It is on its way in the server's `send`, which takes some turns.
                await asyncio.sleep(0)
                sending.cancel()
            await asyncio.wait([sending])
        await send({"type": "http.response.body"})
        raise RuntimeError("It broke.")

    async def play() -> None:
        async with staged(metered_app(plain(impatient), part)) as stage:
            ended = await stage.drive()
            assert (ended.outcome, len(body(ended.log))) == ("raised", 4 * len(piece))
            assert await stage.outcomes() == ["completed"]

    asyncio.run(play())


@pytest.mark.parametrize("layers", [(), (Passing,)])
def test_failing_background_task_takes_nothing_back(layers: tuple[Any, ...]) -> None:
    """Pitfall 24: the client has its whole answer, also through BaseHTTPMiddleware, and pays for it."""

    @billable(2)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({}, background=BackgroundTask(broken_task))

    async def play() -> None:
        async with staged(starlette(endpoint, *layers)) as stage:
            ended = await stage.drive()
            assert ended.exception is not None
            assert await stage.outcomes() == ["completed"]
            assert await stage.basis() == ("usage",)

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


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda text: memoryview(bytearray(text))])
def test_charge_an_answer_whose_fields_are_bytes_of_another_kind(kind: Any) -> None:
    """Names and values may be any bytes-like object: the answer goes out, its length is read, and it is charged."""

    @plain
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        fields = [(kind(b"content-length"), kind(b"2")), (kind(b"content-type"), kind(b"text/plain"))]
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})
        raise RuntimeError("behind it")

    async def run() -> None:
        async with staged(metered_app(app, billable(2))) as stage:
            ended = await stage.drive()
            assert str(ended.exception) == "behind it"
            assert await stage.basis() == ("usage",)

    asyncio.run(run())
