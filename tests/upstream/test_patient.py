"""What passes an upstream client is read when somebody asks for it, and says the same."""

from __future__ import annotations

import gzip
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from asgi_metering.upstream.patient import MAX_UNHEARD, READ_AT_ONCE, PatientReader
from asgi_metering.usage import TokenUsage, UsageReader, dialects, register_dialect
from asgi_metering.usage.notes import Json, Notes
from tests.usage import vectors
from tests.usage.test_openai import delta, sse

USAGE = sse({"object": "chat.completion.chunk", "usage": {"prompt_tokens": 9, "completion_tokens": 2}})


def told(reader: UsageReader) -> object:
    """All that a reader tells."""
    return reader.report(), reader.heard(), reader.text(), reader.text_chars, reader.known, reader.streams


@pytest.mark.parametrize("name", vectors.NAMES)
@pytest.mark.parametrize("wants_text", [False, True])
def test_tell_what_a_reader_tells_that_reads_at_once(name: str, wants_text: bool) -> None:
    """Of every body a patient reader tells what one tells that reads each chunk as it comes, at any time (S1.46)."""
    data, media = vectors.body(name), vectors.content_type(name)
    eager, patient = UsageReader(media), PatientReader(media)
    if wants_text:
        eager.keep_text()
        patient.keep_text()
    assert told(patient) == told(eager)
    third = len(data) // 3 + 1
    for at in range(0, len(data), third):
        eager.feed(data[at : at + third])
        patient.feed(data[at : at + third])
        assert told(patient) == told(eager)
    eager.forget_text()
    patient.forget_text()
    assert told(patient) == told(eager)


@pytest.mark.parametrize("wants_text", [False, True])
def test_take_many_chunks_as_one_after_the_other(wants_text: bool) -> None:
    """Of a stream of events as long as providers send them the same is told, however many come at a time."""
    more = {"system_fingerprint": "fp_0123456789abcdef", "service_tier": "default", "obfuscation": "x" * 40}
    chunks = [sse({**delta(content=f"word {number}"), **more}) for number in range(400)]
    chunks.append(USAGE)
    eager, patient, waiting = UsageReader("text/event-stream"), PatientReader(), PatientReader()
    for reader in (eager, patient, waiting) if wants_text else ():
        reader.keep_text()
    for chunk in chunks:
        eager.feed(chunk)
        patient.feed(chunk)
    waiting.feed_many(chunks)
    assert told(patient) == told(waiting) == told(eager)
    assert bool(eager.text()) is wants_text


def test_read_no_text_that_nobody_asks_for() -> None:
    """A stream that reports its usage within the bound is never read for its text (DESIGN 9)."""
    reader = PatientReader("text/event-stream")
    reader.keep_text()
    for _ in range(READ_AT_ONCE // 50):
        reader.feed(sse(delta(content="word ")))
    reader.feed(USAGE)
    report = reader.report()
    assert report is not None
    assert report.usage == TokenUsage(9, 2)
    assert reader._words is None
    reader.forget_text()
    assert not reader._unheard


def test_keep_a_bounded_part_whose_text_was_not_read() -> None:
    """Beyond the bound the oldest text is read as more comes, and none of it is lost."""
    reader = PatientReader("text/event-stream")
    reader.keep_text()
    count, most = 3 * MAX_UNHEARD // 1_000, 0
    for number in range(count):
        reader.feed(sse(delta(content=f"{number:05}" + "x" * 200)))
        most = max(most, sum(map(len, (*reader._waiting, *reader._unheard))))
    assert most <= MAX_UNHEARD + 2 * READ_AT_ONCE
    assert reader._words is not None
    assert reader.text_chars == 205 * count
    assert reader.text().startswith("00000x")


def test_keep_of_a_compressed_body_as_much_as_it_expands_to() -> None:
    """What is kept unread is bounded by what it will be to read, which may be a thousand times what came (S1.39)."""
    chunks = [sse(delta(content=f"{number:05}" + "x" * 2_000)) for number in range(400)]
    packed = gzip.compress(b"".join(chunks))
    assert len(packed) < MAX_UNHEARD // 10
    reader = PatientReader("text/event-stream", "gzip")
    reader.keep_text()
    for start in range(0, len(packed), 100):
        reader.feed(packed[start : start + 100])
    reader.report()
    assert reader._words is not None
    assert reader._words.text_chars > 2_005 * 400 - MAX_UNHEARD
    assert reader.text_chars == 2_005 * 400


def test_count_a_body_that_breaks_by_its_chunks() -> None:
    """Where a compressed body breaks, what cannot be read counts by its bytes, from the chunk on that it breaks in."""
    data = gzip.compress(sse(*[delta(content="a word ")] * 40))
    chunks = [data[:60], data[60:90], b"no gzip" * 20, b"and more" * 20]
    eager, patient = UsageReader("text/event-stream", "gzip"), PatientReader("text/event-stream", "gzip")
    for reader in (eager, patient):
        reader.keep_text()
        for chunk in chunks:
            reader.feed(chunk)
    assert told(patient) == told(eager)
    assert eager.undecodable


def test_take_the_place_of_dropped_bytes() -> None:
    """A gap is a gap to whoever reads for usage, and to whoever reads for text."""
    eager, patient = UsageReader("text/event-stream"), PatientReader("text/event-stream")
    for reader in (eager, patient):
        reader.keep_text()
        reader.feed(sse(delta(content="one ")))
        reader.gap(100)
        reader.feed(sse(delta(content="two")) + USAGE)
    assert told(patient) == told(eager)


def test_several_threads_ask_while_one_feeds() -> None:
    """Whoever asks meanwhile takes nothing from what is read: heartbeats look at what a thread's client receives."""
    reader = PatientReader("text/event-stream")
    reader.keep_text()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            reader.report()
            reader.heard()

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(300):
        reader.feed(sse(delta(content="word ")))
    reader.feed(USAGE)
    over.set()
    asking.join(30)
    report = reader.report()
    assert report is not None
    assert report.usage == TokenUsage(9, 2)
    assert reader.text() == "word " * 300


@pytest.fixture
def _failing() -> Iterator[None]:
    """A dialect of the application's own, which raises."""
    before = dict(dialects.DIALECTS)

    def fail(notes: Notes, payload: Json) -> None:
        raise RuntimeError("broken dialect")

    register_dialect(replace(dialects.DIALECTS["openai-chat"], name="broken", note=fail))
    yield
    dialects.DIALECTS.clear()
    dialects.DIALECTS.update(before)
    dialects._SIEVES[:] = [dialects.Sieves(before)]


@pytest.mark.usefixtures("_failing")
def test_reader_that_fails_costs_the_observation_alone(caplog: pytest.LogCaptureFixture) -> None:
    """What a dialect raises is logged once, and whoever asks hears that nothing is believed (S1.39, S3.21)."""
    reader = PatientReader("text/event-stream", None, "broken")
    reader.keep_text()
    with caplog.at_level(logging.ERROR, logger="asgi_metering.upstream"):
        for _ in range(3):
            reader.feed(USAGE)
            report = reader.report()
            assert report is not None
            assert (report.usage, report.problems) == (None, ("unreadable",))
    assert reader.text() == ""
    assert [record.getMessage() for record in caplog.records] == ["An answer is not fully observed: its reader failed."]
