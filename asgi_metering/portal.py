"""
Portals: how code without an event loop uses a metering. One thread with a loop of its own, for one process.

Knows how to run something there and wait for it; nothing of what is metered.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

from asgi_metering.errors import ConfigurationError

__all__ = ["Portal"]

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_Entered = TypeVar("_Entered")


class _Running(NamedTuple):
    """The thread while it runs. *ended* has what stopping raised, if it did."""

    thread: threading.Thread
    loop: asyncio.AbstractEventLoop
    stopping: asyncio.Event
    ended: Future[None]


class Portal:
    """
    A thread that runs an event loop. It starts with the first use, and again with the first one after `close`.

    Args:
        stop: Awaited in the thread before it ends.

    Belongs to the process that made it. Any number of threads may use it at once. A process that ends closes it.
    """

    def __init__(self, stop: Callable[[], Awaitable[object]]) -> None:
        self._stop = stop
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def call(
        self, function: Callable[_Given, Awaitable[_Result]], *args: _Given.args, **more: _Given.kwargs
    ) -> _Result:
        """
        Run an async *function* in the thread and return what it returns: ``portal.call(metering.balance, "org_7")``.

        It sees the context variables of the caller. An exception that comes to the waiting thread from outside (Ctrl-C,
        the time limit of a job) cancels it.

        Raises:
            ConfigurationError: The calling thread runs an event loop, which would stand still meanwhile.
            Exception: Whatever *function* raises.
        """

        async def work() -> _Result:
            return await function(*args, **more)

        done = self._begin(work())
        try:
            return done.result()
        finally:
            # Of what is done it changes nothing.
            done.cancel()

    @contextmanager
    def within(self, block: AbstractAsyncContextManager[_Entered]) -> Iterator[_Entered]:
        """
        Enter an async context manager in the thread, and leave it there when this block is left. Raises as `call`.

        It is entered and left in one task. What the block raises is what the manager is told, and rises unchanged
        unless the manager raises something else; a manager that would suppress it does not.
        """
        entered: Future[_Entered] = Future()
        leaving: Future[BaseException | None] = Future()
        done = self._begin(_live(block, entered, leaving))
        done.add_done_callback(lambda _: _never_entered(entered, done))
        try:
            value = entered.result()
        except BaseException:
            # Also when the answer came in the same moment: then the block is left as a cancelled one.
            done.cancel()
            raise
        try:
            yield value
        except BaseException as failure:
            _tell(leaving, failure)
            done.result()
            raise
        _tell(leaving, None)
        done.result()

    def close(self) -> None:
        """
        Stop what runs in the thread, and end it; again changes nothing, and neither does it in a forked child.

        Raises:
            ConfigurationError: The calling thread runs an event loop.
            Exception: What stopping raised.
        """
        if self._pid != os.getpid():
            return
        _check_no_loop()
        with self._lock:
            running, self._running = self._running, None
            if running is None:
                return
            atexit.unregister(self.close)
            running.loop.call_soon_threadsafe(running.stopping.set)
            running.thread.join()
        running.ended.result()

    # -- the thread ----------------------------------------------------------------------------------------

    def _begin(self, work: Coroutine[Any, Any, _Result]) -> Future[_Result]:
        """Have *work* run in the thread, in a copy of this thread's context."""
        try:
            _check_no_loop()
            running = self._started()
        except BaseException:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, running.loop)

    def _started(self) -> _Running:
        with self._lock:
            if self._running is None:
                ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()
                ended: Future[None] = Future()
                # A daemon: at the end of the process the thread is asked to stop, and not waited for first.
                thread = threading.Thread(
                    target=self._run, args=(ready, ended), name="asgi_metering portal", daemon=True
                )
                thread.start()
                self._running = _Running(thread, *ready.result(), ended)
                atexit.register(self.close)
            return self._running

    def _run(self, ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]], ended: Future[None]) -> None:
        async def serve() -> None:
            stopping = asyncio.Event()
            ready.set_result((asyncio.get_running_loop(), stopping))
            await stopping.wait()
            await self._stop()

        try:
            asyncio.run(serve())
        except BaseException as failure:  # noqa: BLE001 -- it is told to whoever closes
            ended.set_exception(failure)
        else:
            ended.set_result(None)


async def _live(
    block: AbstractAsyncContextManager[_Entered],
    entered: Future[_Entered],
    leaving: Future[BaseException | None],
) -> None:
    failure: BaseException | None = None
    try:
        async with block as value:
            entered.set_result(value)
            failure = await asyncio.wrap_future(leaving)
            if failure is not None:
                raise failure
    except BaseException as error:
        # What the block raised is raised again where it was: a task is no place for another thread's Ctrl-C.
        if error is not failure:
            raise


def _never_entered(entered: Future[Any], done: Future[None]) -> None:
    """Whoever waits to enter is told why it cannot."""
    if not entered.done():
        entered.set_exception(CancelledError() if done.cancelled() else done.exception() or CancelledError())


def _tell(leaving: Future[BaseException | None], failure: BaseException | None) -> None:
    # Not where the portal was closed meanwhile: nobody listens, and `done` says so.
    if leaving.set_running_or_notify_cancel():
        leaving.set_result(failure)


def _check_no_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise ConfigurationError(
        "A portal was used in a thread that runs an event loop, which would stand still meanwhile. Await there: async "
        "with metering.charge(...)."
    )
