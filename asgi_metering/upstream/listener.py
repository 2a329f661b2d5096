"""
What an upstream client tells about each HTTP exchange, and to whom.

Knows the shape of the listener. Never knows what a call is: the token that `started` hands out comes back as it
was, so whoever listens decides what it means.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from asgi_metering.usage.reader import UsageReader

__all__ = ["LiveUpstreamListener", "UpstreamListener"]


@runtime_checkable
class UpstreamListener(Protocol):
    """
    Hears of every HTTP exchange with a provider; a retry and a redirect are exchanges of their own.

    Order for one exchange: `started`, then `answered` once when the headers came, then `finished` once. An
    exchange that got no answer (refused connection, timeout, cancellation) is only `started`, so `started` must
    not reserve anything. Methods are called on the path of the response and must not block; what they raise is
    logged and dropped. `started` runs in the context of whoever sends; the others may run in another task or
    thread, so they must use the token and not look for the current call.
    """

    def started(self, provider: str) -> object:
        """Return what the other methods get as *token*: the current call, or `None`."""

    def answered(
        self, token: object, provider: str, status: int, headers: Iterable[tuple[bytes, bytes]], started_at: float
    ) -> None:
        """
        Take the headers of any answer, 429 and 5xx included, before its body is read.

        Args:
            token: What `started` returned; `None` if it raised.
            provider: The name that the transport was given.
            status: HTTP status.
            headers: Pairs as they came on the wire, any case.
            started_at: Epoch seconds at which the request was sent.
        """

    def finished(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """
        Take the usage that the body told, when the body ended, was closed or broke.

        A body that was not read to its end shows what had passed until then. An error's body is read too; it is
        for the listener to know that a retried 429 is no usage. A response that nobody reads or closes never ends.
        """


@runtime_checkable
class LiveUpstreamListener(UpstreamListener, Protocol):
    """
    A listener that also wants the reader while the body still passes.

    Heartbeats carry what was observed so far, and a call whose client left is settled before an abandoned
    upstream stream is closed: both need the reader before `finished`.
    """

    def body_started(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """Take the reader of a body that begins to pass, after `answered`; `finished` gets the same one."""
