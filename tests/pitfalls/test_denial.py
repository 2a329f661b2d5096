"""The refusal on its way out: which answer the client gets, and that it is the only one (pitfalls 13-16, 18, 21)."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_metering import CallRefused, MeteringMiddleware, billable, current_call, rate_limited
from asgi_metering.asgi.answers import DEFAULT_OPTIONS
from asgi_metering.asgi.exchange import Exchange, run
from asgi_metering.asgi.refusals import refusal_answer
from asgi_metering.errors import ConfigurationError, MeteringError
from asgi_metering.metering import ALL_FEATURES
from asgi_metering.opening import Opening
from asgi_metering.prices import per_token
from tests.harness.drive import Drive, body, drive, headers, status
from tests.pitfalls.apps import HOW, PRICE, How, fastapi_app, installed
from tests.pitfalls.scene import ANN, POOR, Scene, Visit, field_of, http_only, problem, visit

REFUSED = Visit(caller=POOR)
START = "http.response.start"
BODY = "http.response.body"


def kinds(ended: Drive) -> list[str]:
    """What was sent, by type."""
    return [message["type"] for message in ended.log]


def refused_whole(ended: Drive) -> None:
    """The client got one 402 with problem details, whole, and the server no exception."""
    assert kinds(ended) == [START, BODY]
    assert status(ended.log) == problem(ended)["status"] == 402
    assert ended.exception is None


def loud(records: list[logging.LogRecord]) -> list[str]:
    """What was logged as a warning or worse; not the audit's, which knows the applications of other tests."""
    said = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    return [sentence for sentence in said if "no route reaches it" not in sentence]


@billable(PRICE)
async def paid() -> None:
    """Something that costs."""


@billable(PRICE)
async def paid_endpoint(request: Request) -> PlainTextResponse:
    """An endpoint that costs."""
    return PlainTextResponse("paid")


# -- pitfall 13: whatever arrives --------------------------------------------------------------------------


class Stopped(BaseException):
    """What an inner middleware may make of any exception."""


class TranslatedError(Exception):
    """The same, as a plain exception."""


def group(refusal: CallRefused) -> BaseException:
    """The refusal in a group in a group."""
    return ExceptionGroup("group", [refusal, ExceptionGroup("inner", [refusal])])


def base_group(refusal: CallRefused) -> BaseException:
    """The refusal beside what it became, in a group that is no exception."""
    stopped = Stopped()
    stopped.__cause__ = refusal
    return BaseExceptionGroup("group", [refusal, stopped])


TRANSLATIONS: dict[str, Callable[[CallRefused], BaseException]] = {
    "itself": lambda refusal: refusal,
    "group": group,
    "base-group": base_group,
    "exception": lambda refusal: TranslatedError(),
    "base-exception": lambda refusal: Stopped(),
}


def translating(app: ASGIApp, translate: Callable[[CallRefused], BaseException]) -> ASGIApp:
    """A middleware that makes something else of refusals."""

    async def translated(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        except CallRefused as refusal:
            made = translate(refusal)
            if made is refusal:
                raise
            raise made from refusal

    return translated


@http_only
async def paid_app(scope: Scope, receive: Receive, send: Send) -> None:
    """A plain application whose only work costs."""
    await paid()
    await PlainTextResponse("paid")(scope, receive, send)


@pytest.mark.parametrize("form", TRANSLATIONS)
def test_answer_whatever_the_refusal_became(form: str, scene: Scene) -> None:
    """Pitfall 13: as itself, in groups, or translated by a middleware inside, the refusal is a 402 and no error."""
    (ended,) = visit(MeteringMiddleware(translating(paid_app, TRANSLATIONS[form]), scene.metering), REFUSED)
    refused_whole(ended)


def test_answer_a_refusal_that_somebody_kept_silent_of(scene: Scene) -> None:
    """Pitfall 13: a middleware inside that swallows the refusal and answers nothing leaves the answer to us."""

    @http_only
    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(CallRefused):
            await paid_app(scope, receive, send)

    (ended,) = visit(MeteringMiddleware(silent, scene.metering), REFUSED)
    refused_whole(ended)


def test_answer_and_still_raise_what_has_nothing_to_do_with_it(scene: Scene) -> None:
    """Pitfall 13: a bug that shows after a refusal does not hide the 402, and the 402 does not hide the bug."""

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(CallRefused):
            await paid()
        raise KeyError("bug")

    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert kinds(ended) == [START, BODY]
    assert status(ended.log) == 402
    assert isinstance(ended.exception, KeyError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, asyncio.CancelledError, GeneratorExit])
