"""
Sessions: the answers of models in the messages that an application sends over one connection, one after the other.

Knows which message belongs to which answer, and that every answer is counted once. Never knows how one is charged, nor
a connection. No I/O, nothing awaits, and nothing that a message holds raises.

A body is one answer, whatever ids it shows; a session has many, and nothing but its messages tells where one ends. An
answer begins where its first message says so, where another one of its id would repeat, or behind the end of the one
before it. Where that leaves open whether usage was counted again or anew it counts once: as running totals, of which
the last one is all.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from asgi_metering.usage import gemini, live, openai, realtime
from asgi_metering.usage.dialects import ERROR, claiming, named, sieves
from asgi_metering.usage.frames import MAX_PAYLOAD, EventFrames, Payload
from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, objects
from asgi_metering.usage.reader import UsageReader
from asgi_metering.usage.values import TokenUsage

__all__ = ["MAX_OPEN", "MAX_SHOWN", "SessionReader"]

MAX_OPEN: Final = 8
"""Answers that may still go on, the latest: sessions have one or two at a time, and each keeps the text of its own."""

MAX_LATE: Final = 2
"""Answers that have ended and may still tell their usage, or tell it again, among them."""

MAX_LOOKED_INTO: Final = 16 << 20
"""Bytes of one message that are parsed to see whose it is: those of images are some millions."""

MAX_SHOWN: Final = 1_000
"""Ids of answers that are remembered when they are over, so that one that is told again counts once."""

PIECE: Final = 1 << 14
"""Bytes of a stream of events that are cut into events at a time."""

_BOM: Final = b"\xef\xbb\xbf"
_DECODER: Final = json.JSONDecoder()
_BETWEEN: Final = frozenset(" \t\r\n,")
_FIELD: Final = re.compile(rb"(?:data|event|id|retry):")
_EVENT: Final = re.compile(rb"(?:data|event|id|retry):|: ")
"""How a message begins that is a piece of a stream of events: with a field, or with a comment."""

_DATA: Final = re.compile(rb"(?:\A|[\r\n])data:")
"""What a piece of a stream of events has in one of its lines, that it tells anything by."""

_LINES: Final = re.compile(rb"\}[ \t]*\r?\n\s*\{")
"""Between two objects on lines of their own; in one document there is a comma."""

_ID: Final = rb'"(?:id|response_id|responseId)"\s*:\s*%b'
_OPENING: Final = (b"", b"{", b"[")
_DONE: Final = b"[DONE]"
_ENDS: Final = re.compile(rb"[\r\n]+")
_FIRST: Final = frozenset(
    {"response.created", "message_start", "message-start", "start", "message", realtime.TRANSCRIBED}
)
_WHOLE: Final = frozenset({"chat.completion", "response", "list"})
_UNIQUE: Final = frozenset({realtime.REALTIME.name, openai.RESPONSES.name})
"""Dialects whose ids are the provider's own, and never come again for another answer."""


