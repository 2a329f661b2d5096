"""`requires_upstream`: what a provider has left decides before the provider does, in process, and takes nothing."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from asgi_metering import (
    Caller,
    CallRefused,
    Idempotency,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    TokenUsage,
    billable,
    current_call,
    metered_app,
    rate_limited,
    requires_upstream,
)
from asgi_metering.asgi.audit import audit
from asgi_metering.decisions import Reason
from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.headroom import Need
from asgi_metering.rules.operations import Admit, Preview
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock, store_down
from asgi_metering.testing.conformance import tables
from tests.harness.drive import Drive, body, headers, status
from tests.outage.gated import Gated, call, identify, metered, settled, used
from tests.pitfalls.scene import Books
from tests.pitfalls.stage import within
from tests.quotas import refusals

pytestmark = pytest.mark.uncounted

RESET_S = 30


def tell(metering: Metering, *, label: str | None = None, wait: int = RESET_S, **remaining: int) -> None:
    """A provider's answer that came just now."""
    fields = [(f"x-ratelimit-remaining-{name}", str(left)) for name, left in remaining.items()]
    fields += [(f"x-ratelimit-reset-{name}", f"{wait}s") for name in remaining]
    encoded = [(name.encode(), value.encode()) for name, value in fields]
    metering.quotas.record("openai", encoded, 200, label=label)


def problem(ended: Drive) -> dict[str, Any]:
    """What a refusal says."""
    found: dict[str, Any] = json.loads(body(ended.log))
    return found


def house(store: Any = "memory://", **options: Any) -> Metering:
    """A metering that knows who asks."""
    return Metering(store, identify=identify, sinks=(), **options)


def test_answer_before_the_provider_would() -> None:
    """503 with the provider's own reset, while nothing is left there; the store is not asked, and nobody charged."""

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            await metering.grant("ann", 9, id="g")
            app = metered(metering, requires_upstream("openai"), rate_limited("9/minute", concurrency=2), billable(2))
            assert status((await call(app)).log) == 200
            asked = len(books.asked)
            tell(metering, requests=0)
            ended = await call(app)
            assert status(ended.log) == 503
            told = problem(ended)
            assert told["code"] == "upstream_headroom"
            assert dict(headers(ended.log))["retry-after"] == str(RESET_S) == str(told["retry_after"])
            # How much the operator has, and of whom, is nobody's business (X.9).
            assert "openai" not in str(told)
            assert len(books.asked) == asked
            assert [dict(key)["metering.refusal.reason"] for key in metering.meters.totals("refusals")] == [
                "upstream_headroom"
            ]
            tell(metering, requests=1)
            assert status((await call(app)).log) == 200

    asyncio.run(play())


def test_count_what_this_process_has_let_in() -> None:
    """With two requests left, of four calls at once two are let in; when those are over two more are."""

    async def play() -> None:
        leave, inside = asyncio.Event(), 0

        async def work() -> None:
            nonlocal inside
            inside += 1
            await leave.wait()

        async with house() as metering:
            app = metered(metering, requires_upstream("openai"), work=work)
            tell(metering, requests=2)
            running = [asyncio.create_task(call(app)) for _ in range(4)]
            await within(10, lambda: inside == 2 and sum(each.done() for each in running) == 2)
            assert metering.headroom.running("openai") == Need(2)
            leave.set()
            ended = [status((await each).log) for each in running]
            assert sorted(ended) == [200, 200, 503, 503]
            await within(10, lambda: metering.headroom.running("openai") == Need(0))
            assert status((await call(app)).log) == 200

    asyncio.run(play())


