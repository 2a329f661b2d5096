"""
The house that burns: one application behind the middleware, played by a process that is killed, and by the one after.

Both import it and agree on everything but the fault. Knows nothing of what is right afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

import asgi_metering.asgi.exchange
import asgi_metering.heartbeats
from asgi_metering import (
    Caller,
    Idempotency,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    Unit,
    billable,
    current_call,
    rate_limited,
)
from asgi_metering.asgi.types import ASGIApp
from asgi_metering.events.sinks import Sink
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis, GrantReceipt, Posting
from asgi_metering.rules.operations import Admit, Grow, WalletSource
from asgi_metering.stores.contract import Store
from asgi_metering.testing import FakeClock
from asgi_metering.testing.faults import Crash, crash_after
from tests.harness.drive import Drive, drive, http_scope, lifespan
from tests.servers.books import deliver_to
from tests.stores.places import store_at

__all__ = [
    "CREDITS",
    "GRACE_S",
    "GROWN",
    "HELD",
    "LIFE_S",
    "POLICIES",
    "PRICE",
    "SEEN",
    "USED",
    "VERBS",
    "Plan",
    "Policy",
    "ask",
    "burn",
    "metering_of",
    "rooms",
]

Policy = Literal["observed", "none", "hold"]

POLICIES: tuple[Policy, ...] = ("observed", "none", "hold")

CREDITS = Unit("credits", scale=0)

HELD, SEEN, USED = 10, 3, 7
"""What a stream sets aside, what it has reported at its heartbeat, and what at its end."""

GROWN = 15
"""What a hold that grows has in the end."""

PRICE = 2
"""Of the route with a fixed price."""

LIFE_S, GRACE_S = 60.0, 30.0
"""Of each hold, by the store's clock, which stands still until the next process moves it."""

KEYS = (("idempotency-key", "once"), ("x-session", "s"))
"""Header fields of every request, of both processes."""

BEAT_TURNS = 5
"""Turns of the loop in which a heartbeat that was begun looks at its call."""


@dataclass(frozen=True)
class Plan:
    """
    What the process that is killed does.

    Attributes:
        url: Of its store.
        payer: Who calls; nobody else uses the account.
        now: The time, by the store.
        point: Where it is killed, and at which time that it comes there.
        policy: ``on_abort`` of its routes.
        room: What it plays: a path of `rooms`, or one of `VERBS`, or ``grow`` or ``sweep``.
        log: The file where its sink writes.
        leaves: Its client leaves when the admission is committed.
    """

    url: str
    payer: str
    now: float
    point: str
    log: Path
    nth: int = 1
    policy: Policy = "observed"
    room: str = "/stream"
    leaves: bool = False

    @property
    def call(self) -> str:
        """The id of its first call."""
        return f"{self.payer}.a1"


# -- the application ---------------------------------------------------------------------------------------


