"""
Records: a usage event as the fields of an OpenTelemetry log record.

The one place that says which field of an event becomes which attribute (S2.3). Knows no provider and sends nothing.
A record names the payer and the caller, which a metric never does; it has no credential, because no event has one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from asgi_metering.amounts import Unit
from asgi_metering.events import conventions as names
from asgi_metering.events.conventions import GenAI
from asgi_metering.events.metrics import sendable
from asgi_metering.usage.event import UsageEvent

__all__ = ["KnownUnits", "Records", "Traces", "whole_units"]

_NS: Final = 1_000_000_000

_LATEST_S: Final = 9_000_000_000.0
"""In the year 2255; nanoseconds end on the wire in 2262."""

MAX_TEXT: Final = 1_024
"""Characters of an attribute value: room for any identifier, none for a prompt."""


def whole_units(parts: int, unit: Unit) -> int | float:
    """Convert smallest parts to whole units for eyes and dashboards: an int where the unit has no fraction."""
    return parts if unit.scale == 0 else parts / 10**unit.scale


class KnownUnits:
    """
    Units by their names.

    Args:
        units: May grow: a metering gets to know those of its routes one by one.
    """

    def __init__(self, units: Iterable[Unit]) -> None:
        self._units = units if isinstance(units, Collection) else tuple(units)
        self._by_name: dict[str, Unit] = {}

    def get(self, name: str) -> Unit | None:
        """The unit called *name*; None where nobody has named it yet."""
        if name not in self._by_name:
            self._by_name = {unit.name: unit for unit in tuple(self._units)}
        return self._by_name.get(name)


class Traces:
    """Rebuilds the trace of the call that an event tells of. Imports the OpenTelemetry API when constructed."""

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context

        self._trace = trace
        self._none = trace.set_span_in_context(trace.INVALID_SPAN, Context())

    def of(self, event: UsageEvent) -> Any:
        """The context of the call: its own is gone, and the worker's is another's (X.10)."""
        if event.trace_id is None or event.span_id is None:
            # Not an empty context, which would be taken for none, and replaced by whatever is current.
            return self._none
        span = self._trace.NonRecordingSpan(
            self._trace.SpanContext(
                int(event.trace_id, 16),
                int(event.span_id, 16),
                is_remote=True,
                trace_flags=self._trace.TraceFlags(int(event.trace_flags or "00", 16)),
            )
        )
        return self._trace.set_span_in_context(span, self._none)


class Records:
    """
    Turns events into the arguments of ``Logger.emit``.

    Args:
        generation: Which GenAI names tokens get.
        units: Units whose scale is known, so that amounts can also be told in whole units.

    Imports the OpenTelemetry API when constructed.
    """

    def __init__(self, generation: GenAI, units: KnownUnits) -> None:
        from opentelemetry._logs import SeverityNumber

        self._traces = Traces()
        self._severity = SeverityNumber.INFO
        self._units = units
        self._tokens = _token_names(generation)

    def fields(self, event: UsageEvent) -> dict[str, Any]:
        """Return the arguments of ``Logger.emit``: the record is dated by the call's end, and in the call's trace."""
        return {
            "timestamp": int(min(max(0.0, event.ended_at), _LATEST_S) * _NS),
            "context": self._traces.of(event),
            "severity_number": self._severity,
            "severity_text": "INFO",
            "attributes": self._attributes(event),
            "event_name": names.USAGE_EVENT,
        }

    def _attributes(self, event: UsageEvent) -> dict[str, Any]:
        told: dict[str, Any] = {
            names.CALL_ID: event.id,
            names.LINE: event.line,
            names.PAYER: event.payer,
            names.CALLER: event.caller,
            names.CALLER_TYPE: event.caller_type,
            names.UNIT: event.unit,
            names.AMOUNT_PARTS: event.amount,
            names.HELD_PARTS: event.held,
            names.OUTCOME: event.outcome,
            names.BASIS: event.basis,
            names.ESTIMATED: event.estimated,
            names.REASON: event.reason,
            names.STATUS: event.status,
            names.DURATION: event.duration_s,
            names.REQUEST_ID: event.request_id,
            names.SESSION_ID: event.session_id,
            names.USAGE_SOURCE: event.usage_source,
            names.RESPONSE_MODEL: event.model,
            names.PROVIDER: names.provider_name(event.provider) if event.provider else None,
        }
        unit = self._units.get(event.unit)
        if unit is not None:
            told[names.AMOUNT] = whole_units(event.amount, unit)
            told[names.HELD] = whole_units(event.held, unit)
        if event.usage is not None:
            for axis, attribute in self._tokens:
                told[attribute] = getattr(event.usage, axis)
        for name, value in event.attributes.items():
            # What the conventions name keeps its name, and never replaces what is said above.
            told.setdefault(name if name.startswith(names.NAMESPACES) else names.EXTRA + name, value)
        return {
            str(sendable(name, MAX_TEXT)): sendable(value, MAX_TEXT)
            for name, value in told.items()
            if value is not None
        }


def _token_names(generation: GenAI) -> tuple[tuple[str, str], ...]:
    common = (
        ("input", names.INPUT_TOKENS),
        ("output", names.OUTPUT_TOKENS),
        ("cached", names.CACHE_READ_TOKENS),
        ("reasoning", names.REASONING_TOKENS),
        ("audio", names.AUDIO_TOKENS),
    )
    before = (("cache_write", names.CACHE_CREATION_TOKENS),)
    after = (("cache_write", names.CACHE_WRITE_TOKENS),)
    extra = {GenAI.STABLE_SET: before, GenAI.LATEST: after, GenAI.BOTH: before + after}
    return common + extra[generation]