def test_correct_by_the_answer_of_the_provider() -> None:
    """Once the provider has answered a call, what it says is what is left, although the call still runs."""

    async def play() -> None:
        leave = asyncio.Event()
        left = iter([5, 4])

        def answer(_: httpx2.Request) -> httpx2.Response:
            fields = {"x-ratelimit-remaining-requests": str(next(left)), "x-ratelimit-reset-requests": "30s"}
            return httpx2.Response(200, headers=fields, json={})

        async with (
            house() as metering,
            metering.upstream_client("openai", wrap=httpx2.MockTransport(answer)) as client,
        ):
            seen = []

            async def work() -> None:
                seen.append(metering.headroom.running("openai").requests)
                # Also from work that is charged inside of the call.
                async with metering.charge(payer="ann", line="inner", price=0):
                    await client.get("http://provider/")
                seen.append(metering.headroom.running("openai").requests)
                await client.get("http://provider/")
                seen.append(metering.headroom.running("openai").requests)

            app = metered(metering, requires_upstream("openai", requests=2, tokens=100), work=work)
            assert status((await call(app)).log) == 200
            assert seen == [2, 1, 0]
            leave.set()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("tokens", "left", "fits"),
    [
        (500, 500, True),
        (501, 500, False),
        (TokenUsage(input=400, output=101), 500, False),
        (lambda call: 10 * len(call.id), 10_000, True),
        (lambda: None, 1, True),
        (None, 0, False),
        ("estimate", 50, False),
    ],
)
def test_know_how_many_tokens_a_call_takes(tokens: Any, left: int, fits: bool) -> None:
    """Tokens are a number, kinds apart, a function's answer or the estimate of the request itself."""

    async def play() -> None:
        async with house() as metering:
            tell(metering, tokens=left)
            ended = await call(metered(metering, requires_upstream("openai", tokens=tokens)))
            assert status(ended.log) == (200 if fits else 503)

    asyncio.run(play())


def test_estimate_from_the_request_as_a_hold_does() -> None:
    """``tokens="estimate"`` is what the route's own hold would be sized by."""

    async def play() -> None:
        async with house() as metering:
            await metering.grant("ann", 100, id="g")
            from asgi_metering.prices import per_token

            price = billable(per_token(output="0.01"), hold=TokenUsage(input=10, output=90))
            app = metered(metering, requires_upstream("openai", tokens="estimate"), price)
            for left, answer in ((99, 503), (100, 200)):
                tell(metering, tokens=left)
                assert status((await call(app)).log) == answer

    asyncio.run(play())


def test_keep_keys_of_one_provider_apart() -> None:
    """A label, given or computed, is that of the client, as readings keep it."""

    async def play() -> None:
        fields = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "30s"}
        transport = httpx2.MockTransport(lambda _: httpx2.Response(429, headers=fields))
        async with (
            house() as metering,
            metering.upstream_client("openai", wrap=transport, label="eu") as client,
        ):
            await client.get("http://provider/")
            for label, answer in (("eu", 503), (lambda: "eu", 503), ("us", 200), (None, 200)):
                ended = await call(metered(metering, requires_upstream("openai", label=label)))
                assert status(ended.log) == answer

    asyncio.run(play())


DAY_IS_SPENT = refusals.GOOGLE_DAY
"""Gemini's: nothing is left of the day of the one model ``gemini-2.5-flash``."""


@pytest.mark.parametrize(
    ("model", "answer"),
    [
        ("gemini-2.5-flash", 503),
        ("models/Gemini-2.5-Flash", 503),
        ("gemini-2.5-pro", 200),
        (["gemini-2.5-pro", "gemini-2.5-flash"], 503),
        (lambda: "gemini-2.5-pro", 200),
        (lambda: "gemini-2.5-flash", 503),
        (lambda: None, 503),
        (lambda: "", 503),
        (None, 503),
        ("no name at all", 200),
    ],
)
def test_keep_models_of_one_key_apart(model: Any, answer: int) -> None:
    """What a refusal told of one model refuses calls of that model, and calls that name none, and no others (S1.45)."""

    async def play() -> None:
        transport = httpx2.MockTransport(lambda _: httpx2.Response(429, content=DAY_IS_SPENT))
        async with house() as metering, metering.upstream_client("google", wrap=transport) as client:
            await client.get("http://provider/")
            ended = await call(metered(metering, requires_upstream("google", model=model)))
            assert status(ended.log) == answer
            if answer == 503:
                assert int(dict(headers(ended.log))["retry-after"]) > RESET_S

    asyncio.run(play())


