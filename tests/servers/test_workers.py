"""Two worker processes on one file, and more clients at once than their payer can pay for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest

from tests.harness.waiting import wait_until
from tests.servers.house import House, house
from tests.servers.test_answers import PAID

CLIENTS = 24
PAYS_FOR = 10

Answered = TypeVar("Answered")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One uvicorn with two workers, both of which have answered; a store that is slow is waited for."""
    folder = tmp_path_factory.mktemp("two")
    with house("uvicorn-h11", folder, workers=2, metering={"store_timeout_s": 10}) as running:
        warm = running.books.grant("warm", 10_000)

        def both() -> bool:
            running.ask("/json", warm)
            return len({note["pid"] for note in running.notes("ran", key=warm)}) == 2

        wait_until(both, what="both workers have answered")
        yield running


def at_once(ask: Callable[[], Answered]) -> list[Answered]:
    """Let all clients ask at the same moment."""
    ready = threading.Barrier(CLIENTS)

    def one() -> Answered:
        ready.wait()
        return ask()

    with ThreadPoolExecutor(CLIENTS) as pool:
        return [future.result() for future in [pool.submit(one) for _ in range(CLIENTS)]]


def test_admit_exactly_what_can_be_paid(two: House) -> None:
    """Of 24 calls at once, a balance for 10 admits 10; the others were refused, and no worker overdrew it."""
    payer = two.books.grant("rush", 2 * PAYS_FOR)
    statuses = Counter(at_once(lambda: two.ask("/json", payer)[0].status))
    assert statuses == {200: PAYS_FOR, 402: CLIENTS - PAYS_FOR}
    assert two.books.ended(payer, PAYS_FOR) == [PAID] * PAYS_FOR
    assert len(two.notes("ran", key=payer)) == PAYS_FOR
    assert two.books.account(payer).available == 0
    assert two.books.account(payer).debt == 0


def test_limit_over_both_workers(two: House) -> None:
    """Two calls an hour are two, whichever worker is asked, and only they are charged."""
    payer = two.books.grant("often", 100)
    statuses = Counter(at_once(lambda: two.ask("/limited", payer)[0].status))
    assert statuses == {200: 2, 429: CLIENTS - 2}
    assert two.books.ended(payer, 2) == [PAID] * 2
