"""
The tap: keeps references to the chunks that pass to a client, for reading off the byte path.

On the path it only appends a reference. Usage is read when somebody asks for it, and the text of a stream only when
it is needed to tell what was delivered: at heartbeats, and at the end of a stream that broke. Never delays a chunk,
and what it keeps is bounded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from asgi_metering.usage import UsageReader, UsageReport

__all__ = ["Tap"]

BLOCK = 524_288
"""
Bytes of references beyond which the worker reads the oldest: most answers of models end before, at some 2,000 words.

Text costs ten times as much to read as all else of a stream, and one that reports its usage has none to be read.
"""

MAX_WAITING = 1_048_576
"""Bytes of references that wait at most, and what passes between two checkpoints: beyond it the middle is dropped."""

SLICE = 32_768
"""Bytes whose text is read in one turn of the event loop, which takes some 3 ms."""

PACKED_SLICE = 4_096
"""The same of a compressed body, which are several times as many when they are read."""

SAMPLE = 8_192
"""Bytes kept of what is dropped, to tell how dense its text is: tens of a model's events."""

MAX_SAMPLE = 32_768
"""Bytes of one chunk that are kept for it: of an event that is cut nobody can tell how much of it is text."""


class Tap:
    """
    Watches one response body.

    Args:
        content_type, content_encoding: Of the response.
        dialect: The usage dialect where the shape would mislead; None detects it.

    Attributes:
        keep: Keeps a reference to a chunk that was sent: all that happens for each of them.
    """

    __slots__ = ("_chunks", "_dropped", "_for_text", "_for_usage", "_kind", "_noted", "_sheds", "_usage_at", "keep")

    answers = None

    def __init__(self, content_type: str | None, content_encoding: str | None, dialect: str | None) -> None:
        # Two readers of the same chunks: looking for usage alone skips what looking for text has to parse.
        self._kind = content_type, content_encoding, dialect
        self._for_usage = UsageReader(*self._kind)
        self._for_text: UsageReader | None = None
        # One list for good, which is emptied and never replaced: `keep` is its own method.
        self._chunks: list[bytes] = []
        self.keep: Callable[[bytes], None] = self._chunks.append
        # Bytes that wait, as far as they were noted: below zero where some were read before.
        self._noted = 0
        self._usage_at = 0
        self._sheds = 0
        # Of what was dropped and whose text is not read yet: a sample, and how much more there was.
        self._dropped: list[tuple[bytes, int]] = []

    def passed(self, count: int) -> None:
        """
        Note that *count* more bytes were kept since the last time; called at the checkpoints of a long body.

        Usage is read here, since at the bound it has to be: of so many bytes in a millisecond or two, never of more.
        """
        self._read_usage()
        self._noted += count
        if self._noted > MAX_WAITING:
            self._shed()

    def digest(self) -> bool:
        """Read a slice of what waits beyond a block, the oldest first; whether more of it waits."""
        beyond = self._waiting() - BLOCK
        return beyond >= 0 and beyond >= self._read_slice(beyond)

    def report(self) -> UsageReport | None:
        """What the body has reported so far; None if nothing."""
        self._read_usage()
        return self._for_usage.report()

    async def read_on(self) -> None:
        """
        Read the text of what waits, in slices, with a turn of the event loop behind each; what comes meanwhile waits.

        Of a stream that broke half a megabyte may wait, and to read that takes fifty milliseconds.
        """
        left = self._waiting() - self._slice
        while left > 0:
            left -= self._read_slice(left)
            await asyncio.sleep(0)

    @property
    def _slice(self) -> int:
        return PACKED_SLICE if self._kind[1] else SLICE

    def _read_slice(self, most: int) -> int:
        """Read the text of the oldest chunks, *most* bytes or one chunk; how many bytes that were is returned."""
        most = min(most, self._slice)
        count = size = 0
        for chunk in self._chunks:
            if count and size + len(chunk) > most:
                break
            count, size = count + 1, size + len(chunk)
        self._read_usage()
        self._read_text(count)
        return size

    def text_reader(self) -> UsageReader:
        """The reader that has seen every chunk and keeps its text."""
        self._read_usage()
        return self._read_text(len(self._chunks))

    def _read_text(self, count: int) -> UsageReader:
        """Read the text of so many chunks, the oldest, which have been read for usage, and give them up."""
        reader = self._for_text = self._for_text or UsageReader(*self._kind, keep_text=True)
        for sample, lost in self._dropped:
            reader.feed(sample)
            reader.gap(lost)
        self._dropped.clear()
        chunks = self._chunks[:count]
        reader.feed_many(chunks)
        del self._chunks[:count]
        self._noted -= sum(map(len, chunks))
        self._usage_at = len(self._chunks)
        return reader

    def _waiting(self) -> int:
        return sum(map(len, self._chunks))

    def _read_usage(self) -> None:
        self._for_usage.feed_many(self._chunks[self._usage_at :])
        self._usage_at = len(self._chunks)

    def _shed(self) -> None:
        """
        Nobody read for a while: the newest half stays, since final usage comes last.

        Of the text that is dropped a sample is read, and the rest counts by its bytes as equally dense: past the bound
        the observation is an estimate from bytes (DESIGN 4), which nothing that passes later makes less.
        """
        surplus = self._noted - MAX_WAITING // 2
        at = dropped = 0
        for chunk in self._chunks:
            if dropped >= surplus:
                break
            at, dropped = at + 1, dropped + len(chunk)
        self._sheds += 1
        if self._sheds & (self._sheds - 1) == 0:
            # The first time, the second, the fourth, the eighth: of a stream without end no more than a few samples.
            sample = self._sample(at)
            self._dropped.append((sample, dropped - len(sample)))
        else:
            sample, lost = self._dropped.pop() if self._dropped else (b"", 0)
            self._dropped.append((sample, lost + dropped))
        del self._chunks[:at]
        self._usage_at = len(self._chunks)
        self._noted -= dropped

    def _sample(self, end: int) -> bytes:
        """The first of the chunks before *end*: whole ones if possible, since most servers send an event in each."""
        sample = bytearray()
        for chunk in self._chunks[:end]:
            if len(sample) >= SAMPLE:
                break
            sample += chunk[:MAX_SAMPLE]
        return bytes(sample)
