"""
Keys: requests that run once, and calls that are charged once together.

An *idempotency key* belongs to one request and its repeats; a *charge key* to all calls that bring it within a window.
Does not know where a key comes from, nor what its text means.
"""

from __future__ import annotations

from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.receipts import EndedBy, Receipt
from asgi_metering.rules.calendars import pick
from asgi_metering.rules.charging import basis_of, charge, receipt_of
from asgi_metering.rules.hold import HoldEvent, HoldState, next_state
from asgi_metering.rules.operations import Admit, End, IdempotencyAsk, KeyAsk
from asgi_metering.rules.state import Change, ChargeKey, Hold, IdempotencyKey, State, Table

__all__ = [
    "GIVEN_BACK",
    "answer_key",
    "claim",
    "claimed",
    "end_member",
    "hold_of_key",
    "is_repeated",
    "key_rows",
    "live_key",
    "new_key",
    "unpaid_key",
    "window_of",
]

GIVEN_BACK = ""
"""Whose an idempotency key is that is free again; it keeps the fingerprint of the request that had it last."""


# -- idempotency keys --------------------------------------------------------------------------------------


def claimed(state: State, ask: Admit, wanted: IdempotencyAsk, now: float) -> Decision | None:
    """
    What a request is answered whose idempotency key is taken: replay, in flight, or another request's key.

    None where the key is free. A key whose call is in doubt stays taken (DESIGN "Idempotency").
    """
    row = state.idempotency_keys.get(wanted.key)
    if row is None or row.call == GIVEN_BACK or (row.receipt is not None and row.expires_at <= now):
        return None
    if row.receipt is None:
        return Decision(ask.id, now, Refusal(Reason.IN_FLIGHT, "idempotency", transient=True))
    if row.fingerprint != wanted.fingerprint:
        return Decision(ask.id, now, Refusal(Reason.FINGERPRINT, "idempotency"))
    return Decision(ask.id, now, replay=row.receipt, reply=row.reply)


def claim(wanted: IdempotencyAsk, call: str, now: float) -> Change:
    """Take the idempotency key of an admitted call."""
    return (Table.IDEMPOTENCY, wanted.key, IdempotencyKey(wanted.key, wanted.fingerprint, call, now + wanted.ttl_s))


def answer_key(state: State, hold: Hold, ask: End, receipt: Receipt) -> list[Change]:
    """
    At the end of its call, late or not: what repeats are answered, or the key free again where nothing was done.

    A free key is remembered for its time: the late end of a call that was given up still answers the repeats to come.
    """
    key = hold.idempotency_key
    row = state.idempotency_keys.get(key)
    if row is None or row.call not in (hold.id, GIVEN_BACK):
        return []
    if ask.failed and not receipt.amount + (receipt.late or 0):
        return [(Table.IDEMPOTENCY, key, row._replace(call=GIVEN_BACK, receipt=receipt, reply=None))]
    return [(Table.IDEMPOTENCY, key, row._replace(call=hold.id, receipt=receipt, reply=ask.reply))]


def is_repeated(state: State, hold: Hold) -> bool:
    """Whether a call was given up, its idempotency key was free again, and another one has brought it since."""
    row = state.idempotency_keys.get(hold.idempotency_key)
    return row is not None and row.call not in (hold.id, GIVEN_BACK)


# -- charge keys -------------------------------------------------------------------------------------------


def window_of(ask: KeyAsk, now: float) -> tuple[float, float] | None:
    """The window of a key that nobody has brought yet; None where its calendar does not cover *now*."""
    return pick(ask.boundaries, now) if ask.boundaries else (now, now + ask.window_s)


def key_rows(ask: KeyAsk) -> list[str]:
    """The rows that may stand for this key: one for each calendar window, so that each has its own members."""
    if not ask.boundaries:
        return [ask.key]
    return [_row_key(ask.key, start) for start in ask.boundaries[:-1]]


def _row_key(key: str, start: float) -> str:
    return f"{key}@{start:.0f}"


