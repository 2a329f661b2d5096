"""Holds that grow while their call runs: when they ask for more, for how much, and what becomes of it (DESIGN 4)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import httpx2
import pytest
from starlette.responses import JSONResponse, Response

from asgi_metering import Allowance, Metering, Payer, TokenUsage, Wallet, billable, current_call, slices
from asgi_metering.asgi.exchange import CHECKPOINT_BYTES
from asgi_metering.billing import observed_parts
from asgi_metering.call import Call, CallCut
from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.growing import LEAST_ROOM, MOST_ROOM
from asgi_metering.measuring import TextCounts
from asgi_metering.prices import per_token
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Grow, Operation
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from asgi_metering.usage import UsageReader
from tests.harness.drive import Drive, body, http_scope
from tests.pitfalls.scene import Books
from tests.pitfalls.stage import StuckAt, staged, within
from tests.pitfalls.streams import delta, sse, starlette

CREDIT = 1_000_000
PRICE = per_token(output=1)


class Asked(Books):
    """Books whose growths can be told apart, and that give none while they are down."""

    down = False

    def run_now(self, operation: Operation) -> Answer:
        if self.down and isinstance(operation, Grow):
            self.asked.append(operation)
            raise StoreUnavailableError("The store is down.")
        return super().run_now(operation)

    @property
    def growths(self) -> list[tuple[int, int]]:
        """To how many credits, and what would do, in smallest parts."""
        return [(asked.to // CREDIT, asked.minimum) for asked in self.asked if isinstance(asked, Grow)]


@asynccontextmanager
async def opened(granted: int = 100, store: Any = None, **options: Any) -> AsyncIterator[Metering]:
    """A metering in which ann has so many credits."""
    metering = Metering(Asked() if store is None else store, sinks=(), **options)
    async with metering:
        if granted:
            await metering.grant("ann", granted, id="g")
        yield metering


def growing(metering: Metering, hold: Any, **options: Any) -> Any:
    """A call of ann's at a credit a token."""
    return metering.charge(payer="ann", line="job", **{"price": PRICE, "hold": hold, **options})


async def used(call: Call, tokens: int) -> None:
    """Report so many tokens, and wait until they were looked at."""
    call.record(TokenUsage(output=tokens))
    await looked(call)


async def looked(call: Call) -> None:
    """Wait until whoever was nudged has looked."""
    growth = call.growth
    assert growth is not None
    told = sum(report.usage.output or 0 for report in call.reports) * CREDIT
    await within(10, lambda: growth.used == told and growth._look is None and not growth._asked)


async def books(metering: Metering) -> tuple[int, int, int]:
    """What ann has spent, holds and owes, in credits."""
    balance = await metering.balance("ann")
    return balance.settled // CREDIT, balance.held // CREDIT, balance.debt // CREDIT


# -- when, and by how much ---------------------------------------------------------------------------------


