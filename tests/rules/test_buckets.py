"""Token buckets: so much at once, and so much flows back."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, Reason
from asgi_metering.rules.operations import LimitAsk, Sweep, Undo
from asgi_metering.rules.state import Counter, PinnedWindow
from asgi_metering.rules.windows import correct, look, may_be_corrected
from tests.rules.world import World, bucket

TOKENS = {"name": "tokens", "key": "t", "meter": "tokens"}
BEGIN = 1_700_000_000.0


def hit(world: World, ask: LimitAsk) -> Decision:
    """One call."""
    return world.admit(limits=(ask,))


def left(world: World, ask: LimitAsk) -> int:
    """What is in the bucket; negative where it owes."""
    seen = look(ask._replace(cost=0), world.state.counters.get(ask.key), world.now)
    assert seen is not None
    return ask.limit - seen.used


def test_begin_full_and_flow_back_evenly() -> None:
    """A new bucket gives its burst at once, and then as fast as it is refilled."""
    world, ask = World(BEGIN), bucket(10, 5, 1.0)
    assert [hit(world, ask).windows[0].remaining for _ in range(5)] == [4, 3, 2, 1, 0]
    refusal = hit(world, ask).refusal
    assert refusal is not None
    assert refusal.reason is Reason.RATE_LIMIT
    assert refusal.retry_after_s == pytest.approx(0.1, abs=1e-6)
    world.wait(0.25)
    assert [hit(world, ask).admitted for _ in range(3)] == [True, True, False]
    world.wait(9)
    assert left(world, ask) == 5


def test_tell_the_burst_and_how_long_it_takes_to_come_back() -> None:
    """An answer says what the bucket holds, in how long it fills, what is in it, and when one more will be."""
    world, ask = World(BEGIN), bucket(10, 50, 60.0)
    window = hit(world, ask).windows[0]
    assert (window.limit, window.window_s, window.remaining, window.reset_after_s) == (50, 300.0, 49, 6.0)
    world.wait(4)
    assert hit(world, ask._replace(cost=0)).windows[0].reset_after_s == 2.0
    world.wait(2)
    full = hit(world, ask._replace(cost=0)).windows[0]
    assert (full.remaining, full.reset_after_s) == (50, 0.0)


def test_refuse_a_call_above_the_burst() -> None:
    """A cost that not even a full bucket has is told so; all that it holds is not above it."""
    world = World(BEGIN)
    refusal = hit(world, bucket(10, 5, cost=6)).refusal
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s, world.state.counters) == (Reason.EXCEEDS_LIMIT, None, {})
    assert hit(world, bucket(10, 5, cost=5)).windows[0].remaining == 0
    refusal = hit(world, bucket(10, 5, cost=5)).refusal
    assert refusal is not None
    assert refusal.retry_after_s == 30.0


def test_change_nothing_where_a_clock_stepped_back() -> None:
    """A clock that steps back takes nothing out of the bucket and puts nothing in; the wait is that of the clock."""
    world, ask = World(BEGIN), bucket(1, 10, 1.0)
    hit(world, ask._replace(cost=8))
    world.wait(5)
    hit(world, ask)
    world.wait(-4)
    assert left(world, ask) == 6
    assert hit(world, ask._replace(cost=6)).admitted
    refusal = hit(world, ask).refusal
    assert refusal is not None
    assert refusal.retry_after_s == 5.0


def test_look_without_taking() -> None:
    """A cost of 0 leaves the row as it is."""
    world, ask = World(BEGIN), bucket(1, 10, 1.0)
    hit(world, ask._replace(cost=8))
    before = world.counter()
    world.wait(2)
    assert hit(world, ask._replace(cost=0)).windows[0].remaining == 4
    assert world.counter() == before


def test_owe_what_was_used_beyond_the_estimate() -> None:
    """A weighted bucket is held by estimate; what a call used beyond it is owed, and nobody passes until it is back."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.end("a", None, actual={"tokens": 150})
    assert left(world, ask) == -50
    refusal = world.admit(0, "b", limits=(ask,)).refusal
    assert refusal is not None
    assert refusal.retry_after_s == 7.0
    assert refusal.available == 0
    world.wait(7)
    assert world.admit(0, "c", limits=(ask,)).admitted


