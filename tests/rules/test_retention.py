"""Retention: old ledger lines fold into a checkpoint that still proves the sums; what cannot matter any more goes."""

from __future__ import annotations

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.receipts import EndedBy
from asgi_metering.rules.conservation import ledger_discrepancies
from asgi_metering.rules.operations import (
    Acknowledge,
    Correct,
    Emit,
    IdempotencyAsk,
    KeyAsk,
    Refund,
    ReverseGrant,
    Sweep,
)
from asgi_metering.rules.retention import fold
from asgi_metering.rules.state import Account, Checkpoint
from tests.rules.world import DAY_S, WALLET, World, imbalances

ADA = ("ada", "credits")
FOLD = Sweep(keep_entries_s=60.0)


def busy() -> World:
    """An account with a line of every kind that a ledger has."""
    world = World()
    world.grant(50, "soon", ends_in=50)
    world.grant(30, "bad")
    world.admit(60, "a", ttl_s=10.0, grace_s=0.0)
    world.beat("a", 55)
    world.wait(30)
    world.run(Sweep())
    world.end("a", 57)
    world.run(Refund("r1", "a", "ada", "credits", 10))
    world.run(Correct("k1", "ada", "credits", 40))
    world.grant(5, "small")
    world.grant(9, "later", starts_in=500)
    world.run(ReverseGrant("v1", "bad", "ada", "credits"))
    world.admit(5, "b", sources=(world.free(9), WALLET))
    world.end("b", 5)
    world.wait(30)
    return world


def test_fold_lines_that_are_old_enough() -> None:
    """Lines of that age go into the checkpoint, younger ones stay, and both together prove the account."""
    world = busy()
    lines = len(world.entries())
    world.wait(40)
    world.grant(7, "new")
    world.wait(19)
    world.run(FOLD)
    checkpoint = world.state.checkpoints[ADA]
    assert 0 < checkpoint.number <= lines
    assert world.entries()[0].number == checkpoint.number + 1
    assert imbalances(world.state) == []
    world.wait(60)
    world.run(FOLD)
    assert world.entries() == []
    assert world.state.refs == {}
    assert world.state.checkpoints[ADA].number == world.account().entries
    assert imbalances(world.state) == []


def test_fold_a_few_at_a_time() -> None:
    """A sweep folds at most its limit of lines of at most its limit of accounts; further ones come to the same end."""
    whole, slow = busy(), busy()
    for world in (whole, slow):
        world.grant(5, payer="bob")
        world.wait(60)
    whole.run(FOLD)
    numbers = []
    for _ in range(20):
        slow.run(FOLD._replace(limit=1))
        assert imbalances(slow.state) == []
        numbers.append(slow.state.checkpoints[ADA].number)
    assert numbers[:3] == [1, 2, 3]
    assert slow.state.checkpoints == whole.state.checkpoints
    assert slow.state.entries == whole.state.entries


def test_fold_nothing_twice() -> None:
    """An account without old lines gets no checkpoint, and one with a checkpoint none that says the same again."""
    world = World()
    assert fold(world.state, ADA, 9) == []
    world.grant(5)
    given_at = world.now
    world.run(FOLD)
    assert world.state.checkpoints == {}
    world.wait(60)
    world.run(FOLD)
    assert world.state.checkpoints[ADA] == Checkpoint(*ADA, 1, given_at, {"given": 5})
    assert fold(world.state, ADA, 1) == []


def test_refund_no_charge_that_is_folded() -> None:
    """A line that was folded is nobody's any more: its charge is not refunded by the call's id."""
    world = World()
    world.grant(50)
    world.admit(10, "a")
    world.end("a", 10)
    world.wait(60)
    world.run(FOLD)
    with pytest.raises(ConfigurationError, match="has no charge left"):
        world.run(Refund("r1", "a", "ada", "credits"))


def test_keep_allowance_windows_for_a_while() -> None:
    """A window stays that long after its end, and as long as a call holds some of it."""
    world = World()
    world.admit(5, "a", sources=(world.free(9),), ttl_s=90 * DAY_S)
    world.admit(5, "b", payer="bob", sources=(world.free(9),))
    world.end("b", 5)
    keep = Sweep(keep_windows_s=2 * DAY_S)
    world.wait(2 * DAY_S)
    world.run(keep)
    assert len(world.state.allowances) == 2
    world.wait(DAY_S)
    world.run(keep)
    assert [key[0] for key in world.state.allowances] == ["ada"]
    world.end("a", 5, by=EndedBy.PERSON)
    world.run(keep)
    assert world.state.allowances == {}
    assert world.state.latest == {}


