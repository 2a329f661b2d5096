"""Framing: WHATWG server-sent events, JSON lines, whole bodies, gaps and bounds."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import pytest

from asgi_metering.usage import frames as module
from asgi_metering.usage.frames import (
    HEAD,
    MAX_PAYLOAD,
    TAIL,
    BodyFrames,
    EventFrames,
    Frames,
    LineFrames,
    Payload,
)
from asgi_metering.usage.sniffing import SniffingFrames


def feed(frames: Frames, data: bytes, size: int) -> list[Payload]:
    """Feed the data in chunks of a size, and gather what they ended."""
    return [found for start in range(0, len(data), size) for found in frames.feed(data[start : start + size])]


STREAMS = [
    (b"data: a\n\n", [b"a"]),
    (b"data:a\n\n", [b"a"]),
    (b"data:  a\n\n", [b" a"]),
    (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
    (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
    (b"data: a\n\r\ndata: b\r\n\n", [b"a", b"b"]),
    (b"data: a\ndata: b\n\n", [b"a\nb"]),
    (b"data\ndata: b\n\n", [b"\nb"]),
    (b"data:\n\n", [b""]),
    (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    (b"data: a\n\n\xef\xbb\xbfdata: b\n\n", [b"a"]),
    (b": keep-alive\n\n: another\n\ndata: a\n\n", [b"a"]),
    (b"event: x\nid: 1\nretry: 5\ndata: a\nunknown: z\n\n", [b"a"]),
    (b"event: x\n\n", []),
    (b"dataset: a\n\n", []),
    (b" data: a\n\n", []),
    (b"\n\n\n\n", []),
    (b"data: a\x0bb\x0cc\x1cd\xc2\x85e\n\n", [b"a\x0bb\x0cc\x1cd\xc2\x85e"]),
    ("data: ä\U0001f600\n\n".encode(), ["ä\U0001f600".encode()]),
    (b"data: never ended\n", []),
    (b"", []),
]


@pytest.mark.parametrize(("stream", "events"), STREAMS)
def test_cut_events_at_any_size(stream: bytes, events: list[bytes]) -> None:
    """Line ends, comments, other fields, byte order marks and several data lines are read as the standard says."""
    for size in range(1, len(stream) + 2):
        assert feed(EventFrames(), stream, size) == [Payload(event) for event in events]


@pytest.mark.parametrize(
    ("begun", "pending"),
    [
        (b"", None),
        (b"data: a", b"a"),
        (b"data: a\n", b"a"),
        (b"data: a\ndata: b", b"a\nb"),
        (b"data: a\nevent: x", b"a"),
        (b"\xef\xbb\xbfdata: a", b"a"),
        (b": comment", None),
        (b"data: a\n\n", None),
    ],
)
def test_look_at_an_event_that_has_not_ended(begun: bytes, pending: bytes | None) -> None:
    """What is pending can be looked at any number of times, and ends as it would have ended."""
    frames = EventFrames()
    frames.feed(begun)
    expected = Payload(pending) if pending is not None else None
    assert frames.pending() == frames.pending() == expected
    rest = frames.feed(b"\n\n")
    assert rest == ([expected] if expected is not None else [])


def test_cut_lines_at_any_size() -> None:
    """Lines end at every kind of end, the last one is pending, and empty ones are passed on."""
    data = b'\xef\xbb\xbf{"a":1}\r\n{"b":2}\n\r{"c":3}\r{"d":4}'
    for size in range(1, len(data) + 1):
        frames = LineFrames()
        lines = feed(frames, data, size)
        assert [line.data for line in lines] == [b'{"a":1}', b'{"b":2}', b"", b'{"c":3}']
        assert frames.pending() == Payload(b'{"d":4}')
        assert frames.feed(b"\n") == [Payload(b'{"d":4}')]
        assert frames.pending() is None


def test_pass_a_gap_between_events() -> None:
    """Events on both sides of a gap are read, the one that it cut goes out as it stands."""
    frames = EventFrames()
    assert frames.feed(b"data: a\n\ndata: b\ndata: cu") == [Payload(b"a")]
    assert frames.gap() == [Payload(b"b\ncu")]
    assert frames.pending() is None
    assert frames.feed(b'rest"}\n\ndata: d\n\n') == [Payload(b'rest"}', torn=True), Payload(b"d")]
    assert frames.gap() == []


def test_pass_a_gap_at_the_beginning_of_a_line() -> None:
    """A gap that ends where an event begins loses nothing of that event."""
    frames = EventFrames()
    frames.gap()
    assert frames.feed(b"data: d\n\n") == [Payload(b"d")]


def test_pass_a_gap_inside_a_line_end() -> None:
    r"""A gap behind ``\r`` may not swallow a ``\n`` that belongs to another line."""
    frames = EventFrames()
    assert frames.feed(b"data: a\r") == []
    assert frames.gap() == [Payload(b"a")]
    assert frames.feed(b"\ndata: b\n\n") == [Payload(b"b")]


def test_look_at_a_torn_line() -> None:
    """A piece of a line is pending as a piece, and an event that follows it stands for itself."""
    frames = EventFrames()
    frames.gap()
    frames.feed(b"2}}\ndata: b\ndata: c")
    assert frames.pending() == Payload(b"b\nc")
    torn = EventFrames()
    torn.gap()
    torn.feed(b"2}}")
    assert torn.pending() == Payload(b"2}}", torn=True)
    assert torn.gap() == [Payload(b"2}}", torn=True)]


def test_pass_a_gap_between_lines() -> None:
    """The line before a gap goes out unterminated, the one behind it is torn, the next is whole."""
    frames = LineFrames()
    assert frames.feed(b"a\nb") == [Payload(b"a")]
    assert frames.gap() == [Payload(b"b")]
    assert frames.feed(b"c\nd\n") == [Payload(b"c", torn=True), Payload(b"d")]
    assert frames.gap() == []


@pytest.mark.parametrize("size", [1 << 12, 1 << 16, 1 << 22])
def test_clip_a_line_that_is_too_large(size: int) -> None:
    """Of a line beyond the bound only its beginning and its end are kept; the events around it are whole."""
    large = b"<" + b"x" * MAX_PAYLOAD * 3 + b">"
    frames = EventFrames()
    found = feed(frames, b"data: a\n\ndata: " + large + b"\n\ndata: b\n\n", size)
    assert [payload.data for payload in found] == [b"a", (b"data: " + large)[:HEAD][6:], b"b"]
    assert found[1].tail == large[-TAIL:]
    assert found[0].tail is found[2].tail is None


def test_clip_a_line_that_has_not_ended() -> None:
    """A line beyond the bound can be looked at before it ends, through a gap as well."""
    frames = EventFrames()
    frames.feed(b"data: " + b"x" * (MAX_PAYLOAD + 1))
    clipped = frames.pending()
    assert clipped is not None
    assert clipped.tail == b"x" * TAIL
    assert frames.gap() == [clipped]
    frames.feed(b"y" * (MAX_PAYLOAD + 1))
    assert frames.pending() == Payload(b"y" * HEAD, b"y" * TAIL, torn=True, lost=MAX_PAYLOAD + 1 - HEAD - TAIL)
    assert frames.feed(b"\n\n") == [Payload(b"y" * HEAD, b"y" * TAIL, torn=True, lost=MAX_PAYLOAD + 1 - HEAD - TAIL)]


@pytest.mark.parametrize("field", [b"event: ", b": "])
def test_skip_a_large_line_that_is_no_data(field: bytes) -> None:
    """A comment or name beyond the bound is dropped, and its event is not."""
    line = field + b"x" * (MAX_PAYLOAD + 1)
    frames = EventFrames()
    assert frames.feed(line) == []
    assert frames.pending() is None
    assert frames.feed(b"\ndata: a\n\n") == [Payload(b"a")]


def test_drop_an_event_of_too_many_lines() -> None:
    """An event whose lines together are beyond the bound is dropped whole, and the next one is read."""
    frames = EventFrames()
    line = b"data: " + b"x" * 1000 + b"\n"
    assert frames.feed(line * 2000) == []
    assert frames.pending() is None
    assert frames.feed(b"data: more\n\ndata: a\n\n") == [Payload(b"a")]


@pytest.mark.parametrize("line", [b"data\n", b"data:\n", b"data: x\n"])
def test_drop_an_event_of_tiny_lines(line: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty data lines count as well: an event of nothing but them is bounded."""
    monkeypatch.setattr(module, "MAX_PAYLOAD", 100)
    frames = EventFrames()
    fitting = 100 // len(line.removeprefix(b"data").removeprefix(b": ").replace(b":", b""))
    frames.feed(line * fitting)
    assert frames.pending() is not None
    frames.feed(line)
    assert frames.pending() is None
    assert frames.feed(b"\ndata: a\n\n") == [Payload(b"a")]


