"""The bytes of a connection: batches beside one another, and a server that says what nobody asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.rules.operations import Admit, PostGrant, WalletSource
from asgi_metering.stores.redis import RedisStore, ServerPlace
from asgi_metering.stores.redis.link import Link
from asgi_metering.stores.redis.scripts import Scripts
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer

Maker = Callable[..., RedisStore]


def test_run_beside_a_batch_that_is_away(server: ValkeyServer, make_store: Maker) -> None:
    """Batches of one store are on their way on one connection together, and each gets its own answers."""

    async def run() -> None:
        store = make_store()
        await store.open()
        await store.run([PostGrant("g", "p", "credits", 1_000)])
        batches = [[f"{name}{number}" for number in range(size)] for name, size in (("a", 1), ("b", 100), ("c", 3))]
        asked = [[Admit(name, "p", "credits", 1, 1, (WalletSource(),)) for name in names] for names in batches]
        before = server.ask("INFO", "clients")
        answers = await asyncio.gather(*map(store.run, asked))
        assert [[answer.id for answer in some] for some in answers] == batches  # type: ignore[union-attr]
        left = [answer.available for some in answers for answer in some]  # type: ignore[union-attr]
        assert left == list(range(999, 895, -1))
        assert connected(server.ask("INFO", "clients")) == connected(before)
        await store.close()

    asyncio.run(run())


def connected(told: bytes) -> bytes:
    """How many clients a server has, from what it tells of them."""
    return next(line for line in told.splitlines() if line.startswith(b"connected_clients:"))


async def with_server(replies: bytes, scene: Callable[[Link], Awaitable[None]]) -> None:
    """Play *scene* on a link to a server that says *replies* to a PING, or leaves if there are none; to all else OK."""
    served: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(asyncio.current_task())
        with suppress(ConnectionError):
            while told := await reader.read(65_536):
                if b"PING" in told and not replies:
                    break
                writer.write(replies if b"PING" in told else b"+OK\r\n" * told.count(b"*"))
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, HOST, 0) as running:
        port = running.sockets[0].getsockname()[1]
        link = Link(ServerPlace({"host": HOST, "port": port}, 5.0), Scripts(), 5.0)
        await scene(link)
        await link.close()
        await asyncio.gather(*(task for task in served if task is not None))


def test_reply_that_comes_in_pieces() -> None:
    """Replies are told when they are whole, and each error is the reply of its own command."""

    async def scene(link: Link) -> None:
        found = await link.exchange([("PING",), ("PING",), ("PING",)])
        assert (found[0], type(found[1]).__name__, found[2]) == (b"1", "OutOfMemoryError", [b"x" * 100_000, None, 7])

    whole = b"$1\r\n1\r\n-OOM none left\r\n*3\r\n$100000\r\n" + b"x" * 100_000 + b"\r\n$-1\r\n:7\r\n"
    asyncio.run(with_server(whole, scene))


@pytest.mark.parametrize("said", [b"+PONG\r\n+MORE\r\n", b"+PONG\r\n?\r\n"])
def test_server_that_says_what_nobody_asked_for(said: bytes) -> None:
    """A connection whose replies are out of step is given up; the next exchange has a new one."""

    async def scene(link: Link) -> None:
        for _ in range(3):
            assert await link.exchange([("PING",)]) == [b"PONG"]
            assert await link.exchange([("SET", "a", "b")]) == [b"OK"]

    asyncio.run(with_server(said, scene))


def test_server_that_closes_while_batches_are_away() -> None:
    """All exchanges that were on their way are told that the connection is lost, each by an error of its own."""

    async def scene(link: Link) -> None:
        failures = await asyncio.gather(link.exchange([("PING",)]), link.exchange([("PING",)]), return_exceptions=True)
        assert [type(failure) for failure in failures] == [StoreUnavailableError] * 2
        assert failures[0] is not failures[1]

    asyncio.run(with_server(b"", scene))
