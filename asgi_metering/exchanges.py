"""
Exchanges: what a call keeps of its upstream exchanges, the latest by themselves and all before them as sums.

So that an agent loop of any length is charged for all that it used, and keeps few bodies' readers: details are
bounded, sums are not. Knows how reports of one kind are added. Never knows what one costs, nor which of them count.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asgi_metering.errors import UsageError
from asgi_metering.prices.costing import ModelCall
from asgi_metering.usage.texts import Heard
from asgi_metering.usage.values import UsageReport

if TYPE_CHECKING:
    from asgi_metering.usage import UsageReader

__all__ = ["MAX_EXCHANGES", "MAX_SUMS", "SPARE", "Entry", "Exchanges", "Sum", "kind_of"]

MAX_EXCHANGES: Final = 1_000
"""
Upstream exchanges of one call that are kept by themselves: beyond it an agent loop would keep every body's reader.

What still runs is kept beside them, as many as the clients have connections.
"""

SPARE: Final = 250
"""How many of them become sums at once, when there are more: to look through all of them costs a millisecond or two."""

MAX_SUMS: Final = 1_000
"""
Sums that are told apart; names of models come from upstream. What is beyond is summed as of a model that nobody named.
"""

MAX_SHOWN: Final = 100_000
"""Answers that are remembered when they are summed, so that one that is fetched again counts once."""

Entry: TypeAlias = "tuple[str, UsageReader | Sum, int]"
"""(provider, who has read the body, status)."""

LOCK: Final = threading.Lock()
"""Held while exchanges become sums, and while both are looked at: answers come in several threads."""


def kind_of(price: Any, call: ModelCall) -> Hashable:
    """
    What *price* tells calls of one model apart by: those of one kind cost together what they cost apart.

    A price says so by a method ``kind_of``; of another one it is the length of the context, by powers of two.
    """
    asked = getattr(price, "kind_of", None)
    kind: Hashable = (call.usage.input or 0).bit_length() if asked is None else asked(call)
    return kind, call.service


class Sum:
    """
    What exchanges of one kind came to; stands where the reader of one would. Never changes.

    Args:
        call: Their sum.
        problems: What was odd in them (`UsageReport.problems`).
        truncated: A token limit cut one of them.
        counted: Their bodies broke, so that they were counted as far as they had come.
        unreported: They reported nothing, so that the work must have begun for them to count.
    """

    __slots__ = ("call", "counted", "problems", "truncated", "unreported")

    streams = fetched = False
    known = over = True

    def __init__(
        self, call: ModelCall, problems: tuple[str, ...], *, truncated: bool, counted: bool, unreported: bool
    ) -> None:
        self.call, self.problems, self.truncated = call, problems, truncated
        self.counted, self.unreported = counted, unreported

    @property
    def ended(self) -> bool:
        """Whether all of them were read to their end."""
        return not self.counted

    def plus(self, other: Sum) -> Sum:
        """Both; a sum that cannot be counted is believed as little as such a report."""
        problems = dict.fromkeys((*self.problems, *other.problems))
        try:
            call = self.call.plus(other.call)
        except UsageError:
            call, problems["invalid_count"] = self.call, None
        truncated = self.truncated or other.truncated
        return Sum(call, tuple(problems), truncated=truncated, counted=self.counted, unreported=self.unreported)

    def unnamed(self) -> Sum:
        """The same, of a model that nobody named."""
        call = replace(self.call, model=None)
        return Sum(call, self.problems, truncated=self.truncated, counted=self.counted, unreported=self.unreported)

    def report(self) -> UsageReport:
        """What they reported, as if one had."""
        refused = not self.counted and "invalid_count" in self.problems
        return UsageReport(
            usage=None if refused else self.call.usage,
            model=self.call.model,
            finish_reason="length" if self.truncated and not self.counted else None,
            cost=self.call.cost,
            complete=not self.counted,
            problems=self.problems,
        )

    def heard(self) -> Heard:
        """No text is left; what was counted of it is in the usage."""
        return Heard("", 0, self.counted)


class Exchanges(list[Entry]):
    """
    The upstream exchanges of one call, the latest of them, in the order in which they were answered.

    Attributes:
        most: How many are kept by themselves.
        spare: How many become sums at once.
        most_sums: How many sums are told apart.
        sums: Those before, by what tells them apart; None as long as there are few.
        shown: Hashes of the answers in there, by provider and id.
        again: How many there have to be until it is worth while to look for what can be summed.
        folds: Somebody looks.
    """

    most, spare, most_sums = MAX_EXCHANGES, SPARE, MAX_SUMS
    sums: dict[Hashable, Sum] | None = None
    shown: frozenset[int] = frozenset()
    again = 0
    folds = False

    def take(self, entry: Entry) -> bool:
        """Keep one more; whether there are so many that the oldest should be folded, by whoever is told so."""
        with LOCK:
            self.append(entry)
            if self.folds or len(self) <= max(self.most, self.again):
                return False
            self.folds = True
            return True

    def entries(self) -> list[Entry]:
        """Sums first, then each of the latest."""
        with LOCK:
            return list(self) if self.sums is None else [*map(_entry, self.sums.values()), *self]

    def latest(self) -> list[Entry]:
        """Each that is no part of a sum."""
        with LOCK:
            return list(self)

    def was_summed(self, provider: str, response_id: str) -> bool:
        """Whether that answer is in a sum."""
        return hash((provider, response_id)) in self.shown

    def fold(self, gone: Iterable[Entry], folded: Iterable[tuple[Hashable, Sum, str | None]]) -> None:
        """
        Let *gone* go, and add what is *folded* of them.

        Args:
            gone: Entries.
            folded: What tells each apart, the exchange as a sum of one, and the id of its answer.
        """
        sums, shown = dict(self.sums or {}), set(self.shown)
        for kind, one, response_id in folded:
            key: Hashable = (kind, one.call.provider, one.call.model, one.counted, one.unreported)
            if response_id is not None and len(shown) < MAX_SHOWN:
                shown.add(hash((one.call.provider, response_id)))
            added = one
            if key not in sums and len(sums) >= self.most_sums:
                key, added = (one.counted, one.unreported), one.unnamed()
            known = sums.get(key)
            sums[key] = added if known is None else known.plus(added)
        let_go = set(map(id, gone))
        with LOCK:
            self[:] = [entry for entry in self if id(entry) not in let_go]
            self.sums, self.shown = sums, frozenset(shown)

    def rest(self) -> None:
        """Nobody looks any more; again when there are many more of them."""
        with LOCK:
            self.folds = False
            self.again = len(self) + self.spare


def _entry(known: Sum) -> Entry:
    return known.call.provider or "", known, SUCCESS


SUCCESS: Final = 200
"""The status of exchanges that were summed: an error used nothing."""