def hold_of_key(call: str) -> str:
    """The id of the hold that a charge key owns, by that of the call that brought it first."""
    return f"{call}:key"


def live_key(state: State, ask: KeyAsk, now: float) -> ChargeKey | None:
    """
    The row that a call of this key joins; None where it is the first of its window.

    A rolling window does not end while calls of it run that may still pay for it.
    """
    if ask.boundaries:
        edges = pick(ask.boundaries, now)
        row = None if edges is None else state.charge_keys.get(_row_key(ask.key, edges[0]))
    else:
        row = state.charge_keys.get(ask.key)
        if row is not None and now >= row.end and row.settled:
            return None
    return None if row is None or row.is_given_back else row


def new_key(ask: KeyAsk, window: tuple[float, float], hold_id: str) -> ChargeKey:
    """The row of a key that its first call has just brought."""
    start, end = window
    key = _row_key(ask.key, start) if ask.boundaries else ask.key
    return ChargeKey(key, start, end, hold_id, 1)


def end_member(state: State, hold: Hold, ask: End, now: float) -> tuple[Receipt, list[Change]]:
    """
    End one call of a charge key: its first success settles the key's hold, the last failure releases it.

    Returns the receipt of this call: what the key costs, for the one that settled it, and 0 for all others.
    """
    nothing = receipt_of(hold, ask, basis_of(ask), 0, (), None, now, None)
    row = state.charge_keys.get(hold.charge_key)
    # A row that began later is the next window's.
    if row is None or hold.created_at < row.start:
        return nothing, []
    left = row._replace(members=max(0, row.members - 1))
    if row.settled:
        return nothing, [(Table.CHARGE_KEY, row.key, left)]
    owned = state.holds.get(row.hold)
    if owned is None or owned.receipt is not None:
        # A person has ended the key's own hold, and that stands for all of its calls.
        is_settled = owned is not None and owned.state is HoldState.SETTLED
        return nothing, [(Table.CHARGE_KEY, row.key, left._replace(settled=is_settled))]
    amount = _charge_of(ask, owned)
    if amount is not None:
        # Under the call's own id, so that its ledger line is found by it.
        end = ask._replace(amount=amount)
        receipt, changes = charge(state, owned._replace(id=hold.id, line=hold.line), end, now)
        changes.append((Table.CHARGE_KEY, row.key, left._replace(settled=True)))
        return receipt, [*changes, _over(owned, HoldEvent.SETTLE, receipt)]
    if left.members:
        return nothing, [(Table.CHARGE_KEY, row.key, left)]
    receipt, changes = charge(state, owned, ask, now)
    # The row stays: the late end of a call that was given up pays for its window, once.
    changes.append((Table.CHARGE_KEY, row.key, left))
    return nothing, [*changes, _over(owned, HoldEvent.RELEASE, receipt)]


def _charge_of(ask: End, owned: Hold) -> int | None:
    """What the key costs by this end: its price, or what a person says; None where the call leaves without success."""
    if ask.by is EndedBy.PERSON:
        return ask.amount or None
    return None if ask.amount is None else owned.amount


def unpaid_key(state: State, hold: Hold) -> ChargeKey | None:
    """
    The row of a call's key if it was given back and nobody has brought it since; None where others pay, or have paid.

    What a person has ended stays as it is.
    """
    row = state.charge_keys.get(hold.charge_key)
    if row is None or not row.is_given_back:
        return None
    owned = state.holds.get(row.hold)
    decided = owned is not None and owned.receipt is not None and owned.receipt.ended_by is EndedBy.PERSON
    return None if decided else row


def _over(owned: Hold, event: HoldEvent, receipt: Receipt) -> Change:
    target = next_state(owned.state, event)
    if target is None:
        raise AssertionError(f"the hold {owned.id!r} of a charge key has ended as {owned.state} before its key")
    return (Table.HOLD, owned.id, owned.ended(target, receipt))
