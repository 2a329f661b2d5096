"""Windows: how rate limits count, to the microsecond, beside the `limits` package and after a call's end."""

from __future__ import annotations

import asyncio
from math import floor
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from limits import RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import FixedWindowRateLimiter, RateLimiter, SlidingWindowCounterRateLimiter

from asgi_metering.decisions import Decision, Reason, WindowState
from asgi_metering.rules.operations import LimitAsk, WindowKind
from asgi_metering.rules.state import NEVER, Counter, PinnedWindow
from asgi_metering.rules.windows import correct, look
from tests.rules.world import DAY_S, MIDNIGHT, World, calendar, days, fixed, sliding, slots, snapshot

TICK_S = 1e-6
"""What a sliding window adds to its waits: at the very instant of equality the past still weighs."""


def hit(world: World, limit: LimitAsk) -> Decision:
    """One call under one limit and nothing else."""
    return world.admit(limits=(limit,))


def state_of(decision: Decision) -> WindowState:
    """What the only limit of a decision says."""
    (state,) = decision.windows
    return state


# -- fixed ---------------------------------------------------------------------------------------------------


def test_begin_a_fixed_window_with_its_first_hit() -> None:
    """A fixed window begins when the first call comes and ends its length later, as in `limits` (S2.29)."""
    world = World()
    first = state_of(hit(world, fixed(3)))
    assert first == WindowState("calls", 3, 2, 60.0, 60.0, "requests")
    begun = world.now
    world.wait(59.5)
    assert state_of(hit(world, fixed(3))).reset_after_s == 0.5
    assert world.counter() == Counter("k", begun, begun + 60, 2)
    world.wait(0.5)
    assert state_of(hit(world, fixed(3))) == first
    assert world.counter() == Counter("k", begun + 60, begun + 120, 1)


def test_admit_up_to_the_limit_and_no_further() -> None:
    """Equality passes; the call above it is refused with the exact wait, and counts nowhere."""
    world = World()
    for left in (2, 1, 0):
        assert state_of(hit(world, fixed(3))).remaining == left
    world.wait(20)
    refusal = world.refused(limits=(fixed(3),))
    assert (refusal.reason, refusal.name, refusal.required, refusal.available, refusal.limit) == (
        Reason.RATE_LIMIT,
        "calls",
        1,
        0,
        3,
    )
    assert (refusal.retry_after_s, refusal.held, refusal.transient) == (40.0, 0, False)


def test_take_the_cost_of_a_call() -> None:
    """A call takes its cost; what does not fit whole takes nothing, while a cheaper call still passes."""
    world = World()
    assert state_of(hit(world, fixed(10, cost=6))).remaining == 4
    assert world.refused(limits=(fixed(10, cost=5),)).available == 4
    assert state_of(hit(world, fixed(10, cost=4))).remaining == 0
    assert state_of(hit(world, fixed(10, cost=0))).remaining == 0


def test_refuse_a_cost_of_zero_above_the_limit() -> None:
    """Where the count stands above the limit already, also a call that takes nothing waits."""
    world = World()
    hit(world, fixed(10, cost=10))
    world.wait(10)
    refusal = world.refused(limits=(fixed(4, cost=0),))
    assert (refusal.required, refusal.available, refusal.retry_after_s) == (0, 0, 50.0)


@pytest.mark.parametrize("limit", [fixed(5, cost=6), sliding(5, cost=6), calendar(5, MIDNIGHT, cost=6), fixed(0)])
def test_refuse_for_good_what_is_above_the_limit_itself(limit: LimitAsk) -> None:
    """A call that costs more than a whole window allows never fits: its own reason, and no wait."""
    world = World(MIDNIGHT + 60)
    refusal = world.refused(limits=(limit,))
    assert refusal.reason is Reason.EXCEEDS_LIMIT
    assert (refusal.required, refusal.limit, refusal.available) == (limit.cost, limit.limit, limit.limit)
    assert (refusal.held, refusal.retry_after_s, refusal.transient) == (0, None, False)


def test_report_what_never_fits_before_what_has_to_wait() -> None:
    """Of several failing limits the one that the call can never meet is reported."""
    world = World()
    hit(world, fixed(1, 3600, key="a"))
    refusal = world.refused(limits=(fixed(1, 3600, key="a"), fixed(5, cost=6, key="b", name="size")))
    assert (refusal.reason, refusal.name) == (Reason.EXCEEDS_LIMIT, "size")


