"""
Sniffing: which framing a body has, told by its first bytes, and by its media type only where they leave it open.

Knows how events, lines, JSON and binary event streams begin. Never knows what they say. A media type that is wrong or
missing costs nothing: usage that is there is found (reference `usage-payloads`, section 5).
"""

from __future__ import annotations

import codecs
import re
from enum import Enum
from typing import Final

from asgi_metering.usage.coded import CODED, CodedFrames
from asgi_metering.usage.eventstream import PRELUDE, EventStreamFrames, is_prelude
from asgi_metering.usage.frames import (
    MAX_PAYLOAD,
    BodyFrames,
    EventFrames,
    Frames,
    LineFrames,
    Payload,
    ProseFrames,
)

__all__ = ["SNIFFED", "JsonFrames", "Media", "SniffingFrames", "media_of"]

SNIFFED: Final = 64
"""Bytes of a beginning by which every framing shows itself; white space before it is passed over."""


class Media(Enum):
    """What a media type says of a body."""

    EVENTS = "events"
    LINES = "lines"
    JSON = "json"
    UNSAID = "unsaid"  # none, or text/plain, which many frameworks send for want of another
    TEXT = "text"
    BINARY = "binary"  # images, voices, archives: whose bytes are nobody's words


_LINES: Final = ("ndjson", "jsonl", "jsonlines", "json-lines", "json-seq", "stream+json")
_PROSE: Final = ("xml", "yaml", "javascript")


def media_of(content_type: str | None) -> Media:
    """Return what *content_type* says, its parameters aside."""
    media = (content_type or "").partition(";")[0].strip().lower()
    if media == "text/event-stream":
        return Media.EVENTS
    if media.endswith(_LINES):
        return Media.LINES
    if media == "application/json" or media.endswith("+json"):
        return Media.JSON
    if media in ("", "text/plain"):
        return Media.UNSAID
    return Media.TEXT if media.startswith("text/") or media.endswith(_PROSE) else Media.BINARY


_LINE_END: Final = re.compile(rb"[\r\n]")
_INK: Final = re.compile(rb"\S")


class _Chooser:
    """Frames that are chosen when the body has shown what it is; before that there are none."""

    __slots__ = ("_frames",)

    def __init__(self) -> None:
        self._frames: Frames | None = None

    @property
    def ends(self) -> tuple[bytes, ...]:
        """Those of the chosen frames."""
        return self._frames.ends if self._frames is not None else ()

    @property
    def between(self) -> bool:
        """Whether the chosen frames are between payloads."""
        return self._frames is not None and self._frames.between


class JsonFrames(_Chooser):
    """
    What begins as a JSON object: the whole body, or the first of many lines.

    A line that closes its object, before another that opens one, was a line: no JSON text has ``}`` before ``{``.

    Args:
        lines: The media type says that they are lines: one without an end is no whole body.
    """

    __slots__ = ("_begun", "_end", "_lines", "_looked")

    def __init__(self, *, lines: bool) -> None:
        super().__init__()
        self._begun = bytearray()
        self._lines = lines
        self._looked = 0
        self._end = -1

    @property
    def streams(self) -> bool:
        """Whether these are lines, as far as is known."""
        return isinstance(self._frames, LineFrames) or (self._frames is None and self._lines)

    def feed(self, chunk: bytes) -> list[Payload]:
        """Pass the bytes on once it is clear to whom."""
        if self._frames is not None:
            return self._frames.feed(chunk)
        begun = self._begun
        begun += chunk
        if self._looked == 0:
            # Blank lines before it are no lines.
            self._looked = begun.find(b"{") + 1
        if self._end < 0 and (end := _LINE_END.search(begun, self._looked)):
            self._end = end.start()
            self._looked = self._end
        ink = _INK.search(begun, self._looked) if self._end >= 0 else None
        if ink is not None:
            closed = begun[: self._end].rstrip().endswith(b"}")
            return self._choose(LineFrames() if closed and ink[0] == b"{" else BodyFrames())
        self._looked = len(begun)
        return self._choose(BodyFrames()) if len(begun) > MAX_PAYLOAD else []

    def _choose(self, frames: Frames) -> list[Payload]:
        self._frames = frames
        begun, self._begun = bytes(self._begun), bytearray()
        return frames.feed(begun)

    def gap(self) -> list[Payload]:
        """Pass the gap on, to what the media type says where nothing else does."""
        before: list[Payload] = []
        if self._frames is None:
            before = self._choose(LineFrames() if self._lines else BodyFrames())
        return before + self._frames.gap() if self._frames is not None else before

    def pending(self) -> Payload | None:
        """Return what has no end yet, which of a body is all of it."""
        if self._frames is not None:
            return self._frames.pending()
        return Payload(bytes(self._begun), last=not self._lines) if self._begun else None


