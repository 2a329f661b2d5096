"""The harness shows what real servers do, so that tests built on it may be believed."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest
from opentelemetry._logs import SeverityNumber
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from tests.harness import apps
from tests.harness.clients import Http2Client, HttpClient
from tests.harness.drive import (
    Drive,
    assert_same_log,
    body,
    drive,
    headers,
    http_scope,
    lifespan,
    status,
    websocket_scope,
)
from tests.harness.otlp import OtlpReceiver
from tests.harness.servers import HOST, PATIENT, SERVER_KINDS, ServerKind, ServerProcess, serve, serve_in_thread
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until

pytestmark = pytest.mark.uncounted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from starlette.types import Message, Receive, Scope, Send

APP = "tests.harness.apps:app"


class Served:
    """A running server and the log that its application writes."""

    def __init__(self, server: ServerProcess, log: Path) -> None:
        self.server = server
        self.log = log

    @property
    def port(self) -> int:
        """The server's port."""
        return self.server.port

    def wait_for(self, event: str, count: int = 1) -> list[dict[str, object]]:
        """Wait until the application noted *event* so often."""
        wait_until(lambda: len(apps.read_log(self.log, event)) >= count, what=f"{count} x {event} in the log")
        return apps.read_log(self.log, event)


@contextlib.contextmanager
def served(folder: Path, kind: ServerKind, **options: object) -> Iterator[Served]:
    """Run the harness's application under *kind* with a log in *folder*."""
    log = folder / "harness.log"
    with serve(APP, kind, env={apps.LOG_VARIABLE: str(log)}, **options) as server:  # type: ignore[arg-type]
        yield Served(server, log)


