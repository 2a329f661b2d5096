"""
Flat limits: what a middleware counts before anything of its application runs, and before a byte of a body is read.

Knows which of them a request is counted by, and how it is answered when one refuses. A default limit never fails open:
a request whose route cannot be told is counted with all others of that kind. Keeps nothing about a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asgi_metering.asgi.audit import Row, has_routes, routes_of
from asgi_metering.asgi.denials import deny_refused
from asgi_metering.asgi.exchange import Exchange
from asgi_metering.asgi.refusals import refusal_response
from asgi_metering.asgi.table import RouteTable, runs
from asgi_metering.asgi.types import ASGIApp, Message, Receive, Scope, Send
from asgi_metering.asgi.websocket import Session
from asgi_metering.call import Call, CallRefused
from asgi_metering.decorators import gather, is_unlimited, rate_limited
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import Part
from asgi_metering.opening import Opening, Origin
from asgi_metering.policies import EndpointPolicy, RatePolicy
from asgi_metering.rules.ending import Cause
from asgi_metering.runtime import BOOK_S

if TYPE_CHECKING:
    from asgi_metering.asgi.answers import AnswerOptions

__all__ = ["Checked", "FlatLimits", "FlatOpening", "counted", "counted_session", "rates_of", "run_unless"]

OFFERED = ("scope", "request")
"""What callables of these limits may ask for, besides ``call``: nothing of a body, which is not read yet."""

UNMATCHED = "unmatched"
"""The bucket of requests whose route cannot be told: unknown paths, and frameworks whose routes nobody can read."""


class FlatLimits:
    """
    The flat limits of one middleware.

    Args:
        application_limits, default_limits: As of `MeteringMiddleware`.

    Raises:
        ConfigurationError: What is no list of limits of requests, or is counted by what is not known yet.
    """

    def __init__(self, application_limits: Sequence[Part | str], default_limits: Sequence[Part | str]) -> None:
        self.application_limits = _parts(application_limits, "application_limits")
        self.default_limits = _parts(default_limits, "default_limits")
        self.application = rates_of(self.application_limits, "application")
        # Read once here, so that what is wrong with them is told at import.
        rates_of(self.default_limits, UNMATCHED)
        if any(rate.key == "route" for rate in self.application):
            raise ConfigurationError(
                "application_limits= are counted before the route is known, so key='route' means nothing to them. Use "
                "key='global', or write them as default_limits=."
            )
        self._table: RouteTable | None = None
        # By row, which the table keeps: two routes of one name may differ in what limits them.
        self._policies: dict[tuple[int, int], EndpointPolicy] = {}

    def default(self, row: Row | None) -> tuple[RatePolicy, ...]:
        """The default limits that count at *row*, or where no route is known."""
        if row is not None and not defaults_apply(row):
            return ()
        return rates_of(self.default_limits, UNMATCHED if row is None else bucket_of(row))

    def of(self, app: ASGIApp, scope: Scope, depth: int) -> tuple[EndpointPolicy | None, Row | None]:
        """
        What the request of *scope* is counted by, and the route that was trusted to need no default limit.

        Args:
            app: Behind the middleware.
            scope: Of the request.
            depth: How many layers outside of this one have counted it.
        """
        row = self._row(app, scope) if self.default_limits else None
        place = (0 if row is None else id(row), depth)
        policy = self._policies.get(place)
        if policy is None:
            rates = (*_deeper(self.application, depth), *_deeper(self.default(row), depth))
            name = UNMATCHED if row is None else bucket_of(row)
            policy = self._policies[place] = EndpointPolicy(f"limits of {name}", rates=rates)
        trusted = row if self.default_limits and row is not None and not defaults_apply(row) else None
        return policy if policy.rates else None, trusted

    def handshake(self, depth: int) -> EndpointPolicy | None:
        """What the handshake of a WebSocket is counted by; routes of WebSockets have no default limits."""
        place = (-2, depth)
        policy = self._policies.get(place)
        if policy is None:
            policy = self._policies[place] = EndpointPolicy(
                "limits of WebSockets", rates=_deeper(self.application, depth)
            )
        return policy if policy.rates else None

    def unmatched(self, depth: int) -> EndpointPolicy:
        """What a request is counted by that took another route than the one which was trusted."""
        place = (-1, depth)
        policy = self._policies.get(place)
        if policy is None:
            rates = _deeper(self.default(None), depth)
            policy = self._policies[place] = EndpointPolicy(f"limits of {UNMATCHED}", rates=rates)
        return policy

    def _row(self, app: ASGIApp, scope: Scope) -> Row | None:
        table = self._table
        if table is None:
            application = app if has_routes(app) else scope.get("app", app)
            root_path = getattr(application, "root_path", "") if application is not scope.get("app") else ""
            table = self._table = RouteTable(list(routes_of(application)), root_path or "")
        return table.find(scope)


def _parts(given: Any, name: str) -> tuple[Part, ...]:
    if not isinstance(given, list | tuple):
        raise ConfigurationError(f"{name}={given!r} is no list of limits. Write [rate_limited('100/minute')], say.")
    parts = []
    for each in given:
        part = rate_limited(each) if isinstance(each, str) else each
        if not isinstance(part, Part) or part.rates is None or part.charge is not None:
            raise ConfigurationError(f"{name}= has {each!r}, which is no limit. Write rate_limited('100/minute'), say.")
        parts.append(part)
    return tuple(parts)


def rates_of(parts: Sequence[Part], name: str) -> tuple[RatePolicy, ...]:
    """
    The limits of *parts*, counted in the bucket *name* where they name no scope.

    Raises:
        ConfigurationError: Parts that contradict each other, ask for what is not known yet, or count tokens.
    """
    if not parts:
        return ()
    # The last of several decorators is the first that is applied.
    policy = gather(tuple(reversed(parts)), name, OFFERED)
    if policy.weighs:
        raise ConfigurationError(
            "Limits of a middleware count requests: what a call will use is not known before its body is read. Write "
            "limits of tokens on the endpoints."
        )
    if policy.messages:
        raise ConfigurationError(
            'Limits of a middleware count HTTP requests, and per="message" what comes in over a WebSocket. Write '
            "it on the endpoints."
        )
    return policy.rates


def _deeper(rates: tuple[RatePolicy, ...], depth: int) -> tuple[RatePolicy, ...]:
    """*rates* in buckets of their own, where a layer outside has counted the same request in those of its own."""
    if not depth:
        return rates
    return tuple([replace(rate, scope=f"{rate.scope}#{depth + 1}") for rate in rates])


def bucket_of(row: Row) -> str:
    """
    What the default limits of *row* are counted as: one bucket for each route, whatever its parameters are.

    With the module, as limits of its own are: routes of another application on the same store are others.
    """
    kind = type(row.endpoint)
    module = getattr(row.endpoint, "__module__", kind.__module__)
    plain = getattr(row.endpoint, "__qualname__", kind.__qualname__)
    return f"default {row.path} {module}.{plain.replace('<locals>.', '')}"


def defaults_apply(row: Row) -> bool:
    """Whether default limits count at *row*: it has none of its own that stand for them, and is not `unlimited`."""
    if is_unlimited(row.endpoint):
        return False
    policies = row.policies if row.around is None else (*row.policies, row.around)
    return not any(map(_overrides, policies))


def _overrides(policy: EndpointPolicy) -> bool:
    return any(rate.overrides for rate in policy.rates)


class FlatOpening(Opening):
    """
    The request as its flat limits see it: an admission of its own, with nothing of the endpoint's.

    Args:
        around: The exchange of the request.
    """

    is_flat = True

    def __init__(self, around: Opening) -> None:
        super().__init__(around.metering, frozenset({"rates"}))
        self.around, self.before = around, around.before
        # Its slots are held for as long as what it counts may last.
        self.is_session = around.is_session

    @property
    def origin(self) -> Origin | None:
        """Where the request came from."""
        assert self.around is not None  # noqa: S101 -- made with it
        return self.around.origin


async def counted(
    limits: FlatLimits,
    exchange: Exchange,
    answers: AnswerOptions,
    app: ASGIApp,
    run: Any,
    channel: tuple[Scope, Receive, Send],
) -> None:
    """
    Count a request by *limits*, and let it through or answer it.

    Args:
        limits: Of the layer.
        exchange: Of the request.
        answers: How refusals look.
        app: Behind the layer.
        run: Runs an app for the request.
        channel: Scope, ``receive`` and ``send`` of the layer.
    """
    scope, _, send = channel
    depth = 0 if exchange.before is None else exchange.before.layers
    policy, trusted = limits.of(app, scope, depth)
    if trusted is not None:
        app = Checked(app, limits, exchange, answers, trusted, depth)
    if policy is None:
        await run(app)
        return
    opening = FlatOpening(exchange)
    call = opening.open_call()
    try:
        try:
            await call.gate(policy, _offered(policy, exchange))
        except CallRefused:
            await _answer(call, exchange, answers, send)
            return
        exchange.counted_before(call)
        await run(app)
    finally:
        await _over(opening, call)


async def counted_session(
    limits: FlatLimits, session: Session, app: ASGIApp, channel: tuple[Scope, Receive, Send]
) -> None:
    """
    The same for the handshake of a WebSocket, which application limits count as the request that it is.

    Args:
        limits: Of the layer.
        session: Of the WebSocket.
        app: Runs with the channel where the handshake is let in.
        channel: Scope, ``receive`` and ``send`` of the layer.
    """
    scope, receive, send = channel
    policy = limits.handshake(0 if session.before is None else session.before.layers)
    if policy is None:
        await app(scope, receive, send)
        return
    opening = FlatOpening(session)
    call = opening.open_call()
    try:
        try:
            await call.gate(policy, _offered(policy, session))
        except CallRefused:
            await deny_refused(call, session.options, scope, receive, send)
            return
        session.counted_before(call)
        await app(scope, receive, send)
    finally:
        await _over(opening, call)


def _offered(policy: EndpointPolicy, opening: Exchange | Session) -> Mapping[str, Any]:
    if not policy.callables():
        return {}
    from starlette.requests import HTTPConnection, Request

    scope = opening.scope
    return {"scope": scope, "request": Request(scope) if scope["type"] == "http" else HTTPConnection(scope)}


async def _answer(call: Call, exchange: Exchange, answers: AnswerOptions, send: Send) -> None:
    """Answer the refusal; nothing was read of the request."""
    rendered = refusal_response(call, answers)
    # It tells of all windows already.
    exchange.before = None
    await send({"type": "http.response.start", "status": rendered.status, "headers": rendered.headers})
    await send({"type": "http.response.body", "body": rendered.body})


async def _over(opening: Opening, call: Call) -> None:
    """The request is over: give back the slots that it had."""
    opening.closed = True
    runtime = call.runtime
    if runtime is not None:
        call.see(Cause.COMPLETED)
        runtime.finish(call)
        if not (runtime.managed or call.receipt is not None or not call.has_hold):
            await asyncio.wait((call.expects_ending(),), timeout=BOOK_S)
    opening.let_go()


async def run_unless(
    refuses: Callable[[], Awaitable[bool]], app: ASGIApp, channel: tuple[Scope, Receive, Send]
) -> None:
    """
    Run *app*, whose answer gives way to a refusal.

    Args:
        refuses: Asked once, before the response begins or where the app raises: whether it has answered the request.
        app: What it says is passed on until then, and no more where it was answered.
        channel: Scope, ``receive`` and ``send`` of the app.
    """
    scope, receive, send = channel
    asked = answered = False

    async def ask() -> None:
        nonlocal asked, answered
        asked = True
        answered = await refuses()

    async def send_(message: Message) -> None:
        if not asked and message["type"] == "http.response.start":
            await ask()
        if not answered:
            await send(message)

    try:
        await app(scope, receive, send_)
    except Exception:
        # Answered further out, for all that is known here; whoever is refused hears that instead.
        if not asked:
            await ask()
        if not answered:
            raise


class Checked:
    """
    An app whose route was told to need no default limit, and which is held to it.

    A request that took another route is counted before its response begins, with those whose route is not known: what
    changes paths or methods on the way, such as a middleware for overrides, must not be a way around the limits.
    """

    def __init__(
        self,
        app: ASGIApp,
        limits: FlatLimits,
        exchange: Exchange,
        answers: AnswerOptions,
        row: Row,
        depth: int,
    ) -> None:
        self._app, self._limits, self._exchange, self._answers = app, limits, exchange, answers
        self._row, self._depth = row, depth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; what it answers gives way to a refusal."""

        async def refuses() -> bool:
            return await self.refuses(scope, receive, send)

        await run_unless(refuses, self._app, (scope, receive, send))

    async def refuses(self, scope: Scope, _: Receive, send: Send) -> bool:
        """Count a request after all that took another route; whether it was answered with a refusal."""
        return not self._is_right(scope) and await self._refuses(send)

    def _is_right(self, scope: Scope) -> bool:
        call = self._exchange.call
        # Limits that stand beside the defaults, or only tell, are no proof: their own route is counted by default.
        if call is not None and call.policy is not None and _overrides(call.policy):
            return True
        return runs(self._row, scope)

    async def _refuses(self, send: Send) -> bool:
        """Count the request after all; whether it was answered with a refusal."""
        opening = FlatOpening(self._exchange)
        call = opening.open_call()
        policy = self._limits.unmatched(self._depth)
        try:
            await call.gate(policy, _offered(policy, self._exchange))
        except CallRefused:
            await _answer(call, self._exchange, self._answers, send)
            return True
        finally:
            await _over(opening, call)
        return False
