"""Reports that cannot be, in every dialect, and bodies that only want to cost something: never believed, never kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.usage import TokenUsage, UsageReader, UsageReport
from asgi_metering.usage.dialects import DIALECTS
from asgi_metering.usage.values import MAX_TOKENS, REFUSING
from tests.usage.test_openai import chunk, sse
from tests.usage.test_vercel import coded
from tests.usage.vectors import read

pytestmark = pytest.mark.uncounted

Make = Callable[[Any, Any], bytes]


def _body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _anthropic(asked: Any, given: Any) -> bytes:
    start = {"type": "message_start", "message": {"type": "message", "content": [], "usage": {"input_tokens": asked}}}
    return sse(
        start, {"type": "message_delta", "delta": {}, "usage": {"output_tokens": given}}, {"type": "message_stop"}
    )


SAYS: dict[str, Make] = {
    "openai-chat": lambda asked, given: sse(
        chunk(usage={"prompt_tokens": asked, "completion_tokens": given}), b"[DONE]"
    ),
    "openai-realtime": lambda asked, given: _body(
        type="response.done", event_id="e", response={"usage": {"input_tokens": asked, "output_tokens": given}}
    ),
    "openai-responses": lambda asked, given: _body(
        object="response", usage={"input_tokens": asked, "output_tokens": given, "input_tokens_details": {}}
    ),
    "bedrock": lambda asked, given: _body(
        output={"message": {}}, stopReason="x", usage={"inputTokens": asked, "outputTokens": given}
    ),
    "anthropic": _anthropic,
    "gemini-live": lambda asked, given: _body(
        serverContent={"turnComplete": True}, usageMetadata={"promptTokenCount": asked, "responseTokenCount": given}
    ),
    "gemini": lambda asked, given: _body(usageMetadata={"promptTokenCount": asked, "candidatesTokenCount": given}),
    "ollama": lambda asked, given: _body(model="o", done=True, prompt_eval_count=asked, eval_count=given),
    "cohere": lambda asked, given: _body(usage={"tokens": {"input_tokens": asked, "output_tokens": given}}),
    "vercel-data": lambda asked, given: coded(("d", {"usage": {"promptTokens": asked, "completionTokens": given}})),
    "vercel-ui": lambda asked, given: sse(
        {"type": "start-step"},
        {"type": "finish", "messageMetadata": {"totalUsage": {"inputTokens": asked, "outputTokens": given}}},
    ),
}
"""How each dialect reports two counts."""

GOOD = st.one_of(st.integers(0, MAX_TOKENS), st.integers(0, 100).map(float))
BAD = st.one_of(
    st.integers(max_value=-1),
    st.integers(min_value=MAX_TOKENS + 1),
    st.sampled_from(
        [float("nan"), float("inf"), -float("inf"), 0.5, 2**53 + 0.0, True, False, "7", "", [], [7], {}, {"a": 7}]
    ),
)


def report(name: str, asked: Any, given: Any) -> UsageReport | None:
    """What is read where a dialect reports these."""
    return read([SAYS[name](asked, given)], None).report()


def test_fuzz_every_dialect() -> None:
    """No dialect is left out of what follows."""
    assert list(SAYS) == list(DIALECTS)


@pytest.mark.parametrize("name", SAYS)
@given(GOOD, GOOD)
@settings(max_examples=8)
def test_believe_counts_that_can_be(name: str, asked: float, given: float) -> None:
    """S2.41, S3.21: every whole count from zero to the bound is believed as it is, in every dialect."""
    found = report(name, asked, given)
    assert found is not None
    assert (found.usage, found.problems, found.dialect) == (TokenUsage(int(asked), int(given)), (), name)


@pytest.mark.parametrize("name", SAYS)
@given(GOOD, BAD, st.booleans())
@settings(max_examples=14)
def test_refuse_counts_that_cannot_be(name: str, good: float, bad: Any, first: bool) -> None:
    """S3.21: negative, fractional, absurd, infinite, or no number at all: nothing beside it is believed either."""
    found = report(name, *((bad, good) if first else (good, bad)))
    assert found is not None
    assert found.usage is None
    assert found.reported is None
    assert found.refused
    assert set(found.problems) <= REFUSING


@pytest.mark.parametrize("name", SAYS)
def test_report_null_as_nothing(name: str) -> None:
    """S2.41: null is missing: neither zero nor an alarm, and of one side alone the other stays missing."""
    nothing = report(name, None, None)
    assert nothing is None or (nothing.usage, nothing.problems) == (None, ())
    for counts in ((0, None), (None, 0), (5, None), (None, 5)):
        found = report(name, *counts)
        assert found is not None
        assert found.usage == TokenUsage(*counts)
        assert found.problems == ()


@pytest.mark.parametrize("name", SAYS)
def test_take_the_last_of_a_field_that_is_written_twice(name: str) -> None:
    """Of a field that an object has twice the last counts, as parsers of JSON have it, and nothing breaks."""
    text = SAYS[name](1234567, 7).replace(b"1234567", b'1,"x":1').replace(b": 1,", b": 3,")
    found = read([text], None).report()
    assert found is not None
    assert found.usage is not None
    assert found.usage.output == 7


FILLERS = {
    "tiny events": b"data:1\n\n",
    "empty events": b"\n",
    "comments": b": keep-alive\n\n",
    "a line": b"x",
    "a comment": b":",
    "names and ids": b"event: a\nid: 1\n",
    "null usage": b'data: {"usage": null}\n\n',
    "empty data": b"data:\n",
    "quotes": b'data: """"""""""""\n\n',
}


@pytest.mark.parametrize("keep", [False, True], ids=["usage", "text"])
@pytest.mark.parametrize("filler", FILLERS.values(), ids=list(FILLERS))
def test_find_the_usage_behind_megabytes_of_nothing(filler: bytes, keep: bool) -> None:
    """However much a stream sends that means nothing, little of it is kept, and the usage behind it is found."""
    reader = UsageReader("text/event-stream", keep_text=keep)
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14}
    reader.feed(b"data: {}\n\n")
    block = filler * (65_536 // len(filler))
    for _ in range(4 if keep else 20):
        reader.feed(block)
    lines = reader._frames._frames._lines  # type: ignore[union-attr]
    assert len(lines._line._bytes) <= 2 << 20
    assert reader._text.kept + reader._guess.kept <= 2 * 200_000
    reader.feed(b"\n\n" + sse(chunk(choices=[], usage=usage), b"[DONE]"))
    found = reader.report()
    assert found is not None
    assert found.usage == TokenUsage(9, 5)
    assert found.complete
