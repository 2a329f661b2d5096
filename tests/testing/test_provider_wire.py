"""What the bundled provider writes: usage as asked, frames, ends, and refusals of what is wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from anthropic.types import Message as AnthropicMessage
from anthropic.types import RawMessageStreamEvent
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from asgi_metering.testing.provider import Provider, answer_text
from asgi_metering.testing.provider.app import MAX_BODY_BYTES
from tests.harness.drive import body, headers

if TYPE_CHECKING:
    pass
from tests.testing.support import (
    ANTHROPIC,
    CHAT,
    KEYS,
    MESSAGES,
    PROMPT,
    PROMPT_TOKENS,
    RESPONSES,
    ask,
    events,
    payload,
    streamed,
)


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
    plain = streamed(path, "echo")
    odd = streamed(path, "echo:crlf:comments:torn")
    assert body(plain.log).startswith(first.encode())
    assert body(odd.log).startswith(f": keep-alive\r\n\r\n{first}".encode())
    assert body(plain.log) == body(odd.log).replace(b": keep-alive\r\n\r\n", b"").replace(b"\r\n", b"\n")
    pieces = [message["body"] for message in odd.log[1:-1]]
    assert len(pieces) == 2 * (len(plain.log) - 2)
    assert any(piece.endswith("é".encode()[:1]) for piece in pieces)
    assert dict(headers(plain.log))["content-type"] == "text/event-stream; charset=utf-8"


@pytest.mark.parametrize("path", [CHAT, RESPONSES, ANTHROPIC])
def test_a_stream_ends_as_the_vendor_ends_it(path: str) -> None:
    """Chat ends with `[DONE]`, the others with their own last event; after an error event nothing follows."""
    last = {
        CHAT: b"data: [DONE]\n\n",
        RESPONSES: b"event: response.completed\n",
        ANTHROPIC: b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
    }[path]
    provider = Provider()
    assert body([streamed(path, "echo", provider=provider).log[-2]]).startswith(last)
    assert (provider.requests[0].finished, provider.requests[0].client_disconnected) == (True, False)
    failed = streamed(path, "echo:error-after-0")
    assert b"[DONE]" not in body(failed.log)
    assert b"error" in body([failed.log[-2]])
    assert not failed.log[-1]["more_body"]


# Refusals before the model is looked at


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
