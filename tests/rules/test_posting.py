"""Posting: units are given once per id, within bounds, and another body under the same id is named."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError, ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import GrantReceipt
from asgi_metering.rules.operations import PostGrant
from asgi_metering.rules.posting import MAX_LIVE_GRANTS
from asgi_metering.rules.state import NEVER, Grant
from tests.rules.world import DAY_S, World, imbalances, snapshot


def test_give_units_once_per_id() -> None:
    """The same grant again changes nothing and says so (S3.15); its answer tells what the account has by now."""
    world = World()
    assert world.grant(10, "inv-1") == GrantReceipt("inv-1", 10, True, 0, 10)
    world.admit(4)
    before = snapshot(world.state)
    world.wait(DAY_S)
    assert world.grant(10, "inv-1") == GrantReceipt("inv-1", 10, False, 0, 6)
    assert snapshot(world.state) == before


def test_keep_what_a_grant_says() -> None:
    """A grant's row holds all that was posted, and its number is that of its ledger line."""
    world = World()
    world.grant(1, "other")
    world.grant(10, "inv-1", ends_in=50.0, priority=7, kind="promotional", actor="stripe")
    assert world.a_grant("inv-1") == Grant(
        "ada", "credits", "inv-1", 10, 7, world.now, world.now + 50, 2, "promotional", "stripe"
    )
    line = world.entries()[1]
    assert (line.number, line.amount, line.ref, line.actor) == (2, 10, "inv-1", "stripe")


@pytest.mark.parametrize(
    ("changed", "field", "stored", "given"),
    [
        ({"amount": 11}, "amount", 10, 11),
        ({"priority": 1}, "priority", 0, 1),
        ({"expires_at": 9e9}, "expires_at", 8e9, 9e9),
        ({"kind": "promotional"}, "kind", "purchased", "promotional"),
        ({"effective_at": 1e9}, "effective_at", 2e9, 1e9),
        ({"kind": "x", "priority": 2, "amount": 3}, "amount", 10, 3),
        ({"effective_at": 1e9, "kind": "x"}, "kind", "purchased", "x"),
    ],
)
def test_name_the_first_field_that_differs(changed: dict[str, Any], field: str, stored: Any, given: Any) -> None:
    """Another grant under a known id is a conflict that names the first field that differs (S3.15)."""
    world = World()
    ask = PostGrant("inv-1", "ada", "credits", 10, effective_at=2e9, expires_at=8e9)
    world.run(ask)
    before = snapshot(world.state)
    with pytest.raises(IdempotencyConflictError) as caught:
        world.run(ask._replace(**changed))
    assert (caught.value.key, caught.value.field) == ("inv-1", field)
    assert (caught.value.stored, caught.value.given) == (stored, given)
    assert snapshot(world.state) == before


def test_repeat_a_grant_without_its_beginning() -> None:
    """A grant that began "now" is repeated without a beginning, or with the one that it got."""
    world = World()
    world.grant(10)
    begun = world.now
    world.wait(5)
    assert not world.grant(10).applied
    assert not world.run(PostGrant("gift", "ada", "credits", 10, effective_at=begun)).applied


def test_know_a_grant_that_was_used_up_or_lapsed() -> None:
    """The id of a closed grant is taken for ever."""
    world = World()
    world.grant(10, ends_in=50)
    world.admit(4, "c")
    world.end("c", 4)
    world.wait(100)
    world.grant(0, "look")
    with pytest.raises(IdempotencyConflictError, match="expires_at"):
        world.grant(10, ends_in=50)


def test_share_ids_with_nobody() -> None:
    """A grant's id is its account's own."""
    world = World()
    world.grant(10)
    assert world.grant(99, payer="bob").applied


