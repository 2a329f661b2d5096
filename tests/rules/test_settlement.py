"""Settlement: ends by the call, by the policy and by a person; heartbeats; and ends that come after the end."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, EndedBy, EntryKind, Part, Receipt, Source
from asgi_metering.rules.decide import OVERDUE_PER_ADMISSION
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import Claim, End, Renew, Sweep, WalletSource
from asgi_metering.rules.settlement import end_overdue
from asgi_metering.rules.state import Lease
from tests.rules.world import DAY_S, MIDNIGHT, World, fixed, imbalances, sliding, slots, snapshot

GRANT, SETTLE, EXPIRE, DEBT_PAYMENT, LATE, *_ = EntryKind


def events(world: World) -> dict[str, Any]:
    """Payloads of the outbox, by id."""
    return {key: event.payload for key, event in world.state.events.items()}


# -- the first end -------------------------------------------------------------------------------------------


def test_settle_less_than_held_and_free_the_rest() -> None:
    """An end charges what was used and frees the rest, in one step (S3.7)."""
    world = World()
    world.grant(10)
    world.admit(6, "c", line="chat")
    receipt = world.end("c", 4, estimated=True)
    assert receipt == Receipt(
        "c",
        "ada",
        "credits",
        4,
        6,
        Basis.USAGE,
        True,
        EndedBy.CALL,
        (Part(Source.GRANT, "gift", 0.0, 4),),
        6,
        world.now,
        2,
    )
    assert world.sums() == (10, 4, 0, 0, 0)
    assert world.hold("c").receipt == receipt
    assert world.hold("c").state is HoldState.SETTLED
    line = world.entries()[-1]
    assert (line.kind, line.amount, line.ref, line.line, line.basis) == (SETTLE, 4, "c", "chat", Basis.USAGE)
    assert line.parts == receipt.parts
    assert receipt.entry == line.number


def test_settle_zero_without_a_line() -> None:
    """A success that cost nothing is settled with zero: a receipt, no ledger line (S3.23)."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    receipt = world.end("c", 0)
    assert (receipt.amount, receipt.entry, receipt.parts, receipt.basis) == (0, None, (), Basis.USAGE)
    assert world.hold("c").state is HoldState.SETTLED
    assert world.lines() == [(GRANT, 10)]


def test_release_on_no_basis_whatever_is_said() -> None:
    """A release charges nothing, and nothing is its basis."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    receipt = world.end("c", None, Basis.ESTIMATE)
    assert (receipt.amount, receipt.basis, receipt.entry, receipt.available) == (0, Basis.NONE, None, 10)
    assert world.hold("c").state is HoldState.RELEASED


@pytest.mark.parametrize("amount", [-1, MAX_AMOUNT + 1, 1.5, True])
def test_refuse_to_charge_what_is_no_amount(amount: Any) -> None:
    """A charge that is no number of smallest parts is an error, and the hold lives on (S3.21)."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    before = snapshot(world.state)
    with pytest.raises(AmountError, match="The charge"):
        world.end("c", amount)
    assert snapshot(world.state) == before


def test_free_the_slots_with_the_end() -> None:
    """Every slot of a call is free when it ends, however it ends (S0.45)."""
    world = World()
    for amount in (None, 0):
        world.admit(0, f"c{amount}", leases=(slots(1), slots(5, "all", "global")))
        world.end(f"c{amount}", amount)
        assert not world.state.leases


def test_end_a_call_that_held_only_a_slot() -> None:
    """A call without a price ends with an empty receipt, and no account is made for it."""
    world = World()
    world.admit(0, "c", leases=(slots(1),))
    receipt = world.end("c", 0)
    assert (receipt.amount, receipt.held, receipt.parts, receipt.available, receipt.entry) == (0, 0, (), None, None)
    assert not world.state.accounts


