"""What a store must do so that its books can be moved to another store, and those of another one to it."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision
from asgi_metering.errors import ConfigurationError, UnwritableError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Backfill,
    Claim,
    Correct,
    Declare,
    Emit,
    End,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Refund,
    Renew,
    Share,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import NEVER, Event, Grant, SharedReading, Table
from asgi_metering.stores.contract import PAGE_ROWS, TABLES, Books, EntriesAfter, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.moving import export_books, import_books
from asgi_metering.testing.conformance.scene import (
    GRACE_S,
    LIFE_S,
    PAYER,
    UNIT,
    WALLET,
    Scene,
    Suite,
    scenario,
    tables,
)

__all__ = ["Moving"]

SESSION, OTHER = (KeyAsk(rooted(name, PAYER), window_s=9_000.0) for name in ("session", "other"))

_AnySuite = TypeVar("_AnySuite", bound=Suite)


def _movable(test: Callable[[_AnySuite, Scene], Awaitable[None]]) -> Callable[[_AnySuite], None]:
    """A scenario of stores that can be moved; one that cannot must say so."""

    @wraps(test)
    async def run(self: _AnySuite, scene: Scene) -> None:
        kind = type(scene.store)
        if kind.books is not Store.books and kind.fill is not Store.fill:
            await test(self, scene)
            return
        for opened in (scene.store.books, scene.store.fill):
            refused = False
            try:
                async with opened():
                    pass
            except ConfigurationError:
                refused = True
            assert refused, "a store that cannot be moved must say so"

    return scenario(run)


async def _move(store: Store, to: Store) -> None:
    """Move everything by way of a file, whose books balance."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "books.jsonl"
        assert (await export_books(store, file)).discrepancies == []
        moved = await import_books(to, file)
        assert moved.discrepancies == []
        assert moved.new == sum(moved.counts.values())


def _memory(scene: Scene) -> Scene:
    return Scene(MemoryStore(scene.clock), scene.clock, scene.fellow)


async def _rows(books: Books, table: str) -> list[Any]:
    async with aclosing(books.rows(table)) as pages:
        found = [page async for page in pages]
    assert all(found), "a page is empty"
    return [row for page in found for row in page]


async def _live(scene: Scene) -> None:
    """A life that leaves rows of every kind, of which some wait for what comes."""
    now = scene.clock()
    weighted = scene.limit(WindowKind.SLIDING, 100, name="tokens", cost=9, meter="tokens")
    log, bucket = _log_and_bucket(scene)
    slots = (LeaseAsk("jobs", "jobs|7", 5),)

    def admit(call_id: str, amount: int, **more: Any) -> Admit:
        return scene.ask(call_id, amount)._replace(**more)

    await scene.run(
        Declare(((UNIT, 6), ("messages", 0))),
        Share((SharedReading("openai/batch", "limits", now - 0.1, '{"n":"\\u00e9"}'),)),
        PostGrant("old", PAYER, UNIT, 50, 5, None, now + 30.0, "promotional", "eve"),
        PostGrant("new", PAYER, UNIT, 1_000),
        PostGrant("later", PAYER, UNIT, 7, 0, now + 1e6),
        PostGrant("new", "org_8 é", "messages", 2**53 - 1, actor='"; {}'),
        admit("lost", 10, in_doubt=Basis.OBSERVED),
        Renew("lost", 4),
        admit("free", 3, sources=(scene.allowance(5), WalletSource())),
        End("free", 3, Basis.USAGE),
        admit("spent", 60),
        End("spent", 60, Basis.USAGE, event={"outcome": "completed"}),
        Refund("ticket", "spent", PAYER, UNIT, 5),
    )
    scene.clock.advance(LIFE_S + GRACE_S)
    await scene.run(
        Sweep(keep_entries_s=LIFE_S),
        Correct("audit", PAYER, UNIT, 11),
        Backfill("import", "org_9", UNIT, 12, "batch"),
        Emit((("e1", {"n": [1, None, "é"]}), ("e2", {}), ("e3", {}))),
        Acknowledge(("e3",)),
        Claim(1, 1e6),
        admit("live", 20, limits=(weighted, scene.limit(WindowKind.FIXED, 9), log, bucket), leases=slots),
        admit("held", 2, sources=(scene.allowance(5), WalletSource())),
        admit("first", 30, charge_key=SESSION),
        End("first", 30, Basis.USAGE),
        admit("one", 30, charge_key=OTHER),
        admit("done", 1, idempotency=IdempotencyAsk("k1", "f")),
        End("done", 1, Basis.USAGE, reply={"status": 200}),
        admit("runs", 1, idempotency=IdempotencyAsk("k2", "f")),
    )


