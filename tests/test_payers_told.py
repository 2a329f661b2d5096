"""Payers as they are told, kept and counted: on the wire and on events, by session, and for each user apart."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route

from asgi_metering import Allowance, Caller, Metering, MeteringMiddleware, Wallet, billable, current_call
from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.asgi.fields import HeaderNames
from asgi_metering.call import CallRefused
from asgi_metering.decisions import Reason
from asgi_metering.errors import ConfigurationError, PayerError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Operation, Preview
from asgi_metering.sources import Payer
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from tests.harness.drive import body, drive, headers, http_scope, status
from tests.test_payers import CREDIT, OWN, PLATFORM, SOURCES, charging, play, spent

Asked = list[tuple[str | None, dict[str, Any]]]


def asked(*bodies: bytes, sources: Any, answers: AnswerOptions | None = None, **options: Any) -> Asked:
    """Requests one after the other: ``Metering-Payer`` of each answer, and what its event says of who pays."""
    told: list[Any] = []
    metering = Metering("memory://", identify=lambda connection: Caller("ann"), sinks=(CallbackSink(told.extend),))

    @billable(options.pop("price", 1), line="chat", sources=sources, **options)
    async def chat(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    routes = [Route("/chat", chat, methods=["POST"])]
    app = MeteringMiddleware(Starlette(routes=routes), metering=metering, **({"answers": answers} if answers else {}))

    async def scene() -> Asked:
        async with metering:
            await metering.grant("ann", 100, id="g")
            fields = []
            for session in bodies:
                ended = await drive(app, http_scope("/chat", "POST", headers=[("x-session", session.decode())]))
                assert status(ended.log) == 200
                fields.append(dict(headers(ended.log)).get("metering-payer"))
            await metering.runtime().booked()
        return list(zip(fields, [dict(event.attributes) for event in told], strict=True))

    return asyncio.run(scene())


PAID_BY, SWITCHED = "metering.payer.name", "metering.payer.switched"


def test_name_the_payer_on_the_wire() -> None:
    """Each answer, and each event, names who pays, and says where that is another than the first choice (S0.38)."""
    assert asked(b"a", b"b", sources=SOURCES, price=2) == [
        ('"platform"', {PAID_BY: "platform"}),
        ('"own";switched', {PAID_BY: "own", SWITCHED: True}),
    ]


def test_name_the_payer_of_a_session_that_was_counted() -> None:
    """Requests that join a session hold nothing, and are told its payer all the same (S0.27, S0.38)."""
    found = asked(b"a", b"b", b"b", b"a", sources=[Allowance(1, payer=PLATFORM), Wallet()], charge_key="x-session")
    own = ("caller;switched", {SWITCHED: True})
    assert found == [('"platform"', {PAID_BY: "platform"}), own, own, ('"platform"', {PAID_BY: "platform"})]


def test_name_the_payer_of_free_work() -> None:
    """Work that costs nothing runs on the first choice, and says so (S0.26)."""
    assert asked(b"a", sources=SOURCES, price=0) == [('"platform"', {PAID_BY: "platform"})]


def test_give_each_user_an_allowance_on_the_shared_credential() -> None:
    """A payer without an account is the call's own: its allowance is counted by user and plan (S0.9, S0.19, S0.23)."""
    shared = Payer("platform", credential=lambda: "platform-key", headers={"x-bill-to": "acme"})
    sources = [Allowance({"free": 1, "pro": 2}, payer=shared), Wallet(payer=OWN)]

    async def scene(metering: Metering) -> None:
        paid = []
        for user, plan in (("ann", "free"), ("acme", "pro")):
            for _ in range(3):
                caller = Caller(user, plan=plan)
                async with charging(metering, 1, payer=user, caller=caller, sources=sources) as call:
                    paid.append((call.payer, call.paid_by.name, await call.credential()))
        own = ("ann", "platform", "platform-key"), ("acme", "platform", "platform-key")
        keys = ("ann", "own", "key of ann"), ("acme", "own", "key of acme")
        assert paid == [own[0], keys[0], keys[0], own[1], own[1], keys[1]]
        assert await spent(metering) == (2, 1)
        used = [(await metering.allowances(user, sources=sources, plan="pro"))[0].used for user in ("ann", "acme")]
        assert used == [CREDIT, 2 * CREDIT]

    play(scene)