_CODE: Final = re.compile(rb"[0-9a-k]:?")
_FIELDS: Final = (b"data:", b"event:")
_SURE: Final = (*_FIELDS, b": ")
_EVENT_STARTS: Final = (*_FIELDS, b"id:", b"retry:", b":")
_LOOSE: Final = frozenset({Media.EVENTS, Media.LINES, Media.JSON, Media.UNSAID})
"""Where a beginning that a text might have as well is an event's."""


class SniffingFrames(_Chooser):
    """
    Decides by the first bytes, and by the media type where they are nobody's.

    Args:
        media: What the media type says.
        prose: Return what shows no format as text; without it that is not read.

    Attributes:
        nothing: It is settled that there is nothing to be read.
    """

    __slots__ = ("_media", "_prose", "_start", "nothing")

    def __init__(self, media: Media = Media.UNSAID, *, prose: bool = False) -> None:
        super().__init__()
        self._start = b""
        self._media = media
        self._prose = prose and media is not Media.BINARY
        self.nothing = False

    @property
    def undecided(self) -> bool:
        """Whether nothing has shown itself yet."""
        return self._frames is None and not self.nothing

    @property
    def streams(self) -> bool:
        """Whether the body is one of events or lines, as far as is known."""
        frames = self._frames
        if frames is None:
            return self._media in (Media.EVENTS, Media.LINES)
        if isinstance(frames, JsonFrames):
            return frames.streams
        return isinstance(frames, EventFrames | LineFrames | CodedFrames | EventStreamFrames)

    def feed(self, chunk: bytes) -> list[Payload]:
        """Pass the bytes on once it is clear to whom."""
        if self._frames is not None:
            return self._frames.feed(chunk)
        if self.nothing:
            return []
        chunk = self._start + chunk
        ink = _INK.search(chunk, len(codecs.BOM_UTF8) if chunk.startswith(codecs.BOM_UTF8) else 0)
        start = chunk[ink.start() : ink.start() + SNIFFED] if ink is not None else b""
        self._frames = self._sniff(start)
        if self._frames is None:
            self._settle(chunk, start)
        else:
            self._start = b""
        return self._frames.feed(chunk) if self._frames is not None else []

    def _sniff(self, start: bytes) -> Frames | None:
        """Return the framing that *start* shows."""
        media = self._media
        if start.startswith(_EVENT_STARTS if media in _LOOSE else _SURE):
            return EventFrames()
        if start.startswith(b"{"):
            return JsonFrames(lines=media is Media.LINES)
        if start.startswith(b"["):
            return LineFrames() if media is Media.LINES else BodyFrames()
        if CODED.match(start):
            return CodedFrames()
        return EventStreamFrames() if is_prelude(start) else None

    def _settle(self, chunk: bytes, start: bytes) -> None:
        """Wait for more, while a framing may still show itself; else it is what the media type says."""
        if not start:
            # White space is no beginning, however much of it comes.
            self._start = chunk[-SNIFFED:] if len(chunk) > SNIFFED else chunk
            return
        undecided = len(start) < PRELUDE and (
            any(mark.startswith(start) for mark in _EVENT_STARTS)
            or _CODE.fullmatch(start)
            or start[0] == 0
            or codecs.BOM_UTF8.startswith(start)
        )
        if undecided:
            self._start = chunk
            return
        self._start = b""
        self._frames = self._said()
        self.nothing = self._frames is None

    def _said(self) -> Frames | None:
        if self._media is Media.EVENTS:
            return EventFrames()
        if self._media is Media.LINES:
            return LineFrames()
        if self._media is Media.JSON:
            return BodyFrames()
        return ProseFrames() if self._prose else None

    def gap(self) -> list[Payload]:
        """Pass the gap on; a body that has not shown itself before one is what its media type says."""
        if self._frames is None and not self.nothing:
            self._frames = self._said()
            self.nothing = self._frames is None
            start, self._start = self._start, b""
            if self._frames is not None:
                return self._frames.feed(start) + self._frames.gap()
        return self._frames.gap() if self._frames is not None else []

    def pending(self) -> Payload | None:
        """Return what the chosen frames hold; of a body that has not shown itself yet what came, as text."""
        if self._frames is not None:
            return self._frames.pending()
        return Payload(self._start, prose=True) if self._prose and self._start.strip() else None
