"""
A request that may become a metered call, and how the code that runs in it finds that call.

Knows no HTTP: the edge makes an opening and says what it can tell of the request. Whether anything is asked or
charged is the call's, which is made on first use.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from asgi_metering.call import Call, CallRefused
from asgi_metering.caller import Caller
from asgi_metering.decisions import Refusal, WindowState
from asgi_metering.errors import CallClosedError, NoCallError
from asgi_metering.policies import ALL_FEATURES

if TYPE_CHECKING:
    from asgi_metering.metering import Metering

__all__ = ["ALL_FEATURES", "CURRENT", "SCOPE_KEY", "Before", "Opening", "Origin", "RequestBody", "current_call"]


class Origin(Protocol):
    """Where a call came from, as far as policies may ask; the edge fills it lazily."""

    @property
    def connection(self) -> Any:
        """What `identify` gets: the connection with its headers."""

    @property
    def address(self) -> str | None:
        """The client's address as the server reports it."""

    @property
    def request_id(self) -> str | None:
        """The correlation id that the client sent, cleaned."""

    @property
    def target(self) -> tuple[bytes, ...]:
        """Method, path and query."""

    def fields(self, name: str) -> list[str]:
        """The lines of the header field of this name, in lower case."""


class RequestBody(Protocol):
    """The body of a request."""

    async def digest(self) -> bytes:
        """SHA-256 of it; raises `keying.BodyError` where it cannot be told."""


class Before(NamedTuple):
    """What the limits of a middleware found out: who calls, if they asked, and how their windows stand."""

    caller: Caller | None
    windows: tuple[WindowState, ...]
    layers: int


class Opening:
    """
    A request that may become a metered call. Light: every request behind the middleware makes one.

    Args:
        free: Nothing of it is metered: HEAD, OPTIONS, or a test that opted out.

    Attributes:
        metering: The composition root of the layer that opened it.
        features: Which layers are present; inner layers add theirs.
        call: The call, once somebody asked for it.
        closed: The request is over; code that outlives it must not admit or charge (pitfall 1).
        around: In which request, or charge, the work runs that this charge is for; None where there is none.
        is_session: It is a connection over which messages go, such as a WebSocket, and may last for hours.
        accepted: Of a session: it is open.
        is_flat: Whether this is what the limits of a middleware see of a request, before its application runs.
        before: What those limits have found out, once they let it through; None where there are none.
    """

    # On the class: what a request never has costs it nothing.
    call: Call | None = None
    free = False
    closed = False
    around: Opening | None = None
    is_session = False
    accepted = False
    is_flat = False
    before: Before | None = None

    def __init__(
        self,
        metering: Metering,
        features: frozenset[str],
        *,
        free: bool = False,
        unenforced: frozenset[str] = frozenset(),
    ) -> None:
        self.metering = metering
        self.features = features
        self.free = free
        self.unenforced = unenforced

    @property
    def origin(self) -> Origin | None:
        """Where it came from; None outside HTTP."""
        return None

    def request_body(self) -> RequestBody | None:
        """The request's body; None outside HTTP."""
        return None

    def stays_free(self, scope: Mapping[str, Any] | None = None) -> bool:
        """
        Whether what was free when it was opened still is where its request has come to.

        Args:
            scope: What the code that asks was given of the request, which may be a copy; the request's own by default.
        """
        return self.free

    def let_go(self) -> None:
        """
        Forget the call of a request that is over, once that has ended too.

        They refer to each other: a circle for each request would be work for the collector of garbage.
        """
        if self.closed:
            self.call = None

    def counted_before(self, call: Call) -> None:
        """Note that the limits of a layer let the request through, by the admission of *call*."""
        windows = call.decision.windows if call.decision is not None else ()
        inner = self.before or Before(None, (), 0)
        self.before = Before(call.caller or inner.caller, (*windows, *inner.windows), inner.layers + 1)

    def refused_inside(self) -> None:
        """Note that a charge inside of it was refused: it is the request's to answer, if there is one."""
        if self.around is not None:
            self.around.refused_inside()

    def refusal_of(self, call: Call, refusal: Refusal) -> CallRefused:
        """The exception that says that *call* may not run."""
        return CallRefused(call, refusal, call.decision)

    def cut(self) -> None:
        """Stop the work of the call and its answer, on the loop of the request; outside HTTP nothing can be stopped."""

    def check(self) -> None:
        """Raise `CallClosedError` if the request is over."""
        if self.closed:
            raise CallClosedError(
                "The request that this code belongs to is over. Charge work that outlives it with metering.charge()."
            )

    def open_call(self) -> Call:
        """The call of this request, made on first use; raises as `check`."""
        if self.closed:
            self.check()
        call = self.call
        if call is None:
            call = self.call = Call(self)
            if self.before is not None:
                call.known(self.before.caller)
        return call


SCOPE_KEY = "asgi_metering.opening"
"""Where the edge puts the opening into a connection's scope."""

CURRENT: ContextVar[Opening | None] = ContextVar("asgi_metering_current", default=None)
"""The request in whose context the code runs; None outside (S2.44: never a mutable default)."""


def current_call() -> Call:
    """
    The metered call in whose context this code runs.

    Raises:
        NoCallError: There is none: no middleware, no `metering.charge()`, or another thread's context.
        CallClosedError: It is over (pitfall 1).
    """
    opening = CURRENT.get()
    if opening is None:
        raise NoCallError(
            "No metered call is running here. Add MeteringMiddleware to the application, or use metering.charge()."
        )
    return opening.open_call()
