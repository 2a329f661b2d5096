"""What a metered request asks of a Redis server, as that counts it (DESIGN 9): one read, and then nobody waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from asgi_metering import Allowance, Caller, Metering, MeteringMiddleware, Wallet, billable, metered_app, rate_limited
from tests.harness.drive import http_scope
from tests.harness.valkey import ValkeyServer

LIMITS = ("1000/second", "100000/hour", "1000000/day")

Handler = Callable[[], Coroutine[Any, Any, None]]


class Scene:
    """
    One endpoint with three limits, slots, an allowance and a wallet, on a server that counts what it reads.

    Args:
        server: A real one.
        name: Of a namespace of its own.
    """

    def __init__(self, server: ValkeyServer, name: str) -> None:
        self.server = server
        self.metering = Metering(
            f"{server.url}?namespace={name}", identify=lambda connection: Caller("ann"), sinks=(), store_timeout_s=20.0
        )
        self.inside: Handler | None = None
        sources = [Allowance(2, per="day"), Wallet()]
        policies = (rate_limited(*LIMITS, concurrency=1_000), billable(1, sources=sources, line="hit"))
        self.app = MeteringMiddleware(metered_app(self._answer, *policies), metering=self.metering)

    async def __aenter__(self) -> Scene:
        await self.metering.start()
        self.metering.runtime().managed = True
        await self.metering.grant("ann", 1_000, id="first")
        for _ in range(4):
            # The first ones load what the server runs; two of them are paid by the allowance.
            assert await self.ask() == 200
        await self.ended()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.metering.stop()

    async def _answer(self, _scope: Any, _receive: Any, send: Any) -> None:
        if self.inside is not None:
            await self.inside()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"done"})

    async def ask(self) -> int:
        """The status of one request."""
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        await self.app(http_scope("/hit"), receive, send)
        return int(sent[0]["status"])

    async def ended(self) -> None:
        """Wait until all that was to be told to the store is told."""
        await self.metering.runtime().booked()

    def reads(self) -> int:
        """How often the server has read something, this question not counted."""
        stats = self.server.ask("INFO", "stats").decode()
        (line,) = [line for line in stats.splitlines() if line.startswith("total_reads_processed:")]
        return int(line.partition(":")[2])


def test_read_one_request_before_the_handler(server: ValkeyServer) -> None:
    """Three limits, a slot, an allowance that is spent and a wallet are one round trip before the handler, by INFO."""

    async def run() -> list[int]:
        async with Scene(server, "trips") as scene:
            seen: list[int] = []

            async def inside() -> None:
                seen.append(scene.reads())

            scene.inside = inside
            before = scene.reads()
            own = scene.reads() - before
            assert await scene.ask() == 200
            await scene.ended()
            after = scene.reads()
            return [seen[0] - before - 2 * own, after - seen[0] - own]

    assert asyncio.run(run()) == [1, 1]


def test_answer_before_the_store_knows_the_end(server: ValkeyServer) -> None:
    """A server that is frozen while the handler runs delays no answer: nothing after the handler is waited for."""

    async def run() -> int:
        async with Scene(server, "after") as scene:

            async def inside() -> None:
                server.freeze()

            scene.inside = inside
            try:
                # A client that waited for the store would wait for ever.
                return await asyncio.wait_for(scene.ask(), 15)
            finally:
                server.thaw()
                await scene.ended()

    assert asyncio.run(run()) == 200


def test_send_what_waits_together_at_once(server: ValkeyServer) -> None:
    """Of 64 requests that come while the server is busy, the first one goes alone and all others go together."""

    async def run() -> int:
        async with Scene(server, "together") as scene:
            entered, everyone = 0, asyncio.Event()

            async def inside() -> None:
                nonlocal entered
                entered += 1
                if entered == 64:
                    everyone.set()
                # No end is told before the last one is admitted.
                await everyone.wait()

            scene.inside = inside
            before = scene.reads()
            own = scene.reads() - before
            server.freeze()
            asked = [asyncio.create_task(scene.ask()) for _ in range(64)]
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            server.thaw()
            await everyone.wait()
            trips = scene.reads() - before - 2 * own
            assert await asyncio.gather(*asked) == [200] * 64
            await scene.ended()
            return trips

    assert asyncio.run(run()) <= 3
