"""The ledger's verbs, in memory and on SQLite: each moves what it says, once, and the books balance after it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Allowance, Metering, Unit, UsageEvent, Wallet
from asgi_metering.errors import (
    AmountError,
    ConfigurationError,
    IdempotencyConflictError,
    InvalidKeyError,
    UnknownHoldError,
)
from asgi_metering.events.outbox import read_event
from asgi_metering.ledger import POSTED
from asgi_metering.receipts import EndedBy, Entry, EntryKind
from asgi_metering.rules.operations import Admit, LeaseAsk, Sweep, WalletSource
from asgi_metering.stores.contract import PendingEvents, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock

CREDIT = 1_000_000
DAY_S = 86_400.0
MESSAGES = Unit("messages", 0)


class Unheard:
    """A sink that takes nothing, so that what is told stays in the outbox."""

    name = "unheard"

    async def deliver(self, events: Any) -> None:
        """Refuse."""
        raise RuntimeError("not now")


class Books:
    """
    A metering with 100 credits of ann's, and a clock that only the test moves.

    Attributes:
        metering: Of the store.
        clock: The store's.
    """

    def __init__(self, store: Store, clock: FakeClock, sinks: Any = ()) -> None:
        self.metering = Metering(store, sinks=sinks)
        self.clock = clock

    async def charge(self, price: int, **options: Any) -> str:
        """Run one call of ann's to its end and return its id."""
        async with self.metering.charge(payer="ann", line="search", price=price, **options) as call:
            pass
        return call.id

    async def sums(self) -> tuple[int, int, int, int]:
        """Ann's settled, expired, debt and available, in whole credits."""
        found = await self.metering.balance("ann")
        return tuple(part // CREDIT for part in (found.settled, found.expired, found.debt, found.available))  # type: ignore[return-value]

    async def lines(self, kind: EntryKind) -> list[Entry]:
        """Ann's lines of one kind."""
        return [line async for line in self.metering.statement("ann") if line.kind is kind]

    async def told(self) -> list[UsageEvent]:
        """What waits for sinks."""
        _, state = await self.metering.store.read(PendingEvents())
        return [read_event(event) for event in state.events.values()]


Play = Callable[[Callable[[Books], Awaitable[None]]], None]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[FakeClock], Store]:
    """Makes a store; on SQLite another look at the same file each time."""
    kept: list[Store] = []

    def make(clock: FakeClock) -> Store:
        if request.param == "sqlite":
            return SQLiteStore(tmp_path / "metering.db", synchronous="OFF", clock=clock)
        if not kept:
            kept.append(MemoryStore(clock))
        return kept[0]

    return make


