"""Calls that share a script: what stops a script early, and how what follows still comes in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, Reason
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.operations import (
    Admit,
    Claim,
    End,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Renew,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.redis import RedisStore
from asgi_metering.stores.redis.batch import Batch
from asgi_metering.stores.redis.calls import Calls
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.packing import Packing
from asgi_metering.stores.redis.parts import Part, What, part_of, reservation
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.testing.clock import NOON, FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.valkey import ValkeyServer
from tests.stores.operations import comparable
from tests.stores.proofs import assert_conserved
from tests.stores.redis.proxy import Proxy

Maker = Callable[..., RedisStore]


def call(call_id: str, amount: int = 10, **more: Any) -> Admit:
    """A call of the payer, that lives 5 seconds."""
    return Admit(call_id, "p", "credits", amount, amount, (WalletSource(),), ttl_s=5.0, **more)


def beside_memory(server: ValkeyServer, make_store: Maker, *steps: Sequence[Operation]) -> tuple[list[Any], int]:
    """
    Run *steps*, 3 seconds apart, on both stores, and compare answers and whole states.

    Returns the answers to the last one, and how many turns it took.
    """
    clock = FakeClock()

    async def run() -> tuple[list[Any], int]:
        async with Proxy(server.port) as proxy:
            memory, redis = MemoryStore(clock), make_store(port=proxy.port, clock=clock)
            await redis.open()
            answers, turns = [], 0
            for step in steps:
                clock.advance(3.0)
                before = proxy.turns
                answers = await redis.run(step)
                turns = proxy.turns - before
                assert comparable(answers) == comparable(await memory.run(step))
            found, expected = [(await store.read(EverythingKept())).state for store in (redis, memory)]
            assert tables(found) == tables(expected)
            await redis.close()
        return answers, turns

    return asyncio.run(run())


def test_call_that_cannot_be_decided_behind_others(server: ValkeyServer, make_store: Maker) -> None:
    """A call whose account may have overdue holds, behind an end that changes which, begins a script of its own."""
    answers, turns = beside_memory(
        server,
        make_store,
        [PostGrant("g", "p", "credits", 100), call("a"), call("other", 0)],
        [Renew("a"), Renew("other")],
        [End("a", 3, Basis.USAGE), call("b"), End("b", 4, Basis.USAGE)],
    )
    assert [type(answer) for answer in answers] == [Receipt, Decision, Receipt]
    assert turns == 2


def test_end_that_fails_when_it_has_begun(make_store: Maker) -> None:
    """An end that is beyond what is counted exactly is refused alone: those that shared its script are done, once."""

    async def run() -> None:
        store, most = make_store(), MAX_AMOUNT
        await store.run([PostGrant("g", "p", "credits", most), call("a", most - 10), End("a", most - 10, Basis.USAGE)])
        await store.run([call("b", 5)])
        answers = await store.run(
            [Renew("b", 1), call("c", 1), End("b", most, Basis.USAGE), End("c", 1, Basis.USAGE, event={})]
        )
        assert [type(answer) for answer in answers] == [bool, Decision, AmountError, Receipt]
        state = (await store.read(EverythingKept())).state
        assert_conserved(state)
        account = state.accounts["p", "credits"]
        assert (account.settled, account.held, len(state.events)) == (most - 9, 5, 1)
        await store.close()

    asyncio.run(run())


def test_slots_are_counted_within_a_batch(server: ValkeyServer, make_store: Maker) -> None:
    """A slot that a call of the same script has taken is taken, and one that its end gave back is free."""
    slot = (LeaseAsk("a", "pool", 2),)
    answers, turns = beside_memory(
        server,
        make_store,
        [PostGrant("g", "p", "credits", 100), call("a", leases=slot)],
        [
            *(call(name, 1, leases=slot) for name in ("b", "c")),
            End("a", 1, Basis.USAGE),
            Renew("b"),
            *(call(name, 1, leases=slot) for name in ("d", "e")),
        ],
    )
    admitted = [answer.refusal is None for answer in answers if isinstance(answer, Decision)]
    assert admitted == [True, False, True, False]
    assert answers[1].refusal.reason is Reason.CONCURRENCY
    assert turns == 1


def test_first_of_a_batch_that_falls_due(server: ValkeyServer, make_store: Maker) -> None:
    """Of an account's calls that one script admits, a sweep finds the one with the shortest life, wherever it is."""
    lives = [("long", 600.0), ("short", 1.0), ("middle", 300.0)]
    answers, _ = beside_memory(
        server,
        make_store,
        [PostGrant("g", "p", "credits", 100)],
        [call(call_id)._replace(ttl_s=ttl_s) for call_id, ttl_s in lives],
        [Sweep(10)],
    )
    assert answers[0] > 0


