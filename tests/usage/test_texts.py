"""What a body said, for counting: known text, guessed text, and what only bytes are left of."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from asgi_metering.usage import UsageReader, reader
from asgi_metering.usage.frames import MAX_PAYLOAD
from asgi_metering.usage.reader import MAX_TEXT
from asgi_metering.usage.texts import LOOSE, Heard, Text, join, words
from tests.usage.test_openai import delta, sse

BLOB = "QUJD" * 1_000


def reading(*chunks: bytes, media: str | None = "text/event-stream", **options: Any) -> UsageReader:
    """A reader that keeps text and was fed."""
    found = UsageReader(media, keep_text=True, **options)
    for chunk in chunks:
        found.feed(chunk)
    return found


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ("a", ["a"]),
        ({"id": "1", "type": "token", "model": "m", "role": "user", "text": "a"}, ["a"]),
        ({"a": ["b", {"c": "d"}], "e": "f"}, ["b", "d", "f"]),
        ({"n": 1, "x": None, "y": True}, []),
        ({"type": "error", "message": "no"}, []),
        ({"error": {"message": "no"}, "a": "b"}, ["b"]),
        ({"b64_json": BLOB, "caption": "a cat"}, ["", "a cat"]),
    ],
)
def test_read_the_words_of_an_unknown_document(document: Any, found: list[str]) -> None:
    """Strings are words; labels, numbers, errors and encoded binary are none."""
    assert list(words(document)) == found


def test_read_words_however_deep() -> None:
    """A document of any depth that could be parsed is read without recursion."""
    deep: Any = "a"
    for _ in range(50_000):
        deep = [deep]
    assert list(words(deep)) == ["a"]


def test_hear_known_text_as_it_is() -> None:
    """Text of a known dialect is no guess, and other events between do not add to it."""
    assert reading(sse({"hello": "there"}, delta(content="a"), {"own": "event"})).heard() == Heard("a", 0, False)


@pytest.mark.parametrize("media", ["text/plain", "text/markdown", "application/xml", None])
def test_hear_text_without_a_format(media: str | None) -> None:
    """A body of text is heard as it is, cut anywhere, as a guess."""
    data = "d\u00e4s \U0001f600 tuts".encode()
    for size in range(1, len(data)):
        found = reading(*(data[at : at + size] for at in range(0, len(data), size)), media=media)
        assert found.heard() == Heard("d\u00e4s \U0001f600 tuts", 0, True)
        assert found.text() == ""


@pytest.mark.parametrize(
    "media", ["image/png", "audio/mpeg", "video/mp4", "application/pdf", "application/octet-stream"]
)
def test_hear_nothing_in_binary_media(media: str) -> None:
    """Nobody can tell tokens from the bytes of binary media, in Brotli neither."""
    assert reading(b"plain enough", media=media).heard() == Heard()
    assert reading(b"plain enough", media=media, content_encoding="br").heard() == Heard()


def test_hear_nothing_in_bytes_that_are_no_text() -> None:
    """A body without a content type that holds zero bytes is no text."""
    assert reading(b"GIF\0\0\1", media=None).heard() == Heard()


def test_hear_a_compressed_body_decoded() -> None:
    """What gzip packed is heard as what it was."""
    assert reading(gzip.compress(b"data: a b c\n\n"), content_encoding="gzip").heard() == Heard("a b c", 0, True)


def test_hear_wire_bytes_of_an_unknown_coding() -> None:
    """Of a body that cannot be decoded each byte stands for a character."""
    assert reading(b"x" * 40, b"y" * 2, content_encoding="compress").heard() == Heard("", 42, True)


def test_hear_what_follows_a_broken_coding_as_dense_as_before() -> None:
    """Once a coding breaks, the rest counts by its bytes, as dense as the text of what was read."""
    packed = gzip.compress(sse(*(delta(content=f"word{number} ") for number in range(100))))
    found = reading(packed, content_encoding="gzip")
    before = found.heard()
    found.gap()
    found.feed(b"?" * len(packed))
    after = found.heard()
    assert (before.more_chars, before.estimated) == (0, False)
    assert after == Heard(before.text, len(before.text), True)


def test_hear_a_gap_by_its_bytes_once_and_for_all() -> None:
    """Lost bytes count as dense as what was read until then; what passes later never makes them less."""
    event = sse(delta(content="x" * 50))
    found = reading(event * 10)
    found.gap(len(event) * 100)
    assert found.heard() == Heard("x" * 500, 5_000, True)
    found.feed(b": ping\n\n" * 1_000)
    assert found.heard().more_chars == 5_000


def test_hear_a_gap_before_anything_as_text() -> None:
    """Bytes that were lost before anything was read stand for a character each."""
    found = reading()
    found.gap(30)
    assert found.heard() == Heard("", 30, True)


def test_hear_the_middle_of_a_large_payload() -> None:
    """Of a payload beyond the bound the ends are heard, and the middle by its size; a large image is not."""
    text = "a word " * (MAX_PAYLOAD // 4)
    found = reading(b"data: " + text.encode() + b"\n\n").heard()
    assert len(found.text) + found.more_chars == pytest.approx(len(text), rel=0.01)
    assert found.estimated
    image = json.dumps({"b64_json": BLOB * 1_000}).encode()
    assert sum(map(len, reading(image, media="application/json").heard()[:1])) < 100


def test_hear_no_null() -> None:
    """A payload that is null says nothing; neither does an end mark, or a keep-alive."""
    assert reading(b"data: null\n\n: ping\n\ndata: [DONE]\n\n").heard() == Heard()


def test_hear_a_body_that_broke() -> None:
    """JSON that was cut is heard as text: it was written, and nothing can be told of it but its length."""
    found = reading(b'{"object":"chat.completion","choices":[{"message":{"content":"half of', media="application/json")
    assert found.heard().text.endswith("half of")
    assert found.heard().estimated


def test_hear_no_more_than_the_bound() -> None:
    """Guessed text is kept up to the bound and counted beyond it."""
    found = reading(b"a b " * MAX_TEXT, media="text/plain").heard()
    assert (len(found.text), found.more_chars) == (MAX_TEXT, 3 * MAX_TEXT)


def test_give_up_the_guess_once_the_dialect_is_known() -> None:
    """What was guessed before the first event of a known dialect is given up: its text alone counts."""
    found = reading(b"data: loading\n\n")
    assert (found.heard(), found.known) == (Heard("loading", 0, True), False)
    found.feed(sse(delta(content="a")))
    assert (found.heard(), found.known, found._guess.parts) == (Heard("a", 0, False), True, [])


def test_parse_what_is_begun_when_it_is_whole_and_not_with_every_chunk_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that comes in many pieces behind a guess is parsed once, when it ended."""
    parsed: list[int] = []
    parse = reader._parse

    def counted(data: bytes) -> Any:
        parsed.append(len(data))
        return parse(data)

    monkeypatch.setattr(reader, "_parse", counted)
    found = UsageReader("text/event-stream", keep_text=True)
    for piece in (sse({"said": "before"}), b'data: {"said":"', *[b"a word "] * 50, b'"}\n\n'):
        found.feed(piece)
    assert len(parsed) == 2
    assert found.heard().text.startswith("beforea word ")


