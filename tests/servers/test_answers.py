"""What clients of real servers get, and what it costs them, as long as everybody stays to the end."""

from __future__ import annotations

import json

from tests.harness.clients import HttpClient, ResponseHead
from tests.harness.servers import ThreadServer, serve_in_thread
from tests.servers.app import FILE_BYTES, app
from tests.servers.books import CREDIT, Ended
from tests.servers.house import House, key

PAID = Ended("completed", "completed, usage reported", "usage", 2 * CREDIT)
"""A call of two credits that came to its end."""


def problem(answer: tuple[ResponseHead, bytes]) -> tuple[int, str, dict[str, str]]:
    """Status and code of a refusal, and the fields that only a gate sends; it is whole, and nobody may keep it."""
    head, body = answer
    assert head.get("content-type") == "application/problem+json"
    assert head.get("content-length") == str(len(body))
    assert head.get("cache-control") == "no-store"
    gate = ("www-authenticate", "retry-after", "ratelimit-policy", "ratelimit", "metering-available")
    found = json.loads(body)
    assert found["status"] == head.status
    return head.status, found["code"], {name: value for name, value in head.headers if name in gate}


def test_charges_a_fixed_price_for_json(each: House) -> None:
    """JSON costs its two credits once, and its head says what is left after them."""
    payer = each.books.grant("json", 10)
    head, body = each.ask("/json", payer)
    assert (head.status, head.get("metering-available")) == (200, '"8";unit="credits"')
    assert json.loads(body)["pid"] in each.server.worker_pids()
    assert each.books.ended(payer) == [PAID]


def test_charges_a_stream_by_the_usage_at_its_end(each: House) -> None:
    """A stream of 20 words costs the 20 tokens of its usage chunk, and every byte arrives (pitfall 22)."""
    payer = each.books.grant("words", 1_001)
    head, body = each.ask("/words?n=20", payer)
    assert (head.status, head.get("metering-available")) == (200, '"1";unit="credits"')
    assert body.count(b'"delta"') == 20
    assert body.endswith(b"data: [DONE]\n\n")
    assert each.books.ended(payer) == [Ended("completed", "completed, usage reported", "usage", 20 * CREDIT)]


def test_charges_a_file(each: House) -> None:
    """A file costs its price once, also where granian sends it by its path (pitfalls 22 and 36)."""
    payer = each.books.grant("file", 10)
    head, body = each.ask("/file", payer)
    assert (head.status, len(body)) == (200, FILE_BYTES)
    assert each.notes("file", by_path=each.kind == "granian")
    assert each.books.ended(payer) == [PAID]


def test_refuses_who_cannot_pay_before_the_first_byte(each: House) -> None:
    """An empty account gets 402 for JSON and for a stream; nothing ran, and nothing is in the books."""
    each.books.grant("spent", 2)
    each.ask("/json", "spent")
    each.books.ended("spent")
    ran = len(each.notes("ran", key="spent"))
    assert problem(each.ask("/json", "spent")) == (402, "insufficient_credits", {})
    assert problem(each.ask("/words?n=20", "spent")) == (402, "insufficient_credits", {})
    assert problem(each.ask("/raw/trailers/", "spent")) == (402, "insufficient_credits", {})
    assert len(each.notes("ran", key="spent")) == ran == 1
    assert each.books.ended("spent") == [PAID]


def test_refuses_nobody_before_the_first_byte(each: House) -> None:
    """Nobody gets 401 with a challenge, and the endpoint did not run."""
    assert problem(each.ask("/json", None)) == (401, "unauthenticated", {"www-authenticate": "Bearer"})
    assert each.notes("ran", key=None) == []


def test_refuses_who_is_too_fast_before_the_first_byte(each: House) -> None:
    """The third of two calls an hour gets 429 with the limit's fields; it did not run and cost nothing."""
    payer = each.books.grant("fast", 10)
    limits = [each.ask("/limited", payer)[0].get("ratelimit") for _ in range(2)]
    status, code, fields = problem(each.ask("/limited", payer))
    wait_s = fields["retry-after"]
    assert [limit.split(";t=")[0] for limit in limits if limit] == ['"2-per-hour";r=1', '"2-per-hour";r=0']
    assert (status, code) == (429, "rate_limit")
    assert 0 < int(wait_s) <= 3_600
    assert fields == {
        "retry-after": wait_s,
        "ratelimit-policy": '"2-per-hour";q=2;w=3600',
        "ratelimit": f'"2-per-hour";r=0;t={wait_s}',
    }
    assert len(each.notes("ran", path="/limited", key=payer)) == 2
    assert each.books.ended(payer, 2) == [PAID, PAID]


def test_asks_nothing_for_head_and_options(each: House) -> None:
    """HEAD and OPTIONS of a priced route are free, need nobody, and leave no trace (pitfall 12)."""
    payer = each.books.grant("free", 10)
    for caller in (payer, None):
        for method in ("HEAD", "OPTIONS"):
            head, _ = each.ask("/json", caller, method)
            assert head.status == 200
            assert head.get("metering-available") is None
    assert each.books.ended(payer, 0) == []


def test_charges_each_of_two_calls_on_one_connection(each: House) -> None:
    """A connection that is kept alive carries two calls, and each is charged once."""
    payer = each.books.grant("twice", 10)
    with each.client() as client:
        for _ in range(2):
            client.send_request(path="/json", headers=key(payer))
            assert client.read_head().status == 200
            client.read_rest()
            client.next_cycle()
    assert each.books.ended(payer, 2) == [PAID, PAID]


def test_needs_no_file_behind_a_real_server() -> None:
    """In memory the same server charges JSON and a stream, refuses who cannot pay, and its books balance."""
    with serve_in_thread(app) as server:
        _desk(server, "ann", "&credits=1002")
        statuses = [_ask(server, path, payer)[0] for payer in ("ann", "bob") for path in ("/json", "/words?n=3")]
    # The first server has drained, and the memory is this process's: a second one reads what it has booked.
    with serve_in_thread(app) as server:
        found = _desk(server, "ann")
    assert statuses == [200, 200, 402, 402]
    assert found == {"held": 0, "charges": [["usage", 2 * CREDIT], ["usage", 3 * CREDIT]], "wrong": []}


def _ask(server: ThreadServer, path: str, payer: str) -> tuple[int, bytes]:
    with HttpClient(server.port) as client:
        client.send_request(path=path, headers=key(payer))
        return client.read_head().status, client.read_rest()


def _desk(server: ThreadServer, payer: str, query: str = "") -> dict[str, object]:
    return json.loads(_ask(server, f"/desk?payer={payer}{query}", payer)[1])  # type: ignore[no-any-return]