@pytest.fixture(scope="module", params=SERVER_KINDS)
def each_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Each kind of server, started once for all tests of this module."""
    with served(tmp_path_factory.mktemp(request.param), request.param) as running:
        yield running


# Servers and the HTTP/1.1 client


def test_read_exact_bytes_and_events_on_every_server(each_server: Served) -> None:
    """The client hands over exactly as many bytes or events as asked, and sees the proper end of a body."""
    with HttpClient(each_server.port) as client:
        client.send_request(path="/events?n=4")
        head = client.read_head()
        assert (head.status, head.get("content-type")) == (200, "text/event-stream")
        assert client.read_events(2) == [b"data: 0", b"data: 1"]
        assert client.read_body(7) == b"data: 2"
        assert client.ended is None
        assert client.read_rest() == b"\n\ndata: 3\n\n"
        assert client.ended == "complete"


def test_send_two_requests_on_one_connection(each_server: Served) -> None:
    """A connection is used again after a complete response, with a body that the application gets whole."""
    with HttpClient(each_server.port) as client:
        client.send_request(path="/quick")
        assert client.read_head().status == 200
        assert client.read_rest() == b"quick"
        client.next_cycle()
        client.send_request("POST", "/echo", body=b"again")
        assert client.read_head().status == 200
        assert client.read_rest() == b"again"


def test_leave_mid_stream_is_seen_on_every_server(each_server: Served) -> None:
    """A client that leaves an endless stream by FIN or by RST ends it: the application gets `http.disconnect`."""
    for leave, count in ((HttpClient.leave_fin, 1), (HttpClient.leave_rst, 2)):
        client = HttpClient(each_server.port)
        client.send_request(path="/endless")
        assert client.read_head().status == 200
        assert client.read_events(3) == [b"data: more"] * 3
        leave(client)
        poured = [line for line in each_server.wait_for("poured", count) if line["path"] == "/endless"]
        assert len(poured) == count
        assert poured[-1]["chunks"] >= 3  # type: ignore[operator]


def test_leave_before_the_response_is_seen_on_every_server(each_server: Served) -> None:
    """A client that leaves while no byte of the response went out is seen by an application that listens."""
    client = HttpClient(each_server.port)
    client.send_request(path="/held")
    wait_until(lambda: "/held" in _paths(each_server, "started"))
    client.leave_fin()
    wait_until(lambda: "/held" in _paths(each_server, "disconnect"))


def test_leave_in_the_request_body(each_server: Served) -> None:
    """Half a request body reaches the application and then a disconnect; daphne and only daphne buffers it whole."""
    before = len([path for path in _paths(each_server, "started") if path == "/echo"])
    client = HttpClient(each_server.port)
    client.send_request("POST", "/echo", body=b"x" * 10_000, stop_after=4_000)
    if each_server.server.kind == "daphne":
        client.leave_fin()
        with HttpClient(each_server.port) as other:
            other.send_request(path="/quick")
            other.read_head()
        assert len([path for path in _paths(each_server, "started") if path == "/echo"]) == before
        return
    wait_until(lambda: any(line["body_bytes"] == 4_000 for line in apps.read_log(each_server.log, "received")))
    client.leave_fin()
    wait_until(lambda: "/echo" in _paths(each_server, "disconnect"))


def test_stall_and_go_on_loses_nothing(each_server: Served) -> None:
    """A client with a small buffer stops reading and goes on: every byte is still there."""
    with HttpClient(each_server.port, receive_buffer=4_096) as client:
        client.send_request(path="/burst")
        assert client.read_head().status == 200
        assert client.read_body(10) == b"x" * 10
        wait_until(lambda: "/burst" in _paths(each_server, "started"))
        assert client.read_body(200_000) == b"x" * 200_000


@pytest.mark.parametrize("leave", [HttpClient.leave_fin, HttpClient.leave_rst])
def test_leave_by_the_chosen_segment(leave: Callable[[HttpClient], None]) -> None:
    """With bytes unread, `leave_fin` still shows the server an end and `leave_rst` a reset."""
    with socket.create_server((HOST, 0)) as listener:
        client = HttpClient(listener.getsockname()[1])
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"never read")
            leave(client)
            if leave is HttpClient.leave_rst:
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
            else:
                assert connection.recv(1) == b""


def test_see_a_body_that_was_cut(each_server: Served) -> None:
    """An application that returns early cuts the connection, and the client tells that from an end; daphne stalls."""
    with HttpClient(each_server.port) as client:
        client.send_request(path="/cut")
        assert client.read_head().status == 200
        assert client.read_body(4) == b"half"
        if each_server.server.kind == "daphne":
            client.socket.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.read_rest()
        else:
            assert client.read_rest() == b""
            assert client.ended == "eof"


def test_scopes_differ_by_server(each_server: Served) -> None:
    """No server says spec version 2.4 yet, and only daphne has neither version, lifespan nor state."""
    with HttpClient(each_server.port) as client:
        client.send_request(path="/scope")
        client.read_head()
        seen = json.loads(client.read_rest())
    expected = {"hypercorn": "2.1", "granian": "2.3", "daphne": None}.get(each_server.server.kind, "2.3")
    lives = each_server.server.kind != "daphne"
    assert (seen["spec_version"], seen["state"], seen["http_version"]) == (expected, lives, "1.1")
    assert bool(apps.read_log(each_server.log, "lifespan.startup")) == lives


@pytest.mark.parametrize("kind", SERVER_KINDS)
def test_terminate_with_an_open_stream(kind: ServerKind, tmp_path: Path) -> None:
    """SIGTERM and a graceful timeout end an open stream as the table in `servers` says of each server."""
    with served(tmp_path, kind, graceful_timeout_s=1) as running:
        with HttpClient(running.port) as client:
            client.send_request(path="/endless")
            client.read_head()
            client.read_events(1)
            running.server.terminate()
            if kind in PATIENT:
                client.close()
            running.server.wait()
        cancelled = apps.read_log(running.log, "cancelled")
        shutdown = apps.read_log(running.log, "lifespan.shutdown")
        output = running.server.output()
    assert bool(cancelled) == (kind not in ("granian", *PATIENT)), output
    assert bool(shutdown) == (kind not in ("granian", "daphne")), output
    assert running.server.output() == output


@pytest.mark.parametrize("kind", ["uvicorn-h11", "granian"])
def test_kill_leaves_no_trace(kind: ServerKind, tmp_path: Path) -> None:
    """SIGKILL ends every process of the server with no word to the application, and the port refuses."""
    with served(tmp_path, kind) as running:
        client = HttpClient(running.port)
        client.send_request(path="/endless")
        client.read_head()
        workers = running.server.worker_pids()
        assert (workers == [running.server.process.pid]) == (kind == "uvicorn-h11")
        running.server.kill()
        assert running.server.process.returncode == -signal.SIGKILL
        client.read_rest()
        assert client.ended in ("eof", "reset")
        client.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, running.port), timeout=1)
    assert not apps.read_log(running.log, "cancelled")
    assert not apps.read_log(running.log, "lifespan.shutdown")


def test_run_two_workers(tmp_path: Path) -> None:
    """Two workers are two processes, each with its own lifespan."""
    with served(tmp_path, "hypercorn", workers=2) as running:
        pids = {line["pid"] for line in apps.read_log(running.log, "lifespan.startup")}
        assert pids == set(running.server.worker_pids())
        assert len(pids) == 2


@pytest.mark.parametrize("kind", ["uvicorn-h11", "hypercorn"])
def test_start_what_does_not_exist(kind: ServerKind) -> None:
    """A server that cannot load its application is an error that shows the server's own words."""
    with pytest.raises(RuntimeError, match="absent"), serve("tests.harness.apps:absent", kind):
        raise AssertionError("It cannot serve.")


