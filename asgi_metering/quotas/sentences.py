"""
What the sentence of a 429 says in numbers: OpenAI, Groq, Azure, xAI.

Knows the phrases. Never knows where the sentence stood.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from asgi_metering.quotas.reading import QuotaLimit
from asgi_metering.quotas.values import MAX_WAIT_S, parse_count, parse_duration_s

__all__ = ["MAX_SENTENCE", "Sentence", "read_sentence"]

MAX_SENTENCE = 2_000
"""Characters that are read: the longest known has four hundred."""

_WINDOWS = {"sec": "second", "min": "minute", "hr": "hour"}

_USED = re.compile(
    r"on (?:input |output )?(?P<kind>tokens|requests) per (?P<window>[a-z]{3,8}) \([A-Z]{3,6}\): "
    r"Limit (?P<limit>\d(?:[\d,]{0,18}\d)?)(?:, Used (?P<used>\d(?:[\d,]{0,18}\d)?))?"
)
_ACTUAL = re.compile(
    r"(?P<kind>tokens|requests) per (?P<window>[a-z]{3,8}) \(actual/limit\): "
    r"(?P<used>\d(?:[\d,]{0,18}\d)?)/(?P<limit>\d(?:[\d,]{0,18}\d)?)",
    re.IGNORECASE,
)
_AGAIN = re.compile(
    r"(?:try again|retry) (?:in|after) (?P<wait>[0-9][0-9a-zµ.]{0,30}?)(?P<unit> seconds?)?(?:[.\s]*(?:\s|$))",
    re.IGNORECASE,
)
_REPLENISHED = re.compile(r"replenished in (?:(\d{1,4})\.)?(\d{1,2}):(\d\d):(\d\d)")


class Sentence(NamedTuple):
    """What a sentence told: limits in its order, and the seconds to wait; None is not told."""

    limits: tuple[QuotaLimit, ...] = ()
    retry_after_s: float | None = None


def read_sentence(text: str, now: float) -> Sentence:
    """
    Read the numbers of *text*; *now* is when it came.

    ``tokens per min (TPM): Limit 30000, Used 29000`` (OpenAI, Groq) and ``Tokens per Minute (actual/limit):
    65605/16000`` (xAI) become ``tokens_minute``; ``try again in 9m38.016s``, ``retry after 6 seconds`` (Azure) and
    ``replenished in 01:02:03`` (Azure API Management) the wait.
    """
    text = text[:MAX_SENTENCE]
    wait = _wait_s(text)
    limits = []
    for match in (*_USED.finditer(text), *_ACTUAL.finditer(text)):
        limit, used = parse_count(match["limit"]), parse_count(match["used"] or "")
        window = match["window"].lower()
        limits.append(
            QuotaLimit(
                resource=f"{match['kind'].lower()}_{_WINDOWS.get(window, window)}",
                limit=limit,
                remaining=None if limit is None or used is None else max(0, limit - used),
                reset_at=None if wait is None else now + wait,
            )
        )
    return Sentence(tuple(limits), wait)


def _wait_s(text: str) -> float | None:
    if match := _AGAIN.search(text):
        wait = match["wait"].rstrip(".")
        return parse_duration_s(wait + "s" if match["unit"] else wait)
    if match := _REPLENISHED.search(text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return min(float(((days * 24 + hours) * 60 + minutes) * 60 + seconds), MAX_WAIT_S)
    return None
