"""
Boilerplate: what the events of one stream repeat around their texts, looked at once and passed over from then on.

Knows bytes, and that names stand in quotation marks. Never knows a name: what may matter is found by a `Search`. It
may want an event too many, which costs its reader a look, and never one too few.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import Final, NamedTuple

from asgi_metering.usage.skim import MOST

__all__ = ["Boilerplate", "Search"]

SOME: Final = 4
"""Events of which it is worth to look at what all of them repeat."""

SHORT: Final = 160
"""Bytes of events, on average, that are searched in less time than it takes to take off what they repeat."""

LONG: Final = 1_024
"""Bytes of events, on average, whose texts are worth a look of their own for a quotation mark: most have none."""

MANY: Final = 128
"""Quotation marks of an event whose text has most of them."""

LESSONS: Final = 8
"""How often a stream may change what it repeats: one that does so more often repeats nothing."""

FEW: Final = 4
"""One event of so many that is wanted is one too many: then nothing is spared."""

MAX_KEPT: Final = 65_536
"""Bytes of what is repeated that are kept for the next events; around no text do providers repeat nearly as much."""

_BETWEEN: Final = b'"\n"'
"""Between two texts. No name has an end of a line, so nothing is found across it."""

_QUOTE, _LF, _CR, _BACKSLASH = b'"\n\r\\'
"""Numbers, which are looked for in a fifth of the time."""

_BYTES: Final = frozenset((bytes,))
"""Applications also send other things that hold bytes, which cannot be searched, or may hold others later."""


class Search(NamedTuple):
    """
    What may matter in a payload.

    Args:
        of: Its identity: what is known of the boilerplate holds for one search.
        find: Where it first stands in these bytes from a place on, or -1. A name whose value lies behind them matters.
        escapes: A backslash matters, too.
    """

    of: object
    find: Callable[[bytes, int], int]
    escapes: bool


class Boilerplate:
    """
    What most events of one stream begin and end with, in which nothing matters.

    The beginning ends with a quotation mark, or where an event does, and the end begins with one. So a name in
    quotation marks is whole in one of the two, where it was searched for once, or whole in what is left between them.
    """

    __slots__ = ("_before", "_behind", "_lessons", "_of")

    def __init__(self) -> None:
        self._before = self._behind = b""
        self._lessons = LESSONS
        self._of: object = None

    def wanted(self, chunks: Sequence[bytes], size: int, ends: tuple[bytes, ...], search: Search) -> list[int] | None:
        """
        Return the places of those of *chunks* in which something may matter, in their order.

        None where all of them have to be read: each was not one or more whole events, or too little is spared.

        Args:
            chunks: The next ones of the stream, of which the first begins an event.
            size: How many bytes they are.
            ends: Behind any of these an event is over.
            search: What may matter. Once an event changes that, the places behind it hold no longer.
        """
        if len(chunks) < SOME or size < SHORT * len(chunks) or not (self._lessons or self._before or self._behind):
            return None
        # Whole ones, before anything is learned from them: a piece of one may end within a name.
        if not (_BYTES.issuperset(map(type, chunks)) and all(map(bytes.endswith, chunks, repeat(ends)))):
            return None
        if not self._knows(chunks, size, search):
            return None
        wanted = self._long(chunks, search) if size > LONG * len(chunks) else self._short(chunks, size, search)
        if wanted is None or FEW * len(wanted) > len(chunks):
            self._before = self._behind = b""
            return None
        return wanted

    def _long(self, events: Sequence[bytes], search: Search) -> list[int]:
        """Return all but those whose text is longer than any name, without a quotation mark, and of one line."""
        before, behind, escapes = self._before, self._behind, search.escapes
        wanted = []
        for place, event in enumerate(events):
            text = event.removeprefix(before).removesuffix(behind)
            if not text:
                continue
            is_plain = len(text) > MOST and not (_QUOTE in text or _LF in text or _CR in text)
            if not is_plain or (escapes and _BACKSLASH in text):
                wanted.append(place)
        return wanted

    def _short(self, events: Sequence[bytes], size: int, search: Search) -> list[int] | None:
        """Return those in whose texts something is found; None where their texts are most of these bytes."""
        behind = map(bytes.removeprefix, events, repeat(self._before))
        texts = [*map(bytes.removesuffix, behind, repeat(self._behind))]
        return _found(texts, search) if 2 * sum(map(len, texts)) <= size else None

    def _knows(self, events: Sequence[bytes], size: int, search: Search) -> bool:
        """Whether anything is known, or learned now, that is worth to be taken off so many bytes."""
        if self._of is not search.of:
            self._before, self._behind, self._of = b"", b"", search.of
        if not (self._before or self._behind) and self._lessons:
            self._lessons -= 1
            later = events[len(events) // 2 :]
            before, behind = _shared(later[0], next((event for event in later if event != later[0]), later[0]))
            kept = len(before) + len(behind)
            is_worth = kept <= MAX_KEPT and (size > LONG * len(events) or 2 * kept * len(events) > size)
            if is_worth and search.find(before, 0) < 0 and search.find(behind, 0) < 0:
                self._before, self._behind = before, behind
        return bool(self._before or self._behind)


def _shared(one: bytes, other: bytes) -> tuple[bytes, bytes]:
    """Return what two events begin with and what they end with; equal ones have nothing else."""
    if one == other:
        return one, b""
    if max(one.count(b'"'), other.count(b'"')) > MANY:
        return b"", b""
    ours, theirs = one.split(b'"'), other.split(b'"')
    shared = min(len(ours), len(theirs)) - 1
    first = _same(ours, theirs, shared)
    last = _same(ours[::-1], theirs[::-1], shared - first)
    return b'"'.join([*ours[:first], b""]), b'"'.join([b"", *ours[len(ours) - last :]])


def _same(one: Sequence[bytes], other: Sequence[bytes], most: int) -> int:
    """Return how many of their first *most* pieces are the same."""
    return next((at for at in range(most) if one[at] != other[at]), most)


def _found(texts: Sequence[bytes], search: Search) -> list[int]:
    """Return the places of texts in which something is found; more than a few of them say only that there are many."""
    joined = _BETWEEN.join([b"", *texts, b""])
    place = search.find(joined, 0)
    if place < 0:
        return []
    # Where the quotation mark before each of them stands.
    starts = [*accumulate(map(len(_BETWEEN).__add__, map(len, texts)), initial=len(_BETWEEN) - 1)]
    found: list[int] = []
    while place >= 0 and FEW * len(found) <= len(texts):
        at = bisect_right(starts, place) - 1
        found.append(at)
        place = search.find(joined, starts[at + 1])
    return found
