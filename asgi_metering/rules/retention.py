"""
Retention: what is forgotten, and when. Ledger lines fold into a checkpoint, so that the books still prove themselves.

Does not know how often anybody looks, nor how a store finds what is old.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from heapq import nsmallest
from itertools import islice
from operator import attrgetter

from asgi_metering.receipts import Entry, EntryKind, Source
from asgi_metering.rules.operations import Sweep
from asgi_metering.rules.state import AccountKey, Change, Checkpoint, Counter, State, Table

__all__ = ["effect", "fold", "forgotten", "is_past"]

_SPENDING = frozenset((EntryKind.SETTLE, EntryKind.LATE, EntryKind.BACKFILL, EntryKind.CORRECTION, EntryKind.REFUND))


def effect(entry: Entry) -> tuple[str, int]:
    """What a ledger line did to its account: the name of the sum, and by how much. What allowances paid moves none."""
    if entry.kind in _SPENDING:
        return "settled", entry.amount - sum(part.amount for part in entry.parts if part.source is Source.ALLOWANCE)
    if entry.kind in (EntryKind.GRANT, EntryKind.REVERSAL):
        return "given", entry.amount
    return ("expired", entry.amount) if entry.kind is EntryKind.EXPIRE else ("debt_paid", entry.amount)


def fold(state: State, key: AccountKey, number: int) -> list[Change]:
    """Fold the ledger lines of an account up to *number* into its checkpoint; none where there are none."""
    checkpoint = state.checkpoints.get(key) or Checkpoint(*key, 0, 0.0, {})
    lines = [line for line in state.entries.get(key, ()) if checkpoint.number < line.number <= number]
    if not lines:
        return []
    sums = dict(checkpoint.sums)
    for line in lines:
        name, amount = effect(line)
        sums[name] = sums.get(name, 0) + amount
    return [(Table.CHECKPOINT, key, Checkpoint(*key, lines[-1].number, lines[-1].at, sums))]


def forgotten(state: State, ask: Sweep, now: float) -> Iterator[list[Change]]:
    """What may be forgotten by now, kind by kind, at most *limit* of each; apply each before asking for the next."""
    yield list(islice(_old_holds(state, ask, now), ask.limit))
    yield list(islice(_dead_leases(state, now), ask.limit))
    yield list(islice(_past_counters(state, now), ask.limit))
    yield _past_windows(state, ask, now)
    yield _past_charge_keys(state, ask, now)
    yield _past_idempotency_keys(state, ask, now)
    yield _delivered_events(state, ask, now)
    yield _old_readings(state, ask, now)
    yield _old_entries(state, ask, now)


def _old_holds(state: State, ask: Sweep, now: float) -> Iterator[Change]:
    for hold in state.holds.values():
        if hold.receipt is not None and hold.receipt.at + ask.keep_holds_s <= now:
            yield (Table.HOLD, hold.id, None)


def _dead_leases(state: State, now: float) -> Iterator[Change]:
    for pool, leases in state.leases.items():
        for lease in leases.values():
            if lease.expires_at <= now:
                yield (Table.LEASE, (pool, lease.id), None)


def is_past(counter: Counter, now: float) -> bool:
    """Whether a counter's window is over, and so is the one in which a sliding window still weighs it."""
    return counter.end + (counter.end - counter.start) <= now


def _past_counters(state: State, now: float) -> Iterator[Change]:
    for counter in state.counters.values():
        if is_past(counter, now):
            yield (Table.COUNTER, counter.key, None)


def _past_windows(state: State, ask: Sweep, now: float) -> list[Change]:
    """Windows that are over and hold nothing: kept for a while, for refunds and for whoever looks back."""
    past = [
        (window.end, key)
        for key, window in state.allowances.items()
        if not window.held and window.end + ask.keep_windows_s <= now
    ]
    return [(Table.ALLOWANCE, key, None) for _, key in nsmallest(ask.limit, past)]


def _past_charge_keys(state: State, ask: Sweep, now: float) -> list[Change]:
    """Kept as long as a late end of one of its calls may come: it must not be charged beside the one that paid."""
    past = [
        (row.end, row.key)
        for row in state.charge_keys.values()
        if not row.members and row.end + ask.keep_holds_s <= now
    ]
    return [(Table.CHARGE_KEY, key, None) for _, key in nsmallest(ask.limit, past)]


def _past_idempotency_keys(state: State, ask: Sweep, now: float) -> list[Change]:
    """While its call runs, or is in doubt, a key is kept however old it is."""
    past = [
        (row.expires_at, row.key)
        for row in state.idempotency_keys.values()
        if row.receipt is not None and row.expires_at <= now
    ]
    return [(Table.IDEMPOTENCY, key, None) for _, key in nsmallest(ask.limit, past)]


def _delivered_events(state: State, ask: Sweep, now: float) -> list[Change]:
    """What waits is none of them, however old it is."""
    past = [
        (event.acknowledged_at, event.id)
        for event in state.delivered.values()
        if event.acknowledged_at is not None and event.acknowledged_at + ask.keep_events_s <= now
    ]
    return [(Table.EVENT, key, None) for _, key in nsmallest(ask.limit, past)]


def _old_readings(state: State, ask: Sweep, now: float) -> list[Change]:
    past = [
        (reading.observed_at, key)
        for key, reading in state.readings.items()
        if reading.observed_at + ask.keep_readings_s <= now
    ]
    return [(Table.READING, key, None) for _, key in nsmallest(ask.limit, past)]


def _old_entries(state: State, ask: Sweep, now: float) -> list[Change]:
    """Of at most *limit* accounts, the *limit* oldest lines that are old enough, folded."""
    before = now - ask.keep_entries_s
    old = sorted(key for key, lines in state.entries.items() if lines and lines[0].at <= before)
    changes: list[Change] = []
    for key in old[: ask.limit]:
        lines = state.entries[key]
        count = min(bisect_right(lines, before, key=attrgetter("at")), ask.limit)
        changes.extend(fold(state, key, lines[count - 1].number))
    return changes
