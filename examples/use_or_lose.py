"""
A router between providers: sends calls where credits would expire unused, and elsewhere when nothing is left there.

    asgi-metering init quotas.json                # then edit it
    KILO_API_KEY=... DEEPSEEK_API_KEY=... uvicorn examples.use_or_lose:app

`rank` puts providers in order by what their packages still allow, by the burn of our own calls, and by expiry dates;
it asks nobody. A poller keeps the balances up to date, and what providers say in their answers counts at once.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
from fastapi import FastAPI, HTTPException
from openai import AsyncOpenAI
from pydantic import BaseModel

from asgi_metering import Caller, Metering, MeteringMiddleware, billable
from asgi_metering.asgi.quotas import quotas_app
from asgi_metering.prices import per_million_tokens
from asgi_metering.tracking import QuotaPoller, QuotaTracker, UsageLog

tracker = QuotaTracker(
    os.environ.get("QUOTAS", "quotas.json"),
    log=UsageLog(os.environ.get("USAGE_LOG", "usage.db")),  # several workers may share both files
)
KEYS = {"key-of-ada": "ada", "key-of-bob": "bob"}  # yours are in a database

metering = Metering(
    os.environ.get("METERING_STORE", "sqlite:///metering.db"),
    identify=lambda connection: Caller(owner) if (owner := KEYS.get(connection.headers.get("x-api-key", ""))) else None,
    packages=tracker,
)


def client(name: str, url: str) -> AsyncOpenAI:
    """A client of one provider, whose answers are captured under its name."""
    return AsyncOpenAI(
        base_url=os.environ.get(f"{name.upper()}_URL", url),
        api_key=os.environ.get(f"{name.upper()}_API_KEY", "unset"),
        http_client=metering.upstream_client(name),
        max_retries=0,  # another provider is the better second try
    )


CLIENTS = {
    "deepseek": client("deepseek", "https://api.deepseek.com"),
    "kilo": client("kilo", "https://api.kilo.ai/api/openrouter"),
}


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Ask for balances now and then, while the application runs."""
    async with QuotaPoller(tracker, enabled=os.environ.get("POLL") == "yes"):
        yield
    for each in CLIENTS.values():
        await each.close()


class ChatRequest(BaseModel):
    """What our own API takes."""

    model: str = "deepseek-chat"
    messages: list[dict[str, Any]]


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


@app.post("/chat")
@billable(per_million_tokens(input=1, output=2), line="chat", errors="openai")
async def chat(body: ChatRequest) -> dict[str, Any]:
    """Ask the provider that `rank` puts first, and the next one where that refuses."""
    for name in tracker.rank(CLIENTS):
        if metering.headroom.look(name) is not None:
            continue  # it said that it would refuse
        try:
            answer = await CLIENTS[name].chat.completions.create(model=body.model, messages=body.messages)  # type: ignore[arg-type]
        except openai.APIStatusError:
            continue
        return {"provider": name, "text": answer.choices[0].message.content}
    raise HTTPException(503, "No provider can answer now.")


def is_staff(connection: Any) -> bool:
    """Who may see what our providers allow us; a real application asks its own session."""
    return bool(os.environ.get("STAFF_KEY")) and connection.headers.get("x-staff") == os.environ["STAFF_KEY"]


app.mount("/quotas", quotas_app(tracker, authorize=is_staff))
