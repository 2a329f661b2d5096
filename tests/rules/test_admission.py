"""Admission: one decision over slots, rates and sources, all or nothing, with the first reason that refuses."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, Part, Source
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import AllowanceSource, End, LeaseAsk, LimitAsk, WalletSource
from asgi_metering.rules.settlement import end_overdue
from asgi_metering.rules.state import AllowanceWindow, Counter, Hold, Lease
from tests.rules.world import (
    DAY_S,
    HOUR_S,
    MIDNIGHT,
    WALLET,
    World,
    calendar,
    days,
    fixed,
    imbalances,
    sliding,
    slots,
    snapshot,
)

# -- the order of reasons --------------------------------------------------------------------------------------


def test_list_reasons_in_the_order_in_which_they_are_looked_for() -> None:
    """The order of DESIGN "Admission": idempotency, policy, upstream, concurrency, rates, allowance, credits."""
    order = [
        Reason.IN_FLIGHT,
        Reason.FINGERPRINT,
        Reason.POLICY,
        Reason.UPSTREAM,
        Reason.CONCURRENCY,
        Reason.EXCEEDS_LIMIT,
        Reason.RATE_LIMIT,
        Reason.ALLOWANCE,
        Reason.CREDITS,
        Reason.STORE_DOWN,
    ]
    assert [reason for reason in Reason if reason in order] == order


@pytest.mark.parametrize(
    ("full", "spent", "dry", "reason"),
    [
        (True, True, True, Reason.CONCURRENCY),
        (True, False, True, Reason.CONCURRENCY),
        (False, True, True, Reason.RATE_LIMIT),
        (False, True, False, Reason.RATE_LIMIT),
        (False, False, True, Reason.CREDITS),
    ],
)
def test_report_the_first_reason(full: bool, spent: bool, dry: bool, reason: Reason) -> None:
    """Slots are looked at before rates, and rates before sources; the first that refuses is told."""
    world = World()
    world.grant(1)
    world.admit(0, leases=(slots(1),) if full else (), limits=(fixed(1),) if spent else ())
    assert world.refused(9 if dry else 1, limits=(fixed(1),), leases=(slots(1),)).reason is reason


def test_look_at_the_calendar_before_anything_else() -> None:
    """Where boundaries do not cover the store's time nothing is decided, not even a full pool."""
    world = World()
    world.admit(0, leases=(slots(1),))
    before = snapshot(world.state)
    answer = world.admit(5, limits=(calendar(1, world.now + 9 * DAY_S),), leases=(slots(1),))
    assert (answer.stale_calendar, answer.admitted, answer.refusal) == (True, False, None)
    assert snapshot(world.state) == before


# -- all or nothing --------------------------------------------------------------------------------------------


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """A state in which something is granted, spent, held, counted and full, drawn at random."""
    world = World(MIDNIGHT + draw(st.sampled_from([0.0, 10 * HOUR_S, DAY_S - 1])))
    for number in range(draw(st.integers(0, 3))):
        world.grant(
            draw(st.integers(1, 20)),
            f"g{number}",
            starts_in=draw(st.sampled_from([None, 0.0, 30.0])),
            ends_in=draw(st.sampled_from([40.0, 70.0, float("inf")])),
            priority=draw(st.integers(-1, 1)),
        )
    for number in range(draw(st.integers(0, 4))):
        call = f"c{number}"
        world.run(draw(asks(world, call)))
        world.wait(draw(st.sampled_from([0.0, 5.0, 20.0])))
        if draw(st.booleans()):
            world.end(call, draw(st.sampled_from([None, 0, 3, 12])))
    return world


def asks(world: World, call: str) -> st.SearchStrategy[Any]:
    """Admissions that meet each other in *world*."""
    sources = [(WALLET,), (world.free(8),), (world.free(8), WALLET), (WALLET, world.free(8, "other")), ()]
    stale = AllowanceSource("free", 8, days(world.now - 9 * DAY_S))
    limits: list[LimitAsk] = [
        fixed(3),
        fixed(20, cost=7, key="t", name="tokens", meter="tokens"),
        sliding(3, key="s", name="smooth"),
        calendar(4, world.now, key="d", name="day"),
        calendar(4, world.now - 9 * DAY_S, key="d", name="day"),
        fixed(2, cost=3, key="x", name="never"),
    ]
    pools: list[LeaseAsk] = [slots(1, "one"), slots(2, "two"), slots(0, "none", "global")]
    return st.builds(
        lambda amount, least, sources, limits, leases: world.ask(
            amount, call, at_least=min(amount, least), sources=sources, limits=limits, leases=leases, ttl_s=15.0
        ),
        st.integers(0, 15),
        st.integers(0, 15),
        st.sampled_from([*sources, (stale,), (WALLET, stale)]),
        st.lists(st.sampled_from(limits), max_size=3, unique=True),
        st.lists(st.sampled_from(pools), max_size=2, unique=True),
    )


