"""The SDKs of OpenAI and Anthropic as clients of a metered gateway behind a real server, with a real provider."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
import pytest

from asgi_metering import Metering
from asgi_metering.demo.gateway import PRICE, gateway, who
from asgi_metering.testing import Provider
from asgi_metering.usage import TokenUsage
from tests.harness.servers import serve_in_thread
from tests.servers.books import CREDIT, Books, Ended, deliver_to

MESSAGES: Any = [{"role": "user", "content": "Tell me about metering."}]


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running gateway, its books, and the provider behind it."""

    url: str
    books: Books
    provider: Provider

    def openai(self, key: str) -> openai.OpenAI:
        """OpenAI's client, asking once."""
        return openai.OpenAI(api_key=key, base_url=f"{self.url}/v1", max_retries=0, timeout=20)

    def anthropic(self, key: str) -> anthropic.Anthropic:
        """Anthropic's client, asking once."""
        return anthropic.Anthropic(api_key=key, base_url=self.url, max_retries=0, timeout=20)


@pytest.fixture
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The demo's gateway behind uvicorn, in front of the bundled provider behind another."""
    books = Books(tmp_path_factory.mktemp("gateway") / "metering.db")
    provider = Provider()
    metering = Metering(
        f"{books.url}?synchronous=OFF", identify=who, sinks=[deliver_to(books.delivered)], store_timeout_s=10.0
    )
    with serve_in_thread(provider) as upstream, serve_in_thread(gateway(metering, upstream.url)) as server:
        yield Gateway(server.url, books, provider)


def cost(usage: TokenUsage) -> int:
    """What *usage* costs, in smallest parts."""
    exact = PRICE.cost(usage) * CREDIT
    assert exact == int(exact)
    return int(exact)


def test_openai_raises_its_own_errors(served: Gateway) -> None:
    """A stranger, an empty account and the seventh call of a minute raise OpenAI's typed errors; nothing is charged."""
    with served.openai("key-nobody") as stranger, pytest.raises(openai.AuthenticationError) as unknown:
        stranger.chat.completions.create(model="echo", messages=MESSAGES)
    with served.openai("key-ada") as poor, pytest.raises(openai.APIStatusError) as broke:
        poor.chat.completions.create(model="echo", messages=MESSAGES, stream=True)
    assert not served.provider.requests
    served.books.grant("carol", 100)
    with served.openai("key-carol") as fast:
        for _ in range(6):
            fast.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=2)
        with pytest.raises(openai.RateLimitError) as limited:
            fast.chat.completions.create(model="echo", messages=MESSAGES, max_tokens=2)
    assert (unknown.value.status_code, unknown.value.code) == (401, "invalid_api_key")
    assert (broke.value.status_code, broke.value.code) == (402, "insufficient_quota")
    assert limited.value.status_code == 429
    assert 0 < int(limited.value.response.headers["retry-after"]) <= 60
    assert len(served.provider.requests) == 6
    assert {ended.basis for ended in served.books.ended("carol", 6)} == {"usage"}


def test_anthropic_raises_its_own_errors(served: Gateway) -> None:
    """The same for Anthropic's."""
    ask: dict[str, Any] = {"model": "claude-echo", "messages": MESSAGES, "max_tokens": 2}
    with served.anthropic("key-nobody") as stranger, pytest.raises(anthropic.AuthenticationError) as unknown:
        stranger.messages.create(**ask)
    with served.anthropic("key-ada") as poor, pytest.raises(anthropic.APIStatusError) as broke:
        poor.messages.create(**ask)
    assert not served.provider.requests
    served.books.grant("carol", 100)
    with served.anthropic("key-carol") as fast:
        for _ in range(6):
            fast.messages.create(**ask)
        with pytest.raises(anthropic.RateLimitError) as limited:
            fast.messages.create(**ask)
    errors = [(error.value.status_code, error.value.type) for error in (unknown, broke, limited)]
    assert errors == [(401, "authentication_error"), (402, "billing_error"), (429, "rate_limit_error")]
    assert 0 < int(limited.value.response.headers["retry-after"]) <= 60
    assert len(served.provider.requests) == 6
    assert {ended.basis for ended in served.books.ended("carol", 6)} == {"usage"}


def test_openai_streams_and_is_charged_by_usage(served: Gateway) -> None:
    """A stream that OpenAI's SDK reads to its end costs what its last chunk reports."""
    served.books.grant("ada", 100)
    with served.openai("key-ada") as client:
        chunks = list(
            client.chat.completions.create(
                model="echo:words-12",
                messages=MESSAGES,
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens == 12
    due = cost(TokenUsage(input=usage.prompt_tokens, output=usage.completion_tokens))
    assert served.books.ended("ada") == [Ended("completed", "completed, usage reported", "usage", due)]


def test_anthropic_streams_and_is_charged_by_usage(served: Gateway) -> None:
    """A stream that Anthropic's SDK reads to its end costs what its events report, cache reads included."""
    served.books.grant("ada", 100)
    with (
        served.anthropic("key-ada") as client,
        client.messages.stream(model="claude-echo:cached-3", messages=MESSAGES, max_tokens=12) as stream,
    ):
        usage = stream.get_final_message().usage
    read = usage.cache_read_input_tokens
    assert read == 3
    due = cost(TokenUsage(input=usage.input_tokens + read, cached=read, output=usage.output_tokens))
    assert served.books.ended("ada") == [Ended("completed", "completed, usage reported", "usage", due)]


@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
def test_close_an_sdk_stream_midway(served: Gateway, vendor: str) -> None:
    """A stream that the SDK closes midway costs what had passed, and the provider's stream is closed as well."""
    served.books.grant("ada", 100)
    ask: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 4_000, "stream": True}
    stream: Any
    if vendor == "openai":
        with served.openai("key-ada") as client:
            stream = client.chat.completions.create(model="echo:endless:slow-2", **ask)
            for _ in range(10):
                next(stream)
            stream.close()
    else:
        with served.anthropic("key-ada") as other:
            stream = other.messages.create(model="claude-echo:endless:slow-2", **ask)
            for _ in range(10):
                next(stream)
            stream.close()
    (ended,) = served.books.ended("ada")
    assert (ended.outcome, ended.basis) == ("client_gone", "observed")
    assert 0 < ended.amount < cost(TokenUsage(output=4_000))
    (seen,) = served.provider.requests
    assert seen.ended.wait(20)
    assert seen.client_disconnected
