"""Charged clients: one method of a client is charged whenever it is awaited, the rest is as it was (S3.41)."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from asgi_metering import Metering, TokenUsage, current_call
from asgi_metering.call import CallRefused
from asgi_metering.charged import ChargedStream
from asgi_metering.errors import ConfigurationError
from asgi_metering.opening import CURRENT
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis
from asgi_metering.testing.provider import Provider
from tests.harness.servers import serve_in_thread

CREDIT = 1_000_000
PRICE = per_token(input=1, output=1)


class Studio:
    """A client of some provider: one method costs, and says what it used."""

    def __init__(self) -> None:
        self.name = "studio"
        self.asked: list[str] = []
        self.closed = False

    def voices(self) -> list[str]:
        """What costs nothing."""
        return ["alloy"]

    async def speak(self, text: str) -> str:
        """Use three tokens; raise what is asked for."""
        self.asked.append(text)
        current_call().record(TokenUsage(input=1, output=2))
        if text == "fail":
            raise LookupError(text)
        return text.upper()

    async def listen(self, words: int) -> AsyncIterator[str]:
        """Answer a stream that uses a token for each word, and raises after ten."""

        async def stream() -> AsyncIterator[str]:
            try:
                for number in range(words):
                    current_call().record(TokenUsage(output=1))
                    if number == 10:
                        raise LookupError("too many")
                    yield f"word {number}"
            finally:
                self.closed = True

        return stream()

    def sing(self) -> AsyncIterator[str]:
        """Stream without being awaited first."""
        return aiter(_Items(2))

    def hum(self) -> str:
        """Answer at once."""
        return "hm"


class _Items:
    """A stream of numbers that is no generator."""

    def __init__(self, left: int) -> None:
        self.left = left

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> str:
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        current_call().record(TokenUsage(output=1))
        return str(self.left)


def play(scene: Callable[[Metering, Studio], Awaitable[None]]) -> None:
    """Play *scene* with a client and a hundred credits of ann's; nothing stays held, and the books are proven."""

    async def run() -> None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 100, id="g")
            await scene(metering, Studio())
            assert CURRENT.get() is None
            await metering.runtime().booked()
            assert (await metering.balance("ann")).held == 0
            assert await metering.check() == []

    asyncio.run(run())


def charged(metering: Metering, studio: Any, method: str, **options: Any) -> Any:
    """The client with one method that ann is charged for."""
    return metering.charged(studio, method, **{"payer": "ann", "line": "speech", "price": PRICE, "hold": 9, **options})


async def spent(metering: Metering) -> int:
    """What ann has settled, in credits."""
    await metering.runtime().booked()
    return (await metering.balance("ann")).settled // CREDIT


def test_charge_what_a_method_has_used() -> None:
    """Each awaited call is charged what was used in it; everything else of the client falls through (S3.41)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        client = charged(metering, studio, "speak")
        assert (client.name, client.voices()) == ("studio", ["alloy"])
        assert await spent(metering) == 0
        assert await client.speak("one") == "ONE"
        assert await client.speak(text="two") == "TWO"
        assert await spent(metering) == 6
        assert (studio.asked, repr(client)[:14]) == (["one", "two"], "<speak charged")

    play(scene)


def test_call_nothing_where_the_charge_is_refused() -> None:
    """Who cannot pay has the method not called (S3.41, S3.2)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        client = charged(metering, studio, "speak", payer="poor")
        with pytest.raises(CallRefused):
            await client.speak("one")
        assert studio.asked == []

    play(scene)


def test_charge_nothing_for_what_fails() -> None:
    """What the method raises rises unchanged, and is not charged (S3.8)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        with pytest.raises(LookupError, match="fail"):
            await charged(metering, studio, "speak").speak("fail")
        assert await spent(metering) == 0

    play(scene)


def test_charge_a_method_of_a_part() -> None:
    """A name with dots is a method of a part; other parts, and other methods of that one, are the client's own."""

    async def scene(metering: Metering, studio: Studio) -> None:
        client = charged(metering, SimpleNamespace(audio=SimpleNamespace(voice=studio), v=1), "audio.voice.speak")
        assert (client.v, client.audio.voice.voices()) == (1, ["alloy"])
        assert await client.audio.voice.speak("one") == "ONE"
        assert await spent(metering) == 3

    play(scene)


