"""The bundled provider answers, counts and fails as the real ones do, to their own SDKs."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import TYPE_CHECKING, Any

import anthropic
import httpx2
import openai
import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.routing import Mount

import asgi_metering.testing
from asgi_metering.testing import provider as provider_package
from asgi_metering.testing.provider import BEHAVIOURS, Provider, SeenRequest, TokenCounts, answer_text
from asgi_metering.testing.provider.app import MAX_BODY_BYTES
from asgi_metering.testing.provider.behaviour import UnknownBehaviourError, read_model
from asgi_metering.testing.provider.quota import Bucket, go_duration, rfc3339
from asgi_metering.tokens import ENCODINGS, count_tokens
from tests.harness.clients import HttpClient
from tests.harness.drive import body, drive, headers, http_scope, lifespan, status, websocket_scope
from tests.harness.servers import serve, serve_in_thread
from tests.harness.waiting import DEFAULT_TIMEOUT_S, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from tests.harness.drive import Drive

NOW = 1_795_000_000.0
PROMPT = "Tell me what the river is called <|endoftext|>."
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}]
PROMPT_TOKENS = count_tokens(f"Be brief.\n{PROMPT}").tokens
KEYS = {"authorization": "Bearer sk-any", "x-api-key": "sk-any", "anthropic-version": "2023-06-01"}

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
ANTHROPIC = "/v1/messages"


class Live:
    """The provider behind a real server, and clients for it."""

    def __init__(self, provider: Provider, url: str) -> None:
        self.provider = provider
        self.url = url

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        """A client of the real SDK that does not retry unless told to."""
        http = openai.DefaultAsyncHttpxClient(verify=False)  # reads no certificates: the server is on loopback
        defaults: dict[str, Any] = {
            "base_url": f"{self.url}/v1",
            "api_key": "sk-any",
            "max_retries": 0,
            "http_client": http,
        }
        return openai.AsyncOpenAI(**(defaults | options))

    def anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        """A client of the real SDK that does not retry unless told to."""
        http = anthropic.DefaultAsyncHttpxClient(verify=False)
        defaults: dict[str, Any] = {"base_url": self.url, "api_key": "sk-any", "max_retries": 0, "http_client": http}
        return anthropic.AsyncAnthropic(**(defaults | options))

    def last(self) -> SeenRequest:
        """The last request, when the provider is done with it."""
        seen = self.provider.requests[-1]
        assert seen.ended.wait(DEFAULT_TIMEOUT_S)
        return seen


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One provider behind uvicorn for all tests of this module."""
    provider = Provider()
    with serve_in_thread(provider) as server:
        yield Live(provider, server.url)


def ask(
    provider: Provider,
    path: str,
    payload: Mapping[str, Any] | bytes,
    *,
    headers: Mapping[str, str] = KEYS,
    method: str = "POST",
) -> httpx2.Response:
    """Send one request in process."""
    content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()

    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(provider)
        async with httpx2.AsyncClient(transport=transport, base_url="http://provider") as client:
            return await client.request(method, path, content=content, headers=headers)

    return asyncio.run(run())


def payload(path: str, model: str, **rest: Any) -> dict[str, Any]:
    """A request for *model* in the shape of *path*."""
    if path == RESPONSES:
        return {"model": model, "instructions": "Be brief.", "input": PROMPT, **rest}
    if path == ANTHROPIC:
        return {"model": model, "system": "Be brief.", "messages": MESSAGES[1:], "max_tokens": 1_000, **rest}
    return {"model": model, "messages": MESSAGES, **rest}