def test_daphne_refuses_workers() -> None:
    """Asking daphne for two workers is an error, not one worker."""
    with pytest.raises(ValueError, match="1 process"), serve(APP, "daphne", workers=2):
        raise AssertionError("It cannot serve.")


def _paths(running: Served, event: str) -> list[object]:
    return [line.get("path") for line in apps.read_log(running.log, event)]


# The HTTP/2 client


@pytest.mark.parametrize("kind", ["hypercorn", "granian"])
def test_leave_one_http2_stream(kind: ServerKind, tmp_path: Path) -> None:
    """RST_STREAM ends one stream only: its application sees it, the neighbour on the connection goes on."""
    with served(tmp_path, kind) as running, Http2Client(running.port) as client:
        endless = client.send_request(path="/endless")
        assert client.read_head(endless).status == 200
        assert client.read_body(endless, 12) == b"data: more\n\n"
        scope = client.send_request(path="/scope")
        assert client.read_head(scope).get("content-type") == "text/plain"
        assert json.loads(client.read_rest(scope))["http_version"] == "2"
        assert client.ended == {scope: "complete"}
        client.reset_stream(endless)
        running.wait_for("poured")
        echo = client.send_request("POST", "/echo", body=b"still here")
        assert client.read_rest(echo) == b"still here"


@pytest.mark.parametrize("kind", ["hypercorn", "granian"])
def test_stall_and_leave_an_http2_stream(kind: ServerKind, tmp_path: Path) -> None:
    """
    Reading opens the window again and again; a client that stalls and leaves is seen by `receive`.

    Only by `receive`: hypercorn never returns from the `send` that waited for the window (pitfall 27).
    """
    with served(tmp_path, kind) as running, Http2Client(running.port, window=16_384) as client:
        burst = client.send_request(path="/burst")
        assert client.read_body(burst, 200_000) == b"x" * 200_000
        client.leave_rst()
        assert running.wait_for("disconnect")[0]["path"] == "/burst"
        running.server.kill()


def test_lose_an_http2_connection(tmp_path: Path) -> None:
    """A killed server ends every HTTP/2 stream, and a stream with no head is an error."""
    with served(tmp_path, "hypercorn") as running, Http2Client(running.port) as client:
        held = client.send_request("POST", "/held", body=b"12345", stop_after=2)
        running.wait_for("started")
        running.server.kill()
        assert client.read_rest(held) == b""
        assert client.ended[held] in ("eof", "reset")
        with pytest.raises(ConnectionError):
            client.read_head(held)


# uvicorn in a thread


def test_serve_in_thread_runs_the_lifespan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread serves the object itself, starts and ends its lifespan, and cancels what is still open."""
    log = tmp_path / "harness.log"
    monkeypatch.setenv(apps.LOG_VARIABLE, str(log))
    with serve_in_thread(apps.app, graceful_timeout_s=0) as server, HttpClient(server.port) as client:
        assert server.url == f"http://127.0.0.1:{server.port}"
        client.send_request(path="/endless")
        client.read_head()
        client.read_events(1)
        server.stop()
    assert apps.read_log(log, "cancelled")
    assert apps.read_log(log, "lifespan.shutdown")


def test_serve_in_thread_reports_a_failed_startup() -> None:
    """An application whose startup fails is an error in the test, not a hang."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no"})

    with pytest.raises(RuntimeError, match="did not start"), serve_in_thread(refuse, lifespan="on"):
        raise AssertionError("It cannot serve.")


# The OTLP receiver


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """A receiver that got nothing unreadable by the end."""
    with OtlpReceiver() as receiver:
        yield receiver
        assert not receiver.malformed


