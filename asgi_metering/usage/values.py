"""
Token usage as a value: what one call, or the sum of several, consumed.

Knows the axes, their bounds, and the difference between zero and not reported. Never knows where a count came
from, what it costs, or who pays.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import Decimal
from operator import attrgetter
from typing import Final

from asgi_metering.errors import UsageError

__all__ = ["AXES", "MAX_TOKENS", "REFUSING", "UNREAD", "TokenUsage", "UsageReport", "read_count"]

MAX_TOKENS: Final = 10**12
"""
The largest count of one axis that is believed.

The largest context windows hold about 10**7 tokens, so this leaves five orders of magnitude for sums, and a price per
token of a whole unit still stays below the largest amount that stores keep.
"""

AXES: Final = (
    "input",
    "output",
    "cached",
    "cache_write",
    "reasoning",
    "audio",
    "audio_output",
    "cache_write_1h",
    "image_input",
    "image_output",
)
"""The fields of `TokenUsage`, in order."""

_COUNTS: Final = attrgetter(*AXES)
_TYPES: Final = frozenset({int, type(None)})

REFUSING: Final = frozenset({"invalid_count", "part_exceeds_whole", "total_below_parts", "output_fell", "unreadable"})
"""Problems for which nothing of a report is believed: whoever contradicts himself may be wrong anywhere (S3.21)."""

UNREAD: Final = frozenset({"undecodable", "no_decoder"})
"""Problems for which a report may be missing altogether."""

_TRUNCATED: Final = frozenset({"length", "max_tokens", "max_output_tokens", "MAX_TOKENS"})
"""What the families call "stopped by the limit": OpenAI chat, Anthropic, OpenAI Responses, Gemini."""


def _check(value: int | None, axis: str) -> None:
    if value is None:
        return
    if type(value) is not int:
        raise UsageError(
            f"The {axis} count {value!r} is a {type(value).__name__}, not an int. Pass whole tokens, or None."
        )
    if not 0 <= value <= MAX_TOKENS:
        raise UsageError(f"The {axis} count {value} is outside 0 to {MAX_TOKENS}. Pass what one call really used.")


@dataclass(frozen=True, slots=True, repr=False)
class TokenUsage:
    """
    Tokens consumed. `None` means not reported, which is never zero (S2.41).

    Args:
        input: Every input token, cached or not, cache writes included.
        output: Every output token, reasoning included.
        cached: Read from a prompt cache; a part of `input`.
        cache_write: Written to a prompt cache; a part of `input`.
        reasoning: Spent on thinking; a part of `output`.
        audio: Audio tokens of both directions; a part of `input` and `output`.
        audio_output: Those of them that are output, which cost more; `None` where the directions were not told apart.
        cache_write_1h: Those written for an hour rather than some minutes, which cost more; a part of `cache_write`.
        image_input: Tokens of images and films; a part of `input`.
        image_output: Those of the output; a part of `output`. 0 says that all of it is text.

    All but the first two are parts and never added to `total` (S2.43). They are kept as they were given, also where a
    part is larger than its whole: extractors reconcile what providers report, and a price must not subtract below zero.

    A `TokenUsage` is true when any axis was reported, also as zero.

    Raises:
        UsageError: A count is not an int (a bool, float or NaN), negative, or above `MAX_TOKENS`.
    """

    input: int | None = None
    output: int | None = None
    cached: int | None = None
    cache_write: int | None = None
    reasoning: int | None = None
    audio: int | None = None
    audio_output: int | None = None
    cache_write_1h: int | None = None
    image_input: int | None = None
    image_output: int | None = None

    def __post_init__(self) -> None:
        counts = _COUNTS(self)
        # Some servers report with each word. Of nearly all counts C says at once that they are usable.
        if _TYPES.issuperset(map(type, counts)):
            told = [count for count in counts if count]
            if not told or (min(told) > 0 and max(told) <= MAX_TOKENS):
                return
        tuple(map(_check, counts, AXES))

    def __repr__(self) -> str:
        told = ", ".join(f"{axis}={count}" for axis in AXES if (count := getattr(self, axis)) is not None)
        return f"TokenUsage({told})"

    @property
    def total(self) -> int | None:
        """Input and output together; `None` when neither was reported."""
        return _plus(self.input, self.output)

    @property
    def observed(self) -> bool:
        """Whether anything was reported. A zero is a report (S2.41)."""
        return any(getattr(self, axis) is not None for axis in AXES)

    def __bool__(self) -> bool:
        return self.observed

    def __add__(self, other: TokenUsage | None) -> TokenUsage:
        """
        Add each axis on its own; what only one side reported is kept, and `None` adds nothing (S2.39).

        Raises:
            UsageError: A sum is above `MAX_TOKENS`.
        """
        if other is None:
            return self
        if not isinstance(other, TokenUsage):
            return NotImplemented
        return TokenUsage(*(_plus(getattr(self, axis), getattr(other, axis)) for axis in AXES))

    @classmethod
    def sum(cls, usages: Iterable[TokenUsage | None]) -> TokenUsage:
        """Add any number of usages, missing ones included; of nothing it is a usage that observed nothing."""
        total = cls()
        for usage in usages:
            total += usage
        return total


def _plus(one: int | None, other: int | None) -> int | None:
    if one is None:
        return other
    return one if other is None else one + other


def read_count(value: object) -> int | None:
    """
    Read one count out of parsed JSON: an int, or a float or Decimal that is integral (Cohere sends floats).

    Returns:
        The count, or `None` for a missing (null) one.

    Raises:
        UsageError: A bool, str or other type, NaN, infinite, negative, fractional, or above `MAX_TOKENS`.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise UsageError(f"The count is a {type(value).__name__}, not a number. It counts as not reported.")
    # The range is checked before the conversion: int(Decimal("1e999999")) would build a million digits.
    if not 0 <= value <= MAX_TOKENS or value != int(value):
        raise UsageError(f"The count is not a whole number from 0 to {MAX_TOKENS}. It counts as not reported.")
    return int(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageReport:
    """
    What one HTTP exchange with a model said about itself, so far.

    Args:
        usage: The counts, normalised (cache reads and writes inside `input`); `None` when none were readable, or when
            what was read cannot be believed: it is not reported then, never zero and never a part of it.
        doubted: The counts that are not believed, for whoever looks into it; never charged.
        model: The model that answered, as the provider names it.
        response_id: The first id that the exchange showed; gateways may rotate ids within one stream.
        dialect: Name of the dialect that was read, `None` when only an error was recognised.
        finish_reason: In the provider's own words: "stop", "length", "end_turn", "max_output_tokens", ...
        cost: What the provider says that it charges, in USD; `None` when it does not say.
        service: By which service tier it was answered, in the provider's own word, such as "flex"; in small letters.
        searches: Searches of the web that the provider made for it.
        citations: Tokens of what it cites, where they are counted beside the answer's (Perplexity).
        seconds: Of voice, where it is counted by these and not by tokens.
        complete: The body's end was seen: ``[DONE]``, a terminal event, or the whole JSON body.
        error: The exchange carried an error.
        partial: `usage.output` is only the seed that the stream began with, not a count of what was produced.
        problems: Codes of what was odd, each once. Those of `REFUSING` refuse the counts, with an alarm:
            ``invalid_count`` (one is no whole number from 0 to `MAX_TOKENS`), ``part_exceeds_whole`` (more cached than
            read, more reasoning than written), ``total_below_parts``, ``output_fell`` (the last running total is below
            an earlier one). The others are told beside counts that are believed: ``total_mismatch`` (the provider's own
            total is a larger number), ``invalid_cost`` (read as not reported), ``other_model_tokens`` (tokens billed
            under another model are left out), ``clipped`` (counts found in a piece of a payload), ``undecodable`` (the
            compressed body could not be followed to here), ``no_decoder`` (its coding is unknown, or its decoder is not
            installed).
    """

    usage: TokenUsage | None = None
    doubted: TokenUsage | None = None
    model: str | None = None
    response_id: str | None = None
    dialect: str | None = None
    finish_reason: str | None = None
    cost: Decimal | None = None
    service: str | None = None
    searches: int | None = None
    citations: int | None = None
    seconds: Decimal | None = None
    complete: bool = False
    error: bool = False
    partial: bool = False
    problems: tuple[str, ...] = ()

    @property
    def refused(self) -> bool:
        """Whether it reported counts that are not believed."""
        return not REFUSING.isdisjoint(self.problems)

    @property
    def reported(self) -> TokenUsage | None:
        """
        The counts that may be charged as reported: `usage` without an output that is only a seed.

        A stream that ends before its first running total (Anthropic without ``message_delta``) has told nothing about
        its output, so it is `None` here, never the seed.
        """
        if self.usage is None or not self.partial:
            return self.usage
        usage = self.usage
        known = TokenUsage(usage.input, cached=usage.cached, cache_write=usage.cache_write)
        known = replace(known, cache_write_1h=usage.cache_write_1h, image_input=usage.image_input)
        return known if known.observed else None

    def truncated(self, max_tokens: int | None = None) -> bool:
        """
        Tell whether the answer was cut by a token limit (S3.28).

        Args:
            max_tokens: The limit that the request asked for; decides when no finish reason came.
        """
        if self.finish_reason is not None:
            return self.finish_reason in _TRUNCATED
        output = self.reported.output if self.reported is not None else None
        return max_tokens is not None and output is not None and output >= max_tokens
