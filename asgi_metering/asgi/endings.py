"""
Endings: what messages and exceptions say of how a response ends.

Pure readings of one message or one failure. Keeps nothing, sends nothing, and never decides what is charged.
"""

from __future__ import annotations

import asyncio

from asgi_metering.asgi.types import Message, Scope
from asgi_metering.asgi.watch import ClientGone
from asgi_metering.call import CallCut, CallRefused
from asgi_metering.rules.ending import Cause

__all__ = [
    "announced",
    "cause_of",
    "cause_of_close",
    "is_bare_end",
    "is_departure",
    "is_last",
    "is_refusal",
    "is_whole",
    "refusal_in",
    "stops",
]


def announced(start: Message) -> int | None:
    """How many bytes a response says it has; None where it does not."""
    for name, value in start["headers"]:
        # Text is no field, and the server's to refuse.
        if not isinstance(name, str) and bytes(name).lower() == b"content-length":
            length = bytes(value)
            return int(length) if length.isdigit() else None
    return None


def cause_of(failure: BaseException, finishing: bool) -> Cause:
    """
    What an exception of the app makes of a call that nothing else has ended.

    After the last message it is an error still, if it comes within the grace: `BaseHTTPMiddleware` fabricates that
    message, an empty one, for an app that broke (pitfall 24). Not asked for here are responses that nobody fabricates:
    a body in one message, a file by path, and as many bytes as ``Content-Length`` said. They are whole, and charged,
    whatever raises behind them, such as a background task.
    """
    if isinstance(failure, Exception) or not isinstance(failure, (asyncio.CancelledError, GeneratorExit)):
        return Cause.ERROR
    return Cause.COMPLETED if finishing else Cause.ABORTED


SAID_GOODBYE = frozenset({1000, 1001})
"""
Codes of a WebSocket whose client closed it and said so: normally, or going away (RFC 6455, section 7.4.1).

1005, a close without a code, is none: uvicorn and granian say it of connections that were lost, too.
"""

OWN_CODES = 3000
"""From here on they are of libraries and applications (RFC 6455, section 7.4.2)."""

RESTARTING = 1012
"""The server's own code when it stops (IANA registry of close codes). A client may send it as well."""

SAYS_SO = (2, 4)
"""The ASGI of servers that close by `RESTARTING` when they stop, uvicorn's; granian (2.3) and daphne (2.0) do not."""


def cause_of_close(message: Message, scope: Scope) -> Cause:
    """
    What ``websocket.disconnect`` says of the end: a goodbye, a server that stops, or a client that is gone.

    The codes from 3000 on are the application's: whoever sends one has closed in good order. hypercorn says 1006 of
    every end by a client. A client that sends the code of a server that stops is one that is gone, for it shall not
    choose what it is charged by; uvicorn gives a reason, an empty one at least, for closes of clients alone.
    """
    code = message.get("code")
    if code is None:
        return Cause.CLIENT_GONE
    if code in SAID_GOODBYE or code >= OWN_CODES:
        return Cause.COMPLETED
    is_servers_own = code == RESTARTING and "reason" not in message and _asgi_of(scope) >= SAYS_SO
    return Cause.ABORTED if is_servers_own else Cause.CLIENT_GONE


def _asgi_of(scope: Scope) -> tuple[int, ...]:
    """By which version of the ASGI specification its server speaks; 2.0 where it does not say."""
    version = str(scope.get("asgi", {}).get("spec_version", "2.0"))
    return tuple([int(part) for part in version.split(".") if part.isdecimal()])


def is_refusal(failure: BaseException | None) -> bool:
    """Whether *failure* is a refusal, was raised from one, or is a group of nothing else (pitfall 13)."""
    return refusal_in(failure) is not None


def refusal_in(failure: BaseException | None) -> CallRefused | None:
    """The refusal that *failure* is, or was raised from; the first one of a group of nothing else."""
    while failure is not None:
        if isinstance(failure, BaseExceptionGroup):
            found = [refusal_in(inner) for inner in failure.exceptions]
            return found[0] if all(found) else None
        if isinstance(failure, CallRefused):
            return failure
        failure = failure.__cause__
    return None


def is_departure(failure: BaseException) -> bool:
    """Whether *failure* says only that nobody reads any more: our words for it, Starlette's, or a group of these."""
    if isinstance(failure, BaseExceptionGroup):
        return all(is_departure(inner) for inner in failure.exceptions)
    # Not imported before they are needed: naming the middleware imports no framework.
    from anyio import BrokenResourceError, ClosedResourceError
    from starlette.requests import ClientDisconnect
    from starlette.websockets import WebSocketDisconnect

    # The last two are what the makers of a stream hear when its sender has stopped.
    nobody_reads = ClientDisconnect | WebSocketDisconnect | BrokenResourceError | ClosedResourceError
    return isinstance(failure, ClientGone | CallCut | nobody_reads)


def stops(failure: BaseException) -> bool:
    """Whether somebody wants the task or the process to end, which no answer may hold up."""
    if isinstance(failure, BaseExceptionGroup):
        return any(stops(inner) for inner in failure.exceptions)
    return isinstance(failure, _STOPPING)


_STOPPING = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)


def is_last(message: Message) -> bool:
    """Whether a response without trailers ends with *message*."""
    kind = message["type"]
    return kind == "http.response.pathsend" or (kind == "http.response.body" and not message.get("more_body", False))


def is_bare_end(message: Message) -> bool:
    """Whether *message* only says that the answer is over."""
    return message["type"] == "http.response.body" and is_last(message) and not message.get("body")


def is_whole(message: Message) -> bool:
    """Whether *message* begins an answer that is there as a whole, and no framework's answer to an exception."""
    begins = message["type"] == "http.response.start" and message["status"] < 500
    return begins and announced({"headers": (), **message}) is not None
