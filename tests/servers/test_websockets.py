"""WebSockets of real servers: uvicorn with `websockets` and with wsproto, hypercorn, granian, daphne; a real client."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from asgi_metering.rules.hold import HoldState
from tests.harness.servers import HOST
from tests.harness.waiting import wait_until
from tests.servers.books import CREDIT, Ended
from tests.servers.house import House, house, key
from tests.servers.test_answers import PAID
from tests.servers.test_disconnects import GONE_LATE

SAMPLES = Path(__file__).parents[1] / "samples"


def said_goodbye(each: House, whole: int) -> list[Ended]:
    """The end of one call whose client said goodbye; hypercorn does not tell it from one that is lost."""
    if each.kind == "hypercorn":
        return [Ended("client_gone", GONE_LATE, "observed", whole * CREDIT)]
    return [Ended("completed", "completed, usage reported", "usage", whole * CREDIT)]


@contextmanager
def talking(served: House, path: str, payer: str | None, **options: Any) -> Iterator[ClientConnection]:
    """A connection of this caller; who refuses it raises `InvalidStatus`."""
    headers = key(payer) if payer else []
    url = f"ws://{HOST}:{served.server.port}{path}"
    with connect(url, additional_headers=headers, proxy=None, **options) as client:
        yield client


def say(client: ClientConnection, *texts: str) -> list[str]:
    """Send each, and read what is said back."""
    said = []
    for text in texts:
        client.send(text)
        said.append(str(client.recv(10)))
    return said


def closed(client: ClientConnection) -> tuple[int, str]:
    """Read until the server has closed the connection: code and reason."""
    try:
        while True:
            client.recv(10)
    except ConnectionClosed as ended:
        frame = ended.rcvd
    assert frame is not None
    return frame.code, frame.reason


def test_talk_over_a_websocket(each: House) -> None:
    """A connection is charged once, however much is said; its subprotocol is the one that the application chose."""
    payer = each.books.grant("talks", 10)
    with talking(each, "/ws", payer, subprotocols=["v2", "v1"]) as client:
        assert client.subprotocol == "v2"
        assert say(client, "a", "b") == ["a!", "b!"]
    assert each.books.ended(payer) == said_goodbye(each, 2)


def test_talk_over_an_unmetered_websocket(each: House) -> None:
    """What is not decorated needs nobody, and charges nobody."""
    with talking(each, "/ws/free", None) as client:
        assert say(client, "a") == ["a!"]


def test_refuse_a_websocket(each: House) -> None:
    """402 with the whole body where the server can say it, 403 where it cannot; the handler does not run."""
    payer = each.books.grant("refused", 1)
    with pytest.raises(InvalidStatus) as refused, talking(each, "/ws", payer):
        pass
    response = refused.value.response
    if each.kind == "daphne":
        assert response.status_code == 403
    else:
        assert response.status_code == 402
        assert response.headers["content-type"] == "application/problem+json"
        assert json.loads(response.body)["code"] == "insufficient_credits"
    assert each.notes("talks", key=payer) == []
    assert each.books.account(payer).available == CREDIT


def test_close_a_websocket_that_runs_dry(each: House) -> None:
    """Three credits are three messages; before the fourth the client hears 4402, and the handler of a disconnect."""
    payer = each.books.grant("dry", 3)
    with talking(each, "/ws/messages", payer) as client:
        assert say(client, "a", "b", "c") == ["a!", "b!", "c!"]
        client.send("d")
        code, reason = closed(client)
    assert code == 4402
    # daphne loses the reason.
    assert reason == ("" if each.kind == "daphne" else "insufficient_credits: Insufficient credits")
    each.wait_for("disconnected", key=payer, code=4402)
    assert each.books.ended(payer) == [Ended("cut", "cut", "observed", 3 * CREDIT)]


def test_charge_a_websocket_for_what_its_messages_told(each: House) -> None:
    """A realtime session is charged for the sum of its responses, however its hold had to grow for that."""
    payer = each.books.grant("relays", 1_000)
    messages = (SAMPLES / "openai-realtime-session.ndjson").read_text().splitlines()
    with talking(each, "/ws/relay", payer) as client:
        assert say(client, *messages) == messages
    assert each.books.ended(payer) == said_goodbye(each, 253 + 121 + 13 + 9 + 340 + 28)


def test_outgrow_the_hold_of_a_websocket(each: House) -> None:
    """A hold of three messages at a time pays for thirty, settled once."""
    payer = each.books.grant("grows", 40)
    with talking(each, "/ws/messages", payer) as client:
        texts = [str(number) for number in range(30)]
        assert say(client, *texts) == [f"{text}!" for text in texts]
    assert each.books.ended(payer) == said_goodbye(each, 30)


def test_limit_the_messages_of_a_websocket(each: House) -> None:
    """The fourth message of an hour closes the connection with 4429."""
    with talking(each, "/ws/limited", "limited") as client:
        assert say(client, "a", "b", "c") == ["a!", "b!", "c!"]
        client.send("d")
        assert closed(client)[0] == 4429


def test_close_a_websocket_by_the_handler(each: House) -> None:
    """The handler's own close is what the client hears."""
    payer = each.books.grant("hears", 10)
    with talking(each, "/ws", payer) as client:
        client.send("close")
        assert closed(client)[0] == 4000
    assert each.books.ended(payer) == [PAID]


