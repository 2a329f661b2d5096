"""Conservation: books that balance are proven, and each single thing that is wrong with them is named."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.receipts import Part, Source
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.state import Account, AllowanceWindow, Grant, Hold
from tests.rules.world import MIDNIGHT, WALLET, World

ADA = ("ada", "credits")


def books() -> tuple[Account, dict[str, Grant], dict[str, Hold], list[AllowanceWindow]]:
    """An account with everything: open, closed, expired and future grants, debt, live holds on grants and allowance."""
    world = World()
    world.grant(10, "spent", priority=-1)
    world.admit(10, "a")
    world.end("a", 10)
    world.grant(20, "lapsed", ends_in=50)
    world.admit(4, "b", ttl_s=900)
    world.wait(50)
    world.grant(30, "open")
    world.grant(40, "later", starts_in=500)
    world.admit(7, "c", ttl_s=900)
    world.admit(5, "d", sources=(world.free(9), WALLET), ttl_s=900)
    world.admit(2, "e", sources=(world.free(9), WALLET), ttl_s=900)
    world.end("e", 2)
    state = world.state
    grants = {**state.closed_grants[ADA], **state.grants[ADA]}
    return (
        state.accounts[ADA],
        grants,
        {hold.id: hold for hold in state.live_holds(ADA)},
        list(state.allowances.values()),
    )


def proven(
    account: Account, grants: dict[str, Grant], holds: dict[str, Hold], allowances: list[AllowanceWindow] | None
) -> list[str]:
    """The proof over these rows."""
    return discrepancies(account, grants.values(), holds.values(), allowances)


def test_prove_books_that_balance() -> None:
    """An account with every kind of row balances, with its allowances and without."""
    account, grants, holds, allowances = books()
    assert {grant.begun for grant in grants.values()} == {True, False}
    assert {part.source for hold in holds.values() for part in hold.parts} == {Source.GRANT, Source.ALLOWANCE}
    assert proven(account, grants, holds, allowances) == []
    assert proven(account, grants, holds, None) == []


def test_prove_an_account_in_debt() -> None:
    """Debt is part of what was settled, and no discrepancy."""
    world = World()
    world.grant(5)
    world.admit(5, "c")
    world.end("c", 9)
    account = world.account()
    assert account.debt == 4
    assert discrepancies(account, [world.a_grant()], []) == []


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("granted", "granted is"),
        ("settled", "settled is"),
        ("held", "held by grants is"),
        ("expired", "expired is"),
        ("debt", "settled is"),
    ],
)
def test_name_each_sum_of_the_account_that_is_wrong(field: str, says: str, by: int) -> None:
    """One sum of the account changed by one is found, and the sentence names payer, unit and sum."""
    account, grants, holds, allowances = books()
    wrong = proven(account._replace(**{field: getattr(account, field) + by}), grants, holds, allowances)
    assert any(sentence.startswith(f"'ada' in 'credits': {says}") for sentence in wrong)


def test_name_both_proofs_of_what_is_held() -> None:
    """What is held is proven twice: by the grants, and by the live holds."""
    account, grants, holds, _ = books()
    wrong = proven(account._replace(held=99), grants, holds, None)
    assert wrong == [
        "'ada' in 'credits': held by grants is 99 in the account and 11 in its rows.",
        "'ada' in 'credits': held by live holds is 99 in the account and 11 in its rows.",
    ]


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("field", ["settled", "held", "expired", "amount"])
@pytest.mark.parametrize("name", ["spent", "lapsed", "open"])
def test_find_each_field_of_a_grant_that_is_wrong(name: str, field: str, by: int) -> None:
    """One number of one grant changed by one is found."""
    account, grants, holds, _ = books()
    grants[name] = grants[name]._replace(**{field: getattr(grants[name], field) + by})
    assert proven(account, grants, holds, None) != []


@pytest.mark.parametrize("name", ["open", "later"])
def test_find_a_grant_that_began_at_the_wrong_time(name: str) -> None:
    """A grant that is marked as begun, or as not begun, against the sums is found."""
    account, grants, holds, _ = books()
    grants[name] = grants[name]._replace(begun=not grants[name].begun)
    assert proven(account, grants, holds, None) != []


@pytest.mark.parametrize(
    ("moved", "says"),
    [
        ({"settled": 1}, "grant 'later' was used before it began."),
        ({"held": 3}, "grant 'later' was used before it began."),
        ({"settled": 41}, "grant 'later' is overdrawn by 1."),
        ({"expired": -1}, "grant 'later' has a negative sum."),
        ({"held": 3}, "grant 'later' keeps 3 for holds that keep 0 of it."),
    ],
)
def test_name_what_is_wrong_with_a_grant(moved: dict[str, int], says: str) -> None:
    """A grant that is overdrawn, negative, used too early or held by nobody is named."""
    account, grants, holds, _ = books()
    grants["later"] = grants["later"]._replace(**moved)
    assert f"'ada' in 'credits': {says}" in proven(account, grants, holds, None)


def test_find_units_that_moved_between_grants() -> None:
    """Units that one grant keeps for another's hold are found, though every sum is right."""
    account, grants, holds, _ = books()
    grants["lapsed"] = grants["lapsed"]._replace(held=grants["lapsed"].held - 1)
    grants["open"] = grants["open"]._replace(held=grants["open"].held + 1)
    wrong = proven(account, grants, holds, None)
    assert wrong == [
        "'ada' in 'credits': grant 'lapsed' keeps 3 for holds that keep 4 of it.",
        "'ada' in 'credits': grant 'open' keeps 8 for holds that keep 7 of it.",
    ]


