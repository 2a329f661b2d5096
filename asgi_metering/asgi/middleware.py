"""
The middleware: the whole stack, and its layers alone.

Keeps configuration only; a request's state lives in its exchange. Scopes that it does not know pass untouched.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from asgi_metering.asgi.answers import DEFAULT_OPTIONS, AnswerOptions
from asgi_metering.asgi.audit import MAX_DEPTH
from asgi_metering.asgi.denials import deny_mistaken
from asgi_metering.asgi.exchange import Exchange, run
from asgi_metering.asgi.flat import FlatLimits, counted, counted_session
from asgi_metering.asgi.hearing import FREE_METHODS, ExchangeOptions
from asgi_metering.asgi.lifespan import LAYERS_KEY, Lifespan, refuse_startup
from asgi_metering.asgi.native import framework_of
from asgi_metering.asgi.overridden import Overridden
from asgi_metering.asgi.startup import check_stack, examined
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send
from asgi_metering.asgi.websocket import Session, attend
from asgi_metering.asgi.workers import check_workers
from asgi_metering.errors import ConfigurationError, MeteringError
from asgi_metering.guards import Part
from asgi_metering.metering import ALL_FEATURES, Metering
from asgi_metering.opening import SCOPE_KEY, Opening

__all__ = [
    "CreditGateMiddleware",
    "MeteringMiddleware",
    "QuotaCaptureMiddleware",
    "RateLimitMiddleware",
    "UsageEventsMiddleware",
    "layers_of",
]

log = logging.getLogger("asgi_metering")

MISTAKEN = b'{"type":"about:blank","title":"Internal Server Error","status":500,"code":"misconfigured"}'
"""What a client hears of an application that must not serve: what is wrong is the operator's, and in the log."""


