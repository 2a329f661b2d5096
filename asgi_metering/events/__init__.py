"""
Usage events on their way out: the exporter, its sinks, and OpenTelemetry.

The one room that knows OpenTelemetry, and imports it only when a sink writes or a span is looked for. A new sink is any
object with a name and an async `deliver`.
"""

from __future__ import annotations

from asgi_metering.events.conventions import GenAI
from asgi_metering.events.exporter import Exporter
from asgi_metering.events.metrics import Meters
from asgi_metering.events.otel import OTelSink
from asgi_metering.events.otlp import OTLPLogSink
from asgi_metering.events.outbox import Backlog, Dropped
from asgi_metering.events.sinks import CallbackSink, Sink
from asgi_metering.events.span import annotate_span, current_trace

__all__ = [
    "Backlog",
    "CallbackSink",
    "Dropped",
    "Exporter",
    "GenAI",
    "Meters",
    "OTLPLogSink",
    "OTelSink",
    "Sink",
    "annotate_span",
    "current_trace",
]
