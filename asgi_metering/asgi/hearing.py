"""
What an application hears of its request: the body, and that its client has left, or not.

The state of the one connection that both directions share is kept here; what the application sends is the exchange's.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asgi_metering.asgi.answers import DEFAULT_OPTIONS, AnswerOptions
from asgi_metering.asgi.body import RequestBody, has_key, may_have_body
from asgi_metering.asgi.draining import Draining, drain
from asgi_metering.asgi.native import DJANGO, FORBIDDEN, known_refusal
from asgi_metering.asgi.origin import HTTPOrigin
from asgi_metering.asgi.refusals import message_error
from asgi_metering.asgi.types import Message, Receive, Scope, Send
from asgi_metering.asgi.watch import Watch, unread_end
from asgi_metering.call import Call, CallRefused
from asgi_metering.decisions import Refusal
from asgi_metering.holding import Slices
from asgi_metering.opening import Opening
from asgi_metering.rules.ending import Cause

if TYPE_CHECKING:
    from asgi_metering.asgi.overridden import Overridden
    from asgi_metering.metering import Metering

__all__ = ["FREE_METHODS", "ExchangeOptions", "Hearing"]

FREE_METHODS = frozenset({"HEAD", "OPTIONS"})
"""Never metered: no body is wanted, and CORS preflights come by OPTIONS (X.4, pitfall 12)."""


@dataclass(frozen=True, slots=True)
class ExchangeOptions:
    """
    What a layer lets its exchanges do.

    Attributes:
        answers: How refusals look.
        stop_on_disconnect: Watch for a client that left and raise `OSError` from ``send`` (pitfalls 27, 28). The
            server does not hear of it.
        framework: Whose the application is; see `known_refusal`.
    """

    answers: AnswerOptions = DEFAULT_OPTIONS
    stop_on_disconnect: bool = False
    framework: str | None = None

    def replaces(self, status: int) -> bool:
        """Whether the framework made an answer of *status* out of a refusal; others are an application's own."""
        return status >= 500 or (status == FORBIDDEN and self.framework == DJANGO)


_DEFAULTS = ExchangeOptions()

MARK_KEY = "asgi_metering.mark"
"""Where the scope of a free request has an object that nothing else refers to, so that copies of it are seen."""

references = getattr(sys, "getrefcount", None)
"""Counts who refers to an object; None for a Python that does not count."""

MARKED = 3
"""References to the mark of a scope that nobody has copied: of the scope, the exchange, and whoever counts."""


