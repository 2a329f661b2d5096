"""Books of a Cluster whose partitions are several: out of it and into it, and into another number of them."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.errors import StoreContendedError, StoreUnavailableError, UnwritableError
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import Claim, Emit, End, IdempotencyAsk, KeyAsk, LeaseAsk, PostGrant, Renew, Sweep
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import NEVER, Account, ChargeKey, Counter, DeclaredUnit, Event, Grant, Table
from asgi_metering.stores.contract import EverythingKept, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.moving import export_books, import_books
from asgi_metering.stores.redis import ClusterPlace, ClusterStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer
from tests.stores.operations import comparable
from tests.stores.redis.test_cluster import MovingSlot
from tests.stores.redis.test_dance import Books as Scene
from tests.stores.redis.test_dance import DeathError, dies, play
from tests.stores.redis.test_partitions import SEEDS, made_fit, state_of
from tests.stores.service import Service

_numbers = count()

SERVED, THEN = 200, 30
"""Operations before a move and behind it."""


async def _whole(store: Store) -> dict[str, Any]:
    return tables((await store.read(EverythingKept())).state)


async def _move(store: Store, to: Store, file: Path) -> None:
    assert (await export_books(store, file)).discrepancies == []
    moved = await import_books(to, file)
    assert moved.discrepancies == []
    assert moved.new == sum(moved.counts.values())


class Served:
    """A memory store that serves, and operations that go on."""

    def __init__(self, seed: int) -> None:
        self.clock = FakeClock()
        self.memory = MemoryStore(self.clock)
        self._service, self._known, self._time = Service(seed, self.clock, whole_steps=False), set[str](), 0.0

    def next(self) -> Any:
        """The next operation, some time later; no operation where it is none that a Cluster answers alike."""
        (operation, *_) = self._service.batch()
        self.clock.advance(max(0.0, self._time - self.clock()))
        self._time = max(self._time, self.clock())
        return made_fit(operation, self._known)

    async def serve(self, operations: int) -> None:
        """Serve for a while."""
        for _ in range(operations):
            if (operation := self.next()) is not None:
                await self.memory.run([operation])


def cluster_of(nodes: list[ValkeyServer], partitions: int, clock: FakeClock) -> ClusterStore:
    """A store on a namespace of its own."""
    place = ClusterPlace([(HOST, nodes[0].port)], {}, 5.0)
    return ClusterStore(place, namespace=f"volumes{next(_numbers)}", partitions=partitions, clock=clock)


@pytest.mark.parametrize("seed", SEEDS)
def test_move_into_partitions_and_go_on(nodes: list[ValkeyServer], tmp_path: Path, seed: int) -> None:
    """A store that has served is on a Cluster what it was; what comes then is answered as where it came from."""

    async def story() -> None:
        served, file = Served(seed), tmp_path / "books.jsonl"
        await served.serve(SERVED)
        one, other = (cluster_of(nodes, partitions, served.clock) for partitions in (5, 3))
        kept = await _whole(served.memory)
        await _move(served.memory, one, file)
        assert await _whole(one) == kept
        await _move(one, other, file)
        assert await _whole(other) == kept
        again = MemoryStore(served.clock)
        await _move(other, again, file)
        assert await _whole(again) == kept
        for _ in range(THEN):
            operation = served.next()
            # What is overdue ends at once everywhere, and not when somebody comes by.
            for store in (served.memory, other):
                await store.run([Sweep(10_000)])
            if operation is None:
                continue
            expected = comparable(await served.memory.run([operation]))
            assert comparable(await other.run([operation])) == expected, operation
        now = served.clock()
        found, wanted = [(await store.read(EverythingKept())).state for store in (other, served.memory)]
        assert state_of(found, now) == state_of(wanted, now)
        await one.close()
        await other.close()

    asyncio.run(story())


def test_move_a_call_of_many_partitions(nodes: list[ValkeyServer], tmp_path: Path) -> None:
    """A call in flight ends, after a move, in all the partitions where it has something, and its key learns of it."""

    async def story(books: Scene) -> None:
        await books.grant(100, books.owner)
        tokens = books.limit(100, cost=40, meter="tokens")
        own = tokens._replace(name="own", key=rooted("own", books.payer))
        theirs = tokens._replace(name="theirs", key=rooted("theirs", books.owner))
        ask = books.ask(
            "a",
            sources=books.theirs(),
            limits=(tokens, theirs, own),
            leases=(LeaseAsk("one", books.address, 1), LeaseAsk("two", books.pool, 1)),
            idempotency=IdempotencyAsk(rooted("key", books.payer), "print"),
        )
        await books.one(ask)
        store = cluster_of(nodes, 7, books.clock)
        await _move(books.store, store, tmp_path / "books.jsonl")
        (hold,) = (await store.read(EverythingKept())).state.holds.values()
        assert sorted(hold.pools) == sorted((books.address, books.pool))
        alive, refused = await store.run([Renew("a", 3), ask._replace(id="b", idempotency=None)])
        assert (alive, refused.refusal.name) == (True, "one")  # type: ignore[union-attr]
        (receipt,) = await store.run([End("a", 7, Basis.USAGE, actual={"tokens": 4}, reply={"status": 200})])
        assert (receipt.amount, receipt.payer) == (7, books.owner)  # type: ignore[union-attr]
        state = (await store.read(EverythingKept())).state
        assert ({row.used for row in state.counters.values()}, state.leases, state.live) == ({4}, {}, {})
        (again,) = await store.run([ask._replace(id="again")])
        assert (again.replay.amount, again.reply) == (7, {"status": 200})  # type: ignore[union-attr]
        await store.close()

    play(nodes, story)


def test_key_that_somebody_else_pays_ends_after_a_move(nodes: list[ValkeyServer], tmp_path: Path) -> None:
    """A charge key that another owner pays, which a Cluster does not begin, is settled there by calls that came so."""

    async def story(books: Scene) -> None:
        memory, key = MemoryStore(books.clock), KeyAsk(rooted("session", books.payer), window_s=900.0)
        ask = books.ask("a", sources=books.theirs(), limits=(), leases=(), charge_key=key)
        await memory.run([PostGrant("g", books.owner, "credits", 100), ask, ask._replace(id="b")])
        await _move(memory, books.store, tmp_path / "books.jsonl")
        receipts = [await books.one(End(call, 10, Basis.USAGE)) for call in "ab"]
        assert [(receipt.payer, receipt.amount) for receipt in receipts] == [(books.owner, 10), (books.owner, 0)]

    play(nodes, story)


def test_late_end_after_a_move(nodes: list[ValkeyServer], tmp_path: Path) -> None:
    """A call that its policy ended before a move is corrected by its own end after it, wherever it was counted."""

    async def story(books: Scene) -> None:
        memory = MemoryStore(books.clock)
        limit = books.limit(100, cost=40, meter="tokens")
        ask = books.ask("a", limits=(limit,))
        await memory.run([PostGrant("g", books.payer, "credits", 100), ask])
        books.clock.advance(100.0)
        await memory.run([Sweep()])
        await _move(memory, books.store, tmp_path / "books.jsonl")
        for _ in range(2):
            receipt = await books.one(End("a", 6, Basis.USAGE, actual={"tokens": 3}))
            assert (receipt.ended_by, receipt.late) == (EndedBy.POLICY, 6)
        state = await books.state()
        (window,) = state.holds["a"].windows
        assert (state.counters[books.address].used, window.taken) == (3, 40)

    play(nodes, story)


def test_key_of_a_dead_admission_is_not_moved(
    nodes: list[ValkeyServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that died while a call was being decided leaves its key free where the books come to."""

    async def story(books: Scene) -> None:
        await books.grant(100, books.owner)
        once = IdempotencyAsk(rooted("key", books.payer), "print")
        ask = books.ask("a", sources=books.theirs(), limits=(), leases=(), idempotency=once)
        with monkeypatch.context() as patch:
            dies(books.store, 1, unheard=True, monkeypatch=patch)
            (answer,) = await books.store.run([ask])
        assert isinstance(answer, DeathError)
        memory = MemoryStore(books.clock)
        await _move(books.fellow(), memory, tmp_path / "books.jsonl")
        (decision,) = await memory.run([ask._replace(id="b")])
        assert decision.admitted  # type: ignore[union-attr]

    play(nodes, story)


