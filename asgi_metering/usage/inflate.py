"""
Undoing a content encoding piece by piece, within bounds.

Knows gzip and deflate. Never knows what the bytes mean, nor any other coding (Brotli and Zstandard are not in the
standard library): those are not followed.

Source: RFC 9110, 8.4.1 ("x-gzip" is "gzip"; "deflate" is the zlib format, and some servers send it raw).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final, cast

__all__ = ["MAX_INFLATED", "Inflate"]

MAX_INFLATED: Final = 64 << 20
"""Bytes that one body may inflate to: no real answer is larger, a bomb is stopped here."""

_PIECE: Final = 1 << 16
"""Bytes inflated at a time, so that what is inflated never has to be kept at once."""

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_RAW: Final = -zlib.MAX_WBITS
_CODINGS: Final = {"gzip": _GZIP_OR_ZLIB, "x-gzip": _GZIP_OR_ZLIB, "deflate": _GZIP_OR_ZLIB}


class Inflate:
    """
    Decodes one body. Once `failed`, it stays so: a compressed body cannot be entered in the middle.

    Args:
        content_encoding: The header field's value; several codings, or an unknown one, fail at once.
    """

    __slots__ = ("_decoder", "_ended", "_first", "_left", "failed")

    def __init__(self, content_encoding: str | None) -> None:
        codings = [name.strip().lower() for name in (content_encoding or "").split(",")]
        codings = [name for name in codings if name not in ("", "identity")]
        self.failed = len(codings) > 1 or any(name not in _CODINGS for name in codings)
        self._decoder = zlib.decompressobj(_CODINGS[codings[0]]) if codings and not self.failed else None
        self._left = MAX_INFLATED
        self._ended = False
        # A raw deflate stream shows itself by a header that is none, which is read again.
        self._first: bytes | None = b"" if codings == ["deflate"] else None

    @property
    def active(self) -> bool:
        """Whether the bytes that come in are not those that go out."""
        return self._decoder is not None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what *chunk* decodes to, in bounded pieces; nothing once it failed."""
        if self.failed:
            return
        if self._decoder is None:
            yield chunk
            return
        try:
            yield from self._inflate(chunk)
        except zlib.error:
            self.failed = True

    def _inflate(self, chunk: bytes) -> Iterator[bytes]:
        if self._first is not None:
            chunk, self._first = self._first + chunk, None
            if len(chunk) < 2:
                self._first = chunk
                return
            # RFC 1950: the first two bytes of the zlib format are a multiple of 31, and its method is 8.
            if chunk[0] & 0x0F != 8 or int.from_bytes(chunk[:2], "big") % 31:
                self._decoder = zlib.decompressobj(_RAW)
        more = True
        while more:
            if self._ended:
                # RFC 1952, 2.2: a gzip file is a sequence of members, and zeros may fill up its end.
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    return
                self._decoder, self._ended = zlib.decompressobj(_GZIP_OR_ZLIB), False
            decoder = cast("zlib._Decompress", self._decoder)
            piece = decoder.decompress(chunk, _PIECE)
            self._left -= len(piece)
            if self._left < 0:
                self.failed = True
                return
            if piece:
                yield piece
            self._ended = decoder.eof
            chunk = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
            # A full piece may leave some output behind in the decoder although all input is taken.
            more = bool(chunk) or len(piece) == _PIECE
