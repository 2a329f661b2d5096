"""Prompt answers: in which turn of the event loop whoever waits for one goes on."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable

import pytest

from asgi_metering.stores.prompt import Prompt

STAGE = contextvars.ContextVar[str]("stage")


async def turns(number: int = 3) -> None:
    """Let the loop turn."""
    for _ in range(number):
        await asyncio.sleep(0)


def play(scene: Callable[[Prompt[int]], Awaitable[None]]) -> None:
    """Play *scene* with something to wait for."""

    async def run() -> None:
        await scene(Prompt(loop=asyncio.get_running_loop()))

    asyncio.run(run())


def test_waiter_goes_on_inside_of_the_answer() -> None:
    """In its own context, and before the callback that answers is over: a busy loop has no say in it."""

    async def scene(prompt: Prompt[int]) -> None:
        seen: list[object] = []

        async def wait() -> None:
            STAGE.set("waiter")
            seen.append(await prompt)
            seen.append(STAGE.get())

        def answer() -> None:
            prompt.set_result(7)
            seen.append("answered")

        task = asyncio.create_task(wait())
        await turns()
        asyncio.get_running_loop().call_soon(answer)
        await task
        assert seen == [7, "waiter", "answered"]

    play(scene)


def test_waiter_of_an_answer_within_a_task_goes_on_in_the_next_turn() -> None:
    """One task never runs inside of another."""

    async def scene(prompt: Prompt[int]) -> None:
        task = asyncio.create_task(_value(prompt))
        await turns()
        prompt.set_result(7)
        assert not task.done()
        assert await task == 7

    play(scene)


def test_waiter_in_the_context_that_answers_goes_on_in_the_next_turn() -> None:
    """A context is entered once at a time."""

    async def scene(prompt: Prompt[int]) -> None:
        context = contextvars.copy_context()
        task = asyncio.create_task(_value(prompt), context=context)
        await turns()
        asyncio.get_running_loop().call_soon(prompt.set_result, 7, context=context)
        assert await task == 7

    play(scene)


def test_answer_that_is_there_already_is_not_waited_for() -> None:
    """As of any future."""

    async def scene(prompt: Prompt[int]) -> None:
        prompt.set_result(7)
        assert await prompt == 7

    play(scene)


def test_all_waiters_are_answered() -> None:
    """The first at once, and the others in the next turn."""

    async def scene(prompt: Prompt[int]) -> None:
        tasks = [asyncio.create_task(_value(prompt)) for _ in range(3)]
        heard: list[int] = []
        await turns()
        prompt.add_done_callback(lambda done: heard.append(done.result()))
        asyncio.get_running_loop().call_soon(prompt.set_result, 7)
        assert await asyncio.gather(*tasks) == [7, 7, 7]
        assert heard == [7]

    play(scene)


def test_failure_wakes_the_waiter() -> None:
    """In the next turn: a deadline may pass anywhere."""

    async def scene(prompt: Prompt[int]) -> None:
        task = asyncio.create_task(_value(prompt))
        await turns()
        prompt.set_exception(ValueError("no"))
        assert not task.done()
        with pytest.raises(ValueError, match="no"):
            await task

    play(scene)


def test_cancelled_waiter_ends() -> None:
    """A task that waits is cancelled with what it waits for, and the answer finds nobody."""

    async def scene(prompt: Prompt[int]) -> None:
        task = asyncio.create_task(_value(prompt))
        await turns()
        task.cancel("gone")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert prompt.cancelled()
        assert not prompt.cancel()

    play(scene)


def test_waiter_that_was_taken_away_hears_nothing() -> None:
    """Whatever waits for several things at once takes its callbacks away from those that come later."""

    async def scene(prompt: Prompt[int]) -> None:
        heard: list[object] = []
        prompt.add_done_callback(heard.append, context=contextvars.copy_context())
        prompt.add_done_callback(heard.append)
        assert prompt.remove_done_callback(print) == 0
        assert prompt.remove_done_callback(heard.append) == 2
        prompt.set_result(7)
        await turns()
        assert heard == []

    play(scene)


async def _value(prompt: Prompt[int]) -> int:
    return await prompt