def test_report_the_window_that_takes_longest() -> None:
    """Of several spent limits the last to have room is reported: after its wait all of them pass."""
    world = World()
    limits = (fixed(1, 60, key="m", name="minute"), fixed(1, 3600, key="h", name="hour"), fixed(1, 10, key="s"))
    assert world.admit(limits=limits).admitted
    world.wait(5)
    refusal = world.refused(limits=limits)
    assert (refusal.name, refusal.retry_after_s) == ("hour", 3595.0)
    world.wait(3595)
    assert world.admit(limits=limits).admitted


def test_tell_every_limit_in_policy_order_also_when_refused() -> None:
    """A refusal tells of each limit what it has, untaken, in the order of the policy."""
    world = World()
    limits = (fixed(5, key="a", name="a"), sliding(1, key="b", name="b"), calendar(9, world.now, key="c", name="c"))
    admitted = world.admit(limits=limits)
    assert [(seen.name, seen.remaining) for seen in admitted.windows] == [("a", 4), ("b", 0), ("c", 8)]
    refused = world.admit(limits=limits)
    assert [(seen.name, seen.remaining) for seen in refused.windows] == [("a", 4), ("b", 0), ("c", 8)]
    assert refused.refusal is not None
    assert refused.refusal.name == "b"


@pytest.mark.parametrize("amount", [0, 4])
def test_tell_what_is_left_after_the_call_itself(amount: int) -> None:
    """The answer to an admitted call counts that call already, whether it holds units or not."""
    world = World()
    world.grant(10)
    assert state_of(world.admit(amount, limits=(fixed(5, cost=2),))).remaining == 3


def test_keep_a_fixed_window_when_the_clock_steps_back() -> None:
    """A clock that steps back stays in the window it had reached: nothing is counted twice, nothing is forgotten."""
    world = World()
    hit(world, fixed(2))
    world.wait(-30)
    assert state_of(hit(world, fixed(2))) == WindowState("calls", 2, 0, 60.0, 60.0, "requests")
    assert world.refused(limits=(fixed(2),)).retry_after_s == 60.0
    world.wait(30)
    assert world.counter().used == 2


# -- calendar ------------------------------------------------------------------------------------------------


def test_count_a_calendar_window_between_its_boundaries() -> None:
    """A calendar window is the one that holds the store's time; the next one begins empty (S0.5)."""
    world = World(MIDNIGHT + DAY_S - 1)
    sent = calendar(2, world.now)
    hit(world, sent)
    assert state_of(hit(world, sent)) == WindowState("calls", 2, 0, 1.0, DAY_S, "requests")
    assert world.refused(limits=(sent,)).retry_after_s == 1.0
    world.wait(1)
    assert state_of(hit(world, sent)) == WindowState("calls", 2, 1, DAY_S, DAY_S, "requests")
    assert world.counter() == Counter("k", MIDNIGHT + DAY_S, MIDNIGHT + 2 * DAY_S, 1)


@pytest.mark.parametrize("away", [-2 * DAY_S, 2 * DAY_S])
def test_answer_once_more_when_the_boundaries_do_not_cover_now(away: float) -> None:
    """Boundaries around another time are answered with the store's time and change nothing; those around it pass."""
    world = World(MIDNIGHT)
    sent = calendar(2, MIDNIGHT - away)
    before = snapshot(world.state)
    answer = world.admit(limits=(fixed(5, key="other"), sent))
    assert (answer.stale_calendar, answer.admitted, answer.refusal, answer.now) == (True, False, None, MIDNIGHT)
    assert snapshot(world.state) == before
    assert world.admit(limits=(calendar(2, answer.now),)).admitted


@pytest.mark.parametrize("away", [-2 * DAY_S + 1, -DAY_S, 0.0, 1.0, DAY_S])
def test_decide_on_boundaries_of_a_clock_that_is_off(away: float) -> None:
    """Four boundaries cover a caller whose clock is up to a day behind or ahead: the store picks by its own."""
    world = World(MIDNIGHT)
    assert world.admit(limits=(calendar(2, MIDNIGHT - away),)).admitted
    assert world.counter().start == MIDNIGHT