def test_read_the_time_of_an_end_no_earlier_than_the_accounts() -> None:
    """An end whose clock stepped back is booked at the largest time that the account has seen."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    seen = world.now
    world.wait(-30)
    assert world.end("c", 1).at == seen
    assert world.entries()[-1].at == seen


# -- allowances ----------------------------------------------------------------------------------------------


def test_settle_an_allowance_above_its_hold_and_its_limit() -> None:
    """What exceeds a hold on an allowance is booked in its window, above the limit if need be, and never as debt."""
    world = World()
    world.grant(100)
    world.admit(5, "c", sources=(world.free(8),))
    receipt = world.end("c", 20)
    assert receipt.parts == (Part(Source.ALLOWANCE, "free", MIDNIGHT, 20),)
    assert (receipt.amount, receipt.available) == (20, None)
    assert world.today() == (20, 0)
    assert world.sums() == (100, 0, 0, 0, 0)
    assert world.lines()[-1] == (SETTLE, 20)
    assert world.refused(1, sources=(world.free(8),)).available == 0
    assert imbalances(world.state) == []


def test_give_an_allowance_back_on_failure() -> None:
    """A use that failed gives its allowance back, and writes no line (S0.12)."""
    world = World()
    world.admit(5, "c", sources=(world.free(5),))
    receipt = world.end("c", None)
    assert (receipt.parts, receipt.entry, receipt.available) == ((), None, None)
    assert world.today() == (0, 0)
    assert world.admit(5, sources=(world.free(5),)).admitted


def test_book_an_allowance_in_the_window_of_the_admission() -> None:
    """A call that runs over midnight is booked in the day that admitted it; the new day stays whole."""
    world = World(MIDNIGHT + DAY_S - 1)
    world.admit(5, "c", sources=(world.free(5),))
    world.wait(10)
    world.end("c", 4)
    assert world.today() == (0, 0)
    assert world.state.allowances["ada", "credits", "free", MIDNIGHT].settled == 4


# -- events --------------------------------------------------------------------------------------------------


def test_write_the_event_in_the_same_step() -> None:
    """The usage event carries what admission knew, what the end says, and what was really charged (S2.2)."""
    world = World()
    world.grant(10)
    world.admit(6, "c", line="chat", facts={"caller": "key-1", "started_at": 5.0, "model": "old"})
    admitted_at = world.now
    world.wait(2)
    world.end("c", 4, Basis.ESTIMATE, estimated=True, event={"outcome": "completed", "model": "new", "amount": 999})
    assert events(world) == {
        "c": {
            "started_at": 5.0,
            "caller": "key-1",
            "outcome": "completed",
            "model": "new",
            "id": "c",
            "payer": "ada",
            "unit": "credits",
            "line": "chat",
            "amount": 4,
            "held": 6,
            "basis": "estimate",
            "estimated": True,
            "ended_at": admitted_at + 2,
        }
    }
    assert world.state.events["c"].at == world.now


def test_tell_when_a_call_began_where_its_facts_do_not() -> None:
    """Every event says when its call started; without a fact of it, that is the admission."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    began = world.now
    world.wait(5)
    world.end("c", None, event={"outcome": "error"})
    assert events(world)["c"]["started_at"] == began
    assert events(world)["c"]["amount"] == 0
    assert events(world)["c"]["basis"] == "none"


def test_write_no_event_where_none_is_asked() -> None:
    """An end without an event writes none, and a repeat never writes a second."""
    world = World()
    world.grant(10)
    world.admit(6, "a")
    world.end("a", 4)
    assert events(world) == {}
    world.admit(6, "b")
    world.end("b", 4, event={"n": 1})
    world.end("b", 4, event={"n": 2})
    assert events(world)["b"]["n"] == 1
    assert len(world.state.events) == 1


# -- heartbeats ----------------------------------------------------------------------------------------------


