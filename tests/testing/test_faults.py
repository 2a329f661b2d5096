"""The fault kit: points are reached where they say, clients leave when they say, stores are down as long as told."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call, slices
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send
from asgi_metering.errors import ConfigurationError, SettlementError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.rules.operations import PostGrant
from asgi_metering.stores.contract import HoldRow, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing import FakeClock
from asgi_metering.testing.faults import (
    PHASES,
    POINTS,
    Crash,
    crash_after,
    disconnect_at,
    kill,
    store_down,
    until_killed,
)
from asgi_metering.testing.faults.departures import Shown
from asgi_metering.testing.faults.outages import DownHow
from asgi_metering.usage.event import UsageEvent
from tests.harness.drive import body, drive, http_scope, lifespan, status, websocket_scope
from tests.harness.waiting import wait_until
from tests.harness.warm import preload

preload()

CREDITS = 1_000_000
"""Smallest parts of one."""


class Recorder(Crash):
    """A fault that never comes: it notes each point that is reached."""

    def __init__(self) -> None:
        super().__init__("opening.before")
        self.seen: list[str] = []

    def reach(self, point: str) -> None:
        """Note it."""
        self.seen.append(point)


class Deaf:
    """A sink that nobody listens to."""

    name = "deaf"
    enabled = False

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """Never called."""
        raise AssertionError(events)


def metering_on(store: Store, *sinks: Any, **more: Any) -> Metering:
    """A metering with one caller."""
    return Metering(store, identify=lambda connection: Caller("ann"), sinks=sinks, **more)


def rooms(metering: Metering, fault: Crash) -> ASGIApp:
    """A stream of three messages that reports a token for each, and a plain answer; behind the middleware."""

    @billable(per_token(output=1), hold=10)
    @fault.endpoint
    async def stream(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            for chunk in (b"a", b"b", b"c"):
                current_call().record(TokenUsage(input=0, output=1))
                yield chunk

        return StreamingResponse(chunks())

    @billable(2)
    @fault.endpoint
    def plain(request: Request) -> PlainTextResponse:
        return PlainTextResponse("plain")

    app = Starlette(routes=[Route("/stream", stream), Route("/plain", plain)])
    return fault.app(MeteringMiddleware(app, metering=metering))


# -- crashes -----------------------------------------------------------------------------------------------


CALLED = [
    "admission.before",
    "admission.inside",
    "admission.after",
    "endpoint.before",
    "endpoint.after",
    "response.start",
    "response.first_byte",
    "response.before_last",
    "response.last",
    "response.returned",
    "end.before",
    "end.inside",
    "end.after",
    "claim.before",
    "claim.inside",
    "claim.after",
    "delivery.before",
    "delivery.after",
    "acknowledgement.before",
    "acknowledgement.inside",
    "acknowledgement.after",
]
"""What one call comes to behind its grant."""


@pytest.mark.parametrize("path", ["/stream", "/plain"])
def test_reach_the_points_of_a_call_in_their_order(path: str) -> None:
    """A call comes to each of its points in the order of the published list, whatever its endpoint is."""
    fault = Recorder()

    async def run() -> None:
        async def take(events: Sequence[UsageEvent]) -> None:
            assert len(events) == 1

        store = fault.store(MemoryStore(fault.clock(FakeClock())))
        metering = metering_on(store, fault.sink(CallbackSink(take)))
        app = rooms(metering, fault)
        async with lifespan(app):
            await metering.grant("ann", 100, id="g")
            await drive(app, http_scope(path))

    asyncio.run(run())
    began = [point for point in fault.seen if point.partition(".")[0] in ("opening", "units", "grant")]
    assert began[:5] == ["opening.before", "opening.after", "units.before", "units.inside", "units.after"]
    assert began[5:] == ["grant.before", "grant.inside", "grant.after"]
    seen = fault.seen[fault.seen.index("admission.before") :]
    # A body of one message is the first and the last at once.
    alike = {"/plain": ("response.first_byte", "response.before_last"), "/stream": ()}[path]
    expected = [point for point in CALLED if point not in alike]
    assert [point for point in seen if point in expected][: len(expected)] == expected
    assert set(alike) <= set(seen)
    assert [point for point in POINTS if point in CALLED] == CALLED


def test_reach_the_points_of_an_outage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that ends while the store is down comes to the points of the journal, and of a store that comes back."""
    for name in ("RETRY_FIRST_S", "RETRY_LAST_S", "IDLE_S"):
        monkeypatch.setattr(f"asgi_metering.delivery.{name}", 0.01)
    fault = Recorder()

    async def run() -> None:
        down = store_down()
        metering = metering_on(fault.store(down), journal=fault.journal(tmp_path / "j"))
        async with metering:
            assert metering.journal is not None
            await metering.grant("ann", 100, id="g")
            with contextlib.suppress(SettlementError):
                async with metering.charge(payer="ann", line="job", price=1):
                    down.fail()
            down.restore()
            async with asyncio.timeout(10):
                while await metering.journal.counts() != (0, 0):
                    await asyncio.sleep(0.01)

    asyncio.run(run())
    expected = ["keeping.before", "keeping.after", "reading.after"]
    expected += ["recovery.before", "recovery.after", "end.after", "removal.before", "removal.after"]
    assert [point for point in dict.fromkeys(fault.seen) if point in expected] == expected


