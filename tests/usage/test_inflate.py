"""Undoing content encodings within bounds."""

from __future__ import annotations

import gzip
import random
import zlib

import pytest

from asgi_metering.usage.inflate import MAX_INFLATED, Inflate

NOISE = random.Random(5).randbytes(300_000)
PLAIN = b"data: x\n\n" * 50_000 + NOISE


def raw(data: bytes) -> bytes:
    """Compress without any header, as some servers understand "deflate"."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.no_cover
@pytest.mark.parametrize(
    ("header", "packed"),
    [
        (None, PLAIN),
        ("", PLAIN),
        ("identity", PLAIN),
        ("identity, identity", PLAIN),
        ("gzip", gzip.compress(PLAIN)),
        (" GZip ", gzip.compress(PLAIN)),
        ("x-gzip, identity", gzip.compress(PLAIN)),
        ("deflate", zlib.compress(PLAIN)),
        ("deflate", zlib.compress(PLAIN, 9)),
        ("deflate", raw(PLAIN)),
        ("gzip", gzip.compress(PLAIN[:1000]) + gzip.compress(PLAIN[1000:])),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 1000, 1 << 30])
def test_inflate_in_any_pieces(header: str | None, packed: bytes, size: int) -> None:
    """Every coding that is known gives the plain bytes, however it is cut, raw deflate too."""
    decoder = Inflate(header)
    chunks = [
        packed[start : start + size] for start in range(0, min(len(packed), 40_000 if size < 9 else 1 << 30), size)
    ]
    found = b"".join(piece for chunk in chunks for piece in decoder.feed(chunk))
    assert found == PLAIN[: len(found)]
    assert len(found) == len(PLAIN) or size < 9
    assert not decoder.failed
    assert decoder.active is ("gzip" in (header or "").lower() or header == "deflate")


def test_inflate_a_piece_that_fills_exactly() -> None:
    """Output that the decoder held back, its input being used up, comes out in the same call."""
    plain = b"a" * (1 << 20)
    decoder = Inflate("gzip")
    packed = gzip.compress(plain)
    found = b"".join(decoder.feed(packed[:-9]))
    found += b"".join(decoder.feed(packed[-9:]))
    assert found == plain


@pytest.mark.parametrize("header", ["br", "zstd", "gzip, br", "gzip, gzip", "compress", "*"])
def test_refuse_an_unknown_coding(header: str) -> None:
    """A coding that cannot be followed fails at once and gives nothing."""
    decoder = Inflate(header)
    assert decoder.failed
    assert list(decoder.feed(b"data: a\n\n")) == []


@pytest.mark.parametrize("broken", [b"not gzip at all", gzip.compress(PLAIN)[:5000] + NOISE], ids=["no gzip", "noise"])
def test_stop_at_a_broken_body(broken: bytes) -> None:
    """A body that breaks off keeps what came before, and stays failed."""
    decoder = Inflate("gzip")
    found = b"".join(decoder.feed(broken))
    assert PLAIN.startswith(found[:20_000])
    assert decoder.failed
    assert list(decoder.feed(gzip.compress(b"again"))) == []


def test_stop_at_a_bomb() -> None:
    """A body that inflates without end is stopped at the bound, in pieces that are never all kept."""
    packer = zlib.compressobj(9, wbits=31)
    bomb = b"".join(packer.compress(b"\0" * (1 << 20)) for _ in range(80)) + packer.flush()
    assert len(bomb) < 200_000
    decoder = Inflate("gzip")
    sizes = [len(piece) for piece in decoder.feed(bomb)]
    assert decoder.failed
    assert sum(sizes) <= MAX_INFLATED
    assert max(sizes) <= 1 << 16


def test_stop_at_garbage_behind_the_end() -> None:
    """What follows the last member without being one is refused, but not what came before it."""
    decoder = Inflate("gzip")
    assert b"".join(decoder.feed(gzip.compress(b"all") + b"garbage")) == b"all"
    assert decoder.failed
