"""The tracker of a metering, and our own budgets in its record."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from asgi_metering import CREDITS, Allowance, Metering, TokenUsage, tracking
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_million_tokens
from asgi_metering.quotas.packages import read_package
from asgi_metering.testing.provider import Provider
from asgi_metering.tracking import Package, QuotaTracker, UsageLog, budget_status
from asgi_metering.usage import UsageEvent
from tests.harness.servers import serve_in_thread


async def forget(events: object) -> None:
    """A sink that takes everything."""


def packages() -> list[Package]:
    """Credits and a window of acme."""
    return [
        read_package({"provider_id": "acme", "total_credits": 10}, "c"),
        read_package(
            {"provider_id": "acme", "package_type": "daily", "limit_per_day": 10, "model_weights": {"m": 2}}, "d"
        ),
    ]


async def settled(metering: Metering, used: float) -> None:
    """Wait until the events have been delivered to the log."""
    assert metering.tracker is not None
    for _ in range(400):
        status = metering.tracker.status("d")
        if status is not None and status.used >= used:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("the usage events were not counted")


def test_metering_counts_its_own_calls_for_its_packages() -> None:
    """Calls that name a provider are counted by their usage events, and what they cost is the burn (S1.7, S1.11)."""

    async def play() -> None:
        async with Metering(sinks=[], packages=packages()) as metering:
            await metering.grant("ann", 100, id="g")
            for _ in range(3):
                async with metering.charge(payer="ann", line="chat", price=per_million_tokens(input=1), hold=7) as call:
                    call.record(TokenUsage(input=7_000_000, output=0), provider="acme", model="m")
            await settled(metering, 6)
            tracker = metering.tracker
            assert tracker is not None
            assert metering.quotas is tracker.readings
            prepaid, day = tracker.statuses()
            assert (day.used, day.remaining) == (6, 4)
            assert prepaid.burn_per_day == 3

    asyncio.run(play())


def test_packages_count_each_upstream_call_of_a_call() -> None:
    """One request that asks models several times is as many calls to their providers, each by its weight (S1.11)."""
    both = [
        *packages(),
        read_package({"provider_id": "other", "package_type": "rolling_window", "limit_per_window": 10}, "w"),
        read_package({"provider_id": "other", "total_credits": 10}, "o"),
    ]

    async def play() -> None:
        async with Metering(sinks=[], packages=both) as metering:
            await metering.grant("ann", 100, id="g")
            async with metering.charge(payer="ann", line="agent", price=per_million_tokens(input=1), hold=7) as call:
                for provider, model in (("acme", "m"), ("acme", "m"), ("acme", "n"), ("other", "m")):
                    call.record(TokenUsage(input=7_000_000), provider=provider, model=model)
            await settled(metering, 5)
            async with metering.charge(payer="ann", line="agent", price=per_million_tokens(input=1), hold=7) as call:
                for _ in range(3):
                    call.record(TokenUsage(input=7_000_000), provider="acme", model="m")
            await settled(metering, 11)
            assert metering.tracker is not None
            used = {each.package_id: each.used for each in metering.tracker.statuses()}
            assert (used["d"], used["w"]) == (2 + 2 + 1 + 6, 1)
            burns = {each.package_id: each.burn_per_day for each in metering.tracker.statuses()}
            assert (burns["c"], burns["o"]) == ((21 + 21) / 7, 7 / 7)

    asyncio.run(play())


@pytest.mark.parametrize("left", [True, False], ids=["left", "unreported"])
def test_packages_count_calls_that_told_no_usage(left: bool) -> None:
    """A stream that is left, or whose usage nobody asked for, is a call to its provider too (S1.11, S3.27)."""
    told: list[UsageEvent] = []

    async def play(url: str) -> None:
        mine = [read_package({"provider_id": "openai", "package_type": "daily", "limit_per_day": 10}, "d")]
        async with Metering(sinks=[CallbackSink(told.extend)], packages=mine) as metering:
            await metering.grant("ann", 100, id="g")
            http = metering.upstream_client("openai", verify=False)
            async with openai.AsyncOpenAI(api_key="sk-any", base_url=url + "/v1", http_client=http) as sdk:
                price = per_million_tokens(input=1)
                async with metering.charge(payer="ann", line="chat", price=price, hold=7, on_missing_usage="none"):
                    for _ in range(2):
                        stream = await sdk.chat.completions.create(
                            model="words-30", messages=[{"role": "user", "content": "Hi"}], stream=True
                        )
                        async for _event in stream:
                            if left:
                                break
                        await stream.close()
            await settled(metering, 2)

    with serve_in_thread(Provider()) as server:
        asyncio.run(play(server.url))
    (event,) = told
    assert (event.provider, event.amount) == ("openai", 0)
    assert event.model in ("words-30", None)
    assert event.attributes["metering.upstream.calls"] == 2


def test_metering_takes_a_tracker_with_a_log_of_its_own(tmp_path: Path) -> None:
    """A tracker's log is one more sink beside others, once; its readings are those of the metering (S1.41)."""
    log = UsageLog(tmp_path / "log.db")
    tracker = QuotaTracker(tmp_path / "quotas.json", log=log)
    sink = CallbackSink(forget, "forgotten")
    assert Metering(sinks=[sink], packages=tracker).sinks == (sink, log)
    assert Metering(sinks=[log], packages=tracker).sinks == (log,)
    assert Metering(sinks=[], packages=QuotaTracker()).sinks == ()
    made = Metering(sinks=[], packages=tmp_path / "quotas.json")
    assert made.tracker is not None
    assert made.tracker.statuses() == []
    assert Metering(sinks=[]).tracker is None


