"""
The provider as an ASGI application.

Knows paths, keys, limits, the order of checks, and when a client is gone. Never knows a field of a wire format.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
import anyio.lowlevel
from starlette.requests import ClientDisconnect, Request

from asgi_metering.testing.provider.answers import TokenCounts, plan
from asgi_metering.testing.provider.anthropic_wire import Anthropic, CountTokens, Messages
from asgi_metering.testing.provider.behaviour import Behaviour, Stop, UnknownBehaviourError, read_model
from asgi_metering.testing.provider.compatible_wire import Groq, GroqChat, Mistral, MistralChat
from asgi_metering.testing.provider.gemini_wire import Gemini, GenerateContent
from asgi_metering.testing.provider.openai_wire import Chat, OpenAI, Responses
from asgi_metering.testing.provider.quota import Account
from asgi_metering.testing.provider.wire import (
    Asked,
    Call,
    Endpoint,
    Json,
    Refusal,
    Vendor,
    encode_event,
    encode_json,
    limited,
)
from asgi_metering.tokens import DEFAULT_ENCODING, count_tokens

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from starlette.types import Message, Receive, Scope, Send

__all__ = ["Provider", "SeenRequest"]

MAX_BODY_BYTES: Final = 32 * 1024 * 1024
"""Anthropic's documented bound of a request; OpenAI states none."""

MAX_SEEN: Final = 1_000
"""Requests that are remembered: a test looks at few, and a demo that runs for days must not grow."""

_JSON = "application/json"
_EVENTS = "text/event-stream; charset=utf-8"


@dataclass(slots=True, eq=False)
class SeenRequest:
    """
    One request as the provider saw it; it is filled in while the request is answered.

    Attributes:
        number: Counted from 1; the answer's ids carry it.
        path: Without the query.
        headers: Names in lower case; not in the ``repr``, for they carry the key.
        body: The JSON body, or `None` while it was not read or is none.
        model: As asked for, or "".
        status: The answer's status, or `None` before it began.
        counts: What the whole answer uses, or `None` where none was planned. Cut short, less was sent.
        usage_sent: The final usage went out.
        deltas_sent: Words handed to the server; ``answer_text(deltas_sent)`` is their text for one choice.
        finished: The response was handed to the server to its proper end, which may be an error's.
        client_disconnected: The client left before that.
        ended: Set when the provider is done with it, in whatever way; wait for it in a thread.
    """

    number: int
    path: str
    headers: dict[str, str] = field(repr=False)
    body: Json | None = field(default=None, repr=False)
    model: str = ""
    status: int | None = None
    counts: TokenCounts | None = None
    usage_sent: bool = False
    deltas_sent: int = 0
    finished: bool = False
    client_disconnected: bool = False
    ended: threading.Event = field(default_factory=threading.Event, repr=False)


class _House(NamedTuple):
    """A vendor, its account here, its paths, and what finds those that carry the model's name."""

    vendor: Vendor
    account: Account
    endpoints: dict[str, Endpoint]
    at: Callable[[str], Endpoint | None] | None = None

    def endpoint(self, path: str) -> Endpoint | None:
        """What answers at *path*."""
        return self.endpoints.get(path) if self.at is None else self.at(path)