def _log_and_bucket(scene: Scene) -> tuple[LimitAsk, LimitAsk]:
    bucket = scene.limit(WindowKind.BUCKET, 30, name="bucket", cost=9, meter="tokens", refill=7)
    return scene.limit(WindowKind.MOVING, 2, name="log"), bucket


def _what_comes(scene: Scene) -> Sequence[Operation]:
    """Operations that meet the rows of `_live`."""
    ask = scene.ask("again", 30)
    return (
        Renew("live", 6),
        ask._replace(id="limited", amount=1, minimum=1, limits=_log_and_bucket(scene)),
        End("live", 17, Basis.USAGE, actual={"tokens": 4}, event={"outcome": "completed"}),
        End("live", 99, Basis.USAGE),
        End("lost", 9, Basis.USAGE),
        End("held", 2, Basis.USAGE),
        ask._replace(id="joins", charge_key=SESSION),
        ask._replace(id="two", charge_key=OTHER),
        End("one", None, failed=True),
        End("two", 30, Basis.USAGE),
        ask._replace(idempotency=IdempotencyAsk("k1", "f")),
        ask._replace(idempotency=IdempotencyAsk("k1", "another")),
        ask._replace(idempotency=IdempotencyAsk("k2", "f")),
        PostGrant("new", PAYER, UNIT, 1_000),
        PostGrant("more", "org_9", UNIT, 20),
        Refund("ticket", "spent", PAYER, UNIT, 5),
        Refund("ticket-2", "spent", PAYER, UNIT),
        Claim(10, 30.0),
        Sweep(),
    )


