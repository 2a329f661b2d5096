"""
Requests per second behind uvicorn, of a bare application and of the same behind the whole stack.

    python -m tests.bench.end_to_end

Each is a server process of its own, asked over keep-alive connections; rounds are interleaved. Options: ``--servers
NAME ...``, ``--stores NAME ...``, ``--connections N``, ``--rounds N``, ``--seconds S``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asgi_metering.stores.postgres import PostgresStore
from tests.bench.served import STORE
from tests.harness.postgres import postgres_server
from tests.harness.servers import HOST, SERVER_KINDS, ServerKind, serve
from tests.harness.valkey import valkey

REQUEST = b"GET /hit HTTP/1.1\r\nhost: bench\r\nx-key: payer\r\n\r\n"


@contextmanager
def _sqlite() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{Path(folder, 'bench.db')}"


@contextmanager
def _redis() -> Iterator[str]:
    with valkey("--appendonly", "yes", "--appendfsync", "everysec") as server:
        yield server.url


@contextmanager
def _postgres() -> Iterator[str]:
    with postgres_server() as server:
        asyncio.run(_migrated(server.url()))
        yield server.url()


async def _migrated(url: str) -> None:
    store = PostgresStore(url, migrate=True)
    await store.open()
    await store.close()


@contextmanager
def _memory() -> Iterator[str]:
    yield "memory://"


STORES = {"memory": _memory, "sqlite": _sqlite, "redis": _redis, "postgres": _postgres}


class Connection(asyncio.Protocol):
    """
    One keep-alive connection: asks again as soon as it has an answer.

    Attributes:
        answers: How many came, all of them 200 and of one length.
    """

    def __init__(self) -> None:
        self.answers = 0
        self.lost: BaseException | None = None
        self._asking = True
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask the first time."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(REQUEST)

    def data_received(self, data: bytes) -> None:
        """Count a whole answer, and ask again."""
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if not end or len(body) < len(b'{"ok":true}'):
            return
        assert head.startswith(b"HTTP/1.1 200"), head
        self._buffer = b""
        self.answers += 1
        if self._asking:
            self._transport.write(REQUEST)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that the server has closed it."""
        if self._asking:
            self.lost = exc or ConnectionResetError("The server closed the connection.")

    def stop(self) -> None:
        """Ask no more."""
        self._asking = False
        self._transport.close()


async def per_second(port: int, connections: int, seconds: float) -> float:
    """Answers per second over so many connections at once."""
    loop = asyncio.get_running_loop()
    opened = [(await loop.create_connection(Connection, HOST, port))[1] for _ in range(connections)]
    before, began = sum(one.answers for one in opened), time.perf_counter()
    await asyncio.sleep(seconds)
    count, took = sum(one.answers for one in opened) - before, time.perf_counter() - began
    for one in opened:
        one.stop()
        if one.lost is not None:
            raise one.lost
    return count / took


def measure(kind: ServerKind, given: argparse.Namespace) -> None:
    """Print the rows of one server."""
    with ExitStack() as stack:
        served = {"bare": stack.enter_context(serve("tests.bench.served:bare", kind, extra_args=["--factory"])).port}
        for name in given.stores:
            env = {STORE: stack.enter_context(STORES[name]())}
            server = serve("tests.bench.served:metered", kind, env=env, extra_args=["--factory"])
            served[name] = stack.enter_context(server).port
        rates: dict[str, list[float]] = {name: [] for name in served}
        # One round that does not count: pools are filled, statements prepared.
        for turn in range(given.rounds + 1):
            for name, port in served.items():
                rate = asyncio.run(per_second(port, given.connections, given.seconds))
                if turn:
                    rates[name].append(rate)
    for name, found in rates.items():
        ratios = [ours / bare for ours, bare in zip(found, rates["bare"], strict=True)]
        print(
            f"| {kind} | {name} | {statistics.median(found):.0f} | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f} {max(ratios):.2f}] |",
            flush=True,
        )


def main() -> None:
    """Run each server in turn."""
    parser = argparse.ArgumentParser(description="End-to-end benchmark of asgi_metering")
    servers = [kind for kind in SERVER_KINDS if kind.startswith("uvicorn")]
    parser.add_argument("--servers", nargs="+", choices=servers, default=servers)
    parser.add_argument("--stores", nargs="*", choices=STORES, default=list(STORES))
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each in each round")
    given = parser.parse_args()
    print("Three limits, a lease, a hold, a settlement and an event for each metered request; medians [least most].\n")
    print("| server | store | requests/s | of the bare app's |")
    print("|---|---|---:|---:|")
    for kind in given.servers:
        measure(kind, given)


if __name__ == "__main__":
    main()