def test_pay_as_the_call_around_it() -> None:
    """Without a payer of its own it is paid by the call around it, and is a call of its own (S0.27, S3.24)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        client = charged(metering, studio, "speak", payer=None)
        async with metering.charge(payer="ann", line="turn", price=1) as outer:
            await client.speak("one")
            assert current_call() is outer
        assert await spent(metering) == 4

    play(scene)


def test_charge_a_stream_when_it_is_exhausted() -> None:
    """A stream is charged at its end for all that it used; between its items the reader's own call goes on (S3.24)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        client = charged(metering, studio, "listen")
        async with metering.charge(payer="ann", line="turn", price=1) as outer:
            words = []
            async for word in await client.listen(4):
                assert current_call() is outer
                words.append(word)
        assert words == [f"word {number}" for number in range(4)]
        assert await spent(metering) == 5

    play(scene)


def test_charge_a_stream_that_is_not_awaited() -> None:
    """A method that answers a stream at once is awaited all the same, and its stream is charged."""

    async def scene(metering: Metering, studio: Studio) -> None:
        stream = await charged(metering, studio, "sing").sing()
        assert (stream.left, [item async for item in stream], await spent(metering)) == (2, ["1", "0"], 2)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    play(scene)


@pytest.mark.parametrize("how", ["aclose", "close", "block"])
def test_charge_a_stream_that_is_left(how: str) -> None:
    """A stream that is closed early is closed itself, and charged for what it has used until then, once."""

    async def scene(metering: Metering, studio: Studio) -> None:
        stream = await charged(metering, studio, "listen").listen(9)
        if how == "block":
            async with stream:
                assert [await anext(stream) for _ in range(2)] == ["word 0", "word 1"]
        else:
            assert [await anext(stream) for _ in range(2)] == ["word 0", "word 1"]
            await getattr(stream, how)()
        assert (studio.closed, await spent(metering)) == (True, 2)
        await stream.aclose()
        assert await spent(metering) == 2

    play(scene)


@pytest.mark.parametrize("read", [0, 2, 9])
def test_charge_a_stream_that_is_dropped(read: int) -> None:
    """A stream that nobody closes, as of a response whose client left, is charged as if it had been (pitfall 38)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        stream = await charged(metering, studio, "listen", on_missing_usage="none").listen(9)
        assert [await anext(stream) for _ in range(read)] == [f"word {number}" for number in range(read)]
        (held,) = await metering.holds()
        del stream
        gc.collect()
        async with asyncio.timeout(5):
            while await metering.holds():
                await asyncio.sleep(0)
        assert held.amount == 9 * CREDIT
        assert await spent(metering) == read

    play(scene)


@pytest.mark.parametrize("where", ["stream", "reader"])
def test_charge_nothing_for_a_stream_that_fails(where: str) -> None:
    """A stream that raises, or whose reader's block does, releases its hold; the error rises unchanged (S3.8)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        async def read() -> None:
            async with await charged(metering, studio, "listen", hold=20).listen(20) as stream:
                async for _ in stream:
                    if where == "reader":
                        raise LookupError("too many")

        with pytest.raises(LookupError, match="too many"):
            await read()
        assert (studio.closed, await spent(metering)) == (True, 0)

    play(scene)


def test_refuse_what_cannot_be_charged() -> None:
    """A method that is not there is refused at once; one that cannot be awaited when it is called, uncharged."""

    async def scene(metering: Metering, studio: Studio) -> None:
        with pytest.raises(ConfigurationError, match="has no method 'shout'"):
            charged(metering, studio, "shout")
        with pytest.raises(ConfigurationError, match=r"has no method 'audio\.speak'"):
            charged(metering, studio, "audio.speak")
        with pytest.raises(ConfigurationError, match=r"metering\.charge_sync"):
            await charged(metering, studio, "hum").hum()
        assert await spent(metering) == 0

    play(scene)


