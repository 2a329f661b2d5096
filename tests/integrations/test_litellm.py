"""LiteLLM's real completions, asked of the bundled provider, booked to the call that they were begun in."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import sys
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import openai
import pytest

from asgi_metering import Metering
from asgi_metering.errors import ConfigurationError
from asgi_metering.events import CallbackSink
from asgi_metering.integrations import litellm as integration
from asgi_metering.integrations.litellm import litellm_callback
from asgi_metering.prices import per_token
from asgi_metering.testing.provider import Provider, TokenCounts
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.event import UsageEvent
from asgi_metering.witnesses import Witnesses
from tests.harness.servers import serve_in_thread

# LiteLLM reads fields of its pydantic models in a way that pydantic is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Accessing the 'model_:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

MODEL = "openai/gpt-4o"

MESSAGES = [{"role": "user", "content": "What does the river pass?"}]

PRICE = per_token(input="0.001", output="0.01")


class House:
    """A metering whose callback LiteLLM knows, and a provider to ask."""

    def __init__(self, library: Any, provider: Provider, url: str) -> None:
        self.library, self.provider, self.url = library, provider, url
        self.seen_before = len(provider.requests)
        self.events: list[UsageEvent] = []
        self.metering = Metering(sinks=[CallbackSink(self.events.extend, "seen")])

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Metering]:
        """Run the metering with credits for one payer; behind it, every event has been delivered."""
        async with self.metering as metering:
            await metering.grant("org", 1_000, id="g")
            yield metering
        await self._close_clients()

    async def _close_clients(self) -> None:
        """Close what LiteLLM keeps open for the next completion, in another event loop than this one."""
        known = self.library.in_memory_llm_clients_cache
        for client in list(known.cache_dict.values()):
            closing = client.close() if hasattr(client, "close") else None
            if inspect.isawaitable(closing):
                await closing
        known.flush_cache()

    def charge(self, line: str = "chat") -> Any:
        """A call that is charged by what it uses."""
        return self.metering.charge(payer="org", line=line, price=PRICE, hold=1)

    def options(self, model: str = MODEL, **options: Any) -> dict[str, Any]:
        """What every completion here is asked with."""
        return {"model": model, "messages": MESSAGES, "api_key": "sk", "api_base": f"{self.url}/v1", **options}

    async def ask(self, kind: str, model: str = MODEL, **options: Any) -> Any:
        """One completion, to its end: ``async``, ``async-stream``, ``sync`` or ``sync-stream``."""
        if "stream" in kind:
            options = {"stream": True, "stream_options": {"include_usage": True}, **options}
        options = self.options(model, **options)
        if kind.startswith("sync"):
            return await asyncio.to_thread(self._ask, options)
        answer = await self.library.acompletion(**options)
        return [chunk async for chunk in answer] if "stream" in kind else answer

    def _ask(self, options: dict[str, Any]) -> Any:
        answer = self.library.completion(**options)
        return list(answer) if options.get("stream") else answer

    def used(self) -> TokenCounts:
        """What the provider's last answer used."""
        counts = self.provider.requests[-1].counts
        assert counts is not None
        return counts

    def total(self, tally: str) -> int:
        """What a counter of the metering has counted, over all attributes."""
        return sum(self.metering.meters.totals(tally).values())


def logging_worker() -> Any:
    """LiteLLM's background, in which it tells its callbacks."""
    return importlib.import_module("litellm.litellm_core_utils.logging_worker").GLOBAL_LOGGING_WORKER


@pytest.fixture(scope="module")
def library() -> Iterator[Any]:
    """LiteLLM, imported once and kept off the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        module: Any = importlib.import_module("litellm")
        module.suppress_debug_info = True
        yield module
    with warnings.catch_warnings():
        # Connections that LiteLLM has lost: here, and not in whichever test the collector comes to them.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Provider, str]]:
    """One provider behind a server, for all tests."""
    with serve_in_thread(provider := Provider()) as server:
        yield provider, server.url


@pytest.fixture
def house(library: Any, served: tuple[Provider, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    """A metering, and LiteLLM's callbacks as they were when the test ends."""
    made = House(library, *served)
    callback = litellm_callback(made.metering)
    monkeypatch.setattr(library, "callbacks", [callback])
    # So that a slow machine does not decide what is heard.
    monkeypatch.setattr(Witnesses.settled, "__defaults__", (60.0,))
    yield made
    for name in ("input", "success", "failure", "_async_success", "_async_failure"):
        known = getattr(library, f"{name}_callback")
        known[:] = [each for each in known if each is not callback]