def test_move_the_deadlines_with_a_heartbeat() -> None:
    """A heartbeat gives hold and slots a whole life from now on, and keeps what was seen so far (S0.48)."""
    world = World()
    world.grant(10)
    world.admit(6, "c", ttl_s=60.0, grace_s=30.0, leases=(slots(1), slots(1, "all")))
    world.wait(45)
    assert world.beat("c", 3)
    assert (world.hold("c").expires_at, world.hold("c").due_at) == (world.now + 60, world.now + 90)
    assert world.hold("c").observed == 3
    for pool in ("pool", "all"):
        assert world.state.leases[pool]["c"] == Lease(pool, "c", world.now + 60)


def test_remember_the_most_that_was_observed() -> None:
    """Heartbeats that overtake one another never lower what was seen."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    for seen in (2, 5, 3):
        world.beat("c", seen)
    assert world.hold("c").observed == 5


def test_never_shorten_a_life() -> None:
    """A heartbeat of a clock that stepped back leaves the deadline where it was."""
    world = World()
    world.admit(0, "c", leases=(slots(1),))
    deadline = world.hold("c").expires_at
    world.wait(-30)
    world.beat("c")
    assert world.hold("c").expires_at == deadline
    assert world.state.leases["pool"]["c"].expires_at == deadline


@pytest.mark.parametrize("observed", [-1, MAX_AMOUNT + 1, 0.5])
def test_refuse_a_heartbeat_of_what_is_no_amount(observed: Any) -> None:
    """What the policy may charge later has to be an amount now."""
    world = World()
    world.grant(10)
    world.admit(6, "c")
    before = snapshot(world.state)
    with pytest.raises(AmountError, match="The observed amount"):
        world.beat("c", observed)
    assert snapshot(world.state) == before


# -- in doubt ------------------------------------------------------------------------------------------------


def test_keep_counting_a_hold_in_doubt() -> None:
    """A hold whose heartbeats stopped still counts as held until somebody ends it (DESIGN "Holds")."""
    world = World()
    world.grant(10)
    world.admit(6, "c", ttl_s=60, grace_s=30)
    world.wait(60)
    refusal = world.admit(5).refusal
    assert refusal is not None
    assert (refusal.available, refusal.held, refusal.transient) == (4, 6, True)
    assert world.hold("c").state is HoldState.IN_DOUBT
    assert world.account().next_due_at == world.now + 30


def test_keep_the_doubt_on_record_when_the_heart_beats_again() -> None:
    """A late heartbeat postpones the policy's end; that there was doubt stays visible."""
    world = World()
    world.grant(10)
    world.admit(6, "c", ttl_s=60, grace_s=30)
    world.wait(60)
    world.run(Sweep())
    assert world.hold("c").state is HoldState.IN_DOUBT
    world.wait(29)
    assert world.beat("c", 2)
    assert world.hold("c").state is HoldState.IN_DOUBT
    world.wait(60)
    world.run(Sweep())
    assert world.hold("c").receipt is None
    world.wait(30)
    world.run(Sweep())
    receipt = world.hold("c").receipt
    assert receipt is not None
    assert (receipt.amount, receipt.ended_by) == (2, EndedBy.POLICY)


@pytest.mark.parametrize(
    ("policy", "observed", "charged", "basis"),
    [
        (Basis.OBSERVED, 4, 4, Basis.OBSERVED),
        (Basis.OBSERVED, 0, 0, Basis.NONE),
        (Basis.OBSERVED, 9, 9, Basis.OBSERVED),
        (Basis.HOLD, 4, 6, Basis.HOLD),
        (Basis.HOLD, 0, 6, Basis.HOLD),
        (Basis.NONE, 4, 0, Basis.NONE),
    ],
)
def test_end_an_overdue_hold_by_its_policy(policy: Basis, observed: int, charged: int, basis: Basis) -> None:
    """After its grace a hold is ended by the policy pinned at admission: observed, the hold, or nothing (S3.9)."""
    world = World()
    world.grant(10)
    world.admit(6, "c", ttl_s=60, grace_s=30, in_doubt=policy, line="chat", facts={"caller": "k"})
    world.beat("c", observed)
    world.wait(89.999)
    world.run(Sweep())
    assert world.hold("c").receipt is None
    world.wait(0.001)
    world.run(Sweep())
    receipt = world.hold("c").receipt
    assert receipt is not None
    assert (receipt.amount, receipt.basis, receipt.ended_by) == (charged, basis, EndedBy.POLICY)
    assert world.hold("c").state is (HoldState.SETTLED if charged else HoldState.RELEASED)
    assert world.sums() == (10, charged, 0, 0, 0)
    event = events(world)["c"]
    assert (event["outcome"], event["reason"], event["amount"]) == ("aborted", "in_doubt", charged)
    assert (event["caller"], event["basis"]) == ("k", basis.value)
    assert imbalances(world.state) == []


