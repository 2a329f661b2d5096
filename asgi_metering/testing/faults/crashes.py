"""
Crashes: a process that is killed at one exact point of a call's life.

Wraps what a user hands to the package anyway (a store, its clock, a sink, an endpoint, the application), so that no
line of the package knows of it. Never knows what becomes of the books: that is for the process that comes after.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

from asgi_metering.asgi.types import ASGIApp, Message, Receive, Scope, Send
from asgi_metering.call import CallCut
from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.events.sinks import Sink, is_enabled
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.contract import Store
from asgi_metering.testing.faults.between import StoreBetween
from asgi_metering.testing.faults.points import OPERATIONS, check_point
from asgi_metering.usage.event import UsageEvent

if TYPE_CHECKING:
    from asgi_metering.journal import Journal

__all__ = ["Crash", "crash_after", "kill", "until_killed"]

CHILD_S: Final = 60.0
"""What a child gets to reach its point: a bound for broken code on a busy machine, not a measurement."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def kill() -> None:
    """End this process with SIGKILL: no handler, no ``finally`` and no flush runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def crash_after(point: str, *, nth: int = 1, how: Callable[[], object] = kill) -> Crash:
    """
    Make a fault that kills this process once *point* is reached.

    Args:
        point: One of `POINTS`, such as ``"admission.after"``.
        nth: At which time that it is reached.
        how: What to do there instead of killing; it is called once.

    Raises:
        ConfigurationError: There is no such point, or no such time.

    Wire it to whatever the point speaks of; the rest changes nothing:

        fault = crash_after("end.after")
        metering = Metering(fault.store(SQLiteStore("metering.db")), sinks=[fault.sink(mine)])
        app = fault.app(MeteringMiddleware(app, metering=metering))
    """
    return Crash(point, nth=nth, how=how)


class Crash:
    """
    One fault, and the wrappers that lead to it. See `crash_after`.

    Attributes:
        point: Where.
        reached: How often it was reached so far.
    """

    def __init__(self, point: str, *, nth: int = 1, how: Callable[[], object] = kill) -> None:
        if type(nth) is not int or nth < 1:
            raise ConfigurationError(f"nth={nth!r} is no time at which a point is reached. Use an int from 1 up.")
        self.point = check_point(point)
        self.reached = 0
        self._nth = nth
        self._how = how
        self._inside: tuple[str, ...] = ()

    def reach(self, point: str) -> None:
        """Say that *point* is reached."""
        if point == self.point:
            self.reached += 1
            if self.reached == self._nth:
                self._how()

    def store(self, inner: Store) -> Store:
        """*inner*, for the points of its operations, and ``opening``."""
        return _CrashingStore(inner, self)

    def clock(self, inner: Callable[[], float]) -> Callable[[], float]:
        """
        *inner*, for the points ``inside`` a transaction: a store reads its clock behind its locks.

        Hand it to the store that `store` wraps: ``fault.store(SQLiteStore(path, clock=fault.clock(time.time)))``.
        """

        def read() -> float:
            # Once for each time that the store is asked: it may begin again, or read its clock twice.
            points, self._inside = self._inside, ()
            for point in points:
                self.reach(point)
            return inner()

        return read

    def sink(self, inner: Sink) -> Sink:
        """*inner*, for the points of ``delivery``."""
        return _CrashingSink(inner, self)

    def journal(self, path: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> Journal:
        """
        The journal at *path*, for the points of ``keeping``, ``reading`` and ``removal``.

        Hand it to the metering: ``Metering(fault.store(store), journal=fault.journal("metering.journal"))``.
        """
        from asgi_metering.testing.faults.journals import CrashingJournal

        return CrashingJournal(path, self.reach, clock=clock)

    def endpoint(self, function: _Function) -> _Function:
        """
        *function*, for the points of ``endpoint``. Stands below the decorators that meter it.

        Takes async and plain functions; a generator has no ``endpoint.after`` before its response.
        """
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*arguments: Any, **named: Any) -> Any:
                self.reach("endpoint.before")
                answer = await function(*arguments, **named)
                self.reach("endpoint.after")
                return answer

            return awaited  # type: ignore[return-value]

        @functools.wraps(function)
        def called(*arguments: Any, **named: Any) -> Any:
            self.reach("endpoint.before")
            answer = function(*arguments, **named)
            self.reach("endpoint.after")
            return answer

        return called  # type: ignore[return-value]

    def app(self, inner: ASGIApp) -> ASGIApp:
        """*inner*, for the points of a ``response``. Stands around the middleware, as the server does."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await inner(scope, receive, send)
                return
            await inner(scope, receive, self._watched(send))
            self.reach("response.returned")

        return app

    def stream(self, inner: ASGIApp) -> ASGIApp:
        """*inner*, for the point ``response.cut``. Stands inside of the middleware."""

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            async def watched(message: Message) -> None:
                try:
                    await send(message)
                except CallCut:
                    self.reach("response.cut")
                    raise

            await inner(scope, receive, watched)

        return app

    def inside(self, words: Sequence[str]) -> None:
        """Say which operations the store runs from now on; empty for none."""
        self._inside = tuple(f"{word}.inside" for word in words)

    def _watched(self, send: Send) -> Callable[[Message], Awaitable[None]]:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                await send(message)
                self.reach("response.start")
                return
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if last:
                self.reach("response.before_last")
            taken = True
            try:
                await send(message)
            except OSError:
                taken = False
                raise
            finally:
                # Also of a task that is cancelled in the server's `send`: the bytes are the server's then.
                if taken and message.get("body") and not begun:
                    begun = True
                    self.reach("response.first_byte")
                if taken and last:
                    self.reach("response.last")

        return watched


