"""
A worker is killed at every point outside of a stream's life: postings, sweeps, members of a charge key, growing holds,
free work, a client that left; and between any two steps of one transaction, and of a migration.
"""

from __future__ import annotations

import asyncio
from typing import Final

import pytest

from asgi_metering.receipts import EndedBy, GrantReceipt, Posting
from asgi_metering.rules.operations import PostGrant
from asgi_metering.testing.faults import POINTS, until_killed
from tests.harness.drive import body, status
from tests.stores.crashes import test_calls, test_growth, test_outage, torn
from tests.stores.crashes.after import CREDITED, LEASE_S, next_process, whole_books
from tests.stores.crashes.conftest import Ground
from tests.stores.crashes.house import GROWN, HELD, LIFE_S, POLICIES, PRICE, SEEN, USED, VERBS, Policy, ask, burn
from tests.stores.places import store_at

# What is killed is counted nowhere, and what comes after it is a process like any other.

MOMENTS: Final = ("before", "inside", "after")

WORDS: Final = {
    "grant": "grant",
    "reverse": "reversal",
    "refund": "refund",
    "correct": "correction",
    "backfill": "backfill",
}
"""What each verb of the ledger is called among the points."""


LINES: Final = {"grant": 3, "reverse": 4, "refund": 3, "correct": 3, "backfill": 3}
"""Of the ledger, in the end: the first grant, the charge of `spend`, and what the verb writes."""


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("verb", WORDS)
def test_kill_amid_a_posting(ground: Ground, verb: str, moment: str) -> None:
    """A posting that is repeated after the crash with its id is booked once, whether or not it had been (S3.15)."""
    plan = ground.plan(f"{WORDS[verb]}.{moment}", room=verb)
    until_killed(burn, plan)
    moved = {"grant": 5, "reverse": 0, "refund": SEEN - HELD, "correct": -SEEN, "backfill": -SEEN}[verb]

    async def after() -> None:
        async with next_process(plan) as next_:
            first = await VERBS[verb](next_.metering, plan)
            second = await VERBS[verb](next_.metering, plan)
            assert isinstance(first, Posting | GrantReceipt)
            assert (first.applied, second.applied) == (moment != "after", False)
            assert (second.id, second.amount) == (first.id, first.amount)
            assert len(await next_.entries()) == LINES[verb]
            account = await next_.account()
            assert (account.available, account.held) == (CREDITED + moved - (HELD if verb != "refund" else 0), 0)

    asyncio.run(after())


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_amid_a_sweep(ground: Ground, moment: str) -> None:
    """Of three calls in doubt some are ended by the process that dies, the others by the next; each once (S3.13)."""
    plan = ground.plan(f"sweep.{moment}", room="sweep", nth=2)
    until_killed(burn, plan)
    found = []

    async def after() -> None:
        async with next_process(plan) as next_:
            found.append(next_)
            next_.clock.advance(LIFE_S)
            ended_before = 2 if moment == "after" else 1
            assert len(await next_.live()) == len(POLICIES) - ended_before
            assert len(await next_.after_grace()) == len(POLICIES) - ended_before
            assert await next_.charges() == [(f"{plan.payer}.a3", HELD)]
            account = await next_.account()
            assert (account.settled, account.held) == (HELD, 0)

    asyncio.run(after())
    calls = [f"{plan.payer}.a{number}" for number in range(1, len(POLICIES) + 1)]
    assert found[0].events() == dict(zip(calls, (0, 0, HELD), strict=True))


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_amid_a_growth(ground: Ground, moment: str) -> None:
    """A hold is as large as it was, or as large as it was asked to be: ``hold`` charges exactly that (S3.7)."""
    plan = ground.plan(f"growth.{moment}", room="grow", policy="hold")
    until_killed(burn, plan)
    size = GROWN if moment == "after" else HELD

    async def after() -> None:
        async with next_process(plan) as next_:
            assert (await next_.account()).held == size
            await next_.after_expiry()
            assert await next_.after_grace() == [plan.call]
            assert await next_.charges() == [(plan.call, size)]
            assert (await next_.account()).available == CREDITED - size

    asyncio.run(after())


SESSIONS: Final[list[tuple[str, int, Policy, int, bool]]] = [
    # Point, the time that it is reached, policy, members in doubt, and whether the key was charged.
    ("admission.after", 1, "observed", 1, False),
    ("admission.after", 1, "hold", 1, False),
    ("admission.inside", 2, "observed", 1, False),
    ("admission.after", 2, "observed", 2, False),
    ("admission.after", 2, "hold", 2, False),
    ("end.before", 1, "none", 2, False),
    ("end.inside", 1, "observed", 2, False),
    ("end.after", 1, "observed", 1, True),
    ("end.after", 1, "hold", 1, True),
    ("admission.after", 3, "hold", 2, True),
    ("end.after", 2, "observed", 1, True),
]


@pytest.mark.parametrize(("point", "nth", "policy", "members", "charged"), SESSIONS)
def test_kill_amid_the_calls_of_a_charge_key(
    ground: Ground, point: str, nth: int, policy: Policy, members: int, charged: bool
) -> None:
    """
    Calls of one charge key are charged once in all, however many of them die with their process (S0.3, S0.10).

    A key whose members all die unobserved is free again, and its next call is charged.
    """
    plan = ground.plan(point, room="/session", nth=nth, policy=policy)
    until_killed(burn, plan)

    async def after() -> None:
        async with next_process(plan) as next_:
            assert (await next_.account()).held == (0 if charged else PRICE)
            await next_.after_expiry()
            assert len(await next_.after_grace()) == members
            pays = charged or policy == "hold"
            assert [amount for _, amount in await next_.charges()] == [PRICE] * pays
            assert ((await next_.account()).held, await next_.live()) == (0, [])
            again = await ask(next_.app, "/session")
            assert (status(again.log), body(again.log)) == (200, b"done")
            await next_.metering.drain()
            assert [amount for _, amount in await next_.charges()] == [PRICE]
            assert (await next_.account()).available == CREDITED - PRICE

    asyncio.run(after())


