"""
An outage, with a journal: a call that ends in it, one that is let in during it, and the time after it. Played by a
process that is killed.

Knows nothing of what is right afterwards.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from asgi_metering import CallRefused, Metering, TokenUsage, delivery
from asgi_metering.errors import SettlementError, StoreUnavailableError
from asgi_metering.prices import per_token
from asgi_metering.stores import breaker
from asgi_metering.stores.breaker import BreakerState
from asgi_metering.testing import FakeClock
from asgi_metering.testing.faults import crash_after, store_down
from tests.servers.books import deliver_to
from tests.stores.crashes.house import GRACE_S, HELD, LIFE_S, PRICE, USED, Plan, metering_of
from tests.stores.places import store_at

__all__ = ["FORGOTTEN", "LATER", "PAUSES", "PAUSE_S", "PROBE", "hurry", "journal_of", "lose"]

PROBE = "probe"
"""The room of a plan whose fault counts from the moment on in which the journal is empty again."""

LATER = "later"
"""And of one whose fault counts from the end of the outage on."""

FORGOTTEN = "forgotten"
"""And of one where the store had admitted the call that was queued then, and its answer was lost."""

PAUSES = (
    (delivery, "RETRY_FIRST_S"),
    (delivery, "RETRY_LAST_S"),
    (delivery, "IDLE_S"),
    (breaker, "FIRST_PAUSE_S"),
    (breaker, "LAST_PAUSE_S"),
)
"""That a service can afford, and a test cannot."""

PAUSE_S = 0.01


def hurry() -> None:
    """Make every pause of this process short, and have one failure open its breaker."""
    for module, name in PAUSES:
        setattr(module, name, PAUSE_S)
    breaker.FAILURES = 1  # type: ignore[misc]


def journal_of(plan: Plan) -> Path:
    """Where the processes of *plan* keep what waits."""
    return plan.log.with_suffix(".journal")


async def lose(plan: Plan) -> None:
    """Lose the store amid a call, make another one, and have it back; until the fault ends this process."""
    hurry()
    fault, clock = crash_after(plan.point, nth=plan.nth), FakeClock(plan.now)
    if plan.room in (LATER, PROBE):
        # What it meets before does not count.
        fault.reached = -1_000_000

    def forget() -> None:
        down.fail()
        raise StoreUnavailableError("The reply was lost.")

    real = store_at(plan.url, fault.clock(clock))
    # Both calls are asked for; of the second one nobody hears.
    down = store_down(crash_after("admission.after", nth=2, how=forget).store(real) if plan.room == FORGOTTEN else real)
    sink = fault.sink(deliver_to(plan.log))
    journal = fault.journal(journal_of(plan))
    metering = metering_of(fault.store(down), plan.payer, sink, "a", journal=journal)
    options: dict[str, Any] = {"payer": plan.payer, "on_abort": plan.policy, "ttl_s": LIFE_S, "grace_s": GRACE_S}
    async with metering:
        with suppress(SettlementError):
            # Its end is not booked, and says so.
            async with metering.charge(line="held", price=per_token(input=1, output=1), hold=HELD, **options) as call:
                call.record(TokenUsage(input=0, output=USED))
                down.fail()
        if plan.room == FORGOTTEN:
            down.restore()
            await _read_off(metering)
        async with metering.charge(line="queued", price=PRICE, on_store_down="queue", **options):
            pass
        assert metering.breaker.state is BreakerState.OPEN
        if plan.room == LATER:
            fault.reached = 0
        down.restore()
        await _read_off(metering)
        if plan.room == PROBE:
            fault.reached = 0
        await _recovered(metering, options)


async def _read_off(metering: Metering) -> None:
    assert metering.journal is not None
    while await metering.journal.counts() != (0, 0):
        await asyncio.sleep(PAUSE_S)


async def _recovered(metering: Metering, options: dict[str, Any]) -> None:
    """Calls, until one of them was the probe that is answered."""
    while metering.breaker.state is not BreakerState.CLOSED:
        with suppress(CallRefused):
            async with metering.charge(line="probe", price=PRICE, **options):
                pass
        await asyncio.sleep(PAUSE_S)
