"""`metered_app`: the gate for what is no function, such as a mounted application or a class of endpoints."""

from __future__ import annotations

from asgi_metering.amounts import Amount
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send
from asgi_metering.decorators import gather
from asgi_metering.errors import ConfigurationError, NoCallError
from asgi_metering.guards import Part
from asgi_metering.opening import CURRENT, SCOPE_KEY, Opening

__all__ = ["MeteredApp", "metered_app"]


OFFERED = ("scope",)
"""What a policy's callables may ask for: an app has no arguments but these."""


class MeteredApp:
    """
    An ASGI app behind the gate. Made by `metered_app`.

    Attributes:
        app: The app inside.
        policy: What every HTTP request and every WebSocket to it is asked for.
    """

    def __init__(self, app: ASGIApp, *parts: Part | Amount, name: str | None = None) -> None:
        if isinstance(app, Part):
            raise ConfigurationError(
                "metered_app() has a policy for its app. Write the app first: metered_app(app, billable(2))."
            )
        if not callable(app):
            raise ConfigurationError(f"{app!r} is no ASGI app. Pass a callable of scope, receive and send.")
        self.app = app
        inner = getattr(app, "__name__", None) or type(app).__name__
        self.policy = gather(parts, name or f"metered_app.{inner}", OFFERED)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for admission before the app sees an HTTP request or a WebSocket; other scopes pass untouched."""
        if scope["type"] in ("http", "websocket"):
            opening = scope.get(SCOPE_KEY) or CURRENT.get()
            if not isinstance(opening, Opening):
                raise NoCallError(
                    f"{self.policy.name} is metered, but no middleware opened a call. Put MeteringMiddleware around "
                    f"the application."
                )
            if not (opening.free and opening.stays_free(scope)):
                await opening.open_call().gate(self.policy, {"scope": scope})
        await self.app(scope, receive, send)


def metered_app(app: ASGIApp, *parts: Part | Amount, name: str | None = None) -> MeteredApp:
    """
    Put the gate in front of a whole ASGI app, such as one that is mounted.

    Args:
        app: The app; MeteringMiddleware goes around it, or around the application that mounts it.
        parts: ``billable(2)``, ``rate_limited("60/minute")``: as the decorators. Callables may ask for ``scope``.
        name: Names it in answers and audits; the app's own name by default.

    Raises:
        ConfigurationError: No part, parts that contradict each other, or what is no app.
    """
    return MeteredApp(app, *parts, name=name)
