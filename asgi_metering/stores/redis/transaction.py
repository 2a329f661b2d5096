"""
Transactions: an operation decided here, on rows that were read, and written only if none of them has changed since.

What was read is read again by the script that writes; after a few conflicts the gate keeps everybody else out for a
moment, so that a busy account cannot starve anybody. Decides nothing: `rules.decide.run` does.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

from asgi_metering.errors import StoreContendedError
from asgi_metering.rules.state import Change
from asgi_metering.stores.redis.link import Command, Link, Reply
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.packing import Packing
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["Transactions"]

Answer = TypeVar("Answer")

Work: TypeAlias = Callable[[WorkingCopy], Awaitable[tuple[Answer, list[Change]]]]
"""What is done on a fresh copy: it loads, decides, and says what is to be written."""

FREE_ATTEMPTS = 2
"""Without keeping others out."""

GATE_S = 1.0
"""A gate whose owner died opens by itself after this long."""

BUSY_S = 5.0
"""How long to wait for others before `StoreContendedError`."""

PAUSE_S = 0.001
"""Between looks at a gate that somebody else has closed."""


class Transactions:
    """
    Run work as transactions, over one link.

    Args:
        link, names, packing, scripts: Of the store.
        clock: The time of tests; None reads the server's.
    """

    def __init__(
        self, link: Link, names: Names, packing: Packing, scripts: Scripts, clock: Callable[[], float] | None
    ) -> None:
        self._link = link
        self._names = names
        self._packing = packing
        self._scripts = scripts
        self._clock = clock

    async def run(self, work: Work[Answer]) -> Answer:
        """
        Do *work* until what it read was still true when it was written.

        Raises:
            StoreContendedError: Others kept changing what it reads, for `BUSY_S` seconds.
            MeteringError: As *work* does; nothing has changed, except what *work* says should be written anyway.
        """
        deadline = time.monotonic() + BUSY_S
        token = ""
        attempt = 0
        while time.monotonic() < deadline:
            attempt += 1
            if attempt > FREE_ATTEMPTS and not token:
                token = await self._gate()
                if not token:
                    continue
            copy = WorkingCopy(self._link, self._names, self._packing, self._clock)
            failure: Exception | None = None
            try:
                answer, changes = await work(copy)
            except Mistake as mistake:
                failure, changes = mistake.error, mistake.written
            reply = await self._commit(copy, changes, token)
            if reply == 1:
                if failure is not None:
                    raise failure
                return answer
            # A gate that was ours has run out if somebody changed something behind it.
            token = ""
            if reply == -1:
                await _pause()
        raise StoreContendedError(f"Others changed the same rows of the Redis store for {BUSY_S} s. Try again later.")

    # -- for who works alone longer than one transaction ---------------------------------------------------

    async def enter(self, seconds: float) -> str:
        """
        Close the gate for *seconds*, and return what opens it: until then, only `run_alone` with it writes.

        Raises:
            StoreContendedError: Others work alone, for `BUSY_S` seconds.
        """
        deadline = time.monotonic() + BUSY_S
        while time.monotonic() < deadline:
            if token := await self._gate(seconds):
                return token
        raise StoreContendedError(f"Somebody else works alone on the Redis store for {BUSY_S} s. Try again later.")

    async def run_alone(self, token: str, seconds: float, work: Work[Answer]) -> Answer:
        """
        Do *work* behind our own gate, which stays closed for *seconds* from then on.

        Raises:
            StoreContendedError: It was not closed all the time; nothing of *work* is kept.
        """
        copy = WorkingCopy(self._link, self._names, self._packing, self._clock)
        (found,) = await copy.read(("GET", self._names.gate))
        if found == token.encode():
            answer, changes = await work(copy)
            copy.commands.append(("KEEP", self._names.gate, int(seconds * 1_000)))
            if await self._commit(copy, changes, token) == 1:
                return answer
        raise StoreContendedError(
            "Others may have written to the Redis store, which was to be filled by one alone. Stop them, and begin "
            "again: an import is resumed."
        )

    async def leave(self, token: str) -> None:
        """Open the gate, if it is still ours."""
        copy = WorkingCopy(self._link, self._names, self._packing, self._clock)
        await self._commit(copy, [], token)

    async def _commit(self, copy: WorkingCopy, changes: list[Change], token: str) -> Reply:
        writes = copy.writes(changes)
        words: list[str | bytes | int] = [token, len(copy.reads)]
        for read, found in copy.reads.items():
            words += [len(read), *read, *_told(found)]
        words.append(len(writes))
        for write in writes:
            words += [len(write), *write]
        if not writes and not token and len(copy.reads) < 2:
            # One read, nothing to write: it was true when it was read.
            return 1
        (reply,) = await self._link.exchange([("EVALSHA", self._scripts.sha["apply"], 2, *self._names.fence, *words)])
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _gate(self, seconds: float = GATE_S) -> str:
        token = uuid.uuid4().hex
        command: Command = ("SET", self._names.gate, token, "NX", "PX", int(seconds * 1_000))
        (reply,) = await self._link.exchange([command])
        if reply == b"OK":
            return token
        await _pause()
        return ""


class Mistake(Exception):  # noqa: N818 -- it carries the error that the caller gets
    """An operation is a mistake, and yet something is to be written: what stands by itself."""

    def __init__(self, error: Exception, written: list[Change]) -> None:
        super().__init__(error, written)
        self.error = error
        self.written = written


def _told(found: Reply) -> Sequence[str | bytes | int]:
    if found is None:
        return ("-",)
    return ("*", len(found), *found) if isinstance(found, list) else ("$", found)


async def _pause() -> None:
    await asyncio.sleep(PAUSE_S * (1.0 + random.random()))  # noqa: S311 -- so that those who wait do not meet again
