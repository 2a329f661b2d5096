"""How a payer stands: previews and allowances are read from what the gate decides by, and consume nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Allowance, Caller, Metering, TokenUsage, Unit, Wallet, up_to
from asgi_metering.call import CallRefused
from asgi_metering.decisions import Reason
from asgi_metering.errors import ConfigurationError, PayerError
from asgi_metering.prices import per_token
from asgi_metering.sources import Payer
from asgi_metering.stores.contract import EverythingKept, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import NOON, FakeClock

pytestmark = pytest.mark.uncounted

CREDIT = 1_000_000
HALF_DAY_S = 43_200.0
PLATFORM = Payer("platform", account="acme")
DAILY = Allowance({"free": 3, "pro": 20}, name="daily")
SOURCES = [DAILY, Wallet()]

Play = Callable[[Callable[[Metering, FakeClock], Awaitable[None]]], None]


@pytest.fixture(params=["memory", "sqlite"])
def play(request: pytest.FixtureRequest, tmp_path: Path) -> Play:
    """Plays a scene on books with ten credits of ann's."""

    def play(scene: Callable[[Metering, FakeClock], Awaitable[None]]) -> None:
        clock = FakeClock()
        store: Store = (
            MemoryStore(clock)
            if request.param == "memory"
            else SQLiteStore(tmp_path / "metering.db", synchronous="OFF", clock=clock)
        )

        async def run() -> None:
            async with Metering(store, sinks=()) as metering:
                await metering.grant("ann", 10, id="g")
                await scene(metering, clock)

        asyncio.run(run())

    return play


async def spend(metering: Metering, price: Any, **options: Any) -> None:
    """One call of ann's."""
    async with metering.charge(payer="ann", line="job", price=price, **options):
        pass


async def everything(metering: Metering) -> Any:
    """All that the store keeps, but for when it was last looked at."""
    _, state = await metering.store.read(EverythingKept())
    return [getattr(state, name) for name in ("accounts", "grants", "holds", "allowances", "entries", "events")]


# -- previews ----------------------------------------------------------------------------------------------


def test_preview_says_who_would_pay(play: Play) -> None:
    """A preview names source and account, and what would be held and left, before the first paid call (S0.37)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        seen = await metering.preview("ann", line="chat", price=2, sources=SOURCES, plan="pro")
        assert (seen.admitted, seen.unit, seen.held, seen.available) == (True, "credits", 2 * CREDIT, 18 * CREDIT)
        assert (seen.payer, seen.paid_by, seen.source, seen.switched) == ("ann", None, "daily", False)
        assert seen.refusal is None
        beyond = await metering.preview("ann", line="chat", price=4, sources=SOURCES)
        assert (beyond.source, beyond.available) == ("wallet", 6 * CREDIT)

    play(scene)


def test_preview_consumes_nothing(play: Play) -> None:
    """However often it is asked, the store is as it was, and nothing is counted (S0.37)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        before = await everything(metering)
        for _ in range(5):
            assert (await metering.preview("ann", line="chat", price=10)).admitted
        assert await everything(metering) == before
        assert metering.runtime().in_flight == {}

    play(scene)


def test_preview_a_switch_of_payers(play: Play) -> None:
    """That another payer than the first choice would pay is seen before it does (S0.37, S0.38)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        sources = [Allowance(1, payer=PLATFORM), Wallet()]
        seen = await metering.preview("ann", line="chat", price=1, sources=sources)
        assert (seen.payer, seen.paid_by, seen.switched) == ("acme", PLATFORM, False)
        await spend(metering, 1, sources=sources)
        seen = await metering.preview("ann", line="chat", price=1, sources=sources)
        assert (seen.payer, seen.paid_by, seen.switched) == ("ann", None, True)

    play(scene)


def test_preview_a_session(tmp_path: Path) -> None:
    """
    Who pays a session, and that it has been counted, is told from the store, on its day (S0.31, S0.33, S0.34, S0.35).

    A process that has just started says the same; on the next day the session is counted anew (S0.32).
    """
    clock = FakeClock()
    sources = [Allowance(1, payer=PLATFORM), Wallet()]

    async def seen(metering: Metering, session: str) -> tuple[bool, str, bool, int]:
        told = await metering.preview("ann", line="job", price=1, sources=sources, charge_key=session)
        return told.joined, told.payer, told.switched, told.held

    async def first_process() -> None:
        async with Metering(SQLiteStore(tmp_path / "metering.db", clock=clock), sinks=()) as metering:
            await metering.grant("ann", 10, id="g")
            for session in ("of the platform", "of ann"):
                await spend(metering, 1, sources=sources, charge_key=session)

    async def next_process() -> None:
        async with Metering(SQLiteStore(tmp_path / "metering.db", clock=clock), sinks=()) as metering:
            assert await seen(metering, "of the platform") == (True, "acme", False, 0)
            assert await seen(metering, "of ann") == (True, "ann", True, 0)
            assert await seen(metering, "never used") == (False, "ann", True, CREDIT)
            clock.advance(2 * HALF_DAY_S)
            for session in ("of the platform", "of ann", "never used"):
                assert await seen(metering, session) == (False, "acme", False, CREDIT)

    asyncio.run(first_process())
    asyncio.run(next_process())


def test_preview_work_that_was_done(play: Play) -> None:
    """A key whose work is done would be answered by what it did, and a preview says so (S0.37, S3.15)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        once: dict[str, Any] = {"price": 2, "idempotency_key": "file-81"}
        assert (await metering.preview("ann", line="job", **once)).admitted
        await spend(metering, **once)
        seen = await metering.preview("ann", line="job", **once)
        assert seen.refusal is not None
        assert (seen.admitted, seen.refusal.reason) == (False, Reason.REPLAYED)
        assert (await metering.preview("ann", line="job", price=2, idempotency_key="file-82")).admitted

    play(scene)


