"""
An ASGI server without a network: one application, one scope, each message under the test's control.

Knows the messages of HTTP, WebSocket and lifespan, and what servers do when a client leaves. Never knows
what the application does with them. Use it where a test must hit an exact message; use `servers` and
`clients` where the real thing must be seen.

    ended = await drive(app, http_scope("/chat"), disconnect_at=3)
    assert ended.outcome == "returned" and status(ended.log) == 200

Messages that the application sends are counted from 1. The faults:

==================  ================================================================================
``disconnect_at=n``  after message n the client is gone: `receive` answers ``http.disconnect``, and later
                     messages go nowhere. Below spec version 2.4 that is silent; from 2.4 on `send` raises
                     `OSError`. ``0``: gone before the first message.
``raise_at=n``       `send` raises `OSError` at message n and at every later one, in any version
``cancel_at=n``      the application's task is cancelled while message n waits in `send`, as by a server
                     whose graceful time is over
``hang_at=n``        `send` never returns for message n (hypercorn with HTTP/2, after the client left)
==================  ================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from starlette.types import ASGIApp, Message, Scope

__all__ = [
    "Drive",
    "Outcome",
    "assert_same_log",
    "body",
    "canonical",
    "drive",
    "headers",
    "http_scope",
    "lifespan",
    "status",
    "websocket_scope",
]

Outcome = Literal["returned", "raised", "cancelled", "hung"]
"""How the application's call ended; ``hung``: it did not, because `send` never returned."""

DRIVE_TIMEOUT_S = 10.0
"""Bound of one drive: an application that waits for ever for a message that nobody sends."""

SEND_YIELDS = 5
"""
Turns of the event loop in each `send`: enough for a task that waits in `receive` to get the disconnect before the last
`send` returns. hypercorn does that, and an application must not take it for a client that left.
"""


