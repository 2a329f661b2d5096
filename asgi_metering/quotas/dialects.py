"""
Which provider's header names a response speaks, and how to read them.

Knows the order of the dialects and the names that a gateway must not pass on. Never knows a clock, a network or
a store: `read_quota` is a pure function of headers and two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asgi_metering.quotas import anthropic, ietf, openai
from asgi_metering.quotas.reading import QuotaLimit, Reading
from asgi_metering.quotas.values import decode_value, parse_milliseconds, parse_wait_s

__all__ = ["DIALECTS", "UNKNOWN", "Dialect", "DialectRegistry", "is_quota_header", "read_quota"]

UNKNOWN = "unknown"
"""Name of the dialect that only said ``retry-after``, and of a provider that nobody named (S1.5)."""

_MAX_HEADERS = 256  # Recognised lines of one response that are read; the richest known has two dozen.

_RETRY_AFTER = b"retry-after"
_RETRY_AFTER_MS = b"retry-after-ms"

_GATEWAY_PRIVATE = (b"llm_provider-", b"x-litellm-key-", b"x-litellm-response-cost", b"x-ai-ratelimit-")
"""What LiteLLM and APISIX put on a response about the account behind them; nothing of it is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """
    One way of naming quota headers.

    Attributes:
        name: As it appears in `Reading.dialect`.
        marks: Beginnings of names, lower-case, by any of which it is recognised; `read` gets the lines whose
            names begin with a mark of any dialect.
        read: Called with (lines with lower-case names, now); returns limits and never raises.
        private: Beginnings of names, lower-case, that describe the account and must not reach a client.
    """

    name: str
    marks: tuple[bytes, ...]
    read: Callable[[Iterable[tuple[bytes, bytes]], float], tuple[QuotaLimit, ...]]
    private: tuple[bytes, ...] = ()


class DialectRegistry:
    """
    Dialects in the order in which they are tried: the first whose mark appears reads the response (S1.34).

    Args:
        dialects: To put your own first: ``DialectRegistry(mine, *DIALECTS.dialects)``.
    """

    __slots__ = ("_begins", "_initials", "_private", "_private_initials", "dialects")

    def __init__(self, *dialects: Dialect) -> None:
        self.dialects = dialects
        self._begins = (_RETRY_AFTER, *dict.fromkeys(mark for dialect in dialects for mark in dialect.marks))
        self._private = (*_GATEWAY_PRIVATE, *dict.fromkeys(name for dialect in dialects for name in dialect.private))
        # Most names are dismissed by their first letter, before the rest of them is looked at (S1.47).
        self._initials = _initials(self._begins)
        self._private_initials = _initials(self._private)

    def read(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        provider: str | None,
        status: int | None,
        now: float,
        started_at: float | None = None,
    ) -> Reading | None:
        """
        Read what a response says about the provider's limits on us.

        Args:
            headers: Pairs of name and value as they came, any case, duplicates allowed; walked once.
            provider: The name to keep the reading under; `None` becomes ``"unknown"``.
            status: HTTP status of the response, if known.
            now: Epoch seconds at which the headers came: relative waits and resets count from here.
            started_at: Epoch seconds at which the request was started, by which readings are ordered; `None`
                means *now*. Do not pass it as *now*: a reset of "6s" after a call of 30 s would lie in the past.

        Returns:
            The reading, or `None` when no header is known or none is readable. Nothing but the understood values
            is kept (S1.50).

        Raises:
            Nothing: a garbled value is unknown and costs no other (S1.39).

        Source: S1.34 to S1.40; the providers' rate-limit guides.
        """
        lines = self._recognise(headers)
        if not lines:
            return None
        dialect = next((dialect for dialect in self.dialects if _speaks(dialect, lines)), None)
        limits = dialect.read(lines, now) if dialect else ()
        retry_after_s = _retry_after_s(lines, now)
        if not limits and retry_after_s is None:
            return None
        observed_at = now if started_at is None else started_at
        return Reading(
            provider=provider or UNKNOWN,
            dialect=dialect.name if dialect else UNKNOWN,
            observed_at=observed_at,
            status=status,
            limits=limits,
            retry_after_s=retry_after_s,
            received_at=now,
            limits_observed_at=observed_at if limits else None,
        )

    def is_quota_header(self, name: bytes) -> bool:
        """
        Whether a gateway must take this response header off before its own client sees it.

        True for the limits, quotas and organisation ids of every dialect: they describe the operator's account, and
        would be taken for the gateway's own. False for ``retry-after``, which a passed-through 429 needs, and for
        ``RateLimit`` and ``RateLimit-Policy``, which a metered route sends itself. Any case of *name* is taken.
        """
        return name[:1] in self._private_initials and name.lower().startswith(self._private)

    def _recognise(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        initials, begins = self._initials, self._begins
        lines = []
        for name, value in headers:
            if name[:1] in initials:
                lower = name.lower()
                if lower.startswith(begins):
                    lines.append((lower, value))
        return lines[:_MAX_HEADERS]


def _initials(names: Iterable[bytes]) -> frozenset[bytes]:
    return frozenset(letter for name in names for letter in (name[:1].lower(), name[:1].upper()))


def _speaks(dialect: Dialect, lines: list[tuple[bytes, bytes]]) -> bool:
    return any(name.startswith(dialect.marks) for name, _ in lines)


def _retry_after_s(lines: list[tuple[bytes, bytes]], now: float) -> float | None:
    """Milliseconds first, because they are the finer of two that are sent together (so do the SDKs)."""
    for name, value in lines:
        if name == _RETRY_AFTER_MS and (wait := parse_milliseconds(decode_value(value))) is not None:
            return wait
    for name, value in lines:
        if name == _RETRY_AFTER and (wait := parse_wait_s(decode_value(value), now)) is not None:
            return wait
    return None


DIALECTS = DialectRegistry(
    Dialect(name="anthropic", marks=anthropic.MARKS, read=anthropic.read_limits, private=anthropic.PRIVATE),
    # Google tells its quotas in error bodies; if a front end adds x-ratelimit-* names, they are read.
    Dialect(name="google", marks=(b"x-goog-",), read=openai.read_limits),
    Dialect(name="openrouter", marks=(b"openrouter-provider", b"x-openrouter-provider"), read=openai.read_limits),
    Dialect(name="openai", marks=openai.MARKS, read=openai.read_limits, private=openai.PRIVATE),
    Dialect(name="ietf", marks=ietf.MARKS, read=ietf.read_limits, private=ietf.PRIVATE),
)
"""The dialects that come with the package, in the order of S1.34, then the IETF fields."""

read_quota = DIALECTS.read
"""`DialectRegistry.read` with the dialects of the package."""

is_quota_header = DIALECTS.is_quota_header
"""`DialectRegistry.is_quota_header` with the dialects of the package."""
