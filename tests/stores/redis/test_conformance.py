"""The shipped suite, on a real Valkey server."""

from __future__ import annotations

from itertools import count

import pytest

from asgi_metering.stores.contract import Store
from asgi_metering.stores.redis import RedisStore, ServerPlace
from asgi_metering.testing.clock import FakeClock
from asgi_metering.testing.conformance import StoreConformance
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer

_numbers = count()


class TestStandalone(StoreConformance):
    """Every rule of the suite, on one server."""

    @pytest.fixture(autouse=True)
    def _server(self, server: ValkeyServer) -> None:
        self.place = ServerPlace({"host": HOST, "port": server.port}, 5.0)

    async def make_store(self, clock: FakeClock) -> Store:
        """Make a store with a namespace of its own."""
        store = RedisStore(self.place, namespace=f"suite{next(_numbers)}", clock=clock)
        await store.open()
        return store
