"""
A process that works while its store goes away, and one that comes after it: run as ``python -m tests.outage.worker``.

Says one word on its standard output for each thing that is so, and waits for a line on its standard input where the
test has something to do. Knows a store's URL and a journal, and not which store it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from asgi_metering import Metering, delivery
from asgi_metering.stores.sqlite import SQLiteStore

__all__ = ["HELD", "QUEUED", "Worker", "working"]

ROOT = Path(__file__).parents[2]

HELD, QUEUED = 3, 2
"""Credits of the call that was admitted before the outage, and of the one that was let in during it."""


class Worker:
    """A process of this module, as a test sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @staticmethod
    def _open(pipe: IO[str] | None) -> IO[str]:
        assert pipe is not None
        return pipe

    def expect(self, word: str) -> None:
        """Wait until it says *word*."""
        said = self._open(self.process.stdout).readline().strip()
        assert said == word, f"It said {said!r}, and not {word!r}."

    def go_on(self) -> None:
        """Let it go on."""
        stdin = self._open(self.process.stdin)
        stdin.write("\n")
        stdin.flush()


@contextlib.contextmanager
def working(role: str, store: str, journal: Path) -> Iterator[Worker]:
    """A process in this role (``victim`` or ``heir``); it is gone when the block is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.outage.worker", role, store, str(journal)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield Worker(process)
    finally:
        process.kill()
        process.communicate()


def say(word: str) -> None:
    """Tell the test."""
    print(word, flush=True)


async def told() -> None:
    """Wait for the test."""
    await asyncio.to_thread(sys.stdin.readline)


async def waits(metering: Metering, number: int) -> None:
    """Until so many entries wait in the journal."""
    assert metering.journal is not None
    while await metering.journal.counts() != (number, 0):
        await asyncio.sleep(0.01)


async def victim(metering: Metering) -> None:
    """Begin a call, lose the store, end it, and make another one; then wait to be killed."""
    async with metering:
        with contextlib.suppress(Exception):
            # Its end is not booked, and says so.
            async with metering.charge(payer="ann", line="held", price=HELD):
                say("admitted")
                await told()
        async with metering.charge(payer="ann", line="queued", price=QUEUED, on_store_down="queue"):
            say("let-in")
        await waits(metering, 2)
        say("kept")
        await told()


async def heir(metering: Metering) -> None:
    """Start without the store, and deliver what was left when it is there."""
    async with metering:
        await waits(metering, 2)
        say("started")
        await told()
        await waits(metering, 0)
        say("delivered")


def main(role: str, store: str, journal: str) -> None:
    """Play *role*."""
    metering = Metering(store, sinks=(), journal=journal, store_timeout_s=0.3, drain_s=0.1)
    # In a test there is no time for the patience of a service.
    metering.end_timeout_s = 0.5
    delivery.RETRY_LAST_S = 0.2  # type: ignore[misc]
    if isinstance(metering.store, SQLiteStore):
        metering.store._database._busy_timeout_s = 0.2
    asyncio.run({"victim": victim, "heir": heir}[role](metering))


if __name__ == "__main__":
    main(*sys.argv[1:])
