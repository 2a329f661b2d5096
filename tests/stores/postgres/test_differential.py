"""
The PostgreSQL store beside the memory store: the same operations, the same answers, the same whole state.

PostgreSQL decides on the rows that it loaded. A row that it did not load, or wrote wrongly, makes it differ from the
store that decides on everything. Two stores on one schema work in turn.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from asgi_metering.rules.operations import Operation, PostGrant, Sweep
from asgi_metering.stores.contract import (
    AccountRows,
    AccountsAfter,
    EntriesAfter,
    EverythingKept,
    HoldRow,
    LiveHolds,
    PendingEvents,
)
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.postgres import PostgresServer
from tests.stores import test_differential
from tests.stores.operations import CLOCK_STEPS_S, comparable, operations

_numbers = count(1)


class Pair:
    """
    Both stores, on one clock, and a loop to run them on.

    Args:
        server: Where the schema is made.
    """

    def __init__(self, server: PostgresServer) -> None:
        self.clock = FakeClock()
        self.memory = MemoryStore(self.clock)
        self._server = server
        self._schema = f"pair_{next(_numbers)}"
        self._loop = asyncio.Runner()
        self.postgres, self._other = self._opened(), self._opened()

    def _opened(self) -> PostgresStore:
        store = PostgresStore(self._server.url(), namespace=self._schema, clock=self.clock, migrate=True)
        self._loop.run(store.open())
        return store

    def swap(self) -> None:
        """From now on, the other store on the same schema works."""
        self.postgres, self._other = self._other, self.postgres

    def run(self, *batch: Operation) -> list[Any]:
        """Run *batch* on both, compare, and return the answers."""

        async def both() -> list[Any]:
            expected = comparable(await self.memory.run(batch))
            assert comparable(await self.postgres.run(batch)) == expected
            assert tables((await self.postgres.read(EverythingKept())).state) == tables(
                (await self.memory.read(EverythingKept())).state
            )
            return expected

        return self._loop.run(both())

    def sweep_apart(self, sweep: Sweep, times: int) -> None:
        """Sweep both, and compare how much they do each time, and what is left at the end."""

        async def both() -> None:
            for _ in range(times):
                assert await self.postgres.run([sweep]) == await self.memory.run([sweep])

        self._loop.run(both())
        self.run(sweep)

    def compare_reads(self, *queries: Any) -> None:
        """Read *queries* from both and compare what they found."""

        async def both() -> None:
            for query in queries:
                found, expected = await self.postgres.read(query), await self.memory.read(query)
                assert found.now == expected.now
                was, told = tables(expected.state), tables(found.state)
                assert {name: rows for name, rows in told.items() if rows != was[name]} == {
                    name: rows for name, rows in was.items() if rows != told[name]
                }, query

        self._loop.run(both())

    def reopen(self) -> None:
        """Close the connections for good, and make new ones."""
        self._close_stores()
        self.postgres, self._other = self._opened(), self._opened()

    def _close_stores(self) -> None:
        self._loop.run(self.postgres.close())
        self._loop.run(self._other.close())

    def close(self) -> None:
        """Close the stores and the loop, and drop the schema."""
        self._close_stores()
        self._loop.close()
        self._server.execute(f'DROP SCHEMA "{self._schema}" CASCADE')


class BesideMemory(RuleBasedStateMachine):
    """Random sequences on both stores; between them the clock moves, and others write."""

    server: PostgresServer

    @initialize()
    def begin(self) -> None:
        """Open both."""
        self.pair = Pair(self.server)

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        """Run one sequence."""
        self.pair.run(*data.draw(operations(self.pair.clock())))

    @rule(seconds=st.sampled_from(CLOCK_STEPS_S), data=st.data())
    def run_later(self, seconds: float, data: st.DataObject) -> None:
        """Let time pass, or step back, and run one sequence."""
        self.pair.clock.advance(seconds)
        self.pair.run(*data.draw(operations(self.pair.clock())))

    @rule()
    def swap(self) -> None:
        """Let the other one of the two stores on the schema work."""
        self.pair.swap()

    @rule(call=st.sampled_from(("c0", "c1", "c2")))
    def read(self, call: str) -> None:
        """Read parts."""
        self.pair.compare_reads(
            AccountRows("p", "credits"),
            AccountsAfter("p", "credits", 1),
            EntriesAfter("p", "credits", 1, 3),
            HoldRow(call),
            LiveHolds(),
            PendingEvents(3),
        )

    def teardown(self) -> None:
        """Close what was opened."""
        if hasattr(self, "pair"):
            self.pair.close()


@pytest.mark.timeout(900)  # Making a failure small takes minutes; passing takes seconds.
def test_run_any_sequences_beside_memory(postgres: PostgresServer) -> None:
    """Whatever is run, PostgreSQL answers as memory does and keeps what memory keeps."""

    class Beside(BesideMemory):
        server = postgres

    run_state_machine_as_test(
        Beside,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture
def pair(postgres: PostgresServer) -> Iterator[Pair]:
    """Both stores, with one account of 1,000 units."""
    pair = Pair(postgres)
    pair.run(PostGrant("g", "p", "credits", 1_000))
    yield pair
    pair.close()


# What is too rare to be met by chance is told once, for every store that loads rows.
globals().update(
    {
        name: test
        for name, test in vars(test_differential).items()
        if name.startswith("test_") and "pair" in inspect.signature(test).parameters
    }
)