def events(response: httpx2.Response) -> list[dict[str, Any]]:
    """The JSON data of every event of a whole stream; ``[DONE]`` and comments left out."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


# The OpenAI SDK


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


@pytest.mark.parametrize(
    "model", ["echo", "echo:words-0", "echo:cached-4:cache-write-2:reasoning-3", "echo:zero-usage"]
)
def test_answers_fit_the_sdks_types(model: str) -> None:
    """Every JSON answer and every event has the fields and types that the SDKs declare, without leniency."""
    provider = Provider()
    shapes: list[tuple[str, TypeAdapter[Any], TypeAdapter[Any]]] = [
        (CHAT, TypeAdapter(ChatCompletion), TypeAdapter(ChatCompletionChunk)),
        (RESPONSES, TypeAdapter(Response), TypeAdapter(ResponseStreamEvent)),
        (ANTHROPIC, TypeAdapter(AnthropicMessage), TypeAdapter(RawMessageStreamEvent)),
    ]
    for path, whole, part in shapes:
        whole.validate_json(ask(provider, path, payload(path, model)).content)
        for event in events(ask(provider, path, payload(path, model, stream=True))):
            if event.get("type") != "ping":
                part.validate_python(event)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, ANTHROPIC])
@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ("no-usage", "absent"),
        ("null-usage", None),
        ("zero-usage", (0, 0)),
        ("negative-usage", (-1, -1)),
        ("usage-12-9007199254740993", (12, 9_007_199_254_740_993)),
    ],
)
def test_report_usage_as_asked(path: str, behaviour: str, expected: object) -> None:
    """Usage can be missing, null, zero, negative or absurd, in JSON and in the last event that carries it."""
    provider = Provider()
    options = {"stream_options": {"include_usage": True}} if path == CHAT else {}
    whole = ask(provider, path, payload(path, f"echo:{behaviour}")).json()
    stream = events(ask(provider, path, payload(path, f"echo:{behaviour}", stream=True, **options)))
    assert _reported(whole) == expected
    last = [event.get("response", event) for event in stream if "usage" in event.get("response", event)]
    if expected == "absent":
        assert last == []
        assert "usage" not in stream[0].get("message", {})
    else:
        assert _reported(last[-1]) == expected
    assert [seen.usage_sent for seen in provider.requests] == [expected != "absent"] * 2


def _reported(answer: dict[str, Any]) -> object:
    if "usage" not in answer:
        return "absent"
    usage = answer["usage"]
    if usage is None:
        return None
    return usage.get("prompt_tokens", usage.get("input_tokens")), usage.get(
        "completion_tokens", usage.get("output_tokens")
    )


def test_fixed_usage_takes_its_parts_along() -> None:
    """A fixed usage may have cached and reasoned parts, which never exceed it."""
    usage = ask(Provider(), CHAT, payload(CHAT, "echo:usage-50-9:cached-40:cache-write-40:reasoning-4")).json()["usage"]
    details = usage["prompt_tokens_details"]
    assert (details["cached_tokens"], details["cache_write_tokens"]) == (40, 10)
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 4


def test_running_usage_is_cumulative() -> None:
    """`running-usage` reports the sum so far on every chunk, unasked: the last wins, and a sum would be wrong."""
    provider = Provider()
    chunks = events(ask(provider, CHAT, payload(CHAT, "echo:words-3:running-usage:reasoning-2", stream=True)))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [2, 3, 4, 5, 5]
    assert provider.requests[0].usage_sent


def test_the_seed_of_a_messages_stream_is_no_count() -> None:
    """`message_start` says 1 output token, or a reported 0; `message_delta` says the count."""
    for model, seed, count in (("echo", 1, 20), ("echo:zero-usage", 0, 0)):
        stream = events(ask(Provider(), ANTHROPIC, payload(ANTHROPIC, model, stream=True)))
        assert stream[0]["message"]["usage"]["output_tokens"] == seed
        assert stream[-2]["usage"]["output_tokens"] == count


def test_several_choices_are_all_counted() -> None:
    """With `n`, deltas of every choice interleave, and one usage covers them all."""
    provider = Provider()
    options = {"n": 3, "stream": True, "stream_options": {"include_usage": True}}
    chunks = events(ask(provider, CHAT, payload(CHAT, "echo:words-2", **options)))
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
    assert texts == [answer_text(2)] * 3
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert len(ask(provider, CHAT, payload(CHAT, "echo", n=3)).json()["choices"]) == 3


def test_prompt_text_is_found_in_every_shape() -> None:
    """Text counts the same as a string, as content parts and as items; images count nothing."""
    provider = Provider()
    parts = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": "data:,"}}]
    chat = payload(CHAT, "echo") | {"messages": [MESSAGES[0], {"role": "user", "content": parts}]}
    items = [{"role": "user", "content": [{"type": "input_text", "text": PROMPT}]}]
    ask(provider, CHAT, chat)
    ask(provider, RESPONSES, payload(RESPONSES, "echo") | {"input": items})
    ask(provider, ANTHROPIC, payload(ANTHROPIC, "echo") | {"system": [{"type": "text", "text": "Be brief."}]})
    assert [seen.counts and seen.counts.input for seen in provider.requests] == [PROMPT_TOKENS] * 3


def test_responses_can_fail_or_stay_incomplete() -> None:
    """`response.failed` has no usage and JSON says `failed` with 200; a maximum ends as `incomplete` with usage."""
    provider = Provider()
    stream = events(ask(provider, RESPONSES, payload(RESPONSES, "echo:failed-after-2", stream=True)))
    assert [event["type"] for event in stream][-2:] == ["response.output_text.delta", "response.failed"]
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    assert stream[-1]["response"]["usage"] is None
    whole = ask(provider, RESPONSES, payload(RESPONSES, "echo:failed-after-2"))
    assert (whole.status_code, whole.json()["status"], whole.json()["error"]["code"]) == (
        200,
        "failed",
        "server_error",
    )
    error = events(ask(provider, RESPONSES, payload(RESPONSES, "echo:error-after-1", stream=True)))[-1]
    assert (error["type"], error["code"]) == ("error", "server_error")
    short = events(ask(provider, RESPONSES, payload(RESPONSES, "echo", stream=True, max_output_tokens=4)))[-1]
    assert short["type"] == "response.incomplete"
    assert short["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    assert short["response"]["usage"]["output_tokens"] == 4
    assert [seen.usage_sent for seen in provider.requests] == [False, False, False, True]


@pytest.mark.parametrize("path", [CHAT, ANTHROPIC])
@pytest.mark.parametrize("behaviour", ["error-after-3", "failed-after-3"])
def test_a_failing_json_answer_is_500(path: str, behaviour: str) -> None:
    """Where a whole answer cannot say that it failed, it is the vendor's 500."""
    provider = Provider()
    assert ask(provider, path, payload(path, f"echo:{behaviour}")).status_code == 500
    assert not provider.requests[0].usage_sent