class Provider:
    """
    A model provider that runs anywhere: the wire formats of five vendors, real token counts, faults on demand.

    See the package's docstring for what a request can ask for. One account for each vendor, shared by all keys.

    Args:
        requests_per_minute: Limit of each account.
        tokens_per_minute: All but Anthropic: input and output together.
        input_tokens_per_minute, output_tokens_per_minute: Anthropic.
        api_keys: The keys that are known; `None` takes any.
        count: Counts the tokens of a text; by default with `asgi_metering.tokens`, which estimates where the
            ``tokens`` extra is not installed.
        clock: Seconds of the epoch: for timestamps, refills and resets.
        sleep: Awaits seconds: for slow answers.

    Attributes:
        requests: The last `MAX_SEEN` requests, oldest first.
    """

    def __init__(
        self,
        *,
        requests_per_minute: int = 5_000,
        tokens_per_minute: int = 2_000_000,
        input_tokens_per_minute: int = 2_000_000,
        output_tokens_per_minute: int = 400_000,
        api_keys: Collection[str] | None = None,
        count: Callable[[str], int] | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = anyio.sleep,
    ) -> None:
        self.requests: deque[SeenRequest] = deque(maxlen=MAX_SEEN)
        self._api_keys = api_keys
        self._count = count or _count
        self._clock = clock
        self._sleep = sleep
        self._seen = 0
        self._asked: Counter[str] = Counter()
        now = clock()
        shared = {"requests": requests_per_minute, "tokens": tokens_per_minute}
        self._openai = _house(OpenAI(), Account(shared, now), Chat(), Responses())
        limits = {
            "requests": requests_per_minute,
            "input-tokens": input_tokens_per_minute,
            "output-tokens": output_tokens_per_minute,
        }
        # By the beginning of their paths; what begins otherwise is OpenAI's.
        self._others = {
            "/v1/messages": _house(Anthropic(), Account(limits, now), Messages(), CountTokens()),
            "/openai/": _house(Groq(), Account(shared, now), GroqChat()),
            "/mistral/": _house(Mistral(), Account(shared, now), MistralChat()),
            "/v1/models/": (gemini := _House(Gemini(), Account(shared, now), {}, GenerateContent.at)),
            "/v1beta/models/": gemini,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; a lifespan is answered, a WebSocket closed."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await self._http(Request(scope, receive), send)

    async def _http(self, request: Request, send: Send) -> None:
        self._seen += 1
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        seen = SeenRequest(self._seen, path, dict(request.headers))
        self.requests.append(seen)
        house = next((found for start, found in self._others.items() if path.startswith(start)), self._openai)
        exchange = _Exchange(seen, house, self._clock, self._sleep, request.receive, send)
        try:
            await self._answer(request, exchange)
        except Refusal as refusal:
            with suppress(OSError):
                await exchange.refuse(refusal)
        except ClientDisconnect:
            seen.client_disconnected = True
        finally:
            seen.ended.set()

    async def _answer(self, request: Request, exchange: _Exchange) -> None:
        """Check and answer. Raises `Refusal`, and `ClientDisconnect` while the body is read."""
        seen, house = exchange.seen, exchange.house
        endpoint = house.endpoint(seen.path)
        if endpoint is None:
            raise Refusal("unknown_path", f"{request.method} {seen.path}")
        if request.method != "POST":
            raise Refusal("wrong_method", f"{request.method} {seen.path}")
        self._check_key(house.vendor, seen.headers)
        house.vendor.check_headers(seen.headers)
        seen.body = _parse(await _read(request))
        asked = endpoint.read(seen.body)
        seen.model = asked.model
        call = self._plan(asked, seen)
        self._admit(call, endpoint, house)
        await exchange.answer(endpoint, call)

    def _check_key(self, vendor: Vendor, headers: dict[str, str]) -> None:
        key = vendor.credential(headers)
        if key is None:
            raise Refusal("no_key")
        if self._api_keys is not None and key not in self._api_keys:
            raise Refusal("wrong_key")

    def _plan(self, asked: Asked, seen: SeenRequest) -> Call:
        try:
            behaviour = read_model(asked.model)
        except UnknownBehaviourError as error:
            raise Refusal("unknown_model", str(error), param="model") from error
        if not asked.stream and behaviour.endless:
            raise Refusal("invalid", "An endless answer needs a stream.", param="stream")
        answer = plan(behaviour, asked.prompt, asked.max_tokens, asked.choices, self._count)
        return Call(seen.number, int(self._clock()), asked, behaviour, answer)

    def _admit(self, call: Call, endpoint: Endpoint, house: _House) -> None:
        """Take from the limits, or raise the `Refusal` that the behaviour or a limit asks for."""
        behaviour = call.behaviour
        failure = behaviour.failure
        if behaviour.fail_first:
            self._asked[call.asked.model] += 1
            if self._asked[call.asked.model] <= behaviour.fail_first:
                failure = behaviour.first_failure
        if failure is not None:
            limit = house.account.buckets["requests"].limit
            detail = f"Limit {limit}, Used {limit}, Requested 1."
            raise Refusal(failure.kind, detail, status=failure.status, retry_after_s=failure.retry_after_s)
        if endpoint.uses:
            house.account.refill(self._clock())
            shortage = house.account.take(house.vendor.amounts(call.answer.counts))
            if shortage is not None:
                raise limited(shortage)


class _Exchange:
    """One request's way back to the client."""

    def __init__(
        self,
        seen: SeenRequest,
        house: _House,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        receive: Receive,
        send: Send,
    ) -> None:
        self.seen = seen
        self.house = house
        self._clock = clock
        self._sleep = sleep
        self._receive = receive
        self._send = send
        self._request_id = f"req_{seen.number:06d}"

    async def refuse(self, refusal: Refusal) -> None:
        """Answer with the vendor's error; a 429 says what is left."""
        vendor, account = self.house.vendor, self.house.account
        status, body = vendor.error(refusal, self._request_id)
        fields = {}
        if status == 429:
            account.refill(self._clock())
            fields = vendor.spent_fields(account, refusal)
        await self._json(status, body, fields)

    async def answer(self, endpoint: Endpoint, call: Call) -> None:
        """Answer by JSON or by a stream, and stop at once when the client leaves."""
        if endpoint.uses:
            self.seen.counts = call.answer.counts
        async with anyio.create_task_group() as group:
            group.start_soon(self._watch, group.cancel_scope)
            try:
                await (self._stream if call.asked.stream else self._whole)(endpoint, call)
            except OSError:
                # From ASGI 2.4 on, `send` says so when the client has left.
                self.seen.client_disconnected = True
            group.cancel_scope.cancel()

    async def _watch(self, scope: anyio.CancelScope) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        # Servers also say so once the response is complete.
        if not self.seen.finished:
            self.seen.client_disconnected = True
        scope.cancel()

    async def _whole(self, endpoint: Endpoint, call: Call) -> None:
        behaviour, stop = call.behaviour, call.behaviour.stop
        await self._pause(behaviour.pause_s * call.answer.words)
        kind = stop.kind if stop is not None else None
        if kind == "stall":
            await anyio.sleep_forever()
        if kind == "error" or (kind == "failed" and not endpoint.fails_in_body):
            await self.refuse(Refusal("status", status=500))
            return
        self.seen.usage_sent = call.answer.reports and endpoint.uses and kind is None
        await self._json(200, endpoint.answer(call), self._quota_fields(behaviour), cut=kind == "cut")

    async def _stream(self, endpoint: Endpoint, call: Call) -> None:
        behaviour, stop, seen = call.behaviour, call.behaviour.stop, self.seen
        await self._start(200, _EVENTS, {"cache-control": "no-cache", **self._quota_fields(behaviour)})
        for number, event in enumerate(endpoint.events(call)):
            if stop is not None and seen.deltas_sent == stop.after and (event.is_delta or stop.after > 0):
                await self._break(endpoint, call, stop, number)
                return
            if event.is_delta:
                await self._pause(behaviour.pause_s)
            for piece in encode_event(event, behaviour):
                await self._body(piece, more=True)
            seen.deltas_sent += event.is_delta
            seen.usage_sent |= event.has_usage
        seen.finished = True
        await self._body(b"", more=False)

    async def _pause(self, seconds: float) -> None:
        if seconds:
            await self._sleep(seconds)
        # An injected `sleep` may not yield, and nothing else here must: the watch would never see the client leave.
        await anyio.lowlevel.checkpoint()

    async def _break(self, endpoint: Endpoint, call: Call, stop: Stop, number: int) -> None:
        if stop.kind == "stall":
            await anyio.sleep_forever()
        if stop.kind == "cut":
            # A server closes the connection under an application that returns without the end of its body.
            return
        for piece in encode_event(endpoint.broken(call, number), call.behaviour):
            await self._body(piece, more=True)
        self.seen.finished = True
        await self._body(b"", more=False)

    def _quota_fields(self, behaviour: Behaviour) -> dict[str, str]:
        return self.house.vendor.quota_fields(self.house.account) if behaviour.quota_headers else {}

    async def _json(self, status: int, payload: Json, fields: dict[str, str], *, cut: bool = False) -> None:
        body = encode_json(payload)
        await self._start(status, _JSON, {"content-length": str(len(body)), **fields})
        if cut:
            await self._body(body[: len(body) // 2], more=True)
            return
        self.seen.finished = True
        await self._body(body, more=False)

    async def _start(self, status: int, content_type: str, fields: dict[str, str]) -> None:
        self.seen.status = status
        everything = {"content-type": content_type, **self.house.vendor.fields(self._request_id), **fields}
        headers = [(name.encode(), value.encode()) for name, value in everything.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _body(self, body: bytes, *, more: bool) -> None:
        message: Message = {"type": "http.response.body", "body": body, "more_body": more}
        await self._send(message)


def _house(vendor: Vendor, account: Account, *endpoints: Endpoint) -> _House:
    return _House(vendor, account, {endpoint.path: endpoint for endpoint in endpoints})


def _count(text: str) -> int:
    return count_tokens(text, DEFAULT_ENCODING).tokens


async def _read(request: Request) -> bytes:
    """Return the body. Raises `Refusal` beyond `MAX_BODY_BYTES`, and `ClientDisconnect`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Refusal("too_large", f"The limit is {MAX_BODY_BYTES} bytes.")
    return bytes(body)


def _parse(body: bytes) -> Json:
    try:
        parsed: Any = json.loads(body)
    except ValueError as error:
        raise Refusal("bad_json", str(error)) from error
    if not isinstance(parsed, dict):
        raise Refusal("bad_json", f"Expected an object, got a {type(parsed).__name__}.")
    return parsed


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
