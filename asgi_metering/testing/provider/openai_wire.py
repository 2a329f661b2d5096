"""
OpenAI's wire formats: Chat Completions, Responses, errors, rate-limit fields.

Knows field names and the order of events. Never decides what is answered.

Sources: openai 3.54.0 (types and stream decoder), the rate-limits guide, captured error bodies.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from asgi_metering.testing.provider.answers import TokenCounts, answer_text, word
from asgi_metering.testing.provider.quota import Account, go_duration, openai_fields
from asgi_metering.testing.provider.wire import Asked, Call, Event, Json, Refusal, flag, flat_text, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Chat", "OpenAI", "Responses"]

MAX_CHOICES = 16
"""Answers of one chat request; the API's own bound is 128, and nothing here depends on it."""

_FAULT = "The server had an error while processing your request. Sorry about that!"
_ORGANIZATION = "org-bundled"


class OpenAI:
    """Keys, limits, fields and errors of the OpenAI platform."""

    def credential(self, headers: Mapping[str, str]) -> str | None:
        """Return the bearer token."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return token.strip() or None if scheme.lower() == "bearer" else None

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Ask for nothing else."""

    def amounts(self, counts: TokenCounts) -> dict[str, int]:
        """Return one request, and all tokens."""
        return {"requests": 1, "tokens": counts.input + counts.output}

    def fields(self, request_id: str) -> dict[str, str]:
        """Return the request's id and the account's organisation."""
        return {"x-request-id": request_id, "openai-organization": _ORGANIZATION, "openai-version": "2020-10-01"}

    def quota_fields(self, account: Account) -> dict[str, str]:
        """Return limits, remainders and resets."""
        return openai_fields(account)

    def spent_fields(self, account: Account, refusal: Refusal) -> dict[str, str]:
        """Return the same with nothing left of the limit in question, and both forms of ``retry-after``."""
        fields = openai_fields(account)
        if refusal.retry_after_s is None:
            return fields
        return fields | {
            f"x-ratelimit-remaining-{refusal.family}": "0",
            f"x-ratelimit-reset-{refusal.family}": go_duration(refusal.retry_after_s),
            "retry-after": str(math.ceil(refusal.retry_after_s)),
            "retry-after-ms": str(math.ceil(refusal.retry_after_s * 1000)),
        }

    def error(self, refusal: Refusal, request_id: str) -> tuple[int, Json]:
        """Return status and ``{"error": {"message", "type", "param", "code"}}``."""
        status, kind, code, message = _error(refusal)
        return status, {"error": {"message": message, "type": kind, "param": refusal.param, "code": code}}


def _error(refusal: Refusal) -> tuple[int, str, str | None, str]:
    """Return status, type, code and message."""
    detail, invalid = refusal.detail, "invalid_request_error"
    match refusal.kind:
        case "no_key":
            message = "You didn't provide an API key. You need to provide your API key in an Authorization header "
            return 401, invalid, None, message + "using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
        case "wrong_key":
            return 401, invalid, "invalid_api_key", "Incorrect API key provided."
        case "bad_json":
            return 400, invalid, None, f"We could not parse the JSON body of your request. {detail}"
        case "missing":
            return 400, invalid, "missing_required_parameter", f"Missing required parameter: '{refusal.param}'."
        case "invalid":
            return 400, invalid, "invalid_value", f"Invalid value for '{refusal.param}'. {detail}"
        case "unknown_path":
            return 404, invalid, None, f"Invalid URL ({detail})"
        case "wrong_method":
            return 405, invalid, None, f"Not allowed: {detail}"
        case "too_large":
            return 413, invalid, None, f"The request is too large. {detail}"
        case "unknown_model":
            return 404, invalid, "model_not_found", f"The model does not exist. {detail}"
        case "rate_limited" | "never_fits":
            return 429, *_rate_limit(refusal)
        case "out_of_credit":
            message = "You exceeded your current quota, please check your plan and billing details."
            return 429, "insufficient_quota", "insufficient_quota", message
        case "overloaded":
            return 503, "server_error", None, "The engine is currently overloaded, please try again later."
        case "status":
            if refusal.status < 500:
                return refusal.status, invalid, None, f"The request was refused with {refusal.status}."
            return refusal.status, "server_error", None, _FAULT