@pytest.mark.parametrize(("path", "first"), [(CHAT, "data: "), (RESPONSES, "event: "), (ANTHROPIC, "event: ")])
def test_frame_a_stream_as_asked(path: str, first: str) -> None:
    """Line ends, comments and torn characters change the bytes of a stream and nothing that it says."""
    plain = _stream(path, "echo")
    odd = _stream(path, "echo:crlf:comments:torn")
    assert body(plain.log).startswith(first.encode())
    assert body(odd.log).startswith(f": keep-alive\r\n\r\n{first}".encode())
    assert body(plain.log) == body(odd.log).replace(b": keep-alive\r\n\r\n", b"").replace(b"\r\n", b"\n")
    pieces = [message["body"] for message in odd.log[1:-1]]
    assert len(pieces) == 2 * (len(plain.log) - 2)
    assert any(piece.endswith("é".encode()[:1]) for piece in pieces)
    assert dict(headers(plain.log))["content-type"] == "text/event-stream; charset=utf-8"


def _stream(path: str, model: str, **options: Any) -> Drive:
    """A stream message by message, in process."""
    scope = http_scope(path, "POST", headers=KEYS.items(), spec_version=options.pop("spec_version", "2.3"))
    provider = options.pop("provider", None) or Provider(clock=lambda: NOW)
    content = json.dumps(payload(path, model, stream=True)).encode()
    return asyncio.run(drive(provider, scope, body=content, **options))


@pytest.mark.parametrize("path", [CHAT, RESPONSES, ANTHROPIC])
def test_a_stream_ends_as_the_vendor_ends_it(path: str) -> None:
    """Chat ends with `[DONE]`, the others with their own last event; after an error event nothing follows."""
    last = {
        CHAT: b"data: [DONE]\n\n",
        RESPONSES: b"event: response.completed\n",
        ANTHROPIC: b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    }[path]
    provider = Provider()
    assert body([_stream(path, "echo", provider=provider).log[-2]]).startswith(last)
    assert (provider.requests[0].finished, provider.requests[0].client_disconnected) == (True, False)
    failed = _stream(path, "echo:error-after-0")
    assert b"[DONE]" not in body(failed.log)
    assert b"error" in body([failed.log[-2]])
    assert not failed.log[-1]["more_body"]


