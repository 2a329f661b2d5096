"""With the API alone, in a fresh process: nothing is exported, nothing fails, and nothing is imported too early."""

from __future__ import annotations

import subprocess
import sys
import textwrap


def run(program: str) -> str:
    """Run *program* in a fresh interpreter where warnings are errors; what it printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_import_no_opentelemetry_until_it_is_used() -> None:
    """Importing this package's events, making sinks and looking for a span import no OpenTelemetry."""
    printed = run(
        """
        import sys
        import asgi_metering.events as events
        sink, meters = events.OTelSink(), events.Meters()
        events.current_trace(); events.annotate_span({"metering.line": "chat"})
        meters.count("refusals", line="chat", reason="policy")
        print([name for name in sys.modules if name.startswith("opentelemetry")])
        """
    )
    assert printed == "[]\n"


def test_deliver_with_the_api_alone() -> None:
    """Without a provider every call is a no-op: no exception, no SDK, no exporter, no thread."""
    printed = run(
        """
        import asyncio, sys, threading
        from asgi_metering.events import Meters, OTelSink, annotate_span, current_trace
        from tests.events.support import Outbox, make_events

        async def main():
            outbox = Outbox()
            await outbox.put(make_events(100))
            meters = Meters()
            meters.count("refusals", line="chat", reason="policy")
            meters.gauge("holds", 1)
            exporter = outbox.exporter([OTelSink()], meters=meters)
            print(await exporter.drain(20.0), await outbox.ids(), exporter.listening)
            await OTelSink().deliver(make_events(2_000))
            meters.flush()
            print(current_trace(), annotate_span({"metering.line": "chat"}), len(threading.enumerate()))

        asyncio.run(main())
        from opentelemetry import metrics
        from opentelemetry import _logs
        print(type(metrics.get_meter_provider()).__name__, type(_logs.get_logger_provider()).__name__)
        print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
        """
    )
    assert printed.splitlines() == ["0 [] False", "{} None 1", "_ProxyMeterProvider ProxyLoggerProvider", "[]"]


def test_write_to_providers_that_are_installed_later() -> None:
    """A sink that wrote before the application installed its SDK writes to it from then on."""
    printed = run(
        """
        import asyncio
        from asgi_metering.events import Meters, OTelSink
        from tests.events.support import make_event

        sink, meters = OTelSink(), Meters()
        print(sink.enabled, OTelSink(logs=False).enabled)
        asyncio.run(sink.deliver([make_event(1)]))
        meters.count("ends_lost"); meters.flush()

        from opentelemetry import _logs, metrics
        from tests.events.providers import Telemetry
        seen = Telemetry()
        _logs.set_logger_provider(seen.loggers)
        print(sink.enabled, OTelSink(logs=False).enabled)
        metrics.set_meter_provider(seen.meters)
        print(sink.enabled, OTelSink(logs=False).enabled)
        asyncio.run(sink.deliver([make_event(2)]))
        meters.count("ends_lost"); meters.flush()
        print(sorted((point.name, point.data.value) for point in seen.points() if hasattr(point.data, "value")))
        print([record.log_record.attributes["metering.call.id"] for record in seen.records()])
        seen.meters.shutdown(); seen.loggers.shutdown()
        """
    )
    assert printed.splitlines() == [
        "False False",
        "True False",
        "True True",
        "[('metering.amount', 1.5), ('metering.calls', 1), ('metering.ends.lost', 1)]",
        "['call-2']",
    ]
