"""Bedrock: Converse, the metrics of InvokeModel, and the binary framing of both."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest

from asgi_metering.usage import TokenUsage, UsageReader, eventstream
from asgi_metering.usage.eventstream import MAX_MESSAGE, PRELUDE, EventStreamFrames, is_prelude
from asgi_metering.usage.frames import MAX_PAYLOAD, Payload
from tests.usage import vectors
from tests.usage.test_openai import body, sse
from tests.usage.vectors import read

MEDIA = "application/vnd.amazon.eventstream"
DECODED = vectors.body("bedrock-converse-stream.ndjson").splitlines()


def text_header(name: str, value: str) -> bytes:
    """A header whose value is text."""
    return bytes([len(name)]) + name.encode() + b"\7" + len(value).to_bytes(2, "big") + value.encode()


def message(payload: bytes, headers: bytes) -> bytes:
    """One message as it goes over the wire."""
    total = PRELUDE + len(headers) + len(payload) + 4
    prelude = total.to_bytes(4, "big") + len(headers).to_bytes(4, "big")
    data = prelude + zlib.crc32(prelude).to_bytes(4, "big") + headers + payload
    return data + zlib.crc32(data).to_bytes(4, "big")


def event(kind: str, payload: Any, *, name: str = ":event-type") -> bytes:
    """One event, with the headers that Bedrock sends and one of every other type."""
    others = b"".join(
        bytes([1]) + b"x" + bytes([kind]) + value
        for kind, value in (
            (0, b""), (1, b""), (2, b"\1"), (3, b"\1\2"), (4, b"1234"), (5, b"12345678"),
            (6, b"\0\3abc"), (8, b"12345678"), (9, b"1" * 16),
        )
    )  # fmt: skip
    headers = others + text_header(name, kind) + text_header(":content-type", "application/json")
    return message(json.dumps(payload).encode(), headers + text_header(":message-type", "event"))


def wire() -> bytes:
    """The sample's stream in its binary form."""
    parts = []
    for line in DECODED:
        ((kind, payload),) = json.loads(line).items()
        parts.append(event(kind, payload))
    return b"".join(parts)


@pytest.mark.parametrize("media", [MEDIA, "application/octet-stream", None, "text/event-stream", "application/json"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 1 << 20])
def test_read_the_binary_stream_in_any_pieces(size: int, media: str | None) -> None:
    """A binary event stream gives the counts and the text of its decoded form, under any content type."""
    data = wire()
    reader = read([data[at : at + size] for at in range(0, len(data), size)], media, keep_text=True)
    vectors.check("bedrock-converse-stream.ndjson", reader.report())
    assert reader.text() == "ok"
    assert reader.streams


@pytest.mark.uncounted
def test_read_the_binary_stream_cut_in_two_anywhere() -> None:
    """A border at any byte of a binary event stream changes nothing."""
    data = wire()
    for cut in range(len(data) + 1):
        reader = read([data[:cut], data[cut:]], MEDIA, keep_text=True)
        vectors.check("bedrock-converse-stream.ndjson", reader.report())
        assert reader.text() == "ok"


def test_read_the_models_own_events_out_of_chunks() -> None:
    """InvokeModel wraps the model's events in base64; their own usage counts, before the metrics behind them."""
    lines = [line.removeprefix(b"data: ") for line in vectors.body("anthropic-messages.sse").splitlines()]
    events = [json.loads(line) for line in lines if line.startswith(b"{")]
    events[-1]["amazon-bedrock-invocationMetrics"] = {"inputTokenCount": 1, "outputTokenCount": 2}
    chunks = [event("chunk", {"bytes": base64.b64encode(json.dumps(one).encode()).decode()}) for one in events]
    reader = read(chunks, MEDIA, keep_text=True)
    vectors.check("anthropic-messages.sse", reader.report())
    assert reader.text() == "Hello"


@pytest.mark.parametrize("payload", [{"bytes": "?"}, {"bytes": 1}, {}, [], "x", {"bytes": "eHg="}])
def test_read_nothing_from_a_chunk_that_holds_no_payload(payload: Any) -> None:
    """A chunk whose bytes are no base64, or no JSON, says nothing and hurts nothing."""
    assert read([event("chunk", payload)], MEDIA).report() is None