@asynccontextmanager
async def opened(make: Callable[[FakeClock], Store], **options: Any) -> AsyncIterator[Books]:
    """Books with ann's grant; they are proven when the block is left."""
    clock = FakeClock()
    books = Books(make(clock), clock, **options)
    async with books.metering:
        await books.metering.grant("ann", 100, id="paid")
        yield books
        assert await books.metering.check() == []


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shutdown that gives sinks no time: they take nothing."""
    monkeypatch.setattr("asgi_metering.runtime.EXPORT_S", 0.01)


@pytest.fixture
def play(make: Callable[[FakeClock], Store]) -> Play:
    """Plays a scene on books of its own."""

    def play(scene: Callable[[Books], Awaitable[None]]) -> None:
        async def run() -> None:
            async with opened(make) as books:
                await scene(books)

        asyncio.run(run())

    return play


# -- refunds -----------------------------------------------------------------------------------------------


def test_refund_all_of_a_charge(play: Play) -> None:
    """Without an amount all of the charge goes back to its grant, and can be spent again."""

    async def scene(books: Books) -> None:
        call = await books.charge(30)
        posting = await books.metering.refund(call, id="r", actor="eve")
        assert (posting.amount, posting.returned, posting.lapsed) == (-30 * CREDIT, 30 * CREDIT, 0)
        assert (posting.payer, posting.applied, posting.available) == ("ann", True, 100 * CREDIT)
        assert await books.sums() == (0, 0, 0, 100)
        (line,) = await books.lines(EntryKind.REFUND)
        assert (line.ref, line.id, line.actor, line.line, line.number) == (call, "r", "eve", "search", posting.entry)

    play(scene)


def test_refund_a_part_of_a_charge(play: Play) -> None:
    """Parts add up, and without an amount the rest goes back."""

    async def scene(books: Books) -> None:
        call = await books.charge(30)
        assert (await books.metering.refund(call, id="a", amount="0.5")).amount == -CREDIT // 2
        assert (await books.metering.refund(call, id="b", amount=10)).available == 80 * CREDIT + CREDIT // 2
        assert (await books.metering.refund(call, id="c")).amount == -(19 * CREDIT + CREDIT // 2)

    play(scene)


def test_refund_once_per_id(play: Play) -> None:
    """The same refund again changes nothing and says so (S0.11)."""

    async def scene(books: Books) -> None:
        call = await books.charge(30)
        first = await books.metering.refund(call, id="r", amount=10)
        again = await books.metering.refund(call, id="r", amount=10)
        assert (again.applied, again.amount, again.entry) == (False, first.amount, first.entry)
        assert await books.sums() == (20, 0, 0, 80)

    play(scene)


def test_refuse_another_refund_under_the_same_id(play: Play) -> None:
    """The same id with another amount is a mistake, and moves nothing."""

    async def scene(books: Books) -> None:
        call = await books.charge(30)
        await books.metering.refund(call, id="r", amount=10)
        with pytest.raises(IdempotencyConflictError, match="'r'"):
            await books.metering.refund(call, id="r", amount=11)
        assert await books.sums() == (20, 0, 0, 80)

    play(scene)


def test_refuse_to_refund_more_than_is_left(play: Play) -> None:
    """Nobody gets back more than was charged, not in parts either."""

    async def scene(books: Books) -> None:
        call = await books.charge(30)
        await books.metering.refund(call, id="a", amount=10)
        with pytest.raises(AmountError, match="what is left of the charge"):
            await books.metering.refund(call, id="b", amount=21)
        await books.metering.refund(call, id="c", amount=20)
        with pytest.raises(ConfigurationError, match="has no charge left"):
            await books.metering.refund(call, id="d")
        assert await books.sums() == (0, 0, 0, 100)

    play(scene)


@pytest.mark.parametrize(
    ("arguments", "error", "mend"),
    [
        ({"call": "nobodys", "id": "r"}, UnknownHoldError, "No hold of call 'nobodys' is kept"),
        ({"call": "nobodys", "id": "r", "payer": "ann"}, ConfigurationError, "has no charge left on account 'ann'"),
        ({"call": "", "id": "r"}, InvalidKeyError, "call id"),
        ({"call": "nobodys", "id": "", "payer": "ann"}, InvalidKeyError, "posting id"),
        ({"call": "nobodys", "id": "r", "payer": "ann", "amount": 0.5}, AmountError, "Write it as a str"),
    ],
    ids=["unknown", "unknown to the payer", "no call", "no id", "float"],
)
def test_refuse_a_refund_of_nothing(play: Play, arguments: dict[str, Any], error: type, mend: str) -> None:
    """What names no charge is a mistake with its mend."""

    async def scene(books: Books) -> None:
        with pytest.raises(error, match=mend):
            await books.metering.refund(**arguments)

    play(scene)


def test_refund_a_call_whose_hold_is_forgotten(play: Play) -> None:
    """Once the hold is forgotten, the ledger's own lines still know the charge of a payer who is named."""

    async def scene(books: Books) -> None:
        call = await books.charge(30)
        books.clock.advance(8 * DAY_S)
        await books.metering._submit(Sweep())
        with pytest.raises(UnknownHoldError, match="say whose it was: payer="):
            await books.metering.refund(call, id="r")
        assert (await books.metering.refund(call, id="r", payer="ann")).returned == 30 * CREDIT

    play(scene)


