"""
Framing: which bytes of a body are one payload. Server-sent events, JSON lines, or the whole body.

Knows line ends, fields, gaps and bounds. Never knows JSON, nor what a payload means. Every byte is looked at once,
however the body was cut; nothing grows beyond `MAX_PAYLOAD`.

Source: WHATWG HTML, "Server-sent events", 9.2.5 and 9.2.6, except that an unterminated last event may be looked at.
"""

from __future__ import annotations

import codecs
from typing import Final, NamedTuple, Protocol

__all__ = [
    "MAX_PAYLOAD",
    "TAIL",
    "BodyFrames",
    "EventFrames",
    "Frames",
    "LineFrames",
    "Payload",
    "ProseFrames",
]

MAX_PAYLOAD: Final = 1 << 20
"""Bytes of one payload that are kept whole: parsing 1 MiB of JSON takes 10 ms; images and vectors are larger."""

HEAD: Final = 1 << 14
"""Bytes kept from the beginning of a larger one: ids, the model and the type stand there."""

TAIL: Final = 1 << 16
"""Bytes kept from its end: usage stands behind the content in every dialect."""


class Payload(NamedTuple):
    """
    One payload, or what is left of it.

    Args:
        data: All of it; of one that was too large its beginning; of a torn one its end.
        tail: The end of one that was too large, else `None`.
        torn: The bytes before it were dropped, so that it may begin anywhere.
        last: It is the whole body.
        lost: Bytes between the beginning and the end of one that was too large.
        prose: A piece of a text without any format.
    """

    data: bytes
    tail: bytes | None = None
    torn: bool = False
    last: bool = False
    lost: int = 0
    prose: bool = False


class Frames(Protocol):
    """Cuts a body into payloads."""

    @property
    def ends(self) -> tuple[bytes, ...]:
        """Behind any of these bytes a payload is over, whatever stood before; empty where none tells it."""
        ...

    @property
    def between(self) -> bool:
        """Whether nothing is begun, so that whole payloads may be left out from here on without a trace."""
        ...

    def feed(self, chunk: bytes) -> list[Payload]:
        """Take the next bytes, and return the payloads that they ended."""
        ...

    def gap(self) -> list[Payload]:
        """Note that bytes were dropped here, and return what stood before them, unterminated."""
        ...

    def pending(self) -> Payload | None:
        """Return what has no end yet, without taking it."""
        ...


class _Clip:
    """Bytes of one payload: all of them up to `MAX_PAYLOAD`, past it a head and a rolling tail."""

    __slots__ = ("_bytes", "_head", "_size")

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._head: bytes | None = None
        self._size = 0

    def __bool__(self) -> bool:
        return bool(self._bytes) or self._head is not None

    def add(self, piece: bytes) -> None:
        self._bytes += piece
        self._size += len(piece)
        if self._head is None and len(self._bytes) > MAX_PAYLOAD:
            self._head = bytes(self._bytes[:HEAD])
        # Cutting only at twice the size makes the cost of a byte constant.
        if self._head is not None and len(self._bytes) > 2 * TAIL:
            del self._bytes[:-TAIL]

    def tear(self) -> None:
        """Keep the beginning, and start a new tail: bytes were dropped here."""
        if self._head is None:
            self._head = bytes(self._bytes[:HEAD])
        self._bytes.clear()

    def peek(self, *, torn: bool = False) -> Payload:
        if self._head is None:
            return Payload(bytes(self._bytes), None, torn)
        tail = bytes(self._bytes[-TAIL:])
        return Payload(self._head, tail, torn, lost=max(0, self._size - len(self._head) - len(tail)))

    def take(self, *, torn: bool = False) -> Payload:
        payload = self.peek(torn=torn)
        self._bytes.clear()
        self._head = None
        self._size = 0
        return payload


