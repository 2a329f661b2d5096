"""The Gemini and Ollama dialects, and the registry."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import TokenUsage, UsageReader, UsageReport
from asgi_metering.usage.dialects import DIALECTS, detect, detect_usage, named
from asgi_metering.usage.notes import Notes
from tests.usage.test_openai import body, stream
from tests.usage.vectors import read


def gemini(*usages: Any, **fields: Any) -> UsageReport:
    """Read chunks with these usages as a stream."""
    report = stream(*({"modelVersion": "g", "usageMetadata": usage, **fields} for usage in usages)).report()
    assert report is not None
    return report


def test_add_what_gemini_counts_apart() -> None:
    """Gemini counts thoughts and tool prompts apart, and cached content within the prompt."""
    usage = {"promptTokenCount": 100, "cachedContentTokenCount": 80, "candidatesTokenCount": 20}
    usage |= {"thoughtsTokenCount": 30, "toolUsePromptTokenCount": 7, "totalTokenCount": 157}
    assert gemini(usage).usage == TokenUsage(107, 50, cached=80, reasoning=30)


def test_keep_a_field_that_vanishes() -> None:
    """A later chunk that lacks a field leaves the former value; one without counts reports nothing."""
    first = {"promptTokenCount": 9, "thoughtsTokenCount": 4}
    assert gemini({"trafficType": "ON_DEMAND"}).usage is None
    assert gemini(first).usage == TokenUsage(9, 4, reasoning=4)
    assert gemini(first, {"candidatesTokenCount": 3}, None).usage == TokenUsage(9, 7, reasoning=4)


def test_read_geminis_traffic_and_searches() -> None:
    """Gemini tells the kind of traffic with its counts, and its queries with the candidate that they ground."""
    counts = {"promptTokenCount": 3, "candidatesTokenCount": 4, "trafficType": "ON_DEMAND"}
    grounds = [{"groundingMetadata": {"webSearchQueries": ["a", "b"]}}, {"groundingMetadata": {}}]
    payload = {"modelVersion": "m", "usageMetadata": counts, "candidates": grounds}
    report = body(payload).report()
    assert report is not None
    assert (report.service, report.searches) == ("on_demand", 2)


def test_read_geminis_images() -> None:
    """Images and films of both sides are told apart from text; without details nobody said what the output is."""
    usage: dict[str, Any] = {"promptTokenCount": 300, "candidatesTokenCount": 1_300}
    assert gemini(usage).usage == TokenUsage(300, 1_300)
    usage["promptTokensDetails"] = [{"modality": "IMAGE", "tokenCount": 258}, {"modality": "VIDEO", "tokenCount": 9}]
    usage["candidatesTokensDetails"] = [{"modality": "IMAGE", "tokenCount": 1_290}]
    assert gemini(usage).usage == TokenUsage(300, 1_300, image_input=267, image_output=1_290)


def test_tell_no_images_apart_in_what_came_behind_the_details() -> None:
    """Details count for the output that they came with: what is written later may be a picture, and nobody says."""
    first = {"promptTokenCount": 3, "candidatesTokenCount": 4}
    first |= {"candidatesTokensDetails": [{"modality": "TEXT", "tokenCount": 4}]}
    assert gemini(first, {"candidatesTokenCount": 4}).usage == TokenUsage(3, 4, image_output=0)
    assert gemini(first, {"candidatesTokenCount": 1_294}).usage == TokenUsage(3, 1_294)


def test_pass_over_a_kind_of_detail_that_is_no_word() -> None:
    """Details that name their kind by something else than a text are of no kind that has a price (S1.39)."""
    usage: dict[str, Any] = {"promptTokenCount": 3, "candidatesTokenCount": 4}
    usage["promptTokensDetails"] = [{"modality": [], "tokenCount": 2}, {"modality": {}, "tokenCount": 1}]
    assert gemini(usage).usage == TokenUsage(3, 4, image_input=0)


def test_read_geminis_audio() -> None:
    """Audio details of both sides add up and may be more than the totals; an impossible one refuses the report."""
    usage = {
        "promptTokenCount": 5,
        "responseTokenCount": 2,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 5}, {"modality": "AUDIO", "tokenCount": 9}],
        "candidatesTokensDetails": [{"modality": "AUDIO", "tokenCount": 1}],
    }
    assert gemini(usage).usage == TokenUsage(5, 2, audio=10, audio_output=1, image_input=0, image_output=0)
    usage["candidatesTokensDetails"] = [{"modality": "AUDIO", "tokenCount": -1}]
    report = gemini(usage)
    assert report.usage is None
    assert report.problems == ("invalid_count",)


def test_take_a_total_that_is_the_prompt_for_no_output() -> None:
    """Gemini leaves zeros out: where the total is the prompt nothing was written, which is a zero (S2.41)."""
    assert gemini({"promptTokenCount": 9, "totalTokenCount": 9}).usage == TokenUsage(9, 0)
    assert gemini({"promptTokenCount": 9, "totalTokenCount": 12}).usage == TokenUsage(9)
    report = gemini({"promptTokenCount": 9, "candidatesTokenCount": 3, "totalTokenCount": 11})
    assert (report.usage, report.problems) == (None, ("total_below_parts",))


def test_end_geminis_stream() -> None:
    """A finish reason or a blocked prompt ends a stream that has no end mark."""
    assert not gemini({"promptTokenCount": 1}).complete
    assert gemini({"promptTokenCount": 1}, candidates=[{"finishReason": "MAX_TOKENS"}]).truncated()
    blocked = gemini({"promptTokenCount": 1}, promptFeedback={"blockReason": "SAFETY"})
    assert (blocked.complete, blocked.finish_reason) == (True, "SAFETY")


def test_gather_geminis_text() -> None:
    """Text, thoughts and the arguments of calls are text."""
    parts = [{"text": "a", "thought": True}, {"functionCall": {"name": "f", "args": {"x": 1}}}, {"text": 3}, "b"]
    payload = {"modelVersion": "g", "candidates": [{"content": {"parts": parts}}, {"content": None}]}
    assert body(payload, keep_text=True).text() == 'a{"x":1}'


def ollama(**fields: Any) -> UsageReport:
    """Read one object."""
    report = body({"model": "o", **fields}).report()
    assert report is not None
    return report


def test_read_ollamas_last_line() -> None:
    """Counts stand at the top level; a prompt without one was cached, which is not zero."""
    assert ollama(done=True, prompt_eval_count=26, eval_count=282).usage == TokenUsage(26, 282)
    assert ollama(done=True, eval_count=282).usage == TokenUsage(None, 282)
    assert ollama(done=False).usage is None
    assert ollama(embeddings=[[0.1]], prompt_eval_count=8).usage == TokenUsage(8, 0)


def test_end_ollamas_lines() -> None:
    """Only the line that is done ends the stream."""
    going, done = b'{"model":"o","done":false}\n', b'{"model":"o","done":true,"eval_count":1}\n'
    for data, complete in ((going, False), (going + done, True), (done + going, True)):
        report = read([data], "application/x-ndjson").report()
        assert report is not None
        assert report.complete is complete


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"message": {"content": "b", "thinking": "a"}}, "ab"),
        ({"response": "b", "thinking": "a"}, "ab"),
        ({"message": {"content": ""}}, ""),
    ],
)
def test_gather_ollamas_text(payload: dict[str, Any], text: str) -> None:
    """Chats and generations give their thinking and their answer."""
    assert body({"model": "o", "done": False, **payload}, keep_text=True).text() == text


@pytest.mark.parametrize("name", DIALECTS)
def test_name_a_dialect(name: str) -> None:
    """Each dialect is found by its own name."""
    assert named(name).name == name


def test_name_no_dialect() -> None:
    """An unknown name is refused when the reader is made, with the names there are."""
    with pytest.raises(ConfigurationError, match=r"'openai-chat'.*'anthropic'"):
        UsageReader(dialect="claude")


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        ({"object": "chat.completion"}, "openai-chat"),
        ({"object": "chat.completion.chunk"}, "openai-chat"),
        ({"object": "text_completion"}, "openai-chat"),
        ({"object": "list"}, "openai-chat"),
        ({"object": ["list"]}, None),
        ({"object": "response"}, "openai-responses"),
        ({"type": "response.created"}, "openai-responses"),
        ({"type": "transcript.text.done"}, "openai-responses"),
        ({"type": "message_start"}, "anthropic"),
        ({"type": "message", "content": []}, "anthropic"),
        ({"type": "message"}, None),
        ({"type": ["message"]}, None),
        ({"type": {}}, None),
        ({"usageMetadata": None}, "gemini"),
        ({"candidates": [], "modelVersion": "g"}, "gemini"),
        ({"model": "o", "done": False}, "ollama"),
        ({"model": "o", "done": 1}, None),
        ({"usage": {"prompt_tokens": 1}}, "openai-chat"),
        ({"usage": {"completion_tokens": 1}}, "openai-chat"),
        ({"usage": {"input_tokens": 1, "total_tokens": 1}}, "openai-responses"),
        ({"usage": {"input_tokens": 1, "input_tokens_details": None}}, "openai-responses"),
        ({"usage": {"input_tokens": 1, "input_token_details": {}}}, "openai-responses"),
        ({"usage": {"input_tokens": 1, "total_tokens": 1, "cache_read_input_tokens": 1}}, "anthropic"),
        ({"usage": {"input_tokens": 1, "total_tokens": 1, "cache_creation_input_tokens": 1}}, "anthropic"),
        ({"usage": {"input_tokens": 1, "output_tokens": 1}}, "anthropic"),
        ({"usage": {"total_tokens": 1}}, None),
        ({"usage": {}}, None),
        ({"input_tokens": 1}, None),
        ({}, None),
    ],
)
def test_detect_a_dialect(payload: dict[str, Any], name: str | None) -> None:
    """The type marks decide, then the shape of the usage, whether its input is inclusive or exclusive (section 5)."""
    found = detect(payload)
    assert (found.name if found is not None else None) == name


def test_detect_the_dialect_of_a_bare_usage() -> None:
    """Each family's usage object shows by itself whose it is."""
    names = {
        "openai-chat": {"prompt_tokens": 1},
        "openai-responses": {"input_tokens": 1, "total_tokens": 1},
        "anthropic": {"cache_read_input_tokens": 1},
        "gemini": {"promptTokenCount": 1},
        "ollama": {"eval_count": 1},
    }
    for name, usage in names.items():
        found = detect_usage(usage)
        assert found is not None
        assert found.name == name
        notes = Notes()
        assert found.note_usage(notes, usage)
        assert not found.note_usage(notes, {})
    assert detect_usage({}) is None


@pytest.mark.parametrize(
    "usage", [{"prompt_eval_count": 1}, {"eval_count": 1}, {"prompt_eval_count": 0, "eval_count": 0}]
)
def test_count_any_side_of_ollama(usage: dict[str, int]) -> None:
    """Either count is a report, also as zero."""
    notes = Notes()
    assert named("ollama").note_usage(notes, usage)
    assert notes.usage == TokenUsage(usage.get("prompt_eval_count"), usage.get("eval_count"))


def test_override_the_detection() -> None:
    """The same counters are inclusive or exclusive by the dialect that is asked for, against detection."""
    usage = {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15, "cache_read_input_tokens": 4}
    for dialect, expected in (
        (None, TokenUsage(14, 5, cached=4)),
        ("anthropic", TokenUsage(14, 5, cached=4)),
        ("openai-responses", TokenUsage(10, 5, cached=4)),
        ("openai-chat", TokenUsage(10, 5, cached=4)),
        ("gemini", None),
    ):
        report = body({"model": "m", "usage": usage}, dialect=dialect).report()
        assert (report.usage if report is not None else None) == expected
