"""A PostgreSQL server that is stopped, frozen or cut off while calls run: what clients see, and what is booked."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering, billable, rate_limited
from asgi_metering.stores.postgres import PostgresStore
from tests.harness.cutting import cutting_proxy
from tests.harness.drive import Drive, http_scope, status
from tests.harness.postgres import PostgresServer
from tests.outage.gated import CREDIT, call, identify, metered, settled, until
from tests.outage.worker import HELD, QUEUED, working


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again within milliseconds."""
    for name in ("stores.breaker.FIRST_PAUSE_S", "stores.breaker.LAST_PAUSE_S", "delivery.RETRY_LAST_S"):
        monkeypatch.setattr(f"asgi_metering.{name}", 0.05)


@asynccontextmanager
async def served(
    server: PostgresServer, schema: str, *, port: int = 0, prepare: bool = True, **options: Any
) -> AsyncIterator[Metering]:
    """A metering on the server; ann has 100 credits."""
    store = PostgresStore(server.url(port=port), namespace=schema, migrate=True, answer_within_s=0.6, prepare=prepare)
    given = {"identify": identify, "sinks": (), "store_timeout_s": 0.3, "drain_s": 0.1, **options}
    async with Metering(store, **given) as metering:
        metering.runtime().managed = True
        await metering.grant("ann", 100, id="g")
        yield metering


async def _is_empty(metering: Metering) -> bool:
    assert metering.journal is not None
    return await metering.journal.counts() == (0, 0)


async def _is_quiet(metering: Metering) -> bool:
    return metering.runtime().busy == 0


async def _is_let_in(app: Any) -> bool:
    return status((await call(app)).log) == 200


async def _holds_nothing(metering: Metering) -> bool:
    return not await metering.holds()


def test_stall_nobody_with_a_frozen_server(postgres: PostgresServer, schema: str) -> None:
    """A server stopped with SIGSTOP: unmetered requests and streams go on, counted ones are let in, money is 503.

    An unmetered request that comes after a metered one is answered before it: nobody stands behind the store. What the
    server did admit before it froze, or after it woke up, is given back.
    """
    order: list[str] = []
    leave = asyncio.Event()

    async def ask(name: str, app: Any) -> int:
        answer = status((await call(app)).log)
        order.append(name)
        return answer

    async def play() -> None:
        async with served(postgres, schema) as metering:
            paid = metered(metering, billable(1))
            stream = metered(metering, billable(2), work=leave.wait)
            async with Drive(stream, http_scope("/", "POST")) as run:
                await until(lambda: _is_running(metering))
                with postgres.frozen():
                    asked = [ask("paid", paid), ask("counted", metered(metering, rate_limited("1/day")))]
                    answers = await asyncio.gather(*asked, *(ask("unmetered", metered(metering)) for _ in range(20)))
                    assert answers == [503, 200, *[200] * 20]
                    assert order[:20] == ["unmetered"] * 20
                    leave.set()
                    assert await run.ended() == "returned"
                    assert status(run.log) == 200
            await until(lambda: _is_let_in(paid))
            await until(lambda: _is_quiet(metering))
            await until(lambda: _holds_nothing(metering))
            assert await settled(metering) == (3 * CREDIT, 0)

    asyncio.run(play())


async def _is_running(metering: Metering) -> bool:
    return len(metering.runtime().in_flight) == 1


def test_keep_charging_while_the_server_restarts(postgres: PostgresServer, schema: str, tmp_path: Path) -> None:
    """With a journal and "queue" a restart of the server is seen by no client, and every call is charged once."""
    statuses: list[int] = []

    async def play() -> None:
        down: dict[str, Any] = {"credits": "queue"}
        async with served(postgres, schema, journal=tmp_path / "j", on_store_down=down) as metering:
            app = metered(metering, billable(1))
            over = asyncio.Event()

            async def caller() -> None:
                while not over.is_set():
                    statuses.append(status((await call(app)).log))
                    await asyncio.sleep(0.02)

            callers = [asyncio.create_task(caller()) for _ in range(3)]
            await until(lambda: _has(statuses, 3))
            await asyncio.to_thread(postgres.stop)
            try:
                at_stop = len(statuses)
                await until(lambda: _has(statuses, at_stop + 9))
            finally:
                await asyncio.to_thread(postgres.start)
            over.set()
            await asyncio.gather(*callers)
            await until(lambda: _is_quiet(metering))
            await until(lambda: _is_empty(metering))
            await until(lambda: _holds_nothing(metering))
            assert set(statuses) == {200}
            assert await settled(metering) == (len(statuses) * CREDIT, 0)

    asyncio.run(play())


async def _has(found: list[int], number: int) -> bool:
    return len(found) >= number


@pytest.mark.parametrize("lost", [b"hashtextextended", b"COMMIT"])
def test_charge_once_although_replies_are_lost(
    postgres: PostgresServer, schema: str, tmp_path: Path, lost: bytes
) -> None:
    """S3.15: a connection that is reset between request and reply, at each step of a queued charge, changes nothing."""

    async def play() -> None:
        with cutting_proxy(postgres.port) as proxy:
            # What is prepared goes out once, and by its name from then on: the proxy looks for the text.
            async with served(postgres, schema, port=proxy.port, prepare=False, journal=tmp_path / "j") as metering:
                app = metered(metering, billable(4, on_store_down="queue"))
                for cut in range(1, 4):
                    proxy.cut_reply_to = lost
                    # The first reply that is lost is that of the admission, which lets the call in without the store.
                    assert status((await call(app)).log) == 200
                    assert proxy.cuts == 2 * cut - 1
                    # The next one is that of what the journal has to say.
                    proxy.cut_reply_to = lost
                    await until(lambda cut=cut: _has_cut(proxy, 2 * cut))  # type: ignore[misc]
                await until(lambda: _is_empty(metering))
                await until(lambda: _is_quiet(metering))
                await until(lambda: _holds_nothing(metering))
                assert await settled(metering) == (12 * CREDIT, 0)

    asyncio.run(play())


async def _has_cut(proxy: Any, number: int) -> bool:
    return bool(proxy.cuts >= number)


def test_deliver_what_a_killed_process_left(postgres: PostgresServer, schema: str, tmp_path: Path) -> None:
    """`kill -9` with the server stopped: the next process, which starts without it, charges both calls when it is back.

    One was admitted before the outage and ended in it; the other was let in while it lasted.
    """
    url = f"{postgres.url()}?namespace={schema}"

    async def prepare() -> None:
        async with served(postgres, schema):
            pass

    async def prove() -> None:
        async with Metering(url, sinks=()) as metering:
            assert await settled(metering) == ((HELD + QUEUED) * CREDIT, 0)

    asyncio.run(prepare())
    with working("victim", url, tmp_path / "j") as victim:
        victim.expect("admitted")
        postgres.stop()
        try:
            victim.go_on()
            victim.expect("let-in")
            victim.expect("kept")
            victim.process.send_signal(signal.SIGKILL)
            with working("heir", url, tmp_path / "j") as heir:
                heir.expect("started")
                postgres.start()
                heir.go_on()
                heir.expect("delivered")
        finally:
            postgres.stop()
            postgres.start()
    asyncio.run(prove())