def _parse(data: bytes) -> Any:
    """What the JSON of a message says; `None` for what is none, or what only its reader may make sense of."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


class SessionReader:
    """
    Reads the messages of one session, in their order. Not safe for several threads at once.

    Args:
        dialect: As of `UsageReader`; None detects it, for each message.
        begun: Is told of the reader of each answer, when it begins, and whose dialect it is. What a reader says may
            change until it is `over`.

    Raises:
        ConfigurationError: There is no dialect of that name.

    Attributes:
        rest: Has read, as one answer, all that no dialect claims by its marks: texts, and messages of the application's
            own, whose usage is a running total. Of use where no answer has begun.

    Memory: texts and one unfinished message of at most `MAX_OPEN` answers, and of `rest`.
    """

    __slots__ = (
        "_begun",
        "_dialect",
        "_events",
        "_going",
        "_has_begun",
        "_is_amid",
        "_latest",
        "_models",
        "_open",
        "_shown",
        "_streams",
        "rest",
    )

    def __init__(self, dialect: str | None, begun: Callable[[str, UsageReader], None]) -> None:
        self._dialect = None if dialect is None else named(dialect)
        self._begun = begun
        self._events = EventFrames()
        # The message before was a piece of a stream of events; and it ended amid a line.
        self._streams = self._is_amid = self._has_begun = False
        self._open: dict[object, UsageReader] = {}
        # Of each dialect the answer that went on last.
        self._latest: dict[str, UsageReader] = {}
        self._shown: dict[object, None] = {}
        # The answer that went on last, and what shows that a message is of it.
        self._going: tuple[UsageReader, re.Pattern[bytes]] | None = None
        self._models = realtime.Models(None, None)
        self.rest = _reader(dialect)

    def feed(self, message: str | bytes) -> None:
        """Take the next message that was sent. Never raises on what it holds."""
        for _ in self.read(message):
            pass

    def read(self, message: str | bytes) -> Iterator[int]:
        """
        As `feed`, step by step, with the bytes of each: one message may hold very many objects.

        Read each message to its end before the next one.
        """
        data = message.encode("utf-8", "surrogatepass") if isinstance(message, str) else bytes(message)
        data = data.removeprefix(_BOM)
        text = data.strip()
        if self._continues(text):
            yield from self._read_events(data)
        elif text.startswith((b"{", b"[")):
            self._streams = False
            for line in _LINES.sub(b"}\n{", text).split(b"\n") if _LINES.search(text) else (text,):
                for document in self._documents(line) if line.startswith(b"[") else (line,):
                    self._take(document)
                    yield len(document)
        elif self._is_event(text):
            if self._is_amid:
                # Lines are sent without their ends.
                yield from self._end_event()
            self._streams = True
            yield from self._read_events(data)
        elif isinstance(message, str):
            _give(self.rest, _words(data))
            yield len(data)

    def _documents(self, data: bytes) -> Iterator[bytes]:
        """Each object of an array: several events at once; but the array that one answer of Gemini's is."""
        parsed = _parse(data) if len(data) <= MAX_LOOKED_INTO else None
        found = list(objects(parsed))
        if len(found) < 2 or self._is_one(found[0]):
            yield data
            return
        text, at = data.decode(json.detect_encoding(data), "surrogatepass"), 1
        while text[at] != "]":
            if text[at] in _BETWEEN:
                at += 1
                continue
            value, end = _DECODER.raw_decode(text, at)
            if isinstance(value, dict):
                yield text[at:end].encode("utf-8", "surrogatepass")
            at = end

    def _is_one(self, document: Json) -> bool:
        try:
            return (self._dialect or self._claimed(document)) is gemini.GENERATE
        except Exception:  # noqa: BLE001 -- a dialect's, on JSON that nobody expected; its reader says so
            return False

    # -- pieces of streams ---------------------------------------------------------------------------------

    def _continues(self, text: bytes) -> bool:
        """Whether a line of an event was begun in an earlier message, and this one goes on with it."""
        if not self._is_amid or _FIELD.match(text):
            return False
        if not text.startswith(b"{") or _parse(text) is None:
            return True
        # What is whole by itself is no piece, unless the message before it ended behind ``data:``.
        pending = self._events.pending()
        return pending is not None and not pending.data

    def _is_event(self, text: bytes) -> bool:
        """
        Whether a message is a piece of a stream of events.

        Words of a model may look like comments and names, and would be lost: they count as long as no answer began.
        """
        if self._has_begun:
            return self._streams or _EVENT.match(text) is not None
        return _DATA.search(text) is not None

    def _read_events(self, data: bytes) -> Iterator[int]:
        for at in range(0, len(data), PIECE):
            yield from self._take_all(self._events.feed(data[at : at + PIECE]))
        pending = self._events.pending()
        self._is_amid = not data.endswith((b"\n", b"\r"))
        if pending is not None and (pending.data.strip() == _DONE or _parse(pending.data) is not None):
            yield from self._end_event()
        elif self._is_amid and not self._has_begun:
            if pending is None or pending.data.strip()[:1] not in _OPENING:
                # No JSON, so that it is no answer: words of an application's own stream, or of a model that knows them.
                yield from self._end_event()
            else:
                # What never becomes whole are words as well.
                _give(self.rest, _words(data))

    def _end_event(self) -> Iterator[int]:
        self._is_amid = False
        yield from self._take_all(self._events.feed(b"\n\n"))

    def _take_all(self, payloads: list[Payload]) -> Iterator[int]:
        for payload in payloads:
            if payload.tail is None:
                self._take(payload.data)
            else:
                # An answer that is larger than anybody parses says at its end what it used.
                reader = self._any()
                reader.feed(b"data: " + payload.data)
                reader.gap(payload.lost)
                reader.feed(payload.tail + b"\n\n")
                self._look_at(reader)
            yield len(payload.data)

    # -- whose a message is --------------------------------------------------------------------------------

    def _any(self) -> UsageReader:
        """The answer that went on last, for a message that nobody can look into."""
        return next(reversed(self._open.values()), self.rest)

    def _take(self, data: bytes) -> None:
        going = self._going
        if going is not None and not going[0].ended and _goes_on(data, going[1]):
            # What nearly every message is: words more, which tell nothing.
            _give(going[0], data)
            return
        document = _parse(data) if len(data) <= MAX_LOOKED_INTO else None
        if isinstance(document, list):
            # Of one answer.
            document = next(objects(document), None)
        if not isinstance(document, dict):
            # The end mark of a stream, or what is too large to be looked into here, or broken.
            self._tell(self._any(), data)
            return
        try:
            reader = self._whose(document)
        except Exception:  # noqa: BLE001 -- a dialect's, on JSON that nobody expected; its reader says so
            reader = self.rest
        if reader is not None:
            self._tell(reader, data, is_whole=_label(document.get("object")) in _WHOLE and bool(document.get("usage")))

    def _whose(self, document: Json) -> UsageReader | None:
        """The reader of the answer that *document* is a part of; None where it is of none, or counted before."""
        dialect = self._dialect or self._claimed(document)
        if dialect is None:
            return self.rest
        if dialect is realtime.REALTIME and self._skips(document):
            return None
        return self._answer(dialect, document)

    def _claimed(self, document: Json) -> Dialect | None:
        """Whose *document* is; what looks like one dialect's is another's in a session that speaks that one."""
        dialect = claiming(document)
        if dialect is openai.RESPONSES and realtime.REALTIME.name in self._latest:
            return realtime.REALTIME
        if dialect is gemini.GENERATE and live.LIVE.name in self._latest and "candidates" not in document:
            return live.LIVE
        return dialect

    def _skips(self, document: Json) -> bool:
        """Whether an event of a realtime session belongs to no answer: the session's own, and what the user says."""
        self._models = realtime.named_models(document) or self._models
        kind = document.get("type")
        return kind != realtime.TRANSCRIBED and not (isinstance(kind, str) and kind.startswith("response."))

    def _answer(self, dialect: Dialect, document: Json) -> UsageReader | None:
        key, begins = _identity(dialect, document)
        known = self._open.get(key)
        if known is not None:
            is_next = begins and known.ended and dialect.name not in _UNIQUE and _says(dialect, document) is None
            if not is_next:
                self._open[key] = self._open.pop(key)
                self._note_latest(dialect, document, known)
                if key is not None and (self._going is None or self._going[0] is not known):
                    self._going = known, re.compile(_ID % re.escape(json.dumps(key).encode()))
                return known
        elif key in self._shown and (dialect.name in _UNIQUE or not (begins or any(dialect.text(document)))):
            return None
        latest = self._latest.get(dialect.name)
        if latest is None or self._is_another(dialect, document, latest, begins=begins, key=key):
            return self._begin(dialect, document, key)
        return latest

    def _is_another(self, dialect: Dialect, document: Json, latest: UsageReader, *, begins: bool, key: object) -> bool:
        """Whether *document*, of an id that is not known or of none, is of another answer than the *latest*."""
        if dialect is realtime.REALTIME:
            return key is not None or begins or latest.ended
        report = latest.report()
        known = None if report is None else report.usage
        told = _says(dialect, document) if dialect in (openai.CHAT, live.LIVE) else None
        if known is not None and told is not None and _differs(known, told, has_id=key is not None):
            return True
        if begins:
            # Some gateways give each message of one answer an id of its own, and begin anew in each.
            return latest.ended or told is None or known is None
        if not latest.ended:
            return False
        if dialect is live.LIVE:
            return live.speaks(document)
        if dialect is gemini.GENERATE:
            return "candidates" in document
        if dialect is openai.CHAT:
            return any(dialect.text(document))
        return report is not None and report.complete

    def _begin(self, dialect: Dialect, document: Json, key: object) -> UsageReader:
        if key in self._open:
            self._close(key)
        reader, self._has_begun = _reader(dialect.name), True
        if dialect is realtime.REALTIME:
            is_heard = document.get("type") == realtime.TRANSCRIBED
            model = self._models.transcriber if is_heard else self._models.model
            if model is not None:
                _give(reader, json.dumps({"type": "session.created", "session": {"model": model}}).encode())
        self._open[object() if key is None else key] = reader
        self._note_latest(dialect, document, reader)
        done = [each for each, known in self._open.items() if known.ended]
        for each in done[:-MAX_LATE] or [*self._open][:-MAX_OPEN]:
            self._close(each)
        self._begun(dialect.name, reader)
        return reader

    def _note_latest(self, dialect: Dialect, document: Json, reader: UsageReader) -> None:
        if document.get("type") != realtime.TRANSCRIBED:
            self._latest[dialect.name] = reader

    def _close(self, key: object) -> None:
        """Nothing more is awaited of an answer."""
        reader = self._open.pop(key)
        reader.over = True
        self._latest = {name: each for name, each in self._latest.items() if each is not reader}
        if reader.ended and isinstance(key, str):
            self._shown[key] = None
            if len(self._shown) > MAX_SHOWN:
                del self._shown[next(iter(self._shown))]

    def _tell(self, reader: UsageReader, data: bytes, *, is_whole: bool = False) -> None:
        if self._going is not None and self._going[0] is not reader:
            self._going = None
        _give(reader, data)
        if is_whole:
            reader.end()
        self._look_at(reader)

    def _look_at(self, reader: UsageReader) -> None:
        """Note whether the answer has told all that it will; then nobody needs its text."""
        report = reader.report()
        if report is None or reader is self.rest:
            return
        is_told = report.usage is not None and report.usage.output is not None and not report.partial
        if report.complete or (is_told and report.finish_reason is not None):
            reader.end()
        if reader.ended and is_told:
            reader.forget_text()


