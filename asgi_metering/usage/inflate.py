"""
Undoing a content encoding piece by piece, within bounds.

Knows gzip and deflate, and Brotli and Zstandard where a decoder for them is installed (the ``compression`` extra; from
Python 3.14 on Zstandard is in the standard library). Never knows what the bytes mean. Whatever it cannot follow it
fails, and never guesses.

Sources: RFC 9110, 8.4.1 ("x-gzip" is "gzip"; "deflate" is the zlib format, and some servers send it raw), RFC 7932
(``br``), RFC 8878 and 9659 (``zstd``, whose window is at most 8 MiB in HTTP).
"""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Final, Protocol

__all__ = ["MAX_INFLATED", "Inflate", "codings_of"]

MAX_INFLATED: Final = 64 << 20
"""Bytes that one body may inflate to: no real answer is larger, a bomb is stopped here."""

_PIECE: Final = 1 << 16
"""Bytes inflated at a time, so that what is inflated never has to be kept at once."""

_TAKEN: Final = 1 << 13
"""Bytes that a decoder is given at a time: what it leaves of them, behind each member and each piece, is copied."""

_GZIP_OR_ZLIB: Final = zlib.MAX_WBITS | 32
_RAW: Final = -zlib.MAX_WBITS

ZSTD_WINDOW_LOG: Final = 23
"""2**23 bytes, the largest window that a sender may ask a receiver in HTTP to keep (RFC 9659)."""


class _Decoder(Protocol):
    """Decodes one member, frame or stream."""

    def decode(self, data: bytes) -> Iterator[bytes]:
        """Yield what *data* stands for, in pieces of about `_PIECE`."""
        ...

    @property
    def rest(self) -> bytes | None:
        """What stood behind the end; None before it."""
        ...

    @property
    def error(self) -> type[Exception]:
        """What `decode` raises where the data is broken."""
        ...


class _Zlib:
    __slots__ = ("_zlib",)

    error: Final = zlib.error

    def __init__(self, bits: int = _GZIP_OR_ZLIB) -> None:
        self._zlib = zlib.decompressobj(bits)

    def decode(self, data: bytes) -> Iterator[bytes]:
        while True:
            piece = self._zlib.decompress(data, _PIECE)
            if piece:
                yield piece
            data = self._zlib.unconsumed_tail
            # A full piece may leave some output behind in the decoder although all input is taken.
            if self._zlib.eof or (not data and len(piece) < _PIECE):
                return

    @property
    def rest(self) -> bytes | None:
        return self._zlib.unused_data if self._zlib.eof else None


class _RawOrZlib:
    """A raw deflate stream shows itself by a header that is none."""

    __slots__ = ("_first", "_zlib")

    error: Final = zlib.error

    def __init__(self) -> None:
        self._first = b""
        self._zlib: _Zlib | None = None

    def decode(self, data: bytes) -> Iterator[bytes]:
        if self._zlib is None:
            self._first += data
            if len(self._first) < 2:
                return
            # RFC 1950: the first two bytes of the zlib format are a multiple of 31, and its method is 8.
            plain = self._first[0] & 0x0F == 8 and int.from_bytes(self._first[:2], "big") % 31 == 0
            self._zlib, data = _Zlib(_GZIP_OR_ZLIB if plain else _RAW), self._first
        yield from self._zlib.decode(data)

    @property
    def rest(self) -> bytes | None:
        return self._zlib.rest if self._zlib is not None else None


class _Brotli:
    __slots__ = ("_brotli", "error")

    def __init__(self, module: Any) -> None:
        self._brotli = module.Decompressor()
        self.error: type[Exception] = module.error

    def decode(self, data: bytes) -> Iterator[bytes]:
        piece = self._brotli.process(data, output_buffer_limit=_PIECE)
        # What it holds back although all input is taken it does not tell.
        while piece:
            yield piece
            piece = self._brotli.process(b"", output_buffer_limit=_PIECE)

    @property
    def rest(self) -> None:
        """Nothing follows a stream of Brotli: the decoder itself refuses it."""


