"""What a store must do at the edge of what is counted exactly: refuse alike, keep everything, and never get stuck."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

import asgi_metering.rules.operations as ops
from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Reason
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Operation, Sweep, WalletSource, WindowKind
from asgi_metering.testing.conformance.scene import GRACE_S, LIFE_S, PAYER, UNIT, Scene, Suite, scenario

__all__ = ["Bounding"]


class Bounding(Suite):
    """Amounts and their sums: up to 2^53 - 1 smallest parts, and not one further (X.7)."""

    @scenario
    async def test_amount_beyond_the_bound(self, scene: Scene) -> None:
        """An amount above the bound, or below zero, is refused with its number by whoever gets it; nothing changes."""
        await scene.grant(100)
        await scene.admit("a", 10)
        most = MAX_AMOUNT + 1
        hold = scene.ask("b", 10)
        async with scene.nothing_changes():
            for amount in (most, -1):
                await _refused(
                    scene,
                    str(amount),
                    hold._replace(amount=amount, minimum=amount),
                    ops.Preview(hold._replace(amount=amount, minimum=amount)),
                    ops.Grow("a", amount, amount, hold.sources),
                    ops.Renew("a", amount),
                    ops.End("a", amount, Basis.USAGE),
                    ops.PostGrant("h", PAYER, UNIT, amount),
                    ops.Backfill("k", PAYER, UNIT, amount),
                )
            await _refused(scene, str(most), ops.Correct("k", PAYER, UNIT, most))
            await _refused(scene, str(-most), ops.Correct("k", PAYER, UNIT, -most))

    @scenario
    async def test_charges_beyond_the_bound(self, scene: Scene) -> None:
        """What an account has spent and holds is counted together up to the bound: what exceeds it is refused."""
        await scene.grant(100)
        await scene.admit("a", 10)
        await scene.admit("b", 10)
        await scene.one(ops.Backfill("k", PAYER, UNIT, MAX_AMOUNT - 21))
        async with scene.nothing_changes():
            await _refused(
                scene,
                f"up to {MAX_AMOUNT}",
                ops.End("a", 12, Basis.USAGE),
                ops.End("a", MAX_AMOUNT, Basis.USAGE, event={}, failed=True),
            )
            await _refused(
                scene,
                f"more than {MAX_AMOUNT}",
                ops.Backfill("l", PAYER, UNIT, 2),
                ops.Correct("l", PAYER, UNIT, 2),
            )
        assert [(await scene.settle("a", 11)).amount, (await scene.settle("b", 10)).amount] == [11, 10]
        account = await scene.account()
        assert (account.settled, account.held) == (MAX_AMOUNT, 0)

    @scenario
    async def test_what_is_held_can_be_charged(self, scene: Scene) -> None:
        """However much an account may owe, it holds no more than can be charged: calls beyond that are refused."""
        sources = (WalletSource(overdraft=MAX_AMOUNT),)
        await scene.one(ops.Backfill("k", PAYER, UNIT, 50))
        assert (await scene.admit("a", MAX_AMOUNT - 60, sources=sources)).admitted
        async with scene.nothing_changes():
            refusal = (await scene.admit("b", 11, sources=sources)).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.available) == (Reason.CREDITS, 10)
        assert (await scene.admit("c", 11, at_least=1, sources=sources)).held == 10
        assert (await scene.one(ops.Grow("c", 20, 11, sources))).refusal is not None
        for call, amount in (("c", 10), ("a", MAX_AMOUNT - 60)):
            assert (await scene.settle(call, amount)).amount == amount
        account = await scene.account()
        assert (account.settled, account.available) == (MAX_AMOUNT, -MAX_AMOUNT)

    @scenario
    async def test_allowance_beyond_the_bound(self, scene: Scene) -> None:
        """What one window of an allowance has paid, above its limit too, is counted up to the bound."""
        sources = (scene.allowance(100),)
        await scene.admit("a", 10, sources=sources)
        await scene.admit("b", 10, sources=sources)
        await scene.settle("a", MAX_AMOUNT - 11)
        async with scene.nothing_changes():
            await _refused(scene, "allowance 'free'", ops.End("b", 12, Basis.USAGE))
        await scene.settle("b", 11)
        assert await scene.settled_and_held() == [(MAX_AMOUNT, 0)]

    @scenario
    async def test_late_end_beyond_the_bound(self, scene: Scene) -> None:
        """A late end that no account can count is refused, and comes again with less."""
        await scene.grant(100)
        allowed = (scene.allowance(100),)
        await scene.admit("a", 10)
        await scene.admit("b", 10, sources=allowed)
        await scene.admit("c", 10, sources=allowed)
        scene.clock.advance(LIFE_S + GRACE_S)
        await scene.one(Sweep())
        await scene.one(ops.Backfill("k", PAYER, UNIT, MAX_AMOUNT - 5))
        assert (await scene.settle("c", MAX_AMOUNT - 5)).late == MAX_AMOUNT - 5
        async with scene.nothing_changes():
            await _refused(scene, f"up to {MAX_AMOUNT}", *(ops.End(call, 6, Basis.USAGE) for call in ("a", "b")))
        assert [(await scene.settle(call, 5)).late for call in ("a", "b")] == [5, 5]

    @scenario
    async def test_policy_ends_what_cannot_be_counted(self, scene: Scene) -> None:
        """A call in doubt that was observed to use more than can be counted is charged its hold; others go on."""
        await scene.grant(100)
        await scene.admit("a", 10)
        await scene.admit("b", 0, sources=(WalletSource(),))
        for call in ("a", "b"):
            await scene.one(ops.Renew(call, MAX_AMOUNT))
        await scene.one(ops.Backfill("k", PAYER, UNIT, 20))
        scene.clock.advance(LIFE_S + GRACE_S)
        assert (await scene.admit("c", 10)).admitted
        held, nothing = [(await scene.hold(call)).receipt for call in ("a", "b")]
        assert held is not None
        assert nothing is not None
        assert [(held.amount, held.basis), (nothing.amount, nothing.basis)] == [(10, Basis.HOLD), (0, Basis.NONE)]
        told = {event["id"]: event["attributes"] for event in await scene.events()}
        assert told == {
            "a": {"uncharged_amount": MAX_AMOUNT - 10},
            "b": {"uncharged_amount": MAX_AMOUNT},
        }
        account = await scene.account()
        assert (account.settled, account.held) == (30, 10)

    @scenario
    async def test_absurd_usage_fills_a_limit(self, scene: Scene) -> None:
        """What a weighted limit counts stops at the bound, and no end is lost for it."""
        await scene.grant(100)
        for number, kind in enumerate((WindowKind.FIXED, WindowKind.SLIDING, WindowKind.CALENDAR)):
            limit = scene.limit(kind, MAX_AMOUNT, name=f"tokens {kind}", cost=7, meter="tokens")
            await scene.admit(f"a{number}", 10, limits=[limit])
            await scene.admit(f"b{number}", 10, limits=[limit])
            for call in ("a", "b"):
                receipt = await scene.settle(f"{call}{number}", 1, actual={"tokens": MAX_AMOUNT})
                assert receipt.amount == 1
            assert (await scene.state()).counters[limit.key].used == MAX_AMOUNT


async def _refused(scene: Scene, words: str, *operations: Operation) -> None:
    """Each of them is a mistake of amounts whose sentence has *words*."""
    for operation, answer in zip(operations, await scene.run(*operations), strict=True):
        assert isinstance(answer, AmountError), operation
        assert words in str(answer), operation
