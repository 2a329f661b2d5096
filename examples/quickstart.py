"""A paying search in 30 lines; run it with ``uvicorn examples.quickstart:app``."""

from contextlib import asynccontextmanager

from fastapi import FastAPI

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, rate_limited


def api_key_lookup(connection):
    owner = {"secret-of-ada": "ada"}.get(connection.headers.get("x-api-key", ""))
    return Caller(owner) if owner else None


@asynccontextmanager
async def lifespan(_app):
    await metering.grant("ada", 100, id="welcome-ada")  # once, however often we start
    yield


metering = Metering("sqlite:///metering.db", identify=api_key_lookup)
app = FastAPI(lifespan=lifespan)
app.add_middleware(MeteringMiddleware, metering=metering)


@app.get("/search")
@rate_limited("60/minute", "5000/day")
@billable(2)
async def search(q: str):
    return {"found": f"results for {q}"}