def test_refuse_every_model_where_the_key_has_nothing_left() -> None:
    """What was told of no model in particular refuses calls of all of them, whatever is told of one of them."""

    async def play() -> None:
        async with house() as metering:
            tell(metering, requests=0)
            metering.quotas.record("openai", (), 429, body=DAY_IS_SPENT)
            for model in ("gemini-2.5-flash", "gemini-2.5-pro", None):
                ended = await call(metered(metering, requires_upstream("openai", model=model)))
                assert status(ended.log) == 503

    asyncio.run(play())


def test_tell_operators_how_to_let_other_models_pass() -> None:
    """Who is refused for a model and names none is told in the refusal, not in the answer, how to name one (X.9)."""

    async def play() -> None:
        async with house() as metering:
            metering.quotas.record("google", (), 429, body=DAY_IS_SPENT)
            for model, mend in ((None, True), ("gemini-2.5-flash", False)):
                with pytest.raises(CallRefused) as refused:
                    async with metering.charge(
                        payer="ann", line="l", price=0, requires=requires_upstream("google", model=model)
                    ):
                        pass
                told = refused.value.refusal.detail
                assert "'gemini-2.5-flash'" in told
                assert ("requires_upstream(model=)" in told) is mend

    asyncio.run(play())


def test_require_several_providers() -> None:
    """All of them must have room; what was reserved of the first is free again when the second has none."""

    async def play() -> None:
        async with house() as metering:
            app = metered(metering, requires_upstream("anthropic"), requires_upstream("openai"))
            tell(metering, requests=0)
            assert status((await call(app)).log) == 503
            assert metering.headroom.running("anthropic") == Need(0)

    asyncio.run(play())


@pytest.mark.parametrize("how", ["refused", "down", "cancelled"])
def test_reserve_nothing_for_a_call_that_is_not_let_in(how: str) -> None:
    """A refusal of the store, its outage, and a request that is cancelled meanwhile free what was reserved."""

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=0.05 if how == "down" else 5) as metering:
            app = metered(metering, requires_upstream("openai"), billable(2 if how != "refused" else 1_000))
            store.down, store.silent = how == "down", how == "cancelled"
            running = asyncio.create_task(call(app))
            if how == "cancelled":
                await within(10, lambda: metering.headroom.running("openai") == Need(1))
                running.cancel()
            await asyncio.wait([running])
            assert metering.headroom.running("openai") == Need(0)

    asyncio.run(play())


def test_let_repeats_of_a_request_through() -> None:
    """What is known of an idempotency key comes first: a repeat gets its answer, and needs nothing of a provider."""

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            await metering.grant("ann", 9, id="g")
            app = metered(metering, requires_upstream("openai"), billable(2, idempotency=Idempotency(store_body=99)))
            first = await call(app, idempotency_key="a")
            assert status(first.log) == 200
            tell(metering, requests=0)
            again = await call(app, idempotency_key="a")
            assert (status(again.log), body(again.log)) == (200, b"done")
            assert status((await call(app, idempotency_key="b")).log) == 503
            assert status((await call(app)).log) == 503
            # Neither was claimed, nor charged.
            assert [type(each) for each in books.asked if isinstance(each, Preview | Admit)] == [
                Admit,
                Preview,
                Preview,
            ]
            tell(metering, requests=9)
            assert status((await call(app, idempotency_key="b")).log) == 200

    asyncio.run(play())


def test_refuse_although_the_store_is_down() -> None:
    """It needs no store: with one that is down the answer is the provider's reset, also of a request with a key."""

    async def play() -> None:
        store = store_down("memory://")
        async with house(store, store_timeout_s=0.05) as metering:
            await metering.grant("ann", 9, id="g")
            tell(metering, requests=0)
            with store.down("refuse"):
                for part in (billable(2), billable(2, idempotency=True)):
                    ended = await call(metered(metering, requires_upstream("openai"), part), idempotency_key="a")
                    assert problem(ended)["code"] == "upstream_headroom"

    asyncio.run(play())


