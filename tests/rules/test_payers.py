"""Payer objects: groups are tried in order, one of them pays the whole call, a split group by its sources together."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.decisions import Reason
from asgi_metering.receipts import Source
from asgi_metering.rules.operations import AllowanceSource, Sweep, WalletSource
from tests.rules.world import DAY_S, WALLET, World, imbalances

PLATFORM: dict[str, Any] = {"payer": "platform", "group": "platform"}
USER: dict[str, Any] = {"group": "user"}
SPLIT_WALLET = WalletSource(split=True)


def split_free(world: World, limit: int, name: str = "free") -> AllowanceSource:
    """A daily allowance that pays together with its neighbours."""
    return world.free(limit, name)._replace(split=True)


def parts(world: World, call: str) -> list[tuple[str, int]]:
    """(name, amount) of the parts of a hold; debt has no name."""
    return [(part.name, part.amount) for part in world.hold(call).parts]


# -- groups --------------------------------------------------------------------------------------------------


def test_switch_the_whole_call_to_the_next_payer() -> None:
    """Past the platform's allowance the caller's own account pays everything, and the decision says so (S0.23)."""
    world = World()
    world.grant(100)
    sources = (world.free(10)._replace(**PLATFORM), WalletSource(**USER))
    first, second = world.admit(10, "a", sources=sources), world.admit(6, "b", sources=sources)
    assert (first.payer, first.group, first.source) == ("platform", "platform", "free")
    assert (second.payer, second.group, second.source) == ("ada", "user", "wallet")
    assert world.today(payer="platform") == (0, 10)
    assert [world.hold(call).payer for call in "ab"] == ["platform", "ada"]


def test_charge_the_payer_that_was_admitted() -> None:
    """A call ends on the account that admission chose, overshoot included, and never on another's money (S0.25)."""
    world = World()
    world.grant(5, "theirs", payer="platform")
    world.grant(100)
    world.admit(5, "a", sources=(WalletSource(**PLATFORM), WalletSource(**USER)))
    receipt = world.end("a", 8)
    assert (receipt.payer, receipt.amount) == ("platform", 8)
    assert world.account("platform").debt == 3
    assert world.account().settled == 0


def test_keep_one_groups_sources_apart_from_the_next_ones() -> None:
    """Groups do not pay together, also where both of them may split: the whole call switches."""
    world = World()
    world.grant(5)
    sources = (split_free(world, 4)._replace(group="one"), SPLIT_WALLET._replace(group="two"))
    assert world.admit(5, "a", sources=sources).group == "two"
    refusal = world.refused(6, sources=sources)
    assert (refusal.reason, refusal.transient) == (Reason.CREDITS, False)


def test_see_the_time_of_every_account_that_may_pay() -> None:
    """A clock that stepped back is clamped by the latest time that any of the payers' accounts has seen."""
    world = World()
    world.grant(100, payer="platform")
    latest = world.now
    world.wait(-50)
    assert world.admit(5, "a", sources=(WALLET, WalletSource(**PLATFORM))).now == latest
    assert imbalances(world.state) == []


def test_end_what_is_overdue_in_every_account_that_may_pay() -> None:
    """Admission sees expiry by time in the accounts of all its payers, without a sweep."""
    world = World()
    world.grant(10, payer="platform")
    world.admit(10, "a", payer="platform", ttl_s=10.0, grace_s=0.0)
    world.wait(10)
    assert world.admit(10, "b", sources=(WALLET, WalletSource(**PLATFORM))).payer == "platform"


# -- holding nothing -----------------------------------------------------------------------------------------


def test_pin_the_wallet_for_what_will_be_measured() -> None:
    """A hold of nothing names who pays, its repeat says the same, and what was measured posts in full."""
    world = World()
    world.grant(5, payer="platform")
    ask = world.ask(0, "a", sources=(WalletSource(**PLATFORM), WALLET))
    first = world.run(ask)
    assert (first.admitted, first.held, first.payer, first.group, first.source) == (
        True,
        0,
        "platform",
        "platform",
        "wallet",
    )
    assert world.run(ask) == first
    assert world.hold("a").parts == ()
    assert world.end("a", 8).payer == "platform"
    assert world.account("platform").debt == 3


def test_pin_an_allowance_for_what_will_be_measured() -> None:
    """What a hold of nothing turns out to cost goes to the window it was pinned to, above its limit if need be."""
    world = World()
    world.admit(0, "a", sources=(world.free(5),))
    world.end("a", 8)
    assert world.today() == (8, 0)
    assert world.refused(0, sources=(world.free(5),)).reason is Reason.ALLOWANCE


def test_pin_the_first_of_a_split_group_that_owes_nothing() -> None:
    """Where nothing is held, the first source that is not overdrawn is pinned, and the decision names it."""
    world = World()
    sources = (split_free(world, 5), SPLIT_WALLET)
    assert world.admit(0, "a", sources=sources).source == "free"
    world.end("a", 8)
    assert world.today() == (8, 0)
    assert world.admit(0, "b", sources=sources).source == "wallet"
    world.end("b", 3)
    assert world.account().debt == 3
    assert world.refused(0, sources=sources).reason is Reason.CREDITS


