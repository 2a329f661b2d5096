"""
Admission: may this call run? One decision over concurrency, rates and sources, all or nothing.

A refusal comes with no change at all. Does not know why the caller asks, nor how an answer is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision, Reason, Refusal, WindowState
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.receipts import Part, Source
from asgi_metering.rules.book import Book
from asgi_metering.rules.calendars import pick
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.keys import claim, claimed, hold_of_key, live_key, new_key, window_of
from asgi_metering.rules.operations import Admit, AllowanceSource, Grow, KeyAsk, LeaseAsk, SourceAsk
from asgi_metering.rules.state import (
    NEVER,
    AllowanceWindow,
    BucketKey,
    Change,
    ChargeKey,
    Hold,
    Lease,
    PinnedWindow,
    State,
    Table,
    build,
)
from asgi_metering.rules.windows import TICK_S, Look, look, window_state
from asgi_metering.sources import WALLET

__all__ = ["admit", "grow", "window_now"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_HELD = HoldState.HELD

_PAYER_OBJECT = attrgetter("payer", "group")

_NO_LEASES: Mapping[str, Lease] = {}


class _Taken(NamedTuple):
    """What a group of sources gives: where from, how much is left there, and the changes that take it."""

    parts: tuple[Part, ...]
    amount: int
    available: int
    name: str
    changes: list[Change]
    payer: str
    group: str


class _Offer(NamedTuple):
    """
    What one source could give, and what it could if its live holds ended unused.

    *refusal* says why it cannot give the least that is asked, if so.
    """

    source: SourceAsk
    available: int
    unheld: int
    refusal: Refusal | None
    window: AllowanceWindow | None = None


class _Dry(NamedTuple):
    """Why a group gives nothing; what none of its sources refuses, its calendar could not tell."""

    refusals: list[Refusal]
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
    if ask.idempotency is not None:
        taken_key = claimed(state, ask, ask.idempotency, now)
        if taken_key is not None:
            return taken_key, []
    looks: list[Look] = []
    failing: list[Look] = []
    for limit in ask.limits:
        seen = look(limit, state.counters.get(limit.key), now)
        if seen is None:
            return Decision(ask.id, now, stale_calendar=True), []
        looks.append(seen)
        if not seen.fits:
            failing.append(seen)
    refusal = _full_pool(state, ask.leases, now) if ask.leases else None
    if refusal is None and failing:
        refusal = _spent_limit(failing)
    if refusal is not None:
        return _refused(ask, now, refusal, looks), []
    if not ask.sources and not ask.amount:
        return _admitted(ask, now, None, looks)
    if ask.charge_key is not None:
        return _by_key(state, ask, ask.charge_key, looks, now)
    taken = _first_group(state, ask, now)
    if isinstance(taken, _Taken):
        return _admitted(ask, now, taken, looks)
    return _unpaid(ask, now, taken, looks), []


def _by_key(
    state: State, ask: Admit, wanted: KeyAsk, looks: Sequence[Look], now: float
) -> tuple[Decision, list[Change]]:
    """A call of a charge key: the first of its window pays for all, the others join it free (S0.10)."""
    window = window_of(wanted, now)
    if window is None:
        return Decision(ask.id, now, stale_calendar=True), []
    row = live_key(state, wanted, now)
    if row is not None:
        return _join(state, ask, row, looks, now)
    taken = _first_group(state, ask, now)
    if isinstance(taken, _Dry):
        return _unpaid(ask, now, taken, looks), []
    row = new_key(wanted, window, hold_of_key(ask.id))
    hold = _hold(ask, now, taken, looks)
    # The key's own hold has no deadline: it ends with its calls, and each of those has one.
    owned = hold._replace(id=row.hold, expires_at=NEVER, due_at=NEVER, windows=(), pools=(), idempotency_key="")
    member = hold._replace(amount=0, parts=(), charge_key=row.key)
    changes = [*taken.changes, *_counted(ask, now, looks)]
    # A call's id that comes again long after leaves an ended hold of its key behind: this one is another.
    changes += [(Table.HOLD, row.hold, None), (Table.HOLD, row.hold, owned), (Table.HOLD, ask.id, member)]
    changes.append((Table.CHARGE_KEY, row.key, row))
    return _decision(ask, now, taken, looks), changes


def _join(state: State, ask: Admit, row: ChargeKey, looks: Sequence[Look], now: float) -> tuple[Decision, list[Change]]:
    owned = state.holds.get(row.hold)
    member = _hold(ask, now, None, looks)._replace(charge_key=row.key)
    if owned is not None:
        member = member._replace(payer=owned.payer, unit=owned.unit, group=owned.group)
    changes = _counted(ask, now, looks)
    changes.append((Table.HOLD, ask.id, member))
    changes.append((Table.CHARGE_KEY, row.key, row._replace(members=row.members + 1)))
    seen = _windows(looks, taken=True)
    return Decision(ask.id, now, windows=seen, payer=member.payer, group=member.group, joined=True), changes


def _repeat(state: State, ask: Admit, hold: Hold, now: float) -> Decision:
    """The same id again: the reply was lost, not the decision (S3.15). What is left is told as of now."""
    if hold.charge_key:
        owned = state.holds.get(hold_of_key(hold.id))
        if owned is None:
            return Decision(hold.id, now, payer=hold.payer, group=hold.group, joined=True)
        hold = owned._replace(id=hold.id)
    if not ask.sources and not ask.amount:
        return Decision(hold.id, now)
    part = hold.parts[-1] if hold.parts else None
    if part is None or part.source is not Source.ALLOWANCE:
        account = state.accounts.get((hold.payer, hold.unit))
        available = None if account is None else account.available
        name = WALLET
    else:
        window = state.allowances.get((hold.payer, hold.unit, part.name, part.start))
        limits = [
            source.limit for source in ask.sources if isinstance(source, AllowanceSource) and source.name == part.name
        ]
        available = limits[0] - window.settled - window.held if limits and window is not None else None
        name = part.name
    return Decision(hold.id, now, None, hold.amount, available, name, payer=hold.payer, group=hold.group)


def _full_pool(state: State, leases: Sequence[LeaseAsk], now: float) -> Refusal | None:
    for ask in leases:
        pool = state.leases.get(ask.pool, _NO_LEASES)
        if len(pool) < ask.limit:
            continue
        live = sum(1 for lease in pool.values() if lease.expires_at > now)
        if live >= ask.limit:
            return Refusal(
                Reason.CONCURRENCY, ask.name, 1, 0, live, ask.limit, transient=ask.limit > 0, level=ask.level
            )
    return None


def _spent_limit(failing: Sequence[Look]) -> Refusal:
    for seen in failing:
        ask = seen.ask
        if ask.cost > ask.limit:
            return Refusal(Reason.EXCEEDS_LIMIT, ask.name, ask.cost, seen.before, 0, ask.limit)
    worst = max(failing, key=lambda seen: seen.retry_after_s)
    ask = worst.ask
    return Refusal(Reason.RATE_LIMIT, ask.name, ask.cost, worst.before, 0, ask.limit, retry_after_s=worst.retry_after_s)


def _first_group(state: State, ask: Admit, now: float) -> _Taken | _Dry:
    """Try the payer objects in order; the first whose sources can pay takes the whole call (S0.23)."""
    sources = ask.sources
    if len(sources) == 1:
        (source,) = sources
        return _from_group(state, ask, source.payer or ask.payer, source.group, sources, now)
    dry: list[Refusal] = []
    for (payer, group), members in groupby(sources, key=_PAYER_OBJECT):
        got = _from_group(state, ask, payer or ask.payer, group, list(members), now)
        if isinstance(got, _Taken) or got.stale:
            return got
        dry.extend(got.refusals)
    return _Dry(dry)


def _from_group(
    state: State, ask: Admit, payer: str, group: str, sources: Sequence[SourceAsk], now: float
) -> _Taken | _Dry:
    book = Book(state, (payer, ask.unit), now)
    offers: dict[str, _Offer] = {}
    for source in sources:
        offer = _offer(state, ask, source, book, now)
        if offer is None:
            return _Dry([], stale=True)
        if offer.refusal is None and not source.split:
            return _take(ask, group, book, [offer], now)
        # A place that is named twice has no more for that.
        offers.setdefault(_name(offer), offer)
    refusals = [offer.refusal for offer in offers.values() if offer.refusal is not None]
    if not any(source.split for source in sources):
        return _Dry(refusals)
    giving = _together(ask, list(offers.values()))
    if giving:
        return _take(ask, group, book, giving, now)
    return _Dry(_dry_together(ask, list(offers.values())))


def _name(offer: _Offer) -> str:
    return WALLET if offer.window is None else offer.window.name


def _together(ask: Admit, offers: list[_Offer]) -> list[_Offer]:
    """Those of a split group's offers that give something; none where they have too little together."""
    giving = [offer for offer in offers if offer.available > 0]
    if ask.amount and giving and sum(offer.available for offer in giving) >= ask.minimum:
        return giving
    # Where nothing is taken, the first one that owes nothing is who pays.
    return [offer for offer in offers if offer.refusal is None][:1]


