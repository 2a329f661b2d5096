"""The one door to the rules: every operation, the outbox, and sweeping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.receipts import Basis, EndedBy, Part, Source
from asgi_metering.rules.decide import run
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Claim,
    Emit,
    End,
    LeaseAsk,
    LimitAsk,
    PostGrant,
    Renew,
    Sweep,
    WindowKind,
)
from asgi_metering.rules.state import Account, Change, Counter, Event, Grant, Hold, Lease, State, Table
from tests.rules.world import World, calendar, fixed, imbalances, sliding, slots, snapshot

ADA = ("ada", "credits")
WEEK_S = 7 * 86_400.0


# -- what is written -----------------------------------------------------------------------------------------


def test_write_exactly_what_has_changed() -> None:
    """What `run` reports as written, applied to a copy of the state, makes the same state: stores rely on it."""
    world, copy = World(), State()

    def step(operation: Any) -> None:
        world.run(operation)
        copy.apply(world.written)
        assert snapshot(copy) == snapshot(world.state)

    step(PostGrant("g", "ada", "credits", 20, expires_at=world.now + 500))
    tokens = sliding(100, key="t", name="tokens", meter="tokens", cost=9)
    step(world.ask(5, "a", limits=(fixed(3), tokens), leases=(slots(3),), facts={"n": 1}, ttl_s=30, grace_s=0))
    step(world.ask(5, "b", sources=(world.free(9),), limits=(calendar(9, world.now, key="d"),)))
    step(world.ask(99, "refused"))
    step(End("b", 3, Basis.USAGE, event={"n": 2}, actual={"tokens": 3}))
    step(Emit((("e", {"n": 3}),)))
    step(Claim(1, 30))
    world.wait(30)
    step(world.ask(1, "c"))
    step(End("a", 7, Basis.USAGE, event={"n": 4}, actual={"tokens": 1}))
    step(Acknowledge(("e", "b")))
    world.wait(600)
    step(Sweep(keep_holds_s=100))
    step(PostGrant("h", "ada", "credits", 20))


def test_write_rows_with_all_their_fields() -> None:
    """Every row that a call writes, and every answer it gets, has all fields of its class."""
    world = World()
    world.grant(20, "g")
    tokens = sliding(100, key="t", name="tokens", meter="tokens", cost=9)
    limits = (fixed(3), tokens, calendar(9, world.now, key="d"))
    admit = world.ask(9, "a", limits=limits, leases=(slots(3),))
    for step in (admit, End("a", 7, Basis.USAGE, event={"n": 4}, actual={"tokens": 1})):
        answer = world.run(step)
        _check_fields([answer, *(row for _, _, row in world.written if row is not None)])


def _check_fields(rows: Iterable[Any]) -> None:
    for row in rows:
        if isinstance(row, tuple):
            assert len(row) == len(getattr(row, "_fields", row))
            _check_fields(row)


def test_change_nothing_when_an_operation_is_a_mistake() -> None:
    """An operation that raises has written nothing and left the state as it was."""
    world = World()
    world.grant(5)
    before = snapshot(world.state)
    with pytest.raises(ConfigurationError):
        world.grant(5, "late", ends_in=-1)
    with pytest.raises(AmountError):
        world.end("nobody", -1)
    assert world.written == []
    assert snapshot(world.state) == before


def test_refuse_an_operation_that_no_rule_knows() -> None:
    """What is no operation is an error, and not silently nothing."""
    with pytest.raises(KeyError):
        run(State(), "admit", 0.0, [])  # type: ignore[arg-type]


# -- the outbox ----------------------------------------------------------------------------------------------


def test_append_events_that_belong_to_no_hold() -> None:
    """Free work is audited: its events are appended with the store's time, and counted."""
    world = World()
    assert world.run(Emit((("e1", {"n": 1}), ("e2", {"n": 2})))) == 2
    assert world.state.events == {"e1": Event("e1", world.now, {"n": 1}), "e2": Event("e2", world.now, {"n": 2})}


