"""What a store must do when it is asked to admit a call: hold units, by one of its sources, or refuse whole."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from asgi_metering.decisions import Reason
from asgi_metering.receipts import Source
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import AllowanceSource, LeaseAsk, WalletSource, WindowKind
from asgi_metering.testing.conformance.scene import DAY_S, GRACE_S, LIFE_S, WALLET, Scene, Suite, scenario

__all__ = ["Admitting", "Paying", "Sourcing"]

FIXED, CALENDAR, SLIDING = WindowKind.FIXED, WindowKind.CALENDAR, WindowKind.SLIDING


class Admitting(Suite):
    """Holding units, and refusing to."""

    @scenario
    async def test_admit_holds_the_amount(self, scene: Scene) -> None:
        """An admitted call's amount is held, not spent: it is no longer available."""
        await scene.grant(100)
        decision = await scene.admit("a", 30)
        assert decision.admitted
        assert (decision.held, decision.available, decision.source) == (30, 70, "wallet")
        account = await scene.account()
        assert (account.granted, account.settled, account.held, account.available) == (100, 0, 30, 70)
        hold = await scene.hold("a")
        assert (hold.amount, hold.state, hold.receipt) == (30, HoldState.HELD, None)

    @scenario
    async def test_admit_exactly_what_is_available(self, scene: Scene) -> None:
        """Equality passes: a call may take the last unit (S3.4)."""
        await scene.grant(100)
        await scene.admit("a", 60)
        assert (await scene.admit("b", 40)).admitted
        assert (await scene.account()).available == 0

    @scenario
    async def test_admit_one_unit_too_much(self, scene: Scene) -> None:
        """One unit more than available is refused, says what there is, and changes nothing (S3.4)."""
        await scene.grant(100)
        await scene.admit("a", 10)
        await scene.settle("a", 10)
        await scene.admit("b", 40)
        async with scene.nothing_changes():
            refusal = (await scene.admit("c", 51)).refusal
        assert refusal is not None
        assert refusal.reason is Reason.CREDITS
        assert (refusal.required, refusal.available, refusal.held) == (51, 50, 40)
        assert refusal.transient

    @scenario
    async def test_admit_more_than_live_holds_could_free(self, scene: Scene) -> None:
        """A refusal is transient only if the call would pass once all live holds ended unused."""
        await scene.grant(100)
        await scene.admit("a", 40)
        decisions = [await scene.admit(call_id, amount) for call_id, amount in (("b", 100), ("c", 101))]
        assert [decision.refusal and decision.refusal.transient for decision in decisions] == [True, False]

    @scenario
    async def test_admit_for_an_unknown_account(self, scene: Scene) -> None:
        """An account that does not exist has nothing: a refusal with zeros, and no account afterwards (S3.5)."""
        async with scene.nothing_changes():
            refusal = (await scene.admit("a", 1)).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.available, refusal.held) == (Reason.CREDITS, 0, 0)

    @scenario
    async def test_admit_up_to_takes_what_there_is(self, scene: Scene) -> None:
        """With a lower bound the hold is the smaller of what is asked and what there is."""
        await scene.grant(100)
        assert (await scene.admit("a", 80, at_least=10)).held == 80
        assert (await scene.admit("b", 80, at_least=10)).held == 20
        async with scene.nothing_changes():
            assert not (await scene.admit("c", 80, at_least=1)).admitted

    @scenario
    async def test_admit_up_to_from_its_lower_bound_on(self, scene: Scene) -> None:
        """The lower bound itself is enough; one unit less is not."""
        await scene.grant(10)
        assert not (await scene.admit("a", 80, at_least=11)).admitted
        assert (await scene.admit("b", 80, at_least=10)).held == 10

    @scenario
    async def test_admit_the_same_id_again(self, scene: Scene) -> None:
        """A repeated admission answers the first hold again and holds nothing more (S3.15)."""
        await scene.grant(100)
        first = await scene.admit("a", 30)
        async with scene.nothing_changes():
            again = await scene.admit("a", 30)
        assert (again.admitted, again.held, again.available, again.source) == (True, 30, 70, first.source)

    @scenario
    async def test_admit_an_id_whose_call_has_ended(self, scene: Scene) -> None:
        """A repeat that comes after the end changes nothing either: an ended call does not begin again."""
        await scene.grant(100)
        await scene.admit("a", 30)
        await scene.settle("a", 30)
        async with scene.nothing_changes():
            assert (await scene.admit("a", 30)).held == 30

    @scenario
    async def test_admit_free_work(self, scene: Scene) -> None:
        """A call that holds nothing and limits nothing leaves no row (S3.32)."""
        async with scene.nothing_changes():
            decision = await scene.admit("a", 0)
        assert (decision.admitted, decision.held, decision.source) == (True, 0, None)

    @scenario
    async def test_admit_for_one_payer_leaves_the_others_alone(self, scene: Scene) -> None:
        """Accounts are independent: one payer's hold is nobody else's (S0.9)."""
        await scene.grant(100)
        await scene.grant(100, "grant_2", payer="org_8")
        await scene.admit("a", 100)
        assert (await scene.admit("b", 100, payer="org_8")).admitted

    @scenario
    async def test_refuse_by_credits_takes_from_no_limit_and_no_pool(self, scene: Scene) -> None:
        """All or nothing: a call that cannot pay has counted in no window and taken no slot (S0.22)."""
        limits = [scene.limit(FIXED, 5), scene.limit(SLIDING, 5, name="slow"), scene.limit(CALENDAR, 5, name="daily")]
        async with scene.nothing_changes():
            decision = await scene.admit("a", 1, limits=limits, leases=[LeaseAsk("at once", "pool", 2)])
        assert decision.refusal is not None
        assert [window.remaining for window in decision.windows] == [5, 5, 5]

    @scenario
    async def test_refuse_names_the_first_reason(self, scene: Scene) -> None:
        """Of several reasons the first in the order concurrency, rates, credits is told."""
        full, spent = [LeaseAsk("at once", "pool", 0)], [scene.limit(FIXED, 0)]
        reasons = []
        for asked in ({"leases": full, "limits": spent}, {"limits": spent}, {}):
            refusal = (await scene.admit("a", 1, **asked)).refusal
            reasons.append(refusal and refusal.reason)
        assert reasons == [Reason.CONCURRENCY, Reason.EXCEEDS_LIMIT, Reason.CREDITS]

    @scenario
    async def test_admit_burns_by_priority_then_expiry_then_age(self, scene: Scene) -> None:
        """Grants burn by priority, then soonest expiry, then oldest."""
        for grant_id, priority, expires_in_s in (
            ("late", 1, 900.0),
            ("old", 0, 900.0),
            ("young", 0, 900.0),
            ("soon", 0, 300.0),
        ):
            await scene.grant(10, grant_id, priority=priority, expires_in_s=expires_in_s)
        await scene.admit("a", 35)
        parts = (await scene.hold("a")).parts
        assert [(part.name, part.amount) for part in parts] == [("soon", 10), ("old", 10), ("young", 10), ("late", 5)]


