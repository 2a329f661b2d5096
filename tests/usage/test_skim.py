"""Skimming finds whatever reading every payload finds: the reader that cuts and asks each of them is the oracle."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.usage import UsageReader, UsageReport, reader
from asgi_metering.usage.dialects import DIALECTS, detect, sieves
from asgi_metering.usage.frames import MAX_PAYLOAD, EventFrames, Frames, LineFrames, Payload
from asgi_metering.usage.notes import Notes
from asgi_metering.usage.skim import DONE, FAR, MAX_WINDOW, WINDOW, end_before, end_behind, find_mark, sieve
from tests.usage.test_fuzz import DOCUMENTS, cut
from tests.usage.vectors import NAMES, body, content_type

pytestmark = pytest.mark.uncounted

EVENTS = EventFrames.ends
LINES = LineFrames.ends
TELLING = sieve(*(dialect.telling for dialect in DIALECTS.values()))


class Full(UsageReader):
    """The oracle: every payload is cut, and asked whether it may matter."""

    __slots__ = ()

    def _skim(self, frames: Frames, data: bytes) -> None:
        self._frame(frames, data)


class Eager(Full):
    """Parses the first payloads even if they show no name that detection needs."""

    __slots__ = ()

    def _worthwhile(self, data: bytes, notes: Notes) -> bool:
        if reader._is_introduced(notes):
            return super()._worthwhile(data, notes)
        notes.introduced += 1
        return True


def reports(made: UsageReader, chunks: list[bytes], gap: int = -1) -> list[UsageReport | None]:
    """What a reader reports after each chunk."""
    found = []
    for number, chunk in enumerate(chunks):
        if number == gap:
            made.gap()
        made.feed(chunk)
        found.append(made.report())
    return found


def agree(chunks: list[bytes], gap: int = -1, **options: Any) -> UsageReport | None:
    """Both readers report the same after each chunk; returns what they report in the end."""
    found = reports(UsageReader(**options), chunks, gap)
    assert found == reports(Full(**options), chunks, gap)
    eager = Eager(**options)
    # Past those it would parse no more, while what shows nothing does not count against the others.
    assert found == reports(eager, chunks, gap) or eager._notes.introduced == reader.INTRODUCTION
    assert found[-1:] == reports(UsageReader(**options), [b"".join(chunks)])[-1:] or gap >= 0
    return found[-1] if found else None


# -- whole streams -------------------------------------------------------------------------------------------


def events(name: str) -> list[bytes]:
    """The payloads of a sample, one event or line each."""
    data = body(name).replace(b"\r\n", b"\n")
    if name.endswith(".sse"):
        return [b"\n".join(line for line in event.split(b"\n") if line) for event in data.split(b"\n\n") if event]
    return [b"data: " + line for line in data.splitlines() if line]


HOSTILE = [
    b": keep-alive",
    b":",
    b"event: ping",
    b"data",
    b"data:",
    b"retry: 3",
    b'data: {"type": "ping"}',
    b'data: {"choices":[{"delta":{"content":"\\"usage\\":{\\"prompt_tokens\\":1}"}}]}',
    b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}',
    b'data: {"choices":[{"delta":{"content":"' + b"a long text " * 40 + b'"}}]}',
    b'data: {"type":"x","delta":"' + b"QUJD" * 300 + b'","usage":null}',
    b'data: {"usage":null,"a":{"usage":{"prompt_tokens":7}}}',
    b'data: {"usage"  :  {"prompt_tokens":5,"completion_tokens":6}}',
    b'data: {"usage":null,"choices":[],"x":{"deep":[{"usage":{"input_tokens":3}}]}}',
    b'data: {"usage": null, "finish_reason" : null}',
    b'data: {"\\u0075sage":{"prompt_tokens":8}}',
    b'data: {"usage":\ndata: {"prompt_tokens":11,\ndata: "completion_tokens":12}}',
    b'data: {"usage":{"prompt_tokens":1',
    b'data: {"usage":{"prompt_tokens":-1,"completion_tokens":true}}',
    b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":0,"cost":0.5}}',
    b'data: {"error":{"message":"overloaded"}}',
    b'data: {"choices":[{"finish_reason":"error"}]}',
    b'data: {"choices":[{"finish_reason":"stop","delta":{}}],"model":"other","id":"i"}',
    b'data: {"done":false,"response":"x"}',
    b"data: [DONE]",
    b"data:[DONE]",
    b"data:   [DONE] \t",
    b"data: [DONE] and more",
    b"data: \ndata: [DONE]",
    b"x" * 700,
    b'data: "' + b"y" * 700,
    b"data: [" + b"0.25," * 200 + b"0]",
]
POOL = sorted({*(event for name in NAMES for event in events(name)), *HOSTILE})
FILLER = b'data: {"choices":[{"delta":{"content":"word "}}]}'
BREAKS = st.sampled_from([b"\n\n", b"\n\n", b"\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"\r\n\n", b"\n\r\n", b"\n\n\n"])
CODINGS: dict[str, Callable[[bytes], bytes]] = {
    "identity": bytes,
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": bytes,
    "zstd": bytes,
}


@given(
    st.lists(st.tuples(st.sampled_from(POOL) | st.just(FILLER), BREAKS, st.integers(1, 40)), max_size=12),
    st.lists(st.integers(0), max_size=6),
    st.integers(-4, 6),
    st.sampled_from([None, None, *DIALECTS]),
    st.sampled_from(["text/event-stream", "text/event-stream", "application/x-ndjson", None]),
    st.sampled_from(["identity", "identity", "gzip", "deflate", "br", "zstd"]),
)
@settings(max_examples=120, deadline=None)
def test_read_what_a_full_reader_reads(
    parts: list[tuple[bytes, bytes, int]],
    borders: list[int],
    gap: int,
    dialect: str | None,
    media: str | None,
    coding: str,
) -> None:
    """Of streams of any payloads, repeated, cut anywhere, with gaps and codings, both readers report the same."""
    ends = [(event, end) for event, end, times in parts for _ in range(times if len(event) < 200 else 1)]
    if media == "application/x-ndjson":
        ends = [(event.removeprefix(b"data:").strip(), end) for event, end in ends]
    data = CODINGS[coding](b"".join(event + end for event, end in ends))
    agree(cut(data, borders), gap, content_type=media, content_encoding=coding, dialect=dialect)


@given(st.lists(DOCUMENTS, max_size=5), st.lists(st.integers(0), max_size=4), st.sampled_from([None, *DIALECTS]))
@settings(max_examples=50, deadline=None)
def test_read_random_json_as_a_full_reader(documents: list[Any], borders: list[int], dialect: str | None) -> None:
    """Of random JSON behind the payloads that introduce a stream both readers report the same."""
    lines = [json.dumps(document).encode() for document in documents]
    start = (FILLER + b"\n\n") * reader.INTRODUCTION
    data = start + b"".join(b"data: " + line + b"\n\n" + FILLER + b"\n\n" for line in lines)
    agree([start, *cut(data[len(start) :], borders)], content_type="text/event-stream", dialect=dialect)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".sse", ".ndjson"))])
@pytest.mark.parametrize("filled", [0, 40])
def test_read_sample_as_a_full_reader(name: str, filled: int) -> None:
    """Each sample, alone and behind many deltas, cut in two all over: both readers report the same after each part."""
    end, media = (b"\n\n", content_type(name)) if name.endswith(".sse") else (b"\n", content_type(name))
    line = FILLER if name.endswith(".sse") else b'{"message":{"content":"word"}}'
    data = (line + end) * filled + body(name)
    whole = agree([data], content_type=media)
    for border in range(filled and len((line + end) * filled) - 9, len(data), 41):
        assert agree([data[:border], b"", data[border:]], content_type=media) == whole
    interleaved = body(name).replace(end, end + (line + end) * 3)
    agree([interleaved[at : at + 500] for at in range(0, len(interleaved), 500)], content_type=media)


def stream(*parts: bytes) -> bytes:
    """Events of a chat stream that has shown its model, then the parts."""
    first = b'data: {"object":"chat.completion.chunk","model":"m","choices":[]}'
    return b"".join(part + b"\n\n" for part in (first, *parts))


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}'


@pytest.mark.parametrize("size", [MAX_PAYLOAD // 2, MAX_PAYLOAD - 200, MAX_PAYLOAD + 1])
def test_read_huge_events_as_a_full_reader(size: int) -> None:
    """Events near and above the bound of one payload, in one chunk and in several, are read by both alike."""
    huge = b'data: {"model":"huge","usage":{"prompt_tokens":1},"x":"' + b"z" * size + b'"}'
    data = stream(FILLER, huge, FILLER, USAGE)
    for step in (len(data), 1 << 16, 1_000_003):
        report = agree([data[at : at + step] for at in range(0, len(data), step)], content_type="text/event-stream")
        assert report is not None
        assert report.usage is not None
        assert (report.usage.input, report.usage.output) == (9, 2)


@pytest.mark.parametrize(
    ("event", "error", "asked"),
    [
        (b'data: {"\\u0075sage":{"prompt_tokens":8}}', False, 8),
        (b'data: {"usag\\u0065":{"prompt_tokens":8}}', False, 8),
        (b'data: {"error":{"message":"x"}}', True, None),
        (b'data: {"type":"error"}', True, None),
    ],
)
@pytest.mark.parametrize("before", [0, 1, 500])
def test_introduce_by_what_stands_behind_strangers(event: bytes, error: bool, asked: int | None, before: int) -> None:
    """However many payloads that show nothing come first, an error counts, and so does a name that has escapes."""
    report = agree([b"data: 1\n\n" * before + event + b"\n\n" + FILLER], content_type="text/event-stream")
    assert report is not None
    assert report.error is error
    assert (report.usage and report.usage.input) == asked


@pytest.mark.parametrize("before", [3, 40])
def test_look_for_the_model_of_a_known_dialect_in_its_first_events(before: int) -> None:
    """Where the dialect is asked for, the model is taken from one of the first payloads, whatever they hold."""
    named = b'data: {"choices":[],"model":"m"}'
    data = b"".join(event + b"\n\n" for event in (*[FILLER] * before, named, FILLER))
    report = agree([data], content_type="text/event-stream", dialect="openai-chat")
    assert (report is not None) is (before < reader.INTRODUCTION)


def test_skip_no_event_whose_ends_would_be_searched() -> None:
    """An event above the bound names its model without any mark: it is never passed over."""
    strangers = b'data: {"type":"mine"}\n\n' * reader.INTRODUCTION
    data = FILLER + b"\n\n" + b'data: {"model":"huge","x":"' + b"z" * MAX_PAYLOAD + b'"}\n\n'
    report = agree([strangers, data], content_type="text/event-stream")
    assert report is not None
    assert report.model == "huge"


@pytest.mark.parametrize("start", [b"", b'"text of an event"}\n\n', b'"}]}\n'])
def test_leave_a_torn_event_behind(start: bytes) -> None:
    """What follows a torn event is whole, also if nothing of the torn one was worth reading."""
    named = b'event: {"usage":{"prompt_tokens":3,"completion_tokens":1}}\ndata: {"error":{}}\n\n'
    report = agree([stream(), start + FILLER + b"\n\n" + named], 1, content_type="text/event-stream")
    assert report is not None
    assert report.usage is None


def test_take_no_byte_order_mark_within_a_body() -> None:
    """Only the first line of a body may begin with a byte order mark; behind others it makes an unknown field."""
    data = FILLER + b"\n\n\xef\xbb\xbf" + USAGE + b"\n\n"
    assert agree([data], content_type="text/event-stream", dialect="openai-chat") is None
    assert agree([data], content_type="text/event-stream") is None


def test_cut_and_parse_only_what_may_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand deltas between usage and error none is cut, let alone parsed; all that tells something is."""
    seen: list[bytes] = []
    take = UsageReader._take

    def taken(made: UsageReader, payload: Payload, *rest: Any) -> None:
        seen.append(payload.data)
        take(made, payload, *rest)

    monkeypatch.setattr(UsageReader, "_take", taken)
    error = b'data: {"error":{"message":"x"}}'
    found = UsageReader("text/event-stream")
    found.feed(stream())
    seen.clear()
    found.feed(b"\n\n".join([*[FILLER] * 500, USAGE, *[FILLER] * 500, error, *[FILLER] * 500, b"data: [DONE]", b""]))
    assert seen == [USAGE[6:], error[6:], b"[DONE]"]
    report = found.report()
    assert report is not None
    assert (report.error, report.complete) == (True, True)