class Moving(Suite):
    """The books out of one store, and into another."""

    @_movable
    async def test_move_to_memory_and_back(self, scene: Scene) -> None:
        """Every row, but events that were delivered, comes to the memory store as it was, and back to another one."""
        await _live(scene)
        kept = tables(await scene.state())
        assert all(kept.values()), "a kind of rows is missing"
        kept["delivered"] = {}
        memory, other = _memory(scene), await scene.fellow()
        await _move(scene.store, memory.store)
        await _move(memory.store, other.store)
        assert tables(await memory.state()) == kept
        assert tables(await other.state()) == kept
        assert {**tables(await scene.state()), "delivered": {}} == kept
        await other.assert_conserved()

    @_movable
    async def test_go_on_after_a_move(self, scene: Scene) -> None:
        """Live holds, keys, late ends, refunds and sweeps answer on the new store what they would on the old one."""
        await _live(scene)
        other = await scene.fellow()
        await _move(scene.store, other.store)
        for operation in _what_comes(scene):
            (was,), (now,) = await scene.run(operation), await other.run(operation)
            if isinstance(was, Exception):
                was, now = str(was), str(now)
            assert now == was, operation
        assert tables(await other.state()) == {**tables(await scene.state()), "delivered": {}}
        await other.assert_conserved()

    @_movable
    async def test_end_a_moved_hold(self, scene: Scene) -> None:
        """A live hold that was moved is settled where it came to, once; a repeat answers that receipt."""
        await scene.grant(100)
        await scene.admit("c1", 10)
        other = await scene.fellow()
        await _move(scene.store, other.store)
        receipt = await other.settle("c1", 4)
        assert (receipt.applied, receipt.amount, receipt.held, receipt.available) == (True, 4, 10, 96)
        assert await other.settle("c1", 9) == receipt._replace(applied=False)

    @_movable
    async def test_move_the_receipt_of_a_key(self, scene: Scene) -> None:
        """A repeat under an idempotency key is answered by the store that the key came to, with the same receipt."""
        await scene.grant(100)
        ask = scene.ask("c1", 10)._replace(idempotency=IdempotencyAsk("k", "f"))
        await scene.run(ask, End("c1", 4, Basis.USAGE))
        other = await scene.fellow()
        await _move(scene.store, other.store)
        decision = await other.one(ask._replace(id="c2"))
        assert isinstance(decision, Decision)
        assert decision.replay is not None
        assert (decision.replay.id, decision.replay.amount) == ("c1", 4)
        assert (await other.account()).settled == 4

    @_movable
    async def test_move_a_key_that_is_free_again(self, scene: Scene) -> None:
        """The late end of a request that was given up finds its key on the store that both came to, and answers it."""
        await scene.grant(100)
        ask = scene.ask("c1", 10)._replace(idempotency=IdempotencyAsk(rooted("k", PAYER), "f"))
        await scene.run(ask)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        other = await scene.fellow()
        await _move(scene.store, other.store)
        assert tables(await other.state()) == tables(await scene.state())
        assert (await other.settle("c1", 4)).late == 4
        assert (await other.one(ask._replace(id="c2"))).replay is not None

    @_movable
    async def test_deliver_moved_events_once(self, scene: Scene) -> None:
        """Events that nobody has taken are claimed in their order where they came to, and once."""
        await scene.run(*(Emit(((f"e{number}", {"n": number}),)) for number in (3, 1, 2)))
        other = await scene.fellow()
        await _move(scene.store, other.store)
        claimed = await other.one(Claim(10, 30.0))
        assert [event.id for event in claimed] == ["e3", "e1", "e2"]
        await other.one(Acknowledge(tuple(event.id for event in claimed)))
        other.clock.advance(30.0)
        assert await other.one(Claim(10, 30.0)) == ()

    @_movable
    async def test_go_on_with_a_statement(self, scene: Scene) -> None:
        """Ledger lines keep their numbers: the cursor of a statement goes on where the account came to."""
        await _live(scene)
        other = await scene.fellow()
        await _move(scene.store, other.store)
        last = (await other.entries())[-2].number
        await other.settle("live", 7)
        _, page = await other.store.read(EntriesAfter(PAYER, UNIT, last))
        numbers = [line.number for line in page.entries[PAYER, UNIT]]
        assert numbers == [last + 1, last + 2]

    @_movable
    async def test_books_of_one_instant(self, scene: Scene) -> None:
        """Books that say they are of one instant show nothing of what is written while they are read."""
        await _live(scene)
        before = await scene.state()
        async with scene.store.books() as books:
            assert books.now == scene.clock()
            counts = dict(await books.counts())
            await scene.run(*_what_comes(scene))
            if books.one_instant:
                found = {table: await _rows(books, table) for table in TABLES}
                assert {table: len(rows) for table, rows in found.items()} == counts
                assert {account.payer: account for account in found[Table.ACCOUNT] if account.unit == UNIT} == {
                    payer: account for (payer, unit), account in before.accounts.items() if unit == UNIT
                }
                assert found[Table.HOLD] == list(before.holds.values())

    @_movable
    async def test_order_of_books(self, scene: Scene) -> None:
        """Rows of accounts come by payer and unit as Python orders them, holds by their time, events as they came."""
        await scene.run(
            *(
                PostGrant(grant, payer, UNIT, 9)
                for grant in ("g2", "g1")
                for payer in ("é", "a%", "a$", "a\x01", "a", "Z", "\U0001f600")
            )
        )
        calls = [f"{number}{payer}" for number in (2, 1) for payer in ("é", "Z")]
        for call in calls:
            scene.clock.advance(1.0)
            await scene.run(Admit(call, call[1:], UNIT, 1, 1, WALLET))
        await scene.run(*(Emit(((event, {}),)) for event in ("y", "x")))
        async with scene.store.books() as books:
            payers = [account.payer for account in await _rows(books, Table.ACCOUNT)]
            assert payers == sorted(payers)
            assert len(payers) == 7
            grants = [(grant.payer, grant.number, grant.id) for grant in await _rows(books, Table.GRANT)]
            assert grants == [(payer, number, f"g{3 - number}") for payer in payers for number in (1, 2)]
            lines = [(line.payer, line.number) for line in await _rows(books, Table.ENTRY)]
            assert lines == sorted(lines)
            assert [hold.id for hold in await _rows(books, Table.HOLD)] == calls
            assert [event.id for event in await _rows(books, Table.EVENT)] == ["y", "x"]

    @_movable
    async def test_many_pages(self, scene: Scene) -> None:
        """More rows than a page takes come each once, in their order, and are kept when they are put in pieces."""
        count = 2 * PAGE_ROWS + 1
        events = [Event(f"e{(number * 7919) % count}", 1.0, {}) for number in range(count)]
        async with scene.store.fill() as filling:
            for start in range(0, count, 600):
                assert await filling.put(Table.EVENT, events[start : start + 600]) == len(events[start : start + 600])
            assert (await filling.counts())[Table.EVENT] == count
        async with scene.store.books() as books:
            assert await _rows(books, Table.EVENT) == events

    @_movable
    async def test_put_what_is_kept(self, scene: Scene) -> None:
        """A row whose key is kept stays as it is, also within one call; putting the same again changes nothing."""
        row = Grant(PAYER, UNIT, "g", 5, 0, 1.0, NEVER, 1, settled=5)
        async with scene.store.fill() as filling:
            assert await filling.put(Table.GRANT, [row, row._replace(id="h", number=2)]) == 2
            assert await filling.put(Table.GRANT, [row._replace(amount=9, settled=9), row._replace(id="i")]) == 1
        async with scene.store.fill() as filling:
            assert await filling.put(Table.GRANT, [row]) == 0
        assert await scene.grant_row("g") == row
        async with scene.store.fill() as filling:
            lasting = [row._replace(payer="q"), row._replace(payer="q", amount=7)]
            assert await filling.put(Table.GRANT, lasting) == 1
        async with scene.store.books() as books:
            assert [grant.amount for grant in await _rows(books, Table.GRANT) if grant.payer == "q"] == [5]

    @_movable
    async def test_put_exactly(self, scene: Scene) -> None:
        """The largest amounts, times to their last bit and texts of any kind come back as they were put."""
        texts = ('\'; DROP TABLE "grant" --', "\U0001f600 e\u0301 é \u2028", '{\\x41},"NULL"', " NULL ", "null")
        rows = [
            Grant(PAYER, UNIT, text, amount, -number, 0.1 + 0.2, 1e10 / 3, number, text, text, amount)
            for number, (amount, text) in enumerate(zip(range(MAX_AMOUNT, 0, -1), texts, strict=False))
        ]
        events = [Event(text, 1.1, {text: [2**53 + 1, 0.1, None, True, {"": text}]}, NEVER) for text in texts]
        async with scene.store.fill() as filling:
            await filling.put(Table.GRANT, rows)
            await filling.put(Table.EVENT, events)
            assert await _rows(filling, Table.GRANT) == rows
        async with scene.store.books() as books:
            assert await _rows(books, Table.GRANT) == rows
            assert await _rows(books, Table.EVENT) == events

    @_movable
    async def test_put_more_than_is_counted(self, scene: Scene) -> None:
        """An amount beyond 2^53 - 1 is kept exactly, or refused with a sentence that has it; then nothing is kept."""
        much = 2**62 + 1
        row = Grant(PAYER, UNIT, "g", much, 0, 1.0, NEVER, 1, settled=much)
        told = ""
        try:
            async with scene.store.fill() as filling:
                await filling.put(Table.EVENT, [Event("e", 1.0, {})])
                await filling.put(Table.GRANT, [row._replace(id="h", number=2, amount=1, settled=1), row])
        except UnwritableError as refusal:
            told = str(refusal)
        if told:
            assert str(much) in told
            assert not any(tables(await scene.state()).values())
        else:
            assert await scene.grant_row("g") == row

    @_movable
    async def test_fill_that_fails(self, scene: Scene) -> None:
        """A filling that is left with an error keeps nothing if it is whole; otherwise putting again completes it."""
        events = [Event(f"e{number}", 1.0, {}) for number in range(4)]

        class CutError(Exception):
            """The move was cut."""

        try:
            async with scene.store.fill() as filling:
                await filling.put(Table.EVENT, events[:3])
                whole = filling.whole
                raise CutError
        except CutError:
            kept = list((await scene.state()).events.values())
        assert kept == ([] if whole else events[:3])
        async with scene.store.fill() as filling:
            assert await filling.put(Table.EVENT, events) == len(events) - len(kept)
        assert list((await scene.state()).events.values()) == events
        assert [event.id for event in await scene.one(Claim(9, 1.0))] == [event.id for event in events]
