"""
Settlement: heartbeats and ends of holds, by the call, by the policy for calls in doubt, or by a person.

The hold's table says what may happen; the book moves the units. Everything is keyed by the call's id, so that a
repeat, or an end that comes too late, is answered with the first receipt (S3.13, S3.14).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from asgi_metering.amounts import check_parts
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, EndedBy, EntryKind, Part, Receipt, Source
from asgi_metering.rules.book import Book
from asgi_metering.rules.charging import basis_of, charge
from asgi_metering.rules.hold import HoldEvent, next_state
from asgi_metering.rules.keys import GIVEN_BACK, answer_key, end_member, is_repeated, unpaid_key
from asgi_metering.rules.operations import End, Renew, Undo
from asgi_metering.rules.returning import give_back, left_of, move_window
from asgi_metering.rules.state import (
    NEVER,
    AccountKey,
    Change,
    ChargeKey,
    Event,
    Hold,
    Lease,
    PinnedWindow,
    State,
    Table,
    build,
)
from asgi_metering.rules.windows import correct, taken_at

__all__ = ["end", "end_overdue", "event_payload", "renew", "undo"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_ALLOWANCE, _RELEASE, _SETTLE = Source.ALLOWANCE, HoldEvent.RELEASE, HoldEvent.SETTLE


def renew(state: State, beat: Renew, now: float) -> tuple[bool, list[Change]]:
    """
    Move the deadline of a live hold and of its leases, and keep what was observed. False for any other hold.

    Raises:
        AmountError: What was observed is no number of smallest parts.
    """
    check_parts(beat.observed, "observed amount")
    hold = state.holds.get(beat.id)
    if hold is None or next_state(hold.state, HoldEvent.RENEW) is None:
        return False, []
    expires_at = max(now + hold.ttl_s, hold.expires_at)
    changes: list[Change] = [
        (
            Table.HOLD,
            hold.id,
            hold._replace(
                expires_at=expires_at,
                due_at=expires_at + hold.grace_s,
                observed=max(hold.observed, beat.observed),
            ),
        )
    ]
    for pool in hold.pools:
        changes.append((Table.LEASE, (pool, hold.id), Lease(pool, hold.id, expires_at)))
    return True, changes


def end(state: State, ask: End, now: float) -> tuple[Receipt, list[Change]]:
    """
    End a hold, once. See `operations.End`.

    An ended hold answers its first receipt with ``applied=False``; the first settlement by the call after the
    policy ended it posts one linked late entry of actual minus already charged (DESIGN "Holds").

    Raises:
        AmountError: The amount is no number of smallest parts, or more than the account, or its allowance, can count
            beside what it has spent and held. What was held never is.
    """
    if ask.amount is not None:
        check_parts(ask.amount, "charge")
    hold = state.holds.get(ask.id)
    if hold is None:
        return _unknown(ask, now), []
    account = state.accounts.get((hold.payer, hold.unit))
    if account is not None and account.seen_at > now:
        now = account.seen_at
    target = next_state(hold.state, _RELEASE if ask.amount is None else _SETTLE)
    if target is None:
        return _after_the_end(state, hold, ask, now)
    if hold.charge_key:
        receipt, changes = end_member(state, hold, ask, now)
    else:
        receipt, changes = charge(state, hold, ask, now)
    changes.append((Table.HOLD, hold.id, hold.ended(target, receipt)))
    for pool in hold.pools:
        changes.append((Table.LEASE, (pool, hold.id), None))
    if hold.idempotency_key:
        changes.extend(answer_key(state, hold, ask, receipt))
    if hold.windows:
        _correct_windows(state, hold, ask.actual, changes, now)
    if ask.event is not None:
        changes.append(_event(hold, receipt, ask.event))
    return receipt, changes


def undo(state: State, ask: Undo, now: float) -> tuple[bool, list[Change]]:
    """
    Take an admission back as if it had not been: a refusal leaves no trace in any counter (DESIGN "Admission").

    False where its call has ended meanwhile: then it was somebody's.
    """
    hold = state.holds.get(ask.ask.id)
    changes: list[Change] = []
    if hold is not None:
        if hold.receipt is not None:
            return False, []
        _, changes = end(state, End(hold.id, None, failed=True), now)
        # Keys that nobody else has brought are as if they had not been.
        changes = [(table, key, _kept(table, row)) for table, key, row in changes]
    for limit in ask.ask.limits:
        counter = state.counters.get(limit.key)
        if counter is None:
            continue
        start = taken_at(counter, ask.at)
        taken = None if start is None else PinnedWindow(limit.key, start, limit.meter, limit.cost)
        restored = None if taken is None else correct(taken, counter, 0, now)
        if restored is not None:
            changes.append((Table.COUNTER, limit.key, restored))
    return True, changes


def _kept(table: str, row: Any) -> Any:
    if table == Table.CHARGE_KEY:
        return None if row.is_given_back else row
    return None if table == Table.IDEMPOTENCY and row.call == GIVEN_BACK else row


def _unknown(ask: End, now: float) -> Receipt:
    return Receipt(ask.id, "", "", 0, 0, Basis.NONE, False, ask.by, (), None, now, None, applied=False, known=False)


def _correct_windows(state: State, hold: Hold, actual: Mapping[str, int], changes: list[Change], now: float) -> None:
    for pinned in hold.windows:
        used = actual.get(pinned.meter)
        if used is None:
            continue
        counter = correct(pinned, state.counters.get(pinned.key), used, now)
        if counter is not None:
            changes.append((Table.COUNTER, pinned.key, counter))


def _event(hold: Hold, receipt: Receipt, told: Mapping[str, Any]) -> Change:
    key, at = receipt.id, receipt.at
    payload = event_payload(hold, told, key, receipt.amount, receipt.held, receipt.basis, receipt.estimated, at)
    return (Table.EVENT, key, build(Event, (key, at, payload, 0.0, None)))


def event_payload(
    hold: Hold,
    told: Mapping[str, Any],
    key: str,
    amount: int,
    held: int,
    basis: Basis,
    estimated: bool,
    at: float,
) -> dict[str, Any]:
    """
    What the usage event *key* of an end says: what was known at admission, what the end tells, and the receipt.

    Amounts are in smallest parts of the unit, times are epoch seconds. The ledger's own words win over both others.
    """
    payload: dict[str, Any] = {"started_at": hold.created_at, **hold.facts, **told}
    # One by one: a second dictionary that is merged into this one costs as much as all of them.
    payload["id"] = key
    payload["payer"] = hold.payer
    payload["unit"] = hold.unit
    payload["line"] = hold.line
    payload["amount"] = amount
    payload["held"] = held
    payload["basis"] = basis._value_
    payload["estimated"] = estimated
    payload["ended_at"] = at
    return payload


# -- ends that come after the end --------------------------------------------------------------------------


def _after_the_end(state: State, hold: Hold, ask: End, now: float) -> tuple[Receipt, list[Change]]:
    """The first receipt again. The call's own end, if somebody else was first, is written down once beside it."""
    first = hold.receipt
    if first is None:
        raise AssertionError(f"hold {hold.id!r} has ended as {hold.state} and has no receipt")
    if ask.by is not EndedBy.CALL or first.ended_by is EndedBy.CALL or first.late is not None:
        return first._replace(applied=False), []
    actual = ask.amount or 0
    difference = actual - first.amount
    told = ask.event
    changes: list[Change] = []
    unpaid = unpaid_key(state, hold)
    if first.ended_by is EndedBy.PERSON or is_repeated(state, hold):
        # What a person decided stands, and so does the repeat of a request that was given up (S3.15): what the call
        # used is told, not charged.
        difference = 0
        told = _uncharged(hold, told, actual)
    elif unpaid is None and hold.charge_key in state.charge_keys:
        # The key's other calls pay for it, or have paid.
        difference = 0
    elif difference:
        difference = _post_late(state, _as_its_key(state, hold, unpaid), first, difference, ask, now, changes)
        if unpaid is not None:
            changes.append((Table.CHARGE_KEY, unpaid.key, unpaid._replace(settled=True)))
    receipt = first._replace(late=difference)
    if first.ended_by is not EndedBy.PERSON:
        _correct_windows(state, hold, ask.actual, changes, now)
        changes.extend(answer_key(state, hold, ask, receipt))
    changes.append((Table.HOLD, hold.id, hold.ended(hold.state, receipt)))
    if told is not None:
        # An event of its own, of the difference only: whoever sums events up has the first one already.
        late = first._replace(
            id=f"{hold.id}:late", amount=difference, held=0, basis=basis_of(ask), estimated=ask.estimated, at=now
        )
        changes.append(_event(hold, late, {**told, "event_of": hold.id}))
    return receipt._replace(applied=False), changes