def rooms(metering: Metering, policy: Policy, fault: Crash, beaten: asyncio.Event | None = None) -> ASGIApp:
    """
    The application.

    Args:
        metering: Whose.
        policy: ``on_abort`` of its routes.
        fault: Stands around its endpoints.
        beaten: A stream asks for heartbeats behind its first chunk, and goes on when this is set; None does neither.
    """
    common: dict[str, Any] = {"on_abort": policy, "ttl_s": LIFE_S, "grace_s": GRACE_S}

    @rate_limited("100/minute", concurrency=1)
    @billable(per_token(input=1, output=1), hold=HELD, line="stream", idempotency=Idempotency(), **common)
    @fault.endpoint
    async def stream(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[bytes]:
            call = current_call()
            call.record(TokenUsage(input=0, output=SEEN))
            yield b"one"
            if beaten is not None:
                # Overdue at once for the worker of this process; the store's hold lives on.
                call.ttl_s = 0.0
                await beaten.wait()
                call.ttl_s = LIFE_S
                for _ in range(BEAT_TURNS):
                    await asyncio.sleep(0)
            call.record(TokenUsage(input=0, output=USED - SEEN))
            yield b"two"

        return StreamingResponse(chunks())

    @billable(PRICE, line="session", charge_key="x-session", charge_per=86_400.0, **common)
    async def session(request: Request) -> PlainTextResponse:
        if "wait" in request.query_params:
            # Until the process is killed.
            await asyncio.Event().wait()
        return PlainTextResponse("done")

    @billable(0, line="free")
    async def free(request: Request) -> PlainTextResponse:
        return PlainTextResponse("free")

    routes = [Route("/stream", stream), Route("/session", session), Route("/free", free)]
    return MeteringMiddleware(Starlette(routes=routes), metering=metering)


def metering_of(store: Store, payer: str, sink: Sink, worker: str, **options: Any) -> Metering:
    """A metering with these *options*, whose only caller is *payer*; call ids say which *worker* made them."""
    numbers = count(1)
    return Metering(
        store,
        identify=lambda connection: Caller(payer),
        unit=CREDITS,
        sinks=[sink],
        store_timeout_s=60.0,
        new_id=lambda: f"{payer}.{worker}{next(numbers)}",
        **options,
    )


async def ask(app: ASGIApp, path: str) -> Drive:
    """One request, with keys that are the same in both processes."""
    path, _, query = path.partition("?")
    return await drive(app, http_scope(path, headers=KEYS, query=query))


# -- the process that is killed ----------------------------------------------------------------------------


async def burn(plan: Plan, probes: Mapping[str, Callable[[], object]] = MappingProxyType({})) -> None:
    """
    Play *plan* until the fault ends this process; where it never does, return.

    Args:
        plan: What to play.
        probes: What else is done at other points of the store.
    """
    asgi_metering.heartbeats.TICK_S = 0.005
    # A machine that stalls for 50 ms shall not end a call in place of the application that returns.
    asgi_metering.asgi.exchange.GRACE_S = LIFE_S
    admitted, beaten, clock = asyncio.Event(), asyncio.Event(), FakeClock(plan.now)
    leaving: list[asyncio.Task[None]] = []
    fault = crash_after(plan.point, nth=plan.nth)
    # The fault is nearest to the store: it comes first where several wait for the same point.
    store = fault.store(store_at(plan.url, fault.clock(clock)))
    told = {
        "admission.after": lambda: (admitted.set(), [task.cancel() for task in leaving]),
        "heartbeat.after": beaten.set,
    }
    for point, how in {**told, **probes}.items():
        store = crash_after(point, how=how).store(store)
    metering = metering_of(store, plan.payer, fault.sink(deliver_to(plan.log)), "a")
    if not plan.room.startswith("/"):
        async with metering:
            await _SCENES.get(plan.room, spend)(metering, plan, clock)
            if plan.room in VERBS:
                await VERBS[plan.room](metering, plan)
        return
    app = fault.app(rooms(metering, plan.policy, fault, beaten))
    async with lifespan(app):
        if plan.room == "/session":
            await _sessions(app, admitted)
        elif plan.leaves:
            await _leave(app, plan.room, leaving)
        else:
            await ask(app, plan.room)


async def _sessions(app: ASGIApp, admitted: asyncio.Event) -> None:
    """A call of the charge key that runs on, one that succeeds, and one that comes after it."""
    running = asyncio.create_task(ask(app, "/session?wait=1"))
    await admitted.wait()
    for _ in range(2):
        await ask(app, "/session")
    running.cancel()


async def _leave(app: ASGIApp, path: str, leaving: list[asyncio.Task[None]]) -> None:
    """A request that is cancelled in the moment in which its admission is committed (pitfall 29)."""
    async with Drive(app, http_scope(path, headers=KEYS)) as request:
        assert request.task is not None
        leaving.append(request.task)
        await request.ended()


# -- scenes without a request ------------------------------------------------------------------------------


async def grant(metering: Metering, plan: Plan) -> GrantReceipt:
    """A grant."""
    return await metering.grant(plan.payer, 5, id="extra")


async def reverse(metering: Metering, plan: Plan) -> Posting:
    """A grant that is taken back; giving it again changes nothing."""
    await metering.grant(plan.payer, 5, id="extra")
    return await metering.reverse_grant(plan.payer, "extra", id="back")


async def refund(metering: Metering, plan: Plan) -> Posting:
    """A part of what `spend` charged is given back."""
    return await metering.refund(plan.call, id="back", payer=plan.payer, amount=SEEN)


async def correct(metering: Metering, plan: Plan) -> Posting:
    """A charge without a call."""
    return await metering.correct(plan.payer, SEEN, id="extra")


async def backfill(metering: Metering, plan: Plan) -> Posting:
    """A charge for what nobody admitted."""
    return await metering.backfill(plan.payer, SEEN, id="extra", line="job")


async def spend(metering: Metering, plan: Plan, clock: FakeClock) -> None:
    """A call outside HTTP that is charged what it held."""
    async with metering.charge(payer=plan.payer, line="job", hold=HELD):
        pass


async def grow(metering: Metering, plan: Plan, clock: FakeClock) -> None:
    """A hold that is made larger, of a call whose process is gone."""
    await metering.runtime().submit(_admission(plan, "a1", plan.policy))
    await metering.runtime().submit(Grow(plan.call, GROWN, GROWN, (WalletSource(),)))


async def sweep(metering: Metering, plan: Plan, clock: FakeClock) -> None:
    """Three calls whose process is gone, ended one by one."""
    for number, policy in enumerate(POLICIES, 1):
        await metering.runtime().submit(_admission(plan, f"a{number}", policy))
    clock.advance(LIFE_S + GRACE_S)
    await metering.reconcile(limit=1)


def _admission(plan: Plan, call: str, in_doubt: Policy) -> Admit:
    return Admit(
        f"{plan.payer}.{call}",
        plan.payer,
        CREDITS.name,
        HELD,
        HELD,
        (WalletSource(),),
        ttl_s=LIFE_S,
        grace_s=GRACE_S,
        in_doubt=Basis(in_doubt),
        line="job",
        facts={"caller": plan.payer},
    )


VERBS: dict[str, Callable[[Metering, Plan], Awaitable[Posting | GrantReceipt]]] = {
    verb.__name__: verb for verb in (grant, reverse, refund, correct, backfill)
}
"""What the next process repeats, as the webhook or the person behind it does."""

_SCENES = {scene.__name__: scene for scene in (spend, grow, sweep)}