def test_claim_the_oldest_events_for_a_time() -> None:
    """A claim takes up to its limit of free events, oldest first; nobody else gets them until it runs out."""
    world = World()
    world.run(Emit(tuple((f"e{number}", {}) for number in range(5))))
    first = world.run(Claim(2, 30))
    assert [event.id for event in first] == ["e0", "e1"]
    assert all(event.claimed_until == world.now + 30 for event in first)
    assert [event.id for event in world.run(Claim(10, 60))] == ["e2", "e3", "e4"]
    assert world.run(Claim(10, 60)) == ()
    world.wait(29.999)
    assert world.run(Claim(10, 60)) == ()
    world.wait(0.001)
    assert [event.id for event in world.run(Claim(10, 60))] == ["e0", "e1"]
    assert world.run(Claim(0, 60)) == ()


def test_tell_nobody_again_what_was_delivered() -> None:
    """Acknowledged events wait no more, unknown ones are passed over, and the answer counts those that waited."""
    world = World()
    world.run(Emit((("e1", {}), ("e2", {}))))
    assert world.run(Acknowledge(("e1", "never"))) == 1
    assert set(world.state.events) == {"e2"}
    assert world.run(Acknowledge(("e1",))) == 0
    assert world.run(Emit((("e1", {}), ("e3", {})))) == 2
    assert (set(world.state.events), set(world.state.delivered)) == ({"e2", "e3"}, {"e1"})


# -- sweeping ------------------------------------------------------------------------------------------------


def test_sweep_ends_overdue_holds_of_every_account() -> None:
    """A sweep puts in doubt and ends what is overdue in any account, and leaves the rest alone (S0.47)."""
    world = World()
    for payer in ("ada", "bob"):
        world.grant(10, payer=payer)
        world.admit(3, f"{payer}-dead", payer=payer, ttl_s=60, grace_s=0)
        world.admit(3, f"{payer}-doubt", payer=payer, ttl_s=60, grace_s=60)
        world.admit(3, f"{payer}-alive", payer=payer, ttl_s=600)
    world.wait(60)
    assert world.run(Sweep()) > 0
    for payer in ("ada", "bob"):
        states = [world.hold(f"{payer}-{what}").state for what in ("dead", "doubt", "alive")]
        assert states == [HoldState.RELEASED, HoldState.IN_DOUBT, HoldState.HELD]
        assert world.account(payer).held == 6
    assert imbalances(world.state) == []


def test_sweep_a_bounded_number_of_holds_over_all_accounts() -> None:
    """One sweep ends at most its limit, accounts together, so that no step grows with the number of payers."""
    world = World()
    for number in range(5):
        world.grant(10, payer=f"p{number}")
        for call in range(2):
            world.admit(1, f"p{number}-{call}", payer=f"p{number}", ttl_s=60, grace_s=0)
    world.wait(60)
    left = []
    for turn in range(5):
        world.run(Sweep(limit=3))
        if not turn:
            # Behind the bound nobody's account is even looked at.
            assert {key for table, key, _ in world.written if table == Table.ACCOUNT} == {
                ("p0", "credits"),
                ("p1", "credits"),
            }
        left.append(sum(1 for hold in world.state.holds.values() if hold.receipt is None))
    assert left == [7, 4, 1, 0, 0]


def test_sweep_each_hold_for_one() -> None:
    """A sweep ends as many holds as its limit says, also one in each account."""
    world = World()
    for number in range(5):
        world.admit(0, f"c{number}", payer=f"p{number}", leases=(slots(9),), ttl_s=60, grace_s=0)
    world.wait(60)
    world.run(Sweep(limit=2))
    assert sum(1 for hold in world.state.holds.values() if hold.receipt is not None) == 2


def test_count_only_what_the_sweep_itself_did() -> None:
    """A sweep in a batch counts its own changes and not those of the operations before it."""
    world = World()
    world.admit(0, "c", leases=(slots(9),), ttl_s=60, grace_s=60)
    world.wait(60)
    written: list[Change] = [(Table.EVENT, "before", None)]
    assert run(world.state, Sweep(), world.now, written) == 2
    assert len(written) == 3


