"""Undoing content encodings within bounds."""

from __future__ import annotations

import gzip
import random
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import brotli
import pytest
from backports import zstd

from asgi_metering.usage import inflate
from asgi_metering.usage.inflate import MAX_INFLATED, Inflate

NOISE = random.Random(5).randbytes(300_000)
PLAIN = b"data: x\n\n" * 50_000 + NOISE


def raw(data: bytes) -> bytes:
    """Compress without any header, as some servers understand "deflate"."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.uncounted
@pytest.mark.parametrize(
    ("header", "packed"),
    [
        (None, PLAIN),
        ("", PLAIN),
        ("identity", PLAIN),
        ("identity, identity", PLAIN),
        ("none", PLAIN),
        ("UTF-8", PLAIN),
        ("gzip", gzip.compress(PLAIN)),
        (" GZip ", gzip.compress(PLAIN)),
        ("x-gzip, identity", gzip.compress(PLAIN)),
        ("deflate", zlib.compress(PLAIN)),
        ("deflate", zlib.compress(PLAIN, 9)),
        ("deflate", raw(PLAIN)),
        ("gzip", gzip.compress(PLAIN[:1000]) + gzip.compress(PLAIN[1000:])),
        ("br", brotli.compress(PLAIN, quality=5)),
        ("BR", brotli.compress(PLAIN, quality=0)),
        ("zstd", zstd.compress(PLAIN)),
        ("zstd", zstd.compress(PLAIN[:1000]) + zstd.compress(PLAIN[1000:])),
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
    assert decoder.expanded == (len(found) if decoder.active else 0)
    assert len(found) == len(PLAIN) or size < 9
    assert not decoder.failed
    assert decoder.active is ((header or "").lower().split(",")[0].strip() not in ("", "identity", "none", "utf-8"))


def test_inflate_a_piece_that_fills_exactly() -> None:
    """Output that the decoder held back, its input being used up, comes out in the same call."""
    plain = b"a" * (1 << 20)
    decoder = Inflate("gzip")
    packed = gzip.compress(plain)
    found = b"".join(decoder.feed(packed[:-9]))
    found += b"".join(decoder.feed(packed[-9:]))
    assert found == plain
    assert decoder.expanded == 1 << 20


@pytest.mark.parametrize(("header", "module"), [("br", ["brotli"]), ("zstd", ["compression.zstd", "backports.zstd"])])
def test_refuse_a_coding_whose_decoder_is_not_installed(
    header: str, module: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the decoder a coding fails at once, by its name, and gives nothing."""
    for name in module:
        monkeypatch.setitem(sys.modules, name, None)
    decoder = Inflate(header)
    assert (decoder.failed, decoder.coding) == (True, header)
    assert list(decoder.feed(b"data: a\n\n")) == []


def test_refuse_a_decoder_without_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Brotli of before 1.2, which gives out a bomb at once, counts as none."""
    monkeypatch.setattr(brotli, "Decompressor", type("Decompressor", (), {}))
    assert Inflate("br").coding == "br"


@pytest.mark.parametrize("header", ["gzip, br", "gzip, gzip", "compress", "*"])
def test_refuse_an_unknown_coding(header: str) -> None:
    """A coding that cannot be followed fails at once and gives nothing."""
    decoder = Inflate(header)
    assert decoder.failed
    assert decoder.coding == header
    assert list(decoder.feed(b"data: a\n\n")) == []


PACKERS = {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "zstd": zstd.compress}


@pytest.mark.parametrize("header", PACKERS)
@pytest.mark.parametrize("cut", [0, 5000], ids=["from the start", "later"])
def test_stop_at_a_broken_body(header: str, cut: int) -> None:
    """A body that breaks off keeps what came before, and stays failed; its coding is known all the same."""
    decoder = Inflate(header)
    found = b"".join(decoder.feed(PACKERS[header](NOISE)[:cut] + b"\xff not packed at all" * 20_000))
    assert NOISE.startswith(found[:4_000])
    assert (decoder.failed, decoder.coding) == (True, None)
    assert list(decoder.feed(PACKERS[header](b"again"))) == []


def bomb(header: str) -> bytes:
    """80 MiB of nothing."""
    nothing = b"\0" * (1 << 20)
    if header == "br":
        tight: Any = brotli.Compressor(quality=1)
        return b"".join(tight.process(nothing) for _ in range(80)) + bytes(tight.finish())
    packer: Any = zlib.compressobj(9, wbits=31) if header == "gzip" else zstd.ZstdCompressor()
    return b"".join(packer.compress(nothing) for _ in range(80)) + bytes(packer.flush())


@pytest.mark.parametrize("header", ["gzip", "br", "zstd"])
def test_stop_at_a_bomb(header: str) -> None:
    """A body that inflates without end is stopped at the bound, in pieces that are never all kept."""
    packed = bomb(header)
    assert len(packed) < 200_000
    decoder = Inflate(header)
    sizes = [len(piece) for piece in decoder.feed(packed)]
    assert decoder.failed
    assert sum(sizes) <= MAX_INFLATED
    assert max(sizes) <= 1 << 20


@pytest.mark.parametrize("header", ["gzip", "zstd"])
def test_hand_over_many_small_members_a_bounded_number_of_times(header: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many members one chunk holds, what follows each is handed on in pieces: the work grows with the bytes."""
    handed = 0
    kind = {"gzip": inflate._Zlib, "zstd": inflate._Zstd}[header]
    decode = kind.decode

    def counted(decoder: Any, data: bytes) -> Iterator[bytes]:
        nonlocal handed
        handed += len(data)
        return decode(decoder, data)

    monkeypatch.setattr(kind, "decode", counted)
    looked = []
    for size in (1 << 15, 1 << 17):
        handed = 0
        member = PACKERS[header](b"a")
        decoder = Inflate(header)
        assert b"".join(decoder.feed(member * (size // len(member)))) == b"a" * (size // len(member))
        assert not decoder.failed
        looked.append(handed / size)
    # All that follows each of them would be four times as much of four times as many.
    assert looked[1] <= 2 * looked[0]


def test_stop_at_a_window_that_nobody_may_ask_for() -> None:
    """A frame of Zstandard whose window is larger than HTTP allows takes no memory for it (RFC 9659)."""
    options = {zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.enable_long_distance_matching: 1}
    packer = zstd.ZstdCompressor(options=options)
    packed = packer.compress(NOISE) + packer.flush()
    decoder = Inflate("zstd")
    assert list(decoder.feed(packed)) == []
    assert decoder.failed


@pytest.mark.parametrize("header", ["gzip", "deflate", "br", "zstd"])
def test_stop_at_garbage_behind_the_end(header: str) -> None:
    """What follows the last member without being one is refused, but not what came before it."""
    decoder = Inflate(header)
    assert b"".join(decoder.feed(PACKERS[header](b"all"))) == b"all"
    assert list(decoder.feed(b"garbage")) == []
    assert decoder.failed
