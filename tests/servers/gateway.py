"""
A gateway whose provider is the bundled one, on the same server: one route for each policy of clients that leave.

``POST /chat/{policy}?phase=...&model=...`` passes a chat stream on, one credit for each token of the answer. In the
phase ``dispatch`` it asks the provider only once its gate is open, and in ``told`` it ends the answer only then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Mount, Route

from asgi_metering import Call, Metering, MeteringMiddleware, billable, current_call
from asgi_metering.prices import per_token
from asgi_metering.testing import Provider
from tests.harness.apps import note
from tests.servers.app import EVENTS, GATES, HOLD, STORE, who
from tests.servers.books import deliver_to

__all__ = ["POLICIES", "app"]

POLICIES = ("observed", "none", "usage", "estimate", "hold", "drain")

metering = Metering(
    os.environ.get(STORE, "memory://"),
    identify=who,
    sinks=[deliver_to(Path(os.environ[EVENTS]))] if EVENTS in os.environ else (),
    store_timeout_s=10.0,
)
client = metering.upstream_client("echo")


async def _passed(gate: str, call: Call) -> None:
    """Wait until the gate is open, and write down when the client was seen to leave meanwhile."""
    seen = False
    while not (Path(os.environ[GATES]) / gate).exists():
        if call.cause is not None and not seen:
            seen = True
            note("left", key=gate)
        await asyncio.sleep(0.01)


async def _answer(request: Request, gate: str, call: Call) -> AsyncIterator[bytes]:
    _, port = request.scope["server"]
    asked = {
        "model": request.query_params["model"],
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    url = f"http://127.0.0.1:{port}/provider/v1/chat/completions"
    told = False
    async with client.stream("POST", url, json=asked, headers={"authorization": "Bearer any"}) as answer:
        note("dispatched", key=gate)
        async for chunk in answer.aiter_bytes():
            yield chunk
            if request.query_params["phase"] == "told" and b'"completion_tokens"' in chunk and not told:
                told = True
                note("told", key=gate)
                await _passed(gate, call)


def _route(policy: Any) -> Route:
    @billable(per_token(output=1), hold=HOLD, line=f"chat-{policy}", on_disconnect=policy)
    async def chat(request: Request) -> StreamingResponse:
        gate, call = request.headers["x-api-key"], current_call()
        note("asked", key=gate)
        if request.query_params["phase"] == "dispatch":
            await _passed(gate, call)
        return StreamingResponse(_answer(request, gate, call), media_type="text/event-stream")

    return Route(f"/chat/{policy}", chat, methods=["POST"])


app = MeteringMiddleware(
    Starlette(routes=[*map(_route, POLICIES), Mount("/provider", app=Provider())]), metering=metering
)
