"""The sample bodies and what each must be read as."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from asgi_metering.usage import UsageReader, UsageReport

FOLDER = Path(__file__).parent.parent / "samples"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FOLDER / "expected.json").read_text())["samples"]
NAMES = sorted(EXPECTED)

CONTENT_TYPES = {
    "sse": "text/event-stream; charset=utf-8",
    "json": "application/json",
    "json-array-stream": "application/json",
    "ndjson": "application/x-ndjson",
    "decoded-eventstream": "application/x-ndjson",
    "vercel-data-stream": "text/plain; charset=utf-8",
}

# The text that each sample's model produced; those that are not named produced none.
TEXTS = {
    "anthropic-messages-error.sse": "Hello",
    "anthropic-messages-server-tool.sse": "Hello",
    "anthropic-messages.json": "Hi",
    "anthropic-messages.sse": "Hello",
    "bedrock-converse-stream.ndjson": "ok",
    "bedrock-converse.json": "ok",
    "cohere-v2.json": "ok",
    "cohere-v2.sse": "ok",
    "deepseek-chat.sse": "think42",
    "gemini-live.ndjson": "Hello",
    "gemini-stream-array.json": "Hello",
    "gemini-stream.sse": "Hello world",
    "gemini.json": "ok",
    "groq-chat.sse": "Hi",
    "mistral-chat.sse": "Bonjour",
    "moonshot-chat.sse": "Hi",
    "ollama-chat.ndjson": "Hi",
    "openai-chat-error-midstream.sse": "Hel",
    "openai-chat-include-usage-crlf.sse": "Hello",
    "openai-chat-include-usage.sse": "Hello",
    "openai-chat-no-usage.sse": "Hello",
    "openai-chat-truncated.sse": "Hello",
    "openai-chat.json": "Hello",
    "openai-compatible-cumulative.sse": "Hello there",
    "openai-realtime.ndjson": "Hello there.",
    "openai-responses.sse": "Hi",
    "openai-transcription-duration.json": "",
    "openai-transcription-tokens.json": "hi",
    "openrouter-chat.sse": "Hi",
    "vercel-data-stream-v1.txt": "Hello",
    "vercel-ui-message-stream.sse": "Hello",
    "xai-chat.json": "ok",
}

# The dialect that detection must find.
DIALECTS = {
    "anthropic": "anthropic",
    "bedrock": "bedrock",
    "cohere": "cohere",
    "gemini-live": "gemini-live",
    "gemini": "gemini",
    "ollama": "ollama",
    "openai-realtime": "openai-realtime",
    "openai-responses": "openai-responses",
    "openai-image": "openai-responses",
    "openai-transcription-tokens": "openai-responses",
    "vercel-data": "vercel-data",
    "vercel-ui": "vercel-ui",
}

AXES = {"input": "input", "output": "output", "cached_input": "cached", "cache_write": "cache_write"}
AXES |= {"reasoning": "reasoning", "total": "total", "input_audio": "audio"}

# What an expectation calls 0 is reported, or passed over in silence, and then it must be unknown and not zero: these
# are the fields' names in every dialect, of which a silent body has none.
REPORTED_AS = {
    "cached_input": (
        b'"cached_tokens"',
        b'"cache_read_input_tokens"',
        b'"cachedContentTokenCount"',
        b'"prompt_cache_hit_tokens"',
        b'"cacheReadInputTokens"',
        b'"cachedInputTokens"',
    ),
    "cache_write": (b'"cache_creation_input_tokens"', b'"cache_write_tokens"', b'"cacheWriteInputTokens"'),
    "reasoning": (b'"reasoning_tokens"', b'"thoughtsTokenCount"', b'"thinking_tokens"', b'"reasoningTokens"'),
}


def body(name: str) -> bytes:
    """The sample's bytes."""
    return (FOLDER / name).read_bytes()


def content_type(name: str) -> str:
    """The media type that the sample would come with."""
    return CONTENT_TYPES[EXPECTED[name]["format"]]


def dialect(name: str) -> str:
    """The dialect that the sample speaks."""
    return next((found for start, found in DIALECTS.items() if name.startswith(start)), "openai-chat")


def read(chunks: Iterable[bytes], content_type: str | None, **options: Any) -> UsageReader:
    """Feed the chunks to a new reader."""
    reader = UsageReader(content_type, **options)
    for chunk in chunks:
        reader.feed(chunk)
    return reader


@functools.cache
def is_silent(name: str, key: str) -> bool:
    """Whether the sample's body has no field that would report *key*."""
    return key in REPORTED_AS and not any(field in body(name) for field in REPORTED_AS[key])


def check(name: str, report: UsageReport | None) -> None:
    """Compare a report with what the sample must be read as: every number and every mark that it names."""
    expected = EXPECTED[name]
    usage = report.usage if report is not None else None
    if "usage" in expected:
        assert usage is None
    else:
        assert usage is not None
        for key, axis in AXES.items():
            if key in expected:
                assert getattr(usage, axis) == (None if is_silent(name, key) else expected[key]), key
    if report is None:
        assert "model" not in expected
        return
    assert report.dialect == dialect(name)
    assert report.problems == ()
    assert report.complete is expected.get("complete", True)
    assert report.error is expected.get("error", False)
    assert report.partial is expected.get("partial", False)
    assert report.model == expected.get("model", report.model)
    assert report.response_id == expected.get("response_id", report.response_id)
    assert report.cost == (Decimal(expected["cost"]) if "cost" in expected else None)
