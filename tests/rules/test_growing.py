"""Growth: a live hold is made larger, from the payer object that pays it, or stays as it was."""

from __future__ import annotations

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, Reason
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.receipts import Basis
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import AllowanceSource, Grow, KeyAsk, Sweep, WalletSource
from tests.rules.world import DAY_S, WALLET, World, days, imbalances, snapshot


def grow(
    world: World, call: str, to: int, least: int | None = None, *sources: AllowanceSource | WalletSource
) -> Decision:
    """Ask for growth; all or nothing and from the wallet unless the test says otherwise."""
    decision: Decision = world.run(Grow(call, to, to if least is None else least, sources or (WALLET,)))
    return decision


def test_grow_a_hold() -> None:
    """A hold grows to the amount asked, the decision tells all that is held, and a repeat changes nothing."""
    world = World()
    world.grant(100)
    world.admit(10, "a")
    decision = grow(world, "a", 30)
    assert (decision.admitted, decision.held, decision.available, decision.source) == (True, 30, 70, "wallet")
    before = snapshot(world.state)
    assert grow(world, "a", 30).held == grow(world, "a", 5).held == 30
    assert snapshot(world.state) == before
    assert world.end("a", 25).held == 30
    assert world.account().available == 75


def test_keep_each_place_once() -> None:
    """What a hold takes more of a grant joins the part that it has; new grants come behind it (S3.7)."""
    world = World()
    world.grant(20, "old")
    world.admit(15, "a")
    world.grant(20, "new")
    grow(world, "a", 30)
    assert [(part.name, part.amount) for part in world.hold("a").parts] == [("old", 20), ("new", 10)]
    assert imbalances(world.state) == []


def test_refuse_growth_beyond_what_there_is() -> None:
    """Growth that the payer cannot pay is refused whole, with what is held, and changes nothing."""
    world = World()
    world.grant(100)
    world.admit(90, "a")
    world.admit(5, "b")
    before = snapshot(world.state)
    decision = grow(world, "a", 96)
    assert (decision.admitted, decision.held) == (False, 90)
    assert decision.refusal is not None
    assert (decision.refusal.required, decision.refusal.available, decision.refusal.transient) == (6, 5, True)
    assert snapshot(world.state) == before
    assert grow(world, "a", 95).admitted


def test_grow_as_far_as_will_do() -> None:
    """With a lower bound growth takes what there is, from the bound on; below what is held already it is no refusal."""
    world = World()
    world.grant(100)
    world.admit(90, "a")
    assert not grow(world, "a", 150, 101).admitted
    assert grow(world, "a", 150, 100).held == 100
    decision = grow(world, "a", 150, 100)
    assert (decision.admitted, decision.held) == (True, 100)


def test_grow_without_more_in_debt() -> None:
    """An account in debt has nothing more, and refuses no growth that would do with what is held."""
    world = World()
    world.grant(10)
    world.admit(5, "a")
    world.admit(5, "b")
    world.end("b", 20)
    decision = grow(world, "a", 9, 5)
    assert (decision.admitted, decision.held) == (True, 5)
    assert not grow(world, "a", 9, 6).admitted


def test_grow_from_the_next_source_of_the_group() -> None:
    """Where the allowance that pays has no more, the wallet of its payer object does; an empty one is passed over."""
    world = World()
    world.grant(50)
    sources = (world.free(10), WALLET)
    world.admit(10, "a", sources=sources)
    assert grow(world, "a", 25, 1, *sources).held == 25
    assert [(part.name, part.amount) for part in world.hold("a").parts] == [("free", 10), ("gift", 15)]
    world.end("a", 40)
    assert world.today() == (10, 0)
    assert world.account().settled == 30


def test_grow_from_no_other_payer() -> None:
    """Growth stays with the account that admission chose, whatever the sources say (DESIGN "Sources")."""
    world = World()
    world.grant(10, payer="platform")
    world.grant(100)
    theirs = WalletSource(payer="platform", group="platform")
    world.admit(10, "a", sources=(theirs, WALLET))
    decision = grow(world, "a", 20, 20, theirs, WALLET)
    assert (decision.admitted, decision.payer, decision.group) == (False, "platform", "platform")
    assert world.account().held == 0


