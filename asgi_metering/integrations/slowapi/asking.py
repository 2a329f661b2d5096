"""
Asking: one request at the limits of one endpoint, from what counts to what its client may be shown.

Knows calls and decisions. Never answers a request, and never runs an endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from math import floor
from typing import TYPE_CHECKING, Any

from slowapi.errors import RateLimitExceeded
from slowapi.wrappers import Limit
from starlette.requests import HTTPConnection

from asgi_metering.asgi.fields import whole_seconds
from asgi_metering.asgi.origin import HTTPOrigin
from asgi_metering.call import Call, CallRefused
from asgi_metering.decisions import Decision, Reason, Refusal, WindowState
from asgi_metering.integrations.slowapi.rules import Counted
from asgi_metering.opening import Opening
from asgi_metering.rules.ending import Cause
from asgi_metering.rules.operations import LimitAsk

if TYPE_CHECKING:
    from asgi_metering.integrations.slowapi.endpoints import Limited
    from asgi_metering.metering import Metering

__all__ = ["ASKING", "Alone", "Asking", "LimitExceeded", "Shown"]

SPENT = frozenset((Reason.RATE_LIMIT, Reason.EXCEEDS_LIMIT))


class Alone(Opening):
    """
    A request whose limits are asked for where no middleware of ours stands in front.

    Args:
        metering: That counts.
        scope: The connection's.
    """

    def __init__(self, metering: Metering, scope: Any) -> None:
        super().__init__(metering, frozenset({"rates"}))
        self.scope = scope
        self._origin = HTTPOrigin(scope)

    @property
    def origin(self) -> HTTPOrigin:
        """Where it came from."""
        return self._origin

    def open_call(self) -> Call:
        """The call of this request. Nobody asks who calls: whom its limits count is theirs to say."""
        call = super().open_call()
        call.known_as_nobody()
        return call

    def over(self) -> None:
        """The endpoint is done, or never began."""
        self.closed = True
        call = self.call
        if call is not None and call.runtime is not None:
            # Counted in this process alone, it is known to its background.
            call.see(Cause.COMPLETED)
            call.runtime.finish(call)
        self.let_go()
        self.scope = None


class Shown(tuple[Any, ...]):  # noqa: SLOT001 -- a tuple has no place for what it is to show
    """
    What slowapi keeps at ``request.state.view_rate_limit``: the item, and by what it is counted.

    Attributes:
        limit, remaining: How many per window, and how many are left of it; None before the store has answered.
        reset_at: The epoch second, by the store's clock, after the one in which there are more.
        retry_s: Whole seconds until a repeat may pass.
    """

    limit = 0
    remaining: int | None = None
    reset_at = retry_s = 0
    _call: Call
    _name: str

    @classmethod
    def of(cls, counted: Counted, call: Call) -> Shown:
        """What there is to show of *counted*, once it is decided on *call*."""
        shown = cls((counted.limit.limit, list(counted.identifiers)))
        shown._call, shown._name = call, counted.ask.name
        return shown

    def settle(self) -> bool:
        """Take the numbers; False before there are any."""
        decision = self._call.decision
        if self.remaining is None and decision is not None:
            for window in decision.windows:
                if window.name == self._name:
                    self._take(window, decision.now, decision.refusal)
        return self.remaining is not None

    def _take(self, window: WindowState, now: float, refusal: Refusal | None) -> None:
        self.limit, self.remaining = window.limit, window.remaining
        self.reset_at = floor(now + window.reset_after_s) + 1
        waits = [window.reset_after_s, (refusal.retry_after_s if refusal is not None else None) or 0.0]
        self.retry_s = max(whole_seconds(wait) or 0 for wait in waits)


class Asking:
    """
    One request on its way through the limits of one endpoint.

    Args:
        limited: The endpoint's.
        request: As the endpoint gets it.
        outer: What else is asked around it.
        opening: In which its call is; None as long as that is not known.

    Attributes:
        asked: Somebody has begun to find out what counts.
        counted: What counts.
        shown: What the client may see; None where nothing counts.
    """

    __slots__ = ("_fallback", "asked", "counted", "limited", "opening", "outer", "request", "shown")

    def __init__(
        self, limited: Limited, request: HTTPConnection, outer: Asking | None = None, opening: Opening | None = None
    ) -> None:
        self.limited, self.request, self.outer, self.opening = limited, request, outer, opening
        self.asked = False
        self.counted: Sequence[Counted] = ()
        self._fallback: Sequence[Counted] = ()
        self.shown: Shown | None = None
        request.state.view_rate_limit = None

    def of(self, limited: Limited, call: Call) -> Asking | None:
        """This, or what is around it, if it asks for *limited* of *call*, and not of a request before."""
        asking: Asking | None = self
        while asking is not None:
            if asking.limited is limited and asking.opening in (None, call.opening):
                return asking
            asking = asking.outer
        return None

    def covers(self, limited: Limited, request: HTTPConnection) -> bool:
        """Whether a decorator of the same limiter, in which *limited* runs, has counted *request* already."""
        is_same = self.limited.limiter is limited.limiter and self.request.scope is request.scope
        if self.asked and is_same and self.limited.rules:
            return True
        return self.outer is not None and self.outer.covers(limited, request)

    def count(self, call: Call, counted: Sequence[Counted], fallback: Sequence[Counted] = ()) -> list[LimitAsk]:
        """Note what counts for *call*, and what does without the store; what to ask is returned."""
        self.counted, self._fallback = counted, fallback
        # The first of the finest, as slowapi chooses it.
        finest = min(counted, key=lambda each: each.limit.limit.GRANULARITY.seconds, default=None)
        self._show(None if finest is None else Shown.of(finest, call))
        return [each.ask for each in counted]

    def fall_back(self, call: Call) -> list[LimitAsk]:
        """Count by what was said for the time without a store."""
        return self.count(call, self._fallback)

    def _show(self, shown: Shown | None) -> None:
        self.shown = self.request.state.view_rate_limit = shown
        self.request.state._rate_limiting_complete = True

    def refused(self, call: Call, refusal: Refusal, decision: Decision) -> Limit | None:
        """
        The limit of slowapi's that has refused *call*; None where it was none of them.

        Of several it is the first in slowapi's order, and the wait is that of the one that lasts longest.
        """
        asked = {each.ask.name: each for each in self.counted}
        if refusal.reason not in SPENT or refusal.name not in asked:
            return None
        left = {window.name: window.remaining for window in decision.windows}
        failing = (each for each in self.counted if each.ask.cost > left.get(each.ask.name, each.ask.cost))
        first = next(failing, asked[refusal.name])
        self._show(Shown.of(first, call))
        return first.limit


class LimitExceeded(RateLimitExceeded, CallRefused):
    """
    A limit of an adopted limiter is spent: slowapi's exception for its handlers, and a refusal for our middleware.

    Args:
        limit: slowapi's.
        call, refusal, decision: Of the refused call.
    """

    def __init__(self, limit: Limit, call: Call, refusal: Refusal, decision: Decision | None) -> None:
        CallRefused.__init__(self, call, refusal, decision)
        RateLimitExceeded.__init__(self, limit)


ASKING: ContextVar[Asking | None] = ContextVar("asgi_metering_slowapi", default=None)
"""What is being asked for the request in whose context the code runs."""
