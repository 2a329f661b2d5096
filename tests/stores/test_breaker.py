"""The breaker: a table of three states on an injected clock."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.stores.breaker import FAILURES, FIRST_PAUSE_S, LAST_PAUSE_S, PROBE_S, SPREAD, Breaker, BreakerState


class Clock:
    """Steady seconds that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A breaker with its clock, the draws that it made, and what it told."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.drawn: list[tuple[float, float]] = []
        self.told: list[BreakerState] = []
        self.breaker = Breaker(clock=self.clock, draw=self._draw, told=self.told.append)

    def _draw(self, low: float, high: float) -> float:
        self.drawn.append((low, high))
        return high

    def fail(self, times: int = 1) -> None:
        """Let so many ask, one after another, and get no answer."""
        for _ in range(times):
            number = self.breaker.ask()
            assert number is not None
            self.breaker.failed(number)

    def opened(self) -> Bench:
        """The same, open."""
        self.fail(FAILURES)
        assert self.breaker.state is BreakerState.OPEN
        return self


def test_open_after_failures_in_a_row_only() -> None:
    """An answer in between begins the count anew; the last of enough failures in a row opens it, and tells so."""
    bench = Bench()
    bench.fail(FAILURES - 1)
    number = bench.breaker.ask()
    assert number is not None
    bench.breaker.answered(number)
    bench.fail(FAILURES - 1)
    assert (bench.breaker.state, bench.told) == (BreakerState.CLOSED, [])
    bench.fail()
    assert (bench.breaker.state, bench.told) == (BreakerState.OPEN, [BreakerState.OPEN])
    assert bench.breaker.ask() is None


def test_let_one_probe_through_for_all() -> None:
    """After the pause one asks, and however many others come meanwhile do not; its answer lets all of them."""
    bench = Bench().opened()
    bench.clock.now = FIRST_PAUSE_S - 0.001
    assert bench.breaker.ask() is None
    bench.clock.now = FIRST_PAUSE_S
    probe = bench.breaker.ask()
    assert probe is not None
    assert [bench.breaker.ask() for _ in range(1_000)] == [None] * 1_000
    assert bench.breaker.state is BreakerState.HALF_OPEN
    bench.breaker.answered(probe)
    assert bench.told == [BreakerState.OPEN, BreakerState.CLOSED]
    assert None not in [bench.breaker.ask() for _ in range(3)]


def test_probe_ever_more_seldom_up_to_a_bound() -> None:
    """Each probe that fails doubles the pause, each pause is drawn, and only the first opening is told."""
    bench = Bench().opened()
    pauses = []
    for _ in range(6):
        began = bench.clock.now
        while (number := bench.breaker.ask()) is None:
            bench.clock.now += FIRST_PAUSE_S / 2
        pauses.append(bench.clock.now - began)
        bench.breaker.failed(number)
    assert pauses[:3] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert pauses[-1] == LAST_PAUSE_S
    assert set(bench.drawn) == {SPREAD}
    assert bench.told == [BreakerState.OPEN]


def test_begin_anew_after_a_recovery() -> None:
    """A breaker that closed needs as many failures as ever, and its first pause is the short one again."""
    bench = Bench().opened()
    for outcome in ("failed", "failed", "answered"):
        bench.clock.now += LAST_PAUSE_S
        number = bench.breaker.ask()
        assert number is not None
        getattr(bench.breaker, outcome)(number)
    bench.fail(FAILURES - 1)
    assert bench.breaker.state is BreakerState.CLOSED
    bench.fail()
    bench.clock.now += FIRST_PAUSE_S
    assert bench.breaker.ask() is not None


def test_count_no_news_of_an_older_state() -> None:
    """Calls that were under way when it opened neither keep it open longer nor close it."""
    bench = Bench()
    under_way = [bench.breaker.ask() for _ in range(20)]
    bench.opened()
    for number in under_way:
        assert number is not None
        bench.breaker.failed(number)
        bench.breaker.answered(number)
        bench.breaker.left(number)
    assert bench.breaker.state is BreakerState.OPEN
    bench.clock.now = FIRST_PAUSE_S
    assert bench.breaker.ask() is not None