def test_grow_an_allowance_in_its_next_window() -> None:
    """A call that outlives its window grows in the running one, and its end books to both."""
    world = World()
    world.admit(10, "a", sources=(world.free(10),), ttl_s=9 * DAY_S)
    yesterday = days(world.now)[1]
    world.wait(DAY_S)
    assert grow(world, "a", 16, 16, world.free(10)).available == 4
    world.end("a", 12)
    assert world.state.allowances["ada", "credits", "free", yesterday][5:] == (10, 0)
    assert world.today() == (2, 0)


def test_grow_into_an_overdraft() -> None:
    """Growth may be bounded debt: held as such, and owed only if it is used."""
    world = World()
    world.grant(10)
    world.admit(10, "a")
    assert grow(world, "a", 14, 14, WalletSource(5)).available == -4
    grow(world, "a", 15, 15, WalletSource(5))
    assert not grow(world, "a", 16, 16, WalletSource(5)).admitted
    world.end("a", 12)
    assert world.sums() == (10, 12, 0, 0, 2)


def test_grow_a_hold_in_doubt() -> None:
    """A hold in doubt may still grow: its worker lives. It stays in doubt, and is due when it was."""
    world = World()
    world.grant(100)
    world.admit(10, "a", ttl_s=30.0, grace_s=30.0)
    world.wait(40)
    world.run(Sweep())
    assert world.hold("a").state is HoldState.IN_DOUBT
    due_at = world.hold("a").due_at
    assert grow(world, "a", 20).admitted
    assert (world.hold("a").state, world.hold("a").due_at) == (HoldState.IN_DOUBT, due_at)
    world.wait(20)
    world.run(Sweep())
    assert world.hold("a").receipt is not None
    assert imbalances(world.state) == []


def test_grow_nothing_that_has_ended() -> None:
    """A call that has ended, that nobody knows, or that the policy must end by now, does not grow."""
    world = World()
    world.grant(100)
    world.admit(10, "a")
    world.end("a", 10)
    world.admit(10, "late", ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    for call in ("a", "nobody", "late"):
        refusal = grow(world, call, 20).refusal
        assert refusal is not None
        assert refusal.reason is Reason.ENDED
    assert world.account().available == 90


def test_end_what_is_overdue_before_growing() -> None:
    """Growth sees expiry by time, as admission does: what a dead worker held is free for it."""
    world = World()
    world.grant(20)
    world.admit(10, "a", ttl_s=900.0)
    world.admit(10, "dead", ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    assert grow(world, "a", 20).admitted


def test_grow_when_the_clock_steps_back() -> None:
    """Growth happens at the latest time that the account has seen."""
    world = World()
    world.grant(100)
    world.admit(10, "a")
    latest = world.now
    world.wait(-50)
    assert grow(world, "a", 20).now == latest
    assert world.account().seen_at == latest


def test_grow_by_a_stale_calendar() -> None:
    """An allowance whose calendar does not cover the store's time asks for another one, and nothing changes."""
    world = World()
    world.admit(5, "a", sources=(world.free(10),))
    stale = AllowanceSource("free", 10, days(world.now - 9 * DAY_S))
    before = snapshot(world.state)
    assert grow(world, "a", 10, 10, stale).stale_calendar
    assert snapshot(world.state) == before


def test_grow_no_call_that_is_charged_by_key() -> None:
    """Calls that are charged once together have a fixed price, and nothing of their own that could grow (S0.3)."""
    world = World()
    world.grant(100)
    world.run(world.ask(10, "a", charge_key=KeyAsk("session", window_s=60.0)))
    with pytest.raises(ConfigurationError, match="is charged by key"):
        grow(world, "a", 20)


@pytest.mark.parametrize(("to", "least"), [(-1, -1), (5, 6), (MAX_AMOUNT + 1, 5), (5, -1)])
def test_refuse_growth_to_no_amount(to: int, least: int) -> None:
    """Growth has bounds like an admission (DESIGN "Amounts")."""
    world = World()
    world.grant(100)
    world.admit(1, "a")
    with pytest.raises(AmountError, match="asks to hold"):
        grow(world, "a", to, least)


def test_end_a_grown_hold_by_its_policy() -> None:
    """Where the policy charges what was held, that is what is held in the end."""
    world = World()
    world.grant(100)
    world.admit(10, "a", ttl_s=10.0, grace_s=0.0, in_doubt=Basis.HOLD)
    grow(world, "a", 30)
    world.wait(10)
    world.run(Sweep())
    assert world.account().settled == 30
