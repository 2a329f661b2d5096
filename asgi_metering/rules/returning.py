"""
Returning: giving back what was charged, from its last part backwards, to where it came from.

Used by corrections of a charge, whoever asks for them. Does not know why, nor whether it may be.
"""

from __future__ import annotations

from collections.abc import Iterable

from asgi_metering.receipts import Part, Source
from asgi_metering.rules.book import Book
from asgi_metering.rules.charging import check_window
from asgi_metering.rules.state import Change, State, Table

__all__ = ["give_back", "left_of", "move_window"]

_ALLOWANCE = Source.ALLOWANCE


def give_back(state: State, book: Book, parts: tuple[Part, ...], amount: int, changes: list[Change]) -> list[Part]:
    """
    Take back *amount* of a charge that *parts* paid; *changes* gets the windows, *book* the rest.

    An allowance's window that is over, or forgotten, gets nothing to spend again (S0.11). An account gets no more than
    it has spent: a correction may have given back before what this charge was.

    Returns the parts that were given back, in the order in which that was done, with their amounts negative.
    """
    given: list[Part] = []
    left = amount
    for part in reversed(parts):
        take = min(part.amount, left)
        if not take:
            continue
        left -= take
        if part.source is _ALLOWANCE:
            move_window(state, book, part, -take, changes)
        else:
            take = min(take, book.settled)
            if not take:
                continue
            book.give_back((part,), take)
        given.append(part._replace(amount=-take))
    return given


def left_of(paid: Iterable[Part], given: Iterable[Part]) -> tuple[Part, ...]:
    """What is left of the parts of a charge, in their order, once *given*, with negative amounts, has gone back."""
    left = list(paid)
    for back in given:
        owed = -back.amount
        for at in range(len(left) - 1, -1, -1):
            part = left[at]
            if part[:3] == back[:3]:
                take = min(part.amount, owed)
                left[at] = part._replace(amount=part.amount - take)
                owed -= take
    return tuple(part for part in left if part.amount)


def move_window(state: State, book: Book, part: Part, amount: int, changes: list[Change]) -> None:
    """Add *amount*, of either sign, to what the part's window has settled: never below zero, and not to one gone."""
    key = (*book.key, part.name, part.start)
    window = state.allowances.get(key)
    if window is not None:
        moved = window._replace(settled=max(0, window.settled + amount))
        check_window(window, moved)
        changes.append((Table.ALLOWANCE, key, moved))
