"""
Framing of Amazon's binary event streams (``application/vnd.amazon.eventstream``), as Bedrock sends them.

Knows lengths, checksums, headers, and how a message's type and its JSON become one payload. Never knows what it means.

Sources: Amazon Transcribe's developer guide, "Event stream encoding" (four bytes of total length, four of header
length, their CRC-32, headers, payload, CRC-32 of all before), and botocore 1.44.5, ``eventstream.py`` (types of
headers). A ``chunk`` of InvokeModel holds the model's own JSON as base64.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import zlib
from typing import Final

from asgi_metering.usage.frames import MAX_PAYLOAD, Payload

__all__ = ["MAX_MESSAGE", "PRELUDE", "EventStreamFrames", "is_prelude"]

PRELUDE: Final = 12
"""Bytes of the two lengths and their checksum."""

_CHECKSUM: Final = 4

MAX_MESSAGE: Final = 16 << 20
"""Bytes of one message: Amazon sends payloads of at most 16 MiB. A longer one is no message, whatever its checksum."""

MAX_HEADERS: Final = 128 << 10
"""Bytes of the headers of one message, by the same guide."""

_SIZES: Final = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}
"""Bytes of a header's value by its type, of those that do not say it themselves (6 is bytes, 7 is text)."""

_LIKELY: Final = re.compile(rb"[\0\1](?=[\s\S]{3}\0[\0-\2])")
"""Where a prelude may begin: both lengths are far below what four bytes hold."""

_NAMES: Final = (":event-type", ":exception-type")


def is_prelude(data: bytes | bytearray) -> bool:
    """Whether *data* begins a message: two lengths that fit each other, and the checksum of both."""
    if len(data) < PRELUDE:
        return False
    total, headers = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
    fits = PRELUDE + _CHECKSUM + headers <= total <= MAX_MESSAGE and headers <= MAX_HEADERS
    return fits and zlib.crc32(data[:8]) == int.from_bytes(data[8:PRELUDE], "big")


class EventStreamFrames:
    """
    Cuts messages; one beyond `MAX_PAYLOAD` is passed over, for no such message of a model holds usage.

    Behind a gap the next prelude is looked for: JSON and base64 hold no bytes that could be one. A message that breaks
    its checksum is passed over whole, for its length has a checksum of its own.
    """

    __slots__ = ("_begun", "_lost", "_skip")

    ends = ()
    between = False

    def __init__(self) -> None:
        self._begun = bytearray()
        self._skip = 0
        self._lost = False

    def feed(self, chunk: bytes) -> list[Payload]:
        """Return the payloads of the messages that *chunk* ended."""
        if self._skip:
            passed = min(self._skip, len(chunk))
            self._skip -= passed
            chunk = chunk[passed:]
        begun = self._begun
        begun += chunk
        payloads: list[Payload] = []
        at = 0
        while len(begun) - at >= PRELUDE:
            if self._lost or not is_prelude(begun[at : at + PRELUDE]):
                at = self._find(at)
                if self._lost:
                    break
            size = int.from_bytes(begun[at : at + 4], "big")
            if len(begun) - at < size:
                if size > MAX_PAYLOAD:
                    self._skip = size - (len(begun) - at)
                    at = len(begun)
                break
            payloads += _read(bytes(begun[at : at + size]))
            at += size
        del begun[:at]
        return payloads

    def _find(self, at: int) -> int:
        """Return where the next prelude begins, or where to go on looking."""
        last = len(self._begun) - PRELUDE
        for match in _LIKELY.finditer(self._begun, at):
            if match.start() > last:
                break
            if is_prelude(self._begun[match.start() : match.start() + PRELUDE]):
                self._lost = False
                return match.start()
        self._lost = True
        return last + 1

    def gap(self) -> list[Payload]:
        """Forget the message that was begun, and look for the next one."""
        self._lost = True
        self._begun.clear()
        self._skip = 0
        return []

    def pending(self) -> None:
        """Nothing: a message counts once its checksum proved it."""


def _read(message: bytes) -> list[Payload]:
    """Return the payload of a message, if its checksum proves it and it has a type."""
    if zlib.crc32(message[:-_CHECKSUM]) != int.from_bytes(message[-_CHECKSUM:], "big"):
        return []
    body = PRELUDE + int.from_bytes(message[4:8], "big")
    headers = _headers(message[PRELUDE:body])
    kind = next((headers[name] for name in _NAMES if name in headers), None)
    return [] if kind is None else _payload(kind, message[body:-_CHECKSUM])


def _headers(data: bytes) -> dict[str, str]:
    """Return the headers that are text, by name, up to the first that cannot be followed."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        name = data[at + 1 : at + 1 + data[at]].decode("utf-8", "replace")
        at += 1 + data[at]
        kind = data[at] if at < len(data) else -1
        at += 1
        size = _SIZES.get(kind)
        if size is None:
            if kind not in (6, 7):
                break
            size = int.from_bytes(data[at : at + 2], "big")
            at += 2
        if kind == 7:
            found[name] = data[at : at + size].decode("utf-8", "replace")
        at += size
    return found


def _payload(kind: str, data: bytes) -> list[Payload]:
    """Put the type before its JSON, as the decoded form of a stream has it; of a ``chunk`` take what it holds."""
    if kind != "chunk":
        return [Payload(b"{" + json.dumps(kind).encode() + b":" + (data or b"null") + b"}")]
    try:
        return [Payload(base64.b64decode(json.loads(data)["bytes"], validate=True))]
    except (ValueError, TypeError, KeyError, RecursionError, binascii.Error):
        return []
