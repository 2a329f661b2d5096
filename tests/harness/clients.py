"""
HTTP clients that leave when a test says so.

Knows the wire: HTTP/1.1 through h11 and HTTP/2 (cleartext, prior knowledge) through h2, over a plain
socket. Never retries, never reads ahead on its own, never follows anything: what is on the wire is the
test's doing. How each client can end:

- it reads to the end: `read_rest`, and `ended` says ``"complete"``, ``"eof"`` or ``"reset"``;
- it leaves politely: `leave_fin` (a FIN is the first thing the server sees);
- it leaves rudely: `leave_rst` (a RST, what a crashed client or a cut connection looks like);
- it stalls: stop reading, with a small `receive_buffer`, and the server's writes back up.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import h2.config
import h2.connection
import h2.events
import h2.settings
import h11

from tests.harness.servers import HOST

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Ended", "Http2Client", "HttpClient", "ResponseHead"]

Ended = Literal["complete", "eof", "reset"]
"""How a response ended: by its own framing; by a FIN before that; by a RST (HTTP/2: also RST_STREAM)."""

_READ_BYTES = 65_536
_EVENT_END = re.compile(rb"\r\n\r\n|\n\n|\r\r")
_LINGER_ZERO = struct.pack("ii", 1, 0)


class ResponseHead(NamedTuple):
    """The status and the header fields of a response; names are lower case, repeated fields stay apart."""

    status: int
    headers: list[tuple[str, str]]

    def get(self, name: str) -> str | None:
        """Return the first field of this name, or `None`."""
        return next((value for key, value in self.headers if key == name.lower()), None)


class _Socket:
    """A loopback connection and the ways to leave it."""

    def __init__(self, port: int, *, timeout_s: float, receive_buffer: int | None) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(timeout_s)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect((HOST, port))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close without ceremony; idempotent. Unread bytes make the kernel send a RST instead of a FIN."""
        self.socket.close()

    def leave_fin(self) -> None:
        """Send a FIN, whatever is still unread, and close."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.close()

    def leave_rst(self) -> None:
        """Send a RST and nothing else (``SO_LINGER`` of zero)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        self.close()


class HttpClient(_Socket):
    """
    One HTTP/1.1 connection; one response at a time.

    Args:
        port: On loopback.
        timeout_s: Bound of every single read, write and connect.
        receive_buffer: ``SO_RCVBUF`` in bytes; a small one lets a client that stops reading be felt soon.

    Attributes:
        ended: How the response ended, or `None` while it has not.
    """

    def __init__(self, port: int, *, timeout_s: float = 10.0, receive_buffer: int | None = None) -> None:
        super().__init__(port, timeout_s=timeout_s, receive_buffer=receive_buffer)
        self.ended: Ended | None = None
        self._wire = h11.Connection(h11.CLIENT)
        self._authority = f"{HOST}:{port}"
        self._unread = b""

    def send_request(
        self,
        method: str = "GET",
        path: str = "/",
        *,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        stop_after: int | None = None,
    ) -> None:
        """
        Send a request with its body, announced by ``content-length``.

        Args:
            method: The method.
            path: The target, with its query.
            headers: Further fields.
            body: The whole body.
            stop_after: Send only this many bytes of *body*; the server waits for the rest.
        """
        fields = [("host", self._authority), *headers]
        if body:
            fields.append(("content-length", str(len(body))))
        self._write(self._wire.send(h11.Request(method=method, target=path, headers=fields)))
        self._write(self._wire.send(h11.Data(data=body[:stop_after])))
        if stop_after is None:
            self._write(self._wire.send(h11.EndOfMessage()))

    def read_head(self) -> ResponseHead:
        """
        Read the status and the header fields; informational responses are passed over.

        Raises:
            ConnectionError: The server closed without a response.
            TimeoutError: Nothing came in time.
        """
        event = self._event()
        while isinstance(event, h11.InformationalResponse):
            event = self._event()
        if not isinstance(event, h11.Response):
            raise ConnectionError(f"No response came: {self.ended!r}.")
        return ResponseHead(event.status_code, [(name.decode(), value.decode()) for name, value in event.headers])

    def read_body(self, size: int) -> bytes:
        """Read exactly *size* body bytes, transfer coding taken off; fewer only if the body ends before."""
        while len(self._unread) < size and self._read_data():
            pass
        return self._take(size)

    def read_events(self, count: int) -> list[bytes]:
        """Read exactly *count* server-sent events, without the blank line; fewer only if the body ends before."""
        events: list[bytes] = []
        while len(events) < count:
            match = _EVENT_END.search(self._unread)
            if match:
                events.append(self._take(match.end())[: match.start()])
            elif not self._read_data():
                break
        return events

    def read_rest(self) -> bytes:
        """Read to the end of the response, however it comes; see `ended`."""
        while self._read_data():
            pass
        return self._take(len(self._unread))

    def next_cycle(self) -> None:
        """Make ready for another request on this connection, after a complete response."""
        self._wire.start_next_cycle()
        self.ended = None

    def _take(self, size: int) -> bytes:
        taken, self._unread = self._unread[:size], self._unread[size:]
        return taken

    def _read_data(self) -> bool:
        if self.ended is not None:
            return False
        event = self._event()
        if isinstance(event, h11.Data):
            self._unread += event.data
            return True
        if self.ended is None:
            self.ended = "complete"
        return False

    def _event(self) -> object:
        while True:
            try:
                event = self._wire.next_event()
            except h11.RemoteProtocolError:
                # The only fault that servers of this suite commit: the body ended before its framing did.
                self.ended = "eof"
                return None
            if event is not h11.NEED_DATA:
                if isinstance(event, h11.ConnectionClosed):
                    self.ended = "eof"
                return event
            try:
                self._wire.receive_data(self.socket.recv(_READ_BYTES))
            except ConnectionResetError:
                self.ended = "reset"
                return None

    def _write(self, data: bytes | None) -> None:
        self.socket.sendall(data or b"")


