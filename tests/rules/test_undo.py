"""Undo: an admission whose caller never learned of it is taken back as if it had not been."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.rules.operations import Admit, IdempotencyAsk, LimitAsk, Preview, Undo
from tests.rules.world import WALLET, World, calendar, fixed, imbalances, sliding, slots, snapshot


def admitted(world: World, amount: int = 0, **more: Any) -> tuple[Admit, Decision]:
    """A call that was admitted, and the decision that got lost."""
    ask = world.ask(amount, **more)
    decision = world.run(ask)
    assert decision.admitted
    return ask, decision


def test_undo_gives_everything_back() -> None:
    """Units, slots and what was counted of every limit are there again: a lost admission leaves no trace (S0.22)."""
    world = World()
    world.grant(100)
    limits = (
        fixed(5),
        sliding(5, key="s", cost=2),
        calendar(5, world.now, key="d"),
        fixed(90, key="t", meter="tokens"),
    )
    world.admit(0, limits=limits)
    was = {key: row.used for key, row in world.state.counters.items()}
    ask, decision = admitted(world, 30, limits=limits, leases=[slots(2)])
    assert world.run(Undo(ask, decision.now)) is True
    assert {key: row.used for key, row in world.state.counters.items()} == was
    assert (world.account().held, world.state.leases, world.state.events) == (0, {}, {})
    assert imbalances(world.state) == []


def test_undo_what_holds_nothing() -> None:
    """A call that was only limited has no row of its own; its counts are given back all the same."""
    world = World()
    ask, decision = admitted(world, limits=[fixed(1)])
    world.refused(limits=[fixed(1)])
    assert world.run(Undo(ask, decision.now)) is True
    assert world.admit(limits=[fixed(1)]).admitted


def test_undo_gives_an_allowance_back() -> None:
    """What was held of an allowance is free in its window (S0.12)."""
    world = World()
    ask, decision = admitted(world, 5, sources=(world.free(5), WALLET))
    world.run(Undo(ask, decision.now))
    assert world.today() == (0, 0)


def test_undo_nothing_that_has_ended() -> None:
    """A call that has ended was somebody's: it stays, and so does what it counted. A repeated undo is one of those."""
    world = World()
    world.grant(100)
    ask, decision = admitted(world, 30, limits=[fixed(5)])
    world.end(ask.id, 30)
    before = snapshot(world.state)
    assert world.run(Undo(ask, decision.now)) is False
    assert snapshot(world.state) == before
    ask, decision = admitted(world, 30, limits=[fixed(5)])
    assert [world.run(Undo(ask, decision.now)) for _ in range(2)] == [True, False]
    assert world.counter().used == 1


def test_undo_frees_the_idempotency_key() -> None:
    """The request was never run: its key is free for the repeat that will be (DESIGN "Idempotency")."""
    world = World()
    world.grant(100)
    key = IdempotencyAsk("key", "print")
    ask, decision = admitted(world, 30, idempotency=key)
    world.run(Undo(ask, decision.now))
    assert world.state.idempotency_keys == {}
    again = world.admit(30, idempotency=key)
    assert (again.admitted, again.replay) == (True, None)


@pytest.mark.parametrize(
    ("limit", "later_s", "used", "previous"),
    [
        (sliding(9, 60.0), 60.0, 1, 0),
        (sliding(9, 60.0), 120.0, 1, 0),
        (fixed(9, 60.0), 60.0, 1, 0),
        (fixed(9, 60.0), 200.0, 1, 0),
    ],
)
def test_undo_in_the_window_of_its_admission(limit: LimitAsk, later_s: float, used: int, previous: int) -> None:
    """A window that began since keeps its own count; a sliding one forgets the call in its past."""
    world = World()
    ask, decision = admitted(world, limits=[limit])
    world.wait(later_s)
    world.admit(limits=[limit])
    world.run(Undo(ask, decision.now))
    assert (world.counter().used, world.counter().previous) == (used, previous)


def test_undo_leaves_a_later_past_alone() -> None:
    """Two windows later the past of a sliding limit is others': what they used still weighs."""
    world = World()
    limit = sliding(9, 60.0)
    ask, decision = admitted(world, limits=[limit])
    for _ in range(2):
        world.wait(60)
        world.admit(limits=[limit])
    world.run(Undo(ask, decision.now))
    assert (world.counter().used, world.counter().previous) == (1, 1)


def test_undo_when_the_counter_is_forgotten() -> None:
    """A counter that nobody keeps any more has nothing to give back."""
    world = World()
    ask, decision = admitted(world, limits=[fixed(1)])
    world.state.counters.clear()
    assert world.run(Undo(ask, decision.now)) is True
    assert world.state.counters == {}


def test_preview_consumes_nothing() -> None:
    """A preview decides as an admission would, who pays included, and changes nothing (S0.37)."""
    world = World()
    world.grant(100)
    ask = world.ask(30, limits=[fixed(5)], leases=[slots(1)], sources=(world.free(20), WALLET))
    before = snapshot(world.state)
    foreseen = world.run(Preview(ask))
    assert snapshot(world.state) == before
    assert world.run(ask) == foreseen
    assert (foreseen.source, foreseen.held, foreseen.available) == ("wallet", 30, 70)
    assert not world.run(Preview(world.ask(71))).admitted
