"""
No framework: any ASGI app is metered as a whole, or at a point of its own choosing.

    uvicorn examples.plain_asgi:app
"""

from __future__ import annotations

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, current_call, metered_app, rate_limited

KEYS = {"key-of-ada": "ada"}  # yours are in a database


def by_key(connection):
    """Who calls: whoever the key belongs to."""
    owner = KEYS.get(connection.headers.get("x-api-key", ""))
    return Caller(owner) if owner else None


metering = Metering("memory://", identify=by_key)


async def thumbnails(scope, receive, send):
    """An app that knows nothing of metering; every request to it costs the same."""
    await answer(send, b"a thumbnail")


async def reports(scope, receive, send):
    """An app that asks for admission itself, once it knows the price."""
    pages = int(scope["query_string"] or b"1")
    await current_call().admit(billable(pages, line="report"), rate_limited("10/minute"))
    await answer(send, b"page\n" * pages)


async def answer(send, body):
    """Send one small response."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


paid_thumbnails = metered_app(thumbnails, billable("0.5", line="thumbnail"), rate_limited("100/minute"))


async def router(scope, receive, send):
    """Two paths; everything else, a lifespan too, is not ours."""
    if scope["type"] != "http":
        raise ValueError(f"Only HTTP is served here, not {scope['type']!r}.")
    chosen = paid_thumbnails if scope["path"].startswith("/thumbnails") else reports
    await chosen(scope, receive, send)


app = MeteringMiddleware(router, metering=metering)