class Http2Client(_Socket):
    """
    One cleartext HTTP/2 connection by prior knowledge, as hypercorn and granian take it; several streams.

    Args:
        port: On loopback.
        timeout_s: Bound of every single read, write and connect.
        receive_buffer: ``SO_RCVBUF`` in bytes.
        window: The window in bytes that is announced for each stream. It is refilled as the test reads, on whatever
            stream: a test that stops reading stalls every stream after at most that many bytes.

    Attributes:
        ended: By stream id, how its response ended.
    """

    def __init__(
        self, port: int, *, timeout_s: float = 10.0, receive_buffer: int | None = None, window: int = 65_535
    ) -> None:
        super().__init__(port, timeout_s=timeout_s, receive_buffer=receive_buffer)
        self.ended: dict[int, Ended] = {}
        self._authority = f"{HOST}:{port}"
        self._heads: dict[int, ResponseHead] = {}
        self._unread: dict[int, bytes] = {}
        self._wire = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self._wire.local_settings = h2.settings.Settings(
            client=True, initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window}
        )
        self._wire.initiate_connection()
        self._flush()

    def send_request(
        self,
        method: str = "GET",
        path: str = "/",
        *,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        stop_after: int | None = None,
    ) -> int:
        """Send a request and return its stream id; *stop_after* leaves the body open after so many bytes."""
        stream = self._wire.get_next_available_stream_id()
        fields = [(":method", method), (":path", path), (":authority", self._authority), (":scheme", "http")]
        self._wire.send_headers(stream, [*fields, *headers], end_stream=not body)
        if body:
            self._wire.send_data(stream, body[:stop_after], end_stream=stop_after is None)
        self._unread[stream] = b""
        self._flush()
        return stream

    def read_head(self, stream: int) -> ResponseHead:
        """
        Read the status and the header fields of *stream*.

        Raises:
            ConnectionError: The stream or the connection ended without them.
        """
        while stream not in self._heads:
            if not self._read(stream):
                raise ConnectionError(f"No response came on stream {stream}: {self.ended.get(stream)!r}.")
        return self._heads[stream]

    def read_body(self, stream: int, size: int) -> bytes:
        """Read exactly *size* body bytes of *stream*; fewer only if its body ends before."""
        while len(self._unread[stream]) < size and self._read(stream):
            pass
        taken, self._unread[stream] = self._unread[stream][:size], self._unread[stream][size:]
        return taken

    def read_rest(self, stream: int) -> bytes:
        """Read *stream* to its end, however it comes; see `ended`."""
        while self._read(stream):
            pass
        return self.read_body(stream, len(self._unread[stream]))

    def reset_stream(self, stream: int) -> None:
        """Leave one stream by RST_STREAM (CANCEL); the connection stays."""
        self._wire.reset_stream(stream, error_code=0x8)
        self._flush()

    def _read(self, stream: int) -> bool:
        """Read once from the socket; false when *stream* has ended."""
        if stream in self.ended:
            return False
        try:
            data = self.socket.recv(_READ_BYTES)
        except ConnectionResetError:
            self._end_all("reset")
            return False
        if not data:
            self._end_all("eof")
            return False
        for event in self._wire.receive_data(data):
            self._take_event(event)
        self._flush()
        return True

    def _take_event(self, event: h2.events.Event) -> None:
        if isinstance(event, h2.events.ResponseReceived):
            fields = [(str(name), str(value)) for name, value in event.headers]
            self._heads[event.stream_id] = ResponseHead(int(fields[0][1]), fields[1:])
        elif isinstance(event, h2.events.DataReceived):
            self._unread[event.stream_id] += event.data
            self._wire.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        elif isinstance(event, h2.events.StreamEnded):
            self.ended.setdefault(event.stream_id, "complete")
        elif isinstance(event, h2.events.StreamReset):
            self.ended.setdefault(event.stream_id, "reset")
        elif isinstance(event, h2.events.ConnectionTerminated):
            self._end_all("eof")

    def _end_all(self, how: Ended) -> None:
        for stream in self._unread:
            self.ended.setdefault(stream, how)

    def _flush(self) -> None:
        self.socket.sendall(self._wire.data_to_send())
