"""
A store beside the memory store: the same operations, the same answers, the same whole state.

Memory decides on everything it keeps. A store that loads rows decides on those that it loaded, and one that runs
scripts by rules told again: a row not loaded or written wrongly, or a rule told otherwise, makes it differ.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
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
    ReadingsKept,
    Store,
)
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import tables
from tests.stores.operations import CLOCK_STEPS_S, comparable, operations
from tests.stores.service import Service

__all__ = ["STEPS", "STEPS_EACH", "Pair", "run_any_sequences", "run_as_a_service"]

STEPS = int(os.environ.get("METERING_TEST_STEPS", "20000"))
"""Operations of a service that each store answers beside memory."""

STEPS_EACH = 2_000
"""Operations from one empty store to the next."""

COMPARED = 12
"""Batches of a service from one comparison of whole states to the next; answers are compared at every one."""

EXAMPLES = 25
"""Of short sequences in which everything collides."""


class Pair:
    """
    Both stores, on one clock, and a loop to run them on. Two stores work on the same rows in turn.

    Args:
        make: Makes one of the two, not open yet, on the clock given.
        before: Is called with the store that works, before each batch.
        after: Is called at the end, when the stores are closed.
    """

    def __init__(
        self,
        make: Callable[[FakeClock], Store],
        before: Callable[[Any], None] = lambda store: None,
        after: Callable[[], object] = lambda: None,
    ) -> None:
        self.clock = FakeClock()
        self.memory = MemoryStore(self.clock)
        self._make, self._before, self._after = make, before, after
        self._loop = asyncio.Runner()
        self.store, self._other = self._opened(), self._opened()

    def _opened(self) -> Store:
        store = self._make(self.clock)
        self._loop.run(store.open())
        return store

    def swap(self) -> None:
        """From now on, the other store on the same rows works."""
        self.store, self._other = self._other, self.store

    def answer(self, *batch: Operation) -> list[Any]:
        """Run *batch* on both, compare the answers, and return them."""

        async def both() -> list[Any]:
            expected = comparable(await self.memory.run(batch))
            assert comparable(await self.store.run(batch)) == expected
            return expected

        self._before(self.store)
        return self._loop.run(both())

    def compare(self) -> None:
        """Compare everything that is kept."""
        self.compare_reads(EverythingKept())

    def run(self, *batch: Operation) -> list[Any]:
        """Run *batch* on both, compare answers and everything that is kept, and return the answers."""
        answers = self.answer(*batch)
        self.compare()
        return answers

    def sweep_apart(self, sweep: Sweep, times: int) -> None:
        """Sweep both, and compare how much they do each time, and what is left at the end."""

        async def both() -> None:
            for _ in range(times):
                assert await self.store.run([sweep]) == await self.memory.run([sweep])

        self._loop.run(both())
        self.run(sweep)

    def compare_reads(self, *queries: Any) -> None:
        """Read *queries* from both and compare what they found."""

        async def both() -> None:
            for query in queries:
                found, expected = await self.store.read(query), await self.memory.read(query)
                assert found.now == expected.now
                was, told = tables(expected.state), tables(found.state)
                assert {name: rows for name, rows in told.items() if rows != was[name]} == {
                    name: rows for name, rows in was.items() if rows != told[name]
                }, query

        self._loop.run(both())

    def reopen(self) -> None:
        """Close both stores for good, and make new ones."""
        self._close_stores()
        self.store, self._other = self._opened(), self._opened()

    def _close_stores(self) -> None:
        self._loop.run(self.store.close())
        self._loop.run(self._other.close())

    def close(self) -> None:
        """Close the stores and the loop, and what was made for them."""
        self._close_stores()
        self._loop.close()
        self._after()


def _beside_memory(pairs: Callable[[], Pair]) -> type[RuleBasedStateMachine]:
    class BesideMemory(RuleBasedStateMachine):
        """Random sequences on both stores; between them the clock moves, others write, and the store is reopened."""

        @initialize()
        def begin(self) -> None:
            """Open both."""
            self.pair = pairs()

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
            """Let the other one of the two stores on the same rows work."""
            self.pair.swap()

        @rule()
        def reopen(self) -> None:
            """Close both and open them again."""
            self.pair.reopen()

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
                ReadingsKept(),
            )

        def teardown(self) -> None:
            """Close what was opened."""
            if hasattr(self, "pair"):
                self.pair.close()

    return BesideMemory


def run_any_sequences(pairs: Callable[[], Pair]) -> None:
    """Short sequences that Hypothesis makes of few things, so that everything meets everything."""
    run_state_machine_as_test(
        _beside_memory(pairs),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def run_as_a_service(pairs: Callable[[], Pair], steps: int = STEPS) -> None:
    """Long traffic, *steps* operations that live and end as in service; Hypothesis chooses what it begins from."""

    # A smaller number is no smaller traffic: nothing to shrink.
    @settings(max_examples=-(-steps // STEPS_EACH), deadline=None, database=None, phases=[Phase.generate])
    @given(st.integers(0, 2**32), st.booleans())
    def play(seed: int, whole: bool) -> None:
        pair = pairs()
        try:
            _play(pair, Service(seed, pair.clock, whole_steps=whole))
        finally:
            pair.close()

    play()


def _play(pair: Pair, service: Service) -> None:
    done = batches = 0
    while done < STEPS_EACH:
        batch: Sequence[Operation] = service.batch()
        pair.answer(*batch)
        done, batches = done + len(batch), batches + 1
        if batches % COMPARED == 0:
            pair.compare()
            pair.swap()
    pair.compare()
