"""Moving logs: at most so many calls in any window of that length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.decisions import Reason
from asgi_metering.rules import logs
from asgi_metering.rules.operations import Sweep, Undo
from asgi_metering.rules.state import Counter, PinnedWindow
from asgi_metering.rules.windows import correct, may_be_corrected
from tests.rules.world import World, moving

MOST_S = 1e-6
"""Documented resolution of resets and of Retry-After."""


def refused_for(world: World, limit: int = 2, cost: int = 1) -> float:
    """The wait that a refusal tells."""
    refusal = world.admit(limits=(moving(limit, cost=cost),)).refusal
    assert refusal is not None
    assert refusal.reason is Reason.RATE_LIMIT
    assert refusal.retry_after_s is not None
    return refusal.retry_after_s


def times(world: World) -> list[float]:
    """What the log has, oldest first."""
    log = world.counter().extra
    assert log[:1] == logs.MARK
    return [logs.time_at(log[1:], index) for index in range(logs.count(log[1:]))]


def test_count_each_call_for_a_window_of_its_own() -> None:
    """A call counts until it is older than the window, whenever others came; a refused one never counts."""
    world = World(1_000.0)
    assert world.admit(limits=(moving(2),)).admitted
    world.wait(40)
    assert world.admit(limits=(moving(2),)).admitted
    assert refused_for(world) == pytest.approx(20, abs=MOST_S)
    world.wait(20)
    assert refused_for(world) <= MOST_S
    world.wait(0.001)
    decision = world.admit(limits=(moving(2),))
    assert (decision.admitted, decision.windows[0].remaining) == (True, 0)
    assert decision.windows[0].reset_after_s == pytest.approx(39.999, abs=MOST_S)
    assert times(world) == [1_040.0, 1_060.001]


def test_refuse_a_call_above_the_log_itself() -> None:
    """A cost that no empty log has room for is told so."""
    world = World()
    refusal = world.admit(limits=(moving(2, cost=3),)).refusal
    assert refusal is not None
    assert (refusal.reason, refusal.retry_after_s) == (Reason.EXCEEDS_LIMIT, None)


def test_wait_for_as_many_as_a_cost_needs() -> None:
    """A call that costs several waits until so many have left."""
    world = World(1_000.0)
    for _ in range(3):
        world.admit(limits=(moving(3),))
        world.wait(10)
    assert refused_for(world, 3, cost=2) == pytest.approx(40, abs=MOST_S)
    assert refused_for(world, 3, cost=3) == pytest.approx(50, abs=MOST_S)


def test_look_without_taking() -> None:
    """A cost of 0 leaves the row as it is, and tells what is left of a log that is empty by now."""
    world = World()
    world.admit(limits=(moving(3),))
    before = world.counter()
    world.wait(5)
    looked = world.admit(limits=(moving(3, cost=0),))
    assert (looked.windows[0].remaining, world.counter()) == (2, before)
    world.wait(60.5)
    assert world.admit(limits=(moving(3, cost=0),)).windows[0].remaining == 3
    assert times(world) == []


def test_stay_where_a_clock_stepped_back() -> None:
    """A clock that steps back ages no call: those that come then count as the latest one does."""
    world = World(1_000.0)
    world.admit(limits=(moving(2),))
    world.wait(-30)
    assert world.admit(limits=(moving(2),)).admitted
    assert times(world) == [1_000.0, 1_000.0]
    assert refused_for(world) == pytest.approx(90, abs=MOST_S)


def test_take_back_one_call_of_its_time() -> None:
    """An admission that is undone leaves the log as it was, one of several at the same instant too."""
    world = World(1_000.0)
    world.admit(limits=(moving(9),))
    world.wait(1)
    world.admit(limits=(moving(9),))
    before = world.counter()
    ask = world.ask(limits=(moving(9),))
    decision = world.run(ask)
    assert times(world) == [1_000.0, 1_001.0, 1_001.0]
    world.run(Undo(ask, decision.now))
    assert world.counter() == before
    world.wait(100)
    world.admit(limits=(moving(9),))
    before = world.counter()
    world.run(Undo(ask, decision.now - 1_000))
    world.run(Undo(ask, decision.now + 1_000))
    assert times(world) == []
    assert world.counter()._replace(used=1, extra=before.extra) == before


def test_take_back_what_came_while_the_clock_had_stepped_back() -> None:
    """Such a call stands at a later time than its decision: that entry goes."""
    world = World(1_000.0)
    world.admit(limits=(moving(9),))
    world.wait(-5)
    ask = world.ask(limits=(moving(9),))
    world.run(Undo(ask, world.run(ask).now))
    assert times(world) == [1_000.0]


def test_correct_nothing_but_what_is_taken_back() -> None:
    """A log counts calls: what a call used never adds to it, and one that has left is not there to leave."""
    world = World(1_000.0)
    world.admit(limits=(moving(9),))
    row = world.counter()
    pinned = PinnedWindow("k", 1_000.0, "requests", 1)
    assert correct(pinned, row, 5, 1_000.0) is None
    assert correct(pinned, row, 1, 1_000.0) is None
    assert correct(pinned._replace(start=999.0), row, 0, 1_000.0) is None
    assert may_be_corrected(pinned, row, 1_000.0)
    empty = correct(pinned, row, 0, 1_000.0)
    assert empty == Counter("k", 1_000.0, 1_060.0, 0, 0, logs.MARK)
    assert not may_be_corrected(pinned, empty, 1_000.0)


def test_forget_a_log_that_nobody_is_in() -> None:
    """A log goes with the sweep when every call has left it, and not before."""
    world = World(1_000.0)
    world.admit(limits=(moving(2),))
    world.wait(60)
    world.run(Sweep())
    assert times(world) == [1_000.0]
    world.wait(60)
    world.run(Sweep())
    assert world.state.counters == {}


def test_begin_anew_on_the_row_of_another_strategy() -> None:
    """A limit whose strategy was changed finds no calls in what the old one kept."""
    world = World()
    world.state.counters["k"] = Counter("k", world.now - 5, world.now + 5, 9)
    assert world.admit(limits=(moving(2),)).windows[0].remaining == 1


@pytest.mark.uncounted
@given(
    begin=st.floats(0, 2e9),
    waits=st.lists(st.floats(0, 70), min_size=1, max_size=30),
    limit=st.integers(1, 4),
    window=st.floats(0.1, 90),
)
def test_never_admit_more_in_any_window(begin: float, waits: list[float], limit: int, window: float) -> None:
    """In no window of its length are more calls than the limit; a refusal's wait is enough, and all of it is needed."""
    world = World(begin)
    admitted: list[float] = []
    for wait in waits:
        world.wait(wait)
        decision = world.admit(limits=(moving(limit, window),))
        inside = [at for at in admitted if at >= world.now - window]
        assert decision.admitted == (len(inside) < limit)
        if decision.admitted:
            admitted.append(world.now)
            assert decision.windows[0].remaining == limit - len(inside) - 1
        else:
            assert decision.refusal is not None
            retry = decision.refusal.retry_after_s
            assert retry is not None
            refused_at = world.now
            if retry > 2 * MOST_S:
                world.now = refused_at + retry - 2 * MOST_S
                assert not world.admit(limits=(moving(limit, window),)).admitted
            world.now = refused_at + retry
            assert world.admit(limits=(moving(limit, window),)).admitted
            admitted.append(world.now)
