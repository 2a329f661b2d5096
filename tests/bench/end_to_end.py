"""
Requests per second behind uvicorn, of a bare application and of the same behind the whole stack.

    python -m tests.bench.end_to_end

Each is a server process of its own, asked over keep-alive connections by ``wrk``, or where that is not installed by a
small client of our own; rounds are interleaved. Options: ``--servers NAME ...``, ``--stores NAME ...``,
``--connections N``, ``--rounds N``, ``--seconds S``, ``--no-wrk``, and ``--peers`` for the limiters of ``tox run -e
bench-peers``, in memory and on Redis.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from asgi_metering.stores.postgres import PostgresStore
from tests.bench.served import PEER, STORE
from tests.harness.postgres import postgres_server
from tests.harness.servers import HOST, SERVER_KINDS, ServerKind, serve
from tests.harness.valkey import valkey

REQUEST = b"GET /hit HTTP/1.1\r\nhost: bench\r\nx-key: bench\r\n\r\n"


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


WRK_RATE = re.compile(r"^Requests/sec:\s+([0-9.]+)$", re.MULTILINE)
WRK_WRONG = re.compile(r"^\s*(Non-2xx or 3xx responses|Socket errors): .*$", re.MULTILINE)


def per_second_by_wrk(port: int, connections: int, seconds: float) -> float:
    """The same by ``wrk``, whose one thread takes far less of the machine."""
    url = f"http://{HOST}:{port}/hit"
    command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-H", "x-key: bench", url]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60 + seconds).stdout
    wrong, rate = WRK_WRONG.search(told), WRK_RATE.search(told)
    if wrong is not None or rate is None:
        raise RuntimeError(told)
    return float(rate[1])


def asked(port: int, given: argparse.Namespace) -> float:
    """Answers per second of one server."""
    if given.wrk:
        return per_second_by_wrk(port, given.connections, given.seconds)
    return asyncio.run(per_second(port, given.connections, given.seconds))


def measure(kind: ServerKind, given: argparse.Namespace) -> None:
    """Print the rows of one server."""
    with ExitStack() as stack:

        def serving(app: str, **env: str) -> int:
            extra = [] if app == "peer" else ["--factory"]
            return stack.enter_context(serve(f"tests.bench.served:{app}", kind, env=env, extra_args=extra)).port

        served = {"bare": serving("bare")}
        urls = {name: stack.enter_context(STORES[name]()) for name in given.stores}
        for name, url in urls.items():
            served[name] = serving("metered", **{STORE: url})
        for name, url in urls.items():
            for peer in peers_on(name) if given.peers else []:
                served[f"{peer}, {name}"] = serving("peer", **{STORE: url, PEER: peer})
        rates: dict[str, list[float]] = {name: [] for name in served}
        # One round that does not count: pools are filled, statements prepared.
        for turn in range(given.rounds + 1):
            for name, port in served.items():
                rate = asked(port, given)
                if turn:
                    rates[name].append(rate)
    for name, found in rates.items():
        ratios = [ours / bare for ours, bare in zip(found, rates["bare"], strict=True)]
        print(
            f"| {kind} | {name} | {statistics.median(found):.0f} | {statistics.median(ratios):.2f} "
            f"[{min(ratios):.2f} {max(ratios):.2f}] |",
            flush=True,
        )


def peers_on(store: str) -> list[str]:
    """The peers that count in a store of that name."""
    from tests.bench.peers import PEERS

    return [peer.name for peer in PEERS if store == "memory" or (store == "redis" and peer.on_redis)]


def main() -> None:
    """Run each server in turn."""
    parser = argparse.ArgumentParser(description="End-to-end benchmark of asgi_metering")
    servers = [kind for kind in SERVER_KINDS if kind.startswith("uvicorn")]
    parser.add_argument("--servers", nargs="+", choices=servers, default=servers)
    parser.add_argument("--stores", nargs="*", choices=STORES, default=list(STORES))
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each in each round; whole ones for wrk")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--no-wrk", dest="wrk", action="store_false", default=shutil.which("wrk") is not None)
    given = parser.parse_args()
    print(f"Asked by {'wrk' if given.wrk else 'our own client'}.")
    print("Three limits, a lease, a hold, a settlement and an event for each metered request; medians [least most].\n")
    print("| server | store | requests/s | of the bare app's |")
    print("|---|---|---:|---:|")
    for kind in given.servers:
        measure(kind, given)


if __name__ == "__main__":
    main()