class _Zstd:
    __slots__ = ("_zstd", "error")

    def __init__(self, module: Any) -> None:
        self.error: type[Exception] = module.ZstdError
        options = {module.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
        self._zstd = module.ZstdDecompressor(options=options)

    def decode(self, data: bytes) -> Iterator[bytes]:
        piece = self._zstd.decompress(data, _PIECE)
        while piece:
            yield piece
            done = self._zstd.eof or self._zstd.needs_input
            piece = b"" if done else self._zstd.decompress(b"", _PIECE)

    @property
    def rest(self) -> bytes | None:
        return self._zstd.unused_data if self._zstd.eof else None


def _first_of(*names: str) -> Any:
    """Return the first of these modules that is there, or None."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    return None


def _brotli() -> Callable[[], _Decoder] | None:
    module = _first_of("brotli")
    # Older ones have no bound for what they give out at once.
    able = module is not None and hasattr(module.Decompressor, "can_accept_more_data")
    return (lambda: _Brotli(module)) if able else None


def _zstd() -> Callable[[], _Decoder] | None:
    module = _first_of("compression.zstd", "backports.zstd")
    return (lambda: _Zstd(module)) if module is not None else None


_CODINGS: Final[dict[str, Callable[[], Callable[[], _Decoder] | None]]] = {
    "gzip": lambda: _Zlib,
    "x-gzip": lambda: _Zlib,
    "deflate": lambda: _RawOrZlib,
    "br": _brotli,
    "zstd": _zstd,
}
"""By the name of a coding, what finds the decoder of it: nothing is imported before a body needs it."""


_NO_CODINGS: Final = frozenset(("", "identity", "none", "utf-8", "utf8"))
"""
Words that undo nothing. The last three are no codings at all, and are sent: ``none`` keeps the compression of some
Node.js servers off a stream, and others say a charset here.
"""


def codings_of(content_encoding: str) -> list[str]:
    """The codings, in lower case, that *content_encoding* says a body is in; empty for one that is as it is."""
    names = (name.strip().lower() for name in content_encoding.split(","))
    return [name for name in names if name not in _NO_CODINGS]


class Inflate:
    """
    Decodes one body. Once `failed`, it stays so: a compressed body cannot be entered in the middle.

    Args:
        content_encoding: The header field's value; several codings, an unknown one, or one without a decoder, fail at
            once.

    Attributes:
        failed: Nothing more can be decoded.
        coding: The codings, where nobody here can decode them; None otherwise.
    """

    __slots__ = ("_decoder", "_error", "_left", "_make", "coding", "failed")

    def __init__(self, content_encoding: str | None) -> None:
        codings = codings_of(content_encoding or "")
        find = _CODINGS.get(codings[0]) if len(codings) == 1 else None
        self._make = find() if find is not None else None
        self.failed = bool(codings) and self._make is None
        self.coding = ", ".join(codings) if self.failed else None
        self._decoder: _Decoder | None = self._make() if self._make is not None else None
        self._error: type[Exception] = zlib.error if self._decoder is None else self._decoder.error
        self._left = MAX_INFLATED

    @property
    def active(self) -> bool:
        """Whether the bytes that come in are not those that go out."""
        return self._make is not None

    @property
    def expanded(self) -> int:
        """Bytes of a coded body that went out."""
        return MAX_INFLATED - self._left

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield what *chunk* decodes to, in bounded pieces; nothing once it failed."""
        if self.failed:
            return
        if self._make is None:
            yield chunk
            return
        try:
            for at in range(0, len(chunk), _TAKEN):
                yield from self._inflate(chunk[at : at + _TAKEN], self._make)
        except self._error:
            self.failed = True

    def _inflate(self, chunk: bytes, make: Callable[[], _Decoder]) -> Iterator[bytes]:
        while chunk and not self.failed:
            if self._decoder is None:
                # RFC 1952, 2.2, and RFC 8878, 3.1: members follow one another; zeros may fill up the end of a file.
                chunk = chunk.lstrip(b"\0")
                if not chunk:
                    return
                self._decoder = make()
            for piece in self._decoder.decode(chunk):
                self._left -= len(piece)
                if self._left < 0:
                    self.failed = True
                    return
                yield piece
            rest = self._decoder.rest
            if rest is None:
                return
            self._decoder, chunk = None, rest
