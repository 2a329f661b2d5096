"""The bundled provider to OpenAI's own SDK: answers, streams, errors, and clients that leave."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response

from asgi_metering.testing.provider import TokenCounts, answer_text
from asgi_metering.tokens import count_tokens

if TYPE_CHECKING:
    pass
from tests.testing.support import MESSAGES, PROMPT, PROMPT_TOKENS, Live


def test_chat_by_the_sdk_counts_the_very_text(live: Live) -> None:
    """A JSON answer has as many tokens as words, and its usage is the count of the prompt and of the answer."""

    async def run() -> None:
        async with live.openai() as client:
            answer = await client.chat.completions.create(model="echo", messages=MESSAGES, max_completion_tokens=7)
        choice = answer.choices[0]
        assert (choice.message.content, choice.finish_reason) == (answer_text(7), "length")
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (PROMPT_TOKENS, 7)
        assert answer.usage.total_tokens == PROMPT_TOKENS + 7
        assert answer.model == "echo"

    asyncio.run(run())
    seen = live.last()
    assert (seen.model, seen.status, seen.finished, seen.usage_sent) == ("echo", 200, True, True)
    assert seen.counts == TokenCounts(PROMPT_TOKENS, 7)
    assert seen.headers["authorization"] == "Bearer sk-any"
    assert "sk-any" not in repr(seen)


@pytest.mark.parametrize("include", [True, False])
def test_chat_stream_by_the_sdk_honours_include_usage(live: Live, include: bool) -> None:
    """The last chunk carries the usage and no choices exactly where it was asked for; deltas add up to it."""

    async def run() -> list[ChatCompletionChunk]:
        async with live.openai() as client:
            options: Any = {"stream_options": {"include_usage": True}} if include else {}
            stream = await client.chat.completions.create(
                model="echo:words-12", messages=MESSAGES, stream=True, **options
            )
            return [chunk async for chunk in stream]

    chunks = asyncio.run(run())
    deltas = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(deltas) == answer_text(12)
    assert [chunk.usage is not None for chunk in chunks].count(True) == include
    assert ("usage" in chunks[0].model_fields_set) == include
    if include:
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(deltas) == count_tokens("".join(deltas)).tokens
    assert (live.last().deltas_sent, live.last().usage_sent) == (12, include)


def test_responses_stream_by_the_sdk_accumulates(live: Live) -> None:
    """The SDK's accumulator takes every typed event and ends with the completed response and its usage."""

    async def run() -> Response:
        model = "echo:words-5:reasoning-4"
        async with live.openai() as client, client.responses.stream(model=model, input=PROMPT) as stream:
            deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
            assert "".join(deltas) == answer_text(5)
            return await stream.get_final_response()

    answer = asyncio.run(run())
    assert (answer.status, answer.output_text) == ("completed", answer_text(5))
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (9, 4)


@pytest.mark.parametrize(
    ("model", "error", "code"),
    [
        ("echo:error-400", openai.BadRequestError, None),
        ("echo:error-403", openai.PermissionDeniedError, None),
        ("echo:error-500", openai.InternalServerError, None),
        ("echo:overloaded", openai.InternalServerError, None),
        ("echo:rate-limited-30", openai.RateLimitError, "rate_limit_exceeded"),
        ("echo:out-of-credit", openai.RateLimitError, "insufficient_quota"),
        ("echo:misspelt", openai.NotFoundError, "model_not_found"),
    ],
)
def test_openai_sdk_raises_its_own_errors(
    live: Live, model: str, error: type[openai.APIStatusError], code: str | None
) -> None:
    """Each refusal becomes the SDK's own exception with the documented code, for a stream as well."""

    async def run(stream: bool) -> openai.APIStatusError:
        async with live.openai() as client:
            with pytest.raises(error) as raised:
                await client.chat.completions.create(model=model, messages=MESSAGES, stream=stream)
        return raised.value

    for stream in (False, True):
        refusal = asyncio.run(run(stream))
        assert refusal.code == code
        assert refusal.request_id == f"req_{live.last().number:06d}"
        assert live.last().counts is None
    if code == "rate_limit_exceeded":
        fields = refusal.response.headers
        assert (fields["retry-after"], fields["retry-after-ms"]) == ("30", "30000")
        assert (fields["x-ratelimit-remaining-requests"], fields["x-ratelimit-reset-requests"]) == ("0", "30s")


def test_openai_sdk_retries_a_model_that_fails_first(live: Live) -> None:
    """`fail-first-1` refuses once by model name, so the SDK's second try succeeds within one call."""
    before = len(live.provider.requests)

    async def run() -> ChatCompletion:
        async with live.openai(max_retries=1) as client:
            return await client.chat.completions.create(model="echo:fail-first-1", messages=MESSAGES)

    assert asyncio.run(run()).choices[0].message.content == answer_text(20)
    assert [seen.status for seen in list(live.provider.requests)[before:]] == [500, 200]


def test_openai_sdk_sees_a_cut_and_an_error_in_the_stream(live: Live) -> None:
    """A cut connection and an error event both end the stream early, each by the SDK's own exception."""

    async def run(model: str, error: type[Exception]) -> str:
        parts: list[str] = []

        async def read(stream: openai.AsyncStream[ChatCompletionChunk]) -> None:
            async for chunk in stream:
                parts.append(chunk.choices[0].delta.content or "")

        async with live.openai() as client:
            stream = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
            with pytest.raises(error):
                await read(stream)
        return "".join(parts)

    assert asyncio.run(run("echo:cut-after-3", openai.APIConnectionError)) == answer_text(3)
    assert (live.last().deltas_sent, live.last().finished, live.last().client_disconnected) == (3, False, False)
    assert asyncio.run(run("echo:error-after-25", openai.APIError)) == answer_text(25)
    assert (live.last().deltas_sent, live.last().usage_sent) == (25, False)


def test_leave_an_endless_openai_stream(live: Live) -> None:
    """A client that leaves an endless stream ends it, and the provider knows that it left and what it was sent."""

    async def run() -> None:
        async with live.openai() as client:
            stream = await client.chat.completions.create(model="echo:endless", messages=MESSAGES, stream=True)
            async with stream:
                async for chunk in stream:
                    if (chunk.choices[0].delta.content or "").endswith("machine"):
                        break

    asyncio.run(run())
    seen = live.last()
    assert (seen.client_disconnected, seen.finished, seen.usage_sent) == (True, False, False)
    assert seen.deltas_sent >= 18


# The Anthropic SDK
