"""What a store must do when a call ends: by itself, by its policy, by a person, too late, or twice."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from asgi_metering.receipts import Basis, EndedBy, EntryKind, Source
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import End, Renew, Sweep, WalletSource
from asgi_metering.testing.conformance.scene import GRACE_S, LIFE_S, PAYER, UNIT, Scene, Suite, scenario

__all__ = ["Doubting", "Ending"]


class Ending(Suite):
    """Settling and releasing, once."""

    @scenario
    async def test_settle_less_than_held(self, scene: Scene) -> None:
        """A charge below the hold is spent, and the rest is available again."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipt = await scene.settle("a", 12)
        assert (receipt.applied, receipt.amount, receipt.held, receipt.available) == (True, 12, 30, 88)
        account = await scene.account()
        assert (account.settled, account.held, account.available) == (12, 0, 88)
        hold = await scene.hold("a")
        assert (hold.state, hold.receipt) == (HoldState.SETTLED, receipt)

    @scenario
    async def test_settle_writes_one_ledger_line(self, scene: Scene) -> None:
        """A charge is one line of the ledger: what, for which call, on what basis, from where, and what is left."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipt = await scene.settle("a", 12, estimated=True)
        line = (await scene.entries())[-1]
        assert (line.number, line.kind, line.amount, line.ref, line.line) == (2, EntryKind.SETTLE, 12, "a", "chat")
        assert (line.basis, line.estimated, line.available, line.at) == (Basis.USAGE, True, 88, scene.clock())
        assert (receipt.entry, receipt.parts) == (2, line.parts)
        assert [(part.source, part.name, part.amount) for part in line.parts] == [(Source.GRANT, "grant_1", 12)]

    @scenario
    async def test_release_gives_everything_back(self, scene: Scene) -> None:
        """A released hold leaves no charge and no ledger line."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipt = await scene.release("a")
        assert (receipt.applied, receipt.amount, receipt.available, receipt.entry) == (True, 0, 100, None)
        assert (await scene.hold("a")).state is HoldState.RELEASED
        assert [entry.kind for entry in await scene.entries()] == [EntryKind.GRANT]

    @scenario
    async def test_settle_zero(self, scene: Scene) -> None:
        """A call that cost nothing gives its whole hold back and is settled, not released (S3.23)."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipt = await scene.settle("a", 0)
        assert (receipt.amount, receipt.available, receipt.basis, receipt.entry) == (0, 100, Basis.USAGE, None)
        assert (await scene.hold("a")).state is HoldState.SETTLED

    @scenario
    async def test_settle_more_than_held(self, scene: Scene) -> None:
        """A charge above the hold posts in full and is taken from what is free (S3.7)."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipt = await scene.settle("a", 80)
        assert (receipt.amount, receipt.available) == (80, 20)
        assert (await scene.account()).debt == 0

    @scenario
    async def test_settle_more_than_there_is(self, scene: Scene) -> None:
        """A charge above everything posts in full too: what is missing is debt, and the next call is refused (S3.7)."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipt = await scene.settle("a", 150)
        account = await scene.account()
        assert (account.settled, account.debt, account.available) == (150, 50, -50)
        assert [(part.source, part.amount) for part in receipt.parts] == [
            (Source.GRANT, 30),
            (Source.GRANT, 70),
            (Source.DEBT, 50),
        ]
        assert not (await scene.admit("b", 1)).admitted

    @scenario
    async def test_settle_leaves_other_holds_their_units(self, scene: Scene) -> None:
        """A charge above its hold becomes debt rather than taking what another call holds."""
        await scene.grant(100)
        await scene.admit("a", 50)
        await scene.admit("b", 50)
        await scene.settle("a", 70)
        assert (await scene.account()).debt == 20
        assert (await scene.settle("b", 50)).amount == 50
        account = await scene.account()
        assert (account.settled, account.held, account.available) == (120, 0, -20)

    @scenario
    async def test_settle_consumes_parts_in_hold_order(self, scene: Scene) -> None:
        """A hold over two grants is spent from its first part on, and given back from its last."""
        await scene.grant(10, "first", expires_in_s=300)
        await scene.grant(50, "second")
        await scene.admit("a", 40)
        await scene.settle("a", 25)
        first, second = await scene.grant_row("first"), await scene.grant_row("second")
        assert (first.settled, second.settled, second.held) == (10, 15, 0)

    @scenario
    async def test_end_twice(self, scene: Scene) -> None:
        """The first end wins: a repeat and an opposite answer its receipt and change nothing (S3.13)."""
        await scene.grant(100)
        await scene.admit("a", 30)
        first = await scene.settle("a", 12, event={"outcome": "completed"})
        async with scene.nothing_changes():
            again = await scene.settle("a", 12, event={"outcome": "completed"})
            opposite = await scene.release("a")
            other = await scene.settle("a", 99)
        assert again == opposite == other == first._replace(applied=False)

    @scenario
    async def test_end_an_unknown_call(self, scene: Scene) -> None:
        """An end of a call that the store does not know says so and changes nothing (S3.14)."""
        await scene.grant(100)
        async with scene.nothing_changes():
            settled, released = await scene.settle("nobody", 5), await scene.release("nobody")
        assert [(receipt.known, receipt.applied) for receipt in (settled, released)] == [(False, False)] * 2

    @scenario
    async def test_end_writes_its_event_in_the_same_step(self, scene: Scene) -> None:
        """The usage event of a call is in the outbox as soon as its end is answered, with what was really charged."""
        await scene.grant(100)
        await scene.admit("a", 30, facts={"caller": "key_1", "outcome": "none"})
        assert await scene.events() == []
        await scene.settle("a", 12, event={"outcome": "completed"})
        assert [event["id"] for event in await scene.events()] == ["a"]
        (event,) = await scene.events()
        assert event["caller"] == "key_1"
        assert event["outcome"] == "completed"
        assert (event["id"], event["payer"], event["unit"], event["line"]) == ("a", PAYER, UNIT, "chat")
        assert (event["amount"], event["held"], event["basis"]) == (12, 30, "usage")

    @scenario
    async def test_end_without_an_event(self, scene: Scene) -> None:
        """An end that tells nothing puts nothing into the outbox."""
        await scene.grant(100)
        await scene.admit("a", 30)
        await scene.release("a")
        assert await scene.events() == []


class Doubting(Suite):
    """Calls whose worker is gone, and ends that come after somebody else's."""

    @scenario
    async def test_renew_keeps_a_call_alive(self, scene: Scene) -> None:
        """A heartbeat moves the end of the hold's life, which no sweep ends, and keeps the most observed (S0.51)."""
        await scene.grant(100)
        await scene.admit("a", 30)
        for observed, kept in ((5, 5), (9, 9), (7, 9)):
            scene.clock.advance(LIFE_S - 1)
            assert await scene.one(Renew("a", observed)) is True
            hold = await scene.hold("a")
            assert (hold.observed, hold.expires_at) == (kept, scene.clock() + LIFE_S)
        await scene.one(Sweep())
        assert (await scene.hold("a")).state is HoldState.HELD

    @scenario
    async def test_renew_what_does_not_live(self, scene: Scene) -> None:
        """A heartbeat of an ended or unknown call answers no and changes nothing."""
        await scene.grant(100)
        await scene.admit("a", 30)
        await scene.release("a")
        async with scene.nothing_changes():
            assert await scene.run(Renew("a", 5), Renew("nobody")) == [False, False]

    @scenario
    async def test_hold_goes_in_doubt_and_still_counts(self, scene: Scene) -> None:
        """A hold whose heartbeats stopped is in doubt: visible, and still held, until its grace is over."""
        await scene.grant(100)
        await scene.admit("a", 30)
        scene.clock.advance(LIFE_S)
        await scene.one(Sweep())
        assert (await scene.hold("a")).state is HoldState.IN_DOUBT
        assert (await scene.account()).held == 30
        scene.clock.advance(GRACE_S - 1)
        await scene.one(Sweep())
        assert (await scene.account()).held == 30

    @scenario
    async def test_policy_ends_a_call_in_doubt(self, scene: Scene) -> None:
        """When its grace is over a call is charged what its policy says: what was observed, its hold, or nothing."""
        await scene.grant(100)
        for call_id, basis in (("a", Basis.OBSERVED), ("b", Basis.HOLD), ("c", Basis.NONE)):
            await scene.admit(call_id, 20, in_doubt=basis)
            await scene.one(Renew(call_id, 7))
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        holds = (await scene.state()).holds
        charged = {call_id: hold.receipt and (hold.state, hold.receipt.amount) for call_id, hold in holds.items()}
        assert charged == {
            "a": (HoldState.SETTLED, 7),
            "b": (HoldState.SETTLED, 20),
            "c": (HoldState.RELEASED, 0),
        }
        assert (await scene.account()).available == 73
        assert [event["id"] for event in await scene.events()] == ["a", "b", "c"]

    @scenario
    async def test_admission_sees_what_is_overdue(self, scene: Scene) -> None:
        """Nobody has to sweep: an admission ends the overdue calls of its account before it decides."""
        await scene.grant(100)
        await scene.admit("a", 100)
        scene.clock.advance(LIFE_S + GRACE_S - 1)
        assert not (await scene.admit("b", 100)).admitted
        scene.clock.advance(1)
        assert (await scene.admit("c", 100)).admitted

    @scenario
    async def test_admission_ends_many_overdue_calls_in_turns(self, scene: Scene) -> None:
        """After a crash of many calls, each admission ends some of them, until none is left (bounded work)."""
        await scene.grant(1_000)
        await scene.run(*(scene.ask(f"a{call:02}", 10) for call in range(50)))
        scene.clock.advance(LIFE_S + GRACE_S)
        left = []
        for turn in range(1, 5):
            await scene.admit(f"b{turn}", 1)
            left.append((await scene.account()).held - turn)
        assert 0 < left[0] < 500
        assert left[-1] == 0
        assert left == sorted(left, reverse=True)

    @scenario
    async def test_call_in_doubt_ends_by_itself(self, scene: Scene) -> None:
        """A call in doubt that turns out to live ends as any other: nobody was faster."""
        await scene.grant(100)
        await scene.admit("a", 30)
        scene.clock.advance(LIFE_S)
        await scene.one(Sweep())
        assert (await scene.settle("a", 25)).applied
        assert (await scene.account()).settled == 25

    @scenario
    async def test_late_end_charges_what_is_missing(self, scene: Scene) -> None:
        """The first end by the call after its policy's posts one linked entry of the difference."""
        await self._let_the_policy_end(scene, observed=7)
        receipt = await scene.settle("a", 25)
        assert (receipt.applied, receipt.amount, receipt.late) == (False, 7, 18)
        line = (await scene.entries())[-1]
        assert (line.kind, line.amount, line.ref) == (EntryKind.LATE, 18, "a")
        assert (await scene.account()).settled == 25

    @scenario
    async def test_late_end_charges_where_it_was_held(self, scene: Scene) -> None:
        """A late end of a split hold takes from each of its sources what was held there, and the rest from the last."""
        await scene.grant(100)
        free = scene.allowance(30)._replace(split=True)
        await scene.admit("a", 50, sources=[free, WalletSource(split=True)])
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        assert (await scene.settle("a", 60)).late == 60
        assert await scene.settled_and_held() == [(30, 0)]
        assert (await scene.account()).settled == 30

    @scenario
    async def test_late_end_gives_back_what_was_too_much(self, scene: Scene) -> None:
        """A late end below what the policy charged gives the difference back to where it came from."""
        await self._let_the_policy_end(scene, observed=25)
        receipt = await scene.settle("a", 7)
        assert receipt.late == -18
        assert (await scene.entries())[-1].amount == -18
        assert (await scene.grant_row()).settled == 7
        assert (await scene.account()).available == 93

    @scenario
    async def test_late_end_counts_once(self, scene: Scene) -> None:
        """Only the first late end counts; one that agrees with the policy writes no line, and is the first too."""
        await self._let_the_policy_end(scene, observed=7)
        await scene.settle("a", 7)
        assert [line.kind for line in await scene.entries()] == [EntryKind.GRANT, EntryKind.SETTLE]
        async with scene.nothing_changes():
            assert (await scene.settle("a", 25)).late == 0

    @scenario
    async def test_late_release_gives_everything_back(self, scene: Scene) -> None:
        """A late end that charges nothing takes the policy's whole charge back."""
        await self._let_the_policy_end(scene, observed=25)
        assert (await scene.release("a")).late == -25
        assert (await scene.account()).available == 100

    @scenario
    async def test_late_end_after_a_person(self, scene: Scene) -> None:
        """What a person decided stands: the call's own end is recorded, and charges nothing."""
        await scene.grant(100)
        await scene.admit("a", 30)
        await scene.settle("a", 5, by=EndedBy.PERSON)
        before = await scene.account()
        assert (await scene.settle("a", 25, event={"outcome": "completed"})).amount == 5
        assert await scene.account() == before

    @scenario
    async def test_late_end_of_a_debt_gives_back_to_whoever_paid_it(self, scene: Scene) -> None:
        """A charge that became debt, which a later grant paid, is given back to that grant, even when it is spent."""
        await scene.grant(10)
        await scene.admit("a", 10, in_doubt=Basis.OBSERVED)
        await scene.one(Renew("a", 40))
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        assert (await scene.account()).debt == 30
        await scene.grant(30, "grant_2")
        assert (await scene.account()).available == 0
        assert (await scene.settle("a", 15)).late == -25
        account = await scene.account()
        assert (account.settled, account.debt, account.available) == (15, 0, 25)
        assert (await scene.grant_row("grant_2")).free == 25

    @scenario
    async def test_late_end_of_a_grant_that_another_gave_back_to(self, scene: Scene) -> None:
        """Two late ends give back in full, also where the first took its paid debt from the other's grant."""
        await scene.grant(10, priority=5)
        for call, observed in (("a", 8), ("b", 5)):
            await scene.admit(call, 5, in_doubt=Basis.OBSERVED)
            await scene.one(Renew(call, observed))
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        await scene.grant(3, "grant_2", priority=0)
        assert (await scene.grant_row("grant_2")).settled == 3
        assert (await scene.release("a")).late == -8
        assert (await scene.release("b")).late == -5
        account = await scene.account()
        assert (account.settled, account.debt, account.available) == (0, 0, 13)

    @staticmethod
    async def _let_the_policy_end(scene: Scene, observed: int) -> None:
        await scene.grant(100)
        await scene.admit("a", 30)
        await scene.one(Renew("a", observed))
        scene.clock.advance(LIFE_S + GRACE_S)
        assert await scene.run(Sweep(), End("nobody", None))
