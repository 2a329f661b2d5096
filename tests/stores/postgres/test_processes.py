"""A process that is stopped, and not killed, while the server waits for it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Sequence

from asgi_metering.rules.operations import Admit, PostGrant, WalletSource
from asgi_metering.stores.postgres import PostgresStore
from tests.harness.postgres import PostgresServer
from tests.harness.waiting import wait_until
from tests.stores.test_races import Course


def test_stop_a_process_that_keeps_an_account_locked(postgres: PostgresServer, schema: str) -> None:
    """A process that is stopped in the middle of a batch loses its locks after a while, and its batch with them."""
    course = Course(f"{postgres.url()}?namespace={schema}")
    course.prepare(PostGrant("more", "payer", "credits", 1_000_000))
    with course.processes("work", 10_000, 1, is_streaming=True) as (victim,):
        victim.told.recv()
        _stop_inside_a_transaction(postgres, victim.process.pid)

        async def others() -> int:
            store = PostgresStore(postgres.url(), namespace=schema, busy_timeout_s=20.0, answer_within_s=30.0)
            await store.open()
            (decision,) = await store.admit([Admit("other", "payer", "credits", 1, 1, (WalletSource(),))])
            await store.close()
            return decision.held

        assert asyncio.run(others()) == 1


def _stop_inside_a_transaction(server: PostgresServer, process: int) -> None:
    """SIGSTOP *process* where the server waits for its next statement, and locks are held."""

    def is_inside() -> bool:
        os.kill(process, signal.SIGSTOP)
        rows: Sequence[tuple[int]] = server.execute(
            "SELECT count(*) FROM pg_stat_activity a JOIN pg_locks l USING (pid) "
            "WHERE a.state = 'idle in transaction' AND l.locktype = 'advisory'"
        )
        if rows[0][0]:
            return True
        os.kill(process, signal.SIGCONT)
        return False

    wait_until(is_inside, what="the process is stopped inside a transaction")
