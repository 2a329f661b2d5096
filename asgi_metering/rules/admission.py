"""
Admission: may this call run? One decision over concurrency, rates and sources, all or nothing.

A refusal comes with no change at all. Does not know why the caller asks, nor how an answer is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, Reason, Refusal, WindowState
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Part, Source
from asgi_metering.rules.book import Book
from asgi_metering.rules.calendars import pick
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.operations import Admit, AllowanceSource, LeaseAsk
from asgi_metering.rules.state import AllowanceWindow, Change, Hold, Lease, PinnedWindow, State, Table
from asgi_metering.rules.windows import Look, look, window_state
from asgi_metering.sources import WALLET

__all__ = ["admit"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_HELD = HoldState.HELD


class _Taken(NamedTuple):
    """What a source gives: where from, how much is left there, and the changes that take it."""

    parts: tuple[Part, ...]
    amount: int
    available: int
    name: str
    changes: list[Change]


class _Dry(NamedTuple):
    """Why a source gives nothing."""

    refusal: Refusal
    stale: bool = False


def admit(state: State, ask: Admit, now: float) -> tuple[Decision, list[Change]]:
    """
    Decide on one call.

    Returns the decision and the changes to make; without admission the changes are none.
    The order of reasons is concurrency, rates, sources (DESIGN "Admission"); the first that refuses is reported.

    Raises:
        AmountError: Not ``0 <= minimum <= amount <= MAX_AMOUNT``.
    """
    if not 0 <= ask.minimum <= ask.amount <= MAX_AMOUNT:
        raise AmountError(
            f"Call {ask.id!r} asks to hold {ask.amount}, at least {ask.minimum}, smallest parts of {ask.unit!r}. "
            f"Ask for 0 to {MAX_AMOUNT}, and for no more as the least than as the most."
        )
    stored = state.holds.get(ask.id)
    if stored is not None:
        return _repeat(state, ask, stored, now), []
    looks: list[Look] = []
    for limit in ask.limits:
        seen = look(limit, state.counters.get(limit.key), now)
        if seen is None:
            return Decision(ask.id, now, stale_calendar=True), []
        looks.append(seen)
    refusal = _full_pool(state, ask.leases, now) or _spent_limit(looks)
    if refusal is not None:
        return _refused(ask, now, refusal, looks), []
    if not ask.amount and not ask.sources:
        return _admitted(ask, now, None, looks)
    taken = _first_source(state, ask, now)
    if isinstance(taken, _Taken):
        return _admitted(ask, now, taken, looks)
    if taken.stale:
        return Decision(ask.id, now, stale_calendar=True), []
    return _refused(ask, now, taken.refusal, looks), []


def _repeat(state: State, ask: Admit, hold: Hold, now: float) -> Decision:
    """The same id again: the reply was lost, not the decision (S3.15). What is left is told as of now."""
    if not hold.parts:
        return Decision(hold.id, now)
    part = hold.parts[0]
    if part.source is not Source.ALLOWANCE:
        account = state.accounts[hold.payer, hold.unit]
        return Decision(hold.id, now, held=hold.amount, available=account.available, source=WALLET)
    window = state.allowances.get((hold.payer, hold.unit, part.name, part.start))
    limits = [
        source.limit for source in ask.sources if isinstance(source, AllowanceSource) and source.name == part.name
    ]
    available = limits[0] - window.settled - window.held if limits and window is not None else None
    return Decision(hold.id, now, held=hold.amount, available=available, source=part.name)


def _full_pool(state: State, leases: Sequence[LeaseAsk], now: float) -> Refusal | None:
    for ask in leases:
        pool = state.leases.get(ask.pool, {})
        if len(pool) < ask.limit:
            continue
        live = sum(1 for lease in pool.values() if lease.expires_at > now)
        if live >= ask.limit:
            return Refusal(
                Reason.CONCURRENCY, ask.name, 1, 0, live, ask.limit, transient=ask.limit > 0, level=ask.level
            )
    return None


def _spent_limit(looks: Sequence[Look]) -> Refusal | None:
    failing = [seen for seen in looks if not seen.fits]
    if not failing:
        return None
    for seen in failing:
        ask = seen.ask
        if ask.cost > ask.limit:
            return Refusal(Reason.EXCEEDS_LIMIT, ask.name, ask.cost, seen.before, 0, ask.limit)
    worst = max(failing, key=lambda seen: seen.retry_after_s)
    ask = worst.ask
    return Refusal(Reason.RATE_LIMIT, ask.name, ask.cost, worst.before, 0, ask.limit, retry_after_s=worst.retry_after_s)


def _first_source(state: State, ask: Admit, now: float) -> _Taken | _Dry:
    """Try the sources in order; the first that can pays the whole hold."""
    dry: list[Refusal] = []
    for source in ask.sources:
        if isinstance(source, AllowanceSource):
            got = _from_allowance(state, ask, source, now)
        else:
            got = _from_wallet(state, ask, now)
        if isinstance(got, _Taken) or got.stale:
            return got
        dry.append(got.refusal)
    return _Dry(_dry_refusal(ask, dry, now))


def _dry_refusal(ask: Admit, dry: list[Refusal], now: float) -> Refusal:
    """402 if a wallet was asked, else what the last allowance says; any of them may be the first to help again."""
    if not dry:
        return Refusal(Reason.CREDITS, ask.unit, ask.minimum, 0, 0)
    chosen = next((refusal for refusal in dry if refusal.reason is Reason.CREDITS), dry[-1])
    resets_at = min((refusal.resets_at for refusal in dry if refusal.resets_at is not None), default=None)
    transient = any(refusal.transient for refusal in dry)
    if resets_at is None or chosen.reason is Reason.CREDITS:
        # A wallet may be filled at any time: when to ask it again, nobody can tell.
        return chosen._replace(transient=transient, resets_at=resets_at)
    return chosen._replace(transient=transient, resets_at=resets_at, retry_after_s=resets_at - now)


def _from_wallet(state: State, ask: Admit, now: float) -> _Taken | _Dry:
    book = Book(state, (ask.payer, ask.unit), now)
    available = book.available
    amount = ask.amount
    if amount > available:
        amount = available
    if amount < ask.minimum:
        return _Dry(
            Refusal(
                Reason.CREDITS,
                ask.unit,
                ask.minimum,
                max(0, available),
                book.held,
                transient=available + book.returnable >= ask.minimum,
            )
        )
    parts = book.hold(amount)
    return _Taken(parts, amount, available - amount, WALLET, book.changes(now + ask.ttl_s))


def _from_allowance(state: State, ask: Admit, source: AllowanceSource, now: float) -> _Taken | _Dry:
    edges = pick(source.boundaries, now)
    if edges is None:
        return _Dry(Refusal(Reason.ALLOWANCE, source.name), stale=True)
    start, end = edges
    key = (ask.payer, ask.unit, source.name, start)
    window = state.allowances.get(key) or AllowanceWindow(ask.payer, ask.unit, source.name, start, end)
    available = source.limit - window.settled - window.held
    amount = min(ask.amount, available)
    if amount < ask.minimum:
        return _Dry(
            Refusal(
                Reason.ALLOWANCE,
                source.name,
                ask.minimum,
                max(0, available),
                window.held,
                source.limit,
                # The next window helps only if this one could have: not with a cap of 0 (S0.8).
                resets_at=end if ask.minimum <= source.limit else None,
                transient=available + window.held >= ask.minimum,
            )
        )
    changes = Book(state, (ask.payer, ask.unit), now).changes(now + ask.ttl_s)
    changes.append((Table.ALLOWANCE, key, window._replace(held=window.held + amount)))
    return _Taken(
        (Part(Source.ALLOWANCE, source.name, start, amount),),
        amount,
        available - amount,
        source.name,
        changes,
    )


def _refused(ask: Admit, now: float, refusal: Refusal, looks: Sequence[Look]) -> Decision:
    return Decision(ask.id, now, refusal, windows=_windows(looks, taken=False))


def _windows(looks: Sequence[Look], taken: bool) -> tuple[WindowState, ...]:
    return tuple([window_state(seen, taken) for seen in looks])


def _admitted(ask: Admit, now: float, taken: _Taken | None, looks: Sequence[Look]) -> tuple[Decision, list[Change]]:
    changes = taken.changes if taken is not None else []
    pinned = []
    for seen in looks:
        counter, limit = seen.counter, seen.ask
        changes.append((Table.COUNTER, limit.key, counter))
        if limit.meter != "requests":
            pinned.append(PinnedWindow(limit.key, counter.start, limit.meter, limit.cost))
    expires_at = now + ask.ttl_s
    for lease in ask.leases:
        changes.append((Table.LEASE, (lease.pool, ask.id), Lease(lease.pool, ask.id, expires_at)))
    if taken is not None or ask.leases or pinned:
        changes.append((Table.HOLD, ask.id, _hold(ask, now, expires_at, taken, tuple(pinned))))
    if taken is None:
        return Decision(ask.id, now, windows=_windows(looks, taken=True)), changes
    decision = Decision(ask.id, now, None, taken.amount, taken.available, taken.name, _windows(looks, taken=True))
    return decision, changes


def _hold(ask: Admit, now: float, expires_at: float, taken: _Taken | None, pinned: tuple[PinnedWindow, ...]) -> Hold:
    return Hold(
        ask.id,
        ask.payer,
        ask.unit,
        taken.amount if taken is not None else 0,
        taken.parts if taken is not None else (),
        _HELD,
        now,
        expires_at,
        expires_at + ask.grace_s,
        ask.ttl_s,
        ask.grace_s,
        ask.in_doubt,
        ask.line,
        0,
        pinned,
        tuple([lease.pool for lease in ask.leases]),
        ask.facts,
    )
