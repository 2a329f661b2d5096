"""What a store must do about grants, about time, and about what is old."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from asgi_metering.errors import ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.operations import End, LeaseAsk, PostGrant, Renew, Sweep, WindowKind
from asgi_metering.testing.conformance.scene import GRACE_S, LIFE_S, PAYER, UNIT, Scene, Suite, scenario, tables

__all__ = ["Granting", "Passing"]

KEPT_S = 3_600.0


class Granting(Suite):
    """Units given, begun, lapsed, and debt."""

    @scenario
    async def test_grant_twice(self, scene: Scene) -> None:
        """A grant counts once per id: a repeat answers what it did and changes nothing."""
        first = await scene.grant(100)
        async with scene.nothing_changes():
            again = await scene.grant(100)
        assert (first.applied, first.available) == (True, 100)
        assert (again.applied, again.amount, again.available) == (False, 100, 100)

    @scenario
    async def test_grant_twice_once_it_is_spent(self, scene: Scene) -> None:
        """A spent grant is still known by its id: a repeat that comes late gives nothing."""
        await scene.grant(100)
        await scene.admit("a", 100)
        await scene.settle("a", 100)
        async with scene.nothing_changes():
            assert not (await scene.grant(100)).applied

    @scenario
    async def test_grant_the_same_id_with_another_body(self, scene: Scene) -> None:
        """Another grant under a known id is a mistake that names the first field that differs."""
        await scene.grant(100)
        async with scene.nothing_changes():
            (amount, kind) = await scene.run(
                PostGrant("grant_1", PAYER, UNIT, 200, 5), PostGrant("grant_1", PAYER, UNIT, 100, kind="gift")
            )
        assert isinstance(amount, IdempotencyConflictError)
        assert isinstance(kind, IdempotencyConflictError)
        assert (amount.field, kind.field) == ("amount", "kind")

    @scenario
    async def test_grant_the_same_id_to_another_payer(self, scene: Scene) -> None:
        """Grant ids belong to their account: another payer's grant of the same id is another grant."""
        await scene.grant(100)
        assert (await scene.grant(50, payer="org_8")).applied
        assert (await scene.account("org_8")).available == 50

    @scenario
    async def test_grant_that_never_lives(self, scene: Scene) -> None:
        """A grant that would lapse before it begins is a mistake, and changes nothing."""
        now = scene.clock()
        async with scene.nothing_changes():
            (answer,) = await scene.run(PostGrant("g", PAYER, UNIT, 10, effective_at=now + 20, expires_at=now + 20))
        assert isinstance(answer, ConfigurationError)

    @scenario
    async def test_grant_that_begins_later(self, scene: Scene) -> None:
        """A grant that begins later counts from its instant on, without anybody's doing."""
        assert (await scene.grant(100, begins_in_s=60)).available == 0
        assert not (await scene.admit("a", 1)).admitted
        scene.clock.advance(60)
        assert (await scene.admit("b", 100)).admitted

    @scenario
    async def test_grant_lapses_by_time(self, scene: Scene) -> None:
        """What is free of a grant lapses at its expiry, and the ledger says so."""
        await scene.grant(100, expires_in_s=60)
        await scene.admit("a", 30)
        await scene.settle("a", 30)
        scene.clock.advance(60)
        assert not (await scene.admit("b", 1)).admitted
        await scene.grant(5, "grant_2")
        account = await scene.account()
        assert (account.settled, account.expired, account.available) == (30, 70, 5)
        kinds = [(line.kind, line.amount) for line in await scene.entries()]
        assert kinds[2:] == [(EntryKind.EXPIRE, 70), (EntryKind.GRANT, 5)]

    @scenario
    async def test_grant_expires_under_a_hold(self, scene: Scene) -> None:
        """Units held before their grant's expiry stay spendable by that hold; what it gives back lapses."""
        await scene.grant(100, expires_in_s=30)
        await scene.admit("a", 100)
        scene.clock.advance(30)
        receipt = await scene.settle("a", 60)
        assert (receipt.amount, receipt.available) == (60, 0)
        account = await scene.account()
        assert (account.settled, account.expired, account.debt) == (60, 40, 0)

    @scenario
    async def test_late_return_to_an_expired_grant(self, scene: Scene) -> None:
        """What a late end gives back to a grant that has expired since lapses with it."""
        await scene.grant(100, expires_in_s=200)
        await scene.admit("a", 100, in_doubt=Basis.HOLD)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        scene.clock.advance(200)
        await scene.settle("a", 60)
        account = await scene.account()
        assert (account.settled, account.expired, account.available) == (60, 40, 0)

    @scenario
    async def test_grant_pays_debt_first(self, scene: Scene) -> None:
        """A new grant pays the debt before it can be spent, as a line of its own that names the grant."""
        await scene.grant(10)
        await scene.admit("a", 10)
        await scene.settle("a", 40)
        receipt = await scene.grant(100, "grant_2")
        assert (receipt.paid_debt, receipt.available) == (30, 70)
        line = (await scene.entries())[-1]
        assert (line.kind, line.amount, line.ref) == (EntryKind.DEBT_PAYMENT, 30, "grant_2")
        assert (await scene.account()).debt == 0

    @scenario
    async def test_grant_below_the_debt(self, scene: Scene) -> None:
        """A grant smaller than the debt is used up by it, and the account stays negative."""
        await scene.grant(10)
        await scene.admit("a", 10)
        await scene.settle("a", 40)
        receipt = await scene.grant(20, "grant_2")
        assert (receipt.paid_debt, receipt.available) == (20, -10)
        assert not (await scene.admit("b", 1)).admitted

    @scenario
    async def test_ledger_counts_without_gaps(self, scene: Scene) -> None:
        """The lines of an account are numbered 1, 2, 3, and their sums are the account's."""
        await scene.grant(100, expires_in_s=600)
        for call, (held, charged) in enumerate([(10, 4), (20, 20), (5, 9)]):
            await scene.admit(f"a{call}", held)
            await scene.settle(f"a{call}", charged)
        scene.clock.advance(600)
        await scene.grant(50, "grant_2")
        lines = await scene.entries()
        account = await scene.account()
        assert [line.number for line in lines] == list(range(1, account.entries + 1))
        sums = {kind: sum(line.amount for line in lines if line.kind is kind) for kind in EntryKind}
        assert sums[EntryKind.GRANT] == account.granted
        assert sums[EntryKind.SETTLE] == account.settled
        assert sums[EntryKind.EXPIRE] == account.expired
        assert lines[-1].available == account.available