def test_tell_no_event_of_a_call_that_was_only_limited() -> None:
    """A hold without facts is of a call that charges nothing: its policy's end writes no event."""
    world = World()
    world.admit(0, "c", leases=(slots(1),), ttl_s=60, grace_s=30)
    world.wait(90)
    world.run(Sweep())
    assert world.hold("c").state is HoldState.RELEASED
    assert events(world) == {}


def test_end_the_longest_overdue_first_and_not_too_many() -> None:
    """One step ends a bounded number of overdue holds, the longest due first, of equals by id (S0.47)."""
    world = World()
    world.grant(100)
    for number in (3, 1, 2):
        world.admit(1, f"late-{number}", ttl_s=50, grace_s=0)
    world.admit(1, "first", ttl_s=40, grace_s=0)
    world.admit(1, "in grace", ttl_s=10, grace_s=500)
    world.wait(50)

    def ended() -> list[str]:
        return sorted(hold.id for hold in world.state.holds.values() if hold.receipt is not None)

    account = ("ada", "credits")
    end_overdue(world.state, account, world.now, 2)
    assert ended() == ["first", "late-1"]
    assert world.account().next_due_at <= world.now
    end_overdue(world.state, account, world.now, 2)
    assert ended() == ["first", "late-1", "late-2", "late-3"]
    assert world.hold("in grace").state is HoldState.HELD
    end_overdue(world.state, account, world.now, 2)
    assert world.hold("in grace").state is HoldState.IN_DOUBT
    assert world.account().next_due_at == world.hold("in grace").due_at


def test_return_what_ending_overdue_holds_has_written() -> None:
    """The changes that are returned, applied to the state before, make the state after."""
    world, other = World(), World()
    for each in (world, other):
        each.grant(100)
        for number in range(3):
            each.admit(1, f"c{number}", ttl_s=50, grace_s=0, in_doubt=Basis.HOLD, facts={"n": number})
        each.wait(50)
    changes = end_overdue(world.state, ("ada", "credits"), world.now, 10)
    other.state.apply(changes)
    assert snapshot(other.state) == snapshot(world.state)
    assert world.account().next_due_at == float("inf")


def test_end_a_bounded_number_with_each_admission() -> None:
    """A crash's aftermath is shared by the admissions that come: none ends more than its share."""
    world = World()
    world.grant(1000)
    for number in range(2 * OVERDUE_PER_ADMISSION + 1):
        world.admit(1, f"dead-{number:02}", ttl_s=50, grace_s=0)
    world.wait(50)
    left = []
    for _ in range(3):
        world.admit(1)
        left.append(sum(1 for hold in world.state.live_holds(("ada", "credits")) if hold.id.startswith("dead")))
    assert left == [OVERDUE_PER_ADMISSION + 1, 1, 0]


def test_end_holds_of_an_account_that_has_no_row() -> None:
    """Calls that only took slots are ended by time, too, though no account is behind them."""
    world = World()
    world.admit(0, "c", leases=(slots(1),), ttl_s=50, grace_s=0)
    world.wait(50)
    world.run(Sweep())
    assert world.hold("c").receipt is not None
    assert not world.state.accounts


# -- after an automatic end ----------------------------------------------------------------------------------


