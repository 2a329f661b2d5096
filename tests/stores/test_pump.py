"""The pump: batches, lanes, operations that cannot be written, and its end."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import (
    IdempotencyConflictError,
    MeteringError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
    UnwritableError,
)
from asgi_metering.receipts import Basis
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Emit,
    End,
    LeaseAsk,
    Operation,
    PostGrant,
)
from asgi_metering.stores import pump as pump_module
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.pump import MAX_BATCH, Pump
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from tests.stores.gated import GatedStore, ask, play, submit, turns

# -- batches -----------------------------------------------------------------------------------------------


def test_submit_what_waits_together_goes_together() -> None:
    """A lone operation goes at once; what comes while it is away goes together, in order of arrival."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        first = submit(pump, ask("a"))
        await turns()
        rest = submit(pump, ask("b"), End("a", None), ask("c"), End("b", None), PostGrant("g2", "p", "credits", 1))
        await turns()
        assert store.batches == [["a"]]
        store.gate.set()
        await asyncio.gather(*first, *rest)
        assert store.batches == [["a"], ["b", "a", "c", "b", "g2"]]

    play(scene)


def test_submit_more_than_a_batch() -> None:
    """A batch has a bound; what is above it goes with the next."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        callers = submit(pump, *(ask(f"c{number}") for number in range(MAX_BATCH + 10)))
        store.gate.set()
        await asyncio.gather(*callers)
        assert [len(batch) for batch in store.batches] == [MAX_BATCH, 10]

    play(scene)


def test_submit_on_sqlite_in_batches_as_large_as_the_crowd(tmp_path: Path) -> None:
    """With 32 callers that each wait for their answer, a store with a commit sees batches of about 32."""
    sizes: list[int] = []

    class Counting(SQLiteStore):
        """Counts what goes together."""

        async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
            sizes.append(len(operations))
            return await super().run(operations)

        def start(self, operation: Operation, told: Callable[[Answer | Exception | None], None]) -> bool:
            """Count what goes alone."""
            sizes.append(1)
            return super().start(operation, told)

    async def scene() -> None:
        store = Counting(tmp_path / "m.db", synchronous="OFF")
        await store.open()
        pump = Pump(store)
        await pump.submit(PostGrant("g", "p", "credits", 10_000))

        async def caller(number: int) -> None:
            for turn in range(10):
                await pump.submit(ask(f"c{number}.{turn}"))
                await pump.submit(End(f"c{number}.{turn}", 1, Basis.USAGE))

        await asyncio.gather(*(caller(number) for number in range(32)))
        await pump.close()
        await store.close()

    asyncio.run(scene())
    assert sum(sizes) == 641
    assert len(sizes) <= 41


def test_submit_an_end_before_the_admission_that_needs_it() -> None:
    """An end that arrived first frees its slot for the admission behind it, in the same batch."""
    leases = (LeaseAsk("at once", "pool", 1),)

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        await pump.submit(ask("a", leases=leases))
        store.gate.clear()
        away = submit(pump, Emit(()))
        await turns()
        _, decision = waiting = submit(pump, End("a", None), ask("b", leases=leases))
        store.gate.set()
        await asyncio.gather(*away, *waiting)
        answer: Any = decision.result()
        assert answer.admitted

    play(scene)


def test_submit_ends_under_a_storm_of_admissions() -> None:
    """However many admissions wait, every batch has room for ends: they free what the admissions wait for."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        storm = submit(pump, *(ask(f"c{number}") for number in range(3 * MAX_BATCH)))
        ends = submit(pump, *(End(f"e{number}", None) for number in range(MAX_BATCH // 2)))
        store.gate.set()
        await asyncio.gather(*storm, *ends)
        shares = [sum(call_id.startswith("e") for call_id in batch) for batch in store.batches]
        assert shares[:2] == [MAX_BATCH // 4, MAX_BATCH // 4]

    play(scene)


def test_submit_admissions_under_a_storm_of_ends() -> None:
    """However many ends wait, admissions go with the next batch."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        ends = submit(pump, *(End(f"e{number}", None) for number in range(3 * MAX_BATCH)))
        (late,) = submit(pump, ask("late"))
        store.gate.set()
        await asyncio.gather(*ends, late)
        assert "late" in store.batches[0]

    play(scene)


def test_submit_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound admissions are refused at once; ends never are."""
    monkeypatch.setattr(pump_module, "MAX_WAITING", 3)

    async def scene(store: GatedStore, pump: Pump) -> None:
        away = submit(pump, Emit(()))
        await turns()
        waiting = submit(pump, *(ask(f"c{number}") for number in range(3)))
        await turns()
        with pytest.raises(StoreUnavailableError, match="3 admissions wait for the gated store already"):
            await pump.submit(ask("one too many"))
        ends = submit(pump, *(End(f"e{number}", None) for number in range(5)))
        store.gate.set()
        await asyncio.gather(*away, *waiting, *ends)
        assert isinstance(await pump.submit(ask("now")), Decision)

    play(scene)


def test_submit_to_a_store_that_answers_at_once() -> None:
    """Nothing is queued for a store that needs no waiting: no task is started, no turn of the loop passes."""

    async def scene() -> None:
        pump = Pump(MemoryStore(FakeClock()))
        steps = pump.submit(PostGrant("g", "p", "credits", 5))
        with pytest.raises(StopIteration):
            steps.send(None)
        assert len(asyncio.all_tasks()) == 1
        await pump.drain()
        await pump.close()

    asyncio.run(scene())


@pytest.mark.parametrize("facts", [{"ttl_s": "soon"}, {"id": []}])
def test_submit_what_an_immediate_store_cannot_run(facts: dict[str, Any]) -> None:
    """What breaks a store that answers at once is told in the words of every other store."""

    async def scene() -> None:
        pump = Pump(MemoryStore(FakeClock()))
        await pump.submit(PostGrant("g", "p", "credits", 5))
        with pytest.raises(UnwritableError, match="The memory store could not run the operation: TypeError"):
            await pump.submit(ask("a")._replace(**facts))
        with pytest.raises(MeteringError) as mistake:
            await pump.submit(PostGrant("g", "p", "credits", 6))
        assert type(mistake.value) is IdempotencyConflictError

    asyncio.run(scene())


def test_submit_outside_of_the_callers_context() -> None:
    """The pump's task does not keep the variables of whichever request started it."""
    secret: contextvars.ContextVar[str] = contextvars.ContextVar("secret")

    async def scene(store: GatedStore, pump: Pump) -> None:
        seen: list[str | None] = []
        store.on_batch = lambda ids: seen.append(secret.get(None))
        store.gate.set()
        secret.set("of the first request")
        await pump.submit(ask("a"))
        assert seen == [None]

    play(scene)


# -- lanes -------------------------------------------------------------------------------------------------


def test_submit_beside_a_batch_that_is_away() -> None:
    """Where a store has two lanes a second batch goes at once; what comes then goes together, when one is back."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.lanes = 2
        tasks = []
        for ids in ("ab", "cd", "e", "f"):
            tasks += submit(pump, *map(ask, ids))
            await turns()
        assert store.batches == [["a", "b"], ["c", "d"]]
        store.gate.set()
        answers = await asyncio.gather(*tasks)
        assert [answer.id for answer in answers if isinstance(answer, Decision)] == list("abcdef")
        assert store.batches[2:] == [["e", "f"]]
        await pump.submit(ask("g"))
        assert store.batches[3:] == [["g"]]

    play(scene)


def test_drain_waits_for_all_lanes() -> None:
    """Draining ends when no lane has a batch away, and not when the first one is back."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.lanes = 2
        back = asyncio.Event()
        first = submit(pump, ask("a"))
        await turns()
        gate, store.gate = store.gate, back
        second = submit(pump, ask("b"))
        await turns()
        drained = asyncio.ensure_future(pump.drain())
        gate.set()
        await asyncio.gather(*first)
        await turns()
        assert not drained.done()
        back.set()
        await drained
        assert second[0].done()

    play(scene)


def test_lane_is_stopped_beside_another() -> None:
    """A lane whose run is cancelled tells its callers and those who wait; the other lane's get their answers."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.lanes = 2
        store.failures += [asyncio.CancelledError(), None]
        tasks = []
        for ids in ("a", "b", "c"):
            tasks += submit(pump, *map(ask, ids))
            await turns()
        store.gate.set()
        stopped, answered, waited = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(told) for told in (stopped, answered, waited)] == [
            StoreUnavailableError,
            Decision,
            StoreUnavailableError,
        ]
        await pump.drain()
        assert isinstance(await pump.submit(ask("d")), Decision)

    play(scene)


def test_close_stops_all_lanes() -> None:
    """Who gives up waiting stops every lane, also one that has not begun: all callers are told."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.lanes = 2
        away = submit(pump, ask("a"))
        await turns()
        closing = asyncio.ensure_future(pump.close())
        await turns()
        closing.cancel()
        with pytest.raises(StoreUnavailableError, match="was stopped"):
            await pump.submit(ask("b"))
        with pytest.raises(StoreUnavailableError, match="was stopped"):
            await away[0]
        assert store.batches == [["a"]]
        store.gate.set()
        await pump.drain()
        assert isinstance(await pump.submit(ask("c")), Decision)

    play(scene)


# -- failures ----------------------------------------------------------------------------------------------


def test_submit_a_mistake() -> None:
    """A mistake is raised where it was made, and nowhere else."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        mistake, fine = submit(pump, PostGrant("g", "p", "credits", 7), ask("a"))
        with pytest.raises(IdempotencyConflictError):
            await mistake
        assert isinstance(await fine, Decision)

    play(scene)


def test_submit_what_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """A batch with an operation that cannot be written is run one by one: only the guilty one fails, with its cause."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        before, guilty, after = submit(pump, ask("a"), End("unwritable", 5), ask("b"))
        with pytest.raises(StoreError, match="could not run the operation: ValueError") as caught:
            await guilty
        assert isinstance(caught.value.__cause__, ValueError)
        assert [getattr(await task, "admitted", None) for task in (before, after)] == [True, True]
        assert store.batches == [["a", "unwritable", "b"], ["a"], ["unwritable"], ["b"]]
        assert (await store.account()).held == 2

    with caplog.at_level(logging.ERROR):
        play(scene)
    assert "The gated store could not run End." in caplog.text


def test_cancel_while_operations_run_one_by_one() -> None:
    """Who leaves while a poisoned batch is run one by one is left out of it."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        guilty, gone, stays = submit(pump, End("unwritable", 5), ask("gone"), ask("stays"))
        store.on_batch = lambda ids: gone.cancel() if ids == ["unwritable"] else None
        store.gate.set()
        await asyncio.gather(guilty, gone, stays, return_exceptions=True)
        assert store.batches[1:] == [["unwritable"], ["stays"]]

    play(scene)


def test_submit_what_sqlite_cannot_write(tmp_path: Path) -> None:
    """On a real store too: facts that are no JSON fail their own call, and the calls beside it are admitted."""

    async def scene() -> None:
        store = SQLiteStore(tmp_path / "m.db", synchronous="OFF")
        await store.open()
        pump = Pump(store)
        await pump.submit(PostGrant("g", "p", "credits", 100))
        asks = [ask("a", 10), ask("poison", 10, facts={"when": object()}), ask("b", 10)]
        answers = await asyncio.gather(*submit(pump, *asks), return_exceptions=True)
        assert [type(answer) for answer in answers] == [Decision, UnwritableError, Decision]
        assert (await store.read(EverythingKept())).state.accounts["p", "credits"].held == 20
        await pump.close()
        await store.close()

    asyncio.run(scene())


@pytest.mark.parametrize("kind", [StoreUnavailableError, StoreContendedError, UnwritableError, StoreError])
def test_submit_to_a_store_that_fails(kind: type[StoreError]) -> None:
    """A store that fails fails the whole batch, once, each caller with an error of its own, and then goes on."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        cause = OSError("no route")
        failure = kind("The store is down.")
        failure.__cause__ = cause
        store.failures.append(failure)
        store.gate.set()
        first, second = await asyncio.gather(*submit(pump, ask("a"), ask("b")), return_exceptions=True)
        assert type(first) is type(second) is kind
        assert first is not second
        assert str(first) == "The store is down."
        assert isinstance(first, StoreError)
        assert first.__cause__ is cause
        assert isinstance(await pump.submit(ask("c")), Decision)

    play(scene)


def test_submit_to_a_store_with_errors_of_its_own() -> None:
    """An error class of a third-party store reaches callers as the class of ours that it is."""

    class UnusualError(StoreUnavailableError):
        def __init__(self, code: int, where: str) -> None:
            super().__init__(f"Error {code} at {where}.")

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.failures.append(UnusualError(7, "node 3"))
        store.gate.set()
        with pytest.raises(StoreUnavailableError, match="Error 7 at node 3"):
            await pump.submit(ask("a"))

    play(scene)


def test_submit_to_a_store_that_forgets_an_answer() -> None:
    """A store that does not answer each operation has failed: no caller waits for ever, none gets another's answer."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.forgets = 1
        store.gate.set()
        answers = await asyncio.gather(*submit(pump, ask("a"), ask("b")), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["The gated store gave 1 answers to 2 operations."] * 2
        store.forgets = 0
        assert isinstance(await pump.submit(ask("c")), Decision)

    play(scene)


def test_submit_an_answer_that_is_an_unforeseen_error(tmp_path: Path) -> None:
    """An error that a store answers for one operation, and that is none of ours, is wrapped once, with its cause."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        wrong: Any = "not an amount"
        guilty, fine = submit(pump, End("a", wrong), ask("a"))
        with pytest.raises(MeteringError) as caught:
            await guilty
        assert isinstance(caught.value, MeteringError)
        assert isinstance(await fine, Decision)
        store.inner.run = _type_errors  # type: ignore[method-assign]
        with pytest.raises(StoreError, match="could not run the operation: TypeError"):
            await pump.submit(ask("b"))

    play(scene)


async def _type_errors(operations: Sequence[Operation]) -> list[Answer | Exception]:
    return [TypeError("unforeseen") for _ in operations]


# -- the end -----------------------------------------------------------------------------------------------


def test_drain_waits_for_what_was_submitted() -> None:
    """Draining returns when everything was sent and answered, releases for callers that left included."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        await pump.drain()
        store.gate.set()
        await pump.submit(Emit(()))
        await pump.drain()
        store.gate.clear()
        gone, stays = submit(pump, ask("gone", 3), ask("stays", 4))
        await turns()
        gone.cancel()
        draining = asyncio.ensure_future(pump.drain())
        await turns()
        assert not draining.done()
        store.gate.set()
        await draining
        assert stays.done()
        assert (await store.account()).held == 4

    play(scene)


def test_close_drains_and_can_begin_again() -> None:
    """Closing drains and leaves no task; closing again does nothing; a later operation starts the pump again."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        tasks = submit(pump, *(ask(f"c{number}") for number in range(5)))
        await turns(1)
        await pump.close()
        assert all(task.done() for task in tasks)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await pump.close()
        assert isinstance(await pump.submit(ask("later")), Decision)

    play(scene)


def test_close_is_cancelled() -> None:
    """Who gives up waiting for a dead store stops the pump: those who wait are told, and nobody hangs."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        away = submit(pump, ask("away"))
        await turns()
        waits = submit(pump, ask("waits"), End("e", None))
        await turns()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(pump.close(), 0.001)
        answers = await asyncio.gather(*away, *waits, return_exceptions=True)
        assert [type(answer) for answer in answers] == [StoreUnavailableError] * 3
        assert {str(answer) for answer in answers} == {"The pump of the gated store was stopped."}

    play(scene)


def test_pump_is_stopped_by_a_store_that_is_cancelled() -> None:
    """A store whose run is cancelled from inside ends the pump, its callers are told, and the next one starts anew."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.failures.append(asyncio.CancelledError())
        store.gate.set()
        with pytest.raises(StoreUnavailableError, match="was stopped"):
            await pump.submit(ask("a"))
        assert isinstance(await pump.submit(ask("b")), Decision)

    play(scene)


def test_nothing_is_left_for_the_garbage_collector(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever became of callers and their errors, asyncio has nothing to complain about afterwards."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        for leave_after in range(8):
            store.failures.append(StoreUnavailableError("The store is down."))
            store.gate.clear()
            task = asyncio.ensure_future(pump.submit(ask(f"c{leave_after}"), deadline_s=0.0005))
            await turns(leave_after)
            task.cancel()
            store.gate.set()
            await asyncio.gather(task, return_exceptions=True)
            await pump.drain()
        store.failures.clear()

    with caplog.at_level(logging.ERROR):
        play(scene)
        gc.collect()
    assert caplog.text == ""
