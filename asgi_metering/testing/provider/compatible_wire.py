"""
The wire formats of those who copied OpenAI's chat completions: Groq and Mistral, with their own fields.

Knows in which fields they differ. Never decides what is answered.

Sources: groq 1.7 and mistralai 3.7 (types), Groq's rate-limits guide, captured Mistral headers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from asgi_metering.testing.provider.openai_wire import Chat, OpenAI
from asgi_metering.testing.provider.wire import Asked, Call, Event, Json, Refusal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asgi_metering.testing.provider.quota import Account

__all__ = ["Groq", "GroqChat", "Mistral", "MistralChat"]

_SECONDS_PER_TOKEN = 0.001
"""What the times in Groq's usage are made of: nothing here takes any."""


class Groq(OpenAI):
    """Keys, limits, fields and errors of Groq: OpenAI's, but for the identifiers."""

    def fields(self, request_id: str) -> dict[str, str]:
        """Return the request's id."""
        return {"x-request-id": request_id, "x-groq-region": "bundled"}

    def spent_fields(self, account: Account, refusal: Refusal) -> dict[str, str]:
        """Return what OpenAI does, without milliseconds."""
        fields = super().spent_fields(account, refusal)
        fields.pop("retry-after-ms", None)
        return fields


class GroqChat(Chat):
    """``POST /openai/v1/chat/completions``: usage has times, and a stream tells it in ``x_groq``, unasked."""

    path = "/openai/v1/chat/completions"

    def answer(self, call: Call) -> Json:
        """Return a ``chat.completion`` with Groq's own fields."""
        payload = super().answer(call)
        if payload.get("usage"):
            payload["usage"] = _groq_usage(payload["usage"])
        return {**payload, "x_groq": {"id": f"req_{call.number:06d}"}}

    def events(self, call: Call) -> Iterator[Event]:
        """Return chunks, of which the first and the last have an ``x_groq``; a chunk of usage too, where asked for."""
        usage = super().answer(call).get("usage", ...)
        first = True
        for event in super().events(call):
            payload = event.data
            if isinstance(payload, str):
                yield event
                continue
            choices = payload["choices"]
            ends = bool(choices) and choices[0]["finish_reason"] is not None
            extra: Json = {"id": f"req_{call.number:06d}"} if first or ends else {}
            if ends and usage is not ...:
                extra["usage"] = usage and _groq_usage(usage)
            first = False
            told = event.has_usage or (ends and usage is not ...)
            yield event._replace(data={**payload, "x_groq": extra} if extra else payload, has_usage=told)


def _groq_usage(usage: Json) -> Json:
    given, written = (usage[name] * _SECONDS_PER_TOKEN for name in ("prompt_tokens", "completion_tokens"))
    parts = {
        "prompt_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
        "completion_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
    }
    times = {"queue_time": 0.0, "prompt_time": given, "completion_time": written, "total_time": given + written}
    return {**usage, **parts, **times}


class Mistral(OpenAI):
    """Keys, limits, fields and errors of Mistral's platform."""

    def fields(self, request_id: str) -> dict[str, str]:
        """Return the request's id."""
        return {"mistral-correlation-id": request_id}

    def quota_fields(self, account: Account) -> dict[str, str]:
        """Return limits and remainders per minute."""
        fields = {}
        for family, bucket in account.buckets.items():
            name = "req" if family == "requests" else family
            fields[f"x-ratelimit-limit-{name}-minute"] = str(bucket.limit)
            fields[f"x-ratelimit-remaining-{name}-minute"] = str(bucket.remaining)
        return fields

    def spent_fields(self, account: Account, refusal: Refusal) -> dict[str, str]:
        """Return the same with nothing left of the limit in question, and ``retry-after`` in seconds."""
        fields = self.quota_fields(account)
        if refusal.retry_after_s is None:
            return fields
        name = "req" if refusal.family == "requests" else refusal.family
        return fields | {
            f"x-ratelimit-remaining-{name}-minute": "0",
            "retry-after": str(math.ceil(refusal.retry_after_s)),
        }

    def error(self, refusal: Refusal, request_id: str) -> tuple[int, Json]:
        """Return status and ``{"object": "error", "message", "type", "param", "code"}``."""
        status, body = super().error(refusal, request_id)
        error = body["error"]
        kind, code = ("rate_limited", "1300") if status == 429 else (error["type"], error["code"])
        told = {"message": error["message"], "type": kind, "param": error["param"], "code": code}
        return status, {"object": "error", **told}


class MistralChat(Chat):
    """``POST /v1/chat/completions`` below ``/mistral``: three counts, in the last chunk, unasked."""

    path = "/mistral/v1/chat/completions"

    def read(self, body: Json) -> Asked:
        """Read a chat request; there are no stream options. Raises `Refusal`."""
        return super().read({**body, "stream_options": None})

    def answer(self, call: Call) -> Json:
        """Return a ``chat.completion`` with Mistral's fields alone."""
        return _of_mistral(super().answer(call))

    def events(self, call: Call) -> Iterator[Event]:
        """Return chunks, of which the one with the ``finish_reason`` has the usage."""
        usage = super().answer(call).get("usage", ...)
        for event in super().events(call):
            payload = event.data
            if isinstance(payload, str):
                yield event
                continue
            ends = payload["choices"][0]["finish_reason"] is not None and usage is not ...
            told = _of_mistral({**payload, "usage": usage} if ends else payload)
            yield event._replace(data=told, has_usage=event.has_usage or ends)


_OF_MISTRAL = ("id", "object", "created", "model", "choices", "usage")


def _of_mistral(payload: Json) -> Json:
    """*payload* without what only OpenAI sends."""
    told = {name: payload[name] for name in _OF_MISTRAL if name in payload}
    if told.get("usage"):
        told["usage"] = {name: count for name, count in told["usage"].items() if isinstance(count, int)}
    told["choices"] = [{name: part for name, part in each.items() if name != "logprobs"} for each in told["choices"]]
    return told
