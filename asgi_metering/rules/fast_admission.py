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
    NEVER,
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

__all__ = ["admit", "window_change"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_HELD = HoldState.HELD
_FIXED, _GRANT, _ALLOWANCE = WindowKind.FIXED, Source.GRANT, Source.ALLOWANCE

_Looks: TypeAlias = tuple[tuple[WindowState, ...], dict[str, Counter], tuple[PinnedWindow, ...]]
"""What the limits say after the call, their rows by key, and the windows that its end corrects."""

_NO_LOOKS: _Looks = ((), {}, ())

_NEW = Counter("", 0.0, -NEVER, 0)
"""The row of a window that has not begun: over at any time."""

_Taken: TypeAlias = tuple[tuple[Part, ...], int]
"""Where units came from, and what is left there."""

_Take: TypeAlias = Callable[[State, AccountKey, Account, Any, int, float, float, list[Change] | None], _Taken | None]

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
    # The account that pays is looked at by whoever takes from it.
    if (not sources or sources[0].payer) and account is not None and not account[-1] <= now < account[-2]:
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
        if minimum > amount or minimum < 0 or amount > MAX_AMOUNT or (len(sources) > 1 and not _decides(sources)):
            return None
        source = sources[0]
        if isinstance(source, WalletSource):
            overdraft, other, group, _ = source
            if overdraft < 0:
                return None
            take: _Take = _hold
            name = WALLET
        else:
            take = _use
            name, other, group = source.name, source.payer, source.group
        if other:
            payer = other
            key = (payer, unit)
            account = state.accounts.get(key)
        took = None if account is None else take(state, key, account, source, amount, expires_at, now, written)
        if took is None:
            return None
        # From here on it is admitted: units were taken, and nothing below can refuse or fail.
        parts, available = took
        # fmt: off
        decision: Decision = build(Decision, (
            call, now, None, amount, available, name, windows, False, payer, group, False, None, None, (),
        ))
        # fmt: on
    elif amount or minimum:
        return None
    else:
        parts, group = (), ""
        decision = build(Decision, (call, now, None, 0, None, None, windows, False, "", "", False, None, None, ()))
    rows = state.counters
    for place, counter in counters.items():
        # One by one: to an ordered dict that is faster than `update`.
        rows[place] = counter
    hold = None
    if sources or leases or pinned:
        # fmt: off
        hold = build(Hold, (
            call, payer, unit, amount, parts, _HELD, now, expires_at, due_at, ttl_s, grace_s, in_doubt, line, 0, pinned,
            pools, facts, None, group, "", "",
        ))
        # fmt: on
        state.holds[call] = hold
        live = state.live.get(key)
        if live is None:
            state.live[key] = {call}
        else:
            live.add(call)
        for pool in pools:
            state.leases.setdefault(pool, {})[call] = build(Lease, (pool, call, expires_at))
    if written is not None:
        _tell_admitted(written, counters, hold)
    return decision


def _looked(state: State, limits: Sequence[LimitAsk], now: float) -> _Looks | None:
    """See `_Looks`; None where a limit refuses, or cannot tell."""
    rows = state.counters
    windows: list[WindowState] = []
    counters: dict[str, Counter] = {}
    pinned: tuple[PinnedWindow, ...] = ()
    for name, key, kind, most, window_s, cost, meter, _, _ in limits:
        if kind is _FIXED:
            _, start, end, used, _, _ = rows.get(key, _NEW)
            if now >= end:
                start, end, used = now, now + window_s, 0
            used += cost
            if used > most:
                return None
            left = end - now if now > start else end - start
            counters[key] = build(Counter, (key, start, end, used, 0, ""))
            windows.append(build(WindowState, (name, most, most - used, left, window_s, meter)))
        else:
            seen = look(limits[len(windows)], rows.get(key), now)
            if seen is None or not seen.fits:
                return None
            start = seen.counter.start
            counters[key] = seen.counter
            windows.append(window_state(seen, True))
        if meter != "requests":
            pinned += (PinnedWindow(key, start, meter, cost),)
    if len(counters) < len(windows):
        # Two limits count by one key: both are written, and the general rules know in which order.
        return None
    return tuple(windows), counters, pinned


def _decides(sources: Sequence[SourceAsk]) -> bool:
    """Whether the first source pays alone if it can, and nobody else's account is looked at."""
    first, *others = sources
    return not first.split and not any(source.payer for source in others)


def _hold(
    state: State,
    key: AccountKey,
    account: Account,
    _source: WalletSource,
    amount: int,
    due_at: float,
    now: float,
    written: list[Change] | None,
) -> _Taken | None:
    """Set *amount* aside for a hold that falls due then; None, and nothing written, where that is not plain."""
    payer, unit, granted, settled, held, expired, debt, entries, changes_at, next_due_at, seen_at = account
    available = granted - settled - expired - held - amount
    if available < 0 or now >= changes_at or not seen_at <= now < next_due_at:
        return None
    if due_at > next_due_at:
        due_at = next_due_at
    # fmt: off
    account = build(Account, (
        payer, unit, granted, settled, held + amount, expired, debt, entries, changes_at, due_at, now,
    ))
    # fmt: on
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
        wallet[name] = grant
        if written is not None:
            written.append((Table.GRANT, key, grant))
    state.accounts[key] = account
    if written is not None:
        written.append((Table.ACCOUNT, key, account))
    return parts, available


def _use(
    state: State,
    key: AccountKey,
    account: Account,
    source: AllowanceSource,
    amount: int,
    due_at: float,
    now: float,
    written: list[Change] | None,
) -> _Taken | None:
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
    moved = [(Table.ACCOUNT, key, account), window_change(window)]
    state.apply(moved)
    if written is not None:
        written.extend(moved)
    return (Part(_ALLOWANCE, name, start, amount),), available


def window_change(window: AllowanceWindow) -> Change:
    """The change that puts the row of a window."""
    return (Table.ALLOWANCE, (window.payer, window.unit, window.name, window.start), window)


@lru_cache(SHARED_PARTS)
def _parts(grant: str, amount: int) -> tuple[Part, ...]:
    return (build(Part, (_GRANT, grant, 0.0, amount)),)


def _tell_admitted(written: list[Change], counters: dict[str, Counter], hold: Hold | None) -> None:
    for key, counter in counters.items():
        written.append((Table.COUNTER, key, counter))
    if hold is not None:
        call, expires_at, pools = hold[0], hold[7], hold[15]
        for pool in pools:
            written.append((Table.LEASE, (pool, call), build(Lease, (pool, call, expires_at))))
        written.append((Table.HOLD, call, hold))
