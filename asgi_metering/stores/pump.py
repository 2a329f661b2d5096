"""
The pump: operations that wait together go to the store together.

One pump per event loop and store. There is no timer: a batch is what came while all lanes of the store were taken, so a
lone caller never waits. Callers wait on plain futures; their cancellation never reaches the store's connection.
Knows operations only as far as their order and cancellation matter; never decides anything.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from typing import NamedTuple

from asgi_metering.decisions import Decision
from asgi_metering.errors import (
    MeteringError,
    StoreContendedError,
    StoreError,
    StoreUnavailableError,
    UnwritableError,
)
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Operation, Undo
from asgi_metering.rules.state import build
from asgi_metering.stores.contract import Store
from asgi_metering.stores.deadlines import Deadlines
from asgi_metering.stores.prompt import Prompt

__all__ = ["Pump"]

log = logging.getLogger("asgi_metering.stores")

MAX_BATCH = 128
"""Operations in one batch: larger ones delay the first more than they save."""

MAX_WAITING = 10_000
"""Admissions that may wait: beyond it the store cannot keep up, and saying so at once is kinder than a timeout."""

ENDS_SHARE = 4
"""Each batch keeps one place in four for ends: under a storm of admissions, ends free what those wait for."""


class _Waiting(NamedTuple):
    """An operation and whoever waits for it. ``number`` counts arrivals; of ``is_repeated`` see `Pump.submit`."""

    number: int
    operation: Operation
    future: asyncio.Future[Answer]
    is_repeated: bool = False


_by_arrival = attrgetter("number")


class Pump:
    """
    Send operations to *store* in batches.

    Args:
        store: Opened, and closed after the pump, by whoever owns it.
        unknown: Called with each admission that was sent and got no answer, or whose undoing got none: it may hold
            something all the same.
    """

    def __init__(self, store: Store, unknown: Callable[[Admit], None] | None = None) -> None:
        self._store = store
        self._unknown = unknown
        self._admissions: deque[_Waiting] = deque()
        self._others: deque[_Waiting] = deque()
        self._arrived = 0
        self._lanes: list[asyncio.Task[None]] = []
        self._asleep: list[asyncio.Future[None]] = []
        self._awake = 0
        # Sent by its caller in its own turn, and counted among the lanes; how many the last batch were.
        self._alone: _Waiting | None = None
        self._last = 0
        self._is_coming = False
        self._idle = asyncio.Event()
        self._deadlines = Deadlines(self._expire)

    @property
    def waiting(self) -> int:
        """Admissions that wait for a lane."""
        return len(self._admissions)

    async def submit(
        self, operation: Operation, deadline_s: float | None = None, *, is_repeated: bool = False
    ) -> Answer:
        """
        Run one operation and return its answer.

        A caller that is cancelled, or whose deadline passes, before its batch starts is taken out of it. If an
        admission is answered after its caller has gone, it is undone at once, with all that it counted (pitfall 29).

        Args:
            operation: One atomic step.
            deadline_s: Seconds to wait for the answer; None waits as long as the store does.
            is_repeated: The caller asks again, under the same id, until there is an answer: an admission that it did
                not hear of is not given back, since the next time it would find it ended.

        Raises:
            StoreUnavailableError: No answer in time, the store cannot be reached, too many are waiting, or the pump
                was stopped meanwhile.
            UnwritableError: The store could not run this operation, and will not when it is repeated.
            StoreError: The store could not do it.
            MeteringError: The operation is a mistake; nothing changed.
        """
        if self._store.immediate:
            try:
                return self._store.run_now(operation)
            except MeteringError:
                raise
            except Exception as failure:
                raise _unwritable(self._store, failure) from failure
        if len(self._admissions) >= MAX_WAITING and isinstance(operation, Admit):
            raise StoreUnavailableError(
                f"{len(self._admissions)} admissions wait for the {self._store.name} store already. Ask again later."
            )
        future = (None if self._awake else self._start(operation, is_repeated)) or self._enqueue(operation, is_repeated)
        if deadline_s is not None:
            self._deadlines.watch(future, deadline_s)
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and not is_repeated:
                # Answered and cancelled in one turn of the loop: the answer never reached the caller.
                self._abandoned(operation, future.exception() or future.result())
            raise
        except GeneratorExit:
            # Nobody goes on with the caller, and nobody cancelled it.
            if not future.cancel() and not is_repeated and not (future.cancelled() or future.exception()):
                # Where no loop runs any more its hold expires.
                with suppress(RuntimeError):
                    self._abandoned(operation, future.result())
            raise

    def _enqueue(self, operation: Operation, is_repeated: bool = False) -> asyncio.Future[Answer]:
        loop = asyncio.get_running_loop()
        # As the loop makes it, without a function of its own.
        future: asyncio.Future[Answer] = asyncio.Future(loop=loop)
        queue = self._admissions if isinstance(operation, Admit) else self._others
        self._arrived += 1
        queue.append(build(_Waiting, (self._arrived, operation, future, is_repeated)))
        if not self._awake:
            self._idle.clear()
        if not self._is_coming:
            self._is_coming = self._wake(loop)
        return future

    def _start(self, operation: Operation, is_repeated: bool) -> asyncio.Future[Answer] | None:
        """
        Send the operation of a lone caller in its own turn of the loop, which costs less than to wake a lane.

        Asked for while no lane is awake.

        Not where the last batch was of several: they come again, in this turn, and shall go together.
        """
        if self._admissions or self._others or self._last > 1:
            return None
        self._arrived += 1
        waiting = _Waiting(self._arrived, operation, Prompt(loop=asyncio.get_running_loop()), is_repeated)
        if not self._store.start(operation, partial(self._started, waiting)):
            return None
        self._alone, self._last = waiting, 1
        self._awake += 1
        self._idle.clear()
        return waiting.future

    def _started(self, waiting: _Waiting, answer: Answer | Exception | None) -> None:
        """What came of `_start`."""
        if self._alone is not waiting:
            # Stopped meanwhile: its caller knows.
            return
        self._alone = None
        is_awaited = not (isinstance(answer, Exception) or waiting.future.done())
        if answer is None:
            queue = self._admissions if isinstance(waiting.operation, Admit) else self._others
            queue.appendleft(waiting)
        elif isinstance(answer, StoreError):
            self._lost([waiting], answer)
        elif isinstance(answer, Exception) and not isinstance(answer, MeteringError):
            self._guilty(waiting, answer)
        elif not is_awaited:
            self._deliver(waiting, answer)
        if (self._admissions or self._others) and not self._is_coming:
            self._awake -= 1
            self._is_coming = self._wake(waiting.future.get_loop())
        else:
            self._rest()
        if answer is not None and is_awaited:
            # Last: whoever waits goes on in here, and may come again.
            self._deliver(waiting, answer)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Get a lane that comes for what waits; False while all are taken."""
        if self._awake >= self._store.lanes:
            return False
        # Those of lanes that `close` has cancelled are done, and those lanes go.
        if self._asleep and not self._asleep[-1].done():
            self._asleep.pop().set_result(None)
        else:
            self._lanes = [lane for lane in self._lanes if not lane.done()]
            # Not in the context of whichever request came first: its variables would live as long as the pump.
            context = contextvars.Context()
            self._lanes.append(loop.create_task(self._run(), name="asgi_metering pump", context=context))
        self._awake += 1
        return True

    def _expire(self, future: asyncio.Future[Answer], deadline_s: float) -> None:
        future.set_exception(
            StoreUnavailableError(f"The {self._store.name} store gave no answer within {deadline_s:.3g} s.")
        )

    # -- the pump's own tasks, one for each lane -------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                self._is_coming = False
                batch = self._take()
                if batch:
                    self._last = len(batch)
                    await self._send(batch)
                else:
                    self._rest()
                    await self._sleep()
        except BaseException:
            self._stop()
            raise

    async def _sleep(self) -> None:
        wake = asyncio.get_running_loop().create_future()
        self._asleep.append(wake)
        try:
            await wake
        except BaseException:
            if wake in self._asleep:
                self._asleep.remove(wake)
                self._awake += 1
            raise

    def _rest(self) -> None:
        self._awake -= 1
        if not self._awake:
            self._deadlines.stop()
            self._idle.set()

    def _stop(self) -> None:
        """Whatever ends a lane, nobody waits for it in vain."""
        left = [*self._admissions, *self._others]
        self._admissions.clear()
        self._others.clear()
        self._is_coming = False
        self._fail(left, StoreUnavailableError(f"The pump of the {self._store.name} store was stopped."))
        self._rest()

    def _take(self) -> list[_Waiting]:
        """
        The next batch, in order of arrival, without callers that have left; empty when nobody waits.

        An end that came before an admission is before it in the batch as well: what it frees is free.
        """
        reserved = min(len(self._others), MAX_BATCH // ENDS_SHARE)
        admissions = _draw(self._admissions, MAX_BATCH - reserved)
        others = _draw(self._others, MAX_BATCH - len(admissions))
        if not admissions or not others:
            return admissions or others
        return sorted(admissions + others, key=_by_arrival)

    async def _send(self, batch: list[_Waiting]) -> None:
        store = self._store
        try:
            answers = await store.run([waiting.operation for waiting in batch])
            if len(answers) != len(batch):
                raise StoreError(f"The {store.name} store gave {len(answers)} answers to {len(batch)} operations.")
        except StoreError as failure:
            self._lost(batch, failure)
            return
        except Exception as failure:  # noqa: BLE001 -- whatever it is, it is one operation's and not its neighbours'
            unwritable = failure
        except BaseException:
            self._fail(batch, StoreUnavailableError(f"The pump of the {store.name} store was stopped."))
            raise
        else:
            for waiting, answer in zip(batch, answers, strict=True):
                future = waiting.future
                if future.done() or isinstance(answer, Exception):
                    self._deliver(waiting, answer)
                else:
                    future.set_result(answer)
            return
        await self._send_one_by_one(batch, unwritable)

    async def _send_one_by_one(self, batch: list[_Waiting], failure: Exception) -> None:
        """A batch that cannot be written as a whole: only its guilty operation shall fail."""
        if len(batch) > 1:
            for waiting in batch:
                if not waiting.future.done():
                    await self._send([waiting])
            return
        self._guilty(batch[0], failure)

    def _guilty(self, waiting: _Waiting, failure: Exception) -> None:
        kind = type(waiting.operation).__name__
        log.error("The %s store could not run %s.", self._store.name, kind, exc_info=failure)
        self._deliver(waiting, failure)

    def _lost(self, batch: Sequence[_Waiting], failure: StoreError) -> None:
        """No answers came: what was asked for may have happened all the same, and what was given back may not."""
        self._fail(batch, failure)
        if self._unknown is not None and isinstance(failure, StoreUnavailableError):
            for waiting in batch:
                operation = waiting.operation
                asked = operation.ask if isinstance(operation, Undo) else operation
                if isinstance(asked, Admit) and not waiting.is_repeated:
                    self._unknown(asked)

    def _fail(self, batch: Iterable[_Waiting], failure: StoreError) -> None:
        for waiting in batch:
            if not waiting.future.done():
                # Each caller gets an exception of its own: tracebacks grow where they are raised.
                waiting.future.set_exception(_copy(failure))

    def _deliver(self, waiting: _Waiting, answer: Answer | Exception) -> None:
        future = waiting.future
        if future.done():
            if not waiting.is_repeated:
                self._abandoned(waiting.operation, answer)
        elif not isinstance(answer, Exception):
            future.set_result(answer)
        elif isinstance(answer, MeteringError):
            future.set_exception(answer)
        else:
            error = _unwritable(self._store, answer)
            error.__cause__ = answer
            future.set_exception(error)

    def _abandoned(self, operation: Operation, answer: object) -> None:
        """The caller is gone: what it would have owned is given back."""
        if isinstance(operation, Admit) and isinstance(answer, Decision) and answer.admitted:
            release = self._enqueue(Undo(operation, answer.now))
            release.add_done_callback(self._released)

    def _released(self, release: asyncio.Future[Answer]) -> None:
        if not release.cancelled() and release.exception() is not None:
            log.warning("The hold of a caller that left stays until it expires: %s", release.exception())

    # -- the end -------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Wait until everything that was submitted has been sent and answered."""
        if self._awake:
            await self._idle.wait()

    async def close(self) -> None:
        """
        Drain, then stop. Calling it again changes nothing; what is submitted later starts the pump again.

        A caller that is cancelled meanwhile stops it at once: what still waits gets `StoreUnavailableError`.
        """
        try:
            await self.drain()
        finally:
            if self._lanes:
                for lane in self._lanes:
                    lane.cancel()
                await asyncio.wait(self._lanes)
                # Who came meanwhile may have begun another, which goes on.
                self._lanes = [lane for lane in self._lanes if not lane.done()]
            if self._alone is not None:
                alone, self._alone = self._alone, None
                self._fail([alone], StoreUnavailableError(f"The pump of the {self._store.name} store was stopped."))
            while self._awake > len(self._lanes) - len(self._asleep):
                # Stopped before it began.
                self._stop()


def _unwritable(store: Store, failure: Exception) -> UnwritableError:
    return UnwritableError(f"The {store.name} store could not run the operation: {failure!r}.")


def _draw(queue: deque[_Waiting], most: int) -> list[_Waiting]:
    if len(queue) <= most:
        drawn = [waiting for waiting in queue if not waiting.future.done()]
        queue.clear()
        return drawn
    drawn = []
    while queue and len(drawn) < most:
        waiting = queue.popleft()
        if not waiting.future.done():
            drawn.append(waiting)
    return drawn


def _copy(failure: StoreError) -> StoreError:
    kinds = (StoreUnavailableError, StoreContendedError, UnwritableError, StoreError)
    kind = next(kind for kind in kinds if isinstance(failure, kind))
    copy = kind(*failure.args)
    copy.__cause__ = failure.__cause__ or failure
    return copy
