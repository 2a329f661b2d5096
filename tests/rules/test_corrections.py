"""Corrections: refunds, corrections, backfills and reversals, each once per id and linked to what it corrects."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError, ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import Basis, EntryKind, Posting
from asgi_metering.rules.operations import Backfill, Correct, PostGrant, Refund, ReverseGrant, Sweep, WalletSource
from tests.rules.world import DAY_S, WALLET, World, imbalances, snapshot


def refund(world: World, call: str, amount: int | None = None, posting: str = "r1", **more: Any) -> Posting:
    """Refund a call of ada's."""
    done: Posting = world.run(Refund(posting, call, "ada", "credits", amount, **more))
    assert imbalances(world.state) == []
    return done


def correct(world: World, amount: int, posting: str = "k1", **more: Any) -> Posting:
    """Correct ada's account."""
    done: Posting = world.run(Correct(posting, "ada", "credits", amount, **more))
    assert imbalances(world.state) == []
    return done


def take_back(world: World, grant: str = "gift", posting: str = "v1") -> Posting:
    """Take a grant of ada's back."""
    done: Posting = world.run(ReverseGrant(posting, grant, "ada", "credits", "ann"))
    assert imbalances(world.state) == []
    return done


def called(world: World, held: int, charge: int | None, call: str = "a", **more: Any) -> None:
    """A call that was admitted and has ended."""
    world.admit(held, call, **more)
    world.end(call, charge)


def outcome(done: Posting) -> tuple[int, int, int]:
    """(amount, returned, lapsed) of a posting."""
    return done.amount, done.returned, done.lapsed


# -- refunds -------------------------------------------------------------------------------------------------


def test_refund_a_charge() -> None:
    """All of a charge goes back to its grants, in a line of its own that is linked to the call (DESIGN "Sources")."""
    world = World()
    world.grant(100)
    called(world, 30, 30)
    done = refund(world, "a", actor="ann")
    assert (outcome(done), done.available, done.applied) == ((-30, 30, 0), 100, True)
    line = world.entries()[-1]
    assert (line.kind, line.amount, line.ref, line.id, line.actor) == (EntryKind.REFUND, -30, "a", "r1", "ann")
    assert [part.amount for part in line.parts] == [-30]


def test_refund_from_the_last_part_backwards() -> None:
    """A part of a charge goes back to where its last units came from, further ones to those before."""
    world = World()
    world.grant(10, "one")
    world.grant(10, "two")
    called(world, 20, 20)
    refund(world, "a", 4, "r1")
    assert world.spent("one", "two") == ((10, 0, 0), (6, 0, 0))
    refund(world, "a", 10, "r2")
    assert world.spent("one", "two") == ((6, 0, 0), (0, 0, 0))
    refund(world, "a", None, "r3")
    assert world.sums() == (20, 0, 0, 0, 0)


def test_refund_once_per_id() -> None:
    """The same refund again answers what it did; another amount under its id is a conflict (S3.15)."""
    world = World()
    world.grant(100)
    called(world, 30, 30)
    first = refund(world, "a", 10)
    world.wait(5)
    before = snapshot(world.state)
    again = refund(world, "a", 10)
    assert (again.applied, again.amount, again.at, again.entry) == (False, -10, first.at, first.entry)
    assert refund(world, "a").amount == -10
    with pytest.raises(IdempotencyConflictError, match="amount"):
        refund(world, "a", 11)
    assert snapshot(world.state) == before


def test_refund_never_more_than_the_charge() -> None:
    """Refunds together are at most the charge; what is left after one is all that the next may give (S0.11)."""
    world = World()
    world.grant(100)
    called(world, 30, 30)
    refund(world, "a", 20)
    for amount in (11, 0, 99):
        with pytest.raises(AmountError, match="is not from 1 to 10"):
            refund(world, "a", amount, "r2")
    assert refund(world, "a", None, "r2").amount == -10
    with pytest.raises(ConfigurationError, match="has no charge left"):
        refund(world, "a", None, "r3")


@pytest.mark.parametrize("amount", [-5, 1.0, True, "5"])
def test_refund_no_odd_amount(amount: Any) -> None:
    """A refund is a number of smallest parts, and of no other type or sign (S3.16)."""
    world = World()
    world.grant(100)
    called(world, 30, 30)
    with pytest.raises(AmountError):
        refund(world, "a", amount)


def test_refund_nothing_that_was_not_charged() -> None:
    """An unknown call, one that runs, and one that was released have nothing to give back."""
    world = World()
    world.grant(100)
    world.admit(10, "runs")
    called(world, 10, None, "released")
    for call in ("runs", "released", "nobody", "gift"):
        with pytest.raises(ConfigurationError, match="has no charge left"):
            refund(world, call)