def _dry_together(ask: Admit, offers: list[_Offer]) -> list[Refusal]:
    """The refusals of a split group: what would help one of its sources helps only with what the others have."""
    refusals = []
    least = max(1, ask.minimum)
    transient = sum(max(0, offer.unheld) for offer in offers) >= least
    for offer, refusal in [(offer, offer.refusal) for offer in offers if offer.refusal is not None]:
        if offer.window is not None:
            rest = sum(max(0, other.available) for other in offers if other is not offer)
            helps = refusal.limit is not None and refusal.limit + rest >= least
            refusal = refusal._replace(resets_at=_resets_at(offer.source, offer.window) if helps else None)
        refusals.append(refusal._replace(transient=transient))
    return refusals


def _take(ask: Admit, group: str, book: Book, offers: list[_Offer], now: float) -> _Taken:
    """Hold up to the whole amount, of each offer in turn what it has; of nothing, to pin who pays."""
    parts: tuple[Part, ...] = ()
    windows: list[Change] = []
    wanted = left = ask.amount
    name, available = WALLET, 0
    for _, has, _, _, window in offers:
        take = min(left, has)
        if window is None:
            parts += book.hold(take)
            name, available = WALLET, book.available
        else:
            name, available = window.name, has - take
            key = (window.payer, window.unit, name, window.start)
            parts += (Part(Source.ALLOWANCE, name, window.start, take),)
            windows.append((Table.ALLOWANCE, key, window._replace(held=window.held + take)))
        left -= take
        if not left:
            break
    changes = book.changes(now + ask.ttl_s)
    if windows:
        changes += windows
    return build(_Taken, (parts, wanted - left, available, name, changes, book.key[0], group))


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


