"""
The current span: where a call's trace is read, and where the gate's facts are written.

Knows only the OpenTelemetry API's current span. Without anything that traces, each function is one look into
`sys.modules`: a span can be current only after ``opentelemetry.trace`` was imported by whoever made it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from opentelemetry.trace import Span

__all__ = ["annotate_span", "current_trace"]

log = logging.getLogger("asgi_metering.events")

_TRACE: Final = "opentelemetry.trace"

_PLAIN = (str, bool, int, float)


def current_trace() -> dict[str, str]:
    """
    Return the identifiers of the span that is current: what an event keeps, to be linked to it later (X.10).

    Returns:
        ``trace_id`` (32 hex digits), ``span_id`` (16), ``trace_flags`` (2); empty where no span is current.
    """
    span = _current()
    if span is None:
        return {}
    context = span.get_span_context()
    if not context.is_valid:
        return {}
    return {
        "trace_id": f"{context.trace_id:032x}",
        "span_id": f"{context.span_id:016x}",
        "trace_flags": f"{context.trace_flags:02x}",
    }


def is_recording() -> bool:
    """Whether there is a current span that `annotate_span` would write on: asked where its attributes cost time."""
    span = _current()
    return span is not None and span.is_recording()


def annotate_span(attributes: Mapping[str, object]) -> None:
    """
    Write *attributes* on the current span if it records; `None` values are left out, others become plain ones.

    For the gate, where the server's span still records (X.10). Never raises: telemetry breaks no request (S2.5).
    """
    span = _current()
    if span is None or not span.is_recording():
        return
    try:
        span.set_attributes(
            {
                name: value if isinstance(value, _PLAIN) else str(value)
                for name, value in attributes.items()
                if value is not None
            }
        )
    except Exception:
        log.exception("The attributes %s could not be written on the current span.", ", ".join(attributes))


def _current() -> Span | None:
    api: Any = sys.modules.get(_TRACE)
    if api is None:
        return None
    try:
        span: Span = api.get_current_span()
    except AttributeError:
        # Another thread is importing it at this moment, so nothing is traced yet.
        return None
    return span
