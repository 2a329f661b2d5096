"""What a store must do about the past: refunds, corrections, backfills, reversals, and lines that are folded away."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from typing import Any

from asgi_metering.errors import AmountError, ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import Basis, EntryKind, Posting
from asgi_metering.rules.operations import Backfill, Correct, Declare, End, Refund, Renew, ReverseGrant, Sweep
from asgi_metering.stores.contract import AccountRows, LinesOf
from asgi_metering.testing.conformance.scene import DAY_S, GRACE_S, LIFE_S, PAYER, UNIT, Scene, Suite, scenario

__all__ = ["Correcting", "Folding"]

KEPT_S = 3_600.0


async def charged(scene: Scene, call_id: str, held: int, amount: int, **more: Any) -> None:
    """A call that has ended."""
    await scene.admit(call_id, held, **more)
    await scene.settle(call_id, amount)


def outcome(posting: Posting) -> tuple[int, int, int, int]:
    """(amount, returned, lapsed, available) of a posting."""
    return posting.amount, posting.returned, posting.lapsed, posting.available


def refund(call_id: str, amount: int | None = None, posting: str = "refund_1", **more: Any) -> Refund:
    """The operation that refunds a call of the payer."""
    return Refund(posting, call_id, PAYER, UNIT, amount, "ann", **more)


class Correcting(Suite):
    """What is changed about the past, each as a line of its own."""

    @scenario
    async def test_refund_goes_back_to_its_sources(self, scene: Scene) -> None:
        """A refund goes back to where the charge came from, the last part first, as a line that names the call."""
        for grant_id in ("grant_1", "grant_2"):
            await scene.grant(10, grant_id)
        await charged(scene, "a", 20, 18)
        assert outcome(await scene.one(refund("a", 11))) == (-11, 11, 0, 13)
        assert [(await scene.grant_row(f"grant_{n}")).settled for n in (1, 2)] == [7, 0]
        line = (await scene.entries())[-1]
        assert (line.kind, line.amount, line.ref, line.id, line.actor) == (
            EntryKind.REFUND,
            -11,
            "a",
            "refund_1",
            "ann",
        )

    @scenario
    async def test_refund_twice(self, scene: Scene) -> None:
        """A refund counts once per id; another amount under it is a conflict; further ones give what is left."""
        await scene.grant(100)
        await charged(scene, "a", 30, 30)
        await scene.one(refund("a", 20))
        async with scene.nothing_changes():
            again = await scene.one(refund("a", 20))
            answers = await scene.run(refund("a", 21), refund("a", 11, "refund_2"), refund("nobody", 1, "refund_2"))
        assert (again.applied, again.amount) == (False, -20)
        assert [type(answer) for answer in answers] == [IdempotencyConflictError, AmountError, ConfigurationError]
        assert (await scene.one(refund("a", None, "refund_2"))).amount == -10

    @scenario
    async def test_refund_in_the_sequence_of_its_call(self, scene: Scene) -> None:
        """A refund finds the lines that the same sequence has just written."""
        await scene.grant(100)
        ask, settled = scene.ask("a", 30), End("a", 30, Basis.USAGE)
        *_, first, second = await scene.run(ask, settled, refund("a", 10), refund("a", None, "refund_2"))
        assert (first.amount, second.amount) == (-10, -20)

    @scenario
    async def test_refund_to_an_expired_grant(self, scene: Scene) -> None:
        """What comes back to an expired grant lapses with it, and the refund tells both."""
        await scene.grant(10, expires_in_s=30)
        await scene.grant(10, "grant_2")
        await charged(scene, "a", 15, 15)
        scene.clock.advance(30)
        assert outcome(await scene.one(refund("a"))) == (-15, 5, 10, 10)
        account = await scene.account()
        assert (account.settled, account.expired) == (0, 10)

    @scenario
    async def test_refund_to_an_allowance(self, scene: Scene) -> None:
        """What an allowance paid is free in its window again; of a window that is over it is gone (S0.11)."""
        await charged(scene, "a", 20, 20, sources=[scene.allowance(50)])
        assert outcome(await scene.one(refund("a", 5)))[:3] == (-5, 5, 0)
        scene.clock.advance(DAY_S)
        assert outcome(await scene.one(refund("a", 5, "refund_2")))[:3] == (-5, 0, 5)
        assert await scene.settled_and_held() == [(10, 0)]

    @scenario
    async def test_refund_a_debt_that_was_paid_since(self, scene: Scene) -> None:
        """A charge in debt that later grants have paid goes back to grants, spent ones included."""
        await scene.grant(10)
        await charged(scene, "a", 10, 40)
        await scene.grant(30, "grant_2")
        await scene.grant(5, "grant_3")
        assert outcome(await scene.one(refund("a")))[3] == 45
        assert (await scene.account()).settled == 0

    @scenario
    async def test_late_end_after_a_refund(self, scene: Scene) -> None:
        """A late end gives nothing back that a refund has given back already."""
        await scene.grant(100)
        await scene.admit("a", 40, in_doubt=Basis.HOLD)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        await scene.one(refund("a", 30))
        assert (await scene.settle("a", 4)).late == -10
        assert (await scene.account()).settled == 0

    @scenario
    async def test_refund_tells_its_event(self, scene: Scene) -> None:
        """A refund writes its event in the same step, with its sign and the call that it corrects."""
        await scene.grant(100)
        await charged(scene, "a", 30, 30)
        await scene.one(refund("a", 10, event={"reason": "outage"}))
        (told,) = await scene.events()
        assert (told["id"], told["amount"], told["event_of"], told["reason"]) == (
            "a:refund:refund_1",
            -10,
            "a",
            "outage",
        )

    @scenario
    async def test_correct_an_account(self, scene: Scene) -> None:
        """A correction charges more, as debt if need be, or gives back, and never more than was spent; once per id."""
        await scene.grant(10)
        more, less = Correct("more", PAYER, UNIT, 25), Correct("less", PAYER, UNIT, -20)
        assert outcome(await scene.one(more)) == (25, 0, 0, -15)
        assert outcome(await scene.one(less)) == (-20, 20, 0, 5)
        async with scene.nothing_changes():
            assert not (await scene.one(more)).applied
            answers = await scene.run(less._replace(amount=-5), Correct("too much", PAYER, UNIT, -6))
        assert [type(answer) for answer in answers] == [IdempotencyConflictError, AmountError]

    @scenario
    async def test_backfill_work(self, scene: Scene) -> None:
        """Work without an admission is charged in full, once per id, and is refunded by it."""
        await scene.grant(10)
        ask = Backfill("batch", PAYER, UNIT, 25, "nightly")
        assert outcome(await scene.one(ask)) == (25, 0, 0, -15)
        async with scene.nothing_changes():
            assert not (await scene.one(ask)).applied
        assert outcome(await scene.one(refund("batch"))) == (-25, 25, 0, 10)

    @scenario
    async def test_take_a_grant_back(self, scene: Scene) -> None:
        """What is free of a reversed grant goes, what was spent is owed, what is held lapses when it comes back."""
        await scene.grant(100)
        await charged(scene, "a", 30, 30)
        await scene.admit("b", 20)
        ask = ReverseGrant("chargeback", "grant_1", PAYER, UNIT, "ann")
        assert outcome(await scene.one(ask)) == (-80, 0, 0, -30)
        await scene.settle("b", 15)
        account = await scene.account()
        assert (account.granted, account.settled, account.expired, account.debt) == (20, 45, 5, 30)
        async with scene.nothing_changes():
            assert not (await scene.one(ask)).applied
            assert not (await scene.grant(100)).applied
            (answer,) = await scene.run(ask._replace(id="again"))
            assert isinstance(answer, ConfigurationError)

    @scenario
    async def test_take_a_grant_back_from_others(self, scene: Scene) -> None:
        """What a reversal leaves owing is paid at once by what other grants have free."""
        await scene.grant(20)
        await charged(scene, "a", 20, 20)
        await scene.grant(50, "grant_2")
        assert outcome(await scene.one(ReverseGrant("chargeback", "grant_1", PAYER, UNIT)))[3] == 30
        assert (await scene.account()).debt == 0

    @scenario
    async def test_declare_units(self, scene: Scene) -> None:
        """A unit keeps the scale of its first use: another one is refused, with all that was declared beside it."""
        assert await scene.one(Declare(((UNIT, 6), ("usd", 0)))) == 2
        async with scene.nothing_changes():
            assert await scene.one(Declare(((UNIT, 6),))) == 0
            (answer,) = await scene.run(Declare((("new", 1), ("usd", 2))))
        assert isinstance(answer, ConfigurationError)


class Folding(Suite):
    """Ledger lines that are old: they fold into a checkpoint, and the books still prove themselves."""

    @scenario
    async def test_fold_old_lines(self, scene: Scene) -> None:
        """Lines of that age fold into the account's checkpoint, younger ones stay as they are."""
        await scene.grant(100)
        await charged(scene, "a", 30, 30)
        await scene.one(refund("a", 10))
        scene.clock.advance(KEPT_S)
        await charged(scene, "b", 30, 5)
        await scene.one(Sweep(keep_entries_s=KEPT_S))
        rows = (await scene.store.read(AccountRows(PAYER, UNIT))).state
        checkpoint = rows.checkpoints[PAYER, UNIT]
        assert (checkpoint.number, checkpoint.sums) == (3, {"given": 100, "settled": 20})
        assert [line.number for line in await scene.entries()] == [4]
        async with scene.nothing_changes():
            await scene.one(Sweep(keep_entries_s=KEPT_S))
        scene.clock.advance(KEPT_S)
        await scene.one(Sweep(keep_entries_s=KEPT_S))
        assert await scene.entries() == []
        await scene.one(Backfill("batch", PAYER, UNIT, 1))
        assert [line.number for line in await scene.entries()] == [5]

    @scenario
    async def test_fold_a_few_lines_at_a_time(self, scene: Scene) -> None:
        """A sweep folds at most so many lines of an account; further ones do the rest."""
        for number in range(5):
            await scene.grant(1, f"grant_{number}")
        scene.clock.advance(KEPT_S)
        left = []
        for _ in range(3):
            await scene.one(Sweep(2, keep_entries_s=KEPT_S))
            left.append(len(await scene.entries()))
        assert left == [3, 1, 0]

    @scenario
    async def test_read_the_lines_of_a_call(self, scene: Scene) -> None:
        """The lines about one call are found by its id, oldest first; folded ones are gone, their refunds with them."""
        await scene.grant(100)
        await charged(scene, "a", 30, 30)
        await charged(scene, "b", 30, 30)
        await scene.one(refund("a", 10))
        found = (await scene.store.read(LinesOf(PAYER, UNIT, "a"))).state.entries[PAYER, UNIT]
        assert [(line.kind, line.amount) for line in found] == [(EntryKind.SETTLE, 30), (EntryKind.REFUND, -10)]
        scene.clock.advance(KEPT_S)
        await scene.one(Sweep(keep_entries_s=KEPT_S))
        async with scene.nothing_changes():
            (answer,) = await scene.run(refund("b"))
        assert isinstance(answer, ConfigurationError)
        assert (await scene.store.read(LinesOf(PAYER, UNIT, "a"))).state.entries[PAYER, UNIT] == []

    @scenario
    async def test_forget_windows_that_are_past(self, scene: Scene) -> None:
        """An allowance window stays that long after its end, and as long as a call holds some of it."""
        for call_id in ("a", "b"):
            await scene.admit(call_id, 20, sources=[scene.allowance(50, call_id)])
        await scene.settle("a", 20)
        scene.clock.advance(2 * DAY_S)
        keep = Sweep(keep_windows_s=DAY_S)
        await scene.one(Renew("b"))
        await scene.one(keep)
        assert [window.name for window in (await scene.state()).allowances.values()] == ["b"]
        await scene.settle("b", 20)
        await scene.one(keep)
        assert (await scene.state()).allowances == {}
