"""
The OpenAI dialects: chat completions (and everybody who copies them), and Responses.

Knows OpenAI's fields, and the variations of Azure, DeepSeek, Groq, LiteLLM, Mistral, Moonshot, OpenRouter, vLLM and
xAI on them. Never knows how a payload was framed.

Sources: the types of the openai SDK 3.54 (``CompletionUsage``, ``ResponseUsage``, the ``*_event`` types), groq 1.7,
mistralai 3.7, openrouter 1.3, xai-sdk 1.21; that xAI counts reasoning beside the output: its totals and bills.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Context, Decimal
from typing import Final

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, first, objects
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["CHAT", "RESPONSES", "counted", "reconcile"]

_SUMS: Final = Context(prec=60, traps=[])
"""Of untrusted numbers: a sum that is none is refused, and raises nothing."""

TICKS_PER_USD: Final = 10**10
"""xAI's ``cost_in_usd_ticks``; the scale reproduces a captured bill exactly."""

_CHAT_OBJECTS: Final = frozenset(
    {"chat.completion", "chat.completion.chunk", "chat.completion.done", "text_completion", "list"}
)
SEARCHES: Final = "web_search_requests"
"""What gateways and Anthropic call searches of the web."""

_TOTALS: Final = frozenset({"prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens"})
"""All that running totals are, which some servers send with each word."""

_PLAIN: Final = frozenset({"role", "content"})
_TERMINAL: Final = frozenset(
    {
        "response.completed",
        "response.incomplete",
        "response.failed",
        "response.cancelled",
        "response.done",
        "image_generation.completed",
        "image_edit.completed",
        "transcript.text.done",
        "speech.audio.done",
    }
)
"""Events that end a stream, or the only ones of theirs that carry usage. The earlier ones say ``usage: null``."""


def counted(notes: Notes, usage: Json, *, total_is_input: bool) -> TokenUsage | None:
    """
    Normalise a usage object of either shape; `None` when it counts nothing (null, {}, billed by duration).

    Inclusive everywhere: cache reads and writes lie within the input, reasoning within the output, except where the
    provider's total shows that reasoning was counted beside it (xAI).
    """
    asked = notes.count(usage.get("prompt_tokens"), usage.get("input_tokens"))
    given = notes.count(usage.get("completion_tokens"), usage.get("output_tokens"))
    total = notes.count(usage.get("total_tokens"))
    if usage.keys() <= _TOTALS and asked is not None and given is not None:
        return TokenUsage(asked, reconcile(notes, asked, given, None, total))
    into = as_object(
        first(usage.get("prompt_tokens_details"), usage.get("input_tokens_details"), usage.get("input_token_details"))
    )
    out = as_object(
        first(
            usage.get("completion_tokens_details"),
            usage.get("output_tokens_details"),
            usage.get("output_token_details"),
        )
    )
    # Azure's DeepSeek puts reasoning_tokens beside the totals, its details being null.
    reasoning = notes.count(out.get("reasoning_tokens"), usage.get("reasoning_tokens"))
    if asked is None and given is None and total is not None and total_is_input:
        asked = total
    if asked is None and given is None:
        return None
    if _counts_beside(usage) and reasoning is not None:
        # Its total is with or without them.
        total = None
        given = notes.plus(given, reasoning)
    given = reconcile(notes, asked, given, reasoning, total)
    if given is None and total is None and total_is_input:
        given = 0
    cached = notes.count(
        into.get("cached_tokens"),
        usage.get("cached_tokens"),
        usage.get("prompt_cache_hit_tokens"),
        usage.get("cache_read_input_tokens"),
    )
    written = notes.count(into.get("cache_write_tokens"), usage.get("cache_creation_input_tokens"))
    notes.inside(asked, cached, written)
    spoken = notes.count(out.get("audio_tokens"))
    audio = notes.plus(notes.count(into.get("audio_tokens")), spoken)
    return TokenUsage(
        input=asked,
        output=given,
        cached=notes.part(cached, asked),
        cache_write=notes.part(written, asked),
        reasoning=notes.part(reasoning, given),
        # Modalities are not always subsets of the totals: never lowered to them.
        audio=audio,
        audio_output=(spoken or 0) if audio else None,
        image_input=notes.count(into.get("image_tokens")),
        image_output=notes.count(out.get("image_tokens")),
    )


