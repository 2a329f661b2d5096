"""
Tests of your own for the day on which something breaks: a worker is killed, a client hangs up, the store is down.

    pytest examples/faults_in_tests.py
"""

from __future__ import annotations

import asyncio
import time

from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call
from asgi_metering.prices import per_token
from asgi_metering.stores.sqlite import SQLiteStore
from asgi_metering.testing import crash_after, disconnect_at, store_down, until_killed


def application(metering):
    """Your application: here a stream that costs a credit a word."""

    @billable(per_token(output=1), hold=10)
    async def words(request):
        async def chunks():
            for word in ("to ", "be ", "or ", "not"):
                current_call().record(TokenUsage(input=0, output=1))
                yield word

        return StreamingResponse(chunks())

    return MeteringMiddleware(Starlette(routes=[Route("/words", words)]), metering=metering)


def metering_on(store):
    """Your metering, with everything but the store as in production."""
    return Metering(store, identify=lambda connection: Caller("ada"), sinks=())


async def worker(path):
    """Runs in a process of its own, and dies with a call in its hands: its end is not booked."""
    fault = crash_after("end.before")
    metering = metering_on(fault.store(SQLiteStore(path)))
    async with metering:
        await metering.grant("ada", 100, id="first")
        await disconnect_at("end", fault.app(application(metering)), "/words")


def test_killed_worker_costs_nobody_anything(tmp_path):
    """Its hold stays until its grace is over; then the next worker ends it by the route's policy."""
    path = str(tmp_path / "metering.db")
    until_killed(worker, path)

    async def next_worker():
        later = metering_on(SQLiteStore(path, clock=lambda: time.time() + 3_600))
        async with later:
            assert (await later.balance("ada")).held == 10_000_000
            assert len(await later.reconcile()) == 1
            assert later.unit.text((await later.balance("ada")).available) == "100"
            assert await later.check() == []

    asyncio.run(next_worker())


def test_client_that_hangs_up_pays_for_what_it_got():
    """After two words it has gone, and two words are charged."""

    async def run():
        metering = metering_on("memory://")
        async with metering:
            await metering.grant("ada", 100, id="first")
            left = await disconnect_at("body", application(metering), "/words", nth=2)
            assert left.body == b"to be "
            assert metering.unit.text((await metering.balance("ada")).available) == "98"

    asyncio.run(run())


def test_store_that_is_down_lets_nobody_in_for_free():
    """While it is down the route answers 503; afterwards it works again."""

    async def run():
        store = store_down("memory://")
        metering = metering_on(store)
        app = application(metering)
        async with metering:
            await metering.grant("ada", 100, id="first")
            with store.down():
                assert (await disconnect_at("end", app, "/words")).status == 503
            assert (await disconnect_at("end", app, "/words")).status == 200

    asyncio.run(run())
