"""
Images in a request: how many tokens each is, by the formula that its provider documents.

Reads no more of an image than its size. Never fetches one: what is not in the request counts as the largest.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

__all__ = ["MAX_IMAGES", "image_tokens", "size_of"]

MAX_IMAGES: Final = 10_000
"""Images of one request that are looked at: providers take hundreds."""

MAX_DEPTH: Final = 8
"""Nesting of message parts that is looked into, as for texts."""

HEAD_CHARS: Final = 262_144
"""Characters of an image in base64 that are decoded: its size stands behind whatever a camera wrote before it."""

TILE_TOKENS: Final[Mapping[str, tuple[int, int]]] = {
    "gpt-4o-mini": (2833, 5667),
    "gpt-5": (70, 140),
    "o1": (75, 150),
    "o3": (75, 150),
}
"""By the beginning of a model's name: tokens of an image, and of each of its tiles (OpenAI, "Images and vision")."""

USUAL_TILE: Final = (85, 170)
"""The same of the others: gpt-4o, gpt-4.1."""

PATCH_FACTORS: Final[Mapping[str, tuple[int, int]]] = {
    "gpt-4.1-mini": (162, 100),
    "gpt-4.1-nano": (246, 100),
    "gpt-5-mini": (162, 100),
    "gpt-5-nano": (246, 100),
    "o4-mini": (172, 100),
}
"""By the beginning of a model's name: tokens for each patch of 32 pixels a side, as a fraction."""

MAX_PATCHES: Final = 1_536
"""A larger image is scaled down to so many."""

ANTHROPIC_PIXELS: Final = 750
"""Pixels for a token."""

ANTHROPIC_MOST: Final = 4_784
"""Tokens of an image at most, of the models that take the largest ones; others scale it down to 1,568."""

GEMINI_TILE: Final = 258
"""Tokens of a tile of 768 pixels a side; of an image of at most 384 a side it is the whole."""

GEMINI_UNKNOWN: Final = 6
"""Tiles of an image whose size is not told: 1920 by 1080."""

UNKNOWN: Final = (2_048, 768)
"""The size of an image that is not told, as OpenAI scales the largest ones: eight tiles."""


def image_tokens(value: Any, model: str = "", depth: int = 0) -> int:
    """
    How many tokens the images in *value* are: a message, a part of one, or a list of them.

    Parts are told apart by their shape: OpenAI's ``image_url`` and ``input_image``, Anthropic's ``image`` with its
    ``source``, Gemini's ``inlineData`` and ``fileData``.

    Args:
        value: As parsed; objects with ``model_dump`` are dumped.
        model: The request's: OpenAI's formulas go by it.
        depth: How deep it stands.
    """
    if depth >= MAX_DEPTH or isinstance(value, str | bytes | bytearray):
        return 0
    value = value.model_dump() if hasattr(value, "model_dump") else value
    if isinstance(value, Mapping):
        own = _own(value, model)
        inner = (value.get(key) for key in ("content", "parts", "output"))
        return own + sum(image_tokens(part, model, depth + 1) for part in inner if part is not None)
    if isinstance(value, Sequence):
        return sum(image_tokens(part, model, depth + 1) for part in value[:MAX_IMAGES])
    return 0


def _own(part: Mapping[str, Any], model: str) -> int:
    kind = part.get("type")
    if kind in ("image_url", "input_image"):
        told = part.get("image_url")
        url = told.get("url") if isinstance(told, Mapping) else told
        detail = told.get("detail") if isinstance(told, Mapping) else part.get("detail")
        return _openai(_of_url(url), str(detail), model.rpartition("/")[2])
    if kind == "image" and isinstance(part.get("source"), Mapping):
        source = part["source"]
        return _anthropic(size_of(source.get("data")) if source.get("type") == "base64" else None)
    inline = part.get("inlineData") or part.get("inline_data")
    if isinstance(inline, Mapping) and str(inline.get("mimeType") or inline.get("mime_type")).startswith("image/"):
        return _gemini(size_of(inline.get("data")))
    file = part.get("fileData") or part.get("file_data")
    if isinstance(file, Mapping) and str(file.get("mimeType") or file.get("mime_type")).startswith("image/"):
        return _gemini(None)
    return 0


