"""The tap keeps references to what passes, bounded, and reads them when asked."""

from __future__ import annotations

import json

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
