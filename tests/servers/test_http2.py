"""HTTP/2 behind hypercorn: many calls on one connection, clients that reset one of them, and a `send` that hangs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness.clients import Http2Client
from tests.servers.app import FILE_BYTES
from tests.servers.books import CREDIT, Ended
from tests.servers.house import House, house, key
from tests.servers.test_answers import PAID
from tests.servers.test_disconnects import GONE_LATE, left_midway

pytestmark = pytest.mark.parametrize("each", ["hypercorn"], indirect=True)

Leave = Callable[[Http2Client, int], None]

LEAVE: dict[str, Leave] = {
    "fin": lambda client, _stream: client.leave_fin(),
    "rst": lambda client, _stream: client.leave_rst(),
    "rst_stream": lambda client, stream: client.reset_stream(stream),
}

each_way = pytest.mark.parametrize("way", LEAVE)
"""By FIN, by RST, and by RST_STREAM on a connection that stays."""


def test_charges_each_call_of_one_connection(each: House) -> None:
    """JSON, a stream and a file on one connection, all asked for at once, are charged once each."""
    payer = each.books.grant("h2", 2_000)
    with each.client2() as client:
        streams = [client.send_request(path=path, headers=key(payer)) for path in ("/json", "/words?n=20", "/file")]
        statuses = [client.read_head(stream).status for stream in streams]
        sizes = [len(client.read_body(stream, 2 * FILE_BYTES)) for stream in streams]
        assert set(client.ended.values()) == {"complete"}
    assert statuses == [200, 200, 200]
    assert sizes[2] == FILE_BYTES
    amounts = sorted(ended.amount for ended in each.books.ended(payer, 3))
    assert amounts == [2 * CREDIT, 2 * CREDIT, 20 * CREDIT]


def test_refuses_one_stream_of_a_connection(each: House) -> None:
    """A refused call does not disturb its neighbour on the connection."""
    payer = each.books.grant("h2-neighbour", 10)
    with each.client2() as client:
        refused, paid = (client.send_request(path="/json", headers=key(who)) for who in ("h2-poor", payer))
        heads = [client.read_head(stream) for stream in (refused, paid)]
        client.read_rest(refused)
        client.read_rest(paid)
    assert [head.status for head in heads] == [402, 200]
    assert heads[0].get("content-type") == "application/problem+json"
    assert each.notes("ran", key="h2-poor") == []
    assert each.books.ended(payer) == [PAID]


def test_ends_with_the_trailers(each: House) -> None:
    """A response that announces trailers is over with them (pitfall 36)."""
    payer = each.books.grant("h2-trailers", 10)
    with each.client2() as client:
        stream = client.send_request(path="/raw/trailers/", headers=[*key(payer), ("te", "trailers")])
        assert client.read_head(stream).status == 200
        assert client.read_rest(stream) == b"body"
        assert client.ended[stream] == "complete"
    assert each.books.ended(payer) == [PAID]
    assert each.notes("trailers", announced=True)


@each_way
def test_leave_a_stream(each: House, way: str) -> None:
    """Whoever leaves a stream pays for what had passed, whether the connection ends or only the stream."""
    payer = each.books.grant(f"h2-words-{way}", 100_000)
    client = each.client2()
    stream = client.send_request(path="/words?n=100000&pause_ms=2", headers=key(payer))
    assert len(client.read_body(stream, 400)) == 400
    LEAVE[way](client, stream)
    left_midway(each, payer, 100_000)


@each_way
def test_leave_before_the_response(each: House, way: str) -> None:
    """
    An endpoint that answers JSON to a client that left has completed.

    Its last `send` may never return, which the call does not wait for (pitfall 27).
    """
    payer = each.books.grant(f"h2-before-{way}", 10)
    client = each.client2()
    stream = client.send_request(path=f"/slow?until={payer}", headers=key(payer))
    each.wait_for("waits", until=payer)
    LEAVE[way](client, stream)
    each.let(payer)
    assert each.books.ended(payer) == [PAID]


def _leave_a_loop(served: House, path: str, payer: str, way: str) -> None:
    """Open an endless stream that never looks for its client, and leave it."""
    client = served.client2()
    stream = client.send_request(path=path, headers=key(payer))
    assert len(client.read_body(stream, 10)) == 10
    LEAVE[way](client, stream)


def test_end_a_call_whose_send_never_returns(each: House, tmp_path: Path) -> None:
    """
    A loop whose client left waits in `send` for ever: `max_call_s` ends its call as it is (pitfall 27).

    Its price is fixed and bytes went out, so that it is due.
    """
    with house(each.kind, tmp_path, metering={"max_call_s": 1}, graceful_timeout_s=1) as impatient:
        payer = impatient.books.grant("hung", 10)
        _leave_a_loop(impatient, "/raw/ticks/", payer, "rst")
        assert impatient.books.ended(payer) == [Ended("aborted", "aborted, worker died", "observed", 2 * CREDIT)]
        assert impatient.notes("stopped") == []


@each_way
def test_watch_for_a_client_that_leaves_a_send_that_never_returns(each: House, way: str) -> None:
    """Watched, the same loop is freed from its `send` and ends at once, as a client that left."""
    payer = each.books.grant(f"h2-watched-{way}", 10)
    _leave_a_loop(each, "/watched/raw/ticks/", payer, way)
    assert each.books.ended(payer) == [Ended("client_gone", GONE_LATE, "observed", 2 * CREDIT)]
    each.wait_for("stopped", by="ClientGone", key=payer)
