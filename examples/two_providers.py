"""
One endpoint that asks two providers: drafts with one, has it judged by the other, and charges both as one call.

    OPENAI_API_KEY=... ANTHROPIC_API_KEY=... uvicorn examples.two_providers:app

Both SDKs run at once, each on its own metered client. The caller pays once; the usage event says what each model used.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anthropic import AsyncAnthropic
from fastapi import FastAPI
from openai import AsyncOpenAI
from pydantic import BaseModel

from asgi_metering import Caller, Metering, MeteringMiddleware, billable
from asgi_metering.events import CallbackSink
from asgi_metering.prices import per_million_tokens
from asgi_metering.usage import UsageEvent

events: list[UsageEvent] = []

KEYS = {"key-of-ada": "ada", "key-of-bob": "bob"}  # yours are in a database

metering = Metering(
    os.environ.get("METERING_STORE", "sqlite:///metering.db"),
    identify=lambda connection: Caller(owner) if (owner := KEYS.get(connection.headers.get("x-api-key", ""))) else None,
    sinks=[CallbackSink(events.extend, "kept")],
)

drafting = AsyncOpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("OPENAI_API_KEY", "unset"),
    http_client=metering.upstream_client("openai"),
)
judging = AsyncAnthropic(
    base_url=os.environ.get("ANTHROPIC_BASE_URL"),
    api_key=os.environ.get("ANTHROPIC_API_KEY", "unset"),
    http_client=metering.upstream_client("anthropic"),
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Close the connections to both with the application."""
    async with drafting, judging:
        yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


class Topic(BaseModel):
    """What our own API takes."""

    text: str


async def draft(topic: str) -> str:
    """One draft."""
    answer = await drafting.chat.completions.create(
        model="gpt-5.5", max_tokens=50, messages=[{"role": "user", "content": f"Write about {topic}."}]
    )
    return answer.choices[0].message.content or ""


@app.post("/essays")
@billable(per_million_tokens(input=3, output=15), hold="0.01", line="essays")
async def essay(topic: Topic) -> dict[str, str]:
    """Two drafts at once, and which one is better."""
    drafts = await asyncio.gather(draft(topic.text), draft(topic.text))
    judged = await judging.messages.create(
        model="claude-opus-5",
        max_tokens=50,
        messages=[{"role": "user", "content": "Which is better?\n" + "\n---\n".join(drafts)}],
    )
    return {"essay": drafts[0], "judged": judged.content[0].text if judged.content[0].type == "text" else ""}