def _reader(dialect: str | None) -> UsageReader:
    return UsageReader("text/event-stream", None, dialect, keep_text=True)


def _goes_on(data: bytes, shown: re.Pattern[bytes]) -> bool:
    """Whether a message that *shown* finds cannot tell more than words, whoever's dialect it is."""
    if len(data) > MAX_PAYLOAD or shown.search(data) is None:
        return False
    return sieves().any.search(data) is None and ERROR.pattern.search(data) is None


def _give(reader: UsageReader, data: bytes) -> None:
    """Let *reader* have one whole message: an event, whatever line ends its JSON has between its values."""
    reader.feed(b"data: " + _ENDS.sub(b" ", data) + b"\n\n")


def _words(data: bytes) -> bytes:
    return json.dumps({"text": data.decode("utf-8", "replace")}).encode()


def _identity(dialect: Dialect, document: Json) -> tuple[str | None, bool]:
    """The id of the answer that *document* is of, if it says, and whether it is the first one of it."""
    kind = document.get("type")
    begins = (isinstance(kind, str) and kind in _FIRST) or "messageStart" in document
    if kind == realtime.TRANSCRIBED:
        return _label(document.get("item_id")), begins
    if dialect in (realtime.REALTIME, openai.RESPONSES) and isinstance(document.get("response"), dict):
        return _label(document["response"].get("id")), begins
    if kind == "message_start":
        return _label(as_object(document.get("message")).get("id")), begins
    if _label(document.get("object")) in _WHOLE:
        begins = True
    elif dialect is openai.CHAT:
        begins = any(as_object(choice.get("delta")).get("role") for choice in objects(document.get("choices")))
    ids = (document.get(name) for name in ("response_id", "responseId", "messageId", "id"))
    return next((each for each in map(_label, ids) if each is not None), None), begins


def _label(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 200 else None


def _says(dialect: Dialect, document: Json) -> TokenUsage | None:
    """What usage *document* reports by itself."""
    notes = Notes(dialect=dialect)
    try:
        dialect.note(notes, document)
    except Exception:  # noqa: BLE001 -- a dialect's, on JSON that nobody expected; its reader says so
        return None
    return notes.usage


def _differs(known: TokenUsage, told: TokenUsage, *, has_id: bool) -> bool:
    """
    Whether *told* cannot be a running total of the answer that has reported *known*.

    The output of one never falls. What went in does not change where its messages have ids; the turn of a Live session
    reads what its tools answered.
    """
    falls = told.output is not None and told.output < (known.output or 0)
    return falls or (has_id and told.input != known.input)
