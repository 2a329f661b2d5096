"""
Which provider's header names a response speaks, and how to read them.

Knows the order of the dialects and the names that a gateway must not pass on. Never knows a clock, a network or
a store: `read_quota` is a pure function of headers and two moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from asgi_metering.quotas import anthropic, gateways, ietf, openai
from asgi_metering.quotas.bodies import Told, read_body
from asgi_metering.quotas.reading import MAX_LIMITS, QuotaLimit, Reading
from asgi_metering.quotas.values import decode_value, parse_milliseconds, parse_wait_s
from asgi_metering.quotas.verdicts import verdict_of

__all__ = ["DIALECTS", "UNKNOWN", "Dialect", "DialectRegistry", "is_quota_header", "read_quota"]

UNKNOWN = "unknown"
"""Name of the dialect that only said ``retry-after``, and of a provider that nobody named (S1.5)."""

_MAX_HEADERS = 256  # Recognised lines of one response that are read; the richest known has two dozen.

_RETRY_AFTER = b"retry-after"
_RETRY_AFTER_MS = b"retry-after-ms"
_ERROR_TYPE = b"x-amzn-errortype"  # Bedrock's word for what went wrong.
_REFUSED_FROM = 400

_GATEWAY_PRIVATE = (b"llm_provider-", b"x-litellm-key-", b"x-litellm-response-cost", b"x-ai-ratelimit-")
"""What LiteLLM and APISIX put on a response about the account behind them."""


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

    Attributes:
        private_initials: What every name of `is_quota_header` begins with, in either case.
    """

    __slots__ = ("_begins", "_initials", "_private", "dialects", "private_initials")

    def __init__(self, *dialects: Dialect) -> None:
        self.dialects = dialects
        self._begins = (
            _RETRY_AFTER,
            _ERROR_TYPE,
            *dict.fromkeys(mark for dialect in dialects for mark in dialect.marks),
        )
        self._private = (*_GATEWAY_PRIVATE, *dict.fromkeys(name for dialect in dialects for name in dialect.private))
        # Most names are dismissed by their first letter, before the rest of them is looked at (S1.47).
        self._initials = _initials(self._begins)
        self.private_initials = _initials(self._private)

    def read(
        self,
        headers: Iterable[tuple[bytes, bytes]],
        *,
        provider: str | None,
        status: int | None,
        now: float,
        started_at: float | None = None,
        body: bytes | None = None,
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
            body: Of a refused call, without content codings: its verdict, and what no header said. `None` where it is
                not known, or the call was not refused.

        Returns:
            The reading, or `None` when no header is known or none is readable, and no body says more. Nothing but the
            understood values is kept (S1.50).

        Raises:
            Nothing: a garbled value is unknown and costs no other (S1.39).

        Source: S1.34 to S1.40; the providers' rate-limit guides.
        """
        lines = self._recognise(headers)
        is_refused = status is not None and status >= _REFUSED_FROM
        if not (lines or (is_refused and body is not None)):
            return None
        told = _told(status, lines, body, now) if is_refused else _NOTHING
        if told.headers:
            # After the answer's own, so that these win; what both say is the same.
            lines += self._recognise(told.headers)
        dialect = next((dialect for dialect in self.dialects if _speaks(dialect, lines)), None)
        if told.model is None:
            limits = _joined(dialect.read(lines, now) if dialect else (), told.limits)
            retry_after_s = _retry_after_s(lines, now)
        else:
            # Headers name no model, and were read when they came.
            limits, retry_after_s = told.limits, None
        if retry_after_s is None:
            retry_after_s = told.retry_after_s
        if not limits and retry_after_s is None and (body is None or told.verdict is None):
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
            verdict=told.verdict,
            model=told.model,
        )

    def is_quota_header(self, name: bytes) -> bool:
        """
        Whether a gateway must take this response header off before its own client sees it.

        True for the limits, quotas and organisation ids of every dialect: they describe the operator's account, and
        would be taken for the gateway's own. False for ``retry-after``, which a passed-through 429 needs, and for
        ``RateLimit`` and ``RateLimit-Policy``, which a metered route sends itself. Any case of *name* is taken.
        """
        return name[:1] in self.private_initials and name.lower().startswith(self._private)

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
    marks = dialect.marks
    for name, _ in lines:  # noqa: SIM110 -- a generator takes three times as long, for every dialect of every answer
        if name.startswith(marks):
            return True
    return False


_NOTHING = Told(None)


def _told(status: int | None, lines: list[tuple[bytes, bytes]], body: bytes | None, now: float) -> Told:
    """What a refused call says beside its limits."""
    error_type = next((decode_value(value) for name, value in lines if name == _ERROR_TYPE), "")
    if body is not None:
        return read_body(status, body, now, error_type)
    return Told(verdict_of(status, (error_type.partition(":")[0],)))


def _joined(first: tuple[QuotaLimit, ...], more: tuple[QuotaLimit, ...]) -> tuple[QuotaLimit, ...]:
    """Both, each resource once: a header is finer than a sentence, and what names no window is mostly per minute."""
    known = {limit.resource for limit in first}
    new = (limit for limit in more if not known & {limit.resource, limit.resource.removesuffix("_minute")})
    return (*first, *new)[:MAX_LIMITS]


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
    # Before the fields of the IETF, which Mistral's older names begin like and stand beside.
    Dialect(name="mistral", marks=gateways.MISTRAL_MARKS, read=gateways.read_mistral),
    Dialect(name="ietf", marks=ietf.MARKS, read=ietf.read_limits, private=ietf.PRIVATE),
    Dialect(name="litellm", marks=gateways.LITELLM_MARKS, read=gateways.read_litellm),
    Dialect(name="apisix", marks=gateways.APISIX_MARKS, read=gateways.read_apisix),
)
"""The dialects that come with the package, in the order of S1.34, then the IETF fields and what gateways add."""

read_quota = DIALECTS.read
"""`DialectRegistry.read` with the dialects of the package."""

is_quota_header = DIALECTS.is_quota_header
"""`DialectRegistry.is_quota_header` with the dialects of the package."""
