"""
Skimming: where, in many payloads at once, one may stand that matters, without cutting or parsing the others.

Knows names in JSON and the ends of lines and events. Never knows what a name means, nor whose it is. It may name a
place too many, which costs its reader a look, and never one too few.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from re import Pattern
from typing import Final

__all__ = [
    "LEAST",
    "MAX_LEAP",
    "MOST",
    "Marks",
    "end_before",
    "end_behind",
    "find_mark",
    "is_searchable",
    "sieve",
]

WINDOW: Final = 128
"""Bytes that are searched behind a leap: the end of one large event and the beginning of the next."""

MAX_WINDOW: Final = 4_096
"""Bytes that are searched at a time where there is nothing to leap over; it grows to them by doubling."""

FAR: Final = 128
"""A stretch without a quotation mark that is worth leaping over, which costs as much as searching so many bytes."""

MAX_LEAP: Final = 16_384
"""Bytes that are looked at for the end of such a stretch: each mark is searched from the one before it anew."""

REACH: Final = 48
"""Bytes behind a window that a name which begins in it may take, with the beginning of its value."""

DONE: Final = b"[DONE]"
"""The end mark of many streams, the only one that is no JSON."""

DONE_REACH: Final = len(DONE) - 1
"""Bytes behind a window that one which begins in it takes."""

_LETTERS: Final = 3
"""Of a name that are asked as sets first: most quotation marks fail them, in a fraction of what alternatives take."""

LEAST: Final = _LETTERS
"""Letters of the shortest name that can be searched for."""

MOST: Final = 40
"""Letters of the longest, which is seen whole within `REACH`, with the beginning of its value."""

_NOTHING: Final = rb'"(?!:\s?(?:null|false))'
"""Behind a name whose value decides: most events of most streams repeat it only to say that there is nothing yet."""

_EMPTY: Final = ("null", "false")
"""The values that it passes over."""


def is_searchable(name: str) -> bool:
    """Whether *name* has `LEAST` to `MOST` letters, and JSON writes them as they are."""
    return LEAST <= len(name) <= MOST and json.dumps(name) == f'"{name}"'


class Marks:
    """
    Names, one of which a payload must show to matter.

    Args:
        names: As keys or values, each of which `is_searchable`.
        fields: Such keys that matter with a value that begins like this (a regular expression) only.

    Attributes:
        bare: Those that matter whatever their value, or with one that is empty.
        pattern: What shows any of them.
    """

    __slots__ = ("bare", "fields", "names", "pattern")

    def __init__(self, names: Iterable[str], fields: Mapping[str, str] | None = None) -> None:
        self.names = tuple(sorted(names))
        self.fields = dict(fields or {})
        shown = [f'"{re.escape(name)}"' for name in self.names]
        shown += [rf'"{re.escape(name)}"\s*:\s*(?:{begins})' for name, begins in self.fields.items()]
        self.pattern = re.compile("|".join(shown).encode())
        empty = [name for name, begins in self.fields.items() if any(map(re.compile(begins).match, _EMPTY))]
        self.bare = (*self.names, *empty)


def sieve(*marks: Marks) -> Pattern[bytes]:
    """
    Make a pattern that lets through whatever any of *marks* finds, and little else, for `find_mark`.

    It looks no further than `REACH` bytes, and may be shown a name that is cut there.
    """
    names = {name.encode(): _NOTHING for each in marks for name in each.fields}
    names |= {name.encode(): b'"' for each in marks for name in each.bare}
    sets = b"".join(b"[" + re.escape(bytes({name[at] for name in names})) + b"]" for at in range(_LETTERS))
    rests: dict[bytes, set[bytes]] = {}
    for name, behind in names.items():
        rest = name[_LETTERS:]
        rests.setdefault(rest[:1], set()).add(re.escape(rest[1:]) + behind)
    ends = b"|".join(
        re.escape(first) + b"(?:" + b"|".join(sorted(each)) + b")" for first, each in sorted(rests.items())
    )
    return re.compile(b'"' + sets + b"(?:" + ends + b")")


def find_mark(data: bytes, at: int, marks: Pattern[bytes], end: int | None = None) -> int:
    """
    Return where the first mark or end mark of ``data[at:end]`` begins, or -1; it may be one that begins soon behind.

    Names stand in quotation marks, and an end mark has a line without any: so the stretch from one to the next within
    a line, such as a long text, is passed over.
    """
    size = len(data) if end is None else end
    find, search = data.find, marks.search
    window = WINDOW
    while at < size:
        stop = at + window
        found = search(data, at, stop + REACH)
        if found is not None and found.start() < stop:
            done = find(DONE, at, found.start())
            return found.start() if done < 0 else done
        done = find(DONE, at, stop + DONE_REACH)
        if done >= 0:
            return done
        at = stop
        quote = find(b'"', at, at + MAX_LEAP)
        if quote < 0:
            quote = min(at + MAX_LEAP, size)
        if quote > at + FAR and find(b"\n", at, quote) < 0 and find(b"\r", at, quote) < 0:
            at, window = quote, WINDOW
        elif window < MAX_WINDOW:
            window += window
    return -1


def end_before(data: bytes, at: int, place: int, ends: tuple[bytes, ...]) -> int:
    """Return the position behind the last of *ends* in ``data[at:place]``; *at*, which is one, if there is none."""
    line = place
    while (line := data.rfind(b"\n", at, line)) >= 0:
        if data.endswith(ends, at, line + 1):
            return line + 1
    return at


def end_behind(data: bytes, at: int, place: int, ends: tuple[bytes, ...]) -> int:
    """Return the position behind the first of *ends* at or behind *place* in ``data[at:]``; all of it without one."""
    line = place
    while (line := data.find(b"\n", line) + 1) > 0:
        if data.endswith(ends, at, line):
            return line
    return len(data)
