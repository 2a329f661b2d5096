"""The gate at the endpoint: every kind of function, asked once, and what is free (pitfalls 5, 7-9, 12, 37, 39)."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from fastapi import Depends, FastAPI, HTTPException
from fastapi.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from asgi_metering import (
    CallRefused,
    Metering,
    MeteringMiddleware,
    Unit,
    billable,
    current_call,
    rate_limited,
)
from asgi_metering.errors import ConfigurationError
from asgi_metering.testing import unmetered
from tests.harness.drive import Drive, body, drive, http_scope, status
from tests.pitfalls.apps import (
    GENERATORS,
    HOW,
    PRICE,
    STARLETTE_KINDS,
    How,
    fastapi_app,
    installed,
    starlette_app,
)
from tests.pitfalls.scene import ANN, POOR, Scene, SlowBooks, Visit, field_of, http_only, problem, visit


def starlette(*routes: tuple[str, Callable[..., Any]]) -> Starlette:
    """An application with these endpoints."""
    return Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in routes])


# -- pitfall 5: every kind of function ---------------------------------------------------------------------


def visited(app: ASGIApp, path: str, caller: str, spec_version: str = "2.3") -> Drive:
    """One visit."""
    (ended,) = visit(app, Visit(path, caller=caller, spec_version=spec_version))
    return ended


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", STARLETTE_KINDS)
def test_gate_every_kind_of_starlette_endpoint(kind: str, how: How, scene: Scene, ran: list[str]) -> None:
    """Pitfall 5: every kind has one admission and one settle, or 402 and nothing of it runs (S3.2, S3.3, S4.7)."""
    refused = visited(installed(starlette_app(ran), scene.metering, how), f"/{kind}", POOR)
    assert (status(refused.log), ran) == (402, [])
    assert refused.exception is None
    admitted = visited(installed(starlette_app(ran), scene.metering, how), f"/{kind}", ANN)
    assert (status(admitted.log), ran) == (200, [kind])
    assert (len(scene.books.admissions), len(scene.books.ends)) == (2, 1)
    assert (scene.settled(), scene.settled(POOR)) == (PRICE, 0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["async", "sync"])
def test_gate_every_kind_of_fastapi_function(kind: str, how: How, scene: Scene, ran: list[str]) -> None:
    """Pitfall 5, S2.31: without a `request`, async or sync: one admission and one settle, or 402 and no line of it."""
    refused = visited(installed(fastapi_app(ran), scene.metering, how), f"/{kind}", POOR)
    assert (status(refused.log), ran) == (402, [])
    assert refused.exception is None
    admitted = visited(installed(fastapi_app(ran), scene.metering, how), f"/{kind}", ANN)
    assert (status(admitted.log), ran) == (200, [kind])
    assert (len(scene.books.admissions), len(scene.books.ends)) == (2, 1)
    assert scene.settled() == PRICE


# -- pitfall 7: generators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", GENERATORS)
def test_refuse_generators_before_their_first_byte(
    kind: str, how: How, spec_version: str, scene: Scene, ran: list[str]
) -> None:
    """Pitfall 7: a refused generator endpoint, of any kind, answers 402 alone, and not one line of it runs."""
    refused = visited(installed(fastapi_app(ran), scene.metering, how), f"/{kind}", POOR, spec_version)
    assert ran == []
    assert [message["type"] for message in refused.log] == ["http.response.start", "http.response.body"]
    assert problem(refused)["status"] == status(refused.log) == 402
    assert refused.exception is None
    assert len(scene.books.admissions) == 1
    assert scene.books.ends == []


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", GENERATORS)
def test_settle_generators_once(kind: str, how: How, spec_version: str, scene: Scene, ran: list[str]) -> None:
    """Pitfall 7: an admitted generator endpoint streams whole, and is asked for once and settled once."""
    admitted = visited(installed(fastapi_app(ran), scene.metering, how), f"/{kind}", ANN, spec_version)
    assert (status(admitted.log), ran) == (200, [kind])
    bare = visited(_ungated(kind), f"/{kind}", ANN, spec_version)
    assert body(admitted.log) == body(bare.log) != b""
    assert (len(scene.books.admissions), len(scene.books.ends)) == (1, 1)
    assert scene.settled() == PRICE


def _ungated(kind: str) -> ASGIApp:
    """The same application, everything in it free."""
    app = fastapi_app([])

    async def free(scope: Scope, receive: Receive, send: Send) -> None:
        with unmetered():
            await app(scope, receive, send)

    return free


def test_refuse_a_generator_whose_first_step_met_the_refusal(scene: Scene, ran: list[str]) -> None:
    """Pitfall 15: a start of 200 that comes after the generator's first step was refused gives way to the 402."""

    @billable(PRICE)
    async def numbers() -> AsyncIterator[str]:
        ran.append("numbers")
        yield "1"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        generator = numbers()
        with pytest.raises(CallRefused):
            await anext(generator)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit(caller=POOR))
    assert (status(ended.log), ran) == (402, [])


