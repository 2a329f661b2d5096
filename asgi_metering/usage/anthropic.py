"""
The Anthropic dialect: Messages, streamed or not, and the gateways that speak it.

Knows Anthropic's fields and events. Never knows how a payload was framed.

Sources: the types of the anthropic SDK 2.12 (``Usage``, ``MessageDeltaUsage``, ``BetaUsage.iterations``, the
``Raw*Event`` types), and recorded streams: input counts may rise (server tools) and fall (compaction) on the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, compact, objects
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["MESSAGES"]

_EVENTS: Final = frozenset(
    {
        "message_start",
        "message_delta",
        "message_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
    }
)
_FIELDS: Final = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
_DELTAS: Final = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
    "compaction_delta": "content",
}
"""The field that holds the text of each type of delta; signatures and citations were not written by the model."""


def _claims(payload: Json) -> bool:
    kind = payload.get("type")
    if kind == "message":
        # Many applications have events of that name; a message of this family has blocks.
        return isinstance(payload.get("content"), list)
    return isinstance(kind, str) and kind in _EVENTS


def _claims_usage(usage: Json) -> bool:
    return "input_tokens" in usage or "cache_read_input_tokens" in usage


def _merge(notes: Notes, usage: Json) -> None:
    """
    Take each field that is present and not null; the last value wins, never the largest, never a sum.

    The top level of a body with compaction leaves the compaction's own tokens out, though they are billed to the same
    model: they are added. An advisor's belong to another model and price: left out and flagged.
    """
    found: dict[str, object] = {name: usage.get(name) for name in _FIELDS}
    found["thinking_tokens"] = as_object(usage.get("output_tokens_details")).get("thinking_tokens")
    split = as_object(usage.get("cache_creation"))
    found["ephemeral"] = notes.plus(*(notes.count(value) for value in split.values()))
    found["ephemeral_1h"] = split.get("ephemeral_1h_input_tokens")
    if "iterations" in usage:
        for name in _FIELDS:
            found["compaction_" + name] = notes.plus(
                *(
                    notes.count(entry.get(name))
                    for entry in objects(usage["iterations"])
                    if entry.get("type") == "compaction"
                )
            )
        if any(entry.get("type") == "advisor_message" for entry in objects(usage["iterations"])):
            notes.flag("other_model_tokens")
    notes.search(as_object(usage.get("server_tool_use")).get("web_search_requests"))
    # The fast mode has prices of its own, in whichever tier.
    notes.serve("fast" if usage.get("speed") == "fast" else usage.get("service_tier"))
    for name, value in found.items():
        count = notes.count(value)
        if count is not None:
            notes.counts[name] = count
    merged = _normal(notes)
    if merged is not None:
        notes.usage = merged


def _normal(notes: Notes) -> TokenUsage | None:
    """Turn the exclusive counters into the inclusive form: input + cache reads + cache writes."""
    counts = notes.counts
    plain, read, written, output = (
        notes.plus(counts.get(name), counts.get("compaction_" + name)) if name in counts else None for name in _FIELDS
    )
    # The split by lifetime may come in the first event only, while the total grows: a substitute, not the truth.
    written = counts.get("ephemeral") if written is None else written
    if plain is None and output is None:
        return None
    return TokenUsage(
        input=None if plain is None else notes.plus(plain, read, written),
        output=output,
        cached=read,
        cache_write=written,
        cache_write_1h=_for_an_hour(counts, written),
        reasoning=notes.part(counts.get("thinking_tokens"), output),
    )


def _for_an_hour(counts: Mapping[str, int], written: int | None) -> int | None:
    """What of the cache writes is kept for an hour; by which the total grew later is taken for that, if any was."""
    long = counts.get("ephemeral_1h")
    if not long or written is None:
        return None
    return max(min(long, written), written - (counts.get("ephemeral", long) - long))


def _note(notes: Notes, payload: Json) -> None:
    kind = payload.get("type")
    message = as_object(payload.get("message")) if kind == "message_start" else payload
    usage = as_object(message.get("usage"))
    if kind in ("message", "message_start"):
        notes.identify(message)
    if kind == "message_stop":
        notes.complete = True
    notes.finish(payload.get("stop_reason"))
    notes.finish(as_object(payload.get("delta")).get("stop_reason"))
    if usage:
        _merge(notes, usage)
        _mark_seed(notes, usage, seed=kind == "message_start")


def _mark_seed(notes: Notes, usage: Json, *, seed: bool) -> None:
    """What ``message_start`` says of the output is a seed, until any later event has counted."""
    if seed:
        notes.partial = notes.usage is not None
    elif usage.get("output_tokens") is not None:
        notes.partial = False
    if notes.usage is not None:
        notes.take(notes.usage)


def _note_usage(notes: Notes, usage: Json) -> bool:
    _merge(notes, usage)
    _mark_seed(notes, usage, seed=False)
    return _claims_usage(usage) or "output_tokens" in usage


def _text(payload: Json) -> Iterator[str]:
    kind = payload.get("type")
    if kind == "content_block_delta":
        delta = as_object(payload.get("delta"))
        delta_kind = delta.get("type")
        text = delta.get(_DELTAS.get(delta_kind, "")) if isinstance(delta_kind, str) else None
        if isinstance(text, str):
            yield text
    elif kind == "content_block_start":
        yield from _block(as_object(payload.get("content_block")), started=True)
    elif kind == "message":
        for block in objects(payload.get("content")):
            yield from _block(block, started=False)


def _block(block: Json, *, started: bool) -> Iterator[str]:
    for name in ("text", "thinking"):
        if isinstance(block.get(name), str) and block[name]:
            yield block[name]
    # A block that starts has the empty input whose deltas follow.
    if not started and isinstance(block.get("input"), dict):
        yield compact(block["input"])


MESSAGES: Final = Dialect(
    name="anthropic",
    claims=_claims,
    claims_usage=_claims_usage,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks(["message_start", "message_delta", "message_stop"], {"usage": r"\{", "stop_reason": '"'}),
    texty=re.compile(rb'"(?:content_block_delta|content_block_start|content)"'),
)
