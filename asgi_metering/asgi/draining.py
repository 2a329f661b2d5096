"""
Draining: an application that goes on for a client that left, so that what it does is charged by what it used.

It is shown no disconnect, and what it sends goes nowhere, within the bounds that its route gives it. Decides nothing
about the charge.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asgi_metering.asgi.types import Message
from asgi_metering.asgi.watch import ClientGone
from asgi_metering.rules.ending import Drain, Situation

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.runtime import Runtime

__all__ = ["Draining", "drain"]


class Draining:
    """
    One application that goes on. To be made, and stopped, on its event loop.

    Args:
        bounds: How far it may.
        runtime: Of its event loop, which counts it.

    Attributes:
        is_within: It has not gone beyond its bounds.
    """

    __slots__ = ("_bounds", "_over", "_passed", "_runtime", "_timer", "is_within")

    def __init__(self, bounds: Drain, runtime: Runtime) -> None:
        self._bounds = bounds
        self._runtime = runtime
        self._passed = 0
        self._over: asyncio.Future[None] = runtime.loop.create_future()
        self._timer: asyncio.TimerHandle | None = runtime.loop.call_later(bounds.within_s, self._give_up)
        self.is_within = True
        runtime.draining += 1

    async def receive(self) -> Message:
        """What the application is given: nothing, until it has gone too far; then the disconnect."""
        # Whoever asks in passing, as for `is_disconnected`, gives up; and none of them gives up for the others.
        await asyncio.shield(self._over)
        return {"type": "http.disconnect"}

    async def take(self, message: Message) -> None:
        """What the application sends, and nobody gets; raises `ClientGone` once it has gone too far."""
        self._passed += len(message.get("body", b""))
        if self._passed > self._bounds.most_bytes:
            self._give_up()
        if not self.is_within:
            raise ClientGone("The client has left, and the application has gone on for it as far as it may.")

    def finished(self) -> None:
        """The application has sent its last message: its time is over, and what runs behind that has none."""
        if self._timer is not None:
            self._timer.cancel()

    def failed(self) -> None:
        """The application did not finish: what it did is what was observed."""
        self.is_within = False

    def stop(self) -> None:
        """The request is over. Again changes nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._runtime.draining -= 1
        if not self._over.done():
            self._over.set_result(None)

    def _give_up(self) -> None:
        self.is_within = False
        if not self._over.done():
            self._over.set_result(None)


def drain(call: Call) -> Draining | None:
    """Let the application of *call*, whose client has left, go on; None where it may not, or too many do."""
    charge, runtime = call.charge, call.runtime
    if charge is None or runtime is None or call.exempt or call.closed:
        return None
    bounds: Drain | None = charge.end.drains.get(Situation.GONE_LATE if call.first_byte else Situation.GONE_EARLY)
    if bounds is None:
        return None
    if runtime.draining >= call.metering.max_draining:
        call.metering.meters.count("drains_refused", line=call.line)
        return None
    return Draining(bounds, runtime)