def test_reach_the_cut_of_a_stream() -> None:
    """A stream that is stopped since nothing more can be held for it comes to its point before its last message."""
    fault = Recorder()

    @billable(per_token(input=1, output=1), hold=slices(5))
    async def endpoint(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            call = current_call()
            yield b"data: a\n\n"
            call.record(TokenUsage(input=0, output=50))
            while call.growth is None or not call.growth.is_cut:
                await asyncio.sleep(0)
            yield b"data: b\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def run() -> None:
        metering = metering_on(MemoryStore())
        inner = fault.stream(Starlette(routes=[Route("/", endpoint)]))
        app = fault.app(MeteringMiddleware(inner, metering=metering))
        async with lifespan(app):
            await metering.grant("ann", 20, id="g")
            await drive(app, http_scope("/"))

    asyncio.run(run())
    expected = ["response.first_byte", "response.cut", "response.before_last", "response.last"]
    assert [point for point in fault.seen if point in expected] == expected


def test_reach_a_point_for_the_time_that_was_asked_for() -> None:
    """A fault comes once, at its time, and tells how often its point was reached."""
    struck: list[int] = []
    fault = crash_after("grant.after", nth=2, how=lambda: struck.append(fault.reached))

    async def run() -> None:
        store = fault.store(MemoryStore())
        await store.post([PostGrant(f"g{number}", "ann", "credits", 1) for number in range(3)])

    asyncio.run(run())
    assert (struck, fault.reached) == ([2], 3)


def test_reach_nothing_inside_a_reading() -> None:
    """A clock that is read while no operation runs leads to no point inside a transaction."""
    fault = Recorder()
    clock = fault.clock(FakeClock(5.0))
    fault.inside(("end",))
    assert (clock(), clock(), fault.seen) == (5.0, 5.0, ["end.inside"])
    fault.inside(())
    assert (clock(), fault.seen) == (5.0, ["end.inside"])


def test_ask_for_a_point_that_there_is_not() -> None:
    """A point or a time that cannot be reached is refused before anything runs."""
    with pytest.raises(ConfigurationError, match=r"no point 'admission'.*admission\.before"):
        crash_after("admission")
    with pytest.raises(ConfigurationError, match="nth=0 is no time"):
        crash_after("admission.after", nth=0)


def test_stand_around_what_is_no_request() -> None:
    """Lifespans and WebSockets pass as they are, and a sink that nobody listens to stays one."""
    fault = Recorder()
    seen: list[str] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])
        await send({"type": "websocket.close", "code": 1000})

    asyncio.run(drive(fault.app(inner), websocket_scope()))
    assert (seen, fault.seen) == (["websocket"], [])
    sink = fault.sink(Deaf())
    assert (sink.name, getattr(sink, "enabled", None)) == ("deaf", False)


