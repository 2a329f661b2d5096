"""
A worker is killed amid an outage and after it: while the journal is written, while it is replayed, and while its
breaker recovers. The next process of the machine finds the journal, and does what is left (X.6).
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Final, Literal, TypeAlias

import pytest

from asgi_metering.journal import Journal
from asgi_metering.testing.faults import until_killed
from tests.stores.crashes.after import CREDITED, Next, next_process
from tests.stores.crashes.conftest import Ground
from tests.stores.crashes.house import HELD, POLICIES, PRICE, USED, Policy
from tests.stores.crashes.outage import FORGOTTEN, LATER, PAUSE_S, PAUSES, PROBE, journal_of, lose
from tests.stores.crashes.test_calls import EVERYTHING

# What is killed is counted nowhere, and what comes after it is a process like any other.

Fate: TypeAlias = Literal["never", "doubt", "ended"]
"""Of a call: it never began, it ends by its policy, or its own end is known."""

AMID: Final[list[tuple[str, int, Fate, Fate]]] = [
    # Point, the time that it is reached, the call that the store admitted, and the one that was queued.
    ("keeping.before", 1, "doubt", "never"),
    ("keeping.after", 1, "ended", "never"),
    ("recovery.before", 1, "ended", "never"),
    ("keeping.before", 2, "ended", "never"),
    ("keeping.after", 2, "ended", "doubt"),
    ("keeping.before", 3, "ended", "doubt"),
    ("keeping.after", 3, "ended", "ended"),
]
"""The journal is written when the first call ends, when the queued one begins, and when that one ends."""

BEHIND: Final = (
    "recovery.after",
    "reading.after",
    "admission.before",
    "admission.inside",
    "admission.after",
    "end.before",
    "end.inside",
    "end.after",
    "removal.before",
    "removal.after",
)
"""When the store is back, up to the moment when the journal is empty."""

PROBED: Final[list[tuple[str, Fate]]] = [("admission.before", "never"), ("admission.after", "doubt")]
"""The probe of the breaker is a call like others."""

ALIKE: Final = ("admission.before", "end.before") if EVERYTHING not in os.environ else ()
"""Nothing has happened there since the point before them: they are played with all others."""

DUE_S: Final = 7_200.0
"""Longer than any call takes: what the journal keeps for the worst case is due."""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process is as impatient as the first one."""
    for module, name in PAUSES:
        monkeypatch.setattr(module, name, PAUSE_S)


def policies(*fates: Fate) -> list[Policy]:
    """What is played where the calls meet these *fates*: a policy is told by a call in doubt alone."""
    return list(POLICIES) if EVERYTHING in os.environ else ["hold" if "doubt" in fates else "observed"]


def settle(ground: Ground, point: str, policy: Policy, *fates: Fate, nth: int = 1, room: str = "") -> None:
    """Kill a process there, and prove that each call is charged what it should be, once, and told of, once."""
    if policy == "hold" and not room and nth > 1:
        # What the store may hold for the queued call is to be given back: that is written before it.
        nth += 1
    plan = ground.plan(point, nth=nth, policy=policy, room=room)
    until_killed(lose, plan)
    in_full = (USED, PRICE, PRICE)
    by_hold = (HELD, PRICE, PRICE)
    charged = [
        by_hold[number] * (policy == "hold") if fate == "doubt" else in_full[number]
        for number, fate in enumerate(fates)
        if fate != "never"
    ]
    found: list[Next] = []

    async def after() -> None:
        journal = Journal(journal_of(plan), clock=lambda: time.time() + DUE_S)
        async with next_process(plan, journal=journal) as next_:
            found.append(next_)
            async with asyncio.timeout(30):
                while await journal.counts() != (0, 0):
                    await asyncio.sleep(PAUSE_S)
            await next_.after_expiry()
            await next_.after_grace()
            assert await next_.live() == []
            assert sorted(amount for _, amount in await next_.charges()) == sorted(filter(None, charged))
            assert len({call for call, _ in await next_.charges()}) == len(list(filter(None, charged)))
            account = await next_.account()
            assert (account.available, account.held) == (CREDITED - sum(charged), 0)

    asyncio.run(after())
    assert sorted(found[0].events().values()) == sorted(charged)


@pytest.mark.parametrize(
    ("point", "nth", "held", "queued", "policy"), [(*row, policy) for row in AMID for policy in policies(*row[2:])]
)
def test_kill_amid_an_outage(ground: Ground, point: str, nth: int, held: Fate, queued: Fate, policy: Policy) -> None:
    """What is in the journal is charged, and what is not is in doubt, also for a call that the store never saw."""
    settle(ground, point, policy, held, queued, nth=nth)


@pytest.mark.parametrize("point", [point for point in BEHIND if point not in ALIKE])
def test_kill_amid_the_replay_of_a_backlog(ground: Ground, point: str) -> None:
    """Nothing that waited is lost or charged twice, wherever between the journal and the store it is."""
    settle(ground, point, "hold", "ended", "ended", room=LATER)


@pytest.mark.parametrize(
    ("point", "fate", "policy"),
    [(*row, policy) for row in PROBED if row[0] not in ALIKE for policy in policies(row[1])],
)
def test_kill_amid_the_recovery_of_the_breaker(ground: Ground, point: str, fate: Fate, policy: Policy) -> None:
    """The call that is the breaker's probe is in doubt as any other, and what waited before it is charged, once."""
    settle(ground, point, policy, "ended", "ended", fate, room=PROBE)


def test_kill_after_the_reply_to_an_admission_was_lost(ground: Ground) -> None:
    """Of a call that the store had admitted without our knowing, and that was queued instead, one is charged (S3.15).

    Also where the route charges what was held by a worker that died, and the one that asked dies before it could give
    the other one back.
    """
    settle(ground, "keeping.after", "hold", "ended", "doubt", nth=3, room=FORGOTTEN)