def test_more_than_one_command_takes(server: ValkeyServer, make_store: Maker) -> None:
    """Calls that share a script and have very many buckets take all that they take, their slots too, in one turn."""
    buckets = tuple(LimitAsk(f"l{n}", f"l{n}", WindowKind.BUCKET, 1_000, 60.0, refill=1_000) for n in range(43))
    slot = (LeaseAsk("a", "pool", 94),)
    answers, turns = beside_memory(
        server,
        make_store,
        [PostGrant("g", "p", "credits", 1_000)],
        [call(f"c{number}", limits=buckets, leases=slot) for number in range(96)],
    )
    assert [answer.refusal is None for answer in answers] == 94 * [True] + 2 * [False]
    assert turns == 1


def test_rows_that_one_command_does_not_take(server: ValkeyServer, make_store: Maker) -> None:
    """Calls that share a script and write more rows than one command takes write them all, in one turn."""
    _, turns = beside_memory(
        server,
        make_store,
        [PostGrant("g", "p", "credits", 1_000)],
        [
            call(f"c{at}", limits=tuple(LimitAsk(f"l{n}", f"l{n} {at}", WindowKind.FIXED, 9, 60.0) for n in range(43)))
            for at in range(96)
        ],
    )
    assert turns == 1


def test_small_script_behind_a_large_one(server: ValkeyServer, make_store: Maker) -> None:
    """Nothing of a script's rows, lines, holds, ends and events is found by a smaller one that follows it."""
    names = [f"c{number}" for number in range(30)]
    admissions = [call(name, 3)._replace(payer=f"p{at % 20}") for at, name in enumerate(names)]
    ends = [End(name, at % 4, Basis.USAGE, event={"at": at}) for at, name in enumerate(names)]
    beside_memory(
        server,
        make_store,
        [PostGrant("g", f"p{number}", "credits", 100) for number in range(20)],
        admissions,
        ends[:25],
        [Claim(30, 600.0)],
        [call("one", 2)._replace(payer="p1"), ends[25]],
        [End("one", 1, Basis.USAGE, event={})],
        [Renew(names[26]), ends[26], ends[0]],
    )


def test_part_is_taken_back_by_the_script_that_took_it(make_store: Maker) -> None:
    """Windows that a reservation began are gone with it, and what its neighbours wrote before and after it is not."""
    kinds = [LimitAsk(name, name, WindowKind.FIXED, 9, 60.0) for name in ("first", "second", "third")]

    async def run() -> None:
        store = make_store()
        reserved = reservation(call("far"), tuple(kinds), (), None)
        await store.run([PostGrant("g", "p", "credits", 100)])
        await store.run(
            [
                call("before", limits=(kinds[0],)),
                reserved,
                call("after", limits=(kinds[2]._replace(key="own"),)),
                Part(part_of("far"), What.TAKE_BACK),
                call("last"),
            ]
        )
        state = (await store.read(EverythingKept())).state
        assert {key: counter.used for key, counter in state.counters.items()} == {"first": 1, "own": 1}
        assert sorted(state.holds) == ["after", "before", "last"]
        assert state.accounts["p", "credits"].held == 30
        await store.close()

    asyncio.run(run())


def test_many_calls_are_several_scripts(server: ValkeyServer, make_store: Maker) -> None:
    """More calls than one script runs are sent together all the same, and answered in order."""
    answers, turns = beside_memory(
        server,
        make_store,
        [PostGrant("g", "p", "credits", 150), call("first", 1)],
        [call(f"c{number}", 1) for number in range(200)],
    )
    assert [answer.admitted for answer in answers] == [True] * 149 + [False] * 51
    assert turns == 1