def test_receive_metrics_logs_and_spans(receiver: OtlpReceiver) -> None:
    """What the real exporters send, with gzip, comes out as protobuf messages."""
    zipped = Compression.Gzip
    reader = PeriodicExportingMetricReader(OTLPMetricExporter(receiver.endpoint("metrics"), compression=zipped))
    meters = MeterProvider([reader])
    meters.get_meter("t").create_counter("metering.calls", "{call}").add(3)
    loggers = LoggerProvider()
    loggers.add_log_record_processor(
        SimpleLogRecordProcessor(OTLPLogExporter(receiver.endpoint("logs"), compression=zipped))
    )
    loggers.get_logger("t").emit(event_name="metering.usage", severity_number=SeverityNumber.INFO)
    tracers = TracerProvider()
    tracers.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(receiver.endpoint("traces"), compression=zipped)))
    tracers.get_tracer("t").start_span("call").end()
    meters.shutdown()
    loggers.shutdown()
    tracers.shutdown()

    (metric,) = (metric for metric in receiver.metrics() if metric.name == "metering.calls")
    assert metric.sum.data_points[0].as_int == 3
    assert [record.event_name for record in receiver.log_records()] == ["metering.usage"]
    assert [span.name for span in receiver.spans()] == ["call"]
    assert receiver.wait_for("logs")[0].headers["content-encoding"] == "gzip"


def test_refuse_an_export(receiver: OtlpReceiver) -> None:
    """A refused export is kept apart from the accepted ones, and carries the status and `retry-after`."""
    receiver.status, receiver.retry_after_s = 503, 7
    with pytest.raises(urllib.error.HTTPError) as refusal:
        _post(receiver, "/v1/logs", _one_log_record())
    assert (refusal.value.code, refusal.value.headers["retry-after"]) == (503, "7")
    refusal.value.close()
    assert [request.status for request in receiver.requests] == [503]
    assert list(receiver.log_records()) == []
    receiver.status = 200
    assert _post(receiver, "/v1/logs", _one_log_record()) == 200
    assert [record.event_name for record in receiver.log_records()] == ["metering.usage"]


def test_hold_an_export(receiver: OtlpReceiver) -> None:
    """A held export has arrived but gets no answer, whatever the exporter's deadline, until it is released."""
    receiver.hold()
    with pytest.raises(TimeoutError):
        _post(receiver, "/v1/logs", _one_log_record(), timeout_s=0.2)
    assert len(receiver.wait_for("logs")) == 1

    async def run() -> None:
        export = asyncio.ensure_future(asyncio.to_thread(_post, receiver, "/v1/logs", _one_log_record()))
        await asyncio.to_thread(receiver.wait_for, "logs", 2)
        receiver.release()
        assert await export == 200

    asyncio.run(run())


def test_miss_an_export(receiver: OtlpReceiver) -> None:
    """Waiting for an export that does not come ends with the number that came."""
    with pytest.raises(TimeoutError, match="0 of 1 traces"):
        receiver.wait_for("traces", timeout_s=0.01)


@pytest.mark.parametrize(
    ("path", "body", "content_type", "code"),
    [
        ("/v1/profiles", b"", "application/x-protobuf", 404),
        ("/v1/logs", b"{}", "application/json", 415),
        ("/v1/logs", b"\xff\xff", "application/x-protobuf", 400),
    ],
)
def test_note_what_cannot_be_read(path: str, body: bytes, content_type: str, code: int) -> None:
    """What is no OTLP protobuf is refused by its own status and noted."""
    with OtlpReceiver() as receiver:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            _post(receiver, path, body, content_type)
        refusal.value.close()
        assert (refusal.value.code, len(receiver.malformed), receiver.requests) == (code, 1, [])


def _post(
    receiver: OtlpReceiver,
    path: str,
    body: bytes,
    content_type: str = "application/x-protobuf",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> int:
    request = urllib.request.Request(receiver.url + path, body, {"content-type": content_type})
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        code: int = response.status
        return code


def _one_log_record() -> bytes:
    record = LogRecord(event_name="metering.usage")
    scoped = ResourceLogs(scope_logs=[ScopeLogs(log_records=[record])])
    encoded: bytes = ExportLogsServiceRequest(resource_logs=[scoped]).SerializeToString()
    return encoded


# The in-process driver


async def _three_parts(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"1"), (b"x-a", b"2")]})
    for part in (b"one", b"two"):
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})


async def _listens(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200})
    while (await receive())["type"] != "http.disconnect":
        await send({"type": "http.response.body", "body": b".", "more_body": True})


def test_drive_to_the_end() -> None:
    """Every message is logged and delivered, and the readers put the response together."""
    run = asyncio.run(drive(_three_parts, http_scope()))
    assert run.outcome == "returned"
    assert run.log == run.delivered
    assert (status(run.log), headers(run.log), body(run.log)) == (201, [("x-a", "1"), ("x-a", "2")], b"onetwo")