def test_refund_to_an_expired_grant() -> None:
    """It lowers settled and raises expired; returned and lapsed are told apart (DESIGN "Sources")."""
    world = World()
    world.grant(10, "soon", ends_in=50)
    world.grant(10, "late")
    called(world, 15, 15)
    world.wait(50)
    done = refund(world, "a", 12)
    assert outcome(done) == (-12, 5, 7)
    assert world.sums() == (20, 3, 0, 7, 0)
    assert (EntryKind.EXPIRE, 7) in world.lines()


def test_refund_to_an_allowance() -> None:
    """What an allowance paid goes back to its window; once that is over, nobody can spend it again (S0.11)."""
    world = World()
    world.grant(100)
    sources = (world.free(10)._replace(split=True), WalletSource(split=True))
    called(world, 15, 15, sources=sources)
    assert outcome(refund(world, "a", 6)) == (-6, 6, 0)
    assert world.today() == (9, 0)
    world.wait(DAY_S)
    assert outcome(refund(world, "a", None, "r2")) == (-9, 0, 9)
    assert [row.settled for row in world.state.allowances.values()] == [0]
    assert world.account().settled == 0


def test_refund_to_a_window_that_is_forgotten() -> None:
    """A window that nobody keeps any more gets nothing; the refund is told, and all of it lapsed (S0.11)."""
    world = World()
    called(world, 10, 10, sources=(world.free(10),))
    world.wait(3 * DAY_S)
    world.run(Sweep(keep_windows_s=0.0))
    assert outcome(refund(world, "a")) == (-10, 0, 10)


def test_refund_a_debt_that_is_owed_still() -> None:
    """A charge that nothing paid yet is owed no more, before anything goes back to grants."""
    world = World()
    world.grant(10)
    called(world, 10, 25)
    assert outcome(refund(world, "a", 20)) == (-20, 20, 0)
    assert world.sums() == (10, 5, 0, 0, 0)


def test_refund_a_debt_that_was_paid_meanwhile() -> None:
    """What a later grant paid of the charge's debt goes back to grants that have paid, in reverse burn order."""
    world = World()
    world.grant(10, "one")
    called(world, 10, 25)
    world.grant(40, "two")
    assert world.account().debt == 0
    refund(world, "a", 20)
    assert world.spent("one", "two") == ((5, 0, 0), (0, 0, 0))
    assert world.account().available == 45


def test_refund_while_another_call_owes() -> None:
    """What comes back pays debt before it can be spent, as a line of its own."""
    world = World()
    world.grant(10)
    called(world, 10, 10)
    called(world, 0, 8, "b", sources=(WALLET,))
    assert refund(world, "a").available == 2
    assert world.account().debt == 0
    assert (EntryKind.DEBT_PAYMENT, 8) in world.lines()


def test_refund_a_charge_whose_grant_was_taken_back() -> None:
    """What had become debt with its grant is owed no more."""
    world = World()
    world.grant(10)
    called(world, 10, 10)
    take_back(world)
    assert outcome(refund(world, "a")) == (-10, 10, 0)
    assert world.sums() == (0, 0, 0, 0, 0)


def test_refund_a_charge_with_its_late_entry() -> None:
    """What a late end added belongs to the charge, and what it gave back does not."""
    world = World()
    world.grant(100)
    for call, seen, actual in (("more", 10, 16), ("less", 10, 4)):
        world.admit(20, call, ttl_s=10.0, grace_s=0.0)
        world.beat(call, seen)
        world.wait(30)
        world.run(Sweep())
        world.end(call, actual)
    assert refund(world, "more").amount == -16
    assert refund(world, "less").amount == -4
    assert world.account().settled == 0


@pytest.mark.parametrize(
    ("refunded", "actual", "late", "settled"),
    [(10, 4, 0, 0), (3, 4, -6, 1), (8, 4, -2, 0), (10, 15, 5, 5), (4, 10, 0, 6)],
)
def test_end_late_after_a_refund(refunded: int, actual: int, late: int, settled: int) -> None:
    """A late end gives back no more than a refund has left of the charge; what it adds is charged in full."""
    world = World()
    world.grant(100)
    world.admit(20, "a", ttl_s=10.0, grace_s=0.0)
    world.beat("a", 10)
    world.wait(30)
    world.run(Sweep())
    refund(world, "a", refunded)
    assert world.end("a", actual).late == late
    assert world.account().settled == settled
    assert sum(line.kind is EntryKind.LATE for line in world.entries()) == bool(late)
    assert imbalances(world.state) == []


