"""
What the body of a refused call says of quotas.

Knows where providers put codes, sentences, details and copied headers. Never raises on what a body holds, and keeps
nothing of it but numbers and a verdict: a sentence may name an organisation (S1.39, S1.50).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from asgi_metering.quotas.google import read_details
from asgi_metering.quotas.reading import QuotaLimit
from asgi_metering.quotas.sentences import MAX_SENTENCE, read_sentence
from asgi_metering.quotas.verdicts import Verdict, verdict_of

__all__ = ["MAX_BODY", "Told", "read_body", "status_in_band"]

MAX_BODY = 64 * 1024
"""Bytes of a refusal that are read: known ones have some hundred, Google's with all details a few thousand."""

_MAX_WORD = 128
_WORD_KEYS = ("code", "type", "status", "error_code", "error_type", "reason", "limit_source", "__type")
_MAX_COPIED = 32


class Told(NamedTuple):
    """
    What a body told.

    Attributes:
        verdict: Why the call was refused, by status and body; None where neither says.
        limits: Of the provider, in the order told.
        retry_after_s: Seconds to wait; None is not told.
        headers: Quota headers that the body repeats (OpenRouter), to be read as such.
        model: The one model that limits and wait are of; None is all of them.
    """

    verdict: Verdict | None
    limits: tuple[QuotaLimit, ...] = ()
    retry_after_s: float | None = None
    headers: tuple[tuple[bytes, bytes], ...] = ()
    model: str | None = None


def read_body(status: int | None, body: bytes, now: float, error_type: str = "") -> Told:
    """
    Read the body of an answer that was refused; any bytes, of which `MAX_BODY` are looked at.

    Args:
        status: HTTP status.
        body: As it is without content codings. No JSON: then the status alone speaks.
        now: Epoch seconds at which it came.
        error_type: AWS's name of the error, from the header ``x-amzn-errortype``.

    Source: reference/provider-quota-headers.md, sections 2 and 3.
    """
    error, message, words = _opened(_parsed(body))
    if error_type:
        words.append(error_type.partition(":")[0])
    verdict = verdict_of(status, words, message)
    if verdict is None:
        # A bad request may speak of limits, too: those of a model's context, say.
        return Told(None)
    limits, wait, model = read_details(error, now)
    sentence = read_sentence(message, now)
    return Told(
        verdict,
        limits or sentence.limits,
        sentence.retry_after_s if wait is None else wait,
        _copied(error.get("metadata")),
        # Who has to pay first has to for every model.
        None if verdict is Verdict.OUT_OF_CREDIT else model,
    )


_IN_BAND = {
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "resource_exhausted": 429,
    "throttlingexception": 429,
    "billing_error": 402,
    "overloaded_error": 529,
    "server_is_overloaded": 503,
    "slow_down": 503,
    "unavailable": 503,
    "serviceunavailableexception": 503,
}
"""Words of errors inside of a stream, and the statuses that the same errors come with before one has begun."""


def status_in_band(body: bytes) -> int | None:
    """
    The status that an error would have had which came behind a success; None where it says nothing of quotas.

    Args:
        body: The error as JSON.

    Source: OpenRouter's mid-stream errors carry the number; Anthropic, OpenAI and Google the words of their refusals.
    """
    error, _, words = _opened(_parsed(body))
    code = error.get("code")
    if type(code) is int and verdict_of(code) is not None:
        return code
    return next((_IN_BAND[word] for word in map(str.lower, words) if word in _IN_BAND), None)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body[:MAX_BODY])
    except (ValueError, RecursionError):
        return None


def _opened(payload: Any) -> tuple[Mapping[str, Any], str, list[str]]:
    """The error object, its sentence, and its codes; a stream that is no SSE is an array of one (Gemini)."""
    if isinstance(payload, list):
        payload = payload[0] if payload else None
    if isinstance(payload, str):
        return {}, payload[:MAX_SENTENCE], []
    if not isinstance(payload, Mapping):
        return {}, "", []
    inner = payload.get("error")
    error = inner if isinstance(inner, Mapping) else payload
    places = [payload, error, error.get("metadata"), error.get("details")]
    words = [
        place[key][:_MAX_WORD]
        for place in places
        if isinstance(place, Mapping)
        for key in _WORD_KEYS
        if isinstance(place.get(key), str)
    ]
    message = inner if isinstance(inner, str) else error.get("message")
    return error, message[:MAX_SENTENCE] if isinstance(message, str) else "", words


def _copied(metadata: object) -> tuple[tuple[bytes, bytes], ...]:
    headers = metadata.get("headers") if isinstance(metadata, Mapping) else None
    if not isinstance(headers, Mapping):
        return ()
    return tuple(
        (str(name).encode("utf-8", "replace"), str(value).encode("utf-8", "replace"))
        for name, value in list(headers.items())[:_MAX_COPIED]
    )
