"""Applications that must not start: each makes one mistake with its decorators or layers."""

from __future__ import annotations

from fastapi import FastAPI

from asgi_metering import (
    CreditGateMiddleware,
    Metering,
    MeteringMiddleware,
    RateLimitMiddleware,
    billable,
)

__all__ = ["above", "absent", "two"]

above = FastAPI()
above.add_middleware(MeteringMiddleware, metering=Metering(sinks=()))


@billable(2)
@above.get("/search")
async def search() -> dict[str, str]:
    """Ungated: the framework has the plain function."""
    return {}


absent = FastAPI()
absent.add_middleware(RateLimitMiddleware, metering=Metering(sinks=()))


@absent.get("/paint")
@billable(2)
async def paint() -> dict[str, str]:
    """Billable, where nothing enforces it."""
    return {}


two = FastAPI()
two.add_middleware(RateLimitMiddleware, metering=Metering(sinks=()))
two.add_middleware(CreditGateMiddleware, metering=Metering(sinks=()))
