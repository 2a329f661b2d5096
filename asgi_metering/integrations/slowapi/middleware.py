"""
Middleware: what slowapi's two middlewares do for an adopted limiter, in their place.

Default limits of endpoints without a decorator, counted before the endpoint runs. Finds the endpoint as the router
will, through included routers and mounted applications too; slowapi's own lose these, and tear streams.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from slowapi import _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Match

from asgi_metering.asgi.middleware import layers_of
from asgi_metering.asgi.types import ASGIApp, Message, Receive, Scope, Send
from asgi_metering.guards import Guard, Part, guard_of
from asgi_metering.integrations.slowapi.asking import ASKING, Asking, LimitExceeded
from asgi_metering.integrations.slowapi.endpoints import COUNTED_THOUGH_FREE, LIMITED, Limited, opening_of
from asgi_metering.integrations.slowapi.headers import write_fields
from asgi_metering.integrations.slowapi.limiter import AdoptedLimiter
from asgi_metering.metering import Metering

__all__ = ["endpoint_of", "stand_in"]

log = logging.getLogger("slowapi")

MAX_DEPTH = 32
"""Applications within applications that are looked into: deeper is a loop."""

OURS = "__asgi_metering_slowapi__"
"""What a middleware's ``__call__`` has that looks for adopted limiters."""


def stand_in() -> None:
    """
    Have slowapi's middlewares run `limited` for applications whose limiter is adopted; for all others they are as ever.

    In the classes themselves: applications name them, and may have made theirs before.
    """
    for kind in (SlowAPIMiddleware, SlowAPIASGIMiddleware):
        if not hasattr(kind.__call__, OURS):
            replaced = _looking(kind.__call__)
            setattr(replaced, OURS, True)
            kind.__call__ = replaced  # type: ignore[assignment, method-assign]