def test_drop_what_follows_a_clipped_line() -> None:
    """Further lines of an event whose data was clipped are no event of their own."""
    frames = EventFrames()
    assert frames.feed(b"data: a\ndata: " + b"x" * (MAX_PAYLOAD + 1) + b"\n") != []
    assert frames.feed(b"data: b\n\ndata: c\n\n") == [Payload(b"c")]


def test_keep_a_body_until_it_is_asked_for() -> None:
    """A body is pending from its first byte, whole up to the bound, and never ends by itself."""
    frames = BodyFrames()
    assert frames.pending() is None
    assert frames.feed(b'{"a":') == []
    assert frames.feed(b"1}") == []
    assert frames.pending() == Payload(b'{"a":1}', last=True)


def test_keep_the_ends_of_a_body_with_a_gap() -> None:
    """A gap leaves the beginning before it and the end behind it; a second one keeps the first beginning."""
    frames = BodyFrames()
    frames.feed(b"begin")
    assert frames.gap() == []
    frames.feed(b"middle")
    frames.gap()
    frames.feed(b"end")
    assert frames.pending() == Payload(b"begin", b"end", last=True, lost=len(b"middle"))


def test_keep_the_end_of_a_body_that_began_with_a_gap() -> None:
    """A body whose beginning was dropped is never mistaken for a whole one."""
    frames = BodyFrames()
    frames.gap()
    frames.feed(b'{"usage":{}}')
    assert frames.pending() == Payload(b"", b'{"usage":{}}', last=True)


