"""Several processes on one Valkey server, and processes that are killed."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.receipts import Receipt
from asgi_metering.rules.operations import Admit, End, Operation, PostGrant, WalletSource
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.redis import RedisStore
from tests.harness.valkey import ValkeyServer
from tests.stores.test_processes import assert_conserved

ROOT = Path(__file__).parents[3]

UNITS = 50
"""In the wallet that is raced for."""


@contextmanager
def processes(kind: str, url: str, number: int, tries: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start *number* processes with traffic on *url*; those that still run afterwards are killed."""
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.stores.redis.traffic", kind, url, f"worker{index}", str(tries)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(number)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def all_at_once(workers: list[subprocess.Popen[str]]) -> list[list[str]]:
    """Let them start together; what each has told, word by word."""
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    told = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers)
    return [line.split() for said in told for line in said.splitlines()]


class Shared:
    """One namespace of the server, for processes by its URL, and for the test itself."""

    def __init__(self, server: ValkeyServer, namespace: str, make: Callable[..., RedisStore]) -> None:
        self.url = f"{server.url}?namespace={namespace}"
        self._make = lambda: make(namespace=namespace)

    def run(self, *operations: Operation) -> list[Any]:
        """Run operations in a store of the test's own."""

        async def once() -> list[Any]:
            store = self._make()
            answers = await store.run(operations)
            await store.close()
            return answers

        return asyncio.run(once())

    def state(self) -> State:
        """Everything that is kept."""

        async def once() -> State:
            store = self._make()
            state = (await store.read(EverythingKept())).state
            await store.close()
            return state

        return asyncio.run(once())


@pytest.fixture
def shared(server: ValkeyServer, make_store: Callable[..., RedisStore], request: pytest.FixtureRequest) -> Shared:
    """A namespace of the test's own."""
    return Shared(server, "".join(char for char in request.node.name if char.isalnum()), make_store)


def test_race_of_processes_for_the_last_units(shared: Shared) -> None:
    """Four processes ask at once for more units, slots and counts than there are: each is given away exactly once.

    The allowance belongs to a payer that no process had seen before (S0.6, S0.44).
    """
    shared.run(PostGrant("g", "payer", "credits", UNITS))
    with processes("race", shared.url, number=4, tries=40) as workers:
        told = all_at_once(workers)
    assert Counter(kind for _, kind in told) == {"wallet": UNITS, "allowance": 40, "limit": 30, "pool": 20}
    state = shared.state()
    assert_conserved(state)
    assert state.accounts["payer", "credits"].available == 0
    assert len(state.holds) == UNITS + 40 + 20


def test_race_of_processes_with_one_key(shared: Shared) -> None:
    """However many calls bring a charge key at once, in four processes, it is charged once; a request runs once."""
    shared.run(PostGrant("g", "payer", "credits", 1_000))
    with processes("keys", shared.url, number=4, tries=25) as workers:
        told = Counter(" ".join(words) for words in all_at_once(workers))
    assert told == {"first": 1, "joined": 99, "charged 7": 1, "charged 0": 99, "ran": 1, "refused": 99}
    state = shared.state()
    assert_conserved(state)
    assert state.accounts["payer", "credits"].settled == 7
    assert state.charge_keys["session"].members == 0


def test_race_of_processes_to_end_the_same_calls(shared: Shared) -> None:
    """Settle, release, sweep and settle again, from four processes at once: one end of each call counts."""
    calls = 60
    shared.run(PostGrant("g", "payer", "credits", 1_000))
    shared.run(
        *(Admit(f"c{number}", "payer", "credits", 5, 5, (WalletSource(),), facts={"n": 1}) for number in range(calls))
    )
    with processes("ends", shared.url, number=4, tries=calls) as workers:
        told = all_at_once(workers)
    applied = {call_id: int(amount) for _, call_id, amount in told}
    assert len(told) == len(applied) == calls
    state = shared.state()
    assert_conserved(state)
    account = state.accounts["payer", "credits"]
    assert (account.held, account.granted, account.settled) == (0, 1_000 + calls, sum(applied.values()))


@pytest.mark.parametrize("after", [150, 400])
def test_kill_a_process_in_the_middle_of_its_work(shared: Shared, after: int) -> None:
    """Nothing that was acknowledged before a kill is lost, nothing is half done, and the others never notice.

    One of two processes is killed with SIGKILL in the middle of its batches. What it told before is read from its
    pipe: every admission it was promised is there, every end is charged once, with its ledger line and its event.
    """
    shared.run(PostGrant("g", "payer", "credits", 1_000_000))
    with processes("work", shared.url, number=2, tries=60) as (victim, survivor):
        assert victim.stdout is not None
        told = [victim.stdout.readline() for _ in range(after)]
        victim.kill()
        told.extend(victim.stdout.readlines())
        assert (victim.wait(), len(told) < 2 * 16 * 60) == (-signal.SIGKILL, True)
        told.extend(survivor.communicate()[0].splitlines(keepends=True))
        assert survivor.returncode == 0
    state = shared.state()
    assert_conserved(state)
    # The last line of a killed process may be cut.
    lines = [line.split() for line in told if line.endswith("\n")]
    admitted = {call_id for word, call_id, *_ in lines if word == "admitted"}
    ended = {call_id: int(*amount) for word, call_id, *amount in lines if word == "ended"}
    assert len(ended) >= 16 * 60
    assert admitted <= state.holds.keys()
    charged = {call_id: hold.receipt.amount for call_id, hold in state.holds.items() if hold.receipt is not None}
    assert ended.items() <= charged.items()
    assert ended.keys() <= state.events.keys()
    settled = {line.ref: line.amount for line in state.entries["payer", "credits"] if line.kind == "settle"}
    assert settled == {call_id: amount for call_id, amount in charged.items() if amount}


def test_post_to_an_account_that_others_keep_changing(shared: Shared) -> None:
    """What is decided on rows that were read comes through on an account that is never the same for a millisecond."""
    shared.run(PostGrant("g", "payer", "credits", 1_000_000))
    with processes("work", shared.url, number=2, tries=10_000) as workers:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        grants = [shared.run(PostGrant(f"more{number}", "payer", "credits", 5)) for number in range(20)]
    assert all(receipt.applied for (receipt,) in grants)
    state = shared.state()
    assert_conserved(state)
    assert state.accounts["payer", "credits"].granted == 1_000_100
    (answer,) = shared.run(End("nobody", 1))
    assert isinstance(answer, Receipt)
