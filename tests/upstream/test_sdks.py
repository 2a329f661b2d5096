"""The real OpenAI and Anthropic SDKs on a metered client, against a real server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest

from asgi_metering.upstream import QuotaReadings, upstream_client, upstream_client_sync
from tests.upstream.provider import (
    ANTHROPIC_HEADERS,
    CURRENT,
    OPENAI_HEADERS,
    Answer,
    Provider,
    Recorder,
    json_answer,
)

MODEL = "claude-opus-5"
"""A name that the SDK does not warn about."""

MESSAGES: Any = [{"role": "user", "content": "Hi"}]


class Sdk:
    """One SDK, asynchronous or not, on one library, reduced to what these tests ask of it."""

    def __init__(self, vendor: str, asynchronous: bool, library: str = "httpx2") -> None:
        self.vendor = vendor
        self.asynchronous = asynchronous
        self.library = library
        module: Any = openai if vendor == "openai" else anthropic
        names = {("openai", True): "AsyncOpenAI", ("openai", False): "OpenAI"}
        names |= {("anthropic", True): "AsyncAnthropic", ("anthropic", False): "Anthropic"}
        self.default_client = module.DefaultAsyncHttpxClient if asynchronous else module.DefaultHttpxClient
        self._class = getattr(module, names[vendor, asynchronous])
        self.rate_limit_error = module.RateLimitError

    def metered(self, listener: Any, *args: Any) -> Any:
        """Return the HTTP client that is under test."""
        make = upstream_client if self.asynchronous else upstream_client_sync
        return make(self.vendor, listener, *args, library=self.library)

    def make(self, url: str, **options: Any) -> Any:
        """Return the SDK's client for the provider at *url*."""
        path = "/v1" if self.vendor == "openai" else ""
        return self._class(api_key="sk-secret", base_url=url + path, **options)

    def ask(self, sdk: Any, **options: Any) -> Any:
        """Begin one chat call; awaitable if asynchronous."""
        if self.vendor == "openai":
            return sdk.chat.completions.create(model="gpt-5.5", messages=MESSAGES, **options)
        return sdk.messages.create(model=MODEL, max_tokens=64, messages=MESSAGES, **options)

    def run(self, sdk: Any, work: Callable[[Any], Any], **options: Any) -> Any:
        """Ask, hand the answer to *work*, close the client, and return what *work* returned."""
        if not self.asynchronous:
            with sdk:
                return work(self.ask(sdk, **options))

        async def run() -> Any:
            async with sdk:
                done = work(await self.ask(sdk, **options))
                return await done if inspect.isawaitable(done) else done

        return asyncio.run(run())

    def count_events(self, stream: Any) -> Any:
        """Read a stream to its end; awaitable if asynchronous."""
        if not self.asynchronous:
            return sum(1 for _ in stream)

        async def count() -> int:
            return len([event async for event in stream])

        return count()

    @property
    def counts(self) -> tuple[int, int]:
        """Input and output tokens of the provider's usual answer."""
        return (9, 2) if self.vendor == "openai" else (425, 15)

    @property
    def quota(self) -> tuple[bytes, bytes]:
        """One of the quota headers of the provider's usual answer."""
        return (OPENAI_HEADERS if self.vendor == "openai" else ANTHROPIC_HEADERS)[1]


@pytest.fixture(
    params=["openai-async", "openai-sync", "anthropic-async", "anthropic-sync"],
)
def sdk(request: pytest.FixtureRequest) -> Sdk:
    """Go through both SDKs, asynchronous and not, on the library that they are made for."""
    vendor, _, kind = request.param.partition("-")
    return Sdk(vendor, kind == "async")


@pytest.fixture(params=["httpx2", "httpx"])
def openai_sdk(request: pytest.FixtureRequest) -> Sdk:
    """Go through both libraries that the OpenAI SDK takes."""
    return Sdk("openai", True, request.param)


