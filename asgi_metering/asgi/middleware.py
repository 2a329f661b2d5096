"""
The middleware: the whole stack, and its layers alone.

Keeps configuration only; a request's state lives in its exchange. Scopes that it does not know pass untouched.
"""

from __future__ import annotations

from typing import Any, ClassVar

from asgi_metering.asgi.answers import DEFAULT_OPTIONS, AnswerOptions
from asgi_metering.asgi.exchange import ExchangeOptions, run
from asgi_metering.asgi.lifespan import LAYERS_KEY, Lifespan
from asgi_metering.asgi.origin import HTTPOrigin
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send
from asgi_metering.call import SCOPE_KEY, Opening
from asgi_metering.errors import ConfigurationError
from asgi_metering.metering import ALL_FEATURES, Metering

__all__ = [
    "CreditGateMiddleware",
    "MeteringMiddleware",
    "QuotaCaptureMiddleware",
    "RateLimitMiddleware",
    "UsageEventsMiddleware",
]

FREE_METHODS = frozenset({"HEAD", "OPTIONS"})
"""Never metered: no body is wanted, and CORS preflights come by OPTIONS (X.4, pitfall 12)."""


class MeteringMiddleware:
    """
    The whole stack: rate limits, credit gate, quota capture and usage events, with one admission.

    Args:
        app: Any ASGI app.
        metering: The composition root; the same object in every layer of a stack.
        unenforced: ``"allow"`` lets endpoints run whose layer is absent here; by default that fails at startup.
        answers: How refusals and limits look on the wire.
        stop_on_disconnect: Raise `OSError` from ``send`` once the client has left, for apps that would run on.

    Raises:
        ConfigurationError: *metering* is no `Metering`, or *unenforced* is another word.

    With no policy on any endpoint not one byte of any response changes (S2.27). Installed twice, the inner one adds
    nothing (pitfall 37).
    """

    features: ClassVar[frozenset[str]] = ALL_FEATURES

    def __init__(
        self,
        app: ASGIApp,
        metering: Metering,
        *,
        unenforced: str = "error",
        answers: AnswerOptions = DEFAULT_OPTIONS,
        stop_on_disconnect: bool = False,
    ) -> None:
        if not isinstance(metering, Metering):
            raise ConfigurationError(
                f"metering={metering!r} is no Metering. Make one, Metering('sqlite:///metering.db'), and pass it here."
            )
        if unenforced not in ("error", "allow"):
            raise ConfigurationError(f"unenforced={unenforced!r} is not known. Use 'error' or 'allow'.")
        self.app = app
        self.metering = metering
        self.unenforced = ALL_FEATURES - self.features if unenforced == "allow" else frozenset[str]()
        self._options = ExchangeOptions(answers, stop_on_disconnect)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Meter HTTP requests; look after the lifespan; pass everything else on."""
        kind = scope["type"]
        if kind == "http":
            await self._http(scope, receive, send)
        elif kind == "lifespan":
            await self._lifespan(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        opening = scope.get(SCOPE_KEY)
        if opening is not None:
            await self._join(opening, scope, receive, send)
            return
        opening = Opening(
            self.metering,
            self.features,
            HTTPOrigin(scope),
            free=scope["method"] in FREE_METHODS,
            unenforced=self.unenforced,
        )
        # Into the scope itself, as Starlette's own middleware does: a copy would hide the route from outer layers.
        scope[SCOPE_KEY] = opening
        await run(self.app, opening, scope, receive, send, self._options)

    async def _join(self, opening: Opening, scope: Scope, receive: Receive, send: Send) -> None:
        """An outer layer opened the call; this one adds what it enables (X.1)."""
        if opening.metering is not self.metering:
            raise ConfigurationError(
                f"{type(self).__name__} has another Metering than the layer outside it. Pass the same object to both."
            )
        opening.features |= self.features
        opening.unenforced &= self.unenforced
        await self.app(scope, receive, send)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        layers: list[Any] | None = scope.get(LAYERS_KEY)
        if layers is not None:
            layers.append(self)
            await self.app(scope, receive, send)
            return
        layers = scope[LAYERS_KEY] = [self]
        await Lifespan(self.app, self.metering, layers).run(scope, receive, send)


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