def test_refuse_a_sync_generator_whose_first_step_met_the_refusal(scene: Scene, ran: list[str]) -> None:
    """Pitfall 7: the first step of a sync generator, in a thread, asks and is refused before any response begins."""

    @billable(PRICE)
    def numbers() -> Iterator[str]:
        ran.append("numbers")
        yield "1"

    @http_only
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.to_thread(list, numbers())

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit(caller=POOR))
    assert (status(ended.log), ran) == (402, [])
    assert ended.exception is None


def test_close_a_gated_generator_with_its_consumer(scene: Scene) -> None:
    """Pitfall 7: the endpoint's own generator is closed when the consumer stops, and not some time later."""
    closed: list[str] = []

    @billable(PRICE)
    async def numbers() -> AsyncIterator[str]:
        try:
            yield "1"
            yield "2"
        finally:
            closed.append("numbers")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        generator = numbers()
        await anext(generator)
        await generator.aclose()
        assert closed == ["numbers"]
        await PlainTextResponse("ok")(scope, receive, send)

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit())
    assert ended.exception is None


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("raised", [HTTPException(418), ValueError("broken")], ids=["answer", "error"])
def test_show_a_gated_dependency_how_its_request_failed(raised: Exception, kind: str, scene: Scene) -> None:
    """Pitfall 7: a gated dependency that yields sees the very exception of its endpoint, and can roll back by it."""
    seen: list[BaseException] = []

    @billable(PRICE)
    async def unit_of_work() -> AsyncIterator[str]:
        try:
            yield "work"
        except BaseException as failure:
            seen.append(failure)
            raise

    @billable(PRICE)
    def unit_of_work_in_a_thread() -> Iterator[str]:
        try:
            yield "work"
        except BaseException as failure:
            seen.append(failure)
            raise

    app = FastAPI()
    dependency = unit_of_work if kind == "async" else unit_of_work_in_a_thread

    @app.get("/", dependencies=[Depends(dependency)])
    async def endpoint() -> None:
        raise raised

    (ended,) = visit(installed(app, scene.metering, "wrapped"), Visit())
    assert status(ended.log) == (418 if isinstance(raised, HTTPException) else 500)
    assert seen == [raised]
    assert scene.settled() == 0


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_charge_an_endpoint_inside_of_what_a_dependency_charges(kind: str, scene: Scene) -> None:
    """S3.24: an endpoint whose dependency charges for its own work is asked for by its request, and finds its call."""
    lines: list[str] = []
    app = FastAPI()

    async def extra() -> AsyncIterator[None]:
        async with scene.metering.charge(payer=ANN, line="extra", price=3):
            yield

    @billable(PRICE, line="own")
    async def endpoint() -> None:
        lines.append(current_call().line)

    @billable(PRICE, line="own")
    def endpoint_in_a_thread() -> None:
        lines.append(current_call().line)

    app.get("/", dependencies=[Depends(extra)])(endpoint if kind == "async" else endpoint_in_a_thread)
    (ended,) = visit(installed(app, scene.metering, "wrapped"), Visit())
    assert status(ended.log) == 200
    assert lines == ["own"]
    assert scene.settled() == PRICE + 3


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_show_a_generator_its_own_call_inside_of_what_a_dependency_charges(kind: str, scene: Scene) -> None:
    """S3.24: a generator finds its request's call at each step, and what it charges itself; others find their own."""
    lines: list[str] = []
    app = FastAPI()

    def look() -> str:
        lines.append(current_call().line)
        return "item"

    async def extra() -> AsyncIterator[None]:
        async with scene.metering.charge(payer=ANN, line="extra", price=3):
            yield
            look()

    @billable(PRICE, line="own")
    async def endpoint() -> AsyncIterator[str]:
        try:
            yield look()
            async with scene.metering.charge(payer=ANN, line="inner", price=4):
                yield look()
                yield look()
            yield look()
        finally:
            look()

    @billable(PRICE, line="own")
    def endpoint_in_a_thread() -> Iterator[str]:
        try:
            yield look()
            with scene.metering.charge_sync(payer=ANN, line="inner", price=4):
                yield look()
                yield look()
            yield look()
        finally:
            look()

    endpoint = endpoint if kind == "async" else endpoint_in_a_thread
    app.get("/", dependencies=[Depends(extra)], response_class=EventSourceResponse)(endpoint)
    (ended,) = visit(installed(app, scene.metering, "wrapped"), Visit())
    scene.metering.close()
    assert body(ended.log).count(b"item") == 4
    assert lines == ["own", "inner", "inner", "own", "own", "extra"]
    assert scene.settled() == PRICE + 3 + 4


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside of a charge"])
def test_hand_what_is_sent_to_a_gated_generator(inside: bool, kind: str, scene: Scene) -> None:
    """Pitfall 7: what a consumer sends or throws into a gated generator is the endpoint's, which may go on."""

    @billable(PRICE)
    async def echo() -> AsyncGenerator[Any, Any]:
        answer: Any = "begun"
        while answer != "over":
            try:
                answer = yield answer
            except ValueError as failure:
                answer = str(failure)

    @billable(PRICE)
    def echo_in_a_thread() -> Generator[Any, Any, Any]:
        answer: Any = "begun"
        while answer != "over":
            try:
                answer = yield answer
            except ValueError as failure:
                answer = str(failure)

    async def consume(generator: Any) -> None:
        assert [await anext(generator), await generator.asend(7)] == ["begun", 7]
        assert await generator.athrow(ValueError("thrown")) == "thrown"
        with pytest.raises(StopAsyncIteration):
            await generator.asend("over")

    def consume_in_a_thread(generator: Any) -> None:
        assert [next(generator), generator.send(7), generator.throw(ValueError("thrown"))] == ["begun", 7, "thrown"]
        with pytest.raises(StopIteration):
            generator.send("over")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        charge = scene.metering.charge(payer=ANN, line="extra", price=3)
        async with charge if inside else nullcontext():
            if kind == "async":
                await consume(echo())
            else:
                await asyncio.to_thread(consume_in_a_thread, echo_in_a_thread())
        await PlainTextResponse("ok")(scope, receive, send)

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit())
    assert ended.exception is None


