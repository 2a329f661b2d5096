"""
What an account may still use, and how the two providers write that into header fields.

Knows token buckets that refill continuously, as both providers document theirs. Has no clock of its own.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Account", "Bucket", "Shortage", "anthropic_fields", "go_duration", "openai_fields", "rfc3339"]

WINDOW_MS = 60_000
"""Both providers state their limits per minute."""


class Bucket:
    """
    A limit that refills continuously, in exact arithmetic: who waits as long as told is admitted.

    Args:
        limit: Units per `WINDOW_MS`, and the most that it holds; it begins full.
        now: Seconds of the epoch.
    """

    def __init__(self, limit: int, now: float) -> None:
        self.limit = limit
        self._at_ms = round(now * 1000)
        # In parts, WINDOW_MS of which are one unit: each millisecond brings as many back as the limit has units.
        self._parts = limit * WINDOW_MS

    def refill(self, now: float) -> None:
        """Add what came back since it was last looked at; a clock that steps back adds nothing."""
        now_ms = round(now * 1000)
        gained = max(0, now_ms - self._at_ms) * self.limit
        self._parts = min(self.limit * WINDOW_MS, self._parts + gained)
        self._at_ms = max(self._at_ms, now_ms)

    def take(self, amount: int) -> None:
        """Take *amount* units, which must fit."""
        self._parts -= amount * WINDOW_MS

    def wait_s(self, amount: int) -> float:
        """Return the seconds until *amount* fits: 0 if it does now, infinity if it never will."""
        if amount > self.limit:
            return math.inf
        return max(0, math.ceil((amount * WINDOW_MS - self._parts) / self.limit)) / 1000

    @property
    def remaining(self) -> int:
        """Whole units that are left."""
        return self._parts // WINDOW_MS

    @property
    def full_in_s(self) -> float:
        """Seconds until it is full again."""
        return self.wait_s(self.limit)

    @property
    def at(self) -> float:
        """The moment of the last refill, in seconds of the epoch."""
        return self._at_ms / 1000


class Shortage(NamedTuple):
    """Why a request does not fit: the limit's name, its bucket, what was asked, and the seconds until it fits."""

    family: str
    bucket: Bucket
    asked: int
    wait_s: float


class Account:
    """The limits of one account, taken from together or not at all."""

    def __init__(self, limits: Mapping[str, int], now: float) -> None:
        self.buckets = {family: Bucket(limit, now) for family, limit in limits.items()}

    def refill(self, now: float) -> None:
        """Bring every limit up to *now*."""
        for bucket in self.buckets.values():
            bucket.refill(now)

    def take(self, amounts: Mapping[str, int]) -> Shortage | None:
        """Take *amounts* by limit, or return the limit that has to be waited for longest and take nothing."""
        short = [
            Shortage(family, self.buckets[family], amount, wait)
            for family, amount in amounts.items()
            if (wait := self.buckets[family].wait_s(amount)) > 0
        ]
        if short:
            return max(short, key=lambda shortage: shortage.wait_s)
        for family, amount in amounts.items():
            self.buckets[family].take(amount)
        return None


def openai_fields(account: Account) -> dict[str, str]:
    """Return the ``x-ratelimit-*`` fields of ``requests`` and ``tokens``; resets are Go durations."""
    fields = {}
    for family, bucket in account.buckets.items():
        fields[f"x-ratelimit-limit-{family}"] = str(bucket.limit)
        fields[f"x-ratelimit-remaining-{family}"] = str(bucket.remaining)
        fields[f"x-ratelimit-reset-{family}"] = go_duration(bucket.full_in_s)
    return fields


def anthropic_fields(account: Account) -> dict[str, str]:
    """
    Return the ``anthropic-ratelimit-*`` fields of ``requests``, ``input-tokens``, ``output-tokens``, ``tokens``.

    Remaining tokens are rounded to the nearest thousand, and ``tokens`` is the two kinds together, as documented.
    """
    rows = {
        family: (bucket.limit, bucket.remaining, bucket.at + bucket.full_in_s)
        for family, bucket in account.buckets.items()
    }
    into, out = rows["input-tokens"], rows["output-tokens"]
    rows["tokens"] = (into[0] + out[0], into[1] + out[1], max(into[2], out[2]))
    fields = {}
    for family, (limit, remaining, reset) in rows.items():
        left = remaining if family == "requests" else round(remaining, -3)
        fields[f"anthropic-ratelimit-{family}-limit"] = str(limit)
        fields[f"anthropic-ratelimit-{family}-remaining"] = str(left)
        fields[f"anthropic-ratelimit-{family}-reset"] = rfc3339(reset)
    return fields


def go_duration(seconds: float) -> str:
    """Write *seconds* as Go's ``time.Duration`` does, in whole milliseconds: ``20ms``, ``7.66s``, ``6m0s``."""
    milliseconds = round(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if hours:
        return f"{hours}h{minutes}m{whole}"
    return f"{minutes}m{whole}" if minutes else whole


def rfc3339(epoch_s: float) -> str:
    """Write a moment as Anthropic does: UTC, whole seconds, rounded up so that it is never too early."""
    return datetime.fromtimestamp(math.ceil(epoch_s), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
