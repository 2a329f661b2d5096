"""The reader: gaps, bounds, what is parsed, and bodies that mean harm."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asgi_metering.usage import TokenUsage, UsageReader, UsageReport, reader
from asgi_metering.usage.frames import MAX_PAYLOAD
from asgi_metering.usage.reader import INTRODUCTION, MAX_CANDIDATES, MAX_TEXT
from tests.usage.test_openai import body, chunk, delta, sse, stream
from tests.usage.vectors import read

HEAD = 2 << 10
TAIL = 16 << 10

CHAT_USAGE = {"prompt_tokens": 9, "completion_tokens": 500, "total_tokens": 509}


def chat_stream(padding: str) -> tuple[bytes, TokenUsage]:
    """A long chat stream with its usage at the end."""
    deltas = [delta(content=f"{padding}{number} ") for number in range(500)]
    return sse(*deltas, chunk(choices=[], usage=CHAT_USAGE), b"[DONE]"), TokenUsage(9, 500)


def responses_stream(padding: str) -> tuple[bytes, TokenUsage]:
    """A long Responses stream, whose last event repeats the whole output before its usage."""
    output = [{"type": "message", "content": [{"type": "output_text", "text": padding * 500}]}]
    usage = {
        "input_tokens": 37,
        "output_tokens": 11,
        "total_tokens": 48,
        "input_tokens_details": {"cached_tokens": 8},
    }
    response = {"id": "r", "object": "response", "model": "m"}
    return sse(
        {"type": "response.created", "response": {**response, "usage": None}},
        *({"type": "response.output_text.delta", "delta": padding} for _ in range(500)),
        {"type": "response.completed", "response": {**response, "output": output, "usage": usage}},
    ), TokenUsage(37, 11, cached=8)


def anthropic_stream(padding: str) -> tuple[bytes, TokenUsage]:
    """A long Anthropic stream, whose input is counted at the beginning and whose output at the end."""
    usage = {"input_tokens": 25, "cache_read_input_tokens": 400, "output_tokens": 1}
    return sse(
        {"type": "message_start", "message": {"id": "m", "model": "m", "usage": usage}},
        *({"type": "content_block_delta", "delta": {"type": "text_delta", "text": padding}} for _ in range(500)),
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}},
        {"type": "message_stop"},
    ), TokenUsage(425, 15, cached=400)


@pytest.mark.uncounted
@pytest.mark.parametrize("make", [chat_stream, responses_stream, anthropic_stream])
@pytest.mark.parametrize("padding", ["word", "x" * 200, "ä\U0001f600"])
def test_read_the_ends_of_a_long_stream(make: Callable[[str], tuple[bytes, TokenUsage]], padding: str) -> None:
    """The first 2 KiB and the last 16 KiB of a stream give its final usage, wherever the gap cuts it."""
    data, usage = make(padding)
    assert len(data) > HEAD + TAIL
    for shift in range(0, 300, 3):
        found = UsageReader("text/event-stream", keep_text=True)
        found.feed(data[: HEAD + shift])
        found.gap()
        found.feed(data[-TAIL + shift :])
        report = found.report()
        assert report is not None
        assert (report.usage, report.complete, report.partial) == (usage, True, False)
        assert report.model == "m"
        assert found.gapped
        assert found.text_chars > 0


def test_read_a_tail_that_begins_with_the_last_event() -> None:
    """A tail of nothing but the usage event loses nothing to resynchronisation."""
    found = UsageReader("text/event-stream")
    found.feed(sse(delta(content="a")))
    found.gap()
    found.feed(sse(chunk(choices=[], usage=CHAT_USAGE), b"[DONE]"))
    report = found.report()
    assert report is not None
    assert (report.usage, report.complete, report.problems) == (TokenUsage(9, 500), True, ())


def test_read_a_torn_event() -> None:
    """A piece of an event is searched for its usage, and the report says so."""
    found = UsageReader("text/event-stream")
    found.gap()
    found.feed(b'x"}}],"usage":' + json.dumps(CHAT_USAGE).encode() + b"}\n\n")
    report = found.report()
    assert report is not None
    assert (report.usage, report.dialect, report.problems) == (TokenUsage(9, 500), "openai-chat", ("clipped",))


def test_count_the_output_of_a_torn_event() -> None:
    """A running total found in a piece ends the seed, as a whole event would; a piece without one does not."""
    started = {"type": "message_start", "message": {"model": "m", "usage": {"input_tokens": 25, "output_tokens": 1}}}
    for piece, output, partial in ((b'{"output_tokens":15}', 15, False), (b'{"input_tokens":25}', 1, True)):
        found = UsageReader("text/event-stream")
        found.feed(sse(started))
        found.gap()
        found.feed(b'rn"},"usage":' + piece + b"}\n\n")
        report = found.report()
        assert report is not None
        assert (report.usage, report.partial) == (TokenUsage(25, output), partial)


@pytest.mark.parametrize("torn", [b'"usage":{"prompt_tokens":9', b'"usage":{}', b'"usage":{"x":1}', b"nothing", b""])
def test_read_nothing_from_a_torn_event(torn: bytes) -> None:
    """A usage object that is cut, empty or of no shape that is known counts nothing."""
    found = UsageReader("text/event-stream")
    found.gap()
    found.feed(torn + b"\n\n")
    assert found.report() is None


def test_take_the_event_that_a_gap_cut() -> None:
    """An event whose end fell into the gap counts if all of its data stands before it."""
    found = UsageReader("text/event-stream")
    found.feed(sse(chunk(choices=[], usage=CHAT_USAGE)).rstrip(b"\n"))
    found.gap()
    report = found.report()
    assert report is not None
    assert report.usage == TokenUsage(9, 500)


def test_read_lines_around_a_gap() -> None:
    """JSON lines are read on both sides of a gap; one that begins there is read if it is whole."""
    last = b'{"model":"o","done":true,"prompt_eval_count":26,"eval_count":282}'
    for rest in (b'rest"}\n' + last, last):
        found = UsageReader("application/x-ndjson")
        found.feed(b'{"model":"o","done":false}\n{"mod')
        found.gap()
        found.feed(rest)
        report = found.report()
        assert report is not None
        assert report.usage == TokenUsage(26, 282)


def embeddings(count: int) -> bytes:
    """A body whose usage and model stand behind its vectors."""
    data = [{"object": "embedding", "index": 0, "embedding": [0.25] * count}]
    usage = {"prompt_tokens": 8, "total_tokens": 8}
    return json.dumps({"object": "list", "data": data, "model": "e", "usage": usage}).encode()


def test_read_the_ends_of_a_long_body() -> None:
    """The ends of a JSON body give its usage and its model, and its end tells that it is complete."""
    data = embeddings(10_000)
    found = UsageReader("application/json; charset=utf-8", keep_text=True)
    found.feed(data[:HEAD])
    found.gap()
    found.feed(data[-TAIL:])
    assert found.report() == UsageReport(
        usage=TokenUsage(8, 0), model="e", dialect="openai-chat", complete=True, problems=("clipped",)
    )
    assert found.text() == ""


def test_forget_a_body_that_went_on_behind_a_gap() -> None:
    """What looked like the end of a body before another gap was none, and counts nothing."""
    found = UsageReader("application/json")
    found.feed(b'{"object":"list","model":"e",')
    found.gap()
    found.feed(b'{"usage":{"prompt_tokens":1}}')
    found.gap()
    found.feed(b", ")
    report = found.report()
    assert report is not None
    assert (report.usage, report.model, report.complete) == (None, "e", False)


def test_read_the_usage_at_the_beginning_of_a_long_body() -> None:
    """A usage that stands before the content is found in the kept beginning."""
    found = UsageReader("application/json")
    found.feed(b'{"usage":{"prompt_tokens":1,"completion_tokens":2},"id":"c","model":"m","object":"chat.completion",')
    found.gap()
    found.feed(b'"choices":[]}')
    report = found.report()
    assert report is not None
    assert (report.usage, report.model, report.response_id) == (TokenUsage(1, 2), "m", "c")


def test_take_no_model_from_behind_the_content_of_other_bodies() -> None:
    """A name behind the content may be a tool's: only dialects that put the model there are believed."""
    found = UsageReader("application/json")
    found.feed(b'{"id":"r","object":"response","status":"completed",')
    found.gap()
    found.feed(b'"tools":[{"type":"image_generation","model":"i"}],"usage":{"input_tokens":1,"output_tokens":2}}')
    report = found.report()
    assert report is not None
    assert (report.usage, report.model, report.response_id) == (TokenUsage(1, 2), None, "r")


