"""Images count as their providers document it, and no more of them is read than their size."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from asgi_metering.estimates.images import image_tokens, size_of


def encoded(data: bytes) -> str:
    """*data* as requests carry it."""
    return base64.b64encode(data).decode()


def png(width: int, height: int) -> bytes:
    """The head of a PNG of that size."""
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII", 13, b"IHDR", width, height) + bytes(9)


def jpeg(width: int, height: int, before: int = 100) -> bytes:
    """The head of a JPEG, behind so many bytes of what a camera wrote, and a table."""
    exif = b"\xff\xe1" + struct.pack(">H", before + 2) + bytes(before)
    table = b"\xff\xc4" + struct.pack(">H", 4) + bytes(2)
    return b"\xff\xd8" + exif + table + b"\xff\xc2" + struct.pack(">HBHHB", 17, 8, height, width, 3) + bytes(12)


def webp(kind: bytes, body: bytes) -> bytes:
    """The head of a WebP."""
    return (b"RIFF" + bytes(4) + b"WEBP" + kind + bytes(4) + body).ljust(60, b"\0")


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (png(1024, 768), (1024, 768)),
        (jpeg(1920, 1080), (1920, 1080)),
        (jpeg(640, 480, before=60_000), (640, 480)),
        (b"GIF89a" + struct.pack("<HH", 320, 200), (320, 200)),
        (webp(b"VP8 ", bytes(6) + struct.pack("<HH", 550 | 0x4000, 368)), (550, 368)),
        (webp(b"VP8L", b"\x2f" + struct.pack("<I", 399 | 300 << 14)), (400, 301)),
        (webp(b"VP8X", bytes(4) + (499).to_bytes(3, "little") + (799).to_bytes(3, "little")), (500, 800)),
        (webp(b"ALPH", b""), None),
        (png(0, 5), None),
        (png(5, 5)[:20], None),
        (b"\xff\xd8\xff\xe1\x00", None),
        (b"\xff\xd8 no segment", None),
        (b"\xff\xd8\xff\xc0\x00\x11", None),
        (b"BM", None),
        (b"", None),
    ],
)
def test_read_the_size_of_an_image(data: bytes, size: tuple[int, int] | None) -> None:
    """Width and height come from the head of PNG, JPEG, GIF and WebP; what does not say them has none."""
    assert size_of(encoded(data)) == size


@pytest.mark.parametrize("wrong", [None, 7, "ä", "===", "a"])
def test_read_no_size_of_what_is_no_base64(wrong: Any) -> None:
    """What is no text in base64 has no size, and raises nothing."""
    assert size_of(wrong) is None


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8\xff", b"RIFF1234WEBPVP8X", b"\x89PNG\r\n\x1a\n", b"GIF8"])
)
def test_survive_any_bytes(data: bytes, head: bytes) -> None:
    """Whatever stands in an image, reading its size raises nothing and answers a size or none."""
    size = size_of(encoded(head + data))
    assert size is None or (size[0] > 0 and size[1] > 0)


def openai(data: bytes | None, detail: str | None = None) -> dict[str, Any]:
    """A part of a chat message."""
    url = "https://example.com/x.png" if data is None else f"data:image/png;base64,{encoded(data)}"
    return {"type": "image_url", "image_url": {"url": url, **({"detail": detail} if detail else {})}}


@pytest.mark.parametrize(
    ("part", "model", "tokens"),
    [
        (openai(png(1024, 1024)), "gpt-4o", 85 + 4 * 170),
        (openai(png(2048, 4096), "high"), "gpt-4o", 85 + 6 * 170),
        (openai(png(4096, 1024)), "gpt-4o", 85 + 4 * 170),
        (openai(png(4096, 8192), "low"), "gpt-4o", 85),
        (openai(png(512, 512)), "gpt-4o", 85 + 170),
        (openai(None), "gpt-4o", 85 + 8 * 170),
        (openai(png(512, 512)), "gpt-4o-mini", 2833 + 5667),
        (openai(png(512, 512)), "openai/gpt-5", 70 + 140),
        (openai(png(1024, 1024)), "gpt-4.1-mini", -(-1024 * 162 // 100)),
        (openai(png(9_000, 9_000)), "o4-mini", -(-1536 * 172 // 100)),
        (openai(None), "gpt-5-mini", -(-1536 * 162 // 100)),
        ({"type": "input_image", "image_url": openai(png(512, 512))["image_url"]["url"]}, "", 255),
        ({"type": "input_image", "file_id": "f", "detail": "low"}, "gpt-4o", 85),
        ({"type": "image_url", "image_url": "https://x"}, "", 1445),
        ({"type": "image", "source": {"type": "base64", "data": encoded(png(1000, 1000))}}, "", 1334),
        ({"type": "image", "source": {"type": "base64", "data": encoded(png(9_000, 9_000))}}, "", 4784),
        ({"type": "image", "source": {"type": "url", "url": "https://x"}}, "claude", 4784),
        ({"inlineData": {"mimeType": "image/png", "data": encoded(png(300, 384))}}, "gemini", 258),
        ({"inline_data": {"mime_type": "image/png", "data": encoded(png(1920, 1080))}}, "gemini", 6 * 258),
        ({"fileData": {"mimeType": "image/png", "fileUri": "gs://x"}}, "gemini", 6 * 258),
        ({"inlineData": {"mimeType": "audio/wav", "data": "x"}}, "gemini", 0),
        ({"fileData": {"mimeType": "audio/wav"}}, "gemini", 0),
        ({"type": "image"}, "", 0),
        ({"type": "text", "text": "data:image/png;base64,"}, "", 0),
    ],
)
def test_count_an_image_as_documented(part: dict[str, Any], model: str, tokens: int) -> None:
    """OpenAI's tiles and patches, Anthropic's pixels, Gemini's tiles; an image that is not there is the largest."""
    message = {"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}
    assert image_tokens(part, model) == tokens
    assert image_tokens([message, {"role": "user", "parts": (part,)}], model) == 2 * tokens


def test_look_into_no_depth() -> None:
    """Nesting is bounded, texts are no images, and objects of an SDK count as what they dump."""

    class Message(BaseModel):
        content: list[dict[str, Any]]

    deep: Any = openai(None)
    for _ in range(8):
        deep = [deep]
    assert image_tokens(deep) == 0
    assert image_tokens("image_url") == image_tokens(None) == 0
    assert image_tokens([Message(content=[openai(png(512, 512))])]) == 255
