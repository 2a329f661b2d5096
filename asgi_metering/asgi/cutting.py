"""
Cutting: how the answer of a call ends whose hold is used up and cannot grow.

Knows which messages may still pass, how an app is stopped that sends none, and what the client is told. Never decides
that a call is cut, nor what is charged.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from types import CoroutineType

from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.asgi.refusals import in_band_error
from asgi_metering.asgi.types import Message, Send
from asgi_metering.call import Call, CallCut
from asgi_metering.rules.ending import Cause

__all__ = ["Cutting", "let_go", "task_within"]

log = logging.getLogger("asgi_metering")

SILENT_S = 1.0
"""
How long an app whose call is cut may go without sending before it is cancelled.

Its next `send` stops it more gently. A model that thinks for longer costs money that nobody has.
"""

TELL_S = 10.0
"""How long the server may take over the message that tells the client: one that does not read is left without it."""


class Cutting:
    """
    The answer of one call whose hold grows, should it be cut.

    Args:
        call: Whose.

    Attributes:
        pending: What the call holds is used up: its next message is its last.
        cancelled: The app was silent then, and was cancelled.
    """

    __slots__ = ("_head", "_silence", "_tail", "_task", "call", "cancelled", "pending")

    def __init__(self, call: Call) -> None:
        self.call = call
        self._task: asyncio.Task[object] | None = None
        self._head: Message | None = None
        self._tail: bytes | None = None
        self._silence: asyncio.TimerHandle | None = None
        self.pending = self.cancelled = False

    def follow(self, start: Message, keep: Callable[[bytes], None] | None) -> Callable[[bytes], None]:
        """Know where the answer stands that began with *start*; returns what is shown each chunk instead of *keep*."""
        self._head = start

        def kept(chunk: bytes) -> None:
            self._tail = chunk
            if keep is not None:
                keep(chunk)

        return kept

    def begin(self, task: asyncio.Task[object] | None) -> None:
        """Stop the app, which *task* runs: at its next message, or by cancelling it if it sends none."""
        self.pending = True
        self._task = task
        self._silence = asyncio.get_running_loop().call_later(SILENT_S, self._cancel)

    def _cancel(self) -> None:
        if self.pending and self._task is not None and self.call.cause in (None, Cause.CUT):
            self.call.cut()
            self.cancelled = self._task.cancel()

    def lets(self, over: bool) -> bool:
        """
        Whether a message may pass after all: the call is *over* with it, by the end of its stream or a whole answer.

        A handler's own answer, if it caught what stopped it, is one; a framework's 500 is not (pitfall 15).
        """
        if over:
            self.pending = False
        return over

    def is_ours(self, failure: BaseException) -> bool:
        """Whether *failure* is the cancellation of this cut, or a group with nothing else."""
        if isinstance(failure, BaseExceptionGroup):
            return all(self.is_ours(inner) for inner in failure.exceptions)
        return isinstance(failure, CallCut) or (self.cancelled and isinstance(failure, asyncio.CancelledError))

    def wanted_by_others(self) -> bool:
        """Whether somebody else wants the task to end as well."""
        return self.cancelled and self._task is not None and self._task.cancelling() > 1

    async def tell(self, send: Send, options: AnswerOptions) -> bool:
        """
        End the answer with the error of its protocol.

        False where only a broken connection tells that it is not whole: its body has no place for an error, or the
        client does not read.
        """
        latest = None if self._tail is None else {"body": self._tail}
        error = in_band_error(self.call, options, self._head, latest)
        if error is None:
            return False
        try:
            async with asyncio.timeout(TELL_S):
                await send({"type": "http.response.body", "body": error})
        except TimeoutError:
            return False
        except OSError:
            log.debug("The client of call %s left before it could be told of the cut.", self.call.id)
        return True

    def close(self) -> None:
        """The request is over."""
        if self._silence is not None:
            self._silence.cancel()
        if self.cancelled and self._task is not None:
            self._task.uncancel()


def task_within(function: Callable[..., object], name: str, value: object) -> asyncio.Task[object] | None:
    """
    The task of this loop that is amid a call of the coroutine function *function* whose argument *name* is *value*.

    Looks through all tasks: for requests that asked for their own task at no cost, since nothing could cut them then.
    """
    code = function.__code__
    for task in asyncio.all_tasks():
        inner: object = task.get_coro()
        while isinstance(inner, CoroutineType):
            frame = inner.cr_frame
            if frame is not None and frame.f_code is code and frame.f_locals[name] is value:
                return task
            inner = inner.cr_await
    return None


def let_go(failure: BaseException) -> None:
    """
    Forget what the frames that *failure* has left behind refer to: the generator of a stream, and the upstream in it.

    A generator whose reader stopped is closed when nobody refers to it, and tracebacks do, in circles, until the
    garbage is collected: meanwhile a model would go on writing for nobody.
    """
    seen: set[int] = set()
    left = [failure]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        traceback.clear_frames(each.__traceback__)
        left += [linked for linked in (each.__cause__, each.__context__) if linked is not None]
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
