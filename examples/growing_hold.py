"""
Long answers on a small balance: the hold grows while the answer is written, and the stream is cut when nothing is left.

    OPENAI_API_KEY=... uvicorn examples.growing_hold:app

Nobody has to afford the longest answer that there could be. Whoever runs dry gets every word that was paid for, then
the error that OpenAI's SDK knows, `insufficient_quota`; the provider is told to stop.
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

from asgi_metering import CallCut, Caller, Metering, MeteringMiddleware, TokenUsage, billable, slices
from asgi_metering.prices import per_million_tokens

KEYS = {"key-of-ada": "ada", "key-of-bob": "bob"}  # yours are in a database

metering = Metering(
    os.environ.get("METERING_STORE", "sqlite:///metering.db"),
    identify=lambda connection: Caller(owner) if (owner := KEYS.get(connection.headers.get("x-api-key", ""))) else None,
)

openai = AsyncOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("OPENAI_API_KEY", "unset"),
    http_client=metering.upstream_client("openai"),
)

PRICE = per_million_tokens(input=3, output=15)
HOLD = slices(TokenUsage(output=200))  # the prompt and 200 tokens at first, then 200 more whenever half of them is used


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to OpenAI with the application."""
    async with openai:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


class ChatRequest(BaseModel):
    """What our own API takes: no bound of the output is needed."""

    model: str = "gpt-5.5"
    messages: list[dict[str, Any]]


@app.post("/chat/completions")
@billable(PRICE, hold=HOLD, line="chat", errors="openai")
async def chat(body: ChatRequest) -> StreamingResponse:
    """Stream for as long as the caller's credits last."""
    messages: Any = body.messages
    stream = await openai.chat.completions.create(
        model=body.model,
        messages=messages,
        stream=True,
        stream_options={"include_usage": True},
    )

    async def events() -> AsyncIterator[str]:
        async with stream:  # left when the stream is cut: that stops the provider
            async for chunk in stream:
                yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def write_chapters(payer: str, chapters: list[str]) -> list[str]:
    """The same outside HTTP: the report that finds nothing left raises `CallCut`, and what was recorded is charged."""
    written: list[str] = []
    try:
        async with metering.charge(payer=payer, line="book", price=PRICE, hold=HOLD) as call:
            for chapter in chapters:
                answer = await openai.chat.completions.create(
                    model="gpt-5.5", messages=[{"role": "user", "content": f"Write the chapter {chapter!r}."}]
                )
                written.append(answer.choices[0].message.content or "")
                used = answer.usage
                if used is not None:
                    call.record(TokenUsage(input=used.prompt_tokens, output=used.completion_tokens))
    except CallCut:
        written.append("To be continued, once there are credits.")
    return written
