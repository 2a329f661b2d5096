"""
Gemini's wire formats: ``generateContent``, ``streamGenerateContent`` as server-sent events, errors.

Knows field names and where the model's name stands. Never decides what is answered.

Sources: google-genai 3.4 (types, and how it asks), captured error bodies. There are no quota fields: only a 429's body
says when to come back.
"""

from __future__ import annotations

import itertools
import re
from typing import TYPE_CHECKING

from asgi_metering.testing.provider.answers import TokenCounts, word
from asgi_metering.testing.provider.wire import Asked, Call, Event, Json, Refusal, flat_text, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from asgi_metering.testing.provider.quota import Account

__all__ = ["Gemini", "GenerateContent"]

_PATH = re.compile(r"/v1(?:beta)?/models/(?P<model>.+):(?P<verb>generateContent|streamGenerateContent)")

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}

_STATUS_OF: Mapping[str, int] = {
    "no_key": 401,
    "wrong_key": 401,
    "unknown_path": 404,
    "unknown_model": 404,
    "wrong_method": 405,
    "too_large": 413,
    "rate_limited": 429,
    "never_fits": 429,
    "out_of_credit": 429,
    "overloaded": 503,
}
"""What is not in here is a bad request."""


class Gemini:
    """Keys, limits and errors of the Gemini API."""

    def credential(self, headers: Mapping[str, str]) -> str | None:
        """Return the key of ``x-goog-api-key``."""
        return headers.get("x-goog-api-key", "").strip() or None

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Ask for nothing else."""

    def amounts(self, counts: TokenCounts) -> dict[str, int]:
        """Return one request, and all tokens."""
        return {"requests": 1, "tokens": counts.input + counts.output}

    def fields(self, request_id: str) -> dict[str, str]:
        """Return what says nothing of the account."""
        return {"server-timing": "gfet4t7; dur=1", "x-bundled-request-id": request_id}

    def quota_fields(self, account: Account) -> dict[str, str]:
        """Return nothing: no answer tells what is left."""
        return {}

    def spent_fields(self, account: Account, refusal: Refusal) -> dict[str, str]:
        """Return nothing: the body says when to come back."""
        return {}

    def error(self, refusal: Refusal, request_id: str) -> tuple[int, Json]:
        """Return status and ``{"error": {"code", "message", "status", "details"}}``."""
        status = refusal.status or _STATUS_OF.get(refusal.kind, 400)
        error: Json = {"code": status, "message": str(refusal), "status": _STATUS.get(status, "UNKNOWN")}
        if refusal.retry_after_s is not None:
            delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": f"{refusal.retry_after_s:g}s"}
            error["details"] = [delay]
        return status, {"error": error}


class GenerateContent:
    """
    ``POST /v1/models/MODEL:generateContent`` and ``:streamGenerateContent?alt=sse``, below ``/v1beta`` as well.

    Args:
        path: As asked for.
        model: As it stands in there, with its behaviours.
        stream: Whether events are wanted.
    """

    uses = True
    fails_in_body = False

    def __init__(self, path: str, model: str, stream: bool) -> None:
        self.path = path
        self._model = model
        self._stream = stream

    @classmethod
    def at(cls, path: str) -> GenerateContent | None:
        """Return the endpoint at *path*, `None` where there is none."""
        found = _PATH.fullmatch(path)
        return None if found is None else cls(path, found["model"], found["verb"] == "streamGenerateContent")

    def read(self, body: Json) -> Asked:
        """Read a request. Raises `Refusal`."""
        contents = body.get("contents")
        if not isinstance(contents, list) or not contents:
            raise Refusal("invalid", "Expected a non-empty array.", param="contents")
        config = body.get("generationConfig") or {}
        prompt = flat_text([_texts(body.get("systemInstruction")), *map(_texts, contents)])
        return Asked(self._model, prompt, self._stream, whole_number(config, "maxOutputTokens"))

    def answer(self, call: Call) -> Json:
        """Return the whole answer."""
        return _payload(call, call.answer.text, call.answer.reported, _finish(call))

    def events(self, call: Call) -> Iterator[Event]:
        """Return chunks, each with the usage so far; the last one says why it ended."""
        counts, words = call.answer.counts, call.answer.words
        for at in itertools.count() if call.behaviour.endless else range(words):
            last = not call.behaviour.endless and at == words - 1
            so_far = TokenCounts(counts.input, counts.reasoning + at + 1, counts.cached, 0, counts.reasoning)
            # What is not counted is what the behaviour asks for, all along.
            usage = so_far if call.behaviour.usage == "counted" and not last else call.answer.reported
            payload = _payload(call, word(at), usage, _finish(call) if last else None)
            yield Event(None, payload, is_delta=True, has_usage=last and call.answer.reports)
        if not words and not call.behaviour.endless:
            yield Event(None, self.answer(call), has_usage=call.answer.reports)

    def broken(self, call: Call, sent: int) -> Event:
        """Return the error object as an event."""
        return Event(None, {"error": {"code": 500, "message": "An internal error has occurred.", "status": "INTERNAL"}})


def _texts(content: object) -> object:
    """The parts of one content, for `flat_text`."""
    return content.get("parts") if isinstance(content, dict) else content


def _finish(call: Call) -> str:
    return "MAX_TOKENS" if call.answer.truncated else "STOP"


def _payload(call: Call, text: str, usage: TokenCounts | None, finish: str | None) -> Json:
    candidate: Json = {"content": {"parts": [{"text": text}], "role": "model"}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    payload: Json = {
        "candidates": [candidate],
        "modelVersion": call.behaviour.model,
        "responseId": f"gen-{call.number:06d}",
    }
    if call.answer.reports:
        payload["usageMetadata"] = None if usage is None else _usage(usage)
    return payload


def _usage(counts: TokenCounts) -> Json:
    """Gemini counts what was thought beside the answer, and what was cached within the prompt."""
    usage = {
        "promptTokenCount": counts.input,
        "candidatesTokenCount": counts.output - counts.reasoning,
        "totalTokenCount": counts.input + counts.output,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": counts.input}],
    }
    parts = {"cachedContentTokenCount": counts.cached, "thoughtsTokenCount": counts.reasoning}
    return usage | {name: count for name, count in parts.items() if count}