def test_count_an_allowance_of_each_payer_at_the_expense_of_another() -> None:
    """Each user has so many uses of its own, and what is done inside of them is the platform's (S0.9, S0.19, S0.27)."""
    sources = [Allowance({"free": 1, "pro": 2}, payer=PLATFORM, each=True), Wallet(payer=OWN)]

    async def scene(metering: Metering) -> None:
        await metering.grant("eve", 100, id="g")
        paid = []
        for user, plan in (("ann", "free"), ("eve", "pro")):
            for _ in range(3):
                caller = Caller(user, plan=plan)
                async with charging(metering, 1, payer=user, caller=caller, sources=sources) as outer:
                    assert await outer.credential() == (
                        "platform-key" if outer.paid_by is PLATFORM else f"key of {user}"
                    )
                    async with charging(metering, 10, payer=None, line="sub") as sub:
                        assert (sub.paid_by, sub.caller.id) == (outer.paid_by, user)
                        async with charging(metering, 5, payer=None, line="subsub") as innermost:
                            assert innermost.paid_by is outer.paid_by
                paid.append((outer.payer, outer.paid_by.name, sub.payer, innermost.payer, outer.payer_switched))
        assert paid == [
            ("ann", "platform", "acme", "acme", False),
            ("ann", "own", "ann", "ann", True),
            ("ann", "own", "ann", "ann", True),
            ("eve", "platform", "acme", "acme", False),
            ("eve", "platform", "acme", "acme", False),
            ("eve", "own", "eve", "eve", True),
        ]
        # Of ann and eve the uses beyond their allowance, and what was done in these; the platform has the rest.
        assert await spent(metering) == (32, 45)
        assert (await metering.balance("eve")).settled == 16 * CREDIT
        seen = [(await metering.allowances(user, sources=sources, plan="pro"))[0] for user in ("ann", "eve", "bob")]
        assert [(each.payer, each.used // CREDIT) for each in seen] == [("ann", 1), ("eve", 2), ("bob", 0)]
        notice = await metering.preview("bob", line="job", price=1, sources=sources, plan="free")
        assert (notice.payer, notice.paid_by, notice.switched) == ("bob", PLATFORM, False)

    play(scene)


def test_compute_the_limit_of_each_payer() -> None:
    """A limit that is computed is asked for whom it is counted for, and not for whose expense it is (S0.1, S0.9)."""
    limits = {"ann": 2, "acme": 0}

    async def scene(metering: Metering) -> None:
        sources = [Allowance(lambda payer: limits[payer], payer=PLATFORM, each=True), Wallet(payer=OWN)]
        paid = []
        for _ in range(3):
            async with charging(metering, 1, sources=sources) as call:
                paid.append(call.paid_by.name)
        assert paid == ["platform", "platform", "own"]
        (seen,) = await metering.allowances("ann", sources=sources)
        assert (seen.payer, seen.limit // CREDIT) == ("ann", 2)

    play(scene)


@pytest.mark.parametrize("price", [0, 1])
def test_charge_the_platform_for_work_in_a_joined_or_free_call(price: int) -> None:
    """What is done inside is the platform's also where a session was counted before, or the call costs nothing."""
    sources = [Allowance(1, payer=PLATFORM, each=True), Wallet(payer=OWN)]

    async def scene(metering: Metering) -> None:
        for _ in range(2):
            async with (
                charging(metering, price, sources=sources, charge_key="s"),
                charging(metering, 10, payer=None, line="sub") as sub,
            ):
                assert (sub.payer, await sub.credential()) == ("acme", "platform-key")
        assert await spent(metering) == (0, 20)

    play(scene)


def test_compute_whose_expense_it_is() -> None:
    """An account that is computed is asked for all the same, and one that cannot be resolved starts nothing (S0.25)."""
    computed = Payer("team", account=lambda call: call.caller.attributes["team"])

    async def scene(metering: Metering) -> None:
        sources = [Allowance(1, payer=computed, each=True)]
        caller = Caller("ann", attributes={"team": "acme"})
        async with (
            charging(metering, 1, caller=caller, sources=sources) as outer,
            charging(metering, 10, payer=None, line="sub") as sub,
        ):
            assert (outer.payer, sub.payer) == ("ann", "acme")
        with pytest.raises(CallRefused):
            async with charging(metering, 1, sources=sources):
                raise AssertionError("It ran.")

    play(scene)


@pytest.mark.parametrize(
    ("sources", "mend"),
    [
        ([Allowance(1, payer=PLATFORM, each=True), Wallet(payer=PLATFORM)], "has other sources of its own account"),
        ([Allowance(1, payer=PLATFORM, each=True), Allowance(2, payer=PLATFORM, name="b")], "of its own account"),
    ],
    ids=["wallet", "allowance"],
)
def test_refuse_sources_of_two_accounts_for_one_payer(sources: Any, mend: str) -> None:
    """One call takes from one account of a payer: what grows or is split would not know where to go on."""
    with pytest.raises(ConfigurationError, match=mend):
        billable(1, sources=sources)
    billable(1, sources=[sources[0], Allowance(5, payer=PLATFORM, name="monthly", per="month", each=True)])


@pytest.mark.parametrize(("each", "payer"), [("yes", PLATFORM), (True, None)])
def test_refuse_each_that_means_nothing(each: Any, payer: Payer | None) -> None:
    """Without a payer an allowance is each payer's own, and what only looks like a bool is none."""
    with pytest.raises(ConfigurationError, match="each="):
        Allowance(1, payer=payer, each=each)


def test_keep_who_pays_before_the_paid_work_runs(tmp_path: Path) -> None:
    """Decision, payer and session are one row that any process reads before the first line of the work (S0.30)."""
    path = tmp_path / "m.db"
    kept: list[tuple[str, str]] = []

    async def play_both() -> None:
        async with Metering(SQLiteStore(path), sinks=()) as metering, Metering(SQLiteStore(path), sinks=()) as other:
            await metering.grant("ann", 100, id="g")
            sources = [Allowance(1, payer=PLATFORM), Wallet(payer=OWN)]
            for session in ("a", "b"):
                async with charging(metering, 1, sources=sources, charge_key=session) as call:
                    _, state = await other.store.read(EverythingKept())
                    kept.extend((hold.payer, hold.group) for hold in state.holds.values() if hold.id == call.id)
                    seen = await other.preview("ann", line="job", price=1, sources=sources, charge_key=session)
                    assert (seen.joined, seen.payer, seen.paid_by) == (True, call.payer, call.paid_by)

    asyncio.run(play_both())
    assert kept == [("acme", "platform"), ("ann", "own")]


@pytest.mark.parametrize(("per", "next_day"), [("day", "platform"), (30 * 86_400, "own")], ids=["window", "sticky"])
def test_decide_anew_who_pays_a_session_or_stick_to_it(per: Any, next_day: str) -> None:
    """On the next day a session is the platform's again, or for as long as its window says the user's (S0.32)."""
    clock = FakeClock()

    async def scene(metering: Metering) -> None:
        sources = [Allowance(1, payer=PLATFORM), Wallet(payer=OWN)]
        said: dict[str, Any] = {"sources": sources, "charge_per": per}
        for session in ("a", "b"):
            async with charging(metering, 1, charge_key=session, **said):
                pass
        clock.advance(86_400)
        async with charging(metering, 1, charge_key="b", **said) as call:
            assert (call.paid_by.name, call.joined) == (next_day, next_day == "own")

    play(scene, store=MemoryStore(clock))


def test_run_nothing_unbilled_where_the_decision_cannot_be_kept() -> None:
    """A store that cannot write the admission denies it, and no line of the work runs (S0.30, X.6)."""

    class ReadOnly(MemoryStore):
        """A store that keeps no admissions."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, Admit):
                raise StoreUnavailableError("read-only")
            return super().run_now(operation)

    async def scene(metering: Metering) -> None:
        with pytest.raises(CallRefused) as refused:
            async with charging(metering, sources=SOURCES):
                raise AssertionError("It ran.")
        assert refused.value.refusal.reason is Reason.STORE_DOWN

    play(scene, store=ReadOnly())


def test_let_the_application_answer_for_a_missing_credential() -> None:
    """What the user's branch runs on is not there: 401 by the application's own handler, free, and no hold (S0.25)."""
    lost = Payer("own", credential=lambda call: None)
    metering = Metering("memory://", identify=lambda connection: Caller("ann"), sinks=())
    started: list[str] = []
    api = FastAPI()
    api.add_middleware(MeteringMiddleware, metering=metering)

    @api.post("/chat")
    @billable(1, sources=[Allowance(0, payer=PLATFORM), Wallet(payer=lost)])
    async def chat() -> None:
        await current_call().credential()
        started.append("work")

    @api.exception_handler(PayerError)
    async def unpaid(request: Request, failure: PayerError) -> JSONResponse:
        return JSONResponse({"detail": str(failure)}, 401)

    async def scene() -> None:
        async with metering:
            await metering.grant("ann", 100, id="g")
            ended = await drive(api, http_scope("/chat", "POST"))
            assert (status(ended.log), started) == (401, [])
            assert json.loads(body(ended.log))["detail"].endswith("and no other one may be used.")
            await metering.runtime().booked()
            assert (await spent(metering), await metering.holds()) == ((0, 0), [])

    asyncio.run(scene())


def test_name_no_payer_where_there_is_no_choice() -> None:
    """A route that names no payer says nothing of them, nor does one whose application wants no such field."""
    assert asked(b"a", sources=[Allowance(0), Wallet()]) == [(None, {})]
    names = AnswerOptions(names=HeaderNames(payer=None))
    assert asked(b"a", sources=SOURCES, answers=names) == [(None, {PAID_BY: "platform"})]


@pytest.mark.parametrize("sources", ["payers", "none"])
def test_continue_a_session_with_its_payer(sources: str) -> None:
    """What continues a turn is free and goes on with whoever pays its session, and its credential (S0.16, S0.27)."""
    chosen = [Allowance(1, payer=PLATFORM), Wallet(payer=OWN)] if sources == "payers" else [Wallet()]
    reads: list[Preview] = []

    class Read(MemoryStore):
        """A store that notes what is only looked at."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, Preview):
                reads.append(operation)
            return super().run_now(operation)

    # By a store whose day is another one than ours.
    metering = Metering(Read(FakeClock()), identify=lambda connection: Caller("ann"), sinks=())
    api = FastAPI()
    api.add_middleware(MeteringMiddleware, metering=metering)

    @api.post("/{session}/{what}")
    @billable(1, sources=chosen, charge_key=lambda session: session, skip_if=lambda what: what == "approve")
    async def turn(session: str, what: str) -> dict[str, Any]:
        call = current_call()
        async with metering.charge(line="sub", price=10) as sub:
            pass
        return {"paid": call.paid_by and call.paid_by.name, "joined": call.joined, "held": call.held, "sub": sub.payer}

    async def scene() -> list[Any]:
        async with metering:
            for payer in ("ann", "acme"):
                await metering.grant(payer, 100, id="g")
            paths = ("/a/say", "/b/say", "/b/approve", "/a/approve", "/new/approve")
            told = [json.loads(body((await drive(api, http_scope(path, "POST"))).log)) for path in paths]
            await metering.runtime().booked()
            assert await metering.check() == []
            return [(each["paid"], each["joined"], each["sub"]) for each in told]

    found = asyncio.run(scene())
    if sources == "none":
        # Nobody else could pay, so that nothing has to be looked up.
        assert ({paid for paid, _, _ in found}, reads) == ({None}, [])
        return
    platform, own = ("platform", False, "acme"), ("own", False, "ann")
    assert found == [platform, own, ("own", True, "ann"), ("platform", True, "acme"), platform]


@pytest.mark.parametrize(("down", "said"), [("deny", 503), ("allow", 200)])
def test_continue_no_session_whose_payer_cannot_be_told(down: Any, said: int) -> None:
    """Without an answer who pays a session is unknown: what continues it is denied, or as the route says otherwise."""

    class Blind(MemoryStore):
        """A store that answers no previews."""

        def run_now(self, operation: Operation) -> Answer:
            if isinstance(operation, Preview):
                raise StoreUnavailableError("down")
            return super().run_now(operation)

    metering = Metering(Blind(), identify=lambda connection: Caller("ann"), sinks=())

    @billable(1, sources=SOURCES, charge_key="x-session", skip_if=lambda request: True, on_store_down=down)
    async def turn(request: Request) -> PlainTextResponse:
        return PlainTextResponse(str(current_call().paid_by.name))

    app = MeteringMiddleware(Starlette(routes=[Route("/", turn, methods=["POST"])]), metering=metering)

    async def scene() -> None:
        async with metering:
            ended = await drive(app, http_scope("/", "POST", headers=[("x-session", "a")]))
            assert status(ended.log) == said
            if said == 200:
                assert body(ended.log) == b"platform"

    asyncio.run(scene())