def test_refund_a_charge_of_an_allowance(play: Play) -> None:
    """What an allowance paid goes back to its window, and to no grant."""

    async def scene(books: Books) -> None:
        sources = [Allowance(20)]
        call = await books.charge(15, sources=sources)
        posting = await books.metering.refund(call, id="r", amount=5)
        assert (posting.returned, posting.lapsed) == (5 * CREDIT, 0)
        assert await books.sums() == (0, 0, 0, 100)
        (today,) = await books.metering.allowances("ann", sources=sources)
        assert (today.used, today.remaining) == (10 * CREDIT, 10 * CREDIT)

    play(scene)


def test_refund_to_a_window_that_is_over(play: Play) -> None:
    """What comes back to yesterday's allowance is told as lapsed; today's is not touched (S0.11)."""

    async def scene(books: Books) -> None:
        sources = [Allowance(20)]
        call = await books.charge(15, sources=sources)
        books.clock.advance(DAY_S)
        posting = await books.metering.refund(call, id="r")
        assert (posting.returned, posting.lapsed) == (0, 15 * CREDIT)
        (today,) = await books.metering.allowances("ann", sources=sources)
        assert today.used == 0

    play(scene)


def test_refund_to_a_grant_that_has_expired(play: Play) -> None:
    """It lowers what is settled and raises what is expired: returned and lapsed are told apart (DESIGN 4)."""

    async def scene(books: Books) -> None:
        metering = books.metering
        await metering.grant("ann", 10, id="promo", priority=-1, expires_at=books.clock() + 60)
        call = await books.charge(30)
        books.clock.advance(61)
        posting = await metering.refund(call, id="r")
        assert (posting.returned, posting.lapsed) == (20 * CREDIT, 10 * CREDIT)
        assert await books.sums() == (0, 10, 0, 100)

    play(scene)


def test_refund_what_was_debt(play: Play) -> None:
    """A charge beyond the grants is owed; a refund lowers the debt first, from the last part of the charge."""

    async def scene(books: Books) -> None:
        call = await books.charge(130, sources=[Wallet(overdraft=50)])
        assert await books.sums() == (130, 0, 30, -30)
        posting = await books.metering.refund(call, id="r", amount=40)
        assert posting.amount == -40 * CREDIT
        assert await books.sums() == (90, 0, 0, 10)

    play(scene)


def test_refund_in_the_unit_of_the_call(play: Play) -> None:
    """A call of another unit is refunded in that, which has to be given: its scale is nobody's guess."""

    async def scene(books: Books) -> None:
        await books.metering.grant("ann", 9, id="m", unit=MESSAGES)
        call = await books.charge(2, unit=MESSAGES)
        with pytest.raises(ConfigurationError, match="counted in 'messages', not in 'credits'"):
            await books.metering.refund(call, id="r")
        assert (await books.metering.refund(call, id="r", amount=1, unit=MESSAGES)).available == 8

    play(scene)


# -- corrections, backfills, reversals ---------------------------------------------------------------------


def test_correct_both_ways(play: Play) -> None:
    """A correction charges more, or gives back what was spent, each as a line of its own."""

    async def scene(books: Books) -> None:
        up = await books.metering.correct("ann", 5, id="up", line="search", actor="eve")
        assert (up.amount, await books.sums()) == (5 * CREDIT, (5, 0, 0, 95))
        down = await books.metering.correct("ann", 2, id="down", give_back=True)
        assert (down.amount, down.returned, await books.sums()) == (-2 * CREDIT, 2 * CREDIT, (3, 0, 0, 97))
        assert [(line.id, line.line, line.actor) for line in await books.lines(EntryKind.CORRECTION)] == [
            ("up", "search", "eve"),
            ("down", "", ""),
        ]
        assert (await books.metering.correct("ann", 5, id="up")).applied is False

    play(scene)


