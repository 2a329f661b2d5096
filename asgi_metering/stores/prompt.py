"""
Prompt answers: who waits for one goes on in the turn of the event loop in which it comes.

A future of the standard library wakes its waiter in the next turn, and where the loop is busy a turn is a millisecond.
Knows futures and tasks; nothing of what is waited for.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ["Prompt"]

_Result = TypeVar("_Result")


class Prompt(asyncio.Future[_Result]):
    """
    A future whose first waiter runs inside of `set_result`.

    So that is called last, by a callback of the loop that has nothing left to do; within a task it is a future as all
    others. A failure and a cancellation wake in the next turn: they come from anywhere.
    """

    _waiter: tuple[Callable[[Any], object], contextvars.Context] | None = None

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: contextvars.Context | None = None) -> None:
        """As of any future; the first of them, which is a task's that awaits it, is the waiter."""
        if self._waiter is not None or self.done() or context is None:
            super().add_done_callback(fn, context=context)
        else:
            self._waiter = (fn, context)

    def remove_done_callback(self, fn: Callable[[Any], object], /) -> int:
        """As of any future."""
        removed = super().remove_done_callback(fn)
        if self._waiter is not None and self._waiter[0] == fn:
            self._waiter = None
            removed += 1
        return removed

    def set_result(self, result: _Result, /) -> None:
        """Answer, and let the waiter go on before this returns."""
        super().set_result(result)
        waiter, self._waiter = self._waiter, None
        if waiter is None:
            return
        fn, context = waiter
        try:
            context.run(fn, self)
        except RuntimeError:
            # A task is running, or this is its context: nothing of the waiter has run.
            self.get_loop().call_soon(fn, self, context=context)

    def set_exception(self, exception: type | BaseException, /) -> None:
        """As of any future."""
        super().set_exception(exception)
        self._wake_later()

    def cancel(self, msg: Any | None = None) -> bool:
        """As of any future."""
        is_cancelled = super().cancel(msg)
        self._wake_later()
        return is_cancelled

    def _wake_later(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            self.get_loop().call_soon(waiter[0], self, context=waiter[1])
