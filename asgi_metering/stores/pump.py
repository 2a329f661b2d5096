"""
The pump: operations that wait together go to the store together.

One pump per event loop and store. There is no timer: a batch is what came while the one before was away, so a lone
caller never waits. Callers wait on plain futures; their cancellation never reaches the store's connection.
Knows operations only as far as their order and cancellation matter; never decides anything.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from typing import NamedTuple

from asgi_metering.decisions import Decision
from asgi_metering.errors import MeteringError, StoreError, StoreUnavailableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, End, Operation
from asgi_metering.stores.contract import Store

__all__ = ["Pump"]

log = logging.getLogger("asgi_metering.stores")

MAX_BATCH = 128
"""Operations in one batch: larger ones delay the first more than they save."""

MAX_WAITING = 10_000
"""Admissions that may wait: beyond it the store cannot keep up, and saying so at once is kinder than a timeout."""

ENDS_SHARE = 4
"""Each batch keeps one place in four for ends: under a storm of admissions, ends free what those wait for."""


class _Waiting(NamedTuple):
    operation: Operation
    future: asyncio.Future[Answer]


class Pump:
    """
    Send operations to *store* in batches.

    Args:
        store: Opened by whoever owns it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._admissions: deque[_Waiting] = deque()
        self._others: deque[_Waiting] = deque()
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._idle = asyncio.Event()

    async def submit(self, operation: Operation, deadline_s: float | None = None) -> Answer:
        """
        Run one operation and return its answer.

        A caller that is cancelled, or whose deadline passes, before its batch starts is taken out of it. If an
        admission is answered after its caller has gone, its hold is released at once, by id (pitfall 29).

        Args:
            operation: One atomic step.
            deadline_s: Seconds to wait for the answer; None waits as long as the store does.

        Raises:
            StoreUnavailableError: No answer in time, the store cannot be reached, or too many are waiting.
            MeteringError: The operation is a mistake; nothing changed.
        """
        if self._store.immediate:
            return self._store.run_now(operation)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        queue = self._admissions if isinstance(operation, Admit) else self._others
        if queue is self._admissions and len(queue) >= MAX_WAITING:
            raise StoreUnavailableError(f"{len(queue)} admissions wait for the {self._store.name} store already.")
        queue.append(_Waiting(operation, future))
        self._idle.clear()
        self._start(loop)
        if deadline_s is None:
            return await future
        timer = loop.call_later(deadline_s, self._expire, future, deadline_s)
        try:
            return await future
        finally:
            timer.cancel()

    def _expire(self, future: asyncio.Future[Answer], deadline_s: float) -> None:
        if not future.done():
            future.set_exception(
                StoreUnavailableError(f"The {self._store.name} store gave no answer within {deadline_s} s.")
            )

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._task is None or self._task.done():
            # Not in the context of whichever request came first: its variables would live as long as the pump.
            self._task = loop.create_task(self._run(), name="asgi_metering pump", context=contextvars.Context())
        elif self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = self._take()
            if batch:
                await self._send(batch)
            elif not self._admissions and not self._others:
                self._idle.set()
                self._wake = loop.create_future()
                await self._wake

    def _take(self) -> list[_Waiting]:
        """The next batch: admissions first, with a share of ends, in order of arrival; no abandoned callers."""
        reserved = min(len(self._others), MAX_BATCH // ENDS_SHARE)
        batch = _draw(self._admissions, MAX_BATCH - reserved)
        batch.extend(_draw(self._others, MAX_BATCH - len(batch)))
        return batch

    async def _send(self, batch: list[_Waiting]) -> None:
        try:
            answers = await self._store.run([waiting.operation for waiting in batch])
        except asyncio.CancelledError:
            self._fail(batch, StoreUnavailableError("The event loop is shutting down."))
            raise
        except StoreError as failure:
            self._fail(batch, failure)
        except Exception as failure:  # noqa: BLE001 -- whatever it is, it is one operation's and not its neighbours'
            await self._send_one_by_one(batch, failure)
        else:
            for waiting, answer in zip(batch, answers, strict=True):
                self._deliver(waiting, answer)

    async def _send_one_by_one(self, batch: list[_Waiting], failure: Exception) -> None:
        """A batch that cannot be written as a whole: only its guilty operation shall fail."""
        if len(batch) == 1:
            log.error("The %s store could not run %r.", self._store.name, batch[0].operation, exc_info=failure)
            error = StoreError(f"The {self._store.name} store could not run the operation: {failure!r}.")
            error.__cause__ = failure
            self._fail(batch, error)
            return
        for waiting in batch:
            await self._send([waiting])

    def _fail(self, batch: list[_Waiting], failure: StoreError) -> None:
        for waiting in batch:
            if not waiting.future.done():
                # Each caller gets an exception of its own: tracebacks grow where they are raised.
                error = type(failure)(*failure.args)
                error.__cause__ = failure.__cause__ or failure
                waiting.future.set_exception(error)

    def _deliver(self, waiting: _Waiting, answer: Answer | Exception) -> None:
        future = waiting.future
        if future.done():
            self._abandoned(waiting.operation, answer)
        elif isinstance(answer, Exception):
            future.set_exception(answer if isinstance(answer, MeteringError) else StoreError(repr(answer)))
        else:
            future.set_result(answer)

    def _abandoned(self, operation: Operation, answer: Answer | Exception) -> None:
        """The caller is gone: what it would have owned is given back."""
        if isinstance(operation, Admit) and isinstance(answer, Decision) and answer.admitted:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[Answer] = loop.create_future()
            self._others.append(_Waiting(End(operation.id, None), future))

    async def drain(self) -> None:
        """Wait until everything that was submitted has been sent and answered."""
        if self._task is not None and not self._task.done():
            await self._idle.wait()

    async def close(self) -> None:
        """Drain, then stop."""
        await self.drain()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._task = None


def _draw(queue: deque[_Waiting], most: int) -> list[_Waiting]:
    drawn: list[_Waiting] = []
    while queue and len(drawn) < most:
        waiting = queue.popleft()
        if not waiting.future.done():
            drawn.append(waiting)
    return drawn