class MeteringMiddleware:
    """
    The whole stack: rate limits, credit gate, quota capture and usage events, with one admission.

    Args:
        app: Any ASGI app.
        metering: The composition root; the same object in every layer of a stack.
        unenforced: ``"allow"`` lets endpoints run whose layer is absent here; by default that fails at startup.
        answers: How refusals and limits look on the wire. Of a stack of layers the outermost says it for all of them,
            and an inner one that says something else fails at startup; so for:
        stop_on_disconnect: Raise `OSError` from ``send`` once the client has left, for apps that would run on.
        application_limits: Limits that count every HTTP request, whatever its route, and the handshakes of WebSockets:
            ``[rate_limited("1000/minute", key="address")]``.
        default_limits: Limits that count the requests of each route that has none of its own, route by route, but for
            those that are `unlimited`; a route whose own ones say ``override_defaults=False`` has both. Requests whose
            route cannot be told beforehand (unknown paths, frameworks without a route table that can be read) are
            counted together.

    Raises:
        ConfigurationError: *metering* is no `Metering`, *unenforced* is another word, or *answers* no `AnswerOptions`;
            limits that are no list, count tokens, or belong to a layer that enforces none. Where an event loop runs,
            as when ``add_middleware`` makes its layers, the startup fails by it instead.

    Both kinds of limits are one admission of their own, before the application sees the request and before a byte of
    its body is read: one more round trip than the endpoint's, on stores that have any. What they count stays counted
    when the endpoint refuses. ``identify`` is asked there if a limit is by caller, payer or attribute; callables get
    ``scope``, ``request`` (without a body) and ``call``. HEAD and OPTIONS are free.

    The application is audited once: when its lifespan starts, or, where none comes (a mounted application, daphne, a
    function behind a gateway), before its first request or WebSocket is served. One that must not serve answers every
    request with 500 then, says why in the log, and charges nothing.

    With no policy on any endpoint not one byte of any response changes (S2.27). Installed twice, the inner one adds
    nothing (pitfall 37).
    """

    features: ClassVar[frozenset[str]] = ALL_FEATURES

    def __init__(
        self,
        app: ASGIApp,
        metering: Metering,
        *,
        unenforced: Literal["error", "allow"] = "error",
        answers: AnswerOptions = DEFAULT_OPTIONS,
        stop_on_disconnect: bool = False,
        application_limits: Sequence[Part | str] = (),
        default_limits: Sequence[Part | str] = (),
    ) -> None:
        self.app = app
        self.metering = metering
        self.unenforced = ALL_FEATURES - self.features if unenforced == "allow" else frozenset[str]()
        framework = framework_of(app)
        self.options = ExchangeOptions(DEFAULT_OPTIONS, stop_on_disconnect, framework)
        self.limits: FlatLimits | None = None
        self.mistake: ConfigurationError | None = None
        try:
            self._check(metering, unenforced, answers)
            self.options = ExchangeOptions(answers, stop_on_disconnect, framework)
            self.limits = self._flat(application_limits, default_limits)
        except ConfigurationError as mistake:
            if not _is_serving():
                raise
            self.mistake = mistake
        self.application_limits = () if self.limits is None else self.limits.application_limits
        self.default_limits = () if self.limits is None else self.limits.default_limits
        # Of the outermost layer: whether the application was audited and may serve, and why not.
        self.proven = False
        self.fault: MeteringError | None = None
        self._proving = threading.Lock()

    def _check(self, metering: object, unenforced: str, answers: object) -> None:
        if not isinstance(metering, Metering):
            raise ConfigurationError(
                f"metering={metering!r} is no Metering. Make one, Metering('sqlite:///metering.db'), and pass it here."
            )
        if unenforced not in ("error", "allow"):
            raise ConfigurationError(f"unenforced={unenforced!r} is not known. Use 'error' or 'allow'.")
        if not isinstance(answers, AnswerOptions):
            raise ConfigurationError(
                f"answers={answers!r} is no AnswerOptions. Make one: "
                f"AnswerOptions(names=HeaderNames.with_legacy()), say."
            )

    def _flat(self, application: Sequence[Part | str], default: Sequence[Part | str]) -> FlatLimits | None:
        if not (application or default):
            return None
        limits = FlatLimits(application, default)
        if "rates" not in self.features:
            raise ConfigurationError(
                f"{type(self).__name__} enforces no limits, so application_limits= and default_limits= would mean "
                f"nothing here. Give them to RateLimitMiddleware or MeteringMiddleware."
            )
        return limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Meter HTTP requests and WebSockets; look after the lifespan; pass everything else on."""
        kind = scope["type"]
        if kind == "http":
            opening = scope.get(SCOPE_KEY)
            if opening is not None:
                await self._join(opening, scope, receive, send)
            elif self.proven or self._prove(scope):
                # Into the scope itself, as Starlette's own middleware does: a copy would hide the route from outer
                # layers.
                exchange = scope[SCOPE_KEY] = Exchange(
                    self.metering,
                    self.features,
                    scope,
                    receive,
                    send,
                    self.options,
                    free=scope["method"] in FREE_METHODS,
                    unenforced=self.unenforced,
                )
                if self.limits is None:
                    await run(self.app, exchange)
                else:
                    await self._limited(self.limits, exchange, (scope, receive, send))
            else:
                await _answer_mistaken(send)
        elif kind == "websocket":
            await self._websocket(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _limited(self, limits: FlatLimits, exchange: Exchange, channel: tuple[Scope, Receive, Send]) -> Awaitable[None]:
        if exchange.free:
            return run(Overridden(self.app, limits, exchange, self.options.answers), exchange)
        return counted(limits, exchange, self.options.answers, self.app, lambda app: run(app, exchange), channel)

    def _prove(self, scope: Scope) -> bool:
        """Audit the application, once, where no lifespan did; False for one that must not serve."""
        # A lock of threads: event loops of several may share one application. Nothing in it waits.
        with self._proving:
            if self.fault is None and not self.proven:
                try:
                    layers = list(layers_of(self))
                    check_stack(layers)
                    check_workers(self.metering.store)
                    self.metering.runtime()
                    examined(scope, layers)
                except MeteringError as failure:
                    self.fault = failure
                else:
                    self.proven = True
        if self.fault is not None:
            log.error("The application cannot serve: %s", self.fault)
        return self.fault is None

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        opening = scope.get(SCOPE_KEY)
        if opening is not None:
            await self._join(opening, scope, receive, send)
        elif self.proven or self._prove(scope):
            session = scope[SCOPE_KEY] = Session(
                self.metering, self.features, scope, receive, send, self.options.answers, unenforced=self.unenforced
            )
            if self.limits is None:
                await attend(self.app, session)
                return
            channel = (scope, receive, send)
            await counted_session(self.limits, session, lambda *_: attend(self.app, session), channel)
        else:
            await deny_mistaken(scope, receive, send, MISTAKEN)

    async def _join(self, opening: Opening, scope: Scope, receive: Receive, send: Send) -> None:
        """An outer layer opened the call; this one adds what it enables (X.1)."""
        if self.mistake is not None:
            raise self.mistake
        if opening.metering is not self.metering:
            raise ConfigurationError(
                f"{type(self).__name__} has another Metering than the layer outside it. Pass the same object to both."
            )
        opening.features |= self.features
        opening.unenforced &= self.unenforced
        channel = (scope, receive, send)
        if self.limits is not None and isinstance(opening, Session):
            await counted_session(self.limits, opening, self.app, channel)
            return
        if self.limits is None or not isinstance(opening, Exchange):
            await self.app(*channel)
            return
        answers = opening.options.answers
        if opening.free:
            await Overridden(self.app, self.limits, opening, answers)(*channel)
            return
        await counted(self.limits, opening, answers, self.app, lambda app: app(*channel), channel)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        layers: list[Any] | None = scope.get(LAYERS_KEY)
        if layers is not None:
            layers.append(self)
            await self.app(scope, receive, send)
            return
        layers = scope[LAYERS_KEY] = [self]
        if self.mistake is not None:
            await refuse_startup(self.mistake, receive, send)
        await Lifespan(self.app, self.metering, layers).run(scope, receive, send)


def layers_of(app: Any) -> Iterator[MeteringMiddleware]:
    """The layers from *app* inwards, as far as middleware that keeps its app as ``app`` lets them be seen."""
    for _ in range(MAX_DEPTH):
        if app is None:
            return
        if isinstance(app, MeteringMiddleware):
            yield app
        app = getattr(app, "app", None)


def _is_serving() -> bool:
    """
    Whether an event loop runs here: then a framework makes its layers for the first scope that a server has sent.

    That is its lifespan, and a server takes an exception there for "this application has none", and serves. So a
    mistake waits for the startup, and is told as any other.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _answer_mistaken(send: Send) -> None:
    fields = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(MISTAKEN)).encode("ascii")),
        (b"cache-control", b"no-store"),
    ]
    await send({"type": "http.response.start", "status": 500, "headers": fields})
    await send({"type": "http.response.body", "body": MISTAKEN})


class RateLimitMiddleware(MeteringMiddleware):
    """The rate and concurrency limits alone."""

    features = frozenset({"rates"})


class CreditGateMiddleware(MeteringMiddleware):
    """The credit gate alone: holds, 402 before the first byte, settlement."""

    features = frozenset({"credits"})


class QuotaCaptureMiddleware(MeteringMiddleware):
    """The capture of provider quotas from responses alone."""

    features = frozenset({"quotas"})


class UsageEventsMiddleware(MeteringMiddleware):
    """The usage events alone: what the credit gate inside or outside of it settles is reported."""

    features = frozenset({"events"})