@pytest.mark.uncounted
@given(data=st.data(), world=worlds())
def test_take_everything_or_nothing(data: st.DataObject, world: World) -> None:
    """A refusal leaves the whole state as it was; an admission takes every limit, slot and unit it asked for."""
    # What an admission ends on its way, whatever it decides, is done before.
    end_overdue(world.state, ("ada", "credits"), world.now, 100)
    ask = data.draw(asks(world, "new"))
    before = snapshot(world.state)
    decision = world.run(ask)
    assert isinstance(decision, Decision)
    if not decision.admitted:
        assert snapshot(world.state) == before
        assert world.written == []
        assert (decision.held, decision.available, decision.source) == (0, None, None)
        return
    assert len(decision.windows) == len(ask.limits)
    for limit in ask.limits:
        assert world.counter(limit.key).used >= limit.cost
    for lease in ask.leases:
        assert world.state.leases[lease.pool]["new"].expires_at == world.now + 15
    if ask.amount:
        assert ask.minimum <= decision.held <= ask.amount
        assert sum(part.amount for part in world.hold("new").parts) == decision.held
    assert imbalances(world.state) == []


@pytest.mark.parametrize("last", ["slot", "rate", "source"])
def test_consume_nothing_when_the_last_check_refuses(last: str) -> None:
    """Whichever of several slots, limits and sources refuses, no other has counted (S3.44, S3.45, S0.22)."""
    world = World()
    world.grant(5)
    world.admit(0, limits=(fixed(1, key="spent"),), leases=(slots(1, "full"),))
    limits = [fixed(9, key="free", name="free")]
    leases = [slots(9, "free")]
    if last == "slot":
        leases.append(slots(1, "full"))
    elif last == "rate":
        limits.append(fixed(1, key="spent", name="spent"))
    amount = 6 if last == "source" else 5
    world.refused(amount, limits=limits, leases=leases)
    assert "free" not in world.state.counters
    assert "free" not in world.state.leases


@pytest.mark.parametrize(
    ("amount", "minimum"), [(-1, -1), (0, -1), (5, 6), (MAX_AMOUNT + 1, 0), (MAX_AMOUNT + 1, MAX_AMOUNT + 1)]
)
def test_refuse_as_a_mistake_what_no_call_may_ask(amount: int, minimum: int) -> None:
    """A negative amount, one beyond the bound, or a least above the most is an error and changes nothing (X.7)."""
    world = World()
    world.grant(10)
    before = snapshot(world.state)
    with pytest.raises(AmountError, match=rf"Call 'c' asks to hold {amount}, at least {minimum}"):
        world.admit(amount, "c", at_least=minimum, limits=(fixed(5),))
    assert snapshot(world.state) == before


# -- the wallet ------------------------------------------------------------------------------------------------


def test_admit_up_to_the_last_unit() -> None:
    """Denied only if settled, held and new are more than granted: equality passes (S3.4)."""
    world = World()
    world.grant(10)
    world.admit(3, "settled")
    world.end("settled", 3)
    world.admit(3, "held")
    assert world.refused(5).available == 4
    decision = world.admit(4, "c")
    assert (decision.held, decision.available, decision.source) == (4, 0, "wallet")
    refusal = world.refused(1)
    assert refusal == Refusal(Reason.CREDITS, "credits", 1, 0, 7, transient=True)


def test_refuse_an_unknown_account_with_zeros() -> None:
    """An account that nobody ever gave anything is refused like an empty one, and is not made by it (S3.5)."""
    world = World()
    assert world.refused(1) == Refusal(Reason.CREDITS, "credits", 1, 0, 0)
    assert not world.state.accounts


def test_refuse_a_call_that_names_no_source() -> None:
    """A price without a source to pay it from is refused as lacking credits, never run for free."""
    world = World()
    world.grant(10)
    assert world.refused(1, sources=()) == Refusal(Reason.CREDITS, "credits", 1, 0, 0)


