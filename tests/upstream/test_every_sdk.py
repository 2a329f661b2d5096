"""Each model SDK on the client of a metering, asking the bundled provider: what it uses reaches the call."""

from __future__ import annotations

import asyncio
import importlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import islice
from typing import Any

import httpx
import httpx2
import pytest

from asgi_metering import CallRefused, Metering
from asgi_metering.events import CallbackSink
from asgi_metering.prices import per_token
from asgi_metering.testing.provider import Provider, SeenRequest
from asgi_metering.usage.event import UsageEvent
from tests.harness.servers import ThreadServer, serve_in_thread

PRICE = per_token(input="0.001", output="0.01")

ASKED = [{"role": "user", "content": "What does the river pass?"}]


class Sdk(ABC):
    """One SDK, asynchronous or not, reduced to what these tests ask of it; imported when it is made."""

    library = "httpx2"
    path = ""
    has_quotas = True

    def __init__(self, url: str, metering: Metering, asynchronous: bool) -> None:
        self.url, self.asynchronous = url + self.path, asynchronous
        self.clients = {
            True: metering.upstream_client(self.name, library=self.library, verify=False),
            False: metering.upstream_client_sync(self.name, library=self.library, verify=False),
        }
        self.sdk = self.make()

    @property
    def name(self) -> str:
        """Under which the provider is known."""
        return type(self).__name__.lower()

    @abstractmethod
    def make(self) -> Any:
        """The SDK's client, on ours."""

    @abstractmethod
    def ask(self, model: str, stream: bool) -> Any:
        """Begin one call; awaitable if asynchronous."""

    def breaks(self) -> tuple[type[Exception], ...]:
        """What rises where a stream breaks: what the HTTP library says, or an error of the SDK's own."""
        module: Any = importlib.import_module(type(self.sdk).__module__.partition(".")[0])
        return httpx.RemoteProtocolError, httpx2.RemoteProtocolError, getattr(module, "APIConnectionError", OSError)

    async def whole(self, model: str) -> Any:
        """One answer that is no stream."""
        if self.asynchronous:
            return await self.ask(model, stream=False)
        return await asyncio.to_thread(self.ask, model, False)

    async def chunks(self, model: str, most: int | None = None) -> int:
        """How many chunks of a stream came; left behind *most* of them, as an application leaves one."""
        if not self.asynchronous:
            return await asyncio.to_thread(self._chunks, model, most)
        stream = await self.ask(model, stream=True)
        async with AsyncExitStack() as stack:
            if hasattr(stream, "__aenter__"):
                await stack.enter_async_context(stream)
            else:
                stack.push_async_callback(stream.aclose)
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == most:
                    break
        return seen

    def _chunks(self, model: str, most: int | None) -> int:
        stream = self.ask(model, stream=True)
        seen = sum(1 for _ in islice(iter(stream), most))
        close = getattr(stream, "close", None) or stream.response.close
        close()
        return seen

    @property
    def closes_streams(self) -> bool:
        """Whether a stream that is closed gives its connection back at once."""
        return True

    async def close(self) -> None:
        """Close the clients, as their owner does."""
        await self.clients[True].aclose()
        self.clients[False].close()


class OpenAI(Sdk):
    """openai, on httpx2; a stream tells its usage where that is asked for."""

    path = "/v1"

    def make(self) -> Any:
        """``AsyncOpenAI(http_client=...)``."""
        module: Any = importlib.import_module("openai")
        made = module.AsyncOpenAI if self.asynchronous else module.OpenAI
        return made(api_key="sk", base_url=self.url, http_client=self.clients[self.asynchronous])

    def ask(self, model: str, stream: bool) -> Any:
        """Chat completions."""
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
        return self.sdk.chat.completions.create(model=model, messages=ASKED, **options)


class Groq(Sdk):
    """groq, on the older httpx; a stream tells its usage in ``x_groq``, unasked."""

    library = "httpx"

    def make(self) -> Any:
        """``AsyncGroq(http_client=...)``."""
        module: Any = importlib.import_module("groq")
        made = module.AsyncGroq if self.asynchronous else module.Groq
        return made(api_key="sk", base_url=self.url, http_client=self.clients[self.asynchronous])

    def ask(self, model: str, stream: bool) -> Any:
        """Chat completions."""
        return self.sdk.chat.completions.create(model=model, messages=ASKED, **({"stream": True} if stream else {}))


class Anthropic(Sdk):
    """anthropic, on httpx2."""

    def make(self) -> Any:
        """``AsyncAnthropic(http_client=...)``."""
        module: Any = importlib.import_module("anthropic")
        made = module.AsyncAnthropic if self.asynchronous else module.Anthropic
        return made(api_key="sk", base_url=self.url, http_client=self.clients[self.asynchronous])

    def ask(self, model: str, stream: bool) -> Any:
        """Messages."""
        options = {"stream": True} if stream else {}
        return self.sdk.messages.create(model=model, messages=ASKED, max_tokens=500, **options)


