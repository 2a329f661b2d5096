"""The tap keeps references to what passes, bounded, and reads them when asked."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from asgi_metering.asgi.exchange import CHECKPOINT_BYTES
from asgi_metering.asgi.tap import BLOCK, MAX_WAITING, PACKED_SLICE, SAMPLE, SLICE, Tap
from asgi_metering.usage import TokenUsage, UsageReader
from asgi_metering.usage.reader import MAX_TEXT, READ_AT_ONCE

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"total_tokens":11}}\n\n'


def delta(text: str) -> bytes:
    """One event of a chat stream."""
    chunk = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": text}}]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def tap() -> Tap:
    """A tap on a stream of events."""
    return Tap("text/event-stream", None, None)


def give(watched: Tap, chunk: bytes, times: int = 1) -> int:
    """Show a tap chunks as an exchange does, and say at each checkpoint what has passed; returns the most it kept."""
    unchecked = most = 0
    for _ in range(times):
        watched.keep(chunk)
        unchecked += len(chunk)
        if unchecked >= CHECKPOINT_BYTES:
            most = max(most, waiting(watched))
            watched.passed(unchecked)
            unchecked = 0
    return max(most, waiting(watched))


def waiting(watched: Tap) -> int:
    """Bytes that a tap has not read yet."""
    return sum(map(len, watched._chunks))


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


def test_digest_reads_beyond_a_block_and_leaves_less_alone() -> None:
    """The worker's look reads the oldest references beyond a block and gives them up; less than one stays unread."""
    watched = tap()
    numbered = [delta(f"{number:04} " + "a" * 1_000) for number in range(BLOCK // 1_000 + 1)]
    watched.keep(numbered[0])
    watched.digest()
    assert waiting(watched) == len(numbered[0])
    for chunk in numbered[1:]:
        watched.keep(chunk)
    while watched.digest():
        pass
    assert BLOCK - len(numbered[0]) <= waiting(watched) < BLOCK
    watched.keep(USAGE)
    assert (
        watched.text_reader().text()
        == "".join(f"{number:04} " + "a" * 1_000 for number in range(len(numbered)))[:MAX_TEXT]
    )
    assert waiting(watched) == 0


def test_what_nobody_reads_is_bounded_and_its_usage_is_found_still() -> None:
    """
    A stream of many times the bound keeps at most the bound and what passes between two checkpoints.

    The usage at its end counts, and the text says its gap.
    """
    watched = tap()
    chunk = delta("x" * 2_000)
    assert give(watched, chunk, 5 * MAX_WAITING // len(chunk)) <= MAX_WAITING + CHECKPOINT_BYTES + len(chunk)
    watched.keep(USAGE)
    report = watched.report()
    reader = watched.text_reader()
    assert report is not None
    assert report.usage == TokenUsage(input=9, output=2)
    assert reader.gapped


def test_one_huge_chunk_is_not_kept_beyond_the_bound() -> None:
    """A single chunk above the bound is read for usage at once and dropped."""
    watched = tap()
    give(watched, b"data: " + b"x" * (MAX_WAITING + 1) + b"\n\n")
    assert waiting(watched) == 0
    watched.keep(USAGE)
    report = watched.report()
    assert report is not None
    assert report.usage is not None


def burst(chunks: int, size: int = 900) -> int:
    """Characters that a tap hears of a burst that nobody reads."""
    watched = tap()
    give(watched, delta(("a word " * size)[:size]), chunks)
    heard = watched.text_reader().heard()
    return len(heard.text) + heard.more_chars


def test_text_past_the_bound_is_an_estimate_from_bytes() -> None:
    """DESIGN 4: of a burst beyond the bound the text is estimated from the bytes that were dropped, and flagged."""
    for chunks in (1_000, 1_500, 2_500, 6_000):
        assert burst(chunks) == pytest.approx(chunks * 900, rel=0.02)
    watched = tap()
    give(watched, delta("x" * 900), 2_000)
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
        give(watched, delta(text))
        heard = watched.text_reader().heard()
        assert len(heard.text) + heard.more_chars == pytest.approx(chars, rel=0.02, abs=10_000)


def test_keeps_a_chunk_without_running_any_code_of_ours() -> None:
    """What a chunk costs on the path is one append to a list, and the list is the same for good (DESIGN 9)."""
    watched = tap()
    keep = watched.keep
    assert keep.__self__ is watched._chunks  # type: ignore[attr-defined]
    give(watched, delta("x" * 2_000), 2 * MAX_WAITING // 2_000)
    watched.text_reader()
    assert watched.keep is keep
    keep(USAGE)
    report = watched.report()
    assert report is not None
    assert report.usage == TokenUsage(input=9, output=2)


def test_drops_nothing_for_what_was_read_before_its_checkpoint() -> None:
    """What was read between two checkpoints waits no longer, though the next one counts it: nothing is dropped yet."""
    watched = tap()
    chunk = delta("x" * 2_000)
    times = CHECKPOINT_BYTES // len(chunk) + 1
    for _ in range(times):
        watched.keep(chunk)
    watched.text_reader()
    watched.passed(times * len(chunk))
    give(watched, chunk, 3 * times)
    assert MAX_WAITING - CHECKPOINT_BYTES < waiting(watched) < MAX_WAITING
    assert not watched.text_reader().gapped


def test_reads_chunks_of_any_sizes_together() -> None:
    """However large or small the chunks are, empty ones too, all of them are read, once, in order."""
    for sizes in ([0, 0], [1] * 300, [0, 3, 0, READ_AT_ONCE, 1, 2 * READ_AT_ONCE, 5]):
        watched = tap()
        data = delta("first") + delta("w" * sum(sizes)) + USAGE
        at = 0
        for size in sizes:
            watched.keep(data[at : at + size])
            at += size
            watched.report()
        watched.keep(data[at:])
        report = watched.report()
        assert report is not None
        assert (report.usage, report.model) == (TokenUsage(input=9, output=2), "m")
        assert watched.text_reader().text() == "first" + "w" * sum(sizes)


@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_gives_the_loop_turns_while_much_text_is_read(encoding: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits at the end of a stream that broke is read in slices, each a turn of the loop, and says the same."""
    chunk = delta(" word" * 40)
    count = 400_000 // len(chunk)
    packed = gzip.compress(chunk * count, 1)
    sent = [chunk] * count if encoding is None else [packed[at : at + 512] for at in range(0, len(packed), 512)]
    one, other = (Tap("text/event-stream", encoding, None) for _ in range(2))
    for each in sent:
        one.keep(each)
        other.keep(each)
    expected = other.text_reader().heard()
    read: list[int] = []
    feed = UsageReader._feed

    def watch(reader: UsageReader, data: bytes) -> None:
        if reader is one._for_text:
            read[-1] += len(data)
        feed(reader, data)

    async def play() -> None:
        reading = asyncio.create_task(one.read_on())
        while not reading.done():
            read.append(0)
            await asyncio.sleep(0)

    monkeypatch.setattr(UsageReader, "_feed", watch)
    asyncio.run(play())
    most = SLICE if encoding is None else PACKED_SLICE
    assert max(read) <= most
    assert sum(read) >= sum(map(len, sent)) - most
    assert one.text_reader().heard() == expected


def test_waits_for_no_stream_that_goes_on() -> None:
    """What comes while the text is read is not waited for: a stream that never rests ends nobody's patience."""
    watched = tap()
    give(watched, delta("x" * 500), 500)

    async def play() -> int:
        reading, more = asyncio.create_task(watched.read_on()), 0
        while not reading.done():
            give(watched, delta("x" * 500), 200)
            await asyncio.sleep(0)
            more += 1
        return more

    assert asyncio.run(play()) < 50


def test_digests_a_slice_at_a_time() -> None:
    """What waits beyond a block is read in slices, and it is told while more of it waits (pitfall 33)."""
    watched = tap()
    give(watched, delta("x" * 500), MAX_WAITING * 3 // 4 // len(delta("x" * 500)))
    before = waiting(watched)
    assert watched.digest()
    assert SLICE // 2 < before - waiting(watched) <= SLICE
    while watched.digest():
        pass
    assert BLOCK - 1_000 <= waiting(watched) < BLOCK


def test_looks_at_each_byte_once_however_often_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats may ask for usage and text after every chunk: no reader is fed a byte twice."""
    fed: dict[int, int] = {}
    feed = UsageReader._feed

    def counted(reader: UsageReader, chunk: bytes) -> None:
        fed[id(reader)] = fed.get(id(reader), 0) + len(chunk)
        feed(reader, chunk)

    monkeypatch.setattr(UsageReader, "_feed", counted)
    watched = tap()
    chunk = delta("a")
    for number in range(300):
        watched.keep(chunk)
        watched.report()
        watched.digest()
        if number % 7 == 0:
            watched.text_reader()
    watched.text_reader()
    assert list(fed.values()) == [300 * len(chunk)] * 2


def test_keeps_few_samples_of_a_long_burst() -> None:
    """Of what is dropped a sample is kept the first time, the second, the fourth and so on; only asking reads it."""
    watched = tap()
    chunk = delta("x" * 2_000)
    give(watched, chunk, 8 * MAX_WAITING // len(chunk))
    assert watched._for_text is None
    sampled = sum(len(sample) for sample, _ in watched._dropped)
    assert 0 < sampled <= 4 * (SAMPLE + len(chunk))
    reader = watched.text_reader()
    heard = reader.heard()
    assert reader._read <= sampled + MAX_WAITING + CHECKPOINT_BYTES
    assert len(heard.text) + heard.more_chars == pytest.approx(8 * MAX_WAITING * 2_000 / len(chunk), rel=0.02)
    give(watched, chunk, 8 * MAX_WAITING // len(chunk))
    again = watched.text_reader().heard()
    assert len(again.text) + again.more_chars == pytest.approx(16 * MAX_WAITING * 2_000 / len(chunk), rel=0.02)
