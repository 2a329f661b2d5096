"""
What an end takes while the event loop has other things to do: ``python -m tests.bench.busy``.

A task keeps the loop from ever sleeping, with turns of so many milliseconds each. Whatever waits for another thread,
or for a socket, then waits for turns of the loop as well, so each row also says how many of them an operation took.
What must not happen is that it takes without bound, as a thread does that gives the interpreter up at each step of
SQLite.

Two turns are the least, whoever asks: one until the loop looks at the socket again, or lets a thread have the
interpreter, and one until the task that waits goes on. So the ratio cannot be less than two turns over what an end
takes on an idle loop, which is the column "floor"; where that takes less than two fifths of a turn, no client stays
below five. The rows "bare" are the proof: a ``PING`` over a protocol of asyncio, and nothing else.

Options: ``--stores NAME ...``, ``--turns MS ...``, ``--ends N``, ``--rounds N``.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, Operation, PostGrant, WalletSource
from asgi_metering.stores.contract import Store
from asgi_metering.stores.pump import Pump
from tests.bench.stores import STORES, Submit
from tests.harness.valkey import valkey

TURNS_MS = (0.05, 0.2, 1.0)
"""What a server's loop does in one turn under load: a few small requests, many, or one that computes."""


BARE = "bare"
"""A client that does nothing but to ask a server and to wait for what it says."""


class Burner:
    """Keeps the running loop from sleeping."""

    def __init__(self, turn_ms: float) -> None:
        self._turn_s = turn_ms / 1_000
        self.turns = 0

    async def run(self) -> None:
        """Take turns until cancelled."""
        while True:
            until = time.perf_counter() + self._turn_s
            while time.perf_counter() < until:
                pass
            self.turns += 1
            await asyncio.sleep(0)


class Ping(asyncio.Protocol):
    """The least that a client can do: one write, and one read."""

    def __init__(self) -> None:
        self._transport: Any = None
        self._answered: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the way to the server."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Wake who waits."""
        if self._answered is not None:
            self._answered.set_result(None)

    async def submit(self, _operation: Operation) -> None:
        """Whatever is asked."""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(b"PING\r\n")
        await self._answered

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()


async def ends(submit: Submit, name: str, count: int) -> list[float]:
    """Milliseconds that each of *count* ends took, one after another."""
    took = []
    for number in range(count):
        call = f"{name}.{number}"
        await submit(Admit(call, "p", "credits", 3, 3, (WalletSource(),), line="bench"))
        began = time.perf_counter()
        await submit(End(call, 2, Basis.USAGE))
        took.append(1_000 * (time.perf_counter() - began))
    return took


async def measure(store: Store, given: argparse.Namespace) -> None:
    """Print the rows of one store."""
    await store.open()
    await store.run([PostGrant("g", "p", "credits", 10**12)])
    pump = Pump(store)
    await compare(store.name, pump.submit, given)
    await pump.close()
    await store.close()


async def measure_bare(given: argparse.Namespace) -> None:
    """Print the rows of the barest client."""
    with valkey() as server:
        url = urlsplit(server.url)
        _, ping = await asyncio.get_running_loop().create_connection(Ping, str(url.hostname), int(url.port or 0))
        await compare(BARE, ping.submit, given)
        ping.close()


async def compare(name: str, submit: Submit, given: argparse.Namespace) -> None:
    """Each round looks at the idle loop and at each kind of turn."""
    idle: list[float] = []
    busy: dict[float, list[float]] = {turn: [] for turn in given.turns}
    turns: dict[float, list[float]] = {turn: [] for turn in given.turns}
    for lap in range(given.rounds):
        idle.append(statistics.median(await ends(submit, f"idle.{lap}", given.ends)))
        for turn in given.turns:
            burner = Burner(turn)
            burning = asyncio.create_task(burner.run())
            busy[turn].append(statistics.median(await ends(submit, f"{turn}.{lap}", given.ends)))
            turns[turn].append(burner.turns / given.ends / 2)
            burning.cancel()
            await asyncio.wait([burning])
    for turn in given.turns:
        _print(name, turn, idle, busy[turn], turns[turn])


def _print(name: str, turn: float, idle: Sequence[float], busy: Sequence[float], turns: Sequence[float]) -> None:
    ratio = statistics.median(b / i for b, i in zip(busy, idle, strict=True))
    floor = statistics.median(2 * turn / i for i in idle)
    print(
        f"| {name} | {turn} | {statistics.median(idle):.2f} | {statistics.median(busy):.2f} | {ratio:.1f} | "
        f"{floor:.1f} | {statistics.median(turns):.1f} |",
        flush=True,
    )


def main() -> None:
    """Run each store on a file or a server of its own."""
    parser = argparse.ArgumentParser(description="What an end takes on a busy event loop")
    parser.add_argument(
        "--stores", nargs="+", choices=[*STORES, "bare"], default=["sqlite", "postgres", "redis", "bare"]
    )
    parser.add_argument("--turns", type=float, nargs="+", default=TURNS_MS, help="of the busy loop, milliseconds")
    parser.add_argument("--ends", type=int, default=100, help="in each row of each round")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    print("| store | a turn, ms | idle p50, ms | busy p50, ms | ratio | floor | turns an operation |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in given.stores:
        if name == BARE:
            asyncio.run(measure_bare(given))
            continue
        with STORES[name]() as (make, _):
            asyncio.run(measure(make(), given))


if __name__ == "__main__":
    main()
