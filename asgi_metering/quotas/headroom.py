"""
Headroom: whether what a provider said of its limits on us has room for one more call.

A pure judgement of one reading, of what is asked, and of what runs already and no reading shows yet. Never knows a
call, a clock or another process.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from asgi_metering.quotas.reading import QuotaLimit, Reading
from asgi_metering.quotas.verdicts import Verdict

__all__ = ["STALE_S", "Lack", "Need", "lack_of", "longest_of"]

STALE_S = 60.0
"""
How long a limit without a reset counts (Mistral, Fireworks): most are per minute. Then one call finds out how it is.
"""

_REJECTED = "rejected"
_UNIFIED = "unified"
_APART = ("priority_", "fast_", "unified_overage")
"""Limits of other tiers: an ordinary call passes by them, and none of them says that it would be refused."""


class Need(NamedTuple):
    """
    What calls take of a provider: *requests*, *input* and *output* tokens, and *tokens* of both.

    0 tokens is "not known": then only a limit with nothing left refuses.
    """

    requests: int = 1
    input: int = 0
    output: int = 0
    tokens: int = 0

    def plus(self, other: Need) -> Need:
        """Both together."""
        return Need(
            self.requests + other.requests,
            self.input + other.input,
            self.output + other.output,
            self.tokens + other.tokens,
        )


class Lack(NamedTuple):
    """
    Why there is no room.

    Attributes:
        resource: The limit, as the reading names it; ``"retry_after"`` where the provider asked us not to come back,
            ``"credit"`` where it said that somebody has to pay first.
        required: What the call takes of it, as far as it is counted.
        available: What is left of it, without what runs already.
        limit: Its size, if it was told.
        retry_after_s: Seconds until the provider's own reset; where it told none, until what it told counts no more.
        model: The one model that it is of; None is all of them.
    """

    resource: str
    required: int | None = None
    available: int | None = None
    limit: int | None = None
    retry_after_s: float = 0.0
    model: str | None = None


def lack_of(reading: Reading | None, need: Need, running: Need, now: float) -> Lack | None:
    """
    Return what is missing for a call that takes *need*, or None where there is room.

    Args:
        reading: The latest of that provider; None, nobody has asked yet, means room.
        need: Of the call.
        running: Of calls that were admitted and that *reading* does not show.
        now: Epoch seconds.

    A limit whose reset has passed has room. One that is smaller than the call itself has room when nothing of it is
    used: an estimate may be too high, and the provider knows better. Of several that lack, the one that is full for the
    longest is returned. ``unified`` (Anthropic's subscriptions) says itself whether its windows refuse; those of other
    tiers (``priority``, ``fast``, overage) never do.

    Source: reference/provider-quota-headers.md; DESIGN 4 "Admission" (upstream headroom).
    """
    if reading is None:
        return None
    lacks = []
    retry_at = reading.retry_at
    if retry_at is not None and retry_at > now and (reading.status is None or reading.status >= 400):
        lacks.append(Lack("retry_after", retry_after_s=retry_at - now))
    if reading.verdict is Verdict.OUT_OF_CREDIT and reading.observed_at + STALE_S > now:
        # Nobody knows when that ends, so one call finds out now and then.
        lacks.append(Lack("credit", retry_after_s=reading.observed_at + STALE_S - now))
    seen_at = reading.observed_at if reading.limits_observed_at is None else reading.limits_observed_at
    judges_itself = any(limit.resource == _UNIFIED and limit.state is not None for limit in reading.limits)
    for limit in reading.limits:
        until = seen_at + STALE_S if limit.reset_at is None else limit.reset_at
        if until <= now:
            continue
        if limit.resource.startswith(_APART) or (judges_itself and limit.resource.startswith(_UNIFIED + "_")):
            continue
        lack = _lack(limit, need, running)
        if lack is not None:
            lacks.append(lack._replace(retry_after_s=until - now))
    longest = longest_of(lacks)
    return longest if longest is None or reading.model is None else longest._replace(model=reading.model)


def longest_of(lacks: Iterable[Lack]) -> Lack | None:
    """The one after whose reset the same call could pass; the first of equal ones."""
    return max(lacks, key=_wait_s, default=None)


def _wait_s(lack: Lack) -> float:
    return lack.retry_after_s


def _lack(limit: QuotaLimit, need: Need, running: Need) -> Lack | None:
    """Whether one limit that counts now is full."""
    name = limit.resource
    if limit.state == _REJECTED and name.startswith(_UNIFIED):
        return Lack(name)
    if limit.remaining is None:
        spent = limit.utilization is not None and limit.utilization >= 1 and (limit.state in (None, _REJECTED))
        return Lack(name) if spent else None
    asked = max(1, _counted(name, need))
    if limit.limit is not None:
        asked = min(asked, max(1, limit.limit))
    left = max(0, limit.remaining - _counted(name, running))
    return None if asked <= left else Lack(name, asked, left, limit.limit)


def _counted(resource: str, need: Need) -> int:
    """What *need* is in terms of a resource, by its name."""
    if "token" not in resource:
        # Also by the policies of the IETF draft, which count requests unless they say otherwise.
        return need.requests
    if "input" in resource or "prompt" in resource:
        return need.input
    if "output" in resource or "generated" in resource:
        return need.output
    return need.tokens