@pytest.mark.parametrize(("asked", "transient"), [(7, True), (8, False)])
def test_tell_transient_from_terminal(asked: int, transient: bool) -> None:
    """Transient is what would pass if the live holds ended unused; anything above is terminal (DESIGN "Admission")."""
    world = World()
    world.grant(10)
    world.admit(3, "settled")
    world.end("settled", 3)
    world.admit(5, "held")
    refusal = world.refused(asked)
    assert (refusal.transient, refusal.available, refusal.held) == (transient, 2, 5)
    assert refusal.retry_after_s is None
    assert refusal.resets_at is None


def test_call_terminal_what_would_only_lapse() -> None:
    """Units under a hold whose grant has expired would lapse when they came back: nobody can wait for them."""
    world = World()
    world.grant(10, ends_in=100)
    world.admit(10, "c", ttl_s=1000)
    assert world.refused(5).transient
    world.wait(100)
    assert not world.refused(5).transient


def test_call_terminal_what_debt_would_take() -> None:
    """Units that come back pay debt first; only what is left of them after it can be waited for."""
    world = World()
    world.grant(10)
    world.admit(6, "held")
    world.admit(4, "over")
    world.end("over", 7)
    assert world.account().available == -3
    assert world.refused(4).transient is False
    assert world.refused(3).transient is True
    assert world.refused(3).available == 0


def test_touch_no_account_for_free_work() -> None:
    """A call of price zero is admitted whatever the account holds, and writes no account row (S3.32)."""
    world = World()
    decision = world.admit(0, limits=(fixed(1),), leases=(slots(1),))
    assert (decision.admitted, decision.held, decision.available, decision.source) == (True, 0, None, None)
    assert not world.state.accounts


@pytest.mark.parametrize("source", [WALLET, AllowanceSource("free", 10, days(MIDNIGHT))])
def test_hold_nothing_of_a_source(source: Any) -> None:
    """A call that asks to hold 0 of a source gets a row to settle, and passes until something is owed (S3.7)."""
    world = World()
    decision = world.admit(0, "c", sources=(source,))
    assert (decision.admitted, decision.held) == (True, 0)
    assert decision.source in ("wallet", "free")
    assert world.hold("c").amount == 0
    world.run(End("c", 11, Basis.USAGE))
    assert not world.admit(0, sources=(source,)).admitted
    assert imbalances(world.state) == []


# -- up to -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "held"), [(20, 10), (10, 10), (9, 9), (4, 4), (3, 3)])
def test_hold_the_smaller_of_estimate_and_available(available: int, held: int) -> None:
    """`up_to` holds what is there, from its least to its estimate (DESIGN "A hold's size")."""
    world = World()
    world.grant(available)
    decision = world.admit(10, "c", at_least=3)
    assert (decision.held, decision.available) == (held, available - held)
    assert world.hold("c").amount == held
    assert imbalances(world.state) == []


def test_refuse_below_the_least_that_admits() -> None:
    """Below its least `up_to` is refused, and the least is what was required."""
    world = World()
    world.grant(2)
    refusal = world.refused(10, at_least=3)
    assert (refusal.required, refusal.available) == (3, 2)


def test_hold_nothing_where_nothing_is_needed_and_nothing_is_there() -> None:
    """With a least of zero an empty wallet admits with an empty hold; one in debt does not."""
    world = World()
    decision = world.admit(10, "c", at_least=0)
    assert (decision.admitted, decision.held, decision.available) == (True, 0, 0)
    assert world.hold("c").parts == ()
    world.end("c", 4)
    assert world.refused(10, at_least=0).reason is Reason.CREDITS


def test_hold_what_an_allowance_has_left() -> None:
    """An allowance, too, gives what it has, from the least on."""
    world = World()
    assert world.admit(10, "c", at_least=3, sources=(world.free(5),)).held == 5
    assert world.today() == (0, 5)
    assert world.refused(10, at_least=1, sources=(world.free(5),)).available == 0


# -- sources ---------------------------------------------------------------------------------------------------


