"""The stores that processes are killed on, one of each kind for all tests of a module."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.rules.operations import PostGrant
from asgi_metering.testing.clock import NOON
from tests.stores.crashes.after import CREDITED, whole_books
from tests.stores.crashes.house import CREDITS, Plan
from tests.stores.places import store_at

PAYERS = 300
"""More than there are tests in a module."""

STEP_S = 10_000.0
"""Between two tests: far beyond every life, grace and lease."""


@dataclass
class Ground:
    """
    A store that many processes are killed on, one after the other, each with a payer and a time of its own.

    Attributes:
        url: Of the store.
        folder: For what the processes write.
    """

    url: str
    folder: Path
    _numbers: Iterator[int] = field(default_factory=count)

    def plan(self, point: str, **more: Any) -> Plan:
        """What the next process does."""
        number = next(self._numbers)
        return Plan(
            self.url, f"p{number}", NOON + number * STEP_S, point=point, log=self.folder / f"{number}.log", **more
        )


async def _prepare(url: str) -> None:
    store = store_at(url, lambda: NOON, migrate=True)
    await store.open()
    await store.post([PostGrant("first", f"p{number}", CREDITS.name, CREDITED) for number in range(PAYERS)])
    await store.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "redis"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A store with payers; when all tests are over, every account of it must be proven by its rows and its ledger."""
    folder = tmp_path_factory.mktemp("ground")
    if request.param == "sqlite":
        url = f"sqlite:///{folder / 'metering.db'}"
    elif request.param == "redis":
        url = f"{request.getfixturevalue('server').url}?namespace={folder.name}"
    else:
        server = request.getfixturevalue("postgres")
        url = f"{server.url()}?namespace={folder.name}"
    asyncio.run(_prepare(url))
    yield Ground(url, folder)
    assert asyncio.run(whole_books(url)) == []
