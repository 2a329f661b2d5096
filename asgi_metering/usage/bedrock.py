"""
The Bedrock dialect: Converse and ConverseStream, and the metrics that InvokeModel puts into its last chunk.

Knows the fields of Amazon Bedrock. Never knows how a payload was framed: an event of a stream comes as an object with
one field, named by its type.

Source: botocore 1.44.5 (``ConverseResponse``, ``ConverseStreamOutput``, ``TokenUsage``): cache reads and writes are
counted beside ``inputTokens``. Whether ``totalTokens`` includes them is not said, so it proves nothing but a sum that
is too small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, compact, objects
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["CONVERSE"]

_METRICS: Final = "amazon-bedrock-invocationMetrics"
_EVENTS: Final = frozenset(
    {
        "messageStart",
        "contentBlockStart",
        "contentBlockDelta",
        "contentBlockStop",
        "messageStop",
    }
)
_FAILURES: Final = (
    "internalServerException",
    "modelStreamErrorException",
    "modelTimeoutException",
    "serviceUnavailableException",
    "throttlingException",
    "validationException",
)
_FIELDS: Final = ("inputTokens", "cacheReadInputTokens", "cacheWriteInputTokens", "outputTokens")
_OTHERS: Final = ("inputTokenDetails", "outputTokenDetails", "cachedInputTokens", "reasoningTokens")
"""What the AI SDK has beside the same names, whose input includes what was cached."""


def _claims(payload: Json) -> bool:
    if _METRICS in payload:
        return True
    if len(payload) == 1:
        ((name, value),) = payload.items()
        return isinstance(value, dict) and (
            name in _EVENTS
            or name in _FAILURES
            or (name == "metadata" and _claims_usage(as_object(value.get("usage"))))
        )
    return "stopReason" in payload and isinstance(payload.get("output"), dict)


def _claims_usage(usage: Json) -> bool:
    return ("inputTokens" in usage or "outputTokens" in usage) and not any(name in usage for name in _OTHERS)


def _note_usage(notes: Notes, usage: Json) -> bool:
    plain, read, written, given = (notes.count(usage.get(name)) for name in _FIELDS)
    total = notes.count(usage.get("totalTokens"))
    long = [entry.get("inputTokens") for entry in objects(usage.get("cacheDetails")) if entry.get("ttl") == "1h"]
    return _take(notes, plain, read, written, given, total, notes.plus(*map(notes.count, long)))


def _note_metrics(notes: Notes, metrics: Json) -> None:
    names = ("inputTokenCount", "cacheReadInputTokenCount", "cacheWriteInputTokenCount", "outputTokenCount")
    plain, read, written, given = (notes.count(metrics.get(name)) for name in names)
    _take(notes, plain, read, written, given, None)


def _take(
    notes: Notes,
    plain: int | None,
    read: int | None,
    written: int | None,
    given: int | None,
    total: int | None,
    long: int | None = None,
) -> bool:
    if plain is None and given is None:
        return False
    notes.add_up(plain, given, total)
    asked = None if plain is None else notes.plus(plain, read, written)
    notes.take(TokenUsage(input=asked, output=given, cached=read, cache_write=written, cache_write_1h=long))
    return True


def _note(notes: Notes, payload: Json) -> None:
    notes.error = notes.error or any(name in payload for name in _FAILURES)
    stop = as_object(payload.get("messageStop"))
    notes.finish(stop.get("stopReason"))
    notes.finish(payload.get("stopReason"))
    metadata = as_object(payload.get("metadata"))
    if metadata or _METRICS in payload:
        notes.complete = True
    _note_usage(notes, as_object(metadata.get("usage") or payload.get("usage")))
    if notes.usage is None:
        # The model's own counts are the better ones, where it has any.
        _note_metrics(notes, as_object(payload.get(_METRICS)))


def _text(payload: Json) -> Iterator[str]:
    delta = as_object(as_object(payload.get("contentBlockDelta")).get("delta"))
    message = as_object(as_object(payload.get("output")).get("message"))
    for block in (delta, *objects(message.get("content"))):
        reasoning = as_object(block.get("reasoningContent"))
        call = as_object(block.get("toolUse")).get("input")
        for text in (
            block.get("text"),
            reasoning.get("text"),
            as_object(reasoning.get("reasoningText")).get("text"),
            compact(call) if isinstance(call, dict) else call,
        ):
            if isinstance(text, str) and text:
                yield text


CONVERSE: Final = Dialect(
    name="bedrock",
    claims=_claims,
    claims_usage=_claims_usage,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks([_METRICS, "messageStop", "stopReason", *_FAILURES], {"usage": r"\{"}),
    texty=re.compile(rb'"(?:contentBlockDelta|output)"'),
    shows=(_METRICS, "metadata", "stopReason", *sorted(_EVENTS), *_FAILURES),
)
