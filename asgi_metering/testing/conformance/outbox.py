"""What a store must do about events, sequences of operations, races and reads."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from asgi_metering.errors import MeteringError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import (
    Acknowledge,
    Claim,
    Emit,
    End,
    LeaseAsk,
    Operation,
    PostGrant,
    Renew,
    Sweep,
    WindowKind,
)
from asgi_metering.stores.contract import (
    AccountRows,
    AccountsAfter,
    EntriesAfter,
    HoldRow,
    LiveHolds,
    PendingEvents,
)
from asgi_metering.testing.conformance.scene import (
    DAY_S,
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

__all__ = ["Delivering", "Reading", "Sharing"]

LEASE_S = 30.0


class Delivering(Suite):
    """The outbox: at least once, each event to one at a time."""

    @scenario
    async def test_emit_appends(self, scene: Scene) -> None:
        """Events that belong to no charge are appended, in their order, each with its id and the store's time."""
        assert await scene.one(Emit((("e1", {"n": 1}), ("e2", {"n": [2, None]})))) == 2
        events = (await scene.state()).events.values()
        assert [(event.id, event.at, event.payload) for event in events] == [
            ("e1", scene.clock(), {"n": 1}),
            ("e2", scene.clock(), {"n": [2, None]}),
        ]

    @scenario
    async def test_claim_the_oldest_first(self, scene: Scene) -> None:
        """A claim takes the oldest events that nobody else has claimed, at most as many as it asks for."""
        await scene.run(*(Emit(((f"e{number}", {}),)) for number in range(5)))
        claims = [[event.id for event in await scene.one(Claim(2, LEASE_S))] for _ in range(4)]
        assert claims == [["e0", "e1"], ["e2", "e3"], ["e4"], []]

    @scenario
    async def test_claim_again_after_the_lease(self, scene: Scene) -> None:
        """What was claimed and not acknowledged is for others again when the claim's time is over: at least once."""
        await scene.one(Emit((("e1", {}),)))
        await scene.one(Claim(5, LEASE_S))
        scene.clock.advance(LEASE_S - 1)
        assert await scene.one(Claim(5, LEASE_S)) == ()
        scene.clock.advance(1)
        (event,) = await scene.one(Claim(5, LEASE_S))
        assert (event.id, event.claimed_until) == ("e1", scene.clock() + LEASE_S)

    @scenario
    async def test_acknowledge_what_was_delivered(self, scene: Scene) -> None:
        """An acknowledged event waits no more; one that is not known, or was acknowledged, counts as nothing."""
        await scene.one(Emit((("e1", {}), ("e2", {}))))
        assert await scene.run(Acknowledge(("e1", "nothing")), Acknowledge(("e1",))) == [1, 0]
        assert await scene.one(Acknowledge(("e1",))) == 0
        scene.clock.advance(LEASE_S)
        assert [event.id for event in await scene.one(Claim(5, LEASE_S))] == ["e2"]
        assert list((await scene.store.read(PendingEvents())).state.events) == ["e2"]

    @scenario
    async def test_keep_what_was_delivered_for_a_day(self, scene: Scene) -> None:
        """An acknowledged event stays as it was for a day, then sweeps forget it, a few at a time, oldest first."""
        await scene.one(Emit((("e1", {"n": 1}), ("e2", {}), ("e3", {}))))
        for event_id in ("e2", "e1", "e3"):
            scene.clock.advance(1)
            await scene.one(Acknowledge((event_id,)))
        scene.clock.advance(DAY_S - 2.5)
        assert await scene.one(Sweep()) == 0
        assert (await scene.state()).delivered["e1"].payload == {"n": 1}
        assert (await scene.state()).delivered["e1"].acknowledged_at == scene.clock() - DAY_S + 1.5
        scene.clock.advance(1.5)
        left = []
        for _ in range(3):
            await scene.one(Sweep(limit=1))
            left.append(sorted((await scene.state()).delivered))
        assert left == [["e1", "e3"], ["e3"], ["e3"]]
        scene.clock.advance(1)
        await scene.one(Sweep())
        assert tables(await scene.state())["delivered"] == {}

    @scenario
    async def test_tell_again_what_was_delivered(self, scene: Scene) -> None:
        """An event that is emitted again is not delivered again while what was acknowledged is kept, and then is."""
        await scene.one(Emit((("e1", {"n": 1}), ("e2", {}))))
        await scene.one(Acknowledge(("e1",)))
        again, known, claimed = await scene.run(
            Emit((("e1", {"n": 2}), ("e2", {}), ("e3", {}))), Acknowledge(("e1",)), Claim(5, LEASE_S)
        )
        assert (again, known, [event.id for event in claimed]) == (3, 0, ["e2", "e3"])
        assert (await scene.state()).delivered["e1"].payload == {"n": 1}
        scene.clock.advance(DAY_S)
        _, _, claimed = await scene.run(Sweep(), Emit((("e1", {"n": 2}),)), Claim(5, LEASE_S))
        assert [event.payload for event in claimed] == [{}, {}, {"n": 2}]

    @scenario
    async def test_tell_again_behind_the_acknowledgement(self, scene: Scene) -> None:
        """In one sequence, too, what was acknowledged before it is told again is not delivered again."""
        await scene.one(Emit((("e1", {"n": 1}),)))
        *_, claimed = await scene.run(
            Acknowledge(("e1",)), Emit((("e1", {"n": 2}), ("e2", {}))), Acknowledge(("e2",)), Claim(5, LEASE_S)
        )
        assert claimed == ()
        kept = (await scene.state()).delivered
        assert {event_id: event.payload for event_id, event in kept.items()} == {"e1": {"n": 1}, "e2": {}}

    @scenario
    async def test_event_survives_until_it_is_acknowledged(self, scene: Scene) -> None:
        """Neither time nor sweeps take an undelivered event from the outbox."""
        await scene.grant(10)
        await scene.admit("a", 10)
        await scene.settle("a", 10, event={"outcome": "completed"})
        scene.clock.advance(30 * 86_400.0)
        await scene.one(Sweep())
        assert [event["id"] for event in await scene.events()] == ["a"]

    @scenario
    async def test_claim_in_the_sequence_that_emits(self, scene: Scene) -> None:
        """A claim sees what came before it in its own sequence, behind what was there already."""
        await scene.one(Emit((("old", {}),)))
        _, claimed, gone, rest = await scene.run(
            Emit((("new", {}), ("newest", {}))), Claim(2, LEASE_S), Acknowledge(("old", "new")), Claim(5, LEASE_S)
        )
        assert [event.id for event in claimed] == ["old", "new"]
        assert gone == 2
        assert [event.id for event in rest] == ["newest"]