def test_sweep_past_holds_that_only_wait() -> None:
    """Holds whose grace still runs take no place of those that are due."""
    world = World()
    for number in range(4):
        world.admit(0, f"a{number}", payer="a", leases=(slots(9, "a"),), ttl_s=10, grace_s=500)
    world.admit(0, "z", payer="z", leases=(slots(9, "z"),), ttl_s=10, grace_s=40)
    world.wait(10)
    world.run(Sweep())
    world.wait(40)
    world.run(Sweep(limit=2))
    assert world.hold("z").receipt is not None


def test_sweep_at_no_earlier_time_than_an_accounts() -> None:
    """A sweep books what it ends at the account's largest time, and judges by its own what is overdue."""
    world = World()
    world.grant(10)
    world.admit(3, "c", ttl_s=60, grace_s=0)
    world.wait(100)
    world.grant(1, "later")
    seen = world.now
    world.wait(-30)
    world.run(Sweep())
    receipt = world.hold("c").receipt
    assert receipt is not None
    assert receipt.at == seen


def test_sweep_forgets_ended_holds_when_no_late_end_is_awaited() -> None:
    """Ended holds stay as long as late ends are accepted; live ones stay for ever (DESIGN "Retention")."""
    world = World()
    world.grant(10)
    world.admit(3, "old")
    world.end("old", 1)
    world.wait(1)
    world.admit(3, "young")
    world.end("young", 1)
    world.wait(WEEK_S - 1)
    world.run(Sweep())
    assert set(world.state.holds) == {"young"}
    world.admit(3, "alive", ttl_s=WEEK_S)
    world.wait(1)
    assert world.run(Sweep()) == 1
    assert set(world.state.holds) == {"alive"}
    assert world.end("old", 5).known is False


def test_sweep_forgets_dead_leases_and_past_counters() -> None:
    """Slots whose time is over go; counters go when neither their window nor the next one can need them."""
    world = World()
    world.admit(0, "a", leases=(slots(9),), ttl_s=60, grace_s=1000, limits=(sliding(9, 60.0),))
    ends = world.counter().end
    world.admit(0, "b", leases=(slots(9),), ttl_s=600)
    world.wait(60)
    world.run(Sweep())
    assert set(world.state.leases["pool"]) == {"b"}
    world.now = ends + 59.999
    world.run(Sweep())
    assert "k" in world.state.counters
    world.now = ends + 60
    world.run(Sweep())
    assert not world.state.counters


def test_sweep_forgets_a_bounded_number_of_each() -> None:
    """Of each kind of row a sweep forgets at most its limit, and counts what it did."""
    world = World()
    for number in range(5):
        world.admit(0, f"c{number}", leases=(slots(9),), limits=(fixed(9, key=f"k{number}"),), ttl_s=600)
        world.end(f"c{number}", None)
    for number in range(5):
        world.admit(0, f"d{number}", leases=(slots(9),), ttl_s=600, grace_s=WEEK_S)
    world.wait(WEEK_S - 1000)
    assert world.run(Sweep(limit=2, keep_holds_s=10)) == 2 + 2 + 2 + 2
    assert len(world.state.holds) == 8
    assert len(world.state.counters) == 3
    assert len(world.state.leases["pool"]) == 3


def test_sweep_finds_nothing_to_do() -> None:
    """A sweep of a state in which nothing is due changes nothing and says so."""
    world = World()
    world.grant(10)
    world.admit(3, "c", leases=(slots(1),), limits=(fixed(1),))
    before = snapshot(world.state)
    assert world.run(Sweep()) == 0
    assert snapshot(world.state) == before


# -- rows ----------------------------------------------------------------------------------------------------


