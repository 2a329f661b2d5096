"""Several processes on one SQLite file, and processes that are killed."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.operations import PostGrant
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.sqlite import SQLiteStore

ROOT = Path(__file__).parents[2]

UNITS = 50
"""In the wallet that is raced for."""


@contextmanager
def processes(kind: str, path: Path, number: int, tries: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start *number* processes with traffic on *path*; those that still run afterwards are killed."""
    command = [sys.executable, "-m", "tests.stores.traffic", kind, str(path)]
    started = [
        subprocess.Popen(
            [*command, f"worker{index}", str(tries)],
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


async def _prepare(path: Path, amount: int) -> None:
    store = SQLiteStore(path)
    await store.open()
    await store.post([PostGrant("g", "payer", "credits", amount)])
    await store.close()


async def _everything(path: Path) -> State:
    store = SQLiteStore(path)
    await store.open()
    state = (await store.read(EverythingKept())).state
    await store.close()
    return state


def assert_conserved(state: State) -> None:
    """Every account can be proven from its rows and from its ledger."""
    for key, account in state.accounts.items():
        grants = [*state.grants.get(key, {}).values(), *state.closed_grants.get(key, {}).values()]
        windows = [row for place, row in state.allowances.items() if place[:2] == key]
        assert discrepancies(account, grants, state.live_holds(key), windows) == []
        lines = state.entries.get(key, [])
        assert [line.number for line in lines] == list(range(1, account.entries + 1))
        assert sum(line.amount for line in lines if line.kind == "settle") == account.settled


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file that all share."""
    return tmp_path / "metering.db"


def test_race_of_processes_for_the_last_units(path: Path) -> None:
    """Four processes ask at once for more units, slots and counts than there are: each is given away exactly once.

    The allowance belongs to a payer that no process had seen before (S0.6, S0.44).
    """
    asyncio.run(_prepare(path, UNITS))
    with processes("race", path, number=4, tries=40) as workers:
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        told = [worker.communicate()[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * 4
    admitted = Counter(line.split()[1] for said in told for line in said.splitlines())
    assert admitted == {"wallet": UNITS, "allowance": 40, "limit": 30, "pool": 20}
    state = asyncio.run(_everything(path))
    assert_conserved(state)
    assert state.accounts["payer", "credits"].available == 0
    assert len(state.holds) == UNITS + 40 + 20


def test_open_a_new_file_in_several_processes(path: Path) -> None:
    """Processes that find no file make one together: none fails, and it has its tables once."""
    with processes("work", path, number=4, tries=0) as workers:
        for worker in workers:
            worker.communicate()
        assert [worker.returncode for worker in workers] == [0] * 4
    asyncio.run(_prepare(path, 1))
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("after", [150, 400])
def test_kill_a_process_in_the_middle_of_its_work(path: Path, after: int) -> None:
    """Nothing that was acknowledged before a kill is lost, nothing is half done, and the others never notice.

    One of two processes is killed with SIGKILL in the middle of its batches. What it told before is read from its
    pipe: every admission it was promised is there, every end is charged once, with its ledger line and its event.
    """
    asyncio.run(_prepare(path, 1_000_000))
    with processes("work", path, number=2, tries=60) as (victim, survivor):
        assert victim.stdout is not None
        told = [victim.stdout.readline() for _ in range(after)]
        victim.kill()
        told.extend(victim.stdout.readlines())
        assert (victim.wait(), len(told) < 2 * 16 * 60) == (-signal.SIGKILL, True)
        told.extend(survivor.communicate()[0].splitlines(keepends=True))
        assert survivor.returncode == 0
    state = asyncio.run(_everything(path))
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
