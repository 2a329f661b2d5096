"""
The watch: notices a client that left, for apps that never look.

Off by default. It reads ahead only once the app has read the whole request, and gives the app every message in
order: it never competes for `receive` (pitfall 27).
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable

from asgi_metering.asgi.types import Message, Receive

__all__ = ["Watch"]


class Watch:
    """
    One request's watch.

    Args:
        receive: The server's.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._consumed = False
        self._ahead: asyncio.Task[Message] | None = None
        self._on_gone: Callable[[], None] | None = None
        self.is_gone = False

    async def receive(self) -> Message:
        """What the app calls: the server's messages, those read ahead included."""
        if self._ahead is not None:
            # After the request's end there is one message left to come, and it repeats itself.
            return await asyncio.shield(self._ahead)
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body", False):
            self._consumed = True
            self._look_ahead()
        return message

    def start(self, on_gone: Callable[[], None], loop: asyncio.AbstractEventLoop) -> None:
        """Begin to look, as soon as the request is read; *on_gone* hears of the disconnect."""
        self._on_gone = on_gone
        self._loop = loop
        self._look_ahead()

    def _look_ahead(self) -> None:
        if self._consumed and self._on_gone is not None and self._ahead is None:
            self._ahead = self._loop.create_task(self._next(), context=contextvars.Context())

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.is_gone = True
            if self._on_gone is not None:
                self._on_gone()
        return message

    def stop(self) -> None:
        """The request is over."""
        if self._ahead is not None:
            self._ahead.cancel()