def test_clip_a_body_that_is_too_large() -> None:
    """Of a body beyond the bound only its beginning and its end are kept."""
    frames = BodyFrames()
    feed(frames, b"<" + b"x" * MAX_PAYLOAD * 2 + b">", 1 << 15)
    lost = 2 + 2 * MAX_PAYLOAD - HEAD - TAIL
    assert frames.pending() == Payload(b"<" + b"x" * (HEAD - 1), b"x" * (TAIL - 1) + b">", last=True, lost=lost)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"data: a\n\n", "events"),
        (b"event: x\ndata: a\n\n", "events"),
        (b"id: x\ndata: a\n\n", "events"),
        (b"retry: 1\ndata: a\n\n", "events"),
        (b": x\ndata: a\n\n", "events"),
        (b'\n\n {"a": 1}', "body"),
        (b"[1]", "body"),
        (b" " * 200 + b"[1]", "body"),
        (b"<html>data: a\n\n" + b"x" * 200, "none"),
        (b"hello", "none"),
        (b"", "none"),
    ],
)
def test_sniff_what_a_body_is(start: bytes, kind: str) -> None:
    """The first bytes decide between events, a JSON body and nothing, wherever they are cut."""
    for size in range(1, len(start) + 2):
        frames = SniffingFrames()
        events = feed(frames, start, size)
        pending = frames.pending()
        assert events == ([Payload(b"a")] if kind == "events" else [])
        assert (pending is not None and pending.last) is (kind == "body")


def test_sniff_across_a_gap() -> None:
    """A gap before anything was seen ends the sniffing; one behind it is passed on."""
    frames = SniffingFrames()
    frames.gap()
    assert frames.feed(b"data: a\n\n") == []
    frames = SniffingFrames()
    frames.feed(b"data: a")
    assert frames.gap() == [Payload(b"a")]


class CountingBytes(bytearray):
    """Bytes that count how many of them are written or moved, in `moved`."""

    moved = 0

    def __iadd__(self, piece: Any) -> Self:  # type: ignore[misc, override]
        CountingBytes.moved += len(piece)
        return super().__iadd__(piece)  # type: ignore[return-value]

    def __add__(self, piece: Any) -> CountingBytes:
        CountingBytes.moved += len(self) + len(piece)
        return CountingBytes(super().__add__(piece))

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        CountingBytes.moved += len(found) if isinstance(at, slice) else 0
        return found

    def __delitem__(self, at: Any) -> None:
        super().__delitem__(at)
        # What was behind the gap moves up.
        CountingBytes.moved += len(self)

    def __bytes__(self) -> bytes:
        CountingBytes.moved += len(self)
        return b"".join([self])


def calls_of(work: Callable[[], object]) -> int:
    """Calls that *work* makes, of functions in Python and in C."""
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return calls


@pytest.mark.uncounted
@pytest.mark.parametrize("chunks", [2_000, 20_000], ids=["within the bound", "beyond the bound"])
@pytest.mark.parametrize("make", [EventFrames, LineFrames, BodyFrames, SniffingFrames])
def test_work_grows_with_the_bytes_however_small_the_chunks(
    make: Callable[[], Frames], chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one long line each byte is kept and moved at most three times, and each chunk takes the same few calls."""
    monkeypatch.setattr(module, "bytearray", CountingBytes, raising=False)
    for bound, small in {"MAX_PAYLOAD": 1 << 17, "HEAD": 1 << 10, "TAIL": 1 << 12}.items():
        monkeypatch.setattr(module, bound, small)

    def feed_small(count: int) -> tuple[int, int]:
        frames = make()
        frames.feed(b"data: ")
        monkeypatch.setattr(CountingBytes, "moved", 0)
        calls = calls_of(lambda: [frames.feed(b"x" * 32) for _ in range(count)])
        return calls, CountingBytes.moved

    (once, _), (twice, moved) = feed_small(chunks), feed_small(2 * chunks)
    written = 2 * chunks * 32
    assert written <= moved <= 3 * written
    # Not exactly twice: past the bound one chunk in many cuts what is kept.
    assert twice <= 2.1 * once


def test_take_an_empty_chunk_for_nothing() -> None:
    r"""An empty chunk between ``\r`` and ``\n`` leaves them one end of a line."""
    frames = EventFrames()
    chunks = (b"data: a\r", b"", b"\ndata: b\r\n", b"", b"\r\n")
    assert [payload.data for chunk in chunks for payload in frames.feed(chunk)] == [b"a\nb"]
