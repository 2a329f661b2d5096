"""
The fast path of ends: see `fast_admission`, whose docstring is this module's too.

Knows the end of a call that nobody else has touched, charged no more than was held; everything else it leaves to
`settlement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from asgi_metering.receipts import Basis, Entry, EntryKind, Part, Receipt, Source
from asgi_metering.rules.fast_admission import window_change
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import End
from asgi_metering.rules.settlement import event_payload
from asgi_metering.rules.state import (
    Account,
    AccountKey,
    Change,
    Counter,
    Event,
    Grant,
    Hold,
    PinnedWindow,
    State,
    Table,
    build,
)
from asgi_metering.rules.windows import correct

__all__ = ["end"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_HELD, _SETTLED, _RELEASED = HoldState.HELD, HoldState.SETTLED, HoldState.RELEASED
_GRANT, _SETTLE, _NONE = Source.GRANT, EntryKind.SETTLE, Basis.NONE

_Settled: TypeAlias = tuple[tuple[Part, ...], int, int]
"""What was charged and where, what the account has left, and the number of its last ledger line."""

_Settle: TypeAlias = Callable[
    [State, AccountKey, Account, tuple[Part, ...], int, float, list[Change] | None], _Settled | None
]


def end(state: State, ask: End, now: float, written: list[Change] | None = None) -> Receipt | None:
    """
    End one plain call; None, and nothing written, where the general rules must decide. Arguments as of `admit`.

    Plain is: a hold that nobody has ended or doubted, without keys, of nothing, or of one open grant that stays open;
    no more charged than was held; no debt, no grant that begins or lapses meanwhile, and no clock that stepped back.
    """
    call, amount, basis, estimated, by, actual, told, _, _ = ask
    hold = state.holds.get(call)
    if hold is None:
        return None
    # fmt: off
    (_, payer, unit, held, parts, status, created_at, expires_at, due_at, ttl_s, grace_s, in_doubt, line, observed,
        pinned, pools, facts, _, group, charge_key, idempotency_key) = hold
    # fmt: on
    if status is not _HELD or charge_key or idempotency_key or len(parts) > 1:
        return None
    key = (payer, unit)
    account = state.accounts.get(key)
    if amount is None:
        charged, basis, status = 0, _NONE, _RELEASED
    elif type(amount) is int and amount >= 0:
        charged, status = amount, _SETTLED
    else:
        return None
    # Whatever may fail comes first: where it does, nothing has been written.
    corrected = _corrected(state, pinned, actual, now) if pinned and actual else ()
    payload = None if told is None else event_payload(hold, told, call, charged, held, basis, estimated, now)
    spent: tuple[Part, ...] = ()
    available = number = None
    if parts:
        is_granted = parts[0][0] is _GRANT
        settle: _Settle = _settle if is_granted else _charge
        moved = None if account is None else settle(state, key, account, parts, charged, now, written)
        if moved is None:
            return None
        spent, left, entries = moved
        if is_granted:
            available = left
        if charged:
            number = entries
            # fmt: off
            entry = build(Entry, (
                payer, unit, number, now, _SETTLE, charged, call, line, basis, estimated, left, "", spent, "",
            ))
            # fmt: on
            lines = state.entries.get(key)
            if lines is None:
                state.entries[key] = [entry]
            else:
                lines.append(entry)
            state.refs.setdefault((payer, unit, call), []).append(entry)
            if written is not None:
                written.append((Table.ENTRY, key, entry))
    elif charged or (account is not None and account[-1] > now):
        return None
    # fmt: off
    receipt: Receipt = build(Receipt, (
        call, payer, unit, charged, held, basis, estimated, by, spent, available, now, number, True, None, True,
    ))
    state.holds[call] = ended = build(Hold, (
        call, payer, unit, held, parts, status, created_at, expires_at, due_at, ttl_s, grace_s, in_doubt, line,
        observed, pinned, pools, facts, receipt, group, "", "",
    ))
    # fmt: on
    live = state.live[key]
    live.discard(call)
    if not live:
        del state.live[key]
    for pool in pools:
        taken = state.leases.get(pool)
        if taken is not None:
            taken.pop(call, None)
            if not taken:
                del state.leases[pool]
    for counter in corrected:
        state.counters[counter[0]] = counter
    event = None
    if payload is not None:
        event = build(Event, (call, now, payload, 0.0, None))
        if call not in state.delivered:
            state.events[call] = event
    if written is not None:
        _tell_ended(written, ended, corrected, event)
    return receipt


def _settle(
    state: State,
    key: AccountKey,
    account: Account,
    parts: tuple[Part, ...],
    amount: int,
    now: float,
    written: list[Change] | None,
) -> _Settled | None:
    """
    Spend *amount* of the one held part, and give back what is left of it.

    None, and nothing written, where that is not plain.
    """
    payer, unit, granted, settled, held, expired, debt, entries, changes_at, due_at, seen_at = account
    ((_, name, _, size),) = parts
    if amount > size or debt or now >= changes_at or now < seen_at:
        return None
    wallet = state.grants[key]
    # fmt: off
    (_, _, _, given, priority, effective_at, expires_at, number, kind, actor, spent, kept, lapsed, begun,
        taken_back) = wallet[name]
    spent += amount
    if expires_at <= now or spent + lapsed + taken_back >= given:
        return None
    grant = build(Grant, (
        payer, unit, name, given, priority, effective_at, expires_at, number, kind, actor, spent, kept - size, lapsed,
        begun, taken_back,
    ))
    # fmt: on
    if amount:
        entries += 1
        if amount < size:
            parts = (build(Part, (_GRANT, name, 0.0, amount)),)
    else:
        parts = ()
    settled += amount
    held -= size
    wallet[name] = grant
    # fmt: off
    state.accounts[key] = account = build(Account, (
        payer, unit, granted, settled, held, expired, debt, entries, changes_at, due_at, now,
    ))
    # fmt: on
    if written is not None:
        written += ((Table.GRANT, key, grant), (Table.ACCOUNT, key, account))
    return parts, granted - settled - expired - held, entries


def _charge(
    state: State,
    key: AccountKey,
    account: Account,
    parts: tuple[Part, ...],
    amount: int,
    now: float,
    written: list[Change] | None,
) -> _Settled | None:
    """As `_settle`, of the window of an allowance; None where it is no window, gone, or charged above what was held."""
    (part,) = parts
    window = state.allowances.get((*key, part.name, part.start))
    if window is None or amount > part.amount or now >= account.next_change_at or now < account.seen_at:
        return None
    window = window._replace(held=window.held - part.amount, settled=window.settled + amount)
    account = account._replace(entries=account.entries + (1 if amount else 0), seen_at=now)
    moved = [window_change(window), (Table.ACCOUNT, key, account)]
    state.apply(moved)
    if written is not None:
        written += moved
    return (part._replace(amount=amount),) if amount else (), account.available, account.entries


def _corrected(state: State, pinned: Sequence[PinnedWindow], actual: Mapping[str, int], now: float) -> list[Counter]:
    """The rows of weighted limits, with what the call used instead of what was taken for it."""
    rows = []
    for window in pinned:
        used = actual.get(window.meter)
        if used is not None:
            row = correct(window, state.counters.get(window.key), used, now)
            if row is not None:
                rows.append(row)
    return rows


def _tell_ended(written: list[Change], hold: Hold, corrected: Sequence[Counter], event: Event | None) -> None:
    call, pools = hold[0], hold[15]
    written.append((Table.HOLD, call, hold))
    for pool in pools:
        written.append((Table.LEASE, (pool, call), None))
    for counter in corrected:
        written.append((Table.COUNTER, counter[0], counter))
    if event is not None:
        written.append((Table.EVENT, call, event))