@pytest.fixture(autouse=True)
def call() -> Iterator[None]:
    """Run inside the call ``call-1``."""
    token = CURRENT.set("call-1")
    yield
    CURRENT.reset(token)


def check_answer(sdk: Sdk, recorder: Recorder) -> None:
    """Insist that one usual answer was heard, for the call, with its headers and its usage."""
    assert recorder.events == ["started", "answered 200", "finished 200"]
    token, provider, _, headers, _ = recorder.answers[0]
    assert (token, provider) == ("call-1", sdk.vendor)
    assert headers[sdk.quota[0]] == sdk.quota[1]
    assert [(ended.token, ended.counts) for ended in recorder.ended] == [("call-1", sdk.counts)]


def test_sdk_answer_is_heard(sdk: Sdk, provider: Provider) -> None:
    """A plain answer shows its headers and its usage, and the SDK parses it as ever."""
    recorder = Recorder()
    client = sdk.make(provider.url, http_client=sdk.metered(recorder))
    answer = sdk.run(client, lambda answer: answer)
    assert answer.id in ("chatcmpl-1", "msg_1")
    check_answer(sdk, recorder)


def test_sdk_stream_is_heard(sdk: Sdk, provider: Provider) -> None:
    """A stream shows its headers and its usage, and the SDK sees every event."""
    recorder = Recorder()
    client = sdk.make(provider.url, http_client=sdk.metered(recorder))
    assert sdk.run(client, sdk.count_events, stream=True) == (3 if sdk.vendor == "openai" else 6)
    check_answer(sdk, recorder)


def test_sdk_on_legacy_httpx_is_heard(openai_sdk: Sdk, provider: Provider) -> None:
    """The OpenAI SDK takes a client of either library, and both are heard alike, stream and plain."""
    for options, work in (({}, lambda answer: answer), ({"stream": True}, openai_sdk.count_events)):
        recorder = Recorder()
        http_client = openai_sdk.metered(recorder)
        assert isinstance(http_client, httpx2.AsyncClient if openai_sdk.library == "httpx2" else httpx.AsyncClient)
        openai_sdk.run(openai_sdk.make(provider.url, http_client=http_client), work, **options)
        check_answer(openai_sdk, recorder)


def test_sdk_retry_is_an_exchange_of_its_own(sdk: Sdk, provider: Provider) -> None:
    """A refused try that the SDK repeats is a reading without usage, and only the answer has usage (S1.44)."""
    refusal = [(b"retry-after-ms", b"1"), (sdk.quota[0], b"0")]
    provider.script = [json_answer({"error": {"type": "rate_limit_error", "message": "no"}}, refusal, status=429)]
    recorder, readings = Recorder(), QuotaReadings()
    sdk.run(sdk.make(provider.url, http_client=sdk.metered(recorder)), lambda answer: answer)
    assert recorder.events == ["started", "answered 429", "finished 429", "started", "answered 200", "finished 200"]
    assert [(ended.status, ended.counts) for ended in recorder.ended] == [(429, None), (200, sdk.counts)]
    for (_, name, status, headers, started_at), left in zip(recorder.answers, (0, int(sdk.quota[1])), strict=True):
        latest = readings.record(name, headers.items(), status, started_at)
        assert latest is not None
        assert (latest.status, latest.limits[-1].remaining) == (status, left)


def test_sdk_refusal_without_retry_is_heard_and_raised(sdk: Sdk, provider: Provider) -> None:
    """Without a retry the SDK raises its own error with the provider's body, and the refusal was heard."""
    provider.script = [json_answer({"error": {"message": "slow down"}}, [(b"retry-after", b"7")], status=429)]
    recorder = Recorder()
    with pytest.raises(sdk.rate_limit_error, match="slow down"):
        sdk.run(sdk.make(provider.url, http_client=sdk.metered(recorder), max_retries=0), lambda answer: answer)
    assert recorder.events == ["started", "answered 429", "finished 429"]


