"""Reading the trace at the gate, and writing on its span."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from asgi_metering.events.span import annotate_span, current_trace
from tests.events.support import TRACE, make_event


def test_read_the_current_trace() -> None:
    """The ids are those of the current span, in the form that an event keeps."""
    context = trace.SpanContext(
        int(TRACE["trace_id"], 16), int(TRACE["span_id"], 16), is_remote=False, trace_flags=trace.TraceFlags(1)
    )
    with trace.use_span(trace.NonRecordingSpan(context)):
        assert current_trace() == TRACE
    assert make_event(**TRACE).trace_id == TRACE["trace_id"]


def test_pad_small_ids() -> None:
    """Leading zeros stay, so that the ids are valid hex of full length."""
    with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False))):
        assert current_trace() == {"trace_id": "0" * 31 + "1", "span_id": "0" * 15 + "2", "trace_flags": "00"}


def test_read_nothing_without_a_span() -> None:
    """Without a current span there are no ids, rather than zeros."""
    assert current_trace() == {}


def test_annotate_the_recording_span() -> None:
    """Attributes are written on the current span; None is left out, and anything else becomes text."""
    provider = TracerProvider(shutdown_on_exit=False)
    with provider.get_tracer("test").start_as_current_span("request") as span:
        annotate_span(
            {"metering.line": "chat", "metering.held": 5, "metering.admitted": True, "nothing": None, "odd": {1}}
        )
        found = dict(span.attributes)  # type: ignore[attr-defined]
    provider.shutdown()
    assert found == {"metering.line": "chat", "metering.held": 5, "metering.admitted": True, "odd": "{1}"}


def test_leave_a_span_alone_that_does_not_record() -> None:
    """A span that is not recorded, or none at all, costs and gets nothing."""

    class Expensive:
        def __str__(self) -> str:
            raise AssertionError("was looked at")

    annotate_span({"x": Expensive()})
    with trace.use_span(trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False))):
        annotate_span({"x": Expensive()})


def test_survive_a_span_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A broken span breaks no request (S2.5)."""

    class Broken(trace.NonRecordingSpan):
        def is_recording(self) -> bool:
            return True

        def set_attributes(self, attributes: Any) -> None:
            raise RuntimeError("broken")

    with trace.use_span(Broken(trace.SpanContext(1, 2, is_remote=False))):
        annotate_span({"metering.line": "chat"})
    assert "metering.line could not be written" in caplog.text


def test_find_no_span_where_nothing_imported_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody imported it, or is just importing it, no span is current, and nothing is imported to find out."""
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    assert current_trace() == {}
    annotate_span({"metering.line": "chat"})
    assert "opentelemetry.trace" not in sys.modules
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", types.ModuleType("half"))
    assert current_trace() == {}