@pytest.mark.parametrize("how", ["close", "block", "drop"])
def test_charge_what_was_observed_of_a_real_stream_that_is_left(how: str) -> None:
    """Left behind five of 200 words it costs what came until then, not all that was held for it (S3.41, S3.7)."""
    provider = Provider()

    async def run(url: str) -> None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 10_000, id="g")
            http = metering.upstream_client("openai", verify=False)
            async with openai.AsyncOpenAI(api_key="sk-any", base_url=url + "/v1", http_client=http) as sdk:
                client = charged(metering, sdk, "chat.completions.create", hold=5_000)
                messages = [{"role": "user", "content": "Hi"}]
                stream = await client.chat.completions.create(model="words-200", messages=messages, stream=True)
                read = 0
                async with stream if how == "block" else contextlib.nullcontext():
                    async for event in stream:
                        read += bool(event.choices and event.choices[0].delta.content)
                        if read == 5:
                            break
                if how == "close":
                    await stream.close()
                del stream, event
                gc.collect()
                async with asyncio.timeout(5):
                    while await metering.holds():
                        await asyncio.sleep(0)
                assert 5 <= await spent(metering) < 1_000
                lines = [line async for line in metering.statement("ann") if line.line == "speech"]
                assert [line.basis for line in lines] == [Basis.OBSERVED]

    with serve_in_thread(provider) as server:
        asyncio.run(run(server.url))


def test_know_what_a_call_of_a_method_asks_for() -> None:
    """What the method is given is the request: its prompt and bound are held; who leaves pays the prompt (S3.41)."""
    provider = Provider()

    async def run(url: str) -> None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 10_000, id="g")
            http = metering.upstream_client("openai", verify=False)
            async with openai.AsyncOpenAI(api_key="sk-any", base_url=url + "/v1", http_client=http) as sdk:
                client = charged(metering, sdk, "chat.completions.create", hold=None)
                messages = [{"role": "user", "content": "word " * 500}]
                stream = await client.chat.completions.create(
                    model="words-200", messages=messages, stream=True, max_tokens=300
                )
                (hold,) = await metering.holds()
                assert 800 < hold.amount / CREDIT < 850
                await anext(aiter(stream))
                await stream.close()
                assert 500 < await spent(metering) < 600

    with serve_in_thread(provider) as server:
        asyncio.run(run(server.url))


@pytest.mark.parametrize(("on_disconnect", "cost"), [("none", 0), ("hold", 9), ("observed", 2)])
def test_choose_what_a_stream_costs_that_is_left(on_disconnect: Any, cost: int) -> None:
    """Outside HTTP it is the reader who leaves: what that costs is chosen as of a client (S3.41)."""

    async def scene(metering: Metering, studio: Studio) -> None:
        stream = await charged(metering, studio, "listen", on_disconnect=on_disconnect).listen(9)
        assert [await anext(stream) for _ in range(2)] == ["word 0", "word 1"]
        await stream.aclose()
        assert await spent(metering) == cost

    play(scene)


@pytest.mark.parametrize("streams", [False, True])
def test_charge_a_real_client(streams: bool) -> None:
    """The openai SDK's own client is charged what the provider reported, whole or as a stream (S3.41)."""
    provider = Provider()

    async def run(url: str) -> None:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 1_000, id="g")
            http = metering.upstream_client("openai", verify=False)
            sdk = openai.AsyncOpenAI(api_key="sk-any", base_url=url + "/v1", http_client=http)
            # The block of a charged client is the client's own.
            async with contextlib.AsyncExitStack() as stack:
                client = await stack.enter_async_context(charged(metering, sdk, "chat.completions.create", hold=500))
                options: dict[str, Any] = {"stream_options": {"include_usage": True}} if streams else {}
                messages = [{"role": "user", "content": "Hi"}]
                answer = await client.chat.completions.create(
                    model="words-20", messages=messages, stream=streams, **options
                )
                if streams:
                    assert isinstance(answer, ChargedStream)
                    async with answer:
                        assert [event async for event in answer][-1].usage.completion_tokens == 20
                counts = provider.requests[-1].counts
                assert counts is not None
                assert await spent(metering) == counts.input + counts.output
                lines = [line async for line in metering.statement("ann") if line.line == "speech"]
                assert [line.basis for line in lines] == [Basis.USAGE]
            assert sdk.is_closed()

    with serve_in_thread(provider) as server:
        asyncio.run(run(server.url))