class Paying(Suite):
    """Sources: allowances that come back every window, and which source pays."""

    @scenario
    async def test_admit_from_the_first_source_that_can(self, scene: Scene) -> None:
        """Sources are tried in order, and a call is paid by one of them whole: it is never split unasked."""
        await scene.grant(100)
        sources = [scene.allowance(50), *WALLET]
        paid = [(await scene.admit(call_id, 30, sources=sources)).source for call_id in ("a", "b")]
        assert paid == ["free", "wallet"]
        assert await scene.settled_and_held() == [(0, 30)]
        assert (await scene.account()).held == 30

    @scenario
    async def test_admit_exactly_the_allowance(self, scene: Scene) -> None:
        """An allowance may be used to its last unit, and not one further; what is held counts as used."""
        sources = [scene.allowance(50)]
        await scene.admit("a", 20, sources=sources)
        assert (await scene.admit("b", 30, sources=sources)).available == 0
        async with scene.nothing_changes():
            refusal = (await scene.admit("c", 1, sources=sources)).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.name, refusal.limit) == (Reason.ALLOWANCE, "free", 50)
        assert (refusal.available, refusal.held, refusal.resets_at) == (0, 50, scene.days()[2])

    @scenario
    async def test_admit_from_an_allowance_of_none(self, scene: Scene) -> None:
        """A cap of 0 grants nothing, not even the first time (S0.8)."""
        async with scene.nothing_changes():
            assert not (await scene.admit("a", 1, sources=[scene.allowance(0)])).admitted

    @scenario
    async def test_admit_in_the_next_window(self, scene: Scene) -> None:
        """Every window of an allowance begins empty, without anything that resets it (S0.5)."""
        await scene.admit("a", 50, sources=[scene.allowance(50)])
        await scene.settle("a", 50)
        scene.clock.advance(DAY_S)
        assert (await scene.admit("b", 50, sources=[scene.allowance(50)])).admitted
        assert await scene.settled_and_held() == [(50, 0), (0, 50)]

    @scenario
    async def test_end_books_to_the_window_of_its_admission(self, scene: Scene) -> None:
        """A call that ends in the next window is charged to, or given back to, the one that it began in."""
        for call_id in ("a", "b"):
            await scene.admit(call_id, 20, sources=[scene.allowance(50)])
        scene.clock.advance(DAY_S)
        await scene.settle("a", 15)
        await scene.release("b")
        assert await scene.settled_and_held() == [(15, 0)]

    @scenario
    async def test_settle_more_than_the_allowance(self, scene: Scene) -> None:
        """A charge above the hold posts in full, also above the allowance, and the next call is refused."""
        await scene.admit("a", 20, sources=[scene.allowance(50)])
        receipt = await scene.settle("a", 70)
        assert (receipt.amount, receipt.available) == (70, None)
        assert await scene.settled_and_held() == [(70, 0)]
        assert not (await scene.admit("b", 1, sources=[scene.allowance(50)])).admitted

    @scenario
    async def test_pay_nothing_from_an_allowance_that_is_spent(self, scene: Scene) -> None:
        """A call that needs nothing yet goes past an allowance with nothing left: it would be charged above its cap."""
        await scene.grant(100)
        await scene.admit("a", 50, sources=[scene.allowance(50)])
        for limit, split in ((0, False), (50, False), (0, True), (50, True)):
            free = scene.allowance(limit)._replace(split=split)
            for amount in (0, 5):
                call = f"{limit} {split} {amount}"
                async with scene.nothing_changes():
                    assert not (await scene.admit(call, amount, at_least=0, sources=[free])).admitted
                paid = await scene.admit(call, amount, at_least=0, sources=[free, WalletSource(split=split)])
                assert paid.source == "wallet"

    @scenario
    async def test_admit_after_the_allowance_was_cut(self, scene: Scene) -> None:
        """An allowance's limit is that of each decision: cutting it can leave used above limit, raising it helps."""
        await scene.admit("a", 40, sources=[scene.allowance(50)])
        assert not (await scene.admit("b", 1, sources=[scene.allowance(30)])).admitted
        assert (await scene.admit("c", 1, sources=[scene.allowance(41)])).admitted

    @scenario
    async def test_admit_with_boundaries_that_do_not_cover_now(self, scene: Scene) -> None:
        """A store whose time is outside the boundaries that were sent asks for others, and changes nothing."""
        await scene.grant(100)
        stale = AllowanceSource("free", 50, tuple(day - 10 * DAY_S for day in scene.days()))
        limit = scene.limit(CALENDAR, 5)._replace(boundaries=stale.boundaries)
        async with scene.nothing_changes():
            for asked in ({"sources": [stale, *WALLET]}, {"limits": [limit]}):
                decision = await scene.admit("a", 1, **asked)
                assert (decision.stale_calendar, decision.admitted, decision.refusal) == (True, False, None)
                assert decision.now == scene.clock()

    @scenario
    async def test_refuse_by_a_dry_waterfall(self, scene: Scene) -> None:
        """Where a wallet was among the sources it is the reason, and the allowance says when it comes back."""
        await scene.grant(5)
        refusal = (await scene.admit("a", 10, sources=[scene.allowance(9), *WALLET])).refusal
        assert refusal is not None
        assert (refusal.reason, refusal.available) == (Reason.CREDITS, 5)


