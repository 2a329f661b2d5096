"""The bundled provider to Anthropic's own SDK: answers, streams, errors, and clients that leave."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import anthropic
import pytest
from anthropic.types import Message as AnthropicMessage

from asgi_metering.testing.provider import answer_text
from asgi_metering.tokens import count_tokens

if TYPE_CHECKING:
    pass
from tests.testing.support import MESSAGES, PROMPT, PROMPT_TOKENS, Live


def test_messages_by_the_sdk_count_the_very_text(live: Live) -> None:
    """Input tokens leave out what came from the cache, and the three inputs add up to the prompt's count."""

    async def run() -> AnthropicMessage:
        async with live.anthropic() as client:
            return await client.messages.create(
                model="echo:cached-3:cache-write-2:reasoning-4",
                system="Be brief.",
                messages=MESSAGES[1:],
                max_tokens=10,
            )

    answer = asyncio.run(run())
    usage = answer.usage
    assert answer.content[0].type == "text"
    assert (answer.content[0].text, answer.stop_reason) == (answer_text(6), "max_tokens")
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (
        PROMPT_TOKENS - 5,
        3,
        2,
    )
    assert usage.output_tokens == 10
    assert usage.output_tokens_details is not None
    assert usage.output_tokens_details.thinking_tokens == 4


def test_messages_stream_by_the_sdk_accumulates(live: Live) -> None:
    """The SDK's accumulator takes every event; the usage of `message_delta` replaces the seed of `message_start`."""

    async def run() -> tuple[list[str], AnthropicMessage]:
        async with (
            live.anthropic() as client,
            client.messages.stream(model="echo:words-8", messages=MESSAGES[1:], max_tokens=99) as stream,
        ):
            deltas = [text async for text in stream.text_stream]
            return deltas, await stream.get_final_message()

    deltas, answer = asyncio.run(run())
    assert "".join(deltas) == answer_text(8)
    assert (answer.usage.output_tokens, answer.stop_reason) == (8, "end_turn")
    assert answer.usage.input_tokens == count_tokens(PROMPT).tokens


def test_count_tokens_by_the_sdk_is_no_usage(live: Live) -> None:
    """Counting a prompt answers a number, and takes nothing from any limit."""

    async def run() -> int:
        async with live.anthropic() as client:
            return (await client.messages.count_tokens(model="echo", messages=MESSAGES[1:])).input_tokens

    assert asyncio.run(run()) == count_tokens(PROMPT).tokens
    assert (live.last().counts, live.last().usage_sent) == (None, False)


@pytest.mark.parametrize(
    ("model", "error", "kind"),
    [
        ("echo:error-402", anthropic.APIStatusError, "billing_error"),
        ("echo:error-418", anthropic.APIStatusError, "invalid_request_error"),
        ("echo:error-500", anthropic.InternalServerError, "api_error"),
        ("echo:error-504", anthropic.InternalServerError, "timeout_error"),
        ("echo:overloaded", anthropic.InternalServerError, "overloaded_error"),
        ("echo:rate-limited-30", anthropic.RateLimitError, "rate_limit_error"),
        ("echo:out-of-credit", anthropic.BadRequestError, "invalid_request_error"),
        ("echo:misspelt", anthropic.NotFoundError, "not_found_error"),
    ],
)
def test_anthropic_sdk_raises_its_own_errors(
    live: Live, model: str, error: type[anthropic.APIStatusError], kind: str
) -> None:
    """Each refusal becomes the SDK's own exception with the documented type and the request's id."""

    async def run() -> anthropic.APIStatusError:
        async with live.anthropic() as client:
            with pytest.raises(error) as raised:
                await client.messages.create(model=model, messages=MESSAGES[1:], max_tokens=10)
        return raised.value

    refusal = asyncio.run(run())
    assert (refusal.type, refusal.request_id) == (kind, f"req_{live.last().number:06d}")
    if kind == "rate_limit_error":
        assert refusal.response.headers["retry-after"] == "30"
        assert refusal.response.headers["anthropic-ratelimit-requests-remaining"] == "0"


def test_anthropic_sdk_sees_an_error_in_the_stream(live: Live) -> None:
    """The `error` event after a 200 is the SDK's exception, and the text before it has arrived."""

    async def run() -> str:
        parts: list[str] = []

        async def read(client: anthropic.AsyncAnthropic) -> None:
            stream = client.messages.stream(model="echo:error-after-2", messages=MESSAGES[1:], max_tokens=50)
            async with stream as events:
                async for part in events.text_stream:
                    parts.append(part)

        async with live.anthropic() as client:
            with pytest.raises(anthropic.APIStatusError, match="overloaded_error"):
                await read(client)
        return "".join(parts)

    assert asyncio.run(run()) == answer_text(2)


def test_leave_a_stalled_anthropic_stream(live: Live) -> None:
    """A stalled stream sends its deltas and then nothing, until the client gives up."""

    async def run() -> str:
        text = ""
        async with (
            live.anthropic() as client,
            client.messages.stream(model="echo:stall-after-3", messages=MESSAGES[1:], max_tokens=50) as stream,
        ):
            async for part in stream.text_stream:
                text += part
                if text == answer_text(3):
                    break
        return text

    assert asyncio.run(run()) == answer_text(3)
    assert (live.last().deltas_sent, live.last().client_disconnected) == (3, True)


# Shapes
