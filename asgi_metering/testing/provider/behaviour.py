"""
What a request asks the provider to do wrong, read from the model's name.

Knows the grammar ``base[:behaviour[-number]...]...`` and its bounds. Never knows a wire format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["BEHAVIOURS", "MAX_WORDS", "Behaviour", "Failure", "Stop", "UnknownBehaviourError", "read_model"]

MAX_WORDS = 30_000
"""Words of one answer: about 155,000 characters, which are still counted and not estimated."""

MAX_PAUSE_MS = 60_000
"""A pause between two deltas beyond a minute is a stall, which has its own name."""

MAX_TOKENS = 2**63 - 1
"""Absurd on purpose: a fixed usage may be beyond what any balance can hold."""

_PIECE = re.compile(r"(?P<name>[a-z]+(?:-[a-z]+)*)(?P<numbers>(?:-[0-9]{1,19})*)")


class UnknownBehaviourError(ValueError):
    """The model's name has a part that the provider does not know."""


@dataclass(frozen=True, slots=True)
class Failure:
    """
    A refusal before the first byte.

    Args:
        kind: ``status`` with its own number; ``rate_limited``; ``overloaded`` (OpenAI 503, Anthropic 529);
            ``out_of_credit`` (OpenAI 429 ``insufficient_quota``, Anthropic 400).
        status: The status of ``status``, else 0.
        retry_after_s: Seconds for ``retry-after``, or `None`.
    """

    kind: Literal["status", "rate_limited", "overloaded", "out_of_credit"]
    status: int = 0
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class Stop:
    """
    An end of the answer that is not its own.

    Args:
        kind: ``cut``: the connection ends; ``error``: the in-band error event; ``failed``: the same, but
            ``response.failed`` in the Responses API; ``stall``: nothing more, until the client leaves.
        after: Deltas that are sent before it.
    """

    kind: Literal["cut", "error", "failed", "stall"]
    after: int


@dataclass(frozen=True, slots=True)
class Behaviour:
    """
    How one request is answered.

    Args:
        model: The base name; the answer carries it as its ``model``.
        words: Words of the answer, or `None` for the provider's default.
        pause_s: Before each delta of a stream; before a JSON answer once for each word.
        endless: The stream goes on until the client leaves.
        failure: Refused before the first byte.
        fail_first: Refused until the model's name was asked for so often.
        first_failure: As what.
        stop: Ended early.
        usage: What is reported instead of the counts; `fixed_usage` if ``fixed``.
        fixed_usage: Input and output tokens.
        running_usage: Chat streams repeat the usage so far on every chunk.
        cached, cache_write: Input tokens read from and written to the cache, at most the input's.
        reasoning: Output tokens that were thought and not shown.
        quota_headers: Whether the answer says what is left.
        line_end: Of the stream.
        comments: A comment line before each event.
        torn: Each event comes in two pieces, torn inside a character where it has one of several bytes.
    """

    model: str
    words: int | None = None
    pause_s: float = 0.0
    endless: bool = False
    failure: Failure | None = None
    fail_first: int = 0
    first_failure: Failure = Failure("status", 500)
    stop: Stop | None = None
    usage: Literal["counted", "missing", "null", "zero", "negative", "fixed"] = "counted"
    fixed_usage: tuple[int, int] = (0, 0)
    running_usage: bool = False
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0
    quota_headers: bool = True
    line_end: bytes = b"\n"
    comments: bool = False
    torn: bool = False


class _Number(NamedTuple):
    """One number of a behaviour; it must be written if it has no default."""

    lowest: int
    highest: int
    default: int | None = None


class _Rule(NamedTuple):
    numbers: tuple[_Number, ...]
    changes: Callable[..., Mapping[str, Any]]


_COUNT = _Number(0, MAX_WORDS)


def _failure(kind: Literal["rate_limited", "overloaded", "out_of_credit"]) -> dict[str, Failure]:
    return {"failure": Failure(kind)}