def test_refund_tells_its_event() -> None:
    """A refund's event has a stable id and its own sign, and names the event of the call."""
    world = World()
    world.grant(100)
    world.admit(30, "a", line="chat")
    world.end("a", 30)
    refund(world, "a", 10, event={"reason": "outage"})
    (event,) = world.state.events.values()
    assert event.id == "a:refund:r1"
    told = {name: event.payload[name] for name in ("event_of", "reason", "amount", "line", "outcome", "payer")}
    assert told == {
        "event_of": "a",
        "reason": "outage",
        "amount": -10,
        "line": "chat",
        "outcome": "corrected",
        "payer": "ada",
    }


def test_refund_what_a_correction_gave_back() -> None:
    """A refund gives no more than the account has spent: what a correction gave back before is not given twice."""
    world = World()
    world.grant(20)
    called(world, 10, 10, sources=(world.free(4)._replace(split=True), WalletSource(split=True)))
    correct(world, -5)
    before = snapshot(world.state)
    with pytest.raises(AmountError, match="has given back some of it already"):
        refund(world, "a")
    assert snapshot(world.state) == before
    assert refund(world, "a", 1).amount == -1
    assert world.account().settled == 0


def test_end_late_after_a_correction() -> None:
    """A late end posts what it can give back, and is no mistake where a correction gave back before."""
    world = World()
    world.grant(20)
    world.admit(20, "a", ttl_s=10.0, grace_s=0.0)
    world.beat("a", 10)
    world.wait(30)
    world.run(Sweep())
    correct(world, -7)
    assert world.end("a", 2).late == -3
    assert world.sums() == (20, 0, 0, 0, 0)
    assert imbalances(world.state) == []


def test_end_late_when_everything_was_given_back() -> None:
    """A late end that has nothing left to give back writes no line."""
    world = World()
    world.grant(20)
    world.admit(20, "a", ttl_s=10.0, grace_s=0.0)
    world.beat("a", 10)
    world.wait(30)
    world.run(Sweep())
    correct(world, -10)
    lines = len(world.entries())
    assert world.end("a", 2).late == 0
    assert len(world.entries()) == lines


# -- corrections and backfills -------------------------------------------------------------------------------


def test_correct_an_account_upwards() -> None:
    """A correction charges more without a call behind it, as debt where nothing is there."""
    world = World()
    world.grant(10)
    done = correct(world, 15, line="chat", actor="ann")
    assert (outcome(done), done.available) == ((15, 0, 0), -5)
    line = world.entries()[-1]
    assert (line.kind, line.ref, line.id, line.line, line.actor) == (EntryKind.CORRECTION, "k1", "k1", "chat", "ann")


def test_correct_an_account_downwards() -> None:
    """A correction gives back what was spent: debt first, then to grants, and what comes to a lapsed one is told."""
    world = World()
    world.grant(10, "soon", ends_in=50)
    called(world, 10, 14)
    world.wait(50)
    assert outcome(correct(world, -6)) == (-6, 4, 2)
    assert world.sums() == (10, 8, 0, 2, 0)


@pytest.mark.parametrize("amount", [0, MAX_AMOUNT + 1, -MAX_AMOUNT - 1, 1.5, True])
def test_correct_by_no_odd_amount(amount: Any) -> None:
    """A correction is an int other than 0, within the bounds of amounts (X.7)."""
    world = World()
    with pytest.raises(AmountError, match="corrects nothing, or too much"):
        correct(world, amount)


def test_correct_by_no_more_than_was_spent() -> None:
    """More than was spent cannot come back: that would be a grant."""
    world = World()
    world.grant(10)
    called(world, 10, 4)
    with pytest.raises(AmountError, match="has spent 4"):
        correct(world, -5)
    assert correct(world, -4).available == 10


def test_correct_once_per_id() -> None:
    """The same correction again changes nothing; another amount under its id is a conflict (S3.15)."""
    world = World()
    world.grant(10)
    correct(world, 4)
    assert not correct(world, 4).applied
    with pytest.raises(IdempotencyConflictError):
        correct(world, -4)
    assert world.account().settled == 4


def test_backfill_work_that_was_done() -> None:
    """Work without an admission is charged in full, once per id, and can be refunded by that id."""
    world = World()
    world.grant(10)
    ask = Backfill("b1", "ada", "credits", 15, "batch", "ann", {"n": 1})
    done = world.run(ask)
    assert (outcome(done), done.available) == ((15, 0, 0), -5)
    assert world.entries()[-1].basis is Basis.USAGE
    assert not world.run(ask).applied
    with pytest.raises(IdempotencyConflictError):
        world.run(ask._replace(amount=16))
    assert refund(world, "b1").available == 10


@pytest.mark.parametrize("amount", [0, -1, MAX_AMOUNT + 1])
def test_backfill_no_odd_amount(amount: int) -> None:
    """A backfill charges at least one smallest part, and no more than amounts may be."""
    world = World()
    with pytest.raises(AmountError):
        world.run(Backfill("b1", "ada", "credits", amount))
    assert world.state.accounts == {}


