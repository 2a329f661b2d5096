"""
Estimates: how many tokens a request may use, read from the request itself.

Understands the bodies of the usual model APIs as mappings or as objects with such attributes. Never looks at a
response, and never decides what an estimate is good for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from asgi_metering.tokens import count_tokens_async
from asgi_metering.usage import TokenUsage

__all__ = ["DEFAULT_OUTPUT_TOKENS", "estimate_arguments", "estimate_body"]

DEFAULT_OUTPUT_TOKENS = 4_096
"""Output that is held for when a request names no bound: the usual cap of providers' own defaults."""

MAX_OUTPUT_TOKENS = 10_000_000
"""A bound above this is somebody's mistake; it is cut, so that the hold stays a number that can be refused."""

PER_MESSAGE_TOKENS = 3
"""What chat formats add around each message."""

_OUTPUT_BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_PROMPTS = ("messages", "input", "prompt", "system", "instructions")
_TOKENISED = ("input", "prompt")
_BODY_MARKS = frozenset((*_OUTPUT_BOUNDS, *_PROMPTS, "model"))


async def estimate_arguments(arguments: Mapping[str, Any]) -> TokenUsage:
    """
    Estimate from an endpoint's bound arguments: the first that looks like a request to a model.

    A Starlette ``Request`` is read as JSON; its body stays available to the endpoint. Without any such argument the
    estimate is `DEFAULT_OUTPUT_TOKENS` of output.
    """
    for value in arguments.values():
        body = await _as_body(value)
        if body is not None:
            return await estimate_body(body)
    return TokenUsage(input=0, output=DEFAULT_OUTPUT_TOKENS)


async def estimate_body(body: Mapping[str, Any], default_output: int = DEFAULT_OUTPUT_TOKENS) -> TokenUsage:
    """
    Estimate one request body.

    Args:
        body: ``messages``, ``input`` or ``prompt``, with ``system``, ``instructions`` and ``tools``; the output's bound
            from ``max_completion_tokens``, ``max_output_tokens`` or ``max_tokens``, times ``n``.
        default_output: Output tokens where the body names no bound.

    Input is counted by the tokenizer, or estimated where it is missing; long texts off the event loop. Where ``input``
    or ``prompt`` gives token ids instead of text, as embeddings take them, each id is a token.
    """
    texts = [text for key in _PROMPTS for text in _texts(body.get(key))]
    tools = body.get("tools")
    if tools:
        texts.append(json.dumps(_plain(tools), default=str))
    counted = await count_tokens_async("\n".join(texts))
    messages = body.get("messages")
    around = (
        PER_MESSAGE_TOKENS * len(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else 0
    )
    bound = next((bound for key in _OUTPUT_BOUNDS if (bound := _whole(body.get(key))) is not None), default_output)
    answers = _whole(body.get("n")) or 1
    ids = sum(_ids(body.get(key)) for key in _TOKENISED)
    return TokenUsage(input=counted.tokens + around + ids, output=min(bound * answers, MAX_OUTPUT_TOKENS))


def _ids(value: Any) -> int:
    """How many token ids *value* holds: a list of them, or one list for each text."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        return 0
    return sum(1 if type(part) is int else _flat_ids(part) for part in value)


def _flat_ids(value: Any) -> int:
    return sum(type(part) is int for part in value) if isinstance(value, list | tuple) else 0


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


async def _as_body(value: Any) -> Mapping[str, Any] | None:
    # Requests first: Starlette's are mappings too, of their scope.
    if hasattr(value, "scope") and hasattr(value, "json"):
        return await _request_body(value)
    if hasattr(value, "model_dump"):  # pydantic, without importing it
        value = value.model_dump()
    return value if isinstance(value, Mapping) and _BODY_MARKS & value.keys() else None


async def _request_body(request: Any) -> Mapping[str, Any] | None:
    if not _may_be_json(request.headers.get("content-type", "")):
        # An upload may be large, and the endpoint may want it piece by piece.
        return None
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        # What is not JSON is for the endpoint to complain about.
        return None
    return body if isinstance(body, Mapping) and _BODY_MARKS & body.keys() else None


def _may_be_json(content_type: str) -> bool:
    """Whether a body may be a request to a model; many clients name no type, or ``text/plain``."""
    media = content_type.partition(";")[0].strip().lower()
    return media in ("", "text/plain", "application/x-www-form-urlencoded") or "json" in media


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


MAX_DEPTH = 8
"""Nesting of message parts that is looked into: the APIs use three."""


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Every text of a prompt: strings, and the texts inside lists of messages and of content parts."""
    if isinstance(value, str):
        yield value
    elif depth < MAX_DEPTH:
        value = _plain(value)
        if isinstance(value, Mapping):
            for key in ("role", "name", "content", "text", "input", "output", "arguments"):
                yield from _texts(value.get(key), depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            for part in value:
                yield from _texts(part, depth + 1)
