"""
The body of a request that brings an idempotency key: hashed as it passes to the app, and read ahead for a gate.

Gives the app every message once and in order, whoever read it. Keeps nothing that has passed, and at most a bounded
part of what has not. Does not know what a fingerprint is for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque

from asgi_metering.asgi.types import Message, Receive, Scope
from asgi_metering.keying import KEY_FIELD, BodyError

__all__ = ["MAX_AHEAD", "RequestBody", "has_key", "may_have_body"]

MAX_AHEAD = 1_048_576
"""
Bytes of a body that are read before the app asks for them. What the framework has read already is hashed whatever its
size: it is in memory anyway, or in a file.
"""

BODILESS = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
"""Methods whose requests have no body by custom (RFC 9110, section 9.3)."""

_FIELD = KEY_FIELD.encode("ascii")


def has_key(scope: Scope) -> bool:
    """Whether a request brings an idempotency key."""
    # A loop and no generator: every request whose body is read passes here.
    for field in scope.get("headers", ()):  # noqa: SIM110
        if field[0] == _FIELD:
            return True
    return False


def may_have_body(scope: Scope) -> bool:
    """Whether a body may follow: where the fields say so, and over HTTP/2 and later also where they say nothing."""
    for name, value in scope.get("headers", ()):
        if name == b"transfer-encoding":
            return True
        if name == b"content-length":
            return bool(value.strip(b" 0"))
    return scope.get("http_version", "1.1") not in ("1.0", "1.1") and scope["method"] not in BODILESS


class RequestBody:
    """
    One request's body.

    Args:
        scope: The connection's; read only.
        receive: The server's, of which nothing has been read.
    """

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._announced = _announced(scope)
        self._hash = hashlib.sha256()
        self._kept: deque[Message] = deque()
        self._ahead = 0  # bytes in them
        self._whole = False
        self._cut = False
        # One reader at a time: servers with queues would deal the messages out.
        self._turn = asyncio.Lock()

    async def receive(self) -> Message:
        """What the app calls: the server's messages, those read ahead first."""
        async with self._turn:
            return self._kept.popleft() if self._kept else await self._next()

    async def digest(self) -> bytes:
        """
        SHA-256 of the whole body, however it is split; what has not come yet is read ahead.

        Raises:
            BodyError: More than `MAX_AHEAD` bytes of it wait, or the client left before its end.
        """
        if not self._whole and self._announced > MAX_AHEAD:
            raise _too_large()
        while not self._whole:
            async with self._turn:
                if not self._whole:
                    await self._read_ahead()
        return self._hash.digest()

    async def _read_ahead(self) -> None:
        if not self._cut:
            message = await self._next()
            self._kept.append(message)
            self._ahead += len(message.get("body", b""))
        if self._cut:
            raise BodyError("The client left before the end of the request's body.")
        if self._ahead > MAX_AHEAD:
            raise _too_large()

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._hash.update(message.get("body", b""))
            self._whole = self._whole or not message.get("more_body", False)
        else:
            self._cut = True
        return message


def _announced(scope: Scope) -> int:
    """What the client says of the body's size; 0 where it does not."""
    for name, value in scope.get("headers", ()):
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _too_large() -> BodyError:
    return BodyError(
        f"The body is larger than {MAX_AHEAD} bytes, and this service reads it only after it has looked at the "
        f"Idempotency-Key."
    )
