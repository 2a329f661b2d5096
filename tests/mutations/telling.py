"""How what the gate tells others is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

EXCHANGE = "asgi_metering.asgi.exchange"
DRESSING = "asgi_metering.asgi.dressing"
METERING = "asgi_metering.metering"


def _gate(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/events/test_through_the_gate.py::{name}" for name in names)


def _fields(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/pitfalls/test_fields.py::{name}" for name in names)


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        0,
        "nothing is written on the span",
        METERING,
        "        if is_recording():\n",
        "        if False:\n",
        _gate(
            "test_write_on_the_span_before_the_first_byte[/function]",
            "test_write_on_the_span_before_the_first_byte[/threaded]",
            "test_write_on_the_span_before_the_first_byte[/generator]",
        ),
    ),
    Mutation(
        0,
        "events have no trace",
        "asgi_metering.events.span",
        "    if not context.is_valid:\n        return {}\n",
        "    return {}\n",
        _gate(
            "test_export_the_record_in_the_trace_of_its_request[/function]",
            "test_export_the_record_in_the_trace_of_its_request[/generator]",
            "test_export_the_record_of_a_call_that_outlives_its_span",
        ),
    ),
    Mutation(
        0,
        "admitted responses have the names by default",
        DRESSING,
        "        fields = limit_fields(decision, call.unit, names)\n",
        "        fields = limit_fields(decision, call.unit)\n",
        _fields(
            "test_send_the_legacy_fields_where_they_are_asked_for[/whole]",
            "test_send_the_legacy_fields_where_they_are_asked_for[/streamed]",
            "test_call_the_fields_as_the_application_does[/whole]",
            "test_call_the_fields_as_the_application_does[/streamed]",
        ),
    ),
)