def test_let_through_who_wants_to_stop(stop: type[BaseException], scene: Scene) -> None:
    """Pitfall 13: a cancellation or the end of the process is no refusal, alone or in a group."""

    async def raising(failure: BaseException, sent: list[Message]) -> None:
        @http_only
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            with pytest.raises(CallRefused):
                await paid()
            raise failure

        async def receive() -> Message:
            raise AssertionError("It read.")

        async def send(message: Message) -> None:
            sent.append(message)

        # Inside the coroutine: asyncio itself would treat these apart.
        with pytest.raises(type(failure)):
            await MeteringMiddleware(app, scene.metering)(REFUSED.scope(), receive, send)

    sent: list[Message] = []
    asyncio.run(raising(stop(), sent))
    asyncio.run(raising(BaseExceptionGroup("group", [stop()]), sent))
    assert sent == []


# -- pitfalls 14, 15: frameworks that answer first ---------------------------------------------------------


def bare(routes: list[Any]) -> Starlette:
    """Starlette as it is."""
    return Starlette(routes=routes)


def debugging(routes: list[Any]) -> Starlette:
    """Starlette with tracebacks for developers."""
    return Starlette(routes=routes, debug=True)


def catching_all(routes: list[Any]) -> Starlette:
    """Starlette with a 500 of the application's own."""

    async def handler(request: Request, failure: Exception) -> JSONResponse:
        return JSONResponse({"error": "internal"}, status_code=500)

    return Starlette(routes=routes, exception_handlers={Exception: handler})