class Sharing(Suite):
    """Sequences, mistakes among them, and many callers at once."""

    @scenario
    async def test_run_nothing(self, scene: Scene) -> None:
        """An empty sequence has no answers."""
        assert await scene.run() == []

    @scenario
    async def test_run_together_as_one_by_one(self, scene: Scene) -> None:
        """Operations that are handed over together are answered, and leave everything, as if one by one."""
        other = await scene.fellow()
        for operations in self._a_day(scene):
            together = await scene.run(*operations)
            alone = [answer for operation in operations for answer in await other.run(operation)]
            assert together == alone
            assert tables(await scene.state()) == tables(await other.state())
            scene.clock.advance(45.0)
        assert (await scene.account()).settled > 0

    @staticmethod
    def _a_day(scene: Scene) -> Sequence[Sequence[Operation]]:
        """Sequences in which operations meet others on the same call, account, slot, window and event."""
        leases, limits = [LeaseAsk("at once", "pool", 2)], [scene.limit(WindowKind.FIXED, 400, cost=90, meter="tokens")]
        paid: dict[str, Any] = {"leases": leases, "limits": limits, "sources": [scene.allowance(25), *WALLET]}
        event = {"outcome": "completed"}
        return [
            [PostGrant("g1", PAYER, UNIT, 60), scene.ask("a", 20, **paid), scene.ask("a", 20, **paid)],
            [
                scene.ask("b", 30, **paid),
                End("a", 25, Basis.USAGE, actual={"tokens": 10}, event=event),
                scene.ask("c", 10, **paid),
                End("a", None),
                scene.ask("d", 90, **paid),
                Renew("b", 5),
            ],
            [End("c", 90, Basis.USAGE, event=event), PostGrant("g2", PAYER, UNIT, 50), scene.ask("e", 500, **paid)],
            [Sweep(), scene.ask("f", 5, **paid), Claim(5, LEASE_S), Renew("f", 2), Acknowledge(("a",))],
            [Sweep(), Sweep(), End("b", 9, Basis.USAGE, event=event), Claim(5, LEASE_S)],
            [Sweep(keep_holds_s=0.0), End("b", 9, Basis.USAGE), PostGrant("g2", PAYER, UNIT, 50)],
        ]

    @scenario
    async def test_operation_sees_those_before_it(self, scene: Scene) -> None:
        """A call that is admitted and ended twice in one sequence is admitted once and ended once."""
        await scene.grant(10)
        admitted, first, second, next_one = await scene.run(
            scene.ask("a", 10), End("a", 4, Basis.USAGE), End("a", None), scene.ask("b", 6)
        )
        assert (admitted.admitted, first.applied, second.applied) == (True, True, False)
        assert (next_one.held, next_one.available) == (6, 0)

    @scenario
    async def test_mistake_harms_no_neighbour(self, scene: Scene) -> None:
        """A mistake is its own operation's answer; the operations around it do what they would without it."""
        await scene.grant(100)
        before, mistake, after = await scene.run(
            scene.ask("a", 60), PostGrant("grant_1", PAYER, UNIT, 999), scene.ask("b", 40)
        )
        assert isinstance(mistake, MeteringError)
        assert (before.held, after.held) == (60, 40)
        account = await scene.account()
        assert (account.granted, account.held) == (100, 100)

    @scenario
    async def test_race_for_units(self, scene: Scene) -> None:
        """Of many that ask at once for the last units, exactly as many are admitted as there are (S0.7, S4.12)."""
        await scene.grant(17)
        decisions = await asyncio.gather(*(scene.admit(f"a{call}", 1) for call in range(50)))
        assert sum(decision.admitted for decision in decisions) == 17
        assert (await scene.account()).available == 0

    @scenario
    async def test_race_for_an_allowance_nobody_used_yet(self, scene: Scene) -> None:
        """The first uses of an allowance, all at once, take no more than it allows (S0.6, S0.8)."""
        sources = [scene.allowance(3)]
        decisions = await asyncio.gather(*(scene.admit(f"a{call}", 1, sources=sources) for call in range(20)))
        assert sum(decision.admitted for decision in decisions) == 3
        assert await scene.settled_and_held() == [(0, 3)]

    @scenario
    async def test_race_for_slots(self, scene: Scene) -> None:
        """Ten calls at once get the three slots that there are (S0.44)."""
        leases = [LeaseAsk("at once", "pool", 3)]
        decisions = await asyncio.gather(*(scene.admit(f"a{call}", leases=leases) for call in range(10)))
        assert sum(decision.admitted for decision in decisions) == 3

    @scenario
    async def test_race_for_the_end(self, scene: Scene) -> None:
        """Of many ends of one call exactly one is applied, and all answer the same receipt (S3.13)."""
        await scene.grant(100)
        await scene.admit("a", 30)
        receipts = await asyncio.gather(*(scene.settle("a", amount) for amount in range(1, 11)))
        assert sum(receipt.applied for receipt in receipts) == 1
        assert len({receipt.amount for receipt in receipts}) == 1
        assert (await scene.account()).settled == receipts[0].amount

    @scenario
    async def test_race_for_a_grant(self, scene: Scene) -> None:
        """A grant that is posted many times at once counts once."""
        receipts = await asyncio.gather(*(scene.grant(100) for _ in range(10)))
        assert sum(receipt.applied for receipt in receipts) == 1
        assert (await scene.account()).granted == 100


