"""The life of a hold: every state, every event, and where it leads."""

from __future__ import annotations

from itertools import product

import pytest

from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.hold import TRANSITIONS, HoldEvent, HoldState, diagram, is_live, next_state
from asgi_metering.rules.state import State
from tests.rules.world import World, imbalances, snapshot

HELD, IN_DOUBT, SETTLED, RELEASED = HoldState
RENEW, EXPIRE, SETTLE, RELEASE = HoldEvent

TABLE = {
    HELD: (HELD, IN_DOUBT, SETTLED, RELEASED),
    IN_DOUBT: (IN_DOUBT, None, SETTLED, RELEASED),
    SETTLED: (None, None, None, None),
    RELEASED: (None, None, None, None),
}
"""The table of DESIGN "Holds": where renew, expire, settle and release lead. None changes nothing."""


@pytest.mark.parametrize(("state", "event"), list(product(HoldState, HoldEvent)))
def test_lead_from_every_state_by_every_event(state: HoldState, event: HoldEvent) -> None:
    """Each of the sixteen pairs leads where the table says, and nowhere else (S3.12, S3.13)."""
    assert next_state(state, event) is TABLE[state][list(HoldEvent).index(event)]


@pytest.mark.parametrize("state", HoldState)
def test_keep_units_only_while_something_may_happen(state: HoldState) -> None:
    """A hold keeps its units in the states that have a way out, and in no other."""
    assert is_live(state) is any(TABLE[state])


def test_forbid_anybody_to_change_the_table() -> None:
    """The table and its rows are read-only."""
    with pytest.raises(TypeError):
        TRANSITIONS[SETTLED] = TRANSITIONS[HELD]  # type: ignore[index]
    with pytest.raises(TypeError):
        TRANSITIONS[SETTLED][RELEASE] = RELEASED  # type: ignore[index]


def test_draw_the_table() -> None:
    """The README's diagram is drawn from the table: one line per move, one per end."""
    assert diagram().splitlines() == [
        "held     ── renew   ──► held",
        "held     ── expire  ──► in_doubt",
        "held     ── settle  ──► settled",
        "held     ── release ──► released",
        "in_doubt ── renew   ──► in_doubt",
        "in_doubt ── settle  ──► settled",
        "in_doubt ── release ──► released",
        "settled    (ended: every event answers the first receipt)",
        "released   (ended: every event answers the first receipt)",
    ]


# -- the same table, as operations on a state ---------------------------------------------------------------


def in_state(state: HoldState) -> World:
    """A world with one hold of 10 in *state*, of 100 granted, ttl 60 s and grace 30 s."""
    world = World()
    world.grant(100)
    world.admit(10, "c")
    if state is IN_DOUBT:
        world.wait(60)
        world.admit(1, "passer-by")
        world.end("passer-by", None)
    elif state is SETTLED:
        world.end("c", 7)
    elif state is RELEASED:
        world.end("c", None)
    assert world.hold("c").state is state
    return world


def happens(world: World, event: HoldEvent) -> None:
    """Let *event* come to the hold, as the operation that brings it."""
    if event is RENEW:
        assert world.beat("c", 3) is (world.hold("c").receipt is None)
    elif event is EXPIRE:
        world.wait(max(0.0, world.hold("c").expires_at - world.now))
        world.admit(1, "another")
        world.end("another", None)
    else:
        world.end("c", 5 if event is SETTLE else None)


@pytest.mark.parametrize(("state", "event"), list(product(HoldState, HoldEvent)))
def test_move_a_hold_as_the_table_says(state: HoldState, event: HoldEvent) -> None:
    """What happens to a hold in a state is the table's row, also through the operations; the books stay balanced."""
    world = in_state(state)
    target = TABLE[state][list(HoldEvent).index(event)] or state
    happens(world, event)
    assert world.hold("c").state is target
    assert imbalances(world.state) == []


@pytest.mark.parametrize(("ended", "event"), list(product((SETTLED, RELEASED), (RENEW, SETTLE, RELEASE))))
def test_leave_everything_as_it_was_after_the_end(ended: HoldState, event: HoldEvent) -> None:
    """An event that comes to an ended hold writes nothing at all (S3.14)."""
    world = in_state(ended)
    before = snapshot(world.state)
    happens(world, event)
    assert snapshot(world.state) == before
    assert world.written == []


@pytest.mark.parametrize(("first", "second"), list(product((7, None), (7, 3, None))))
def test_answer_the_first_receipt_after_the_end(first: int | None, second: int | None) -> None:
    """A repeat and an opposite of an end are answered with the first receipt, marked as not applied (S3.13)."""
    world = World()
    world.grant(100)
    world.admit(10, "c")
    receipt = world.end("c", first)
    assert receipt.applied
    assert receipt.known
    again = world.end("c", second)
    assert again == receipt._replace(applied=False)
    assert world.sums() == (100, first or 0, 0, 0, 0)


def test_answer_an_unknown_id_without_an_exception() -> None:
    """An end or heartbeat of a call that no hold is known of changes nothing and says so (S3.14)."""
    world = World()
    receipt = world.end("nobody", 5, by=EndedBy.PERSON)
    assert receipt == Receipt(
        "nobody",
        "",
        "",
        0,
        0,
        Basis.NONE,
        False,
        EndedBy.PERSON,
        (),
        None,
        world.now,
        None,
        applied=False,
        known=False,
    )
    assert world.beat("nobody") is False
    assert snapshot(world.state) == snapshot(State())