def ended_by_policy(amount: int = 6, observed: int = 4, **more: Any) -> World:
    """A world in which the policy ended call "c" for *observed*."""
    world = World()
    world.grant(20)
    world.admit(amount, "c", ttl_s=60, grace_s=0, line="chat", facts={"caller": "k"}, **more)
    world.beat("c", observed)
    world.wait(60)
    world.run(Sweep())
    return world


@pytest.mark.parametrize(("actual", "late"), [(9, 5), (5, 1), (3, -1), (0, -4), (None, -4)])
def test_post_one_late_entry_of_the_difference(actual: int | None, late: int) -> None:
    """The call's own end, after an automatic one, posts actual minus already charged, either sign, and once."""
    world = ended_by_policy()
    first = world.hold("c").receipt
    assert first is not None
    receipt = world.end("c", actual, Basis.USAGE)
    assert receipt == first._replace(applied=False, late=late)
    assert world.hold("c").receipt == first._replace(late=late)
    assert world.account().settled == 4 + late
    line = world.entries()[-1]
    assert (line.kind, line.amount, line.ref, line.line) == (LATE, late, "c", "chat")
    assert line.basis is (Basis.NONE if actual is None else Basis.USAGE)
    assert line.parts == (Part(Source.GRANT, "gift", 0.0, late),)
    before = snapshot(world.state)
    assert world.end("c", 15).late == late
    assert world.end("c", None).late == late
    assert snapshot(world.state) == before
    assert imbalances(world.state) == []


def test_post_no_line_where_the_policy_was_right() -> None:
    """An own end that agrees with the automatic one posts no line, and is the first and last all the same."""
    world = ended_by_policy()
    lines = world.lines()
    assert world.end("c", 4).late == 0
    assert world.lines() == lines
    assert world.end("c", 9).late == 0
    assert world.lines() == lines


def test_tell_the_difference_in_an_event_of_its_own() -> None:
    """The late end's usage event carries the difference only, so that whoever sums up events is right (S2.2)."""
    world = ended_by_policy()
    world.end("c", 9, Basis.USAGE, estimated=True, event={"outcome": "completed", "model": "m"})
    first, late = events(world)["c"], events(world)["c:late"]
    assert (first["amount"], late["amount"]) == (4, 5)
    assert late == {
        "started_at": world.hold("c").created_at,
        "caller": "k",
        "outcome": "completed",
        "model": "m",
        "event_of": "c",
        "id": "c:late",
        "payer": "ada",
        "unit": "credits",
        "line": "chat",
        "amount": 5,
        "held": 0,
        "basis": "usage",
        "estimated": True,
        "ended_at": world.now,
    }


def test_tell_the_usage_of_a_late_end_that_changes_nothing() -> None:
    """What a call really used is told also where the policy had charged the right amount."""
    world = ended_by_policy()
    world.end("c", 4, event={"outcome": "completed"})
    assert events(world)["c:late"]["amount"] == 0
    world.end("c", 4, event={"outcome": "again"})
    assert events(world)["c:late"]["outcome"] == "completed"


def test_write_no_late_event_where_none_is_asked() -> None:
    """A late end without an event corrects the ledger alone."""
    world = ended_by_policy()
    world.end("c", 9)
    assert set(events(world)) == {"c"}


def test_charge_a_late_end_as_debt_where_nothing_is_left() -> None:
    """A late charge posts in full: free grants first, then debt."""
    world = ended_by_policy()
    world.end("c", 30)
    assert world.sums() == (20, 30, 0, 0, 10)
    assert world.entries()[-1].parts == (Part(Source.GRANT, "gift", 0.0, 16), Part(Source.DEBT, "", 0.0, 10))


def test_charge_a_late_end_that_had_held_nothing() -> None:
    """A call without a price whose own end charges something is charged, late."""
    world = World()
    world.grant(20)
    world.admit(0, "c", leases=(slots(1),), ttl_s=60, grace_s=0)
    world.wait(60)
    world.run(Sweep())
    assert world.end("c", 7).late == 7
    assert world.sums() == (20, 7, 0, 0, 0)