def test_preview_a_refusal(play: Play) -> None:
    """What would be refused is told with its reason and numbers, and holds nothing."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        seen = await metering.preview("ann", line="chat", price=11)
        assert (seen.admitted, seen.held, seen.available, seen.payer) == (False, 0, None, "ann")
        assert seen.refusal is not None
        assert (seen.refusal.reason, seen.refusal.required, seen.refusal.available) == (
            Reason.CREDITS,
            11 * CREDIT,
            10 * CREDIT,
        )

    play(scene)


def test_preview_a_measured_price(play: Play) -> None:
    """A measured price shows what it would hold: the smaller of estimate and available with up_to."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        hold = up_to(TokenUsage(input=0, output=25), at_least=1)
        seen = await metering.preview("ann", line="chat", price=per_token(output=1), hold=hold)
        assert (seen.admitted, seen.held, seen.available) == (True, 10 * CREDIT, 0)
        assert (await metering.preview("ann", line="chat", hold="0.5")).held == CREDIT // 2

    play(scene)


def test_preview_free_work(play: Play) -> None:
    """What costs nothing would run, and nobody would pay."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        seen = await metering.preview("bob", line="chat", price=0, sources=[Wallet(payer=PLATFORM)])
        assert (seen.admitted, seen.held, seen.available, seen.payer) == (True, 0, None, "bob")
        assert (seen.paid_by, seen.source, seen.switched) == (PLATFORM, None, False)

    play(scene)


def test_preview_an_unresolved_payer(play: Play) -> None:
    """A payer that cannot be found is the refusal that the gate would give (S0.25)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        lost = Payer("lost", account=lambda call: call.caller.attributes["team"])
        seen = await metering.preview("ann", line="chat", price=1, sources=[Wallet(payer=lost)])
        assert seen.refusal is not None
        assert (seen.admitted, seen.refusal.reason) == (False, Reason.PAYER)
        caller = Caller("ann", attributes={"team": "acme"})
        seen = await metering.preview("ann", line="chat", price=1, sources=[Wallet(payer=lost)], caller=caller)
        assert (seen.refusal is not None and seen.refusal.reason) is Reason.CREDITS

    play(scene)


@pytest.mark.parametrize("own", [None, "free"])
def test_plan_of_a_caller_outranks_the_payers(play: Play, own: str | None) -> None:
    """A caller brings a plan of its own, or takes the one that is said."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        seen = await metering.preview(
            "ann", line="chat", price=1, sources=[DAILY], plan="pro", caller=Caller("bob", plan=own)
        )
        assert seen.available == (19 if own is None else 2) * CREDIT

    play(scene)


@pytest.mark.parametrize(
    ("options", "mend"),
    [({}, "neither a price nor a hold"), ({"price": 1, "caller": "bob"}, "is no Caller")],
    ids=["no price", "no caller"],
)
def test_refuse_a_preview_that_cannot_work(play: Play, options: dict[str, Any], mend: str) -> None:
    """Mistakes are those of a charge."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        with pytest.raises(ConfigurationError, match=mend):
            await metering.preview("ann", line="chat", **options)

    play(scene)


# -- allowances --------------------------------------------------------------------------------------------


def test_allowance_that_nobody_used(play: Play) -> None:
    """A window shows plan, used, limit, rest and reset; an unknown plan has the smallest limit (S0.2, S0.13, S4.18)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        (free,) = await metering.allowances("ann", sources=SOURCES, plan="mystery")
        assert (free.name, free.payer, free.unit, free.plan) == ("daily", "ann", "credits", "mystery")
        assert (free.used, free.held, free.limit, free.remaining) == (0, 0, 3 * CREDIT, 3 * CREDIT)
        assert (free.starts_at, free.resets_at) == (NOON - HALF_DAY_S, NOON + HALF_DAY_S)
        (pro,) = await metering.allowances("ann", sources=SOURCES, plan="pro")
        assert pro.limit == 20 * CREDIT

    play(scene)


def test_allowance_in_use(play: Play) -> None:
    """What calls settled and what they hold is shown apart, and reading changes nothing (S0.13, S0.49)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        await spend(metering, 1, sources=SOURCES)
        async with metering.charge(payer="ann", line="job", price=1, sources=SOURCES):
            before = await everything(metering)
            (seen,) = await metering.allowances("ann", sources=SOURCES)
            assert (seen.used, seen.held, seen.remaining) == (CREDIT, CREDIT, 2 * CREDIT)
            assert await everything(metering) == before

    play(scene)


