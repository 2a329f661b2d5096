"""Two processes on one store, each with what the other's providers answered (DESIGN 6, S1.41, S1.45)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import TypeAlias

import pytest

from asgi_metering import Metering, requires_upstream
from asgi_metering.stores.contract import Store
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.redis import RedisStore, ServerPlace
from asgi_metering.stores.sqlite import SQLiteStore
from tests.harness.drive import headers, status
from tests.harness.postgres import PostgresServer
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer, valkey
from tests.outage.gated import call, identify, metered, until

Make: TypeAlias = Callable[[], Store]

_numbers = count()

RESET_S = 30


@pytest.fixture(params=["sqlite", "postgres", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path, schema: str) -> Make:
    """Makes the stores of several processes, on the same rows."""
    if request.param == "sqlite":
        return lambda: SQLiteStore(tmp_path / "metering.db", synchronous="OFF")
    if request.param == "postgres":
        server: PostgresServer = request.getfixturevalue("postgres")
        return lambda: PostgresStore(server.url(), namespace=schema, migrate=True)
    return at(request.getfixturevalue("server"))


def at(server: ValkeyServer) -> Make:
    """Makes stores on one namespace of a server."""
    namespace = f"sharing{next(_numbers)}"
    return lambda: RedisStore(ServerPlace({"host": HOST, "port": server.port}, 5.0), namespace=namespace)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everybody share at every tick, and tick often."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.005)
    for name in ("TELL_EVERY_S", "LISTEN_EVERY_S", "PAUSE_S"):
        monkeypatch.setattr(f"asgi_metering.sharing.{name}", 0.0)


def house(store: Store) -> Metering:
    """A process that knows who asks."""
    return Metering(store, identify=identify, sinks=(), drain_s=0.05)


def tell(metering: Metering, left: int) -> None:
    """A provider's answer that came just now."""
    fields = [
        (b"x-ratelimit-remaining-requests", str(left).encode()),
        (b"x-ratelimit-reset-requests", b"%ds" % RESET_S),
    ]
    metering.quotas.record("openai", fields, 200)


async def answered(metering: Metering, with_status: int) -> None:
    """Wait until an endpoint that requires the provider answers so."""
    app = metered(metering, requires_upstream("openai"))

    async def is_answered() -> bool:
        ended = await call(app)
        assert status(ended.log) == 200 or 0 < int(dict(headers(ended.log))["retry-after"]) <= RESET_S
        return status(ended.log) == with_status

    await until(is_answered)


@pytest.mark.usefixtures("quick")
def test_answer_to_one_process_is_known_to_another(make: Make) -> None:
    """What a provider told one process lets the other refuse before the provider does, and let in again."""

    async def play() -> None:
        async with house(make()) as here, house(make()) as there:
            await answered(there, 200)
            tell(here, 0)
            await answered(there, 503)
            tell(there, 5)
            await answered(here, 200)

    asyncio.run(play())


def test_what_was_told_outlives_its_process(make: Make) -> None:
    """A process that ends tells what came last, and one that begins knows it (S2.21)."""

    async def play() -> None:
        async with house(make()) as metering:
            tell(metering, 0)
        async with house(make()) as metering:
            await answered(metering, 503)

    asyncio.run(play())


@pytest.mark.usefixtures("quick")
def test_store_that_stops_and_comes_back() -> None:
    """Without the store each process goes on by its own readings; when it is back, they share again (X.6)."""
    with valkey() as server:
        make = at(server)

        async def play() -> None:
            async with house(make()) as here, house(make()) as there:
                await answered(there, 200)
                server.stop()
                tell(here, 0)
                await answered(here, 503)
                await answered(there, 200)
                server.restart()
                await answered(there, 503)

        asyncio.run(play())