def test_keep_the_model_of_an_earlier_event() -> None:
    """A piece of an event does not rename the model that a whole one named."""
    found = UsageReader("text/event-stream")
    large = {"type": "response.completed", "response": {"model": "other", "output": "x" * MAX_PAYLOAD}}
    found.feed(sse({"type": "response.created", "response": {"id": "r", "model": "m"}}, large))
    report = found.report()
    assert report is not None
    assert (report.model, report.usage) == ("m", None)


@pytest.mark.parametrize(
    ("payload", "usage"),
    [
        (chunk(padding="x" * MAX_PAYLOAD, usage=CHAT_USAGE), TokenUsage(9, 500)),
        (
            {
                "type": "response.completed",
                "response": {
                    "id": "r",
                    "model": "m",
                    "output": ["x" * MAX_PAYLOAD],
                    "usage": {"input_tokens": 1, "output_tokens": 2, "total_tokens": 3},
                },
            },
            TokenUsage(1, 2),
        ),
        (
            {"type": "message_delta", "delta": {"x": "y" * MAX_PAYLOAD}, "usage": {"output_tokens": 15}},
            TokenUsage(None, 15),
        ),
        (
            {"modelVersion": "m", "candidates": ["x" * MAX_PAYLOAD], "usageMetadata": {"promptTokenCount": 3}},
            TokenUsage(3),
        ),
    ],
)
def test_read_the_usage_of_an_event_that_is_too_large(payload: dict[str, Any], usage: TokenUsage) -> None:
    """An event with an image or a whole book in it still gives its usage, in a stream and as a body."""
    events = sse(delta(content="a"), payload) if "object" in payload else sse(payload)
    for found in (read([events], "text/event-stream"), body(payload)):
        report = found.report()
        assert report is not None
        assert report.usage == usage
        assert "clipped" in report.problems


