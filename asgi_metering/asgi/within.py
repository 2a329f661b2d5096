"""
Refusals within: what a request is answered whose handler let the refusal of a charge inside of it rise.

That charge is a call of its own (`Metering.charge`), and its refusal an answer on its way to the edge like any other:
402 before the first byte, where a server would say 500. Decides nothing; behind the first byte nothing is changed,
and a WebSocket closes itself (`websocket`).
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Awaitable
from typing import TYPE_CHECKING

from asgi_metering.asgi.dressing import told
from asgi_metering.asgi.endings import refusal_in, stops
from asgi_metering.asgi.hearing import Hearing
from asgi_metering.asgi.refusals import refusal_within
from asgi_metering.asgi.types import Message

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.opening import Opening

__all__ = ["Within", "refused_within"]


def refused_within(opening: Opening, failure: BaseException | None) -> Call | None:
    """
    The charge inside of *opening* by whose refusal its application was left; None for any other *failure*.

    The opening's own call is answered otherwise, and what another metering refuses is an error of the application.
    """
    refused = None if failure is None or stops(failure) else refusal_in(failure)
    if refused is None or refused.call is opening.call or refused.call.metering is not opening.metering:
        return None
    return refused.call


class Within(Hearing):
    """One request, inside of which charges may be refused; arguments and attributes as of `Hearing`."""

    started = False  # the app's response, or ours instead of it, has begun
    swapped = False  # ours instead of the app's: what the app still sends goes nowhere
    begun: Message | None = None  # the start of the app's response, if it passed before an admission

    def refused_inside(self) -> None:
        """Look at the start that comes next: a framework may make a 500 of the refusal (pitfall 15)."""
        if not self.started and self.passing is None:
            self.passing = self._start

    async def _start(self, message: Message) -> None:
        self.passing = None
        is_failure = message["type"] == "http.response.start" and message["status"] >= 500
        # Of what it handles while it sends: a handler that caught the refusal, and failed otherwise, has its own 500.
        if is_failure and await self.answers_within(sys.exc_info()[1]):
            return
        if self.call is not None:
            await self.send(message)
            return
        # As `exchange.run` does with it.
        if message["type"] == "http.response.start":
            if self.before is not None:
                message = told(self.before, message, self.options.answers)
            self.started, self.begun = True, message
        await self.server_send(message)

    @abstractmethod
    def send(self, message: Message) -> Awaitable[None]:
        """What the app calls once there is a call: see `Exchange`."""

    async def answers_within(self, failure: BaseException | None) -> bool:
        """Whether *failure*, which the app raised, is the refusal of a charge inside of it that is answered here."""
        inner = refused_within(self, failure)
        if inner is None:
            return False
        if not self.started:
            await self._answer(inner)
        return self.passing == self._nowhere

    async def _answer(self, inner: Call) -> None:
        self.started = self.swapped = True
        self.passing = self._nowhere
        rendered = refusal_within(inner, self.call, self.options.answers)
        await self.server_send({"type": "http.response.start", "status": rendered.status, "headers": rendered.headers})
        body = b"" if self.scope["method"] == "HEAD" else rendered.body
        await self.server_send({"type": "http.response.body", "body": body})

    async def _nowhere(self, message: Message) -> None:
        """What the app sends behind our answer."""
