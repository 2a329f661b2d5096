"""
What the upstream client costs for each answer of a provider: ``python -m tests.bench.upstream``.

Everything is in one process: the transport that is wrapped makes the answer, so that what is timed besides is the HTTP
library alone. The quotas of each answer are captured and its usage is read, in a metered call and outside of one.
Options: ``--rounds N``, ``--requests N``, ``--chunks N``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Any

import httpx2

from asgi_metering import Metering
from asgi_metering.prices import per_million_tokens
from tests.bench.drive import Subject, Work, measure, shares, table

ROUNDS = 13
REQUESTS = 200
CHUNKS = 200

URL = "http://provider.test/v1/chat/completions"

FIELDS = {
    "x-request-id": "req_1",
    "openai-version": "2020-10-01",
    "x-ratelimit-limit-requests": "5000",
    "x-ratelimit-remaining-requests": "4999",
    "x-ratelimit-reset-requests": "12ms",
    "x-ratelimit-limit-tokens": "2000000",
    "x-ratelimit-remaining-tokens": "1999996",
    "x-ratelimit-reset-tokens": "1ms",
}
"""What OpenAI sends with each answer."""

USAGE = {"prompt_tokens": 9, "completion_tokens": 200, "total_tokens": 209}

BARE = "bare transport"


class Body(httpx2.AsyncByteStream):
    """A body that comes in these pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self._pieces:
            yield piece


class Answering(httpx2.AsyncBaseTransport):
    """A transport that answers at once, always the same."""

    def __init__(self, media: str, pieces: list[bytes]) -> None:
        self._fields = {**FIELDS, "content-type": media}
        self._pieces = pieces

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """The answer, whose body streams."""
        return httpx2.Response(200, headers=self._fields, stream=Body(self._pieces))


def whole() -> Answering:
    """An answer in JSON, of a few hundred words."""
    message = {"role": "assistant", "content": "the river runs past a small cafe " * 30}
    answer = {"object": "chat.completion", "model": "gpt-5.5", "choices": [{"message": message}], "usage": USAGE}
    return Answering("application/json", [json.dumps(answer).encode()])


def streamed(chunks: int) -> Answering:
    """A stream of so many chunks, and one with the usage."""

    def event(choices: list[Any], **more: Any) -> bytes:
        chunk = {"id": "c", "object": "chat.completion.chunk", "model": "gpt-5.5", "choices": choices, **more}
        return b"data: " + json.dumps(chunk).encode() + b"\n\n"

    delta = event([{"index": 0, "delta": {"content": " word"}, "finish_reason": None}])
    end = event([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    return Answering("text/event-stream", [*[delta] * chunks, end, event([], usage=USAGE), b"data: [DONE]\n\n"])


def asking(client: httpx2.AsyncClient) -> Work:
    """Work that asks, and reads each answer as it comes."""

    async def work(count: int) -> None:
        for _ in range(count):
            async with client.stream("POST", URL, json={}) as answer:
                async for _piece in answer.aiter_raw():
                    pass

    return work


def in_calls(metering: Metering, work: Work) -> Work:
    """The same, in a metered call for each round: its own cost is shared by all the answers."""

    async def metered(count: int) -> None:
        # A call remembers a thousand answers at most.
        for start in range(0, count, 500):
            async with metering.charge(payer="org", line="chat", price=per_million_tokens(input=3, output=15), hold=1):
                await work(min(500, count - start))

    return metered


async def tables(rounds: int, requests: int, chunks: int) -> str:
    """CPU per answer: a JSON one, and a stream."""
    metering = Metering(sinks=())
    parts = []
    async with metering:
        await metering.grant("org", 10**8, id="g")
        answers: list[tuple[str, Callable[[], Answering]]] = [
            ("JSON answer", whole),
            (f"stream of {chunks} chunks", lambda: streamed(chunks)),
        ]
        for what, make in answers:
            bare = asking(httpx2.AsyncClient(transport=make(), verify=False))
            metered = asking(metering.upstream_client("openai", make(), verify=False))
            subjects = [
                Subject(BARE, bare),
                Subject("upstream client, in no call", metered, BARE),
                Subject("upstream client, in a metered call", in_calls(metering, metered), BARE),
            ]
            count = requests if make is whole else max(1, requests // 10)
            rows = await measure(subjects, rounds=rounds, requests=count)
            parts.append(table(f"Per {what} of a provider", rows, shares(subjects, BARE), "the bare answer", "CPU us"))
    return "\n".join(parts)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.upstream")
    for name, default in (("rounds", ROUNDS), ("requests", REQUESTS), ("chunks", CHUNKS)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, httpx2 {version('httpx2')}\n")
    print(asyncio.run(tables(options.rounds, options.requests, options.chunks)))


if __name__ == "__main__":
    main()
