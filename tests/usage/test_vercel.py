"""Vercel's AI SDK: the data stream of coded lines, and the UI message stream whose usage applications put there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from asgi_metering.usage import TokenUsage, UsageReader
from asgi_metering.usage.coded import CodedFrames
from asgi_metering.usage.frames import MAX_PAYLOAD, Payload
from tests.usage.test_openai import sse
from tests.usage.vectors import read


def coded(*lines: tuple[str, Any]) -> bytes:
    """Write lines of the data stream."""
    return b"".join(f"{code}:{json.dumps(value)}\n".encode() for code, value in lines)


def data(*lines: tuple[str, Any]) -> UsageReader:
    """Read lines of the data stream."""
    return read([coded(*lines)], "text/plain; charset=utf-8", keep_text=True)


def step(given: Any, written: Any) -> dict[str, Any]:
    """What a finish line says."""
    return {"finishReason": "stop", "usage": {"promptTokens": given, "completionTokens": written}}


@pytest.mark.parametrize(
    ("lines", "expected", "problems"),
    [
        ([("e", step(7, 2)), ("d", step(7, 2))], TokenUsage(7, 2), ()),
        ([("e", step(7, 2)), ("e", step(9, 3)), ("d", step(16, 5))], TokenUsage(16, 5), ()),
        ([("e", step(7, 2)), ("e", step(9, 3))], TokenUsage(16, 5), ()),
        ([("e", step(7, 2)), ("e", step(None, 3))], TokenUsage(None, 5), ()),
        ([("e", step(None, None)), ("e", step(9, None))], None, ()),
        ([("e", step(7, 2)), ("d", step(None, None))], TokenUsage(7, 2), ()),
        ([("d", step(7, 2)), ("e", step(7, 2))], TokenUsage(7, 2), ()),
        ([("d", step(None, 0))], TokenUsage(None, 0), ()),
        ([("d", step(-1, 2))], None, ("invalid_count",)),
        ([("d", {"finishReason": "stop"})], None, ()),
    ],
)
def test_count_the_steps_of_a_data_stream(
    lines: list[tuple[str, Any]], expected: TokenUsage | None, problems: tuple[str, ...]
) -> None:
    """The whole message's counts win; without them the steps add up, and one that counts nothing leaves no sum."""
    report = data(("f", {"messageId": "m"}), *lines).report()
    assert report is not None
    assert (report.usage, report.problems, report.response_id) == (expected, problems, "m")
    assert report.complete is any(code == "d" for code, _ in lines)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([("0", "Hel"), ("0", "lo"), ("g", "why")], "Hellowhy"),
        ([("0", ""), ("2", [{"own": "data"}]), ("8", ["x"]), ("h", {"url": "u"}), ("j", {"signature": "s"})], ""),
        ([("9", {"toolCallId": "1", "toolName": "f", "args": {"x": 1}}), ("a", {"result": "r"})], '{"x":1}'),
        (
            [
                ("b", {"toolCallId": "1", "toolName": "f"}),
                ("c", {"toolCallId": "1", "argsTextDelta": '{"x":'}),
                ("c", {"toolCallId": "1", "argsTextDelta": "1}"}),
                ("9", {"toolCallId": "1", "toolName": "f", "args": {"x": 1}}),
            ],
            '{"x":1}',
        ),
        ([("9", []), ("c", [1])], ""),
    ],
)
def test_gather_the_text_of_a_data_stream(lines: list[tuple[str, Any]], text: str) -> None:
    """Text, reasoning and the arguments of tools are text, once, whether or not they were streamed first."""
    found = data(("f", {}), *lines)
    assert found.text() == text
    assert not found.heard().estimated


def test_read_an_error_of_a_data_stream() -> None:
    """The line of an error, or a finish reason that says so, is one."""
    for line in (("3", "boom"), ("d", {"finishReason": "error"})):
        report = data(("0", "x"), line).report()
        assert report is not None
        assert report.error


