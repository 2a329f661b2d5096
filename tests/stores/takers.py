"""
Takers: what each of several processes, or threads, does to one store at the same time as the others.

A kind of traffic is a coroutine that waits for the common start, goes through a pump, and tells what it was answered.
Knows nothing of what the answers of all together must be: the tests do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Barrier
from typing import Any, TypeAlias

from asgi_metering.decisions import Decision
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.receipts import Basis, EndedBy, Posting, Receipt
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    Claim,
    End,
    Grow,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Refund,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.stores.contract import Store
from asgi_metering.stores.pump import Pump
from tests.stores.places import store_at

__all__ = ["CALLERS", "LEASED", "LONG_S", "PRICE", "REFUND", "Taker", "take", "take_at"]

CALLERS = 16
"""Tasks at once in each process."""

LONG_S = 1e6
"""A life that no test sees the end of."""

LEASED = 3
"""Slots of the pool that is raced for."""

PRICE = 10
"""Of a call that is charged before the race, or by a key in it."""

REFUND = 4
"""What each refund gives back of `PRICE`: two of them fit, a third does not."""

START_S = 60.0
"""Bound of the wait for the others."""

Tell: TypeAlias = Callable[..., object]


@dataclass(frozen=True)
class Taker:
    """
    One of those who race.

    Attributes:
        kind: Of traffic, one of this module's coroutines.
        name: Its own.
        tries: How often it tries.
        ahead_s: How far its store's clock is ahead; 0 leaves the store its own.
    """

    kind: str
    name: str
    tries: int
    ahead_s: float = 0.0


class Race:
    """One taker's way to the store."""

    def __init__(self, pump: Pump, taker: Taker, tell: Tell) -> None:
        self.pump = pump
        self.name = taker.name
        self.numbers = range(taker.tries)
        self.tell = tell

    async def ask(self, operation: Operation) -> Answer:
        """Run one operation."""
        return await self.pump.submit(operation)

    async def admit(self, call: str, payer: str = "payer", amount: int = 0, **more: Any) -> Decision:
        """Ask for a call that lives long."""
        sources = more.pop("sources", (WalletSource(),) if amount else ())
        lives = {"ttl_s": LONG_S, "grace_s": LONG_S, **more}
        decision = await self.ask(Admit(call, payer, "credits", amount, amount, sources, **lives))
        assert isinstance(decision, Decision)
        return decision

    async def end(self, call: str, amount: int | None, **more: Any) -> Receipt:
        """End a call."""
        receipt = await self.ask(End(call, amount, Basis.USAGE, **more))
        assert isinstance(receipt, Receipt)
        return receipt

    async def at_once(self, one: Callable[[int], Awaitable[object]]) -> None:
        """Run *one* for each try, all at once."""
        await asyncio.gather(*map(one, self.numbers))


# -- kinds of traffic --------------------------------------------------------------------------------------


async def last_units(race: Race) -> None:
    """Ask for single units of a wallet, an allowance that nobody used yet, a limit and a pool."""
    kinds: dict[str, dict[str, Any]] = {
        "wallet": {"amount": 1},
        "allowance": {
            "amount": 1,
            "payer": "newcomer",
            "sources": (AllowanceSource("free", 40, (0.0, 1.0, 1e11, 2e11)),),
        },
        "limit": {"payer": "newcomer", "limits": (LimitAsk("calls", "race", WindowKind.FIXED, 30, LONG_S),)},
        "log": {"payer": "newcomer", "limits": (LimitAsk("log", "log race", WindowKind.MOVING, 25, LONG_S),)},
        "bucket": {
            "payer": "newcomer",
            "limits": (LimitAsk("bucket", "bucket race", WindowKind.BUCKET, 35, LONG_S, refill=1),),
        },
        "pool": {"payer": "newcomer", "leases": (LeaseAsk("at once", "race", 20),)},
    }

    async def one(number: int) -> None:
        for kind, wanted in kinds.items():
            if (await race.admit(f"{race.name}.{kind}.{number}", **wanted)).admitted:
                race.tell(kind)

    await race.at_once(one)


async def newcomers(race: Race) -> None:
    """Be the first to touch accounts and calls: everybody posts the same grants and asks for the same calls."""

    async def one(number: int) -> None:
        payer = f"newcomer{number}"
        await race.ask(PostGrant(f"g{number}", payer, "credits", 3))
        same = await race.admit(f"same{number}", payer, 2)
        race.tell("same", same.admitted, same.held)
        if (await race.admit(f"{race.name}.{number}", payer, 1)).admitted:
            race.tell("own")

    await race.at_once(one)


async def growths(race: Race) -> None:
    """Hold one unit each, then ask for two more, all or nothing."""

    async def one(number: int) -> None:
        call = f"{race.name}.{number}"
        if (await race.admit(call, amount=1)).admitted:
            race.tell("held", 1)
            grown = await race.ask(Grow(call, 3, 3, (WalletSource(),)))
            assert isinstance(grown, Decision)
            if grown.admitted:
                race.tell("grown", 2)

    await race.at_once(one)