FRAMEWORKS = {"bare": bare, "debug": debugging, "catch-all": catching_all}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_answer_instead_of_a_frameworks_500(
    framework: str, how: How, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Pitfalls 14, 15, 17: the framework's 500 reaches no client, its exception no server and no log."""
    app = FRAMEWORKS[framework]([Route("/", paid_endpoint)])
    (ended,) = visit(installed(app, scene.metering, how), REFUSED)
    refused_whole(ended)
    # At startup, and of no request.
    assert [told for told in loud(caplog.records) if "answers HEAD" not in told] == []


@pytest.mark.parametrize("how", HOW)
def test_answer_for_a_mounted_sub_application(how: How, scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """Pitfall 14: a mounted FastAPI's own error middleware answers 500 and raises again; neither is seen."""
    outer = FastAPI()
    outer.mount("/sub", fastapi_app([]))
    refused, admitted = visit(
        installed(outer, scene.metering, how), Visit("/sub/async", caller=POOR), Visit("/sub/async")
    )
    refused_whole(refused)
    assert status(admitted.log) == 200
    assert loud(caplog.records) == []


def handled(answer: Callable[[], Any]) -> Starlette:
    """An application with a handler of its own for refusals."""

    async def handler(request: Request, failure: Exception) -> Any:
        return answer()

    return Starlette(routes=[Route("/", paid_endpoint)], exception_handlers={CallRefused: handler})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("code", [200, 402, 403, 429])
def test_keep_the_answer_of_an_own_handler(code: int, how: How, scene: Scene) -> None:
    """Pitfall 15: an application's own 402, or its degraded 200, goes out as it is."""
    app = handled(lambda: PlainTextResponse("own words", code))
    (ended,) = visit(installed(app, scene.metering, how), REFUSED)
    assert (status(ended.log), body(ended.log)) == (code, b"own words")
    assert field_of(ended, "cache-control") is None
    assert ended.exception is None


@pytest.mark.parametrize("how", HOW)
def test_replace_an_own_handlers_500(how: How, scene: Scene) -> None:
    """Pitfall 15: from 500 on an answer says that we failed, which a refusal is not: it is replaced."""
    (ended,) = visit(installed(handled(lambda: PlainTextResponse("oops", 503)), scene.metering, how), REFUSED)
    refused_whole(ended)


def test_keep_what_an_endpoint_makes_of_its_explicit_gate(scene: Scene) -> None:
    """Pitfall 15: an endpoint that catches the refusal of its explicit gate answers as it likes, below 500."""

    async def endpoint(request: Request) -> JSONResponse:
        try:
            await current_call().admit(PRICE)
        except CallRefused as refusal:
            return JSONResponse({"degraded": refusal.refusal.reason.value})
        return JSONResponse({"degraded": None})

    app = installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "added")
    refused, admitted = visit(app, REFUSED, Visit())
    assert json.loads(body(refused.log)) == {"degraded": "insufficient_credits"}
    assert json.loads(body(admitted.log)) == {"degraded": None}
    assert scene.settled() == PRICE


def test_keep_an_http_exception_made_of_a_refusal(scene: Scene) -> None:
    """Pitfall 15: a dependency or endpoint that turns the refusal into a 403 of its own is left alone."""
    app = FastAPI()

    @app.get("/")
    async def endpoint() -> None:
        try:
            await current_call().admit(PRICE)
        except CallRefused as refusal:
            raise HTTPException(403, "members only") from refusal

    (ended,) = visit(installed(app, scene.metering, "wrapped"), REFUSED)
    assert (status(ended.log), json.loads(body(ended.log))) == (403, {"detail": "members only"})


# -- pitfall 16: after the swap ----------------------------------------------------------------------------

LATER: list[Message] = [
    {"type": START, "status": 200, "headers": []},
    {"type": BODY, "body": b"more", "more_body": True},
    {"type": BODY, "body": b""},
    {"type": "http.response.pathsend", "path": "/etc/hostname"},
    {"type": "http.response.zerocopysend", "file": 1},
    {"type": "http.response.trailers", "headers": []},
]


@pytest.mark.parametrize("message", LATER, ids=lambda message: message["type"])
def test_raise_from_every_send_after_the_swap(message: Message, scene: Scene) -> None:
    """Pitfall 16: once the 402 stands for a 500, every later message raises the refusal and none reaches the client."""
    raised: list[BaseException] = []

    @http_only
    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        with pytest.raises(CallRefused):
            await paid()
        await send({"type": START, "status": 500, "headers": []})
        for _ in range(2):
            try:
                await send(message)
            except CallRefused as refusal:
                raised.append(refusal)

    (ended,) = visit(MeteringMiddleware(stubborn, scene.metering), REFUSED)
    assert len(raised) == 2
    refused_whole(ended)


def test_skip_the_background_of_a_replaced_answer(scene: Scene, ran: list[str]) -> None:
    """Pitfall 16: a background task of the answer that never went out does not run."""

    async def work() -> None:
        ran.append("background")

    app = handled(lambda: PlainTextResponse("oops", 500, background=BackgroundTask(work)))
    (ended,) = visit(installed(app, scene.metering, "added"), REFUSED)
    refused_whole(ended)
    assert ran == []


# -- pitfall 18: after the start ---------------------------------------------------------------------------


def streaming(
    content_type: str, *chunks: bytes, extra: tuple[tuple[bytes, bytes], ...] = (), gate: Any = None
) -> ASGIApp:
    """A plain application that asks for admission when its response has begun and *chunks* are out."""

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        fields = [(b"Content-Type", content_type.encode()), *extra]
        await send({"type": START, "status": 200, "headers": fields})
        for chunk in chunks:
            await send({"type": BODY, "body": chunk, "more_body": True})
        await (gate or (lambda: current_call().admit(PRICE)))()
        await send({"type": BODY, "body": b"the rest"})

    return app


def in_band(ended: Drive) -> dict[str, Any]:
    """The error at the end of an event stream."""
    _, _, last = body(ended.log).rpartition(b"event: error\ndata: ")
    assert last.endswith(b"\n\n")
    return dict(json.loads(last))


SSE = "text/event-stream; charset=utf-8"


@pytest.mark.parametrize(
    ("chunks", "before"),
    [
        ((), b""),
        ((b"data: 1\n\n",), b"data: 1\n\n"),
        ((b"data: 1\r\n\r\n",), b"data: 1\r\n\r\n"),
        ((b"data: 1\n\n", b"data: 2"), b"data: 1\n\ndata: 2\n\n"),
    ],
    ids=["nothing-yet", "between", "between-crlf", "inside"],
)
def test_end_an_event_stream_with_its_own_error(chunks: tuple[bytes, ...], before: bytes, scene: Scene) -> None:
    """Pitfall 18: a refusal inside a stream of events is its last event, after which it ends properly."""
    (ended,) = visit(MeteringMiddleware(streaming(SSE, *chunks), scene.metering), REFUSED)
    assert status(ended.log) == 200
    assert body(ended.log).startswith(before + b"event: error\n")
    assert (in_band(ended)["status"], in_band(ended)["code"]) == (402, "insufficient_credits")
    assert ended.complete.is_set()
    assert ended.exception is None


@pytest.mark.parametrize(
    ("chunks", "before"),
    [((), b""), ((b'{"n":1}\n',), b'{"n":1}\n'), ((b'{"n":',), b'{"n":\n')],
    ids=["nothing-yet", "between", "inside"],
)
@pytest.mark.parametrize("content_type", ["application/jsonl", "application/x-ndjson"])
def test_end_lines_of_json_with_their_own_error(
    content_type: str, chunks: tuple[bytes, ...], before: bytes, scene: Scene
) -> None:
    """Pitfall 18: a refusal inside a stream of JSON lines is its last line."""
    (ended,) = visit(MeteringMiddleware(streaming(content_type, *chunks), scene.metering), REFUSED)
    assert body(ended.log).startswith(before)
    assert json.loads(body(ended.log).removeprefix(before))["status"] == 402
    assert ended.complete.is_set()
    assert ended.exception is None


@pytest.mark.parametrize("word", [b"identity", b" Identity ", b"none"])
def test_end_a_stream_that_says_that_it_is_not_compressed(word: bytes, scene: Scene) -> None:
    """Pitfalls 18, 35: words that undo nothing are no compression, also ``none``, with which SSE is often sent."""
    app = streaming(SSE, b"data: 1\n\n", extra=((b"content-encoding", word),))
    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert in_band(ended)["code"] == "insufficient_credits"
    assert ended.complete.is_set()


def test_speak_the_shape_of_the_route_in_band(scene: Scene) -> None:
    """Pitfall 18: the error event has the shape that the explicit gate's policy chose."""
    app = streaming(SSE, gate=lambda: current_call().admit(billable(PRICE, errors="openai")))
    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert json.loads(body(ended.log).removeprefix(b"data: "))["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize(
    ("content_type", "extra"),
    [
        ("text/plain", ()),
        ("application/json", ()),
        (SSE, ((b"content-encoding", b"gzip"),)),
        (SSE, ((b"content-length", b"100"),)),
    ],
    ids=["text", "json", "compressed", "sized"],
)
def test_break_a_body_that_has_no_place_for_an_error(
    content_type: str, extra: tuple[tuple[bytes, bytes], ...], scene: Scene
) -> None:
    """Pitfall 18: no swap and no second answer: the refusal rises, and the server cuts the connection."""
    app = streaming(content_type, gzip.compress(b"1"), extra=extra)
    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert kinds(ended) == [START, BODY]
    assert isinstance(ended.exception, CallRefused)
    assert not ended.complete.is_set()


def test_break_a_stream_that_promised_trailers(scene: Scene) -> None:
    """Pitfall 18: an end without the promised trailers would be no end, so the refusal rises."""

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        fields = [(b"content-type", b"text/event-stream")]
        await send({"type": START, "status": 200, "headers": fields, "trailers": True})
        await paid()

    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert kinds(ended) == [START]
    assert isinstance(ended.exception, CallRefused)


async def events(request: Request) -> StreamingResponse:
    """A stream that costs from its second event on."""

    async def parts() -> AsyncIterator[str]:
        yield "data: 1\n\n"
        await current_call().admit(PRICE)
        yield "data: 2\n\n"

    return StreamingResponse(parts(), media_type="text/event-stream")


def own_handler(app: Starlette) -> None:
    """Add a handler for refusals."""

    async def handler(request: Request, failure: Exception) -> JSONResponse:
        return JSONResponse({}, 402)

    app.add_exception_handler(CallRefused, handler)


def base_http(app: Starlette) -> None:
    """Add a middleware that fabricates clean ends."""

    async def dispatch(request: Request, call_next: Callable[[Request], Awaitable[Any]]) -> Any:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=dispatch)


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("inside", [lambda app: None, own_handler, base_http], ids=["bare", "handler", "base-http"])
@pytest.mark.parametrize("how", HOW)
def test_end_a_frameworks_stream_with_its_own_error(
    how: How, inside: Callable[[Starlette], None], spec_version: str, scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    """Pitfall 18: the same in Starlette, also where a handler comes too late and where an end is fabricated."""
    app = Starlette(routes=[Route("/", events)])
    inside(app)
    refused, admitted = visit(
        installed(app, scene.metering, how),
        Visit(caller=POOR, spec_version=spec_version),
        Visit(spec_version=spec_version),
    )
    assert body(refused.log).startswith(b"data: 1\n\nevent: error\n")
    assert body(refused.log).count(b"event:") == 1
    assert in_band(refused)["status"] == 402
    assert refused.complete.is_set()
    assert refused.exception is None
    assert body(admitted.log) == b"data: 1\n\ndata: 2\n\n"
    assert scene.settled() == PRICE
    assert loud(caplog.records) == []


@pytest.mark.parametrize("end", ["return", "raise"])
def test_keep_what_a_stream_says_of_its_refusal(end: str, scene: Scene) -> None:
    """Pitfall 18: a stream that catches its refusal and ends with words of its own gets none of ours."""

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        try:
            await paid()
        except CallRefused:
            await send({"type": BODY, "body": b"data: sorry\n\n", "more_body": True})
            if end == "raise":
                raise
            await send({"type": BODY})

    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert body(ended.log) == b"data: sorry\n\n"
    assert isinstance(ended.exception, CallRefused) is (end == "raise")


def test_raise_a_refusal_after_the_end(scene: Scene) -> None:
    """Pitfall 18: refused when the response is out already, nothing more is sent, and the log of the server has it."""

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": BODY, "body": b"data: 1\n\n"})
        await paid()

    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert body(ended.log) == b"data: 1\n\n"
    assert kinds(ended) == [START, BODY]
    assert isinstance(ended.exception, CallRefused)


def test_still_raise_what_else_broke_a_refused_stream(scene: Scene) -> None:
    """Pitfall 18: the stream ends with its error, and a bug that ended it is raised all the same."""

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        with pytest.raises(CallRefused):
            await paid()
        raise KeyError("bug")

    (ended,) = visit(MeteringMiddleware(app, scene.metering), REFUSED)
    assert in_band(ended)["status"] == 402
    assert isinstance(ended.exception, KeyError)


def test_charge_what_was_admitted_after_the_start() -> None:
    """S4.6: an explicit gate inside a stream is charged by the usage that passes after it, and its status is told."""
    scene = Scene(tells=True)
    usage = b'data: {"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7},"choices":[]}\n\n'

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": START, "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": BODY, "body": b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', "more_body": True})
        await current_call().admit(billable(per_token(input=1, output=2), hold=50))
        await send({"type": BODY, "body": usage})

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit())
    assert ended.exception is None
    assert scene.settled() == 11
    (event,) = scene.told
    assert (event.status, event.outcome) == (200, "completed")


