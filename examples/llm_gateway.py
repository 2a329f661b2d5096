"""
An LLM gateway: streams from OpenAI through its own SDK, and charges what each answer used.

    OPENAI_API_KEY=... uvicorn examples.llm_gateway:app

The handler knows nothing of billing but two lines: the client that reports usage, and the cap that the caller can
afford. A client that hangs up pays for what it got; a provider that fails costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from openai import AsyncOpenAI
from pydantic import BaseModel

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, current_call, rate_limited, up_to
from asgi_metering.prices import per_million_tokens

KEYS = {"key-of-ada": "ada", "key-of-bob": "bob"}  # yours are in a database

metering = Metering(
    os.environ.get("METERING_STORE", "sqlite:///metering.db"),
    identify=lambda connection: Caller(owner) if (owner := KEYS.get(connection.headers.get("x-api-key", ""))) else None,
)

openai = AsyncOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("OPENAI_API_KEY", "unset"),
    http_client=metering.upstream_client("openai"),  # captures usage and quotas of every answer
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to OpenAI with the application."""
    async with openai:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


class ChatRequest(BaseModel):
    """What our own API takes."""

    model: str = "gpt-5.5"
    messages: list[dict[str, Any]]
    max_tokens: int = 1_000


@app.post("/chat")
@rate_limited("60/minute", "200000/minute of tokens", concurrency=4)
@billable(per_million_tokens(input=3, output=15), hold=up_to(at_least="0.0001"), line="chat", errors="openai")
async def chat(body: ChatRequest) -> StreamingResponse:
    """Stream an answer of at most what the caller can afford."""
    cap = current_call().affordable("output")
    stream = await openai.chat.completions.create(  # type: ignore[call-overload]
        model=body.model,
        messages=body.messages,
        max_tokens=min(body.max_tokens, cap),
        stream=True,
        stream_options={"include_usage": True},
    )

    async def texts() -> AsyncIterator[str]:
        async with stream:
            async for chunk in stream:
                for choice in chunk.choices:
                    yield choice.delta.content or ""

    return StreamingResponse(texts(), media_type="text/plain")


@app.get("/quota")
async def quota() -> dict[str, Any]:
    """What OpenAI still allows us, from the headers of its last answer."""
    reading = metering.quotas.latest("openai")
    return reading.to_dict() if reading else {}
