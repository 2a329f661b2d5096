"""
The fast path: the common admission, decided and written in one pass; the common end is in `fast_end`.

Nearly every call finds room everywhere, pays from one grant, and ends with no more than it held. For these the general
rules build looks, offers, a book and a list of changes, nearly all of which say "nothing special here". This module
looks at the same rows and puts the new ones where they belong at once, in a fraction of the time.

It has no rule of its own. At the first thing that is not plain it answers None and has written nothing, and the general
rules decide (`decide.run`). What a running fixed window is, and what moves between the sums of an account, is said
twice for speed, here and in `windows` and `book`: tests/rules/test_fast_path.py runs both ways side by side and demands
equal answers, states and changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.receipts import Part, Source
from asgi_metering.rules.admission import window_now
from asgi_metering.rules.book import burn_order
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import Admit, AllowanceSource, LimitAsk, SourceAsk, WalletSource, WindowKind
from asgi_metering.rules.state import (
    Account,
    AccountKey,
    AllowanceWindow,
    Change,
    Counter,
    Grant,
    Hold,
    Lease,
    PinnedWindow,
    State,
    Table,
    build,
)
from asgi_metering.rules.windows import look, window_state
from asgi_metering.sources import WALLET

__all__ = ["Moved", "admit", "window_change"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_HELD = HoldState.HELD
_FIXED, _GRANT, _ALLOWANCE = WindowKind.FIXED, Source.GRANT, Source.ALLOWANCE

_Looks: TypeAlias = tuple[tuple[WindowState, ...], list[Counter], tuple[PinnedWindow, ...]]
"""What the limits say after the call, their rows, and the windows that its end corrects."""

_NO_LOOKS: _Looks = ((), [], ())

Moved: TypeAlias = tuple[tuple[Part, ...], int, Account, Grant | None, AllowanceWindow | None]
"""Where units came from, what is left there, and the rows after that: of the account, and of one of the two."""

_Take: TypeAlias = Callable[[State, AccountKey, Account, Any, int, float, float], Moved | None]

SHARED_PARTS = 4_096
"""Grants times prices whose parts are one object each: holds stay for long after they ended, and the collector looks at
whatever they are made of. Half a megabyte; what does not fit is made anew."""


def admit(state: State, ask: Admit, now: float, written: list[Change] | None = None) -> Decision | None:
    """
    Admit one plain call; None, and nothing written, where the general rules must decide.

    Plain is: a new id and no key; room in every limit and pool; nothing overdue, and no clock that stepped back; no
    source, or a first one that covers the whole amount, by one grant or one window of an account that is known.

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
        if (len(sources) > 1 and not _decides(sources)) or not 0 <= minimum <= amount <= MAX_AMOUNT:
            return None
        if type(source) is WalletSource:
            take: _Take = _hold
            overdraft, other, group, _ = source
            if overdraft < 0:
                return None
        else:
            take = _use
            other, group = source.payer, source.group
        if other:
            payer = other
            key = (payer, unit)
            account = state.accounts.get(key)
        moved = None if account is None else take(state, key, account, source, amount, expires_at, now)
        if moved is None:
            return None
        parts, available, account, grant, window = moved
        name = WALLET if window is None else window.name
        # fmt: off
        decision: Decision = build(Decision, (
            call, now, None, amount, available, name, windows, False, payer, group, False, None, None, (),
        ))
        # fmt: on
        state.accounts[key] = account
        if grant is not None:
            state.grants[key][grant[2]] = grant
        elif window is not None:
            state.apply([window_change(window)])
    elif amount or minimum:
        return None
    else:
        parts, group, account, grant, window = (), "", None, None, None
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
        _tell_admitted(written, key, account, grant, window, counters, hold)
    return decision


def _looked(state: State, limits: Sequence[LimitAsk], now: float) -> _Looks | None:
    """See `_Looks`; None where a limit refuses, or cannot tell."""
    rows = state.counters
    windows: list[WindowState] = []
    counters: list[Counter] = []
    pinned: tuple[PinnedWindow, ...] = ()
    for limit in limits:
        name, key, kind, most, window_s, cost, meter, _, _ = limit
        row = rows.get(key)
        if kind is _FIXED:
            if row is not None and now < row[2]:
                _, start, end, used, _, _ = row
            else:
                start, end, used = now, now + window_s, 0
            used += cost
            if used > most:
                return None
            left = end - now if now > start else end - start
            counters.append(build(Counter, (key, start, end, used, 0, "")))
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


def _decides(sources: Sequence[SourceAsk]) -> bool:
    """Whether the first source pays alone if it can, and nobody else's account is looked at."""
    first, *others = sources
    return not first.split and not any(source.payer for source in others)


def _hold(
    state: State, key: AccountKey, account: Account, _source: WalletSource, amount: int, due_at: float, now: float
) -> Moved | None:
    """Set *amount* aside for a hold that falls due then; None where that is not plain."""
    payer, unit, granted, settled, held, expired, debt, entries, changes_at, next_due_at, seen_at = account
    available = granted - settled - expired - held - amount
    if available < 0 or now >= changes_at or not seen_at <= now < next_due_at:
        return None
    grant = None
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
    return parts, available, account, grant, None


def _use(
    state: State, key: AccountKey, account: Account, source: AllowanceSource, amount: int, due_at: float, now: float
) -> Moved | None:
    """As `_hold`, of the window of an allowance; the account is noted to have been looked at."""
    if now >= account.next_change_at or not account.seen_at <= now < account.next_due_at:
        return None
    window = window_now(state, source, (*key, source.name), now)
    if window is None:
        return None
    payer, unit, name, start, end, settled, held = window
    available = source.limit - settled - held - amount
    # One that has nothing left pays for nothing, also where nothing is asked yet.
    if available < 0 or not available + amount:
        return None
    window = AllowanceWindow(payer, unit, name, start, end, settled, held + amount)
    account = account._replace(next_due_at=min(due_at, account.next_due_at), seen_at=now)
    return (Part(_ALLOWANCE, name, start, amount),), available, account, None, window


def window_change(window: AllowanceWindow) -> Change:
    """The change that puts the row of a window."""
    return (Table.ALLOWANCE, (window.payer, window.unit, window.name, window.start), window)


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
    account: Account | None,
    grant: Grant | None,
    window: AllowanceWindow | None,
    counters: Sequence[Counter],
    hold: Hold | None,
) -> None:
    if grant is not None:
        written.append((Table.GRANT, key, grant))
    if account is not None:
        written.append((Table.ACCOUNT, key, account))
    if window is not None:
        written.append(window_change(window))
    for counter in counters:
        written.append((Table.COUNTER, counter[0], counter))
    if hold is not None:
        call, expires_at, pools = hold[0], hold[7], hold[15]
        for pool in pools:
            written.append((Table.LEASE, (pool, call), build(Lease, (pool, call, expires_at))))
        written.append((Table.HOLD, call, hold))