@pytest.mark.parametrize("kind", ["async", "async-stream", "sync", "sync-stream"])
def test_completion_is_booked_to_its_call(house: House, kind: str) -> None:
    """Each kind of completion is charged what the provider counted, once, with model, cost and quotas (S3.20)."""

    async def run() -> None:
        async with house.open() as metering:
            async with house.charge():
                await house.ask(kind)
            # LiteLLM tells its listeners when it gets to it.
            async with asyncio.timeout(20):
                while (reading := metering.quotas.latest("openai")) is None:
                    await asyncio.sleep(0.01)
            assert {limit.remaining for limit in reading.limits if limit.remaining is not None} >= {4_999}

    asyncio.run(run())
    used = house.used()
    (event,) = house.events
    assert (event.usage_source, event.model, event.provider, event.basis) == ("litellm", "gpt-4o", "openai", "usage")
    assert event.usage is not None
    assert (event.usage.input, event.usage.output, event.estimated) == (used.input, used.output, False)
    assert event.amount == used.input * 1_000 + used.output * 10_000
    # 2.50 USD for a million input tokens and 10 for output, as LiteLLM's price list says.
    assert event.attributes["metering.cost.usd_micros"] == round(used.input * 2.5 + used.output * 10)
    assert house.total("usage_late") == house.total("usage_unscoped") == 0


def test_stream_that_litellm_counted_itself_is_an_estimate(house: House) -> None:
    """A stream whose provider reported nothing is charged by LiteLLM's own count, and its event says so."""

    async def run() -> None:
        async with house.open(), house.charge():
            await house.ask("async-stream", stream_options=None)

    asyncio.run(run())
    (event,) = house.events
    assert (event.usage_source, event.estimated) == ("litellm", True)
    assert event.usage is not None
    assert event.usage.output == house.used().output


def test_refusal_is_a_reading_and_a_retry_counts_once(house: House) -> None:
    """A refused completion tells quotas and no usage (S1.44); one that LiteLLM repeats is counted by its answer."""

    async def run() -> None:
        async with house.open() as metering:
            async with house.charge("refused"):
                with pytest.raises(house.library.RateLimitError):
                    await house.ask("async", "openai/gpt-4o:rate-limited-1", max_retries=0)
            reading = metering.quotas.latest("openai")
            assert reading is not None
            assert (reading.status, reading.limits[0].remaining) == (429, 0)
            async with house.charge("repeated"):
                await house.ask("async", "openai/gpt-4o:fail-first-1:words-4", num_retries=2, max_retries=0)

    asyncio.run(run())
    refused, repeated = house.events
    assert (refused.usage, refused.usage_source) == (None, None)
    assert repeated.usage is not None
    assert (repeated.usage.output, repeated.usage_source, repeated.basis) == (4, "litellm", "usage")
    assert [seen.status for seen in list(house.provider.requests)[house.seen_before :]] == [429, 500, 200]