def _counts_beside(usage: Json) -> bool:
    """Whether reasoning lies beside the answer's tokens, and not within: Perplexity, by what only it counts."""
    return any(usage.get(name) is not None for name in ("citation_tokens", "num_search_queries"))


def reconcile(
    notes: Notes, asked: int | None, given: int | None, reasoning: int | None, total: int | None
) -> int | None:
    """Return the output, reasoning included: the provider's total tells whether it was."""
    if asked is None or total is None:
        return given
    if given is None:
        # Embeddings and rerankers have no output field; a chat without one stays unknown.
        notes.add_up(asked, None, total)
        return 0 if total == asked else None
    if total == asked + given:
        return given
    if reasoning and total == asked + given + reasoning:
        return given + reasoning
    notes.flag("total_below_parts" if total < asked + given else "total_mismatch")
    return given


def _cost(usage: Json) -> object:
    """
    What a gateway says that an answer costs; None where it does not.

    With a key of one's own (``is_byok``) OpenRouter's ``cost`` is its fee alone; what the key is charged is beside it.
    """
    cost = usage.get("cost")
    if isinstance(cost, dict):
        # Perplexity has an object here, whose fields nobody has confirmed.
        return None
    if usage.get("is_byok") is not True:
        return cost
    beside = as_object(usage.get("cost_details")).get("upstream_inference_cost")
    numbers = [value for value in (cost, beside) if isinstance(value, int | Decimal) and not isinstance(value, bool)]
    return _SUMS.add(*map(Decimal, numbers)) if len(numbers) == 2 else None


def _take(notes: Notes, usage: object, *, total_is_input: bool = False) -> bool:
    """Let a usage object that counts something replace the former one: cumulative, so the last wins, never a sum."""
    found = as_object(usage)
    if not found:
        return False
    if not found.keys() <= _TOTALS:
        _take_more(notes, found)
    counts = counted(notes, found, total_is_input=total_is_input)
    if counts is None:
        return False
    notes.take(counts)
    return True


def _take_more(notes: Notes, found: Json) -> None:
    """What a usage object tells beside its tokens."""
    notes.charge(_cost(found))
    notes.charge(found.get("cost_in_usd_ticks"), TICKS_PER_USD)
    notes.serve(found.get("service_tier"))
    made = as_object(first(found.get("server_tool_use"), found.get("server_tool_use_details"))).get(SEARCHES)
    notes.search(first(made, found.get("num_search_queries")))
    notes.cite(found.get("citation_tokens"))


# Chat completions, legacy completions, embeddings.


def _chat_claims(payload: Json) -> bool:
    return payload.get("object") in _CHAT_OBJECTS if isinstance(payload.get("object"), str) else False


def _chat_claims_usage(usage: Json) -> bool:
    return "prompt_tokens" in usage or "completion_tokens" in usage


def _note_chat(notes: Notes, payload: Json) -> None:
    notes.identify(payload)
    notes.serve(payload.get("service_tier"))
    choices = list(objects(payload.get("choices")))
    for choice in choices:
        notes.finish(choice.get("finish_reason"))
        notes.error = notes.error or bool(choice.get("error")) or choice.get("finish_reason") == "error"
    notes.complete = notes.complete or payload.get("object") == "chat.completion.done"
    # One of them, never two: Groq and Moonshot repeat the same counts at the top level when asked to.
    without_output = payload.get("object") == "list"
    found = _take(notes, payload.get("usage"), total_is_input=without_output)
    groq = as_object(payload.get("x_groq"))
    notes.error = notes.error or bool(groq.get("error"))
    found = found or _take(notes, groq.get("usage"))
    if not found:
        for choice in choices:
            _take(notes, choice.get("usage"))


def _note_chat_usage(notes: Notes, usage: Json) -> bool:
    return _take(notes, usage)


