"""
Corrections: what is changed about the past, each as a line of its own that is linked to what it corrects.

Refunds, corrections, backfills and the reversal of a grant, once per id each. Nothing that is written is ever
changed. Does not know who may do this, or why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from asgi_metering.amounts import MAX_AMOUNT, check_parts
from asgi_metering.errors import AmountError, ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import Basis, Entry, EntryKind, Part, Posting, Source
from asgi_metering.rules.book import Book
from asgi_metering.rules.operations import Backfill, Correct, Refund, ReverseGrant
from asgi_metering.rules.returning import give_back, left_of
from asgi_metering.rules.state import TAKEN_BACK, Change, Event, State, Table

__all__ = ["backfill", "charged", "correct_account", "refund", "reverse_grant"]

_CHARGES = frozenset((EntryKind.SETTLE, EntryKind.LATE, EntryKind.BACKFILL, EntryKind.REFUND))
"""Lines that say what a call cost: those of a refund, and of a late end, may be negative."""


def charged(lines: Sequence[Entry]) -> tuple[int, tuple[Part, ...]]:
    """
    What the lines of one call leave of its charge: the amount, and the parts that paid it, in their order.

    What went back is taken off the last part of the same place.
    """
    amount = 0
    left: tuple[Part, ...] = ()
    for line in lines:
        if line.kind in _CHARGES:
            amount += line.amount
            left = left_of(
                (*left, *(part for part in line.parts if part.amount > 0)),
                [part for part in line.parts if part.amount < 0],
            )
    return amount, left


def refund(state: State, ask: Refund, now: float) -> tuple[Posting, list[Change]]:
    """
    Give back what a call was charged, or a part of it. See `operations.Refund`.

    Raises:
        ConfigurationError: The account has no charge of this call, or nothing of it is left.
        AmountError: The amount is none, or more than is left of the charge, or than the account has spent.
        IdempotencyConflictError: The id was used for another amount.

    Source: S0.11 (never below zero; what a window that is over gets back is gone), DESIGN "Sources".
    """
    key = (ask.payer, ask.unit)
    lines = state.lines_of(key, ask.call)
    posted = _posted(lines, EntryKind.REFUND, ask.id)
    if posted is not None:
        asked = None if ask.amount is None else -ask.amount
        return _again(state, "refund", posted, asked, now), []
    amount, parts = charged(lines)
    if amount <= 0:
        raise ConfigurationError(
            f"Call {ask.call!r} has no charge left on account {ask.payer!r} in {ask.unit!r} that could be refunded. "
            f"Check the call's id and payer, or grant the units instead."
        )
    give = amount if ask.amount is None else check_parts(ask.amount, "refund")
    if not 0 < give <= amount:
        raise AmountError(
            f"The refund {ask.id!r} of {give} smallest parts of {ask.unit!r} is not from 1 to {amount}, which is what "
            f"is left of the charge of call {ask.call!r}. Refund less, or leave the amount out for all of it."
        )
    book = Book(state, key, now)
    changes: list[Change] = []
    expired = book.expired
    given = give_back(state, book, parts, give, changes)
    if give + sum(part.amount for part in given):
        raise AmountError(
            f"The refund {ask.id!r} of {give} smallest parts of {ask.unit!r} is more than account {ask.payer!r} has "
            f"spent. A correction has given back some of it already: refund less."
        )
    lapsed = book.expired - expired + _to_windows_gone(state, book, given)
    line = next((each.line for each in lines if each.line), "")
    number = book.write(EntryKind.REFUND, -give, ask.call, line=line, actor=ask.actor, parts=tuple(given), id=ask.id)
    changes = [*book.changes(), *changes]
    event_id = f"{ask.call}:refund:{ask.id}"
    changes.extend(_event(ask.event, event_id, book, -give, line, {"event_of": ask.call}))
    return Posting(ask.id, *key, -give, give - lapsed, lapsed, book.available, now, number), changes


def _to_windows_gone(state: State, book: Book, given: Sequence[Part]) -> int:
    """What went back to allowance windows that are over: nobody can spend it again."""
    gone = 0
    for part in given:
        if part.source is Source.ALLOWANCE:
            window = state.allowances.get((*book.key, part.name, part.start))
            if window is None or window.end <= book.now:
                gone -= part.amount
    return gone


def correct_account(state: State, ask: Correct, now: float) -> tuple[Posting, list[Change]]:
    """
    Charge an account more or less, without a call behind it. See `operations.Correct`.

    Raises:
        AmountError: The amount is 0, or more is given back than the account has spent.
        IdempotencyConflictError: The id was used for another amount.
    """
    key = (ask.payer, ask.unit)
    posted = _posted(state.lines_of(key, ask.id), EntryKind.CORRECTION, ask.id)
    if posted is not None:
        return _again(state, "correction", posted, ask.amount, now), []
    if type(ask.amount) is not int or not 0 < abs(ask.amount) <= MAX_AMOUNT:
        raise AmountError(
            f"The correction {ask.id!r} of {ask.amount!r} smallest parts corrects nothing, or too much. Use an int "
            f"other than 0, up to {MAX_AMOUNT} either way."
        )
    book = Book(state, key, now)
    if ask.amount < -book.settled:
        raise AmountError(
            f"The correction {ask.id!r} gives back {-ask.amount} smallest parts of {ask.unit!r}, and account "
            f"{ask.payer!r} has spent {book.settled}. Grant what goes beyond it."
        )
    expired = book.expired
    if ask.amount > 0:
        parts = tuple(_spent(book, ask.amount, ask.id))
    else:
        parts = (Part(Source.DEBT, "", 0.0, ask.amount),)
        book.give_back((Part(Source.DEBT, "", 0.0, -ask.amount),), -ask.amount)
    lapsed = book.expired - expired
    number = book.write(
        EntryKind.CORRECTION, ask.amount, ask.id, line=ask.line, actor=ask.actor, parts=parts, id=ask.id
    )
    changes = book.changes()
    changes.extend(_event(ask.event, f"{ask.payer}:{ask.unit}:correction:{ask.id}", book, ask.amount, ask.line, {}))
    returned = max(0, -ask.amount) - lapsed
    return Posting(ask.id, *key, ask.amount, returned, lapsed, book.available, now, number), changes


def backfill(state: State, ask: Backfill, now: float) -> tuple[Posting, list[Change]]:
    """
    Charge for work that was done already. Always succeeds: what is not there becomes debt.

    Raises:
        AmountError: The amount is no number of smallest parts above 0, or more than the account can owe.
        IdempotencyConflictError: The id was used for another amount.
    """
    key = (ask.payer, ask.unit)
    posted = _posted(state.lines_of(key, ask.id), EntryKind.BACKFILL, ask.id)
    if posted is not None:
        return _again(state, "backfill", posted, ask.amount, now), []
    if not check_parts(ask.amount, "backfill"):
        raise AmountError(f"The backfill {ask.id!r} of 0 charges nothing. Charge at least 1 smallest part.")
    book = Book(state, key, now)
    parts = tuple(_spent(book, ask.amount, ask.id))
    number = book.write(
        EntryKind.BACKFILL,
        ask.amount,
        ask.id,
        line=ask.line,
        basis=Basis.USAGE,
        actor=ask.actor,
        parts=parts,
        id=ask.id,
    )
    changes = book.changes()
    changes.extend(_event(ask.event, f"{ask.payer}:{ask.unit}:backfill:{ask.id}", book, ask.amount, ask.line, {}))
    return Posting(ask.id, *key, ask.amount, 0, 0, book.available, now, number), changes


def _spent(book: Book, amount: int, posting: str) -> list[Part]:
    if amount > book.room:
        raise AmountError(
            f"With the posting {posting!r} of {amount}, account {book.key[0]!r} would have spent and held "
            f"more than {MAX_AMOUNT} smallest parts of {book.key[1]!r}. Declare the unit with a smaller scale."
        )
    return book.spend(amount)


def reverse_grant(state: State, ask: ReverseGrant, now: float) -> tuple[Posting, list[Change]]:
    """
    Take a grant back. See `operations.ReverseGrant`.

    Raises:
        ConfigurationError: The account has no such grant, or it was taken back under another id.
    """
    key = (ask.payer, ask.unit)
    lines = state.lines_of(key, ask.grant)
    posted = _posted(lines, EntryKind.REVERSAL, ask.id)
    if posted is not None:
        return _again(state, "reversal", posted, None, now), []
    grant = state.grant(key, ask.grant)
    if grant is None:
        raise ConfigurationError(
            f"Account {ask.payer!r} has no grant {ask.grant!r} of {ask.unit!r} that could be taken back. Check the ids."
        )
    if grant.expires_at == TAKEN_BACK:
        raise ConfigurationError(f"Grant {ask.grant!r} of account {ask.payer!r} has been taken back already.")
    book = Book(state, key, now)
    taken = book.reverse(ask.grant)
    number = book.write(EntryKind.REVERSAL, -taken, ask.grant, actor=ask.actor, id=ask.id)
    return Posting(ask.id, *key, -taken, 0, 0, book.available, now, number), book.changes()


def _posted(lines: Sequence[Entry], kind: EntryKind, posting: str) -> Entry | None:
    return next((line for line in lines if line.kind is kind and line.id == posting), None)


def _again(state: State, what: str, posted: Entry, asked: int | None, now: float) -> Posting:
    """The same posting again changes nothing; another one under its id is refused."""
    if asked is not None and asked != posted.amount:
        raise IdempotencyConflictError(what, posted.id, "amount", posted.amount, asked)
    book = Book(state, (posted.payer, posted.unit), now)
    return Posting(
        posted.id,
        posted.payer,
        posted.unit,
        posted.amount,
        0,
        0,
        book.available,
        posted.at,
        posted.number,
        applied=False,
    )


def _event(
    told: Mapping[str, Any] | None, event_id: str, book: Book, amount: int, line: str, more: Mapping[str, Any]
) -> list[Change]:
    """The usage event of a posting: what it changed, with its sign."""
    if told is None:
        return []
    payload = {
        "started_at": book.now,
        "outcome": "corrected",
        "basis": Basis.USAGE.value,
        **more,
        **told,
        "id": event_id,
        "payer": book.key[0],
        "unit": book.key[1],
        "line": line,
        "amount": amount,
        "held": 0,
        "ended_at": book.now,
    }
    return [(Table.EVENT, event_id, Event(event_id, book.now, payload))]