_RULES: Mapping[str, _Rule] = {
    "words": _Rule((_COUNT,), lambda n: {"words": n}),
    "slow": _Rule((_Number(0, MAX_PAUSE_MS, 50),), lambda ms: {"pause_s": ms / 1000}),
    "endless": _Rule((), lambda: {"endless": True}),
    "error": _Rule((_Number(400, 599),), lambda status: {"failure": Failure("status", status)}),
    "rate-limited": _Rule((_Number(0, 3_600, 2),), lambda s: {"failure": Failure("rate_limited", 429, s)}),
    "overloaded": _Rule((), lambda: _failure("overloaded")),
    "out-of-credit": _Rule((), lambda: _failure("out_of_credit")),
    "fail-first": _Rule((_Number(1, 100),), lambda n: {"fail_first": n}),
    "limited-first": _Rule(
        (_Number(1, 100),), lambda n: {"fail_first": n, "first_failure": Failure("rate_limited", 429, 0)}
    ),
    "cut-after": _Rule((_COUNT,), lambda n: {"stop": Stop("cut", n)}),
    "error-after": _Rule((_COUNT,), lambda n: {"stop": Stop("error", n)}),
    "failed-after": _Rule((_COUNT,), lambda n: {"stop": Stop("failed", n)}),
    "stall-after": _Rule((_COUNT,), lambda n: {"stop": Stop("stall", n)}),
    "no-usage": _Rule((), lambda: {"usage": "missing"}),
    "null-usage": _Rule((), lambda: {"usage": "null"}),
    "zero-usage": _Rule((), lambda: {"usage": "zero"}),
    "negative-usage": _Rule((), lambda: {"usage": "negative"}),
    "usage": _Rule((_Number(0, MAX_TOKENS),) * 2, lambda i, o: {"usage": "fixed", "fixed_usage": (i, o)}),
    "running-usage": _Rule((), lambda: {"running_usage": True}),
    "cached": _Rule((_Number(0, MAX_TOKENS),), lambda n: {"cached": n}),
    "cache-write": _Rule((_Number(0, MAX_TOKENS),), lambda n: {"cache_write": n}),
    "reasoning": _Rule((_Number(0, MAX_WORDS),), lambda n: {"reasoning": n}),
    "no-quota": _Rule((), lambda: {"quota_headers": False}),
    "crlf": _Rule((), lambda: {"line_end": b"\r\n"}),
    "comments": _Rule((), lambda: {"comments": True}),
    "torn": _Rule((), lambda: {"torn": True}),
}

BEHAVIOURS = tuple(_RULES)
"""The names of all behaviours, without their numbers; the table is in `asgi_metering.testing.provider`."""


def read_model(name: str) -> Behaviour:
    """
    Read ``base:behaviour:behaviour-12``; the base is free and must not be empty.

    Raises:
        UnknownBehaviourError: A part is unknown, lacks its number, is out of bounds, or contradicts another.
    """
    base, *pieces = name.split(":")
    if not base:
        raise UnknownBehaviourError(f"The model {name!r} has no base name. Write it before the colon.")
    behaviour = Behaviour(base)
    changed: set[str] = set()
    for piece in pieces:
        changes = _changes(piece)
        if not changed.isdisjoint(changes):
            raise UnknownBehaviourError(f"The model {name!r} says {piece!r} and something that contradicts it.")
        changed.update(changes)
        behaviour = replace(behaviour, **changes)
    return behaviour


def _changes(piece: str) -> Mapping[str, Any]:
    match = _PIECE.fullmatch(piece)
    rule = _RULES.get(match["name"]) if match else None
    if match is None or rule is None:
        raise UnknownBehaviourError(f"No behaviour is called {piece!r}. Choose from: {', '.join(BEHAVIOURS)}.")
    written = [int(number) for number in match["numbers"].split("-")[1:]]
    if len(written) > len(rule.numbers):
        raise UnknownBehaviourError(f"The behaviour {piece!r} takes {len(rule.numbers)} numbers.")
    values = [_value(piece, number, written[at : at + 1]) for at, number in enumerate(rule.numbers)]
    return rule.changes(*values)


def _value(piece: str, number: _Number, written: list[int]) -> int:
    value = written[0] if written else number.default
    if value is None or not number.lowest <= value <= number.highest:
        raise UnknownBehaviourError(
            f"The behaviour {piece!r} needs a number from {number.lowest} to {number.highest} here, not {value!r}."
        )
    return value