# Refusals before the model is looked at


ENVELOPES = [
    (CHAT, lambda answer: (answer["error"]["type"], answer["error"]["code"], answer["error"]["param"])),
    (ANTHROPIC, lambda answer: (answer["type"], answer["error"]["type"], answer["request_id"])),
]


@pytest.mark.parametrize(
    ("path", "content", "changed", "status", "kind"),
    [
        (CHAT, {}, {"authorization": ""}, 401, "invalid_request_error"),
        (CHAT, {}, {"authorization": "Basic c2s="}, 401, "invalid_request_error"),
        (CHAT, {}, {"authorization": "Bearer wrong"}, 401, "invalid_request_error"),
        (ANTHROPIC, {}, {"authorization": "", "x-api-key": ""}, 401, "authentication_error"),
        (ANTHROPIC, {}, {"authorization": "", "x-api-key": "wrong"}, 401, "authentication_error"),
        (ANTHROPIC, {}, {"anthropic-version": ""}, 400, "invalid_request_error"),
        (CHAT, b"{", {}, 400, "invalid_request_error"),
        (CHAT, b"\xff", {}, 400, "invalid_request_error"),
        (CHAT, b"[]", {}, 400, "invalid_request_error"),
        (ANTHROPIC, b"", {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo"}, {}, 400, "invalid_request_error"),
        (CHAT, {"messages": MESSAGES}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": 3, "messages": MESSAGES}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": []}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": ["Hi"]}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": MESSAGES, "stream": "yes"}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": MESSAGES, "max_tokens": 0}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": MESSAGES, "max_tokens": True}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": MESSAGES, "n": 17}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": "echo", "messages": MESSAGES, "stream": True, "stream_options": 1}, {}, 400, None),
        (CHAT, {"model": "echo:endless", "messages": MESSAGES}, {}, 400, "invalid_request_error"),
        (CHAT, {"model": ":slow", "messages": MESSAGES}, {}, 404, "invalid_request_error"),
        (RESPONSES, {"model": "echo"}, {}, 400, "invalid_request_error"),
        (RESPONSES, {"model": "echo", "input": 3}, {}, 400, "invalid_request_error"),
        (ANTHROPIC, {"model": "echo", "messages": MESSAGES}, {}, 400, "invalid_request_error"),
        (ANTHROPIC, {"messages": MESSAGES, "max_tokens": 3}, {}, 400, "invalid_request_error"),
        (ANTHROPIC, {"model": 3, "messages": MESSAGES, "max_tokens": 3}, {}, 400, "invalid_request_error"),
        (ANTHROPIC, {"model": "echo", "messages": [], "max_tokens": 3}, {}, 400, "invalid_request_error"),
        ("/v1/embeddings", {}, {}, 404, "invalid_request_error"),
        ("/v1/messages/batches", {}, {}, 404, "not_found_error"),
        (CHAT, b" " * (MAX_BODY_BYTES + 1), {}, 413, "invalid_request_error"),
        (ANTHROPIC, b" " * (MAX_BODY_BYTES + 1), {}, 413, "request_too_large"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_refuse_what_is_wrong_before_the_model(
    path: str, content: Any, changed: dict[str, str], status: int, kind: str | None
) -> None:
    """A wrong key, path, body or field is refused in the vendor's own envelope, and uses nothing."""
    provider = Provider(api_keys={"sk-any"})
    sent = {name: value for name, value in (KEYS | changed).items() if value}
    answer = ask(provider, path, content, headers=sent)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"]) == (status, kind or "invalid_request_error")
    assert set(error) == ({"type", "message"} if path.startswith(ANTHROPIC) else {"type", "message", "param", "code"})
    assert answer.json().get("request_id", "req_000001") == "req_000001"
    assert provider.requests[0].counts is None
    assert "x-ratelimit-limit-requests" not in answer.headers


@pytest.mark.parametrize("path", [CHAT, ANTHROPIC])
def test_refuse_a_wrong_method(path: str) -> None:
    """Only POST is taken."""
    assert ask(Provider(), path, b"", method="GET").status_code == 405


def test_take_a_bearer_token_for_anthropic() -> None:
    """Anthropic's door also takes `Authorization: Bearer`."""
    provider = Provider(api_keys={"sk-any"})
    sent = {name: value for name, value in KEYS.items() if name != "x-api-key"}
    assert ask(provider, ANTHROPIC, payload(ANTHROPIC, "echo"), headers=sent).status_code == 200


# Limits


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the moment that the test chose."""
        return self.now


def test_openai_limits_count_down_and_refill() -> None:
    """Remaining requests and tokens fall by what was used, come back with time, and resets are Go durations."""
    clock = Clock()
    provider = Provider(requests_per_minute=60, tokens_per_minute=600, clock=clock)
    used = PROMPT_TOKENS + 20
    first = ask(provider, CHAT, payload(CHAT, "echo"))
    assert first.headers["x-ratelimit-limit-requests"] == "60"
    assert first.headers["x-ratelimit-remaining-requests"] == "59"
    assert first.headers["x-ratelimit-reset-requests"] == "1s"
    assert first.headers["x-ratelimit-remaining-tokens"] == str(600 - used)
    assert first.headers["x-ratelimit-reset-tokens"] == go_duration(used / 10)
    second = ask(provider, RESPONSES, payload(RESPONSES, "echo"))
    assert second.headers["x-ratelimit-remaining-tokens"] == str(600 - 2 * used)
    clock.now += 3_600
    third = ask(provider, CHAT, payload(CHAT, "echo"))
    assert third.headers["x-ratelimit-remaining-tokens"] == str(600 - used)
    assert third.json()["created"] == int(clock.now)


def test_openai_limits_refuse_and_take_nothing() -> None:
    """Beyond a limit there is a real 429 that says when to come back; it took nothing, so that moment is right."""
    clock = Clock()
    provider = Provider(requests_per_minute=60, tokens_per_minute=PROMPT_TOKENS + 20, clock=clock)
    assert ask(provider, CHAT, payload(CHAT, "echo")).status_code == 200
    clock.now += 30
    refused = ask(provider, CHAT, payload(CHAT, "echo"))
    assert refused.status_code == 429
    assert refused.json()["error"]["type"] == "tokens"
    assert (refused.headers["retry-after"], refused.headers["x-ratelimit-remaining-tokens"]) == ("30", "0")
    assert refused.headers["x-ratelimit-remaining-requests"] == "60"
    clock.now += 29
    assert ask(provider, CHAT, payload(CHAT, "echo")).headers["retry-after"] == "1"
    clock.now += 1
    assert ask(provider, CHAT, payload(CHAT, "echo")).status_code == 200


def test_the_limit_that_lasts_longest_is_named() -> None:
    """Where two limits are used up, the refusal names the one to wait for, and its seconds."""
    clock = Clock()
    provider = Provider(requests_per_minute=1, tokens_per_minute=2 * (PROMPT_TOKENS + 20), clock=clock)
    ask(provider, CHAT, payload(CHAT, "echo"))
    refused = ask(provider, CHAT, payload(CHAT, "echo:words-40"))
    assert (refused.json()["error"]["type"], refused.headers["retry-after"]) == ("requests", "60")


def test_a_refusal_on_demand_says_what_is_left_now() -> None:
    """`rate-limited` empties the requests in its header fields only; the other limits are those of this moment."""
    clock = Clock()
    provider = Provider(clock=clock)
    ask(provider, CHAT, payload(CHAT, "echo"))
    ask(provider, ANTHROPIC, payload(ANTHROPIC, "echo"))
    clock.now += 60
    refused = ask(provider, CHAT, payload(CHAT, "echo:rate-limited-7"))
    assert refused.headers["x-ratelimit-remaining-tokens"] == "2000000"
    refused = ask(provider, ANTHROPIC, payload(ANTHROPIC, "echo:rate-limited-7"))
    assert refused.headers["anthropic-ratelimit-requests-reset"] == rfc3339(clock.now + 7)
    assert ask(provider, CHAT, payload(CHAT, "echo")).headers["x-ratelimit-remaining-requests"] == "4999"


@pytest.mark.parametrize("path", [CHAT, ANTHROPIC])
def test_a_request_above_the_limit_itself_never_fits(path: str) -> None:
    """A request that no refill can admit is a 429 without `retry-after`."""
    provider = Provider(tokens_per_minute=10, output_tokens_per_minute=10)
    refused = ask(provider, path, payload(path, "echo"))
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    assert refused.headers.get("x-ratelimit-remaining-tokens", "10") == "10"


def test_anthropic_limits_count_down() -> None:
    """Four families, remaining tokens in thousands, resets as RFC 3339; cached input takes nothing."""
    provider = Provider(
        requests_per_minute=60, input_tokens_per_minute=80_000, output_tokens_per_minute=16_000, clock=lambda: NOW
    )
    model = f"echo:words-1600:cached-{PROMPT_TOKENS}"
    fields = ask(provider, ANTHROPIC, payload(ANTHROPIC, model, max_tokens=1_600)).headers
    left = {family: fields[f"anthropic-ratelimit-{family}-remaining"] for family in FAMILIES}
    assert left == {"requests": "59", "input-tokens": "80000", "output-tokens": "14000", "tokens": "94000"}
    assert fields["anthropic-ratelimit-tokens-limit"] == "96000"
    resets = {family: fields[f"anthropic-ratelimit-{family}-reset"] for family in FAMILIES}
    assert resets == {
        "requests": rfc3339(NOW + 1),
        "input-tokens": rfc3339(NOW),
        "output-tokens": rfc3339(NOW + 6),
        "tokens": rfc3339(NOW + 6),
    }


FAMILIES = ("requests", "input-tokens", "output-tokens", "tokens")


def test_no_quota_leaves_the_limits_unsaid() -> None:
    """`no-quota` answers without any rate-limit field."""
    for path in (CHAT, ANTHROPIC):
        fields = ask(Provider(), path, payload(path, "echo:no-quota")).headers
        assert not [name for name in fields if "ratelimit" in name]


def test_a_clock_that_steps_back_refills_nothing() -> None:
    """A bucket never loses or gains by a clock that goes backwards."""
    bucket = Bucket(60, NOW)
    bucket.take(50)
    bucket.refill(NOW - 100)
    assert (bucket.remaining, bucket.at) == (10, NOW)
    bucket.refill(NOW + 1)
    assert (bucket.remaining, bucket.at, bucket.full_in_s) == (11, NOW + 1, 49)


@pytest.mark.parametrize(
    ("seconds", "written"),
    [
        (1, "1s"),
        (360, "6m0s"),
        (0.02, "20ms"),
        (179.56, "2m59.56s"),
        (7.66, "7.66s"),
        (3723, "1h2m3s"),
        (578.016, "9m38.016s"),
        (0.12, "120ms"),
        (0, "0s"),
        (3600, "1h0m0s"),
        (0.9999, "1s"),
    ],
)
def test_write_go_durations(seconds: float, written: str) -> None:
    """The vectors of OpenAI's and Groq's headers, the other way round."""
    assert go_duration(seconds) == written


def test_write_rfc3339_never_early() -> None:
    """A moment is written in UTC and rounded up to the second."""
    assert rfc3339(1_755_780_058.2) == "2025-08-21T12:40:59Z"


# The text and its counts


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("words", [1, 2, 44, 45, 500])
def test_each_word_is_one_token(encoding: str, words: int) -> None:
    """The text has as many tokens as words in both encodings, so that counted deltas and reported usage agree."""
    assert count_tokens(answer_text(words), encoding).tokens == words


def test_count_with_another_tokenizer() -> None:
    """`count` replaces the tokenizer for prompt and answer alike."""
    usage = ask(Provider(count=len), CHAT, payload(CHAT, "echo:words-2")).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(f"Be brief.\n{PROMPT}"), len(answer_text(2)))


def test_a_maximum_smaller_than_the_thought_leaves_no_text() -> None:
    """Reasoning counts towards the maximum: nothing is left to say, and the answer was truncated."""
    answer = ask(Provider(), CHAT, payload(CHAT, "echo:reasoning-30", max_tokens=12)).json()
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12


# Model names


def test_the_table_names_every_behaviour() -> None:
    """The docstring's table and the grammar know the same names."""
    names = re.findall(r"^``([a-z-]+?)(?:-[A-Z]+)*``", provider_package.__doc__ or "", re.MULTILINE)
    assert sorted(set(names)) == sorted(BEHAVIOURS)


def test_behaviours_combine_in_any_order() -> None:
    """Parts combine, numbers have defaults, and the base name stays what it was."""
    one, other = read_model("gpt-5.5:slow:cut-after-3:words-9"), read_model("gpt-5.5:words-9:cut-after-3:slow-50")
    assert one == other
    assert (one.model, one.pause_s, one.words) == ("gpt-5.5", 0.05, 9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "has no base name"),
        (":slow", "has no base name"),
        ("echo:", "No behaviour is called ''"),
        ("echo:fast", "Choose from: words, slow"),
        ("ft:gpt-4o:org", "No behaviour is called 'gpt-4o'"),
        ("echo:words", "needs a number from 0 to 30000 here, not None"),
        ("echo:words-30001", "needs a number from 0 to 30000 here, not 30001"),
        ("echo:error-200", "needs a number from 400 to 599"),
        ("echo:slow-1-2", "takes 1 numbers"),
        ("echo:usage-1", "needs a number"),
        ("echo:cut-after-1:stall-after-2", "contradicts"),
        ("echo:slow:slow", "contradicts"),
        ("echo:words-99999999999999999999", "No behaviour is called"),
    ],
)
def test_refuse_model_names_that_mean_nothing(name: str, reason: str) -> None:
    """An unknown, unbounded or contradicting part is an error that says what is wrong and what there is."""
    with pytest.raises(UnknownBehaviourError, match=re.escape(reason)):
        read_model(name)