class Hearing(Opening, HTTPOrigin):
    """
    One request, as its application hears it, and where it came from.

    Args:
        metering: Of the layer that opens it.
        features, free, unenforced: As of `Opening`.
        scope: The connection's.
        receive, send: The server's. To be made in the task of the request.
        options: What the layer lets it do.

    Attributes:
        server_send: The server's.
        passing: What chunks of the body pass to, once it is under way; None before, and where each is looked at.
    """

    # Defaults stand here and not in `__init__`: most requests need none of them, and none pays for what it has not.
    passing: Send | None = None
    finishing = False  # the last message was handed over
    incoming: RequestBody | None = None  # of a request with an idempotency key
    looked = False  # for that key
    task: asyncio.Task[object] | None = None
    watch: Watch | None = None
    draining: Draining | None = None  # the client has left, and the app goes on
    lost = False  # a message did not reach it
    told = False  # the app was shown that, and does not go on
    heard = hears = False  # the app was given the whole request, or a part of it
    mark: object | None = None  # of a free request, in its scope
    overridden: Overridden | None = None  # the innermost layer that has not counted it, since it is free

    def __init__(
        self,
        metering: Metering,
        features: frozenset[str],
        scope: Scope,
        receive: Receive,
        send: Send,
        options: ExchangeOptions = _DEFAULTS,
        *,
        free: bool = False,
        unenforced: frozenset[str] = frozenset(),
    ) -> None:
        # As `Opening` does: to ask it would cost every request of every route as much as a third of this.
        self.metering = metering
        self.features = features
        self.unenforced = unenforced
        self.scope = scope
        self.options = options
        self._receive = receive
        self.server_send = send
        if free:
            self.free = True
            self.mark = scope[MARK_KEY] = object()
        if Slices.in_use:
            # To ask for it costs as much as all else here, so only where some hold of this process may grow.
            self.task = asyncio.current_task()
        if options.stop_on_disconnect:
            self.watch = Watch(scope, receive, send)
            self._receive = self.watch.receive

    def stays_free(self, scope: Mapping[str, Any] | None = None) -> bool:
        """
        As of `Opening`: by its method, which a middleware further in may have changed; what is not free stays so.

        Where it may have done so on a copy that nobody can see from here, the request is not free.
        """
        # Of one that is over nothing is left to look at: it stays what it was, and lets nobody in.
        if self.free and not self.closed:
            told = scope or self.scope
            self.free = told["method"] in FREE_METHODS and (scope is not None or not self._is_copied())
        return self.free

    def _is_copied(self) -> bool:
        """Whether something further in runs with a copy of the scope: then its mark is in more places than one."""
        return references is not None and references(self.mark) > MARKED

    @property
    def origin(self) -> HTTPOrigin:
        """Where the request came from."""
        return self

    def refusal_of(self, call: Call, refusal: Refusal) -> CallRefused:
        """As of `Opening`, of the kinds that frameworks know."""
        decision = call.decision
        return known_refusal(
            call,
            refusal,
            decision,
            framework=self.options.framework,
            told=lambda: message_error(call, self.options.answers, refusal, decision),
        )

    # -- what the app reads --------------------------------------------------------------------------------

    def request_body(self) -> RequestBody:
        """The body of the request, of which nothing has been read but through this."""
        if self.incoming is None:
            self.incoming = RequestBody(self.scope, self._receive)
        return self.incoming

    async def receive(self) -> Message:
        """What the app calls."""
        if not self.looked:
            # Not before something of the body is read: most requests have none, and most routes no keys.
            self.looked = True
            if has_key(self.scope):
                self.request_body()
        if self.draining is not None and self.heard:
            return await self.draining.receive()
        message = await (self._receive() if self.incoming is None else self.incoming.receive())
        if message["type"] == "http.disconnect":
            self._gone()
            return await self._shown(message)
        if message.get("more_body", False):
            self.hears = True
        else:
            self.heard = True
        return message

    async def _shown(self, disconnect: Message) -> Message:
        """The disconnect, unless the app goes on and has heard all: then there is nothing more to receive."""
        if self.draining is None:
            return disconnect
        if self.heard:
            return await self.draining.receive()
        if self._has_more():
            return disconnect
        # Nobody has asked for it before.
        self.heard = True
        return {"type": "http.request", "body": b"", "more_body": False}

    def _has_more(self) -> bool:
        """Whether there is more of the request than the app was given."""
        return self.hears or may_have_body(self.scope)

    def has_left_unread(self) -> bool:
        """Whether the client had left before the app was stopped, which it has not read; see `unread_end`."""
        # A watch reads it by itself.
        return self.watch is None and unread_end(self._receive, "http.disconnect") is not None

    def _gone(self) -> None:
        call = self.call
        if call is None or self.finishing:
            return
        if self.heard or not self._has_more():
            self._left(call)
        else:
            # Who still waits for the rest of a request cannot finish it.
            call.see(Cause.CLIENT_GONE)
            self.told = True

    def _lost(self, call: Call) -> bool:
        """The server says that the client has left, by the `send` of a message; answers as `_left`."""
        self.lost = True
        return self._left(call)

    def _left(self, call: Call) -> bool:
        """The client has left; whether the app goes on as if it had not."""
        call.see(Cause.CLIENT_GONE)
        if self.draining is not None:
            # Servers may say it twice, the second time by a message that was under way at the first.
            return self.draining.is_within
        if self.told or call.cause is not Cause.CLIENT_GONE or call.charge is None or not call.charge.drains:
            return False
        self.draining = drain(call)
        if self.draining is None:
            # Before its admission nothing is decided.
            self.told = call.runtime is not None
            return False
        self.server_send, self.passing = self.draining.take, None
        if self.watch is not None:
            self.watch.stop()
            self.watch = None
        return True
