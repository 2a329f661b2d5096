"""
What one upstream response said about the provider's limits on us.

Knows the shape of a reading and nothing about where it came from. Never holds a raw header, an organisation's
id, a cookie or a credential (S1.50, X.9).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, TypeVar

from asgi_metering.names import is_name
from asgi_metering.quotas.values import (
    decode_value,
    parse_count,
    parse_fraction,
    parse_reset_at,
    parse_state,
)
from asgi_metering.quotas.verdicts import Verdict

__all__ = ["MAX_LIMITS", "MAX_NAMES", "LimitTable", "QuotaLimit", "Reading", "model_series"]

MAX_LIMITS = 32
"""Limits in one reading: the richest known response names twelve; a response cannot make a reading grow past this."""


MAX_NAMES = 512
"""Header names of a family that are remembered as they were read: all families together have fewer."""


def model_series(name: object) -> str | None:
    """
    By what name the readings of one model are kept: without what stands before a slash, in small letters.

    ``models/gemini-2.5-flash`` and ``gemini/Gemini-2.5-Flash`` are one. None for what is no name.
    """
    if not isinstance(name, str):
        return None
    bare = name.rpartition("/")[2].lower()
    return bare if is_name(bare) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaLimit:
    """
    One limit that a provider puts on us. `None` is unknown, never zero.

    Attributes:
        resource: What is limited, in lower case: ``"requests"``, ``"tokens"``, ``"input_tokens"``,
            ``"unified_5h"``, ``"tokens_minute"``. At most 64 characters of ``[a-z0-9_.]``.
        limit: Whole units per window.
        remaining: Whole units left in the window.
        reset_at: Epoch seconds at which units return; may lie in the past.
        utilization: Spent share, 1 is all of it (Anthropic's unified limits give no counts).
        state: The provider's own word, such as ``"allowed"`` or ``"rejected"``.
    """

    resource: str
    limit: int | None = None
    remaining: int | None = None
    reset_at: float | None = None
    utilization: Decimal | None = None
    state: str | None = None

    @property
    def useful(self) -> bool:
        """Whether it tells how much is left or allowed (S1.40)."""
        return self.limit is not None or self.remaining is not None or self.utilization is not None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; *utilization* as a decimal string, so that it comes back exactly."""
        return {
            "resource": self.resource,
            "limit": self.limit,
            "remaining": self.remaining,
            "reset_at": self.reset_at,
            "utilization": None if self.utilization is None else str(self.utilization),
            "state": self.state,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> QuotaLimit:
        """Rebuild a limit from `to_dict`. Raises `ValueError`, `TypeError` or `KeyError` on what it never returned."""
        share = stored["utilization"]
        return cls(
            resource=str(stored["resource"]),
            limit=_known(int, stored["limit"]),
            remaining=_known(int, stored["remaining"]),
            reset_at=_known(float, stored["reset_at"]),
            utilization=None if share is None else Decimal(share),
            state=_known(str, stored["state"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """
    One captured state of a provider's quotas.

    Attributes:
        provider: The name it is kept under.
        dialect: Whose header names were understood: ``"openai"``, ``"anthropic"``, ... or ``"unknown"``.
        observed_at: Epoch seconds at which the **request** was started that got this answer. A provider counts
            when a request comes in and answers may overtake each other, so a reading with an older
            *observed_at* never replaces a newer one (S1.45).
        status: HTTP status of that answer, `None` if not told.
        limits: What was said, in the order it was said.
        retry_after_s: Seconds to wait, counted from *received_at*.
        received_at: Epoch seconds at which the answer's headers came; relative values count from here. `None`
            means *observed_at*.
        limits_observed_at: *observed_at* of the answer that *limits* came with. It is older than *observed_at*
            when a later answer told no limits (see `QuotaReadings`); `None` when there are no limits.
        verdict: Why that answer refused the call; `None` where it did not, or for reasons of another kind.
        model: The one model that all of it is of, as `model_series` names it; `None`: of the provider's key as a whole,
            as far as it told.
    """

    provider: str
    dialect: str
    observed_at: float
    status: int | None = None
    limits: tuple[QuotaLimit, ...] = ()
    retry_after_s: float | None = None
    received_at: float | None = None
    limits_observed_at: float | None = None
    verdict: Verdict | None = None
    model: str | None = None

    @property
    def useful(self) -> bool:
        """Whether it may update a package: at least one limit tells a count or a share (S1.40)."""
        return any(limit.useful for limit in self.limits)

    @property
    def retry_at(self) -> float | None:
        """Epoch seconds before which the provider asked not to come back, or `None`."""
        if self.retry_after_s is None:
            return None
        return (self.observed_at if self.received_at is None else self.received_at) + self.retry_after_s

    def limit(self, resource: str) -> QuotaLimit | None:
        """Return the limit on *resource*, or `None` if the provider told none."""
        return next((limit for limit in self.limits if limit.resource == resource), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the attributes, ``useful``, ``retry_at``, and *limits* as a list of dicts."""
        return {
            "provider": self.provider,
            "model": self.model,
            "dialect": self.dialect,
            "observed_at": self.observed_at,
            "received_at": self.received_at,
            "limits_observed_at": self.limits_observed_at,
            "status": self.status,
            "verdict": self.verdict,
            "useful": self.useful,
            "retry_after_s": self.retry_after_s,
            "retry_at": self.retry_at,
            "limits": [limit.to_dict() for limit in self.limits],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Reading:
        """Rebuild a reading from `to_dict`; `ValueError`, `TypeError` or `KeyError` on what that never returned."""
        return cls(
            provider=str(stored["provider"]),
            dialect=str(stored["dialect"]),
            observed_at=float(stored["observed_at"]),
            status=_known(int, stored["status"]),
            limits=tuple(QuotaLimit.from_dict(each) for each in stored["limits"][:MAX_LIMITS]),
            retry_after_s=_known(float, stored["retry_after_s"]),
            received_at=_known(float, stored["received_at"]),
            limits_observed_at=_known(float, stored["limits_observed_at"]),
            verdict=_known(Verdict, stored["verdict"]),
            model=_known(str, stored["model"]),
        )


_Value = TypeVar("_Value")


def _known(kind: Callable[[Any], _Value], value: Any) -> _Value | None:
    return None if value is None else kind(value)


class LimitTable:
    """
    Gathers the fields of limits while a dialect walks over headers.

    The first readable value of a field stays, so a garbled or repeated line costs nothing else (S1.39), and a
    dialect expresses "fall back to" by putting the fallback later (S1.35: a readable ``0`` stays).
    """

    __slots__ = ("_now", "_rows")

    def __init__(self, now: float) -> None:
        self._now = now
        self._rows: dict[str, dict[str, Any]] = {}

    def put(self, resource: str, field: str, value: bytes) -> None:
        """
        Read *value* as *field* of *resource*.

        Args:
            resource: Its normal form; a resource above `MAX_LIMITS` is dropped.
            field: ``"limit"``, ``"remaining"``, ``"reset"``, ``"utilization"`` or ``"status"``.
            value: The header's value as it came. A limit may be followed by policies, as in ``10, 10;w=1, 50;w=60``.

        Source: draft-ietf-httpapi-ratelimit-headers-05 section 3.1; Envoy's ``x-ratelimit-limit``.
        """
        if field == "limit" and b";" in value:
            # A list, whose first item is the limit that is nearest, and whose others are the policies with parameters.
            value = value.partition(b";")[0].partition(b",")[0]
        text = decode_value(value)
        if field == "reset":
            self._keep(resource, "reset_at", parse_reset_at(text, self._now))
        elif field == "utilization":
            self._keep(resource, "utilization", parse_fraction(text))
        elif field == "status":
            self._keep(resource, "state", parse_state(text))
        else:
            self._keep(resource, field, parse_count(text))

    def put_all(self, rows: Iterable[tuple[str, str, bytes]]) -> None:
        """`put` each (resource, field, value)."""
        for row in rows:
            self.put(*row)

    def _keep(self, resource: str, field: str, value: object) -> None:
        if value is None or (resource not in self._rows and len(self._rows) >= MAX_LIMITS):
            return
        self._rows.setdefault(resource, {}).setdefault(field, value)

    def limits(self) -> tuple[QuotaLimit, ...]:
        """Return what was gathered; a resource without one readable field does not appear."""
        return tuple(QuotaLimit(resource=resource, **fields) for resource, fields in self._rows.items())