def test_charge_a_window_that_is_forgotten() -> None:
    """A pinned window that held nothing may be forgotten meanwhile: the charge is told, and books nowhere."""
    world = World()
    world.admit(0, "a", sources=(world.free(5),), ttl_s=10 * DAY_S)
    world.wait(3 * DAY_S)
    world.run(Sweep(keep_windows_s=0.0))
    receipt = world.end("a", 4)
    assert [(part.source, part.amount) for part in receipt.parts] == [(Source.ALLOWANCE, 4)]
    assert world.state.allowances == {}


def test_repeat_an_admission_whose_account_is_forgotten() -> None:
    """A repeat that comes when its account is gone is answered all the same."""
    world = World()
    ask = world.ask(0, "a", sources=(WALLET,))
    world.run(ask)
    world.end("a", None)
    world.state.accounts.clear()
    assert (world.run(ask).source, world.run(ask).available) == ("wallet", None)


# -- split groups --------------------------------------------------------------------------------------------


def test_split_a_call_over_its_sources_in_order() -> None:
    """A split group holds of each source what it has, in order, and tells of the last."""
    world = World()
    world.grant(100)
    decision = world.admit(45, "a", sources=(split_free(world, 30), split_free(world, 5, "trial"), SPLIT_WALLET))
    assert parts(world, "a") == [("free", 30), ("trial", 5), ("gift", 10)]
    assert (decision.held, decision.source, decision.available) == (45, "wallet", 90)


@pytest.mark.parametrize(
    ("charge", "free", "trial", "wallet"),
    [
        (45, 30, 5, 10),
        (33, 30, 3, 0),
        (30, 30, 0, 0),
        (7, 7, 0, 0),
        (None, 0, 0, 0),
        (60, 30, 5, 25),
        (200, 30, 5, 165),
    ],
)
def test_settle_the_parts_in_the_order_of_the_hold(charge: int | None, free: int, trial: int, wallet: int) -> None:
    """A charge uses up the parts in order; what is left is free again; what exceeds them the last one's source pays."""
    world = World()
    world.grant(100)
    world.admit(45, "a", sources=(split_free(world, 30), split_free(world, 5, "trial"), SPLIT_WALLET))
    receipt = world.end("a", charge)
    assert world.today() == (free, 0)
    assert world.today("trial") == (trial, 0)
    assert (world.account().settled, world.account().held) == (wallet, 0)
    assert receipt.available == 100 - wallet
    assert sum(part.amount for part in receipt.parts) == receipt.amount == (charge or 0)
    assert imbalances(world.state) == []


def test_split_with_the_wallet_before_the_allowance() -> None:
    """A wallet may stand before an allowance: overshoot then goes above the allowance's limit."""
    world = World()
    world.grant(4, "one")
    world.grant(4, "two")
    world.admit(10, "a", sources=(SPLIT_WALLET, split_free(world, 5)))
    assert parts(world, "a") == [("one", 4), ("two", 4), ("free", 2)]
    world.end("a", 20)
    assert (world.account().settled, world.today()) == (8, (12, 0))


def test_split_up_to_what_there_is() -> None:
    """With a lower bound a split group holds what its sources have together, from the bound on."""
    world = World()
    world.grant(4)
    sources = (split_free(world, 5), SPLIT_WALLET)
    assert world.refused(20, at_least=10, sources=sources).reason is Reason.CREDITS
    assert world.admit(20, at_least=9, sources=sources).held == 9
    assert world.admit(20, at_least=0, sources=sources).held == 0


def test_split_passes_over_a_source_that_is_overdrawn() -> None:
    """What one source owes is not taken off what the others have, and nothing is pinned to it."""
    world = World()
    world.admit(0, "a", sources=(world.free(5),))
    world.end("a", 9)
    world.grant(10)
    world.admit(10, "b", sources=(split_free(world, 5), SPLIT_WALLET))
    assert parts(world, "b") == [("gift", 10)]


def test_name_a_place_twice_in_a_split_group() -> None:
    """An allowance or a wallet that is named twice has no more for that."""
    world = World()
    world.grant(5)
    sources = (split_free(world, 5), split_free(world, 5), SPLIT_WALLET, WalletSource(3, split=True))
    world.refused(11, sources=sources)
    world.admit(10, "a", sources=sources)
    assert parts(world, "a") == [("free", 5), ("gift", 5)]
    assert imbalances(world.state) == []


def test_refuse_a_split_group_for_a_while() -> None:
    """A split group's refusal is transient if its sources together would admit once their live holds ended unused."""
    world = World()
    world.grant(10)
    sources = (split_free(world, 10), SPLIT_WALLET)
    world.admit(12, "a", sources=sources)
    assert world.refused(20, sources=sources).transient
    assert not world.refused(21, sources=sources).transient


def test_tell_when_a_split_allowance_would_help() -> None:
    """The next window is named where it would help together with what the others have, and nowhere else (S0.8)."""
    world = World()
    trial = split_free(world, 5, "trial")
    world.admit(15, "a", sources=(split_free(world, 10), trial))
    refusal = world.refused(10, sources=(split_free(world, 10), trial))
    assert refusal.resets_at is not None
    assert world.refused(11, sources=(split_free(world, 10), trial)).resets_at is None
    world.grant(1)
    assert world.refused(11, sources=(split_free(world, 10), trial, SPLIT_WALLET)).resets_at == refusal.resets_at


