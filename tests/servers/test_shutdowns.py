"""
Servers that stop, or are killed, while calls run: what is booked then, by whom, and that it is booked once.

Waiting is most of what happens here, so all servers play at once, and each test looks at the books that one left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from asgi_metering.rules.hold import HoldState
from tests.harness.servers import PATIENT, ServerKind
from tests.harness.waiting import wait_until
from tests.servers.app import HOLD
from tests.servers.books import CREDIT, Books, Ended, read_lines
from tests.servers.house import House, house, key

PAYER = "ann"

GRANTED = 2 * HOLD
"""What the payer has, in credits."""

ABORTED = "aborted, worker died"


def begin(served: House, stream: str, slow: str) -> None:
    """Begin an endless stream and a slow JSON call; the stream has been read from, and both are held for."""
    served.books.grant(PAYER, GRANTED)
    streaming = served.open(f"{stream}?n=1000000&pause_ms=5", PAYER)
    assert len(streaming.read_events(3)) == 3
    served.client().send_request(path=f"{slow}?until=never", headers=key(PAYER))
    served.wait_for("waits", until="never")
    assert sorted(hold.amount for hold in served.books.holds(PAYER)) == [2 * CREDIT, HOLD * CREDIT]


def beaten(served: House) -> None:
    """Wait until a heartbeat has told that words had passed."""
    wait_until(lambda: max(hold.observed for hold in served.books.holds(PAYER)) >= 3 * CREDIT)


def terminated(kind: ServerKind, folder: Path) -> Books:
    """SIGTERM, with a second of grace where there is any."""
    with house(kind, folder, graceful_timeout_s=1) as served:
        begin(served, "/words", "/slow")
        served.server.terminate()
        served.server.wait()
        return served.books


def outlasted(kind: ServerKind, folder: Path) -> Books:
    """SIGTERM to a server that waits for its calls without end, and then kill -9."""
    with house(kind, folder) as served:
        begin(served, "/brief", "/slow/brief")
        served.server.terminate()
        before = max(hold.observed for hold in served.books.holds(PAYER))
        wait_until(lambda: max(hold.observed for hold in served.books.holds(PAYER)) > before + 3 * CREDIT)
        assert served.server.process.poll() is None
        served.server.kill()
        return served.books


def cut_short(kind: ServerKind, folder: Path) -> Books:
    """SIGTERM to a server that kills its workers a second later."""
    with house(kind, folder, graceful_timeout_s=1) as served:
        begin(served, "/brief", "/slow/brief")
        beaten(served)
        served.server.terminate()
        served.server.wait()
        return served.books


def told_as_a_group(kind: ServerKind, folder: Path) -> Books:
    """SIGTERM to the server and its workers at once, as a terminal sends it."""
    with house(kind, folder) as served:
        begin(served, "/brief", "/slow/brief")
        beaten(served)
        served.server.terminate(whole_group=True)
        served.server.wait()
        return served.books


def killed(kind: ServerKind, folder: Path) -> Books:
    """Kill -9 in the middle of it."""
    with house(kind, folder) as served:
        begin(served, "/brief", "/slow/brief")
        beaten(served)
        served.server.kill()
        return served.books


Scene = tuple[Callable[[ServerKind, Path], Books], ServerKind]

TOLD: tuple[ServerKind, ...] = ("uvicorn-h11", "uvicorn-httptools", "hypercorn")
"""What tells its application that it is to end."""

WITH_LIFESPAN: list[Scene] = [(terminated, kind) for kind in TOLD if kind not in PATIENT]

BOOKED: list[Scene] = [*WITH_LIFESPAN, (terminated, "daphne")]

KILLED: tuple[ServerKind, ...] = ("uvicorn-h11", "hypercorn", "daphne")

IN_DOUBT: list[Scene] = [
    (outlasted, "granian"),
    (cut_short, "granian"),
    (told_as_a_group, "hypercorn"),
    *((killed, kind) for kind in KILLED),
]


def _name(scene: Scene) -> str:
    return f"{scene[1]}-{scene[0].__name__}"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Books]]]:
    """All scenes, side by side."""
    with ThreadPoolExecutor(len(BOOKED) + len(IN_DOUBT)) as pool:
        yield {
            _name(scene): pool.submit(scene[0], scene[1], tmp_path_factory.mktemp(_name(scene)))
            for scene in (*BOOKED, *IN_DOUBT)
        }


@pytest.fixture
def books(request: pytest.FixtureRequest, played: dict[str, Future[Books]]) -> Books:
    """What the server of one scene left behind."""
    return played[_name(request.param)].result()


def ends(books: Books) -> tuple[Ended, Ended]:
    """How the stream and the slow call ended; the stream is charged for the three words that were read, at least."""
    slow, stream = sorted(books.ended(PAYER, 2), key=lambda end: end.amount)
    assert stream.amount >= 3 * CREDIT
    assert books.account(PAYER).available == GRANTED * CREDIT - stream.amount
    return stream, slow


@pytest.mark.parametrize("books", BOOKED, indirect=True, ids=_name)
def test_stop_books_what_runs(books: Books) -> None:
    """
    A server that was told to stop has booked its calls when it has exited (pitfalls 31 and 32).

    Half a stream is charged as far as it was observed, an endpoint without an answer not at all. uvicorn does not wait
    for the tasks that it cancels, but its `lifespan.shutdown` is held; daphne has no lifespan and waits for one of them
    only, but the first one to end stays for the others.
    """
    assert books.holds(PAYER) == []
    stream, slow = ends(books)
    assert stream == Ended("aborted", ABORTED, "observed", stream.amount)
    assert slow == Ended("aborted", ABORTED, "none", 0)


@pytest.mark.parametrize("books", WITH_LIFESPAN, indirect=True, ids=_name)
def test_stop_delivers_what_was_booked(books: Books) -> None:
    """Where a lifespan holds the shutdown, the usage events of the last calls have left the outbox as well (S2.21)."""
    assert len(read_lines(books.delivered)) == 2
    assert books.waiting() == []


@pytest.mark.parametrize("books", IN_DOUBT, indirect=True, ids=_name)
def test_die_leaves_calls_in_doubt(books: Books) -> None:
    """
    The calls of a server that died still count as held, also when they are in doubt (pitfall 33).

    When their grace is over any other process ends them by their policy, here this one: each once, the stream for what
    its last heartbeat had observed, with its event in the outbox. Not one unit is lost, and nothing is charged twice.

    Nothing runs when granian kills its worker or waits for ever, when hypercorn's worker is told beside it, at kill -9.
    """
    last = books.holds(PAYER)
    observed = max(hold.observed for hold in last)
    expired, due = max(hold.expires_at for hold in last), max(hold.due_at for hold in last)
    books.sweep(expired)
    assert [hold.state for hold in books.holds(PAYER)] == [HoldState.IN_DOUBT] * 2
    assert books.events(PAYER) == []
    assert books.charges(PAYER) == []
    assert books.account(PAYER).held == (HOLD + 2) * CREDIT
    books.sweep(due)
    stream, slow = ends(books)
    assert stream == Ended("aborted", "in_doubt", "observed", observed)
    assert slow == Ended("aborted", "in_doubt", "none", 0)
    books.sweep(due + 60)
    assert ends(books) == (stream, slow)
