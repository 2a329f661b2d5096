"""
The lifespan: starts the metering with the application, audits it, and holds its shutdown until calls are booked.

Run by the outermost layer of a stack. An app without a lifespan of its own gets one here, so that its shutdown is
held too.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from asgi_metering.asgi.audit import Report
from asgi_metering.asgi.startup import check_stack, examined
from asgi_metering.asgi.types import ASGIApp, Message, Receive, Scope, Send
from asgi_metering.asgi.workers import check_workers
from asgi_metering.errors import ConfigurationError, MeteringError
from asgi_metering.metering import Metering
from asgi_metering.tokens import warm_up

__all__ = ["LAYERS_KEY", "Lifespan", "refuse_startup"]

log = logging.getLogger("asgi_metering")

LAYERS_KEY = "asgi_metering.layers"
"""Where the layers of a stack find each other in the lifespan scope."""


class _StartupRefused(MeteringError):  # noqa: N818 -- an answer that unwinds
    """Unwinds the app after its startup was answered with a failure."""


class Lifespan:
    """
    One run of an application's lifespan.

    Args:
        app: The app behind the outermost layer.
        metering: Of the outermost layer.
        layers: All layers of the stack, outermost first; inner ones add themselves on the way in.
    """

    def __init__(self, app: ASGIApp, metering: Metering, layers: list[Any]) -> None:
        self._app = app
        self._metering = metering
        self._layers = layers
        self._asked = False  # the app has asked for its first message
        self._counted = False  # among those that use the metering on this loop
        self._refused: Exception | None = None

    async def run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """
        Pass the lifespan through, watching both directions (pitfall 31).

        Raises:
            MeteringError: Why the application must not start, after ``lifespan.startup.failed`` has said so: a client
                in process (Starlette's `TestClient`) waits for it, and servers that were told already keep quiet of it.
        """
        try:
            await self._run(scope, receive, send)
        finally:
            # Also where the server cancels it: for others this one is over.
            self._leave()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def receive_() -> Message:
            self._asked = True
            if self._refused is not None:
                raise _StartupRefused(str(self._refused))
            message = await receive()
            if message["type"] == "lifespan.startup":
                await self._start(send)
            elif message["type"] == "lifespan.shutdown":
                # Before the app hears of it: its own resources are still open for calls in flight.
                await self._drain()
            return message

        async def send_(message: Message) -> None:
            kind = message["type"]
            if self._refused is not None:
                # The server has our answer already; what the app still says of its end is for nobody.
                return
            if kind == "lifespan.startup.complete":
                if not await self._check(scope, send):
                    return
            elif kind in ("lifespan.startup.failed", "lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self._stop()
            await send(message)

        try:
            await self._app(scope, receive_, send_)
        except _StartupRefused:
            pass  # raised below, as it is for an app that swallows it
        except Exception:
            if self._refused is not None:
                # hypercorn says so by an exception from its `send`, and serves if that does not end us at once.
                raise
            if self._asked:
                await self._stop()
                raise
            log.debug("The app has no lifespan; the metering keeps one for it.", exc_info=True)
        if not self._asked:
            await self._stand_in(scope, receive, send)
        if self._refused is not None:
            # Its way here says nothing: the sentence has the mistake.
            raise self._refused.with_traceback(None) from None

    async def _drain(self) -> None:
        """Wait for the calls in flight, unless another application runs on: some of them are its own."""
        if self._metering.runtime().lifespans <= 1:
            await self._metering.drain()

    def _leave(self) -> None:
        if self._counted:
            self._counted = False
            self._metering.runtime().lifespans -= 1

    async def _stop(self) -> None:
        self._leave()
        try:
            runtime = self._metering.runtime()
        except ConfigurationError:
            # Of a loop that is not asyncio's, in which nothing was started.
            return
        if runtime.lifespans:
            return
        await self._metering.stop()
        # An app that raises here is served all the same, and nobody holds its shutdown then (pitfall 32).
        runtime.managed = False

    async def _start(self, send: Send) -> None:
        outermost = self._layers[0]
        outermost.proven, outermost.fault = False, None
        try:
            check_stack(self._layers)
            check_workers(self._metering.store)
            runtime = self._metering.runtime()
            runtime.managed = self._counted = True
            runtime.lifespans += 1
            await self._metering.begin()
            return
        except MeteringError as failure:
            refused = failure
        # Outside of the handler: a server that shows what its own exception came from would tell all of it twice.
        await self._refuse(refused, send)
        raise _StartupRefused(str(refused))

    async def _check(self, scope: Scope, send: Send) -> bool:
        """Audit the application; False if that refused its startup."""
        report: Report | MeteringError
        try:
            report = examined(scope, self._layers)
        except MeteringError as failure:
            report = failure
        if isinstance(report, MeteringError):
            await self._refuse(report, send)
            return False
        self._layers[0].proven = True
        if _may_count_tokens(report):
            # Half a second of a thread now, rather than of the first call that is estimated or cut short.
            await warm_up()
        return True

    async def _refuse(self, failure: Exception, send: Send) -> None:
        self._refused = failure
        if isinstance(failure, ConfigurationError):
            # A server that serves all the same shall not serve this; a store that is down may be up again by then.
            self._layers[0].fault = failure
        log.error("The application cannot start: %s", failure)
        # Before the server hears of it: what comes after its `send` may not wait for anything.
        await self._stop()
        await send({"type": "lifespan.startup.failed", "message": str(failure)})

    async def _stand_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Be the lifespan of an app that has none."""
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self._start(send)
                except _StartupRefused:
                    return
                if not await self._check(scope, send):
                    return
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self._drain()
                await self._stop()
                await send({"type": "lifespan.shutdown.complete"})
                return


async def refuse_startup(mistake: ConfigurationError, receive: Receive, send: Send) -> NoReturn:
    """
    Be the lifespan of an application that must not start, of which nothing is asked.

    Raises:
        ConfigurationError: The *mistake*, once the server has heard of it, as `Lifespan.run` does.
    """
    await receive()
    log.error("The application cannot start: %s", mistake)
    await send({"type": "lifespan.startup.failed", "message": str(mistake)})
    raise mistake.with_traceback(None) from None


def _may_count_tokens(report: Report) -> bool:
    """Whether a call of any route could need the tokenizer: fixed prices never do, limits of tokens do."""
    policies = [policy for row in report.rows for policy in row.policies]
    return any(policy.weighs or (policy.charge is not None and policy.charge.measured) for policy in policies)
