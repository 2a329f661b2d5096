"""
A worker is killed at every point of a call's life: what the next process finds, ends and charges.

The points are the published ones, in their order (`asgi_metering.testing.faults.POINTS`); what is right behind each
follows from where it stands.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

import pytest

from asgi_metering.receipts import EndedBy
from asgi_metering.testing.faults import POINTS, until_killed
from tests.harness.drive import Drive, body, headers, status
from tests.stores.crashes.after import CREDITED, Next, next_process
from tests.stores.crashes.conftest import Ground
from tests.stores.crashes.house import HELD, POLICIES, SEEN, USED, Policy, ask, burn

# What is killed is counted nowhere, and what comes after it is a process like any other.

ORDER: Final = list(POINTS)

CUT: Final = "response.cut"

ASIDE: Final = ("undoing", "growth", "audit", "sweep", "grant", "reversal", "refund", "correction", "backfill")
"""Not in the life of a stream that goes well: played by the tests below, and beside this module."""


def between(first: str, last: str) -> list[str]:
    """The points of a stream's life from *first* to *last*."""
    points = ORDER[ORDER.index(first) : ORDER.index(last) + 1]
    return [point for point in points if point != CUT and point.partition(".")[0] not in ASIDE]


UNSEEN: Final = between("opening.before", "admission.inside")
UNOBSERVED: Final = between("admission.after", "heartbeat.inside")
OBSERVED: Final = between("heartbeat.after", "end.inside")
ENDED: Final = between("end.after", "acknowledgement.after")

EVERYTHING: Final = "METERING_ALL_CRASHES"
"""Set, this variable plays every policy at every point: it has found no more, and takes half as long again."""

TELLING: Final = ("admission.after", "heartbeat.inside", "heartbeat.after", "end.inside")
"""First and last points of a doubt: between them ``observed``, the default, stands for all policies."""

CHARGED: Final[dict[Policy, tuple[int, int]]] = {"observed": (0, SEEN), "none": (0, 0), "hold": (HELD, HELD)}
"""By policy, what a call in doubt is charged before and after a heartbeat that told of `SEEN`."""


async def recover(next_: Next) -> list[str]:
    """
    Play the next process up to the end of the doubt; return the calls that it ended.

    Until the grace is over nothing of the hold is given away: it counts, and its key is in use (409).
    """
    held = (await next_.account()).held
    await next_.after_expiry()
    if held:
        assert (await next_.account()).held == held
        assert status((await ask(next_.app, "/stream")).log) == 409
    ended = await next_.after_grace()
    assert (await next_.live(), (await next_.account()).held) == ([], 0)
    return ended


def is_replay(answer: Drive) -> bool:
    """Whether the request was answered from what was done before."""
    assert status(answer.log) == 200
    return dict(headers(answer.log)).get("idempotency-replayed") == "true"


def play(ground: Ground, point: str, policy: Policy, charged: int, by: EndedBy | None, nth: int = 1) -> None:
    """
    Kill a process at *point*, and prove what is right afterwards: *charged*, *by* whom, and everything once.

    By None is a call that never was admitted.
    """
    plan = ground.plan(point, policy=policy, nth=nth)
    until_killed(burn, plan)
    found: list[Next] = []

    async def after() -> None:
        async with next_process(plan) as next_:
            found.append(next_)
            ended = await recover(next_)
            assert ended == ([plan.call] if by is EndedBy.POLICY else [])
            hold = await next_.hold(plan.call)
            receipt = hold.receipt if hold is not None else None
            if by is not None:
                assert receipt is not None
                assert (receipt.amount, receipt.ended_by, receipt.held) == (charged, by, HELD)
            assert await next_.charges() == ([(plan.call, charged)] if charged else [])
            assert (await next_.account()).available == CREDITED - charged
            # The client repeats its request: what was charged is never charged again, what was not is done now.
            again = await ask(next_.app, "/stream")
            assert is_replay(again) == bool(charged)
            if not charged:
                assert body(again.log) == b"onetwo"
            await next_.metering.drain()
            account = await next_.account()
            assert (account.settled, account.held) == (charged or USED, 0)
            assert len(await next_.charges()) == 1

    asyncio.run(after())
    events = found[0].events()
    expected = [] if by is None else [charged]
    assert sorted(events.values()) == sorted(expected if charged else [*expected, USED])
    assert (plan.call in events) == (by is not None)


@pytest.mark.parametrize("point", UNSEEN)
def test_kill_before_the_admission_is_committed(ground: Ground, point: str) -> None:
    """Nothing has happened: nothing is held, charged or told, and the repeated request runs (DESIGN 4, S0.44)."""
    play(ground, point, "observed", 0, None)


def policies(points: list[str]) -> list[tuple[str, Policy]]:
    """Each of *points* with the policies that are played there."""
    return [
        (point, policy)
        for point in points
        for policy in POLICIES
        if policy == "observed" or point in TELLING or EVERYTHING in os.environ
    ]


@pytest.mark.parametrize(("point", "policy"), policies(UNOBSERVED))
def test_kill_before_anything_was_observed(ground: Ground, point: str, policy: Policy) -> None:
    """The call is in doubt, and ends by its route's policy after its grace: only ``hold`` charges it (S2.20)."""
    play(ground, point, policy, CHARGED[policy][0], EndedBy.POLICY)


@pytest.mark.parametrize(("point", "policy"), policies(OBSERVED))
def test_kill_after_a_heartbeat(ground: Ground, point: str, policy: Policy) -> None:
    """The call is in doubt, and ``observed`` charges what its last heartbeat had seen, and no more (S2.20)."""
    play(ground, point, policy, CHARGED[policy][1], EndedBy.POLICY)


@pytest.mark.parametrize("point", ENDED)
def test_kill_after_the_end_is_committed(ground: Ground, point: str) -> None:
    """What was used is charged, once, and its event is delivered at least once, always as the same one (S2.19)."""
    # The exporter looks into the outbox when it starts: the second time there is something in it.
    nth = 2 if point.startswith("claim") else 1
    play(ground, point, "hold", USED, EndedBy.CALL, nth=nth)