def test_try_sources_in_order_and_pay_whole_from_one() -> None:
    """The first source that can pays the whole hold; the others are not touched (S0.19)."""
    world = World()
    world.grant(100)
    waterfall = (world.free(10), WALLET)
    first = world.admit(6, "a", sources=waterfall)
    assert (first.source, first.available, first.held) == ("free", 4, 6)
    assert world.sums() == (100, 0, 0, 0, 0)
    second = world.admit(6, "b", sources=waterfall)
    assert (second.source, second.available) == ("wallet", 94)
    third = world.admit(4, "c", sources=waterfall)
    assert (third.source, third.available) == ("free", 0)
    assert world.hold("a").parts == (Part(Source.ALLOWANCE, "free", MIDNIGHT, 6),)
    assert imbalances(world.state) == []


def test_answer_402_where_a_waterfall_with_a_wallet_ran_dry() -> None:
    """A waterfall that ran dry answers for its wallet if it has one, with the reset that would help (S0.19)."""
    world = World()
    world.grant(3)
    refusal = world.refused(5, sources=(world.free(4), WALLET, world.free(9, "none")._replace(limit=0)))
    assert (refusal.reason, refusal.name, refusal.available) == (Reason.CREDITS, "credits", 3)
    assert refusal.retry_after_s is None
    assert refusal.resets_at is None
    world.admit(4, "c", sources=(world.free(5),))
    refusal = world.refused(5, sources=(world.free(5), WALLET))
    assert refusal.reason is Reason.CREDITS
    assert refusal.resets_at == MIDNIGHT + DAY_S
    assert refusal.retry_after_s is None
    assert refusal.transient


def test_answer_for_the_last_allowance_where_there_is_no_wallet() -> None:
    """Allowances alone answer for the last of them, with the first reset that would help (S0.20)."""
    world = World()
    world.admit(5, "a", sources=(world.free(5, "daily"),))
    world.end("a", 5)
    month = AllowanceSource("monthly", 20, (MIDNIGHT - DAY_S, MIDNIGHT, MIDNIGHT + 30 * DAY_S, MIDNIGHT + 60 * DAY_S))
    world.admit(20, "b", sources=(month,))
    world.end("b", 20)
    refusal = world.refused(5, sources=(world.free(5, "daily"), month))
    assert refusal == Refusal(
        Reason.ALLOWANCE,
        "monthly",
        5,
        0,
        0,
        20,
        retry_after_s=MIDNIGHT + DAY_S - world.now,
        resets_at=MIDNIGHT + DAY_S,
    )
    assert world.refused(6, sources=(world.free(5, "daily"), month)).resets_at == MIDNIGHT + 30 * DAY_S


def test_ask_again_where_an_allowances_calendar_is_stale() -> None:
    """An allowance whose boundaries do not cover now is not skipped for the next source: the caller asks again."""
    world = World()
    world.grant(10)
    stale = AllowanceSource("free", 10, days(world.now + 5 * DAY_S))
    before = snapshot(world.state)
    answer = world.admit(1, sources=(stale, WALLET))
    assert (answer.stale_calendar, answer.now) == (True, world.now)
    assert snapshot(world.state) == before
    assert world.admit(1, sources=(WALLET, stale)).admitted


# -- allowances ------------------------------------------------------------------------------------------------


def test_count_an_allowance_per_window() -> None:
    """A day's allowance is held, settled and given back within its day, and the next day begins at zero (S0.5)."""
    world = World(MIDNIGHT + DAY_S - 10)
    world.admit(4, "a", sources=(world.free(10),))
    assert world.today() == (0, 4)
    receipt = world.end("a", 3)
    assert receipt.parts == (Part(Source.ALLOWANCE, "free", MIDNIGHT, 3),)
    assert receipt.available is None
    assert world.today() == (3, 0)
    refusal = world.refused(8, sources=(world.free(10),))
    assert (refusal.available, refusal.retry_after_s, refusal.resets_at) == (7, 10.0, MIDNIGHT + DAY_S)
    world.wait(9.999)
    assert world.refused(8, sources=(world.free(10),)).retry_after_s == pytest.approx(0.001, abs=1e-6)
    world.wait(0.001)
    assert world.admit(8, sources=(world.free(10),)).admitted
    assert world.today() == (0, 8)


def test_roll_over_at_the_gate_itself() -> None:
    """Nobody has to look at an allowance for its new window to begin: the gate does it (S4.14, S4.15)."""
    world = World()
    world.admit(10, "a", sources=(world.free(10),))
    world.end("a", 10)
    world.wait(40 * DAY_S)
    assert world.admit(10, "b", sources=(world.free(10),)).admitted
    assert len(world.state.allowances) == 2


