"""`metering.charge(limits=...)`: rates and slots of work outside HTTP, such as sessions that live between requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from asgi_metering import Caller, Metering, billable, rate_limited, requires_upstream
from asgi_metering.call import CallRefused
from asgi_metering.decisions import Reason
from asgi_metering.errors import MeteringError
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock

CREDIT = 1_000_000
SESSIONS = rate_limited(concurrency=2, global_concurrency=3, scope="sessions")


def play(scene: Callable[[Metering, FakeClock], Awaitable[None]]) -> None:
    """Play *scene* on a metering where ann has ten credits; the books are proven after it."""

    async def run() -> None:
        clock = FakeClock()
        async with Metering(MemoryStore(clock), sinks=()) as metering:
            await metering.grant("ann", 10, id="g")
            await scene(metering, clock)
            assert await metering.check() == []

    asyncio.run(run())


def session(metering: Metering, user: str = "ann", **options: Any) -> Any:
    """A session of *user*, free unless said otherwise."""
    return metering.charge(**{"payer": user, "line": "session", "price": 0, "limits": SESSIONS, **options})


async def refused(block: Any) -> CallRefused:
    """Why *block* may not run."""
    with pytest.raises(CallRefused) as told:
        async with block:
            raise AssertionError("It ran.")
    return told.value


def test_hold_a_slot_for_as_long_as_a_session_lives() -> None:
    """A session takes a slot before it is built; a full pool says whose it is, and a free slot is free (S0.42)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        async with AsyncExitStack() as sessions:
            first = await sessions.enter_async_context(session(metering))
            assert first.admitted
            async with session(metering):
                full = (await refused(session(metering))).refusal
                assert (full.reason, full.level, full.limit) == (Reason.CONCURRENCY, "caller", 2)
                async with session(metering, "bob"):
                    assert (await refused(session(metering, "cid"))).refusal.level == "global"
            async with session(metering):
                pass

    play(scene)


def test_take_no_more_slots_than_there_are() -> None:
    """Of ten sessions that begin at once three live, and seven are refused; in the end nothing is pending (S0.44)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        over = asyncio.Event()

        async def build(user: str) -> str:
            try:
                async with session(metering, user):
                    await over.wait()
                    return "lived"
            except CallRefused as full:
                return full.refusal.level or ""

        building = [asyncio.create_task(build(f"user{number}")) for number in range(10)]
        while sum(task.done() for task in building) < 7:
            await asyncio.sleep(0)
        over.set()
        assert sorted(await asyncio.gather(*building)) == ["global"] * 7 + ["lived"] * 3
        async with session(metering, "one"), session(metering, "two"), session(metering, "three"):
            pass

    play(scene)


@pytest.mark.parametrize("how", ["fails", "cancelled"])
def test_give_a_slot_back_where_the_build_breaks(how: str) -> None:
    """A build that fails or is cancelled leaves no slot taken, and holds no money (S0.45)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        failure: type[BaseException] = RuntimeError if how == "fails" else asyncio.CancelledError
        for _ in range(3):
            with pytest.raises(failure):
                async with session(metering, price=2):
                    raise failure
        async with session(metering), session(metering):
            pass
        balance = await metering.balance("ann")
        assert (balance.settled, balance.held) == (0, 0)

    play(scene)


def test_limit_jobs_and_charge_them_in_one_decision() -> None:
    """A job over its rate is refused with the time to wait, and has taken neither money nor a slot."""
    limits = [rate_limited("2/minute"), rate_limited("1/hour", key=lambda call: call.caller.plan), SESSIONS]

    async def scene(metering: Metering, clock: FakeClock) -> None:
        for plan in ("free", "pro"):
            async with session(metering, line="job", price=3, limits=limits, caller=Caller("eve", plan=plan)):
                pass
        over = await refused(session(metering, line="job", price=3, limits=limits, caller=Caller("eve", plan="team")))
        assert (over.refusal.reason, over.refusal.name) == (Reason.RATE_LIMIT, "2-per-minute")
        assert (await metering.balance("ann")).settled == 6 * CREDIT
        clock.advance(61.0)
        short = await refused(session(metering, line="job", price=5, limits=limits, caller=Caller("eve", plan="team")))
        assert short.refusal.reason is Reason.CREDITS
        async with session(metering, line="job", price=4, limits=limits, caller=Caller("eve", plan="team")) as call:
            assert call.decision is not None
            assert [window.remaining for window in call.decision.windows] == [1, 0]

    play(scene)


def test_preview_takes_no_slot() -> None:
    """A preview is about the charge: its limits are neither asked nor counted (S0.37)."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        for _ in range(3):
            assert (await metering.preview("ann", line="job", price=1, limits=rate_limited("1/day"))).admitted

    play(scene)


@pytest.mark.parametrize(
    ("limits", "mend"),
    [
        ("60/minute", "is no limit. Write limits=rate_limited"),
        ([billable(2)], "is no limit"),
        (requires_upstream("openai"), "is no limit"),
        ([], "is no limit"),
        (rate_limited("2/minute", per="message"), "only WebSockets are"),
        (rate_limited("2/minute", key="address"), "nobody to count"),
    ],
    ids=["text", "price", "upstream", "empty", "messages", "address"],
)
def test_refuse_what_limits_no_work(limits: Any, mend: str) -> None:
    """What is no limit, or counts what work outside HTTP does not have, is told with the mend, and nothing runs."""

    async def scene(metering: Metering, clock: FakeClock) -> None:
        with pytest.raises(MeteringError, match=mend):
            async with session(metering, limits=limits):
                raise AssertionError("It ran.")

    play(scene)
