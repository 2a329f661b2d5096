"""
The tap: keeps references to the chunks that pass to a client, for reading off the byte path.

On the path it only appends a reference. Reading happens in blocks, from the worker: usage and text are parsed there.
Never copies a chunk, never delays one, and what it keeps is bounded.
"""

from __future__ import annotations

from asgi_metering.usage import UsageReader

__all__ = ["Tap"]

MAX_WAITING = 1_048_576
"""Bytes of unread references per call: beyond it the middle is dropped, and text becomes an estimate."""


class Tap:
    """
    Watches one response body.

    Args:
        content_type, content_encoding: Of the response.
        dialect: The usage dialect where the shape would mislead; None detects it.
    """

    __slots__ = ("_reader", "_waiting", "_waiting_bytes")

    def __init__(self, content_type: str | None, content_encoding: str | None, dialect: str | None) -> None:
        self._reader = UsageReader(content_type, content_encoding, dialect, keep_text=True)
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def keep(self, chunk: bytes) -> None:
        """Keep a reference to a chunk that was sent."""
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._waiting_bytes > MAX_WAITING:
            self._shed()

    def _shed(self) -> None:
        """Nobody read for a while: the newest half stays, since final usage comes last."""
        kept = 0
        for at in range(len(self._waiting) - 1, -1, -1):
            kept += len(self._waiting[at])
            if kept > MAX_WAITING // 2:
                break
        dropped, self._waiting = self._waiting[:at], self._waiting[at:]
        if dropped:
            # The beginning of a body names its dialect and model, and carries some providers' input counts.
            self._reader.feed(dropped[0])
            self._reader.gap()
        self._waiting_bytes = sum(map(len, self._waiting))

    def read(self) -> UsageReader:
        """Parse what waits, and answer the reader."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        for chunk in waiting:
            self._reader.feed(chunk)
        return self._reader