def test_require_it_of_work_outside_http() -> None:
    """`metering.charge(requires=...)` refuses alike, and frees what it reserved when the work is over."""

    async def play() -> None:
        async with house() as metering:
            await metering.grant("ann", 9, id="g")
            wanted = requires_upstream("openai", tokens=lambda call: 7 if call.payer == "ann" else 0)

            def charge(**options: Any) -> Any:
                return metering.charge(payer="ann", line="job", price=1, **options)

            async with charge(requires=wanted):
                assert metering.headroom.running("openai") == Need(1, tokens=7)
            assert metering.headroom.running("openai") == Need(0)
            tell(metering, tokens=6)
            for requires in (wanted, [wanted]):
                with pytest.raises(CallRefused) as refused:
                    async with charge(requires=requires):
                        pass
                assert refused.value.refusal.reason is Reason.UPSTREAM
            for nothing in ("openai", [billable(1)]):
                with pytest.raises(ConfigurationError, match="nothing to require"):
                    async with charge(requires=nothing):
                        pass
            assert await settled(metering) == (1_000_000, 0)

    asyncio.run(play())


def test_tell_a_lack_in_the_shadow() -> None:
    """With shadow=True the call runs and is counted as running; what would have been refused is told (S4.16)."""

    async def play() -> None:
        async with house() as metering:
            tell(metering, requests=0)
            seen: list[Any] = []

            async def work() -> None:
                seen.append((current_call().would_deny, metering.headroom.running("openai").requests))

            shadow = requires_upstream("openai", shadow=True)
            app = metered(metering, shadow, rate_limited("1/minute", scope="s", shadow=True), work=work)
            assert status((await call(app)).log) == 200
            ((refusal, running),) = seen
            assert (refusal.reason, running) == (Reason.UPSTREAM, 1)
            tell(metering, requests=1)
            assert status((await call(metered(metering, shadow))).log) == 200
            assert sum(metering.meters.totals("shadow_admitted").values()) == 1
            denied = metering.meters.totals("shadow_denied")
            assert [dict(key)["metering.refusal.reason"] for key in denied] == ["upstream_headroom"]

    asyncio.run(play())


def test_enforce_it_in_the_layer_that_captures_quotas() -> None:
    """Without that layer a route that requires an upstream fails, unless it may run unenforced."""

    async def play() -> None:
        async with house() as metering:
            tell(metering, requests=0)

            async def app(_scope: Any, _receive: Any, send: Any) -> None:
                await current_call().admit(requires_upstream("openai"), rate_limited("9/minute"))
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"done"})

            ended = await call(RateLimitMiddleware(app, metering))
            assert isinstance(ended.exception, ConfigurationError)
            assert "no layer captures quotas" in str(ended.exception)
            assert status((await call(RateLimitMiddleware(app, metering, unenforced="allow"))).log) == 200
            assert status((await call(MeteringMiddleware(app, metering))).log) == 503
            # Where routes can be seen it is found before the first request.
            found = audit(metered_app(app, requires_upstream("openai")), frozenset({"rates"}), frozenset())
            assert ["no layer captures quotas" in told for told in found.errors] == [True]

    asyncio.run(play())


