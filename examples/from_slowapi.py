"""
An application that used slowapi, with the two lines that changed; run it with ``uvicorn examples.from_slowapi:app``.

`adopt` counts its limits by our admission. What costs something gets a price beside its limit, in the same admission.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import StreamingResponse
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware
from slowapi.util import get_remote_address
from starlette.requests import HTTPConnection

from asgi_metering import Caller, Metering, MeteringMiddleware, billable
from asgi_metering.integrations.slowapi import adopt

KEYS = {"key-of-ada": "ada"}  # yours are in a database


def by_key(connection: HTTPConnection) -> Caller | None:
    """Who calls: whoever the key belongs to."""
    owner = KEYS.get(connection.headers.get("x-api-key", ""))
    return Caller(owner) if owner else None


metering = Metering("memory://", identify=by_key)
limiter = adopt(  # changed: adopted, before the decorators
    Limiter(key_func=get_remote_address, default_limits=["3/minute"], headers_enabled=True), metering
)

app = FastAPI()
app.state.limiter = limiter
app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)  # type: ignore[arg-type]
app.add_middleware(SlowAPIASGIMiddleware)
app.add_middleware(MeteringMiddleware, metering=metering)  # changed: for prices, and the startup audit


@app.get("/old")
@limiter.limit("2/minute")
async def old(request: Request) -> dict[str, str]:
    """As it was; `response` is no longer needed for the header fields."""
    return {"client": get_remote_address(request)}


@app.get("/answers")
@billable(2)
@limiter.limit("2/minute", key_func=lambda: "everybody")
def answers(q: str) -> dict[str, str]:
    """A price and a limit: one admission, and no `request`. What the limit refuses is not charged."""
    return {"answer": f"{q}? Yes."}


router = APIRouter(prefix="/v1")


@router.get("/words")
async def words() -> StreamingResponse:
    """No decorator: the default limit counts it, included as it is, and its stream passes."""

    async def each() -> AsyncIterator[str]:
        for word in ("one ", "two ", "three"):
            yield word

    return StreamingResponse(each(), media_type="text/plain")


@router.get("/health")
@limiter.exempt
async def health() -> dict[str, bool]:
    """Counted by nothing."""
    return {"ok": True}


app.include_router(router)