@pytest.mark.parametrize(("moment", "policy"), [("before", "observed"), ("inside", "hold"), ("after", "hold")])
def test_kill_amid_the_undoing_of_an_admission(ground: Ground, moment: str, policy: Policy) -> None:
    """
    An admission whose client left is given back, or its hold ends by its policy: it never leaks (pitfall 29).

    Once it is given back the request runs again at once.
    """
    plan = ground.plan(f"undoing.{moment}", policy=policy, leaves=True)
    until_killed(burn, plan)
    undone = moment == "after"
    charged = HELD if policy == "hold" and not undone else 0

    async def after() -> None:
        async with next_process(plan) as next_:
            assert (await next_.account()).held == (0 if undone else HELD)
            if not undone:
                await next_.after_expiry()
                assert await next_.after_grace() == [plan.call]
            assert await next_.charges() == [(plan.call, charged)] * bool(charged)
            assert status((await ask(next_.app, "/stream")).log) == 200
            await next_.metering.drain()
            account = await next_.account()
            assert (account.settled, account.held) == (charged or USED, 0)

    asyncio.run(after())


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_amid_the_audit_of_free_work(ground: Ground, moment: str) -> None:
    """Free work touches no balance; a kill loses the event that was not sent, and none that was committed."""
    plan = ground.plan(f"audit.{moment}", room="/free")
    until_killed(burn, plan)
    found = []

    async def after() -> None:
        async with next_process(plan) as next_:
            found.append(next_)
            next_.clock.advance(LEASE_S)
            account = await next_.account()
            assert (account.available, account.held) == (CREDITED, 0)

    asyncio.run(after())
    assert found[0].events() == ({plan.call: 0} if moment == "after" else {})


# -- between the steps of a transaction --------------------------------------------------------------------

FEWEST_STEPS: Final = 4
"""Of any transaction that ends a call: it begins, locks or reads, writes and commits."""

in_transactions = pytest.mark.parametrize("ground", ["sqlite", "postgresql"], indirect=True)
"""The stores whose batches are transactions of many steps; a script of Redis is one."""

MIGRATION_STEPS: Final = (0, 6, 12, 16, 17, 26, 34, 35, 99)
"""Some of the first, of those in the middle, and the last of each kind of store; the last one is behind them all."""


@in_transactions
def test_kill_between_the_steps_of_an_end(ground: Ground) -> None:
    """
    A transaction that is cut anywhere has not happened: charge, ledger line, receipt and event come together or not.

    Steps are the statements that SQLite runs, the commit among them, and the trips to PostgreSQL.
    """
    cut = 0
    while _end_cut_at(ground, cut) is EndedBy.POLICY:
        cut += 1
    # Behind its last step there is nothing to cut.
    assert cut >= FEWEST_STEPS


def _end_cut_at(ground: Ground, step: int) -> EndedBy:
    """Who ended a call whose own end was cut at *step*; the books agree with it."""
    plan = ground.plan("end.after")
    until_killed(torn.end, plan, step)
    found = []

    async def after() -> EndedBy:
        async with next_process(plan) as next_:
            found.append(next_)
            await next_.after_expiry()
            await next_.after_grace()
            hold = await next_.hold(plan.call)
            assert hold is not None
            assert hold.receipt is not None
            receipt = hold.receipt
            assert receipt.amount == (USED if receipt.ended_by is EndedBy.CALL else SEEN)
            assert await next_.charges() == [(plan.call, receipt.amount)]
            assert (await next_.account()).available == CREDITED - receipt.amount
            return receipt.ended_by

    ended_by = asyncio.run(after())
    assert found[0].events() == {plan.call: USED if ended_by is EndedBy.CALL else SEEN}
    return ended_by


@in_transactions
def test_kill_between_the_steps_of_a_migration(ground: Ground) -> None:
    """Tables that were left half made are made by the next process that opens the store, which then works."""
    url = f"{ground.url.removesuffix('.db')}_fresh" + (".db" if ground.url.endswith(".db") else "")
    for step in MIGRATION_STEPS:
        until_killed(torn.migrate, url, step)

    async def after() -> None:
        store = store_at(url, migrate=True)
        await store.open()
        await store.post([PostGrant("first", "p", "credits", CREDITED)])
        await store.close()

    asyncio.run(after())
    assert asyncio.run(whole_books(url)) == []


def test_every_point_is_played() -> None:
    """No published point goes without a process that is killed at it."""
    played = {*test_calls.UNSEEN, *test_calls.UNOBSERVED, *test_calls.OBSERVED, *test_calls.ENDED}
    played |= {point for point, *_ in (*test_growth.SLICED, *test_outage.AMID)} | {*test_outage.BEHIND}
    aside = (*WORDS.values(), "sweep", "growth", "undoing", "audit")
    assert played | {f"{word}.{moment}" for word in aside for moment in MOMENTS} == POINTS.keys()