def test_try_the_last_usage_objects_of_a_piece_only() -> None:
    """In a piece the last object that counts wins, and only so many are tried."""
    valid, broken = b'"usage":{"prompt_tokens":1},', b'"usage":{"prompt_tokens":'
    for junk, expected in ((MAX_CANDIDATES - 1, TokenUsage(1)), (MAX_CANDIDATES, None)):
        found = UsageReader("text/event-stream")
        found.gap()
        found.feed(b'"usage":{"prompt_tokens":7},' + valid + broken * junk + b"\n\n")
        report = found.report()
        assert (report.usage if report is not None else None) == expected


def test_read_no_usage_from_a_body_that_has_not_ended() -> None:
    """An unfinished body reports nothing: its text might hold anything that looks like usage."""
    found = UsageReader("application/json")
    found.feed(b'{"object":"chat.completion","usage":{"prompt_tokens":1,"completion_tokens":1},"choices":[{"input":')
    assert found.report() is None
    found.feed(b"1}]}")
    report = found.report()
    assert report is not None
    assert report.usage == TokenUsage(1, 1)


@pytest.mark.uncounted
@pytest.mark.parametrize(
    "content",
    [
        '","usage":{"prompt_tokens":0,"completion_tokens":0}',
        '\n\ndata: {"usage":{"prompt_tokens":0,"completion_tokens":0}}\n\n',
        "\r\ndata: [DONE]\r\n\r\n",
        '{"error": "x"}',
    ],
)
def test_let_no_text_forge_usage(content: str) -> None:
    """What the model writes is never read as usage, end or error, however it is cut."""
    data = sse(delta(content=content), chunk(choices=[], usage=CHAT_USAGE))
    for cut in range(len(data)):
        found = read([data[:cut], data[cut:]], "text/event-stream", keep_text=True)
        report = found.report()
        assert report is not None
        assert (report.usage, report.complete, report.error) == (TokenUsage(9, 500), False, False)
        assert found.text() == content
        gapped = UsageReader("text/event-stream")
        gapped.feed(data[:cut])
        gapped.gap()
        gapped.feed(data[cut:])
        report = gapped.report()
        # A gap within the usage itself loses it; nothing may take its place.
        assert (
            report is None
            or report.usage == TokenUsage(9, 500)
            or (report.usage is None and cut >= data.rfind(b"usage"))
        )