def test_read_what_a_cache_keeps_for_an_hour() -> None:
    """What is written to a cache for an hour is told apart, for it costs more."""
    usage = {"inputTokens": 1, "outputTokens": 2, "cacheWriteInputTokens": 9}
    usage["cacheDetails"] = [{"ttl": "5m", "inputTokens": 5}, {"ttl": "1h", "inputTokens": 4}]  # type: ignore[assignment]
    report = read([event("metadata", {"usage": usage})], MEDIA).report()
    assert report is not None
    assert report.usage == TokenUsage(10, 2, cache_write=9, cache_write_1h=4)


def test_read_a_failure_of_the_binary_stream() -> None:
    """An exception comes as a message of its own type, and is an error; its text is none of the model's."""
    failure = event("throttlingException", {"message": "slow down"}, name=":exception-type")
    report = read([event("messageStart", {"role": "assistant"}), failure], MEDIA).report()
    assert report is not None
    assert report.error
    assert report.usage is None


@pytest.mark.uncounted
def test_pass_over_a_message_that_breaks_its_checksum() -> None:
    """A byte that changed on the way costs the message that it lies in, and nothing is read from that."""
    data = wire()
    last = data.rindex(b"metadata")
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 0x55
        for size in (50, len(data)):
            pieces = [bytes(broken[start : start + size]) for start in range(0, len(data), size)]
            report = read(pieces, MEDIA, keep_text=True).report()
            usage = report.usage if report is not None else None
            assert usage in (None, TokenUsage(47, 20))
            # The beginning is what the framing shows itself by.
            assert usage is not None or at < PRELUDE or at > last - 150


def test_go_on_behind_a_gap() -> None:
    """The next whole message behind a gap is found by its checksum; the one that was cut is lost."""
    data = wire()
    for cut in (PRELUDE, 150, 300):
        reader = UsageReader(MEDIA, keep_text=True)
        reader.feed(data[:cut])
        reader.gap(100)
        for at in range(cut + 100, len(data), 9):
            reader.feed(data[at : at + 9])
        report = reader.report()
        assert report is not None
        assert report.usage == TokenUsage(47, 20)


def test_believe_a_message_by_its_checksum_alone() -> None:
    """What a message holds is read once the checksum behind it agrees, and the next one is found all the same."""
    broken = bytearray(event("metadata", {"usage": {"inputTokens": 4, "outputTokens": 2}}))
    broken[-20] ^= 0x55
    frames = EventStreamFrames()
    assert frames.feed(bytes(broken)) == []
    assert frames.feed(event("messageStop", {})) == [Payload(b'{"messageStop":{}}')]


def test_check_each_byte_of_messages_that_break_their_checksums_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many beginnings of messages lie in a broken one, the work grows with the bytes: its length was proved."""
    checked: list[int] = []
    read_one = eventstream._read

    def counted(message: bytes) -> list[Payload]:
        checked.append(len(message))
        return read_one(message)

    monkeypatch.setattr(eventstream, "_read", counted)
    start = (6_000).to_bytes(4, "big") + bytes(4)
    data = (start + zlib.crc32(start).to_bytes(4, "big")) * 5_000
    frames = EventStreamFrames()
    assert frames.feed(data) == []
    assert sum(checked) == len(data)
    assert frames.feed(event("messageStop", {})) == [Payload(b'{"messageStop":{}}')]


def test_look_for_no_prelude_twice() -> None:
    """Bytes that are nobody's are kept no longer than a prelude, and looked at once."""
    frames = EventStreamFrames()
    frames.gap()
    for _ in range(100):
        assert frames.feed(b"\0" * 1_000) == []
        assert len(frames._begun) < PRELUDE
    assert frames.feed(b"x" * 20 + b"\0\0\0\x20\0\0") == []
    assert frames.feed(event("messageStop", {})) == [Payload(b'{"messageStop":{}}')]


def test_pass_over_a_message_beyond_the_bound() -> None:
    """A message of megabytes is neither kept nor parsed; the next one is found behind it."""
    large = event("contentBlockDelta", {"x": "y" * (MAX_PAYLOAD + 5)})
    frames = EventStreamFrames()
    found: list[Payload] = []
    for at in range(0, len(large), 60_000):
        found += frames.feed(large[at : at + 60_000])
        assert len(frames._begun) <= MAX_PAYLOAD
    found += frames.feed(event("messageStop", {"stopReason": "end_turn"}))
    assert [payload.data for payload in found] == [b'{"messageStop":{"stopReason": "end_turn"}}']