def test_give_back_what_was_not_used_and_never_above_the_burst() -> None:
    """What a call used less than its estimate comes back, up to a full bucket."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=60, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.end("a", None, actual={"tokens": 10})
    assert left(world, ask) == 90
    world.admit(0, "b", limits=(ask,))
    world.wait(5)
    world.end("b", None, actual={"tokens": 0})
    assert left(world, ask) == 100
    hit(world, ask._replace(cost=100))
    assert left(world, ask) == 0


def test_give_nothing_back_into_a_bucket_that_was_full_since() -> None:
    """What came back late would have flowed over; what was used too much is owed however late it is told."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.admit(0, "b", limits=(ask,))
    world.wait(5)
    world.admit(0, "c", limits=(ask,))
    world.end("a", None, actual={"tokens": 0})
    assert left(world, ask) == 80
    world.end("b", None, actual={"tokens": 50})
    assert left(world, ask) == 50


def test_pay_from_what_flowed_over_while_nobody_came() -> None:
    """Where nobody took since, what came back meanwhile pays for what was used too much."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.wait(8)
    world.end("a", None, actual={"tokens": 150})
    assert left(world, ask) == 30


def test_drop_what_comes_when_the_bucket_has_been_full_for_long() -> None:
    """When a bucket has been full for as long as filling it takes, no correction of up to its burst would show."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    row, pinned = world.counter("t"), world.hold("a").windows[0]
    assert row.end == BEGIN + 12
    assert may_be_corrected(pinned, row, BEGIN + 11.9)
    assert not may_be_corrected(pinned, row, BEGIN + 12)
    world.wait(12)
    world.end("a", None, actual={"tokens": 120})
    assert (world.counter("t"), left(world, ask)) == (row, 100)


def test_forget_a_bucket_that_is_full() -> None:
    """A row goes with the sweep when it says nothing any more; one that owes stays."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.end("a", None, actual={"tokens": 500})
    world.wait(59)
    world.run(Sweep())
    assert left(world, ask) == 100
    assert world.counter("t").end == BEGIN + 60
    world.wait(61)
    world.run(Sweep())
    assert world.state.counters == {}


def test_undo_what_was_taken() -> None:
    """An admission that is undone puts back what it took, unless the bucket was full since."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0)
    hit(world, ask)
    before = world.counter()
    undone = world.ask(limits=(ask._replace(cost=30),))
    at = world.run(undone).now
    world.run(Undo(undone, at))
    assert world.counter() == before
    world.wait(50)
    hit(world, ask)
    before = world.counter()
    world.run(Undo(undone, at))
    assert world.counter() == before


def test_begin_full_on_the_row_of_another_strategy() -> None:
    """A limit whose strategy was changed finds nothing taken in what the old one kept."""
    world = World(BEGIN)
    world.state.counters["k"] = Counter("k", BEGIN - 5, BEGIN + 5, 9)
    assert hit(world, bucket(1, 3)).windows[0].remaining == 2


def test_count_exactly_for_ever() -> None:
    """A bucket that is never full counts on, without windows that are over, where the sum would not be exact."""
    world, ask = World(BEGIN), bucket(2**23, 2**24, 1.0)
    hit(world, ask)
    world.state.counters["k"] = world.counter()._replace(start=BEGIN - 2**30 + 1, used=MAX_AMOUNT - 3)
    # A step of the clock is two of these tokens.
    assert left(world, ask) == pytest.approx(2**23 + 4, abs=2)
    assert hit(world, ask._replace(cost=4)).admitted
    assert (world.counter().start, world.counter().used) == (BEGIN, 2**23)


