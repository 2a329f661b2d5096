"""Bounds: what an account has spent and holds stays within what stores count exactly, and nobody gets stuck there."""

from __future__ import annotations

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Reason
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.operations import Backfill, Grow, Sweep, WalletSource
from asgi_metering.rules.state import AllowanceWindow, Counter, PinnedWindow
from asgi_metering.rules.windows import correct
from tests.rules.world import World, imbalances, snapshot

OWING = (WalletSource(MAX_AMOUNT),)


def spent(amount: int) -> World:
    """A world where ada has 100, and has spent so much."""
    world = World()
    world.grant(100)
    world.run(Backfill("b", "ada", "credits", amount))
    return world


def test_charge_up_to_the_bound_and_no_further() -> None:
    """What exceeds a hold is charged as long as it can be counted beside all that others hold (S3.7, X.7)."""
    world = spent(40)
    for call in ("a", "b"):
        world.admit(10, call)
    before = snapshot(world.state)
    with pytest.raises(AmountError, match=f"Account 'ada' would have spent and held {MAX_AMOUNT + 1} smallest parts"):
        world.end("a", MAX_AMOUNT - 49)
    assert snapshot(world.state) == before
    assert world.end("a", MAX_AMOUNT - 50).amount == MAX_AMOUNT - 50
    assert world.end("b", 10).amount == 10
    assert world.account().settled == MAX_AMOUNT
    assert imbalances(world.state) == []


def test_end_what_was_counted_beyond_the_bound() -> None:
    """Books that were kept without a bound can go on: a call is ended for what it holds, and not for more."""
    world = spent(40)
    world.admit(10, "a")
    key = ("ada", "credits")
    world.state.accounts[key] = world.state.accounts[key]._replace(settled=MAX_AMOUNT + 40, debt=MAX_AMOUNT)
    with pytest.raises(AmountError):
        world.end("a", 11)
    assert world.end("a", 10).amount == 10
    assert world.account().settled == MAX_AMOUNT + 50


def test_hold_no_more_than_can_be_charged() -> None:
    """An overdraft allows no hold that could not be charged: the call is refused, or holds less, as without credits."""
    world = spent(40)
    refusal = world.refused(MAX_AMOUNT - 39, sources=OWING)
    assert (refusal.reason, refusal.available) == (Reason.CREDITS, MAX_AMOUNT - 40)
    assert world.admit(MAX_AMOUNT - 50, "a", sources=OWING).admitted
    assert world.admit(20, "b", at_least=1, sources=OWING).held == 10
    assert world.run(Grow("b", 20, 11, OWING)).refusal is not None
    assert world.end("b", 10).amount == 10


def test_count_an_allowances_window_up_to_the_bound() -> None:
    """A window pays above its limit if need be, and no more than can be counted, in time or late."""
    world = World()
    for call in ("a", "b", "c"):
        world.admit(5, call, sources=(world.free(50),), ttl_s=10.0, grace_s=0.0)
    world.end("a", MAX_AMOUNT - 12)
    before = snapshot(world.state)
    with pytest.raises(AmountError, match="in a window of allowance 'free'"):
        world.end("b", 8)
    assert snapshot(world.state) == before
    world.end("b", 7)
    world.wait(10)
    world.run(Sweep())
    with pytest.raises(AmountError, match=f"spent and held {MAX_AMOUNT + 1} smallest parts"):
        world.end("c", 6)
    assert world.end("c", 5).late == 5
    assert world.today() == (MAX_AMOUNT, 0)


def test_end_in_a_window_that_was_counted_beyond_the_bound() -> None:
    """A window that was kept without a bound takes what was held in it, and gives back."""
    world = World()
    world.admit(5, "a", sources=(world.free(50),))
    (key,) = world.state.allowances
    row: AllowanceWindow = world.state.allowances[key]
    world.state.allowances[key] = row._replace(settled=MAX_AMOUNT + 7)
    with pytest.raises(AmountError):
        world.end("a", 6)
    assert world.end("a", 5).amount == 5


@pytest.mark.parametrize(("amount", "told"), [(10, True), (10, False), (0, True)])
def test_end_a_call_in_doubt_that_nobody_can_count(amount: int, told: bool) -> None:
    """A call in doubt was observed to use more than can be counted: its hold is charged, and nobody is kept waiting."""
    world = spent(40)
    facts = {"attributes": {"team": "x"}} if told else {}
    world.admit(amount, "a", sources=(WalletSource(),), facts=facts, ttl_s=10.0, grace_s=0.0)
    world.beat("a", MAX_AMOUNT)
    world.wait(60)
    assert world.admit(1, "b").admitted
    receipt = world.hold("a").receipt
    assert receipt is not None
    assert (receipt.amount, receipt.basis) == (amount, Basis.HOLD if amount else Basis.NONE)
    assert world.account().settled == 40 + amount
    assert [line.kind for line in world.entries()][2:] == [EntryKind.SETTLE] * bool(amount)
    events = [event.payload["attributes"] for event in world.state.events.values()]
    assert events == ([{"team": "x", "uncharged_amount": MAX_AMOUNT - amount}] if told else [])


@pytest.mark.parametrize(("start", "counted"), [(60.0, (MAX_AMOUNT, 5)), (0.0, (3, MAX_AMOUNT))])
def test_count_usage_up_to_the_bound(start: float, counted: tuple[int, int]) -> None:
    """Usage that nobody can count fills its limit, in the window that runs or in the one before it, and no more."""
    counter = correct(PinnedWindow("k", start, "tokens", 1), Counter("k", 60.0, 120.0, 3, 5), MAX_AMOUNT, 70.0)
    assert counter is not None
    assert (counter.used, counter.previous) == counted
