"""
The tap: keeps references to the chunks that pass to a client, for reading off the byte path.

On the path it only appends a reference. Usage is read when somebody asks for it, and the text of a stream only when
it is needed to tell what was delivered: at heartbeats, and at the end of a stream that broke. Never delays a chunk,
and what it keeps is bounded.
"""

from __future__ import annotations

from asgi_metering.usage import UsageReader, UsageReport

__all__ = ["Tap"]

BLOCK = 262_144
"""Bytes of references after which the worker reads them: most answers of models end before."""

MAX_WAITING = 1_048_576
"""Bytes of references that wait at most: beyond it the middle is dropped, and text becomes an estimate."""

SAMPLE = 32_768
"""Bytes read of what is dropped, for how dense its text is: a fraction of a millisecond for each half of the bound."""


class Tap:
    """
    Watches one response body.

    Args:
        content_type, content_encoding: Of the response.
        dialect: The usage dialect where the shape would mislead; None detects it.
    """

    __slots__ = ("_bytes", "_chunks", "_for_text", "_for_usage", "_usage_at")

    def __init__(self, content_type: str | None, content_encoding: str | None, dialect: str | None) -> None:
        # Two readers of the same chunks: looking for usage alone skips what looking for text has to parse.
        self._for_usage = UsageReader(content_type, content_encoding, dialect)
        self._for_text = UsageReader(content_type, content_encoding, dialect, keep_text=True)
        self._chunks: list[bytes] = []
        self._bytes = 0
        self._usage_at = 0

    def keep(self, chunk: bytes) -> None:
        """Keep a reference to a chunk that was sent."""
        self._chunks.append(chunk)
        self._bytes += len(chunk)
        if self._bytes > MAX_WAITING:
            self._shed()

    def digest(self) -> None:
        """Read what waits, if it is a block; called from the worker now and then."""
        if self._bytes >= BLOCK:
            self.text_reader()

    def report(self) -> UsageReport | None:
        """What the body has reported so far; None if nothing."""
        for at in range(self._usage_at, len(self._chunks)):
            self._for_usage.feed(self._chunks[at])
        self._usage_at = len(self._chunks)
        return self._for_usage.report()

    def text_reader(self) -> UsageReader:
        """The reader that has seen every chunk and keeps its text."""
        self.report()
        for chunk in self._chunks:
            self._for_text.feed(chunk)
        self._chunks.clear()
        self._bytes = self._usage_at = 0
        return self._for_text

    def _shed(self) -> None:
        """
        Nobody read for a while: the newest half stays, since final usage comes last.

        Of the text that is dropped the beginning is read, and the rest counts by its bytes as equally dense: past the
        bound the observation is an estimate from bytes (DESIGN 4), which nothing that passes later makes less.
        """
        self.report()
        kept, at = 0, len(self._chunks)
        while at > 0 and kept + len(self._chunks[at - 1]) <= MAX_WAITING // 2:
            at -= 1
            kept += len(self._chunks[at])
        sampled = lost = 0
        for chunk in self._chunks[:at]:
            # Whole chunks where they are no larger: most servers of streams send an event in each.
            read = chunk[:SAMPLE] if sampled < SAMPLE else b""
            if read:
                self._for_text.feed(read)
            sampled += len(read)
            lost += len(chunk) - len(read)
        self._for_text.gap(lost)
        del self._chunks[:at]
        self._usage_at = len(self._chunks)
        self._bytes = kept
