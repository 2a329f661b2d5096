"""
Anthropic's wire formats: Messages, token counting, errors, rate-limit fields.

Knows field names and the order of events. Never decides what is answered.

Sources: anthropic 2.12.0 (types and stream decoder), the rate-limits and errors pages of its documentation.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from asgi_metering.testing.provider.answers import TokenCounts, word
from asgi_metering.testing.provider.quota import Account, anthropic_fields, rfc3339
from asgi_metering.testing.provider.wire import Asked, Call, Event, Json, Refusal, flag, flat_text, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Anthropic", "CountTokens", "Messages"]

_ORGANIZATION = "00000000-0000-4000-8000-000000000000"

_TYPE_OF_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class Anthropic:
    """Keys, limits, fields and errors of the Anthropic API."""

    def credential(self, headers: Mapping[str, str]) -> str | None:
        """Return the key of ``x-api-key``, or a bearer token."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        bearer = token.strip() if scheme.lower() == "bearer" else ""
        return headers.get("x-api-key", "").strip() or bearer or None

    def check_headers(self, headers: Mapping[str, str]) -> None:
        """Ask for the API's version. Raises `Refusal`."""
        if "anthropic-version" not in headers:
            raise Refusal("missing", param="anthropic-version")

    def amounts(self, counts: TokenCounts) -> dict[str, int]:
        """Return one request, the uncached input, the output: cache reads do not count against the limit."""
        return {"requests": 1, "input-tokens": counts.input - counts.cached, "output-tokens": counts.output}

    def fields(self, request_id: str) -> dict[str, str]:
        """Return the request's id and the account's organisation."""
        return {"request-id": request_id, "anthropic-organization-id": _ORGANIZATION}

    def quota_fields(self, account: Account) -> dict[str, str]:
        """Return limits, remainders and resets."""
        return anthropic_fields(account)

    def spent_fields(self, account: Account, refusal: Refusal) -> dict[str, str]:
        """Return the same with nothing left of the limit in question, and ``retry-after`` in seconds."""
        fields = anthropic_fields(account)
        if refusal.retry_after_s is None:
            return fields
        now = account.buckets[refusal.family].at
        return fields | {
            f"anthropic-ratelimit-{refusal.family}-remaining": "0",
            f"anthropic-ratelimit-{refusal.family}-reset": rfc3339(now + refusal.retry_after_s),
            "retry-after": str(math.ceil(refusal.retry_after_s)),
        }

    def error(self, refusal: Refusal, request_id: str) -> tuple[int, Json]:
        """Return status and ``{"type": "error", "error": {"type", "message"}, "request_id"}``."""
        status, message = _error(refusal)
        kind = _TYPE_OF_STATUS.get(status, "api_error" if status >= 500 else "invalid_request_error")
        return status, {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


def _error(refusal: Refusal) -> tuple[int, str]:
    """Return status and message; the type follows from the status."""
    detail = refusal.detail
    match refusal.kind:
        case "no_key":
            return 401, "x-api-key header is required"
        case "wrong_key":
            return 401, "invalid x-api-key"
        case "bad_json":
            return 400, f"The request body is not valid JSON. {detail}"
        case "missing":
            return 400, f"{refusal.param}: Field required"
        case "invalid":
            return 400, f"{refusal.param}: {detail}"
        case "unknown_path":
            return 404, f"Not found: {detail}"
        case "wrong_method":
            return 405, f"Method not allowed: {detail}"
        case "too_large":
            return 413, f"Request exceeds the maximum size. {detail}"
        case "unknown_model":
            return 404, f"model: {detail}"
        case "rate_limited" | "never_fits":
            what = refusal.family.replace("-", " ")
            return 429, f"This request would exceed your organization's rate limit of {what} per minute. {detail}"
        case "out_of_credit":
            message = "Your credit balance is too low to access the Anthropic API. "
            return 400, message + "Please go to Plans & Billing to upgrade or purchase credits."
        case "overloaded":
            return 529, "Overloaded"
        case "status":
            if refusal.status < 500:
                return refusal.status, f"The request was refused with {refusal.status}."
            return refusal.status, "Internal server error"


class Messages:
    """``POST /v1/messages``."""

    path = "/v1/messages"
    uses = True
    fails_in_body = False

    def read(self, body: Json) -> Asked:
        """Read a Messages request; ``max_tokens`` is required. Raises `Refusal`."""
        asked = _read(body)
        max_tokens = whole_number(body, "max_tokens")
        if max_tokens is None:
            raise Refusal("missing", param="max_tokens")
        return Asked(*asked, stream=flag(body, "stream"), max_tokens=max_tokens)

    def answer(self, call: Call) -> Json:
        """Return a ``message``."""
        content = [{"type": "text", "text": call.answer.text}]
        payload = _message(call, content, _stop_reason(call))
        return call.put_usage(payload, call.answer.reported, _usage)

    def events(self, call: Call) -> Iterator[Event]:
        """
        Return ``message_start`` to ``message_stop``.

        The input's usage comes first, with a seed of 1 for the output; the output's comes with ``message_delta``,
        cumulative. A reported zero is zero from the start.
        """
        start = _message(call, [], None)
        yield _event("message_start", message=call.put_usage(start, _seed(call.answer.reported), _usage))
        yield _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        yield _event("ping")
        for at in itertools.count() if call.behaviour.endless else range(call.answer.words):
            delta = {"type": "text_delta", "text": word(at)}
            yield _event("content_block_delta", index=0, delta=delta)._replace(is_delta=True)
        yield _event("content_block_stop", index=0)
        end: Json = {"type": "message_delta", "delta": {"stop_reason": _stop_reason(call), "stop_sequence": None}}
        call.put_usage(end, call.answer.reported, _delta_usage)
        yield Event("message_delta", end, has_usage=call.answer.reports)
        yield _event("message_stop")

    def broken(self, call: Call, sent: int) -> Event:
        """Return the ``error`` event of an overloaded server; the stream ends with it."""
        return _event("error", error={"type": "overloaded_error", "message": "Overloaded"})


class CountTokens(Messages):
    """``POST /v1/messages/count_tokens``: a count of the prompt, which is no usage and takes from no limit."""

    path = "/v1/messages/count_tokens"
    uses = False

    def read(self, body: Json) -> Asked:
        """Read a Messages request without a maximum. Raises `Refusal`."""
        return Asked(*_read(body), stream=False, max_tokens=None)

    def answer(self, call: Call) -> Json:
        """Return ``{"input_tokens": n}``."""
        return {"input_tokens": call.answer.counts.input}


def _read(body: Json) -> tuple[str, str]:
    """Return the model and the prompt's text. Raises `Refusal`."""
    for name in ("model", "messages"):
        if body.get(name) is None:
            raise Refusal("missing", param=name)
    model, messages = body["model"], body["messages"]
    if not isinstance(model, str):
        raise Refusal("invalid", "Input should be a valid string", param="model")
    if not isinstance(messages, list) or not messages or not all(isinstance(one, dict) for one in messages):
        raise Refusal("invalid", "Input should be a non-empty list of messages", param="messages")
    return model, flat_text([body.get("system"), messages])


def _stop_reason(call: Call) -> str:
    return "max_tokens" if call.answer.truncated else "end_turn"


def _message(call: Call, content: list[Json], stop_reason: str | None) -> Json:
    return {
        "id": f"msg_{call.number:06d}",
        "type": "message",
        "role": "assistant",
        "model": call.behaviour.model,
        "content": content,
        "stop_reason": stop_reason,
        "stop_sequence": None,
    }


def _event(name: str, **rest: Any) -> Event:
    return Event(name, {"type": name, **rest})


def _seed(reported: TokenCounts | None) -> TokenCounts | None:
    if reported is None:
        return None
    return TokenCounts(reported.input, min(reported.output, 1), reported.cached, reported.cache_write)


def _usage(counts: TokenCounts) -> Json:
    return {
        **_delta_usage(counts),
        "cache_creation": {"ephemeral_5m_input_tokens": counts.cache_write, "ephemeral_1h_input_tokens": 0},
        "service_tier": "standard",
    }


def _delta_usage(counts: TokenCounts) -> Json:
    # Unlike OpenAI's, this input leaves out what the cache was asked for.
    return {
        "input_tokens": counts.input - counts.cached - counts.cache_write,
        "cache_creation_input_tokens": counts.cache_write,
        "cache_read_input_tokens": counts.cached,
        "output_tokens": counts.output,
        "output_tokens_details": {"thinking_tokens": counts.reasoning},
    }
