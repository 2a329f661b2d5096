"""Deadlines: each is kept, whatever order they come in, under one timer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop

from asgi_metering.stores.deadlines import Deadlines


def _play(scene: Callable[[asyncio.AbstractEventLoop, Deadlines], Awaitable[None]]) -> None:
    async def main() -> None:
        await scene(asyncio.get_running_loop(), Deadlines(lambda future, deadline_s: future.set_result(deadline_s)))

    asyncio.run(main())


def _timers(loop: Any) -> int:
    return sum(1 for timer in loop._scheduled if not timer.cancelled())


def test_expire_each_in_its_time() -> None:
    """The soonest is over first, also where it came last; those that wait longer still do."""

    async def scene(loop: asyncio.AbstractEventLoop, _: Deadlines) -> None:
        order: list[float] = []

        def expire(future: asyncio.Future[Any], deadline_s: float) -> None:
            order.append(deadline_s)
            future.set_result(deadline_s)

        deadlines = Deadlines(expire)
        slow, soon, sooner = loop.create_future(), loop.create_future(), loop.create_future()
        deadlines.watch(slow, 60.0)
        # Far enough apart for a machine that has other things to do.
        deadlines.watch(soon, 0.1)
        deadlines.watch(sooner, 0.001)
        assert _timers(loop) == 1
        await asyncio.gather(soon, sooner)
        assert order == [0.001, 0.1]
        assert not slow.done()
        assert _timers(loop) == 1
        deadlines.stop()

    _play(scene)


def test_leave_those_that_were_answered() -> None:
    """A future that is done keeps its answer, and nothing waits for it any more."""

    async def scene(loop: asyncio.AbstractEventLoop, deadlines: Deadlines) -> None:
        answered, late = loop.create_future(), loop.create_future()
        deadlines.watch(answered, 0.0)
        answered.set_result("answer")
        deadlines.watch(late, 0.001)
        assert (await late, await answered) == (0.001, "answer")
        assert _timers(loop) == 0

    _play(scene)


def test_stop_waiting() -> None:
    """Stopped, they let everybody wait on, and leave no timer in the loop; they may be used again."""

    async def scene(loop: asyncio.AbstractEventLoop, deadlines: Deadlines) -> None:
        left, again = loop.create_future(), loop.create_future()
        deadlines.watch(left, 0.0)
        deadlines.stop()
        deadlines.stop()
        assert _timers(loop) == 0
        deadlines.watch(again, 0.0)
        assert await again == pytest.approx(0.0)
        assert not left.done()

    _play(scene)


def test_expire_where_the_loop_has_no_timers_that_short() -> None:
    """Milliseconds are what uvloop counts in, and its handles of what is due sooner do not say when that is."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(lambda future, deadline_s: future.set_result(deadline_s))
        over, later = loop.create_future(), loop.create_future()
        deadlines.watch(over, 0.0)
        deadlines.watch(later, 0.001)
        assert await asyncio.gather(over, later) == [0.0, 0.001]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scene())
