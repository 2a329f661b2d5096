"""Gathering: what the partitions of a Cluster answered to one query, as one answer, the parts of calls put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from operator import attrgetter, itemgetter
from typing import TypeVar

from asgi_metering.rules.state import NEVER, Hold, PinnedWindow, State
from asgi_metering.stores.contract import AccountsAfter, LiveHolds, PendingEvents, Query, Snapshot
from asgi_metering.stores.redis.parts import COPIED, NOBODY, POOLS, REQUESTS, WINDOWS, call_of, is_part, unmetered

__all__ = ["by_call", "merged", "whole"]

_Some = TypeVar("_Some")


def merged(query: Query, found: Sequence[Snapshot]) -> Snapshot:
    """The snapshots *found* for *query*, one of each partition, as one; the latest of their times is its own."""
    state = State()
    parts = [hold for snapshot in found for hold in snapshot.state.holds.values() if is_part(hold.id)]
    for snapshot in found:
        _take(state, snapshot.state)
    for call, its_parts in by_call(parts).items():
        hold = state.holds.get(call)
        if hold is not None:
            state.holds[call] = whole(hold, its_parts)
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


def by_call(parts: Iterable[Hold]) -> dict[str, list[Hold]]:
    """Parts by the call that they belong to."""
    calls: dict[str, list[Hold]] = {}
    for part in parts:
        calls.setdefault(call_of(part.id), []).append(part)
    return calls


def whole(hold: Hold, parts: Iterable[Hold]) -> Hold:
    """The hold of a call as it would be with its *parts* in one place."""
    windows, pools, key = list(hold.windows), list(hold.pools), hold.idempotency_key
    taken: list[tuple[float, PinnedWindow]] = []
    slots: list[tuple[float, str]] = []
    for part in parts:
        if part.facts.get(COPIED):
            continue
        told = [window._replace(meter=unmetered(window.meter)) for window in part.windows]
        told = [window for window in told if window.meter != REQUESTS]
        taken += zip(part.facts.get(WINDOWS, [NEVER] * len(told)), told, strict=True)
        slots += zip(part.facts.get(POOLS, [NEVER] * len(part.pools)), part.pools, strict=True)
        key = key or part.idempotency_key
    _insert(windows, taken)
    _insert(pools, slots)
    return hold._replace(windows=tuple(windows), pools=tuple(pools), idempotency_key=key)


def _insert(own: list[_Some], others: list[tuple[float, _Some]]) -> None:
    """Put *others* to their places, if they are known: those of a hold that came from another store."""
    for place, some in sorted(others, key=itemgetter(0)):
        own.insert(int(min(place, len(own))), some)


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
    "readings",
    "refs",
    "units",
)
"""Tables of which each row is in one partition."""
