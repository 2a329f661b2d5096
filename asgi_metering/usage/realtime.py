"""
The dialect of OpenAI's Realtime API, as its server sends it over a WebSocket, event by event.

Knows the fields of its events. Never knows which events belong to one answer: that is `session`.

Each ``response.done`` counts one response by itself, and the transcription of what the user said is counted apart, in
tokens or in seconds, of a model of its own. No response names its model: the session does.

What was read from a cache is told by modality, and is in ``cached`` alone here: ``audio`` and ``image_input`` are what
was not, since a cached token has the price of a cached one, whatever it stands for.

Source: the types of the openai SDK 3.54 (``realtime``): ``RealtimeResponseUsage``, ``RealtimeServerEvent``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

from asgi_metering.usage.notes import Dialect, Json, Notes, as_object, first
from asgi_metering.usage.openai import counted
from asgi_metering.usage.skim import Marks
from asgi_metering.usage.values import TokenUsage

__all__ = ["REALTIME", "TRANSCRIBED", "Models", "named_models"]

TRANSCRIBED: Final = "conversation.item.input_audio_transcription.completed"
"""What a model of its own made of the user's voice."""

DONE: Final = "response.done"
"""The end of a response, however it ended, and all that is told of its usage."""

_FAMILIES: Final = (
    "response.",
    "conversation.",
    "input_audio_buffer.",
    "output_audio_buffer.",
    "rate_limits.",
    "session.",
    "transcription_session.",
)


class Models(NamedTuple):
    """What a session says that its answers are made by: the model that talks, and the one that transcribes."""

    model: str | None
    transcriber: str | None


def named_models(payload: Json) -> Models | None:
    """Return the models that a session names; None for an event that is none of a session's."""
    kind = payload.get("type")
    if not (isinstance(kind, str) and kind.endswith(("session.created", "session.updated"))):
        return None
    session = as_object(payload.get("session"))
    heard = as_object(as_object(session.get("audio")).get("input"))
    names = Notes(), Notes()
    names[0].identify(session)
    # The second is how the beta had it.
    names[1].identify(as_object(first(heard.get("transcription"), session.get("input_audio_transcription"))))
    return Models(names[0].model, names[1].model)


def _claims(payload: Json) -> bool:
    kind = payload.get("type")
    if not isinstance(kind, str) or not kind.startswith(_FAMILIES):
        return False
    # Events of the Responses API have such types as well; they are numbered, and these are named.
    return "event_id" in payload or as_object(payload.get("response")).get("object") == "realtime.response"


def _none(_usage: Json) -> bool:
    """A bare usage object looks as those of Responses do."""
    return False


def _note_usage(notes: Notes, usage: Json) -> bool:
    if usage.get("type") == "duration":
        # Tokens are none of what it is counted by.
        notes.last(usage.get("seconds"))
        notes.take(TokenUsage(input=0, output=0))
        return True
    counts = counted(notes, usage, total_is_input=False)
    if counts is None:
        return False
    into = as_object(first(usage.get("input_token_details"), usage.get("input_tokens_details")))
    read = as_object(into.get("cached_tokens_details"))
    spoken = counts.audio_output or 0
    voices, images = notes.count(read.get("audio_tokens")), notes.count(read.get("image_tokens"))
    if counts.audio is not None and voices:
        heard = counts.audio - spoken
        counts = replace(counts, audio=heard - (notes.part(voices, heard) or 0) + spoken)
    if counts.image_input is not None and images:
        counts = replace(counts, image_input=counts.image_input - (notes.part(images, counts.image_input) or 0))
    notes.take(counts)
    return True


def _note(notes: Notes, payload: Json) -> None:
    kind = payload.get("type")
    told = named_models(payload)
    if told is not None:
        notes.identify({"model": told.model})
    elif kind == TRANSCRIBED:
        notes.identify({"id": payload.get("item_id")})
        notes.complete = True
        _note_usage(notes, as_object(payload.get("usage")))
    else:
        response = as_object(payload.get("response"))
        notes.identify({"id": first(response.get("id"), payload.get("response_id")), "model": response.get("model")})
        if kind == DONE:
            notes.complete = True
            status = response.get("status")
            notes.error = notes.error or status == "failed"
            reason = as_object(response.get("status_details")).get("reason") if status == "incomplete" else None
            notes.finish(first(reason, status))
            notes.serve(response.get("service_tier"))
            _note_usage(notes, as_object(response.get("usage")))


def _text(payload: Json) -> Iterator[str]:
    kind, delta = payload.get("type"), payload.get("delta")
    # Voices are base64; their transcripts have an event of their own. What the user said is no output.
    if not (isinstance(kind, str) and kind.startswith("response.") and isinstance(delta, str)):
        return
    if kind.endswith(".delta") and not kind.endswith("audio.delta"):
        yield delta


REALTIME: Final = Dialect(
    name="openai-realtime",
    claims=_claims,
    claims_usage=_none,
    note=_note,
    note_usage=_note_usage,
    text=_text,
    telling=Marks(["session.created", "session.updated", "response.created", DONE], {"usage": r"\{"}),
    texty=re.compile(rb'\.delta"'),
)
