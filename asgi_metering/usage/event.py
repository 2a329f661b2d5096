"""
The usage event: what one call consumed, who paid, and how it ended.

Knows its fields and their JSON-safe form, which outboxes keep and sinks send. Never knows a sink, and never holds a
credential, a header or a body: whoever fills `attributes` keeps it so.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from itertools import chain, repeat
from operator import attrgetter, itemgetter, or_
from types import MappingProxyType
from typing import Any, Final, TypeAlias

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import UsageError
from asgi_metering.usage.values import AXES, TokenUsage

__all__ = ["CALLS", "EVENT_VERSION", "MODELS", "AttributeValue", "UsageEvent", "ordinary_events"]

AttributeValue: TypeAlias = str | int | float | bool
"""What an attribute may hold: JSON and OpenTelemetry both know these."""

EVENT_VERSION: Final = 1
"""Version of the stored form. A later one may add fields; readers pass over those that they do not know."""

MODELS: Final = "metering.models"
"""JSON: ``[{"model", "provider", "calls", "usage": {...}, "cost_usd_micros"}]``, of calls that used several models."""

CALLS: Final = "metering.upstream.calls"
"""How many upstream calls there were, where one model answered several."""

_TRACE: Final = {"trace_id": 32, "span_id": 16, "trace_flags": 2}
"""Hex digits of each identifier (W3C Trace Context, 3.2.2)."""

_HEX: Final = {name: re.compile(f"[0-9a-f]{{{digits}}}").fullmatch for name, digits in _TRACE.items()}
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
        caller_type: The `Caller`'s type, if it has one; see `billable(callers=)`.
        unit: Name of the unit of `amount` and `held`.
        amount: Charged, in the unit's smallest parts; negative for a correction downwards.
        held: Set aside at admission, in smallest parts.
        outcome: How the call ended: completed, client_gone, error, ...
        basis: What the amount was taken from: usage, observed, estimate, hold, none, ...
        usage: Tokens, as far as anything reported them.
        usage_source: Who reported them: handler, upstream, litellm, telemetry, body, tokenizer.
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
        if not _are_ordinary(_columns([_OWN_VALUES(self)])):
            self._check_each()
        object.__setattr__(self, "attributes", MappingProxyType(dict(self.attributes)))

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
            self._check(name, _is_hex(name, getattr(self, name)), f"{digits} lower-case hex digits or None")
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
        events = ordinary_events((stored,)) if cls is UsageEvent else None
        if events is not None:
            return events[0]
        known = {name: stored[name] for name in _FIELDS if name in stored}
        if not known.keys() >= _REQUIRED:
            missing = [name for name in _FIELDS if name in _REQUIRED and name not in known]
            raise UsageError(f"The stored event lacks {', '.join(missing)}. It was not written by to_dict().")
        known["usage"] = _usage(known.get("usage"))
        return cls(**known)


_FIELDS: Final = tuple(one.name for one in fields(UsageEvent))
_REQUIRED: Final = frozenset({*_REQUIRED_TEXT, "amount", "started_at", "ended_at"})
_TEXT: Final = frozenset({str, type(None)})
_PLAIN: Final = frozenset({str, int, bool, float})
_NAMES: Final = frozenset({str})
_DICTS: Final = frozenset({dict})

_NO_ATTRIBUTES: Final[Mapping[str, AttributeValue]] = MappingProxyType({})
_ABSENT: Final[dict[str, Any]] = {
    one.name: None if one.default is MISSING else one.default for one in fields(UsageEvent)
}
"""What each field is where it was not stored: nothing that is needed may be None."""
_ABSENT["attributes"] = {}

_OWN_VALUES: Final[Callable[[UsageEvent], tuple[Any, ...]]] = attrgetter(*_FIELDS)
_STORED_VALUES: Final[Callable[[Mapping[str, Any]], tuple[Any, ...]]] = itemgetter(*_FIELDS)
_PUT: Final = tuple(getattr(UsageEvent, name).__set__ for name in _FIELDS)
_OTHER_TYPES: Final = {
    **dict.fromkeys(_REQUIRED_TEXT, frozenset({str})),
    **dict.fromkeys(("amount", "held"), frozenset({int})),
    **dict.fromkeys(("started_at", "ended_at"), frozenset({float})),
    "usage": frozenset({TokenUsage, type(None)}),
    "estimated": frozenset({bool}),
    "status": frozenset({int, type(None)}),
    "attributes": _DICTS,
}
_TYPES: Final = tuple(_OTHER_TYPES.get(name, _TEXT) for name in _FIELDS)
"""What each field may be, in the order of `_FIELDS`; most are text or None."""

_Columns: TypeAlias = dict[str, Iterable[Any]]
"""The fields of one or more events: the values of all of them by name, in the order of `_FIELDS`."""


def _columns(rows: Iterable[tuple[Any, ...]]) -> _Columns:
    return dict(zip(_FIELDS, zip(*rows, strict=True), strict=True))


def _are_ordinary(told: _Columns) -> bool:
    """
    Whether each field is exactly of its type and within its bounds, and none takes a closer look.

    Nearly all are. Column by column, C says so of any number of events without a step of the interpreter for each.
    """
    if not all(map(frozenset.issuperset, _TYPES, map(map, repeat(type), told.values()))):
        return False
    parts = (*told["amount"], *told["held"])
    if min(parts) < -MAX_AMOUNT or max(parts) > MAX_AMOUNT:
        return False
    if not (all(map(math.isfinite, told["started_at"])) and all(map(math.isfinite, told["ended_at"]))):
        return False
    if not all(all(map(is_hex, {*told[name]} - {None})) for name, is_hex in _HEX.items()):
        return False
    return _are_plain(told["attributes"])


def _are_plain(attributes: Iterable[dict[Any, Any]]) -> bool:
    """Whether all of them are names with what an event may carry."""
    values = list(chain.from_iterable(map(dict.values, attributes)))
    types = set(map(type, values))
    if float in types and not all(map(math.isfinite, (value for value in values if type(value) is float))):
        return False
    return _PLAIN.issuperset(types) and _NAMES.issuperset(map(type, chain.from_iterable(attributes)))


def ordinary_events(stored: Sequence[Mapping[str, Any]]) -> list[UsageEvent] | None:
    """
    The events that were stored, at least one, if each field of each is exactly of its type; every delivery reads many.

    Of others `UsageEvent.from_dict` says one by one whether they can be read, and why not.

    Raises:
        UsageError: As `UsageEvent.from_dict`, of the tokens of one of them.
    """
    if not _DICTS.issuperset(map(type, stored)):
        return None
    # One is filled up while it is read, and gone with the next: all of them at once would not fit a processor's cache.
    told = _columns(map(_STORED_VALUES, map(or_, repeat(_ABSENT), stored)))
    if any(told["usage"]):
        told["usage"] = tuple(map(_usage, told["usage"]))
    if not _are_ordinary(told):
        return None
    # A copy for each, which nobody else may change, and one for all events without any.
    some = any(told["attributes"])
    told["attributes"] = map(MappingProxyType, map(dict, told["attributes"])) if some else repeat(_NO_ATTRIBUTES)
    # By their slots, and a field of all of them at a time: a frozen class sets each by a call of its own.
    events = list(map(object.__new__, repeat(UsageEvent, len(stored))))
    for put, values in zip(_PUT, told.values(), strict=True):
        deque(map(put, events, values), 0)
    return events


def _usage(stored: Any) -> Any:
    """Tokens by their axes; what is no mapping is told apart by whoever checks."""
    if stored is None or not isinstance(stored, Mapping):
        return stored
    return TokenUsage(**{axis: stored.get(axis) for axis in AXES})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_amount(value: object) -> bool:
    return type(value) is int and abs(value) <= MAX_AMOUNT


def _is_hex(name: str, value: object) -> bool:
    return value is None or (isinstance(value, str) and _HEX[name](value) is not None)
