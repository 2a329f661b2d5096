"""
Keeping the beginning of a refusal's body as it passes, because some providers say their limits there alone.

Knows how much of it is read. Never knows what it says, and holds back no byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from asgi_metering.quotas.bodies import MAX_BODY
from asgi_metering.upstream.patient import PatientReader
from asgi_metering.usage.inflate import Inflate
from asgi_metering.usage.reader import UsageReader

if TYPE_CHECKING:
    from httpx2 import Response

__all__ = ["REFUSED_FROM", "AnswerReader", "RefusalReader"]

REFUSED_FROM = 400
"""The first status of answers that refuse."""


class AnswerReader(PatientReader):
    """
    A reader that knows when its request was sent, should the answer refuse what it began with.

    Args:
        content_type, encoding, usage_dialect: See `PatientReader`.
        started_at: Epoch seconds.
    """

    __slots__ = ("started_at",)

    def __init__(
        self, content_type: str | None, encoding: str | None, usage_dialect: str | None, started_at: float
    ) -> None:
        super().__init__(content_type, encoding, usage_dialect)
        self.started_at = started_at


class RefusalReader(UsageReader):
    """
    A reader that also keeps the first `MAX_BODY` bytes.

    Args:
        response: Whose body it is.
        encoding: Its content coding, or None.
        usage_dialect: See `UsageReader`.
        started_at: Epoch seconds at which the request was sent.

    Attributes:
        headers: Of the answer, as they came.
        started_at: See above.
    """

    __slots__ = ("_begin", "_plain", "headers", "started_at")

    def __init__(self, response: Response, encoding: str | None, usage_dialect: str | None, started_at: float) -> None:
        super().__init__(response.headers.get("content-type"), encoding, usage_dialect)
        self.headers: Iterable[tuple[bytes, bytes]] = response.headers.raw
        self.started_at = started_at
        self._plain = Inflate(encoding)
        self._begin = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes, as `UsageReader.feed`."""
        super().feed(chunk)
        if len(self._begin) < MAX_BODY:
            for piece in self._plain.feed(bytes(chunk)):
                self._begin += piece[: MAX_BODY - len(self._begin)]

    def feed_many(self, chunks: Sequence[bytes]) -> None:
        """Take several chunks."""
        for chunk in chunks:
            self.feed(chunk)

    @property
    def body(self) -> bytes:
        """What was kept so far, without content codings."""
        return bytes(self._begin)