@pytest.mark.parametrize(
    ("arguments", "error", "mend"),
    [
        ({"amount": 0}, AmountError, "moves nothing"),
        ({"amount": 6, "give_back": True}, AmountError, "has spent 5000000"),
        ({"amount": 7, "id": "up"}, IdempotencyConflictError, "'up'"),
    ],
    ids=["nothing", "more than was spent", "another amount"],
)
def test_refuse_a_correction(play: Play, arguments: dict[str, Any], error: type, mend: str) -> None:
    """What corrects nothing, gives back what was never spent, or contradicts itself is refused."""

    async def scene(books: Books) -> None:
        await books.metering.correct("ann", 5, id="up")
        with pytest.raises(error, match=mend):
            await books.metering.correct("ann", **{"id": "new", **arguments})
        assert await books.sums() == (5, 0, 0, 95)

    play(scene)


def test_backfill_work_that_is_done(play: Play) -> None:
    """Imported work is charged once per id, into debt where nothing is left."""

    async def scene(books: Books) -> None:
        for applied in (True, False):
            posting = await books.metering.backfill("ann", 120, id="batch-7", line="search", actor="import")
            assert (posting.applied, posting.amount) == (applied, 120 * CREDIT)
        assert await books.sums() == (120, 0, 20, -20)
        (line,) = await books.lines(EntryKind.BACKFILL)
        assert (line.line, line.actor, line.ref) == ("search", "import", "batch-7")
        with pytest.raises(AmountError, match="moves nothing"):
            await books.metering.backfill("ann", 0, id="batch-8", line="search")

    play(scene)


def test_take_a_grant_back(play: Play) -> None:
    """What is free of it goes, what was spent becomes debt, once; what is unknown is refused."""

    async def scene(books: Books) -> None:
        await books.charge(30)
        posting = await books.metering.reverse_grant("ann", "paid", id="chargeback", actor="bank")
        assert (posting.amount, posting.available) == (-100 * CREDIT, -30 * CREDIT)
        assert await books.sums() == (30, 0, 30, -30)
        assert (await books.metering.reverse_grant("ann", "paid", id="chargeback")).applied is False
        with pytest.raises(ConfigurationError, match="taken back already"):
            await books.metering.reverse_grant("ann", "paid", id="another")
        with pytest.raises(ConfigurationError, match="has no grant 'other'"):
            await books.metering.reverse_grant("ann", "other", id="x")

    play(scene)


# -- holds -------------------------------------------------------------------------------------------------


def test_resolve_by_a_person_stands(play: Play) -> None:
    """What a person decides is charged; the call's own end, later, is recorded and charges nothing (DESIGN 4)."""

    async def scene(books: Books) -> None:
        metering = books.metering
        async with metering.charge(payer="ann", line="search", price=30) as call:
            receipt = await metering.resolve(call.id, charge="12.5")
            assert (receipt.applied, receipt.amount, receipt.ended_by) == (True, 12_500_000, EndedBy.PERSON)
        assert call.receipt is not None
        assert (call.receipt.applied, call.receipt.amount, call.receipt.late) == (False, 12_500_000, 0)
        again = await metering.resolve(call.id)
        assert (again.applied, again.amount) == (False, 12_500_000)
        assert (await metering.balance("ann")).settled == 12_500_000
        assert await books.lines(EntryKind.LATE) == []

    play(scene)


def test_resolve_with_nothing_to_charge(play: Play) -> None:
    """Without a charge everything is given back; an unknown call is refused."""

    async def scene(books: Books) -> None:
        await books.metering.decide(Admit("c", "ann", "credits", 5, 5, (WalletSource(),)))
        assert (await books.metering.resolve("c")).amount == 0
        assert await books.metering.holds() == []
        assert await books.sums() == (0, 0, 0, 100)
        with pytest.raises(UnknownHoldError, match="No hold of call 'x' is kept"):
            await books.metering.resolve("x")

    play(scene)


