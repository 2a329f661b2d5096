"""Who counts where several sources report the usage of one call, and what becomes of usage that comes too late."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import httpx2
import pytest
from starlette.responses import JSONResponse

from asgi_metering import Metering, TokenUsage, billable, current_call, metered_app
from asgi_metering.breakdown import MAX_MODELS, upstream_attributes
from asgi_metering.call import Call
from asgi_metering.errors import ConfigurationError
from asgi_metering.events import CallbackSink
from asgi_metering.measuring import Metered
from asgi_metering.opening import ALL_FEATURES, Opening
from asgi_metering.prices import per_token
from asgi_metering.testing.provider import Provider
from asgi_metering.usage.event import UsageEvent
from asgi_metering.witnesses import LITELLM, MAX_WATCHED, TELEMETRY, Told, Watched, Witness, Witnesses
from tests.pitfalls.stage import staged

pytestmark = pytest.mark.uncounted

PRICE = per_token(input="0.001", output="0.01")

RANKED = ("handler", "upstream", "litellm", "telemetry", "body")
"""DESIGN 6, the highest first."""

OUTPUTS = {"handler": 1, "upstream": 2, "litellm": 3, "telemetry": 4, "body": 5}
"""What each of them says, so that it can be told which one counted."""


class House:
    """A metering with two witnesses, and the bundled provider without a network."""

    def __init__(self) -> None:
        self.events: list[UsageEvent] = []
        self.metering = Metering(sinks=[CallbackSink(self.events.extend, "seen")])
        self.litellm, self.telemetry = (Witness(self.metering.meters, name) for name in (LITELLM, TELEMETRY))
        self.provider = Provider()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Metering]:
        """Run the metering with credits for one payer; behind it, every event has been delivered."""
        async with self.metering as metering:
            await metering.grant("org", 1_000, id="g")
            yield metering

    def charge(self, line: str = "chat", **options: Any) -> Any:
        """A call that is charged by what it uses."""
        return self.metering.charge(payer="org", line=line, price=PRICE, hold=1, **options)

    def client(self) -> httpx2.AsyncClient:
        """The upstream client, before the provider."""
        return self.metering.upstream_client("acme", httpx2.ASGITransport(self.provider), verify=False)

    async def ask(self, client: httpx2.AsyncClient, words: int, **options: Any) -> httpx2.Response:
        """One chat request that is answered with so many words."""
        body = {"model": f"m:words-{words}", "messages": [{"role": "user", "content": "Hi"}], **options}
        fields = {"authorization": "Bearer sk"}
        return await client.post("http://acme.test/v1/chat/completions", json=body, headers=fields)

    def total(self, tally: str) -> int:
        """What a counter of the metering has counted, over all attributes."""
        return sum(self.metering.meters.totals(tally).values())


@pytest.fixture
def house() -> House:
    """A metering without a past."""
    return House()


def told(output: int, **more: Any) -> Told:
    """What a library tells of one upstream call."""
    return Told(TokenUsage(input=1, output=output), "m", "acme", **more)


def opened(house: House) -> Call:
    """A call outside of any request."""
    return Opening(house.metering, ALL_FEATURES).open_call()


REPORTING = [reporting for count in range(1, len(RANKED) + 1) for reporting in itertools.combinations(RANKED, count)]


@pytest.mark.parametrize("reporting", REPORTING, ids="+".join)
def test_highest_source_counts_for_the_whole_call(reporting: tuple[str, ...]) -> None:
    """Of all sources that report, one alone is charged, and the event names it; none are added (S2.42)."""
    house = House()

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        async with house.client() as client:
            if "upstream" in reporting:
                await house.ask(client, OUTPUTS["upstream"])
        for name, witness in (("litellm", house.litellm), ("telemetry", house.telemetry)):
            if name in reporting:
                witness.begin().tell(told(OUTPUTS[name]))
        if "handler" in reporting:
            current_call().record(TokenUsage(input=1, output=OUTPUTS["handler"]))
        usage = {"prompt_tokens": 1, "completion_tokens": OUTPUTS["body"], "total_tokens": 1 + OUTPUTS["body"]}
        body = {"object": "chat.completion", "choices": [], **({"usage": usage} if "body" in reporting else {})}
        await JSONResponse(body)(scope, receive, send)

    async def run() -> list[Any]:
        async with staged(metered_app(endpoint, billable(PRICE, hold=1)), with_lifespan=False) as stage:
            house.metering = stage.metering
            await stage.drive()
        return stage.events

    (event,) = asyncio.run(run())
    highest = next(name for name in RANKED if name in reporting)
    assert event.usage_source == highest
    assert event.usage.output == OUTPUTS[highest]
    assert event.basis == "usage"


def test_end_waits_for_what_is_told_in_the_background(house: House) -> None:
    """A library that tells after its answer was given away, from another thread, is still heard, and not for long."""

    async def run() -> None:
        async with house.open(), house.charge():
            watched = house.litellm.begin(is_awaited=True)
            timer = threading.Timer(0.02, watched.tell, [told(3)])
            timer.start()
        timer.join()

    asyncio.run(run())
    assert [event.usage for event in house.events] == [TokenUsage(input=1, output=3)]


def test_end_that_waited_in_vain_refuses_what_comes_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told when the wait is over is not taken, and counts as late (S3.26)."""
    house = House()

    async def run() -> bool:
        monkeypatch.setattr(Witnesses.settled, "__defaults__", (0.01,))
        async with house.open():
            async with house.charge():
                watched = house.litellm.begin(is_awaited=True)
            return watched.tell(told(3))

    assert asyncio.run(run()) is False
    assert [(event.usage, event.basis) for event in house.events] == [(None, "estimate")]
    assert (house.total("usage_late"), house.total("usage_unscoped")) == (1, 0)


