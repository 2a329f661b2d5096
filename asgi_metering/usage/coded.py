r"""
Framing of lines that are ``CODE:JSON``, one letter or digit each: the data stream of Vercel's AI SDK, v1.

Knows the codes' alphabet and line ends. Never knows what a code means: each line becomes an object with one field,
so that it is read as any other payload.

Source: @ai-sdk/ui-utils 1.2.11, ``formatDataStreamPart``; the stream's media type is ``text/plain``.
"""

from __future__ import annotations

import re
from typing import Final

from asgi_metering.usage.frames import LineFrames, Payload

__all__ = ["CODED", "PREFIX", "CodedFrames"]

PREFIX: Final = "vercel:"
"""Before the code in the field of a payload: no provider has such names."""

CODED: Final = re.compile(rb'[0-9a-k]:["{\[]')
"""How such a line begins; none of the codes' values is a number, true, false or null."""


class CodedFrames:
    """Cuts at line ends, and wraps each line that shows a code; others are no payload."""

    __slots__ = ("_lines",)

    # Marks are not searched for in lines that have not been wrapped.
    ends = ()
    between = False

    def __init__(self) -> None:
        self._lines = LineFrames()

    def feed(self, chunk: bytes) -> list[Payload]:
        """Return the lines that *chunk* ended."""
        return [wrapped for line in self._lines.feed(chunk) if (wrapped := _wrap(line)) is not None]

    def gap(self) -> list[Payload]:
        """Return the line that was begun; the next one may begin anywhere."""
        return [wrapped for line in self._lines.gap() if (wrapped := _wrap(line)) is not None]

    def pending(self) -> Payload | None:
        """Return the line that was begun."""
        line = self._lines.pending()
        return None if line is None else _wrap(line)


def _wrap(line: Payload) -> Payload | None:
    if line.torn:
        return line
    if not CODED.match(line.data):
        return None
    start = b'{"' + PREFIX.encode() + line.data[:1] + b'":' + line.data[2:]
    if line.tail is not None:
        return line._replace(data=start)
    return Payload(start + b"}")
