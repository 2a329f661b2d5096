"""The gate at the endpoint: who is asked for, when, and that nothing runs or is charged past it (pitfalls 1-9, 12)."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from asgi_metering import (
    CallRefused,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
)
from asgi_metering.call import Call
from asgi_metering.errors import CallClosedError, ConfigurationError, NoCallError
from asgi_metering.prices import per_token
from asgi_metering.testing.unmetered import unmetered
from tests.harness.drive import Drive, body, drive, http_scope, lifespan, status
from tests.pitfalls.apps import (
    FASTAPI_KINDS,
    GENERATORS,
    HOW,
    PRICE,
    STARLETTE_KINDS,
    How,
    fastapi_app,
    installed,
    starlette_app,
)
from tests.pitfalls.scene import ANN, POOR, TOKENS, Scene, SlowBooks, Visit, field_of, make, problem, visit

BOB = "bob"


def starlette(*routes: tuple[str, Callable[..., Any]]) -> Starlette:
    return Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in routes])


# -- pitfall 1: calls that are over ------------------------------------------------------------------------


def test_refuse_a_task_that_outlives_its_request(scene: Scene) -> None:
    """Pitfall 1: a task that an endpoint left behind finds its call closed, by every way in, and charges nothing."""
    left: list[asyncio.Task[None]] = []
    over = asyncio.Event()
    failures: list[Exception] = []

    @billable(PRICE)
    async def work() -> None:
        raise AssertionError("It ran.")

    async def later(call: Call) -> None:
        await over.wait()
        ways: list[Callable[[], Awaitable[Any]]] = [
            work,
            lambda: call.admit(PRICE),
            lambda: current_call().admit(PRICE),
        ]
        for way in ways:
            try:
                await way()
            except CallClosedError as failure:
                failures.append(failure)

    @billable(PRICE)
    async def endpoint(request: Request) -> PlainTextResponse:
        left.append(asyncio.create_task(later(current_call())))
        return PlainTextResponse("ok")

    app = installed(starlette(("/", endpoint)), scene.metering, "added")

    async def story() -> None:
        async with lifespan(app):
            await make(app, [Visit()])
            over.set()
            await left[0]

    asyncio.run(story())
    assert len(failures) == 3
    assert "metering.charge()" in str(failures[0])
    assert scene.settled() == PRICE
    assert len(scene.books.admissions) == 1


def test_refuse_a_task_that_outlives_a_free_request(scene: Scene, ran: list[str]) -> None:
    """Pitfall 1: what a free request left behind is over as well, and does not run free for ever."""
    left: list[asyncio.Task[None]] = []
    over = asyncio.Event()

    @billable(PRICE)
    async def work() -> None:
        ran.append("work")

    async def later() -> None:
        await over.wait()
        await work()

    async def endpoint(request: Request) -> PlainTextResponse:
        left.append(asyncio.create_task(later()))
        return PlainTextResponse("ok")

    app = installed(starlette(("/", endpoint)), scene.metering, "added")

    async def story() -> None:
        async with lifespan(app):
            await make(app, [Visit(method="HEAD")])
            over.set()
            with pytest.raises(CallClosedError):
                await left[0]

    asyncio.run(story())
    assert ran == []


def test_refuse_a_thread_that_outlives_its_request(scene: Scene) -> None:
    """Pitfall 1: a thread with a copy of the request's context finds the call closed."""
    over = threading.Event()
    found: list[BaseException] = []

    def later() -> None:
        over.wait(10)
        try:
            current_call().record(TOKENS)
        except CallClosedError as failure:
            found.append(failure)

    threads: list[threading.Thread] = []

    @billable(PRICE)
    def endpoint(request: Request) -> PlainTextResponse:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(later,))
        thread.start()
        threads.append(thread)
        return PlainTextResponse("ok")

    visit(installed(starlette(("/", endpoint)), scene.metering, "added"), Visit())
    over.set()
    threads[0].join(10)
    assert len(found) == 1


class Session:
    """A task that runs tools for many requests in the context of the one that began it, as MCP 1.x does."""

    def __init__(self, tool: Callable[..., Awaitable[Any]]) -> None:
        self.tool = tool
        self.asks: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def work(self) -> None:
        while True:
            asked, answered = await self.asks.get()
            try:
                answered.set_result(await self.tool(asked))
            except Exception as failure:
                answered.set_exception(failure)

    async def ask(self, asked: Any) -> Any:
        if self.task is None:
            self.task = asyncio.create_task(self.work())
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asks.put_nowait((asked, answered))
        return await answered


def session_app(scene: Scene, tool: Callable[..., Awaitable[Any]], asks_for: Callable[[Request], Any]) -> ASGIApp:
    session = Session(tool)

    async def endpoint(request: Request) -> JSONResponse:
        return JSONResponse(await session.ask(asks_for(request)))

    return installed(starlette(("/", endpoint)), scene.metering, "added")


