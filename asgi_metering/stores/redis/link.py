"""
A link: one connection to the server, for one event loop, on which a whole batch is one write and one wait.

Knows connections, scripts and their errors. Never knows what an operation is. The driver connects, authenticates and
speaks TLS; how commands are sent and replies are read is the wire's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.stores.redis.places import Place, driver
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.wire import Told, Wire

__all__ = ["Command", "Link", "Reply", "moves"]

Command: TypeAlias = Sequence[str | bytes | int]
Reply: TypeAlias = Any
"""Bytes, an int, None or a list of these; an error of one command is its exception."""

FIRST_BACKOFF_S = 0.02
MAX_BACKOFF_S = 1.0
"""Between attempts to connect to a server that cannot be reached: it is tried often, and costs nobody a wait."""

IDLE_S = 1.0
"""A connection that was quiet for longer may have been closed at the other end: it is looked at before it is used."""

MAX_MOVES = 5
"""A place that moves more often within one batch is no place."""


class Link:
    """
    One loop's way to the server.

    Args:
        place: Where the server is; asked again whenever the connection is lost.
        scripts: What is loaded into it.
        timeout_s: Seconds that one batch may take before the server counts as lost.
    """

    def __init__(self, place: Place, scripts: Scripts, timeout_s: float) -> None:
        self._place = place
        self._scripts = scripts
        self._timeout_s = timeout_s
        self._wire: Wire | None = None
        self._connecting = asyncio.Lock()
        self._used_at = 0.0
        self._backoff_s = 0.0
        self._not_before = 0.0
        self._failure: BaseException | None = None
        self._has_functions = True

    async def exchange(self, commands: Sequence[Command]) -> list[Reply]:
        """
        Send *commands* in one write and return their replies, errors included, in order.

        A script that the server has lost is loaded, and what failed for want of it is sent again.

        Raises:
            StoreUnavailableError: The connection was lost, or no answer came in time. Any of them may have happened.
            ConfigurationError: The server refuses us: credentials, or what they may do.
        """
        replies = await self._once(commands)
        for _ in range(MAX_MOVES):
            failures = [(at, reply) for at, reply in enumerate(replies) if isinstance(reply, Exception)]
            unknown = [failure for _, failure in failures if _is_of_functions(failure)]
            if unknown and not await self._is_made(unknown):
                commands = list(map(self._scripts.as_script, commands))
            again = await self._mended(failures) if failures else []
            if not again:
                break
            for at, reply in zip(again, await self._once([commands[at] for at in again]), strict=True):
                replies[at] = reply
        return replies

    def post(self, packed: bytes, told: Told) -> bool:
        """
        Send a command in this turn of the loop, if the connection is in use, and return whether it was sent.

        Args:
            packed: One, as the driver packs it.
            told: Gets its reply, alone, as it came; or `StoreUnavailableError` as of `exchange`.
        """
        wire = self._wire
        if wire is None or wire.failure is not None or not self._has_functions:
            return False
        if self._connecting.locked() or time.monotonic() - self._used_at >= IDLE_S:
            return False

        def replied(outcome: list[Reply] | Exception) -> None:
            if isinstance(outcome, Exception):
                told(self._lost(outcome))
            else:
                self._used_at = time.monotonic()
                told(outcome)

        wire.post(packed, 1, self._timeout_s, replied)
        return True

    @property
    def _load(self) -> Command:
        return ("FUNCTION", "LOAD", "REPLACE", self._scripts.library)

    def _lost(self, error: Exception) -> StoreUnavailableError:
        if isinstance(error, TimeoutError):
            said = (
                f"The Redis server at {self._place} gave no answer within {self._timeout_s} s. Repeat with the same id."
            )
        else:
            said = f"The connection to the Redis server at {self._place} is lost: {error}"
        failure = StoreUnavailableError(said)
        failure.__cause__ = error
        return failure

    async def _is_made(self, failures: list[Exception]) -> bool:
        """Make our function, and return whether it is there: if not, what failed for want of it has to be a script."""
        failure = next((failure for failure in failures if _is_refused(failure)), None)
        if failure is None:
            # Replicas get it from their master, so that one is ready when it takes over.
            (loaded,) = await self._once([self._load])
            if not isinstance(loaded, Exception):
                return True
            failure = loaded
        # One that cannot write now, a replica or one whose memory is full, may take it later.
        self._has_functions = not _is_refused(failure)
        return False

    async def _mended(self, failures: list[tuple[int, Exception]]) -> list[int]:
        """Do what some failures ask for, and return those that were not executed and can be sent again."""
        errors = driver().exceptions
        lost = [at for at, failure in failures if isinstance(failure, errors.NoScriptError)]
        if lost:
            self._raise_errors(await self._once([("SCRIPT", "LOAD", text) for text in self._scripts.texts()]))
        unknown = [at for at, failure in failures if _is_of_functions(failure)]
        if lost or unknown:
            # Together, and so in their order: a fresh server has neither.
            return sorted(lost + unknown)
        moved = [at for at, failure in failures if isinstance(failure, moves())]
        if moved and self._place.may_move:
            await self._drop(self._wire)
            await self._place.moved(failures[0][1])
            return moved
        return []

    @staticmethod
    def _raise_errors(replies: list[Reply]) -> None:
        for reply in replies:
            if isinstance(reply, Exception):
                raise ConfigurationError(
                    f"The server does not take our scripts: {reply}. Give this user EVALSHA, SCRIPT and all commands "
                    f"on its own keys."
                ) from reply

    async def _once(self, commands: Sequence[Command]) -> list[Reply]:
        errors, pack = driver().exceptions, driver().pack
        wire: Wire | None = None
        try:
            wire = await self._connected()
            if not self._has_functions:
                commands = list(map(self._scripts.as_script, commands))
            replies = await wire.ask(b"".join([pack(command) for command in commands]), len(commands), self._timeout_s)
            for reply in replies:
                if isinstance(reply, errors.ConnectionError):
                    raise reply
        except errors.AuthenticationError as error:
            # Redis 7.0 says so at the first command, and not when a connection is made.
            await self._drop(wire)
            raise ConfigurationError(
                f"The Redis server at {self._place} does not accept our credentials: {error}. Check user and password."
            ) from error
        except (errors.ConnectionError, errors.TimeoutError, OSError) as error:
            await self._drop(wire)
            raise self._lost(error) from error
        # Whoever stops waiting, or has what cannot be packed, leaves the connection as it is: others wait on it, and it
        # knows whose the replies are.
        self._used_at = time.monotonic()
        return replies

    # -- the connection ------------------------------------------------------------------------------------

    async def _connected(self) -> Wire:
        wire = self._wire
        if wire is not None and wire.failure is None and time.monotonic() - self._used_at < IDLE_S:
            return wire
        async with self._connecting:
            return await self._connected_anew()

    async def _connected_anew(self) -> Wire:
        wire = self._wire
        if wire is not None:
            if not await wire.is_gone():
                return wire
            await self._drop(wire)
        if time.monotonic() < self._not_before:
            told = str(self._failure).removesuffix(".")
            raise StoreUnavailableError(
                f"The Redis server at {self._place} cannot be reached: {told}. It is tried again soon."
            )
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._place.connect()
        except StoreUnavailableError as failure:
            self._backoff_s = min(max(FIRST_BACKOFF_S, 2 * self._backoff_s), MAX_BACKOFF_S)
            self._not_before = time.monotonic() + self._backoff_s
            self._failure = failure.__cause__ or failure
            raise
        self._backoff_s = 0.0
        wire = Wire(connection)
        try:
            # It may be another server than the last one.
            self._has_functions = await self._offers_functions(wire)
        except BaseException:
            # A reply that is still to come is nobody's.
            await wire.close()
            raise
        self._wire = wire
        return wire

    async def _offers_functions(self, wire: Wire) -> bool:
        """
        Whether calls can be functions on this connection; if ours is not there, it is made.

        Called before the first batch, with nothing to do: what fails in one for want of a function is sent again behind
        all others in it, and a batch keeps its order.
        """
        pack, nothing = driver().pack, ("FCALL", self._scripts.calls, 0)
        (found,) = await wire.ask(pack(nothing), 1, self._timeout_s)
        if isinstance(found, Exception) and str(found).startswith(_NOT_FOUND):
            (found,) = await wire.ask(pack(self._load), 1, self._timeout_s)
        return not isinstance(found, Exception) or not _is_refused(found)

    async def _drop(self, wire: Wire | None) -> None:
        if wire is not None:
            if self._wire is wire:
                self._wire = None
            await wire.close()

    async def close(self) -> None:
        """Close the connection, after whoever uses it. Again changes nothing."""
        wire = self._wire
        if wire is not None:
            await wire.quiet()
        await self._drop(self._wire)


def moves() -> tuple[type[Exception], ...]:
    """How a server says that it is not the one to ask, or not now; nothing was done."""
    errors = driver().exceptions
    return (errors.ReadOnlyError, errors.MovedError, errors.AskError, errors.TryAgainError, errors.ClusterDownError)


def _is_of_functions(failure: Exception) -> bool:
    """Whether the server does not know our function, or functions at all, or lets us call none."""
    return str(failure).startswith(_NOT_FOUND) or ("fcall" in str(failure).lower() and _is_refused(failure))


def _is_refused(failure: Exception) -> bool:
    """Whether it is a server before 7, or one that keeps functions from us."""
    return str(failure).startswith(_NO_SUCH)


_NOT_FOUND = "Function not found"

_NO_SUCH = ("unknown command", "this user has no permissions", "User ", "NOPERM")