def _offer(state: State, ask: Admit, source: SourceAsk, book: Book, now: float) -> _Offer | None:
    """What *source* could give; None where its calendar does not cover *now*."""
    if isinstance(source, AllowanceSource):
        return _allowance_offer(state, ask, source, book.key[0], now)
    available = book.available
    if source.overdraft:
        available = min(available + source.overdraft, book.room)
    if available >= ask.minimum:
        return build(_Offer, (source, available, available, None, None))
    unheld = available + book.returnable
    refusal = Refusal(
        Reason.CREDITS, ask.unit, ask.minimum, max(0, available), book.held, transient=unheld >= ask.minimum
    )
    return _Offer(source, available, unheld, refusal)


def _allowance_offer(state: State, ask: Admit, source: AllowanceSource, payer: str, now: float) -> _Offer | None:
    window = window_now(state, source, (payer, ask.unit, source.name), now)
    if window is None:
        return None
    available = source.limit - window.settled - window.held
    refusal = None
    # One that has nothing left pays for nothing, also where nothing is asked yet: it would be charged above its limit.
    least = max(1, ask.minimum)
    if available < least:
        refusal = Refusal(
            Reason.ALLOWANCE,
            source.name,
            least,
            max(0, available),
            window.held,
            source.limit,
            # The next window helps only if this one could have: not with a cap of 0 (S0.8).
            resets_at=_resets_at(source, window) if least <= source.limit else None,
            transient=available + window.held >= least,
        )
    return _Offer(source, available, available + window.held, refusal, window)