def _as_its_key(state: State, hold: Hold, unpaid: ChargeKey | None) -> Hold:
    """*hold*, paid from where its charge key was: a call of a key has no parts of its own."""
    owned = None if unpaid is None else state.holds.get(unpaid.hold)
    return hold if owned is None else hold._replace(parts=owned.parts)


def _post_late(
    state: State, hold: Hold, first: Receipt, difference: int, ask: End, now: float, changes: list[Change]
) -> int:
    """
    Charge or give back what the automatic end got wrong, as an entry of its own; the first receipt stays.

    What refunds have given back already is not given back again. Returns the difference that was posted.
    """
    key = (hold.payer, hold.unit)
    book = Book(state, key, now)
    if difference > 0:
        parts = tuple(_spend_late(state, hold, first, book, difference, changes))
    else:
        refunds = [line for line in state.lines_of(key, hold.id) if line.kind is EntryKind.REFUND]
        left = left_of(first.parts, [part for line in refunds for part in line.parts])
        parts = tuple(give_back(state, book, left, -difference, changes))
        difference = sum(part.amount for part in parts)
        if not difference:
            return 0
    book.write(
        EntryKind.LATE,
        difference,
        hold.id,
        line=hold.line,
        basis=basis_of(ask),
        estimated=ask.estimated,
        parts=parts,
    )
    changes.extend(book.changes())
    return difference


