"""The reader that keeps the beginning of a refusal."""

from __future__ import annotations

import gzip

import httpx2
import pytest

from asgi_metering.quotas.bodies import MAX_BODY
from asgi_metering.upstream.refused import RefusalReader


@pytest.mark.parametrize("coding", [None, "gzip"])
def test_keep_the_beginning_of_a_body(coding: str | None) -> None:
    """At most so many bytes are kept, without codings and in whatever pieces they come, and usage is still read."""
    plain = b'{"error": 1}' + b" " * (2 * MAX_BODY)
    wire = gzip.compress(plain) if coding else plain
    reader = RefusalReader(httpx2.Response(429, headers=[("a", "b")]), coding, None, 7.0)
    for at in range(0, len(wire), 50_000):
        reader.feed(wire[at : at + 50_000])
    reader.end()
    assert reader.body == plain[:MAX_BODY]
    assert (reader.started_at, list(reader.headers)) == (7.0, [(b"a", b"b")])
    at_once = RefusalReader(httpx2.Response(429), coding, None, 7.0)
    at_once.feed_many([wire[at : at + 50_000] for at in range(0, len(wire), 50_000)])
    assert at_once.body == reader.body
    assert at_once.report() == reader.report()


def test_keep_nothing_of_a_coding_that_is_not_known() -> None:
    """What cannot be decoded is not kept, and nothing raises."""
    reader = RefusalReader(httpx2.Response(402), "br", None, 7.0)
    reader.feed(b"whatever")
    assert reader.body == b""
