"""
Ends of plain calls: told in one step, and nobody can tell that from the way that every other call's end goes.

That step says again what the rest of billing finds out. So every end is told twice, with it and without, and has to be
the same to the last word of its event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from asgi_metering import Caller, Metering, billable, rate_limited
from asgi_metering.billing import bill, bill_now
from asgi_metering.call import Call
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.guards import Part, guard_of
from asgi_metering.opening import ALL_FEATURES, Opening
from asgi_metering.policies import EndpointPolicy
from asgi_metering.receipts import Basis
from asgi_metering.rules.ending import Cause
from asgi_metering.rules.operations import End
from asgi_metering.usage import TokenUsage

pytestmark = pytest.mark.uncounted


async def forget(_: object) -> None:
    """A sink that takes everything."""


def policy_of(*parts: Part) -> EndpointPolicy:
    """What these decorators say of an endpoint that is counted besides."""

    async def endpoint() -> None:
        """What they guard."""

    guarded: Any = endpoint
    for part in (*parts, rate_limited("9/day")):
        guarded = part(guarded)
    guard = guard_of(guarded)
    assert guard is not None
    return guard.policy


POLICIES = {
    "limits": policy_of(),
    "slots": policy_of(rate_limited(concurrency=3)),
    "price": policy_of(billable(2)),
    "nothing": policy_of(billable(0)),
    "all": policy_of(billable("0.5", line="all"), rate_limited("99/day", concurrency=3)),
    "held": policy_of(billable(2, on_error="hold", on_late_error="hold", on_disconnect="hold", on_cut="hold")),
    "never": policy_of(billable(2, on_disconnect="none")),
}
"""What decorators say of plain calls."""

FEATURES = (ALL_FEATURES, ALL_FEATURES - {"events"})


def admitted(metering: Metering, policy: EndpointPolicy, features: frozenset[str] = ALL_FEATURES) -> Call:
    """A call under *policy* that was let in at once."""
    call = Opening(metering, features, unenforced=ALL_FEATURES - features).open_call()
    call.preset(Caller("ann", attributes={"team": "blue"}), "ann")
    assert call.passes(policy, {})
    assert call.is_plain
    return call


async def ends(call: Call) -> tuple[End | None, End | None, End]:
    """The end of *call*, told in the short way if it is one for that, at once in the general way, and by waiting."""
    short = bill_now(call)
    call.is_plain = False
    return short, bill_now(call), (await bill(call))[0]


SEEN: dict[str, tuple[Any, ...]] = {
    "status": (None, 200, 399, 400, 500),
    "cause": (None, *Cause),
    "first_byte": (True, False),
    "failure": (None, "provider_overloaded"),
    "drained": (False, True),
    "attributes": ({}, {"tier": "gold"}),
}
"""What can be seen of a call: all of it beside all else."""


@pytest.mark.parametrize("has_sinks", [True, False], ids=["told", "untold"])
@pytest.mark.parametrize("name", POLICIES)
def test_end_a_plain_call_as_any_other(name: str, has_sinks: bool) -> None:
    """DESIGN 4 "End of call": whatever was seen of a plain call, its end is what the general way makes of it."""

    async def run() -> None:
        async with Metering(sinks=(CallbackSink(forget, "forgotten"),) if has_sinks else ()) as metering:
            await metering.grant("ann", 100, id="g")
            for features in FEATURES:
                await compare(admitted(metering, POLICIES[name], features))

    asyncio.run(run())


async def compare(call: Call) -> None:
    """Have *call* end in every way, and compare what is told of it."""
    for seen in product(*SEEN.values()):
        for name, value in zip(SEEN, seen, strict=True):
            setattr(call, name, value)
        call.is_plain = True
        short, at_once, waiting = await ends(call)
        assert short == at_once == waiting, seen
        assert short is not None
        # Also in the order of what it tells: stores keep it so.
        assert list(short.event or ()) == list(waiting.event or ()), seen
    call.metering.runtime().finish(call)


def _reports(call: Call) -> None:
    call.record(TokenUsage(input=1, output=2))


def _observes(call: Call) -> None:
    class Nothing:
        def report(self) -> None:
            return None

    call.observer = Nothing()  # type: ignore[assignment]


@pytest.mark.parametrize("does", [_reports, _observes])
def test_look_closer_at_a_plain_call_that_told_more(does: Callable[[Call], None]) -> None:
    """DESIGN 6: what a plain call has reported, or what passed of it, is read; the short way leaves that alone."""

    async def run() -> End | None:
        async with Metering(sinks=(CallbackSink(forget, "forgotten"),)) as metering:
            await metering.grant("ann", 100, id="g")
            call = admitted(metering, POLICIES["price"])
            call.status, call.cause = 200, Cause.COMPLETED
            does(call)
            end = bill_now(call)
            metering.runtime().finish(call)
            return end

    assert asyncio.run(run()) is None


def test_charge_a_plain_call_what_it_holds() -> None:
    """S3.7: a whole answer with a fixed price is charged in full, as usage, whatever the route chose for other ends."""

    async def run() -> End | None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            call = admitted(metering, POLICIES["never"])
            call.status, call.cause = 200, Cause.COMPLETED
            end = bill_now(call)
            metering.runtime().finish(call)
            return end

    end = asyncio.run(run())
    assert end is not None
    assert (end.amount, end.basis, end.estimated, end.failed, end.event) == (2_000_000, Basis.USAGE, False, False, None)
