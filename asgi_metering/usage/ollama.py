"""
The Ollama dialect: ``/api/chat``, ``/api/generate`` and ``/api/embed``, whose streams are JSON lines.

Knows Ollama's fields. Never knows how a payload was framed.

Source: the types of ollama 0.6 (``ChatResponse``, ``GenerateResponse``, ``EmbedResponse``): the last line has
``done: true`` and the counts at its top level. A prompt that was cached may have no count: not reported, not zero.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["CHAT"]


def _claims(payload: Json) -> bool:
    return "prompt_eval_count" in payload or ("model" in payload and isinstance(payload.get("done"), bool))


def _claims_usage(usage: Json) -> bool:
    return "eval_count" in usage or "prompt_eval_count" in usage


def _note_usage(notes: Notes, usage: Json) -> bool:
    asked = notes.count(usage.get("prompt_eval_count"))
    given = notes.count(usage.get("eval_count"), 0 if "embeddings" in usage else None)
    if asked is not None or given is not None:
        notes.usage = TokenUsage(input=asked, output=given)
    return asked is not None or given is not None


def _note(notes: Notes, payload: Json) -> None:
    notes.identify(payload)
    notes.finish(payload.get("done_reason"))
    notes.complete = notes.complete or payload.get("done") is True
    _note_usage(notes, payload)


def _text(payload: Json) -> Iterator[str]:
    for source in (as_object(payload.get("message")), payload):
        for name in ("thinking", "content", "response"):
            if isinstance(source.get(name), str) and source[name]:
                yield source[name]


CHAT: Final = Dialect(
    name="ollama",
    claims=_claims,
    claims_usage=_claims_usage,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks(["eval_count", "prompt_eval_count"], {"done": "true"}),
    texty=re.compile(rb'"(?:message|response)"'),
)