def _resets_at(source: SourceAsk, window: AllowanceWindow) -> float:
    """When the next window counts: a calendar's at this one's end, one that rolls a moment later (S4.13)."""
    return window.end if isinstance(source, AllowanceSource) and source.boundaries else window.end + TICK_S


def window_now(state: State, source: AllowanceSource, bucket: BucketKey, now: float) -> AllowanceWindow | None:
    """
    The window of an allowance that counts now: the calendar's, or the one that rolls (S4.13, S4.14).

    One that nothing was used in yet has no row, and is answered as it would begin. None where the calendar's
    boundaries do not cover *now*.
    """
    if not source.boundaries:
        start = state.latest.get(bucket)
        last = None if start is None else state.allowances[*bucket, start]
        # Strictly after its end: at the instant itself the old window still counts (S4.13).
        if last is not None and now <= last.end:
            return last
        return AllowanceWindow(*bucket, now, now + source.window_s)
    edges = pick(source.boundaries, now)
    if edges is None:
        return None
    return state.allowances.get((*bucket, edges[0])) or AllowanceWindow(*bucket, *edges)


def grow(state: State, ask: Grow, now: float) -> tuple[Decision, list[Change]]:
    """
    Hold more for a call that runs, from the payer object that pays it (DESIGN "A hold's size"). See `operations.Grow`.

    The decision's *held* is all that is held then. Growing to what is held already changes nothing.

    Raises:
        AmountError: Not ``0 <= minimum <= to <= MAX_AMOUNT``.
        ConfigurationError: The call is charged by key.
    """
    if not 0 <= ask.minimum <= ask.to <= MAX_AMOUNT:
        raise AmountError(
            f"Call {ask.id!r} asks to hold {ask.to}, at least {ask.minimum}, smallest parts. Ask for 0 to "
            f"{MAX_AMOUNT}, and for no more as the least than as the most."
        )
    hold = state.holds.get(ask.id)
    if hold is None or hold.receipt is not None:
        return Decision(ask.id, now, Refusal(Reason.ENDED, "call")), []
    if hold.charge_key:
        raise ConfigurationError(
            f"Call {ask.id!r} is charged by key, at a fixed price: it cannot hold more. Charge it without a key."
        )
    if ask.to <= hold.amount:
        return Decision(ask.id, now, held=hold.amount, payer=hold.payer, group=hold.group), []
    more = Admit(
        ask.id,
        hold.payer,
        hold.unit,
        ask.to - hold.amount,
        # Nothing more is no growth: a source that has nothing must not stand before one that has.
        max(1, ask.minimum - hold.amount),
        ttl_s=max(0.0, hold.expires_at - now),
    )
    taken = _from_group(state, more, hold.payer, hold.group, list(ask.sources), now)
    if isinstance(taken, _Dry):
        if taken.stale:
            return Decision(ask.id, now, stale_calendar=True), []
        refusal = _dry_refusal(more, taken.refusals, now) if ask.minimum > hold.amount else None
        return Decision(ask.id, now, refusal, hold.amount, payer=hold.payer, group=hold.group), []
    grown = hold._replace(amount=hold.amount + taken.amount, parts=_joined(hold.parts, taken.parts))
    decision = Decision(
        ask.id, now, None, grown.amount, taken.available, taken.name, payer=hold.payer, group=hold.group
    )
    return decision, [*taken.changes, (Table.HOLD, hold.id, grown)]