# -- filling -----------------------------------------------------------------------------------------------


def test_fill_keeps_others_out_of_all_partitions(nodes: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """While a namespace is filled nobody else writes to any partition, nor fills it; then everybody may."""
    monkeypatch.setattr("asgi_metering.stores.redis.store.BUSY_PAUSES", 3)
    monkeypatch.setattr("asgi_metering.stores.redis.transaction.BUSY_S", 0.05)

    async def story(books: Scene) -> None:
        grants = [PostGrant("g", name, "credits", 1) for name in (books.payer, books.owner, books.pool)]
        async with books.store.fill() as filling:
            await filling.put(Table.UNIT, [DeclaredUnit("credits", 6)])
            for shelf, each in zip(books.store.shelves, filling._each, strict=True):  # type: ignore[attr-defined]
                await shelf.ask([("PEXPIRE", shelf.names.gate, "20000")])
                each._renewed_at -= 40.0
            await filling.put(Table.UNIT, [DeclaredUnit("usd", 2)])
            for shelf in books.store.shelves:
                (left_ms,) = await shelf.ask([("PTTL", shelf.names.gate)])
                assert left_ms > 50_000
            assert (await filling.counts())[Table.UNIT] == 2
            answers = await books.fellow().run(grants)
            assert {type(answer) for answer in answers} == {StoreContendedError}
            with pytest.raises(StoreContendedError):
                await books.fellow().fill().__aenter__()
        await books.store.post(grants)

    play(nodes, story)


@pytest.mark.parametrize("empty", [True, False])
def test_fill_with_what_it_cannot_keep(nodes: list[ValkeyServer], empty: bool) -> None:
    """A row that cannot be kept leaves a namespace empty in all partitions, if it was; what others put stays."""

    async def story(books: Scene) -> None:
        if not empty:
            await books.one(Emit((("e", {}),)))
        accounts = [Account(payer, "credits", 0) for payer in (books.payer, books.owner, books.pool)]
        bad = Grant(books.address, "credits", "g", 5, 0, 1.0, NEVER, 1)
        async with books.store.fill() as filling:
            await filling.put(Table.ACCOUNT, accounts)
            with pytest.raises(UnwritableError, match="came without its account"):
                await filling.put(Table.GRANT, [bad])
            with pytest.raises(StoreUnavailableError, match=r"is over\. Begin again"):
                await filling.put(Table.ACCOUNT, accounts)
        kept = await _whole(books.store)
        assert (len(kept["account"]), len(kept["event"])) == ((0, 0) if empty else (3, 1))

    play(nodes, story)


def test_put_rows_of_nobody(nodes: list[ValkeyServer]) -> None:
    """Rows that say of nobody whose they are come back as they were put, charge keys of unknown calls as well."""
    rows: dict[str, list[Any]] = {
        Table.CHARGE_KEY: [ChargeKey("session@5", 5.0, 9.0, "gone:key"), ChargeKey(rooted("k", "p"), 5.0, 9.0, "x")],
        Table.COUNTER: [Counter("everybody", 1.0, 9.0, 3)],
        Table.EVENT: [Event(event, at, {}) for event, at in (("b", 2.0), ("a", 1.0), ("c", 1.5))],
    }

    async def story(books: Scene) -> None:
        async with books.store.fill() as filling:
            for table, some in rows.items():
                assert (await filling.put(table, some), await filling.put(table, some)) == (len(some), 0)
        async with books.store.books() as kept:
            for table, some in rows.items():
                async with aclosing(kept.rows(table)) as pages:
                    assert sorted([row async for page in pages for row in page]) == sorted(some)
        claimed = await books.one(Claim(9, 1.0))
        assert {event.id for event in claimed} == {"a", "b", "c"}

    play(nodes, story)


def test_slot_moves_while_books_are_read(nodes: list[ValkeyServer]) -> None:
    """When a slot changes its node while keys are looked through, some may have been seen by neither: that is told."""
    moving = MovingSlot(nodes, "{nobody's}")

    async def story(books: Scene) -> None:
        await books.grant()
        async with books.store.books() as opened:
            async with aclosing(opened.keys()) as found:  # type: ignore[attr-defined]
                await anext(found)
                moving.end()
                with pytest.raises(StoreUnavailableError, match="A slot of the Cluster has moved"):
                    assert [keys async for keys in found] == []
            assert sum((await opened.counts()).values()) == sum(
                len(rows) for rows in (await _whole(books.store)).values()
            )

    play(nodes, story)