class Mistral(Sdk):
    """mistralai, on httpx2; it repeats nothing unless told to."""

    path = "/mistral"

    def make(self) -> Any:
        """``Mistral(client=..., async_client=...)``: one class for both."""
        module: Any = importlib.import_module("mistralai.client")
        utils: Any = importlib.import_module("mistralai.client.utils")
        backoff = utils.BackoffStrategy(1, 10, 1.0, 2_000)
        return module.Mistral(
            api_key="sk",
            server_url=self.url,
            client=self.clients[False],
            async_client=self.clients[True],
            retry_config=utils.RetryConfig("backoff", backoff, retry_connection_errors=False),
        )

    def ask(self, model: str, stream: bool) -> Any:
        """Chat."""
        verb = ("stream" if stream else "complete") + ("_async" if self.asynchronous else "")
        return getattr(self.sdk.chat, verb)(model=model, messages=ASKED)


class Gemini(Sdk):
    """google-genai, on httpx2; without a client of ours its asynchronous half would use aiohttp where that is there."""

    has_quotas = False

    def make(self) -> Any:
        """``genai.Client(http_options=HttpOptions(httpx_client=..., httpx_async_client=...))``: one for both."""
        module: Any = importlib.import_module("google.genai")
        types: Any = importlib.import_module("google.genai.types")
        options = types.HttpOptions(
            base_url=self.url,
            httpx_client=self.clients[False],
            httpx_async_client=self.clients[True],
            retry_options=types.HttpRetryOptions(attempts=2, initial_delay=0.01, http_status_codes=[429]),
        )
        return module.Client(api_key="sk", vertexai=False, http_options=options)

    def ask(self, model: str, stream: bool) -> Any:
        """Generate content."""
        models = self.sdk.aio.models if self.asynchronous else self.sdk.models
        verb = models.generate_content_stream if stream else models.generate_content
        return verb(model=model, contents=ASKED[0]["content"])

    @property
    def closes_streams(self) -> bool:
        """Its asynchronous half leaves the response to the garbage collector, on any client."""
        return not self.asynchronous


SDKS = [OpenAI, Groq, Anthropic, Mistral, Gemini]


class House:
    """A metering, one SDK on its client, and the provider behind."""

    def __init__(self, server: ThreadServer, provider: Provider, make: type[Sdk], asynchronous: bool) -> None:
        self.events: list[UsageEvent] = []
        self.metering = Metering(sinks=[CallbackSink(self.events.extend, "seen")])
        self.provider = provider
        self.seen_before = len(provider.requests)
        self.sdk = make(server.url, self.metering, asynchronous)

    @property
    def requests(self) -> list[SeenRequest]:
        """What the provider saw of this test."""
        return list(self.provider.requests)[self.seen_before :]

    @asynccontextmanager
    async def charge(self) -> AsyncIterator[Any]:
        """One call; behind it, its event has been delivered and the clients are closed."""
        async with self.metering as metering:
            await metering.grant("org", 1_000, id="g")
            options: Any = {"on_missing_usage": "observed"}
            async with metering.charge(payer="org", line="chat", price=PRICE, hold=1, **options) as call:
                yield call
            await self.sdk.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[ThreadServer, Provider]]:
    """One provider behind a server, for all of them."""
    provider = Provider()
    with serve_in_thread(provider) as server:
        yield server, provider


@pytest.fixture(params=[True, False], ids=["async", "sync"])
def build(request: pytest.FixtureRequest, served: tuple[ThreadServer, Provider]) -> Callable[[type[Sdk]], House]:
    """Make a house for one SDK, asynchronous and not."""
    return lambda make: House(*served, make, request.param)


@pytest.mark.parametrize("make", SDKS)
def test_answers_and_streams_are_charged_as_counted(make: type[Sdk], build: Callable[[type[Sdk]], House]) -> None:
    """One answer and one stream of each SDK are two exchanges, charged by what the provider counted (S1.46)."""
    house = build(make)

    async def run() -> None:
        async with house.charge() as call:
            assert await house.sdk.whole("m:words-3") is not None
            assert await house.sdk.chunks("n:words-5") >= 5
            assert [(name, status) for name, _, status in call.exchanges] == [(house.sdk.name, 200)] * 2

    asyncio.run(run())
    counts = [seen.counts for seen in house.requests if seen.counts is not None]
    assert len(counts) == 2
    (event,) = house.events
    assert event.usage is not None
    assert event.usage.input == sum(each.input for each in counts)
    assert event.usage.output == sum(each.output for each in counts) == 8
    assert (event.usage_source, event.basis, event.estimated) == ("upstream", "usage", False)
    assert (event.model, event.provider) == ("n", house.sdk.name)
    assert [row in str(event.attributes["metering.models"]) for row in ('"m"', '"n"')] == [True, True]
    reading = house.metering.quotas.latest(house.sdk.name)
    assert (reading is not None and bool(reading.limits)) is make.has_quotas