def test_ask_again_where_a_split_groups_calendar_is_stale() -> None:
    """One source whose calendar does not cover the store's time is enough to ask again."""
    world = World()
    stale = split_free(world, 10)
    world.wait(9 * DAY_S)
    assert world.admit(5, sources=(SPLIT_WALLET, stale)).stale_calendar


# -- overdrafts ----------------------------------------------------------------------------------------------


def test_overdraw_up_to_the_bound() -> None:
    """An overdraft may be held beyond the grants, to its last unit, and what it comes to is debt (DESIGN "Holds")."""
    world = World()
    world.grant(10)
    over = (WalletSource(5),)
    decision = world.admit(13, "a", sources=over)
    assert decision.available == -3
    assert [(part.source, part.amount) for part in world.hold("a").parts] == [(Source.GRANT, 10), (Source.DEBT, 3)]
    assert world.refused(3, sources=over).available == 2
    assert world.admit(2, "b", sources=over).admitted
    world.end("a", 13)
    world.end("b", None)
    assert world.sums() == (10, 13, 0, 0, 3)
    assert imbalances(world.state) == []


def test_spend_new_units_before_an_overdraft_becomes_debt() -> None:
    """What was granted since is used for what was held as debt; only the rest is owed."""
    world = World()
    world.admit(5, "a", sources=(WalletSource(5),))
    world.grant(3)
    assert world.account().available == -2
    receipt = world.end("a", 5)
    assert [(part.source, part.amount) for part in receipt.parts] == [(Source.GRANT, 3), (Source.DEBT, 2)]
    assert world.account().debt == 2


def test_call_an_overdraft_that_comes_back_transient() -> None:
    """Units that a live hold keeps as debt to come are there again when it ends unused: the refusal says so."""
    world = World()
    world.grant(5)
    world.admit(10, "a", sources=(WalletSource(5),))
    assert world.refused(5).transient
    assert not world.refused(6).transient


def test_owe_nothing_for_an_overdraft_that_was_not_used() -> None:
    """An overdraft is held, not owed: a call that costs less leaves no debt."""
    world = World()
    world.grant(10)
    world.admit(15, "a", sources=(WalletSource(5),))
    world.end("a", 9)
    assert world.sums() == (10, 9, 0, 0, 0)


# -- windows that roll ---------------------------------------------------------------------------------------

ROLLS = AllowanceSource("rolls", 10, window_s=30 * DAY_S)


def test_begin_a_rolling_window_with_its_first_use() -> None:
    """The window begins with the first use and lasts its days; refusals begin none (S4.13)."""
    world = World()
    world.refused(11, sources=(ROLLS,))
    world.wait(5 * DAY_S)
    world.admit(10, "a", sources=(ROLLS,))
    (window,) = world.state.allowances.values()
    assert (window.start, window.end) == (world.now, world.now + 30 * DAY_S)
    assert world.refused(1, sources=(ROLLS,)).resets_at == pytest.approx(window.end, abs=1e-5)


def test_begin_the_next_rolling_window_strictly_after_the_last_one() -> None:
    """At the instant of its end the old window still counts, and the refusal tells what helps (S4.13)."""
    world = World()
    world.admit(10, "a", sources=(ROLLS,))
    world.end("a", 10)
    world.wait(30 * DAY_S)
    refusal = world.admit(1, sources=(ROLLS,)).refusal
    assert refusal is not None
    assert refusal.retry_after_s is not None
    assert 0 < refusal.retry_after_s < 1e-3
    world.wait(refusal.retry_after_s)
    assert world.admit(10, "b", sources=(ROLLS,)).admitted
    assert len(world.state.allowances) == 2


def test_book_to_the_rolling_window_of_the_admission() -> None:
    """A call that ends when its window is over is charged there, and the running one is not touched."""
    world = World()
    world.admit(10, "a", sources=(ROLLS,), ttl_s=99 * DAY_S)
    world.wait(40 * DAY_S)
    world.admit(4, "b", sources=(ROLLS,))
    world.end("a", 7)
    assert [(row.settled, row.held) for row in world.state.allowances.values()] == [(7, 0), (0, 4)]


def test_find_no_rolling_window_that_was_forgotten() -> None:
    """When the last window is forgotten, the next use begins one."""
    world = World()
    world.admit(10, "a", sources=(ROLLS,))
    world.end("a", 10)
    world.wait(40 * DAY_S)
    world.run(Sweep(keep_windows_s=DAY_S))
    assert world.state.latest == {}
    assert world.admit(10, "b", sources=(ROLLS,)).admitted


def test_stay_in_a_rolling_window_when_the_clock_steps_back() -> None:
    """A clock that stepped back behind the window's start opens no second one."""
    world = World()
    world.admit(10, "a", sources=(ROLLS,))
    world.wait(-50)
    world.refused(1, sources=(ROLLS,))
