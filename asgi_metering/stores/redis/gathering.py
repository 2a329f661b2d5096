"""Gathering: what the partitions of a Cluster answered to one query, as one answer, the parts of calls put together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from operator import attrgetter

from asgi_metering.rules.state import Hold, State
from asgi_metering.stores.contract import AccountsAfter, LiveHolds, PendingEvents, Query, Snapshot
from asgi_metering.stores.redis.parts import NOBODY, call_of, is_part, unmetered

__all__ = ["merged"]


def merged(query: Query, found: Sequence[Snapshot]) -> Snapshot:
    """The snapshots *found* for *query*, one of each partition, as one; the latest of their times is its own."""
    state = State()
    parts = [hold for snapshot in found for hold in snapshot.state.holds.values() if is_part(hold.id)]
    for snapshot in found:
        _take(state, snapshot.state)
    for part in parts:
        hold = state.holds.get(call_of(part.id))
        if hold is not None:
            state.holds[hold.id] = _whole(hold, part)
    events = sorted(state.events.values(), key=attrgetter("at"))
    match query:
        case AccountsAfter(limit=limit):
            state.accounts = dict(sorted(state.accounts.items())[:limit])
        case LiveHolds(limit=limit):
            holds = sorted(state.holds.values(), key=attrgetter("created_at"))
            state.holds = {hold.id: hold for hold in holds[:limit]}
        case PendingEvents(limit=limit):
            events = list(islice(events, limit))
    state.events = {event.id: event for event in events}
    return Snapshot(max(snapshot.now for snapshot in found), state)


def _whole(hold: Hold, part: Hold) -> Hold:
    """The hold of a call as it would be with its part in one place."""
    windows = [window._replace(meter=unmetered(window.meter)) for window in part.windows]
    return hold._replace(
        windows=(*hold.windows, *(window for window in windows if window.meter != "requests")),
        pools=(*hold.pools, *part.pools),
        idempotency_key=hold.idempotency_key or part.idempotency_key,
    )


def _take(state: State, more: State) -> None:
    more.live.pop(NOBODY, None)
    state.holds.update({key: hold for key, hold in more.holds.items() if not is_part(key)})
    for key, row in more.idempotency_keys.items():
        state.idempotency_keys[key] = row._replace(call=call_of(row.call))
    for pool, leases in more.leases.items():
        own = state.leases.setdefault(pool, {})
        for lease in leases.values():
            own[call_of(lease.id)] = lease._replace(id=call_of(lease.id))
    for account, ids in more.live.items():
        # A call that nobody pays for is where its limits are.
        state.live.setdefault(account, set()).update(ids)
    for name in _PLAIN:
        getattr(state, name).update(getattr(more, name))


_PLAIN = (
    "accounts",
    "allowances",
    "charge_keys",
    "checkpoints",
    "closed_grants",
    "counters",
    "delivered",
    "entries",
    "events",
    "grants",
    "latest",
    "refs",
    "units",
)
"""Tables of which each row is in one partition."""