@pytest.mark.parametrize("limit", [0, 4])
def test_never_grant_what_no_window_would_have(limit: int) -> None:
    """A cap of zero grants zero (S0.8), and a call above the cap has no window to wait for."""
    world = World()
    refusal = world.refused(5, sources=(world.free(limit),))
    assert (refusal.reason, refusal.limit, refusal.available) == (Reason.ALLOWANCE, limit, limit)
    assert (refusal.retry_after_s, refusal.resets_at, refusal.transient) == (None, None, False)


@pytest.mark.parametrize(("amount", "limit"), [(0, 0), (5, 0), (0, 4), (5, 4)])
def test_pay_nothing_from_an_allowance_that_is_spent(amount: int, limit: int) -> None:
    """What needs nothing yet is refused where nothing is left, and never charged above a cap of 0 (S0.8, S4.4)."""
    world = World()
    sources = (world.free(limit),)
    if limit:
        world.admit(limit, "a", sources=sources)
        assert world.refused(amount, at_least=0, sources=sources).transient
        world.end("a", limit)
    refusal = world.refused(amount, at_least=0, sources=sources)
    assert (refusal.reason, refusal.required, refusal.available, refusal.transient) == (Reason.ALLOWANCE, 1, 0, False)
    assert (refusal.resets_at is not None) is (limit > 0)


@pytest.mark.parametrize("split", [False, True])
def test_pass_over_an_allowance_that_is_spent(split: bool) -> None:
    """What needs nothing yet goes on to the wallet, which owes what it does not have; a debtor has nowhere to go."""
    world = World()
    sources = (world.free(0)._replace(split=split), WalletSource(split=split))
    assert world.admit(5, "a", at_least=0, sources=sources).source == "wallet"
    world.end("a", 7)
    assert (world.account().debt, world.state.allowances) == (7, {})
    refusal = world.refused(5, at_least=0, sources=sources)
    assert (refusal.reason, refusal.transient, refusal.resets_at) == (Reason.CREDITS, False, None)


def test_show_what_is_used_above_a_cut_limit() -> None:
    """The limit is resolved at each decision; what was used above a cut one stays, and none is negative (S4.4)."""
    world = World()
    world.admit(8, "a", sources=(world.free(10),))
    world.end("a", 8)
    refusal = world.refused(1, sources=(world.free(5),))
    assert (refusal.available, refusal.limit, refusal.held) == (0, 5, 0)
    assert world.today() == (8, 0)
    assert world.admit(1, sources=(world.free(9),)).admitted


def test_call_transient_what_a_held_allowance_would_admit() -> None:
    """An allowance that is only held may come back within its window."""
    world = World()
    world.admit(8, "a", sources=(world.free(10),))
    refusal = world.refused(3, sources=(world.free(10),))
    assert (refusal.transient, refusal.held, refusal.available) == (True, 8, 2)
    world.end("a", 8)
    assert world.refused(3, sources=(world.free(10),)).transient is False


def test_admit_exactly_the_cap() -> None:
    """The last unit of an allowance passes, the one above it does not, and the count does not move (S0.6)."""
    world = World()
    assert world.admit(10, sources=(world.free(10),)).available == 0
    world.refused(1, sources=(world.free(10),))
    assert world.today() == (0, 10)


def test_keep_payers_and_names_of_allowances_apart() -> None:
    """Each payer has each allowance for itself; routes that name the same one share it (S0.9, S4.11)."""
    world = World()
    world.admit(10, sources=(world.free(10),))
    assert world.admit(10, payer="bob", sources=(world.free(10),)).admitted
    assert world.admit(10, sources=(world.free(10, "images"),)).admitted
    world.refused(1, sources=(world.free(10),))


def test_keep_the_day_when_the_clock_steps_back() -> None:
    """Where the account has seen a later time, a clock that stepped back opens no spent window again."""
    world = World(MIDNIGHT + DAY_S)
    world.admit(10, "a", sources=(world.free(10),))
    world.wait(-5)
    decision = world.admit(1, sources=(AllowanceSource("free", 10, days(world.now)),))
    assert decision.refusal is not None
    assert decision.refusal.available == 0
    assert decision.now == MIDNIGHT + DAY_S


# -- concurrency -----------------------------------------------------------------------------------------------