def test_drive_with_a_body_in_parts() -> None:
    """The request body comes as scripted; after a complete response `receive` answers `http.disconnect`."""

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        parts = [await receive(), await receive()]
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"+".join(part["body"] for part in parts)})
        await receive()

    run = asyncio.run(drive(echo, http_scope("/", "POST"), body=[b"a", b"b"]))
    assert body(run.log) == b"a+b"
    assert run.received == [
        {"type": "http.request", "body": b"a", "more_body": True},
        {"type": "http.request", "body": b"b", "more_body": False},
        {"type": "http.disconnect"},
    ]


@pytest.mark.parametrize(
    ("spec_version", "outcome", "sent"), [("2.3", "returned", 4), (None, "returned", 4), ("2.4", "raised", 3)]
)
def test_drive_disconnect_by_spec_version(spec_version: str | None, outcome: str, sent: int) -> None:
    """After a disconnect `send` is a silent no-op below ASGI 2.4 and raises `OSError` from 2.4 on."""
    run = asyncio.run(drive(_three_parts, http_scope(spec_version=spec_version), disconnect_at=2))
    assert (run.outcome, len(run.log), len(run.delivered)) == (outcome, sent, 2)
    assert isinstance(run.exception, OSError) == (outcome == "raised")


def test_drive_disconnect_before_the_first_message() -> None:
    """A client that is gone from the start gives the application nothing but `http.disconnect`."""
    run = asyncio.run(drive(_listens, http_scope(), disconnect_at=0))
    assert run.received == [{"type": "http.disconnect"}]
    assert run.delivered == []


def test_drive_disconnect_by_hand() -> None:
    """A waiting `receive` answers `http.disconnect` once the test lets the client leave."""

    async def run() -> Drive:
        async with Drive(_listens, http_scope()) as call:
            assert call.outcome is None
            call.disconnect()
            assert await call.ended() == "returned"
        return call

    assert asyncio.run(run()).received[-1] == {"type": "http.disconnect"}


def test_drive_raise_at_a_message() -> None:
    """`send` raises `OSError` at the chosen message in any spec version; nothing later is delivered."""
    run = asyncio.run(drive(_three_parts, http_scope(spec_version=None), raise_at=3))
    assert (run.outcome, len(run.log), body(run.delivered)) == ("raised", 3, b"one")
    assert isinstance(run.exception, OSError)


def test_drive_raise_again_at_later_messages() -> None:
    """An application that takes no notice of the first `OSError` gets it again."""
    errors: list[OSError] = []

    async def stubborn(scope: Scope, receive: Receive, send: Send) -> None:
        for _ in range(4):
            try:
                await send({"type": "http.response.body", "more_body": True})
            except OSError as error:
                errors.append(error)

    run = asyncio.run(drive(stubborn, http_scope(), raise_at=2))
    assert (run.outcome, len(run.log), len(run.delivered), len(errors)) == ("returned", 4, 1, 3)


def test_drive_cancel_at_a_message() -> None:
    """The application's task is cancelled inside the chosen `send`, also when a child task of its sends."""

    async def child(scope: Scope, receive: Receive, send: Send) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(_three_parts(scope, receive, send))

    for app in (_three_parts, child):
        run = asyncio.run(drive(app, http_scope(), cancel_at=2))
        assert (run.outcome, len(run.log), len(run.delivered)) == ("cancelled", 2, 1)


def test_drive_hang_at_a_message() -> None:
    """`send` never returns at the chosen message (pitfall 27); the end of the block cancels the application."""

    async def run() -> Drive:
        async with Drive(_three_parts, http_scope(), hang_at=2) as call:
            assert await call.ended() == "hung"
            assert call.exception is None
        return call

    call = asyncio.run(run())
    assert isinstance(call.exception, asyncio.CancelledError)
    assert (call.outcome, len(call.log), len(call.delivered)) == ("hung", 2, 1)


def test_drive_keeps_what_the_application_raises() -> None:
    """An exception of the application is an outcome to look at."""

    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("inside")

    run = asyncio.run(drive(fail, http_scope()))
    assert (run.outcome, repr(run.exception)) == ("raised", "KeyError('inside')")
    with pytest.raises(LookupError):
        status(run.log)


