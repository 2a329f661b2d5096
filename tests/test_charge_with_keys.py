"""Keys of work outside HTTP: a job runs once, and several calls are one charge, as requests are."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from asgi_metering import Metering, MeteringMiddleware, billable
from asgi_metering.call import CallRefused
from asgi_metering.caller import Caller
from asgi_metering.decisions import Reason
from asgi_metering.errors import ConfigurationError, InvalidKeyError
from asgi_metering.prices import per_million_tokens
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from asgi_metering.usage import TokenUsage
from tests.harness.drive import drive, http_scope, status
from tests.keyed import store_of

HOUR_S = 3_600.0


def with_books(story: Callable[[Metering], Awaitable[None]], **more: Any) -> None:
    """Play *story* on a metering where org_7 has 100 credits."""

    async def run() -> None:
        async with Metering(sinks=(), **more) as metering:
            await metering.grant("org_7", 100, id="g")
            await story(metering)
            assert await metering.check() == []

    asyncio.run(run())


async def spent(metering: Metering, payer: str = "org_7") -> str:
    """What a payer has settled."""
    return metering.unit.text((await metering.balance(payer)).settled)


async def job(metering: Metering, key: str | None = "job-1", **more: Any) -> CallRefused | str:
    """Do a job that costs 2; its call's id, or why it was not done."""
    options: dict[str, Any] = {"payer": "org_7", "line": "import", "price": 2, **more}
    try:
        async with metering.charge(idempotency_key=key, **options) as call:
            return call.id
    except CallRefused as refused:
        return refused


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_do_a_job_once(kind: str, tmp_path: Path) -> None:
    """A job whose key was used is not done again: the refusal carries the receipt of the first (S3.15)."""

    async def story(metering: Metering) -> None:
        first, again = await job(metering), await job(metering)
        assert isinstance(again, CallRefused)
        assert again.refusal.reason is Reason.REPLAYED
        assert again.decision is not None
        assert again.decision.replay is not None
        assert (again.decision.replay.id, again.decision.replay.amount) == (first, 2_000_000)
        assert await spent(metering) == "2"

    with_books(story, store=store_of(kind, tmp_path))


def test_do_a_job_again_that_failed() -> None:
    """A job that raised is charged nothing and frees its key: the next try runs."""

    async def story(metering: Metering) -> None:
        with pytest.raises(RuntimeError):
            async with metering.charge(payer="org_7", line="import", price=2, idempotency_key="job-1"):
                raise RuntimeError
        assert isinstance(await job(metering), str)
        assert await spent(metering) == "2"

    with_books(story)


def test_refuse_a_job_that_runs() -> None:
    """While a job runs, another one of its key is told so and does not run."""

    async def story(metering: Metering) -> None:
        async with metering.charge(payer="org_7", line="import", price=2, idempotency_key="job-1"):
            refused = await job(metering)
        assert isinstance(refused, CallRefused)
        assert refused.refusal.reason is Reason.IN_FLIGHT
        assert await spent(metering) == "2"

    with_books(story)


@pytest.mark.parametrize("other", [{"price": 3}, {"caller": Caller("bob")}])
def test_refuse_another_job_of_the_key(other: dict[str, Any]) -> None:
    """A key that comes again with another price or caller is other work, and a mistake; the same price is the same."""

    async def story(metering: Metering) -> None:
        await job(metering, caller=Caller("ann"))
        refused = await job(metering, **{"caller": Caller("ann"), **other})
        same = await job(metering, caller=Caller("ann"), price="2.00")
        assert isinstance(refused, CallRefused)
        assert isinstance(same, CallRefused)
        assert (refused.refusal.reason, same.refusal.reason) == (Reason.FINGERPRINT, Reason.REPLAYED)

    with_books(story)


