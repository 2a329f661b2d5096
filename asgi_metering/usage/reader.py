"""
Reading usage, and the text that passed, out of one response body.

Knows how bytes become a report: decoding, framing, parsing what may matter, asking the dialect. Never knows a
provider's fields, who pays, nor what is charged. No I/O, nothing awaits, and nothing that a body holds raises.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any, Final

from asgi_metering.usage.dialects import DIALECTS, detect, detect_usage, marks, named
from asgi_metering.usage.frames import BodyFrames, EventFrames, Frames, LineFrames, Payload, SniffingFrames
from asgi_metering.usage.inflate import Inflate
from asgi_metering.usage.notes import Dialect, Json, Notes, objects
from asgi_metering.usage.values import UsageReport

__all__ = ["MAX_TEXT", "UsageReader"]

MAX_TEXT: Final = 200_000
"""Characters of text that are kept: more is not tokenised anyway (see `tokens`), only counted."""

INTRODUCTION: Final = 32
"""Payloads parsed whatever they hold, until the dialect and the model are known: they come in the first events."""

MAX_CANDIDATES: Final = 8
"""Usage objects tried in a piece of a payload, from its end."""

_LINES: Final = ("ndjson", "jsonl", "jsonlines", "json-lines", "json-seq", "stream+json")
_DONE: Final = b"[DONE]"
MAX_DONE: Final = 16
"""Bytes of an end mark with white space around it."""

_ERROR: Final = re.compile(rb'"error"')
_USAGE_KEY: Final = re.compile(
    '"(?:' + "|".join(sorted({re.escape(dialect.usage_key) for dialect in DIALECTS.values()})) + r')"\s*:\s*(?=\{)'
)
_MODEL: Final = re.compile(r'"(?:model|modelVersion)"\s*:\s*"([^"\\]+)"')
_ID: Final = re.compile(r'"(?:id|responseId)"\s*:\s*"([^"\\]+)"')
_TYPE: Final = re.compile(r'"(?:object|type)"\s*:\s*"([^"\\]+)"')


def _constant(_name: str) -> None:
    """Read NaN and Infinity, which are not JSON, as null: nothing was reported."""


_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=_constant)


def _parse(data: bytes) -> Any:
    """Parse JSON from an untrusted source; `None` for what is none, or nested too deep, or has an endless number."""
    try:
        return _DECODER.decode(data.decode("utf-8", "replace").removeprefix("\ufeff"))
    except (ValueError, RecursionError, ArithmeticError):
        return None


def _frames_for(content_type: str | None) -> Frames | None:
    """Choose the framing by media type; `None` for one that holds no usage that we can read."""
    media = (content_type or "").partition(";")[0].strip().lower()
    if media == "text/event-stream":
        return EventFrames()
    if media.endswith(_LINES):
        return LineFrames()
    if media == "application/json" or media.endswith("+json"):
        return BodyFrames()
    return SniffingFrames() if media in ("", "text/plain") else None


class _Text:
    """The text that passed: kept up to `MAX_TEXT` characters, counted beyond."""

    __slots__ = ("chars", "kept", "parts")

    def __init__(self, kept: int = 0) -> None:
        self.parts: list[str] = []
        self.kept = kept
        self.chars = 0

    def add(self, part: str) -> None:
        self.chars += len(part)
        room = MAX_TEXT - self.kept
        if room > 0:
            self.parts.append(part[:room])
            self.kept += min(len(part), room)


def _join(parts: list[str]) -> str:
    joined = "".join(parts)
    try:
        joined.encode()
    except UnicodeEncodeError:
        # A pair of surrogates may have been cut between two deltas: joined, it is one character again.
        return joined.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return joined


class UsageReader:
    """
    Reads one response body, chunk by chunk, in whatever pieces it comes. Not safe for several threads at once.

    Args:
        content_type: The response's ``Content-Type``; without one (or with ``text/plain``) the first bytes decide.
        content_encoding: The response's ``Content-Encoding``; gzip and deflate are followed.
        dialect: A name out of `dialects.DIALECTS`, which overrides detection: an OpenAI-shaped gateway before another
            provider counts as OpenAI does.
        keep_text: Gather the text as well (`text`), for the tokenizer.

    Raises:
        ConfigurationError: There is no dialect of that name.

    Memory: about 1 MiB of an unfinished payload, and `MAX_TEXT` characters. Cost: each byte once; a payload is parsed
    only if it can hold usage, an end, an error, or text that is wanted.
    """

    __slots__ = ("_fixed", "_frames", "_gapped", "_inflate", "_keep_text", "_notes", "_peeked", "_text")

    def __init__(
        self,
        content_type: str | None = None,
        content_encoding: str | None = None,
        dialect: str | None = None,
        keep_text: bool = False,
    ) -> None:
        self._frames = _frames_for(content_type)
        self._inflate = Inflate(content_encoding)
        self._fixed = dialect is not None
        self._notes = Notes(dialect=named(dialect) if dialect is not None else None)
        self._keep_text = keep_text
        self._text = _Text()
        self._gapped = False
        self._peeked: tuple[Notes, _Text] | None = None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body, as they went over the wire. Never raises on what they hold."""
        if self._frames is None:
            return
        self._peeked = None
        for piece in self._inflate.feed(bytes(chunk)):
            for payload in self._frames.feed(piece):
                self._take(payload, self._notes, self._text)

    def gap(self) -> None:
        """
        Note that bytes were dropped here, such as those between the kept beginning and end of a long stream.

        Reading goes on at the next line or event; a piece of one is searched for its usage. A compressed body cannot
        be entered again: what follows is lost (`undecodable`).
        """
        self._gapped = True
        self._peeked = None
        if self._inflate.active:
            self._inflate.failed = True
        elif self._frames is not None:
            for payload in self._frames.gap():
                self._take(payload, self._notes, self._text)

    def report(self) -> UsageReport | None:
        """
        Return what is known now; `None` when nothing was recognised. It may be asked at any time, changing nothing.

        An unterminated last event counts if it parses.
        """
        return self._peek()[0].report()

    def text(self) -> str:
        """
        Return the text that the model produced so far: content, reasoning, refusals, arguments of tool calls.

        At most `MAX_TEXT` characters; empty unless `keep_text` was asked for. What fell into a gap is missing.
        """
        return _join([*self._text.parts, *self._peek()[1].parts])

    @property
    def text_chars(self) -> int:
        """Characters of text that passed, kept or not."""
        return self._text.chars + self._peek()[1].chars

    @property
    def text_truncated(self) -> bool:
        """Whether more text passed than was kept."""
        return self.text_chars > MAX_TEXT

    @property
    def gapped(self) -> bool:
        """Whether bytes were dropped, so that text and usage may be missing."""
        return self._gapped

    @property
    def undecodable(self) -> bool:
        """Whether the content encoding is unknown, broken, inflates to too much, or was cut by a gap."""
        return self._inflate.failed

    def _peek(self) -> tuple[Notes, _Text]:
        """Return the notes with what is pending, and the text of what is pending, taking neither."""
        if self._peeked is None:
            notes, text = self._notes.copy(), _Text(self._text.kept)
            pending = self._frames.pending() if self._frames is not None else None
            if pending is not None:
                self._take(pending, notes, text)
            if self._inflate.failed:
                notes.flag("undecodable")
            self._peeked = notes, text
        return self._peeked

    def _take(self, payload: Payload, notes: Notes, text: _Text) -> None:
        data = payload.data
        if payload.tail is not None:
            self._scan(notes, data, payload.tail)
            notes.complete = notes.complete or (payload.last and payload.tail.rstrip().endswith((b"}", b"]")))
        elif len(data) <= MAX_DONE and data.strip() == _DONE:
            notes.complete = True
        elif payload.last or self._worthwhile(data, notes):
            document = _parse(data)
            found = [document] if isinstance(document, dict) else list(objects(document))
            for item in found:
                self._note(item, notes, text)
            notes.complete = notes.complete or (payload.last and bool(found))
            if payload.torn and not found:
                self._scan(notes, b"", data)

    def _worthwhile(self, data: bytes, notes: Notes) -> bool:
        """Tell whether a payload may change the notes or bring text, without parsing it."""
        dialect = notes.dialect
        if (dialect is None or notes.model is None) and notes.introduced < INTRODUCTION:
            notes.introduced += 1
            return True
        if dialect is None:
            return any(known.telling.search(data) for known in DIALECTS.values())
        if dialect.telling.search(data) or _ERROR.search(data):
            return True
        return self._keep_text and dialect.texty.search(data) is not None

    def _note(self, document: Json, notes: Notes, text: _Text) -> None:
        notes.error = notes.error or bool(document.get("error")) or document.get("type") == "error"
        dialect = self._dialect_of(document, notes)
        if dialect is None:
            return
        notes.dialect = dialect
        notes.recognised = notes.recognised or not self._fixed or dialect.claims(document)
        dialect.note(notes, document)
        if self._keep_text:
            for part in dialect.text(document):
                text.add(part)

    def _dialect_of(self, document: Json, notes: Notes) -> Dialect | None:
        """Stay with a dialect that was asked for or has counted; others give way to one that knows the payload."""
        current = notes.dialect
        if current is not None and (self._fixed or notes.usage is not None or current.claims(document)):
            return current
        return detect(document) or current

    def _scan(self, notes: Notes, head: bytes, tail: bytes) -> None:
        """Search the pieces of a payload that was torn or too large: its last usage object, and its names."""
        start, end = head.decode("utf-8", "replace"), tail.decode("utf-8", "replace")
        if notes.dialect is None and (mark := _TYPE.search(start)):
            notes.dialect = detect(marks(mark[1]))
        if not self._scan_usage(notes, end):
            self._scan_usage(notes, start)
        named = [*_MODEL.finditer(start)][:1]
        if notes.model is None and not named and notes.dialect is not None and notes.dialect.trailing_model:
            named = [*_MODEL.finditer(end)][-1:]
        known = notes.model
        for match in named:
            notes.identify({"model": match[1]})
        notes.model = known or notes.model
        if match_id := _ID.search(start):
            notes.identify({"id": match_id[1]})

    def _scan_usage(self, notes: Notes, text: str) -> bool:
        for match in reversed([*_USAGE_KEY.finditer(text)][-MAX_CANDIDATES:]):
            try:
                usage, _ = _DECODER.raw_decode(text, match.end())
            except (ValueError, RecursionError, ArithmeticError):
                continue
            dialect = notes.dialect or detect_usage(usage)
            if dialect is not None and dialect.note_usage(notes, usage):
                notes.dialect = dialect
                notes.flag("clipped")
                return True
        return False
