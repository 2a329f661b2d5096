"""How many tokens a request asks for, read from the request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from asgi_metering import TokenUsage
from asgi_metering.estimates import DEFAULT_OUTPUT_TOKENS, asked_model, estimate_arguments, estimate_body
from asgi_metering.estimates.bodies import asked_searches, asked_service


@pytest.mark.parametrize("key", ["input", "prompt"])
@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        ([1, 2, 3], 3),
        ([[1, 2], [3, 4, 5]], 5),
        ((1, 2), 2),
        ([[1], "hello", [True, None]], 2),
        ([], 0),
        (b"123", 0),
    ],
)
def test_count_token_ids_as_tokens(key: str, ids: Any, tokens: int) -> None:
    """An embeddings request that sends token ids instead of text asks for as many tokens: its hold is not 0."""
    assert asyncio.run(estimate_body({key: ids, "max_tokens": 0})) == TokenUsage(input=tokens, output=0)


def test_count_no_numbers_elsewhere() -> None:
    """Numbers of other fields are no token ids."""
    body = {"messages": [1, 2], "system": [3], "dimensions": [4]}
    assert asyncio.run(estimate_body(body)) == TokenUsage(input=6, output=DEFAULT_OUTPUT_TOKENS)


@pytest.mark.parametrize(
    ("media", "read"),
    [
        (None, True),
        ("application/json; charset=utf-8", True),
        ("application/vnd.api+json", True),
        ("text/plain", True),
        ("multipart/form-data; boundary=x", False),
        ("audio/mpeg", False),
    ],
)
def test_read_no_uploads(media: str | None, read: bool) -> None:
    """A body that is no JSON by its own words stays unread, for the endpoint to take piece by piece."""
    taken: list[str] = []

    async def receive() -> Any:
        taken.append("body")
        return {"type": "http.request", "body": b'{"input": [1, 2], "max_tokens": 1}'}

    headers = [] if media is None else [(b"content-type", media.encode())]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    found = asyncio.run(estimate_arguments({"request": request}))
    assert bool(taken) is read
    assert found == (TokenUsage(input=2, output=1) if read else TokenUsage(input=0, output=DEFAULT_OUTPUT_TOKENS))


# -- bodies of other dialects -------------------------------------------------------------------------------

FOUR = "one two three four"


@pytest.mark.parametrize(
    ("body", "given", "output"),
    [
        ({"messages": [{"role": "user", "content": FOUR}], "max_completion_tokens": 7, "n": 3}, 9, 21),
        ({"messages": [{"role": "user", "content": FOUR}], "max_tokens": 9}, 9, 9),
        ({"prompt": FOUR, "max_tokens": 5, "best_of": 4, "n": 2}, 4, 20),
        ({"input": FOUR, "instructions": FOUR, "max_output_tokens": 5}, 9, 5),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": FOUR}]}]}, 6, DEFAULT_OUTPUT_TOKENS),
        ({"input": [FOUR, FOUR], "max_tokens": 0}, 9, 0),
        ({"system": [{"type": "text", "text": FOUR}], "messages": [], "max_tokens": 5}, 4, 5),
        (
            {
                "contents": [{"role": "user", "parts": [{"text": FOUR}]}],
                "systemInstruction": {"parts": [{"text": FOUR}]},
                "generationConfig": {"maxOutputTokens": 6, "candidateCount": 2},
            },
            14,
            12,
        ),
        ({"contents": FOUR, "config": {"max_output_tokens": 6}}, 4, 6),
        ({"messages": [], "max_completion_tokens": 1, "max_tokens": 900}, 0, 900),
        ({"messages": [], "max_tokens": "900", "n": 2.0}, 0, 1_800),
        ({"messages": [], "max_tokens": 900.0, "n": "2", "best_of": 3}, 0, 2_700),
        ({"messages": [], "max_tokens": "1e999999", "n": float("nan")}, 0, 10_000_000),
        ({"messages": [], "max_tokens": -1, "n": 0.5}, 0, DEFAULT_OUTPUT_TOKENS),
        (
            {"contents": [], "generationConfig": {"maxOutputTokens": 1}, "config": {"max_output_tokens": 900}},
            0,
            900,
        ),
        ({"messages": [], "max_tokens": True, "n": "two"}, 0, DEFAULT_OUTPUT_TOKENS),
        ({"messages": [], "max_tokens": 10**9, "n": 10**9}, 0, 10_000_000),
    ],
)
def test_count_what_each_dialect_asks_for(body: Any, given: int, output: int) -> None:
    """Prompts and bounds are found where OpenAI, Anthropic and Gemini have them, times the answers (S3.18)."""
    found = asyncio.run(estimate_body(body))
    assert (found.input, found.output, found.cache_write) == (given, output, None)


LONG = "word " * 100


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": LONG}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"text": LONG}}]},
        {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"query": [{"deep": LONG}]}}]},
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": LONG}]}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": LONG}]},
        {"role": "model", "parts": [{"functionCall": {"name": "f", "args": {"query": LONG}}}]},
        {"role": "user", "parts": [{"functionResponse": {"name": "f", "response": {"found": LONG}}}]},
    ],
)
def test_count_what_tools_were_asked_and_answered(message: Any) -> None:
    """The history of an agent is mostly that, and all of it is input again."""
    found = asyncio.run(estimate_body({"messages": [message]}))
    assert found.input is not None
    assert 100 <= found.input <= 130


def test_count_tools_and_schemas() -> None:
    """Tools and the schema of the answer are read by the model too; what cannot be written counts as nothing."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    plain = asyncio.run(estimate_body({"messages": []})).input
    for key in ("tools", "functions", "response_format", "text"):
        assert (asyncio.run(estimate_body({"messages": [], key: [schema]})).input or 0) > (plain or 0) + 10
    endless: list[Any] = []
    endless.append(endless)
    assert asyncio.run(estimate_body({"messages": [], "tools": endless})).input == plain