def test_post_within_what_is_counted_exactly() -> None:
    """No posting brings what was spent above 2^53 - 1 smallest parts: it is refused, and changes nothing (X.7)."""
    world = World()
    world.run(Backfill("b1", "ada", "credits", MAX_AMOUNT))
    before = snapshot(world.state)
    for ask in (Backfill("b2", "ada", "credits", 1), Correct("k1", "ada", "credits", 1)):
        with pytest.raises(AmountError, match="would have spent and held more than"):
            world.run(ask)
    assert snapshot(world.state) == before
    assert correct(world, -MAX_AMOUNT).available == 0


def test_tell_postings_of_two_units_apart() -> None:
    """One id may be used once per unit of a payer, and each posting has its own event."""
    world = World()
    for unit in ("credits", "usd"):
        for ask in (Correct("k1", "ada", unit, 5, event={}), Backfill("k1", "ada", unit, 5, event={})):
            assert world.run(ask).applied
    assert len(world.state.events) == 4


# -- reversals -----------------------------------------------------------------------------------------------


def test_take_back_what_is_free_and_what_was_spent() -> None:
    """What is free of a reversed grant goes, what was spent becomes debt: the payer has had it."""
    world = World()
    world.grant(100)
    called(world, 30, 30)
    done = take_back(world)
    assert (outcome(done), done.available) == ((-100, 0, 0), -30)
    assert world.sums() == (0, 30, 0, 0, 30)
    assert world.lines()[-1] == (EntryKind.REVERSAL, -100)


def test_take_back_from_other_grants() -> None:
    """Debt from a reversal is paid at once by what other grants have free."""
    world = World()
    world.grant(20, "bad")
    called(world, 20, 20)
    world.grant(50, "good")
    assert take_back(world, "bad").available == 30
    assert world.spent("good") == ((20, 0, 0),)
    assert world.account().debt == 0


def test_take_back_under_a_hold() -> None:
    """What is held of a reversed grant stays with its hold, and what that gives back lapses."""
    world = World()
    world.grant(20)
    world.admit(15, "a")
    assert take_back(world).amount == -5
    world.refused(1)
    world.end("a", 9)
    assert world.sums() == (15, 9, 0, 6, 0)
    assert imbalances(world.state) == []


def test_take_back_a_grant_that_is_held_whole() -> None:
    """Also a reversal that takes nothing yet is one: no second one follows it."""
    world = World()
    world.grant(20)
    world.admit(20, "a")
    assert take_back(world).amount == 0
    with pytest.raises(ConfigurationError, match="has been taken back already"):
        take_back(world, posting="v2")
    assert not take_back(world).applied
    world.end("a", None)
    assert world.sums() == (20, 0, 0, 20, 0)


def test_take_back_a_grant_that_has_lapsed() -> None:
    """What lapsed of it is gone already: only what was spent is taken."""
    world = World()
    world.grant(20, ends_in=50)
    called(world, 8, 8)
    world.wait(50)
    assert take_back(world).amount == -8
    assert world.sums() == (12, 8, 0, 12, 8)


def test_take_back_a_grant_before_it_begins() -> None:
    """A grant that begins later is taken whole, and never begins."""
    world = World()
    world.grant(20, starts_in=50)
    assert take_back(world).amount == -20
    world.wait(60)
    world.refused(1)
    assert world.account().granted == 0


def test_take_back_no_unknown_grant() -> None:
    """A grant that the account does not have is a mistake, and changes nothing."""
    world = World()
    with pytest.raises(ConfigurationError, match="has no grant 'gift'"):
        take_back(world)
    assert world.state.accounts == {}


def test_give_again_what_was_taken_back() -> None:
    """A repeat of the grant that was reversed, as by a webhook that is sent twice, gives nothing and is no conflict."""
    world = World()
    ask = PostGrant("gift", "ada", "credits", 20, expires_at=world.now + 900)
    world.run(ask)
    take_back(world)
    assert world.run(ask).applied is False
    assert world.account().available == 0
    with pytest.raises(IdempotencyConflictError):
        world.run(ask._replace(amount=21))


# -- time ----------------------------------------------------------------------------------------------------


def test_post_when_the_clock_steps_back() -> None:
    """Postings are dated no earlier than what the account has seen: the ledger never goes back in time."""
    world = World()
    world.grant(100)
    called(world, 10, 10)
    world.wait(-50)
    refund(world, "a", 5)
    correct(world, 3)
    world.run(Backfill("b1", "ada", "credits", 2))
    take_back(world)
    assert len({line.at for line in world.entries()}) == 1
    assert imbalances(world.state) == []
