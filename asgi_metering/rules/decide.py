"""
The one door to the rules: an operation, the state and the time in; an answer and the changes out.

Every store goes through here: memory on its whole state, a database on the rows that it loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from asgi_metering.decisions import Decision
from asgi_metering.receipts import GrantReceipt, Receipt
from asgi_metering.rules.admission import admit
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Claim,
    Emit,
    End,
    Operation,
    PostGrant,
    Renew,
    Sweep,
)
from asgi_metering.rules.posting import post_grant
from asgi_metering.rules.settlement import end, end_overdue, renew
from asgi_metering.rules.state import AccountKey, Change, Event, State, Table

__all__ = ["Answer", "run"]

Answer: TypeAlias = Decision | Receipt | GrantReceipt | bool | int | tuple[Event, ...]
"""Admit: Decision. End: Receipt. PostGrant: GrantReceipt. Renew: bool. Claim: events. Others: rows touched."""

OVERDUE_PER_ADMISSION = 20
"""Overdue holds that one admission ends on its way: bounded, so that a crash's aftermath delays nobody for long."""


def run(state: State, operation: Operation, now: float, written: list[Change]) -> Answer:
    """
    Decide *operation* on *state*, apply what it changes, and append it to *written*.

    Args:
        state: The working copy.
        operation: One atomic step.
        now: The store's time. A clock that stepped back is clamped to the largest time seen by the account.
        written: What the store has to write. If the operation raises, nothing of it is here or in *state*,
            except overdue holds that were ended on the way, which stand by themselves.

    Raises:
        MeteringError: The operation is refused as a mistake (see `posting.post_grant`).
    """
    if type(operation) is Sweep:
        return _sweep(state, operation, now, written)
    if type(operation) is Admit:
        now = _before_admission(state, operation, now, written)
    answer, changes = _RULES[type(operation)](state, operation, now)
    state.apply(changes)
    written.extend(changes)
    return answer


def _before_admission(state: State, ask: Admit, now: float, written: list[Change]) -> float:
    """End what is overdue in the account, so that admission sees it; the time, clamped, is returned."""
    key = (ask.payer, ask.unit)
    account = state.accounts.get(key)
    if account is None:
        return now
    if account.seen_at > now:
        now = account.seen_at
    if account.next_due_at <= now:
        written.extend(end_overdue(state, key, now, OVERDUE_PER_ADMISSION))
    return now


def _post(state: State, ask: PostGrant, now: float) -> tuple[Answer, list[Change]]:
    return post_grant(state, ask, _clamped(state, (ask.payer, ask.unit), now))


def _emit(_: State, ask: Emit, now: float) -> tuple[Answer, list[Change]]:
    return len(ask.events), [(Table.EVENT, key, Event(key, now, told)) for key, told in ask.events]


def _acknowledge(state: State, ask: Acknowledge, _: float) -> tuple[Answer, list[Change]]:
    known = [key for key in ask.ids if key in state.events]
    return len(known), [(Table.EVENT, key, None) for key in known]


def _clamped(state: State, key: AccountKey, now: float) -> float:
    account = state.accounts.get(key)
    return now if account is None else max(now, account.seen_at)


def _claim(state: State, ask: Claim, now: float) -> tuple[tuple[Event, ...], list[Change]]:
    claimed: list[Event] = []
    for event in state.events.values():
        if len(claimed) == ask.limit:
            break
        if event.claimed_until <= now:
            claimed.append(event._replace(claimed_until=now + ask.lease_s))
    return tuple(claimed), [(Table.EVENT, event.id, event) for event in claimed]


# By the operation's class: looking it up is cheaper than asking each in turn, for every call twice.
_RULES: Mapping[type, Callable[[State, Any, float], tuple[Answer, list[Change]]]] = {
    Admit: admit,
    End: end,
    Renew: renew,
    PostGrant: _post,
    Emit: _emit,
    Claim: _claim,
    Acknowledge: _acknowledge,
}


def _sweep(state: State, ask: Sweep, now: float, written: list[Change]) -> int:
    """End overdue holds account by account, then forget what can no longer matter."""
    before = len(written)
    due = {
        (hold.payer, hold.unit)
        for ids in state.live.values()
        for hold in map(state.holds.__getitem__, ids)
        if hold.expires_at <= now
    }
    left = ask.limit
    for account in sorted(due):
        changes = end_overdue(state, account, _clamped(state, account, now), left)
        written.extend(changes)
        left -= sum(1 for table, _, _ in changes if table == Table.HOLD)
        if not left:
            break
    for forgotten in (_old_holds(state, ask, now), _dead_leases(state, now), _past_counters(state, now)):
        changes = [change for change, _ in zip(forgotten, range(ask.limit), strict=False)]
        state.apply(changes)
        written.extend(changes)
    return len(written) - before


def _old_holds(state: State, ask: Sweep, now: float) -> Iterator[Change]:
    for hold in state.holds.values():
        if hold.receipt is not None and hold.receipt.at + ask.keep_holds_s <= now:
            yield (Table.HOLD, hold.id, None)


def _dead_leases(state: State, now: float) -> Iterator[Change]:
    for pool, leases in state.leases.items():
        for lease in leases.values():
            if lease.expires_at <= now:
                yield (Table.LEASE, (pool, lease.id), None)


def _past_counters(state: State, now: float) -> Iterator[Change]:
    """Counters whose window is over, and for sliding ones also the window in which they are the past."""
    for counter in state.counters.values():
        if counter.end + (counter.end - counter.start) <= now:
            yield (Table.COUNTER, counter.key, None)
