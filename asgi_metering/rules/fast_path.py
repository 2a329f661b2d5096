"""
The fast path: the common admission and the common end, decided and written in one pass.

Nearly every call finds room everywhere, pays from one grant, and ends with no more than it held. For these the general
rules build looks, offers, a book and a list of changes, nearly all of which say "nothing special here". This module
looks at the same rows and puts the new ones where they belong at once, in a fraction of the time.

It has no rule of its own. At the first thing that is not plain it answers None and has written nothing, and the general
rules decide (`decide.run`). What a running fixed window is, and what moves between the sums of an account, is said
twice for speed, here and in `windows` and `book`: tests/rules/test_fast_path.py runs both ways side by side and demands
equal answers, states and changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.receipts import Basis, Entry, EntryKind, Part, Receipt, Source
from asgi_metering.rules.book import burn_order
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import Admit, End, LimitAsk, WalletSource, WindowKind
from asgi_metering.rules.settlement import event_payload
from asgi_metering.rules.state import (
    Account,
    AccountKey,
    Change,
    Counter,
    Event,
    Grant,
    Hold,
    Lease,
    PinnedWindow,
    State,
    Table,
    build,
)
from asgi_metering.rules.windows import correct, look, window_state
from asgi_metering.sources import WALLET

__all__ = ["admit", "end"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_HELD, _SETTLED, _RELEASED = HoldState.HELD, HoldState.SETTLED, HoldState.RELEASED
_FIXED, _GRANT, _SETTLE, _NONE = WindowKind.FIXED, Source.GRANT, EntryKind.SETTLE, Basis.NONE

_Looks: TypeAlias = tuple[tuple[WindowState, ...], list[Counter], tuple[PinnedWindow, ...]]
"""What the limits say after the call, their rows, and the windows that its end corrects."""

_NO_LOOKS: _Looks = ((), [], ())

_Moved: TypeAlias = tuple[tuple[Part, ...], int, Account, Grant | None, dict[str, Grant]]
"""Where units came from, what the account has left, the rows after that, and where the grant is kept."""

_NO_WALLET: dict[str, Grant] = {}

SHARED_PARTS = 4_096
"""Grants times prices whose parts are one object each: holds stay for long after they ended, and the collector looks at
whatever they are made of. Half a megabyte; what does not fit is made anew."""


# -- admission ---------------------------------------------------------------------------------------------


def admit(state: State, ask: Admit, now: float, written: list[Change] | None = None) -> Decision | None:
    """
    Admit one plain call; None, and nothing written, where the general rules must decide.

    Plain is: a new id and no key; room in every limit and pool; nothing overdue, and no clock that stepped back; no
    source, or one wallet, of whomever, whose next grant covers the whole amount.

    Args:
        state: Changed in place, its indexes included.
        ask: What is asked.
        now: The store's time.
        written: Gets what a database has to write, in the order of the general rules; None where nobody asks.
    """
    # fmt: off
    (call, payer, unit, amount, minimum, sources, limits, leases, ttl_s, grace_s, in_doubt, line, facts, charge_key,
        idempotency) = ask
    # fmt: on
    if charge_key is not None or idempotency is not None or call in state.holds:
        return None
    key = (payer, unit)
    account = state.accounts.get(key)
    if account is not None and not account[-1] <= now < account[-2]:
        return None
    pools: tuple[str, ...] = ()
    for _, pool, slots, _ in leases:
        # Also beside leases that are over and were not cleared away.
        taken = state.leases.get(pool)
        if slots <= (0 if taken is None else len(taken)):
            return None
        pools += (pool,)
    looks = _looked(state, limits, now) if limits else _NO_LOOKS
    if looks is None:
        return None
    windows, counters, pinned = looks
    expires_at = now + ttl_s
    due_at = expires_at + grace_s
    if sources:
        source = sources[0]
        if len(sources) > 1 or type(source) is not WalletSource or not 0 <= minimum <= amount <= MAX_AMOUNT:
            return None
        overdraft, other, group, _ = source
        if other:
            payer = other
            key = (payer, unit)
            account = state.accounts.get(key)
        moved = None if account is None or overdraft < 0 else _hold(state, key, account, amount, expires_at, now)
        if moved is None:
            return None
        parts, available, account, grant, wallet = moved
        # fmt: off
        decision: Decision = build(Decision, (
            call, now, None, amount, available, WALLET, windows, False, payer, group, False, None, None, (),
        ))
        # fmt: on
        state.accounts[key] = account
        if grant is not None:
            wallet[grant[2]] = grant
    elif amount or minimum:
        return None
    else:
        parts, group, account, grant = (), "", None, None
        decision = build(Decision, (call, now, None, 0, None, None, windows, False, "", "", False, None, None, ()))
    rows = state.counters
    for counter in counters:
        rows[counter[0]] = counter
    hold = None
    if sources or leases or pinned:
        # fmt: off
        hold = build(Hold, (
            call, payer, unit, amount, parts, _HELD, now, expires_at, due_at, ttl_s, grace_s, in_doubt, line, 0, pinned,
            pools, facts, None, group, "", "",
        ))
        # fmt: on
        _begin(state, key, hold)
    if written is not None:
        _tell_admitted(written, key, grant, account, counters, hold)
    return decision


def _looked(state: State, limits: Sequence[LimitAsk], now: float) -> _Looks | None:
    """See `_Looks`; None where a limit refuses, or cannot tell."""
    rows = state.counters
    windows: list[WindowState] = []
    counters: list[Counter] = []
    pinned: tuple[PinnedWindow, ...] = ()
    for limit in limits:
        name, key, kind, most, window_s, cost, meter, _ = limit
        row = rows.get(key)
        if kind is _FIXED:
            if row is not None and now < row[2]:
                _, start, end, used, _ = row
            else:
                start, end, used = now, now + window_s, 0
            used += cost
            if used > most:
                return None
            left = end - now if now > start else end - start
            counters.append(build(Counter, (key, start, end, used, 0)))
            windows.append(build(WindowState, (name, most, most - used, left, window_s, meter)))
        else:
            seen = look(limit, row, now)
            if seen is None or not seen.fits:
                return None
            start = seen.counter.start
            counters.append(seen.counter)
            windows.append(window_state(seen, True))
        if meter != "requests":
            pinned += (PinnedWindow(key, start, meter, cost),)
    return tuple(windows), counters, pinned


def _hold(state: State, key: AccountKey, account: Account, amount: int, due_at: float, now: float) -> _Moved | None:
    """Set *amount* aside for a hold that falls due then; None where that is not plain."""
    payer, unit, granted, settled, held, expired, debt, entries, changes_at, next_due_at, seen_at = account
    available = granted - settled - expired - held - amount
    if available < 0 or now >= changes_at or not seen_at <= now < next_due_at:
        return None
    grant, wallet = None, _NO_WALLET
    parts: tuple[Part, ...] = ()
    if amount:
        wallet = state.grants[key]
        if len(wallet) == 1:
            (grant,) = wallet.values()
        else:
            # There is one, since something is available and no change is due.
            grant = min([grant for grant in wallet.values() if grant.begun and grant.free], key=burn_order)
        # fmt: off
        (_, _, name, given, priority, effective_at, expires_at, number, kind, actor, spent, kept, lapsed, begun,
            taken_back) = grant
        if given - spent - kept - lapsed - taken_back < amount:
            return None
        grant = build(Grant, (
            payer, unit, name, given, priority, effective_at, expires_at, number, kind, actor, spent, kept + amount,
            lapsed, begun, taken_back,
        ))
        # fmt: on
        parts = _parts(name, amount)
    if due_at > next_due_at:
        due_at = next_due_at
    # fmt: off
    account = build(Account, (
        payer, unit, granted, settled, held + amount, expired, debt, entries, changes_at, due_at, now,
    ))
    # fmt: on
    return parts, available, account, grant, wallet


@lru_cache(SHARED_PARTS)
def _parts(grant: str, amount: int) -> tuple[Part, ...]:
    return (build(Part, (_GRANT, grant, 0.0, amount)),)


def _begin(state: State, key: AccountKey, hold: Hold) -> None:
    """Put a new hold, and take its slots."""
    call, expires_at, pools = hold[0], hold[7], hold[15]
    state.holds[call] = hold
    live = state.live.get(key)
    if live is None:
        state.live[key] = {call}
    else:
        live.add(call)
    for pool in pools:
        lease = build(Lease, (pool, call, expires_at))
        taken = state.leases.get(pool)
        if taken is None:
            state.leases[pool] = {call: lease}
        else:
            taken[call] = lease


def _tell_admitted(
    written: list[Change],
    key: AccountKey,
    grant: Grant | None,
    account: Account | None,
    counters: Sequence[Counter],
    hold: Hold | None,
) -> None:
    if grant is not None:
        written.append((Table.GRANT, key, grant))
    if account is not None:
        written.append((Table.ACCOUNT, key, account))
    for counter in counters:
        written.append((Table.COUNTER, counter[0], counter))
    if hold is not None:
        call, expires_at, pools = hold[0], hold[7], hold[15]
        for pool in pools:
            written.append((Table.LEASE, (pool, call), build(Lease, (pool, call, expires_at))))
        written.append((Table.HOLD, call, hold))


# -- end ---------------------------------------------------------------------------------------------------


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
    if account is not None and account[-1] > now:
        return None
    if amount is None:
        charged, basis, status = 0, _NONE, _RELEASED
    elif type(amount) is int and amount >= 0:
        charged, status = amount, _SETTLED
    else:
        return None
    entry = number = None
    if parts:
        moved = None if account is None else _settle(state, key, account, parts, charged, now)
        if moved is None:
            return None
        spent, available, account, grant, wallet = moved
        if charged:
            number = account[7]
            # fmt: off
            entry = build(Entry, (
                payer, unit, number, now, _SETTLE, charged, call, line, basis, estimated, available, "", spent, "",
            ))
            # fmt: on
    elif charged:
        return None
    else:
        spent, available, account, grant, wallet = (), None, None, None, _NO_WALLET
    # fmt: off
    receipt: Receipt = build(Receipt, (
        call, payer, unit, charged, held, basis, estimated, by, spent, available, now, number, True, None, True,
    ))
    hold = build(Hold, (
        call, payer, unit, held, parts, status, created_at, expires_at, due_at, ttl_s, grace_s, in_doubt, line,
        observed, pinned, pools, facts, receipt, group, "", "",
    ))
    # fmt: on
    corrected = _corrected(state, pinned, actual) if pinned and actual else ()
    event = None
    if told is not None:
        event = build(Event, (call, now, event_payload(hold, receipt, told), 0.0, None))
        if call not in state.delivered:
            state.events[call] = event
    if grant is not None and account is not None:
        state.accounts[key] = account
        wallet[grant[2]] = grant
        if entry is not None:
            _put_line(state, key, entry)
    _over(state, key, hold)
    for counter in corrected:
        state.counters[counter[0]] = counter
    if written is not None:
        _tell_ended(written, key, grant, account, entry, hold, corrected, event)
    return receipt


def _settle(
    state: State, key: AccountKey, account: Account, parts: tuple[Part, ...], amount: int, now: float
) -> _Moved | None:
    """Spend *amount* of the one held part, and give back what is left of it; None where that is not plain."""
    payer, unit, granted, settled, held, expired, debt, entries, changes_at, due_at, _ = account
    ((source, name, _, size),) = parts
    if source is not _GRANT or amount > size or debt or now >= changes_at:
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
    # fmt: off
    account = build(Account, (
        payer, unit, granted, settled, held, expired, debt, entries, changes_at, due_at, now,
    ))
    # fmt: on
    return parts, granted - settled - expired - held, account, grant, wallet


def _corrected(state: State, pinned: Sequence[PinnedWindow], actual: Mapping[str, int]) -> list[Counter]:
    """The rows of weighted limits, with what the call used instead of what was taken for it."""
    rows = []
    for window in pinned:
        used = actual.get(window.meter)
        if used is not None:
            row = correct(window, state.counters.get(window.key), used)
            if row is not None:
                rows.append(row)
    return rows


def _put_line(state: State, key: AccountKey, entry: Entry) -> None:
    lines = state.entries.get(key)
    if lines is None:
        state.entries[key] = [entry]
    else:
        lines.append(entry)
    ref = (entry[0], entry[1], entry[6])
    about = state.refs.get(ref)
    if about is None:
        state.refs[ref] = [entry]
    else:
        about.append(entry)


def _over(state: State, key: AccountKey, hold: Hold) -> None:
    """Put an ended hold, and give its slots back."""
    call, pools = hold[0], hold[15]
    state.holds[call] = hold
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


def _tell_ended(
    written: list[Change],
    key: AccountKey,
    grant: Grant | None,
    account: Account | None,
    entry: Entry | None,
    hold: Hold,
    corrected: Sequence[Counter],
    event: Event | None,
) -> None:
    if grant is not None:
        written.append((Table.GRANT, key, grant))
        written.append((Table.ACCOUNT, key, account))
    if entry is not None:
        written.append((Table.ENTRY, key, entry))
    call, pools = hold[0], hold[15]
    written.append((Table.HOLD, call, hold))
    for pool in pools:
        written.append((Table.LEASE, (pool, call), None))
    for counter in corrected:
        written.append((Table.COUNTER, counter[0], counter))
    if event is not None:
        written.append((Table.EVENT, call, event))
