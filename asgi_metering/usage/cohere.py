"""
The Cohere dialect: chat v2, streamed or not, and what v1, embeddings and rerankers say under ``meta``.

Knows Cohere's fields. Never knows how a payload was framed.

Source: the types of cohere 7.3.1 (``Usage``, ``ApiMeta``, the ``*StreamEvent`` types). ``tokens`` is what was
processed, which is counted; ``billed_units`` is what Cohere charges for, and stands in where nothing else is said.
Cached tokens are a part of the processed input, and may be more than the billed one. Counts may be JSON floats.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, objects
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["CHAT"]

_EVENTS: Final = frozenset(
    {
        "message-start",
        "content-start",
        "content-delta",
        "content-end",
        "tool-plan-delta",
        "tool-call-start",
        "tool-call-delta",
        "tool-call-end",
        "citation-start",
        "citation-end",
        "message-end",
    }
)


def _claims(payload: Json) -> bool:
    kind = payload.get("type")
    return (isinstance(kind, str) and kind in _EVENTS) or _claims_usage(as_object(payload.get("meta")))


def _claims_usage(usage: Json) -> bool:
    return isinstance(usage.get("billed_units"), dict) or isinstance(usage.get("tokens"), dict)


def _note_usage(notes: Notes, usage: Json, *, without_output: bool = False) -> bool:
    processed = as_object(usage.get("tokens"))
    counted = processed or as_object(usage.get("billed_units"))
    asked, given = notes.count(counted.get("input_tokens")), notes.count(counted.get("output_tokens"))
    if asked is None and given is None:
        return False
    given = 0 if given is None and without_output else given
    cached = notes.count(usage.get("cached_tokens"))
    notes.take(
        TokenUsage(input=asked, output=given, cached=notes.part(cached, asked) if processed else None),
    )
    return True


def _note(notes: Notes, payload: Json) -> None:
    delta = as_object(payload.get("delta"))
    notes.identify(payload)
    for source in (payload, delta):
        reason = source.get("finish_reason")
        notes.finish(reason)
        failed = isinstance(reason, str) and (reason.startswith("ERROR") or reason == "TIMEOUT")
        notes.error = notes.error or failed or bool(source.get("error"))
    notes.complete = notes.complete or payload.get("type") == "message-end"
    for usage in (payload.get("usage"), delta.get("usage"), payload.get("meta")):
        _note_usage(notes, as_object(usage), without_output="embeddings" in payload)


def _text(payload: Json) -> Iterator[str]:
    kind = payload.get("type")
    if kind == "tool-call-start":
        # Its arguments follow as deltas.
        return
    delta = as_object(as_object(payload.get("delta")).get("message"))
    for message in (delta, as_object(payload.get("message"))):
        # One part, or one call, in an event; lists of them in a body.
        calls = message.get("tool_calls")
        content = message.get("content")
        for part in (as_object(content), *objects(content)):
            yield from _strings(part.get("thinking"), part.get("text"))
        yield from _strings(message.get("tool_plan"))
        for call in (as_object(calls), *objects(calls)):
            yield from _strings(as_object(call.get("function")).get("arguments"))
    yield from _strings(payload.get("text"))


def _strings(*values: object) -> Iterator[str]:
    return (value for value in values if isinstance(value, str) and value)


CHAT: Final = Dialect(
    name="cohere",
    claims=_claims,
    claims_usage=_claims_usage,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks(["message-end", "billed_units", "tokens"]),
    texty=re.compile(rb'"(?:delta|message|text)"'),
    shows=("meta",),
)
