"""
Bodies: one answer spelled as RFC 9457 problem details, or in the shape that a model SDK turns into its own errors.

Knows the three shapes, as whole responses and as events inside a stream that has begun, and the seam by which an
application changes them. Never knows how a decision was reached, sends nothing, charges nothing.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from asgi_metering.asgi.answers import Answer
from asgi_metering.asgi.fields import Fields, field_name, field_value, safe_name
from asgi_metering.decisions import MONEY, Reason
from asgi_metering.policies import ErrorShape

__all__ = ["Customise", "Rendered", "close_frame", "ndjson_error", "problem", "render", "sse_error"]

log = logging.getLogger("asgi_metering.asgi")

Customise: TypeAlias = Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]]
"""
The application's hook: from our problem details to the members it wants, and header fields to add.

Called with `problem`'s mapping, a copy of its own. Whatever it answers is put into the route's shape. It must not
wait for anything: it runs on the event loop.
"""

MAX_BODY = 65_536
"""Bytes of a body that a hook may make: an error is read whole by every client."""

MAX_FIELDS = 16
"""Header fields that a hook may add: servers and proxies allow about a hundred in all."""

MAX_FIELD_VALUE = 8192
"""Bytes of one such field: what common proxies take; a payment challenge in base64 has one or two thousand."""

MAX_SDK_WAIT_S = 120
"""Seconds that the OpenAI SDK waits at most; the Anthropic SDK would sleep through any number it is given."""

_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
"""Escapes to ASCII: no charset to guess, no lone surrogate to fail on, no line break to cut an event in two."""

_PROBLEM_TYPE = b"application/problem+json"
_JSON_TYPE = b"application/json"

_PROSE = frozenset(("type", "title", "status", "detail"))
"""Members that the SDK shapes say in their own words; all others travel with them as they are."""


class Rendered(NamedTuple):
    """A whole response. *headers* have lower-case names; ``content-length`` is that of *body*, also for HEAD."""

    status: int
    headers: Fields
    body: bytes


def render(answer: Answer, shape: ErrorShape = "problem", customise: Customise | None = None) -> Rendered:
    """
    Return the response that says *answer*.

    Args:
        answer: Status, words and fields.
        shape: ``"problem"`` (RFC 9457), ``"openai"`` or ``"anthropic"``.
        customise: Changes the members and adds fields. One that raises, or answers something else than a mapping that
            JSON can carry and a mapping of header fields, is logged, and the standard body goes out instead. A body
            without ``type`` is no longer problem details: its media type is ``application/json``. Added fields that
            are no header fields, that frame the message or that the answer already has are left out and logged;
            ``WWW-Authenticate`` may come more than once.

    The SDK shapes carry ``x-should-retry``, because an SDK's own rule knows only the status: it would not retry a 402
    that passes, and would retry a request that never fits, or sleep until tomorrow.

    Source: RFC 9457; openai 3.54 and anthropic 2.12 (``_base_client.py``); S0.21, S4.4, S4.5.
    """
    body, media_type, fields = _compose(answer, shape, customise)
    headers = [(b"content-type", media_type), (b"content-length", b"%d" % len(body)), *fields]
    return Rendered(answer.status, headers, body)


def sse_error(
    answer: Answer,
    shape: ErrorShape = "problem",
    customise: Customise | None = None,
    *,
    mid_event: bool = False,
) -> bytes:
    """
    Return the event that ends a stream of server-sent events which has begun with 200.

    OpenAI's has no event name, so that its SDK, which looks into the data, raises for chat completions and responses
    alike; the others are ``event: error``. No ``[DONE]`` follows: it would say that all is well. Fields that
    *customise* adds have nowhere to go any more.

    Args:
        answer: What to say.
        shape: As in `render`.
        customise: As in `render`.
        mid_event: The stream was cut inside an event, which is ended first. A client that reads every event stumbles
            over that half one, and says so instead: cut between events where that can be chosen.
    """
    body, _, _ = _compose(answer, shape, customise)
    name = b"" if shape == "openai" else b"event: error\n"
    # JSON as we write it has no line breaks, so that it is one line of data.
    return (b"\n\n" if mid_event else b"") + name + b"data: " + body + b"\n\n"


def ndjson_error(
    answer: Answer,
    shape: ErrorShape = "problem",
    customise: Customise | None = None,
    *,
    mid_line: bool = False,
) -> bytes:
    """Return the line that ends a stream of JSON lines; *mid_line* ends a line that was cut. Else as `sse_error`."""
    body, _, _ = _compose(answer, shape, customise)
    return (b"\n" if mid_line else b"") + body + b"\n"


def close_frame(answer: Answer) -> tuple[int, str]:
    """
    Return code and reason with which a WebSocket is closed: 4000 plus the status (4402, 4429), then code and title.

    Both are fixed words, far below the 123 bytes that a reason may have.

    Source: RFC 6455 sections 5.5 and 7.4.2 (4000 to 4999 are for private use).
    """
    return 4000 + answer.status, f"{answer.code}: {answer.title}"


def problem(answer: Answer) -> dict[str, Any]:
    """
    Return *answer* as the members of problem details; a member that is unknown or nobody's business is absent.

    ``type``, ``title``, ``status``, ``violated-policies`` (names, as in ``RateLimit-Policy``), ``detail``, ``code``
    (stable, for programs), ``unit``, ``line``, ``required``, ``available``, ``held``, ``limit``, ``used`` (of money:
    strings in whole units; of counts: ints), ``level`` (``caller`` or ``global``), ``transient`` (of credits),
    ``plan``, ``remedy`` (what to do next), ``resets_at`` (RFC 3339), ``retry_after`` (seconds).

    Source: RFC 9457 section 3; draft-ietf-httpapi-ratelimit-headers-10, "Problem Types"; S0.21, S0.42.
    """
    facts = answer.facts
    members = {
        "type": answer.type,
        "title": answer.title,
        "status": answer.status,
        "violated-policies": list(answer.violated) or None,
        "detail": answer.detail,
        "code": answer.code,
        "unit": facts.unit,
        "line": answer.line,
        "required": facts.required,
        "available": facts.available,
        "held": facts.held,
        "limit": facts.limit,
        "used": facts.used,
        "level": facts.level,
        "transient": answer.transient,
        "plan": answer.plan,
        "remedy": answer.remedy,
        "resets_at": facts.reset,
        "retry_after": facts.wait_s,
    }
    return {name: value for name, value in members.items() if value is not None}


def _compose(answer: Answer, shape: ErrorShape, customise: Customise | None) -> tuple[bytes, bytes, Fields]:
    """The body, its media type, and all other fields; of the standard answer wherever the hook's cannot be used."""
    fields = [*answer.headers] if shape == "problem" else [*answer.headers, *_should_retry(answer)]
    if customise is not None:
        try:
            members, added = _asked(customise, problem(answer))
            return *_spell(answer, members, shape), fields + _checked_fields(added, fields)
        # The hook is the application's: whatever it does, its caller gets a refusal and not a 500.
        except Exception:
            log.exception("The hook that customises refusals failed for %r. The standard body was sent.", answer.code)
    return *_standard(answer[:-1], shape), fields