def test_resolve_in_the_unit_of_the_call(play: Play) -> None:
    """A charge in another unit than the metering's needs that unit, and its mend can be followed."""

    async def scene(books: Books) -> None:
        await books.metering.grant("ann", 9, id="m", unit=MESSAGES)
        await books.metering.decide(Admit("c", "ann", "messages", 5, 5, (WalletSource(),)))
        with pytest.raises(ConfigurationError, match="Pass its unit"):
            await books.metering.resolve("c", charge=1)
        assert (await books.metering.resolve("c", charge=1, unit=MESSAGES)).amount == 1

    play(scene)


def test_reconcile_what_is_overdue(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds whose grace is over end by their policies, however many live ones stand before them."""
    monkeypatch.setattr("asgi_metering.ledger.LOOKED_AT", 2)

    async def scene(books: Books) -> None:
        metering = books.metering
        for number in range(4):
            await metering.decide(Admit(f"long{number}", "ann", "credits", 1, 1, (WalletSource(),), ttl_s=9_999.0))
        for number in range(3):
            await metering.decide(Admit(f"dead{number}", "ann", "credits", 5, 5, (WalletSource(),), ttl_s=10.0))
        books.clock.advance(39)
        assert await metering.reconcile() == []
        books.clock.advance(2)
        assert sorted(await metering.reconcile(limit=2)) == ["dead0", "dead1", "dead2"]
        assert await metering.reconcile() == []
        assert [hold.id for hold in await metering.holds()] == ["long0", "long1", "long2", "long3"]

    play(scene)


# -- units -------------------------------------------------------------------------------------------------


def test_refuse_a_unit_of_another_scale_at_the_start(make: Callable[[FakeClock], Store]) -> None:
    """A metering that counts a known unit with other digits does not start: every amount would be off."""

    async def scene() -> None:
        async with opened(make) as books:
            other = Metering(make(books.clock), unit=Unit("credits", 2), sinks=())
            with pytest.raises(ConfigurationError, match=r"counted with 6 digits .* given with 2"):
                await other.start()
            await other.stop()

    asyncio.run(scene())


def test_refuse_a_unit_of_another_scale_at_a_grant(make: Callable[[FakeClock], Store]) -> None:
    """Neither does it grant in such a unit that it meets later."""

    async def scene() -> None:
        async with opened(make) as books:
            await books.metering.grant("ann", 9, id="m", unit=MESSAGES)
            async with Metering(make(books.clock), sinks=()) as other:
                with pytest.raises(ConfigurationError, match="'messages' is counted with 0 digits"):
                    await other.grant("ann", 9, id="n", unit=Unit("messages", 3))
            assert (await books.metering.balance("ann", unit=MESSAGES)).granted == 9

    asyncio.run(scene())


# -- what is told ------------------------------------------------------------------------------------------


def test_postings_are_told_to_sinks(make: Callable[[FakeClock], Store], impatient: None) -> None:
    """Each posting is an event with its sign; a refund names the call that it takes from."""

    async def scene() -> None:
        async with opened(make, sinks=[Unheard()]) as books:
            metering = books.metering
            call = await books.charge(30)
            await metering.refund(call, id="r", amount=10)
            await metering.correct("ann", 2, id="c", give_back=True, line="search")
            done = datetime(2024, 10, 1, tzinfo=UTC)
            await metering.backfill("ann", 4, id="b", line="import", occurred_at=done)
            events = {event.id: event for event in await books.told()}
            ids = [call, f"{call}:refund:r", "ann:credits:correction:c", "ann:credits:backfill:b"]
            assert list(events) == ids
            assert [events[each].amount // CREDIT for each in ids] == [30, -10, -2, 4]
            assert [events[each].line for each in ids] == ["search", "search", "search", "import"]
            assert events[ids[1]].attributes == {"metering.corrects": call}
            assert [events[each].reason for each in ids[1:]] == ["posted"] * 3
            assert events[ids[3]].started_at == done.timestamp()
            assert UsageEvent.from_dict(events[ids[1]].to_dict()) == events[ids[1]]

    asyncio.run(scene())


def test_a_persons_end_is_told_with_what_was_not_charged(make: Callable[[FakeClock], Store], impatient: None) -> None:
    """The late end of a call that a person resolved is an event of 0 that says what it would have cost."""

    async def scene() -> None:
        async with opened(make, sinks=[Unheard()]) as books:
            async with books.metering.charge(payer="ann", line="search", price=30) as call:
                await books.metering.resolve(call.id)
            decided, late = await books.told()
            assert (decided.id, decided.amount, decided.reason) == (call.id, 0, "resolved")
            assert (late.id, late.amount, late.attributes["uncharged_amount"]) == (f"{call.id}:late", 0, 30 * CREDIT)

    asyncio.run(scene())


def test_what_is_said_of_a_posting_fits_an_event() -> None:
    """The words for postings are fields that an event has."""
    event = {"line": "l", "payer": "p", "unit": "u", "outcome": "corrected", "basis": "usage", **POSTED}
    stored = {"id": "x", "amount": -1, "started_at": 0.0, "ended_at": 0.0, **event}
    assert UsageEvent.from_dict(stored).reason == POSTED["reason"]


@pytest.mark.parametrize("moment", [datetime(2024, 1, 1), "noon", True, -1], ids=repr)
def test_refuse_a_moment_without_a_zone(moment: Any) -> None:
    """When work was done is an aware datetime or epoch seconds."""
    metering = Metering("memory://", sinks=())
    with pytest.raises(ConfigurationError, match="occurred_at"):
        asyncio.run(metering.backfill("ann", 1, id="b", line="l", occurred_at=moment))


def test_balances_in_every_unit(play: Play) -> None:
    """A payer's balances are told for each unit that is known here, zeros where there is nothing."""

    async def scene(books: Books) -> None:
        await books.metering.grant("bob", 2, id="m", unit=MESSAGES)
        found = await books.metering.balances("bob")
        assert {name: balance.granted for name, balance in found.items()} == {"credits": 0, "messages": 2}

    play(scene)


def test_balance_shows_what_is_left_of_grants(play: Play) -> None:
    """A balance names the grants that are not used up, as they burn, and when they lapse (DESIGN 2)."""

    async def scene(books: Books) -> None:
        metering, start = books.metering, books.clock()
        await metering.grant("ann", 7, id="gift", priority=-1, kind="promotional", expires_at=start + DAY_S)
        await metering.grant("ann", 3, id="later", effective_at=start + 2 * DAY_S)
        await metering.grant("ann", 1, id="spent", priority=-2)
        await books.charge(2)
        async with metering.charge(payer="ann", line="search", price=4):
            found = await metering.balance("ann")
        gift = ("gift", "promotional", 7 * CREDIT, 2 * CREDIT, 4 * CREDIT, -1, start, start + DAY_S)
        paid = ("paid", "purchased", 100 * CREDIT, 100 * CREDIT, 0, 0, start, None)
        later = ("later", "purchased", 3 * CREDIT, 3 * CREDIT, 0, 0, start + 2 * DAY_S, None)
        assert found.grants == (gift, paid, later)
        assert sum(grant.left for grant in found.grants[:2]) == found.available
        books.clock.advance(DAY_S)
        assert [grant.id for grant in (await metering.balance("ann")).grants] == ["paid", "later"]
        assert (await metering.balance("nobody")).grants == ()

    play(scene)


def test_balance_shows_what_was_used_of_allowances(play: Play) -> None:
    """A balance tells what was used of the windows that run, and when they begin anew (DESIGN 2)."""

    async def scene(books: Books) -> None:
        metering = books.metering
        daily = [Allowance(5, name="daily")]
        assert (await metering.balance("ann")).allowances == ()
        await books.charge(2, sources=daily)
        async with metering.charge(payer="ann", line="search", price=1, sources=daily):
            (window,) = (await metering.balance("ann")).allowances
        (status,) = await metering.allowances("ann", sources=daily)
        assert window == ("daily", 2 * CREDIT, CREDIT, status.starts_at, status.resets_at)
        books.clock.advance(DAY_S)
        assert (await metering.balance("ann")).allowances == ()

    play(scene)


def test_charge_nobody_for_a_call_that_nobody_pays(play: Play) -> None:
    """A call that has a slot alone belongs to no account: a person can end it, and charge nobody for it."""

    async def scene(books: Books) -> None:
        metering = books.metering
        await metering.decide(Admit("slot", "", "credits", 0, 0, leases=(LeaseAsk("jobs", "jobs", 1),)))
        with pytest.raises(ConfigurationError, match=r"'slot' was limited and has no payer .* Leave out charge="):
            await metering.resolve("slot", charge=1)
        assert (await metering.resolve("slot")).applied
        assert await metering.holds() == []

    play(scene)


# -- what cannot be written down ---------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, 5, "a\nb", "\ud800", "x" * 256], ids=["none", "int", "line", "half", "long"])
def test_refuse_what_is_no_text_of_a_statement(play: Play, text: Any) -> None:
    """What a statement cannot show is refused before any store is asked, and moves nothing (DESIGN 10)."""

    async def scene(books: Books) -> None:
        metering = books.metering
        call = await books.charge(1)
        before = await metering.balance("ann")
        attempts: list[Callable[[], Awaitable[Any]]] = [
            lambda: metering.grant("ann", 1, id="x", actor=text),
            lambda: metering.grant("ann", 1, id="x", kind=text),
            lambda: metering.reverse_grant("ann", "paid", id="x", actor=text),
            lambda: metering.refund(call, id="x", actor=text),
            lambda: metering.correct("ann", 1, id="x", actor=text),
            lambda: metering.correct("ann", 1, id="x", line=text),
            lambda: metering.backfill("ann", 1, id="x", line="l", actor=text),
            lambda: metering.backfill("ann", 1, id="x", line=text),
        ]
        for attempt in attempts:
            with pytest.raises(ConfigurationError, match=r"is not a str of at most 255 printable characters\. Shorten"):
                await attempt()
        assert await metering.balance("ann") == before

    play(scene)


def test_refuse_a_priority_that_stores_cannot_order(play: Play) -> None:
    """A priority beyond 32 bits is refused: not every store would keep it, or order it exactly."""

    async def scene(books: Books) -> None:
        wrong: tuple[Any, ...] = (2**31, -(2**31), 2**70, True, "1", 1.0)
        for priority in wrong:
            with pytest.raises(ConfigurationError, match=r"is not an int from -2147483647 to 2147483647\. Use a small"):
                await books.metering.grant("ann", 1, id="x", priority=priority)

    play(scene)


def test_refuse_a_bound_that_is_no_count(play: Play) -> None:
    """What bounds a list or a batch, and where a statement goes on, is a count."""

    async def scene(books: Books) -> None:
        metering = books.metering
        wrong: tuple[Any, ...] = (-1, "x", None, 1.5, True)
        for count in wrong:
            for attempt in (metering.holds, metering.reconcile):
                with pytest.raises(ConfigurationError, match=r"limit=.* is not an int from 1 up\. Pass one"):
                    await attempt(count)
            with pytest.raises(ConfigurationError, match=r"after=.* is not an int from 0 up\. Pass one"):
                _ = [line async for line in metering.statement("ann", after=count)]

    play(scene)
