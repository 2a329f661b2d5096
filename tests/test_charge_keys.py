"""Charge keys end to end: several requests are charged once per window, by the first that succeeds."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp

from asgi_metering import (
    Allowance,
    Metering,
    MeteringMiddleware,
    Payer,
    Wallet,
    billable,
    current_call,
    metered_app,
    rate_limited,
)
from asgi_metering.asgi.audit import audit
from asgi_metering.billing import observed_parts
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from tests.harness.drive import Drive, body, drive, headers, status
from tests.harness.servers import free_port
from tests.keyed import ANN, PRICE, Desk, asked, at_desk, store_of

pytestmark = pytest.mark.uncounted

KINDS = ("memory", "sqlite")
PATHS = ("/async", "/sync", "/sse", "/starlette/", "/whole/")
DAY = 86_400.0


def session(request: Request) -> str | None:
    """The key of a request."""
    return request.headers.get("x-session")


def of_scope(scope: Any) -> str | None:
    """The key of a request to a whole app."""
    found = dict(scope["headers"]).get(b"x-session")
    return found.decode() if found else None


def app_of(desk: Desk, **options: Any) -> ASGIApp:
    """An endpoint of every kind; they share one line, so that a session counts once for all of them."""
    api = FastAPI()
    part = functools.partial(billable, PRICE, line="chat", **options)

    @api.post("/async")
    @part(charge_key=session)
    async def of_async(request: Request) -> Any:
        desk.ran.append(current_call().joined)
        if request.headers.get("x-wait"):
            desk.entered.set()
            await desk.gate.wait()
        return JSONResponse({}, int(request.headers.get("x-status", "200")))

    @api.post("/sync")
    @part(charge_key="X-Session")
    def of_sync() -> dict[str, int]:
        desk.ran.append(current_call().joined)
        return {}

    @api.post("/sse", response_class=EventSourceResponse)
    @part(charge_key="X-Session")
    async def of_sse() -> AsyncIterator[str]:
        desk.ran.append(current_call().joined)
        yield "one"

    @part(charge_key=session)
    async def of_starlette(request: Request) -> PlainTextResponse:
        desk.ran.append(current_call().joined)
        return PlainTextResponse("ok")

    api.mount("/starlette", Starlette(routes=[Route("/", of_starlette, methods=["POST"])]))

    async def whole(scope: Any, receive: Any, send: Any) -> None:
        desk.ran.append(current_call().joined)
        await PlainTextResponse("ok")(scope, receive, send)

    api.router.routes.append(Mount("/whole", metered_app(whole, part(charge_key=of_scope), name="whole")))
    return api


def of(name: str | None, *more: tuple[str, str]) -> dict[str, Any]:
    """Options of a request in a session."""
    return {"key": None, "headers": [*([("x-session", name)] if name else []), *more]}


def field(ended: Drive, name: str) -> str | None:
    """The first header field *name* of a response."""
    found = [value for key, value in headers(ended.log) if key == name]
    return found[0] if found else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS)
def test_charge_a_session_once(path: str, kind: str, tmp_path: Path) -> None:
    """S0.3, S0.35: the first call of a session is charged, later ones join it free and know it."""

    async def story(desk: Desk) -> None:
        ended = [await desk.ask(path, **of("s")) for _ in range(3)]
        assert [status(each.log) for each in ended] == [200] * 3
        assert desk.ran == [False, True, True]
        assert await desk.spent() == PRICE

    at_desk(app_of, story, store_of(kind, tmp_path))


def test_count_a_session_over_the_routes_of_a_line() -> None:
    """The key belongs to payer and line: another route of the line joins, another session or payer does not."""

    async def story(desk: Desk) -> None:
        await desk.metering.grant("eve", 10, id="e")
        for path in PATHS:
            await desk.ask(path, **of("s"))
        await desk.ask("/async", **of("other"))
        await desk.ask("/async", **of("s"), caller="eve")
        assert desk.ran == [False, True, True, True, True, False, False]
        assert await desk.spent() == 2 * PRICE
        assert await desk.spent("eve") == PRICE

    at_desk(app_of, story, MemoryStore())


def test_charge_a_call_without_a_key_by_itself() -> None:
    """No key, no company: such calls pay for themselves, each."""

    async def story(desk: Desk) -> None:
        for path in ("/async", "/sync", "/async", "/sync"):
            await desk.ask(path, **of(None))
        assert desk.ran == [False] * 4
        assert await desk.spent() == 4 * PRICE

    at_desk(app_of, story, MemoryStore())


def test_tell_nothing_of_the_balance_to_a_call_that_joined() -> None:
    """A call that joined holds nothing, so that no field says what its payer has left after it."""

    async def story(desk: Desk) -> None:
        first, second = await desk.ask("/async", **of("s")), await desk.ask("/async", **of("s"))
        assert field(first, "metering-available") == '"98";unit="credits"'
        assert field(second, "metering-available") is None

    at_desk(app_of, story, MemoryStore())


@pytest.mark.parametrize("kind", KINDS)
def test_charge_once_among_many_at_the_same_time(kind: str, tmp_path: Path) -> None:
    """S0.10: N concurrent first uses of one key consume exactly one."""

    async def story(desk: Desk) -> None:
        await asyncio.gather(*(drive(desk.app, asked("/async", **of("s")), body=b"{}") for _ in range(20)))
        await desk.booked()
        assert sorted(desk.ran) == [False] + [True] * 19
        assert await desk.spent() == PRICE

    at_desk(app_of, story, store_of(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_let_one_of_an_empty_allowance_bring_all(kind: str, tmp_path: Path) -> None:
    """S0.3: an allowance of one session takes 20 concurrent calls of it, and refuses the next session."""
    sources = [Allowance(PRICE)]

    async def story(desk: Desk) -> None:
        ended = await asyncio.gather(*(drive(desk.app, asked("/async", **of("s")), body=b"{}") for _ in range(20)))
        assert {status(each.log) for each in ended} == {200}
        await desk.booked()
        assert status((await desk.ask("/async", **of("t"))).log) == 429

    at_desk(functools.partial(app_of, sources=sources), story, store_of(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_let_the_one_that_succeeds_pay(kind: str, tmp_path: Path) -> None:
    """The first call fails while another runs: that one pays when it succeeds."""

    async def story(desk: Desk) -> None:
        second = None
        first = asyncio.create_task(
            drive(desk.app, asked("/async", **of("s", ("x-wait", "1"), ("x-status", "500"))), body=b"{}")
        )
        await desk.entered.wait()
        desk.entered.clear()
        second = asyncio.create_task(drive(desk.app, asked("/async", **of("s", ("x-wait", "1"))), body=b"{}"))
        await desk.entered.wait()
        assert (await desk.metering.balance(ANN)).held == PRICE * 1_000_000
        desk.gate.set()
        await asyncio.gather(first, second)
        await desk.booked()
        assert desk.ran == [False, True]
        assert await desk.spent() == PRICE

    at_desk(app_of, story, store_of(kind, tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_release_with_the_last_that_fails(kind: str, tmp_path: Path) -> None:
    """A key whose calls all failed holds and costs nothing, and the next call begins it anew."""

    async def story(desk: Desk) -> None:
        for _ in range(2):
            await desk.ask("/async", **of("s", ("x-status", "500")))
        assert await desk.spent() == 0
        await desk.ask("/async", **of("s"))
        assert desk.ran == [False, False, False]
        assert await desk.spent() == PRICE

    at_desk(app_of, story, store_of(kind, tmp_path))


@pytest.mark.parametrize(
    ("per", "stays", "passes"),
    [("day", 11 * 3600, 3600), ("week", 2 * DAY + 11 * 3600, 3600), ("month", 27 * DAY, 12 * 3600), (90, 89, 1)],
    ids=["day", "week", "month", "seconds"],
)
def test_charge_again_in_the_next_window(per: Any, stays: float, passes: float) -> None:
    """S0.32: "counted already" is true for its own window alone. The story begins on Friday noon, 4 October 2024."""
    clock = FakeClock()

    async def story(desk: Desk) -> None:
        await desk.ask("/async", **of("s"))
        clock.advance(stays)
        await desk.ask("/async", **of("s"))
        clock.advance(passes)
        await desk.ask("/async", **of("s"))
        assert desk.ran == [False, True, False]
        assert await desk.spent() == 2 * PRICE

    at_desk(functools.partial(app_of, charge_per=per), story, MemoryStore(clock))


def test_begin_the_day_where_its_zone_does() -> None:
    """S0.5: the window's days are those of charge_zone: noon UTC is 21 o'clock in Tokyo."""
    clock = FakeClock()

    async def story(desk: Desk) -> None:
        for _ in range(3):
            await desk.ask("/async", **of("s"))
            clock.advance(2 * 3600)
        assert desk.ran == [False, True, False]

    at_desk(functools.partial(app_of, charge_zone="Asia/Tokyo"), story, MemoryStore(clock))


def test_charge_what_a_member_in_doubt_had_delivered() -> None:
    """A call that joined, sent its first byte and died pays for its key: its heartbeats carry the price."""
    seen: list[tuple[bool, int]] = []

    def make(desk: Desk) -> ASGIApp:
        api = FastAPI()

        @api.post("/stream")
        @billable(PRICE, charge_key="x-session")
        async def stream() -> Any:
            async def chunks() -> AsyncIterator[bytes]:
                call = current_call()
                yield b"one"
                await asyncio.sleep(0)
                seen.append((call.joined, await observed_parts(call)))

            from starlette.responses import StreamingResponse

            return StreamingResponse(chunks())

        return api

    async def story(desk: Desk) -> None:
        await desk.ask("/stream", **of("s"))
        await desk.ask("/stream", **of("s"))
        assert seen == [(False, PRICE * 1_000_000), (True, PRICE * 1_000_000)]

    at_desk(make, story, MemoryStore())


def test_store_no_session_as_it_was_sent() -> None:
    """DESIGN 10: the store has a hash of the key, which may be personal."""

    async def story(desk: Desk) -> None:
        await desk.ask("/async", **of("mrs-smith"))
        assert "smith" not in repr((await desk.store.read(EverythingKept())).state)

    at_desk(app_of, story, MemoryStore())


def test_keep_keys_of_other_types_apart() -> None:
    """The int 7 and the text '7' are two sessions; a key that is neither is refused loudly, and charges nothing."""
    keys: list[Any] = [7, "7", 7, True, "", 1.5]

    def make(desk: Desk) -> ASGIApp:
        @billable(PRICE, charge_key=lambda request: keys[len(desk.ran)])
        async def endpoint(request: Request) -> PlainTextResponse:
            desk.ran.append(current_call().joined)
            return PlainTextResponse("ok")

        return Starlette(routes=[Route("/", endpoint, methods=["POST"])])

    async def story(desk: Desk) -> None:
        for _ in range(3):
            await desk.ask("/", key=None)
        assert desk.ran == [False, False, True]
        for _ in range(3):
            ended = await drive(desk.app, asked("/", key=None), body=b"")
            assert isinstance(ended.exception, ConfigurationError)
            desk.ran.append(None)
        assert await desk.spent() == 2 * PRICE

    at_desk(make, story, MemoryStore())


# -- skip_if -------------------------------------------------------------------------------------------------


def skipping(desk: Desk, **options: Any) -> ASGIApp:
    """An application whose approvals are free."""
    api = FastAPI()

    @api.post("/turn")
    @rate_limited("2/minute")
    @billable(PRICE, skip_if=lambda body: body.get("approval", False), **options)
    async def turn(body: dict[str, Any]) -> dict[str, Any]:
        desk.ran.append(body)
        return {"held": current_call().held, "joined": current_call().joined}

    return api


@pytest.mark.parametrize("payer", [ANN, "poor"])
def test_charge_nothing_for_a_continuation(payer: str) -> None:
    """S0.16: a call that skip_if tells runs free, also for who has nothing left."""

    async def story(desk: Desk) -> None:
        ended = await desk.ask("/turn", key=None, caller=payer, body=b'{"approval": true}')
        assert status(ended.log) == 200
        assert field(ended, "metering-available") is None
        assert await desk.spent(payer) == 0

    at_desk(skipping, story, MemoryStore())


def test_charge_what_is_no_continuation() -> None:
    """Every other call is charged, or refused."""

    async def story(desk: Desk) -> None:
        assert status((await desk.ask("/turn", key=None)).log) == 200
        assert status((await desk.ask("/turn", key=None, caller="poor")).log) == 402
        assert await desk.spent() == PRICE

    at_desk(skipping, story, MemoryStore())


def test_count_a_continuation_against_limits() -> None:
    """What is free is not unlimited."""

    async def story(desk: Desk) -> None:
        answers = [await desk.ask("/turn", key=None, body=b'{"approval": true}') for _ in range(3)]
        assert [status(each.log) for each in answers] == [200, 200, 429]

    at_desk(skipping, story, MemoryStore())


def test_audit_a_continuation() -> None:
    """Free work is audited (S4.17): its event has the line and an amount of 0."""
    told: list[Any] = []

    async def story(desk: Desk) -> None:
        desk.metering.sinks = (CallbackSink(told.extend),)
        desk.metering.runtime()._start_exporter()
        await desk.ask("/turn", key=None, body=b'{"approval": true}')
        async with asyncio.timeout(10):
            while not told:
                await asyncio.sleep(0.001)
        assert [(event.line, event.amount, event.outcome) for event in told] == [("turn", 0, "completed")]

    at_desk(skipping, story, MemoryStore())


@pytest.mark.parametrize("answer", ['"false"', "1", "null", "[]"])
def test_refuse_a_skip_that_is_no_bool(answer: str) -> None:
    """What is merely true would be a call for nothing: skip_if answers True or False, and else the request fails."""

    async def story(desk: Desk) -> None:
        ended = await drive(desk.app, asked("/turn", key=None), body=f'{{"approval": {answer}}}'.encode())
        assert isinstance(ended.exception, ConfigurationError)
        assert desk.ran == []

    at_desk(skipping, story, MemoryStore())


def test_replay_a_call_of_a_charge_key() -> None:
    """Both keys at once: the repeat of a call that joined is answered with its own answer."""

    async def story(desk: Desk) -> None:
        first = await desk.ask("/async", **{**of("s"), "key": "k"})
        joined = await desk.ask("/async", **{**of("s"), "key": "l"})
        again = await desk.ask("/async", **{**of("s"), "key": "l"})
        assert desk.ran == [False, True]
        assert field(again, "idempotency-replayed") == "true"
        assert body(again.log)
        assert [status(each.log) for each in (first, joined, again)] == [200] * 3
        assert await desk.spent() == PRICE

    at_desk(functools.partial(app_of, idempotency=True, sources=[Wallet()]), story, MemoryStore())


def test_refuse_keys_that_several_owners_pay_for_where_payers_are_apart() -> None:
    """On a Cluster a key has one place: a route of which others may pay is found at startup, also outside HTTP."""
    sources = [Wallet(payer=Payer("own")), Wallet(payer=Payer("platform", account="acme"))]
    part = billable(1, charge_key="x-session", sources=sources)
    nowhere = f"redis+cluster://127.0.0.1:{free_port()}"
    errors = {}
    for url in (nowhere, f"{nowhere}?partitions=1", "memory://"):
        metering = Metering(url, sinks=())
        app = MeteringMiddleware(metered_app(PlainTextResponse("done"), part, name=f"keyed {url}"), metering=metering)
        errors[url] = audit(app, app.features, frozenset(), metering).errors
    (error,) = errors.pop(nowhere)
    assert "has a charge_key, and 'platform' may pay for it" in error
    assert list(errors.values()) == [[], []]

    async def outside() -> None:
        metering = Metering(nowhere, sinks=())
        with pytest.raises(ConfigurationError, match="Leave the sources to the call's own payer"):
            async with metering.charge(payer="ann", line="job", price=1, charge_key="s", sources=sources):
                raise AssertionError("It ran.")

    asyncio.run(outside())