class Passing(Suite):
    """Time that passes, time that steps back, and what is forgotten."""

    @scenario
    async def test_clock_steps_back(self, scene: Scene) -> None:
        """A clock that steps back opens no window again, revives no grant, and dates nothing before the last line."""
        limits = [scene.limit(WindowKind.FIXED, 1), scene.limit(WindowKind.CALENDAR, 1, name="daily")]
        await scene.grant(100, expires_in_s=30)
        await scene.grant(50, "grant_2")
        scene.clock.advance(40)
        assert (await scene.admit("a", 10, limits=limits)).admitted
        latest = scene.clock()
        scene.clock.advance(-39)
        async with scene.nothing_changes():
            assert (await scene.admit("b", 41)).now == latest
            assert not (await scene.admit("c", 1, limits=limits)).admitted
        await scene.settle("a", 10)
        lines = await scene.entries()
        assert [line.at for line in lines] == sorted(line.at for line in lines)
        assert (await scene.account()).available == 40

    @scenario
    async def test_log_and_bucket_when_the_clock_steps_back(self, scene: Scene) -> None:
        """A clock that steps back takes nothing out of a log or a bucket, nor puts anything in."""
        log, bucket = (
            scene.limit(WindowKind.MOVING, 3, name="log"),
            scene.limit(WindowKind.BUCKET, 4, name="bucket", refill=1),
        )
        await scene.admit("a", limits=[log, bucket._replace(cost=3)])
        scene.clock.advance(60)
        await scene.admit("b", limits=[log, bucket])
        scene.clock.advance(-59)
        looked = (await scene.admit("c", limits=[log, bucket])).windows
        assert [window.remaining for window in looked] == [0, 0]
        async with scene.nothing_changes():
            refusals = [(await scene.admit("d", limits=[limit])).refusal for limit in (log, bucket)]
        waits = [refusal.retry_after_s or 0.0 for refusal in refusals if refusal is not None]
        assert [round(wait, 5) for wait in waits] == [59.0, 119.0]

    @scenario
    async def test_sliding_window_when_the_clock_steps_back(self, scene: Scene) -> None:
        """A sliding window that a stepped-back clock has not reached yet goes on counting where it was."""
        limits = [scene.limit(WindowKind.SLIDING, 2)]
        scene.clock.advance(60)
        await scene.admit("a", limits=limits)
        scene.clock.advance(-30)
        assert [(await scene.admit(call, limits=limits)).admitted for call in ("b", "c")] == [True, False]

    @scenario
    async def test_sweep_an_empty_store(self, scene: Scene) -> None:
        """A sweep that finds nothing does nothing."""
        async with scene.nothing_changes():
            assert await scene.one(Sweep()) == 0

    @scenario
    async def test_sweep_leaves_what_lives(self, scene: Scene) -> None:
        """A sweep touches no live call, no running window and no ended call that is still kept."""
        await scene.grant(100)
        await scene.admit("a", 10, limits=[scene.limit(WindowKind.FIXED, 5)], leases=[LeaseAsk("at once", "pool", 5)])
        await scene.admit("b", 10)
        await scene.settle("b", 10, event={})
        async with scene.nothing_changes():
            await scene.one(Sweep(keep_holds_s=KEPT_S))

    @scenario
    async def test_sweep_a_few_at_a_time(self, scene: Scene) -> None:
        """A sweep ends and forgets at most as many of a kind as it was asked to; further sweeps do the rest."""
        await scene.grant(100)
        leases, limit = [LeaseAsk("at once", "pool", 9)], scene.limit(WindowKind.FIXED, 5)
        for call in range(5):
            await scene.admit(f"a{call}", 10, leases=leases, limits=[limit._replace(key=f"key {call}")])
        scene.clock.advance(LIFE_S + GRACE_S + 60.0)
        left = []
        for _ in range(3):
            await scene.one(Sweep(limit=2))
            kept = tables(await scene.state())
            left.append((len(kept["live"]), len(kept["counter"])))
        assert left == [(3, 3), (1, 1), (0, 0)]
        assert kept["lease"] == {}
        assert (await scene.account()).available == 100

    @scenario
    async def test_sweep_forgets_old_calls(self, scene: Scene) -> None:
        """An ended call is kept as long as a late end may come, and not longer; its ledger line stays."""
        await scene.grant(100)
        await scene.admit("a", 10)
        await scene.settle("a", 10)
        scene.clock.advance(KEPT_S - 1)
        await scene.one(Sweep(keep_holds_s=KEPT_S))
        assert not (await scene.settle("a", 10)).applied
        assert (await scene.settle("a", 10)).known
        scene.clock.advance(1)
        await scene.one(Sweep(keep_holds_s=KEPT_S))
        assert not (await scene.settle("a", 10)).known
        assert len(await scene.entries()) == 2

    @scenario
    async def test_sweep_forgets_windows_that_are_past(self, scene: Scene) -> None:
        """A counter goes when its window, and the one that it weighs in as the past, are over."""
        await scene.admit("a", limits=[scene.limit(WindowKind.FIXED, 5)])
        scene.clock.advance(119)
        await scene.one(Sweep())
        assert len((await scene.state()).counters) == 1
        scene.clock.advance(1)
        await scene.one(Sweep())
        assert (await scene.state()).counters == {}

    @scenario
    async def test_sweep_ends_the_calls_of_every_account(self, scene: Scene) -> None:
        """A sweep ends what is overdue in accounts that nobody asks about any more."""
        for payer in ("org_1", "org_2", "org_3"):
            await scene.grant(10, payer=payer)
            await scene.admit(f"call of {payer}", 10, payer=payer)
            await scene.one(Renew(f"call of {payer}", 4))
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        available = [account.available for account in (await scene.state()).accounts.values()]
        assert available == [6, 6, 6]

    @scenario
    async def test_sweep_and_a_call_in_one_sequence(self, scene: Scene) -> None:
        """What a sweep ends is free for the call behind it in the same sequence."""
        await scene.grant(100)
        await scene.admit("a", 100)
        scene.clock.advance(LIFE_S + GRACE_S)
        _, decision, late = await scene.run(Sweep(), scene.ask("b", 100), End("a", 100, Basis.USAGE))
        assert decision.admitted
        assert late.late == 100
        assert (await scene.account()).debt == 100