def test_end_that_waits_keeps_no_other_from_ending(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one call waits for what a library tells in the background, others are booked."""
    monkeypatch.setattr(Witnesses.settled, "__defaults__", (60.0,))

    async def slow(begun: asyncio.Future[Watched]) -> None:
        async with house.charge("slow"):
            begun.set_result(house.litellm.begin(is_awaited=True))

    async def run() -> None:
        async with house.open() as metering:
            begun: asyncio.Future[Watched] = asyncio.get_running_loop().create_future()
            waiting = asyncio.create_task(slow(begun))
            watched = await begun
            for number in range(3):
                async with house.charge(f"quick-{number}"):
                    house.telemetry.begin().tell(told(number))
            assert [entry.line async for entry in metering.statement("org")][1:] == ["quick-0", "quick-1", "quick-2"]
            assert not waiting.done()
            watched.tell(told(9))
            await waiting

    asyncio.run(run())
    assert [event.line for event in house.events] == ["quick-0", "quick-1", "quick-2", "slow"]


def test_run_that_stopped_early_leaves_nothing_to_the_next(house: House) -> None:
    """What a run had used when it was stopped is never billed to the one that comes after it (S2.40)."""

    async def first(client: httpx2.AsyncClient) -> None:
        async with asyncio.timeout(30) as limit, house.charge("first"):
            await house.ask(client, 7)
            house.telemetry.begin().tell(told(7))
            limit.reschedule(0)
            await asyncio.Event().wait()

    async def run() -> None:
        async with house.open(), house.client() as client:
            with pytest.raises(TimeoutError):
                await first(client)
            async with house.charge("second"):
                await house.ask(client, 2)

    asyncio.run(run())
    outputs = [(event.line, event.usage and event.usage.output, event.amount > 0) for event in house.events]
    assert outputs == [("first", 7, False), ("second", 2, True)]


def test_fixed_price_tells_what_was_used_all_the_same(house: House) -> None:
    """A call that costs a fixed price has the usage on its event that a library told."""

    async def run() -> None:
        async with house.open() as metering, metering.charge(payer="org", line="flat", price=2):
            house.telemetry.begin().tell(told(4))

    asyncio.run(run())
    (event,) = house.events
    assert (event.usage, event.usage_source, event.amount) == (TokenUsage(input=1, output=4), "telemetry", 2_000_000)


def test_shadow_prices_what_a_library_told() -> None:
    """What a price in the shadow would have charged is told by the usage of whichever source counted (S4.16)."""
    house = House()
    house.metering = Metering(sinks=[CallbackSink(house.events.extend, "seen")], shadow=True)

    async def run() -> None:
        async with house.open(), house.charge():
            Witness(house.metering.meters, TELEMETRY).begin().tell(told(4))

    asyncio.run(run())
    (event,) = house.events
    assert (event.amount, event.attributes["metering.shadow.amount_parts"]) == (0, 41_000)


def test_usage_that_comes_when_the_loop_is_closed_disturbs_nobody(house: House) -> None:
    """A wait that was given up with its loop is not told of what comes then."""
    call = opened(house)
    watched = house.litellm.begin_in(call.opening, is_awaited=True)

    async def run() -> None:
        assert call.witnesses is not None
        waiting = asyncio.create_task(call.witnesses.settled(60))
        await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(run())
    assert watched.tell(told(3))


def test_retry_that_is_never_told_of_keeps_the_usage_whole(house: House) -> None:
    """A repeated try that failed for good, which a library tells nothing of, does not make the rest an estimate."""

    async def run() -> None:
        async with house.open(), house.charge():
            house.telemetry.begin().tell(told(3))
            house.telemetry.begin(is_retry=True)

    asyncio.run(run())
    assert [(event.usage and event.usage.output, event.basis) for event in house.events] == [(3, "usage")]


def test_concurrent_and_nested_calls_never_mix(house: House) -> None:
    """Calls at once, each with upstream calls at once in tasks and threads, and charges inside of them, keep their own.

    Source: S2.44, S3.24, S3.25.
    """

    async def upstream(number: int) -> None:
        watched = house.litellm.begin()
        await asyncio.sleep(0)
        await asyncio.to_thread(watched.tell, told(number))

    async def in_thread(number: int) -> None:
        await asyncio.to_thread(lambda: house.litellm.begin().tell(told(number)))

    async def one(number: int) -> None:
        async with house.charge(f"outer-{number}"):
            await asyncio.gather(*(upstream(number) for _ in range(3)), in_thread(number))
            async with house.charge(f"inner-{number}"):
                await asyncio.gather(upstream(100 * number), in_thread(100 * number))
            await upstream(number)

    async def run() -> None:
        async with house.open():
            await asyncio.gather(*(one(number) for number in range(1, 6)))
            assert not house.litellm.begin().has_call

    asyncio.run(run())
    outputs = {event.line: event.usage.output for event in house.events if event.usage is not None}
    expected = {f"outer-{number}": 5 * number for number in range(1, 6)}
    assert outputs == expected | {f"inner-{number}": 200 * number for number in range(1, 6)}
    assert house.total("usage_late") == house.total("usage_unscoped") == 0


def test_exchange_behind_the_end_of_its_call_is_counted(house: House) -> None:
    """A task that outlives its call is charged to nobody, nor is an exchange of no call; both are counted (S3.26)."""

    async def run() -> None:
        async with house.open(), house.client() as client:
            await house.ask(client, 3)
            assert (house.total("usage_unscoped"), house.total("usage_late")) == (1, 0)
            over = asyncio.Event()

            async def outlive() -> None:
                await over.wait()
                await house.ask(client, 3)

            async with house.charge():
                late = asyncio.create_task(outlive())
            over.set()
            await late

    asyncio.run(run())
    assert (house.total("usage_unscoped"), house.total("usage_late")) == (1, 1)
    assert [event.usage for event in house.events] == [None]


def test_exchange_that_ends_behind_its_call_is_counted(house: House) -> None:
    """An answer that goes on behind the end of its call is charged by what had passed; what comes then is counted."""

    async def run() -> None:
        async with house.open(), house.client() as client:
            first, going_on = asyncio.Event(), asyncio.Event()

            async def stream() -> None:
                body = {"model": "m:words-9", "stream": True, "messages": [{"role": "user", "content": "Hi"}]}
                body["stream_options"] = {"include_usage": True}
                url, fields = "http://acme.test/v1/chat/completions", {"authorization": "Bearer sk"}
                async with client.stream("POST", url, json=body, headers=fields) as answer:
                    first.set()
                    await going_on.wait()
                    assert b"[DONE]" in await answer.aread()

            async with house.charge():
                going = asyncio.create_task(stream())
                await first.wait()
            going_on.set()
            await going

    asyncio.run(run())
    assert (house.total("usage_unscoped"), house.total("usage_late")) == (0, 1)
    assert [event.basis for event in house.events] == ["estimate"]


def test_only_so_many_upstream_calls_are_watched(house: House) -> None:
    """An agent that never ends cannot fill the memory: what is beyond the bound is counted as late."""

    async def run() -> None:
        async with house.open(), house.charge():
            watched = [house.litellm.begin() for _ in range(MAX_WATCHED + 1)]
            assert [each.tell(told(1)) for each in watched[-2:]] == [True, False]

    asyncio.run(run())
    assert house.total("usage_late") == 1


def test_source_without_a_rank_is_refused(house: House) -> None:
    """A witness that nobody would look at fails when it is made."""
    with pytest.raises(ConfigurationError, match="has no rank"):
        Witness(house.metering.meters, "rumour")


def test_event_tells_costs_and_models_of_the_source_that_counted(house: House) -> None:
    """Costs are summed exactly and rounded once (S3.20, S3.21), models apart (S3.27), and no other source is told."""

    async def run() -> None:
        async with house.open(), house.charge():
            house.telemetry.begin().tell(Told(TokenUsage(input=9), "z", cost=Decimal(9)))
            for model, cost in (("a", "0.0000004"), ("a", "0.0000004"), ("b", "0.0000007"), ("c", None)):
                usage = TokenUsage(input=1, output=2)
                known = None if cost is None else Decimal(cost)
                house.litellm.begin().tell(Told(usage, model, "acme", known, truncated=model == "b"))

    asyncio.run(run())
    (event,) = house.events
    assert event.attributes == {
        "metering.cost.usd_micros": 2,
        "metering.truncated": True,
        "metering.models": '[{"model":"a","provider":"acme","calls":2,"usage":{"input":2,"output":4},'
        '"cost_usd_micros":1},{"model":"b","provider":"acme","calls":1,"usage":{"input":1,"output":2},'
        '"cost_usd_micros":1},{"model":"c","provider":"acme","calls":1,"usage":{"input":1,"output":2}}]',
    }


@pytest.mark.parametrize("cost", [Decimal("NaN"), Decimal("Infinity"), Decimal(-1), Decimal(10**300), Decimal(0), None])
def test_cost_that_no_event_may_hold_is_left_out(house: House, cost: Decimal | None) -> None:
    """What is no amount of money, or none, is not told (S3.21, S3.23)."""
    call = opened(house)
    assert upstream_attributes(call, Metered(TokenUsage(input=1), "litellm", cost=cost)) == {}


def test_models_of_an_event_are_bounded(house: House) -> None:
    """Names come from upstream: of more models than are told apart the rest is one row."""
    call = opened(house)
    for number in range(MAX_MODELS + 5):
        house.litellm.begin_in(call.opening).tell(Told(TokenUsage(input=1), f"m{number}"))
    rows = upstream_attributes(call, Metered(TokenUsage(input=1), "litellm"))["metering.models"]
    assert isinstance(rows, str)
    assert rows.count('"model"') == MAX_MODELS + 1
    assert '"model":"_OTHER","provider":null,"calls":5' in rows
