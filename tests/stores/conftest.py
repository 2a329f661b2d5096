"""What the tests of the stores share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest

from tests.harness.postgres import PostgresServer, postgres_server
from tests.harness.valkey import ValkeyServer, valkey
from tests.harness.warm import preload

preload()

_numbers = count(1)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One PostgreSQL server for all tests of this process; each test takes a schema of its own."""
    # Tests kill processes, the server among them, and cut no power.
    with postgres_server(waits_for_disk=False) as server:
        yield server


@pytest.fixture
def schema() -> str:
    """A schema that no other test has."""
    return f"test_{next(_numbers)}"


@pytest.fixture(scope="session")
def server() -> Iterator[ValkeyServer]:
    """One Valkey server for all tests of this process; each test takes a namespace of its own."""
    with valkey("--appendonly", "yes", "--appendfsync", "no") as running:
        yield running