class ToolContext:
    """What MCP hands to a tool, as far as the request is concerned."""

    def __init__(self, request: Request | None) -> None:
        self._request = request

    @property
    def request_context(self) -> Any:
        if self._request is None:
            raise ValueError("Context is not available outside of a request")
        return self

    @property
    def request(self) -> Request | None:
        return self._request


@pytest.mark.parametrize("asks_for", [lambda request: request, ToolContext], ids=["request", "mcp-context"])
def test_charge_the_request_in_the_arguments(scene: Scene, asks_for: Callable[[Request], Any]) -> None:
    """Pitfall 2: a session begun by ann runs bob's tool for bob's money, and refuses poor's, by the argument's scope."""
    scene.grant(BOB, 10)

    @billable(per_token(input=1, output=1), hold=5)
    async def tool(asked: Any) -> str:
        call = current_call()
        call.record(TokenUsage(input=2, output=1))
        assert call.payer is not None
        return call.payer

    app = session_app(scene, tool, asks_for)
    ann, bob, poor = visit(app, Visit(), Visit(caller=BOB), Visit(caller=POOR))
    assert (body(ann.log), body(bob.log)) == (b'"ann"', b'"bob"')
    assert status(poor.log) == 402
    assert (scene.settled(ANN), scene.settled(BOB), scene.settled(POOR)) == (3, 3, 0)


def test_charge_the_request_in_the_arguments_of_a_sync_tool(scene: Scene) -> None:
    """Pitfall 2: the thread of a sync endpoint sees the same call that was gated."""
    scene.grant(BOB, 10)

    @billable(PRICE)
    def tool(request: Request) -> str | None:
        return current_call().payer

    _, bob = visit(session_app(scene, tool, lambda request: request), Visit(), Visit(caller=BOB))
    assert body(bob.log) == b'"bob"'


@pytest.mark.parametrize(
    "asks_for", [lambda request: "nothing", lambda request: ToolContext(None)], ids=["bare", "mcp"]
)
def test_fail_closed_where_only_a_stale_context_is_left(
    scene: Scene, ran: list[str], asks_for: Callable[[Request], Any]
) -> None:
    """Pitfall 1: without a request in the arguments the session's own is over, so a denied payer's tool does not run."""

    @billable(PRICE)
    async def tool(asked: Any) -> str:
        ran.append("tool")
        return "done"

    app = session_app(scene, tool, asks_for)
    first, second = visit(app, Visit(), Visit(caller=POOR))
    assert status(first.log) == 200
    assert isinstance(second.exception, CallClosedError)
    assert ran == ["tool"]
    assert scene.settled() == PRICE


# -- pitfall 3: nobody opened a call -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", FASTAPI_KINDS)
def test_fail_closed_without_middleware_in_fastapi(kind: str, ran: list[str]) -> None:
    """Pitfall 3: without the middleware no kind of endpoint runs, and the sentence names the mend."""
    (ended,) = visit(fastapi_app(ran), Visit(f"/{kind}"))
    assert ran == []
    assert isinstance(ended.exception, NoCallError)
    assert "Add MeteringMiddleware" in str(ended.exception)
    assert "unmetered()" in str(ended.exception)


@pytest.mark.parametrize("kind", STARLETTE_KINDS)
def test_fail_closed_without_middleware_in_starlette(kind: str, ran: list[str]) -> None:
    """Pitfall 3: neither functions, methods nor metered apps run without the middleware."""
    (ended,) = visit(starlette_app(ran), Visit(f"/{kind}"))
    assert ran == []
    assert isinstance(ended.exception, NoCallError)


def test_say_that_no_call_runs() -> None:
    """Pitfall 3: `current_call` outside any request raises with both ways to get one."""
    with pytest.raises(NoCallError, match=r"MeteringMiddleware.*metering\.charge\(\)"):
        current_call()


def test_run_endpoints_unmetered_in_unit_tests() -> None:
    """Pitfall 3: `unmetered` lets every kind of decorated function run as itself, and shows what it reported."""

    @billable(PRICE)
    async def coroutine() -> int:
        await current_call().admit(PRICE)
        current_call().record(TOKENS, model="m")
        return current_call().affordable() and 1

    @billable(PRICE)
    def plain() -> int:
        return 2

    @billable(PRICE)
    async def agen() -> AsyncIterator[int]:
        yield 3

    @billable(PRICE)
    def gen() -> Iterator[int]:
        yield 4

    async def story() -> list[int]:
        return [await coroutine(), await plain(), *[each async for each in agen()], *gen()]

    with unmetered() as call:
        assert asyncio.run(story()) == [1, 2, 3, 4]
    assert [report.model for report in call.reports] == ["m"]
    with pytest.raises(NoCallError):
        current_call()


