"""
Outages: a store that is down for as long as a test says.

Knows the contract of stores alone, and no call.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, Literal, TypeAlias

from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.contract import Query, Snapshot, Store
from asgi_metering.stores.urls import store_from_url
from asgi_metering.testing.faults.between import StoreBetween

__all__ = ["DownHow", "StoreDown", "store_down"]

DownHow: TypeAlias = Literal["refuse", "stall", "forget"]

_WAYS: Final = ("refuse", "stall", "forget")


def store_down(store: str | Store = "memory://") -> StoreDown:
    """
    Put *store* behind a switch: it works until `StoreDown.down` or `StoreDown.fail` says otherwise.

        store = store_down("memory://")
        metering = Metering(store, identify=...)
        with store.down():                        # or down("stall"), down("forget")
            ...                                   # what do your routes answer now?

    Args:
        store: A URL or a `Store`.

    Raises:
        ConfigurationError: No usable URL.
    """
    return StoreDown(store if isinstance(store, Store) else store_from_url(store))


class StoreDown(StoreBetween):
    """
    A store with a switch. See `store_down`. May be switched from any thread.

    Attributes:
        refused: How many operations and readings got no answer so far.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.refused = 0
        self._how: DownHow | None = None
        self._switching = threading.Lock()
        self._stalled: set[asyncio.Future[None]] = set()

    @property
    def is_down(self) -> bool:
        """Whether it gives no answers."""
        return self._how is not None

    @contextmanager
    def down(self, how: DownHow = "refuse") -> Iterator[None]:
        """`fail` until the block ends, then `restore`."""
        self.fail(how)
        try:
            yield
        finally:
            self.restore()

    def fail(self, how: DownHow = "refuse") -> None:
        """
        Go down.

        Args:
            how: ``"refuse"`` raises `StoreUnavailableError` at once, and nothing happens. ``"stall"`` gives no answer
                before `restore`, and goes on then, as a server that was stopped. ``"forget"`` does what it is asked and
                raises `StoreUnavailableError`, as where the connection is lost under the answer.

        Raises:
            ConfigurationError: There is no such way.
        """
        if how not in _WAYS:
            raise ConfigurationError(f"No store goes down by {how!r}. Choose one of {', '.join(_WAYS)}.")
        self._how = how

    def restore(self) -> None:
        """Work again; what was stalled goes on."""
        with self._switching:
            self._how = None
            stalled, self._stalled = self._stalled, set()
        for future in stalled:
            loop = future.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(_let, future)

    async def open(self) -> None:
        """See `Store.open`."""
        await self._pass()
        await super().open()
        self._lose(1)

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """See `Store.run`."""
        await self._pass(len(operations))
        answers = await super().run(operations)
        self._lose(len(operations))
        return answers

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`."""
        await self._pass()
        snapshot = await super().read(query)
        self._lose(1)
        return snapshot

    async def _pass(self, asked: int = 1) -> None:
        """Until it may be done."""
        with self._switching:
            how = self._how
            if how == "stall":
                future = asyncio.get_running_loop().create_future()
                self._stalled.add(future)
        if how == "stall":
            self.refused += asked
            try:
                await future
            finally:
                self._stalled.discard(future)
            await self._pass(0)
        elif how == "refuse":
            self.refused += asked
            raise self._error()

    def _lose(self, asked: int) -> None:
        if self._how == "forget":
            self.refused += asked
            raise self._error()

    def _error(self) -> StoreUnavailableError:
        return StoreUnavailableError(f"The {self.name} store is down, as its test wants it. Restore it.")


def _let(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
