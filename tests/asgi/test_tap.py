"""The tap keeps references to what passes, bounded, and reads them when asked."""

from __future__ import annotations

import json

import pytest

from asgi_metering.asgi.tap import BLOCK, MAX_WAITING, Tap
from asgi_metering.usage import TokenUsage

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}\n\n'


def delta(text: str) -> bytes:
    """One event of a chat stream."""
    chunk = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def tap() -> Tap:
    """A tap on a stream of events."""
    return Tap("text/event-stream", None, None)


def test_reports_what_passed_so_far_and_again() -> None:
    """A report is nothing before usage passed, and the last usage after, however often it is asked for."""
    watched = tap()
    watched.keep(delta("a"))
    before = watched.report()
    watched.keep(USAGE)
    first, second = watched.report(), watched.report()
    assert before is None or before.usage is None
    assert first is not None
    assert first == second
    assert first.usage is not None
    assert (first.usage.input, first.usage.output) == (9, 2)


def test_text_is_whole_also_when_usage_was_asked_for_in_between() -> None:
    """Asking for usage takes nothing from the text, and asking for the text nothing from the usage."""
    watched = tap()
    for part in ("one ", "two ", "three"):
        watched.keep(delta(part))
        watched.report()
    assert watched.text_reader().text() == "one two three"
    watched.keep(delta(" four"))
    watched.keep(USAGE)
    report = watched.report()
    assert watched.text_reader().text() == "one two three four"
    assert report is not None
    assert report.usage == TokenUsage(input=9, output=2)


def test_digest_reads_blocks_and_leaves_less_alone() -> None:
    """The worker's look reads a block's worth of references and gives them up; less than a block stays unread."""
    watched = tap()
    small = delta("a" * 1_000)
    watched.keep(small)
    watched.digest()
    assert watched._bytes == len(small)
    for _ in range(BLOCK // len(small) + 1):
        watched.keep(small)
    watched.digest()
    assert watched._bytes == 0


def test_what_nobody_reads_is_bounded_and_its_usage_is_found_still() -> None:
    """A stream of many times the bound keeps at most the bound; the usage at its end counts, the text says its gap."""
    watched = tap()
    chunk = delta("x" * 2_000)
    for _ in range(5 * MAX_WAITING // len(chunk)):
        watched.keep(chunk)
        assert watched._bytes <= MAX_WAITING
    watched.keep(USAGE)
    report = watched.report()
    reader = watched.text_reader()
    assert report is not None
    assert report.usage == TokenUsage(input=9, output=2)
    assert reader.gapped


def test_one_huge_chunk_is_not_kept_beyond_the_bound() -> None:
    """A single chunk above the bound is read for usage at once and dropped."""
    watched = tap()
    watched.keep(b"data: " + b"x" * (MAX_WAITING + 1) + b"\n\n")
    assert watched._bytes == 0
    watched.keep(USAGE)
    report = watched.report()
    assert report is not None
    assert report.usage is not None


def burst(chunks: int, size: int = 900) -> int:
    """Characters that a tap hears of a burst that nobody reads."""
    watched = tap()
    chunk = delta(("a word " * size)[:size])
    for _ in range(chunks):
        watched.keep(chunk)
    heard = watched.text_reader().heard()
    return len(heard.text) + heard.more_chars


def test_text_past_the_bound_is_an_estimate_from_bytes() -> None:
    """DESIGN 4: of a burst beyond the bound the text is estimated from the bytes that were dropped, and flagged."""
    for chunks in (1_000, 1_500, 2_500, 6_000):
        assert burst(chunks) == pytest.approx(chunks * 900, rel=0.02)
    watched = tap()
    for _ in range(2_000):
        watched.keep(delta("x" * 900))
    assert watched.text_reader().heard().estimated


def test_more_chunks_never_say_less() -> None:
    """What is heard grows with each chunk, also where a chunk makes the tap drop others."""
    for size, counts in ((9_000, range(110, 135)), (40_000, range(20, 48))):
        heard = [burst(chunks, size) for chunks in counts]
        assert heard == sorted(heard)


def test_one_huge_chunk_is_heard_by_its_size() -> None:
    """A chunk above the bound is read at its beginning, and the rest counts by its bytes; base64 is next to nothing."""
    for text, chars in (("a word " * 400_000, 2_800_000), ("QUJD" * 700_000, 0)):
        watched = tap()
        watched.keep(delta(text))
        heard = watched.text_reader().heard()
        assert len(heard.text) + heard.more_chars == pytest.approx(chars, rel=0.02, abs=10_000)
