"""
Long random traffic on the Redis store and beside it on the memory store: answers at every step, whole states often.

Hypothesis finds odd sequences; here calls live, end, and meet each other as in service, for many thousand steps, so
that what the scripts do all day is what is compared most.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    End,
    Grow,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Refund,
    Renew,
    ReverseGrant,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.state import NEVER
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.redis import RedisStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.stores.operations import comparable

STEPS = int(os.environ.get("METERING_STEPS", "20000"))
"""Operations, of all seeds together. Whoever changes a script runs 100,000 once."""

SEEDS = 4

COMPARED = 40
"""Batches from one comparison of whole states to the next; answers are compared for each operation."""

DAY_S = 100.0


class Traffic:
    """
    Makes operations that a service could make.

    Args:
        chance: Where all choices come from.
        clock: The time.
    """

    def __init__(self, chance: random.Random, clock: FakeClock) -> None:
        self._chance = chance
        self._clock = clock
        self._calls: list[str] = []
        self._grants = 0
        self._number = 0

    def batch(self) -> list[Operation]:
        """The operations of one step."""
        return [self._one() for _ in range(self._chance.choice((1, 1, 2, 3, 5)))]

    def _one(self) -> Operation:
        kind = self._chance.choices(
            ("admit", "end", "renew", "grant", "sweep", "grow", "refund", "reverse"), (50, 38, 8, 4, 1, 2, 1, 0.3)
        )[0]
        made: Operation = getattr(self, f"_{kind}")()
        return made

    def _days(self) -> tuple[float, ...]:
        start = self._clock() // DAY_S * DAY_S
        return (start - DAY_S, start, start + DAY_S, start + 2 * DAY_S)

    def _payer(self) -> str:
        return self._chance.choice(("p", "q", "r ü%\x01", "s"))

    def _a_call(self) -> str:
        # Mostly those that began lately; sometimes one that ended long ago, or that nobody knows.
        recent = self._calls[-12:] if self._chance.random() < 0.93 else self._calls[-80:]
        return self._chance.choice(recent or ["nobody"])

    def _sources(self) -> tuple[Any, ...]:
        pick = self._chance.choice
        free = AllowanceSource("free", 60, self._days())
        rolls = AllowanceSource("ro%lls", 45, window_s=1.3 * DAY_S)
        theirs = {"payer": "q", "group": "platform"}
        choices: tuple[tuple[Any, ...], ...] = (
            (WalletSource(),),
            (WalletSource(),),
            (WalletSource(30),),
            (free, WalletSource()),
            (rolls, free, WalletSource(5)),
            (WalletSource(), rolls),
            (free._replace(split=True), rolls._replace(split=True), WalletSource(9, split=True)),
            (WalletSource(split=True), free._replace(split=True), WalletSource(split=True)),
            (
                free._replace(**theirs),
                WalletSource(**theirs),
                WalletSource(20, group="user"),
                rolls._replace(group="user"),
            ),
            (WalletSource(0, "q", "a"), WalletSource(0, "s", "b"), WalletSource(40)),
            (free._replace(boundaries=(0.0, 1.0, 2.0, 3.0)), WalletSource()),
            (),
        )
        return pick(choices)

    def _limits(self) -> tuple[LimitAsk, ...]:
        chance = self._chance
        all_limits = (
            LimitAsk("calls", "k1", WindowKind.FIXED, 4, 20.0),
            LimitAsk("daily", "k2", WindowKind.CALENDAR, 40, DAY_S, boundaries=self._days()),
            LimitAsk("smooth", "k%3", WindowKind.SLIDING, 9, 16.0, 2),
            LimitAsk("tokens", "k4", WindowKind.FIXED, 200, 50.0, 15, "tokens"),
            LimitAsk("smooth tokens", "k5", WindowKind.SLIDING, 300, 32.5, 15, "tokens"),
            LimitAsk("daily tokens", "k6", WindowKind.CALENDAR, 400, DAY_S, 10, "to kens", self._days()),
            LimitAsk("never", "k7", WindowKind.FIXED, 1, 20.0, 2),
        )
        return tuple(chance.sample(all_limits[:6], chance.choice((0, 1, 2, 3)))) + all_limits[6:] * (
            chance.random() < 0.02
        )

    def _admit(self) -> Admit:
        chance = self._chance
        self._number += 1
        call_id = self._a_call() if chance.random() < 0.03 else f"c{self._number}%é"
        self._calls.append(call_id)
        amount = chance.choice((0, 1, 5, 9, 14, 40))
        charge_key, once = None, None
        minimum = chance.choice((amount, amount, amount // 2, 0))
        if chance.random() < 0.2:
            charge_key = chance.choice((KeyAsk("ses%sion", window_s=30.0), KeyAsk("day", self._days())))
            minimum = amount
        if chance.random() < 0.15:
            once = IdempotencyAsk(chance.choice(("one", "two")), chance.choice(("f", "f", "g")), 25.0)
        leases = chance.choice(
            ((), (), (LeaseAsk("a", "one%", 4),), (LeaseAsk("a", "one%", 4), LeaseAsk("b", "two", 6)))
        )
        return Admit(
            call_id,
            self._payer(),
            chance.choice(("credits", "credits", "usd")),
            amount,
            minimum,
            self._sources(),
            self._limits(),
            leases,
            chance.choice((5.0, 20.0, 60.0)),
            chance.choice((0.0, 10.0)),
            chance.choice((Basis.OBSERVED, Basis.HOLD, Basis.NONE)),
            chance.choice(("", 'ch"at\n')),
            chance.choice(({}, {"caller": "k", "attributes": {"n": [1, None, "é"], "at": 1.5}})),
            charge_key,
            once,
        )

    def _end(self) -> End:
        chance = self._chance
        return End(
            self._a_call(),
            chance.choice((None, 0, 1, 5, 9, 14, 60)),
            chance.choice((Basis.USAGE, Basis.ESTIMATE)),
            chance.random() < 0.3,
            chance.choice((EndedBy.CALL, EndedBy.CALL, EndedBy.CALL, EndedBy.PERSON)),
            chance.choice(({}, {"tokens": 4}, {"tokens": 90, "to kens": 0})),
            chance.choice((None, {"outcome": "completed"}, {"caller": "other", "id": "mine"})),
            chance.random() < 0.3,
            chance.choice((None, {"status": 200, "body": "é\t\n"})),
        )

    def _renew(self) -> Renew:
        return Renew(self._a_call(), self._chance.randint(0, 30))

    def _grant(self) -> PostGrant:
        chance, now = self._chance, self._clock()
        self._grants += 1
        return PostGrant(
            f"g{self._grants}",
            self._payer(),
            chance.choice(("credits", "credits", "usd")),
            chance.choice((20, 90, 300)),
            chance.choice((0, 1, -1)),
            chance.choice((None, None, now + 9.0)),
            chance.choice((NEVER, now + 31.0, now + 90.0)),
        )

    def _sweep(self) -> Sweep:
        chance = self._chance
        return Sweep(500, chance.choice((200.0, 1e6)), chance.choice((150.0, 1e6)), chance.choice((100.0, 1e6)))

    def _grow(self) -> Grow:
        return Grow(self._a_call(), self._chance.choice((20, 50)), 10, (WalletSource(),))

    def _refund(self) -> Refund:
        return Refund(f"x{self._number}", self._a_call(), self._payer(), "credits")

    def _reverse(self) -> ReverseGrant:
        grant = f"g{self._chance.randint(1, max(1, self._grants))}"
        return ReverseGrant(f"b{self._number}", grant, self._payer(), "credits")


@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("seed", range(SEEDS))
def test_traffic_beside_memory(make_store: Callable[..., RedisStore], seed: int) -> None:
    """Thousands of steps of traffic are answered and kept as in memory, with a clock that also steps back."""
    clock = FakeClock()
    chance = random.Random(f"{seed} {os.environ.get('METERING_SEED', '')}")
    traffic = Traffic(chance, clock)
    memory, redis = MemoryStore(clock), make_store(clock=clock)
    # Whole steps meet the very instants at which things begin and end; others have all their digits.
    steps = (0.125,) if seed % 2 else ()

    async def compare(batch: int) -> None:
        found = tables((await redis.read(EverythingKept())).state)
        assert found == tables((await memory.read(EverythingKept())).state), batch

    async def run() -> tuple[int, int]:
        driven = batches = 0
        while driven < STEPS // SEEDS:
            clock.advance(chance.choice((0.0, 0.0, 0.5, 1.0, 3.0, *steps)) or (chance.random() if steps else 0.0))
            if chance.random() < 0.01:
                clock.advance(chance.choice((30.0, 70.0, -3.0, -20.0)))
            some = traffic.batch()
            expected = comparable(await memory.run(some))
            assert comparable(await redis.run(some)) == expected, (batches, some)
            driven += len(some)
            batches += 1
            if batches % COMPARED == 0:
                await compare(batches)
        await compare(batches)
        await redis.close()
        return driven, batches

    driven, batches = asyncio.run(run())
    print(f"{driven} operations in {batches} batches, {batches // COMPARED + 1} whole states compared")