def test_give_exactly_as_many_slots_as_there_are() -> None:
    """Of ten calls with a cap of three, three are admitted and seven refused; none of those holds a slot (S0.44)."""
    world = World()
    answers = [world.admit(leases=(slots(3),)) for _ in range(10)]
    assert [answer.admitted for answer in answers] == [True] * 3 + [False] * 7
    assert len(world.state.leases["pool"]) == 3
    for answer in answers[:3]:
        world.end(answer.id, None)
    assert not world.state.leases


@pytest.mark.parametrize(("full", "level"), [("mine", "caller"), ("all", "global")])
def test_name_the_level_that_is_full(full: str, level: str) -> None:
    """With slots per caller and for all, the refusal says which of them is full (S0.42)."""
    world = World()
    world.admit(leases=(slots(1, full),))
    both = (
        LeaseAsk("chat", "mine", 1 + (full == "all"), "caller"),
        LeaseAsk("server", "all", 1 + (full == "mine"), "global"),
    )
    refusal = world.refused(leases=both)
    assert (refusal.reason, refusal.level, refusal.held, refusal.limit) == (Reason.CONCURRENCY, level, 1, 1)
    assert refusal.name == ("chat" if full == "mine" else "server")
    assert (refusal.required, refusal.available, refusal.transient) == (1, 0, True)


def test_use_a_freed_slot_at_once() -> None:
    """A slot that a call gives back is there for the next one (S0.46)."""
    world = World()
    world.admit(0, "a", leases=(slots(1),))
    world.refused(leases=(slots(1),))
    world.end("a", None)
    assert world.admit(leases=(slots(1),)).admitted


def test_free_slots_by_time_without_a_sweep() -> None:
    """A slot whose call stopped beating is free at its expiry and not before, though nobody swept (S0.47, S3.47)."""
    world = World()
    world.admit(0, "a", leases=(slots(2),), ttl_s=30)
    world.wait(10)
    world.admit(0, "b", leases=(slots(2),), ttl_s=30)
    world.wait(19.999)
    assert world.refused(leases=(slots(2),)).held == 2
    world.wait(0.001)
    assert world.admit(0, "c", leases=(slots(2),), ttl_s=30).admitted
    assert world.refused(leases=(slots(2),)).held == 2


def test_keep_a_slot_while_its_call_beats() -> None:
    """A heartbeat moves the slot's expiry with its hold's (S0.48, S0.50)."""
    world = World()
    world.admit(0, "a", leases=(slots(1),), ttl_s=30)
    world.wait(20)
    assert world.beat("a")
    world.wait(20)
    world.refused(leases=(slots(1),))
    assert world.state.leases["pool"]["a"] == Lease("pool", "a", world.now + 10)


def test_free_only_ones_own_slot() -> None:
    """A call whose slot expired and was given on frees nobody else's when it ends at last (S0.53)."""
    world = World()
    world.admit(0, "late", leases=(slots(1),), ttl_s=30)
    world.wait(30)
    world.admit(0, "heir", leases=(slots(1),), ttl_s=30)
    world.end("late", None)
    assert set(world.state.leases["pool"]) == {"heir"}
    world.refused(leases=(slots(1),))


def test_admit_nobody_to_a_pool_of_zero() -> None:
    """A pool without slots is full from the beginning, and waiting does not help."""
    world = World()
    refusal = world.refused(leases=(slots(0),))
    assert (refusal.held, refusal.limit, refusal.transient) == (0, 0, False)


# -- what an admission writes ----------------------------------------------------------------------------------


def test_keep_everything_that_the_end_needs() -> None:
    """The hold carries what its end needs when the process that admitted it is gone."""
    world = World()
    world.grant(10)
    tokens = fixed(100, key="t", name="tokens", meter="tokens", cost=7)
    world.admit(
        4,
        "c",
        limits=(fixed(5), tokens),
        leases=(slots(2), slots(9, "all", "global")),
        ttl_s=40.0,
        grace_s=20.0,
        in_doubt=Basis.HOLD,
        line="chat",
        facts={"model": "m"},
    )
    assert world.hold("c") == Hold(
        "c",
        "ada",
        "credits",
        4,
        (Part(Source.GRANT, "gift", 0.0, 4),),
        HoldState.HELD,
        world.now,
        world.now + 40,
        world.now + 60,
        40.0,
        20.0,
        Basis.HOLD,
        "chat",
        0,
        (("t", world.now, "tokens", 7),),  # type: ignore[arg-type]
        ("pool", "all"),
        {"model": "m"},
    )
    assert world.counter() == Counter("k", world.now, world.now + 60, 1)
    assert world.account().next_due_at == world.now + 40
    assert world.state.live["ada", "credits"] == {"c"}


