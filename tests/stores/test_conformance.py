"""The shipped suite, on every store."""

from __future__ import annotations

from pathlib import Path

import pytest

from asgi_metering.stores.contract import Store
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import StoreConformance


class TestStores(StoreConformance):
    """Every rule of the suite, on each store."""

    @pytest.fixture(autouse=True, params=["memory", "sqlite", "postgres"])
    def _kind_of_store(self, request: pytest.FixtureRequest, tmp_path: Path, schema: str) -> None:
        self.kind = request.param
        self.folder = tmp_path
        self.schema = schema
        self.made = 0
        if self.kind == "postgres":
            self.server = request.getfixturevalue("postgres")

    async def make_store(self, clock: FakeClock) -> Store:
        """Make a store of the kind that the test's id names."""
        self.made += 1
        store: Store
        if self.kind == "memory":
            store = MemoryStore(clock)
        elif self.kind == "postgres":
            namespace = f"{self.schema}_{self.made}"
            store = PostgresStore(self.server.url(), namespace=namespace, clock=clock, migrate=True)
        else:
            store = SQLiteStore(self.folder / f"{self.made}.db", synchronous="OFF", clock=clock)
        await store.open()
        return store