def test_guess_where_the_dialect_of_the_route_finds_nothing() -> None:
    """A dialect that was asked for but does not know the stream leaves it to the guess."""
    assert reading(sse({"t": "a"}, {"t": "b"}), dialect="openai-chat").heard() == Heard("ab", 0, True)


def test_keep_text_from_the_moment_that_it_is_asked_for() -> None:
    """A reader may be asked for the text before its first byte, and to give it up when it is not needed."""
    found = UsageReader("text/event-stream")
    found.keep_text()
    found.feed(sse(delta(content="a")))
    assert found.heard() == Heard("a", 0, False)
    found.forget_text()
    found.feed(sse(delta(content="b")))
    assert found.heard() == Heard()


def test_tell_streams_by_their_media_type() -> None:
    """Events and lines are streams; bodies and pages are none."""
    media = ("text/event-stream", "application/x-ndjson", "application/json", "text/html", "image/png")
    assert [reading(media=each).streams for each in media] == [True, True, False, False, False]


def test_remember_a_proper_end() -> None:
    """Whoever feeds the reader tells the end of the body, which changes nothing of what was read."""
    found = reading(sse(delta(content="a")))
    before = found.ended
    found.end()
    assert (before, found.ended) == (False, True)
    assert found.heard().text == "a"


@pytest.mark.parametrize("start", [b"dat", b"even", b""])
def test_wait_until_a_body_shows_what_it_is(start: bytes) -> None:
    """The beginning of a mark may become an event stream still, and counts as text while it is all that passed."""
    found = reading(start, media="text/plain")
    assert found.heard() == (Heard(start.decode(), 0, True) if start else Heard())
    found.feed(b"um")
    assert found.heard() == Heard((start + b"um").decode(), 0, True)


def test_hear_nothing_behind_a_gap_of_a_body_that_never_showed_itself() -> None:
    """A body that was cut before it showed what it is counts by the bytes that were lost."""
    found = reading(media="text/plain")
    found.gap(10)
    found.feed(b"data: a\n\n")
    assert found.heard().more_chars == 10


def test_hear_the_event_that_a_gap_cut_as_lost() -> None:
    """The beginning of an event of a known dialect counts as dense as the whole ones before it, as its end does."""
    event = sse(delta(content="x" * 50))
    found = reading(event * 10 + event[:40])
    found.gap(len(event) - 40)
    assert found.heard().more_chars == pytest.approx(50, abs=5)


def test_text_puts_many_words_together() -> None:
    """The words of a long stream lie together, few strings for many words, and read the same."""
    text = Text()
    words = [f"w{number} " for number in range(3 * LOOSE)]
    for word in words:
        text.add(word)
    assert len(text.parts) < LOOSE
    assert join(text.parts) == "".join(words)
    assert text.chars == text.kept == len("".join(words))
