"""The shipped suite itself: it notices stores that break a rule, and is easy to run."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Acknowledge, Admit, End, LimitAsk, Operation, PostGrant, Renew, Sweep
from asgi_metering.stores.contract import TABLES, Books, Filling, Query, Snapshot, Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import NOON, FakeClock
from asgi_metering.testing.conformance import StoreConformance


def suite_for(kind: Callable[[FakeClock], Store]) -> StoreConformance:
    """The suite, on stores of one kind."""

    class Suite(StoreConformance):
        async def make_store(self, clock: FakeClock) -> Store:
            return kind(clock)

    return Suite()


def failures(suite: StoreConformance) -> set[str]:
    """The names of the suite's tests that fail."""
    failed = set()
    for name, test in inspect.getmembers(suite, inspect.ismethod):
        if name.startswith("test_"):
            try:
                test()
            except Exception:
                failed.add(name.removeprefix("test_"))
    return failed


class Changing(MemoryStore):
    """A store that changes each operation before it runs it."""

    def changed(self, operation: Operation) -> Operation | None:
        """What is run instead; None runs nothing."""
        return operation

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """Run the changed operations."""
        changed = [self.changed(operation) for operation in operations]
        return await super().run([operation for operation in changed if operation is not None])


class Generous(Changing):
    """It admits for one unit less than was asked."""

    def changed(self, operation: Operation) -> Operation:
        """Ask for less."""
        if isinstance(operation, Admit) and operation.minimum:
            return operation._replace(minimum=operation.minimum - 1)
        return operation


class Silent(Changing):
    """It loses the events of ends."""

    def changed(self, operation: Operation) -> Operation:
        """Tell nothing."""
        return operation._replace(event=None) if isinstance(operation, End) else operation


class Shortsighted(Changing):
    """It looks at the first limit only."""

    def changed(self, operation: Operation) -> Operation:
        """Forget the others."""
        return operation._replace(limits=operation.limits[:1]) if isinstance(operation, Admit) else operation


class Weightless(Changing):
    """It does not correct weighted limits."""

    def changed(self, operation: Operation) -> Operation:
        """Correct nothing."""
        return operation._replace(actual={}) if isinstance(operation, End) else operation


class Deaf(Changing):
    """It does not hear what was observed."""

    def changed(self, operation: Operation) -> Operation:
        """Observe nothing."""
        return operation._replace(observed=0) if isinstance(operation, Renew) else operation


class Forgetful(Changing):
    """It forgets who was acknowledged, and gives grants new ids."""

    grants = 0

    def changed(self, operation: Operation) -> Operation:
        """Change ids."""
        if isinstance(operation, PostGrant):
            self.grants += 1
            return operation._replace(id=f"{operation.id} {self.grants}")
        return Acknowledge(()) if isinstance(operation, Acknowledge) else operation


class Thorough(Changing):
    """It sweeps without a bound."""

    def changed(self, operation: Operation) -> Operation:
        """Sweep everything."""
        return operation._replace(limit=10_000) if isinstance(operation, Sweep) else operation


class Calendarless(Changing):
    """It takes a calendar's windows for fixed ones."""

    def changed(self, operation: Operation) -> Operation:
        """Forget the boundaries."""
        if isinstance(operation, Admit):
            limits = tuple(LimitAsk(*limit[:2], "fixed", *limit[3:]) for limit in operation.limits)  # type: ignore[arg-type]
            return operation._replace(limits=limits)
        return operation


class Keyless(Changing):
    """It does not know charge keys."""

    def changed(self, operation: Operation) -> Operation:
        """Forget the charge key."""
        return operation._replace(charge_key=None) if isinstance(operation, Admit) else operation


class Repetitive(Changing):
    """It does not know idempotency keys."""

    def changed(self, operation: Operation) -> Operation:
        """Forget the idempotency key."""
        return operation._replace(idempotency=None) if isinstance(operation, Admit) else operation


class Mute(Changing):
    """It keeps no replies for repeats."""

    def changed(self, operation: Operation) -> Operation:
        """Forget the reply."""
        return operation._replace(reply=None) if isinstance(operation, End) else operation


class Unforgiving(Changing):
    """It keeps the keys of calls that failed."""

    def changed(self, operation: Operation) -> Operation:
        """Take failures for work that was done."""
        return operation._replace(failed=False) if isinstance(operation, End) else operation


class Partial(MemoryStore):
    """It takes from the limits although the call cannot pay."""

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """Take from the limits first."""
        answers: list[Answer | Exception] = []
        for operation in operations:
            if isinstance(operation, Admit) and operation.limits:
                counted = operation._replace(id=f"{operation.id} counted", amount=0, minimum=0, sources=(), leases=())
                await super().run([counted])
                operation = operation._replace(limits=())
            answers.extend(await super().run([operation]))
        return answers


