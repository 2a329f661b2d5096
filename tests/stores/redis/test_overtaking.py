"""
Batches that overtake one another, on a real server: two are on their way at once, and a lost one may arrive late.

What is done late is done as if it had been asked late: the state is the one that memory has after that order. Nothing
is charged twice, and nothing stays held.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.operations import (
    Admit,
    End,
    LimitAsk,
    Operation,
    PostGrant,
    Renew,
    Sweep,
    Undo,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.redis import RedisStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.valkey import ValkeyServer
from tests.stores.proofs import assert_conserved
from tests.stores.redis.proxy import Proxy

Maker = Callable[..., RedisStore]

GRANT = PostGrant("g", "p", "credits", 100)
LIMIT = LimitAsk("l", "l", WindowKind.FIXED, 100, 60.0, 1, "tokens")
CALL = Admit("a", "p", "credits", 10, 10, (WalletSource(),), (LIMIT,), ttl_s=5.0, grace_s=1.0)
SETTLED = End("a", 7, Basis.USAGE, event={"outcome": "completed"}, actual={"tokens": 4})
OTHER = End("a", 3, Basis.USAGE, event={"outcome": "error"}, actual={"tokens": 2})
RELEASED = End("a", None)


def overtaken(
    server: ValkeyServer, make_store: Maker, before: Sequence[Operation], late: Operation, others: Sequence[Operation]
) -> tuple[list[Any], State]:
    """
    Run *before*; then *late*, which is on its way while the connection is lost and arrives after *others*.

    The state has to be that of memory after *before*, *others* and *late*. Returns the answers of *others*, and the
    state when all that still lived has ended by its time.
    """
    clock = FakeClock()

    async def run() -> tuple[list[Any], State]:
        async with Proxy(server.port) as proxy:
            memory, redis = MemoryStore(clock), make_store(port=proxy.port, clock=clock)
            await redis.open()
            await redis.run(before)
            # What no script of the calls runs is written by one that looks whether anything has changed since.
            proxy.holds = b"EVALSHA" if isinstance(late, Undo) else b"FCALL"
            with pytest.raises(StoreUnavailableError):
                await redis.run([late])
            answers = await redis.run(others)
            await proxy.let_go()
            for operation in (*before, *others, late):
                await memory.run([operation])
            found, expected = [(await store.read(EverythingKept())).state for store in (redis, memory)]
            assert tables(found) == tables(expected)
            assert_conserved(found)
            clock.advance(10.0)
            await redis.run([Sweep(100)])
            found = (await redis.read(EverythingKept())).state
            assert_conserved(found)
            await redis.close()
        return answers, found

    return asyncio.run(run())


def charged(state: State) -> tuple[int, int, int]:
    """What the payer has been charged, what is held of it, and how many lines of its ledger are charges."""
    account = state.accounts["p", "credits"]
    lines = [entry for rows in state.entries.values() for entry in rows if entry.amount > 0 and entry.ref == "a"]
    return account.settled, account.held, len(lines)


@pytest.mark.parametrize(
    ("before", "late", "total"),
    [
        ([GRANT], CALL, (0, 0, 0)),
        ([GRANT, CALL], Renew("a", 2), (2, 0, 1)),
        ([GRANT, CALL], SETTLED, (7, 0, 1)),
        ([GRANT, CALL], RELEASED, (0, 0, 0)),
        ([GRANT, CALL], Undo(CALL, 0.0), (0, 0, 0)),
    ],
    ids=["admit", "renew", "settle", "release", "undo"],
)
def test_repeat_overtakes_what_was_lost(
    server: ValkeyServer, make_store: Maker, before: list[Operation], late: Operation, total: tuple[int, int, int]
) -> None:
    """Asked again under its id while the lost one is still on its way, an operation is done once."""
    _, state = overtaken(server, make_store, before, late, [late])
    assert charged(state) == total


def test_end_overtakes_its_admission(server: ValkeyServer, make_store: Maker) -> None:
    """The end finds nobody and says so; the hold that comes behind it ends by its time, and nothing is charged."""
    (receipt,), state = overtaken(server, make_store, [GRANT], CALL, [SETTLED])
    assert isinstance(receipt, Receipt)
    assert not receipt.known
    assert charged(state) == (0, 0, 0)


@pytest.mark.parametrize(("late", "others", "amount"), [(SETTLED, OTHER, 3), (OTHER, SETTLED, 7), (RELEASED, OTHER, 3)])
def test_end_overtakes_another_end(
    server: ValkeyServer, make_store: Maker, late: End, others: End, amount: int
) -> None:
    """The end that arrives first is charged, and the one behind it changes nothing."""
    (receipt,), state = overtaken(server, make_store, [GRANT, CALL], late, [others])
    assert isinstance(receipt, Receipt)
    assert receipt.applied
    assert charged(state) == (amount, 0, 1)


def test_undo_overtakes_its_admission(server: ValkeyServer, make_store: Maker) -> None:
    """What is taken back before it came is held until its time, as of a caller that died, and nothing is charged."""
    _, state = overtaken(server, make_store, [GRANT], CALL, [Undo(CALL, 0.0)])
    assert charged(state) == (0, 0, 0)


def test_admission_overtakes_an_undo(server: ValkeyServer, make_store: Maker) -> None:
    """Another call's admission before an undo that was lost finds its units held, and both are as if in that order."""
    rich = CALL._replace(id="b", amount=95, minimum=95)
    (decision,), state = overtaken(server, make_store, [GRANT, CALL], Undo(CALL, 0.0), [rich])
    assert isinstance(decision, Decision)
    assert not decision.admitted
    assert charged(state) == (0, 0, 0)


def test_batch_overtakes_the_one_before_it(make_store: Maker) -> None:
    """Of two batches that the pump has sent, the second arrives first: its end settles once it is asked for again."""

    async def run() -> None:
        store = make_store()
        await store.open()
        await store.run([GRANT])
        link, gate = store._link(), asyncio.Event()
        really, sent = link.exchange, []

        async def exchange(commands: Any) -> list[Any]:
            sent.append(commands)
            if len(sent) == 1:
                await gate.wait()
            return await really(commands)

        link.exchange = exchange  # type: ignore[method-assign]
        # Nothing goes past the lanes.
        store.start = lambda *_: False  # type: ignore[method-assign]
        pump = Pump(store)
        first = [asyncio.ensure_future(pump.submit(ask)) for ask in (CALL, CALL._replace(id="b"))]
        while not sent:
            await asyncio.sleep(0)
        early = await pump.submit(SETTLED)
        assert isinstance(early, Receipt)
        assert not early.known
        assert len(sent) == 2
        gate.set()
        assert all(decision.admitted for decision in await asyncio.gather(*first))  # type: ignore[union-attr]
        receipts = [await pump.submit(SETTLED) for _ in range(2)]
        assert [(receipt.amount, receipt.applied) for receipt in receipts] == [(7, True), (7, False)]  # type: ignore[union-attr]
        await pump.submit(RELEASED._replace(id="b"))
        await pump.close()
        state = (await store.read(EverythingKept())).state
        assert_conserved(state)
        assert charged(state) == (7, 0, 1)
        await store.close()

    asyncio.run(run())