def _spend_late(state: State, hold: Hold, first: Receipt, book: Book, amount: int, changes: list[Change]) -> list[Part]:
    """From where an end in time would have taken it: what was held, in its order, then the source of the last part."""
    charged = {part[:3]: part.amount for part in first.parts}
    windows: list[Part] = []
    left, from_book = amount, 0
    for at, part in enumerate(hold.parts, 1):
        rest = max(0, part.amount - charged.get(part[:3], 0))
        take = left if at == len(hold.parts) else min(left, rest)
        left -= take
        if part.source is not _ALLOWANCE:
            from_book += take
        elif take:
            move_window(state, book, part, take, changes)
            windows.append(part._replace(amount=take))
    from_book += left
    paid = book.spend(from_book) if from_book else []
    return [*windows, *paid] if hold.parts and hold.parts[0].source is _ALLOWANCE else [*paid, *windows]


# -- ends by time ------------------------------------------------------------------------------------------


def end_overdue(state: State, account: AccountKey, now: float, limit: int) -> list[Change]:
    """
    Put the overdue holds of *account* in doubt, and end by their policy those whose grace is over.

    At most *limit* holds; the changes also carry the account's new lower bound for the next overdue hold.
    Changes build on one another, so they are applied to *state* here, hold by hold.
    """
    done: list[Change] = []
    # By id where they are due together, so that every store ends the same ones first.
    overdue = sorted((h for h in state.live_holds(account) if h.expires_at <= now), key=lambda h: (h.due_at, h.id))
    for hold in overdue[:limit]:
        if hold.due_at <= now:
            changes = _ended_by_policy(state, hold, now)
        else:
            target = next_state(hold.state, HoldEvent.EXPIRE)
            changes = [] if target is None else [(Table.HOLD, hold.id, hold._replace(state=target))]
        state.apply(changes)
        done.extend(changes)
    row = state.accounts.get(account)
    if row is not None:
        row = row._replace(next_due_at=_next_due(state, account, now))
        state.apply([(Table.ACCOUNT, account, row)])
        done.append((Table.ACCOUNT, account, row))
    return done


def _next_due(state: State, account: AccountKey, now: float) -> float:
    """When the next of the account's holds needs a look: its deadline, or the end of its grace."""
    return min((h.expires_at if h.expires_at > now else h.due_at for h in state.live_holds(account)), default=NEVER)


def _ended_by_policy(state: State, hold: Hold, now: float) -> list[Change]:
    ask = _policy_end(hold)
    try:
        return end(state, ask, now)[1]
    except AmountError:
        # Observed was more than is counted. What was held always is, and nobody may be kept from the account for ever.
        told = _uncharged(hold, ask.event, (ask.amount or 0) - hold.amount)
        instead = ask._replace(amount=hold.amount or None, basis=Basis.HOLD, event=told, failed=not hold.amount)
        return end(state, instead, now)[1]


def _uncharged(hold: Hold, told: Mapping[str, Any] | None, amount: int) -> Mapping[str, Any] | None:
    """What an event tells, and what of the usage was not charged."""
    if told is None:
        return None
    known = {**hold.facts, **told}.get("attributes", {})
    return {**told, "attributes": {**known, "uncharged_amount": amount}}


def _policy_end(hold: Hold) -> End:
    """How the policy pinned at admission ends a call whose worker is gone."""
    amounts = {Basis.OBSERVED: hold.observed, Basis.HOLD: hold.amount}
    amount = amounts.get(Basis(hold.in_doubt)) or None
    if hold.charge_key and hold.in_doubt == Basis.HOLD:
        # Its key's hold is what would be charged.
        amount = 0
    # A call without facts tells no usage event: it was limited, not charged.
    event = {"outcome": "aborted", "reason": "in_doubt"} if hold.facts else None
    # Nothing seen, or the policy charges nothing: given back.
    return End(hold.id, amount, Basis(hold.in_doubt), by=EndedBy.POLICY, event=event, failed=amount is None)
