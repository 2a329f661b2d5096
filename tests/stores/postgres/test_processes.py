"""Several processes on one schema, and processes that are killed or stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.operations import Admit, Operation, PostGrant, Renew, WalletSource
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.postgres import PostgresStore
from tests.harness.postgres import PostgresServer
from tests.harness.waiting import wait_until
from tests.stores.test_processes import assert_conserved

ROOT = Path(__file__).parents[3]

UNITS = 50
"""In the wallet that is raced for."""


@contextmanager
def processes(
    server: PostgresServer, schema: str, kind: str, number: int, tries: int
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start *number* processes with traffic on *schema*; those that still run afterwards are killed."""
    command = [sys.executable, "-m", "tests.stores.postgres.traffic", kind, server.url(), schema]
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


def go(workers: list[subprocess.Popen[str]]) -> list[list[str]]:
    """Let all *workers* begin at once, and return the words of each line that they told."""
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


async def prepare(server: PostgresServer, schema: str, *operations: Operation) -> State:
    """Make the schema, run *operations* together, and return everything."""
    store = PostgresStore(server.url(), namespace=schema, migrate=True)
    await store.open()
    await store.run(operations)
    state = (await store.read(EverythingKept())).state
    await store.close()
    return state


def everything(server: PostgresServer, schema: str) -> State:
    """All that the schema keeps."""
    return asyncio.run(prepare(server, schema))


def test_race_of_processes_for_the_last_units(postgres: PostgresServer, schema: str) -> None:
    """Four processes ask at once for more units, slots and counts than there are: each is given away exactly once.

    The allowance belongs to a payer that no process had seen before (S0.6, S0.44).
    """
    asyncio.run(prepare(postgres, schema, PostGrant("g", "payer", "credits", UNITS)))
    with processes(postgres, schema, "race", number=4, tries=40) as workers:
        told = go(workers)
    assert Counter(kind for _, kind in told) == {"wallet": UNITS, "allowance": 40, "limit": 30, "pool": 20}
    state = everything(postgres, schema)
    assert_conserved(state)
    assert state.accounts["payer", "credits"].available == 0
    assert len(state.holds) == UNITS + 40 + 20


def test_race_for_payers_and_calls_that_nobody_has_seen(postgres: PostgresServer, schema: str) -> None:
    """Four processes post the same grant and ask for the same call, of payers that do not exist yet.

    Each grant counts once, each call is admitted once and told to all as the same (S3.15), and what is left of the
    grant goes to one of them.
    """
    asyncio.run(prepare(postgres, schema))
    with processes(postgres, schema, "newcomers", number=4, tries=40) as workers:
        told = go(workers)
    state = everything(postgres, schema)
    assert_conserved(state)
    accounts = [account for (payer, _), account in state.accounts.items() if payer.startswith("newcomer")]
    assert [(account.granted, account.held) for account in accounts] == [(3, 3)] * 40
    assert Counter(words[0] for words in told) == {"admitted": 4 * 40, "own": 40}
    same = {tuple(words[2:]) for words in told if words[0] == "admitted"}
    assert ("True", "2") in same


def test_race_of_ends(postgres: PostgresServer, schema: str) -> None:
    """Overdue calls are settled, released, ended by a person and swept at once: each call ends exactly once (S3.13)."""
    tries = 60
    admissions = [
        Admit(f"call{number}", "payer", "credits", 5, 5, (WalletSource(),), ttl_s=0.001, grace_s=0.0, facts={"a": 1})
        for number in range(tries)
    ]
    observed = [Renew(f"call{number}", 2) for number in range(tries)]
    asyncio.run(prepare(postgres, schema, PostGrant("g", "payer", "credits", 1_000), *admissions, *observed))
    with processes(postgres, schema, "ends", number=4, tries=tries) as workers:
        told = go(workers)
    state = everything(postgres, schema)
    account, lines = state.accounts["payer", "credits"], state.entries["payer", "credits"]
    grants = [*state.grants["payer", "credits"].values()]
    assert discrepancies(account, grants, state.live_holds(("payer", "credits")), []) == []
    # A call that was swept first tells what it really used by a line of its own.
    assert sum(line.amount for line in lines if line.kind in ("settle", "late")) == account.settled
    settled = [line.ref for line in lines if line.kind == "settle"]
    assert len(settled) == len(set(settled))
    applied = [call for _, call, _ in told]
    assert len(applied) == len(set(applied))
    receipts = {call: hold.receipt for call, hold in state.holds.items()}
    assert len(receipts) == tries
    assert all(receipt is not None for receipt in receipts.values())
    for _, call, amount in told:
        receipt = receipts[call]
        assert receipt is not None
        assert receipt.amount == int(amount)


