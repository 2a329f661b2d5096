"""Calls that are over, that belong to another request, or that nobody opened (pitfalls 1-3)."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from asgi_metering import (
    Caller,
    Metering,
    TokenUsage,
    billable,
    current_call,
    rate_limited,
)
from asgi_metering.call import Call
from asgi_metering.errors import CallClosedError, NoCallError
from asgi_metering.prices import per_token
from asgi_metering.rules.operations import PostGrant
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import unmetered
from tests.harness.drive import body, lifespan, status
from tests.pitfalls.apps import (
    FASTAPI_KINDS,
    PRICE,
    STARLETTE_KINDS,
    fastapi_app,
    installed,
    starlette_app,
)
from tests.pitfalls.scene import ANN, CREDIT, POOR, TOKENS, Books, Scene, SlowBooks, Visit, make, visit

BOB = "bob"


def starlette(*routes: tuple[str, Callable[..., Any]]) -> Starlette:
    """An application with these endpoints."""
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


@pytest.mark.parametrize("slow", ["identify", "store"])
def test_give_back_what_is_admitted_after_the_request(slow: str) -> None:
    """Pitfall 1: a task that asked in time and is answered too late is refused, and holds and takes nothing."""
    left: list[asyncio.Task[None]] = []
    tokens = rate_limited("1000/minute of tokens")

    async def play() -> None:
        free, store = asyncio.Event(), SlowBooks() if slow == "store" else Books()

        async def identify(_connection: Any) -> Caller:
            if slow == "identify":
                await free.wait()
            return Caller(ANN)

        async def endpoint(request: Request) -> PlainTextResponse:
            price = billable(per_token(output=1), hold=TokenUsage(output=3))
            left.append(asyncio.create_task(current_call().admit(price, tokens)))
            await asyncio.sleep(0)
            return PlainTextResponse("ok")

        metering = Metering(store, identify=identify, sinks=())
        app = installed(starlette(("/", endpoint)), metering, "added")
        MemoryStore.run_now(store, PostGrant("g", ANN, "credits", 100 * CREDIT))
        async with lifespan(app):
            await make(app, [Visit()])
            if isinstance(store, SlowBooks):
                store.door.set()
            free.set()
            with pytest.raises(CallClosedError):
                await left[0]
            async with asyncio.timeout(5):
                while (state := (await store.read(EverythingKept())).state).live:
                    await asyncio.sleep(0.001)
            assert metering.runtime().in_flight == {}
            assert state.accounts[ANN, "credits"].held == 0
            assert [counter.used for counter in state.counters.values()] == ([0] if slow == "store" else [])

    asyncio.run(play())


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
    """An application whose endpoint hands its work to one session."""
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
    """Pitfall 2: a session that ann began runs bob's tool for bob's money and refuses poor's, by the argument."""
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
    """Pitfall 1: without a request in the arguments the session's own is over, so a denied payer's tool fails."""

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
    """Pitfall 3: outside any request there is no call by default, and `current_call` names both ways to one (S2.44)."""
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
