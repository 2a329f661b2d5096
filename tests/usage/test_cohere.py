"""Cohere: what was processed counts, streamed or not, and what v1, embeddings and rerankers say under ``meta``."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.usage import TokenUsage
from tests.usage.test_openai import body, sse
from tests.usage.vectors import read


def units(given: float | None = None, written: float | None = None) -> dict[str, Any]:
    """Two counts, those that are None left out."""
    counts = {"input_tokens": given, "output_tokens": written}
    return {name: count for name, count in counts.items() if count is not None}


@pytest.mark.parametrize(
    ("payload", "expected", "problems"),
    [
        ({"usage": {"tokens": units(9.0, 3.0), "billed_units": units(1, 3)}}, TokenUsage(9, 3), ()),
        ({"usage": {"tokens": units(9, 3), "cached_tokens": 4}}, TokenUsage(9, 3, cached=4), ()),
        ({"usage": {"billed_units": units(1, 3), "cached_tokens": 4}}, TokenUsage(1, 3), ()),
        ({"usage": {"tokens": {}, "billed_units": units(1, 3)}}, TokenUsage(1, 3), ()),
        ({"usage": {"tokens": units(9, 3), "cached_tokens": 10}}, None, ("part_exceeds_whole",)),
        ({"usage": {"tokens": units(9.5, 3)}}, None, ("invalid_count",)),
        ({"embeddings": {"float": [[1.0]]}, "meta": {"billed_units": units(8)}}, TokenUsage(8, 0), ()),
        ({"text": "a", "meta": {"tokens": units(8, 2), "billed_units": units(5, 2)}}, TokenUsage(8, 2), ()),
        ({"meta": {"billed_units": units(8)}}, TokenUsage(8), ()),
        ({"results": [], "id": "r", "meta": {"billed_units": {"search_units": 1}}}, None, ()),
    ],
)
def test_read_a_usage_object_of_cohere(
    payload: dict[str, Any], expected: TokenUsage | None, problems: tuple[str, ...]
) -> None:
    """Processed tokens count before billed ones, floats are whole, cached is a part of what was processed."""
    report = body({"id": "x", **payload}).report()
    assert report is not None
    assert (report.usage, report.problems) == (expected, problems)


@pytest.mark.parametrize(
    ("delta", "reason", "error"),
    [
        ({"finish_reason": "COMPLETE"}, "COMPLETE", False),
        ({"finish_reason": "MAX_TOKENS"}, "MAX_TOKENS", False),
        ({"finish_reason": "ERROR"}, "ERROR", True),
        ({"finish_reason": "TIMEOUT"}, "TIMEOUT", True),
        ({"error": "no capacity"}, None, True),
    ],
)
def test_end_coheres_stream(delta: dict[str, Any], reason: str | None, error: bool) -> None:
    """The message's end is the stream's, and says whether it failed."""
    data = sse({"type": "message-start", "id": "c"}, {"type": "message-end", "delta": delta})
    report = read([data], "text/event-stream").report()
    assert report is not None
    assert (report.complete, report.finish_reason, report.error) == (True, reason, error)
    assert report.truncated() is (reason == "MAX_TOKENS")


def message(kind: str, **fields: Any) -> dict[str, Any]:
    """One event whose delta is a message."""
    return {"type": kind, "index": 0, "delta": {"message": fields}}


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        (message("content-delta", content={"text": "a"}), "a"),
        (message("content-delta", content={"thinking": "t"}), "t"),
        (message("tool-plan-delta", tool_plan="I will"), "I will"),
        (message("tool-call-start", tool_calls={"function": {"name": "f", "arguments": "{"}}), ""),
        (message("tool-call-delta", tool_calls={"function": {"arguments": '"x":1}'}}), '"x":1}'),
        ({"type": "content-delta", "delta": None}, ""),
        (
            {
                "usage": {"tokens": units(1, 2)},
                "message": {
                    "tool_plan": "p",
                    "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "a"}, None],
                    "tool_calls": [{"function": {"arguments": "{}"}}],
                },
            },
            "tap{}",
        ),
        ({"text": "v1", "meta": {"tokens": units(1, 2)}}, "v1"),
    ],
)
def test_gather_coheres_text(payload: dict[str, Any], text: str) -> None:
    """Text, thinking, plans and the arguments of tools are text, streamed or not."""
    data = sse({"type": "message-start", "id": "c"}, payload)
    assert read([data], "text/event-stream", keep_text=True).text() == text