def _joined(parts: tuple[Part, ...], more: tuple[Part, ...]) -> tuple[Part, ...]:
    """Parts in their order, each place once."""
    joined = {part[:3]: part for part in parts}
    for part in more:
        known = joined.get(part[:3])
        joined[part[:3]] = part if known is None else known._replace(amount=known.amount + part.amount)
    return tuple(joined.values())


def _unpaid(ask: Admit, now: float, dry: _Dry, looks: Sequence[Look]) -> Decision:
    """What a call is answered that no payer object pays for."""
    if dry.stale:
        return Decision(ask.id, now, stale_calendar=True)
    return _refused(ask, now, _dry_refusal(ask, dry.refusals, now), looks)


def _refused(ask: Admit, now: float, refusal: Refusal, looks: Sequence[Look]) -> Decision:
    return Decision(ask.id, now, refusal, windows=_windows(looks, taken=False))


def _windows(looks: Sequence[Look], taken: bool) -> tuple[WindowState, ...]:
    return tuple([window_state(seen, taken) for seen in looks]) if looks else ()


def _admitted(ask: Admit, now: float, taken: _Taken | None, looks: Sequence[Look]) -> tuple[Decision, list[Change]]:
    counted = _counted(ask, now, looks)
    changes = taken.changes + counted if taken is not None else counted
    hold = _hold(ask, now, taken, looks)
    if taken is not None or hold.pools or hold.windows or hold.idempotency_key:
        changes.append((Table.HOLD, ask.id, hold))
    return _decision(ask, now, taken, looks), changes


def _counted(ask: Admit, now: float, looks: Sequence[Look]) -> list[Change]:
    """What every admission takes: of its limits, its slots, and its idempotency key."""
    changes: list[Change] = []
    for seen in looks:
        counter = seen.counter
        changes.append((Table.COUNTER, counter.key, counter))
    for lease in ask.leases:
        pool, call = place = (lease.pool, ask.id)
        changes.append((Table.LEASE, place, build(Lease, (pool, call, now + ask.ttl_s))))
    if ask.idempotency is not None:
        changes.append(claim(ask.idempotency, ask.id, now))
    return changes


def _decision(ask: Admit, now: float, taken: _Taken | None, looks: Sequence[Look]) -> Decision:
    seen = _windows(looks, taken=True)
    if taken is None:
        return Decision(ask.id, now, windows=seen)
    _, amount, available, name, _, payer, group = taken
    return build(
        Decision, (ask.id, now, None, amount, available, name, seen, False, payer, group, False, None, None, ())
    )


def _pinned(looks: Sequence[Look]) -> tuple[PinnedWindow, ...]:
    """The windows that the end of the call corrects."""
    pinned: tuple[PinnedWindow, ...] = ()
    for seen in looks:
        ask = seen.ask
        if ask.meter != "requests":
            pinned += (PinnedWindow(ask.key, seen.counter.start, ask.meter, ask.cost),)
    return pinned


def _hold(ask: Admit, now: float, taken: _Taken | None, looks: Sequence[Look]) -> Hold:
    call, payer, unit, _, _, _, _, leases, ttl_s, grace_s, in_doubt, line, facts, _, idempotency = ask
    amount, group = 0, ""
    parts: tuple[Part, ...] = ()
    if taken is not None:
        parts, amount, _, _, _, payer, group = taken
    expires_at = now + ttl_s
    due_at = expires_at + grace_s
    pools = tuple([lease.pool for lease in leases]) if leases else ()
    key = idempotency.key if idempotency is not None else ""
    # fmt: off
    return build(Hold, (
        call, payer, unit, amount, parts, _HELD, now, expires_at, due_at, ttl_s, grace_s, in_doubt, line,
        0, _pinned(looks), pools, facts, None, group, "", key,
    ))
    # fmt: on
