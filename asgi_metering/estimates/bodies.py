"""
Bodies: how many tokens a request may use, read from the request itself.

Understands the bodies of the usual model APIs as mappings or as objects with such attributes. Never looks at a
response, and never decides what an estimate is good for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from asgi_metering.estimates.images import image_tokens
from asgi_metering.estimates.sounds import sound_tokens
from asgi_metering.tokens import count_tokens_async
from asgi_metering.usage import TokenUsage

__all__ = [
    "DEFAULT_OUTPUT_TOKENS",
    "asked_model",
    "asked_searches",
    "asked_service",
    "body_of",
    "estimate_arguments",
    "estimate_body",
]

DEFAULT_OUTPUT_TOKENS = 4_096
"""Output that is held for when a request names no bound: the usual cap of providers' own defaults."""

MAX_OUTPUT_TOKENS = 10_000_000
"""A bound above this is somebody's mistake; it is cut, so that the hold stays a number that can be refused."""

PER_MESSAGE_TOKENS = 3
"""What chat formats add around each message."""

OUTPUT_BOUNDS = ("max_completion_tokens", "max_output_tokens", "max_tokens")
_PROMPTS = (
    "messages",
    "input",
    "prompt",
    "system",
    "instructions",
    "contents",
    "systemInstruction",
    "system_instruction",
)
_SCHEMAS = ("tools", "functions", "response_format", "text", "output_config")
CONFIGS = ("generationConfig", "generation_config", "config")
CONFIG_BOUNDS = ("maxOutputTokens", "max_output_tokens")
_MODALITIES = ("modalities", "output_modalities", "responseModalities", "response_modalities")
ANSWERS = ("n", "candidateCount", "candidate_count")
_TOKENISED = ("input", "prompt")
_BODY_MARKS = frozenset((*OUTPUT_BOUNDS, *_PROMPTS, "model"))


async def estimate_arguments(arguments: Mapping[str, Any], *, at_most: bool = False) -> TokenUsage:
    """
    Estimate from an endpoint's bound arguments: the first that looks like a request to a model.

    A Starlette ``Request`` is read as JSON; its body stays available to the endpoint. Without any such argument the
    estimate is `DEFAULT_OUTPUT_TOKENS` of output. *at_most* is as of `estimate_body`.
    """
    body = await body_of(arguments)
    if body is None:
        return TokenUsage(input=0, output=DEFAULT_OUTPUT_TOKENS)
    return await estimate_body(body, at_most=at_most)


async def asked_model(arguments: Mapping[str, Any]) -> str | None:
    """The model that the first of *arguments* names that looks like a request to one; None where none does."""
    return model_of(await body_of(arguments))


def model_of(body: Mapping[str, Any] | None) -> str | None:
    """The model that a request names."""
    model = None if body is None else body.get("model")
    return model if isinstance(model, str) else None


async def estimate_body(
    body: Mapping[str, Any], default_output: int = DEFAULT_OUTPUT_TOKENS, *, at_most: bool = False
) -> TokenUsage:
    """
    Estimate one request body.

    Args:
        body: ``messages``, ``input``, ``prompt`` or ``contents``, with ``system``, ``instructions``, ``tools`` and
            schemas; the output's bound from ``max_completion_tokens``, ``max_output_tokens``, ``max_tokens`` or
            Gemini's ``generationConfig``, the largest where there are several, times ``n``. Images count by their
            provider's formula, sounds by how long they play at most.
        default_output: Output tokens where the body names no bound.
        at_most: Count all of the input as written to a cache too (for an hour, where the body asks for that), and all
            of the output as spoken, where the body asks for that.

    Input is counted by the tokenizer, or estimated where it is missing; long texts off the event loop. Where ``input``
    or ``prompt`` gives token ids instead of text, as embeddings take them, each id is a token.
    """
    texts = [text for key in _PROMPTS for text in _texts(body.get(key))]
    texts += [_written(schema) for key in _SCHEMAS if (schema := _plain(body.get(key))) and not isinstance(schema, str)]
    counted = await count_tokens_async("\n".join(texts))
    around = PER_MESSAGE_TOKENS * sum(map(_parts, (body.get("messages"), body.get("contents"))))
    model = body.get("model")
    named = model if isinstance(model, str) else ""
    images = sum(image_tokens(body.get(key), named) for key in ("messages", "input", "contents", "system"))
    ids = sum(_ids(body.get(key)) for key in _TOKENISED)
    heard = sum(sound_tokens(body.get(key)) for key in ("messages", "input", "contents"))
    given = counted.tokens + around + images + heard + ids
    bound, answers = _bound(body)
    output = (default_output if bound is None else bound) * answers
    output = min(output, MAX_OUTPUT_TOKENS)
    marks = set(_cache_marks(body)) if at_most else set()
    written, long = given if marks else None, given if HOUR in marks else None
    spoken = output if at_most and _asks_for_audio(body) else None
    if heard:
        spoken = spoken or 0
    audio = None if spoken is None else heard + spoken
    return TokenUsage(given, output, None, written, None, audio, spoken, long)


SEARCHES = 10
"""Searches of the web that are held for where a request allows them and names no bound."""

MAX_SEARCHES = 1_000
"""A bound above this is somebody's mistake."""


def asked_service(body: Mapping[str, Any]) -> str | None:
    """The service tier that a request asks for; Anthropic's fast mode is one."""
    service = "fast" if body.get("speed") == "fast" else body.get("service_tier", body.get("serviceTier"))
    return service.lower() if isinstance(service, str) else None


