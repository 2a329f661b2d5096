"""The OpenTelemetry sink against the real SDK."""

from __future__ import annotations

import asyncio
import builtins
import logging
import sys
import threading
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry._logs import NoOpLoggerProvider
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor, InMemoryLogRecordExporter
from opentelemetry.sdk.metrics.export import HistogramDataPoint

from asgi_metering import Metering
from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.events import conventions as names
from asgi_metering.events import metrics, otel
from asgi_metering.events.conventions import GenAI
from asgi_metering.events.otel import OTelSink
from asgi_metering.usage.event import UsageEvent
from asgi_metering.usage.values import TokenUsage
from tests.events.providers import Telemetry, telemetry
from tests.events.support import TRACE, make_event, make_events
from tests.harness.waiting import DEFAULT_TIMEOUT_S

PLACE = ((names.BASIS, "usage"), (names.LINE, "chat"), (names.OUTCOME, "completed"), (names.UNIT, "credits"))

MODEL = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-5.5",
    "gen_ai.response.model": "gpt-5.5",
}


def deliver(seen: Telemetry, *events: UsageEvent, **options: Any) -> OTelSink:
    """Deliver *events* in one batch."""
    sink = OTelSink(seen.meters, seen.loggers, **options)
    asyncio.run(sink.deliver(events))
    return sink


# -- metrics -----------------------------------------------------------------------------------------------


def test_count_calls_by_line_outcome_basis_and_unit() -> None:
    """metering.calls counts each call once, with exactly these four attributes."""
    with telemetry() as seen:
        deliver(seen, *make_events(3), make_event(4, outcome="client_gone", basis="observed"))
        gone = (("metering.basis", "observed"), PLACE[1], ("metering.outcome", "client_gone"), PLACE[3])
        assert seen.values("metering.calls") == {PLACE: 3, gone: 1}
        (point, _) = seen.points("metering.calls")
        assert (point.scope, point.unit) == ("asgi_metering", "{call}")


def test_count_amounts_in_whole_units_with_the_unit_in_braces() -> None:
    """1.5 credits are 1.5, not 1500000; a unit without a fraction stays an int; each unit has its own scope."""
    with telemetry() as seen:
        micros = make_event(2, unit="usd_micros", amount=7)
        deliver(seen, make_event(1), micros, make_event(3), units=[CREDITS, Unit("usd_micros", scale=0)])
        found = {(p.scope, p.unit, p.data.value) for p in seen.points("metering.amount")}
        assert found == {
            ("asgi_metering.credits", "{credits}", 3.0),
            ("asgi_metering.usd_micros", "{usd_micros}", 7),
        }


def test_count_amounts_of_unknown_scale_in_parts() -> None:
    """A unit whose scale nobody told is not mixed with whole units."""
    with telemetry() as seen:
        deliver(seen, make_event(unit="gems", amount=12), make_event(2, unit="gems", amount=-4))
        ((point),) = seen.points("metering.amount_parts")
        assert (point.unit, point.data.value, point.attributes["metering.unit"]) == ("{part}", 12, "gems")
        assert seen.points("metering.amount") == []