class Sourcing(Suite):
    """Payer objects: groups that pay a call whole, or split it among their sources."""

    @scenario
    async def test_admit_by_the_next_payer(self, scene: Scene) -> None:
        """Where the first payer object has too little, the whole call switches to the next, and ends there (S0.23)."""
        await scene.grant(10, payer="platform")
        await scene.grant(100)
        sources = [WalletSource(payer="platform", group="platform"), WalletSource(group="user")]
        paid = [await scene.admit(call_id, 8, sources=sources) for call_id in ("a", "b")]
        assert [(decision.payer, decision.group) for decision in paid] == [("platform", "platform"), ("org_7", "user")]
        assert (await scene.settle("a", 12)).payer == "platform"
        assert (await scene.account("platform")).debt == 2
        assert (await scene.account()).held == 8

    @scenario
    async def test_admit_ends_what_is_overdue_of_every_payer(self, scene: Scene) -> None:
        """Admission sees expiry by time in each account that may pay, and the latest time that any of them has seen."""
        await scene.grant(10, payer="platform")
        await scene.admit("a", 10, payer="platform")
        latest = scene.clock.advance(LIFE_S + GRACE_S)
        await scene.grant(1, "grant_2", payer="platform")
        scene.clock.advance(-5)
        sources = [*WALLET, WalletSource(payer="platform")]
        decision = await scene.admit("b", 11, sources=sources)
        assert (decision.payer, decision.now) == ("platform", latest)

    @scenario
    async def test_split_a_call(self, scene: Scene) -> None:
        """A split group pays with all of its sources, in order; what is left is free from the last backwards."""
        await scene.grant(100)
        split = [scene.allowance(30)._replace(split=True), WalletSource(split=True)]
        await scene.admit("a", 50, sources=split)
        assert [(part.source, part.amount) for part in (await scene.hold("a")).parts] == [
            (Source.ALLOWANCE, 30),
            (Source.GRANT, 20),
        ]
        receipt = await scene.settle("a", 35)
        assert (receipt.available, [part.amount for part in receipt.parts]) == (95, [30, 5])
        assert await scene.settled_and_held() == [(30, 0)]
        async with scene.nothing_changes():
            assert not (await scene.admit("b", 96, sources=split)).admitted

    @scenario
    async def test_hold_nothing_and_pin_who_pays(self, scene: Scene) -> None:
        """A hold of nothing names who pays for what will be measured, and that posts in full."""
        await scene.grant(5, payer="platform")
        ask = scene.ask("a", 0, sources=[WalletSource(payer="platform")])
        decision = await scene.one(ask)
        assert (decision.admitted, decision.held, decision.payer, decision.source) == (True, 0, "platform", "wallet")
        assert await scene.one(ask) == decision
        await scene.admit("b", 0, sources=[scene.allowance(5)])
        await scene.settle("a", 8)
        await scene.settle("b", 8)
        assert (await scene.account("platform")).debt == 3
        assert await scene.settled_and_held() == [(8, 0)]

    @scenario
    async def test_overdraw(self, scene: Scene) -> None:
        """An overdraft may be held beyond the grants; what is spent of it is paid by new units first, else owed."""
        await scene.grant(10)
        over = [WalletSource(5)]
        assert (await scene.admit("a", 15, sources=over)).available == -5
        async with scene.nothing_changes():
            refusal = (await scene.admit("b", 1, sources=over)).refusal
        assert refusal is not None
        assert refusal.transient
        await scene.grant(3, "grant_2")
        await scene.settle("a", 14)
        account = await scene.account()
        assert (account.settled, account.debt) == (14, 1)

    @scenario
    async def test_allowance_that_rolls(self, scene: Scene) -> None:
        """A rolling window begins with the first use; strictly after its end the next use begins another (S4.13)."""
        rolls = [AllowanceSource("rolls", 10, window_s=30 * DAY_S)]
        await scene.admit("a", 10, sources=rolls)
        await scene.settle("a", 10)
        scene.clock.advance(30 * DAY_S)
        assert not (await scene.admit("b", 1, sources=rolls)).admitted
        scene.clock.advance(0.5)
        assert (await scene.admit("c", 10, sources=rolls)).admitted
        assert await scene.settled_and_held("rolls") == [(10, 0), (0, 10)]