def _chat_text(payload: Json) -> Iterator[str]:
    for choice in objects(payload.get("choices")):
        for message in (choice.get("delta"), choice.get("message")):
            if isinstance(message, dict):
                yield from _message_text(message)
        yield from _strings(choice.get("text"))


def _message_text(message: Json) -> list[str]:
    content = message.get("content")
    if message.keys() <= _PLAIN and not isinstance(content, list):
        # What nearly every chunk is.
        return _strings(content)
    calls = [as_object(call.get("function")) for call in objects(message.get("tool_calls"))]
    return _strings(
        # One name for the same reasoning: some gateways send it under both.
        message.get("reasoning_content") or message.get("reasoning"),
        content,
        *(text for part in objects(content) for text in _part_text(part)),
        message.get("refusal"),
        *(call.get("arguments") for call in (*calls, as_object(message.get("function_call")))),
        as_object(message.get("audio")).get("transcript"),
    )


def _part_text(part: Json) -> list[str]:
    """Return the text of a part of a message; Mistral nests the parts of its thinking."""
    return _strings(part.get("text"), *(thought.get("text") for thought in objects(part.get("thinking"))))


def _strings(*values: object) -> list[str]:
    return [value for value in values if isinstance(value, str) and value]


CHAT: Final = Dialect(
    name="openai-chat",
    claims=_chat_claims,
    claims_usage=_chat_claims_usage,
    note=_note_chat,
    note_usage=_note_chat_usage,
    text=_chat_text,
    telling=Marks(["chat.completion.done"], {"usage": r"\{", "finish_reason": '"'}),
    texty=re.compile(rb'"(?:delta|message|text)"'),
    trailing_model=True,
)


# Responses, and the typed events of images, transcription and speech.


def _responses_claims(payload: Json) -> bool:
    kind = payload.get("type")
    return payload.get("object") == "response" or (
        isinstance(kind, str) and (kind.startswith("response.") or kind in _TERMINAL)
    )


def _responses_claims_usage(usage: Json) -> bool:
    exclusive = "cache_read_input_tokens" in usage or "cache_creation_input_tokens" in usage
    inclusive = any(key in usage for key in ("input_tokens_details", "input_token_details", "total_tokens"))
    return "input_tokens" in usage and inclusive and not exclusive


def _note_responses(notes: Notes, payload: Json) -> None:
    event = payload.get("type")
    response = as_object(payload.get("response")) or payload
    notes.identify(response)
    notes.error = notes.error or bool(response.get("error"))
    if isinstance(event, str) and event not in _TERMINAL:
        return
    notes.complete = notes.complete or event is not None
    notes.finish(first(as_object(response.get("incomplete_details")).get("reason"), response.get("status")))
    notes.serve(response.get("service_tier"))
    calls = [item for item in objects(response.get("output")) if item.get("type") == "web_search_call"]
    if calls:
        # Opening a page that was found is free.
        notes.search(sum(as_object(call.get("action")).get("type", "search") == "search" for call in calls))
    _take(notes, response.get("usage"))


def _note_responses_usage(notes: Notes, usage: Json) -> bool:
    # Only the terminal event has a usage that is not null, so the piece tells the end as well.
    found = _take(notes, usage)
    notes.complete = notes.complete or found
    return found


def _responses_text(payload: Json) -> Iterator[str]:
    kind = payload.get("type")
    if isinstance(kind, str):
        # Audio deltas are base64; their transcripts have an event of their own.
        if kind.endswith(".delta") and not kind.endswith("audio.delta"):
            yield from _strings(payload.get("delta"))
        return
    for item in objects(payload.get("output")):
        for part in (*objects(item.get("summary")), *objects(item.get("content"))):
            yield from _strings(part.get("text"), part.get("refusal"))
        yield from _strings(item.get("arguments"), item.get("input"), item.get("code"))
    yield from _strings(payload.get("text"))


RESPONSES: Final = Dialect(
    name="openai-responses",
    claims=_responses_claims,
    claims_usage=_responses_claims_usage,
    note=_note_responses,
    note_usage=_note_responses_usage,
    text=_responses_text,
    telling=Marks(_TERMINAL, {"usage": r"\{"}),
    texty=re.compile(rb'\.delta"|"output"|"text"'),
)