# As often as it is said: see `answers`.
@lru_cache(maxsize=512)
def _standard(said: tuple[Any, ...], shape: ErrorShape) -> tuple[bytes, bytes]:
    """The body of an answer that nobody customises, by all of it but its header fields; and its media type."""
    answer = Answer(*said)
    return _spell(answer, problem(answer), shape)


def _asked(customise: Customise, members: dict[str, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    answered: object = customise(members)
    if inspect.iscoroutine(answered):
        answered.close()
        raise TypeError("The hook is a coroutine function. Make it a plain function.")
    if not isinstance(answered, tuple) or len(answered) != 2:
        raise TypeError(f"The hook answered a {type(answered).__name__}, not a tuple of (body, headers).")
    body, headers = answered
    if not isinstance(body, Mapping) or not isinstance(headers, Mapping):
        raise TypeError("The hook answered something else than two mappings.")
    copied = dict(body)
    if not all(isinstance(name, str) for name in copied):
        raise TypeError("The hook answered a body with a name that is no str.")
    return copied, dict(headers)


def _spell(answer: Answer, members: Mapping[str, Any], shape: ErrorShape) -> tuple[bytes, bytes]:
    media_type = _PROBLEM_TYPE if shape == "problem" and "type" in members else _JSON_TYPE
    body = _JSON.encode(_SHAPES[shape](answer, members)).encode("ascii")
    if len(body) > MAX_BODY:
        raise ValueError(f"The body has {len(body)} bytes; {MAX_BODY} are allowed.")
    return body, media_type


def _as_problem(_: Answer, members: Mapping[str, Any]) -> Mapping[str, Any]:
    return members


def _as_openai(answer: Answer, members: Mapping[str, Any]) -> Mapping[str, Any]:
    kind, code = _openai_type(answer)
    return {
        "error": {
            "message": _message(answer, members),
            "type": kind,
            "param": None,
            "code": code,
            "metering": _extensions(members),
        }
    }


def _as_anthropic(answer: Answer, members: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "error",
        "error": {
            "type": _anthropic_type(answer),
            "message": _message(answer, members),
            # Where the SDK looks for a stable code and what belongs to it.
            "details": {"error_code": answer.code, **_extensions(members)},
        },
    }


_SHAPES: Mapping[ErrorShape, Callable[[Answer, Mapping[str, Any]], Mapping[str, Any]]] = {
    "problem": _as_problem,
    "openai": _as_openai,
    "anthropic": _as_anthropic,
}


def _message(answer: Answer, members: Mapping[str, Any]) -> str:
    """Both sentences: a person who sees only the SDK's exception needs the mend as well."""
    words = [members[name] for name in ("detail", "remedy") if isinstance(members.get(name), str)]
    return " ".join(words) or answer.title


def _extensions(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if name not in _PROSE}


def _openai_type(answer: Answer) -> tuple[str, str]:
    """
    ``type`` and ``code`` as OpenAI's own clients know them.

    ``insufficient_quota`` means that no retry helps soon, so credits that are only held do not use it.
    """
    if answer.reason in (Reason.RATE_LIMIT, Reason.CONCURRENCY) and answer.status == 429:
        meter = answer.facts.unit if answer.reason is Reason.RATE_LIMIT else None
        return meter or "requests", "rate_limit_exceeded"
    if answer.reason is Reason.EXCEEDS_LIMIT:
        return answer.facts.unit or "requests", answer.code
    if answer.reason in MONEY:
        words = "credits_in_flight" if answer.transient else "insufficient_quota"
        return words, words
    if answer.status == 401:
        return "invalid_request_error", "invalid_api_key"
    if answer.status == 403:
        return "request_forbidden", answer.code
    return ("server_error" if answer.status >= 500 else "invalid_request_error"), answer.code


def _anthropic_type(answer: Answer) -> str:
    if answer.status == 503:
        return "overloaded_error" if answer.reason in (Reason.UPSTREAM, Reason.CONCURRENCY) else "api_error"
    return _ANTHROPIC_TYPES[answer.status]


_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    409: "conflict_error",
    413: "request_too_large",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


def _should_retry(answer: Answer) -> Fields:
    wait_s = answer.retry_after_s
    if wait_s is None and answer.status >= 500:
        return []  # Nobody knows; the SDK's own backoff is as good as any.
    again = wait_s is not None and wait_s <= MAX_SDK_WAIT_S
    return [(b"x-should-retry", b"true" if again else b"false")]


def _checked_fields(added: Mapping[Any, Any], ours: Fields) -> Fields:
    """What of the hook's fields may go out. A wrong one costs itself, not the body."""
    taken = {name for name, _ in ours if name != b"www-authenticate"}
    fields: Fields = []
    refused = []
    for name, value in added.items():
        wire_name = field_name(name) if isinstance(name, str) else None
        wire_value = field_value(value) if isinstance(value, str) and len(value) <= MAX_FIELD_VALUE else None
        if wire_name is None or wire_value is None or wire_name in taken or len(fields) == MAX_FIELDS:
            refused.append(safe_name(str(name)))
            continue
        taken.add(wire_name)
        fields.append((wire_name, wire_value))
    if refused:
        log.warning("The hook that customises refusals added fields that cannot be sent: %s.", ", ".join(refused))
    return fields