@pytest.mark.parametrize(
    "make",
    [
        lambda: requires_upstream(lambda: None),  # type: ignore[arg-type]
        lambda: requires_upstream("no name"),
        lambda: requires_upstream("openai", label="not a label"),
        lambda: requires_upstream("openai", requests=0),
        lambda: requires_upstream("openai", tokens=-1),
        lambda: requires_upstream("openai", tokens="some"),  # type: ignore[arg-type]
        lambda: requires_upstream("openai", model=""),
        lambda: requires_upstream("openai", model=["a", 7]),  # type: ignore[list-item]
        lambda: requires_upstream("openai", model={"a": 1}),  # type: ignore[arg-type]
        lambda: requires_upstream("openai", errors="xml"),  # type: ignore[arg-type]
        lambda: metered_app(lambda: None, requires_upstream("openai"), requires_upstream("openai")),  # type: ignore[arg-type]
        lambda: Metering(sinks=()).upstream_client("openai", label="not a label"),
    ],
)
def test_refuse_arguments_that_cannot_work(make: Callable[[], object]) -> None:
    """What cannot work is refused at import, and says what can."""
    with pytest.raises(ConfigurationError):
        make()


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens": lambda: 1.5},
        {"tokens": lambda: -1},
        {"label": lambda: "no label"},
        {"model": lambda: 5},
        {"model": lambda: [""]},
    ],
)
def test_refuse_what_a_function_must_not_answer(wrong: dict[str, Any]) -> None:
    """Tokens that are no number, and a label or a model that is no name, raise on that request; nothing is reserved."""

    async def play() -> None:
        async with house() as metering:
            with pytest.raises(ConfigurationError):
                async with metering.charge(
                    payer="ann", line="l", price=0, requires=requires_upstream("openai", **wrong)
                ):
                    pass
            assert metering.headroom.running("openai") == Need(0)

    asyncio.run(play())


ORDER = ("stranger", "key", "upstream", "slots", "rate", "credits")
"""What refuses a call in these tests, in the order of the documentation."""

ANSWERS = {
    "stranger": (401, "unauthenticated", None),
    "key": (409, "in_flight", (1, 5)),
    "upstream": (503, "upstream_headroom", (RESET_S, RESET_S)),
    "slots": (429, "concurrency", (1, 5)),
    "rate": (429, "rate_limit", (60, 60)),
    "credits": (402, "insufficient_credits", None),
}
"""Status, code, and the least and most seconds of ``Retry-After``: exact where they can be known, else drawn."""


@pytest.mark.parametrize("pair", list(itertools.combinations(ORDER, 2)), ids="+".join)
def test_report_the_first_of_any_two_reasons(pair: tuple[str, str]) -> None:
    """DESIGN "Admission": of two reasons that hold at once the first is answered, and nothing is consumed anywhere."""

    def who(connection: Any) -> Caller | None:
        return None if "stranger" in connection.headers else identify(connection)

    async def play() -> None:
        leave, clock = asyncio.Event(), FakeClock()
        async with Metering(MemoryStore(clock), identify=who, sinks=()) as metering:
            await metering.grant("ann", 5, id="g")
            # What the first call takes is all that there is of whatever refuses the second one.
            limits = rate_limited("1/minute" if "rate" in pair else "9/minute", concurrency=1 if "slots" in pair else 9)
            price = billable(5 if "credits" in pair else 1, idempotency=True)
            app = metered(metering, requires_upstream("openai", requests=1), limits, price, work=leave.wait)
            running = asyncio.create_task(call(app, idempotency_key="a"))
            await within(10, lambda: len(metering.runtime().in_flight) == 1)
            if "upstream" in pair:
                tell(metering, requests=0)
            # A hold that ends may make room: only what was spent is gone for good.
            if "credits" in pair:
                await metering.correct("ann", 5, id="c")
            _, before = await metering.store.read(EverythingKept())
            fields = {"stranger": "yes"} if "stranger" in pair else {}
            ended = await call(app, idempotency_key="a" if "key" in pair else "b", **fields)
            _, after = await metering.store.read(EverythingKept())
            code, reason, waits = ANSWERS[pair[0]]
            assert (status(ended.log), problem(ended)["code"]) == (code, reason)
            wait = dict(headers(ended.log)).get("retry-after")
            assert (wait is None) is (waits is None)
            if wait is not None and waits is not None:
                assert waits[0] <= int(wait) <= waits[1]
            assert tables(after) == tables(before)
            assert metering.headroom.running("openai") == Need(1)
            leave.set()
            await running

    asyncio.run(play())
