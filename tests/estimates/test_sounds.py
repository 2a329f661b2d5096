"""Sounds in a request are counted by how long they play at most, and never left out of a hold."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from asgi_metering.estimates import estimate_body
from asgi_metering.estimates.sounds import LEAST_RATE, UNKNOWN_S, sound_tokens


def wav(seconds: int, rate: int = 48_000) -> str:
    """A WAV file of so many bytes a second, in base64."""
    numbers = [(1, 2), (1, 2), (rate // 2, 4), (rate, 4), (2, 2), (16, 2)]
    form = b"".join(number.to_bytes(size, "little") for number, size in numbers)
    return base64.b64encode(b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + form + b"data\0\0\0\0" + bytes(seconds * rate)).decode()


def spoken(data: Any, kind: str = "wav") -> dict[str, Any]:
    """A part of an OpenAI message."""
    return {"type": "input_audio", "input_audio": {"data": data, "format": kind}}


def inline(data: str, kind: str = "audio/mp3") -> dict[str, Any]:
    """A part of Gemini contents."""
    return {"inlineData": {"mimeType": kind, "data": data}}


MP3 = base64.b64encode(b"ID3" + bytes(10 * LEAST_RATE - 5)).decode()


@pytest.mark.parametrize(
    ("value", "tokens"),
    [
        # 44 bytes of header begin another second.
        ([{"role": "user", "content": [spoken(wav(3)), {"type": "text", "text": "Hi"}]}], 4 * 10),
        ([{"content": [spoken(MP3, "mp3")]}], 10 * 10),
        ([{"content": [spoken(wav(3, rate=100), "wav")]}], 1 * 10),
        ([{"content": [spoken("é" * 40)]}], 1 * 10),
        ([{"content": [spoken(None), {"type": "input_audio"}]}], 2 * UNKNOWN_S * 10),
        ([{"parts": [inline(MP3), inline(MP3, "image/png")]}], 10 * 32),
        ([{"parts": [{"file_data": {"mime_type": "audio/wav", "file_uri": "gs://x"}}]}], UNKNOWN_S * 32),
        ([{"parts": [{"fileData": "x"}, "audio", 7]}], 0),
    ],
)
def test_count_sounds_by_how_long_they_play(value: Any, tokens: int) -> None:
    """Seconds come from a WAV's own rate, else from a low one, times what the provider counts for each."""
    assert sound_tokens(value) == tokens


def test_look_no_deeper_than_the_apis_go() -> None:
    """A request that nests without an end costs no more than one that does not."""
    value: Any = spoken(MP3)
    for _ in range(20):
        value = {"content": [value]}
    assert sound_tokens(value) == 0


@pytest.mark.parametrize("modalities", [None, ["text", "audio"]])
def test_hold_for_sounds_as_audio_input(modalities: list[str] | None) -> None:
    """They are part of the input, of the kind that has a price of its own; an answer that is spoken comes on top."""
    plain = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "max_tokens": 9}
    heard = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, spoken(MP3)]}], "max_tokens": 9}
    without, found = (
        asyncio.run(estimate_body({**body, "modalities": modalities}, at_most=True)) for body in (plain, heard)
    )
    assert found.input == (without.input or 0) + 100
    said = 9 if modalities else 0
    assert (found.audio, found.audio_output) == (100 + said, said)
