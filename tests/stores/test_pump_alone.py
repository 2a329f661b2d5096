"""The pump's lone callers: where a store can send in the caller's own turn, what comes of that is as of a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import StoreUnavailableError, UnwritableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Operation, PostGrant
from asgi_metering.stores.pump import Pump
from tests.stores.gated import GatedStore, ask, submit, turns


class StartingStore(GatedStore):
    """
    A store that sends at once, and answers when the test says so.

    Attributes:
        started: What was sent at once, and whom to tell.
        can_start: Whether it can now.
    """

    lanes = 2

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[Operation, Callable[[Answer | Exception | None], None]]] = []
        self.can_start = True

    def start(self, operation: Operation, told: Callable[[Answer | Exception | None], None]) -> bool:
        """Keep it until the test answers it."""
        if self.can_start:
            self.started.append((operation, told))
        return self.can_start

    async def answer(self, place: int = 0) -> None:
        """Do what was sent at once, and say so."""
        operation, told = self.started[place]
        (answer,) = await self.inner.run([operation])
        told(answer)


def play(scene: Callable[[StartingStore, Pump, list[Admit]], Awaitable[None]]) -> None:
    """Play *scene* on a store whose payer has 1,000 units; the list gets admissions whose outcome is unknown."""

    async def opened() -> None:
        store, unknown = StartingStore(), []  # type: tuple[StartingStore, list[Admit]]
        await store.inner.post([PostGrant("g", "p", "credits", 1_000)])
        pump = Pump(store, unknown.append)
        await scene(store, pump, unknown)
        store.gate.set()
        await pump.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(opened())


def test_submit_alone_goes_in_its_own_turn() -> None:
    """A lone caller's operation is sent before its turn ends; what comes meanwhile goes together, in a lane."""

    async def scene(store: StartingStore, pump: Pump, _: list[Admit]) -> None:
        first = submit(pump, ask("a"))
        await turns(1)
        assert [operation for operation, _ in store.started] == [ask("a")]
        others = submit(pump, ask("b"), ask("c"))
        await turns()
        assert store.batches == [["b", "c"]]
        late = submit(pump, ask("d"))
        await turns()
        # One alone and one batch: all lanes are taken.
        assert store.batches == [["b", "c"]]
        await store.answer()
        await turns()
        assert store.batches == [["b", "c"], ["d"]]
        store.gate.set()
        answers = await asyncio.gather(*first, *others, *late)
        assert [answer.id for answer in answers if isinstance(answer, Decision)] == list("abcd")
        assert len(store.started) == 1

    play(scene)


def test_lone_caller_goes_on_in_the_turn_of_the_answer() -> None:
    """A callback of the loop that brings the answer has run the caller on, and what it asks next is sent already."""

    async def scene(store: StartingStore, pump: Pump, _: list[Admit]) -> None:
        async def come_again() -> None:
            for name in "abc":
                await pump.submit(ask(name))

        loop, coming = asyncio.get_running_loop(), asyncio.create_task(come_again())
        for place in range(3):
            await turns()
            operation, told = store.started[place]
            (answer,) = await store.inner.run([operation])
            sent: list[int] = []
            loop.call_soon(lambda tell=told, answer=answer, sent=sent: (tell(answer), sent.append(len(store.started))))
            await turns(1)
            assert sent == [min(place + 2, 3)]
        await coming
        assert store.batches == []

    play(scene)


def test_submit_after_a_batch_of_several_goes_by_lane() -> None:
    """Callers that came together come again together: the first of them does not go ahead alone."""

    async def scene(store: StartingStore, pump: Pump, _: list[Admit]) -> None:
        store.gate.set()
        store.can_start = False
        await asyncio.gather(*submit(pump, ask("a"), ask("b")))
        store.can_start = True
        await asyncio.gather(*submit(pump, ask("c"), ask("d")))
        assert store.batches == [["a", "b"], ["c", "d"]]
        await asyncio.gather(*submit(pump, ask("e")))
        assert (store.batches[2:], store.started) == ([["e"]], [])
        (last,) = submit(pump, ask("f"))
        await turns()
        await store.answer()
        assert isinstance(await last, Decision)

    play(scene)


def test_operation_that_was_not_done_alone_is_run() -> None:
    """What has to be run after all goes by lane, and its deadline still holds."""

    async def scene(store: StartingStore, pump: Pump, _: list[Admit]) -> None:
        first = asyncio.ensure_future(pump.submit(ask("a"), 0.01))
        await turns(1)
        store.started[0][1](None)
        others = submit(pump, ask("b"))
        await turns()
        assert store.batches == [["a"], ["b"]]
        with pytest.raises(StoreUnavailableError, match="no answer within"):
            await first
        store.gate.set()
        assert isinstance(await others[0], Decision)
        await pump.drain()
        # It was answered when its caller had gone.
        assert (await store.account()).held == 1

    play(scene)


@pytest.mark.parametrize(
    ("told", "raised", "is_unknown"),
    [(StoreUnavailableError("lost"), StoreUnavailableError, True), (ValueError("odd"), UnwritableError, False)],
)
def test_operation_that_fails_alone(told: Exception, raised: type[Exception], is_unknown: bool) -> None:
    """A lone caller gets the failure; an admission that may have happened is told of, and the pump goes on."""

    async def scene(store: StartingStore, pump: Pump, unknown: list[Admit]) -> None:
        (first,) = submit(pump, ask("a"))
        await turns()
        store.started[0][1](told)
        with pytest.raises(raised):
            await first
        assert unknown == ([ask("a")] if is_unknown else [])
        await pump.drain()
        (second,) = submit(pump, ask("b"))
        await turns()
        await store.answer(1)
        assert isinstance(await second, Decision)

    play(scene)


def test_cancel_while_alone() -> None:
    """A lone caller that leaves while its admission is away leaves no hold."""

    async def scene(store: StartingStore, pump: Pump, _: list[Admit]) -> None:
        (gone,) = submit(pump, ask("gone", 30))
        await turns()
        gone.cancel()
        store.gate.set()
        await store.answer()
        await pump.drain()
        assert (await store.account()).held == 0

    play(scene)


def test_drain_and_close_wait_for_a_lone_operation() -> None:
    """Draining ends when the lone operation is answered; who gives up waiting in `close` tells its caller."""

    async def scene(store: StartingStore, pump: Pump, _: list[Admit]) -> None:
        (first,) = submit(pump, ask("a"))
        await turns()
        drained = asyncio.ensure_future(pump.drain())
        await turns()
        assert not drained.done()
        await store.answer()
        await drained
        assert isinstance(await first, Decision)
        (second,) = submit(pump, ask("b"))
        closing: asyncio.Task[Any] = asyncio.ensure_future(pump.close())
        await turns()
        closing.cancel()
        with pytest.raises(StoreUnavailableError, match="was stopped"):
            await second
        # What comes now is nobody's.
        await store.answer(1)
        await pump.drain()
        (third,) = submit(pump, ask("c"))
        await turns()
        await store.answer(2)
        assert isinstance(await third, Decision)

    play(scene)