def test_know_a_prelude() -> None:
    """Lengths that do not fit each other begin no message, whatever their checksum says."""

    def prelude(total: int, headers: int) -> bytes:
        start = total.to_bytes(4, "big") + headers.to_bytes(4, "big")
        return start + zlib.crc32(start).to_bytes(4, "big")

    assert is_prelude(prelude(16, 0))
    assert not is_prelude(prelude(16, 0)[:11])
    assert not is_prelude(prelude(15, 0))
    assert not is_prelude(prelude(16, 1))
    assert not is_prelude(prelude(MAX_MESSAGE + 1, 0))
    assert not is_prelude(prelude(MAX_MESSAGE, 1 << 18))
    assert not is_prelude(prelude(16, 0)[:8] + b"1234")


@pytest.mark.parametrize("headers", [b"", b"\1", b"\1x", b"\1x\x0a1", b"\x09too short", text_header(":other", "x")])
def test_pass_over_a_message_without_a_type(headers: bytes) -> None:
    """A message whose headers name no event, or break off, is no payload."""
    frames = EventStreamFrames()
    assert frames.feed(message(b"{}", headers)) == []
    assert frames.feed(event("messageStop", {})) == [Payload(b'{"messageStop":{}}')]


def test_read_an_event_without_a_payload() -> None:
    """An event may have no payload at all."""
    assert EventStreamFrames().feed(message(b"", text_header(":event-type", "ping"))) == [Payload(b'{"ping":null}')]


@pytest.mark.parametrize(
    ("usage", "expected", "problems"),
    [
        ({"inputTokens": 5, "outputTokens": 2, "totalTokens": 7}, TokenUsage(5, 2), ()),
        (
            {"inputTokens": 5, "outputTokens": 2, "cacheReadInputTokens": 3, "cacheWriteInputTokens": 4},
            TokenUsage(12, 2, 3, 4),
            (),
        ),
        ({"outputTokens": 2}, TokenUsage(None, 2), ()),
        ({"inputTokens": 5}, TokenUsage(5), ()),
        ({"inputTokens": 5, "outputTokens": 2, "totalTokens": 6}, None, ("total_below_parts",)),
        ({"inputTokens": -5, "outputTokens": 2}, None, ("invalid_count",)),
    ],
)
def test_read_a_usage_object_of_bedrock(usage: Any, expected: TokenUsage | None, problems: tuple[str, ...]) -> None:
    """Cache reads and writes are counted beside the input (section 1), and what cannot be is refused."""
    report = body({"output": {"message": {}}, "stopReason": "end_turn", "usage": usage}).report()
    assert report is not None
    assert (report.usage, report.problems, report.finish_reason) == (expected, problems, "end_turn")


def test_read_the_metrics_of_the_last_chunk() -> None:
    """The metrics count where the model itself said nothing, cache reads and writes beside the input."""
    metrics = {"inputTokenCount": 5, "outputTokenCount": 2, "cacheReadInputTokenCount": 3}
    report = body({"generation": "x", "amazon-bedrock-invocationMetrics": metrics}).report()
    assert report is not None
    assert report.usage == TokenUsage(8, 2, cached=3)
    empty = body({"amazon-bedrock-invocationMetrics": {}}).report()
    assert empty is not None
    assert (empty.usage, empty.complete) == (None, True)


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"contentBlockDelta": {"delta": {"text": "a"}}}, "a"),
        ({"contentBlockDelta": {"delta": {"toolUse": {"input": '{"x":'}}}}, '{"x":'),
        ({"contentBlockDelta": {"delta": {"reasoningContent": {"text": "t"}}}}, "t"),
        ({"contentBlockDelta": {"delta": {"reasoningContent": {"signature": "s"}}}}, ""),
        ({"contentBlockDelta": {"delta": None}}, ""),
        (
            {
                "stopReason": "tool_use",
                "output": {
                    "message": {
                        "content": [
                            {"reasoningContent": {"reasoningText": {"text": "t"}}},
                            {"text": "a"},
                            {"toolUse": {"name": "f", "input": {"x": 1}}},
                            {"image": {}},
                        ]
                    }
                },
            },
            'ta{"x":1}',
        ),
    ],
)
def test_gather_bedrocks_text(payload: Any, text: str) -> None:
    """Text, reasoning and the arguments of tools are text, streamed or not."""
    data = sse({"messageStart": {"role": "assistant"}}, payload)
    assert read([data], "text/event-stream", keep_text=True).text() == text


@pytest.mark.parametrize(
    "payload", [{"metadata": {}}, {"metadata": {"usage": {"x": 1}}}, {"messageStart": 1}, {"a": {}}]
)
def test_claim_no_payload_of_others_for_bedrock(payload: Any) -> None:
    """Objects with one field are nobody's unless it is an event of Bedrock's, with what such an event has."""
    assert body(payload).report() is None