@pytest.mark.parametrize("make", SDKS)
def test_retried_refusal_is_a_reading_and_no_usage(make: type[Sdk], build: Callable[[type[Sdk]], House]) -> None:
    """A 429 that the SDK repeats is an exchange of its own, whose quotas are read and whose usage is none (S1.44)."""
    house = build(make)
    statuses = []
    house.metering.quotas.on_reading(lambda reading: statuses.append(reading.status))

    async def run() -> None:
        async with house.charge() as call:
            kind = "async" if house.sdk.asynchronous else "sync"
            await house.sdk.whole(f"{kind}-{make.__name__}:limited-first-1:words-4")
            assert [status for _, _, status in call.exchanges] == [429, 200]

    asyncio.run(run())
    assert [seen.status for seen in house.requests] == [429, 200]
    (event,) = house.events
    assert event.usage is not None
    assert (event.usage.output, event.usage_source, event.basis) == (4, "upstream", "usage")
    assert statuses == [429, 200]


@pytest.mark.parametrize("make", SDKS)
def test_stream_that_is_left_early_counts_as_far_as_it_came(
    make: type[Sdk], build: Callable[[type[Sdk]], House]
) -> None:
    """A stream that is closed behind a few chunks is charged by what had passed, and its event says so (DESIGN 4)."""
    house = build(make)

    async def run() -> None:
        async with house.charge():
            assert await house.sdk.chunks("m:endless:slow-5", most=6) == 6
            (seen,) = house.requests
            if house.sdk.closes_streams:
                assert await asyncio.to_thread(seen.ended.wait, 10)

    asyncio.run(run())
    (seen,) = house.requests
    assert seen.ended.wait(10)
    assert seen.client_disconnected
    (event,) = house.events
    assert event.usage is not None
    assert 1 <= (event.usage.output or 0) <= 8
    assert (event.basis, event.usage_source) == ("observed", "tokenizer")


@pytest.mark.parametrize("make", SDKS)
def test_stream_that_breaks_counts_as_far_as_it_came(make: type[Sdk], build: Callable[[type[Sdk]], House]) -> None:
    """A stream whose connection breaks is charged by what had passed, whatever the SDK makes of the break."""
    house = build(make)

    async def run() -> None:
        async with house.charge():
            with suppress(*house.sdk.breaks()):
                await house.sdk.chunks("m:cut-after-3")

    asyncio.run(run())
    (event,) = house.events
    assert event.usage is not None
    assert (event.usage.output, event.basis, event.usage_source) == (3, "observed", "tokenizer")


def test_thoughts_of_a_stream_that_breaks_count_as_well(build: Callable[[type[Sdk]], House]) -> None:
    """What Gemini had counted of thoughts, which are in no text, is part of what was observed of a broken stream."""
    house = build(Gemini)

    async def run() -> None:
        async with house.charge():
            with suppress(*house.sdk.breaks()):
                await house.sdk.chunks("m:reasoning-40:cut-after-3")

    asyncio.run(run())
    (event,) = house.events
    assert event.usage is not None
    assert (event.usage.output, event.basis) == (43, "observed")


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (OpenAI, "chat.completions.create"),
        (Groq, "chat.completions.create"),
        (Anthropic, "messages.create"),
        (Mistral, "chat.complete_async"),
        (Gemini, "aio.models.generate_content"),
    ],
)
def test_wrapped_sdk_charges_its_one_method(
    make: type[Sdk], method: str, served: tuple[ThreadServer, Provider]
) -> None:
    """One method of each SDK's client is charged by what it used, and is not called where nobody can pay (S3.41)."""
    house = House(*served, make, asynchronous=True)
    bare = house.sdk.sdk

    async def run() -> None:
        async with house.metering as metering:
            await metering.grant("org", 1_000, id="g")
            for payer in ("org", "nobody"):
                house.sdk.sdk = metering.charged(bare, method, line="wrapped", payer=payer, price=PRICE, hold=1)
                if payer == "org":
                    await house.sdk.whole("m:words-4")
                else:
                    with pytest.raises(CallRefused):
                        await house.sdk.whole("m:words-4")
            await house.sdk.close()

    asyncio.run(run())
    assert len(house.requests) == 1
    (event,) = house.events
    assert event.usage is not None
    assert (event.line, event.usage.output, event.usage_source) == ("wrapped", 4, "upstream")
