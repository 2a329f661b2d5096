"""
Departures: one request of a client that leaves at an exact phase of the answer.

An ASGI server without a network. Knows the messages of HTTP and the three ways in which servers tell that a client has
gone. Never knows what the application makes of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from asgi_metering.asgi.types import ASGIApp, Message, Scope
from asgi_metering.errors import ConfigurationError

__all__ = ["PHASES", "Departed", "Shown", "disconnect_at"]

Shown: TypeAlias = Literal["receive", "send", "cancel"]

PHASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "before_start": "the application has the request, and has not answered",
        "start": "the client has the start of the response, and no byte of its body",
        "body": "the client has that many messages of the body",
        "before_last": "the client has all but the last message of the body",
        "end": "the client has the whole response: it has not left early",
    }
)
"""Every phase, and what is true when the client leaves."""

_WAYS: Final = ("receive", "send", "cancel")

BOUND_S: Final = 30.0
"""Bound of one request: an application that waits for what nobody sends."""


@dataclass(slots=True)
class Departed:
    """
    What became of the request.

    Attributes:
        status: Of the response; None if the client left before it.
        headers: Of the response, as they were sent.
        body: What the client got before it left.
        outcome: How the application's call ended: ``returned``, ``raised`` or ``cancelled``.
        error: What it raised.
    """

    status: int | None = None
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""
    outcome: Literal["returned", "raised", "cancelled"] = "returned"
    error: BaseException | None = None


async def disconnect_at(
    phase: str,
    app: ASGIApp,
    path: str = "/",
    *,
    method: str = "GET",
    query: str = "",
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    nth: int = 1,
    shown: Shown = "receive",
    timeout_s: float = BOUND_S,
) -> Departed:
    """
    Send *app* one request, leave at *phase*, and return when the application has ended its call.

    Args:
        phase: One of `PHASES`.
        app: Whole, with its middleware. Its lifespan is the caller's: ``async with metering`` stands for it.
        path: Decoded.
        method: Upper case.
        query: Without the question mark.
        headers: Of the request.
        body: Of the request, in one message.
        nth: For ``"body"``: how many messages of it the client gets.
        shown: How the server tells: ``"receive"`` answers ``http.disconnect`` and swallows what is sent (uvicorn, ASGI
            below 2.4), ``"send"`` raises `OSError` from `send` as well (2.4), ``"cancel"`` cancels the application's
            task as well (hypercorn, daphne).
        timeout_s: Bound of the whole.

    Raises:
        ConfigurationError: There is no such phase, way or number.
        TimeoutError: The application went on. It is cancelled then.

    What the application raises is kept in the answer. The end of its call is booked when this returns, unless the
    application runs with its lifespan: then ``await metering.drain()`` waits for it.
    """
    if phase not in PHASES:
        raise ConfigurationError(f"There is no phase {phase!r}. Choose one of {', '.join(PHASES)}.")
    if shown not in _WAYS:
        raise ConfigurationError(f"No server shows a departure by {shown!r}. Choose one of {', '.join(_WAYS)}.")
    if type(nth) is not int or nth < 1:
        raise ConfigurationError(f"nth={nth!r} is no number of messages. Use an int from 1 up.")
    fields = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4" if shown == "send" else "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode("latin-1"),
        "root_path": "",
        "headers": [(b"host", b"testserver"), *fields],
        "client": ("127.0.0.1", 50_000),
        "server": ("testserver", 80),
    }
    return await _Request(app, scope, body, phase, nth, shown).run(timeout_s)


class _Request:
    """One request and its client."""

    def __init__(self, app: ASGIApp, scope: Scope, body: bytes, phase: str, nth: int, shown: Shown) -> None:
        self._app = app
        self._scope = scope
        self._body: bytes | None = body
        self._phase = phase
        self._nth = nth
        self._shown = shown
        self._gone = asyncio.Event()
        self._seen = Departed()
        self._messages = 0
        self._task: asyncio.Task[None] | None = None

    async def run(self, timeout_s: float) -> Departed:
        """Play it, and tell what became of it."""
        self._task = asyncio.create_task(self._play(), name="asgi_metering departing client")
        done, _ = await asyncio.wait([self._task], timeout=timeout_s)
        if not done:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=timeout_s)
            raise TimeoutError(f"The application went on for {timeout_s} s after {self._seen}. Look what it waits for.")
        error = None if self._task.cancelled() else self._task.exception()
        if self._task.cancelled() or error is not None:
            self._seen.outcome = "cancelled" if error is None else "raised"
            self._seen.error = error
        return self._seen

    async def _play(self) -> None:
        await self._app(self._scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._phase == "before_start":
            self._leave()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if self._phase == "before_start" or (self._phase == "before_last" and last):
            self._leave()
        if self._gone.is_set():
            if self._shown == "send":
                raise OSError("The client has gone.")
        else:
            self._take(message, last)
        # As a server's does: who waits for the departure sees it before more is sent.
        await asyncio.sleep(0)

    def _take(self, message: Message, last: bool) -> None:
        if message["type"] == "http.response.start":
            self._seen.status, self._seen.headers = message["status"], list(message.get("headers", ()))
            if self._phase == "start":
                self._leave()
        elif message["type"] == "http.response.body":
            self._seen.body += message.get("body", b"")
            self._messages += 1
            if last or (self._phase == "body" and self._messages == self._nth):
                # A response that is whole is over for its client, whatever it wanted to do.
                self._leave(whole=last)

    def _leave(self, *, whole: bool = False) -> None:
        if self._gone.is_set():
            return
        self._gone.set()
        if self._shown == "cancel" and not whole and self._task is not None:
            self._task.cancel()