def _rate_limit(refusal: Refusal) -> tuple[str, str, str]:
    short = {"requests": "requests per min (RPM)", "tokens": "tokens per min (TPM)"}[refusal.family]
    if refusal.kind == "never_fits":
        message = f"Request too large on {short}: {refusal.detail} The input or output tokens must be reduced."
    else:
        again = go_duration(refusal.retry_after_s or 0)
        message = f"Rate limit reached in organization {_ORGANIZATION} on {short}: {refusal.detail} "
        message += f"Please try again in {again}."
    return refusal.family, "rate_limit_exceeded", message


class Chat:
    """``POST /v1/chat/completions``."""

    path = "/v1/chat/completions"
    uses = True
    fails_in_body = False

    def read(self, body: Json) -> Asked:
        """Read a chat request. Raises `Refusal`."""
        messages = body.get("messages")
        if messages is None:
            raise Refusal("missing", param="messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
            raise Refusal("invalid", "Expected a non-empty array of objects.", param="messages")
        stream = flag(body, "stream")
        most = [whole_number(body, name) for name in ("max_completion_tokens", "max_tokens")]
        return Asked(
            model=_model(body),
            prompt=flat_text(messages),
            stream=stream,
            max_tokens=next((number for number in most if number is not None), None),
            choices=whole_number(body, "n", MAX_CHOICES) or 1,
            include_usage=not stream or _include_usage(body),
        )

    def answer(self, call: Call) -> Json:
        """Return a ``chat.completion``."""
        message: Json = {"role": "assistant", "content": call.answer.text, "refusal": None, "annotations": []}
        finish = _finish_reason(call)
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": finish}
            for index in range(call.answer.choices)
        ]
        payload = _chat_head(call, "chat.completion", choices)
        return call.put_usage(payload, call.answer.reported, _chat_usage)

    def events(self, call: Call) -> Iterator[Event]:
        """
        Return ``chat.completion.chunk`` events and ``[DONE]``.

        The usage chunk, with no choices, comes only where ``stream_options.include_usage`` asked for it; every
        chunk before it then says ``usage: null``. A ``running-usage`` model reports the sum so far instead, asked
        or not, as some compatible servers do.
        """
        every = range(call.answer.choices)
        for index in every:
            yield _chunk(call, index, {"role": "assistant", "content": "", "refusal": None})
        for at in itertools.count() if call.behaviour.endless else range(call.answer.words):
            for index in every:
                yield _chunk(call, index, {"content": word(at)}, said=at + 1)._replace(is_delta=True)
        for index in every:
            yield _chunk(call, index, {}, _finish_reason(call), said=call.answer.words)
        if call.asked.include_usage and call.answer.reports:
            payload = _chat_head(call, "chat.completion.chunk", [])
            yield Event(None, call.put_usage(payload, call.answer.reported, _chat_usage), has_usage=True)
        yield Event(None, "[DONE]")

    def broken(self, call: Call, sent: int) -> Event:
        """Return the error object as a chunk; nothing follows it, not even ``[DONE]``."""
        return Event(None, {"error": {"message": _FAULT, "type": "server_error", "param": None, "code": None}})


def _model(body: Json) -> str:
    model = body.get("model")
    if model is None:
        raise Refusal("missing", param="model")
    if not isinstance(model, str):
        raise Refusal("invalid", f"Expected a string, got {model!r}.", param="model")
    return model


def _include_usage(body: Json) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise Refusal("invalid", f"Expected an object, got {options!r}.", param="stream_options")
    return flag(options, "include_usage")


def _finish_reason(call: Call) -> str:
    return "length" if call.answer.truncated else "stop"


def _chat_head(call: Call, kind: str, choices: list[Json]) -> Json:
    return {
        "id": f"chatcmpl-{call.number:06d}",
        "object": kind,
        "created": call.created,
        "model": call.behaviour.model,
        "choices": choices,
        "service_tier": "default",
        "system_fingerprint": "fp_bundled",
    }


def _chunk(call: Call, index: int, delta: Json, finish: str | None = None, *, said: int = 0) -> Event:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    payload = _chat_head(call, "chat.completion.chunk", [choice])
    counts, running = call.answer.counts, call.behaviour.running_usage
    if running:
        so_far = TokenCounts(counts.input, counts.reasoning + said * call.answer.choices, reasoning=counts.reasoning)
        call.put_usage(payload, so_far, _chat_usage)
    elif call.asked.include_usage:
        call.put_usage(payload, None, _chat_usage)
    return Event(None, payload, has_usage=running and finish is not None)


