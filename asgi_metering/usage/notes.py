"""
What a reader has gathered from one exchange, and how a dialect adds to it.

Knows how untrusted JSON becomes counts, costs and labels. Never knows a provider's field names, nor bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal
from re import Pattern
from typing import Any, Final, TypeAlias

from asgi_metering.errors import UsageError
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import MAX_TOKENS, REFUSING, UNREAD, TokenUsage, UsageReport, read_count

__all__ = ["Dialect", "Json", "Notes", "as_object", "compact", "first", "objects"]

Json: TypeAlias = dict[str, Any]
"""A parsed JSON object. Its values are untrusted: check a type before descending."""

MAX_LABEL: Final = 200
"""Characters of a model name, id or finish reason: longer ones are not names, and would swell every event."""

MAX_COST: Final = Decimal(10**9)
"""USD of one call: far above any real one, far below what arithmetic on it could hurt."""

MAX_SEARCHES: Final = 10_000
"""Searches of the web for one answer that are believed: each costs a cent, and models make a handful."""

MAX_SECONDS: Final = 10_000_000
"""Seconds of a voice that are believed, months of it: an answer is about what was said since the last one."""

MAX_FAILURE: Final = 16 << 10
"""Bytes of an error that are kept: known ones have some hundred."""

COST_DIGITS: Final = 40
"""Digits and decimal places of a cost: 10**10 ticks a dollar need ten; a longer one is noise or an attack."""

# Wide enough for COST_DIGITS; never the caller's own (mutable, global) context.
_EXACT: Final = Context(prec=60)


def as_object(value: object) -> Json:
    """Return *value* if it is a JSON object, else an empty one: a missing branch has no fields."""
    return value if isinstance(value, dict) else {}


def objects(value: object) -> Iterator[Json]:
    """Yield the objects of a JSON array, passing over everything else."""
    if isinstance(value, list):
        yield from (item for item in value if isinstance(item, dict))


def compact(value: Json) -> str:
    """Write a tool's input about as the model did; nothing if it is nested deeper than can be written."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    except RecursionError:
        return ""


def first(*values: Any) -> Any:
    """Return the first value that is not null."""
    return next((value for value in values if value is not None), None)


