"""
A thread that owns one connection, and the way to it from an event loop.

A connection is made, used and closed in its own thread only. Jobs run in the order in which they are handed over;
each answer costs one wake-up of the loop. Knows no SQL and no metering.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeAlias, TypeVar

from asgi_metering.errors import StoreUnavailableError

__all__ = ["ConnectionThread", "LostConnectionError", "Turn"]

Result = TypeVar("Result")

Told: TypeAlias = Callable[[Result | None, BaseException | None], None]
"""What a job returned, or what it raised."""

STEP_ASIDE_AFTER_S: Final = 0.0005
"""A job that takes longer than this may be waiting for the interpreter rather than for the disk."""

STEP_ASIDE_S: Final = 0.002
"""How long the loop steps aside for a job that computes, at most."""

GLIMPSE_S: Final = 0.00005
"""How long it steps aside for one that waits: enough to take the interpreter, should the wait be over."""


class LostConnectionError(StoreUnavailableError):
    """What a job raises whose connection leads nowhere any more: the next job gets a fresh one."""


class Turn(Generic[Result]):
    """
    One job's turn in the thread.

    Args:
        job: What to do; None ends the thread.
        loop: Where the answer is awaited.
        told: Gets what the job returned, or what it raised; called once, from the loop. It never raises.

    Attributes:
        connection: The thread's own.
        is_on: Whether it is this turn's time; the others stand behind it.
        waits: Set by the job while it waits for a lock or for the disk, and needs no interpreter.
    """

    __slots__ = ("_busy", "_loop", "_outcome", "_timer", "_told", "connection", "is_on", "job", "waits")

    connection: sqlite3.Connection

    def __init__(
        self, job: Callable[[Turn[Result]], Result] | None, loop: asyncio.AbstractEventLoop, told: Told[Result]
    ) -> None:
        self.job = job
        self._loop = loop
        self._told: Told[Result] | None = told
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self._timer: asyncio.TimerHandle | None = None
        self._busy = threading.Lock()
        self._busy.acquire()
        self.is_on = False
        self.waits = False

    def sleep(self, seconds: float) -> None:
        """In the thread: pause, without anybody having to step aside."""
        waited, self.waits = self.waits, True
        time.sleep(seconds)
        self.waits = waited

    def begin(self) -> None:
        """
        In the loop: be there for the thread until it is told.

        The thread gives the interpreter up at each of SQLite's steps, and a loop that never sleeps would keep it from
        then on: the job would take without bound. So while a job takes long, the loop steps aside for moments.
        """
        self._timer = self._loop.call_later(STEP_ASIDE_AFTER_S, self._step_aside)

    def _step_aside(self) -> None:
        if self.waits:
            time.sleep(GLIMPSE_S)
        if self.is_on and self._busy.acquire(timeout=0.0 if self.waits else STEP_ASIDE_S):
            # It is done. A turn of the loop earlier than the thread can say so.
            self._busy.release()
            self._deliver()
        else:
            self.begin()

    def finish(self, answer: Result | None, failure: BaseException | None) -> None:
        """In the thread: send the answer to the loop."""
        self._outcome = (answer, failure)
        try:
            # Before the loop is let go: who steps aside would take the interpreter, and this would wait for it.
            self._loop.call_soon_threadsafe(self._deliver)
        except RuntimeError:
            # The loop has been closed: nobody waits any more. What was committed stays.
            return
        finally:
            self._busy.release()

    def _deliver(self) -> None:
        told, self._told = self._told, None
        if told is None:
            return
        if self._timer is not None:
            self._timer.cancel()
        outcome, self._outcome = self._outcome, (None, None)
        told(*outcome)


class ConnectionThread:
    """
    Run jobs on a connection of their own.

    Args:
        name: The thread's name, for people.
        connect: Makes the connection, in the thread, when the first job comes, or after one that broke it.
    """

    def __init__(self, name: str, connect: Callable[[], sqlite3.Connection]) -> None:
        self._connect = connect
        self._turns: SimpleQueue[Turn[Any]] = SimpleQueue()
        self._standing: deque[Turn[Any]] = deque()
        self._handing_over = threading.Lock()
        self._ended = False
        # A daemon, so that an application that forgets to close its store still ends: a commit is whole or absent.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    async def call(self, job: Callable[[Turn[Result]], Result]) -> Result:
        """
        Run *job* in the thread and return what it returns, or raise what it raises. From any loop, in any thread.

        A caller that is cancelled no longer waits; its job still runs.

        Raises:
            StoreUnavailableError: The thread has been stopped.
        """
        answered: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.start(job, partial(_answer, answered))
        return await answered

    def start(self, job: Callable[[Turn[Result]], Result], told: Told[Result]) -> None:
        """
        The same for who does not wait: *told* gets what *job* returns, or what it raises, from the loop.

        Raises:
            StoreUnavailableError: The thread has been stopped.
        """
        turn = Turn(job, asyncio.get_running_loop(), told)
        with self._handing_over:
            if self._ended:
                raise StoreUnavailableError(f"The thread {self._thread.name!r} has ended. Await open() first.")
            self._put(turn)
        turn.begin()

    async def stop(self) -> None:
        """Finish what was handed over, close the connection and end the thread. Again changes nothing."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        turn: Turn[None] = Turn(None, loop, partial(_answer, ended))
        with self._handing_over:
            if self._ended:
                return
            self._ended = True
            self._put(turn)
        turn.begin()
        await ended
        self._thread.join()

    def _put(self, turn: Turn[Any]) -> None:
        # By itself the thread could not say so: it may not even get the interpreter to begin.
        self._standing.append(turn)
        self._standing[0].is_on = True
        self._turns.put(turn)

    # -- in the thread -------------------------------------------------------------------------------------

    def _work(self) -> None:
        connection: sqlite3.Connection | None = None
        while True:
            turn = self._turns.get()
            if turn.job is None:
                break
            connection = self._serve(turn, connection)
            # Its operations shall not outlive it while the thread waits for the next.
            del turn
        if connection is not None:
            connection.close()
        turn.finish(None, None)

    def _serve(self, turn: Turn[Any], connection: sqlite3.Connection | None) -> sqlite3.Connection | None:
        """Do one job and send its answer; return the connection for the next one."""
        answer, failure = None, None
        try:
            if connection is None:
                connection = self._connect()
            turn.connection = connection
            answer = turn.job(turn) if turn.job is not None else None
        except BaseException as error:  # noqa: BLE001 -- it is the caller's, whatever it is
            failure = error
            if connection is not None and (isinstance(error, LostConnectionError) or connection.in_transaction):
                # Not even its rollback worked; the file's own recovery does that on the next connection.
                connection.close()
                connection = None
        with self._handing_over:
            self._standing.popleft()
            if self._standing:
                self._standing[0].is_on = True
        turn.finish(answer, failure)
        # An error keeps the frames that it came through, and this one would keep the error.
        failure = None
        return connection


def _answer(answered: asyncio.Future[Any], answer: Any, failure: BaseException | None) -> None:
    if answered.done():
        return
    if failure is None:
        answered.set_result(answer)
    else:
        answered.set_exception(failure)