def test_count_every_unit_of_a_metering_in_whole_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sink of a metering that was given none tells amounts of all of its units, also of one that is named later."""

    async def scene() -> None:
        async with Metering("memory://") as metering:
            await metering.grant("ann", 9, id="c")
            async with metering.charge(payer="ann", line="chat", price=2):
                pass
            await metering.grant("ann", 9, id="m", unit=Unit("messages", scale=1))
            async with metering.charge(payer="ann", line="chat", price=3, unit=Unit("messages", scale=1)):
                pass

    with telemetry() as seen:
        for api in ("opentelemetry.metrics", "opentelemetry.metrics._internal"):
            monkeypatch.setattr(f"{api}.get_meter_provider", lambda: seen.meters)
        for api in ("opentelemetry._logs", "opentelemetry._logs._internal"):
            monkeypatch.setattr(f"{api}.get_logger_provider", lambda: seen.loggers)
        asyncio.run(scene())
        amounts = {(point.unit, point.data.value) for point in seen.points("metering.amount")}
        assert amounts == {("{credits}", 2.0), ("{messages}", 3.0)}
        told = [record.log_record.attributes or {} for record in seen.records()]
        assert {(each["metering.unit"], each["metering.amount"], each["metering.held"]) for each in told} == {
            ("credits", 2.0, 2.0),
            ("messages", 3.0, 3.0),
        }


def test_count_a_correction_downwards_as_returned_and_not_as_a_call() -> None:
    """A counter cannot go down: what a late end gives back is its own counter, and no further call."""
    correction = make_event(2, id="call-1:late", amount=-500_000, attributes={names.CORRECTS: "call-1"})
    with telemetry() as seen:
        deliver(seen, make_event(1), correction)
        assert seen.values("metering.amount") == {PLACE: 1.5}
        assert seen.values("metering.amount_returned") == {PLACE: 0.5}
        assert seen.values("metering.calls") == {PLACE: 1}
        assert [point.data.count for point in seen.points("metering.call.duration")] == [1]


def test_record_token_usage_by_the_convention() -> None:
    """gen_ai.client.token.usage has the convention's unit, buckets and attributes, and one value per direction."""
    with telemetry() as seen:
        deliver(seen, make_event())
        points = {p.attributes.pop("gen_ai.token.type"): p for p in seen.points("gen_ai.client.token.usage")}
        assert {side: point.data.sum for side, point in points.items()} == {"input": 900, "output": 120}
        for point in points.values():
            assert isinstance(point.data, HistogramDataPoint)
            assert point.attributes == MODEL
            assert point.unit == "{token}"
            assert point.data.explicit_bounds == (
                *(1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144),
                *(1048576, 4194304, 16777216, 67108864),
            )


def test_record_the_duration_by_line_outcome_and_status() -> None:
    """metering.call.duration is in seconds, with the buckets of model calls and the status as an int."""
    with telemetry() as seen:
        deliver(seen, make_event(1), make_event(2, status=None, started_at=2_000.0))
        with_status, without = seen.points("metering.call.duration")
        assert with_status.attributes == {
            "metering.line": "chat",
            "metering.outcome": "completed",
            "http.response.status_code": 200,
        }
        assert (with_status.unit, with_status.data.sum) == ("s", 2.5)
        assert with_status.data.explicit_bounds[:3] == (0.01, 0.02, 0.04)
        assert "http.response.status_code" not in without.attributes
        assert without.data.sum == 0.0


@pytest.mark.parametrize("generation", [GenAI.STABLE_SET, GenAI.LATEST])
def test_lead_from_a_histogram_to_the_trace_of_the_call(generation: GenAI) -> None:
    """Exemplars of all histograms are of the call's own trace if it was sampled, and never of the worker's (X.10)."""
    span = trace.NonRecordingSpan(trace.SpanContext(7, 7, is_remote=False, trace_flags=trace.TraceFlags(1)))
    with telemetry() as seen, trace.use_span(span):
        untraced = make_event(2, trace_id=None, span_id=None, trace_flags=None)
        deliver(seen, make_event(1), untraced, make_event(3, trace_flags="00"), generation=generation)
        points = [point for point in seen.points() if isinstance(point.data, HistogramDataPoint)]
        led = {point.name: [f"{found.trace_id:032x}" for found in point.data.exemplars] for point in points}
    assert len(led) == (3 if generation is GenAI.STABLE_SET else 4)
    assert all(found == [TRACE["trace_id"]] for found in led.values())


def test_record_what_measured_calls_used_of_their_holds() -> None:
    """metering.hold.used has one share for each call with usage that held something, and none for corrections."""
    events = [
        make_event(1, amount=150, held=300),
        make_event(2, amount=600, held=300),
        make_event(3, amount=5, held=0),
        make_event(4, amount=5, held=5, usage=None),
    ]
    correction = make_event(5, amount=1, held=4, attributes={"metering.corrects": "1"})
    with telemetry() as seen:
        deliver(seen, *events, correction)
        (point,) = seen.points("metering.hold.used")
        assert point.attributes == {"metering.line": "chat"}
        assert (point.data.count, point.data.sum) == (2, 2.5)


