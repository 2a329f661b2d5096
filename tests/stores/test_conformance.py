"""The shipped suite, on every store."""

from __future__ import annotations

from pathlib import Path

import pytest

from asgi_metering.stores.contract import Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import StoreConformance


class TestStores(StoreConformance):
    """Every rule of the suite, on each store that needs no server."""

    @pytest.fixture(autouse=True, params=["memory", "sqlite"])
    def _kind_of_store(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.kind = request.param
        self.folder = tmp_path
        self.made = 0

    async def make_store(self, clock: FakeClock) -> Store:
        """Make a store of the kind that the test's id names."""
        self.made += 1
        store: Store
        if self.kind == "memory":
            store = MemoryStore(clock)
        else:
            store = SQLiteStore(self.folder / f"{self.made}.db", synchronous="OFF", clock=clock)
        await store.open()
        return store