def asked_searches(body: Mapping[str, Any]) -> int:
    """How many searches of the web a request allows its provider: as many as it says, else `SEARCHES` for each tool."""
    tools = body.get("tools")
    count = SEARCHES if body.get("web_search_options") is not None else 0
    for tool in map(_plain, tools if isinstance(tools, list | tuple) else ()):
        if not isinstance(tool, Mapping):
            continue
        if _word(tool.get("type")).startswith("web_search"):
            most = whole(tool.get("max_uses"))
            count += SEARCHES if most is None else most
        elif any(_plain(tool.get(name)) is not None for name in ("google_search", "googleSearch")):
            count += SEARCHES
    return min(count, MAX_SEARCHES)


def _word(value: Any) -> str:
    """A value that is a word; whatever else stands there, however deep it is nested, is none."""
    return value if isinstance(value, str) else ""


def _asks_for_audio(body: Mapping[str, Any]) -> bool:
    """Whether the answer may be spoken: OpenAI's ``modalities``, Gemini's ``responseModalities``."""
    places = [body, *(config for key in CONFIGS if isinstance(config := _plain(body.get(key)), Mapping))]
    wanted = [place.get(key) for place in places for key in _MODALITIES]
    return any(_word(kind).lower() == "audio" for kinds in wanted if isinstance(kinds, list | tuple) for kind in kinds)


def _written(schema: Any) -> str:
    try:
        return json.dumps(schema, default=str)
    except (TypeError, ValueError, RecursionError):
        return ""


def _parts(messages: Any) -> int:
    return len(messages) if isinstance(messages, Sequence) and not isinstance(messages, str) else 0


def _bound(body: Mapping[str, Any]) -> tuple[int | None, int]:
    """(the most output tokens of one answer, None if the request does not say; how many answers)."""
    configs = [config for key in CONFIGS if isinstance(config := _plain(body.get(key)), Mapping)]
    named = [body.get(key) for key in OUTPUT_BOUNDS]
    named += [config.get(key) for config in configs for key in CONFIG_BOUNDS]
    # Of several, nobody knows which one the provider heeds.
    bound = max((bound for value in named if (bound := whole(value)) is not None), default=None)
    # What ranks candidates makes them all.
    counts = [body.get("best_of"), *(part.get(key) for part in (body, *configs) for key in ANSWERS)]
    return bound, max(1, *(whole(value) or 1 for value in counts))


HOUR = "1h"
"""How Anthropic's ``ttl`` of a cache is written that costs more than the usual one."""


def _cache_marks(value: Any, depth: int = 0) -> Iterator[str]:
    """How long a request asks its provider to keep in a cache what it brings, which may cost more (Anthropic)."""
    value = _plain(value)
    if isinstance(value, Mapping):
        mark = _plain(value.get("cache_control"))
        if mark:
            yield _word(mark.get("ttl")) if isinstance(mark, Mapping) else ""
        inner: list[Any] = [value.get(key) for key in ("system", "tools", "messages", "content")]
    else:
        inner = list(value) if isinstance(value, list | tuple) else []
    if depth < MAX_DEPTH:
        for part in inner:
            yield from _cache_marks(part, depth + 1)


def _ids(value: Any) -> int:
    """How many token ids *value* holds: a list of them, or one list for each text."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
        return 0
    return sum(1 if type(part) is int else _flat_ids(part) for part in value)


def _flat_ids(value: Any) -> int:
    return sum(type(part) is int for part in value) if isinstance(value, list | tuple) else 0


MAX_WHOLE = 10**12
"""Larger numbers of a request are read as this one, which nobody can pay for either."""

MAX_DIGITS = 30
"""Characters of a number in a text that are looked at."""


def whole(value: Any) -> int | None:
    """
    A whole number of a request, from 0 up, as lenient providers read it; None for anything else.

    Also ``5.0`` and ``"5"``: what validates requests by pydantic takes these for 5, as vLLM does.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = Decimal(value.strip()[:MAX_DIGITS] if isinstance(value, str) else value)
    except ArithmeticError:
        return None
    if not number.is_finite() or number < 0:
        return None
    return MAX_WHOLE if number > MAX_WHOLE else int(number) if number == int(number) else None


async def body_of(arguments: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The first of *arguments* that looks like a request to a model; None where none does."""
    for value in arguments.values():
        body = await _as_body(value)
        if body is not None:
            return body
    return None


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


_SAID = (
    "role",
    "name",
    "content",
    "parts",
    "text",
    "thinking",
    "refusal",
    "input",
    "output",
    "arguments",
    "tool_calls",
    "function",
)
_CALLED = ("input", "functionCall", "functionResponse", "function_call", "function_response")

MAX_DEPTH = 8
"""Nesting of message parts that is looked into: the APIs use three."""


def _texts(value: Any, depth: int = 0) -> Iterator[str]:
    """Every text of a prompt: strings, and the texts inside lists of messages and of content parts."""
    if isinstance(value, str):
        yield value
    elif depth < MAX_DEPTH:
        value = _plain(value)
        if isinstance(value, Mapping):
            # What a tool was called with, and what it answered, is part of the prompt as it is written.
            called = [key for key in _CALLED if depth and isinstance(value.get(key), Mapping)]
            yield from (_written(value[key]) for key in called)
            for key in _SAID:
                if key not in called:
                    yield from _texts(value.get(key), depth + 1)
        elif isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
            for part in value:
                yield from _texts(part, depth + 1)