def test_keep_a_calendar_window_when_the_clock_steps_back() -> None:
    """A clock that steps back over midnight stays in the day it had reached: yesterday is not opened again."""
    world = World(MIDNIGHT)
    hit(world, calendar(2, world.now))
    world.wait(-10)
    sent = calendar(2, world.now)
    assert state_of(hit(world, sent)) == WindowState("calls", 2, 0, DAY_S, DAY_S, "requests")
    assert world.refused(limits=(sent,)).retry_after_s == DAY_S
    world.wait(10)
    assert world.refused(limits=(sent,)).available == 0


def test_begin_anew_when_a_calendars_zone_changes() -> None:
    """A limit whose days begin at another hour from now on counts in those."""
    world = World(MIDNIGHT + 7200)
    hit(world, calendar(2, world.now))
    moved = tuple(edge + 3600 for edge in days(world.now))
    assert state_of(hit(world, calendar(2, world.now, boundaries=moved))).remaining == 1
    assert world.counter().start == MIDNIGHT + 3600


# -- sliding -------------------------------------------------------------------------------------------------


def test_weigh_the_window_before_by_what_is_left_of_it() -> None:
    """A sliding window counts the running minute whole and the one before by the share that still counts."""
    world = World(MIDNIGHT)
    for _ in range(4):
        hit(world, sliding(10))
    world.wait(75)
    seen = look(sliding(10), world.counter(), world.now)
    assert seen is not None
    assert seen.used == floor(4 * 45 / 60) == 3
    assert (seen.fits, seen.retry_after_s, seen.left_s) == (True, 0.0, 45.0)
    assert state_of(hit(world, sliding(10))).remaining == 6
    assert world.counter() == Counter("k", MIDNIGHT + 60, MIDNIGHT + 120, 1, 4)


def test_forget_what_is_older_than_the_window_before() -> None:
    """Two windows later nothing counts any more."""
    world = World(MIDNIGHT)
    hit(world, sliding(1))
    world.wait(120)
    assert state_of(hit(world, sliding(1))).remaining == 0
    assert world.counter() == Counter("k", MIDNIGHT + 120, MIDNIGHT + 180, 1)


def test_tell_when_a_sliding_window_has_more() -> None:
    """The reset is that of the state after the decision: what was taken now, weighs less only in the next window."""
    world = World(MIDNIGHT)
    first = state_of(hit(world, sliding(4)))
    assert (first.remaining, first.reset_after_s) == (3, pytest.approx(60 + TICK_S))
    looked = state_of(hit(world, sliding(4, key="fresh", cost=0)))
    assert (looked.remaining, looked.reset_after_s) == (4, 0.0)
    hit(world, sliding(4, cost=3))
    refused = world.admit(limits=(sliding(4),))
    assert state_of(refused).reset_after_s == pytest.approx(60 + TICK_S)
    world.wait(60)
    assert state_of(world.admit(limits=(sliding(4),))).reset_after_s == pytest.approx(TICK_S)


def test_tell_a_finite_reset_where_a_limit_was_cut_to_nothing() -> None:
    """Where a limit of zero meets an old count, the reset is when that count is gone."""
    world = World(MIDNIGHT)
    hit(world, sliding(4, cost=4))
    refused = world.admit(limits=(sliding(0),))
    assert refused.refusal is not None
    assert refused.refusal.reason is Reason.EXCEEDS_LIMIT
    reset = state_of(refused).reset_after_s
    seen = look(sliding(4), world.counter(), world.now + reset)
    assert seen is not None
    assert seen.used == 0
    world.wait(60)
    assert 0 < state_of(world.admit(limits=(sliding(0),))).reset_after_s < 60


def test_keep_a_sliding_window_when_the_clock_steps_back() -> None:
    """A clock that steps back stands still at the beginning of the window that it had reached."""
    world = World(MIDNIGHT)
    hit(world, sliding(9, cost=2))
    world.wait(60)
    hit(world, sliding(9, cost=3))
    world.wait(-20)
    assert state_of(hit(world, sliding(9, cost=3))).remaining == 1
    assert world.counter() == Counter("k", MIDNIGHT + 60, MIDNIGHT + 120, 6, 2)


