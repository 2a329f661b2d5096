"""
A chat over WebSockets: each message costs a credit, and a call by voice costs by the second.

    uvicorn examples.websocket_chat:app

Who cannot pay is refused before the handshake is accepted; who runs dry later is told so by the close code 4402.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, WebSocket

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, rate_limited

KEYS = {"key-of-ada": "ada"}  # yours are in a database

metering = Metering(
    os.environ.get("METERING_STORE", "sqlite:///metering.db"),
    # A browser sets no header fields of a WebSocket: a cookie of your session does as well, connection.cookies.
    identify=lambda connection: Caller(owner) if (owner := KEYS.get(connection.query_params.get("key", ""))) else None,
)


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Give everybody who may try this something to spend."""
    await metering.grant("ada", 3, id="welcome-ada")
    yield


app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


@app.websocket("/chat")
@rate_limited(concurrency=2)  # open connections of one caller
@rate_limited("30/minute", per="message", on_excess="answer")
@billable(1, per="message")
async def chat(websocket: WebSocket) -> None:
    """Say everything back: no line of this knows that it costs something."""
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(f"You said {text!r}.")


@app.websocket("/voice")
@billable("0.01", per="second")
async def voice(websocket: WebSocket) -> None:
    """Listen for as long as the caller's credits last."""
    await websocket.accept()
    async for frame in websocket.iter_bytes():
        await websocket.send_bytes(frame)
