"""Stores on the Valkey server of all tests; each test has a namespace of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest

from asgi_metering.stores.redis import RedisStore, ServerPlace
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer, cluster

_numbers = count()


@pytest.fixture(scope="session")
def nodes() -> Iterator[list[ValkeyServer]]:
    """Three nodes that share the slots of a Cluster."""
    with cluster() as running:
        yield running


@pytest.fixture
def make_store(server: ValkeyServer) -> Callable[..., RedisStore]:
    """Makes stores that are not open yet, all on one namespace of the test's own unless told otherwise."""
    own = f"test{next(_numbers)}"

    def make(namespace: str = own, port: int | None = None, **more: Any) -> RedisStore:
        place = ServerPlace({"host": HOST, "port": port or server.port}, 5.0)
        return RedisStore(place, namespace=namespace, **more)

    return make
