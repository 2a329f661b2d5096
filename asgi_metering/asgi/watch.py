"""
The watch: notices a client that left, for apps that never look.

Off by default. It reads ahead once the response has begun, at most one message of the request's body, and gives the
app every message in order: it never competes for `receive` (pitfall 27).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine

from asgi_metering.asgi.types import Message, Receive, Scope, Send

__all__ = ["ClientGone", "Watch", "unread_end"]

STUCK_S = 0.05
"""
What a `send` still gets when the client has left: hypercorn's HTTP/2 never returns from it then (pitfall 27).

Other servers return at once.
"""


class ClientGone(OSError):  # noqa: N818 -- the field's name for it
    """Raised from ``send`` to an app that would go on for a client that left."""


class Watch:
    """
    One request's watch.

    Args:
        scope: The connection's; read only.
        receive, send: The server's.

    Attributes:
        is_gone: The client has left.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._kept: deque[Message] = deque()
        self._reading = 0  # the app's own reads that wait for the server
        self._ahead: asyncio.Task[None] | None = None
        self._limit: asyncio.Timeout | None = None
        self._on_gone: Callable[[], None] | None = None
        # To read such a body is to ask the client for it, which is the app's to do.
        self._may_look = all(name.lower() != b"expect" for name, _ in scope.get("headers", ()))
        self.is_gone = False

    async def receive(self) -> Message:
        """What the app calls: the server's messages, those read ahead included."""
        while not self._kept:
            if self._ahead is None:
                return await self._receive_directly()
            await asyncio.shield(self._ahead)
        # After the disconnect there is nothing to come, and it repeats itself.
        message = self._kept[0] if self.is_gone and len(self._kept) == 1 else self._kept.popleft()
        self._look_ahead()
        return message

    async def _receive_directly(self) -> Message:
        self._reading += 1
        try:
            message = await self._receive()
            self._see(message)
        finally:
            self._reading -= 1
            self._look_ahead()
        return message

    async def send(self, message: Message) -> None:
        """
        Send; raises `ClientGone` where the server does not return although the client has left.

        One at a time, as apps send.
        """
        try:
            async with asyncio.timeout(STUCK_S if self.is_gone else None) as self._limit:
                await self._send(message)
        except TimeoutError as stuck:
            if self._limit is None or not self._limit.expired():
                raise
            raise ClientGone("The client has left, and the server does not take what is sent.") from stuck
        finally:
            self._limit = None

    def start(self, on_gone: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Begin to look; *on_gone* hears of the disconnect."""
        self._on_gone = on_gone
        self._loop = loop
        self._look_ahead()

    def _look_ahead(self) -> None:
        if self._on_gone is None or self._ahead is not None or self._reading or not self._may_look:
            return
        if not self.is_gone and not any(message.get("more_body", False) for message in self._kept):
            self._ahead = self._loop.create_task(self._next(), context=contextvars.Context())

    async def _next(self) -> None:
        try:
            message = await self._receive()
            self._kept.append(message)
            self._see(message)
        finally:
            self._ahead = None
        self._look_ahead()

    def _see(self, message: Message) -> None:
        if message["type"] != "http.disconnect":
            # The app reads it, or has it waiting: there is nothing to ask the client for any more.
            self._may_look = True
            return
        self.is_gone = True
        if self._on_gone is not None:
            self._on_gone()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + STUCK_S)

    def stop(self) -> None:
        """The request is over, or needs no watch any more: who has seen the client leave ends by itself."""
        if self._ahead is not None and not self.is_gone:
            self._ahead.cancel()


MOST_UNREAD = 1_000
"""Messages of a client that a server keeps before its disconnect: some dozens."""


def unread_end(receive: Receive, kind: str = "websocket.disconnect") -> Message | None:
    """
    The disconnect, of that *kind*, which the server has told and nobody read, if it is there at once; else None.

    For an application that is over: daphne cancels one that has not looked for ten seconds after its client left.
    """
    for _ in range(MOST_UNREAD):
        reading = receive()
        if not isinstance(reading, Coroutine):
            return None
        try:
            reading.send(None)
        except StopIteration as told:
            message: Message = told.value
            if message["type"] == kind:
                return message
        except BaseException:  # noqa: BLE001 -- whatever a server says to one reader too many, or to who is cancelled
            return None
        else:
            # It would have to wait.
            reading.close()
            return None
    return None