def test_refuse_to_block_the_loop_for_a_sync_generator(scene: Scene, ran: list[str]) -> None:
    """Pitfall 7: a sync generator iterated on the loop cannot wait for its admission; it says so instead of hanging."""

    @billable(PRICE)
    def numbers() -> Iterator[str]:
        ran.append("numbers")
        yield "1"

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        list(numbers())

    (ended,) = visit(MeteringMiddleware(app, scene.metering), Visit())
    assert isinstance(ended.exception, ConfigurationError)
    assert "Iterate it in a thread" in str(ended.exception)
    assert ran == []


def test_ask_generators_once_when_their_price_fails(scene: Scene) -> None:
    """Pitfall 7: a price that raises fails the request before its first byte, and nothing is held."""
    asked: list[str] = []

    def price() -> int:
        asked.append("price")
        raise RuntimeError("no price today")

    @billable(price)
    async def endpoint(request: Request) -> PlainTextResponse:
        raise AssertionError("It ran.")

    (ended,) = visit(installed(starlette(("/", endpoint)), scene.metering, "wrapped"), Visit())
    assert status(ended.log) == 500
    assert asked == ["price"]
    assert scene.books.admissions == []


# -- pitfall 8: the gate reached twice ---------------------------------------------------------------------


def test_admit_once_when_the_gate_is_reached_twice_at_once(ran: list[str]) -> None:
    """Pitfall 8: two that reach the gate while the store decides share one admission, and one charge."""

    async def story() -> Scene:
        books = SlowBooks()
        scene = Scene(books)

        @billable(PRICE)
        async def work() -> None:
            ran.append("work")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await asyncio.gather(work(), work(), work())
            await PlainTextResponse("ok")(scope, receive, send)

        serving = asyncio.create_task(drive(MeteringMiddleware(app, scene.metering), Visit().scope()))
        await books.asked_once.wait()
        assert ran == []
        books.door.set()
        assert status((await serving).log) == 200
        return scene

    scene = asyncio.run(story())
    assert ran == ["work"] * 3
    assert (len(scene.books.admissions), len(scene.books.ends)) == (1, 1)