class Drive:
    """
    One call of an ASGI application. As an async context manager the call runs while the block does.

    Args:
        app: The application.
        scope: See `http_scope` and `websocket_scope`.
        body: The request body: one message, or one for each element.
        messages: The whole script for `receive` instead (needed for WebSocket). When it is used up, `receive`
            waits until the client is gone or the response is complete, then answers ``*.disconnect``.
        disconnect_at, raise_at, cancel_at, hang_at: See the table above.

    Attributes:
        log: Every message that the application handed to `send`, in order, also undelivered ones.
        delivered: Those that reached the client.
        received: Every message that `receive` gave to the application.
        exception: What the application raised, if anything.
        gone: Set when the client has left.
        complete: Set when the response (or the WebSocket) has its proper end.
        hung: Set when `send` was made to hang.
        task: The task that runs the application; a test may cancel it.
    """

    def __init__(
        self,
        app: ASGIApp,
        scope: Scope,
        *,
        body: bytes | Sequence[bytes] = b"",
        messages: Iterable[Message] | None = None,
        disconnect_at: int | None = None,
        raise_at: int | None = None,
        cancel_at: int | None = None,
        hang_at: int | None = None,
    ) -> None:
        self.log: list[Message] = []
        self.delivered: list[Message] = []
        self.received: list[Message] = []
        self.exception: BaseException | None = None
        self.gone = asyncio.Event()
        self.complete = asyncio.Event()
        self.hung = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self._app = app
        self._scope = scope
        self._script = list(_request_messages(body) if messages is None else messages)
        self._disconnect_at = disconnect_at
        self._raise_at = raise_at
        self._cancel_at = cancel_at
        self._hang_at = hang_at
        self._trailers = False
        if disconnect_at == 0:
            self.gone.set()

    async def __aenter__(self) -> Self:
        self.task = asyncio.create_task(self._run(), name="asgi-app")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.wait([self.task], timeout=DRIVE_TIMEOUT_S)
        if not self.task.done():
            raise TimeoutError(f"The application went on for {DRIVE_TIMEOUT_S} s after it was cancelled.")

    @property
    def outcome(self) -> Outcome | None:
        """How the call ended; `None` while it runs."""
        if self.hung.is_set():
            return "hung"
        if self.task is None or not self.task.done():
            return None
        if self.exception is None:
            return "returned"
        return "cancelled" if isinstance(self.exception, asyncio.CancelledError) else "raised"

    async def ended(self) -> Outcome:
        """
        Wait until the application has returned, raised, been cancelled or hung in `send`.

        Raises:
            TimeoutError: None of these happened; the message says how far it came.
        """
        assert self.task is not None
        hung = asyncio.ensure_future(self.hung.wait())
        await asyncio.wait([self.task, hung], timeout=DRIVE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        hung.cancel()
        outcome = self.outcome
        if outcome is None:
            raise TimeoutError(
                f"The application still runs after {DRIVE_TIMEOUT_S} s, {len(self.log)} messages sent "
                f"and {len(self.received)} received. Script an end for it."
            )
        return outcome

    def disconnect(self) -> None:
        """Let the client leave now."""
        self.gone.set()

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except BaseException as error:
            self.exception = error
            if not isinstance(error, (Exception, asyncio.CancelledError)):
                raise

    async def _receive(self) -> Message:
        if self._script and not self.gone.is_set():
            message = self._script.pop(0)
        else:
            await self._end_of_script()
            message = _disconnect_message(self._scope["type"])
        self.received.append(message)
        return message

    async def _end_of_script(self) -> None:
        waits = [asyncio.ensure_future(event.wait()) for event in (self.gone, self.complete)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _send(self, message: Message) -> None:
        self.log.append(dict(message))
        number = len(self.log)
        if number == self._hang_at:
            self.hung.set()
            await _forever()
        if number == self._cancel_at:
            assert self.task is not None
            self.task.cancel()
            await _forever()
        if self._raises(number):
            raise OSError("The client has gone.")
        if not self.gone.is_set():
            self.delivered.append(dict(message))
            self._note_completion(message)
        if number == self._disconnect_at:
            self.gone.set()
        for _ in range(SEND_YIELDS):
            await asyncio.sleep(0)

    def _raises(self, number: int) -> bool:
        if self._raise_at is not None and number >= self._raise_at:
            self.gone.set()
            return True
        return self.gone.is_set() and _spec_version(self._scope) >= (2, 4)

    def _note_completion(self, message: Message) -> None:
        kind = message["type"]
        if kind.endswith("response.start"):
            self._trailers = message.get("trailers", False)
        last_body = kind.endswith(("response.body", "response.zerocopysend")) and not message.get("more_body", False)
        last_trailer = kind == "http.response.trailers" and not message.get("more_trailers", False)
        whole = last_body or kind == "http.response.pathsend"
        if (whole and not self._trailers) or last_trailer or kind == "websocket.close":
            self.complete.set()


async def drive(
    app: ASGIApp,
    scope: Scope,
    *,
    body: bytes | Sequence[bytes] = b"",
    messages: Iterable[Message] | None = None,
    disconnect_at: int | None = None,
    raise_at: int | None = None,
    cancel_at: int | None = None,
    hang_at: int | None = None,
) -> Drive:
    """
    Run *app* to its end and return the ended `Drive`; an application that hangs in `send` is then cancelled.

    The arguments are those of `Drive`. What the application raises is kept, not raised.

    Raises:
        TimeoutError: The application neither ended nor hung.
    """
    run = Drive(
        app,
        scope,
        body=body,
        messages=messages,
        disconnect_at=disconnect_at,
        raise_at=raise_at,
        cancel_at=cancel_at,
        hang_at=hang_at,
    )
    async with run:
        await run.ended()
    return run


def http_scope(
    path: str = "/",
    method: str = "GET",
    *,
    query: str = "",
    headers: Iterable[tuple[str, str]] = (),
    spec_version: str | None = "2.3",
    http_version: str = "1.1",
    extensions: Mapping[str, Mapping[str, Any]] | None = None,
    state: dict[str, Any] | None = None,
    client: tuple[str, int] | None = ("127.0.0.1", 50_000),
) -> Scope:
    """
    Build an HTTP scope as servers do.

    Args:
        path: Decoded, without the query.
        method: Upper case.
        query: Without the question mark.
        headers: Names are lowered; ``host`` comes first by itself.
        spec_version: ``None`` leaves it out, as daphne does.
        http_version: ``"1.1"`` or ``"2"``.
        extensions: Such as ``{"http.response.pathsend": {}}``; ``None`` leaves the key out.
        state: The lifespan's; ``None`` leaves the key out.
        client: Address and port, or ``None`` for a UNIX socket.
    """
    scope = _connection_scope("http", path, query, headers, spec_version, http_version, extensions, state, client)
    return {**scope, "method": method, "scheme": "http"}


def websocket_scope(
    path: str = "/",
    *,
    query: str = "",
    headers: Iterable[tuple[str, str]] = (),
    subprotocols: Sequence[str] = (),
    spec_version: str | None = "2.3",
    extensions: Mapping[str, Mapping[str, Any]] | None = None,
    state: dict[str, Any] | None = None,
    client: tuple[str, int] | None = ("127.0.0.1", 50_000),
) -> Scope:
    """Build a WebSocket scope; ``extensions={"websocket.http.response": {}}`` allows a denial response."""
    scope = _connection_scope("websocket", path, query, headers, spec_version, "1.1", extensions, state, client)
    return {**scope, "subprotocols": list(subprotocols), "scheme": "ws"}


@contextlib.asynccontextmanager
async def lifespan(app: ASGIApp) -> AsyncIterator[dict[str, Any]]:
    """
    Run the lifespan of *app* around the block, and hand over its state.

    Raises:
        RuntimeError: The startup or the shutdown failed, with the application's message.
        Exception: What the application raised instead of answering.
    """
    state: dict[str, Any] = {}
    scope: Scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": state}
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()

    async def run() -> None:
        await app(scope, inbox.get, outbox.put)

    task = asyncio.create_task(run(), name="asgi-lifespan")
    try:
        await _lifespan_step("startup", task, inbox, outbox)
        yield state
        await _lifespan_step("shutdown", task, inbox, outbox)
        await asyncio.wait_for(task, DRIVE_TIMEOUT_S)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def _lifespan_step(
    name: str, task: asyncio.Task[None], inbox: asyncio.Queue[Message], outbox: asyncio.Queue[Message]
) -> None:
    await inbox.put({"type": f"lifespan.{name}"})
    answer = asyncio.create_task(outbox.get())
    waits: list[asyncio.Task[Any]] = [task, answer]
    await asyncio.wait(waits, timeout=DRIVE_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
    if not answer.done():
        answer.cancel()
        if task.done():
            task.result()
        raise RuntimeError(f"The application did not answer lifespan.{name} within {DRIVE_TIMEOUT_S} s.")
    message = answer.result()
    if message["type"] != f"lifespan.{name}.complete":
        raise RuntimeError(f"The application answered {message!r} to lifespan.{name}.")


def status(log: Iterable[Message]) -> int:
    """Return the status of the response in *log*. Raises `LookupError` if none was started."""
    return int(_start(log)["status"])


def headers(log: Iterable[Message]) -> list[tuple[str, str]]:
    """Return the header fields of the response in *log*, in order. Raises `LookupError` if none was started."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in _start(log)["headers"]]


def body(log: Iterable[Message]) -> bytes:
    """Return the body bytes of the response in *log*, joined."""
    return b"".join(message.get("body", b"") for message in log if message["type"].endswith("response.body"))


def canonical(log: Iterable[Message]) -> list[Message]:
    """Return *log* with every default spelled out, so that two spellings of one message are equal."""
    return [_canonical_message(message) for message in log]


def assert_same_log(actual: Iterable[Message], expected: Iterable[Message]) -> None:
    """Raise `AssertionError` naming the first message in which the two logs differ, defaults spelled out."""
    got, wanted = canonical(actual), canonical(expected)
    for number, (one, other) in enumerate(zip(got, wanted, strict=False), 1):
        assert one == other, f"Message {number} is {one!r}, expected {other!r}."
    assert len(got) == len(wanted), f"{len(got)} messages, expected {len(wanted)}: {(got[len(wanted) :] or wanted)!r}"


def _start(log: Iterable[Message]) -> Message:
    for message in log:
        if message["type"].endswith("response.start"):
            return _canonical_message(message)
    raise LookupError("No response was started.")


def _canonical_message(message: Message) -> Message:
    kind = message["type"]
    if kind.endswith("response.start"):
        fields = [(bytes(name), bytes(value)) for name, value in message.get("headers", ())]
        return {"trailers": False, **message, "headers": fields}
    if kind.endswith("response.body"):
        return {"body": b"", "more_body": False, **message}
    return dict(message)


def _connection_scope(
    kind: str,
    path: str,
    query: str,
    headers: Iterable[tuple[str, str]],
    spec_version: str | None,
    http_version: str,
    extensions: Mapping[str, Mapping[str, Any]] | None,
    state: dict[str, Any] | None,
    client: tuple[str, int] | None,
) -> dict[str, Any]:
    fields = [(b"host", b"testserver")]
    fields += [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    scope: dict[str, Any] = {
        "type": kind,
        "asgi": {"version": "3.0"} if spec_version is None else {"version": "3.0", "spec_version": spec_version},
        "http_version": http_version,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": fields,
        "client": client,
        "server": ("testserver", 80),
    }
    if extensions is not None:
        scope["extensions"] = {name: dict(value) for name, value in extensions.items()}
    if state is not None:
        scope["state"] = dict(state)
    return scope


def _request_messages(body: bytes | Sequence[bytes]) -> list[Message]:
    parts = [body] if isinstance(body, bytes) else list(body) or [b""]
    last = len(parts) - 1
    return [{"type": "http.request", "body": part, "more_body": at < last} for at, part in enumerate(parts)]


def _disconnect_message(kind: str) -> Message:
    if kind == "websocket":
        return {"type": "websocket.disconnect", "code": 1006, "reason": None}
    return {"type": "http.disconnect"}


def _spec_version(scope: Scope) -> tuple[int, ...]:
    return tuple(int(part) for part in scope["asgi"].get("spec_version", "2.0").split("."))


async def _forever() -> None:
    await asyncio.get_running_loop().create_future()