@dataclass(slots=True)
class Notes:
    """
    The mutable state behind a `UsageReport`. One per exchange; a snapshot is taken from a `copy`.

    `counts` belongs to dialects that merge field by field; the others replace `usage` as a whole. `recognised` tells
    that a payload was of the dialect, `introduced` counts those parsed before the dialect and the model were known, and
    `peak` is the largest output that was reported: running totals never end below it.
    """

    dialect: Dialect | None = None
    usage: TokenUsage | None = None
    model: str | None = None
    response_id: str | None = None
    finish_reason: str | None = None
    cost: Decimal | None = None
    service: str | None = None
    searches: int | None = None
    citations: int | None = None
    seconds: Decimal | None = None
    complete: bool = False
    error: bool = False
    failure: bytes = b""
    partial: bool = False
    recognised: bool = False
    introduced: int = 0
    peak: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    problems: dict[str, None] = field(default_factory=dict)

    def copy(self) -> Notes:
        """Return notes that may change without changing these."""
        return replace(self, counts=dict(self.counts), problems=dict(self.problems))

    def flag(self, problem: str) -> None:
        """Remember a problem by its code (see `UsageReport.problems`)."""
        self.problems[problem] = None

    def count(self, *values: object) -> int | None:
        """
        Read the first value that is not null as a count.

        An impossible one is not reported and flagged: the call then falls back to its policy, and is never charged
        an absurd amount.
        """
        for value in values:
            if value is not None:
                break
        else:
            return None
        if type(value) is int and 0 <= value <= MAX_TOKENS:
            # What nearly every count is: some servers send four of them with each word.
            return value
        try:
            return read_count(value)
        except UsageError:
            self.flag("invalid_count")
            return None

    def plus(self, *counts: int | None) -> int | None:
        """Add the counts that are there; a sum above the bound is not reported and flagged."""
        known = [count for count in counts if count is not None]
        if sum(known) > MAX_TOKENS:
            self.flag("invalid_count")
            return None
        return sum(known) if known else None

    def take(self, usage: TokenUsage) -> None:
        """Let *usage* replace what was reported before: running totals, of which the last one counts."""
        self.usage = usage
        if usage.output is not None and not self.partial:
            self.peak = max(self.peak, usage.output)

    def add_up(self, asked: int | None, given: int | None, total: int | None) -> None:
        """Flag a total that is less than its two sides."""
        if total is not None and total < (asked or 0) + (given or 0):
            self.flag("total_below_parts")

    def inside(self, whole: int | None, *parts: int | None) -> None:
        """Flag parts that lie beside each other in *whole* where together they are more."""
        if whole is not None and sum(part for part in parts if part is not None) > whole:
            self.flag("part_exceeds_whole")

    def part(self, part: int | None, whole: int | None) -> int | None:
        """Lower a part to its whole where a provider reports more, and flag it."""
        if part is None or whole is None or part <= whole:
            return part
        self.flag("part_exceeds_whole")
        return whole

    def charge(self, value: object, divisor: int = 1) -> None:
        """Take *value* / *divisor* as the provider's own price in USD: the last wins, impossible ones are flagged."""
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            self.flag("invalid_cost")
            return
        exact = Decimal(value)
        in_range = exact.is_finite() and 0 <= exact <= MAX_COST * divisor
        if not in_range or (exact and (exact.adjusted() < -COST_DIGITS or len(exact.as_tuple().digits) > COST_DIGITS)):
            self.flag("invalid_cost")
            return
        self.cost = _EXACT.divide(exact, Decimal(divisor)) if exact else Decimal(0)

    def identify(self, source: Json, *, model: str = "model", response_id: str = "id") -> None:
        """Take the model (the last one named) and the response id (the first one) from an object's fields."""
        self.model = _label(source.get(model)) or self.model
        self.response_id = self.response_id or _label(source.get(response_id))

    def serve(self, *tiers: object) -> None:
        """Take the first service tier that is named."""
        named = next((label for tier in tiers if (label := _label(tier)) is not None), None)
        self.service = self.service if named is None else named.lower()

    def search(self, count: object) -> None:
        """Take the number of searches so far: a running total, which never falls."""
        found = self.count(count)
        if found is not None and found > MAX_SEARCHES:
            self.flag("invalid_count")
        elif found is not None:
            self.searches = max(found, self.searches or 0)

    def cite(self, count: object) -> None:
        """Take the tokens of what is cited so far: a running total, of which the last one counts."""
        found = self.count(count)
        self.citations = self.citations if found is None else found

    def last(self, seconds: object) -> None:
        """Take the seconds of voice that it is counted by; an impossible number is flagged."""
        if isinstance(seconds, int | Decimal) and not isinstance(seconds, bool) and 0 <= seconds <= MAX_SECONDS:
            self.seconds = Decimal(seconds)
        else:
            self.flag("invalid_count")

    def fail(self, payload: Json) -> None:
        """Keep what the first error says of itself, as JSON of at most `MAX_FAILURE` bytes."""
        inner = as_object(payload.get("response")) if payload.get("error") is None else payload
        error = inner.get("error")
        if not (error or payload.get("type") == "error"):
            return
        told: Json = {name: payload[name] for name in ("type", "code", "message", "status") if name in payload}
        text = compact({**told, **({"error": error} if error else {})}).encode("utf-8", "surrogatepass")
        self.failure = text if len(text) <= MAX_FAILURE else b""

    def finish(self, reason: object) -> None:
        """Take the finish reason; a null one says nothing."""
        self.finish_reason = _label(reason) or self.finish_reason

    def report(self) -> UsageReport | None:
        """Freeze what is known; `None` when nothing was recognised (a dialect that was asked for is no sign)."""
        named = (self.usage, self.model, self.response_id, self.finish_reason, self.cost)
        unread = not UNREAD.isdisjoint(self.problems) or not REFUSING.isdisjoint(self.problems)
        seen = self.error or unread or (self.complete and self.recognised)
        if all(value is None for value in named) and not seen:
            return None
        problems = self.problems
        if self.usage is not None and not self.partial and (self.usage.output or 0) < self.peak:
            problems = {**problems, "output_fell": None}
        refused = not REFUSING.isdisjoint(problems)
        return UsageReport(
            usage=None if refused else self.usage,
            doubted=self.usage if refused else None,
            model=self.model,
            response_id=self.response_id,
            dialect=self.dialect.name if self.dialect is not None else None,
            finish_reason=self.finish_reason,
            cost=self.cost,
            service=self.service,
            searches=self.searches,
            citations=self.citations,
            seconds=self.seconds,
            complete=self.complete,
            error=self.error,
            partial=self.partial,
            problems=tuple(problems),
        )


def _label(value: object) -> str | None:
    """Return a short printable string; anything else has no business on an event or in a metric."""
    if isinstance(value, str) and 0 < len(value) <= MAX_LABEL and value.isprintable():
        return value
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """
    How one family of APIs speaks. A new provider is one of these in its own module, and one sample.

    `fields.dialect_of_fields` makes one out of names alone. Its functions see untrusted JSON: what they raise
    is logged, and refuses what the exchange reported.

    Args:
        name: What `UsageReport.dialect` says, and what overrides detection.
        claims: Whether a payload is of this family, by its own type marks (``object``, ``type``).
        claims_usage: Whether a bare usage object is of this family's shape.
        note: Add one payload (an event, a chunk or a whole body) to the notes.
        note_usage: Add one bare usage object, cut out of a payload whose rest is lost; tell whether it counted.
        text: The text that the model produced in one payload, in order.
        telling: A payload without any of these marks cannot change the notes, so it is not parsed. Errors need not be
            named.
        texty: A payload that this pattern does not find has no text.
        shows: Names, at least three letters long, by which its payloads show themselves, beside those of the others
            (`dialects.COMMON`): a payload without any of them is not looked at before the dialect is known.
        usage_key: The field that holds the usage object.
        trailing_model: A large body names its model behind its content (embeddings do).
    """

    name: str
    claims: Callable[[Json], bool]
    claims_usage: Callable[[Json], bool]
    note: Callable[[Notes, Json], None]
    note_usage: Callable[[Notes, Json], bool]
    text: Callable[[Json], Iterator[str]]
    telling: Marks
    texty: Pattern[bytes]
    shows: tuple[str, ...] = ()
    usage_key: str = "usage"
    trailing_model: bool = False