def test_report_zero_tokens_and_leave_out_unreported_ones() -> None:
    """A reported zero is a value; what was not reported is none (S2.41)."""
    with telemetry() as seen:
        deliver(seen, make_event(usage=TokenUsage(input=0)), make_event(2, usage=None))
        ((point),) = seen.points("gen_ai.client.token.usage")
        assert (point.attributes["gen_ai.token.type"], point.data.count, point.data.sum) == ("input", 1, 0)


@pytest.mark.parametrize(("counted_tokens", "reported"), [(False, 0), (True, 2)])
def test_leave_out_tokens_counted_offline(counted_tokens: bool, reported: int) -> None:
    """The convention reports offline counts only where the user says so."""
    with telemetry() as seen:
        deliver(seen, make_event(usage_source="tokenizer"), counted_tokens=counted_tokens)
        assert len(seen.points("gen_ai.client.token.usage")) == reported


def test_write_the_names_that_replace_the_old_ones() -> None:
    """LATEST writes the new counters and histograms, and nothing of the removed metric; BOTH writes both."""
    new = {
        "gen_ai.client.inference.usage.input_tokens": 900,
        "gen_ai.client.inference.usage.output_tokens": 120,
        "gen_ai.client.inference.usage.cache_read.input_tokens": 400,
        "gen_ai.client.inference.usage.cache_write.input_tokens": 50,
        "gen_ai.client.inference.usage.reasoning.output_tokens": 64,
    }
    with telemetry() as seen:
        deliver(seen, make_event(), generation=GenAI.LATEST)
        for name, count in new.items():
            ((point),) = seen.points(name)
            assert point.data.value == count
            assert point.attributes == {**MODEL, "gen_ai.token.modality": "unknown"}
        for side, total in (("input", 900), ("output", 120)):
            ((point),) = seen.points(f"gen_ai.client.inference.operation.{side}_tokens")
            assert (point.attributes, point.data.sum) == (MODEL, total)
        assert seen.points("gen_ai.client.token.usage") == []
    with telemetry() as seen:
        deliver(seen, make_event(), generation=GenAI.BOTH)
        assert len(seen.points("gen_ai.client.token.usage")) == 2
        assert all(seen.points(name) for name in new)


def test_choose_names_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """OTEL_SEMCONV_STABILITY_OPT_IN chooses the generation, as for OpenTelemetry's own instrumentations."""
    monkeypatch.delenv("OTEL_SEMCONV_STABILITY_OPT_IN", raising=False)
    assert GenAI.from_environment() is GenAI.STABLE_SET
    monkeypatch.setenv("OTEL_SEMCONV_STABILITY_OPT_IN", "http, gen_ai_latest_experimental")
    with telemetry() as seen:
        deliver(seen, make_event())
        assert seen.points("gen_ai.client.token.usage") == []
        assert seen.records()[0].instrumentation_scope.schema_url.endswith("/gen-ai/1.42.0")


def test_take_operation_and_requested_model_from_the_event() -> None:
    """Attributes of the event in the convention's own names say more than the defaults."""
    told = {"gen_ai.operation.name": "embeddings", "gen_ai.request.model": "auto"}
    with telemetry() as seen:
        deliver(seen, make_event(attributes=told), make_event(2, model=None, provider=None))
        first, _, second, _ = seen.points("gen_ai.client.token.usage")
        assert {**first.attributes, "gen_ai.token.type": ""} == {**MODEL, **told, "gen_ai.token.type": ""}
        assert second.attributes["gen_ai.provider.name"] == "_OTHER"
        assert "gen_ai.request.model" not in second.attributes


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("openai", "openai"),
        ("gemini", "gcp.gemini"),
        ("xai", "x_ai"),
        ("az.ai.openai", "azure.ai.openai"),
        ("openrouter", "openrouter"),
        (None, "_OTHER"),
    ],
)
def test_name_providers_as_the_convention_does(ours: str | None, theirs: str) -> None:
    """Well-known providers get their well-known names, others keep theirs."""
    assert names.provider_name(ours) == theirs