# Clients that leave, pauses, scopes


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("fault", ["disconnect_at", "raise_at"])
def test_see_the_client_leave_a_stream(spec_version: str, fault: str) -> None:
    """A disconnect is seen as a message and as an `OSError` of `send`; the stream stops at once."""
    provider = Provider()
    fault_at: Any = {fault: 6}
    run = _stream(CHAT, "echo:endless", provider=provider, spec_version=spec_version, **fault_at)
    seen = provider.requests[0]
    assert (run.outcome, seen.client_disconnected, seen.finished) == ("returned", True, False)
    assert len(run.log) <= 8
    assert seen.ended.is_set()


def test_refuse_a_client_that_is_gone() -> None:
    """A refusal that nobody reads ends quietly, also where `send` raises."""
    provider = Provider()
    run = _stream(CHAT, "echo:error-500", provider=provider, raise_at=2)
    assert (run.outcome, status(run.log)) == ("returned", 500)
    assert provider.requests[0].ended.is_set()


@pytest.mark.parametrize("model", ["echo:stall-after-0", "echo:slow-60000"])
def test_see_the_client_leave_before_the_answer(live: Live, model: str) -> None:
    """A client that gives up on a JSON answer that does not come is seen, though nothing was sent yet."""
    with HttpClient(_port(live)) as client:
        count = len(live.provider.requests)
        client.send_request("POST", CHAT, headers=list(KEYS.items()), body=json.dumps(payload(CHAT, model)).encode())
        wait_until(lambda: len(live.provider.requests) > count and live.provider.requests[-1].counts)
        client.leave_fin()
    assert live.last().client_disconnected
    assert live.last().status is None