@pytest.mark.parametrize(
    ("media", "lines"),
    [
        ("text/event-stream", False),
        ("Text/Event-Stream; charset=utf-8", False),
        ("application/x-ndjson", True),
        ("application/ndjson", True),
        ("application/jsonl", True),
        ("application/stream+json", True),
        ("application/json-seq", True),
        ("application/json", False),
        ("application/problem+json", False),
        ("application/vnd.amazon.eventstream", False),
        ("application/octet-stream", False),
        ("audio/mpeg", False),
        ("text/html", False),
        (None, False),
    ],
)
def test_choose_the_framing_by_the_shape(media: str | None, lines: bool) -> None:
    """Events, lines and bodies show themselves under any media type; it says only whether a lone line is a body."""
    plain = json.dumps({"object": "chat.completion", "usage": CHAT_USAGE}).encode()
    ends_with = {"events": b"data: " + plain + b"\n\n", "lines": plain + b"\n" + plain + b"\n", "body": plain}
    for name, data in ends_with.items():
        report = read([data], media).report()
        assert report is not None
        assert report.usage == TokenUsage(9, 500)
        assert report.complete is (name == "body" and not lines)


@pytest.mark.parametrize("media", ["text/event-stream", "application/json", "application/x-ndjson", None, "image/png"])
@pytest.mark.parametrize(
    "data", [b"", b" ", b"\n" * 500, b"nothing", b"7", b"\xef\xbb\xbf", b"\0" * 300, b"a: b\n\n" * 50, b"<html>" * 50]
)
def test_read_no_usage_where_no_format_shows(media: str | None, data: bytes) -> None:
    """What begins as nothing that can hold usage reports none, in any pieces, also behind a gap."""
    for size in (1, 5, len(data) or 1):
        found = read([data[at : at + size] for at in range(0, len(data), size)], media)
        assert found.report() is None
        found.gap()
        found.feed(b"x")
        assert found.report() is None


@pytest.mark.parametrize("blank", [b"\n", b" ", b"\r\n"])
def test_pass_over_blank_beginnings(blank: bytes) -> None:
    """However much white space stands before it, a format shows itself."""
    plain = json.dumps({"object": "chat.completion", "usage": CHAT_USAGE}).encode()
    for data in (plain, plain + b"\n" + plain + b"\n", *([b"data: " + plain + b"\n\n"] if blank != b" " else [])):
        for size in (1, 300):
            whole = blank * 200 + data
            report = read([whole[at : at + size] for at in range(0, len(whole), size)], None).report()
            assert report is not None
            assert report.usage == TokenUsage(9, 500)


def test_read_an_object_on_several_lines_as_one_body() -> None:
    """No JSON text has a line that closes before one that opens: whatever its layout, one body stays one."""
    document = {"model": "m", "choices": [{"a": {}}, {"b": {}}], "object": "chat.completion", "usage": CHAT_USAGE}
    for text in (
        json.dumps(document, indent=1),
        json.dumps(document).replace("}, {", "}\n,\n {"),
        json.dumps(document) + "\n\n",
        json.dumps(document, indent=0).replace("\n", "\r"),
    ):
        for media in ("application/x-ndjson", None):
            report = read([bytes([byte]) for byte in text.encode()], media).report()
            assert report is not None
            assert report.usage == TokenUsage(9, 500)


def test_read_lines_around_a_gap_before_they_showed_themselves() -> None:
    """A gap in the first line leaves it to the media type what follows: lines, or the end of one body."""
    line = json.dumps({"object": "chat.completion", "usage": CHAT_USAGE}).encode()
    for media, usage in (("application/x-ndjson", TokenUsage(9, 500)), ("application/json", TokenUsage(9, 500))):
        found = read([line[:30]], media)
        found.gap()
        found.feed(b'x"}\n' + line + b"\n")
        report = found.report()
        assert report is not None
        assert report.usage == usage


@pytest.mark.parametrize(
    ("data", "media", "streams"),
    [
        (b"", None, False),
        (b"", "text/event-stream", True),
        (b"", "application/x-ndjson", True),
        (b"data: a", "application/json", True),
        (b'{"a":1}', "application/json", False),
        (b'{"a":1}', "application/x-ndjson", True),
        (b'{"a":1}\n{"a":2}', None, True),
        (b'{\n"a":1}', "application/x-ndjson", False),
        (b"0:[]", None, True),
        (b"[1", None, False),
        (b"nothing that shows itself", "image/png", False),
    ],
)
def test_tell_a_stream_from_a_body(data: bytes, media: str | None, streams: bool) -> None:
    """Events and lines are a stream by their shape; before anything showed itself the media type says so."""
    assert read([data], media).streams is streams


