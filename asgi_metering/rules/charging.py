"""
Charging: turning what was held for a call into spending, by the sources that were held.

Does not know who ends a call, nor whether it may be ended.
"""

from __future__ import annotations

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, EntryKind, Part, Receipt, Source
from asgi_metering.rules.book import Book
from asgi_metering.rules.operations import End
from asgi_metering.rules.state import AllowanceWindow, Change, Hold, State, Table, build

__all__ = ["basis_of", "charge", "check_window", "receipt_of"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_ALLOWANCE = Source.ALLOWANCE


def charge(state: State, hold: Hold, ask: End, now: float) -> tuple[Receipt, list[Change]]:
    """
    Turn the held parts into spending in their order, and give back the rest from the last part backwards.

    What exceeds them is paid by the source of the last part, above its limit or as debt if need be (S3.7); beyond what
    stores count exactly it is an `AmountError`.
    """
    amount = ask.amount or 0
    basis = basis_of(ask)
    changes: list[Change] = []
    if not hold.parts and not amount:
        # A lease alone, or nothing was set aside: no account changes.
        return receipt_of(hold, ask, basis, 0, (), None, now, None), changes
    book = Book(state, (hold.payer, hold.unit), now)
    allowances = 0
    for part in hold.parts:
        if part.source is _ALLOWANCE:
            allowances += 1
    parts = _consume(state, book, hold, amount, changes) if allowances else book.settle(hold.parts, amount)
    number = None
    if amount:
        number = book.write(
            EntryKind.SETTLE,
            amount,
            hold.id,
            line=hold.line,
            basis=basis,
            estimated=ask.estimated,
            parts=parts,
        )
    changes.extend(book.changes())
    available = None if allowances and allowances == len(hold.parts) else book.available
    return receipt_of(hold, ask, basis, amount, parts, available, now, number), changes


def _consume(state: State, book: Book, hold: Hold, amount: int, changes: list[Change]) -> tuple[Part, ...]:
    """Where the charge came from: allowances one by one, the wallet's parts together, in the order of the hold."""
    spent: list[Part] = []
    left = amount
    at, parts = 0, hold.parts
    while at < len(parts):
        if parts[at].source is _ALLOWANCE:
            end = at + 1
        else:
            end = next((i for i in range(at, len(parts)) if parts[i].source is _ALLOWANCE), len(parts))
        run = parts[at:end]
        take = left if end == len(parts) else min(left, sum(part.amount for part in run))
        left -= take
        if run[0].source is _ALLOWANCE:
            spent.extend(_charge_allowance(state, run[0], hold, take, changes))
        else:
            spent.extend(book.settle(run, take))
        at = end
    return tuple(spent)


def basis_of(ask: End) -> Basis:
    """What the charge of *ask* is based on; a release charges nothing."""
    return Basis.NONE if ask.amount is None else ask.basis


def receipt_of(
    hold: Hold,
    ask: End,
    basis: Basis,
    amount: int,
    parts: tuple[Part, ...],
    available: int | None,
    now: float,
    number: int | None,
) -> Receipt:
    """The receipt of an end that applied."""
    # fmt: off
    return build(Receipt, (
        hold.id, hold.payer, hold.unit, amount, hold.amount, basis, ask.estimated, ask.by, parts, available, now,
        number, True, None, True,
    ))
    # fmt: on


def check_window(before: AllowanceWindow, after: AllowanceWindow) -> None:
    """Refuse what would bring a window beyond what stores count exactly, with an `AmountError`; see `Book.changes`."""
    used = after.settled + after.held
    if used > MAX_AMOUNT and used > before.settled + before.held:
        raise AmountError(
            f"Account {after.payer!r} would have spent and held {used} smallest parts of {after.unit!r} in a window of "
            f"allowance {after.name!r}, and stores count exactly up to {MAX_AMOUNT}. Declare the unit with a smaller "
            f"scale."
        )


def _charge_allowance(state: State, part: Part, hold: Hold, amount: int, changes: list[Change]) -> tuple[Part, ...]:
    """The charge goes to the window pinned at admission, above its limit if need be; the rest is free again."""
    key = (hold.payer, hold.unit, part.name, part.start)
    window = state.allowances.get(key)
    if window is not None:
        moved = window._replace(held=window.held - part.amount, settled=window.settled + amount)
        check_window(window, moved)
        changes.append((Table.ALLOWANCE, key, moved))
    elif part.amount:
        raise AssertionError(f"hold {hold.id!r} names allowance window {key!r}, which is gone")
    return (part._replace(amount=amount),) if amount else ()
