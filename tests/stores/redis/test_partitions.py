"""
A Cluster's partitions beside the memory store: one operation at a time has the same answer, wherever its parts are.

What may differ is when: operations that run at the same time, and what is found after a process died in the middle, are
in `test_dance`.
"""

from __future__ import annotations

import asyncio
import os
import random
import struct
from typing import Any

import pytest

from asgi_metering.rules import buckets, logs
from asgi_metering.rules.operations import Admit, Claim, End, Operation, Preview, Sweep, Undo
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import Counter, Hold
from asgi_metering.stores.contract import AccountsAfter, EverythingKept, LiveHolds
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.redis import ClusterPlace, ClusterStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer
from tests.stores.operations import comparable
from tests.stores.service import Service

STEPS = int(os.environ.get("METERING_CLUSTER_STEPS", "50"))
"""Operations of each seed. Whoever changes the dance runs 20,000 of some seeds once, with a longer ``--timeout``."""

SEEDS = range(int(os.environ.get("METERING_CLUSTER_SEEDS", "1")))
"""How many services, races and moves are tried. Whoever changes the dance, or where rows are, tries 4."""

COMPARED = 25
"""Operations from one comparison of whole states to the next."""


def made_fit(operation: Operation, known: set[str]) -> Operation | None:
    """*operation* as layers above ask it: keys scoped to payers, new ids, nothing charged to nobody; None if not so."""
    match operation:
        case Admit():
            if operation.id in known:
                return None
            known.add(operation.id)
            if not (operation.sources or operation.amount):
                known.add(f"free {operation.id}")
            return _scoped(operation)
        case End() if f"free {operation.id}" in known and operation.amount:
            return operation._replace(amount=0)
        case Preview(ask) | Undo(ask):
            return None if ask.id in known else operation._replace(ask=_scoped(ask))
        case Sweep() | Claim():
            return None
        case _:
            return operation


def _scoped(ask: Admit) -> Admit:
    charge, once = ask.charge_key, ask.idempotency
    if charge is not None and any(source.payer not in ("", ask.payer) for source in ask.sources):
        charge = None
    return ask._replace(
        charge_key=charge and charge._replace(key=rooted(f"{ask.unit}|{charge.key}", ask.payer)),
        idempotency=once and once._replace(key=rooted(once.key, ask.payer)),
    )


def state_of(state: Any, now: float) -> dict[str, Any]:
    """A state that does not tell in what order several partitions were asked, nor of windows that do not count now."""
    told = tables(state)
    # When to look again is only a bound.
    told["account"] = {key: row._replace(next_due_at=0.0) for key, row in told["account"].items()}
    told["event"] = sorted(told["event"])
    # What is past is forgotten by the next sweep, or by the one after it.
    keys = told["idempotency"].items()
    told["idempotency"] = {key: row for key, row in keys if row.receipt is None or row.expires_at > now}
    told["hold"] = {key: _in_order(hold) for key, hold in told["hold"].items()}
    told["counter"] = {key: _counting(row, now) for key, row in told["counter"].items() if _counts(row, now)}
    return told


def _counts(row: Counter, now: float) -> bool:
    """Whether it says anything now: a bucket that is full does not."""
    if row.extra.startswith(buckets.MARK):
        _, pace, _, *_ = struct.iter_unpack(">d", bytes.fromhex(row.extra[1:]))
        return row.start + row.used * pace[0] > now
    return bool(row.used) and row.end > now


def _counting(row: Counter, now: float) -> Counter:
    """
    A counter without what left a log, and what a bucket has seen, or was before.

    Both it has seen also of who was refused elsewhere, and then it forgets the one before the last.
    """
    if row.extra.startswith(buckets.MARK):
        return row._replace(extra="", previous=0)
    left = logs.inside(row, now - (row.end - row.start))
    return row._replace(extra=left, used=logs.count(left)) if row.extra else row


def _in_order(hold: Hold) -> Hold:
    """What a call took elsewhere comes in another order, and is not kept with a hold that has ended."""
    if hold.receipt is not None:
        return hold._replace(windows=(), pools=(), idempotency_key="")
    return hold._replace(windows=tuple(sorted(hold.windows)), pools=tuple(sorted(hold.pools)))


@pytest.mark.parametrize("seed", SEEDS)
def test_run_one_by_one_beside_memory(nodes: list[ValkeyServer], seed: int) -> None:
    """Each operation alone is answered, and leaves everything, as on a store that has all in one place."""

    async def run() -> None:
        clock = FakeClock()
        memory = MemoryStore(clock)
        place = ClusterPlace([(HOST, nodes[0].port)], {}, 5.0)
        # One store admits, and another one, which has to look where calls are, may end.
        stores = [ClusterStore(place, namespace=f"steps{seed}", partitions=5, clock=clock) for _ in range(2)]
        service, chance, known = Service(seed, clock, whole_steps=False), random.Random(seed), set[str]()
        time = clock()
        for step in range(STEPS):
            (operation, *_) = service.batch()
            clock.advance(max(0.0, time - clock()))
            if clock() > time:
                time = clock()
                for store in (memory, *stores[:1]):
                    await store.run([Sweep(10_000)])
            fit = made_fit(operation, known)
            if fit is None:
                continue
            store = chance.choice(stores)
            expected = comparable(await memory.run([fit]))
            assert comparable(await store.run([fit])) == expected, fit
            if step % COMPARED == 0:
                found = state_of((await store.read(EverythingKept())).state, time)
                wanted = state_of((await memory.read(EverythingKept())).state, time)
                for name in found:
                    assert found[name] == wanted[name], fit
                for query in (AccountsAfter("p", "a", 3), LiveHolds()):
                    one, other = await store.read(query), await memory.read(query)
                    assert state_of(one.state, time) == state_of(other.state, time)
        for store in stores:
            await store.close()

    asyncio.run(run())