def _chat_usage(counts: TokenCounts) -> Json:
    return {
        "prompt_tokens": counts.input,
        "completion_tokens": counts.output,
        "total_tokens": counts.input + counts.output,
        "prompt_tokens_details": {
            "cached_tokens": counts.cached,
            "cache_write_tokens": counts.cache_write,
            "audio_tokens": 0,
        },
        "completion_tokens_details": {
            "reasoning_tokens": counts.reasoning,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


class Responses:
    """``POST /v1/responses``."""

    path = "/v1/responses"
    uses = True
    fails_in_body = True

    def read(self, body: Json) -> Asked:
        """Read a Responses request. Raises `Refusal`."""
        if body.get("input") is None:
            raise Refusal("missing", param="input")
        if not isinstance(body["input"], (str, list)):
            raise Refusal("invalid", "Expected a string or an array.", param="input")
        prompt = flat_text([body.get("instructions"), body["input"]])
        return Asked(_model(body), prompt, flag(body, "stream"), whole_number(body, "max_output_tokens"))

    def answer(self, call: Call) -> Json:
        """Return a ``response``, failed where the behaviour says so."""
        if _fails(call):
            return _failed(call)
        return _response(call, _status(call), [_item(call, _status(call), call.answer.words)])

    def events(self, call: Call) -> Iterator[Event]:
        """Return the typed events; usage is in the last one only, and there is no ``[DONE]``."""
        numbers = itertools.count()

        def event(name: str, is_delta: bool = False, has_usage: bool = False, **rest: Any) -> Event:
            payload = {"type": f"response.{name}", "sequence_number": next(numbers), **rest}
            return Event(payload["type"], payload, is_delta, has_usage)

        where: Json = {"item_id": f"msg_{call.number:06d}", "output_index": 0, "content_index": 0}
        started = _item(call, "in_progress", 0) | {"content": []}
        yield event("created", response=_response(call, "in_progress", []))
        yield event("in_progress", response=_response(call, "in_progress", []))
        yield event("output_item.added", output_index=0, item=started)
        yield event("content_part.added", **where, part=_part(""))
        for at in itertools.count() if call.behaviour.endless else range(call.answer.words):
            yield event("output_text.delta", True, **where, delta=word(at), logprobs=[])
        status = _status(call)
        item = _item(call, status, call.answer.words)
        yield event("output_text.done", **where, text=call.answer.text, logprobs=[])
        yield event("content_part.done", **where, part=_part(call.answer.text))
        yield event("output_item.done", output_index=0, item=item)
        yield event(status, has_usage=call.answer.reports, response=_response(call, status, [item]))

    def broken(self, call: Call, sent: int) -> Event:
        """Return ``response.failed``, whose usage is null, or the stream's own ``error`` event."""
        if _fails(call):
            payload = {"type": "response.failed", "sequence_number": sent, "response": _failed(call)}
            return Event("response.failed", payload)
        payload = {"type": "error", "sequence_number": sent, "code": "server_error", "message": _FAULT, "param": None}
        return Event("error", payload)


def _status(call: Call) -> str:
    return "incomplete" if call.answer.truncated else "completed"


def _response(call: Call, status: str, output: list[Json]) -> Json:
    ended = status in ("completed", "incomplete")
    payload: Json = {
        "id": f"resp_{call.number:06d}",
        "object": "response",
        "created_at": call.created,
        "completed_at": call.created if status == "completed" else None,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "max_output_tokens": call.asked.max_tokens,
        "model": call.behaviour.model,
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "metadata": {},
    }
    return call.put_usage(payload, call.answer.reported if ended else None, _responses_usage)


def _fails(call: Call) -> bool:
    return call.behaviour.stop is not None and call.behaviour.stop.kind == "failed"


def _failed(call: Call) -> Json:
    return _response(call, "failed", []) | {"error": {"code": "server_error", "message": _FAULT}}


def _item(call: Call, status: str, words: int) -> Json:
    content = [_part(answer_text(words))]
    return {
        "id": f"msg_{call.number:06d}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _part(text: str) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _responses_usage(counts: TokenCounts) -> Json:
    return {
        "input_tokens": counts.input,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": counts.cache_write},
        "output_tokens": counts.output,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.input + counts.output,
    }