@pytest.mark.parametrize("generation", GenAI)
def test_show_no_payer_caller_or_id_in_any_metric(generation: GenAI) -> None:
    """Whoever pays, calls or asks is in no metric's attributes, so cardinality and privacy are safe (X.9)."""
    personal = {
        "payer": "SECRET-payer",
        "caller": "SECRET-caller",
        "id": "SECRET-id",
        "request_id": "SECRET-request",
        "session_id": "SECRET-session",
        "attributes": {"note": "SECRET-note"},
    }
    with telemetry() as seen:
        deliver(seen, make_event(**personal), generation=generation)
        assert len(seen.points()) >= 4
        assert "SECRET" not in repr([(point.name, point.attributes) for point in seen.points()])


def test_bound_the_values_of_an_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that clients invent do not fill the collector: beyond the bound they are _OTHER."""
    monkeypatch.setattr(metrics, "MAX_VALUES", 3)
    events = [make_event(number, model=f"model-{number}") for number in range(10)]
    long = make_event(11, line="x" * 129)
    with telemetry() as seen:
        deliver(seen, *events, long)
        models = {point.attributes["gen_ai.response.model"] for point in seen.points("gen_ai.client.token.usage")}
        assert models == {"model-0", "model-1", "model-2", "_OTHER"}
        assert {p.attributes["metering.line"] for p in seen.points("metering.calls")} == {"chat", "_OTHER"}


def test_bound_the_number_of_attribute_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound everything else is one overflow set, and nothing is lost from the sum."""
    monkeypatch.setattr(metrics, "MAX_SETS", 3)
    with telemetry() as seen:
        deliver(seen, *(make_event(n, line=f"line-{n}", usage=None, status=None) for n in range(10)))
        values = seen.values("metering.calls")
        assert len(values) <= 4
        assert (("otel.metric.overflow", True),) in values
        assert sum(values.values()) == 10


def test_add_once_for_each_attribute_set() -> None:
    """However many events a batch has, a counter is called once for each set of attributes."""
    calls: list[tuple[str, float]] = []
    with telemetry() as seen:
        sink = OTelSink(seen.meters, seen.loggers)
        made = sink._open()._get(names.CALLS)
        add = made.add
        made.add = lambda value, attributes: (calls.append(("calls", value)), add(value, attributes))
        asyncio.run(sink.deliver([*make_events(100), make_event(101, line="search")]))
        assert calls == [("calls", 100), ("calls", 1)]


def test_let_others_run_between_chunks() -> None:
    """A large batch gives the event loop to others in between."""

    async def main() -> None:
        with telemetry() as seen:
            sink, turns = OTelSink(seen.meters, seen.loggers), []
            delivery = asyncio.create_task(sink.deliver(make_events(5 * otel.CHUNK)))
            while not delivery.done():
                turns.append(len(seen.records()))
                await asyncio.sleep(0)
            assert turns[1:6] == [otel.CHUNK * step for step in range(1, 6)]

    asyncio.run(main())


def test_write_each_event_once_when_a_delivery_was_cut_short() -> None:
    """A batch that comes again after a timeout continues where it was; nothing is counted twice."""

    async def main() -> None:
        with telemetry() as seen:
            sink, events = OTelSink(seen.meters, seen.loggers), make_events(3 * otel.CHUNK)
            delivery = asyncio.create_task(sink.deliver(events))
            await asyncio.sleep(0)
            assert len(seen.records()) == otel.CHUNK
            delivery.cancel()
            await asyncio.wait([delivery])
            await sink.deliver(events)
            assert len(seen.records()) == len(events)
            assert seen.values("metering.calls") == {PLACE: len(events)}
            assert seen.points("metering.call.duration")[0].data.count == len(events)
            assert sink._begun == set()

    asyncio.run(main())