def test_see_the_client_leave_in_its_body(live: Live) -> None:
    """A client that leaves half-way through its own request is recorded without a body."""
    count = len(live.provider.requests)
    client = HttpClient(_port(live))
    client.send_request("POST", CHAT, headers=list(KEYS.items()), body=b" " * 1_000, stop_after=500)
    wait_until(lambda: len(live.provider.requests) > count)
    client.leave_rst()
    seen = live.last()
    assert (seen.client_disconnected, seen.body, seen.status) == (True, None, None)


def test_cut_a_json_answer_in_its_middle(live: Live) -> None:
    """A cut JSON answer announces its length and ends before it; no usage went out."""
    with HttpClient(_port(live)) as client:
        content = json.dumps(payload(CHAT, "echo:cut-after-1")).encode()
        client.send_request("POST", CHAT, headers=list(KEYS.items()), body=content)
        head = client.read_head()
        half = client.read_rest()
    assert (head.status, client.ended) == (200, "eof")
    assert len(half) == int(head.get("content-length") or 0) // 2
    assert (live.last().finished, live.last().usage_sent) == (False, False)


def test_cut_a_stream_after_its_last_delta() -> None:
    """A cut after as many deltas as there are words leaves out everything that would have followed them."""
    run = _stream(CHAT, "echo:words-2:cut-after-2")
    assert (run.outcome, run.complete.is_set()) == ("returned", False)
    assert b" river" in body([run.log[-1]])


