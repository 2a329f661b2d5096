"""
A worker is killed amid a stream whose hold grows by slices, and amid its cut.

Whatever was held is given back or charged, once, as the route's policy says of a worker that died (S2.20, S3.7).
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

import pytest

from asgi_metering.receipts import EndedBy
from asgi_metering.testing.faults import until_killed
from tests.stores.crashes.after import CREDITED, Next, next_process
from tests.stores.crashes.conftest import Ground
from tests.stores.crashes.growth import ALL, BEATEN, FIRST, GROWN, SPENT, grow
from tests.stores.crashes.house import POLICIES, Policy
from tests.stores.crashes.test_calls import EVERYTHING

# What is killed is counted nowhere, and what comes after it is a process like any other.

SLICED: Final[list[tuple[str, int, int, int]]] = [
    # Point, the time that it is reached, what was observed by the last heartbeat, and what is held.
    ("response.first_byte", 1, 0, FIRST),
    ("growth.before", 1, BEATEN, FIRST),
    ("growth.inside", 1, BEATEN, FIRST),
    ("growth.after", 1, BEATEN, GROWN),
    ("growth.after", 3, BEATEN, ALL),
    ("response.cut", 1, BEATEN, ALL),
    ("response.before_last", 1, BEATEN, ALL),
    ("end.inside", 1, BEATEN, ALL),
]
"""The third growth is the one that is refused."""

TELLING: Final = ("growth.inside", "growth.after", "response.cut")
"""Where ``hold``, which tells how large the hold is, stands for all policies; elsewhere ``observed`` does."""


def plays() -> list[tuple[str, int, int, int, Policy]]:
    """Each point with the policies that are played there."""
    return [
        (*row, policy)
        for row in SLICED
        for policy in POLICIES
        if row[0] != "growth.before" or EVERYTHING in os.environ
        if EVERYTHING in os.environ or policy == ("hold" if row[0] in TELLING else "observed")
    ]


@pytest.mark.parametrize(("point", "nth", "observed", "held", "policy"), plays())
def test_kill_amid_a_growing_stream(
    ground: Ground, point: str, nth: int, observed: int, held: int, policy: Policy
) -> None:
    """What was held by then is in doubt, and ends by the policy: what was seen, all that was held, or nothing."""
    plan = ground.plan(point, nth=nth, policy=policy)
    until_killed(grow, plan)
    charged = {"observed": observed, "none": 0, "hold": held}[policy]
    found: list[Next] = []

    async def after() -> None:
        async with next_process(plan) as next_:
            found.append(next_)
            assert (await next_.account()).held == held
            await next_.after_expiry()
            assert await next_.after_grace() == [plan.call]
            assert await next_.charges() == [(plan.call, charged)] * bool(charged)
            account = await next_.account()
            assert (account.available, account.held) == (CREDITED - charged, 0)

    asyncio.run(after())
    assert found[0].events() == {plan.call: charged}


def test_kill_after_the_end_of_a_cut(ground: Ground) -> None:
    """A cut that is booked is charged by what was observed, once, although that is more than there was."""
    plan = ground.plan("end.after")
    until_killed(grow, plan)
    found: list[Next] = []

    async def after() -> None:
        async with next_process(plan) as next_:
            found.append(next_)
            await next_.after_expiry()
            assert await next_.after_grace() == []
            hold = await next_.hold(plan.call)
            assert hold is not None
            assert hold.receipt is not None
            assert (hold.receipt.ended_by, str(hold.receipt.basis)) == (EndedBy.CALL, "observed")
            assert await next_.charges() == [(plan.call, SPENT)]
            account = await next_.account()
            assert (account.available, account.held, account.debt) == (CREDITED - SPENT, 0, SPENT - CREDITED)

    asyncio.run(after())
    assert found[0].events() == {plan.call: SPENT}