@pytest.mark.parametrize(("starts_in", "ends_in"), [(None, 0.0), (None, -5.0), (10.0, 10.0), (10.0, 5.0), (-50.0, 0.0)])
def test_refuse_a_grant_that_would_never_live(starts_in: float | None, ends_in: float) -> None:
    """A grant that expires before it begins, or has expired already, is a mistake."""
    world = World()
    with pytest.raises(ConfigurationError, match=r"Grant 'gift' expires at .* Give it a later expiry"):
        world.grant(10, starts_in=starts_in, ends_in=ends_in)
    assert snapshot(world.state) == snapshot(World().state)


def test_begin_in_the_past() -> None:
    """A grant that began before it was posted counts at once."""
    world = World()
    assert world.grant(10, starts_in=-50, ends_in=1).available == 10
    assert world.a_grant().effective_at == world.now - 50


@pytest.mark.parametrize("amount", [-1, MAX_AMOUNT + 1, 2.5, True])
def test_refuse_to_give_what_is_no_amount(amount: Any) -> None:
    """A grant's amount is a number of smallest parts within the bound (X.7)."""
    world = World()
    with pytest.raises(AmountError, match="The grant"):
        world.grant(amount)
    assert not world.state.accounts


def test_give_up_to_the_bound_and_no_further() -> None:
    """All that an account was ever given stays within what stores count exactly (X.7)."""
    world = World()
    world.grant(MAX_AMOUNT - 5, "large")
    assert world.grant(5, "rest").available == MAX_AMOUNT
    with pytest.raises(AmountError, match="With grant 'one' of 1, payer 'ada' would have been granted more than"):
        world.grant(1, "one")
    world.admit(MAX_AMOUNT, "c")
    world.end("c", MAX_AMOUNT)
    with pytest.raises(AmountError):
        world.grant(1, "one")


def test_count_later_grants_against_the_bound() -> None:
    """Grants that begin later count from the day they are given: none of them may break the bound when it begins."""
    world = World()
    world.grant(MAX_AMOUNT, "later", starts_in=DAY_S)
    with pytest.raises(AmountError):
        world.grant(1, "now")
    with pytest.raises(AmountError):
        world.grant(1, "another", starts_in=2 * DAY_S)
    world.wait(DAY_S)
    world.grant(0, "look")
    assert world.account().granted == MAX_AMOUNT


def test_make_an_account_with_a_grant_of_nothing() -> None:
    """A grant of zero makes the account; it is closed from the beginning and counts against no bound."""
    world = World()
    for number in range(MAX_LIVE_GRANTS + 1):
        world.grant(0, f"zero-{number}")
    assert world.account().entries == MAX_LIVE_GRANTS + 1
    assert world.grant(5).available == 5


def test_keep_a_hundred_live_grants_and_no_more() -> None:
    """Admission looks through all live grants, so that an account has at most a hundred (DESIGN "Retention")."""
    world = World()
    for number in range(MAX_LIVE_GRANTS):
        world.grant(1, f"g{number}", ends_in=NEVER if number else 100)
    before = snapshot(world.state)
    with pytest.raises(ConfigurationError, match="Payer 'ada' has 100 grants of 'credits' with units left"):
        world.grant(1, "one more")
    assert snapshot(world.state) == before
    world.admit(99, "c")
    world.end("c", 1)
    assert world.grant(1, "instead").applied
    assert imbalances(world.state) == []


def test_make_room_for_a_grant_when_others_have_lapsed() -> None:
    """Grants that are over make room at once, also in an account that nobody has looked at since."""
    world = World()
    for number in range(MAX_LIVE_GRANTS):
        world.grant(1, f"g{number}", ends_in=100)
    world.wait(100)
    assert world.grant(1, "new").available == 1
    assert world.sums() == (101, 0, 0, 100, 0)


def test_post_no_earlier_than_the_accounts_time() -> None:
    """A grant posted by a clock that stepped back is dated by the largest time that the account has seen."""
    world = World()
    world.grant(10)
    seen = world.now
    world.wait(-50)
    world.grant(5, "second")
    assert world.a_grant("second").effective_at == seen
    assert world.entries()[-1].at == seen
    with pytest.raises(ConfigurationError):
        world.grant(5, "third", ends_in=20)