def _port(live: Live) -> int:
    return int(live.url.rpartition(":")[2])


def test_slow_answers_pause_by_the_given_sleep() -> None:
    """A stream pauses before each delta, a JSON answer once for all its words; other answers never."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    provider = Provider(sleep=sleep)
    ask(provider, CHAT, payload(CHAT, "echo:slow-20:words-3", stream=True))
    ask(provider, CHAT, payload(CHAT, "echo:slow-250:words-4"))
    ask(provider, CHAT, payload(CHAT, "echo", stream=True))
    assert pauses == [0.02, 0.02, 0.02, 1.0]


def test_answers_are_the_same_for_the_same_requests() -> None:
    """Ids, times and texts follow from the requests alone: two providers with one clock answer alike."""
    logs = []
    for _ in range(2):
        provider = Provider(clock=lambda: NOW)
        logs.append([_stream(path, "echo", provider=provider).log for path in (CHAT, RESPONSES, ANTHROPIC)])
    assert logs[0] == logs[1]
    assert b"chatcmpl-000001" in body(logs[0][0])
    assert status(logs[0][0]) == 200


def test_remember_a_bounded_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest requests are forgotten beyond the bound, and numbers go on."""
    monkeypatch.setattr("asgi_metering.testing.provider.app.MAX_SEEN", 2)
    provider = Provider()
    for _ in range(3):
        ask(provider, CHAT, b"")
    assert [seen.number for seen in provider.requests] == [2, 3]
    assert isinstance(provider.requests[0].ended, threading.Event)