@pytest.mark.parametrize(
    "body",
    [
        {"system": [{"type": "text", "text": FOUR, "cache_control": {"type": "ephemeral"}}], "messages": []},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": FOUR, "cache_control": {"type": "x"}}]}]},
        {"messages": [{"content": FOUR}], "tools": [{"name": "t", "cache_control": {"type": "ephemeral"}}]},
        {"messages": [{"content": FOUR}], "cache_control": {"type": "ephemeral"}},
    ],
)
def test_count_what_may_be_written_to_a_cache(body: Any) -> None:
    """A request that marks a part for the cache may have all of its input written there: that is the most it costs."""
    most = asyncio.run(estimate_body(body, at_most=True))
    assert most.cache_write == most.input
    assert asyncio.run(estimate_body(body)).cache_write is None
    deep: Any = {"messages": body}
    for _ in range(20):
        deep = {"messages": [deep]}
    assert asyncio.run(estimate_body(deep, at_most=True)).cache_write is None


@pytest.mark.parametrize(("mark", "is_long"), [({"ttl": "1h"}, True), ({"ttl": "5m"}, False), ("on", False)])
def test_count_what_may_be_written_to_a_cache_for_an_hour(mark: Any, is_long: bool) -> None:
    """A request that asks for an hour pays the dearer write for all of its input, at most."""
    parts = [{"type": "text", "text": FOUR, "cache_control": mark}, {"type": "text", "text": FOUR}]
    most = asyncio.run(estimate_body({"messages": [{"role": "user", "content": parts}]}, at_most=True))
    assert most.cache_write == most.input
    assert most.cache_write_1h == (most.input if is_long else None)


@pytest.mark.parametrize(
    ("body", "spoken"),
    [
        ({"modalities": ["text", "audio"]}, 9),
        ({"output_modalities": ["audio"]}, 9),
        ({"generationConfig": {"responseModalities": ["AUDIO"]}}, 9),
        ({"modalities": ["text"]}, None),
        ({"modalities": "audio"}, None),
    ],
)
def test_expect_an_answer_that_may_be_spoken(body: Any, spoken: int | None) -> None:
    """At most all of the output is spoken, where the request asks for that; what is expected says nothing of it."""
    asked = {"messages": [], "max_tokens": 9, **body}
    most = asyncio.run(estimate_body(asked, at_most=True))
    assert (most.output, most.audio, most.audio_output) == (9, spoken, spoken)
    assert asyncio.run(estimate_body(asked)).audio is None


def test_ask_which_model_is_meant() -> None:
    """The model is that of the first argument that looks like a request; a name that is no text is none."""
    assert asyncio.run(asked_model({"limit": 3, "body": {"model": "m", "messages": []}})) == "m"
    assert asyncio.run(asked_model({"body": {"model": 7}})) is None
    assert asyncio.run(asked_model({"query": "m"})) is None


DEEP: Any = []
"""As deep as a body can be nested."""
for _ in range(2_000):
    DEEP = [DEEP]


def test_estimate_a_request_that_nests_where_a_word_belongs() -> None:
    """What a request writes in the place of a word is no word, and raises nothing, however deep it is (DESIGN 10)."""
    block = {"type": "text", "text": "hi", "cache_control": {"ttl": DEEP}}
    body = {"messages": [{"content": [block]}], "modalities": [DEEP], "max_tokens": 5}
    found = asyncio.run(estimate_body(body, at_most=True))
    assert (found.output, found.cache_write, found.cache_write_1h, found.audio) == (5, found.input, None, None)


@pytest.mark.parametrize(
    ("body", "service", "searches"),
    [
        ({}, None, 0),
        ({"service_tier": "Priority", "tools": "none"}, "priority", 0),
        ({"serviceTier": "flex"}, "flex", 0),
        ({"service_tier": "auto", "speed": "fast"}, "fast", 0),
        ({"service_tier": 3}, None, 0),
        ({"tools": [{"type": "web_search_20250305", "max_uses": 3}, {"type": "web_search"}]}, None, 13),
        ({"tools": [{"type": "function"}, "x", {"google_search": {}}, {"googleSearch": {}}]}, None, 20),
        ({"web_search_options": {}}, None, 10),
        ({"tools": [{"type": "web_search", "max_uses": 10**9}]}, None, 1_000),
        ({"tools": [{"type": DEEP}, {"type": "web_search"}], "service_tier": DEEP}, None, 10),
    ],
)
def test_read_the_tier_and_the_searches_that_are_asked_for(body: Any, service: str | None, searches: int) -> None:
    """A request tells its service tier, and which searches of the web it allows; ten where it names no bound."""
    assert (asked_service(body), asked_searches(body)) == (service, searches)