def _looking(original: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(original)
    async def call(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        state = getattr(scope.get("app"), "state", None)
        limiter = getattr(state, "limiter", None)
        if isinstance(limiter, AdoptedLimiter):
            await limited(limiter, self.app, scope, receive, send)
        else:
            await original(self, scope, receive, send)

    return call


async def limited(limiter: AdoptedLimiter, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run *app* for a request, by the limits that its endpoint has without a decorator of *limiter*."""
    for layer in layers_of(app):
        # Further in than here: decorated endpoints count there.
        limiter.share(layer.metering)
    if scope["type"] == "lifespan":
        try:
            await app(scope, receive, send)
        finally:
            await _stop(limiter.metering)
        return
    if scope["type"] != "http" or not limiter.enabled or not (limiter.application_rules or limiter.default_rules):
        await app(scope, receive, send)
        return
    # What is set on the request's state here is seen further in, and by handlers.
    scope.setdefault("state", {})
    endpoint = endpoint_of(scope)
    if endpoint is None:
        request = Request(scope, receive)
        await _late(app, request, send, send, _found_late(limiter, request))
        return
    known = limiter.known(endpoint)
    if known.rules:
        # Its own wrapper asks for all of them.
        await app(scope, receive, send)
        return
    request = Request(scope, receive)
    asking = Asking(known, request, ASKING.get())
    guard = guard_of(endpoint)
    if guard is None or request.method in COUNTED_THOUGH_FREE:
        # Whatever gate there may be asks for nothing then.
        try:
            await known.enforce(asking)
        except HTTPException as failure:
            await _answer(request, send, failure)
            return
        await app(scope, receive, _showing(asking, send))
    else:
        # Together with what else is written on it, in the one admission of its call.
        _write(known, guard)
        await _inside(asking, request, app, send)


async def _stop(metering: Metering) -> None:
    """Give back what *metering* has opened, where no middleware of ours, and no block, does it."""
    runtime = metering.runtime()
    if not (runtime.lifespans or runtime.blocks):
        await metering.stop()


async def _inside(asking: Asking, request: Request, app: ASGIApp, send: Send) -> None:
    """
    Run *app*, whose gate asks for the limits as well, and answer a refusal by one of them.

    A request that never reaches the gate, as where a dependency fails before, is counted all the same.
    """

    def unasked(_: int | None) -> Asking | None:
        return None if asking.asked or _asks_later(request.scope) else asking

    token = ASKING.set(asking)
    try:
        await _late(app, request, send, _showing(asking, send), unasked)
    except LimitExceeded as failure:
        await _answer(request, send, failure)
    finally:
        ASKING.reset(token)


def _asks_later(scope: Scope) -> bool:
    """Whether the gate of a generator asks at the first byte, further out than here."""
    opening = opening_of(scope)
    return opening is not None and opening.call is not None and opening.call.deferred


async def _late(
    app: ASGIApp, request: Request, send: Send, passing: Send, unasked: Callable[[int | None], Asking | None]
) -> None:
    """
    Run *app*, and count what nobody has counted before it is heard: the response, or what was raised instead of one.

    Args:
        app: What answers *request*.
        request: Whose refusal is answered by *send*, in the place of the response.
        send: The server's.
        passing: Where the messages of a response that is let through go.
        unasked: Tells who has still to be asked for, by the response's status, or None for what was raised.
    """
    begun = refused = False

    async def count(status: int | None) -> bool:
        """Whether a limit has refused it, and that was answered."""
        asking = unasked(status)
        try:
            if asking is not None:
                await asking.limited.enforce(asking)
        except HTTPException as failure:
            await _answer(request, send, failure)
            return True
        return False

    async def late(message: Message) -> None:
        nonlocal begun, refused
        if message["type"] == "http.response.start":
            begun = True
            refused = await count(message["status"])
        if not refused:
            await passing(message)

    try:
        await app(request.scope, request.receive, late)
    except Exception:
        if begun or not await count(None):
            raise


_writing = threading.Lock()


def _write(known: Limited, guard: Guard) -> None:
    """Write the limits of an endpoint that has none of its own into the policy that our decorators made, once."""
    with _writing:
        if all(rate.asker is not known for rate in guard.policy.rates):
            guard.add(Part(rates=known.rate))


def _showing(asking: Asking, send: Send) -> Send:
    """*send*, with slowapi's fields on the start of the response."""

    async def showing(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            write_fields(asking.limited.limiter, MutableHeaders(raw=headers), asking.shown)
            message = {**message, "headers": headers}
        await send(message)

    return showing


def _found_late(limiter: AdoptedLimiter, request: Request) -> Callable[[int | None], Asking | None]:
    """
    What a request is counted by that seemed to have no endpoint, and is held to it: `_late` asks.

    One that has run all the same, by a router or a rewritten path that cannot be told from here, is counted before it
    is heard, whatever it answers or raises: it must not be a way around the limits.
    """

    def unasked(status: int | None) -> Asking | None:
        ran = request.scope.get("endpoint")
        if not (inspect.isroutine(ran) or inspect.isclass(ran)):
            return None
        if status == 405 and endpoint_of(request.scope) is None:
            # The router's own: it names the endpoint of the path, which it has not run for this method.
            return None
        known = limiter.known(ran)
        if known.rules:
            return None
        log.error("%r was not among the routes before it ran; its limits are asked for late.", ran)
        return Asking(known, request, ASKING.get())

    return unasked


async def _answer(request: Request, send: Send, failure: HTTPException) -> None:
    """Answer as slowapi's middlewares do, by the application's handler of that very exception, sync or async."""
    is_limit = isinstance(failure, RateLimitExceeded)
    kind, default = (RateLimitExceeded, _rate_limit_exceeded_handler) if is_limit else (type(failure), _plain)
    handler = request.app.exception_handlers.get(kind, default)
    response = handler(request, failure)
    if inspect.isawaitable(response):
        response = await response
    await response(request.scope, request.receive, send)


def _plain(_: Request, failure: HTTPException) -> PlainTextResponse:
    return PlainTextResponse(failure.detail, failure.status_code, failure.headers)


# -- which endpoint ------------------------------------------------------------------------------------------


def endpoint_of(scope: Scope) -> Any:
    """
    The endpoint that the application of *scope* will run for it; None where there is none, as for a 404, a 405, or a
    mounted application that has no routes.

    The first route that matches, as in routers, where slowapi takes the last; of a class, the method that answers.
    """
    return _endpoint_in(getattr(scope["app"], "routes", ()), scope, 0)


def _endpoint_in(routes: Iterable[Any], scope: Scope, depth: int) -> Any:
    for route in _flat(routes, depth):
        # Of its own: matching may leave things in it.
        match, child = route.matches(dict(scope))
        if match is not Match.FULL:
            continue
        endpoint = child.get("endpoint", getattr(route, "endpoint", None))
        inner = getattr(route, "routes", None) or getattr(getattr(route, "app", None), "routes", None)
        if inner and depth < MAX_DEPTH and not _is_endpoint(route):
            return _endpoint_in(inner, {**scope, **child}, depth + 1)
        return _method_of(endpoint, scope["method"]) if _is_endpoint(route) else None
    return None


def _flat(routes: Iterable[Any], depth: int) -> Iterator[Any]:
    """*routes*, those of FastAPI's included routers among them, with the prefixes that they were included with."""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)
        if contexts is None:
            yield route
        elif depth < MAX_DEPTH:
            for context in contexts():
                yield getattr(context, "starlette_route", None) or context


def _is_endpoint(route: Any) -> bool:
    """Whether it has an endpoint of its own, and is no mounted application."""
    return getattr(route, "endpoint", None) is not None


def _method_of(endpoint: Any, method: str) -> Any:
    if not inspect.isclass(endpoint):
        return endpoint
    name = method.lower()
    handler = getattr(endpoint, name, None) or (getattr(endpoint, "get", None) if name == "head" else None)
    # Limits of a class are its own; those of a method, that method's.
    is_own = handler is not None and (guard_of(handler) is not None or hasattr(handler, LIMITED))
    return handler if is_own else endpoint
