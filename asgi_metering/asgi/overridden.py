"""
Overridden: a request that no limit counts, because of its method, until something further in gives it another.

Knows that such a middleware may stand between a layer and the routes, and neither what it looks at nor what limits are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from asgi_metering.asgi.exchange import Exchange
from asgi_metering.asgi.flat import Checked, FlatLimits, counted, run_unless
from asgi_metering.asgi.types import ASGIApp, Receive, Scope, Send

if TYPE_CHECKING:
    from asgi_metering.asgi.answers import AnswerOptions

__all__ = ["Overridden"]


class Overridden:
    """
    An app behind limits that did not count its request, which was free, and does if it is free no more.

    It is counted before its response begins: nobody knows earlier what becomes of it. Without this an OPTIONS with
    ``X-HTTP-Method-Override: POST`` would be a way around every limit of the layer. Layers count from the outermost
    one inwards, as they do on the way in: each in its own buckets.

    Args:
        app: Behind the layer.
        limits: Of the layer.
        exchange: Of the request.
        answers: How refusals look.
    """

    def __init__(self, app: ASGIApp, limits: FlatLimits, exchange: Exchange, answers: AnswerOptions) -> None:
        self._app, self._limits, self._exchange, self._answers = app, limits, exchange, answers
        self._outer, exchange.overridden = exchange.overridden, self
        self._has_counted = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; what it answers gives way to a refusal."""

        async def refuses() -> bool:
            return not self._exchange.stays_free() and not await self._lets((scope, receive, send))

        await run_unless(refuses, self._app, (scope, receive, send))

    async def _lets(self, channel: tuple[Scope, Receive, Send]) -> bool:
        """Count the request, by its route of now; False where it was answered with a refusal."""
        if self._has_counted:
            return True
        if self._outer is not None and not await self._outer._lets(channel):
            return False
        self._has_counted = True
        is_through = False

        async def through(app: ASGIApp) -> None:
            nonlocal is_through
            # A route that was trusted to need no default limit, and has run by now.
            is_through = not isinstance(app, Checked) or not await app.refuses(*channel)

        await counted(self._limits, self._exchange, self._answers, self._app, through, channel)
        return is_through
