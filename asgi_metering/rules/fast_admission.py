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

from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.receipts import Part, Source
from asgi_metering.rules.admission import window_now
from asgi_metering.rules.book import burn_order
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import Admit, AllowanceSource, SourceAsk, WalletSource, WindowKind
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

_NEW = Counter("", 0.0, -NEVER, 0)
"""The row of a window that has not begun: over at any time."""

_Taken: TypeAlias = tuple[tuple[Part, ...], int]
"""Where units came from, and what is left there."""

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
    other = sources[0].payer if sources else ""
    # The account that pays is looked at where its units are taken.
    if (other or not sources) and account is not None and not account[-1] <= now < account[-2]:
        return None
    leased = state.leases
    pools: tuple[str, ...] = ()
    for _, pool, slots, _ in leases:
        # Also beside leases that are over and were not cleared away.
        taken = leased.get(pool)
        if slots <= (0 if taken is None else len(taken)):
            return None
        pools += (pool,)
    rows = state.counters
    counters: dict[str, Counter] = {}
    windows: list[WindowState] = []
    pinned: tuple[PinnedWindow, ...] = ()
    for name, place, kind, most, window_s, cost, meter, _, _ in limits:
        if kind is _FIXED:
            _, start, end, used, _, _ = rows.get(place, _NEW)
            if now >= end:
                start, end, used = now, now + window_s, 0
            used += cost
            if used > most:
                return None
            left = end - now if now > start else end - start
            counters[place] = build(Counter, (place, start, end, used, 0, ""))
            windows.append(build(WindowState, (name, most, most - used, left, window_s, meter)))
        else:
            seen = look(limits[len(windows)], rows.get(place), now)
            if seen is None or not seen.fits:
                return None
            start = seen.counter.start
            counters[place] = seen.counter
            windows.append(window_state(seen, True))
        if meter != "requests":
            pinned += (PinnedWindow(place, start, meter, cost),)
    if len(counters) < len(windows):
        # Two limits count by one key: both are written, and the general rules know in which order.
        return None
    expires_at = now + ttl_s
    if sources:
        if minimum > amount or minimum < 0 or amount > MAX_AMOUNT or (len(sources) > 1 and not _decides(sources)):
            return None
        source = sources[0]
        if other:
            payer = other
            key = (payer, unit)
            account = state.accounts.get(key)
        if account is None:
            return None
        if isinstance(source, WalletSource):
            paid_by = WALLET
            overdraft, _, group, _ = source
            _, _, granted, settled, held, expired, debt, entries, changes_at, due_at, seen_at = account
            available = granted - settled - expired - held - amount
            if available < 0 or overdraft < 0 or now >= changes_at or not seen_at <= now < due_at:
                return None
            if expires_at < due_at:
                due_at = expires_at
            parts: tuple[Part, ...] = ()
            if amount:
                wallet = state.grants[key]
                if len(wallet) == 1:
                    (grant,) = wallet.values()
                else:
                    # There is one, since something is available and no change is due.
                    grant = min([grant for grant in wallet.values() if grant.begun and grant.free], key=burn_order)
                # fmt: off
                (_, _, name, given, priority, effective_at, ends_at, number, grant_kind, actor, spent, kept, lapsed,
                    begun, taken_back) = grant
                if given - spent - kept - lapsed - taken_back < amount:
                    return None
                wallet[name] = grant = build(Grant, (
                    payer, unit, name, given, priority, effective_at, ends_at, number, grant_kind, actor, spent,
                    kept + amount, lapsed, begun, taken_back,
                ))
                # fmt: on
                parts = _parts(name, amount)
                if written is not None:
                    written.append((Table.GRANT, key, grant))
            # fmt: off
            state.accounts[key] = account = build(Account, (
                payer, unit, granted, settled, held + amount, expired, debt, entries, changes_at, due_at, now,
            ))
            # fmt: on
            if written is not None:
                written.append((Table.ACCOUNT, key, account))
        else:
            paid_by, group = source.name, source.group
            took = _use(state, key, account, source, amount, expires_at, now, written)
            if took is None:
                return None
            parts, available = took
        # Units were taken: it is admitted, and nothing below can refuse or fail.
        # fmt: off
        decision: Decision = build(Decision, (
            call, now, None, amount, available, paid_by, tuple(windows), False, payer, group, False, None, None, (),
        ))
        # fmt: on
    elif amount or minimum:
        return None
    else:
        parts, group = (), ""
        # fmt: off
        decision = build(Decision, (
            call, now, None, 0, None, None, tuple(windows), False, "", "", False, None, None, (),
        ))
        # fmt: on
    rows.update(counters)
    hold = None
    if sources or leases or pinned:
        # fmt: off
        state.holds[call] = hold = build(Hold, (
            call, payer, unit, amount, parts, _HELD, now, expires_at, expires_at + grace_s, ttl_s, grace_s, in_doubt,
            line, 0, pinned, pools, facts, None, group, "", "",
        ))
        # fmt: on
        live = state.live.get(key)
        if live is None:
            state.live[key] = {call}
        else:
            live.add(call)
        for pool in pools:
            lease = build(Lease, (pool, call, expires_at))
            taken = leased.get(pool)
            if taken is None:
                leased[pool] = {call: lease}
            else:
                taken[call] = lease
    if written is not None:
        _tell_admitted(written, counters, hold)
    return decision


def _decides(sources: Sequence[SourceAsk]) -> bool:
    """Whether the first source pays alone if it can, and nobody else's account is looked at."""
    first, *others = sources
    return not first.split and not any(source.payer for source in others)


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
    """Hold *amount* of an allowance until *due_at*; None, and nothing written, where that is not plain."""
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