@pytest.mark.parametrize("name", ["spent", "lapsed", "open", "later"])
def test_find_a_grant_that_is_missing_or_double(name: str) -> None:
    """A grant that was lost, or is there twice, is found wherever it moved anything."""
    account, grants, holds, _ = books()
    lost = {key: grant for key, grant in grants.items() if key != name}
    assert bool(proven(account, lost, holds, None)) is (name != "later")
    assert bool(discrepancies(account, [*grants.values(), grants[name]], holds.values())) is (name != "later")


@pytest.mark.parametrize("name", ["b", "c", "d"])
def test_find_a_hold_that_is_missing(name: str) -> None:
    """A live hold that was lost is found by what its sources keep for it."""
    account, grants, holds, allowances = books()
    del holds[name]
    assert proven(account, grants, holds, allowances) != []


@pytest.mark.parametrize("name", ["b", "c", "d"])
def test_find_a_hold_whose_parts_are_wrong(name: str) -> None:
    """A hold whose amount is not the sum of its parts is named."""
    account, grants, holds, allowances = books()
    holds[name] = holds[name]._replace(amount=holds[name].amount + 1)
    (wrong,) = proven(account, grants, holds, allowances)
    assert wrong.startswith(f"'ada' in 'credits': hold {name!r} of ")
    (part,) = holds[name].parts
    holds[name] = holds[name]._replace(parts=(part._replace(name="nobody"),), amount=part.amount)
    assert proven(account, grants, holds, allowances) != []


@pytest.mark.parametrize(
    ("moved", "says"),
    [
        ({"held": 6}, "keeps 6 for holds that keep 5 of it."),
        ({"held": 4}, "keeps 4 for holds that keep 5 of it."),
        ({"start": 1.0}, "keeps 5 for holds that keep 0 of it."),
        ({"name": "other"}, "keeps 5 for holds that keep 0 of it."),
        ({"settled": -1}, "has settled -1, which is negative."),
    ],
)
def test_find_an_allowance_that_is_wrong(moved: dict[str, Any], says: str) -> None:
    """An allowance's window that keeps more or less than its live holds say is named, if allowances are proven."""
    account, grants, holds, allowances = books()
    allowances[0] = allowances[0]._replace(**moved)
    (wrong,) = proven(account, grants, holds, allowances)
    assert wrong.endswith(says)
    assert proven(account, grants, holds, None) == []


def test_find_debt_beside_free_units() -> None:
    """Debt next to units that could pay it is named; units that lapsed or have not begun cannot pay."""
    grant = Grant("ada", "credits", "g", 10, 0, 0.0, 100.0, 1, settled=4)
    account = Account("ada", "credits", granted=10, settled=7, debt=3, seen_at=50.0)
    assert discrepancies(account, [grant], []) == ["'ada' in 'credits': debt of 3 beside free units of grant 'g'."]
    assert discrepancies(account._replace(seen_at=100.0), [grant], []) == []
    later = grant._replace(begun=False, settled=0)
    assert discrepancies(account._replace(granted=0, settled=3), [later], []) == []


def test_find_a_negative_debt() -> None:
    """Debt below zero is named also where the sums agree with it."""
    grant = Grant("ada", "credits", "g", 10, 0, 0.0, 100.0, 1, settled=4)
    account = Account("ada", "credits", granted=10, settled=3, debt=-1, seen_at=50.0)
    assert discrepancies(account, [grant], []) == [
        "'ada' in 'credits': the debt of -1 is negative.",
        "'ada' in 'credits': debt of -1 beside free units of grant 'g'.",
    ]


def test_count_parts_of_one_source_together() -> None:
    """Several holds on one grant are one sum."""
    part = Part(Source.GRANT, "g", 0.0, 2)
    holds = [
        Hold(name, "ada", "credits", 2, (part,), HoldState.HELD, MIDNIGHT, MIDNIGHT, MIDNIGHT, 1.0, 1.0, "none")
        for name in ("a", "b")
    ]
    grant = Grant("ada", "credits", "g", 10, 0, 0.0, 100.0, 1, held=4)
    assert discrepancies(Account("ada", "credits", granted=10, held=4), [grant], holds) == []