def test_charge_what_was_admitted_after_the_end() -> None:
    """S4.6: metered work in a background task, after the response, is charged as completed and not as aborted."""
    scene = Scene(tells=True)

    async def work() -> None:
        await current_call().admit(PRICE)

    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("accepted", 202, background=BackgroundTask(work))

    app = installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "added")
    (ended,) = visit(app, Visit())
    assert status(ended.log) == 202
    assert scene.settled() == PRICE
    (event,) = scene.told
    assert (event.status, event.outcome) == (202, "completed")


# -- pitfall 21: HEAD and CORS -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_send_no_body_with_a_refused_head(method: str, scene: Scene) -> None:
    """Pitfall 21: where HEAD is not free its refusal has the fields of problem details, and no body behind them."""

    async def strict(scope: Scope, receive: Receive, send: Send) -> None:
        await run(paid_app, Exchange(scene.metering, ALL_FEATURES, scope, receive, send))

    ended = asyncio.run(drive(strict, Visit(method=method, caller=POOR).scope()))
    assert status(ended.log) == 402
    assert field_of(ended, "content-type") == "application/problem+json"
    assert int(field_of(ended, "content-length") or "0") > 0
    assert (body(ended.log) == b"") is (method == "HEAD")


def test_carry_cors_fields_on_refusals(scene: Scene) -> None:
    """Pitfall 21: with CORS outside of the metering a browser may read the 402 and its limits."""
    app = fastapi_app([])
    app.add_middleware(MeteringMiddleware, metering=scene.metering)
    app.add_middleware(CORSMiddleware, allow_origins=["https://a.example"], expose_headers=["Retry-After"])
    (ended,) = visit(app, Visit("/async", caller=POOR, headers=(("origin", "https://a.example"),)))
    refused_whole(ended)
    assert field_of(ended, "access-control-allow-origin") == "https://a.example"
    assert field_of(ended, "access-control-expose-headers") == "Retry-After"