def test_keep_the_first_instant_at_which_a_hold_falls_due() -> None:
    """The account's bound for overdue holds moves forward with nobody and back with the shortest life."""
    world = World()
    world.grant(10)
    world.admit(1, ttl_s=60)
    world.admit(1, ttl_s=90)
    assert world.account().next_due_at == world.now + 60
    world.admit(1, ttl_s=20)
    assert world.account().next_due_at == world.now + 20
    world.admit(1, sources=(world.free(5),), ttl_s=10)
    assert world.account().next_due_at == world.now + 10


# -- the same call again ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["wallet", "free", None])
def test_answer_the_first_decision_again(source: str | None) -> None:
    """A repeat of an admission takes nothing again and is admitted on the same source (S3.15)."""
    world = World()
    world.grant(10)
    sources = {"wallet": (WALLET,), "free": (world.free(9),), None: ()}[source]
    world.admit(2, "before", sources=(WALLET if source == "wallet" else world.free(9),))
    world.end("before", 1)
    ask = world.ask(4 if source else 0, "c", sources=sources, leases=(slots(1),), limits=(fixed(1),))
    first = world.run(ask)
    before = snapshot(world.state)
    again = world.run(ask)
    assert again.admitted
    assert again == first._replace(windows=())
    assert snapshot(world.state) == before


def test_repeat_a_call_of_an_account_that_does_not_exist() -> None:
    """A call that only took a slot is repeated without an account behind it."""
    world = World()
    ask = world.ask(0, "c", leases=(slots(1),))
    assert world.run(ask).admitted
    assert world.run(ask) == Decision("c", world.now)


def test_repeat_an_allowance_that_is_no_longer_asked() -> None:
    """A repeat that names the paying allowance no more cannot tell what is left of it, and is admitted all the same."""
    world = World()
    world.admit(4, "c", sources=(world.free(9),))
    again = world.admit(4, "c", sources=(world.free(9, "other"),))
    assert (again.admitted, again.source, again.held, again.available) == (True, "free", 4, None)
    world.state.allowances.clear()
    assert world.admit(4, "c", sources=(world.free(9),)).available is None


# -- holds that nobody ended -----------------------------------------------------------------------------------


def test_end_overdue_holds_on_the_way() -> None:
    """An admission first ends the overdue holds of its account, so that their units are there for it (S0.47)."""
    world = World()
    world.grant(10)
    world.admit(10, "dead", ttl_s=60, grace_s=30)
    world.wait(89.999)
    assert world.admit(10).refusal is not None
    assert world.hold("dead").state is HoldState.IN_DOUBT
    world.wait(0.001)
    assert world.admit(10).admitted
    assert world.hold("dead").state is HoldState.RELEASED


def test_refuse_after_ending_overdue_holds() -> None:
    """What was ended on the way stands by itself, also where the admission is refused."""
    world = World()
    world.grant(10)
    world.admit(10, "dead", ttl_s=60, grace_s=30)
    world.wait(90)
    decision = world.admit(11)
    assert decision.refusal is not None
    assert decision.refusal.available == 10
    assert world.hold("dead").state is HoldState.RELEASED
    assert world.written
    assert imbalances(world.state) == []


def test_see_no_time_before_the_accounts_last() -> None:
    """An account's time never runs backwards: a decision is taken at the largest time that it has seen."""
    world = World()
    world.grant(10, ends_in=100)
    world.admit(1, "a")
    seen = world.now
    world.wait(-50)
    decision = world.admit(1, "b")
    assert decision.now == seen
    assert world.hold("b").created_at == seen
    assert world.account().seen_at == seen


def test_know_an_admission_from_a_refusal() -> None:
    """A decision admits when nothing refuses and its calendar is current."""
    assert Decision("c", 0.0).admitted
    assert not Decision("c", 0.0, Refusal(Reason.CREDITS, "credits")).admitted
    assert not Decision("c", 0.0, stale_calendar=True).admitted


def test_make_an_allowances_window_with_its_first_use() -> None:
    """The first use of a window writes its row, with both of its ends (S4.15)."""
    world = World()
    world.admit(3, sources=(world.free(10),))
    assert list(world.state.allowances.values()) == [
        AllowanceWindow("ada", "credits", "free", MIDNIGHT, MIDNIGHT + DAY_S, 0, 3)
    ]
