"""
The SQLite store beside the memory store: the same operations, the same answers, the same whole state.

SQLite decides on the rows that it loaded. A row that it did not load, or wrote wrongly, makes it differ from the
store that decides on everything.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    End,
    LeaseAsk,
    Operation,
    PostGrant,
    Renew,
    Sweep,
    WalletSource,
)
from asgi_metering.stores.contract import AccountRows, EverythingKept, HoldRow, LiveHolds, PendingEvents
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.stores.operations import CLOCK_STEPS_S, comparable, operations


class Pair:
    """Both stores, on one clock, and a loop to run them on."""

    def __init__(self, folder: Path) -> None:
        self.clock = FakeClock()
        self.memory = MemoryStore(self.clock)
        self.sqlite = SQLiteStore(folder / "pair.db", synchronous="OFF", clock=self.clock)
        self._loop = asyncio.Runner()
        self._loop.run(self.sqlite.open())

    def run(self, *batch: Operation) -> list[Any]:
        """Run *batch* on both, compare, and return the answers."""

        async def both() -> list[Any]:
            expected = comparable(await self.memory.run(batch))
            assert comparable(await self.sqlite.run(batch)) == expected
            assert tables((await self.sqlite.read(EverythingKept())).state) == tables(
                (await self.memory.read(EverythingKept())).state
            )
            return expected

        return self._loop.run(both())

    def compare_reads(self, *queries: Any) -> None:
        """Read *queries* from both and compare what they found."""

        async def both() -> None:
            for query in queries:
                found, expected = await self.sqlite.read(query), await self.memory.read(query)
                assert found.now == expected.now
                assert tables(found.state) == tables(expected.state)

        self._loop.run(both())

    def close(self) -> None:
        """Close the file and the loop."""
        self._loop.run(self.sqlite.close())
        self._loop.close()


class BesideMemory(RuleBasedStateMachine):
    """Random sequences on both stores, the clock moving between them, and the file closed and opened again."""

    @initialize()
    def begin(self) -> None:
        """Open both."""
        self.folder = tempfile.TemporaryDirectory()
        self.pair = Pair(Path(self.folder.name))

    @rule(data=st.data())
    def run(self, data: st.DataObject) -> None:
        """Run one sequence."""
        self.pair.run(*data.draw(operations(self.pair.clock())))

    @rule(seconds=st.sampled_from(CLOCK_STEPS_S), data=st.data())
    def run_later(self, seconds: float, data: st.DataObject) -> None:
        """Let time pass, or step back, and run one sequence."""
        self.pair.clock.advance(seconds)
        self.pair.run(*data.draw(operations(self.pair.clock())))

    @rule(call=st.sampled_from(("c0", "c1", "c2")))
    def read(self, call: str) -> None:
        """Read parts."""
        self.pair.compare_reads(AccountRows("p", "credits"), HoldRow(call), LiveHolds(), PendingEvents(3))

    def teardown(self) -> None:
        """Close what was opened."""
        if hasattr(self, "pair"):
            self.pair.close()
            self.folder.cleanup()


def test_run_any_sequences_beside_memory() -> None:
    """Whatever is run, SQLite answers as memory does and keeps what memory keeps."""
    run_state_machine_as_test(
        BesideMemory,
        settings=settings(
            max_examples=120,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