def test_stream_left_early_is_not_taken_for_all(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LiteLLM never told of a stream, the call's usage is missing, and nothing waits for ever (S3.26)."""
    monkeypatch.setattr(Witnesses.settled, "__defaults__", (0.05,))

    async def run() -> None:
        async with house.open(), house.charge():
            answer = await house.library.acompletion(**house.options(stream=True))
            async for _ in answer:
                break
            await answer.completion_stream.close()

    asyncio.run(run())
    (event,) = house.events
    assert (event.usage, event.basis, event.estimated) == (None, "estimate", True)


def test_concurrent_calls_never_mix(house: House) -> None:
    """Calls at once, each with completions at once, are each charged their own, whatever thread told of them."""

    async def one(number: int) -> None:
        model = f"openai/gpt-4o:words-{number + 1}"
        async with house.charge(f"line-{number}"):
            await asyncio.gather(*(house.ask(kind, model) for kind in ("async", "async-stream", "sync")))

    async def run() -> None:
        async with house.open():
            await asyncio.gather(*(one(number) for number in range(4)))

    asyncio.run(run())
    told = {event.line: event.usage.output for event in house.events if event.usage is not None}
    assert told == {f"line-{number}": 3 * (number + 1) for number in range(4)}


def test_usage_without_a_call_and_behind_one_is_counted(house: House) -> None:
    """A completion outside of any call is ignored (S3.26), one that outlives its call is refused; both are counted."""

    async def run() -> None:
        async with house.open():
            await house.ask("async")
            started = asyncio.Event()

            async def outlive() -> None:
                await started.wait()
                await house.ask("async")

            async with house.charge():
                late = asyncio.create_task(outlive())
            started.set()
            await late
            await logging_worker().flush()

    asyncio.run(run())
    assert (house.total("usage_unscoped"), house.total("usage_late")) == (1, 1)
    assert [event.usage for event in house.events] == [None]


def test_higher_sources_outrank_litellm(house: House) -> None:
    """What the upstream client saw counts instead of what LiteLLM told, and what the handler says instead of both."""

    async def run() -> None:
        async with house.open() as metering:
            http_client = metering.upstream_client("openai")
            client = openai.AsyncOpenAI(api_key="sk", base_url=f"{house.url}/v1", http_client=http_client)
            async with client:
                async with house.charge("client"):
                    await house.ask("async", client=client)
                async with house.charge("handler") as call:
                    await house.ask("async", client=client)
                    call.record(TokenUsage(input=1, output=1))

    asyncio.run(run())
    assert [event.usage_source for event in house.events] == ["upstream", "handler"]
    used = house.used()
    assert [event.usage and event.usage.output for event in house.events] == [used.output, 1]


@pytest.mark.parametrize("cost", [float("nan"), 1e300])
def test_absurd_cost_is_refused_and_the_usage_kept(house: House, cost: float) -> None:
    """A cost that is no amount is left out with an alarm, and the tokens are charged (S3.21)."""

    async def run() -> None:
        async with house.open(), house.charge():
            told = {"litellm_call_id": "one", "model": "m", "custom_llm_provider": "acme", "response_cost": cost}
            callback = house.library.callbacks[0]
            callback.log_pre_api_call("m", [], told)
            callback.log_success_event(told, Answer(COUNTED, response_cost=-1.0), None, None)
            callback.log_success_event(told, Answer(COUNTED, response_cost=-1.0), None, None)

    asyncio.run(run())
    (event,) = house.events
    assert event.usage == TokenUsage(input=3, output=4)
    assert "metering.cost.usd_micros" not in event.attributes
    assert house.total("usage_rejected") == 2


@pytest.mark.parametrize(
    ("differs", "cost_is_known"),
    [
        ({}, True),
        # A price of the application's own is not in the list, and neither is the price of a model that nobody knows.
        ({"litellm_params": {"input_cost_per_token": 1.0}}, False),
        ({"model": "unheard-of", "custom_llm_provider": "acme"}, False),
    ],
)
def test_stream_whose_cost_litellm_lost_is_priced_by_its_list(
    house: House, monkeypatch: pytest.MonkeyPatch, differs: dict[str, Any], cost_is_known: bool
) -> None:
    """Threads of LiteLLM's that tell of one stream erase the cost that they noted: it is looked up again (S3.20)."""
    completions = house.library.callbacks[0].completions
    succeed = completions.succeed
    lost = {"response_cost": None, "standard_logging_object": None, **differs}

    def erased(told: dict[str, Any], answer: Any) -> None:
        if differs.get("model"):
            answer.model = differs["model"]
        succeed({**told, **lost}, answer)

    monkeypatch.setattr(completions, "succeed", erased)

    async def run() -> None:
        async with house.open(), house.charge():
            await house.ask("sync-stream")

    asyncio.run(run())
    used, (event,) = house.used(), house.events
    assert event.amount == used.input * 1_000 + used.output * 10_000
    expected = round(used.input * 2.5 + used.output * 10) if cost_is_known else None
    assert event.attributes.get("metering.cost.usd_micros") == expected


class Answer:
    """An answer of LiteLLM's, with what it counted."""

    def __init__(self, usage: Any = None, **hidden: Any) -> None:
        self.usage = usage
        self._hidden_params = hidden


COUNTED = {"prompt_tokens": 3, "completion_tokens": 4}


@pytest.mark.parametrize(
    ("told", "answer", "expected"),
    [
        # The cost that LiteLLM hides on the answer counts where it says none openly.
        ({"response_cost": 0}, Answer(COUNTED, response_cost=0.5), (3, "usage", 500_000)),
        ({"response_cost": 0.25}, Answer(COUNTED, response_cost=0.5), (3, "usage", 250_000)),
        ({"response_cost": True}, Answer(COUNTED), (3, "usage", None)),
        # Out of its own cache nothing was used; an answer that counts nothing leaves the call's usage open.
        ({"cache_hit": True}, Answer(COUNTED), (5, "usage", None)),
        ({}, Answer(), (5, "estimate", None)),
        ({}, Answer({}), (5, "estimate", None)),
        ({}, Answer("many"), (5, "estimate", None)),
        # Zeros that LiteLLM made up for a stream are none that the provider reported (S2.41).
        ({"stream": True}, Answer({"prompt_tokens": 0, "completion_tokens": 0}), (5, "estimate", None)),
        ({}, Answer({"prompt_tokens": 0, "completion_tokens": 0}), (5, "usage", None)),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
def test_what_litellm_tells_of_an_answer_is_taken_for_what_it_is(
    house: House, told: dict[str, Any], answer: Answer, expected: tuple[int, str, int | None], announced: bool
) -> None:
    """Costs in their order (S3.20), cached answers, and such as count nothing, announced before or not."""
    callback = house.library.callbacks[0]

    async def run() -> None:
        async with house.open(), house.charge():
            if expected[0] == 5:
                other = {"litellm_call_id": "other", "custom_llm_provider": "acme"}
                callback.log_pre_api_call("m", [], other)
                callback.log_success_event(other, Answer({"prompt_tokens": 5, "completion_tokens": 1}), None, None)
            name = {"litellm_call_id": "one"} if announced else {"start_time": datetime.now(UTC)}
            known = {"model": "m", "custom_llm_provider": "acme", **name, **told}
            callback.log_pre_api_call("m", [], known)
            callback.log_pre_api_call("m", [], known)
            callback.log_success_event(known, answer, None, None)

    asyncio.run(run())
    (event,) = house.events
    assert event.usage is not None
    assert (event.usage.input, event.basis, event.attributes.get("metering.cost.usd_micros")) == expected


def test_failure_without_an_answer_says_nothing(house: House) -> None:
    """A completion that got no answer, or one without fields, is neither usage nor a reading."""
    callback = house.library.callbacks[0]

    async def run() -> None:
        async with house.open(), house.charge():
            callback.log_pre_api_call("m", [], {"litellm_call_id": "one"})
            for failure in (None, ConnectionError("no answer")):
                told = {"litellm_call_id": "one", "exception": failure, "custom_llm_provider": "acme"}
                callback.log_failure_event(told, None, None, None)

    asyncio.run(run())
    assert house.metering.quotas.latest("acme") is None
    assert [event.usage for event in house.events] == [None]


def test_completions_that_are_never_told_of_are_forgotten(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are remembered, the newest, and one that is forgotten is not waited for."""
    monkeypatch.setattr(integration, "MAX_COMPLETIONS", 2)
    callback = house.library.callbacks[0]

    async def run() -> None:
        async with house.open(), house.charge():
            for number in range(4):
                callback.log_pre_api_call("m", [], {"litellm_call_id": f"c{number}"})
            for number in (2, 3):
                callback.log_failure_event({"litellm_call_id": f"c{number}"}, None, None, None)
            assert len(callback.completions._begun) == 2

    asyncio.run(run())
    assert house.events[0].usage is None


def test_callback_without_litellm_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where LiteLLM is missing the sentence names it, and importing the integration needs nothing of it."""
    monkeypatch.setitem(sys.modules, "litellm.integrations.custom_logger", None)
    integration._callback_class.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match="pip install litellm"):
            litellm_callback(Metering(sinks=()))
    finally:
        integration._callback_class.cache_clear()
    with pytest.raises(ConfigurationError, match="quota label"):
        litellm_callback(Metering(sinks=()), label="not a label")
