"""
The OTLP sink: log records that count as delivered only when the collector took them.

Knows how to hand records to an exporter of the OpenTelemetry SDK and to wait for its answer; the one module that
imports the SDK (extra ``otlp``), and only when such a sink is made. Knows nothing of metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from asgi_metering._version import __version__
from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.errors import MissingExtraError
from asgi_metering.events.conventions import SCOPE, GenAI, schema_url
from asgi_metering.events.records import KnownUnits, Records
from asgi_metering.events.sinks import OneCall
from asgi_metering.usage.event import UsageEvent

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk._logs.export import LogRecordExporter
    from opentelemetry.sdk.resources import Resource

__all__ = ["OTLPLogSink"]


class OTLPLogSink:
    """
    Sends the log records of `OTelSink` through *exporter*, batch by batch, and waits for the collector's answer.

    An application's log pipeline drops what its exporter could not send. Here a batch that the collector did not take
    stays in the outbox and comes again, so that no usage event is lost on the way to it. The same record may arrive
    twice; ``metering.call.id`` tells.

    Args:
        exporter: Of the SDK, such as ``OTLPLogExporter(endpoint="http://collector:4318/v1/logs")``. Whoever made it
            shuts it down. It runs in a thread; give it a timeout below the sink's (10 s).
        resource: Names the service, as with any provider; by default from ``OTEL_SERVICE_NAME`` and
            ``OTEL_RESOURCE_ATTRIBUTES``.
        generation: Which GenAI names; by default `GenAI.from_environment`.
        units: Units whose scale is known.
        name: The sink's name.

    Raises:
        MissingExtraError: The OpenTelemetry SDK is not installed.
    """

    def __init__(
        self,
        exporter: LogRecordExporter,
        *,
        resource: Resource | None = None,
        generation: GenAI | None = None,
        units: Iterable[Unit] = (CREDITS,),
        name: str = "otlp_logs",
    ) -> None:
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError:
            raise MissingExtraError("OTLPLogSink", "otlp") from None
        generation = GenAI.from_environment() if generation is None else generation
        self.name = name
        self._exporter = exporter
        self._records = Records(generation, KnownUnits(units))
        self._resource = Resource.create() if resource is None else resource
        self._scope = InstrumentationScope(SCOPE, __version__, schema_url(generation))
        self._thread = OneCall(name)

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """
        See `Sink.deliver`.

        Raises:
            ConnectionError: The collector did not take the batch.
            TimeoutError: The last export still runs.
        """
        result = await self._thread.run(self._send, events)
        if result.name != "SUCCESS":
            raise ConnectionError(
                f"The collector did not take {len(events)} log records. They are sent again; see the exporter's log."
            )

    def _send(self, events: Sequence[UsageEvent]) -> Any:
        from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, detach, set_value

        # As the SDK's own processors do: an instrumented HTTP client must not trace the export.
        token = attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))
        try:
            return self._exporter.export([self._readable(event) for event in events])
        finally:
            detach(token)

    def _readable(self, event: UsageEvent) -> ReadableLogRecord:
        from opentelemetry._logs import LogRecord
        from opentelemetry.sdk._logs import ReadableLogRecord

        return ReadableLogRecord(LogRecord(**self._records.fields(event)), self._resource, self._scope)