class LineFrames:
    r"""Cuts at line ends (``\n``, ``\r\n``, ``\r``): JSON lines, and the lines that events are made of."""

    __slots__ = ("_fresh", "_line", "_skip_lf", "_torn")

    ends = (b"\n",)

    def __init__(self) -> None:
        self._line = _Clip()
        self._fresh = True
        self._skip_lf = False
        self._torn = False

    @property
    def between(self) -> bool:
        """Whether no line is begun, and the next one is neither the first nor torn."""
        return not (self._line or self._torn or self._fresh)

    def feed(self, chunk: bytes) -> list[Payload]:
        """Return the lines that *chunk* ended, without their ends; empty lines too."""
        if not chunk:
            return []
        if self._skip_lf:
            # The chunk before ended in \r, which was an end already.
            self._skip_lf = False
            chunk = chunk.removeprefix(b"\n")
        lines: list[Payload] = []
        for piece in chunk.splitlines(keepends=True):
            line = piece.rstrip(b"\r\n")
            if len(line) == len(piece):
                self._line.add(piece)
                continue
            if self._line or len(line) > MAX_PAYLOAD:
                self._line.add(line)
                lines.append(self._end(self._line.take(torn=self._torn)))
            else:
                lines.append(self._end(Payload(line, None, self._torn)))
        self._skip_lf = chunk.endswith(b"\r")
        return lines

    def _end(self, line: Payload) -> Payload:
        self._torn = False
        if self._fresh:
            self._fresh = False
            return line._replace(data=line.data.removeprefix(codecs.BOM_UTF8))
        return line

    def gap(self) -> list[Payload]:
        """Return the line that was begun; the next one may begin anywhere."""
        begun = [self._end(self._line.take(torn=self._torn))] if self._line else []
        self._torn = True
        self._skip_lf = self._fresh = False
        return begun

    def pending(self) -> Payload | None:
        """Return the line that was begun."""
        if not self._line:
            return None
        line = self._line.peek(torn=self._torn)
        return line._replace(data=line.data.removeprefix(codecs.BOM_UTF8)) if self._fresh else line


class EventFrames:
    """Cuts server-sent events and returns their data; names, ids and comments carry nothing that we need."""

    __slots__ = ("_data", "_lines", "_size", "_spoiled")

    ends = (b"\n\n", b"\r\n\r\n")

    def __init__(self) -> None:
        self._lines = LineFrames()
        self._data: list[bytes] = []
        self._size = 0
        self._spoiled = False

    @property
    def between(self) -> bool:
        """Whether no event has data yet, and no line is begun."""
        return not (self._data or self._spoiled) and self._lines.between

    def feed(self, chunk: bytes) -> list[Payload]:
        """Return the data of the events that *chunk* ended."""
        payloads: list[Payload] = []
        for line in self._lines.feed(chunk):
            payload = self._take(line)
            if payload is not None:
                payloads.append(payload)
        return payloads

    def _take(self, line: Payload) -> Payload | None:
        if not line.data:
            return self._dispatch()
        value = _value_of(line)
        if value is None:
            return None
        if value.torn or value.tail is not None:
            # Only a piece of it is left, which goes out at once; the rest of its event says nothing by itself.
            self._spoiled = not value.torn
            return value
        self._size += len(value.data) + 1
        self._spoiled = self._spoiled or self._size > MAX_PAYLOAD
        self._data.append(value.data)
        if self._spoiled:
            self._data.clear()
        return None

    def _dispatch(self) -> Payload | None:
        data, self._data = self._data, []
        self._size = 0
        self._spoiled = False
        return Payload(b"\n".join(data)) if data else None

    def gap(self) -> list[Payload]:
        """Return the event that was begun; lines that follow may begin anywhere."""
        pending = self.pending()
        self._dispatch()
        self._lines.gap()
        return [pending] if pending is not None else []

    def pending(self) -> Payload | None:
        """Return the data of the event that was begun, its unterminated line included."""
        line = self._lines.pending()
        value = _value_of(line) if line is not None else None
        if value is not None and (value.torn or value.tail is not None):
            return value
        data = self._data if value is None else [*self._data, value.data]
        return Payload(b"\n".join(data)) if data and not self._spoiled else None


def _value_of(line: Payload) -> Payload | None:
    """Return the value of a ``data`` field, or a torn line as it is; `None` for comments and every other field."""
    data = line.data
    if data.startswith(b"data:"):
        return Payload(data[6:] if data[5:6] == b" " else data[5:], line.tail, lost=line.lost)
    if data == b"data":
        return Payload(b"")
    return line if line.torn else None


class BodyFrames:
    """Keeps the whole body as one payload, which is never ended: its reader asks for what is pending."""

    __slots__ = ("_body",)

    ends = ()
    between = False

    def __init__(self) -> None:
        self._body = _Clip()

    def feed(self, chunk: bytes) -> list[Payload]:
        """Keep *chunk*; nothing ends here."""
        self._body.add(chunk)
        return []

    def gap(self) -> list[Payload]:
        """Keep the beginning only; what follows is the end of the same payload."""
        self._body.tear()
        return []

    def pending(self) -> Payload | None:
        """Return the body so far."""
        return self._body.peek()._replace(last=True) if self._body else None


class ProseFrames:
    """Text without a format, such as ``text/html``: each chunk is a payload, cut between characters of UTF-8."""

    __slots__ = ("_decoder",)

    ends = ()
    between = False

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, chunk: bytes) -> list[Payload]:
        """Return the characters that are whole."""
        data = self._decoder.decode(chunk).encode()
        return [Payload(data, prose=True)] if data else []

    def gap(self) -> list[Payload]:
        """Forget the character that was cut."""
        self._decoder.reset()
        return []

    def pending(self) -> None:
        """Nothing: less than a character waits."""
