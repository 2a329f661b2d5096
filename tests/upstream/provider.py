"""
A model provider on loopback, and listeners that write down what they hear.

Knows the wire formats of two providers and how to misbehave. Never knows what a test expects.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from asgi_metering.usage.reader import UsageReader

CURRENT: ContextVar[str | None] = ContextVar("CURRENT", default=None)
"""Stands for the current call: listeners hand it out as their token."""

OPENAI_HEADERS = [
    (b"x-ratelimit-limit-requests", b"60"),
    (b"x-ratelimit-remaining-requests", b"59"),
    (b"x-ratelimit-reset-requests", b"1s"),
    (b"openai-organization", b"org-secret"),
]

ANTHROPIC_HEADERS = [
    (b"anthropic-ratelimit-input-tokens-limit", b"80000"),
    (b"anthropic-ratelimit-input-tokens-remaining", b"79000"),
    (b"request-id", b"req_1"),
]

OPENAI_JSON = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-5.5",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello"}}],
    "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
}

ANTHROPIC_JSON = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4-5",
    "content": [{"type": "text", "text": "Hello"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 25, "cache_read_input_tokens": 400, "output_tokens": 15},
}


def sse(*events: dict[str, Any], named: bool = False) -> list[bytes]:
    """Return each event as one chunk, with an ``event:`` line if *named*."""
    return [
        (f"event: {event['type']}\n" if named else "").encode() + b"data: " + json.dumps(event).encode() + b"\n\n"
        for event in events
    ]


def _openai_chunk(**fields: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-2", "object": "chat.completion.chunk", "created": 1, "model": "gpt-5.5", **fields}


OPENAI_STREAM = [
    *sse(
        _openai_chunk(choices=[{"index": 0, "delta": {"content": "Hel"}, "finish_reason": None}], usage=None),
        _openai_chunk(choices=[{"index": 0, "delta": {"content": "lo"}, "finish_reason": "stop"}], usage=None),
        _openai_chunk(choices=[], usage={"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}),
    ),
    b"data: [DONE]\n\n",
]

ANTHROPIC_STREAM = sse(
    {
        "type": "message_start",
        "message": {
            **ANTHROPIC_JSON,
            "content": [],
            "stop_reason": None,
            "usage": {"input_tokens": 25, "cache_read_input_tokens": 400, "output_tokens": 1},
        },
    },
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "content_block_stop", "index": 0},
    {
        "type": "message_delta",
        "delta": {"stop_reason": "end_turn", "stop_sequence": None},
        "usage": {"output_tokens": 15},
    },
    {"type": "message_stop"},
    named=True,
)


@dataclass
class Answer:
    """
    One scripted answer.

    Attributes:
        chunks: Body parts, each sent on its own.
        gates: Before the chunk of the same index is sent, this event is waited for.
        length: Declared length; a body that ends earlier breaks the connection.
    """

    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    gates: dict[int, threading.Event] = field(default_factory=dict)
    length: int | None = None


def json_answer(body: dict[str, Any], headers: list[tuple[bytes, bytes]], status: int = 200) -> Answer:
    """Return *body* as a JSON answer in one piece."""
    return Answer(status, [(b"content-type", b"application/json"), *headers], [json.dumps(body).encode()])


def stream_answer(chunks: list[bytes], headers: list[tuple[bytes, bytes]], **more: Any) -> Answer:
    """Return *chunks* as an event stream."""
    return Answer(200, [(b"content-type", b"text/event-stream"), *headers], chunks, **more)


class Provider:
    """The ASGI application: gives the scripted answers in turn, then the usual one of its path."""

    def __init__(self) -> None:
        self.url = ""
        self.script: list[Answer] = []
        self.requests: list[dict[str, Any]] = []
        self._held: list[threading.Event] = []

    def forget(self) -> None:
        """Drop script and requests, and open every gate that an answer still stands before."""
        self.script, self.requests = [], []
        for gate in self._held:
            gate.set()
        self._held.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        self.requests.append({"path": scope["path"], "headers": headers, "body": body})
        await self._send(self.script.pop(0) if self.script else self._usual(scope["path"], body), send)

    async def _send(self, answer: Answer, send: Any) -> None:
        headers = list(answer.headers)
        if answer.length is not None:
            headers.append((b"content-length", str(answer.length).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        for index, chunk in enumerate(answer.chunks):
            if index in answer.gates:
                self._held.append(answer.gates[index])
                await asyncio.to_thread(answer.gates[index].wait, 30)
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _usual(self, path: str, body: bytes) -> Answer:
        streams = body and json.loads(body).get("stream")
        if path.endswith("/messages"):
            if streams:
                return stream_answer(ANTHROPIC_STREAM, ANTHROPIC_HEADERS)
            return json_answer(ANTHROPIC_JSON, ANTHROPIC_HEADERS)
        if streams:
            return stream_answer(OPENAI_STREAM, OPENAI_HEADERS)
        return json_answer(OPENAI_JSON, OPENAI_HEADERS)


class _Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = threading.Event()

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """Start, then say so."""
        await super().startup(*args, **kwargs)
        self.listens.set()


@contextlib.contextmanager
def running_provider() -> Iterator[Provider]:
    """Serve a `Provider` from a thread, on a free port, until the block ends."""
    provider = Provider()
    server = _Server(uvicorn.Config(provider, port=0, lifespan="off", log_level="critical", http="h11"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.listens.wait(30)
        port = server.servers[0].sockets[0].getsockname()[1]
        provider.url = f"http://127.0.0.1:{port}"
        yield provider
    finally:
        provider.forget()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


@dataclass
class Ended:
    """What one exchange came to."""

    token: object
    provider: str
    status: int
    reader: UsageReader

    @property
    def counts(self) -> tuple[int | None, int | None] | None:
        """Input and output tokens, `None` without usage."""
        report = self.reader.report()
        return None if report is None or report.usage is None else (report.usage.input, report.usage.output)


class Recorder:
    """A listener that keeps what it hears; `CURRENT` is its token."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.answers: list[tuple[object, str, int, dict[bytes, bytes], float]] = []
        self.ended: list[Ended] = []

    def started(self, provider: str) -> object:
        """Hand out the current call."""
        self.events.append("started")
        return CURRENT.get()

    def answered(
        self, token: object, provider: str, status: int, headers: Iterable[tuple[bytes, bytes]], started_at: float
    ) -> None:
        """Keep the headers, with names in lower case."""
        self.events.append(f"answered {status}")
        lower = {name.lower(): value for name, value in headers}
        self.answers.append((token, provider, status, lower, started_at))

    def finished(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """Keep the reader."""
        self.events.append(f"finished {status}")
        self.ended.append(Ended(token, provider, status, reader))
