"""
The same answers as the `limits` package: long random traces against its three async strategies, hit for hit.

Its `MemoryStorage` is asked at the same instants; several keys, several limits, a clock that jumps. Equal are whether a
hit passes, what remains, and when it resets, to two millionths of a second (`RESOLUTION_S`).

Three differences are known. Its fixed window spends on a refusal. Its moving window does not tell of a call that is
exactly as old as the window, which it still counts when it decides. And at the very instant at which a sliding window
loses one, it says that this resets now, and we say when the next one will be lost.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from math import isclose
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import (
    FixedWindowRateLimiter,
    MovingWindowRateLimiter,
    RateLimiter,
    SlidingWindowCounterRateLimiter,
)

from asgi_metering.decisions import WindowState
from asgi_metering.rules.operations import LimitAsk, WindowKind
from tests.rules.world import World

HITS = 1_500
"""Of one trace, over all keys."""

RESOLUTION_S = 2e-6
"""A tick of our sliding window, and the rounding of epoch seconds."""

KEYS = ("ann", "bob", "cyd")
LIMITS = ((1, 1), (2, 16), (4, 2), (8, 64), (64, 256))
"""(amount, seconds): powers of two, as all steps of the clock are, so that no answer hangs on a rounding."""

STRATEGIES: dict[WindowKind, Callable[[MemoryStorage], RateLimiter]] = {
    WindowKind.FIXED: FixedWindowRateLimiter,
    WindowKind.SLIDING: SlidingWindowCounterRateLimiter,
    WindowKind.MOVING: MovingWindowRateLimiter,
}


class Hit(NamedTuple):
    """One call of a trace."""

    at: float
    key: str
    amount: int
    window: int
    cost: int


class Told(NamedTuple):
    """What was answered to it."""

    admitted: bool
    remaining: int
    reset_at: float


def trace(seed: int, costs: tuple[int, ...]) -> Iterator[Hit]:
    """Bursts, pauses, and jumps over many windows."""
    chance, now = random.Random(seed), 1_700_000_000.0
    pace = 16
    for _ in range(HITS):
        if chance.random() < 0.02:
            pace = chance.choice((0, 1, 16, 160))
        now += chance.randrange(pace + 1) / 16 if chance.random() < 0.99 else float(chance.randrange(600))
        yield Hit(now, chance.choice(KEYS), *chance.choice(LIMITS), chance.choice(costs))


Asked = Callable[[Hit], Awaitable[Told]]


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Callable[[WindowKind], Asked]:
    """A limiter of the package, at the time of each hit."""
    clock = SimpleNamespace(time=lambda: 0.0)
    monkeypatch.setattr("limits.aio.storage.memory.time", clock)
    monkeypatch.setattr("limits.aio.strategies.time", clock)

    def make(kind: WindowKind) -> Asked:
        limiter: RateLimiter = STRATEGIES[kind](MemoryStorage())

        async def ask(hit: Hit) -> Told:
            clock.time = lambda: hit.at
            item: RateLimitItem = RateLimitItemPerSecond(hit.amount, hit.window)
            admitted = await limiter.hit(item, hit.key, cost=hit.cost)
            stats = await limiter.get_window_stats(item, hit.key)
            return Told(admitted, stats.remaining, stats.reset_time)

        return ask

    return make


def ours(world: World, kind: WindowKind, hit: Hit) -> Told:
    """The rules' answer."""
    world.now = hit.at
    name = f"{hit.amount}/{hit.window}"
    ask = LimitAsk(name, f"{hit.key}|{name}", kind, hit.amount, float(hit.window), hit.cost)
    decision = world.admit(limits=(ask,))
    window: WindowState = decision.windows[0]
    return Told(decision.admitted, window.remaining, hit.at + window.reset_after_s)


@pytest.mark.uncounted
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", STRATEGIES)
def test_answer_as_limits_does_at_cost_1(kind: WindowKind, seed: int, theirs: Callable[[WindowKind], Asked]) -> None:
    """Over a long trace every hit passes or not, leaves as much, and resets when, as with the package."""
    world, limiter = World(), theirs(kind)
    passed: dict[tuple[str, int], list[float]] = {}

    async def run() -> None:
        for number, hit in enumerate(trace(seed, (1,))):
            told, expected = ours(world, kind, hit), await limiter(hit)
            before = passed.setdefault((hit.key, hit.amount), [])
            if told.admitted:
                before.append(hit.at)
            if kind is WindowKind.MOVING and hit.at - hit.window in before:
                assert told.admitted == expected.admitted
                continue
            assert told[:2] == expected[:2], (number, hit)
            if kind is WindowKind.SLIDING and _is_at_a_step(world, hit):
                continue
            assert told.reset_at == pytest.approx(expected.reset_at, abs=RESOLUTION_S), (number, hit)

    asyncio.run(run())
    counts = [len(times) for times in passed.values()]
    assert sum(counts) > HITS / 10
    assert sum(counts) < HITS


def _is_at_a_step(world: World, hit: Hit) -> bool:
    """Whether a window begins at this very instant, or the past weighs a whole number: it loses one now, or later."""
    if hit.at % hit.window == 0:
        return True
    row = world.state.counters.get(f"{hit.key}|{hit.amount}/{hit.window}")
    weight = 0.0 if row is None else row.previous * (row.end - hit.at) / hit.window
    return isclose(weight, round(weight), abs_tol=1e-6) and weight > 0


@pytest.mark.uncounted
@pytest.mark.parametrize("kind", STRATEGIES)
def test_answer_as_limits_does_above_cost_1(kind: WindowKind, theirs: Callable[[WindowKind], Asked]) -> None:
    """At any cost the two agree for as long as nothing was refused; windows that spend on no refusal, for ever."""
    world, limiter = World(), theirs(kind)
    refused: set[tuple[str, int]] = set()
    compared = 0

    async def run() -> None:
        nonlocal compared
        for number, hit in enumerate(trace(7, (1, 1, 2, 3, 5))):
            told, expected = ours(world, kind, hit), await limiter(hit)
            if (hit.key, hit.amount) in refused:
                continue
            assert told.admitted == expected.admitted, (number, hit)
            compared += 1
            if not told.admitted and kind is WindowKind.FIXED:
                refused.add((hit.key, hit.amount))

    asyncio.run(run())
    assert compared == HITS if kind is not WindowKind.FIXED else compared >= len(KEYS) * len(LIMITS)


def test_spend_nothing_on_a_refusal(theirs: Callable[[WindowKind], Asked]) -> None:
    """A refused hit of 3 leaves a fixed window of the package without the 2 that it had; ours still has them."""
    world, limiter = World(), theirs(WindowKind.FIXED)
    hits = [Hit(1_000.0, "ann", 5, 60, cost) for cost in (3, 3, 2)]

    async def run() -> list[Told]:
        return [await limiter(hit) for hit in hits]

    assert [told[:2] for told in asyncio.run(run())] == [(True, 2), (False, 0), (False, 0)]
    assert [ours(world, WindowKind.FIXED, hit)[:2] for hit in hits] == [(True, 2), (False, 2), (True, 0)]
