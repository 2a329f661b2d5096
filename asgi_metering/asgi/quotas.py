"""
What upstreams still allow, over HTTP: JSON for programs, and one page for people.

An ASGI application to be mounted. Knows who may look, and nothing of how statuses are made; it shows what
`QuotaTracker.snapshot` tells, and writes no name into the page's markup.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from asgi_metering.asgi.types import Receive, Scope, Send
from asgi_metering.errors import ConfigurationError

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from asgi_metering.upstream.tracker import QuotaTracker

__all__ = ["QuotasApp", "quotas_app"]

log = logging.getLogger("asgi_metering.quotas")

Authorize = Callable[["HTTPConnection"], Awaitable[object] | object]
"""Whether a connection may look."""

_PAGE = "quotas.html"
# The page's own script and style are inside of it; it loads nothing and is framed by nobody.
_POLICY = (
    b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_FIELDS = ((b"content-security-policy", _POLICY), (b"x-content-type-options", b"nosniff"))


class QuotasApp:
    """
    Answers ``GET`` at its root with the snapshot as JSON, and at ``/dashboard`` with the page. Made by `quotas_app`.

    Attributes:
        tracker: Whose packages.
    """

    def __init__(self, tracker: QuotaTracker, authorize: Authorize) -> None:
        self.tracker = tracker
        self._authorize = authorize

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request; a lifespan is answered, a WebSocket closed."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            status, content_type, body = await self._answer(scope)
            await _respond(send, status, content_type, body, is_head=scope["method"] == "HEAD")

    async def _answer(self, scope: Scope) -> tuple[int, bytes, bytes]:
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        if path not in ("", "/dashboard"):
            return 404, _JSON, b'{"error": "There is nothing here."}'
        if scope["method"] not in ("GET", "HEAD"):
            return 405, _JSON, b'{"error": "This is only looked at."}'
        if not await self._may_look(scope):
            return 403, _JSON, b'{"error": "You may not look at this."}'
        if path:
            return 200, _HTML, page()
        import anyio.to_thread

        # It looks into files.
        return 200, _JSON, await anyio.to_thread.run_sync(self._snapshot)

    async def _may_look(self, scope: Scope) -> bool:
        from starlette.requests import HTTPConnection

        answer = self._authorize(HTTPConnection(scope))
        return bool(await answer if inspect.isawaitable(answer) else answer)

    def _snapshot(self) -> bytes:
        """The snapshot as JSON; one that fails is empty, and logged (S1.49)."""
        try:
            return json.dumps(self.tracker.snapshot(), allow_nan=False).encode()
        except Exception:
            log.exception("The quotas cannot be shown.")
            return json.dumps(_NOTHING).encode()


_NOTHING: Final = {
    "packages": [],
    "count": 0,
    "by_alert": {},
    "has_use_or_lose": False,
    "has_exhausted": False,
    "header_snapshots": {},
}
_JSON = b"application/json"
_HTML = b"text/html; charset=utf-8"


def quotas_app(tracker: QuotaTracker | None, *, authorize: Authorize) -> QuotasApp:
    """
    Make an application that shows what upstreams still allow (S1.48 to S1.52), to be mounted under any path.

    Args:
        tracker: ``metering.tracker``.
        authorize: Gets the connection and answers whether it may look; sync or async. Where something in front of the
            application has decided that already: ``lambda connection: True``.

    Raises:
        ConfigurationError: There is no tracker, or nobody who decides.
    """
    if tracker is None:
        raise ConfigurationError("There is no tracker to show. Give the metering its packages: Metering(packages=...).")
    if not callable(authorize):
        raise ConfigurationError(
            f"authorize={authorize!r} cannot be called. Pass a function of the connection that says who may look."
        )
    return QuotasApp(tracker, authorize)


def page() -> bytes:
    """The page: it asks the JSON beside it, wherever both are mounted, and loads nothing else (S1.51)."""
    return files("asgi_metering.asgi").joinpath(_PAGE).read_bytes()


async def _respond(send: Send, status: int, content_type: bytes, body: bytes, *, is_head: bool) -> None:
    headers = [
        (b"content-type", content_type),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        *_FIELDS,
    ]
    if status == 405:
        headers.append((b"allow", b"GET, HEAD"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if is_head else body})


async def _lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