def test_sdk_follows_redirects(sdk: Sdk, provider: Provider) -> None:
    """A redirect is followed with our client as with the SDK's own."""
    recorder = Recorder()
    for options in ({}, {"http_client": sdk.metered(recorder)}):
        provider.script = [Answer(307, [(b"location", b"/elsewhere/messages")])]
        sdk.run(sdk.make(provider.url, **options), lambda answer: answer)
    assert [request["path"] for request in provider.requests].count("/elsewhere/messages") == 2
    assert recorder.events[3:] == ["started", "answered 200", "finished 200"]


@pytest.mark.parametrize("given", [{}, {"timeout": 3.0}])
def test_sdk_keeps_its_timeouts(sdk: Sdk, given: dict[str, Any]) -> None:
    """Each request carries the same timeouts as with the SDK's own client, the SDK's own option included."""
    seen: list[dict[str, float]] = []
    body: dict[str, Any] = {"id": "1", "choices": [], "content": [], "usage": {"input_tokens": 1, "output_tokens": 1}}

    def answer(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.extensions["timeout"])
        return httpx2.Response(200, json=body)

    mock = httpx2.MockTransport(answer)
    for http_client in (sdk.default_client(transport=mock), sdk.metered(Recorder(), mock)):
        sdk.run(sdk.make("http://acme.test", http_client=http_client, **given), lambda answer: answer)
    assert seen[0] == seen[1]
    assert seen[0]["connect"] == (3.0 if given else 5.0)
    assert seen[0]["read"] == (3.0 if given else 600.0)


def test_anthropic_still_refuses_a_long_call_that_does_not_stream() -> None:
    """The guard of Anthropic's SDK, which looks whether the client's timeout is its default, works as before."""
    http_client = upstream_client_sync("anthropic", Recorder())
    with (
        anthropic.Anthropic(api_key="k", http_client=http_client) as client,
        pytest.raises(ValueError, match="Streaming is required"),
    ):
        client.messages.create(model=MODEL, max_tokens=1_000_000, messages=MESSAGES)


def test_sdk_keeps_its_pool_and_redirects(sdk: Sdk) -> None:
    """The pool has the limits of the SDK's own client, and for Anthropic also its socket options."""
    own, metered = sdk.default_client(), sdk.metered(Recorder())
    pools = [own._transport._pool, metered._transport._wrapped._pool]
    for name in ("_max_connections", "_max_keepalive_connections", "_keepalive_expiry", "_http1", "_http2", "_retries"):
        assert len({getattr(pool, name) for pool in pools}) == 1, name
    assert (pools[1]._max_connections, pools[1]._max_keepalive_connections) == (1000, 100)
    if sdk.vendor == "anthropic":
        assert set(pools[0]._socket_options) == set(pools[1]._socket_options)
    assert own.follow_redirects is metered.follow_redirects is True
    assert (own.max_redirects, own.trust_env, own.timeout) == (
        metered.max_redirects,
        metered.trust_env,
        metered.timeout,
    )
    for client in (own, metered):
        if sdk.asynchronous:
            asyncio.run(client.aclose())
        else:
            client.close()


def test_anthropic_stream_helper_left_early_is_heard_once(provider: Provider) -> None:
    """Leaving Anthropic's stream helper after the first text ends the exchange, with the input tokens told by then."""
    recorder = Recorder()

    async def run() -> None:
        http_client = upstream_client("anthropic", recorder)
        async with (
            anthropic.AsyncAnthropic(api_key="k", base_url=provider.url, http_client=http_client) as client,
            client.messages.stream(model=MODEL, max_tokens=64, messages=MESSAGES) as stream,
        ):
            async for _ in stream.text_stream:
                break

    asyncio.run(run())
    assert recorder.events == ["started", "answered 200", "finished 200"]
    assert recorder.ended[0].counts is not None
    assert recorder.ended[0].counts[0] == 425