def test_refuse_all_that_reached_the_gate_at_once(ran: list[str]) -> None:
    """Pitfall 8: those who waited for somebody else's admission are refused with it."""

    async def story() -> Drive:
        books = SlowBooks()
        scene = Scene(books)

        @billable(PRICE)
        async def work() -> None:
            ran.append("work")

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            refusals = await asyncio.gather(work(), work(), return_exceptions=True)
            assert [type(refusal) for refusal in refusals] == [CallRefused, CallRefused]

        serving = asyncio.create_task(drive(MeteringMiddleware(app, scene.metering), Visit(caller=POOR).scope()))
        await books.asked_once.wait()
        books.door.set()
        return await serving

    ended = asyncio.run(story())
    assert (status(ended.log), ran) == (402, [])


def test_ask_again_when_the_first_at_the_gate_was_cancelled(ran: list[str]) -> None:
    """Pitfalls 8, 29: others who wait ask anew, under an id of their own, and only what ran is charged."""

    async def story() -> Scene:
        books = SlowBooks()
        scene = Scene(books)

        @billable(PRICE)
        async def work(name: str) -> None:
            ran.append(name)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            first, second, third = (asyncio.create_task(work(name)) for name in ("first", "second", "third"))
            await books.asked_once.wait()
            first.cancel()
            await asyncio.wait([first])
            books.door.set()
            await asyncio.gather(second, third)
            await PlainTextResponse("ok")(scope, receive, send)

        ended = await drive(MeteringMiddleware(app, scene.metering), Visit().scope())
        assert ended.exception is None
        await scene.metering.stop()
        return scene

    scene = asyncio.run(story())
    assert sorted(ran) == ["second", "third"]
    assert len({ask.id for ask in scene.books.admissions}) == len(scene.books.admissions) == 2
    scene.books.door = asyncio.Event()
    scene.books.door.set()
    assert scene.settled() == PRICE


def test_refuse_another_price_inside_a_call(scene: Scene, ran: list[str]) -> None:
    """Pitfall 8: a metered endpoint called inside another's call is a mistake with a sentence, not a second charge."""

    @billable(1)
    async def inner() -> None:
        ran.append("inner")

    @billable(PRICE)
    async def outer(request: Request) -> PlainTextResponse:
        await inner()
        return PlainTextResponse("ok")

    (ended,) = visit(installed(starlette(("/", outer)), scene.metering, "added"), Visit())
    assert isinstance(ended.exception, ConfigurationError)
    assert "inner' was called inside a call that is metered as" in str(ended.exception)
    assert "Use metering.charge()" in str(ended.exception)
    assert ran == []
    assert (len(scene.books.admissions), scene.settled()) == (1, 0)


def test_count_handlers_that_ask_for_themselves_apart(scene: Scene) -> None:
    """Pitfall 39: explicit gates of two handlers share neither counts nor a line, as if they had been decorated."""

    async def first(request: Request) -> PlainTextResponse:
        await current_call().admit(PRICE, rate_limited("1/day"))
        return PlainTextResponse(current_call().line)

    async def second(request: Request) -> PlainTextResponse:
        await asyncio.create_task(current_call().admit(PRICE, rate_limited("1/day")))
        return PlainTextResponse(current_call().line)

    app = installed(starlette(("/first", first), ("/second", second)), scene.metering, "wrapped")
    answers = visit(app, Visit("/first"), Visit("/second"), Visit("/second"))
    assert [status(ended.log) for ended in answers] == [200, 200, 429]
    assert [body(ended.log) for ended in answers[:2]] == [b"first", b"second"]


def test_refuse_a_second_explicit_gate(scene: Scene) -> None:
    """Pitfall 8: two explicit gates in one handler would charge twice, so the second one raises."""

    async def endpoint(request: Request) -> PlainTextResponse:
        await current_call().admit(PRICE)
        with pytest.raises(ConfigurationError, match=r"Use metering\.charge"):
            await current_call().admit(PRICE)
        return PlainTextResponse("ok")

    (ended,) = visit(installed(starlette(("/", endpoint)), scene.metering, "added"), Visit())
    assert status(ended.log) == 200
    assert scene.settled() == PRICE