def test_reach_nothing_that_the_server_did_not_take() -> None:
    """A message that the server refuses, since the client left, leads to no point behind it."""
    fault = Recorder()

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    ended = asyncio.run(drive(fault.app(inner), http_scope(spec_version="2.4"), disconnect_at=1))
    assert isinstance(ended.exception, OSError)
    assert fault.seen == ["response.start", "response.before_last"]


def die(path: str) -> None:
    """Be killed in the middle."""
    Path(path).write_text("begun")
    kill()
    Path(path).write_text("went on")


async def live(path: str) -> None:
    """Come to the end."""
    await asyncio.to_thread(Path(path).write_text, "done")


def stay(path: str) -> None:
    """Come to no end."""
    Path(path).write_text("begun")
    threading.Event().wait()


def test_run_until_killed(tmp_path: Path) -> None:
    """A process that is killed stops where it was, and the one that started it goes on."""
    until_killed(die, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "begun"


def test_run_what_is_not_killed(tmp_path: Path) -> None:
    """A process that came to its end, or to none, is an error: its point was never reached."""
    with pytest.raises(AssertionError, match="live was not killed but ended with code 0"):
        until_killed(live, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "done"
    with pytest.raises(TimeoutError, match=r"stay ran for 0\.5 s"):
        until_killed(stay, str(tmp_path / "other"), timeout_s=0.5)


# -- departures --------------------------------------------------------------------------------------------


LEFT = {"before_start": (b"", 0), "start": (b"", 0), "body": (b"ab", 2), "before_last": (b"abc", 3), "end": (b"abc", 3)}
"""What the client got, and how many tokens were reported before the departure was seen."""


@pytest.mark.parametrize("shown", ["receive", "send", "cancel"])
@pytest.mark.parametrize("phase", PHASES)
def test_leave_at_each_phase(phase: str, shown: Shown) -> None:
    """The client has got what its phase says and no more, and the call is charged what was observed, once."""

    async def run() -> None:
        metering = metering_on(MemoryStore())
        async with metering:
            await metering.grant("ann", 100, id="g")
            left = await disconnect_at(phase, rooms(metering, Recorder()), "/stream", nth=2, shown=shown)
            got, charged = LEFT[phase]
            # Where nothing but a failing `send` shows it, the endpoint has begun its next chunk by then.
            charged += shown == "send" and phase in ("start", "body")
            assert left.body == got
            assert left.status == (None if phase == "before_start" else 200)
            assert (left.outcome == "returned") or phase != "end"
            balance = await metering.balance("ann")
            assert balance.held == 0
            assert balance.settled == charged * CREDITS
            receipts = [entry async for entry in metering.statement("ann") if entry.kind == "settle"]
            assert len(receipts) == (1 if balance.settled else 0)

    asyncio.run(run())


def test_leave_a_plain_answer_before_its_start() -> None:
    """An endpoint that answers at once never learns that its client left (DESIGN "End of call")."""

    async def run() -> None:
        metering = metering_on(MemoryStore())
        async with metering:
            await metering.grant("ann", 100, id="g")
            left = await disconnect_at("before_start", rooms(metering, Recorder()), "/plain", query="a=b", body=b"x")
            assert (left.status, left.headers, left.body, left.outcome) == (None, [], b"", "returned")
            assert (await metering.balance("ann")).held == 0

    asyncio.run(run())


def test_leave_an_application_that_raises_or_goes_on() -> None:
    """What the application raises is told, and one that goes on is cancelled after a bound."""

    async def raises(scope: Scope, receive: Receive, send: Send) -> None:
        raise RuntimeError(scope["path"])

    async def goes_on(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    left = asyncio.run(disconnect_at("end", raises, "/why"))
    assert (left.outcome, str(left.error)) == ("raised", "/why")
    with pytest.raises(TimeoutError, match=r"went on for 0\.01 s"):
        asyncio.run(disconnect_at("end", goes_on, timeout_s=0.01))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"phase": "middle"}, "no phase 'middle'"),
        ({"shown": "smoke"}, "by 'smoke'"),
        ({"nth": 0}, "nth=0 is no number"),
    ],
)
def test_leave_at_a_phase_that_there_is_not(wrong: dict[str, Any], told: str) -> None:
    """A phase, a way or a number that there is not is refused before the request."""

    async def untouched(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError(scope)

    with pytest.raises(ConfigurationError, match=told):
        asyncio.run(disconnect_at(wrong.pop("phase", "end"), untouched, **wrong))


# -- outages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["refuse", "stall", "forget"])
def test_take_the_store_away_and_give_it_back(how: DownHow, tmp_path: Path) -> None:
    """While the store is down a charging route answers 503 and charges nothing; later it answers again."""

    async def run() -> None:
        store = store_down(SQLiteStore(tmp_path / "metering.db"))
        metering = metering_on(store, store_timeout_s=0.2)
        app = rooms(metering, Recorder())
        async with metering:
            await metering.grant("ann", 100, id="g")
            with store.down(how):
                assert store.is_down
                refused = await drive(app, http_scope("/plain"))
            assert (status(refused.log), store.is_down) == (503, False)
            assert store.refused >= 1
            answered = await drive(app, http_scope("/plain"))
            assert (status(answered.log), body(answered.log)) == (200, b"plain")
            # What was asked while nobody answered was admitted perhaps: it is given back or ends by its policy.
            assert (await metering.balance("ann")).settled == 2 * CREDITS

    asyncio.run(run())


def test_lose_an_answer_and_ask_again() -> None:
    """A store that forgets has done what it was asked: the same operation again changes nothing (S3.15)."""

    async def run() -> None:
        store = store_down("memory://")
        await store.open()
        grant = PostGrant("g", "ann", "credits", 5)
        with store.down("forget"), pytest.raises(StoreUnavailableError, match="memory store is down"):
            await store.post([grant])
        (again,) = await store.post([grant])
        assert (again.applied, again.available) == (False, 5)
        with store.down("forget"):
            for question in (store.open(), store.read(HoldRow("none"))):
                with pytest.raises(StoreUnavailableError):
                    await question
        await store.close()

    asyncio.run(run())


def test_restore_a_stalled_store_from_another_thread() -> None:
    """Operations and readings that were stalled go on when any thread restores the store, unless they were given up."""
    store = store_down(MemoryStore())
    store.fail("stall")
    answers: list[object] = []

    async def run() -> None:
        await_all = [
            asyncio.create_task(work)
            for work in (store.open(), store.post([PostGrant("g", "ann", "credits", 5)]), store.read(HoldRow("none")))
        ]
        given_up = asyncio.create_task(store.read(HoldRow("none")))
        await asyncio.sleep(0)
        given_up.cancel()
        answers.extend(await asyncio.gather(*await_all))

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    wait_until(lambda: store.refused == 4, what="all four are stalled")
    assert not answers
    store.restore()
    thread.join()
    assert len(answers) == 3


def test_take_a_store_away_in_a_way_that_there_is_not() -> None:
    """A way to go down that there is not is refused, and the store stays up."""
    store = store_down()
    with pytest.raises(ConfigurationError, match="by 'smoke'"):
        store.fail("smoke")  # type: ignore[arg-type]
    assert not store.is_down
    assert (store.name, store.durable, store.shared, store.immediate) == ("memory", False, False, False)