def test_bound_the_memory_of_cut_deliveries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many events are remembered as begun."""
    monkeypatch.setattr(otel, "MAX_BEGUN", 0)
    with telemetry() as seen:
        sink = deliver(seen, make_event())
        assert sink._begun == set()


# -- log records -------------------------------------------------------------------------------------------


def test_write_a_log_record_in_the_trace_of_the_call() -> None:
    """The record carries the saved trace ids, the end's time and the event's name (X.10)."""
    with telemetry() as seen:
        deliver(seen, make_event())
        record = seen.records()[0].log_record
        assert record.event_name == "asgi_metering.usage"
        assert f"{record.trace_id:032x}" == TRACE["trace_id"]
        assert f"{record.span_id:016x}" == TRACE["span_id"]
        assert record.trace_flags == 1
        assert record.timestamp == 1_002_500_000_000
        assert record.severity_number is not None
        assert record.severity_number.name == "INFO"


def test_write_every_field_that_is_known() -> None:
    """The record says who paid, what for, how much exactly, and on what basis (S2.2)."""
    event = make_event(
        caller_type="agent",
        reason="done",
        request_id="r-1",
        session_id="s-1",
        attributes={"plan": "pro", "gen_ai.response.id": "resp-1", "metering.payer": "somebody else"},
    )
    with telemetry() as seen:
        deliver(seen, event)
        assert dict(seen.records()[0].log_record.attributes or {}) == {
            "metering.call.id": "call-1",
            "metering.line": "chat",
            "metering.payer": "org_7",
            "metering.caller": "key_9",
            "metering.caller_type": "agent",
            "metering.unit": "credits",
            "metering.amount": 1.5,
            "metering.amount_parts": 1_500_000,
            "metering.held": 2.0,
            "metering.held_parts": 2_000_000,
            "metering.outcome": "completed",
            "metering.basis": "usage",
            "metering.estimated": False,
            "metering.reason": "done",
            "metering.call.duration_s": 2.5,
            "metering.request.id": "r-1",
            "metering.session.id": "s-1",
            "metering.usage.source": "body",
            "http.response.status_code": 200,
            "gen_ai.provider.name": "openai",
            "gen_ai.response.model": "gpt-5.5",
            "gen_ai.usage.input_tokens": 900,
            "gen_ai.usage.output_tokens": 120,
            "gen_ai.usage.cache_read.input_tokens": 400,
            "gen_ai.usage.cache_creation.input_tokens": 50,
            "gen_ai.usage.reasoning.output_tokens": 64,
            "gen_ai.response.id": "resp-1",
            "metering.attributes.plan": "pro",
        }


def test_leave_out_what_is_not_known() -> None:
    """A call without a model, a status or a known unit has no such attributes, and none is null."""
    bare = UsageEvent(
        id="c", line="l", payer="p", unit="gems", amount=1, outcome="error", basis="none", started_at=1.0, ended_at=2.0
    )
    with telemetry() as seen:
        deliver(seen, bare)
        attributes = dict(seen.records()[0].log_record.attributes or {})
        assert None not in attributes.values()
        assert not any(name.startswith("gen_ai.") for name in attributes)
        assert "metering.amount" not in attributes
        assert attributes["metering.amount_parts"] == 1


@pytest.mark.parametrize(
    ("generation", "written"),
    [
        (GenAI.STABLE_SET, {"cache_creation"}),
        (GenAI.LATEST, {"cache_write"}),
        (GenAI.BOTH, {"cache_creation", "cache_write"}),
    ],
)
def test_name_cache_writes_by_generation(generation: GenAI, written: set[str]) -> None:
    """The one token attribute that was renamed has the name of the chosen generation."""
    with telemetry() as seen:
        deliver(seen, make_event(), generation=generation)
        attributes = seen.records()[0].log_record.attributes or {}
        found = {
            kind for kind in ("cache_creation", "cache_write") if f"gen_ai.usage.{kind}.input_tokens" in attributes
        }
        assert found == written


def test_give_a_record_without_a_trace_no_trace() -> None:
    """An event without trace ids does not inherit those of whatever the worker runs in."""
    span = trace.NonRecordingSpan(trace.SpanContext(7, 7, is_remote=False))
    with telemetry() as seen, trace.use_span(span):
        deliver(seen, make_event(trace_id=None, span_id=None, trace_flags=None))
        record = seen.records()[0].log_record
        assert (record.trace_id, record.span_id) == (0, 0)


def test_write_a_trace_without_flags_as_not_sampled() -> None:
    """Saved ids without flags keep their ids."""
    with telemetry() as seen:
        deliver(seen, make_event(trace_flags=None))
        record = seen.records()[0].log_record
        assert f"{record.trace_id:032x}" == TRACE["trace_id"]
        assert record.trace_flags == 0


@pytest.mark.parametrize("ended_at", [-5.0, 1e300])
def test_bound_the_timestamp(ended_at: float) -> None:
    """A clock gone mad makes no timestamp that an exporter could not encode."""
    with telemetry() as seen:
        deliver(seen, make_event(ended_at=ended_at))
        assert 0 <= (seen.records()[0].log_record.timestamp or 0) < 2**63


def test_write_no_log_records_where_told() -> None:
    """logs=False leaves records to another sink; metrics are written."""
    with telemetry() as seen:
        deliver(seen, make_event(), logs=False)
        assert seen.records() == []
        assert seen.values("metering.calls") == {PLACE: 1}


def test_write_metrics_where_the_logs_api_is_unknown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the logs API has moved, metrics go on, and the log says why records are missing."""
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == "opentelemetry._logs" or (name == "opentelemetry" and rest[2] and "_logs" in rest[2]):
            raise ImportError("moved")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with telemetry() as seen:
        deliver(seen, make_event())
        assert seen.values("metering.calls") == {PLACE: 1}
    assert "no log records are written" in caplog.text