def test_metering_with_packages_that_are_none_is_refused() -> None:
    """A sentence says what may be passed."""
    with pytest.raises(ConfigurationError, match="packages=3 is no catalogue"):
        Metering(packages=3)  # type: ignore[arg-type]


def test_budget_of_a_payer_is_shown_by_the_same_record() -> None:
    """What our own payers have left is a status too: held counts as used, and debt is no negative rest (S1.1, S1.4)."""

    async def play() -> None:
        async with Metering(sinks=[]) as metering:
            await metering.grant("ann", 20, id="g")
            async with metering.charge(payer="ann", line="chat", price=5):
                running = budget_status(await metering.balance("ann"), CREDITS)
            balance = await metering.balance("ann")
        assert (running.provider_id, running.package_id) == ("ann", "ann-credits")
        assert (running.total, running.used, running.remaining, running.remaining_ratio) == (20, 5, 15, 0.75)
        assert (running.source, running.alert) == ("local_count", "ok")
        burning = budget_status(balance, CREDITS, charged=CREDITS.parts(14))
        assert (burning.burn_per_day, burning.projected_days_left, burning.alert) == (2, 7.5, "watch")
        owing = budget_status(balance._replace(available=-1, granted=0), CREDITS)
        assert (owing.remaining, owing.remaining_ratio, owing.alert) == (0, 0, "exhausted")

    asyncio.run(play())


def test_budget_of_an_allowance_is_a_window() -> None:
    """A plan's allowance is shown as a window with its reset, what is held included (S1.1, S1.14)."""

    async def play() -> None:
        sources = [Allowance(10, per="day")]
        async with (
            Metering(sinks=[]) as metering,
            metering.charge(payer="ann", line="chat", price=8, sources=sources),
        ):
            (standing,) = await metering.allowances("ann", sources=sources)
        budget = budget_status(standing, CREDITS)
        assert (budget.package_type, budget.window_hours) == ("rolling_window", 24)
        assert (budget.total, budget.used, budget.remaining, budget.alert) == (10, 8, 2, "watch")
        assert budget.reset_at is not None
        bare = budget_status(standing._replace(limit=0, starts_at=None, resets_at=None), CREDITS)
        assert (bare.window_hours, bare.reset_at, bare.remaining_ratio, bare.alert) == (None, None, 0, "ok")

    asyncio.run(play())


def test_tracking_has_every_name_that_it_offers() -> None:
    """Each public name is there, those that need a driver when they are asked for."""
    assert [name for name in tracking.__all__ if getattr(tracking, name) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = tracking.nothing