def test_fill_up_to_the_bound() -> None:
    """Usage that nobody can count fills the bucket's row, and no more."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    corrected = correct(PinnedWindow("t", BEGIN, "tokens", 1), world.counter("t"), MAX_AMOUNT, BEGIN)
    assert corrected is not None
    assert corrected.used == MAX_AMOUNT


@pytest.mark.uncounted
@given(
    refill=st.integers(1, 20),
    burst=st.integers(1, 30),
    window=st.sampled_from((1, 3, 7, 60, 3_600)),
    begin=st.integers(0, 2_000_000_000),
    steps=st.lists(
        st.tuples(st.integers(0, 4_000), st.integers(0, 12), st.one_of(st.none(), st.integers(0, 40))),
        min_size=1,
        max_size=25,
    ),
)
def test_hold_what_arithmetic_without_rounding_holds(
    refill: int, burst: int, window: int, begin: int, steps: list[tuple[int, int, int | None]]
) -> None:
    """
    To the token, a bucket is that of exact fractions: never above its burst, below zero only by corrections.

    A refusal's wait is enough, and all of it is needed.
    """
    world, ask = World(float(begin)), bucket(refill, burst, float(window))
    rate, full, taken = Fraction(refill, window), Fraction(world.now), 0
    for number, (sixteenths, cost, used) in enumerate(steps):
        world.wait(sixteenths / 16)
        now = Fraction(world.now)
        if (now - full) * rate >= taken:
            full, taken = now, 0
        inside = burst - taken + floor((now - full) * rate)
        asked = ask._replace(cost=cost, meter="tokens")
        decision = world.admit(0, f"c{number}", limits=(asked,))
        assert decision.admitted == (cost <= inside), (inside, cost)
        if decision.admitted:
            assert decision.windows[0].remaining == max(0, inside - cost)
            taken += cost
            if used is not None:
                world.end(f"c{number}", None, actual={"tokens": used})
                taken = max(0, taken + used - cost)
        elif cost <= burst:
            assert decision.refusal is not None
            retry = decision.refusal.retry_after_s
            assert retry is not None
            seen = look(asked, world.counter(), world.now + retry)
            assert seen is not None
            assert seen.fits
            early = look(asked, world.counter(), world.now + retry - 2e-6)
            assert early is not None
            assert not early.fits


@pytest.mark.uncounted
@settings(max_examples=20)
@given(begin=st.floats(0, 2e9), pace=st.integers(1, 999), waits=st.lists(st.floats(0, 3), min_size=50, max_size=200))
def test_never_drift(begin: float, pace: int, waits: list[float]) -> None:
    """However often a bucket is looked at and taken from, it gives its burst and what flowed back, to a token."""
    world, ask = World(begin), bucket(pace, 5, 7.0)
    taken = 0
    hit(world, ask._replace(cost=5))
    for wait in waits:
        world.wait(min(wait, 2 / pace))
        taken += hit(world, ask).admitted
    assert abs(taken + left(world, ask) - (world.now - begin) * pace / 7.0) <= 1


def test_be_as_before_where_all_is_given_back() -> None:
    """Where all that was taken of a full bucket comes back, it is as it was: what went before is corrected."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    before = world.counter("t")
    world.wait(5)
    world.admit(0, "b", limits=(ask,))
    world.admit(0, "c", limits=(ask._replace(cost=5),))
    assert (world.counter("t").start, world.counter("t").previous) == (BEGIN + 5, 20)
    world.end("b", None, actual={"tokens": 0})
    assert left(world, ask) == 95
    world.end("c", None, actual={"tokens": 0})
    row = world.counter("t")
    assert (row.start, row.end, row.used, row.previous) == (before.start, before.end, 20, 0)
    world.end("a", None, actual={"tokens": 120})
    assert left(world, ask) == 30


def test_begin_again_when_it_began_though_all_others_gave_back() -> None:
    """What a call uses beyond an estimate of nothing is owed from when it came, whatever those beside it give back."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.wait(9)
    world.admit(0, "b", limits=(ask,))
    world.admit(0, "c", limits=(ask._replace(cost=0),))
    world.end("b", None, actual={"tokens": 0})
    assert world.counter("t").start == BEGIN
    world.end("c", None, actual={"tokens": 70})
    assert left(world, ask) == 30


def test_owe_from_when_a_call_came_that_was_expected_to_use_nothing() -> None:
    """What flowed over before such a call came does not pay for it."""
    world, ask = World(BEGIN), bucket(10, 100, 1.0, cost=20, **TOKENS)
    world.admit(0, "a", limits=(ask,))
    world.wait(9)
    world.admit(0, "b", limits=(ask._replace(cost=0),))
    world.end("b", None, actual={"tokens": 70})
    assert left(world, ask) == 30