_WORDS: Final = {kind: word for word, kind in OPERATIONS.items()}


class _CrashingStore(StoreBetween):
    """Hands on what it gets, and says when."""

    def __init__(self, inner: Store, fault: Crash) -> None:
        super().__init__(inner)
        self._fault = fault
        self._was_silent = False

    async def open(self) -> None:
        self._fault.reach("opening.before")
        await super().open()
        self._fault.reach("opening.after")

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        words = [_WORDS[type(operation)] for operation in operations if type(operation) in _WORDS]
        for word in words:
            self._fault.reach(f"{word}.before")
        if self._was_silent:
            self._fault.reach("recovery.before")
        self._fault.inside(words)
        try:
            answers = await super().run(operations)
        except StoreUnavailableError:
            self._was_silent = True
            raise
        finally:
            self._fault.inside(())
        if self._was_silent:
            self._was_silent = False
            self._fault.reach("recovery.after")
        for word in words:
            self._fault.reach(f"{word}.after")
        return answers


class _CrashingSink:
    """Hands on what it gets, and says when."""

    def __init__(self, inner: Sink, fault: Crash) -> None:
        self.name = inner.name
        self._inner = inner
        self._fault = fault

    @property
    def enabled(self) -> bool:
        """As of the sink behind it."""
        return is_enabled(self._inner)

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """See `Sink.deliver`."""
        self._fault.reach("delivery.before")
        await self._inner.deliver(events)
        self._fault.reach("delivery.after")


# -- the process that is killed ----------------------------------------------------------------------------


def until_killed(target: Callable[..., object], *arguments: Any, timeout_s: float = CHILD_S) -> None:
    """
    Run ``target(*arguments)`` in a process of its own, and return once that was killed.

    Args:
        target: A function of a module, which the other process imports; a coroutine function has a loop of its own
            there. A `crash_after` in it ends it.
        arguments: For *target*; they are pickled.
        timeout_s: Seconds that it may take.

    Raises:
        AssertionError: It ended in another way: its point was never reached, or it failed.
        TimeoutError: It went on; it is killed then.

    The process is forked from a server of `multiprocessing`, which imports once what
    ``multiprocessing.set_forkserver_preload`` names: with many crashes, name what *target* imports. POSIX only.
    """
    process = multiprocessing.get_context("forkserver").Process(target=_play, args=(target, arguments), daemon=True)
    process.start()
    process.join(timeout_s)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
    process.close()
    if code is None:
        raise TimeoutError(f"{_named(target)} ran for {timeout_s} s and was not killed. Look what it waits for.")
    if code != -signal.SIGKILL:
        raise AssertionError(
            f"{_named(target)} was not killed but ended with code {code}. Wire its fault to what the point speaks of."
        )


def _play(target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    answer = target(*arguments)
    if inspect.iscoroutine(answer):
        import asyncio

        asyncio.run(answer)


def _named(target: Callable[..., object]) -> str:
    return str(getattr(target, "__qualname__", target))
