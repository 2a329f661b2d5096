"""
The use of a store by several event loops of one process: opened by each, closed by the last.

Knows loops only as what uses the store; nothing of operations.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Protocol

from asgi_metering.errors import MeteringError

__all__ = ["StoreUse"]

log = logging.getLogger("asgi_metering.stores")


class Opened(Protocol):
    """A store, or a journal."""

    async def open(self) -> None:
        """Get ready; again changes nothing."""

    async def close(self) -> None:
        """Give everything back; again changes nothing."""


class StoreUse:
    """
    Who uses *store*.

    Args:
        store: Opening and closing it again changes nothing, as the contract says.
    """

    def __init__(self, store: Opened) -> None:
        self._store = store
        self._loops: set[asyncio.AbstractEventLoop] = set()
        self._lock = threading.Lock()

    async def open(self) -> None:
        """Open the store for the running loop, until that calls `close`. Raises as `Store.open`."""
        loop = asyncio.get_running_loop()
        with self._lock:
            self._loops.add(loop)
        try:
            await self._store.open()
        except BaseException:
            with self._lock:
                self._loops.discard(loop)
            raise

    async def close(self) -> None:
        """Close the store if the running loop was the last that used it: others may be amid their calls."""
        with self._lock:
            self._loops.discard(asyncio.get_running_loop())
        if self._is_used():
            return
        await self._store.close()
        if self._is_used():
            # Somebody came meanwhile, and may have found the store open still.
            try:
                await self._store.open()
            except MeteringError as failure:
                log.warning("The store that another event loop uses could not be opened again: %s", failure)

    def _is_used(self) -> bool:
        with self._lock:
            # A loop that ended without a stop uses nothing any more.
            self._loops = {loop for loop in self._loops if not loop.is_closed()}
            return bool(self._loops)