def test_refuse_an_explicit_gate_in_another_scale_from_its_first_call_on(scene: Scene) -> None:
    """X.7: a unit that an explicit gate is the first to name is told to the store before anything is charged in it."""
    fine, coarse = Unit("messages", scale=6), Unit("messages", scale=0)
    errors: list[str] = []

    async def endpoint(request: Request) -> PlainTextResponse:
        try:
            await current_call().admit(billable(1, unit=coarse))
        except ConfigurationError as error:
            errors.append(str(error))
        return PlainTextResponse("ok")

    async def granted_elsewhere() -> None:
        async with Metering(scene.books, sinks=()) as other:
            await other.grant(ANN, 5, id="fine", unit=fine)

    asyncio.run(granted_elsewhere())
    visit(installed(starlette(("/", endpoint)), scene.metering, "added"), Visit(), Visit())
    assert ["is counted with 6 digits" in error for error in errors] == [True, True]
    assert scene.books.admissions == []


def test_let_go_of_what_an_explicit_gate_computes(scene: Scene) -> None:
    """A price that a handler makes for one request, and all that it refers to, goes with that request."""
    made: list[weakref.ref[object]] = []

    async def endpoint(request: Request) -> PlainTextResponse:
        def price() -> int:
            return len(request.url.path)

        made.append(weakref.ref(price))
        await current_call().admit(billable(price))
        return PlainTextResponse("ok")

    visit(installed(starlette(("/", endpoint)), scene.metering, "added"), Visit(), Visit())
    gc.collect()
    assert [each() for each in made] == [None, None]


def test_charge_work_of_its_own_inside_a_call(scene: Scene) -> None:
    """Pitfall 8: what the sentence recommends works: `metering.charge` inside a call is a call of its own."""

    @billable(PRICE)
    async def outer(request: Request) -> PlainTextResponse:
        async with scene.metering.charge(payer=ANN, line="inner", price=1):
            pass
        return PlainTextResponse("ok")

    visit(installed(starlette(("/", outer)), scene.metering, "added"), Visit())
    assert scene.settled() == PRICE + 1
    assert len(scene.books.ends) == 2


# -- pitfall 9: sync endpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("build", [fastapi_app, starlette_app])
def test_run_sync_endpoints_off_the_loop(build: Callable[[list[str]], Any], scene: Scene) -> None:
    """Pitfall 9: a decorated sync endpoint runs in a thread, with its call at hand."""
    loop_thread = threading.current_thread()
    seen: list[Any] = []

    class Seen(list):  # type: ignore[type-arg]
        def append(self, kind: str) -> None:
            seen.append((kind, threading.current_thread() is loop_thread, current_call().payer))

    visit(installed(build(Seen()), scene.metering, "added"), Visit("/sync"))
    assert seen == [("sync", False, ANN)]


def test_run_sync_endpoints_where_the_metering_says(ran: list[str]) -> None:
    """Pitfall 9: the thread pool is selectable, for frameworks whose connections belong to a certain thread."""
    chosen: list[str] = []

    async def inline(work: Callable[[], Any]) -> Any:
        chosen.append(threading.current_thread().name)
        return work()

    scene = Scene()
    scene.metering.run_sync = inline
    visit(installed(fastapi_app(ran), scene.metering, "added"), Visit("/sync"))
    assert (len(chosen), ran) == (1, ["sync"])


def test_await_what_a_plain_function_returns(scene: Scene) -> None:
    """Pitfall 9: a plain function may return what its framework would await."""

    async def answer() -> PlainTextResponse:
        return PlainTextResponse(current_call().payer or "")

    @billable(PRICE)
    def endpoint(request: Request) -> Awaitable[PlainTextResponse]:
        return answer()

    (ended,) = visit(installed(starlette(("/", endpoint)), scene.metering, "added"), Visit())
    assert body(ended.log) == b"ann"


# -- pitfall 12: what is free ------------------------------------------------------------------------------


def priced() -> FastAPI:
    """An application with one metered route and one explicit gate."""
    app = FastAPI()

    @app.api_route("/items/{n}", methods=["GET", "HEAD", "OPTIONS"])
    @billable(PRICE)
    @rate_limited("1/day")
    async def items(n: int) -> dict[str, int]:
        return {"n": n}

    @app.get("/explicit")
    async def explicit() -> str:
        await current_call().admit(PRICE)
        return "ok"

    app.add_api_route("/explicit", explicit, methods=["HEAD"])
    return app