def test_fail_in_a_websocket(each: House) -> None:
    """A handler that raises is charged for what was let in before: its client could make it raise at will."""
    payer = each.books.grant("fails", 10)
    with talking(each, "/ws/messages", payer) as client:
        assert say(client, "a") == ["a!"]
        client.send("raise")
        with pytest.raises(ConnectionClosed):
            client.recv(10)
    (ended,) = each.books.ended(payer)
    assert (ended.outcome, ended.basis, ended.amount) == ("error", "observed", 2 * CREDIT)


@pytest.mark.parametrize("how", ["fin", "rst"])
def test_vanish_from_a_websocket(each: House, how: str) -> None:
    """A client that is gone without a word pays for what it sent, and its slot is free."""
    payer = each.books.grant(f"vanishes-{how}", 10)
    with talking(each, "/ws/messages", payer) as client:
        assert say(client, "a", "b") == ["a!", "b!"]
        if how == "rst":
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.socket.close()
        else:
            client.socket.shutdown(socket.SHUT_RDWR)
    (ended,) = each.books.ended(payer)
    assert (ended.outcome, ended.basis, ended.amount) == ("client_gone", "observed", 2 * CREDIT)


def test_share_the_slots_of_websockets(each: House) -> None:
    """Two connections of a caller at once; when one closes there is room for another."""
    payer = each.books.grant("slots", 10)
    with talking(each, "/ws/messages", payer) as first, talking(each, "/ws/messages", payer) as second:
        say(first, "a")
        say(second, "b")
        with pytest.raises(InvalidStatus) as refused, talking(each, "/ws/messages", payer):
            pass
        assert refused.value.response.status_code in (429, 403)
        first.close()
        wait_until(lambda: len(each.books.holds(payer)) == 1, what="the first connection has ended")
        with talking(each, "/ws/messages", payer) as third:
            assert say(third, "c") == ["c!"]
    each.books.ended(payer, 3)


# -- servers that stop, or are killed ----------------------------------------------------------------------


def test_kill_a_server_in_a_session(tmp_path: Path) -> None:
    """Kill -9 leaves the session in doubt, and its policy charges what its last heartbeat had seen: three messages."""
    with house("uvicorn-h11", tmp_path) as served:
        payer = served.books.grant("ann", 50)
        with talking(served, "/ws/brief", payer) as client:
            say(client, "a", "b", "c")
            wait_until(lambda: served.books.holds(payer)[0].observed == 3 * CREDIT, what="a heartbeat has told of it")
            served.server.kill()
        (hold,) = served.books.holds(payer)
        assert hold.state is HoldState.HELD
        served.books.sweep(hold.expires_at + 3_600)
        served.books.sweep(hold.expires_at + 7_200)
        (ended,) = served.books.ended(payer)
        assert (ended.outcome, ended.basis, ended.amount) == ("aborted", "observed", 3 * CREDIT)


def test_stop_a_server_in_a_session(tmp_path: Path) -> None:
    """A server that stops closes with 1012 (uvicorn): the session is booked before the process is gone."""
    with house("uvicorn-h11", tmp_path) as served:
        payer = served.books.grant("ann", 50)
        with talking(served, "/ws/messages", payer) as client:
            say(client, "a", "b")
            served.server.terminate()
            assert closed(client)[0] == 1012
        served.server.wait()
        (ended,) = served.books.ended(payer)
        assert (ended.outcome, ended.basis, ended.amount) == ("aborted", "observed", 2 * CREDIT)