def test_end_unmetered_with_its_block(ran: list[str]) -> None:
    """Pitfall 1: what `unmetered` let in is over when its block ends, also for a context that was copied inside."""

    @billable(PRICE)
    async def endpoint() -> None:
        ran.append("endpoint")

    with unmetered(Metering(sinks=())):
        context = contextvars.copy_context()
    with pytest.raises(CallClosedError):
        context.run(asyncio.run, endpoint())
    assert ran == []


# -- pitfall 4: decorators above the route's own -----------------------------------------------------------


async def startup(app: ASGIApp) -> list[Message]:
    """What the server hears when it starts and, if it can, stops *app*."""
    heard: list[Message] = []
    asks = iter(["lifespan.startup", "lifespan.shutdown"])

    async def receive() -> Message:
        return {"type": next(asks)}

    async def send(message: Message) -> None:
        heard.append(message)

    await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
    return heard


def transparent(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


def upside_down(app: FastAPI) -> None:
    @billable(PRICE)
    @app.get("/search")
    async def search() -> str:
        return "free for all"


def upside_down_between(app: FastAPI) -> None:
    @rate_limited("1/minute")
    @transparent
    @app.get("/search")
    async def search() -> str:
        return "free for all"


def upside_down_in_router(app: FastAPI) -> None:
    router = APIRouter(prefix="/v1")

    @billable(PRICE)
    @router.get("/search")
    async def search() -> str:
        return "free for all"

    app.include_router(router, prefix="/api")


def upside_down_in_mount(app: FastAPI) -> None:
    sub = FastAPI()
    upside_down(sub)
    app.mount("/sub", sub)


WRONG = {
    "plain": (upside_down, "/search runs "),
    "between": (upside_down_between, "/search runs "),
    "router": (upside_down_in_router, "/api/v1/search runs "),
    "mount": (upside_down_in_mount, "/sub/search runs "),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("wrong", WRONG)
def test_refuse_to_start_with_decorators_in_the_wrong_order(wrong: str, how: How, scene: Scene) -> None:
    """Pitfall 4: a route whose decorators stand above its own would be free, so the server hears of a failed startup."""
    build, beginning = WRONG[wrong]
    app = FastAPI()
    build(app)
    heard = asyncio.run(startup(installed(app, scene.metering, how)))
    assert [message["type"] for message in heard] == ["lifespan.startup.failed"]
    assert heard[0]["message"].startswith(beginning)
    assert "Put them below it." in heard[0]["message"]


@pytest.mark.parametrize("how", HOW)
def test_start_with_decorators_in_the_right_order(how: How, scene: Scene) -> None:
    """Pitfall 4: the same route in the right order starts and stops, with the two messages and no others."""
    heard = asyncio.run(startup(installed(fastapi_app([]), scene.metering, how)))
    assert [message["type"] for message in heard] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_refuse_to_start_where_a_bare_function_is_routed_in_starlette(scene: Scene) -> None:
    """Pitfall 4: a route added for the bare function, although a guarded one exists, fails the startup."""

    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("free for all")

    billable(PRICE)(search)
    heard = asyncio.run(startup(installed(starlette(("/search", search)), scene.metering, "added")))
    assert "/search runs" in heard[0]["message"]


def test_start_where_one_function_is_routed_twice(scene: Scene) -> None:
    """Pitfall 4: a function that is free on one route and guarded on another, both reached, is no mistake."""

    async def search(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    app = installed(starlette(("/free", search), ("/paid", billable(PRICE)(search))), scene.metering, "added")
    free, paid = visit(app, Visit("/free", caller=POOR), Visit("/paid", caller=POOR))
    assert (status(free.log), status(paid.log)) == (200, 402)


def test_warn_of_what_no_route_reaches(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: a decorated function of the application's own module that no route reaches is a warning, not a failure."""

    @billable(PRICE)
    async def forgotten() -> None: ...

    async def reached(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    visit(installed(starlette(("/", reached)), scene.metering, "added"), Visit())
    named = [record.getMessage() for record in caplog.records if "forgotten is decorated" in record.getMessage()]
    assert len(named) == 1
    assert "no route reaches it" in named[0]


def test_keep_quiet_of_applications_built_before(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """X.5: an application that a function builds is not warned of the endpoints of those that it built before."""
    before = fastapi_app([])
    visit(installed(fastapi_app([]), scene.metering, "added"), Visit("/async"))
    assert before is not None
    assert [record for record in caplog.records if "fastapi_app" in record.getMessage()] == []


# -- pitfall 5: every kind of function ---------------------------------------------------------------------


def visited(app: ASGIApp, path: str, caller: str, spec_version: str = "2.3") -> Drive:
    (ended,) = visit(app, Visit(path, caller=caller, spec_version=spec_version))
    return ended


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", STARLETTE_KINDS)
def test_gate_every_kind_of_starlette_endpoint(kind: str, how: How, scene: Scene, ran: list[str]) -> None:
    """Pitfall 5: functions and methods, async and sync, streams and whole apps: one admission, one settle, or 402."""
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
    """Pitfall 5: async and sync endpoints of FastAPI: one admission and one settle, or 402 and no line of the body."""
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


# -- pitfall 6: what frameworks read of a function ---------------------------------------------------------


class Item(BaseModel):
    name: str
    price: int = 1


class Found(BaseModel):
    items: list[Item]


async def principal(limit: Annotated[int, Query(ge=1)] = 10) -> int:
    return limit


def documented(metered: bool) -> FastAPI:
    """An application with everything that FastAPI reads from signatures, metered or not."""
    guard: Callable[[Any], Any] = (
        (lambda function: rate_limited("60/minute")(billable(PRICE)(function)))
        if metered
        else (lambda function: function)
    )
    app = FastAPI()
    router = APIRouter(prefix="/v1", tags=["items"])

    @router.post("/items/{item_id}", response_model=Found)
    @guard
    async def create(
        item_id: int, item: Item, q: Annotated[str | None, Query(max_length=5)] = None, who: int = Depends(principal)
    ) -> Any:
        """Create an item."""
        return {"items": [item]}

    @router.get("/items")
    @guard
    def find(who: Annotated[int, Depends(principal)], q: str = "x") -> Found:
        """Find items."""
        return Found(items=[Item(name=q, price=who)])

    @router.get("/stream", response_class=EventSourceResponse)
    @guard
    async def stream(q: str = "x") -> AsyncIterator[Item]:
        yield Item(name=q)

    @router.get("/lines")
    @guard
    def lines(q: str = "x") -> Iterator[Item]:
        yield Item(name=q)

    app.include_router(router, prefix="/api")
    return app


def test_leave_the_openapi_document_as_it_was() -> None:
    """Pitfall 6: the document of a decorated application is byte for byte that of the bare one, string annotations too."""
    assert json.dumps(documented(metered=True).openapi()) == json.dumps(documented(metered=False).openapi())


def test_resolve_string_annotations_in_the_signature() -> None:
    """Pitfall 6: the wrapper's own signature has the types, for frameworks that look names up in its module."""

    @billable(PRICE)
    async def create(item: Item, q: Annotated[str, Query()] = "x") -> Found: ...

    signature = create.__signature__
    assert signature.parameters["item"].annotation is Item
    assert signature.return_annotation is Found


def test_keep_annotations_that_cannot_be_resolved() -> None:
    """Pitfall 6: a name that exists for type checkers only stays a string, and decorating does not fail."""

    @billable(PRICE)
    async def create(item: OnlyForCheckers) -> None: ...  # noqa: F821

    assert create.__signature__.parameters["item"].annotation == "OnlyForCheckers"


@pytest.mark.parametrize("how", HOW)
def test_serve_a_documented_application(how: How, scene: Scene) -> None:
    """Pitfall 6: body models, dependencies and response models work the same behind the decorators."""
    ask = Visit(
        "/api/v1/items/3", "POST", query="q=abc", body=b'{"name":"n"}', headers=(("content-type", "application/json"),)
    )
    metered, bare = (
        visit(installed(documented(metered), Scene().metering, how), ask, Visit("/api/v1/items"))
        for metered in (True, False)
    )
    for one, other in zip(metered, bare, strict=True):
        assert (status(one.log), body(one.log)) == (status(other.log), body(other.log)) == (200, body(one.log))


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
    """Pitfall 8: a metered endpoint called inside another's call is a mistake that a sentence explains, never a second charge."""

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


def test_refuse_a_second_explicit_gate(scene: Scene) -> None:
    """Pitfall 8: two explicit gates in one handler would charge twice, so the second one raises."""

    async def endpoint(request: Request) -> PlainTextResponse:
        await current_call().admit(PRICE)
        with pytest.raises(ConfigurationError, match="Use metering.charge"):
            await current_call().admit(PRICE)
        return PlainTextResponse("ok")

    (ended,) = visit(installed(starlette(("/", endpoint)), scene.metering, "added"), Visit())
    assert status(ended.log) == 200
    assert scene.settled() == PRICE


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
    """Pitfall 12: HEAD, OPTIONS, and requests that reach no endpoint ask the store nothing, whoever sends them."""
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
    """Pitfall 39: lines, limits and events are named by the function, so a route's prefix or parameters change nothing."""

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