def test_take_a_first_line_beyond_the_bound_for_a_body() -> None:
    """A first line that is too large to wait for is read as a body, whose end gives its usage."""
    found = read([b'{"object":"list","data":"' + b"x" * MAX_PAYLOAD], None)
    found.feed(b'","usage":{"prompt_tokens":9,"total_tokens":9}}')
    report = found.report()
    assert report is not None
    assert report.usage == TokenUsage(9, 0)


def test_parse_only_what_may_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the model is known, deltas are parsed only where their text is wanted."""
    parsed: list[bytes] = []
    parse = reader._parse
    monkeypatch.setattr(reader, "_parse", lambda data: (parsed.append(data), parse(data))[1])
    events = [*(delta(content="x") for _ in range(100)), chunk(choices=[], usage=CHAT_USAGE), b"[DONE]"]
    assert stream(*events).report() == stream(*events, keep_text=True).report()
    assert len(parsed) == 2 + 101
    parsed.clear()
    # What shows no name counts for nothing, unless escapes might hide one.
    for mine, count in (({"hello": 1}, 2), ({"type": "mine"}, INTRODUCTION + 1), ({"hello": "\n"}, INTRODUCTION + 1)):
        parsed.clear()
        report = stream(*[mine] * 100, *events).report()
        assert report is not None
        assert (report.usage, report.complete) == (TokenUsage(9, 500), True)
        assert len(parsed) == count


def test_look_for_the_model_in_the_first_events() -> None:
    """The model is taken from an event that holds nothing else, behind one that showed the dialect."""
    named = {"type": "response.in_progress", "response": {"model": "m", "usage": None}}
    report = stream({"type": "response.output_text.delta", "delta": "a"}, named).report()
    assert report is not None
    assert (report.dialect, report.model) == ("openai-responses", "m")


def test_give_way_to_a_dialect_that_knows_the_payload() -> None:
    """An application's own event that looks like another family does not hide the real one."""
    mine = {"type": "message_start", "id": 1}
    report = stream(mine, delta(content="a"), chunk(choices=[], usage=CHAT_USAGE)).report()
    assert report is not None
    assert (report.dialect, report.usage) == ("openai-chat", TokenUsage(9, 500))


def test_stay_with_a_dialect_that_has_counted() -> None:
    """Once usage was read, another family's mark does not take over."""
    report = stream(chunk(choices=[], usage=CHAT_USAGE), {"type": "message_start", "message": {"usage": {}}}).report()
    assert report is not None
    assert (report.dialect, report.usage) == ("openai-chat", TokenUsage(9, 500))


def test_keep_text_up_to_a_bound() -> None:
    """Text is kept up to the bound, to the character, and counted beyond it, pending events included."""
    assert not stream(delta(content="x" * MAX_TEXT), keep_text=True).text_truncated
    part = "x" * 30_000
    found = stream(*[delta(content=part)] * 7, keep_text=True)
    assert found.text() == "x" * MAX_TEXT
    assert found.text_chars == 210_000
    assert found.text_truncated
    found.feed(sse(delta(content="abc")).rstrip())
    assert found.text_chars == 210_003
    assert len(found.text()) == MAX_TEXT


def test_keep_no_text_unless_asked() -> None:
    """Without keep_text nothing is gathered and nothing counted."""
    found = stream(delta(content="abc"))
    assert (found.text(), found.text_chars, found.text_truncated) == ("", 0, False)


def test_join_a_character_that_two_deltas_cut() -> None:
    """Halves of a surrogate pair become one character again; a lone half becomes the replacement character."""
    events = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"%s"}}]}\n\n'
    data = b"".join(events % part for part in (b"\\ud83d", b"\\ude00", b"\\ud83d"))
    assert read([data], "text/event-stream", keep_text=True).text() == "\U0001f600�"


@pytest.mark.parametrize("label", ["", "x" * 201, "a\nb", "a\x00b", "\ud800", 3, ["m"], {"m": 1}, None])
def test_refuse_a_label_that_is_no_name(label: Any) -> None:
    """Models and ids that are empty, endless, unprintable or no strings are not reported."""
    payload = {"object": "chat.completion", "id": label, "model": label, "choices": [{"finish_reason": label}]}
    report = body(payload).report()
    assert report is not None
    assert (report.model, report.response_id, report.finish_reason) == (None, None, None)