class Reading(Suite):
    """Reads: what they find, and that they change nothing."""

    @scenario
    async def test_read_an_account(self, scene: Scene) -> None:
        """An account is read whole: its row, every grant, its live holds and its allowance windows."""
        await scene.grant(10)
        await scene.grant(100, "grant_2")
        await scene.grant(5, "other", payer="org_8")
        for call_id, amount, sources in (("a", 10, WALLET), ("b", 20, WALLET), ("c", 5, [scene.allowance(9)])):
            await scene.admit(call_id, amount, sources=sources)
        await scene.settle("a", 10)
        found = await scene.store.read(AccountRows(PAYER, UNIT))
        state = found.state
        assert found.now == scene.clock()
        assert set(state.accounts) == {(PAYER, UNIT)}
        assert set(state.grants[PAYER, UNIT]) == {"grant_2"}
        assert set(state.closed_grants[PAYER, UNIT]) == {"grant_1"}
        assert {hold.id for hold in state.live_holds((PAYER, UNIT))} == {"b", "c"}
        assert [window.held for window in state.allowances.values()] == [5]

    @scenario
    async def test_read_an_account_that_is_not_there(self, scene: Scene) -> None:
        """An account that does not exist is found empty, and is not made by looking."""
        async with scene.nothing_changes():
            state = (await scene.store.read(AccountRows("nobody", UNIT))).state
        assert state.accounts == {}
        assert not any(state.grants.values())
        assert list(state.live_holds(("nobody", UNIT))) == []

    @scenario
    async def test_read_all_accounts_in_pages(self, scene: Scene) -> None:
        """Accounts are walked in order of payer and unit, a page at a time, none twice and none left out."""
        payers = ["a", "B", "aa", "é", "z", "\N{GRINNING FACE}"]
        for payer in payers:
            await scene.grant(1, payer=payer)
        walked: list[str] = []
        page = [""]
        while page:
            found = await scene.store.read(AccountsAfter(page[-1], UNIT if walked else "", 2))
            page = [payer for payer, _ in found.state.accounts]
            walked.extend(page)
        assert walked == sorted(payers)

    @scenario
    async def test_read_the_ledger_in_pages(self, scene: Scene) -> None:
        """The ledger is read in order of its numbers, after a number, a page at a time."""
        for number in range(5):
            await scene.grant(1, f"grant_{number}")
        found = [(await scene.store.read(EntriesAfter(PAYER, UNIT, after, 2))).state for after in (0, 2, 4, 5)]
        pages = [[line.number for line in state.entries[PAYER, UNIT]] for state in found]
        assert pages == [[1, 2], [3, 4], [5], []]

    @scenario
    async def test_read_holds(self, scene: Scene) -> None:
        """A call's hold is found by its id, live or ended; the live ones are listed oldest first."""
        await scene.grant(100)
        for call_id in ("c", "a", "b"):
            await scene.admit(call_id, 10)
            scene.clock.advance(1)
        await scene.settle("a", 10)
        read = scene.store.read
        assert (await read(HoldRow("a"))).state.holds == {"a": await scene.hold("a")}
        assert (await read(HoldRow("nobody"))).state.holds == {}
        assert list((await read(LiveHolds())).state.holds) == ["c", "b"]
        assert list((await read(LiveHolds(1))).state.holds) == ["c"]

    @scenario
    async def test_read_events_that_wait(self, scene: Scene) -> None:
        """Undelivered events are listed oldest first, claimed ones included."""
        await scene.run(*(Emit(((f"e{number}", {}),)) for number in range(3)))
        await scene.one(Claim(1, LEASE_S))
        read = scene.store.read
        assert list((await read(PendingEvents())).state.events) == ["e0", "e1", "e2"]
        assert list((await read(PendingEvents(2))).state.events) == ["e0", "e1"]

    @scenario
    async def test_read_renews_nothing(self, scene: Scene) -> None:
        """Looking at a call does not keep it alive, and changes nothing else (S0.49, S1.15)."""
        await scene.grant(100)
        await scene.admit("a", 100)
        scene.clock.advance(LIFE_S + GRACE_S - 1)
        async with scene.nothing_changes():
            for query in (AccountRows(PAYER, UNIT), AccountsAfter(), HoldRow("a"), LiveHolds()):
                await scene.store.read(query)
        scene.clock.advance(1)
        assert (await scene.admit("b", 100)).admitted

    @scenario
    async def test_read_is_the_readers_own(self, scene: Scene) -> None:
        """What was read does not change with the store, nor the store with it."""
        await scene.grant(100)
        before = await scene.state()
        await scene.admit("a", 10)
        assert before.holds == {}
        before.accounts.clear()
        before.grants.clear()
        assert (await scene.account()).available == 90

    @scenario
    async def test_open_and_close_again(self, scene: Scene) -> None:
        """Opening an open store and closing a closed one change nothing."""
        await scene.grant(100)
        await scene.store.open()
        assert (await scene.account()).available == 100
        await scene.store.close()
        await scene.store.close()
        await scene.store.open()