def test_delete_rows_that_are_there_and_rows_that_are_not() -> None:
    """A change without a row deletes what it names, and nothing where nothing is."""
    state = State()
    put = [
        (Table.HOLD, "h", Hold("h", *ADA, 0, (), HoldState.HELD, 0.0, 0.0, 0.0, 0.0, 0.0, "none")),
        (Table.ALLOWANCE, (*ADA, "free", 0.0), "row"),
        (Table.COUNTER, "k", Counter("k", 0.0, 1.0, 1)),
        (Table.LEASE, ("pool", "a"), Lease("pool", "a", 1.0)),
        (Table.LEASE, ("pool", "b"), Lease("pool", "b", 1.0)),
        (Table.EVENT, "e", Event("e", 0.0, {})),
        (Table.EVENT, "f", Event("f", 0.0, {}, 0.0, 1.0)),
    ]
    empty = snapshot(state)
    deleted = [(table, key, None) for table, key, _ in put if table != Table.HOLD]
    state.apply(deleted)
    assert snapshot(state) == empty
    state.apply(put[1:])
    state.apply([(Table.LEASE, ("pool", "a"), None)])
    assert set(state.leases["pool"]) == {"b"}
    state.apply(deleted)
    assert snapshot(state) == empty


def test_file_grants_by_whether_they_can_still_change() -> None:
    """A grant is kept among the open ones while something of it is free or held, and among the closed ones after."""
    state = State()
    grant = Grant(*ADA, "g", 10, 0, 0.0, 100.0, 1)
    assert state.grant(ADA, "g") is None
    for row, is_open in ((grant, True), (grant.moved(held=10), True), (grant.moved(9, 0, 1), False), (grant, True)):
        state.apply([(Table.GRANT, ADA, row)])
        assert ("g" in state.grants.get(ADA, {})) is is_open
        assert ("g" in state.closed_grants.get(ADA, {})) is not is_open
        assert state.grant(ADA, "g") == row


def test_move_units_and_nothing_else() -> None:
    """A grant after a movement differs from before in its three sums only; so does an ended hold in its end."""
    grant = Grant("p", "u", "g", 10, 1, 2.0, 3.0, 4, "kind", "actor", 1, 2, 3, False)
    assert grant.moved(10, 20, 30) == grant._replace(settled=11, held=22, expired=33)
    part = Part(Source.GRANT, "g", 0.0, 1)
    hold = Hold(
        "h", "p", "u", 1, (part,), HoldState.HELD, 2.0, 3.0, 4.0, 5.0, 6.0, "hold", "l", 7, (), ("q",), {"f": 1}
    )
    world = World()
    receipt = world.end("nobody", 1)
    assert hold.ended(HoldState.SETTLED, receipt) == hold._replace(state=HoldState.SETTLED, receipt=receipt)


def test_ask_for_no_more_than_is_said() -> None:
    """What an operation or a new row does not say is nothing: nothing observed, estimated, held, spent or claimed."""
    assert Renew("c") == Renew("c", 0)
    assert End("c", 1) == End("c", 1, Basis.NONE, False, EndedBy.CALL, {}, None)
    assert Event("e", 5.0, {}) == Event("e", 5.0, {}, 0.0)
    ask = LimitAsk("n", "k", WindowKind.FIXED, 5, 60.0)
    assert ask == LimitAsk("n", "k", WindowKind.FIXED, 5, 60.0, 1, "requests", ())
    assert LeaseAsk("n", "pool", 1).level == "caller"
    assert Admit("c", "p", "u", 1, 1) == Admit("c", "p", "u", 1, 1, (), (), (), 60.0, 30.0, Basis.OBSERVED, "", {})
    hold = Hold("h", "p", "u", 0, (), HoldState.HELD, 0.0, 0.0, 0.0, 0.0, 0.0, "none")
    assert (hold.line, hold.observed, hold.windows, hold.pools, hold.facts, hold.receipt) == ("", 0, (), (), {}, None)


def test_list_live_holds_of_one_account() -> None:
    """An account's live holds are its own, in doubt included, and none once all have ended."""
    world = World()
    world.grant(10)
    world.grant(10, payer="bob")
    world.admit(1, "a")
    world.admit(1, "b", payer="bob")
    assert [hold.id for hold in world.state.live_holds(ADA)] == ["a"]
    world.end("a", None)
    assert list(world.state.live_holds(ADA)) == []
    assert list(world.state.live_holds(("nobody", "credits"))) == []
    assert ADA not in world.state.live


def test_tell_what_is_available() -> None:
    """Available is granted less settled, expired and held; debt makes it negative."""
    assert Account("ada", "credits", 100, 30, 20, 10).available == 40
    assert Account("ada", "credits", 10, 30, 0, 0, 20).available == -20