@pytest.mark.parametrize(("actual", "late"), [(9, 5), (1, -3)])
def test_correct_an_allowance_late_in_its_own_window(actual: int, late: int) -> None:
    """A late end of a call that an allowance paid is booked in the window of its admission, either sign."""
    world = World(MIDNIGHT + DAY_S - 30)
    world.admit(6, "c", sources=(world.free(8),), ttl_s=60, grace_s=0)
    world.beat("c", 4)
    world.wait(60)
    world.run(Sweep())
    world.end("c", actual)
    assert world.today() == (0, 0)
    assert world.state.allowances["ada", "credits", "free", MIDNIGHT].settled == actual
    assert world.entries()[-1].parts == (Part(Source.ALLOWANCE, "free", MIDNIGHT, late),)
    assert world.account().settled == 0
    assert imbalances(world.state) == []


@pytest.mark.parametrize(
    ("observed", "actual", "today", "settled", "parts"),
    [
        (0, 5, 3, 2, [("free", 3), ("gift", 2)]),
        (0, 2, 2, 0, [("free", 2)]),
        (0, 9, 3, 6, [("free", 3), ("gift", 6)]),
        (1, 5, 3, 2, [("free", 2), ("gift", 2)]),
        (4, 5, 3, 2, [("gift", 1)]),
    ],
)
@pytest.mark.parametrize("wallet_first", [False, True])
def test_charge_a_late_end_where_it_was_held(
    observed: int, actual: int, today: int, settled: int, parts: list[tuple[str, int]], wallet_first: bool
) -> None:
    """A late end of a split hold takes from each part what an end in time would have taken (DESIGN "Sources")."""
    world = World()
    world.grant(3 if wallet_first else 100)
    sources = [world.free(100 if wallet_first else 3)._replace(split=True), WalletSource(split=True)]
    sources = sources[::-1] if wallet_first else sources
    world.admit(5, "a", sources=tuple(sources), ttl_s=10.0, grace_s=0.0)
    world.run(Renew("a", observed))
    world.wait(10)
    world.run(Sweep())
    assert world.end("a", actual).late == actual - observed
    found = (world.account().settled, world.today()[0]) if wallet_first else (world.today()[0], world.account().settled)
    assert found == (today, settled)
    names = {"free": "gift", "gift": "free"} if wallet_first else {"free": "free", "gift": "gift"}
    assert [(names[part.name], part.amount) for part in world.entries()[-1].parts] == parts
    assert imbalances(world.state) == []


def test_write_down_a_late_end_whose_window_is_forgotten() -> None:
    """Where the allowance's window is gone, the ledger still tells the difference, and no account sum moves."""
    world = World()
    world.admit(6, "c", sources=(world.free(8),), ttl_s=60, grace_s=0)
    world.wait(60)
    world.run(Sweep())
    world.state.allowances.clear()
    assert world.end("c", 5).late == 5
    assert world.lines() == [(LATE, 5)]
    assert not world.state.allowances
    assert imbalances(world.state) == []


@pytest.mark.parametrize("make", [fixed, sliding])
def test_correct_weighted_limits_with_the_late_end(make: Any) -> None:
    """What the call really used replaces the estimate in its pinned window, also when its end comes late."""
    world = World(MIDNIGHT)
    world.grant(20)
    world.admit(6, "c", ttl_s=10, grace_s=0, limits=(make(100, name="tokens", key="t", meter="tokens", cost=30),))
    world.wait(10)
    world.run(Sweep())
    assert world.counter("t").used == 30
    world.end("c", 4, actual={"tokens": 12})
    assert world.counter("t").used == 12
    world.end("c", 4, actual={"tokens": 2})
    assert world.counter("t").used == 12


def test_book_a_late_end_no_earlier_than_the_accounts_time() -> None:
    """A late end whose clock stepped back is booked at the largest time that the account has seen."""
    world = ended_by_policy()
    seen = world.now
    world.wait(-40)
    world.end("c", 9)
    assert world.entries()[-1].at == seen
    assert imbalances(world.state) == []