@pytest.mark.parametrize("after", [150, 400])
def test_kill_a_process_in_the_middle_of_its_work(postgres: PostgresServer, schema: str, after: int) -> None:
    """Nothing that was acknowledged before a kill is lost, nothing is half done, and the others never notice.

    One of two processes is killed with SIGKILL in the middle of its batches. What it told before is read from its
    pipe: every admission it was promised is there, every end is charged once, with its ledger line and its event.
    """
    asyncio.run(prepare(postgres, schema, PostGrant("g", "payer", "credits", 1_000_000)))
    with processes(postgres, schema, "work", number=2, tries=40) as (victim, survivor):
        assert victim.stdout is not None
        told = [victim.stdout.readline() for _ in range(after)]
        victim.kill()
        told.extend(victim.stdout.readlines())
        assert (victim.wait(), len(told) < 2 * 16 * 40) == (-signal.SIGKILL, True)
        told.extend(survivor.communicate()[0].splitlines(keepends=True))
        assert survivor.returncode == 0
    state = everything(postgres, schema)
    assert_conserved(state)
    # The last line of a killed process may be cut.
    lines = [line.split() for line in told if line.endswith("\n")]
    admitted = {call_id for word, call_id, *_ in lines if word == "admitted"}
    ended = {call_id: int(*amount) for word, call_id, *amount in lines if word == "ended"}
    assert len(ended) >= 16 * 40
    assert admitted <= state.holds.keys()
    charged = {call_id: hold.receipt.amount for call_id, hold in state.holds.items() if hold.receipt is not None}
    assert ended.items() <= charged.items()
    assert ended.keys() <= state.events.keys()
    settled = {line.ref: line.amount for line in state.entries["payer", "credits"] if line.kind == "settle"}
    assert settled == {call_id: amount for call_id, amount in charged.items() if amount}


def test_stop_a_process_that_keeps_an_account_locked(postgres: PostgresServer, schema: str) -> None:
    """A process that is stopped in the middle of a batch loses its locks after a while, and its batch with them."""
    asyncio.run(prepare(postgres, schema, PostGrant("g", "payer", "credits", 1_000_000)))
    with processes(postgres, schema, "work", number=1, tries=10_000) as (victim,):
        assert victim.stdout is not None
        victim.stdout.readline()
        _stop_inside_a_transaction(postgres, victim)

        async def others() -> int:
            store = PostgresStore(postgres.url(), namespace=schema, busy_timeout_s=20.0, answer_within_s=30.0)
            await store.open()
            (decision,) = await store.admit([Admit("other", "payer", "credits", 1, 1, (WalletSource(),))])
            await store.close()
            return decision.held

        assert asyncio.run(others()) == 1


def _stop_inside_a_transaction(server: PostgresServer, process: subprocess.Popen[str]) -> None:
    """SIGSTOP *process* where the server waits for its next statement, and locks are held."""

    def is_inside() -> bool:
        os.kill(process.pid, signal.SIGSTOP)
        rows: Sequence[tuple[int]] = server.execute(
            "SELECT count(*) FROM pg_stat_activity a JOIN pg_locks l USING (pid) "
            "WHERE a.state = 'idle in transaction' AND l.locktype = 'advisory'"
        )
        if rows[0][0]:
            return True
        os.kill(process.pid, signal.SIGCONT)
        return False

    wait_until(is_inside, what="the process is stopped inside a transaction")