def test_keys_of_others_are_others() -> None:
    """A key belongs to payer and line; work without one is done each time."""

    async def story(metering: Metering) -> None:
        await metering.grant("org_8", 10, id="g")
        for more in ({}, {"line": "export"}, {"payer": "org_8"}, {"key": "job-2"}, {"key": None}, {"key": None}):
            assert isinstance(await job(metering, **more), str)
        assert (await spent(metering), await spent(metering, "org_8")) == ("10", "2")

    with_books(story)


def test_do_measured_work_once() -> None:
    """Work whose price is measured is charged by what it used, and once per key."""
    price = per_million_tokens(input=3, output=15)

    async def story(metering: Metering) -> None:
        async def work(count: int) -> None:
            async with metering.charge(
                payer="org_7", line="podcast", price=price, hold=5, idempotency_key="episode-1"
            ) as call:
                call.record(TokenUsage(input=count, output=0))

        await work(1_000_000)
        with pytest.raises(CallRefused, match="replayed"):
            await work(2_000_000)
        assert await spent(metering) == "3"

    with_books(story)


def test_forget_a_key_after_a_day() -> None:
    """A key is remembered for 24 hours (DESIGN "Retention")."""
    clock = FakeClock()

    async def story(metering: Metering) -> None:
        await job(metering)
        clock.advance(23 * HOUR_S)
        assert isinstance(await job(metering), CallRefused)
        clock.advance(HOUR_S)
        assert isinstance(await job(metering), str)

    with_books(story, store=MemoryStore(clock))


def test_charge_a_session_once_outside_http() -> None:
    """S0.3: calls of one charge key are one charge per window; later ones join free and know it, others pay."""
    clock = FakeClock()

    async def story(metering: Metering) -> None:
        joined = []
        for key, later_s in (("s", 0.0), ("s", 0.0), ("other", 0.0), ("s", HOUR_S)):
            clock.advance(later_s)
            async with metering.charge(payer="org_7", line="chat", price=2, charge_key=key, charge_per=HOUR_S) as call:
                pass
            joined.append(call.joined)
        assert joined == [False, True, False, False]
        assert await spent(metering) == "6"

    with_books(story, store=MemoryStore(clock))


def test_charge_a_session_once_in_requests_and_jobs() -> None:
    """A job joins the session that a request of its payer and line has begun, in a thread as well."""

    async def story(metering: Metering) -> None:
        app = FastAPI()

        @app.post("/chat")
        @billable(2, line="chat", charge_key=lambda session: session)
        async def chat(session: str) -> dict[str, str]:
            return {}

        layered = MeteringMiddleware(app, metering=metering)
        assert status((await drive(layered, http_scope("/chat", "POST", query="session=s"))).log) == 200

        def work() -> bool:
            with metering.charge_sync(payer="org_7", line="chat", price=2, charge_key="s") as call:
                return call.joined

        assert await asyncio.to_thread(work)
        assert await spent(metering) == "2"
        await asyncio.to_thread(metering.close)

    with_books(story, identify=lambda _: Caller("org_7"))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"idempotency_key": ""}, InvalidKeyError, "idempotency key"),
        ({"idempotency_key": 7}, InvalidKeyError, "idempotency key"),
        ({"charge_key": "a\nb"}, InvalidKeyError, "charge key"),
        ({"charge_per": "day", "charge_zone": "Europe/Berlin"}, ConfigurationError, "Give one as well"),
        ({"charge_key": "s", "charge_per": "year"}, ConfigurationError, "is no window"),
        ({"charge_key": "s", "price": per_million_tokens(input=1, output=1)}, ConfigurationError, "measured"),
    ],
)
def test_refuse_keys_that_cannot_be(options: dict[str, Any], error: type[Exception], match: str) -> None:
    """What cannot be a key, or a window of one, is a mistake that is told before anything runs."""

    async def story(metering: Metering) -> None:
        with pytest.raises(error, match=match):
            async with metering.charge(**{"payer": "org_7", "line": "chat", "price": 2, **options}):
                raise AssertionError

    with_books(story)
