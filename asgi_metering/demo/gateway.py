"""
The demo's gateway: two routes that pass requests on to a provider and charge for what came back.

What an application would write; everything about metering is in the decorators and in one line of client.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, current_call, rate_limited, up_to
from asgi_metering.prices import per_million_tokens

__all__ = ["KEYS", "gateway", "passing"]

KEYS = {"key-ada": "ada", "key-bob": "bob", "key-carol": "carol"}
"""API keys of the demo, and who they belong to."""

PRICE = per_million_tokens(input=3_000, output=15_000)
"""Credits for a million tokens: high, so that short answers cost something a person can read."""

HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)
"""Fields of one connection, which no proxy passes on (RFC 9110 section 7.6.1)."""

OUR_SERVERS = frozenset(("date", "server"))
"""Fields that our own server writes into each response; with the provider's they would stand there twice."""


def who(connection: Any) -> Caller | None:
    """Look the API key up, as OpenAI's and Anthropic's clients send it."""
    bearer = connection.headers.get("authorization", "").removeprefix("Bearer ")
    owner = KEYS.get(connection.headers.get("x-api-key", bearer))
    return None if owner is None else Caller(owner)


def gateway(metering: Metering, upstream: str) -> FastAPI:
    """
    The application.

    Args:
        metering: Charges, and captures what the provider says.
        upstream: The provider's base URL.
    """
    openai = metering.upstream_client("openai", base_url=upstream)
    anthropic = metering.upstream_client("anthropic", base_url=upstream)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with openai, anthropic:
            yield

    app = FastAPI(title="LLM gateway", lifespan=lifespan)
    app.add_middleware(MeteringMiddleware, metering=metering)

    @app.post("/v1/chat/completions")
    @rate_limited("6/minute")
    @billable(PRICE, hold=up_to(at_least="0.01"), line="chat", errors="openai")
    async def chat(request: Request) -> StreamingResponse:
        return await passed_on(openai, "/v1/chat/completions", request)

    @app.post("/v1/messages")
    @rate_limited("6/minute")
    @billable(PRICE, hold=up_to(at_least="0.01"), line="messages", errors="anthropic")
    async def messages(request: Request) -> StreamingResponse:
        return await passed_on(anthropic, "/v1/messages", request)

    return app


async def passed_on(client: Any, path: str, request: Request) -> StreamingResponse:
    """Send the request on, its output clamped to what the caller's hold affords, and stream the answer back."""
    body = json.loads(await request.body())
    body["max_tokens"] = min(body.get("max_tokens", 4_096), current_call().affordable("output"))
    if body.get("stream") and path.endswith("completions"):
        # Without it OpenAI streams do not say what they used.
        body["stream_options"] = {"include_usage": True}
    headers = {"authorization": "Bearer provider-key", "x-api-key": "provider-key", "anthropic-version": "2023-06-01"}
    outgoing = client.build_request("POST", path, json=body, headers=headers)
    answer = await client.send(outgoing, stream=True)

    async def chunks() -> Any:
        try:
            async for chunk in answer.aiter_raw():
                yield chunk
        finally:
            await answer.aclose()

    response = StreamingResponse(chunks(), status_code=answer.status_code)
    for name, value in passing(answer.headers.multi_items()):
        response.headers.append(name, value)
    return response


def passing(fields: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The header fields of a provider's response that are for the client, each as often as it came."""
    given = [(name.lower(), value) for name, value in fields]
    connection = {
        option.strip().lower() for name, value in given if name == "connection" for option in value.split(",")
    }
    kept_here = HOP_BY_HOP | OUR_SERVERS | connection
    return [(name, value) for name, value in given if name not in kept_here]
