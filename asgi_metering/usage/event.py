"""
The usage event: what one call consumed, who paid, and how it ended.

Knows its fields and their JSON-safe form, which outboxes keep and sinks send. Never knows a sink, and never holds a
credential, a header or a body: whoever fills `attributes` keeps it so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import UsageError
from asgi_metering.usage.values import AXES, TokenUsage

__all__ = ["EVENT_VERSION", "AttributeValue", "UsageEvent"]

AttributeValue: TypeAlias = str | int | float | bool
"""What an attribute may hold: JSON and OpenTelemetry both know these."""

EVENT_VERSION: Final = 1
"""Version of the stored form. A later one may add fields; readers pass over those that they do not know."""

_TRACE: Final = {"trace_id": 32, "span_id": 16, "trace_flags": 2}
"""Hex digits of each identifier (W3C Trace Context, 3.2.2)."""

_HEX: Final = re.compile(r"[0-9a-f]+")
_REQUIRED_TEXT: Final = ("id", "line", "payer", "unit", "outcome", "basis")
_OPTIONAL_TEXT: Final = (
    "caller",
    "caller_type",
    "usage_source",
    "model",
    "provider",
    "reason",
    "request_id",
    "session_id",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """
    One metered call, ended. One event per call, whatever it did upstream (S2.2).

    Args:
        id: The call's id, stable over retries of the delivery: sinks drop repeats by it.
        line: The billing line.
        payer: Whose balance it was; never a metric attribute.
        caller: Who authenticated, if anybody did.
        caller_type: The caller's type, for lines that name `callers=`.
        unit: Name of the unit of `amount` and `held`.
        amount: Charged, in the unit's smallest parts; negative for a correction downwards.
        held: Set aside at admission, in smallest parts.
        outcome: How the call ended: completed, client_gone, error, ...
        basis: What the amount was taken from: usage, observed, estimate, hold, none, ...
        usage: Tokens, as far as anything reported them.
        usage_source: Who reported them: handler, upstream, telemetry, body, tokenizer.
        model: The model that answered.
        provider: Whose model it was.
        estimated: The amount rests on an estimate.
        reason: Why it ended or was refused, in a word.
        status: HTTP status of the answer.
        trace_id: 32 lower-case hex digits of the trace that the call ran in.
        span_id: 16 of them, of its span.
        trace_flags: 2 of them.
        started_at: Seconds since the epoch.
        ended_at: Seconds since the epoch.
        request_id: The application's own id of the request.
        session_id: The application's own id of the session.
        attributes: More facts by name: str, int, float or bool, read-only here.

    Raises:
        UsageError: A field has another type, a number is not finite or not a usable amount, an identifier is not hex.
    """

    id: str
    line: str
    payer: str
    unit: str
    amount: int
    outcome: str
    basis: str
    started_at: float
    ended_at: float
    held: int = 0
    caller: str | None = None
    caller_type: str | None = None
    usage: TokenUsage | None = None
    usage_source: str | None = None
    model: str | None = None
    provider: str | None = None
    estimated: bool = False
    reason: str | None = None
    status: int | None = None
    trace_id: str | None = None
    span_id: str | None = None
    trace_flags: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self._is_ordinary():
            self._check_each()
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))

    def _is_ordinary(self) -> bool:
        """Whether every field is exactly of its type: most are, and to ask so costs a tenth of finding out why not."""
        return (
            type(self.id) is type(self.line) is type(self.payer) is type(self.unit) is str
            and type(self.outcome) is type(self.basis) is str
            and type(self.caller) in _TEXT
            and type(self.caller_type) in _TEXT
            and type(self.usage_source) in _TEXT
            and type(self.model) in _TEXT
            and type(self.provider) in _TEXT
            and type(self.reason) in _TEXT
            and type(self.request_id) in _TEXT
            and type(self.session_id) in _TEXT
            and type(self.amount) is type(self.held) is int
            and -MAX_AMOUNT <= self.amount <= MAX_AMOUNT
            and -MAX_AMOUNT <= self.held <= MAX_AMOUNT
            and type(self.started_at) is type(self.ended_at) is float
            and math.isfinite(self.started_at)
            and math.isfinite(self.ended_at)
            and (self.usage is None or type(self.usage) is TokenUsage)
            and type(self.estimated) is bool
            and (self.status is None or type(self.status) is int)
            and (self.trace_id is self.span_id is self.trace_flags is None or self._is_traced())
            and type(self.attributes) is dict
            and not self.attributes
        )

    def _is_traced(self) -> bool:
        return all(_is_hex(getattr(self, name), digits) for name, digits in _TRACE.items())

    def _check_each(self) -> None:
        for name in _REQUIRED_TEXT:
            self._check(name, isinstance(getattr(self, name), str), "a str")
        for name in _OPTIONAL_TEXT:
            self._check(name, isinstance(getattr(self, name), str | None), "a str or None")
        for name in ("amount", "held"):
            self._check(name, _is_amount(getattr(self, name)), f"an int of at most {MAX_AMOUNT} smallest parts")
        for name in ("started_at", "ended_at"):
            self._check(name, _is_number(getattr(self, name)), "a finite number of seconds")
        self._check("usage", isinstance(self.usage, TokenUsage | None), "a TokenUsage or None")
        self._check("estimated", isinstance(self.estimated, bool), "a bool")
        self._check("status", self.status is None or type(self.status) is int, "an int or None")
        for name, digits in _TRACE.items():
            self._check(name, _is_hex(getattr(self, name), digits), f"{digits} lower-case hex digits or None")
        self._check("attributes", isinstance(self.attributes, Mapping), "a mapping of names")
        for key, value in self.attributes.items():
            self._check("attributes", isinstance(key, str), "a mapping of names")
            plain = isinstance(value, str | bool) or _is_number(value)
            self._check("attributes", plain, "a mapping to str, bool or finite numbers")

    def _check(self, name: str, usable: bool, wanted: str) -> None:
        if not usable:
            # The value stays out of the message: an attribute may hold what nobody should read in a log.
            found = type(getattr(self, name)).__name__
            raise UsageError(f"The event's {name} (a {found}) is not usable. Pass {wanted}.")

    @property
    def duration_s(self) -> float:
        """Seconds from start to end; 0 where a clock stepped back."""
        return max(0.0, self.ended_at - self.started_at)

    def to_dict(self) -> dict[str, Any]:
        """Return the event as JSON-safe values, every field by its name, plus ``version``. `from_dict` reads it."""
        stored: dict[str, Any] = {"version": EVENT_VERSION}
        for name in _FIELDS:
            stored[name] = getattr(self, name)
        stored["attributes"] = dict(self.attributes)
        if self.usage is not None:
            stored["usage"] = {axis: getattr(self.usage, axis) for axis in AXES}
        return stored

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> UsageEvent:
        """
        Rebuild an event from `to_dict`, or from what a later version of it wrote: unknown fields are passed over.

        Raises:
            UsageError: A field that is needed is missing, or has a value that no event may hold.
        """
        event = _ordinary(stored) if cls is UsageEvent else None
        if event is not None:
            return event
        known = {name: stored[name] for name in _FIELDS if name in stored}
        if not known.keys() >= _REQUIRED:
            missing = [name for name in _FIELDS if name in _REQUIRED and name not in known]
            raise UsageError(f"The stored event lacks {', '.join(missing)}. It was not written by to_dict().")
        known["usage"] = _usage(known.get("usage"))
        return cls(**known)


_FIELDS: Final = tuple(one.name for one in fields(UsageEvent))
_REQUIRED: Final = frozenset({*_REQUIRED_TEXT, "amount", "started_at", "ended_at"})
_TEXT: Final = frozenset({str, type(None)})

_NONE_STORED: Final[dict[str, AttributeValue]] = {}
_NO_ATTRIBUTES: Final[Mapping[str, AttributeValue]] = MappingProxyType(_NONE_STORED)
_PUT: Final[Mapping[str, Callable[[UsageEvent, Any], None]]] = {
    name: getattr(UsageEvent, name).__set__ for name in _FIELDS
}
_put_usage, _put_attributes = _PUT["usage"], _PUT["attributes"]
_SLOTS: Final = tuple(
    (one.name, _PUT[one.name], None if one.default is MISSING else one.default)
    for one in fields(UsageEvent)
    if one.name not in ("usage", "attributes")
)
"""Where each field is kept, and what it is where it was not stored: nothing that is needed may be None."""


def _ordinary(stored: Mapping[str, Any]) -> UsageEvent | None:
    """
    The event that was stored, if each of its fields is exactly of its type; every delivery reads one.

    Put together by its slots: a frozen class sets each of its fields by a call that takes five times as long.
    """
    event = object.__new__(UsageEvent)
    value = stored.get
    for name, put, absent in _SLOTS:
        put(event, value(name, absent))
    _put_usage(event, _usage(value("usage")))
    _put_attributes(event, value("attributes", _NONE_STORED))
    if not event._is_ordinary():
        return None
    _put_attributes(event, _NO_ATTRIBUTES)
    return event


def _usage(stored: Any) -> Any:
    """Tokens by their axes; what is no mapping is told apart by whoever checks."""
    if stored is None or not isinstance(stored, Mapping):
        return stored
    return TokenUsage(**{axis: stored.get(axis) for axis in AXES})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: object) -> bool:
    return type(value) is int and abs(value) <= MAX_AMOUNT


def _is_hex(value: object, digits: int) -> bool:
    return value is None or (isinstance(value, str) and len(value) == digits and _HEX.fullmatch(value) is not None)
