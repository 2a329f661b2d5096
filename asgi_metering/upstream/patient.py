"""
Reading the body of an answer not as it passes, but when somebody asks what it told.

Knows what is kept until then, and how much of it. Never knows what it says: that is the reader's that it builds on.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence

from asgi_metering.usage.reader import UsageReader
from asgi_metering.usage.texts import Heard
from asgi_metering.usage.values import UsageReport

__all__ = ["MAX_UNHEARD", "READ_AT_ONCE", "PatientReader"]

READ_AT_ONCE = 16_384
"""Bytes that are looked through for usage together, for each chunk alone costs more than all that it holds."""

MAX_UNHEARD = 262_144
"""
Bytes whose text nobody has asked for that are kept, as most answers end before; from then on the oldest is read.

Of a compressed body it is those that it expands to: whoever asks waits until all of them are read.
"""

_logger = logging.getLogger("asgi_metering.upstream")


class PatientReader(UsageReader):
    """
    A reader that keeps references to what passes, and reads it for usage in blocks, or before it answers.

    Text is read when somebody asks for it: an answer that reports its usage has none that anybody needs, and to read
    it costs a hundred times as much. Nothing is dropped. Several threads may ask while one feeds it.

    Args:
        content_type, content_encoding, dialect: As of `UsageReader`.
    """

    __slots__ = (
        "_fails",
        "_kind",
        "_lock",
        "_size",
        "_sizes",
        "_unheard",
        "_unheard_size",
        "_waiting",
        "_wants_text",
        "_words",
    )

    def __init__(
        self, content_type: str | None = None, content_encoding: str | None = None, dialect: str | None = None
    ) -> None:
        super().__init__(content_type, content_encoding, dialect)
        self._kind = content_type, content_encoding, dialect
        self._lock = threading.RLock()
        self._waiting: list[bytes] = []
        self._size = 0  # bytes in them, or a few less or more while another thread reads
        self._wants_text = self._fails = False
        self._words: UsageReader | None = None
        self._unheard: deque[bytes] = deque()
        self._sizes: deque[int] = deque()  # what each of them is to read
        self._unheard_size = 0

    def keep_text(self) -> None:
        """Gather the text; to be said before the body begins."""
        self._wants_text = True

    def forget_text(self) -> None:
        """Give up the text: what the body reported makes it needless."""
        with self._lock:
            self._wants_text = False
            self._words = None
            self._unheard.clear()
            self._sizes.clear()
            self._unheard_size = 0

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body."""
        self._waiting.append(bytes(chunk))
        self._size += len(chunk)
        if self._size >= READ_AT_ONCE:
            self._read_on()

    def feed_many(self, chunks: Sequence[bytes]) -> None:
        """Take several chunks."""
        for chunk in chunks:
            self.feed(chunk)

    def _read_on(self) -> None:
        """Read what waits."""
        with self._lock:
            # Another thread may feed meanwhile: what it adds stays.
            count = len(self._waiting)
            if not count:
                return
            chunks = self._waiting[:count]
            del self._waiting[:count]
            self._size = 0
            # Where a coding breaks is told by the chunk that it breaks in.
            for some in [[chunk] for chunk in chunks] if self._inflate.active else [chunks]:
                self._look_through(some)

    def _look_through(self, chunks: Sequence[bytes]) -> None:
        if self._fails:
            return
        before = self._inflate.expanded
        try:
            super().feed_many(chunks)
        except Exception as failure:  # noqa: BLE001 -- a dialect's, which may be one of the application's own
            self._failed(failure)
            return
        if self._wants_text:
            data = b"".join(chunks)
            size = max(len(data), self._inflate.expanded - before)
            self._unheard.append(data)
            self._sizes.append(size)
            self._unheard_size += size
            while self._unheard_size > MAX_UNHEARD:
                self._listen()

    def _listen(self) -> None:
        """Read the oldest text that is kept."""
        if self._words is None:
            self._words = UsageReader(*self._kind)
            self._words.keep_text()
        data = self._unheard.popleft()
        self._unheard_size -= self._sizes.popleft()
        try:
            self._words.feed(data)
        except Exception as failure:  # noqa: BLE001 -- see above
            self._failed(failure)

    def _failed(self, failure: Exception) -> None:
        """What was told until then is all that is known."""
        self._fails = True
        self._unheard.clear()
        self._sizes.clear()
        self._unheard_size = 0
        _logger.error("An answer is not fully observed: its reader failed.", exc_info=failure)

    def gap(self, lost: int = 0) -> None:
        """Note that bytes were dropped here, as `UsageReader.gap`."""
        words = self._heard_by()
        super().gap(lost)
        if words is not None:
            words.gap(lost)

    def _heard_by(self) -> UsageReader | None:
        """Who has read all of the text; None where nobody wants it."""
        with self._lock:
            self._read_on()
            while self._unheard:
                self._listen()
            return self._words if self._wants_text else None

    def report(self) -> UsageReport | None:
        """Return what is known now, as `UsageReader.report`."""
        with self._lock:
            self._read_on()
            return super().report()

    def text(self) -> str:
        """Return the text so far, as `UsageReader.text`."""
        words = self._heard_by()
        return super().text() if words is None else words.text()

    def heard(self) -> Heard:
        """Return what the body said, as `UsageReader.heard`."""
        words = self._heard_by()
        return super().heard() if words is None else words.heard()

    @property
    def known(self) -> bool:
        """Whether a dialect recognised the body."""
        words = self._heard_by()
        return super().known if words is None else words.known

    @property
    def failure(self) -> bytes:
        """The first error that the body carried, as `UsageReader.failure`."""
        with self._lock:
            self._read_on()
            return super().failure

    @property
    def streams(self) -> bool:
        """Whether the body is one of events or lines."""
        with self._lock:
            self._read_on()
            return super().streams

    @property
    def text_chars(self) -> int:
        """Characters of text that passed, kept or not."""
        words = self._heard_by()
        return super().text_chars if words is None else words.text_chars
