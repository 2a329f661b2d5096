"""
The Gemini dialect: ``generateContent`` and ``streamGenerateContent``, as SSE or as one JSON array.

Knows Gemini's fields. Never knows how a payload was framed.

Sources: the types of google-genai 3.4 (``GenerateContentResponseUsageMetadata``): thoughts are counted beside the
candidates, tool-use prompts beside the prompt, cached content within it. An early ``usageMetadata`` may hold no
count at all, and a later one may leave out a field that an earlier one had.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, compact, objects
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["GENERATE"]

_FIELDS: Final = {
    "promptTokenCount": "prompt",
    "toolUsePromptTokenCount": "tools",
    "cachedContentTokenCount": "cached",
    "candidatesTokenCount": "answer",
    "responseTokenCount": "answer",  # the Live API's name
    "thoughtsTokenCount": "thoughts",
}


_PICTURES: Final = ("IMAGE", "VIDEO")
_WRITTEN: Final = "candidatesTokensDetails"


def _claims(payload: Json) -> bool:
    return "usageMetadata" in payload or ("candidates" in payload and "modelVersion" in payload)


def _claims_usage(usage: Json) -> bool:
    return any(name in usage for name in _FIELDS)


def _note_usage(notes: Notes, usage: Json) -> bool:
    notes.serve(usage.get("trafficType"))
    before = notes.counts.get(_FIELDS["candidatesTokenCount"], 0)
    for name, meaning in _FIELDS.items():
        count = notes.count(usage.get(name))
        if count is not None:
            notes.counts[meaning] = count
    for name in ("promptTokensDetails", _WRITTEN):
        details = {str(detail.get("modality")): detail.get("tokenCount") for detail in objects(usage.get(name))}
        if "AUDIO" in details:
            notes.counts[name] = notes.count(details["AUDIO"]) or 0
        if details:
            pictures = notes.plus(*(notes.count(details.get(kind)) for kind in _PICTURES))
            notes.counts["pictures of " + name] = pictures or 0
        elif name == _WRITTEN and notes.counts.get(_FIELDS["candidatesTokenCount"], 0) > before:
            # What was told of the parts was of less; nobody says what came since, which may cost more.
            notes.counts.pop("pictures of " + name, None)
    counts = notes.counts
    total, prompt = notes.count(usage.get("totalTokenCount")), notes.count(usage.get("promptTokenCount"))
    # Of the same object alone: a total says nothing of what an earlier one counted.
    notes.add_up(prompt, notes.count(usage.get("candidatesTokenCount")), total)
    if total is not None and total == prompt:
        # Zeros are left out, as where a prompt was blocked.
        counts.setdefault("answer", 0)
    asked = notes.plus(counts.get("prompt"), counts.get("tools"))
    given = notes.plus(counts.get("answer"), counts.get("thoughts"))
    voices = notes.plus(counts.get("promptTokensDetails"), counts.get("candidatesTokensDetails"))
    if asked is not None or given is not None:
        notes.take(
            TokenUsage(
                input=asked,
                output=given,
                cached=notes.part(counts.get("cached"), asked),
                reasoning=counts.get("thoughts"),
                audio=voices,
                audio_output=counts.get("candidatesTokensDetails", 0) if voices else None,
                image_input=counts.get("pictures of promptTokensDetails"),
                image_output=counts.get("pictures of candidatesTokensDetails"),
            )
        )
    return _claims_usage(usage)


def _note(notes: Notes, payload: Json) -> None:
    notes.identify(payload, model="modelVersion", response_id="responseId")
    for candidate in objects(payload.get("candidates")):
        notes.finish(candidate.get("finishReason"))
        queries = as_object(candidate.get("groundingMetadata")).get("webSearchQueries")
        if isinstance(queries, list):
            notes.search(len(queries))
    blocked = as_object(payload.get("promptFeedback")).get("blockReason")
    notes.finish(blocked)
    notes.complete = notes.complete or notes.finish_reason is not None
    _note_usage(notes, as_object(payload.get("usageMetadata")))


def _text(payload: Json) -> Iterator[str]:
    for candidate in objects(payload.get("candidates")):
        for part in objects(as_object(candidate.get("content")).get("parts")):
            if isinstance(part.get("text"), str):
                yield part["text"]
            call = as_object(part.get("functionCall")).get("args")
            if isinstance(call, dict):
                yield compact(call)


GENERATE: Final = Dialect(
    name="gemini",
    claims=_claims,
    claims_usage=_claims_usage,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks(["usageMetadata", "finishReason", "blockReason"]),
    texty=re.compile(rb'"parts"'),
    usage_key="usageMetadata",
    trailing_model=True,
)