def test_answer_every_refusal_as_problem_details(scene: Scene) -> None:
    """Pitfall 21: no identity is 401, no credits 402, no room 429: each whole, each with its own code and length."""

    @billable(PRICE)
    @rate_limited("1/day")
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid")

    app = installed(Starlette(routes=[Mount("/v1", routes=[Route("/", endpoint)])]), scene.metering, "added")
    ended = visit(app, Visit("/v1/", caller=None), Visit("/v1/", caller=POOR), Visit("/v1/"), Visit("/v1/"))
    assert [status(each.log) for each in ended] == [401, 402, 200, 429]
    refusals = [ended[0], ended[1], ended[3]]
    assert [problem(each)["code"] for each in refusals] == ["unauthenticated", "insufficient_credits", "rate_limit"]
    for each in refusals:
        assert field_of(each, "content-length") == str(len(body(each.log)))
        assert field_of(each, "cache-control") == "no-store"
    assert int(field_of(ended[3], "retry-after") or "0") > 0


def test_let_an_own_hook_rewrite_every_refusal(scene: Scene) -> None:
    """S4.4: a route's hook sees each of its refusals, that of somebody unknown as well."""

    def customise(members: Any) -> Any:
        return {"own": members["code"]}, {"X-Top-Up": "https://pay.example"}

    @billable(PRICE, customise=customise)
    async def endpoint(request: Request) -> PlainTextResponse:
        return PlainTextResponse("paid")

    app = installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "added")
    unknown, poor = visit(app, Visit(caller=None), REFUSED)
    assert (json.loads(body(unknown.log)), json.loads(body(poor.log))) == (
        {"own": "unauthenticated"},
        {"own": "insufficient_credits"},
    )
    assert ("x-top-up", "https://pay.example") in headers(unknown.log)


def test_fail_loudly_on_what_is_no_refusal(scene: Scene) -> None:
    """Pitfall 13: an application's error that has nothing to do with the gate is its own, and nothing is held."""

    @billable(PRICE)
    async def endpoint(request: Request) -> PlainTextResponse:
        raise ConfigurationError("own")

    (ended,) = visit(installed(Starlette(routes=[Route("/", endpoint)]), scene.metering, "wrapped"), Visit(caller=ANN))
    assert status(ended.log) == 500
    assert isinstance(ended.exception, ConfigurationError)
    assert scene.settled() == 0


def test_answer_no_refusal_that_was_none(scene: Scene) -> None:
    """Pitfall 13: asking for the answer of a call that was not refused is a mistake with a sentence."""
    call = Opening(scene.metering, ALL_FEATURES).open_call()
    with pytest.raises(MeteringError, match="was not refused"):
        refusal_answer(call, DEFAULT_OPTIONS)
