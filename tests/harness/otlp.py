"""
An OpenTelemetry collector's HTTP door, on loopback.

Knows OTLP/HTTP with protobuf bodies, plain or gzip: ``/v1/metrics``, ``/v1/logs``, ``/v1/traces``. Keeps
every request, and can be slow, refuse, or not answer at all. Never interprets what it got.
"""

from __future__ import annotations

import gzip
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Literal, Self

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.harness.servers import HOST
from tests.harness.waiting import DEFAULT_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord
    from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

__all__ = ["OtlpReceiver", "OtlpRequest", "Signal"]

Signal = Literal["metrics", "logs", "traces"]

_TYPES: dict[Signal, tuple[type[Any], type[Any]]] = {
    "metrics": (ExportMetricsServiceRequest, ExportMetricsServiceResponse),
    "logs": (ExportLogsServiceRequest, ExportLogsServiceResponse),
    "traces": (ExportTraceServiceRequest, ExportTraceServiceResponse),
}


@dataclass(frozen=True, slots=True)
class OtlpRequest:
    """
    One export as it arrived, whatever was answered.

    Attributes:
        signal: Which of the three paths.
        headers: Field names in lower case.
        message: The parsed ``Export...ServiceRequest``.
        status: The status it was answered with.
    """

    signal: Signal
    headers: dict[str, str]
    message: Any = field(repr=False)
    status: int


class OtlpReceiver:
    """
    Listens from construction until `close` (or the end of a ``with`` block).

    Attributes:
        requests: Every export that could be parsed, in order of arrival; also those that were refused.
        malformed: What could not be parsed, one sentence each; a test may assert that it is empty.
        status: The status of the next answers: 200, or 503 (retryable) or any other.
        retry_after_s: Sent as ``retry-after`` with a status of 400 and above, unless `None`.
    """

    def __init__(self) -> None:
        self.requests: list[OtlpRequest] = []
        self.malformed: list[str] = []
        self.status = 200
        self.retry_after_s: int | None = None
        self._arrived = threading.Condition()
        self._answering = threading.Event()
        self._answering.set()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), name="otlp", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The base URL, for ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"http://{HOST}:{self._server.server_address[1]}"

    def endpoint(self, signal: Signal) -> str:
        """Return the full URL of one signal, as the exporters' ``endpoint=`` wants it."""
        return f"{self.url}/v1/{signal}"

    def hold(self) -> None:
        """Answer nothing from now on; requests are still received and kept. A collector that hangs."""
        self._answering.clear()

    def release(self) -> None:
        """Answer again, also what was held."""
        self._answering.set()

    def close(self) -> None:
        """Stop listening and release what was held. Idempotent."""
        self.release()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def wait_for(self, signal: Signal, count: int = 1, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> list[OtlpRequest]:
        """
        Wait until at least *count* exports of *signal* arrived, and return all of them.

        Raises:
            TimeoutError: They did not come in time.
        """
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self.of(signal)) >= count, timeout_s):
                raise TimeoutError(f"{len(self.of(signal))} of {count} {signal} exports came in {timeout_s} s.")
            return self.of(signal)

    def of(self, signal: Signal) -> list[OtlpRequest]:
        """Return the exports of one signal so far."""
        return [request for request in self.requests if request.signal == signal]

    def metrics(self) -> Iterator[Metric]:
        """Return every metric of every accepted export, oldest first."""
        for message in self._accepted("metrics"):
            for resource in message.resource_metrics:
                for scope in resource.scope_metrics:
                    yield from scope.metrics

    def log_records(self) -> Iterator[LogRecord]:
        """Return every log record of every accepted export, oldest first."""
        for message in self._accepted("logs"):
            for resource in message.resource_logs:
                for scope in resource.scope_logs:
                    yield from scope.log_records

    def spans(self) -> Iterator[Span]:
        """Return every span of every accepted export, oldest first."""
        for message in self._accepted("traces"):
            for resource in message.resource_spans:
                for scope in resource.scope_spans:
                    yield from scope.spans

    def _accepted(self, signal: Signal) -> Iterator[Any]:
        return (request.message for request in self.of(signal) if request.status < 300)

    def _take(self, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        """Keep one request and return what to answer: status and body."""
        name = path.removeprefix("/v1/")
        if name not in _TYPES:
            return self._refuse(404, f"There is no {path!r}.")
        request_type, response_type = _TYPES[name]
        if headers.get("content-type") != "application/x-protobuf":
            return self._refuse(415, f"The content type of {path!r} is {headers.get('content-type')!r}.")
        try:
            message = request_type.FromString(gzip.decompress(body) if _is_gzip(headers) else body)
        except (DecodeError, OSError, EOFError) as error:
            return self._refuse(400, f"The body of {path!r} cannot be read: {error}.")
        status = self.status
        with self._arrived:
            self.requests.append(OtlpRequest(name, headers, message, status))
            self._arrived.notify_all()
        self._answering.wait()
        return status, response_type().SerializeToString() if status < 300 else b""

    def _refuse(self, status: int, why: str) -> tuple[int, bytes]:
        self.malformed.append(why)
        return status, b""


def _is_gzip(headers: dict[str, str]) -> bool:
    return headers.get("content-encoding") == "gzip"


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, receiver: OtlpReceiver) -> None:
        super().__init__((HOST, 0), _Handler)
        self.receiver = receiver

    def handle_error(self, request: object, client_address: object) -> None:
        """Keep what went wrong while answering; an exporter that left before its answer was within its rights."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.receiver.malformed.append(f"Answering {client_address!r} failed: {error!r}.")


class _Handler(BaseHTTPRequestHandler):
    # HTTP/1.0 closes after each answer, so that no idle connection keeps a thread alive at the end.
    server: _Server

    def do_POST(self) -> None:
        receiver = self.server.receiver
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self.rfile.read(int(headers.get("content-length", "0")))
        status, answer = receiver._take(self.path, headers, body)
        self.send_response(status)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(answer)))
        if status >= 400 and receiver.retry_after_s is not None:
            self.send_header("retry-after", str(receiver.retry_after_s))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Print nothing: the requests are kept."""
