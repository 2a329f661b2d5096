"""
The dialect of Gemini's Live API, as its server sends it over a WebSocket, message by message.

Knows the fields of its messages, in the spelling of the wire and in that of the Python SDK's models. Never knows which
messages belong to one turn: that is `session`.

Sources: the types of google-genai 3.4 (``LiveServerMessage``, ``UsageMetadata``). What a turn used is counted for that
turn, the context that it read again included, so that turns are added; seen on the wire by others (pydantic-ai pull
request 7269). Of several counts within a turn nobody says how they belong together: they are taken for running totals.
No message names the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from asgi_metering.usage.gemini import GENERATE
from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, compact, first, objects
from asgi_metering.usage.skim import Marks

__all__ = ["LIVE", "speaks"]

_SNAKE: Final = {
    name: re.sub(r"[A-Z]", lambda letter: "_" + letter[0].lower(), name)
    for name in (
        "cachedContentTokenCount",
        "candidatesTokenCount",
        "candidatesTokensDetails",
        "functionCalls",
        "groundingMetadata",
        "modelTurn",
        "outputTranscription",
        "promptTokenCount",
        "promptTokensDetails",
        "responseTokenCount",
        "responseTokensDetails",
        "serverContent",
        "setupComplete",
        "thoughtsTokenCount",
        "tokenCount",
        "toolCall",
        "toolUsePromptTokenCount",
        "totalTokenCount",
        "trafficType",
        "turnComplete",
        "turnCompleteReason",
        "usageMetadata",
        "webSearchQueries",
    )
}

_SHARED: Final = (
    "promptTokenCount",
    "cachedContentTokenCount",
    "thoughtsTokenCount",
    "toolUsePromptTokenCount",
    "totalTokenCount",
    "trafficType",
)
"""Fields of usage that `GENERATE` has by the same names."""

_RENAMED: Final = {"responseTokenCount": "candidatesTokenCount", "responseTokensDetails": "candidatesTokensDetails"}
"""Those that are `GENERATE`'s by another name, which some servers of the Live API use as well."""

_DETAILS: Final = ("promptTokensDetails", "candidatesTokensDetails")


def _get(payload: Json, name: str) -> Any:
    return first(payload.get(name), payload.get(_SNAKE[name]))


def speaks(payload: Json) -> bool:
    """Whether the model says or asks for something in it: after the end of a turn another one has begun."""
    content = as_object(_get(payload, "serverContent"))
    return bool(_get(content, "modelTurn") or _get(content, "outputTranscription") or _calls(payload))


def _calls(payload: Json) -> list[Json]:
    return list(objects(_get(as_object(_get(payload, "toolCall")), "functionCalls")))


def _claims(payload: Json) -> bool:
    if any(isinstance(_get(payload, name), dict) for name in ("serverContent", "setupComplete")):
        return True
    if "candidates" in payload or "modelVersion" in payload:
        return False
    return bool(_calls(payload)) or _claims_usage(as_object(_get(payload, "usageMetadata")))


def _claims_usage(usage: Json) -> bool:
    return _get(usage, "responseTokenCount") is not None


def _note_usage(notes: Notes, usage: Json) -> bool:
    found: Json = {name: _get(usage, name) for name in _SHARED}
    found |= {ours: first(_get(usage, name), _get(usage, ours)) for name, ours in _RENAMED.items()}
    found["promptTokensDetails"] = _get(usage, "promptTokensDetails")
    for name in _DETAILS:
        found[name] = [{**each, "tokenCount": _get(each, "tokenCount")} for each in objects(found[name])]
    GENERATE.note_usage(notes, {name: value for name, value in found.items() if value is not None})
    return _claims_usage(usage)


def _note(notes: Notes, payload: Json) -> None:
    content = as_object(_get(payload, "serverContent"))
    if _get(content, "turnComplete") is True:
        notes.complete = True
        notes.finish(_get(content, "turnCompleteReason"))
    queries = _get(as_object(_get(content, "groundingMetadata")), "webSearchQueries")
    if isinstance(queries, list):
        notes.search(len(queries))
    usage = as_object(_get(payload, "usageMetadata"))
    if usage:
        _note_usage(notes, usage)


def _text(payload: Json) -> Iterator[str]:
    content = as_object(_get(payload, "serverContent"))
    parts = objects(as_object(_get(content, "modelTurn")).get("parts"))
    for said in (*parts, as_object(_get(content, "outputTranscription"))):
        if isinstance(said.get("text"), str) and said["text"]:
            yield said["text"]
    for call in _calls(payload):
        if isinstance(call.get("args"), dict):
            yield compact(call["args"])


LIVE: Final = Dialect(
    name="gemini-live",
    claims=_claims,
    claims_usage=_claims_usage,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks(["usageMetadata", "usage_metadata", "turnComplete", "turn_complete"]),
    texty=re.compile(rb'"(?:parts|text|args)"'),
    shows=("serverContent", "server_content", "setupComplete", "setup_complete", "toolCall", "usage_metadata"),
    usage_key="usageMetadata",
)