# -- its parts ----------------------------------------------------------------------------------------------


def telling_names() -> Iterator[bytes]:
    """Every mark of every dialect, as it may stand in a payload."""
    for dialect in DIALECTS.values():
        for name in dialect.telling.names:
            yield f'"{name}"'.encode()
        for name, begins in dialect.telling.fields.items():
            yield f'"{name}":{begins.lstrip(chr(92))}'.encode()
            yield f'"{name}" \n : {begins.lstrip(chr(92))}'.encode()


@pytest.mark.parametrize("mark", [*telling_names(), DONE])
@pytest.mark.parametrize("text", [b"x", b'"', b"\n", b'"x":1,', b'data: {"a":"b c d e"}\n\n'])
def test_find_each_mark_wherever_it_stands(mark: bytes, text: bytes) -> None:
    """No window, leap or border hides a mark, behind text with quotation marks and line ends or without any."""
    for before in (*range(40), *range(FAR - 20, FAR + 20), *range(WINDOW - 20, WINDOW + 60), 3 * WINDOW, MAX_WINDOW):
        lead = (text * (before // len(text) + 1))[:before]
        # A line of its own, as an end mark has it.
        data = lead + b"\n" + mark + b"\n" + lead
        assert find_mark(data, 0, TELLING) == before + 1
        assert find_mark(data, before + 2, TELLING) == -1


@pytest.mark.parametrize(
    "nothing",
    [b'"usage":null', b'"usage": null', b'"done":false', b'"finish_reason":null', b'"stop_reason": null', b"usage:{"],
)
def test_pass_over_names_that_say_nothing(nothing: bytes) -> None:
    """A field that is null, as most events repeat it, is no mark, also where a window ends within it."""
    for before in range(3 * WINDOW):
        assert find_mark(b'"' * before + nothing + b"}", 0, TELLING) == -1


class Counted(bytes):
    """Bytes that count how many of them are looked at."""

    looked = 0

    def find(self, part: Any, start: Any = 0, end: Any = None) -> int:
        """Count and find."""
        found = super().find(part, start, end)
        stop = len(self) if end is None else min(end, len(self))
        Counted.looked += 64 + (stop if found < 0 else found) - min(start, stop)
        return found

    def rfind(self, part: Any, start: Any = 0, end: Any = None) -> int:
        """Count and find from the end."""
        found = super().rfind(part, start, end)
        Counted.looked += 64 + (len(self) if end is None else end) - max(found, start)
        return found


@pytest.mark.parametrize(
    "piece",
    [
        b":\\\n\n",
        b"x [DONE]\n\n",
        b"\n",
        b":\n",
        b"x",
        b'"',
        b'"error"\n\n',
        b'data: "type"\n\n',
        b'data: {"a":"\\n"}\n\n',
    ],
)
def test_look_at_hostile_bytes_a_bounded_number_of_times(piece: bytes) -> None:
    """However many marks, escapes or line ends a body has, the work grows with its bytes, not with their square."""
    looked = []
    for size in (1 << 15, 1 << 17):
        made = UsageReader("text/event-stream")
        made.feed(FILLER + b"\n\n")
        Counted.looked = 0
        frames = made._frames
        assert frames is not None
        made._skim(frames, Counted(piece * (size // len(piece))))
        looked.append(Counted.looked / size)
    # A leap for each mark at most, whose bound does not grow with the body: without one it is nearly 4 times as much.
    assert looked[1] <= 2 * looked[0]


@pytest.mark.parametrize(
    "claimed",
    [
        {"object": "response"},
        {"type": "message_stop"},
        {"usageMetadata": {}},
        {"candidates": [], "modelVersion": "g"},
        {"prompt_eval_count": 1},
        {"model": "o", "done": False},
        {"usage": {"prompt_tokens": 1}},
    ],
)
def test_show_each_way_of_claiming_a_payload(claimed: Any) -> None:
    """Each name by which alone a dialect claims a payload is one of those that are looked for before parsing."""
    assert detect(claimed) is not None
    assert sieves().introducing.search(json.dumps(claimed).encode())


@given(DOCUMENTS)
@settings(max_examples=60, deadline=None)
def test_show_every_payload_that_detection_claims(document: Any) -> None:
    """What a dialect claims shows one of the names that are looked for before parsing."""
    if isinstance(document, dict) and detect(document) is not None:
        assert sieves().introducing.search(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("data", "place", "ends", "before", "behind"),
    [
        (b"a\n\nb\n\nc", 4, EVENTS, 3, 6),
        (b"a\r\n\r\nb\r\n\r\nc", 5, EVENTS, 5, 10),
        (b"a\n\nb\nc\nd\n\ne", 5, EVENTS, 3, 10),
        (b"a\r\rb\r\rc", 4, EVENTS, 0, 7),
        (b"abc", 1, EVENTS, 0, 3),
        (b"a\nb\nc", 2, LINES, 2, 4),
        (b"abc", 1, LINES, 0, 3),
    ],
)
def test_find_the_ends_around_a_place(
    data: bytes, place: int, ends: tuple[bytes, ...], before: int, behind: int
) -> None:
    """The last end before a place and the first one behind it; the ends of the data where there is none."""
    assert end_before(data, 0, place, ends) == before
    assert end_behind(data, 0, place, ends) == behind
