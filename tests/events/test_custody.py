"""Custody: the memory of who took what, and its bounds."""

from __future__ import annotations

import pytest

from asgi_metering.events import custody
from asgi_metering.events.custody import Custody
from tests.events.support import make_event

ONE, TWO = 1, 2


def ids(held: Custody, bit: int) -> list[str]:
    """Ids of what the sink of *bit* is missing."""
    return [event.id for event in held.missing(bit)]


def test_finish_an_event_when_everyone_took_it() -> None:
    """An event is finished when the last sink has it, not before."""
    held = Custody(2, remember_s=100)
    held.pick_up([make_event()], until=60)
    held.took([make_event()], ONE, now=0)
    assert (held.finished, ids(held, ONE), ids(held, TWO)) == ((), [], ["call-1"])
    held.took([make_event()], TWO, now=0)
    assert (held.finished, len(held)) == (("call-1",), 0)


def test_not_pick_up_again_what_is_finished() -> None:
    """An event that waits for its acknowledgement is offered to nobody, also if it is claimed again."""
    held = Custody(1, remember_s=100)
    held.pick_up([make_event()], until=60)
    held.took([make_event()], ONE, now=0)
    held.pick_up([make_event()], until=120)
    assert ids(held, ONE) == []
    held.forget(held.finished)
    assert held.finished == ()


def test_put_down_what_is_over_and_remember_who_took_it() -> None:
    """The end of a lease ends custody of the event, not the memory of who took it."""
    held = Custody(2, remember_s=100)
    held.pick_up([make_event()], until=60)
    held.took([make_event()], ONE, now=0)
    held.put_down(now=60)
    assert len(held) == 0
    held.pick_up([make_event()], until=120)
    assert (ids(held, ONE), ids(held, TWO)) == ([], ["call-1"])


def test_keep_what_is_known_when_an_event_in_hand_is_claimed_again() -> None:
    """A second claim of an event in hand renews its lease and nothing else."""
    held = Custody(2, remember_s=100)
    held.pick_up([make_event()], until=60)
    held.took([make_event()], ONE, now=0)
    held.pick_up([make_event()], until=120)
    held.put_down(now=60)
    assert (ids(held, ONE), ids(held, TWO)) == ([], ["call-1"])


def test_note_what_was_taken_after_it_was_put_down() -> None:
    """A slow sink's success counts also when the event is in hand no more, and when another took it meanwhile."""
    held = Custody(2, remember_s=100)
    held.pick_up([make_event()], until=60)
    held.put_down(now=60)
    held.took([make_event()], ONE, now=61)
    held.pick_up([make_event()], until=120)
    assert (ids(held, ONE), ids(held, TWO)) == ([], ["call-1"])
    held.put_down(now=120)
    held.took([make_event()], TWO, now=121)
    held.pick_up([make_event()], until=180)
    assert held.finished == ("call-1",)
    held.took([make_event()], TWO, now=122)
    assert held.finished == ("call-1",)
    held.forget(held.finished)
    held.pick_up([make_event()], until=240)
    assert (ids(held, ONE), ids(held, TWO)) == (["call-1"], ["call-1"])


def test_forget_ids_that_do_not_come_back() -> None:
    """An id that another process acknowledged is forgotten after its time."""
    held = Custody(2, remember_s=100)
    for number, now in ((1, 0.0), (2, 50.0)):
        held.pick_up([make_event(number)], until=now)
        held.took([make_event(number)], ONE, now)
        held.put_down(now)
    held.put_down(now=100)
    for number in (1, 2):
        held.pick_up([make_event(number)], until=200)
    assert ids(held, ONE) == ["call-1"]


def test_bound_the_hand_and_the_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bounds the oldest events are put down, and the newest marks are not made: never both grow."""
    monkeypatch.setattr(custody, "MAX_IN_HAND", 2)
    monkeypatch.setattr(custody, "MAX_MARKS", 1)
    held = Custody(2, remember_s=100)
    for number in range(1, 6):
        held.pick_up([make_event(number)], until=1_000)
        held.took([make_event(number)], ONE, now=0)
    held.put_down(now=0)
    assert ids(held, TWO) == ["call-4", "call-5"]
    for number in range(1, 4):
        held.pick_up([make_event(number)], until=1_000)
    # The first mark was kept, so that a backlog claimed round and round is not all given again.
    assert ids(held, ONE) == ["call-2", "call-3"]


def test_put_down_an_event_both_over_and_beyond_the_bound_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event may be over and too many at once."""
    monkeypatch.setattr(custody, "MAX_IN_HAND", 0)
    held = Custody(1, remember_s=100)
    held.pick_up([make_event()], until=1)
    held.put_down(now=2)
    assert len(held) == 0
