"""The real SDKs on the client of a metering: quotas of refusals reach its readings, usage is charged once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from asgi_metering import Metering
from asgi_metering.prices import per_token
from asgi_metering.quotas import Reading
from asgi_metering.quotas.verdicts import Verdict
from asgi_metering.receipts import EntryKind
from asgi_metering.testing import FakeClock
from asgi_metering.testing.provider import Provider, SeenRequest
from asgi_metering.usage import TokenUsage
from tests.harness.servers import serve_in_thread

LIMIT = 18_000
"""Tokens a minute: three of them come back in 10 ms, so that the wait that a refusal asks for is short."""

DRAINING = LIMIT - 15
"""Words of an answer, one token each, behind which a usual one of 20 words does not fit."""

WAITED_S = 10
"""Seconds that pass on the provider's clock when it has refused."""

CREDIT = 1_000_000
"""Smallest parts of one credit."""


class Upstream:
    """The bundled provider behind a server; its clock stands, and goes on a little with each refusal."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.provider = Provider(
            tokens_per_minute=LIMIT,
            input_tokens_per_minute=LIMIT,
            output_tokens_per_minute=LIMIT,
            requests_per_minute=50,
            clock=self.clock,
        )
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_(message: Any) -> None:
            if message.get("status") == 429:
                self.clock.advance(WAITED_S)
            await send(message)

        await self.provider(scope, receive, send_)

    @property
    def seen(self) -> list[SeenRequest]:
        """Every request until now."""
        return list(self.provider.requests)


@contextmanager
def upstream() -> Iterator[Upstream]:
    """Serve a provider with full limits until the block ends."""
    app = Upstream()
    with serve_in_thread(app) as server:
        app.url = server.url
        yield app


class Asker:
    """One SDK, asynchronous or in a thread, on the client of a metering."""

    def __init__(self, vendor: str, asynchronous: bool) -> None:
        self.vendor = vendor
        self.asynchronous = asynchronous
        self.module: Any = openai if vendor == "openai" else anthropic

    async def ask(self, metering: Metering, url: str, model: str, **options: Any) -> Any:
        """Ask *model* one question."""
        options = {"api_key": "sk-any", "base_url": url, **options}
        if self.vendor == "openai":
            options["base_url"] += "/v1"
        if not self.asynchronous:
            # With the context of the call, which is where the client looks for it.
            return await asyncio.to_thread(self._ask_in_thread, metering, model, options)
        make = self.module.AsyncOpenAI if self.vendor == "openai" else self.module.AsyncAnthropic
        async with make(http_client=metering.upstream_client(self.vendor, verify=False), **options) as client:
            return await self._begin(client, model)

    def _ask_in_thread(self, metering: Metering, model: str, options: dict[str, Any]) -> Any:
        make = self.module.OpenAI if self.vendor == "openai" else self.module.Anthropic
        with make(http_client=metering.upstream_client_sync(self.vendor, verify=False), **options) as client:
            return self._begin(client, model)

    def _begin(self, client: Any, model: str) -> Any:
        messages = [{"role": "user", "content": "Hi"}]
        if self.vendor == "openai":
            return client.chat.completions.create(model=model, messages=messages)
        return client.messages.create(model=model, messages=messages, max_tokens=LIMIT)

    @property
    def resource(self) -> str:
        """The limit that answers of the model are counted by."""
        return "tokens" if self.vendor == "openai" else "output_tokens"

    def left(self, *answered: SeenRequest) -> int:
        """What the provider says is left of `resource` when it has answered these, and refused once."""
        used = 0
        for seen in answered:
            assert seen.counts is not None
            used += seen.counts.output + (seen.counts.input if self.vendor == "openai" else 0)
        left = LIMIT - used + WAITED_S * LIMIT // 60
        return left if self.vendor == "openai" else round(left, -3)


@pytest.fixture(params=["openai-async", "openai-sync", "anthropic-async", "anthropic-sync"])
def asker(request: pytest.FixtureRequest) -> Asker:
    """Go through both SDKs, asynchronous and not."""
    vendor, _, kind = request.param.partition("-")
    return Asker(vendor, kind == "async")


def amounts(reading: Reading, resource: str) -> tuple[int | None, int | None]:
    """Limit and remainder of *resource*."""
    found = reading.limit(resource)
    assert found is not None
    return found.limit, found.remaining


def test_capture_the_quota_of_a_refusal_that_the_sdk_raises(asker: Asker) -> None:
    """S1.44: of a 429 the application gets only an exception, and the readings have its limits and its wait."""

    async def play(served: Upstream) -> None:
        async with Metering(sinks=[]) as metering:
            with pytest.raises(asker.module.RateLimitError):
                await asker.ask(metering, served.url, "echo:rate-limited-7", max_retries=0)
            assert set(metering.quotas.all()) == {asker.vendor}
            reading = metering.quotas.latest(asker.vendor)
            assert reading is not None
            assert (reading.status, reading.dialect, reading.retry_after_s) == (429, asker.vendor, 7)
            assert amounts(reading, "requests") == (50, 0)
            assert amounts(reading, asker.resource) == (LIMIT, LIMIT)

    with upstream() as served:
        asyncio.run(play(served))
        assert [seen.status for seen in served.seen] == [429]


def test_capture_what_only_the_body_of_a_refusal_says(asker: Asker) -> None:
    """S1.44: that nothing is paid for any more stands in the body alone, and is a reading once that has passed."""

    async def play(served: Upstream) -> None:
        async with Metering(sinks=[]) as metering:
            with pytest.raises(asker.module.APIStatusError):
                await asker.ask(metering, served.url, "echo:out-of-credit", max_retries=0)
            reading = metering.quotas.latest(asker.vendor)
            assert reading is not None
            assert reading.verdict is Verdict.OUT_OF_CREDIT
            assert metering.headroom.look(asker.vendor) is not None
            await asker.ask(metering, served.url, "echo:words-1")
            answered = metering.quotas.latest(asker.vendor)
            assert answered is not None
            assert (answered.status, answered.verdict) == (200, None)

    with upstream() as served:
        asyncio.run(play(served))


def test_charge_once_for_an_answer_behind_a_refusal(asker: Asker) -> None:
    """The SDK repeats a refused request by itself: both answers are readings in turn, and only one has usage."""
    told: list[tuple[int | None, tuple[int | None, int | None]]] = []

    async def play(served: Upstream) -> None:
        async with Metering(sinks=[]) as metering:
            await metering.grant("ada", 1_000_000, id="g")
            await asker.ask(metering, served.url, f"echo:words-{DRAINING}")
            metering.quotas.on_reading(lambda reading: told.append((reading.status, amounts(reading, asker.resource))))
            price, hold = per_token(input=1, output=1_000), TokenUsage(input=100, output=100)
            async with metering.charge(payer="ada", line="chat", price=price, hold=hold) as call:
                await asker.ask(metering, served.url, "echo", max_retries=1)
                assert [status for _, _, status in call.exchanges] == [429, 200]
            charges = [entry async for entry in metering.statement("ada") if entry.kind is not EntryKind.GRANT]
        drained, refused, answered = served.seen
        assert (refused.status, answered.status) == (429, 200)
        assert told == [(429, (LIMIT, 0)), (200, (LIMIT, asker.left(drained, answered)))]
        counts = answered.counts
        assert counts is not None
        assert [entry.amount for entry in charges] == [(counts.input + 1_000 * counts.output) * CREDIT]
        assert [str(entry.basis) for entry in charges] == ["usage"]

    with upstream() as served:
        asyncio.run(play(served))


@pytest.mark.parametrize(
    ("failure", "verdict", "lacks"),
    [
        ({"error": {"type": "insufficient_quota", "message": "You exceeded your quota"}}, Verdict.OUT_OF_CREDIT, True),
        ({"error": {"code": 429, "message": "Rate limited"}}, Verdict.RATE_LIMITED, False),
        ({"type": "error", "error": {"type": "overloaded_error"}}, Verdict.CAPACITY, False),
        ({"error": {"type": "server_error", "message": "internal"}}, None, False),
    ],
)
def test_capture_an_error_inside_of_a_stream(failure: Any, verdict: Verdict | None, lacks: bool) -> None:
    """S1.44: what a provider refuses behind a 200 is a reading of the upstream client, as any refusal is."""
    begun = {"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": "Hi"}}]}
    events = b"".join(b"data: " + json.dumps(each).encode() + b"\n\n" for each in (begun, failure))

    def answer(_request: httpx2.Request) -> httpx2.Response:
        fields = {"content-type": "text/event-stream", "x-ratelimit-limit-requests": "50"}
        return httpx2.Response(200, headers={**fields, "x-ratelimit-remaining-requests": "49"}, content=events)

    async def play() -> None:
        async with Metering(sinks=[]) as metering:
            client = metering.upstream_client("acme", wrap=httpx2.MockTransport(answer))
            async with client:
                await client.post("http://models/v1/chat/completions")
            reading = metering.quotas.latest("acme")
            assert reading is not None
            assert reading.verdict == verdict
            assert amounts(reading, "requests") == (50, 49)
            assert (metering.headroom.look("acme") is not None) == lacks

    asyncio.run(play())
