"""Clients of real servers that do not stay: each way to leave, what the server shows of it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.harness.clients import HttpClient
from tests.harness.waiting import wait_until
from tests.servers.app import HOLD
from tests.servers.books import CREDIT, Ended
from tests.servers.house import House, key
from tests.servers.test_answers import PAID

LEAVE = {"fin": HttpClient.leave_fin, "rst": HttpClient.leave_rst}

GONE_LATE = "client gone after the first byte"
GONE_EARLY = "client gone before the first byte"

each_way = pytest.mark.parametrize("leave", LEAVE.values(), ids=LEAVE)
"""By FIN, and by RST."""

Leave = Callable[[HttpClient], None]


def left_midway(each: House, payer: str, full: int) -> Ended:
    """How the one call of *payer* ended: the client was seen to leave, and got less than *full* credits' worth."""
    (ended,) = each.books.ended(payer)
    assert (ended.outcome, ended.reason, ended.basis) == ("client_gone", GONE_LATE, "observed")
    assert 0 < ended.amount < full * CREDIT
    return ended


@each_way
def test_leave_a_stream_between_two_events(each: House, leave: Leave) -> None:
    """Whoever leaves a stream pays for the words that had passed, and not for the others."""
    payer = each.books.grant(f"between-{leave.__name__}", HOLD)
    client = each.open("/words?n=100000&pause_ms=2", payer)
    assert len(client.read_events(3)) == 3
    leave(client)
    assert left_midway(each, payer, HOLD).amount >= 3 * CREDIT


@each_way
def test_leave_a_stream_that_is_finished_for_nobody(each: House, leave: Leave) -> None:
    """Of a route that drains, the handler runs to its usage on every server, and all of that is charged."""
    payer = each.books.grant(f"drained-{leave.__name__}", HOLD)
    client = each.open("/drained?n=200&pause_ms=2", payer)
    assert len(client.read_events(3)) == 3
    leave(client)
    assert each.books.ended(payer) == [Ended("client_gone", "completed, usage reported", "usage", 200 * CREDIT)]


@each_way
def test_leave_a_stream_inside_an_event(each: House, leave: Leave) -> None:
    """Two words and half an event have passed when the client leaves: two tokens."""
    payer = each.books.grant(f"inside-{leave.__name__}", HOLD)
    client = each.open("/torn", payer)
    client.read_events(2)
    client.read_body(10)
    leave(client)
    assert left_midway(each, payer, HOLD).amount == 2 * CREDIT


@each_way
def test_leave_before_the_response(each: House, leave: Leave) -> None:
    """An endpoint that answers JSON never learns that its client left, on any server: the call has completed."""
    payer = each.books.grant(f"before-{leave.__name__}", 10)
    client = each.client()
    client.send_request(path=f"/slow?until={payer}", headers=key(payer))
    each.wait_for("waits", until=payer)
    leave(client)
    each.let(payer)
    assert each.books.ended(payer) == [PAID]


def test_leave_before_the_response_of_what_reports_usage(each: House) -> None:
    """What the endpoint reported before its client left is charged as reported."""
    payer = each.books.grant("told", HOLD)
    client = each.client()
    client.send_request(path=f"/told?until={payer}", headers=key(payer))
    each.wait_for("waits", until=payer)
    client.leave_rst()
    each.let(payer)
    assert each.books.ended(payer) == [Ended("completed", "completed, usage reported", "usage", 7 * CREDIT)]


@each_way
def test_leave_in_the_request_body(each: House, leave: Leave) -> None:
    """
    Half a body and a hang-up cost nothing, although the framework answers 500 to nobody.

    daphne buffers a body whole, so the endpoint has not been called.
    """
    payer = each.books.grant(f"half-{leave.__name__}", 10)
    client = each.client()
    client.send_request("POST", "/upload", headers=key(payer), body=b"x" * 10_000, stop_after=4_000)
    if each.kind == "daphne":
        leave(client)
        each.ask("/desk?payer=nobody", None)
        assert each.books.ended(payer, 0) == []
        assert each.notes("uploads", key=payer) == []
        return
    each.wait_for("uploads", key=payer)
    leave(client)
    assert each.books.ended(payer) == [Ended("client_gone", GONE_EARLY, "none", 0)]


@each_way
def test_leave_after_the_last_byte(each: House, leave: Leave) -> None:
    """A connection that is closed after the response takes nothing back: the call has completed."""
    payer = each.books.grant(f"after-{leave.__name__}", HOLD)
    client = each.open("/words?n=5", payer)
    client.read_rest()
    assert client.ended == "complete"
    leave(client)
    assert each.books.ended(payer) == [Ended("completed", "completed, usage reported", "usage", 5 * CREDIT)]


def _stalled(each: House, payer: str) -> bool:
    """Whether a burst has begun and makes no progress between two looks, or has been swallowed whole."""
    before = len(each.notes("burst", key=payer))
    each.books.holds(payer)
    return 0 < before == len(each.notes("burst", key=payer))


def test_stall_and_leave_a_burst_that_never_waits(each: House) -> None:
    """
    A client that stops reading, and then leaves, ends a generator that never waits (pitfall 26).

    daphne shows no back pressure: it had taken all of the burst, which had completed before its client left.
    """
    payer = each.books.grant("burst", 10_000)
    client = each.open("/burst?n=3000", payer, receive_buffer=4_096)
    client.read_body(10)
    wait_until(lambda: _stalled(each, payer))
    if each.kind == "daphne":
        each.books.ended(payer)
        client.leave_fin()
        assert each.books.ended(payer) == [Ended("completed", "completed, usage reported", "usage", 3_000 * CREDIT)]
        return
    client.leave_fin()
    left_midway(each, payer, 3_000)


def test_leave_a_loop_that_never_looks(each: House) -> None:
    """A loop that never asks for the disconnect runs on, sends the rest to nobody, and has completed."""
    payer = each.books.grant("loop", 10)
    client = each.open("/raw/burst/?n=400", payer, receive_buffer=4_096)
    client.read_body(10)
    client.leave_rst()
    assert each.books.ended(payer) == [PAID]


@each_way
def test_watch_for_a_client_that_leaves_a_loop_that_never_looks(each: House, leave: Leave) -> None:
    """Watched, such a loop is stopped by an OSError from its `send`, and the client was seen to leave (pitfall 28)."""
    payer = each.books.grant(f"watched-{leave.__name__}", 10)
    client = each.open("/watched/raw/ticks/", payer)
    client.read_body(10)
    leave(client)
    assert each.books.ended(payer) == [Ended("client_gone", GONE_LATE, "observed", 2 * CREDIT)]
    each.wait_for("stopped", by="ClientGone", key=payer)


@each_way
def test_watch_a_stream_whose_framework_looks_too(each: House, leave: Leave) -> None:
    """Watched, Starlette still hears itself that its client left: its generator ends although nothing is sent."""
    payer = each.books.grant(f"both-{leave.__name__}", HOLD)
    client = each.open("/watched/torn", payer)
    client.read_events(2)
    each.wait_for("torn", key=payer)
    leave(client)
    assert left_midway(each, payer, HOLD).amount == 2 * CREDIT