def test_answer_a_lifespan_and_close_a_websocket() -> None:
    """The provider starts and stops with its server, and takes no WebSocket."""

    async def run() -> None:
        async with lifespan(Provider()):
            pass
        closed = await drive(Provider(), websocket_scope(), messages=[{"type": "websocket.connect"}])
        assert [message["type"] for message in closed.log] == ["websocket.close"]

    asyncio.run(run())


def test_answer_below_a_mount() -> None:
    """Mounted in another application, the provider finds its paths below the mount."""
    outer = Starlette(routes=[Mount("/upstream", Provider())])
    scope = http_scope(f"/upstream{CHAT}", "POST", headers=KEYS.items())
    run = asyncio.run(drive(outer, scope, body=json.dumps(payload(CHAT, "echo")).encode()))
    assert json.loads(body(run.log))["model"] == "echo"


def test_serve_the_provider_from_the_command_line() -> None:
    """The class is a factory for a server's command line, as its docstring shows."""
    factory = "asgi_metering.testing.provider:Provider"
    with serve(factory, "uvicorn-h11", extra_args=["--factory"]) as server, HttpClient(server.port) as client:
        content = json.dumps(payload(ANTHROPIC, "echo:words-3")).encode()
        client.send_request("POST", ANTHROPIC, headers=list(KEYS.items()), body=content)
        assert client.read_head().status == 200
        assert json.loads(client.read_rest())["content"][0]["text"] == answer_text(3)


def test_names_of_the_testing_package_are_found_on_use() -> None:
    """The testing package hands out its parts on first use, and knows no other name."""
    assert asgi_metering.testing.Provider is Provider
    assert asgi_metering.testing.SeenRequest is SeenRequest
    assert set(asgi_metering.testing.__all__) >= {"Provider", "SeenRequest"}
    with pytest.raises(AttributeError, match="Nothing"):
        asgi_metering.testing.Nothing  # noqa: B018
