"""
The Redis store beside the memory store: the same operations, the same answers, the same whole state.

The scripts mirror the rules, and what they do not run is decided on rows that were loaded. A rule that a script tells
otherwise, a row that was not loaded or was written wrongly, makes it differ from the store that runs the rules.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from itertools import count, groupby
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from asgi_metering.rules.operations import Operation, Sweep
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
from asgi_metering.stores.redis import RedisStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.harness.valkey import ValkeyServer
from tests.stores.operations import CLOCK_STEPS_S, comparable, operations

EXAMPLES = int(os.environ.get("METERING_EXAMPLES", "20"))
"""Each of up to 30 sequences: odd ones; `test_steps` drives the many."""

PHASES = (Phase.generate, Phase.shrink) if os.environ.get("METERING_SHRINK") else (Phase.generate,)
"""Making a failure small takes minutes; whoever looks for one asks for it."""

_numbers = count()


class Pair:
    """
    Both stores, on one clock, and a loop to run them on; two stores work on one namespace in turn.

    Args:
        make: Makes a Redis store.
    """

    def __init__(self, make: Callable[..., RedisStore]) -> None:
        self.clock = FakeClock()
        self.memory = MemoryStore(self.clock)
        self._loop = asyncio.Runner()
        namespace = f"pair{next(_numbers)}"
        self.redis, self._other = (make(namespace=namespace, clock=self.clock) for _ in range(2))

    def swap(self) -> None:
        """From now on, the other store on the same namespace works."""
        self.redis, self._other = self._other, self.redis

    def run(self, *batch: Operation) -> None:
        """Run *batch* on both and compare; what a sweep forgets is seen by what comes after it."""
        for _, some in groupby(batch, key=lambda operation: isinstance(operation, Sweep)):
            self._run(list(some))

    def _run(self, batch: Sequence[Operation]) -> list[Any]:
        async def both() -> list[Any]:
            expected = comparable(await self.memory.run(batch))
            assert comparable(await self.redis.run(batch)) == expected
            found = tables((await self.redis.read(EverythingKept())).state)
            assert found == tables((await self.memory.read(EverythingKept())).state)
            return expected

        return self._loop.run(both())

    def compare_reads(self, *queries: Any) -> None:
        """Read *queries* from both and compare what they found."""

        async def both() -> None:
            for query in queries:
                found, expected = await self.redis.read(query), await self.memory.read(query)
                assert found.now == expected.now
                assert tables(found.state) == tables(expected.state)

        self._loop.run(both())

    def close(self) -> None:
        """Close the stores and the loop."""
        self._loop.run(self.redis.close())
        self._loop.run(self._other.close())
        self._loop.close()


def beside_memory(make: Callable[..., RedisStore]) -> type[RuleBasedStateMachine]:
    """The machine, for stores that *make* makes."""

    class BesideMemory(RuleBasedStateMachine):
        """Random sequences on both stores; between them the clock moves, and others write."""

        @initialize()
        def begin(self) -> None:
            """Open both."""
            self.pair = Pair(make)

        @rule(data=st.data())
        def run(self, data: st.DataObject) -> None:
            """Run one sequence."""
            self.pair.run(*data.draw(operations(self.pair.clock(), 8)))

        @rule(seconds=st.sampled_from(CLOCK_STEPS_S), data=st.data())
        def run_later(self, seconds: float, data: st.DataObject) -> None:
            """Let time pass, or step back, and run one sequence."""
            self.pair.clock.advance(seconds)
            self.pair.run(*data.draw(operations(self.pair.clock(), 8)))

        @rule()
        def swap(self) -> None:
            """Let the other one of the two stores work."""
            self.pair.swap()

        @rule(call=st.sampled_from(("c0", "c1", "c2")))
        def read(self, call: str) -> None:
            """Read parts."""
            self.pair.compare_reads(
                AccountRows("p", "credits"),
                AccountsAfter("p", "a", 2),
                EntriesAfter("p", "credits", 2, 3),
                HoldRow(call),
                LiveHolds(),
                PendingEvents(3),
            )

        def teardown(self) -> None:
            """Close what was opened."""
            if hasattr(self, "pair"):
                self.pair.close()

    return BesideMemory


@pytest.mark.timeout(3_600)  # Making a failure small takes minutes; passing takes seconds.
def test_run_any_sequences_beside_memory(make_store: Callable[..., RedisStore], server: ValkeyServer) -> None:
    """Whatever is run, Redis answers as memory does and keeps what memory keeps."""
    run_state_machine_as_test(
        beside_memory(make_store),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=PHASES,
        ),
    )
    server.ask("FLUSHALL")
