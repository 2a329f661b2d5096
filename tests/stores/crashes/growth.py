"""
A stream whose hold grows by slices until nothing is left, and which is cut then: played by a process that is killed.

Knows nothing of what is right afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

import asgi_metering.heartbeats
from asgi_metering import MeteringMiddleware, TokenUsage, billable, current_call, slices
from asgi_metering.call import Call
from asgi_metering.prices import per_token
from asgi_metering.testing import FakeClock
from asgi_metering.testing.faults import crash_after
from tests.harness.drive import drive, http_scope, lifespan
from tests.servers.books import deliver_to
from tests.stores.crashes.house import BEAT_TURNS, GRACE_S, LIFE_S, Plan, metering_of
from tests.stores.places import store_at

__all__ = ["ALL", "BEATEN", "FIRST", "GROWN", "SPENT", "grow"]

FIRST, GROWN, ALL = 40, 80, 100
"""What is held at first, after one growth, and when the payer has no more."""

BEATEN = 15
"""Used when the hold's heartbeat told of it."""

SPENT = 105
"""Used when the call is cut: a report is as large as it is."""


async def grow(plan: Plan) -> None:
    """Play a stream that uses more than there is, until the fault ends this process."""
    asgi_metering.heartbeats.TICK_S = 0.005
    clock, beaten = FakeClock(plan.now), asyncio.Event()
    fault = crash_after(plan.point, nth=plan.nth)
    store = fault.store(store_at(plan.url, fault.clock(clock)))
    store = crash_after("heartbeat.after", how=beaten.set).store(store)
    metering = metering_of(store, plan.payer, fault.sink(deliver_to(plan.log)), "a")

    @billable(
        per_token(input=1, output=1),
        hold=slices(FIRST, low_water=20),
        line="stream",
        on_abort=plan.policy,
        ttl_s=LIFE_S,
        grace_s=GRACE_S,
    )
    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(_chunks(beaten), media_type="text/event-stream")

    app = fault.stream(Starlette(routes=[Route("/", stream)]))
    served = fault.app(MeteringMiddleware(app, metering=metering))
    async with lifespan(served):
        await drive(served, http_scope("/"))


async def _chunks(beaten: asyncio.Event) -> AsyncIterator[bytes]:
    call = current_call()
    yield b"data: begun\n\n"
    call.record(TokenUsage(input=0, output=BEATEN))
    call.ttl_s = 0.0
    await beaten.wait()
    call.ttl_s = LIFE_S
    for _ in range(BEAT_TURNS):
        await asyncio.sleep(0)
    for used, is_so in ((35, _holds(GROWN)), (75, _holds(ALL)), (SPENT, _is_cut)):
        call.record(TokenUsage(input=0, output=used - sum(each.usage.output or 0 for each in call.reports)))
        while not is_so(call):
            await asyncio.sleep(0)
        yield b"data: more\n\n"


def _holds(parts: int) -> Callable[[Call], bool]:
    return lambda call: call.held == parts


def _is_cut(call: Call) -> bool:
    return call.growth is not None and call.growth.is_cut