def test_drive_bounds_an_application_that_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """An application for which no end was scripted is a `TimeoutError` with how far it came."""
    monkeypatch.setattr("tests.harness.drive.DRIVE_TIMEOUT_S", 0.05)
    with pytest.raises(TimeoutError, match="2 messages sent and 1 received"):
        asyncio.run(drive(_listens, http_scope()))


@pytest.mark.parametrize(
    ("messages", "complete"),
    [
        ([{"type": "http.response.body", "more_body": True}], False),
        ([{"type": "http.response.body"}], True),
        ([{"type": "http.response.pathsend", "path": "/x"}], True),
        ([{"type": "http.response.zerocopysend", "file": 1}], True),
        ([{"type": "http.response.start", "status": 200, "trailers": True}, {"type": "http.response.body"}], False),
        (
            [{"type": "http.response.start", "status": 200, "trailers": True}, {"type": "http.response.trailers"}],
            True,
        ),
        ([{"type": "websocket.close"}], True),
    ],
)
def test_drive_knows_the_end_of_a_response(messages: list[Message], complete: bool) -> None:
    """A response ends with its last body, file or trailers message (pitfall 36)."""

    async def send_all(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)

    assert asyncio.run(drive(send_all, http_scope())).complete.is_set() == complete


def test_drive_a_websocket() -> None:
    """A WebSocket is scripted whole, and ends with a disconnect of code 1006 when the client is gone."""

    async def socket_app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["subprotocols"] == ["v1"]
        while (message := await receive())["type"] != "websocket.disconnect":
            answer = "accept" if message["type"] == "websocket.connect" else "send"
            await send({"type": f"websocket.{answer}"})

    script: list[Message] = [{"type": "websocket.connect"}, {"type": "websocket.receive", "text": "hi"}]
    scope = websocket_scope(subprotocols=["v1"], extensions={"websocket.http.response": {}}, state={"a": 1})
    run = asyncio.run(drive(socket_app, scope, messages=script, disconnect_at=2))
    assert [message["type"] for message in run.log] == ["websocket.accept", "websocket.send"]
    assert run.received[-1] == {"type": "websocket.disconnect", "code": 1006, "reason": None}
    assert (scope["extensions"], scope["state"]) == ({"websocket.http.response": {}}, {"a": 1})


def test_compare_logs_by_meaning() -> None:
    """Two spellings of one message are equal; the first message that differs, or is missing, is named."""
    start: Message = {"type": "http.response.start", "status": 200}
    end: Message = {"type": "http.response.body"}
    assert_same_log([start, end], [{**start, "headers": []}, {**end, "body": b"", "more_body": False}])
    with pytest.raises(AssertionError, match="Message 2"):
        assert_same_log([start, end], [start, {**end, "body": b"x"}])
    with pytest.raises(AssertionError, match="1 messages, expected 2"):
        assert_same_log([start], [start, end])


def test_run_a_lifespan_in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lifespan runs around the block, and a failing or missing one is an error that names it."""
    log = tmp_path / "harness.log"
    monkeypatch.setenv(apps.LOG_VARIABLE, str(log))

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no balance"})

    async def run() -> None:
        async with lifespan(apps.app):
            assert [line["event"] for line in apps.read_log(log)] == ["lifespan.startup"]
        assert [line["event"] for line in apps.read_log(log)] == ["lifespan.startup", "lifespan.shutdown"]
        with pytest.raises(RuntimeError, match="no balance"):
            async with lifespan(refuse):
                raise AssertionError("It cannot start.")
        with pytest.raises(RuntimeError, match="has no lifespan"):
            async with lifespan(apps.without_lifespan):
                raise AssertionError("It cannot start.")

    asyncio.run(run())


def test_wait_for_what_never_comes() -> None:
    """Waiting is bounded, and the error says what was waited for."""
    with pytest.raises(TimeoutError, match=r"Not so after 0\.01 s: the moon; the last answer was 0"):
        wait_until(lambda: 0, timeout_s=0.01, what="the moon")


def test_read_a_log_while_it_is_written(tmp_path: Path) -> None:
    """A last line without its end is left for the next look, wherever it is torn, also inside a character."""
    log = tmp_path / "harness.log"
    whole = json.dumps({"event": "started", "path": "/é"}, ensure_ascii=False).encode() + b"\n"
    log.write_bytes(b"")
    assert apps.read_log(log) == []
    for torn in range(len(whole)):
        log.write_bytes(whole + whole[:torn])
        assert apps.read_log(log) == [{"event": "started", "path": "/é"}]
    log.write_bytes(whole + whole)
    assert len(apps.read_log(log, "started")) == 2