async def charge_keys(race: Race) -> None:
    """Bring the same charge keys as the others, and succeed."""

    async def one(number: int) -> None:
        call = f"{race.name}.{number}"
        decision = await race.admit(call, amount=PRICE, charge_key=KeyAsk(f"k{number}", window_s=LONG_S))
        race.tell("joined" if decision.joined else "first", number)
        receipt = await race.end(call, PRICE)
        race.tell("charged", number, receipt.amount)

    await race.at_once(one)


async def idempotency_keys(race: Race) -> None:
    """Bring the same idempotency keys as the others, and be charged where one is the first."""

    async def one(number: int) -> None:
        call = f"{race.name}.{number}"
        decision = await race.admit(call, amount=PRICE, idempotency=IdempotencyAsk(f"i{number}", "same", LONG_S))
        if decision.admitted:
            race.tell("runs", number)
            await race.end(call, PRICE)
        elif decision.replay is not None:
            race.tell("replayed", number, decision.replay.amount)
        else:
            assert decision.refusal is not None
            race.tell(decision.refusal.reason.value, number)

    await race.at_once(one)


async def ends(race: Race) -> None:
    """End the same overdue calls as the others: by settling, by releasing, by sweeping, and as a person."""

    async def one(number: int) -> None:
        call = f"call{number}"
        if race.name == "taker0":
            receipt = await race.end(call, 3, event={"outcome": "completed"})
        elif race.name == "taker1":
            receipt = await race.end(call, None)
        elif race.name == "taker2":
            await race.ask(Sweep(limit=3))
            return
        else:
            receipt = await race.end(call, 1, by=EndedBy.PERSON)
        race.tell(call, receipt.applied, receipt.amount, receipt.ended_by)

    await race.at_once(one)


async def sweeps(race: Race) -> None:
    """End what is overdue, a few at a time, at the same time as the others."""
    for _ in race.numbers:
        await race.ask(Sweep(limit=7))


async def leases(race: Race) -> None:
    """Take a slot of a small pool and give it back, again and again; tell from when to when it was had."""

    async def one(number: int) -> None:
        for turn in race.numbers:
            call = f"{race.name}.{number}.{turn}"
            decision = await race.admit(call, leases=(LeaseAsk("at once", "race", LEASED),))
            if decision.admitted:
                receipt = await race.end(call, None)
                race.tell(decision.now, receipt.at)

    await asyncio.gather(*map(one, range(LEASED)))


async def refunds(race: Race) -> None:
    """Give back parts of the same charges as the others, under ids of their own and under one that all share."""

    async def one(number: int) -> None:
        for posting in (race.name, "shared"):
            try:
                posted = await race.ask(Refund(posting, f"call{number}", "payer", "credits", REFUND))
            except (AmountError, ConfigurationError):
                continue
            assert isinstance(posted, Posting)
            race.tell(f"call{number}", posting, posted.applied)

    await race.at_once(one)


async def claims(race: Race) -> None:
    """Take events from the outbox until there are none."""
    while events := await race.ask(Claim(5, LONG_S)):
        assert isinstance(events, tuple)
        for event in events:
            race.tell(event.id)


async def work(race: Race) -> None:
    """Admit and end calls of one payer; tell of each only when it was answered."""

    async def caller(number: int) -> None:
        for turn in race.numbers:
            call = f"{race.name}.{number}.{turn}"
            assert (await race.admit(call, amount=3, line="work")).admitted
            race.tell("admitted", call)
            receipt = await race.end(call, turn % 5, event={"outcome": "completed"})
            race.tell("ended", call, receipt.amount)

    await asyncio.gather(*map(caller, range(CALLERS)))


KINDS: dict[str, Callable[[Race], Awaitable[None]]] = {
    kind.__name__: kind
    for kind in (
        last_units,
        newcomers,
        growths,
        charge_keys,
        idempotency_keys,
        ends,
        sweeps,
        leases,
        refunds,
        claims,
        work,
    )
}


# -- who runs them -----------------------------------------------------------------------------------------


async def take(store: Store, taker: Taker, go: Barrier, tell: Tell) -> None:
    """Be one of those who race on *store*, which is open: wait for the others at *go*, then begin."""
    pump = Pump(store)
    await asyncio.to_thread(go.wait, START_S)
    await KINDS[taker.kind](Race(pump, taker, tell))
    await pump.close()


def take_at(url: str, taker: Taker, go: Barrier, told: Connection, is_streaming: bool) -> None:
    """
    Be a process of its own that races on a store of its own at *url*.

    What it tells comes in lists: each as soon as it is told where it *is_streaming*, all at the end otherwise.
    """

    async def run() -> None:
        said: list[tuple[object, ...]] = []
        ahead = (lambda: time.time() + taker.ahead_s) if taker.ahead_s else None
        store = store_at(url, ahead, migrate=True)
        await store.open()
        await take(
            store,
            taker,
            go,
            (lambda *words: told.send([words])) if is_streaming else (lambda *words: said.append(words)),
        )
        await store.close()
        told.send(said)

    asyncio.run(run())
