"""
Posting: units given to an account, once per id.

Does not know who pays for them, or why.
"""

from __future__ import annotations

from asgi_metering.amounts import MAX_AMOUNT, check_parts
from asgi_metering.errors import AmountError, ConfigurationError, IdempotencyConflictError
from asgi_metering.receipts import GrantReceipt
from asgi_metering.rules.book import Book
from asgi_metering.rules.operations import PostGrant
from asgi_metering.rules.state import TAKEN_BACK, Change, Grant, State

__all__ = ["MAX_LIVE_GRANTS", "post_grant"]

MAX_LIVE_GRANTS = 100
"""Grants with units left, per account: admission looks through all of them."""


def post_grant(state: State, ask: PostGrant, now: float) -> tuple[GrantReceipt, list[Change]]:
    """
    Add one grant to its account.

    Raises:
        IdempotencyConflictError: The id exists with another body; the error names the first field that differs.
        ConfigurationError: It would expire before it begins, or the account has `MAX_LIVE_GRANTS` live grants.
        AmountError: The amount is no number of smallest parts, or all that the account was given, later grants
            included, would be more than stores count exactly.
    """
    check_parts(ask.amount, "grant")
    key = (ask.payer, ask.unit)
    stored = state.grant(key, ask.id)
    if stored is not None:
        return _repeat(state, ask, stored, now), []
    begins = now if ask.effective_at is None else ask.effective_at
    if ask.expires_at <= max(begins, now):
        raise ConfigurationError(
            f"Grant {ask.id!r} expires at {ask.expires_at}, which is not after {max(begins, now)}, when it would "
            f"begin. Give it a later expiry."
        )
    book = Book(state, key, now)
    # Asked of the book, which has let lapse what is over: nobody else may have come by to write that down.
    if book.open_grants >= MAX_LIVE_GRANTS:
        raise ConfigurationError(
            f"Payer {ask.payer!r} has {MAX_LIVE_GRANTS} grants of {ask.unit!r} with units left, the most an account "
            f"may have. Merge small grants into larger ones."
        )
    if book.promised + ask.amount > MAX_AMOUNT:
        raise AmountError(
            f"With grant {ask.id!r} of {ask.amount}, payer {ask.payer!r} would have been granted more than "
            f"{MAX_AMOUNT} smallest parts of {ask.unit!r}. Declare the unit with a smaller scale."
        )
    grant = Grant(
        *key,
        ask.id,
        ask.amount,
        ask.priority,
        begins,
        ask.expires_at,
        book.entries + 1,
        ask.kind,
        ask.actor,
        begun=begins <= now,
    )
    paid = book.add(grant)
    return GrantReceipt(ask.id, ask.amount, True, paid, book.available), book.changes()


def _repeat(state: State, ask: PostGrant, stored: Grant, now: float) -> GrantReceipt:
    """The same grant again changes nothing; another grant under its id is refused by the first field that differs."""
    # What was taken back has no expiry of its own any more that another one could differ from.
    expires_at = () if stored.expires_at == TAKEN_BACK else ("expires_at",)
    for field in ("amount", "priority", *expires_at, "kind"):
        was, given = getattr(stored, field), getattr(ask, field)
        if was != given:
            raise IdempotencyConflictError("grant", ask.id, field, was, given)
    if ask.effective_at is not None and ask.effective_at != stored.effective_at:
        raise IdempotencyConflictError("grant", ask.id, "effective_at", stored.effective_at, ask.effective_at)
    return GrantReceipt(ask.id, stored.amount, False, 0, Book(state, (ask.payer, ask.unit), now).available)