class Disorderly(MemoryStore):
    """It hands its rows out from the last to the first."""

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """Turn them around."""
        async with super().books() as books:
            found = {table: [row async for page in books.rows(table) for row in page] for table in TABLES}

            async def rows(table: str) -> AsyncGenerator[Sequence[Any], None]:
                if found[table]:
                    yield found[table][::-1]

            books.rows = rows  # type: ignore[method-assign]
            yield books


class Overwriting(MemoryStore):
    """It puts rows over those that it keeps."""

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """Forget which they are."""
        async with super().fill() as filling:
            put = filling.put

            async def over(table: str, rows: Sequence[Any]) -> int:
                filling._keys[table].clear()  # type: ignore[attr-defined]
                return await put(table, rows)

            filling.put = over  # type: ignore[method-assign]
            yield filling


class Restless(MemoryStore):
    """Looking at it renews what lives."""

    async def read(self, query: Query) -> Snapshot:
        """Renew, then read."""
        found = await super().read(query)
        await self.run([Renew(hold_id) for hold_id in found.state.holds])
        return await super().read(query)


@pytest.mark.parametrize(
    ("kind", "noticed"),
    [
        (Generous, "admit_one_unit_too_much"),
        (Silent, "end_writes_its_event_in_the_same_step"),
        (Shortsighted, "refuse_by_one_of_several_limits"),
        (Weightless, "end_corrects_what_a_weighted_limit_counted"),
        (Deaf, "late_end_gives_back_what_was_too_much"),
        (Forgetful, "grant_twice"),
        (Thorough, "sweep_a_few_at_a_time"),
        (Calendarless, "calendar_window_ends_at_its_boundary"),
        (Keyless, "first_call_of_a_key_pays_and_others_join"),
        (Keyless, "first_success_settles_for_all"),
        (Keyless, "last_failure_releases_for_all"),
        (Keyless, "race_for_the_first_call_of_a_key"),
        (Keyless, "next_day_of_a_key_counts_again"),
        (Keyless, "rolling_window_of_a_key_ends_when_its_calls_do"),
        (Keyless, "call_of_a_key_in_doubt_still_holds"),
        (Repetitive, "repeat_of_a_request_in_flight"),
        (Repetitive, "repeat_of_a_request_that_is_done"),
        (Repetitive, "another_request_under_the_key"),
        (Repetitive, "failure_that_charged_nothing_frees_its_key"),
        (Repetitive, "call_in_doubt_keeps_its_key"),
        (Repetitive, "key_is_remembered_for_its_time"),
        (Repetitive, "race_for_a_key"),
        (Mute, "repeat_of_a_request_that_is_done"),
        (Unforgiving, "failure_that_charged_nothing_frees_its_key"),
        (Partial, "refuse_by_credits_takes_from_no_limit_and_no_pool"),
        (Restless, "read_renews_nothing"),
        (Disorderly, "order_of_books"),
        (Overwriting, "put_what_is_kept"),
        (lambda clock: MemoryStore(), "fixed_window_begins_at_the_first_hit"),
        (lambda clock: MemoryStore(FakeClock(clock())), "hold_goes_in_doubt_and_still_counts"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_suite_notices_a_store_that(kind: Callable[[FakeClock], Store], noticed: str) -> None:
    """A store that breaks a rule fails the test that says the rule."""
    with pytest.raises(AssertionError):
        getattr(suite_for(kind), f"test_{noticed}")()


def test_suite_passes_without_a_test_runner() -> None:
    """The suite needs no plug-in and no fixture: its tests are methods without arguments, each with its rule."""
    suite = suite_for(MemoryStore)
    assert failures(suite) == set()
    tests = [test for name, test in inspect.getmembers(suite, inspect.ismethod) if name.startswith("test_")]
    assert len(tests) > 100
    assert all(not inspect.signature(test).parameters and test.__doc__ for test in tests)


def test_suite_without_a_store() -> None:
    """Who forgets to say how a store is made is told so."""
    with pytest.raises(ConfigurationError, match=r"StoreConformance must say how its store is made"):
        StoreConformance().test_grant_twice()


def test_suite_closes_its_stores() -> None:
    """Every store that a test opened is closed, also when the test fails."""
    opened: list[str] = []

    class Counting(Generous):
        async def close(self) -> None:
            opened.remove("store")

    def make(clock: FakeClock) -> Store:
        opened.append("store")
        return Counting(clock)

    suite = suite_for(make)
    with pytest.raises(AssertionError):
        suite.test_admit_one_unit_too_much()
    suite.test_run_together_as_one_by_one()
    assert opened == []


def test_clock_moves_when_it_is_told() -> None:
    """A fake clock stands still until it is moved, forward or back."""
    clock = FakeClock()
    assert (clock(), clock()) == (NOON, NOON)
    assert clock.advance(1.5) == clock() == NOON + 1.5
    assert clock.advance(-2.0) == NOON - 0.5
    assert repr(FakeClock(7.0)) == "FakeClock(7.0)"
