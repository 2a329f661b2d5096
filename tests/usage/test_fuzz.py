"""Random bodies: reading never raises, never invents, and never depends on how a body was cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.usage import UsageReader
from asgi_metering.usage.dialects import DIALECTS
from asgi_metering.usage.values import AXES, MAX_TOKENS
from tests.usage.vectors import NAMES, body, content_type

MEDIA = st.sampled_from([None, "text/event-stream", "application/json", "application/x-ndjson", "text/plain"])
CODINGS = st.sampled_from([None, None, None, "gzip", "deflate", "br"])
NAMED = st.sampled_from([None, None, *DIALECTS])

# Every word that any dialect looks for, so that random objects reach its deepest branches.
_WORDS = """
    object type usage usageMetadata prompt_tokens completion_tokens total_tokens input_tokens output_tokens
    prompt_tokens_details completion_tokens_details input_tokens_details output_tokens_details input_token_details
    cached_tokens cache_write_tokens reasoning_tokens audio_tokens thinking_tokens cache_read_input_tokens
    cache_creation_input_tokens cache_creation iterations cost cost_in_usd_ticks x_groq choices delta message content
    text thinking refusal tool_calls function arguments function_call audio transcript finish_reason error response
    model id status incomplete_details output summary input content_block stop_reason candidates parts functionCall
    args modelVersion promptTokenCount candidatesTokenCount thoughtsTokenCount promptTokensDetails modality tokenCount
    finishReason promptFeedback blockReason done eval_count prompt_eval_count embeddings
"""
WORDS = st.sampled_from(_WORDS.split())
_MARKS = """
    chat.completion chat.completion.chunk list response response.completed response.failed error message
    message_start message_delta message_stop content_block_delta content_block_start text_delta compaction
    advisor_message AUDIO response.output_text.delta stop length
"""
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 2 * MAX_TOKENS),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(_MARKS.split()),
)
DOCUMENTS = st.recursive(
    VALUES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(WORDS, inner, max_size=6)),
    max_leaves=25,
)


def read(chunks: list[bytes], gap: int, **options: Any) -> UsageReader:
    """Read the chunks with a gap before one of them, looking at the state after each."""
    reader = UsageReader(**options)
    for number, piece in enumerate(chunks):
        if number == gap:
            reader.gap()
        reader.feed(piece)
        check(reader)
    return reader


def check(reader: UsageReader) -> None:
    """Whatever was read is a report within its bounds."""
    report = reader.report()
    assert len(reader.text().encode()) >= 0
    assert reader.text_chars >= 0
    if report is not None and report.usage is not None:
        counts = [getattr(report.usage, axis) for axis in AXES]
        assert all(count is None or 0 <= count <= MAX_TOKENS for count in counts)
        assert report.usage.observed
        assert report.cost is None or 0 <= report.cost < 10**10


def cut(data: bytes, borders: list[int]) -> list[bytes]:
    """Cut the data at the borders."""
    places = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


@pytest.mark.uncounted
@given(st.lists(st.binary(max_size=200), max_size=8), st.integers(-1, 8), MEDIA, CODINGS, NAMED)
@settings(max_examples=200, deadline=None)
def test_read_random_bytes(
    chunks: list[bytes], gap: int, media: str | None, coding: str | None, dialect: str | None
) -> None:
    """Random bytes never raise, with gaps, codings and dialects of any kind."""
    read(chunks, gap, content_type=media, content_encoding=coding, dialect=dialect, keep_text=True)


@pytest.mark.uncounted
@given(st.lists(DOCUMENTS, min_size=1, max_size=6), st.lists(st.integers(0), max_size=5), st.integers(-1, 6), NAMED)
@settings(max_examples=200, deadline=None)
def test_read_random_json(documents: list[Any], borders: list[int], gap: int, dialect: str | None) -> None:
    """Random JSON of the right words never raises; what is reported is within its bounds."""
    lines = [json.dumps(document).encode() for document in documents]
    for media, data in (
        ("text/event-stream", b"".join(b"data: " + line + b"\n\n" for line in lines)),
        ("application/x-ndjson", b"\n".join(lines)),
        ("application/json", lines[0]),
        ("application/json", b"[" + b",".join(lines) + b"]"),
    ):
        read(cut(data, borders), gap, content_type=media, dialect=dialect, keep_text=True)
        whole = read([data], -1, content_type=media, dialect=dialect, keep_text=True)
        parts = read(cut(data, borders), -1, content_type=media, dialect=dialect, keep_text=True)
        assert parts.report() == whole.report()
        assert parts.text() == whole.text()


@given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=3)), max_size=4),
    st.lists(st.integers(0), max_size=4),
    st.integers(-1, 5),
)
@pytest.mark.uncounted
@settings(max_examples=200, deadline=None)
def test_read_damaged_samples(name: str, damage: list[tuple[int, bytes]], borders: list[int], gap: int) -> None:
    """Samples with bytes changed, cut anywhere, with a gap, never raise."""
    data = bytearray(body(name))
    for place, noise in damage:
        start = place % len(data)
        data[start : start + len(noise)] = noise
    read(cut(bytes(data), borders), gap, content_type=content_type(name), keep_text=True)