def test_allowance_of_another_day(play: Play) -> None:
    """What was used yesterday is nothing today (S0.5, S0.33)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        await spend(metering, 3, sources=SOURCES)
        clock.advance(HALF_DAY_S)
        (seen,) = await metering.allowances("ann", sources=SOURCES)
        assert (seen.used, seen.remaining, seen.starts_at) == (0, 3 * CREDIT, NOON + HALF_DAY_S)

    play(scene)


def test_allowance_of_a_clock_that_was_set_back(play: Play) -> None:
    """A clock that steps back by days changes nothing that is seen: gauge and gate are at the account's own time."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        await spend(metering, 2, sources=SOURCES)
        before = await metering.allowances("ann", sources=SOURCES)
        clock.advance(-12 * HALF_DAY_S)
        assert await metering.allowances("ann", sources=SOURCES) == before
        seen = await metering.preview("ann", line="job", price=1, sources=SOURCES)
        assert (seen.source, seen.available) == ("daily", 0)

    play(scene)


def test_allowance_that_was_cut(play: Play) -> None:
    """A limit below what is used leaves nothing, and never a negative remainder (S0.13, DESIGN 4)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        await spend(metering, 3, sources=SOURCES)
        (seen,) = await metering.allowances("ann", sources=[Allowance(1, name="daily")])
        assert (seen.used, seen.limit, seen.remaining) == (3 * CREDIT, CREDIT, 0)

    play(scene)


def test_allowances_of_several_accounts_and_units(play: Play) -> None:
    """Each allowance is shown of the account that its payer names, in the unit that is asked for."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        unit = Unit("messages", 0)
        sources = [Allowance(5, name="a", payer=PLATFORM), Allowance(6, name="b", payer=PLATFORM), Allowance(7)]
        await spend(metering, 2, sources=sources, unit=unit)
        seen = await metering.allowances("ann", sources=sources, unit=unit)
        assert [(each.name, each.payer, each.used, each.limit) for each in seen] == [
            ("a", "acme", 2, 5),
            ("b", "acme", 0, 6),
            ("allowance", "ann", 0, 7),
        ]

    play(scene)


def test_allowances_of_nobody(play: Play) -> None:
    """Whose they are has to be found, and what is no list of sources is a mistake."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        lost = Payer("lost", account=lambda: None)
        with pytest.raises(PayerError, match="could not be resolved"):
            await metering.allowances("ann", sources=[Allowance(1, payer=lost)])
        with pytest.raises(ConfigurationError, match="leaves nothing to pay with"):
            await metering.allowances("ann", sources=[])

    play(scene)


def test_looking_counts_no_refusal(play: Play) -> None:
    """Whose account would pay cannot be found: a preview says so, and no call was refused (S0.37)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        lost = Payer("lost", account=lambda: None)
        seen = await metering.preview("ann", line="l", price=1, sources=[Wallet(payer=lost)])
        assert seen.refusal is not None
        assert (seen.admitted, seen.refusal.reason) == (False, Reason.PAYER)
        assert metering.meters.totals("refusals") == {}

    play(scene)


def test_allowance_that_rolls_begins_with_its_use(play: Play) -> None:
    """It has no window before its first use, counts up to the instant of its end, and then none again (S4.13)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        monthly = [Allowance(3, days=30, name="monthly")]

        async def now() -> tuple[float | None, int]:
            (status,) = await metering.allowances("ann", sources=monthly)
            return status.starts_at, status.used // CREDIT

        assert await now() == (None, 0)
        begun = clock()
        async with metering.charge(payer="ann", line="l", price=2, sources=monthly):
            pass
        assert await now() == (begun, 2)
        clock.advance(30 * 86_400.0)
        assert await now() == (begun, 2)
        clock.advance(0.5)
        assert await now() == (None, 0)

    play(scene)


def test_gauge_and_gate_agree(play: Play) -> None:
    """As much as the gauge shows is admitted, and one smallest part more is refused: one declaration (S4.2)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        await spend(metering, "0.7", sources=[DAILY])
        (seen,) = await metering.allowances("ann", sources=[DAILY])
        for parts, admitted in ((seen.remaining + 1, False), (seen.remaining, True)):
            price = Decimal(parts) / CREDIT
            assert (await metering.preview("ann", line="job", price=price, sources=[DAILY])).admitted is admitted
            try:
                await spend(metering, price, sources=[DAILY])
            except CallRefused:
                assert not admitted
            else:
                assert admitted
        assert (await metering.allowances("ann", sources=[DAILY]))[0].remaining == 0

    play(scene)