def test_count_a_large_window_to_the_unit() -> None:
    """Beside a count of billions the last unit of the past is still weighed exactly, and its wait is exact."""
    world = World(MIDNIGHT)
    counter = Counter("k", MIDNIGHT, MIDNIGHT + 30 * DAY_S, 10**9 - 1, 1)
    ask = LimitAsk("month", "k", WindowKind.SLIDING, 10**9, 30 * DAY_S)
    start = floor(MIDNIGHT / ask.window_s) * ask.window_s
    counter = counter._replace(start=start, end=start + ask.window_s)
    first = look(ask, counter, start)
    assert first is not None
    assert not first.fits
    later = look(ask, counter, start + first.retry_after_s)
    assert later is not None
    assert later.fits
    assert first.retry_after_s == pytest.approx(TICK_S)
    assert world.now == MIDNIGHT


# -- the wait is exact ---------------------------------------------------------------------------------------

moments = st.floats(MIDNIGHT, MIDNIGHT + 10_000, allow_nan=False)
gaps = st.lists(st.floats(0, 45, allow_nan=False), min_size=1, max_size=12)


@given(begin=moments, waits=gaps, limit=st.integers(1, 6), window=st.sampled_from([1, 10, 60, 3600]))
def test_pass_a_fixed_window_exactly_after_the_wait(begin: float, waits: list[float], limit: int, window: int) -> None:
    """The same request passes after its wait, and a microsecond before it does not."""
    world = World(begin)
    ask = fixed(limit, float(window))
    for wait in waits:
        world.wait(wait * window / 60)
        decision = hit(world, ask)
    while decision.admitted:
        decision = hit(world, ask)
    assert decision.refusal is not None
    retry = decision.refusal.retry_after_s
    assert retry is not None
    refused_at = world.now
    world.now = refused_at + retry - 1e-6
    assert not hit(world, ask).admitted
    world.now = refused_at + retry
    assert hit(world, ask).admitted


@pytest.mark.uncounted
@given(
    begin=moments,
    waits=st.lists(st.tuples(st.floats(0, 90, allow_nan=False), st.integers(1, 4)), min_size=1, max_size=12),
    limit=st.integers(4, 12),
    cost=st.integers(1, 4),
    window=st.sampled_from([1, 10, 60, 3600, 86_400]),
)
def test_pass_a_sliding_window_exactly_after_the_wait(
    begin: float, waits: list[tuple[float, int]], limit: int, cost: int, window: int
) -> None:
    """The same request passes after its wait; two microseconds before (its tick, and the clock's own) it does not."""
    world = World(begin)
    for wait, taken in waits:
        world.wait(wait * window / 60)
        hit(world, sliding(limit, float(window), cost=taken))
    ask = sliding(limit, float(window), cost=cost)
    decision = hit(world, ask)
    while decision.admitted:
        decision = hit(world, ask)
    assert decision.refusal is not None
    retry = decision.refusal.retry_after_s
    assert retry is not None
    refused_at = world.now
    if retry > 2e-6:
        world.now = refused_at + retry - 2e-6
        assert not hit(world, ask).admitted
    world.now = refused_at + retry
    assert hit(world, ask).admitted


@given(
    begin=moments,
    waits=st.lists(st.tuples(st.floats(0, 90, allow_nan=False), st.integers(1, 4)), min_size=1, max_size=12),
    limit=st.integers(4, 12),
)
def test_have_more_exactly_at_the_reset(begin: float, waits: list[tuple[float, int]], limit: int) -> None:
    """At its reset a sliding window has more than the decision left, and not before."""
    world = World(begin)
    for wait, taken in waits:
        world.wait(wait)
        decision = hit(world, sliding(limit, cost=taken))
    told = state_of(decision)
    assert told.reset_after_s < 120 + 2 * TICK_S
    assume(told.reset_after_s > 2e-6)
    at = world.now

    def left(now: float) -> int:
        seen = look(sliding(limit), world.state.counters.get("k"), now)
        assert seen is not None
        return seen.before

    assert left(at) == left(at + told.reset_after_s - 2e-6) == told.remaining
    assert left(at + told.reset_after_s) > told.remaining


# -- beside `limits` -----------------------------------------------------------------------------------------