def test_keep_charge_keys_as_long_as_late_ends() -> None:
    """A settled key outlives its window as long as ended calls are kept: no late end is charged beside it (S0.10)."""
    world = World()
    world.grant(50)
    key = KeyAsk("session", window_s=60.0)
    for call, ttl_s in (("a", 900.0), ("late", 10.0)):
        world.run(world.ask(5, call, charge_key=key, ttl_s=ttl_s, grace_s=0.0))
    world.end("a", 5)
    world.wait(70)
    sweep = Sweep(keep_holds_s=100.0)
    world.run(sweep)
    world.run(sweep)
    assert world.end("late", 5).late == 0
    assert world.account().settled == 5
    world.wait(89)
    world.run(sweep)
    assert len(world.state.charge_keys) == 1
    world.wait(1)
    world.run(sweep)
    assert world.state.charge_keys == {}


def test_keep_idempotency_keys_while_they_are_taken() -> None:
    """A key is kept for its time, and as long as its call runs or is in doubt."""
    world = World()
    world.grant(50)
    for call, key in (("a", "k1"), ("runs", "k2")):
        world.run(world.ask(5, call, idempotency=IdempotencyAsk(key, "print", 60.0), ttl_s=900.0))
    world.end("a", 5)
    world.wait(59)
    world.run(Sweep())
    assert len(world.state.idempotency_keys) == 2
    world.wait(1)
    world.run(Sweep())
    assert list(world.state.idempotency_keys) == ["k2"]


def test_forget_delivered_events_after_their_time() -> None:
    """Acknowledged events go after their time, those first that were acknowledged first; what waits stays."""
    world = World()
    world.run(Emit(tuple((event, {}) for event in ("e1", "e2", "e3", "waits"))))
    for event in ("e2", "e3", "e1"):
        world.run(Acknowledge((event,)))
        world.wait(1)
    world.wait(56)
    assert world.run(Sweep(keep_events_s=60.0)) == 0
    world.wait(3)
    assert world.run(Sweep(limit=2, keep_events_s=60.0)) == 2
    assert set(world.state.delivered) == {"e1"}
    assert world.run(Sweep(limit=2, keep_events_s=60.0)) == 1
    assert (set(world.state.events), world.state.delivered) == ({"waits"}, {})


# -- the proof -----------------------------------------------------------------------------------------------


def test_prove_an_account_from_its_ledger() -> None:
    """Lines alone, and a checkpoint with the rest, prove the sums; lines that are younger than the row are left out."""
    world = busy()
    account, entries = world.account(), list(world.entries())
    grants = [*world.state.grants[ADA].values(), *world.state.closed_grants[ADA].values()]
    assert ledger_discrepancies(account, grants, None, entries) == []
    younger = entries[-1]._replace(number=account.entries + 1, amount=999)
    assert ledger_discrepancies(account, grants, None, [*entries, younger]) == []
    assert ledger_discrepancies(Account(*ADA), [], None, []) == []


@pytest.mark.parametrize(
    ("spoilt", "says"),
    [
        (lambda lines: lines[:-1], "the ledger ends with line"),
        (lambda lines: lines[1:], "line 2 follows line 0"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 4 follows line 2"),
        (lambda lines: [*lines[:-1], lines[-1]._replace(at=0.0)], "is older than the one before it"),
        (lambda lines: [lines[0]._replace(amount=51), *lines[1:]], "given is"),
        (lambda lines: [lines[0], lines[1], lines[2]._replace(amount=1), *lines[3:]], "is"),
    ],
    ids=["short", "headless", "gap", "back in time", "another amount", "another line"],
)
def test_find_a_ledger_that_proves_nothing(spoilt: object, says: str) -> None:
    """A line that is missing, moved or changed is found, and the sentence names payer and unit."""
    world = busy()
    grants = [*world.state.grants[ADA].values(), *world.state.closed_grants[ADA].values()]
    wrong = ledger_discrepancies(world.account(), grants, None, spoilt(world.entries()))  # type: ignore[operator]
    assert any(sentence.startswith("'ada' in 'credits': ") and says in sentence for sentence in wrong)


@pytest.mark.parametrize("field", ["granted", "settled", "expired"])
def test_find_each_sum_that_the_ledger_does_not_prove(field: str) -> None:
    """One sum of the account changed by one is found by the ledger alone."""
    world = busy()
    account = world.account()
    grants = [*world.state.grants[ADA].values(), *world.state.closed_grants[ADA].values()]
    wrong = ledger_discrepancies(
        account._replace(**{field: getattr(account, field) + 1}), grants, None, world.entries()
    )
    name = "given" if field == "granted" else field
    assert [sentence.split(": ")[1].split()[0] for sentence in wrong] == [name]
