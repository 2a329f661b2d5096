"""
The outbox: usage events are claimed to be delivered, and acknowledged when they were.

Every event of every charged call comes by both, hundreds at once. So the rows of a batch are looked through and put
together column by column, which C does without a step of the interpreter for each. Knows nothing of what events say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import compress, islice, repeat
from operator import ge, itemgetter

from asgi_metering.rules.operations import Acknowledge, Claim
from asgi_metering.rules.state import Change, Event, State, Table, build

__all__ = ["acknowledge", "claim"]

_CLAIMED_UNTIL = itemgetter(Event._fields.index("claimed_until"))


def claim(state: State, ask: Claim, now: float, written: list[Change] | None = None) -> tuple[Event, ...]:
    """
    Take the oldest events that nobody else has claimed.

    Args:
        state: Changed in place.
        ask: How many, and for how long.
        now: The store's time.
        written: Gets what a database has to write; None where nobody asks.
    """
    waiting = state.events.values()
    is_free = map(ge, repeat(now), map(_CLAIMED_UNTIL, waiting))
    found = tuple(islice(compress(waiting, is_free), ask.limit))
    if not found:
        return ()
    ids, ats, payloads, _, acknowledged = zip(*found, strict=True)
    claimed = _rows(ids, ats, payloads, repeat(now + ask.lease_s), acknowledged)
    # Each in its place: they stay the oldest, also when they are claimed again.
    state.events.update(zip(ids, claimed, strict=True))
    if written is not None:
        written.extend(zip(repeat(Table.EVENT), ids, claimed))
    return claimed


def acknowledge(state: State, ask: Acknowledge, now: float, written: list[Change] | None = None) -> int:
    """Have nobody get these events again, and return how many of them still waited. Arguments as of `claim`."""
    events = state.events
    known = tuple(filter(None, map(events.get, ask.ids)))
    if not known:
        return 0
    ids, ats, payloads, claimed_until, _ = zip(*known, strict=True)
    delivered = _rows(ids, ats, payloads, claimed_until, repeat(now))
    # With a default: an id may be named twice.
    deque(map(events.pop, ids, repeat(None)), 0)
    state.delivered.update(zip(ids, delivered, strict=True))
    if written is not None:
        written.extend(zip(repeat(Table.EVENT), ids, delivered))
    return len(known)


def _rows(*columns: Iterable[object]) -> tuple[Event, ...]:
    """Events by their fields; a field may be without an end, the same for all."""
    return tuple(map(build, repeat(Event), zip(*columns, strict=False)))
