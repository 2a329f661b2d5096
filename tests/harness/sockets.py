"""
A WebSocket in process: a server and its client in one, message by message, as the test says.

Knows ASGI's messages for WebSockets and nothing of what the application does with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from starlette.types import ASGIApp, Message, Scope

from tests.harness.drive import DRIVE_TIMEOUT_S, websocket_scope

__all__ = ["DENIAL", "Socket"]

DENIAL: dict[str, dict[str, Any]] = {"websocket.http.response": {}}
"""The extension of servers that answer a WebSocket with an HTTP response."""


class Socket:
    """
    One connection to *app*, while the block runs.

    Args:
        app: The application.
        scope: A WebSocket's; or what `websocket_scope` takes, by name.

    Attributes:
        log: What the application sent.
        read: What the application was given, in order.
        task: Runs the application.
        failure: What it raised, once the block is over.
        is_gone: The client has vanished: `send` raises.
        breaks: What the server's `receive` raises once the application has said something.
        strict: The server takes nothing after the disconnect or the close, as uvicorn with `websockets`.
        stuck: The client does not read: `send` waits for this, while it is not set.
    """

    def __init__(self, app: ASGIApp, scope: Scope | None = None, *, path: str = "/ws", **options: Any) -> None:
        self._app = app
        self._scope = websocket_scope(path, **options) if scope is None else scope
        self._inbox: asyncio.Queue[Message] = asyncio.Queue()
        self.log: list[Message] = []
        self.read: list[Message] = []
        self.failure: BaseException | None = None
        self.is_gone = False
        self.breaks: Exception | None = None
        self.strict = False
        self.stuck = asyncio.Event()
        self.stuck.set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._inbox.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await asyncio.wait([self.task], timeout=DRIVE_TIMEOUT_S)
        ended = self.task.done()
        self.task.cancel()
        await asyncio.wait([self.task])
        if error is None:
            assert ended, f"The application still runs; it sent {self.log!r}."

    async def _run(self) -> None:
        try:
            await self._app(self._scope, self._receive, self._send)
        except BaseException as failure:
            self.failure = failure
        finally:
            self._changed.set()

    async def _receive(self) -> Message:
        message = await self._inbox.get() if self.breaks is None or not self.log else None
        if message is None:
            assert self.breaks is not None
            raise self.breaks
        self.read.append(message)
        return message

    async def _send(self, message: Message) -> None:
        await self.stuck.wait()
        told = [each["type"] for each in (*self.read, *self.log)]
        if self.strict and ("websocket.disconnect" in told or "websocket.close" in told):
            raise RuntimeError(f"Unexpected {message['type']}.")
        if self.is_gone:
            raise OSError("The client has gone.")
        self.log.append(dict(message))
        if message["type"] == "websocket.close":
            self._inbox.put_nowait(
                {"type": "websocket.disconnect", "code": message.get("code", 1000), "reason": message.get("reason")}
            )
        self._changed.set()

    # -- what the client does ------------------------------------------------------------------------------

    def say(self, *texts: str) -> None:
        """Send text frames."""
        for text in texts:
            self._inbox.put_nowait({"type": "websocket.receive", "text": text})

    def leave(self, code: int = 1000) -> None:
        """Close in good order by this code; 1006 is a client that vanishes."""
        self.is_gone = True
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": code, "reason": ""})

    def stop(self) -> None:
        """The server stops: it closes by 1012 and gives no reason, as uvicorn does (spec version 2.4)."""
        self.is_gone = True
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1012})

    async def until(self, condition: Callable[[], Any]) -> Any:
        """Wait until *condition* holds, looking whenever the application has done something."""
        async with asyncio.timeout(DRIVE_TIMEOUT_S):
            while not (found := condition()):
                self._changed.clear()
                waiting = asyncio.create_task(self._changed.wait())
                await asyncio.wait([waiting], timeout=0.01)
                waiting.cancel()
        return found

    async def opened(self) -> None:
        """Wait until the application has accepted."""
        await self.until(lambda: "accept" in self.kinds)

    async def heard(self, count: int) -> list[str]:
        """The texts that the client was sent, once there are *count*."""
        await self.until(lambda: len(self.texts) >= count)
        return self.texts

    # -- what the client sees ------------------------------------------------------------------------------

    @property
    def kinds(self) -> list[str]:
        """What the application sent, by type, without the prefix."""
        return [message["type"].removeprefix("websocket.") for message in self.log]

    @property
    def texts(self) -> list[str]:
        """The text frames."""
        return [message["text"] for message in self.log if message["type"] == "websocket.send"]

    @property
    def closed(self) -> tuple[int, str] | None:
        """Code and reason of the close."""
        for message in self.log:
            if message["type"] == "websocket.close":
                return message.get("code", 1000), message.get("reason") or ""
        return None
