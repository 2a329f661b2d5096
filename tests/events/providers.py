"""Real OpenTelemetry providers, in memory, and what they collected in a form that tests can compare."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter, SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader


class Point(NamedTuple):
    """One data point with what it belongs to."""

    scope: str
    name: str
    unit: str
    attributes: dict[str, Any]
    data: Any


class Telemetry:
    """Both providers and what they got."""

    def __init__(self) -> None:
        self.reader = InMemoryMetricReader()
        self.exporter = InMemoryLogRecordExporter()
        self.meters = MeterProvider(metric_readers=[self.reader], shutdown_on_exit=False)
        self.loggers = LoggerProvider(shutdown_on_exit=False)
        self.loggers.add_log_record_processor(SimpleLogRecordProcessor(self.exporter))

    def points(self, name: str | None = None) -> list[Point]:
        """Every data point, or those of one metric."""
        collected = self.reader.get_metrics_data()
        found = [
            Point(scope.scope.name, metric.name, metric.unit, dict(point.attributes or {}), point)
            for resource in (collected.resource_metrics if collected is not None else ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        ]
        return [point for point in found if name in (None, point.name)]

    def values(self, name: str) -> dict[tuple[tuple[str, Any], ...], Any]:
        """Values of a counter or gauge by attributes, ordered."""
        return {tuple(sorted(point.attributes.items())): point.data.value for point in self.points(name)}

    def records(self) -> list[ReadableLogRecord]:
        """Every log record."""
        return list(self.exporter.get_finished_logs())


@contextlib.contextmanager
def telemetry() -> Iterator[Telemetry]:
    """Providers that are shut down again."""
    both = Telemetry()
    try:
        yield both
    finally:
        both.meters.shutdown()
        both.loggers.shutdown()
