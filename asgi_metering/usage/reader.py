"""
Reading usage, and the text that passed, out of one response body.

Knows how bytes become a report: decoding, framing, parsing what may matter, asking the dialect. Never knows a
provider's fields, who pays, nor what is charged. No I/O, nothing awaits, and nothing that a body holds raises.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from typing import Any, Final

from asgi_metering.usage.boilerplate import Boilerplate, Search
from asgi_metering.usage.dialects import DIALECTS, ERROR, detect, detect_usage, marks, named, sieves
from asgi_metering.usage.frames import MAX_PAYLOAD, Payload
from asgi_metering.usage.inflate import Inflate
from asgi_metering.usage.notes import Dialect, Json, Notes, objects
from asgi_metering.usage.skim import MAX_LEAP, end_before, end_behind, find_mark
from asgi_metering.usage.sniffing import SNIFFED, Media, SniffingFrames, media_of
from asgi_metering.usage.texts import MAX_TEXT, Heard, Text, join, prose, words
from asgi_metering.usage.values import UsageReport

__all__ = ["MAX_TEXT", "UsageReader"]

INTRODUCTION: Final = 32
"""Payloads parsed for the dialect and the model, if they may show them, until both are known."""

MAX_CANDIDATES: Final = 8
"""Usage objects tried in a piece of a payload, from its end."""

RUN: Final = 8
"""Payloads with a mark in a row, after which the next ones are expected to have one: totals in every chunk, say."""

DENSE: Final = 4_096
"""Bytes that are then read without looking for marks first, which costs more than what it may pass over."""

READ_AT_ONCE: Final = 65_536
"""About so many bytes are put together for reading: for each chunk alone a call would cost more than what it reads."""

LEAD: Final = 8
"""Chunks that are read one by one, if they have to be, until dialect and model are known."""

_DONE: Final = b"[DONE]"
MAX_DONE: Final = 16
"""Bytes of an end mark with white space around it."""

_MODEL: Final = re.compile(r'"(?:model|modelVersion)"\s*:\s*"([^"\\]+)"')
_ID: Final = re.compile(r'"(?:id|responseId)"\s*:\s*"([^"\\]+)"')
_TYPE: Final = re.compile(r'"(?:object|type)"\s*:\s*"([^"\\]+)"')


_logger = logging.getLogger("asgi_metering.upstream")

_DECODER: Final = json.JSONDecoder(parse_float=Decimal, parse_constant=float)
"""NaN and Infinity are not JSON, and reports hold them: as counts they are refused like any other nonsense."""


def _number(digits: str) -> Decimal | float:
    try:
        return Decimal(digits)
    except ArithmeticError:
        return float("nan")


_PATIENT: Final = json.JSONDecoder(parse_float=_number, parse_int=_number, parse_constant=float)
"""For numbers that Python reads no int or Decimal from: as counts they are refused, and not passed over as no JSON."""


def _parse(data: bytes) -> Any:
    """Parse JSON from an untrusted source; `None` for what is none, or nested too deep, or has an endless number."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    try:
        return _DECODER.decode(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    except (ValueError, ArithmeticError):
        return _parse_patiently(text)


def _parse_patiently(text: str) -> Any:
    try:
        return _PATIENT.decode(text)
    except (ValueError, RecursionError):
        return None


class UsageReader:
    """
    Reads one response body, chunk by chunk, in whatever pieces it comes. Not safe for several threads at once.

    Args:
        content_type: The response's ``Content-Type``; it decides where the first bytes show no format.
        content_encoding: The response's ``Content-Encoding``; gzip and deflate are followed, Brotli and Zstandard where
            their decoders are installed.
        dialect: A name out of `dialects.DIALECTS`, which overrides detection: an OpenAI-shaped gateway before another
            provider counts as OpenAI does.
        keep_text: Gather the text as well (`text`, `heard`), for the tokenizer.

    Raises:
        ConfigurationError: There is no dialect of that name.

    Attributes:
        ended: Whoever feeds it saw the body's proper end (`end`).
        over: Whoever feeds it feeds it no more.
        fetched: Whoever feeds it asked for an answer that is there already, such as one that was begun in the
            background: of several that show the same one, only one has used anything.

    Memory: about 1 MiB of an unfinished payload, and twice `MAX_TEXT` characters until the dialect is known. Cost: each
    byte once; a payload is parsed only if it can hold usage, an end, an error, or text that is wanted.
    """

    __slots__ = (
        "_binary",
        "_boilerplate",
        "_fixed",
        "_frames",
        "_gapped",
        "_guess",
        "_inflate",
        "_keep_text",
        "_lead",
        "_lost_chars",
        "_notes",
        "_peeked",
        "_read",
        "_text",
        "_unread",
        "ended",
        "fetched",
        "over",
    )

    def __init__(
        self,
        content_type: str | None = None,
        content_encoding: str | None = None,
        dialect: str | None = None,
        keep_text: bool = False,
    ) -> None:
        media = media_of(content_type)
        self._binary = media is Media.BINARY
        self._frames: SniffingFrames | None = SniffingFrames(media, prose=keep_text)
        self._inflate = Inflate(content_encoding)
        self._boilerplate = Boilerplate()
        self._fixed = dialect is not None
        self._notes = Notes(dialect=named(dialect) if dialect is not None else None)
        self._keep_text = keep_text
        self._lead = LEAD
        self._text = Text()
        self._guess = Text()
        self._read = self._unread = self._lost_chars = 0
        self._gapped = False
        self._peeked: tuple[Notes, Text, Text] | None = None
        self.ended = self.fetched = self.over = False

    def keep_text(self) -> None:
        """Gather the text from here on; who made the reader did not know that somebody needs it."""
        self._keep_text = True

    def forget_text(self) -> None:
        """Give up the text that was gathered: what the body reported makes it needless."""
        self._keep_text = False
        self._text, self._guess = Text(), Text()
        self._peeked = None

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body, as they went over the wire. Never raises on what they hold."""
        self._feed(chunk)

    def _feed(self, chunk: bytes) -> None:
        if self._frames is None:
            return
        self._peeked = None
        if self._inflate.failed:
            self._unread += len(chunk)
            return
        decoded = False
        for piece in self._inflate.feed(bytes(chunk)):
            decoded = True
            if self._frames.undecided and len(piece) > SNIFFED:
                # So much shows what all the rest is, most of which is then passed over.
                self._frame(self._frames, piece[:SNIFFED])
                piece = piece[SNIFFED:]
            if self._keep_text or not self._frames.ends or len(piece) > MAX_PAYLOAD:
                self._frame(self._frames, piece)
            else:
                self._skim(self._frames, piece)
        if not decoded and self.undecodable:
            # Nothing of it was read: it broke here, and its bytes are all that is known.
            self._unread += len(chunk)
            return
        self._read += len(chunk)
        if self._frames.nothing:
            self._frames = None
        elif self._guess.parts and _known(self._notes, self._text):
            self._guess = Text()

    def feed_many(self, chunks: Sequence[bytes]) -> None:
        """
        Take the next chunks of the body as `feed` takes them one by one, for less: whole events that repeat what was
        looked at before are passed over. Never raises on what they hold.

        Who overrides `feed` overrides this as well.
        """
        at = 0
        while at < len(chunks) and self._lead and not _is_introduced(self._notes):
            # They show what the others are.
            self._feed(chunks[at])
            self._lead -= 1
            at += 1
        left = chunks[at + self._pass_over(chunks[at:]) :]
        step = max(1, READ_AT_ONCE * len(left) // max(1, sum(map(len, left))))
        for start in range(0, len(left), step):
            self._feed(b"".join(left[start : start + step]))

    def _pass_over(self, chunks: Sequence[bytes]) -> int:
        """Read the first of *chunks*, of which whole events that would not be parsed are left out; return how many."""
        frames, inflate = self._frames, self._inflate
        if frames is None or self._keep_text or inflate.active or inflate.failed or not frames.between:
            return 0
        search, left = self._search(), sum(map(len, chunks))
        wanted = self._boilerplate.wanted(chunks, left, frames.ends, search) if search is not None else None
        # Of what is too large the ends are searched for more than marks.
        if search is None or wanted is None or (left > MAX_PAYLOAD and max(map(len, chunks)) > MAX_PAYLOAD):
            return 0
        done = 0
        for place in wanted:
            passed = sum(map(len, chunks[done:place]))
            self._read += passed
            self._feed(chunks[place])
            left -= passed + len(chunks[place])
            done = place + 1
            now = self._search()
            if now is None or now.of is not search.of:
                # It told what those behind it are, which were searched for what matters in those before it.
                return done
        self._read += left
        return len(chunks)

    def _frame(self, frames: SniffingFrames, data: bytes) -> None:
        for payload in frames.feed(data):
            self._take(payload, self._notes, self._text, self._guess)

    def _skim(self, frames: SniffingFrames, data: bytes) -> None:
        """
        Read as `_frame` does, and pass over the whole payloads without a mark, of which nothing would be parsed.

        What is begun is read to its end before, whatever it holds. What lies within *data* is never too large.
        """
        at, ends = 0, frames.ends
        if not frames.between:
            at = end_behind(data, 0, 0, ends)
            self._frame(frames, data[:at])
        run = 0
        while at < len(data) and (found := self._next(data, at)) >= 0:
            start = end_before(data, at, found, ends)
            run = run + 1 if start == at else 0
            end = end_behind(data, at, found if run < RUN else found + DENSE, ends)
            self._frame(frames, data[start:end])
            at = end
        at = end_before(data, at, len(data), ends)
        if at < len(data):
            self._frame(frames, data[at:])

    def _next(self, data: bytes, at: int) -> int:
        """Return where in ``data[at:]`` a payload is first that `_worthwhile` may want, or -1."""
        search = self._search()
        return at if search is None else search.find(data, at)

    def _search(self) -> Search | None:
        """Return what shows a payload that `_worthwhile` may want; None where each of them may be one."""
        dialect, known = self._notes.dialect, sieves()
        if _is_introduced(self._notes):
            marks = known.any if dialect is None else known.named[dialect.name]
            return Search(marks, partial(find_mark, marks=marks), escapes=False)
        return Search(known.introducing, _find_shown, escapes=True) if dialect is None else None

    def end(self) -> None:
        """Note that the body came to its proper end, whether or not it said so itself (`ended`)."""
        self.ended = True

    def gap(self, lost: int = 0) -> None:
        """
        Note that bytes were dropped here, such as those between the kept beginning and end of a long stream.

        Reading goes on at the next line or event; a piece of one is searched for its usage. A compressed body cannot
        be entered again: what follows is lost (`undecodable`).

        Args:
            lost: How many. They count as text as dense as what was read until now, once and for all: what passes
                later never makes them less.
        """
        self._gapped = True
        self._peeked = None
        if self._inflate.active:
            self._lost_chars += self._dense(lost)
            self._inflate.failed = True
            return
        chars = self._text.chars
        for payload in self._frames.gap() if self._frames is not None else ():
            self._take(payload, self._notes, self._text, self._guess)
            if self.known and self._text.chars == chars:
                # The event that was cut says nothing by itself, so its beginning is lost as well.
                lost += len(payload.data)
                self._read -= len(payload.data)
        self._peeked = None
        self._lost_chars += self._dense(lost)

    def _dense(self, size: int) -> int:
        """Return the characters that *size* bytes of the wire stand for; one each where nothing could be read."""
        if not size or not self._read:
            return size
        notes, text, guess = self._peek()
        chars = self._text.chars + text.chars if _known(notes, self._text) else self._guess.chars + guess.chars
        return -(-size * chars // self._read)

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
        return join([*self._text.parts, *self._peek()[1].parts])

    def heard(self) -> Heard:
        """
        Return what the body said, for counting its tokens, whatever its shape (DESIGN 4 "Observed").

        Of a known dialect it is `text`. Of any other body that is text it is a guess: the strings of its JSON without
        labels, the data of its events, or all of it. Bytes that could not be read (a gap, a broken coding, Brotli or
        Zstandard) count as text as dense as what was read before them, or as a character each. Binary media (images,
        voices, archives) and base64 in JSON are no text: nobody can tell tokens from their bytes, so they are none.
        """
        if self._frames is None or (self._binary and not self.known):
            return Heard()
        notes, pending, guess = self._peek()
        known = _known(notes, self._text)
        taken, rest = (self._text, pending) if known else (self._guess, guess)
        text = join([*taken.parts, *rest.parts])
        more = max(0, taken.chars + rest.chars - len(text)) + self._lost_chars + self._dense(self._unread)
        return Heard(text, more, bool(more) or (bool(text) and not known))

    @property
    def known(self) -> bool:
        """Whether a dialect recognised the body, so that its text is the model's own."""
        return _known(self._peek()[0], self._text)

    @property
    def failure(self) -> bytes:
        """The first error that the body carried, as JSON; empty where there was none, or a huge one."""
        return self._peek()[0].failure

    @property
    def streams(self) -> bool:
        """Whether the body is one of events or lines."""
        return self._frames is not None and self._frames.streams

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

    def _peek(self) -> tuple[Notes, Text, Text]:
        """Return the notes with what is pending, and the text and the guess of what is pending, taking nothing."""
        if self._peeked is None:
            notes, text, guess = self._notes.copy(), Text(self._text.kept), Text(self._guess.kept)
            pending = self._frames.pending() if self._frames is not None else None
            if pending is not None:
                self._take(pending, notes, text, guess)
            if self._inflate.failed:
                notes.flag("undecodable" if self._inflate.coding is None else "no_decoder")
            self._peeked = notes, text, guess
        return self._peeked

    def _take(self, payload: Payload, notes: Notes, text: Text, guess: Text) -> None:
        data = payload.data
        document: Any = None
        if payload.prose:
            pass
        elif payload.tail is not None:
            self._scan(notes, data, payload.tail)
            notes.complete = notes.complete or (payload.last and payload.tail.rstrip().endswith((b"}", b"]")))
        elif len(data) <= MAX_DONE and data.strip() == _DONE:
            notes.complete = True
            return
        elif payload.last or self._worthwhile(data, notes):
            document = _parse(data)
            found = [document] if isinstance(document, dict) else list(objects(document))
            for item in found:
                try:
                    self._note(item, notes, text)
                except Exception as failure:  # noqa: BLE001 -- a dialect's, on JSON that nobody expected
                    self._doubt(notes, failure)
            notes.complete = notes.complete or (payload.last and bool(found))
            if payload.torn and not found:
                self._scan(notes, b"", data)
        if self._keep_text and not _known(notes, text):
            _guess(payload, document, guess)

    def _worthwhile(self, data: bytes, notes: Notes) -> bool:
        """Tell whether a payload may change the notes or bring text, without parsing it."""
        dialect = notes.dialect
        if not _is_introduced(notes):
            if dialect is None and _find_shown(data, 0) < 0:
                return self._keep_text
            notes.introduced += 1
            return True
        if dialect is None:
            return self._keep_text or any(known.telling.pattern.search(data) for known in DIALECTS.values())
        if dialect.telling.pattern.search(data) or ERROR.pattern.search(data):
            return True
        return self._keep_text and (not notes.recognised or dialect.texty.search(data) is not None)

    def _note(self, document: Json, notes: Notes, text: Text) -> None:
        notes.error = notes.error or bool(document.get("error")) or document.get("type") == "error"
        dialect = self._dialect_of(document, notes)
        if dialect is not None:
            self._note_as(dialect, document, notes, text)
        if notes.error and not notes.failure:
            notes.fail(document)

    def _note_as(self, dialect: Dialect, document: Json, notes: Notes, text: Text) -> None:
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
        for match in reversed([*sieves().usage_key.finditer(text)][-MAX_CANDIDATES:]):
            try:
                usage, _ = _DECODER.raw_decode(text, match.end())
            except (ValueError, RecursionError, ArithmeticError):
                continue
            try:
                dialect = notes.dialect or detect_usage(usage)
                is_noted = dialect is not None and dialect.note_usage(notes, usage)
            except Exception as failure:  # noqa: BLE001 -- as above
                self._doubt(notes, failure)
                continue
            if is_noted:
                notes.dialect = dialect
                notes.flag("clipped")
                return True
        return False

    def _doubt(self, notes: Notes, failure: Exception) -> None:
        """What a dialect raised costs the usage, which is not believed then, and neither the response nor its end."""
        if "unreadable" not in notes.problems and not self._keep_text:
            # Who reads text does it beside one who looks for usage, and says the same.
            _logger.error("An answer is not fully observed: its reader failed.", exc_info=failure)
        notes.flag("unreadable")


def _is_introduced(notes: Notes) -> bool:
    return (notes.dialect is not None and notes.model is not None) or notes.introduced >= INTRODUCTION


def _find_shown(data: bytes, at: int) -> int:
    """Return where in ``data[at:]`` a dialect or an error may first show itself, or -1; escapes may hide a name."""
    introducing, leap = sieves().introducing, MAX_LEAP
    while at < len(data):
        stop = min(at + leap, len(data))
        escape = data.find(b"\\", at, stop)
        shown = find_mark(data, at, introducing, stop if escape < 0 else escape)
        if shown >= 0 and (escape < 0 or shown < escape):
            return shown
        if escape >= 0:
            return escape
        # Never more than what was passed over already: each mark is searched from the one before it anew.
        at, leap = stop, leap + leap
    return -1


def _known(notes: Notes, text: Text) -> bool:
    return notes.recognised or text.chars > 0


def _guess(payload: Payload, document: Any, guess: Text) -> None:
    """Add what a payload of unknown shape may say: the words of its JSON, else its bytes as text."""
    if document is not None:
        for part in words(document):
            guess.add(part)
        return
    if payload.data.strip() == b"null":
        return
    text = prose(payload.data) + (prose(payload.tail) if payload.tail else "")
    guess.add(text)
    if payload.lost and payload.tail:
        # Of the middle of a large payload only the size is known.
        guess.chars += payload.lost * len(text) // (len(payload.data) + len(payload.tail))
