"""
Sounds in a request: how many tokens each is, by how long it plays at the rate that its provider documents.

Reads no more of a sound than the header of a WAV file. Never fetches one: what is not in the request counts as
`UNKNOWN_S`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Final

__all__ = ["MAX_SOUNDS", "sound_tokens"]

MAX_SOUNDS: Final = 1_000
"""Parts of one list that are looked at: providers take a handful."""

MAX_DEPTH: Final = 8
"""Nesting of message parts that is looked into, as for texts."""

OPENAI_PER_S: Final = 10
"""OpenAI counts a token for each 100 ms that a user speaks ("Realtime costs")."""

GEMINI_PER_S: Final = 32
"""Gemini counts so many for each second ("Audio understanding")."""

LEAST_RATE: Final = 2_000
"""
Bytes of a second of speech, compressed as much as is usual: 16 kbit/s.

Most files have four to eight times as many, so that a hold is rather too large than too small.
"""

UNKNOWN_S: Final = 600
"""How long a sound plays that is not in the request itself."""

_HEAD: Final = 64
"""Characters in base64 that hold the header of a WAV file up to its rate."""


def sound_tokens(value: Any, depth: int = 0) -> int:
    """
    How many tokens the sounds in *value* are at most: a message, a part of one, or a list of them.

    Parts are told apart by their shape: OpenAI's ``input_audio``, Gemini's ``inlineData`` and ``fileData``.

    Args:
        value: As parsed; objects with ``model_dump`` are dumped.
        depth: How deep it stands.
    """
    if depth >= MAX_DEPTH or isinstance(value, str | bytes | bytearray):
        return 0
    value = value.model_dump() if hasattr(value, "model_dump") else value
    if isinstance(value, Mapping):
        inner = (value.get(key) for key in ("content", "parts"))
        return _own(value) + sum(sound_tokens(part, depth + 1) for part in inner if part is not None)
    if isinstance(value, Sequence):
        return sum(sound_tokens(part, depth + 1) for part in value[:MAX_SOUNDS])
    return 0


def _own(part: Mapping[str, Any]) -> int:
    if part.get("type") == "input_audio":
        told = part.get("input_audio")
        return _seconds(told.get("data") if isinstance(told, Mapping) else None) * OPENAI_PER_S
    for names, is_here in ((("inlineData", "inline_data"), True), (("fileData", "file_data"), False)):
        told = next((part[name] for name in names if isinstance(part.get(name), Mapping)), None)
        if told is not None and str(told.get("mimeType") or told.get("mime_type")).startswith("audio/"):
            return _seconds(told.get("data") if is_here else None) * GEMINI_PER_S
    return 0


def _seconds(encoded: Any) -> int:
    """How long a sound in base64 plays at most, rounded up; `UNKNOWN_S` where there is none."""
    if not isinstance(encoded, str | bytes):
        return UNKNOWN_S
    return -(-(len(encoded) * 3 // 4) // _rate(encoded[:_HEAD]))


def _rate(head: str | bytes) -> int:
    """Bytes of a second: what a WAV file says itself, which is exact; else `LEAST_RATE`, and never less."""
    try:
        data = base64.b64decode(head[: len(head) // 4 * 4])
    except (binascii.Error, ValueError):
        return LEAST_RATE
    if data.startswith(b"RIFF") and data[8:16] == b"WAVEfmt " and len(data) >= 32:
        return max(LEAST_RATE, int.from_bytes(data[28:32], "little"))
    return LEAST_RATE
