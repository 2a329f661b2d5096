"""
A gateway to many models: each answer costs what its model costs, with a markup, in credits.

    OPENAI_BASE_URL=https://openrouter.ai/api/v1 OPENAI_API_KEY=... uvicorn examples.priced_by_model:app

What the provider says that it charged counts first (OpenRouter does), then the model's published price. A request is
held for by what it asks for, and asks the provider for no more than its hold pays.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from openai import AsyncOpenAI

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, current_call, up_to
from asgi_metering.estimates import clamp, openai_chat
from asgi_metering.prices import above, model_prices, per_image, per_million_tokens

KEYS = {"key-of-ada": "ada", "key-of-bob": "bob"}  # yours are in a database

metering = Metering(
    os.environ.get("METERING_STORE", "sqlite:///metering.db"),
    identify=lambda connection: Caller(owner) if (owner := KEYS.get(connection.headers.get("x-api-key", ""))) else None,
)

PRICES = model_prices(
    # Own prices in USD, before the published ones: of models that nobody else has.
    {"acme/echo": per_million_tokens(input=100, output=400, tiers=[above(200_000, input=200, output=600)])},
    units_per_usd=100,  # credits for a USD
    markup="1.2",
    default=per_million_tokens(input=15, output=75),  # what a model costs that is known nowhere
)

openai = AsyncOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("OPENAI_API_KEY", "unset"),
    http_client=metering.upstream_client("openai"),
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to the provider with the application."""
    async with openai:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


@app.post("/v1/chat/completions")
@billable(PRICES, hold=up_to(openai_chat(), at_least="0.01"), line="chat", errors="openai")
async def chat(body: dict[str, Any]) -> dict[str, Any]:
    """Pass a request on, for at most what the caller can afford."""
    asked = clamp(body, current_call().affordable())
    answer = await openai.chat.completions.create(**asked)
    return answer.model_dump()  # type: ignore[no-any-return]


@app.post("/v1/images/generations")
@billable(per_image({("1024x1024", "high"): 20, "1024x1024": 5}, otherwise=25), line="images")
async def images(body: dict[str, Any]) -> dict[str, Any]:
    """Make images, at a price that is known before."""
    return {"created": body.get("n", 1)}