PREFLIGHT = (("origin", "https://a.example"), ("access-control-request-method", "GET"))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (Visit("/items/1", "HEAD", caller=POOR), 200),
        (Visit("/items/1", "OPTIONS", caller=POOR), 200),
        (Visit("/explicit", "HEAD", caller=POOR), 200),
        (Visit("/items/word", caller=POOR), 422),
        (Visit("/nowhere", caller=POOR), 404),
        (Visit("/items/1", "DELETE", caller=POOR), 405),
    ],
    ids=["head", "options", "explicit", "422", "404", "405"],
)
def test_charge_nothing_for_what_is_no_call(asked: Visit, answered: int, how: How, scene: Scene) -> None:
    """Pitfall 12, X.4: HEAD, OPTIONS, and requests that reach no endpoint ask the store nothing, whoever sends them."""
    first, second = visit(installed(priced(), scene.metering, how), asked, asked)
    assert (status(first.log), status(second.log)) == (answered, answered)
    assert scene.books.asked == []


@pytest.mark.parametrize("cors", ["outside", "inside"])
def test_charge_nothing_for_preflights(cors: str, scene: Scene) -> None:
    """Pitfall 12: a preflight is answered by CORS on either side of the metering, and asks the store nothing."""
    app = priced()
    layers: list[Callable[[], None]] = [
        lambda: app.add_middleware(MeteringMiddleware, metering=scene.metering),
        lambda: app.add_middleware(CORSMiddleware, allow_origins=["*"]),
    ]
    for add in layers if cors == "outside" else reversed(layers):
        add()
    (ended,) = visit(app, Visit("/items/1", "OPTIONS", caller=POOR, headers=PREFLIGHT))
    assert status(ended.log) == 200
    assert field_of(ended, "access-control-allow-origin") == "*"
    assert scene.books.asked == []


# -- pitfalls 37, 39 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", [ANN, POOR])
def test_pass_through_a_second_middleware(caller: str, scene: Scene, ran: list[str]) -> None:
    """Pitfall 37: installed twice, around and inside, there is one admission, one settle and one set of fields."""
    once = visited(installed(fastapi_app(ran), Scene().metering, "added"), "/async", caller)
    twice = visited(
        MeteringMiddleware(installed(fastapi_app(ran), scene.metering, "added"), scene.metering), "/async", caller
    )
    assert status(twice.log) == status(once.log) == (200 if caller == ANN else 402)
    assert [name for name, _ in once.log[0]["headers"]] == [name for name, _ in twice.log[0]["headers"]]
    assert len(scene.books.admissions) == 1
    assert len(scene.books.ends) == (1 if caller == ANN else 0)


def test_label_by_the_decorated_function(scene: Scene) -> None:
    """Pitfall 39: lines and limits are named by the function, so a route's prefix or parameters change nothing."""

    @billable(PRICE)
    @rate_limited("9/day")
    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = Starlette(
        routes=[
            Mount("/v1", routes=[Route("/{region}/search", search)]),
            Mount("/v2", routes=[Route("/search", search)]),
        ]
    )
    visit(installed(app, scene.metering, "added"), Visit("/v1/eu/search"), Visit("/v2/search"))
    first, second = scene.books.admissions
    assert first.line == second.line == "search"
    assert first.limits[0].key == second.limits[0].key
    assert first.limits[0].key.startswith(f"{__name__}.test_label_by_the_decorated_function.search|9-per-day|")
    assert "region" not in repr(first) + repr(second)


def test_name_two_endpoints_of_one_name_apart(scene: Scene) -> None:
    """Pitfall 39: endpoints that share a qualified name, as those made in a loop, do not share their limits."""

    def make_one(answer: str) -> Callable[..., Any]:
        @rate_limited("1/day")
        async def same(request: Request) -> PlainTextResponse:
            return PlainTextResponse(answer)

        return same

    app = starlette(("/one", make_one("1")), ("/two", make_one("2")))
    ended = visit(installed(app, scene.metering, "added"), Visit("/one"), Visit("/two"), Visit("/one"))
    assert [status(each.log) for each in ended] == [200, 200, 429]


def test_stream_a_response_of_a_gated_function(scene: Scene) -> None:
    """Pitfall 5: a function that returns a stream is gated before the stream is made."""

    @billable(PRICE)
    async def endpoint(request: Request) -> StreamingResponse:
        return StreamingResponse(iter(["a", "b"]))

    ended = asyncio.run(drive(installed(starlette(("/", endpoint)), scene.metering, "added"), http_scope("/")))
    assert problem(ended)["code"] == "unauthenticated"
