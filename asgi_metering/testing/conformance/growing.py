"""What a store must do about calls that run, or that nobody wanted: growth, previews, and admissions taken back."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from asgi_metering.decisions import Reason
from asgi_metering.rules.operations import Grow, LeaseAsk, Preview, Renew, Sweep, Undo, WalletSource, WindowKind
from asgi_metering.testing.conformance.scene import DAY_S, GRACE_S, LIFE_S, PAYER, WALLET, Scene, Suite, scenario

__all__ = ["Growing", "Undoing"]


class Growing(Suite):
    """Holds that are made larger."""

    @scenario
    async def test_grow_a_hold(self, scene: Scene) -> None:
        """A live hold grows to what is asked, once; its end charges and gives back all of it."""
        await scene.grant(20)
        await scene.grant(80, "grant_2")
        await scene.admit("a", 10)
        decision = await scene.one(Grow("a", 40, 40, WALLET))
        assert (decision.admitted, decision.held, decision.available) == (True, 40, 60)
        async with scene.nothing_changes():
            assert (await scene.one(Grow("a", 40, 40, WALLET))).held == 40
        assert [part.amount for part in (await scene.hold("a")).parts] == [20, 20]
        receipt = await scene.settle("a", 35)
        assert (receipt.held, receipt.available) == (40, 65)

    @scenario
    async def test_grow_beyond_what_there_is(self, scene: Scene) -> None:
        """Growth that cannot be paid changes nothing; with a lower bound it takes what there is."""
        await scene.grant(100)
        await scene.admit("a", 60)
        async with scene.nothing_changes():
            refused = await scene.one(Grow("a", 101, 101, WALLET))
        assert refused.refusal is not None
        assert (refused.refusal.reason, refused.held) == (Reason.CREDITS, 60)
        assert (await scene.one(Grow("a", 150, 90, WALLET))).held == 100

    @scenario
    async def test_grow_over_several_sources(self, scene: Scene) -> None:
        """Growth goes on with the next source of the payer, in the allowance's running window; it ends by its parts."""
        await scene.grant(10)
        await scene.admit("a", 50, sources=[scene.allowance(50), *WALLET])
        scene.clock.advance(DAY_S)
        await scene.one(Renew("a"))
        await scene.one(Grow("a", 90, 90, (scene.allowance(50), *WALLET)))
        await scene.one(Grow("a", 105, 105, (scene.allowance(50), WalletSource(5))))
        assert await scene.settled_and_held() == [(0, 50), (0, 40)]
        await scene.settle("a", 104)
        assert await scene.settled_and_held() == [(50, 0), (40, 0)]
        account = await scene.account()
        assert (account.settled, account.held, account.debt) == (14, 0, 4)

    @scenario
    async def test_grow_from_who_pays_already(self, scene: Scene) -> None:
        """The hold says whose sources growth is taken from, whatever payer the sources name."""
        free = scene.allowance(50)
        await scene.admit("other", 30, sources=[free])
        await scene.admit("a", 0, sources=WALLET)
        decision = await scene.one(Grow("a", 15, 15, (free._replace(payer="someone else"),)))
        assert (decision.payer, decision.held, decision.available) == (PAYER, 15, 5)

    @scenario
    async def test_grow_a_call_that_has_ended(self, scene: Scene) -> None:
        """An ended call, one that nobody knows, and one that its policy ends by now do not grow."""
        await scene.grant(100)
        for call_id in ("a", "late"):
            await scene.admit(call_id, 10)
        await scene.settle("a", 10)
        scene.clock.advance(LIFE_S + GRACE_S)
        decisions = await scene.run(*(Grow(call_id, 20, 20, WALLET) for call_id in ("a", "nobody", "late")))
        assert [decision.refusal and decision.refusal.reason for decision in decisions] == [Reason.ENDED] * 3
        assert (await scene.account()).available == 90

    @scenario
    async def test_grow_and_sweep_in_one_sequence(self, scene: Scene) -> None:
        """What a call has grown to is what its policy ends, also within one sequence."""
        await scene.grant(100)
        await scene.admit("a", 10)
        await scene.run(Grow("a", 30, 30, WALLET), scene.ask("b", 70))
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        assert (await scene.account()).available == 100


class Undoing(Suite):
    """Admissions that are only looked at, or taken back."""

    @scenario
    async def test_preview_an_admission(self, scene: Scene) -> None:
        """A preview answers what an admission would, and consumes nothing (S0.37)."""
        await scene.grant(100)
        ask = scene.ask("a", 30, limits=[scene.limit(WindowKind.FIXED, 1)], leases=[LeaseAsk("at once", "pool", 1)])
        async with scene.nothing_changes():
            foreseen = await scene.one(Preview(ask))
        assert await scene.one(ask) == foreseen
        assert not (await scene.one(Preview(ask._replace(id="b")))).admitted

    @scenario
    async def test_undo_an_admission(self, scene: Scene) -> None:
        """An admission that is taken back has held nothing and counted nowhere (S0.22)."""
        await scene.grant(100)
        limits = [
            scene.limit(WindowKind.FIXED, 5),
            scene.limit(WindowKind.CALENDAR, 5, name="daily"),
            scene.limit(WindowKind.SLIDING, 90, name="tokens", meter="tokens", cost=20),
            scene.limit(WindowKind.MOVING, 5, name="log"),
            scene.limit(WindowKind.BUCKET, 90, name="bucket", meter="tokens", cost=20, refill=5),
        ]
        await scene.admit("a", 10, limits=limits)
        before = (await scene.state()).counters
        ask = scene.ask("b", 30, limits=limits, leases=[LeaseAsk("at once", "pool", 1)])
        decision = await scene.one(ask)
        assert await scene.one(Undo(ask, decision.now)) is True
        state = await scene.state()
        assert (state.counters, state.leases, (await scene.account()).held) == (before, {}, 10)
        async with scene.nothing_changes():
            assert await scene.one(Undo(ask, decision.now)) is False

    @scenario
    async def test_undo_a_call_that_has_ended(self, scene: Scene) -> None:
        """A call that has ended was somebody's: nothing of it is taken back."""
        await scene.grant(100)
        ask = scene.ask("a", 30, limits=[scene.limit(WindowKind.FIXED, 5)])
        decision = await scene.one(ask)
        await scene.settle("a", 30)
        async with scene.nothing_changes():
            assert await scene.one(Undo(ask, decision.now)) is False

    @scenario
    async def test_undo_what_was_only_limited(self, scene: Scene) -> None:
        """A call that held nothing gives back what it counted, in its own window only."""
        limit = scene.limit(WindowKind.FIXED, 1)
        ask = scene.ask("a", 0, limits=[limit])
        decision = await scene.one(ask)
        await scene.one(Undo(ask, decision.now))
        assert (await scene.admit("b", limits=[limit])).admitted
        scene.clock.advance(60)
        await scene.admit("c", limits=[limit])
        async with scene.nothing_changes():
            await scene.one(Undo(ask, decision.now))