# -- after the call's own end, or a person's -----------------------------------------------------------------


@pytest.mark.parametrize("by", EndedBy)
@pytest.mark.parametrize("first", [4, None])
def test_change_nothing_after_the_calls_own_end(first: int | None, by: EndedBy) -> None:
    """Once the call has ended itself, nobody's end changes anything (S3.13)."""
    world = World()
    world.grant(20)
    world.admit(6, "c")
    receipt = world.end("c", first)
    before = snapshot(world.state)
    assert world.end("c", 9, by=by, event={"n": 1}, actual={"tokens": 1}) == receipt._replace(applied=False)
    assert snapshot(world.state) == before


@pytest.mark.parametrize("by", [EndedBy.POLICY, EndedBy.PERSON])
@pytest.mark.parametrize("first", [EndedBy.POLICY, EndedBy.PERSON])
def test_let_only_the_call_itself_correct(first: EndedBy, by: EndedBy) -> None:
    """After an automatic end or a person's, another of these changes nothing."""
    world = World()
    world.grant(20)
    world.admit(6, "c")
    world.end("c", 2, by=first)
    before = snapshot(world.state)
    assert world.end("c", 5, by=by).applied is False
    assert snapshot(world.state) == before


@pytest.mark.parametrize("decided", [3, None])
def test_record_and_not_charge_after_a_persons_end(decided: int | None) -> None:
    """What a person decided stands: the call's own end is told in an event of zero, and charged nowhere."""
    world = World()
    world.grant(20)
    world.admit(6, "c", facts={"attributes": {"tier": "pro"}})
    world.person_ends("c", decided)
    sums, lines = world.sums(), world.lines()
    receipt = world.end("c", 9, actual={"tokens": 1}, event={"outcome": "completed"})
    assert (receipt.applied, receipt.late, receipt.amount) == (False, 0, decided or 0)
    assert (world.sums(), world.lines()) == (sums, lines)
    event = events(world)["c:late"]
    assert (event["amount"], event["outcome"]) == (0, "completed")
    assert event["attributes"] == {"tier": "pro", "uncharged_amount": 9}
    world.end("c", 11, event={"outcome": "again"})
    assert events(world)["c:late"]["attributes"]["uncharged_amount"] == 9


def test_leave_the_windows_as_a_person_left_them() -> None:
    """After a person's end the call's own corrects no limit: the person may have done so already."""
    world = World()
    world.admit(0, "c", limits=(fixed(100, name="tokens", key="t", meter="tokens", cost=30),))
    world.end("c", None, by=EndedBy.PERSON, actual={"tokens": 0})
    assert world.counter("t").used == 0
    world.end("c", None, actual={"tokens": 12})
    assert world.counter("t").used == 0
    assert events(world) == {}


def test_release_after_a_person_settled_changes_nothing() -> None:
    """An opposite of a person's decision is recorded with nothing uncharged."""
    world = World()
    world.grant(20)
    world.admit(6, "c")
    world.person_ends("c", 5)
    world.end("c", None, event={"outcome": "error", "attributes": {"a": 1}})
    assert world.account().settled == 5
    assert events(world)["c:late"]["attributes"] == {"a": 1, "uncharged_amount": 0}


def test_deliver_the_event_of_every_end() -> None:
    """Events of ends, late ones included, are claimed from the outbox like any others."""
    world = ended_by_policy()
    world.end("c", 9, event={"outcome": "completed"})
    claimed = world.run(Claim(10, 30))
    assert [event.id for event in claimed] == ["c", "c:late"]


def test_settle_by_a_person_is_charged_like_any_end() -> None:
    """A person's end of a live hold is its first end."""
    world = World()
    world.grant(20)
    world.admit(6, "c")
    receipt = world.person_ends("c", 5)
    assert (receipt.applied, receipt.ended_by, receipt.amount) == (True, EndedBy.PERSON, 5)
    assert world.run(End("c", 5, by=EndedBy.POLICY)).ended_by is EndedBy.PERSON