def _openai(size: tuple[int, int] | None, detail: str, model: str) -> int:
    for name, (factor, per) in PATCH_FACTORS.items():
        if model.startswith(name):
            patches = MAX_PATCHES if size is None else min(MAX_PATCHES, _cells(size, 32))
            return -(-patches * factor // per)
    whole, tile = next((tokens for name, tokens in TILE_TOKENS.items() if model.startswith(name)), USUAL_TILE)
    if detail == "low":
        return whole
    return whole + tile * _cells(UNKNOWN if size is None else _fitted(*size), 512)


def _fitted(width: int, height: int) -> tuple[int, int]:
    """An image in a square of 2,048 pixels a side, and then with its shorter side at 768; never enlarged."""
    longer = max(width, height)
    if longer > 2_048:
        width, height = max(1, width * 2_048 // longer), max(1, height * 2_048 // longer)
    shorter = min(width, height)
    if shorter > 768:
        width, height = width * 768 // shorter, height * 768 // shorter
    return width, height


def _cells(size: tuple[int, int], side: int) -> int:
    return -(-size[0] // side) * -(-size[1] // side)


def _anthropic(size: tuple[int, int] | None) -> int:
    return ANTHROPIC_MOST if size is None else min(ANTHROPIC_MOST, -(-size[0] * size[1] // ANTHROPIC_PIXELS))


def _gemini(size: tuple[int, int] | None) -> int:
    if size is None:
        return GEMINI_TILE * GEMINI_UNKNOWN
    return GEMINI_TILE if max(size) <= 384 else GEMINI_TILE * _cells(size, 768)


_DATA_URL: Final = re.compile(r"data:[^,]{0,200};base64,")


def _of_url(url: Any) -> tuple[int, int] | None:
    found = _DATA_URL.match(url) if isinstance(url, str) else None
    return None if found is None else size_of(url[found.end() : found.end() + HEAD_CHARS])


def size_of(encoded: Any) -> tuple[int, int] | None:
    """Width and height of an image in base64 (PNG, JPEG, GIF, WebP); None where it does not say."""
    if not isinstance(encoded, str):
        return None
    head = encoded[:HEAD_CHARS]
    try:
        data = base64.b64decode(head[: len(head) // 4 * 4])
    except (binascii.Error, ValueError):
        return None
    size = next((size for read in (_png, _gif, _webp, _jpeg) if (size := read(data)) is not None), None)
    return size if size is not None and all(size) else None


def _big(data: bytes, at: int, length: int = 2) -> int:
    return int.from_bytes(data[at : at + length], "big")


def _small(data: bytes, at: int, length: int = 2) -> int:
    return int.from_bytes(data[at : at + length], "little")


def _png(data: bytes) -> tuple[int, int] | None:
    return (_big(data, 16, 4), _big(data, 20, 4)) if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) >= 24 else None


def _gif(data: bytes) -> tuple[int, int] | None:
    return (_small(data, 6), _small(data, 8)) if data.startswith(b"GIF8") and len(data) >= 10 else None


def _webp(data: bytes) -> tuple[int, int] | None:
    if not (data.startswith(b"RIFF") and data[8:12] == b"WEBP" and len(data) >= 30):
        return None
    kind = data[12:16]
    if kind == b"VP8 ":
        return _small(data, 26) & 0x3FFF, _small(data, 28) & 0x3FFF
    if kind == b"VP8L":
        bits = _small(data, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return (_small(data, 24, 3) + 1, _small(data, 27, 3) + 1) if kind == b"VP8X" else None


def _jpeg(data: bytes) -> tuple[int, int] | None:
    if not data.startswith(b"\xff\xd8"):
        return None
    for marker, at in _segments(data):
        # Start of frame, of every coding; C4, C8 and CC are tables.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and at + 9 <= len(data):
            return _big(data, at + 7), _big(data, at + 5)
    return None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        yield data[at + 1], at
        at += 2 + max(2, _big(data, at + 2))