def test_pass_a_lost_probe_on() -> None:
    """A probe whose caller left is the next one's; one that says nothing at all is given up after a while."""
    bench = Bench().opened()
    bench.clock.now = FIRST_PAUSE_S
    left = bench.breaker.ask()
    assert left is not None
    bench.breaker.left(left)
    silent = bench.breaker.ask()
    assert silent is not None
    assert bench.breaker.ask() is None
    bench.clock.now += PROBE_S
    probe = bench.breaker.ask()
    assert probe is not None
    bench.breaker.answered(silent)
    assert bench.breaker.state == "half-open"
    bench.breaker.answered(probe)
    assert bench.breaker.state == "closed"


def test_judge_a_block_by_what_it_raises() -> None:
    """No answer is a failure; a mistake is an answer; who was cancelled says nothing."""
    bench = Bench()

    def attempt(failure: BaseException | None) -> None:
        with bench.breaker.attempt("gated"):
            if failure is not None:
                raise failure

    def attempts(failure: BaseException) -> None:
        for _ in range(FAILURES - 1):
            with pytest.raises(type(failure)):
                attempt(failure)

    down = StoreUnavailableError("down")
    attempts(down)
    attempt(None)
    attempts(down)
    attempts(ConfigurationError("a mistake"))
    attempts(down)
    attempts(asyncio.CancelledError())
    assert bench.breaker.state is BreakerState.CLOSED
    with pytest.raises(StoreUnavailableError, match="down"):
        attempt(down)
    with pytest.raises(StoreUnavailableError, match="The gated store has not answered of late") as refused:
        attempt(None)
    assert str(refused.value).endswith("It is asked again soon.")
    bench.clock.now = FIRST_PAUSE_S
    with pytest.raises(asyncio.CancelledError):
        attempt(asyncio.CancelledError())
    attempt(None)
    assert bench.breaker.state is BreakerState.CLOSED


def test_survive_whoever_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """What is told of a change is told on the path of a request, so what that raises is logged and goes no further."""

    def broken(_: BreakerState) -> None:
        raise LookupError("no such gauge")

    breaker = Breaker(told=broken)
    for _ in range(FAILURES):
        number = breaker.ask()
        assert number is not None
        breaker.failed(number)
    assert breaker.state is BreakerState.OPEN
    assert "no such gauge" in caplog.text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["ask", "answered", "failed", "left", "wait"]), st.integers(0, 5))))
def test_hold_to_the_table_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """At no time more than one probe is out; nobody asks an open one; closed is told after open, and in turns."""
    bench = Bench()
    out: list[int] = []
    for what, index in steps:
        before = bench.breaker.state
        if what == "wait":
            bench.clock.now += index * FIRST_PAUSE_S / 2
        elif what == "ask":
            number = bench.breaker.ask()
            assert (number is None) <= (before is not BreakerState.CLOSED)
            if number is not None:
                out.append(number)
                assert bench.breaker.state is (
                    BreakerState.CLOSED if before is BreakerState.CLOSED else BreakerState.HALF_OPEN
                )
        elif out:
            number = out.pop(index % len(out))
            getattr(bench.breaker, what)(number)
            if what == "left":
                assert (bench.breaker.state is before) or before is BreakerState.HALF_OPEN
        if bench.breaker.state is BreakerState.HALF_OPEN:
            assert Counter(out)[bench.breaker._number] <= 1
    expected = [BreakerState.OPEN, BreakerState.CLOSED] * len(bench.told)
    assert bench.told == expected[: len(bench.told)]
    # Whatever came before: with a store that answers again it closes within one longest pause and a lost probe.
    bench.clock.now += max(LAST_PAUSE_S, PROBE_S)
    number = bench.breaker.ask()
    assert number is not None
    bench.breaker.answered(number)
    assert bench.breaker.state is BreakerState.CLOSED


def test_share_one_among_threads() -> None:
    """Of many threads that ask when the pause is over, one may probe."""
    bench = Bench().opened()
    bench.clock.now = FIRST_PAUSE_S
    start = threading.Barrier(8)
    numbers: list[int | None] = []

    def ask() -> None:
        start.wait()
        numbers.append(bench.breaker.ask())

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(number is not None for number in numbers) == 1
