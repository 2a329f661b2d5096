"""
The dialects of Vercel's AI SDK: its data stream (``CODE:JSON`` lines) and its UI message stream.

Knows the codes, the types of events and the SDK's usage object. Never knows how a payload was framed: a line of the
data stream comes as an object with one field, `coded.PREFIX` and its code.

Sources: @ai-sdk/ui-utils 1.2.11 and ai 4.3.19 (the codes; a finish step counts itself, a finish message all of them),
ai 6.0.326 (``LanguageModelUsage``, whose input includes what was cached). The UI stream has no usage of its own:
applications put the SDK's object into ``messageMetadata``, as ``totalUsage`` or ``usage``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from asgi_metering.usage.coded import PREFIX
from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, compact, first
from asgi_metering.usage.openai import reconcile
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["DATA", "UI"]

_TEXT, _ERROR, _CALL, _CALL_DELTA, _FINISH, _STEP, _REASONING = (PREFIX + code for code in "039cdeg")


def _data_claims(payload: Json) -> bool:
    return len(payload) == 1 and next(iter(payload)).startswith(PREFIX)


def _data_claims_usage(usage: Json) -> bool:
    return "promptTokens" in usage or "completionTokens" in usage


def _data_usage(notes: Notes, usage: Json) -> bool:
    asked, given = notes.count(usage.get("promptTokens")), notes.count(usage.get("completionTokens"))
    if asked is None and given is None:
        return False
    notes.usage = TokenUsage(input=asked, output=given)
    return True


def _data_step(notes: Notes, usage: Json) -> None:
    """Add a step; one that does not know its counts leaves none for all of them, until the finish message says."""
    counts = notes.counts
    counts["steps"] = counts.get("steps", 0) + 1
    for name in ("promptTokens", "completionTokens"):
        count = notes.count(usage.get(name))
        if count is not None:
            counts[name] = notes.plus(counts.get(name), count) or 0
            counts["known_" + name] = counts.get("known_" + name, 0) + 1
    asked, given = (
        counts[name] if counts.get("known_" + name) == counts["steps"] else None
        for name in ("promptTokens", "completionTokens")
    )
    notes.usage = None if asked is None and given is None else TokenUsage(input=asked, output=given)


def _data_note(notes: Notes, payload: Json) -> None:
    notes.error = notes.error or _ERROR in payload
    finish, step = as_object(payload.get(_FINISH)), as_object(payload.get(_STEP))
    notes.identify(as_object(payload.get(PREFIX + "f")), response_id="messageId")
    for end in (step, finish):
        notes.finish(end.get("finishReason"))
        notes.error = notes.error or end.get("finishReason") == "error"
    if step and not notes.complete:
        _data_step(notes, as_object(step.get("usage")))
    if finish:
        notes.complete = True
        _data_usage(notes, as_object(finish.get("usage")))
    if _CALL_DELTA in payload:
        notes.counts["streamed"] = 1
    elif "streamed" in notes.counts and isinstance(payload.get(_CALL), dict):
        # The whole call repeats the arguments that came in pieces: they are not text twice.
        payload[_CALL].pop("args", None)


def _data_text(payload: Json) -> Iterator[str]:
    for name in (_TEXT, _REASONING):
        if isinstance(payload.get(name), str) and payload[name]:
            yield payload[name]
    piece = as_object(payload.get(_CALL_DELTA)).get("argsTextDelta")
    if isinstance(piece, str):
        yield piece
    arguments = as_object(payload.get(_CALL)).get("args")
    if isinstance(arguments, dict):
        yield compact(arguments)


DATA: Final = Dialect(
    name="vercel-data",
    claims=_data_claims,
    claims_usage=_data_claims_usage,
    note=_data_note,
    note_usage=_data_usage,
    text=_data_text,
    telling=Marks([_ERROR, _FINISH, _STEP]),
    texty=re.compile(f'^{{"{PREFIX}[09cg]"'.encode()),
    shows=tuple(PREFIX + code for code in "0123456789abcdefghijk"),
)


_DELTAS: Final = {"text-delta": "delta", "reasoning-delta": "delta", "tool-input-delta": "inputTextDelta"}
_TYPES: Final = frozenset(
    {
        *_DELTAS,
        "start-step",
        "finish-step",
        "text-start",
        "text-end",
        "reasoning-start",
        "reasoning-end",
        "tool-input-start",
        "tool-input-available",
        "tool-output-available",
        "message-metadata",
    }
)


def _ui_claims(payload: Json) -> bool:
    kind = payload.get("type")
    return isinstance(kind, str) and (
        kind in _TYPES
        or (kind == "start" and ("messageId" in payload or "messageMetadata" in payload))
        or (kind == "finish" and ("finishReason" in payload or "messageMetadata" in payload))
    )


def _ui_claims_usage(usage: Json) -> bool:
    ours = ("inputTokenDetails", "outputTokenDetails", "cachedInputTokens", "reasoningTokens")
    return "inputTokens" in usage and any(name in usage for name in ours)


def _ui_usage(notes: Notes, usage: Json) -> bool:
    into, out = as_object(usage.get("inputTokenDetails")), as_object(usage.get("outputTokenDetails"))
    asked, given = notes.count(usage.get("inputTokens")), notes.count(usage.get("outputTokens"))
    if asked is None and given is None:
        return False
    reasoning = notes.count(out.get("reasoningTokens"), usage.get("reasoningTokens"))
    given = reconcile(notes, asked, given, reasoning, notes.count(usage.get("totalTokens")))
    cached = notes.count(into.get("cacheReadTokens"), usage.get("cachedInputTokens"))
    written = notes.count(into.get("cacheWriteTokens"))
    notes.inside(asked, cached, written)
    notes.take(TokenUsage(asked, given, cached, written, notes.part(reasoning, given)))
    return True


def _ui_note(notes: Notes, payload: Json) -> None:
    notes.identify(payload, response_id="messageId")
    notes.finish(payload.get("finishReason"))
    notes.error = notes.error or payload.get("finishReason") == "error"
    notes.complete = notes.complete or payload.get("type") == "finish"
    metadata = as_object(payload.get("messageMetadata"))
    _ui_usage(notes, as_object(first(metadata.get("totalUsage"), metadata.get("usage"), metadata)))


def _ui_text(payload: Json) -> Iterator[str]:
    kind = payload.get("type")
    text = payload.get(_DELTAS.get(kind, "")) if isinstance(kind, str) else None
    if isinstance(text, str) and text:
        yield text


UI: Final = Dialect(
    name="vercel-ui",
    claims=_ui_claims,
    claims_usage=_ui_claims_usage,
    note=_ui_note,
    note_usage=_ui_usage,
    text=_ui_text,
    telling=Marks(["finish", "abort", "finishReason"], {"messageMetadata": r"\{"}),
    texty=re.compile(b"-delta"),
    usage_key="totalUsage",
)
