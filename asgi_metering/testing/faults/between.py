"""
A store that stands before another one and hands everything on: what faults of a store are built on.

Knows the contract of stores alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.contract import Query, Snapshot, Store

__all__ = ["StoreBetween"]


class StoreBetween(Store):
    """
    Hands everything on to *inner*, through `run`: it never answers at once, also where *inner* could.

    Args:
        inner: Opened and closed through this one.

    Attributes:
        inner: The store behind it.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.name = inner.name
        self.durable = inner.durable
        self.shared = inner.shared
        self.one_place = inner.one_place

    async def open(self) -> None:
        """See `Store.open`."""
        await self.inner.open()

    async def close(self) -> None:
        """See `Store.close`."""
        await self.inner.close()

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """See `Store.run`."""
        return await self.inner.run(operations)

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`."""
        return await self.inner.read(query)