@pytest.mark.parametrize("coding", ["compress", "*", "gzip, br"])
def test_read_nothing_from_an_unknown_coding(coding: str) -> None:
    """A body that cannot be decoded gives no report, and says why."""
    found = read([sse(chunk(usage=CHAT_USAGE))], "text/event-stream", content_encoding=coding)
    assert found.report() == UsageReport(problems=("no_decoder",))
    assert found.undecodable


def test_keep_what_came_before_a_broken_coding() -> None:
    """A compressed body that breaks keeps what was read before, flagged; so does one with a gap."""
    packed = gzip.compress(sse(chunk(choices=[], usage=CHAT_USAGE)))
    broken = read([packed + b"garbage"], "text/event-stream", content_encoding="gzip")
    gapped = read([packed], "text/event-stream", content_encoding="gzip")
    gapped.gap()
    gapped.feed(gzip.compress(sse(chunk(choices=[], usage={"prompt_tokens": 1}))))
    for found in (broken, gapped):
        report = found.report()
        assert report is not None
        assert (report.usage, report.problems) == (TokenUsage(9, 500), ("undecodable",))
        assert found.undecodable


def test_stop_reading_a_bomb() -> None:
    """A body that inflates without end is dropped within bounds."""
    bomb = gzip.compress(b'{"usage":' + b" " * (80 << 20))
    found = read([bomb], "application/json", content_encoding="gzip")
    assert found.report() == UsageReport(problems=("undecodable",))
    assert found.undecodable


def hostile() -> Iterator[bytes]:
    """Yield JSON that parsers choke on."""
    yield b"[" * 100_000
    yield b'{"a":' * 100_000
    yield b'{"usage":' * 20_000 + b"1" + b"}" * 20_000
    yield b'{"object":"chat.completion","usage":{"prompt_tokens":' + b"9" * 5000 + b"}}"
    yield b'{"object":"chat.completion","usage":{"prompt_tokens":1e' + b"9" * 50 + b"}}"
    yield b'{"object":"chat.completion","usage":{"prompt_tokens":[[[]]],"total_tokens":{}}}'
    yield b'\xff\xfe{\x00"\x00'
    yield b'{"object":"\xff\xff","usage":{"prompt_tokens":1}}'
    yield b'{"type":"message_start","message":[],"usage":"x"}'
    yield b'{"object":"response","output":{"a":1},"response":[]}'
    yield b'{"usageMetadata":[1],"candidates":{"a":1}}'
    yield b"nul"
    yield b"NaN"
    yield b"\x00" * 1000


@pytest.mark.parametrize("payload", list(hostile()))
@pytest.mark.parametrize("media", ["text/event-stream", "application/x-ndjson", "application/json", None])
def test_survive_hostile_json(payload: bytes, media: str | None) -> None:
    """Nesting, endless numbers, wrong types and broken UTF-8 never raise, whole, torn or clipped."""
    framed = b"data: " + payload + b"\n\n" if media == "text/event-stream" else payload + b"\n"
    for gaps in (0, 1):
        found = UsageReader(media, keep_text=True)
        for _ in range(gaps):
            found.gap()
        found.feed(framed)
        report = found.report()
        found.text()
        found.gap()
        found.feed(b"usage" + framed)
        found.report()
        assert report is None or report.usage is None or report.usage == TokenUsage(1)


def test_accept_any_bytes_like_chunk() -> None:
    """Chunks may be bytearrays or memoryviews, which their owner may change afterwards."""
    data = bytearray(sse(chunk(choices=[], usage=CHAT_USAGE)))
    found = UsageReader("text/event-stream")
    found.feed(memoryview(data)[:20])
    found.feed(data[20:])
    data[:] = b""
    report = found.report()
    assert report is not None
    assert report.usage == TokenUsage(9, 500)


def test_keep_the_first_error_that_an_answer_carries() -> None:
    """The error of an event, or of a response that failed, is kept for who looks what it means; no huge one."""
    first = {"type": "error", "error": {"type": "overloaded_error", "message": "x"}, "usage": {"a": [1.5]}}
    reader = stream(first, {"error": {"message": "second"}})
    assert json.loads(reader.failure) == {"type": "error", "error": first["error"]}
    failed = {"type": "response.failed", "response": {"id": "r", "error": {"code": "rate_limit_exceeded"}}}
    assert json.loads(stream(failed).failure)["error"] == {"code": "rate_limit_exceeded"}
    assert stream({"error": {"message": "x" * 100_000}}).failure == b""
    assert stream({"id": "1"}).failure == b""
