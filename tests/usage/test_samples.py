"""Every sample, however it is cut: reference `usage-payloads`, sections 2 to 5."""

from __future__ import annotations

import gzip
import itertools
import zlib

import brotli
import pytest
from backports import zstd

from asgi_metering.usage import UsageReader
from tests.usage import vectors

LYING = [
    None,
    "text/plain",
    "text/html",
    "text/event-stream",
    "application/json",
    "application/x-ndjson",
    "application/octet-stream",
    "image/png",
    "nonsense",
]
# One is enough to run every line of the codings.
CODED = [vectors.NAMES[0], *(pytest.param(name, marks=pytest.mark.uncounted) for name in vectors.NAMES[1:])]
CHUNKED = [name for name in vectors.NAMES if name.endswith((".sse", ".ndjson"))]


def pieces(data: bytes, size: int) -> list[bytes]:
    """Cut the data into chunks of a size."""
    return [data[start : start + size] for start in range(0, len(data), size)]


@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_sample_in_one_piece(name: str) -> None:
    """Each sample gives exactly the counts, marks, cost and text that are expected of it."""
    reader = vectors.read([vectors.body(name)], vectors.content_type(name), keep_text=True)
    vectors.check(name, reader.report())
    assert reader.text() == vectors.TEXTS.get(name, "")
    assert reader.text_chars == len(reader.text())
    assert not reader.text_truncated
    assert not reader.undecodable
    assert not reader.gapped


@pytest.mark.uncounted
@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_sample_cut_in_two_anywhere(name: str) -> None:
    """A border at any byte changes neither the report nor the text."""
    data = vectors.body(name)
    for cut in range(len(data) + 1):
        reader = vectors.read([data[:cut], data[cut:]], vectors.content_type(name), keep_text=True)
        vectors.check(name, reader.report())
        assert reader.text() == vectors.TEXTS.get(name, "")


@pytest.mark.uncounted
@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_sample_in_chunks_of_any_size(name: str) -> None:
    """Chunks of every size, from one byte to half of the sample, give the same report and text."""
    data = vectors.body(name)
    for size in range(1, len(data) // 2 + 2):
        reader = vectors.read(pieces(data, size), vectors.content_type(name), keep_text=True)
        vectors.check(name, reader.report())
        assert reader.text() == vectors.TEXTS.get(name, "")


@pytest.mark.uncounted
@pytest.mark.parametrize("name", vectors.NAMES)
def test_look_at_sample_after_every_byte(name: str) -> None:
    """A report asked for after each byte never disturbs what is read in the end."""
    data = vectors.body(name)
    reader = UsageReader(vectors.content_type(name), keep_text=True)
    for byte in pieces(data, 1):
        reader.feed(byte)
        assert reader.report() == reader.report()
        assert vectors.TEXTS.get(name, "").startswith(reader.text())
    vectors.check(name, reader.report())
    assert reader.text() == vectors.TEXTS.get(name, "")


@pytest.mark.parametrize(
    "coding", ["gzip", "x-gzip", "deflate", "raw deflate", "identity", "gzip members", "br", "zstd"]
)
@pytest.mark.parametrize("name", CODED)
def test_read_sample_compressed(name: str, coding: str) -> None:
    """A compressed sample reads as the plain one, in one piece and byte by byte."""
    data = vectors.body(name)
    half = len(data) // 2
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = {
        "gzip": gzip.compress(data),
        "x-gzip": gzip.compress(data),
        "deflate": zlib.compress(data),
        "raw deflate": raw.compress(data) + raw.flush(),
        "identity": data,
        "br": brotli.compress(data),
        "zstd": zstd.compress(data[:half]) + zstd.compress(data[half:]),
        "gzip members": gzip.compress(data[:half]) + gzip.compress(data[half:]) + b"\0\0",
    }[coding]
    header = coding.removeprefix("raw ").removesuffix(" members")
    for size in (1, 7, len(packed)):
        reader = vectors.read(pieces(packed, size), vectors.content_type(name), content_encoding=header, keep_text=True)
        vectors.check(name, reader.report())
        assert reader.text() == vectors.TEXTS.get(name, "")
        assert not reader.undecodable


@pytest.mark.uncounted
@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_sample_without_a_content_type(name: str) -> None:
    """The first bytes tell the format, whatever the content type says of it, also behind a byte order mark."""
    for start, media in itertools.product((b"", b"\xef\xbb\xbf"), LYING):
        data = start + vectors.body(name)
        vectors.check(name, vectors.read([data], media).report())
    # Byte by byte as well, where every first one is looked at.
    vectors.check(name, vectors.read(pieces(data, 1), LYING[0]).report())


@pytest.mark.uncounted
@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_sample_byte_by_byte_without_a_content_type(name: str) -> None:
    """The same where each byte comes by itself, behind a byte order mark."""
    data = b"\xef\xbb\xbf" + vectors.body(name)
    for media in LYING[1:]:
        vectors.check(name, vectors.read(pieces(data, 1), media).report())


@pytest.mark.parametrize("name", vectors.NAMES)
def test_read_sample_by_an_explicit_dialect(name: str) -> None:
    """Naming the dialect that detection finds changes nothing."""
    reader = vectors.read([vectors.body(name)], vectors.content_type(name), dialect=vectors.dialect(name))
    vectors.check(name, reader.report())


@pytest.mark.parametrize("name", CHUNKED)
def test_read_sample_without_its_last_line_end(name: str) -> None:
    """A last event that lacks its end counts all the same, whatever follows later."""
    data = vectors.body(name)
    reader = vectors.read([data.rstrip(b"\r\n")], vectors.content_type(name), keep_text=True)
    vectors.check(name, reader.report())
    assert reader.text() == vectors.TEXTS.get(name, "")
    reader.feed(data[len(data.rstrip(b"\r\n")) :])
    vectors.check(name, reader.report())
    assert reader.text() == vectors.TEXTS.get(name, "")


@pytest.mark.uncounted
@pytest.mark.parametrize("name", [name for name in CHUNKED if name.endswith(".sse")])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_read_sample_with_other_line_ends(name: str, end: bytes) -> None:
    r"""``\n``, ``\r\n`` and ``\r`` all end a line, also when the chunk ends between ``\r`` and ``\n``."""
    data = vectors.body(name).replace(b"\r\n", b"\n").replace(b"\n", end)
    for size in (1, 2, 3, len(data)):
        vectors.check(name, vectors.read(pieces(data, size), vectors.content_type(name)).report())