def test_cut_coded_lines() -> None:
    """Each line becomes an object by its code; lines without one are no payload, and a torn one stays as it is."""
    frames = CodedFrames()
    assert frames.feed(b'0:"a"\nnothing\n\nz:1\nd:{"x"') == [Payload(b'{"vercel:0":"a"}')]
    assert frames.pending() == Payload(b'{"vercel:d":{"x"}')
    assert frames.gap() == [Payload(b'{"vercel:d":{"x"}')]
    assert frames.pending() is None
    assert frames.feed(b'rest"\n0:"b"\n') == [Payload(b'rest"', torn=True), Payload(b'{"vercel:0":"b"}')]
    large = frames.feed(b'0:"' + b"x" * (MAX_PAYLOAD + 1) + b'"\n')
    assert [(payload.data[:13], payload.tail is not None) for payload in large] == [(b'{"vercel:0":"', True)]
    frames.feed(b"z:")
    assert (frames.pending(), frames.gap()) == (None, [])


def ui(*events: Any) -> UsageReader:
    """Read events of the UI message stream."""
    return read([sse({"type": "start", "messageId": "m"}, *events)], "text/event-stream", keep_text=True)


USED = {"inputTokens": 9, "outputTokens": 4, "totalTokens": 13}


@pytest.mark.parametrize(
    ("metadata", "expected", "problems"),
    [
        ({"totalUsage": USED}, TokenUsage(9, 4), ()),
        ({"usage": USED}, TokenUsage(9, 4), ()),
        (USED, TokenUsage(9, 4), ()),
        ({"totalUsage": {**USED, "cachedInputTokens": 3, "reasoningTokens": 2}}, TokenUsage(9, 4, 3, None, 2), ()),
        (
            {
                "totalUsage": {
                    **USED,
                    "inputTokenDetails": {"noCacheTokens": 5, "cacheReadTokens": 3, "cacheWriteTokens": 1},
                    "outputTokenDetails": {"textTokens": 2, "reasoningTokens": 2},
                }
            },
            TokenUsage(9, 4, 3, 1, 2),
            (),
        ),
        ({"totalUsage": {**USED, "cachedInputTokens": 10}}, None, ("part_exceeds_whole",)),
        ({"totalUsage": {**USED, "totalTokens": 12}}, None, ("total_below_parts",)),
        ({"totalUsage": {**USED, "outputTokens": "4"}}, None, ("invalid_count",)),
        ({"totalUsage": None, "createdAt": 1}, None, ()),
        (None, None, ()),
    ],
)
def test_read_the_usage_that_an_application_puts_into_metadata(
    metadata: Any, expected: TokenUsage | None, problems: tuple[str, ...]
) -> None:
    """The SDK's usage object is found under either of its names; its input includes what was cached."""
    for event in ({"type": "finish", "finishReason": "stop"}, {"type": "message-metadata"}):
        report = ui({**event, "messageMetadata": metadata}).report()
        assert report is not None
        assert (report.usage, report.problems) == (expected, problems)
        assert report.complete is (event["type"] == "finish")


def test_gather_the_text_of_a_ui_stream() -> None:
    """Text, reasoning and the arguments of tools are text, and nothing else is."""
    reader = ui(
        {"type": "start-step"},
        {"type": "reasoning-delta", "id": "r", "delta": "why "},
        {"type": "text-delta", "id": "t", "delta": "Hello"},
        {"type": "text-delta", "id": "t", "delta": 3},
        {"type": "tool-input-delta", "toolCallId": "1", "inputTextDelta": "{}"},
        {"type": "tool-input-available", "toolCallId": "1", "input": {}},
        {"type": "data-own", "data": "no"},
    )
    assert reader.text() == "why Hello{}"


def test_read_an_error_of_a_ui_stream() -> None:
    """An event of an error, or a finish reason that says so, is one."""
    for event in ({"type": "error", "errorText": "boom"}, {"type": "finish", "finishReason": "error"}):
        report = ui({"type": "text-delta", "id": "t", "delta": "x"}, event).report()
        assert report is not None
        assert report.error