async def decided_by_limits(
    strategy: type[RateLimiter], limit: int, window: int, times: list[float], monkeypatch: pytest.MonkeyPatch
) -> list[tuple[bool, int]]:
    """(admitted, remaining) of each hit, by `limits` in memory on a patched clock."""
    clock = SimpleNamespace(time=lambda: now)
    monkeypatch.setattr("limits.aio.storage.memory.time", clock)
    monkeypatch.setattr("limits.aio.strategies.time", clock)
    limiter = strategy(MemoryStorage())
    item = RateLimitItemPerSecond(limit, window)
    answers = []
    for now in times:  # noqa: B007 -- the clock reads it
        admitted = await limiter.hit(item, "k")
        stats = await limiter.get_window_stats(item, "k")
        answers.append((admitted, stats.remaining))
    return answers


def decided_by_us(kind: WindowKind, limit: int, window: int, times: list[float]) -> list[tuple[bool, int]]:
    """(admitted, remaining) of each hit, by the rules."""
    world = World()
    answers = []
    for world.now in times:
        decision = hit(world, LimitAsk("calls", "k", kind, limit, float(window)))
        answers.append((decision.admitted, state_of(decision).remaining))
    return answers


# Sixteenths of a second and windows of powers of two: all of the arithmetic is exact, in `limits` and here, so that
# not one answer may differ.
steps = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 4000)), min_size=1, max_size=40)


@pytest.mark.uncounted
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [(WindowKind.FIXED, FixedWindowRateLimiter), (WindowKind.SLIDING, SlidingWindowCounterRateLimiter)],
)
@settings(max_examples=150)
@given(limit=st.integers(1, 8), window=st.sampled_from([1, 2, 16, 64]), begin=st.integers(1_000, 10_000), steps=steps)
def test_decide_as_limits_does_at_cost_1(
    kind: WindowKind, strategy: type[RateLimiter], limit: int, window: int, begin: int, steps: list[int]
) -> None:
    """Hit for hit, fixed and sliding windows admit what the `limits` package admits, and leave as much."""
    now, times = float(begin), []
    for step in steps:
        now += step / 16
        times.append(now)
    with pytest.MonkeyPatch.context() as monkeypatch:
        theirs = asyncio.run(decided_by_limits(strategy, limit, window, times, monkeypatch))
    assert decided_by_us(kind, limit, window, times) == theirs


# -- weighted limits -----------------------------------------------------------------------------------------

TOKENS = {"name": "tokens", "key": "t", "meter": "tokens"}


@pytest.mark.parametrize("make", [fixed, sliding])
def test_correct_a_weighted_limit_at_the_end(make: type) -> None:
    """Tokens are held by estimate and corrected by actual minus estimate, up or down, when the call ends."""
    world = World(MIDNIGHT)
    world.admit(0, "a", limits=(make(100, cost=30, **TOKENS),))
    world.admit(0, "b", limits=(make(100, cost=40, **TOKENS),))
    assert world.counter("t").used == 70
    world.end("a", None, actual={"tokens": 5, "requests": 9})
    assert world.counter("t").used == 45
    world.end("b", None, actual={"tokens": 95})
    assert world.counter("t").used == 100


def test_correct_the_window_of_the_admission_and_no_other() -> None:
    """The window is pinned at admission: a call that ends in a later fixed window changes nothing there."""
    world = World()
    world.admit(0, "a", limits=(fixed(100, cost=30, **TOKENS),))
    assert world.hold("a").windows == (PinnedWindow("t", world.now, "tokens", 30),)
    world.wait(70)
    world.admit(0, "b", limits=(fixed(100, cost=40, **TOKENS),))
    world.end("a", None, actual={"tokens": 90})
    assert world.counter("t").used == 40
    assert world.admit(limits=(fixed(100, cost=60, **TOKENS),)).admitted


def test_correct_a_fixed_window_that_follows_its_neighbour_at_once() -> None:
    """Also where the next fixed window begins at the very end of the pinned one, its count stays its own."""
    world = World()
    world.admit(0, "a", limits=(fixed(100, cost=30, **TOKENS),))
    world.wait(60)
    world.admit(0, "b", limits=(fixed(100, cost=40, **TOKENS),))
    world.end("a", None, actual={"tokens": 90})
    assert world.counter("t").used == 40
    world.admit(0, "c", limits=(fixed(100, cost=1, **TOKENS),))
    assert world.counter("t") == Counter("t", world.now, world.now + 60, 41)


