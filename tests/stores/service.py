"""
Operations that a service makes: calls begin, live and end, meet each other at limits and keys, and time passes.

What a store does all day is what is compared most. Every choice comes from one seed.
"""

from __future__ import annotations

import random
from typing import Any

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Backfill,
    Claim,
    Correct,
    Emit,
    End,
    Grow,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Preview,
    Refund,
    Renew,
    ReverseGrant,
    Share,
    Sweep,
    Undo,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.readings import PARTS
from asgi_metering.rules.state import NEVER, SharedReading
from asgi_metering.testing.clock import FakeClock

__all__ = ["Service"]

KINDS = {
    "admit": 50.0,
    "end": 38.0,
    "renew": 8.0,
    "grant": 4.0,
    "grow": 2.0,
    "preview": 1.0,
    "sweep": 1.0,
    "outbox": 3.0,
    "refund": 1.0,
    "post": 1.0,
    "undo": 0.5,
    "reverse": 0.3,
    "share": 1.0,
}
"""Of every hundred operations or so, how many."""

BATCHES = (1, 2, 4, 8, 16, 32)
"""Operations that wait together."""

DAY_S = 100.0

UNITS = ("credits", "credits", "usd")


class Service:
    """
    Makes operations that a service could make.

    Args:
        seed: Where all choices come from.
        clock: The time, which moves between batches, and seldom back.
        whole_steps: Let time meet the very instants at which things begin and end; otherwise it has all its digits.
    """

    def __init__(self, seed: int, clock: FakeClock, *, whole_steps: bool) -> None:
        self._chance = random.Random(seed)
        self._clock = clock
        self._steps_s = (0.125,) if whole_steps else ()
        self._calls: list[str] = []
        self._grants = 0
        self._number = 0

    def batch(self) -> list[Operation]:
        """What is asked for next, at once, after some time."""
        chance = self._chance
        step = chance.choice((0.0, 0.0, 0.5, 1.0, 3.0, *self._steps_s))
        self._clock.advance(step or (0.0 if self._steps_s else chance.random()))
        if chance.random() < 0.01:
            self._clock.advance(chance.choice((30.0, 70.0, -3.0, -20.0)))
        return [self._one() for _ in range(chance.choice(BATCHES))]

    def _one(self) -> Operation:
        (kind,) = self._chance.choices(list(KINDS), list(KINDS.values()))
        self._number += 1
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
        return self._chance.choice(choices)

    def _limits(self) -> tuple[LimitAsk, ...]:
        chance = self._chance
        usual = (
            LimitAsk("calls", "k1", WindowKind.FIXED, 4, 20.0),
            LimitAsk("daily", "k2", WindowKind.CALENDAR, 40, DAY_S, boundaries=self._days()),
            LimitAsk("smooth", "k%3", WindowKind.SLIDING, 9, 16.0, 2),
            LimitAsk("tokens", "k4", WindowKind.FIXED, 200, 50.0, 15, "tokens"),
            LimitAsk("smooth tokens", "k5", WindowKind.SLIDING, 300, 32.5, 15, "tokens"),
            LimitAsk("daily tokens", "k6", WindowKind.CALENDAR, 400, DAY_S, 10, "to kens", self._days()),
            LimitAsk("log", "k8", WindowKind.MOVING, 5, 17.5),
            LimitAsk("bucket", "k%9", WindowKind.BUCKET, 6, 7.0, 2, refill=3),
            LimitAsk("tokens in a bucket", "k10", WindowKind.BUCKET, 150, 3.3, 15, "tokens", refill=17),
        )
        if chance.random() < 0.1:
            usual = tuple(limit._replace(cost=0) for limit in usual)
        never = LimitAsk("never", "k7", WindowKind.FIXED, 1, 20.0, 2)
        asked = tuple(chance.sample(usual, chance.choice((0, 1, 2, 3))))
        return (*asked, never) if chance.random() < 0.02 else asked

    def _asked(self) -> Admit:
        chance = self._chance
        amount = chance.choice((0, 1, 5, 9, 14, 40))
        minimum = chance.choice((amount, amount, amount // 2, 0))
        charge_key, once = None, None
        if chance.random() < 0.2:
            charge_key = chance.choice((KeyAsk("ses%sion", window_s=30.0), KeyAsk("day", self._days())))
            minimum = amount
        if chance.random() < 0.15:
            once = IdempotencyAsk(chance.choice(("one", "two")), chance.choice(("f", "f", "g")), 25.0)
        one, two = LeaseAsk("a", "one%", 4), LeaseAsk("b", "two", 6)
        return Admit(
            self._a_call() if chance.random() < 0.03 else f"c{self._number}%é",
            self._payer(),
            chance.choice(UNITS),
            amount,
            minimum,
            self._sources(),
            self._limits(),
            chance.choice(((), (), (one,), (one, two))),
            chance.choice((5.0, 20.0, 60.0)),
            chance.choice((0.0, 10.0)),
            chance.choice((Basis.OBSERVED, Basis.HOLD, Basis.NONE)),
            chance.choice(("", 'ch"at\n')),
            chance.choice(({}, {"caller": "k", "attributes": {"n": [1, None, "é"], "at": 1.5}})),
            charge_key,
            once,
        )

    def _admit(self) -> Admit:
        asked = self._asked()
        self._calls.append(asked.id)
        return asked

    def _preview(self) -> Preview:
        return Preview(self._asked())

    def _undo(self) -> Undo:
        return Undo(self._asked(), self._clock() - self._chance.choice((0.0, 1.0, 30.0)))

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

    def _grow(self) -> Grow:
        return Grow(self._a_call(), self._chance.choice((20, 50)), 10, (WalletSource(),))

    def _grant(self) -> PostGrant:
        chance, now = self._chance, self._clock()
        self._grants += 1
        return PostGrant(
            f"g{self._grants}",
            self._payer(),
            chance.choice(UNITS),
            chance.choice((20, 90, 300)),
            chance.choice((0, 1, -1)),
            chance.choice((None, None, now + 9.0)),
            chance.choice((NEVER, now + 31.0, now + 90.0)),
        )

    def _post(self) -> Operation:
        chance, posting = self._chance, f"p{self._number}"
        payer, unit, amount = self._payer(), chance.choice(UNITS), chance.choice((3, 12))
        return chance.choice(
            (
                Correct(posting, payer, unit, chance.choice((amount, -amount)), "chat", "ann", {"n": 3}),
                Backfill(posting, payer, unit, amount, "chat", "ann"),
            )
        )

    def _refund(self) -> Refund:
        return Refund(f"x{self._number}", self._a_call(), self._payer(), "credits")

    def _reverse(self) -> ReverseGrant:
        grant = f"g{self._chance.randint(1, max(1, self._grants))}"
        return ReverseGrant(f"b{self._number}", grant, self._payer(), "credits")

    def _outbox(self) -> Operation:
        chance = self._chance
        told = tuple(chance.sample(self._calls[-12:], min(len(self._calls), 3)))
        return chance.choice(
            (Claim(chance.choice((2, 20)), 10.0), Acknowledge(told), Emit(((f"e{self._number}", {}),)))
        )

    def _share(self) -> Share:
        chance, now = self._chance, self._clock()
        series, told = chance.choice(("openai", "openai/batch", "xai")), f'{{"n":{self._number}}}'
        parts = chance.choice((PARTS, PARTS[:1]))
        return Share(tuple(SharedReading(series, part, now - chance.choice((0.0, 1.0, 9.0)), told) for part in parts))

    def _sweep(self) -> Sweep:
        chance = self._chance
        return Sweep(500, chance.choice((200.0, 1e6)), chance.choice((150.0, 1e6)), chance.choice((100.0, 1e6)))