@pytest.mark.parametrize(("waiting", "scripts"), [(1, [1]), (65, [65]), (97, [49, 48]), (128, [64, 64])])
def test_scripts_of_a_batch_have_as_many_calls(waiting: int, scripts: list[int]) -> None:
    """What waits is spread evenly: a script of its own for the last call or two would cost as much as several calls."""
    names = Names("metering")
    calls = Calls(names, Packing(names), Scripts(), "halt")
    batch = Batch(calls, [call(f"c{number}") for number in range(waiting)])
    commands = batch.commands("", "1")
    # The gate and the halt, then a hold and an account of each call.
    assert [(int(command[2]) - 2) // 2 for command in commands] == scripts


def test_accounts_that_calls_of_one_script_share(server: ValkeyServer, make_store: Maker) -> None:
    """Whoever comes first to an account, an admission or an end: those behind it find what it left, on each account."""

    def of(payer: str, call_id: str, amount: int = 10) -> Admit:
        return call(call_id, amount)._replace(payer=payer)

    grants = [("p", 40), ("q", 30), ("q", 5), ("r", 10)]
    answers, turns = beside_memory(
        server,
        make_store,
        [PostGrant(f"g{n}", payer, "credits", amount) for n, (payer, amount) in enumerate(grants)],
        [of("p", "p1"), of("q", "q1"), of("r", "r1"), of("p", "p2"), of("q", "q2", 25)],
        [
            End("p1", 4, Basis.USAGE),
            of("p", "p3", 26),
            of("p", "p4", 1),
            of("q", "q3", 1),
            End("q2", 20, Basis.USAGE, event={"outcome": "completed"}),
            of("q", "q4", 5),
            End("r1", 10, Basis.USAGE),
            of("r", "r2", 1),
            End("p2", 12, Basis.USAGE),
            End("q1", None, Basis.NONE),
            End("p3", 0, Basis.USAGE),
        ],
    )
    assert turns == 1
    admitted = [answer.admitted for answer in answers if isinstance(answer, Decision)]
    assert admitted == [True, False, False, True, False]


def test_account_that_others_write_between_calls(server: ValkeyServer, make_store: Maker) -> None:
    """Calls find an account as grants, sweeps and the ends of others have left it, and grants that begin meanwhile."""
    lasting = [call(str(number), amount)._replace(ttl_s=600.0) for number, amount in enumerate((3, 4, 10, 1, 1, 1))]
    ends = [End(str(number), 2, Basis.USAGE) for number in range(6)]
    later = PostGrant("later", "p", "credits", 100, effective_at=NOON + 25.0)
    steps: list[list[Operation]] = [[PostGrant("g", "p", "credits", 12)], lasting[:1], lasting[1:2]]
    steps += [
        [PostGrant("more", "p", "credits", 5)],
        lasting[2:3],
        ends[:1],
        [later],
        lasting[3:4],
        ends[2:3],
        [Sweep(10)],
    ]
    steps += [lasting[4:], ends[3:5], ends[5:], [call("late", 20)], [call("e", 70)], [Sweep(10)], [call("f", 70)]]
    steps += [[End("late", 20, Basis.USAGE)], [call("g", 1), call("h", 1)]]
    debtor = [Admit(f"debt{n}", "q", "credits", 5, 5, (WalletSource(overdraft=20),), ttl_s=600.0) for n in range(3)]
    steps += [[ask] for ask in debtor]
    beside_memory(server, make_store, *steps)


def test_accounts_of_several_namespaces(make_store: Maker) -> None:
    """Accounts of two namespaces that are the same in all they say are never taken for one another."""

    async def run() -> list[int]:
        clock = FakeClock()
        stores = [make_store(namespace=f"own{number}", clock=clock) for number in range(2)]
        for store in stores:
            await store.open()
            await store.run([PostGrant("g", "p", "credits", 100)])
        left = []
        for number in range(3):
            for store in stores:
                (decision,) = await store.run([call(f"c{number}", 10)])
                assert isinstance(decision, Decision)
                left.append(decision.available or 0)
        for store in stores:
            await store.close()
        return left

    assert asyncio.run(run()) == [90, 90, 80, 80, 70, 70]