@pytest.mark.parametrize(("estimate", "actual", "previous"), [(30, 90, 90), (30, 0, 0), (0, 50, 50)])
def test_correct_a_sliding_window_that_has_become_the_past(estimate: int, actual: int, previous: int) -> None:
    """A sliding window still counts its neighbour: a call that ends one window later is corrected in that."""
    world = World(MIDNIGHT)
    world.admit(0, "a", limits=(sliding(100, cost=estimate, **TOKENS),))
    world.wait(60)
    world.admit(0, "b", limits=(sliding(100, cost=40, **TOKENS),))
    world.end("a", None, actual={"tokens": actual})
    assert world.counter("t") == Counter("t", MIDNIGHT + 60, MIDNIGHT + 120, 40, previous)


def test_drop_a_correction_that_no_longer_matters() -> None:
    """Two windows later the pinned one counts nowhere, and its correction is dropped."""
    world = World(MIDNIGHT)
    world.admit(0, "a", limits=(sliding(100, cost=30, **TOKENS),))
    world.wait(120)
    world.admit(0, "b", limits=(sliding(100, cost=40, **TOKENS),))
    before = world.counter("t")
    world.end("a", None, actual={"tokens": 90})
    assert world.counter("t") == before


def test_drop_a_correction_of_a_counter_that_is_forgotten() -> None:
    """A counter that was swept away is not made again by a correction."""
    pinned = PinnedWindow("t", MIDNIGHT, "tokens", 5)
    assert correct(pinned, None, 9, MIDNIGHT) is None


@pytest.mark.parametrize("start", [MIDNIGHT, MIDNIGHT + 60])
def test_never_count_below_zero(start: float) -> None:
    """Where a count was cleared meanwhile, a correction leaves zero in it."""
    counter = Counter("t", start, start + 60, 3, 3)
    corrected = correct(PinnedWindow("t", MIDNIGHT, "tokens", 10), counter, 2, MIDNIGHT)
    assert corrected is not None
    assert min(corrected.used, corrected.previous) == 0


def test_leave_a_weighted_limit_that_nobody_measured() -> None:
    """A meter that the end does not report stays as it was held."""
    world = World()
    world.admit(0, "a", limits=(fixed(100, cost=30, **TOKENS),))
    world.end("a", None)
    assert world.counter("t").used == 30


def test_keep_a_request_counted_when_the_call_fails() -> None:
    """A request count is not given back on failure, whatever the end reports (S0.12 is for allowances)."""
    world = World()
    world.admit(0, "a", limits=(fixed(2), fixed(100, cost=30, **TOKENS)))
    world.end("a", None, actual={"tokens": 0, "requests": 0})
    assert world.counter("k").used == 1
    assert world.counter("t").used == 0


def test_admit_again_after_a_correction_made_room() -> None:
    """Unused estimated tokens are there for the next call at once."""
    world = World()
    limit = fixed(100, cost=60, **TOKENS)
    world.admit(0, "a", limits=(limit,))
    assert world.refused(limits=(limit,)).available == 40
    world.end("a", None, actual={"tokens": 10})
    assert world.admit(limits=(limit,)).admitted


def test_hold_nothing_for_calls_that_only_count_requests() -> None:
    """A call that only counts requests leaves a counter and no hold; with a slot it leaves a hold without parts."""
    world = World()
    world.admit(0, "a", limits=(fixed(2),))
    assert not world.state.holds
    world.admit(0, "b", limits=(fixed(2),), leases=(slots(1),))
    assert world.hold("b").parts == ()
    assert world.hold("b").windows == ()


def test_wait_for_nothing_where_a_call_fits() -> None:
    """What fits now waits for no time, in any kind of window."""
    for ask in (fixed(5), sliding(5), calendar(5, MIDNIGHT)):
        seen = look(ask, None, MIDNIGHT)
        assert seen is not None
        assert (seen.fits, seen.retry_after_s, seen.before) == (True, 0.0, 5)


def test_wait_forever_for_what_never_fits() -> None:
    """Inside the rules a wait that never ends is infinite; no answer carries it."""
    for ask in (fixed(5, cost=6), sliding(5, cost=6)):
        seen = look(ask, None, MIDNIGHT)
        assert seen is not None
        assert (seen.fits, seen.retry_after_s) == (False, NEVER)