def test_be_enabled_where_a_provider_is_given() -> None:
    """A provider of either kind is somebody who may read."""
    with telemetry() as seen:
        assert OTelSink(seen.meters).enabled
        assert OTelSink(logger_provider=seen.loggers).enabled


def test_be_enabled_once_the_application_installs_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API's own providers read nothing; any other, of metrics or of logs where they are written, does."""
    sink, no_logs = OTelSink(), OTelSink(logs=False)
    monkeypatch.setattr("opentelemetry.metrics.get_meter_provider", NoOpMeterProvider)
    monkeypatch.setattr("opentelemetry._logs.get_logger_provider", NoOpLoggerProvider)
    assert (sink.enabled, no_logs.enabled) == (False, False)
    with telemetry() as seen:
        monkeypatch.setattr("opentelemetry._logs.get_logger_provider", lambda: seen.loggers)
        assert (sink.enabled, no_logs.enabled) == (True, False)
        monkeypatch.setattr("opentelemetry.metrics.get_meter_provider", lambda: seen.meters)
        assert (sink.enabled, no_logs.enabled) == (True, True)
    monkeypatch.setattr("opentelemetry.metrics.get_meter_provider", NoOpMeterProvider)
    monkeypatch.setitem(sys.modules, "opentelemetry._logs", None)
    assert not sink.enabled


def test_wait_for_no_provider_that_cannot_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider without force_flush is written to all the same."""
    monkeypatch.setattr(otel, "FLUSH_AFTER", 1)
    with telemetry() as seen:

        class Plain:
            get_logger = seen.loggers.get_logger

        asyncio.run(OTelSink(seen.meters, Plain()).deliver(make_events(3)))  # type: ignore[arg-type]
        assert len(seen.records()) == 3


# -- pacing ------------------------------------------------------------------------------------------------


def test_wait_for_the_sdk_before_its_queue_overflows(caplog: pytest.LogCaptureFixture) -> None:
    """A backlog larger than the SDK's queue arrives whole, because deliveries wait for it to empty."""
    exporter, gate = InMemoryLogRecordExporter(), threading.Event()
    export = exporter.export

    def slow_in_the_background(batch: Any) -> Any:
        if threading.current_thread().name.startswith("Otel"):
            gate.wait(DEFAULT_TIMEOUT_S)
        return export(batch)

    exporter.export = slow_in_the_background  # type: ignore[method-assign]
    provider = LoggerProvider(shutdown_on_exit=False)
    # The processor's own thread begins only when the queue is full, and would then hang.
    processor = BatchLogRecordProcessor(exporter, schedule_delay_millis=3_600_000, max_export_batch_size=2_048)
    provider.add_log_record_processor(processor)

    async def main() -> None:
        sink = OTelSink(seen.meters, provider)
        for start in range(0, 6_000, 500):
            await sink.deliver(make_events(500, start=start))

    with telemetry() as seen, caplog.at_level(logging.WARNING):
        try:
            asyncio.run(main())
        finally:
            gate.set()
            provider.shutdown()
    assert "Queue full" not in caplog.text
    assert len(exporter.get_finished_logs()) == 6_000