def test_grow_at_the_low_water_mark() -> None:
    """A hold grows once no more than its mark is left, by a step beyond what was used or held, and not before."""

    async def play() -> None:
        store = Asked()
        async with opened(store=store) as metering:
            async with growing(metering, slices(10, step=20, low_water=4)) as call:
                await used(call, 5)
                assert (store.growths, call.held // CREDIT) == ([], 10)
                await used(call, 1)
                assert store.growths == [(30, 10 * CREDIT + 1)]
                await used(call, 35)
                assert store.growths[1:] == [(61, 30 * CREDIT + 1)]
                assert await books(metering) == (0, 61, 0)
            assert call.receipt is not None
            assert (call.receipt.held // CREDIT, str(call.receipt.basis)) == (61, "usage")
            assert await books(metering) == (41, 0, 0)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("hold", "first", "grown"),
    [
        (slices(10), 10, 20),
        (slices("10", step=TokenUsage(output=3)), 10, 13),
        (slices(TokenUsage(output=10)), 10, 20),
        (slices(TokenUsage(input=5, output=10)), 15, 30),
        (slices(lambda: 7), 7, 14),
        (slices(lambda: TokenUsage(output=7), step="1"), 7, 8),
    ],
    ids=["amount", "step-of-tokens", "tokens", "with-input", "computed", "computed-tokens"],
)
def test_grow_by_steps_of_any_words(hold: Any, first: int, grown: int) -> None:
    """A slice is an amount, tokens or computed; a step is as large as the first slice unless it is said."""

    async def play() -> None:
        async with opened() as metering, growing(metering, hold, price=per_token(input=1, output=1)) as call:
            assert call.held // CREDIT == first
            await used(call, first)
            assert call.held // CREDIT == grown

    asyncio.run(play())


def test_hold_the_input_of_the_request_with_the_first_slice() -> None:
    """A first slice of output stands behind all the input that the request shows; further ones are output alone."""
    seen: list[int] = []

    @billable(per_token(input=1, output=1), hold=slices(TokenUsage(output=5)))
    async def endpoint(request: Any) -> Response:
        call = current_call()
        seen.append(call.held // CREDIT)
        call.record(TokenUsage(input=seen[0] - 5, output=4))
        await within(10, lambda: call.held // CREDIT > seen[0])
        seen.append(call.held // CREDIT)
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            sent = json.dumps({"messages": [{"role": "user", "content": "word " * 40}], "max_tokens": 900}).encode()
            await stage.drive(method="POST", headers=[("content-type", "application/json")], body=sent)
            first, second = seen
            assert first > 40
            assert second == first + 5

    asyncio.run(play())


def test_ask_the_store_once_at_a_time() -> None:
    """However often usage is reported while a growth is on its way, the store has one; then one for all of it."""

    async def play() -> None:
        store = StuckAt(Grow)
        async with opened(store=store) as metering, growing(metering, slices(10)) as call:
            for _ in range(8):
                call.record(TokenUsage(output=1))
            await asyncio.wait_for(store.asked.wait(), 10)
            for _ in range(20):
                call.record(TokenUsage(output=1))
                await asyncio.sleep(0)
            assert call.held // CREDIT == 10
            store.answer.set()
            await looked(call)
            assert call.held // CREDIT == 38

    asyncio.run(play())


def test_look_when_an_upstream_has_answered() -> None:
    """An upstream exchange that ends is looked at at once; what it reported counts."""
    usage = {"prompt_tokens": 0, "completion_tokens": 9, "total_tokens": 9}
    answer = {"object": "chat.completion", "model": "m", "choices": [], "usage": usage}

    async def play() -> None:
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, json=answer))
        async with (
            opened() as metering,
            metering.upstream_client("openai", wrap=transport) as client,
            growing(metering, slices(10)) as call,
        ):
            await client.get("http://provider/")
            await within(10, lambda: call.held // CREDIT == 20)

    asyncio.run(play())


def test_look_at_what_an_upstream_writes() -> None:
    """Outside HTTP what an upstream has written so far counts before it reports anything."""

    async def chunks() -> AsyncIterator[bytes]:
        yield delta(" word" * 9)
        await asyncio.sleep(60)

    async def play() -> None:
        fields = {"content-type": "text/event-stream"}
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, headers=fields, content=chunks()))
        async with (
            opened() as metering,
            metering.upstream_client("openai", wrap=transport) as client,
            growing(metering, slices(10)) as call,
            client.stream("GET", "http://provider/") as answer,
        ):
            await anext(answer.aiter_bytes())
            await within(10, lambda: call.held // CREDIT == 20)

    asyncio.run(play())


SERVED = per_token(output=1, services={"openai/priority": 3, "acme/priority": 1, "flex": "0.5"})


@pytest.mark.parametrize(
    ("asked", "told", "provider", "seen"),
    [
        ("priority", None, "openai", 27),
        ("priority", "auto", "openai", 27),
        ("priority", "default", "openai", 9),
        ("priority", None, "acme", 9),
        ("flex", None, "openai", 9),
        (None, None, "openai", 9),
    ],
)
def test_observe_at_the_tier_that_was_asked_for_until_one_is_told(
    asked: str | None, told: str | None, provider: str, seen: int
) -> None:
    """
    Until an answer tells its service tier what it wrote counts as served by the one that was asked for, if dearer.

    So a hold in slices grows as it will be charged, and so does a heartbeat tell it; a slice is so many tokens (DESIGN
    "A hold's size").
    """
    looked_at: list[tuple[int, int]] = []
    going = asyncio.Event()

    async def chunks() -> AsyncIterator[bytes]:
        chunk = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": " word" * 9}}]}
        yield b"data: " + json.dumps({**chunk, "service_tier": told}).encode() + b"\n\n"
        await going.wait()

    @billable(SERVED, hold=slices(TokenUsage(input=0, output=10), low_water=TokenUsage(output=2)))
    async def endpoint(request: Any) -> Response:
        call = current_call()
        fields = {"content-type": "text/event-stream"}
        transport = httpx2.MockTransport(lambda _: httpx2.Response(200, headers=fields, content=chunks()))
        async with (
            call.metering.upstream_client(provider, wrap=transport) as client,
            client.stream("GET", "http://provider/") as answer,
        ):
            parts = answer.aiter_bytes()
            await anext(parts)
            growth = call.growth
            assert growth is not None
            first = call.held // CREDIT
            growth.nudge()
            await within(10, lambda: growth.used > 0 and growth._look is None)
            assert await observed_parts(call) == growth.used
            # Where ten tokens were held for nine of them are used, whatever they cost: ten more were asked for.
            if first == seen // 9 * 10:
                assert call.held == 2 * first * CREDIT
            looked_at.append((first, growth.used // CREDIT))
            going.set()
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            sent = json.dumps({"messages": [{"role": "user", "content": "hi"}], "service_tier": asked}).encode()
            await stage.drive(method="POST", headers=[("content-type", "application/json")], body=sent)
            # The hold knows no provider yet, and is as large as the dearest one needs it.
            assert looked_at == [(30 if asked == "priority" else 10, seen)]

    asyncio.run(play())


def test_record_from_a_thread() -> None:
    """Code without an event loop grows its hold as well, and is told in its own thread when it cannot."""
    metering = Metering(sinks=())

    def work() -> None:
        with metering.charge_sync(payer="ann", line="job", price=PRICE, hold=slices(10)) as call:
            for _ in range(10_000):
                call.record(TokenUsage(output=1))
                metering.portal().call(asyncio.sleep, 0)

    try:
        metering.portal().call(metering.grant, "ann", 30, id="g")
        with pytest.raises(CallCut) as cut:
            work()
        receipt = cut.value.call.receipt
        assert receipt is not None
        assert str(receipt.basis) == "observed"
        assert 30 <= receipt.amount // CREDIT < 60
    finally:
        metering.close()


# -- where it cannot ---------------------------------------------------------------------------------------


def test_use_up_what_there_is_before_the_cut() -> None:
    """A hold takes what is left although it is less than a step; the call is cut when that is used, at a report."""

    async def play() -> None:
        async def work(metering: Metering) -> None:
            async with growing(metering, slices(10)) as call:
                await used(call, 8)
                await used(call, 10)
                assert (call.held // CREDIT, call.lack) == (25, None)
                await used(call, 6)
                assert call.lack is None
                await used(call, 3)
                call.record(TokenUsage(output=1))

        async with opened(25) as metering:
            with pytest.raises(CallCut, match="has used up the 25 credits that could be held") as cut:
                await work(metering)
            call = cut.value.call
            assert call.receipt is not None
            assert (call.receipt.amount // CREDIT, str(call.receipt.basis)) == (28, "observed")
            assert await books(metering) == (28, 0, 3)
            assert metering.meters.totals("cuts") == {(("metering.line", "job"),): 1}

    asyncio.run(play())


@pytest.mark.parametrize(("on_cut", "charged"), [("observed", 1_100), ("hold", 1_000)])
def test_charge_a_cut_as_the_route_says(on_cut: Any, charged: int) -> None:
    """What a cut call is charged is the route's choice: what was observed, or all that was held."""

    @billable(per_token(output=100), hold=slices(TokenUsage(output=4)), on_cut=on_cut)
    async def endpoint(request: Any) -> Response:
        call = current_call()
        for _ in range(11):
            call.record(TokenUsage(output=1))
            await within(10, lambda: call.growth is not None and call.growth._look is None)
        raise AssertionError("It was not cut.")

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            (charge,) = await stage.charges()
            assert (charge.amount // CREDIT, str(charge.basis)) == (charged, on_cut)
            assert await stage.outcomes() == ["cut"]

    asyncio.run(play())


def test_charge_what_a_cut_block_held() -> None:
    """The choice of what a cut costs exists outside HTTP as well."""

    async def work(metering: Metering) -> None:
        async with growing(metering, slices(10), on_cut="hold") as call:
            await used(call, 15)
            call.record(TokenUsage(output=0))

    async def play() -> None:
        async with opened(12) as metering:
            with pytest.raises(CallCut):
                await work(metering)
            assert await books(metering) == (12, 0, 0)

    asyncio.run(play())


def test_let_a_block_complete_that_asks_no_more() -> None:
    """Outside HTTP a block that has come to its end when its hold is used up has completed, and is charged in full."""

    async def play() -> None:
        async with opened(10) as metering:
            async with growing(metering, slices(10)) as call:
                await used(call, 15)
                assert call.lack is not None
            assert call.receipt is not None
            assert (call.receipt.amount // CREDIT, str(call.receipt.basis)) == (15, "usage")

    asyncio.run(play())


def test_go_on_once_somebody_pays() -> None:
    """Credits that come while the hold still lasts let the call run on."""

    async def play() -> None:
        async with opened(10) as metering, growing(metering, slices(10)) as call:
            await used(call, 8)
            assert call.growth is not None
            assert call.growth.refusal is not None
            await metering.grant("ann", 90, id="more")
            await used(call, 1)
            assert (call.growth.refusal, call.held // CREDIT) == (None, 20)

    asyncio.run(play())


def test_wait_for_no_hold_of_its_own() -> None:
    """Where only the call itself holds anything no wait helps; where another call holds something, it may."""

    async def refusal(others: int) -> Any:
        async with (
            opened(20 + others) as metering,
            growing(metering, others or "0"),
            growing(metering, slices(20)) as call,
        ):
            await used(call, 19)
            assert call.growth is not None
            return call.growth.refusal

    alone, beside = asyncio.run(refusal(0)), asyncio.run(refusal(5))
    assert (alone.transient, alone.held, beside.held) == (False, 0, 5 * CREDIT)
    assert (beside.transient, beside.required) == (True, 20 * CREDIT)


# -- debt --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overdraft", "debt", "most"), [(0, 7, 7), (3, 0, 3), (3, 4, 7)])
def test_owe_no_more_than_the_bound(overdraft: int, debt: int, most: int) -> None:
    """With a debt calls go on beyond what there is, and are cut at the bound, which is of the wallet, not of each."""
    options: dict[str, Any] = {"hold": slices(5, debt=debt), "sources": [Wallet(overdraft=overdraft)]}

    async def work(metering: Metering) -> None:
        async with growing(metering, **options) as second:
            for _ in range(5 + most):
                await used(second, 1)
            second.record(TokenUsage(output=0))

    async def play() -> None:
        async with opened(10) as metering:
            async with growing(metering, **options) as first:
                with pytest.raises(CallCut):
                    await work(metering)
                assert first.held // CREDIT == 5
            assert await books(metering) == (5 + most, 0, max(0, most - 5))

    asyncio.run(play())


def test_admit_nobody_on_debt() -> None:
    """The debt of slices is for calls that run; who has nothing is not admitted by it."""

    async def play() -> None:
        async with opened(4) as metering:
            with pytest.raises(Exception, match="insufficient_credits"):
                async with growing(metering, slices(5, debt=50)):
                    raise AssertionError("It ran.")

    asyncio.run(play())


# -- sources -----------------------------------------------------------------------------------------------


def test_stay_with_the_payer_that_admitted_the_call() -> None:
    """Growth asks the other sources of the same payer, never another payer's (S0.23)."""
    first, second = Payer("first", account="first"), Payer("second", account="second")
    sources = [Allowance(6, payer=first), Wallet(payer=first), Wallet(payer=second)]

    async def play() -> None:
        async def work(metering: Metering) -> None:
            async with growing(metering, slices(5), sources=sources) as call:
                for _ in range(11):
                    await used(call, 1)

        async with opened(0) as metering:
            await metering.grant("first", 4, id="1")
            await metering.grant("second", 100, id="2")
            with pytest.raises(CallCut) as cut:
                await work(metering)
            call = cut.value.call
            assert (await metering.balance("second")).available == 100 * CREDIT
            assert call.receipt is not None
            assert call.receipt.held // CREDIT == 10
            assert [part.amount // CREDIT for part in call.receipt.parts] == [6, 4, 1]

    asyncio.run(play())


def test_grow_over_midnight() -> None:
    """A growth after the day of the admission's allowance is over finds the new day's, once around the store's time."""

    async def play() -> None:
        clock = FakeClock()
        options: dict[str, Any] = {"sources": [Allowance(6)], "ttl_s": 86_400.0}
        async with (
            opened(0, MemoryStore(clock)) as metering,
            growing(metering, slices(5, low_water=2), **options) as call,
        ):
            clock.advance(86_399)
            await used(call, 4)
            assert call.held // CREDIT == 10

    asyncio.run(play())


# -- what else may happen ----------------------------------------------------------------------------------


def test_cut_nobody_for_a_store_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    """A store that gives no answer cuts nobody: the call runs on, asks again, and is charged in full."""

    async def play() -> None:
        store = Asked()
        async with opened(store=store) as metering:
            async with growing(metering, slices(10)) as call:
                store.down = True
                await used(call, 30)
                assert (call.held // CREDIT, call.lack) == (10, None)
                store.down = False
                await used(call, 1)
                assert call.held // CREDIT == 41
            assert await books(metering) == (31, 0, 0)
            assert metering.meters.totals("store_failures") != {}

    with caplog.at_level(logging.WARNING):
        asyncio.run(play())
    assert "did not grow; it is asked again" in caplog.text


def test_tell_of_growths_that_fail_as_one_alarm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the store is down, or cannot count a unit, every look of every call fails: that is told seldom."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)
    failures = [StoreUnavailableError("down"), ConfigurationError("another scale")]

    async def play() -> None:
        async with opened() as metering:
            asked = [0]

            async def grow(_: Grow) -> Any:
                asked[0] += 1
                raise failures[asked[0] % 2]

            monkeypatch.setattr(metering, "grow", grow)
            async with growing(metering, slices(2)) as call:
                call.record(TokenUsage(output=3))
                await within(10, lambda: asked[0] > 10)
                assert call.lack is None
            assert await books(metering) == (3, 0, 0)

    asyncio.run(play())
    assert [record.message.partition(";")[0].partition(" of ")[0] for record in caplog.records] == ["The hold"] * 2
    assert "so that nothing cuts it" in caplog.text


def test_grow_no_hold_that_has_ended() -> None:
    """A call whose hold somebody ended while it runs is neither cut nor asked for again."""

    async def play() -> None:
        store = Asked()
        async with opened(10, store) as metering, growing(metering, slices(10)) as call:
            await metering.resolve(call.id)
            await used(call, 30)
            call.record(TokenUsage(output=1))
            await asyncio.sleep(0)
            assert (len(store.growths), call.lack) == (1, None)

    asyncio.run(play())


class Capricious:
    """A price that raises once enough was used."""

    def cost(self, usage: TokenUsage) -> Decimal:
        """A credit a token, up to nine."""
        if (usage.output or 0) > 9:
            raise RuntimeError("no price")
        return Decimal(usage.output or 0)

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """Nothing."""
        return 0


def test_keep_a_hold_whose_use_cannot_be_priced(caplog: pytest.LogCaptureFixture) -> None:
    """A price that raises at a look costs the call its growth, with an alarm, and nothing else."""

    async def play() -> None:
        async with opened() as metering, growing(metering, slices(20), price=Capricious()) as call:
            call.record(TokenUsage(output=15))
            await within(10, lambda: "cannot be told, so that its hold does not grow" in caplog.text)
            assert call.held // CREDIT == 20

    asyncio.run(play())


def test_grow_nothing_that_is_free() -> None:
    """A turn that is not charged, and a call that nobody enforces, hold nothing that could grow."""

    @billable(PRICE, hold=slices(5), skip_if=lambda: True)
    async def endpoint(request: Any) -> Response:
        assert current_call().growth is None
        return JSONResponse({})

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            assert body((await stage.drive()).log) == b"{}"
        async with staged(starlette(endpoint), store=Down(), on_store_down={"credits": "allow"}) as stage:
            assert body((await stage.drive()).log) == b"{}"

    asyncio.run(play())


class Down(MemoryStore):
    """A store that admits nobody."""

    def run_now(self, operation: Operation) -> Answer:
        if type(operation).__name__ == "Admit":
            raise StoreUnavailableError("The store is down.")
        return super().run_now(operation)


def test_charge_what_was_observed_where_no_usage_came() -> None:
    """A first slice is no estimate of the whole: without reported usage what was observed is charged."""

    async def words() -> AsyncIterator[bytes]:
        yield delta(" word" * 3)
        yield b"data: [DONE]\n\n"

    @billable(PRICE, hold=slices(50))
    async def endpoint(request: Any) -> Response:
        return sse(words())

    async def play() -> None:
        async with staged(starlette(endpoint)) as stage:
            await stage.drive()
            (charge,) = await stage.charges()
            assert (charge.amount // CREDIT, str(charge.basis)) == (3, "estimate")

    asyncio.run(play())


# -- the pace of an answer ---------------------------------------------------------------------------------


def test_wait_for_the_store_only_as_long_as_for_an_admission() -> None:
    """An answer that outruns its hold waits for a slow store, bounded, and goes on."""

    async def words() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield delta(" word" * 60)

    @billable(PRICE, hold=slices(5))
    async def endpoint(request: Any) -> Response:
        return sse(words())

    async def play() -> None:
        store = StuckAt(Grow)
        async with staged(starlette(endpoint), store=store, store_timeout_s=0.01) as stage:
            async with Drive(stage.app, http_scope()) as run:
                assert await run.ended() == "returned"
                assert len(run.delivered) == 22
                store.answer.set()
                await stage.booked()
            assert await stage.basis() == ("estimate",)

    asyncio.run(play())


def test_wait_once_for_a_store_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that has waited in vain for a growth does not wait for the same one again at each of its chunks."""
    waits = []
    wait = asyncio.wait

    async def counted(tasks: Any, **options: Any) -> Any:
        waits.append(tasks)
        return await wait(tasks, **options)

    async def words() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield delta(" word" * 60)

    @billable(PRICE, hold=slices(5))
    async def endpoint(request: Any) -> Response:
        return sse(words())

    async def play() -> None:
        store = StuckAt(Grow)
        async with staged(starlette(endpoint), store=store, store_timeout_s=0.01) as stage:
            monkeypatch.setattr("asgi_metering.growing.asyncio.wait", counted)
            async with Drive(stage.app, http_scope()) as run:
                assert await run.ended() == "returned"
                store.answer.set()
            assert len([tasks for tasks in waits if "growth" in str(tasks)]) == 1
            await stage.booked()

    asyncio.run(play())


def test_look_less_often_at_what_costs_nothing() -> None:
    """Bytes that cost nothing have ever more room, up to a bound; bytes that use up the hold have the least."""

    async def play() -> None:
        async with opened() as metering, growing(metering, slices(50)) as call:
            growth = call.growth
            assert growth is not None
            rooms = [await growth.pace(LEAST_ROOM) for _ in range(12)]
            assert rooms[0] == 2 * LEAST_ROOM
            assert rooms == sorted(rooms)
            assert rooms[-1] == MOST_ROOM < CHECKPOINT_BYTES
            call.record(TokenUsage(output=20))
            room = await growth.pace(rooms[-1])
            call.record(TokenUsage(output=75))
            assert LEAST_ROOM == await growth.pace(100) < room

    asyncio.run(play())


def test_count_only_what_is_new_of_a_text() -> None:
    """A text that grows is counted piece by piece, and anew where it became shorter."""

    async def play() -> None:
        counts, reader = TextCounts(), UsageReader("text/event-stream")
        grown = [(await counts.count(reader, " word" * number)).tokens for number in (0, 1, 5, 5, 9)]
        assert grown == [0, 1, 5, 5, 9]
        assert (await counts.count(reader, " word" * 3)).tokens == 3
        assert (await counts.count(UsageReader(), " word")).tokens == 1

    asyncio.run(play())


# -- misuse ------------------------------------------------------------------------------------------------

MISUSE: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: slices(None), "slices(None) says nothing of the first slice. Write slices('0.01'), say."),  # type: ignore[arg-type]
    "negative": (lambda: slices(-1), "first slice"),
    "float": (lambda: slices(0.5), "first slice"),  # type: ignore[arg-type]
    "step": (lambda: slices(1, step="x"), "step"),
    "mark": (lambda: slices(1, low_water=-1), "low-water mark"),
    "debt": (lambda: slices(1, debt=-1), "debt"),
    "by-position": (lambda: slices(lambda body, /: 1), "by position"),
    "zero": (lambda: billable(PRICE, hold=slices(0)), "slices(first=0) holds nothing by the price"),
    "zero-step": (lambda: billable(PRICE, hold=slices(1, step="0")), "slices(step='0') holds nothing by the price"),
    "free": (lambda: billable(PRICE, hold=slices(TokenUsage(input=9))), "holds nothing by the price"),
    "high-water": (lambda: billable(PRICE, hold=slices(5, low_water=5)), "slices(low_water=5) is no less than first=5"),
    "high-water-step": (
        lambda: billable(PRICE, hold=slices(9, step=TokenUsage(output=2), low_water="2")),
        "is no less than step=TokenUsage(",
    ),
    "no-wallet": (
        lambda: billable(PRICE, hold=slices(5, debt=1), sources=[Allowance(9)]),
        "slices(debt=1) can be owed by no wallet: none is among the sources.",
    ),
    "fixed": (lambda: billable(2, hold=slices(1)), "A fixed price holds itself."),
}


@pytest.mark.parametrize("name", MISUSE)
def test_refuse_slices_that_cannot_work(name: str) -> None:
    """DESIGN 2: slices that could never grow, or would have to at once, fail where they are written."""
    make, sentence = MISUSE[name]
    with pytest.raises(ValueError) as refused:  # noqa: PT011 -- both kinds of mistake
        make()
    assert sentence in str(refused.value)


@pytest.mark.parametrize("mistake", [{"step": "0.5"}, {"low_water": "0.5"}, {"debt": "0.5"}])
def test_refuse_slices_finer_than_the_unit(mistake: Any) -> None:
    """An amount that the unit cannot count is refused where the unit is named."""
    from asgi_metering import Unit

    with pytest.raises(ValueError, match="messages"):
        billable(PRICE, hold=slices(5, **mistake), unit=Unit("messages", scale=0))
