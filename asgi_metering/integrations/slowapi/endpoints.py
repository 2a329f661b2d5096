"""
Endpoints: what slowapi's decorators write on one, in our words, and what runs instead of it.

Knows functions and the requests that frameworks hand to them. Decides nothing about a limit.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from asgi_metering.call import Call, CallRefused
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import NoCallError
from asgi_metering.guards import NO_ARGUMENTS, Guard, Part, guard_of
from asgi_metering.integrations.slowapi.asking import ASKING, Alone, Asking, LimitExceeded
from asgi_metering.integrations.slowapi.generators import asked_first, with_parameters
from asgi_metering.integrations.slowapi.rules import SCOPE, Counted, Rule, counted, driven, method_of, static_texts
from asgi_metering.opening import CURRENT, SCOPE_KEY, Opening
from asgi_metering.policies import EndpointPolicy, RatePolicy
from asgi_metering.rules.operations import LimitAsk

if TYPE_CHECKING:
    from asgi_metering.integrations.slowapi.limiter import AdoptedLimiter

__all__ = [
    "COUNTED_THOUGH_FREE",
    "LIMITED",
    "Limited",
    "limited_on",
    "named",
    "opening_of",
    "plain",
    "request_of",
    "wrapped",
    "write_on",
]

REQUEST, RESPONSE = "slowapi_request", "slowapi_response"
"""
Parameters that a wrapper asks its framework for, where the endpoint does not have them: FastAPI reads signatures, and
gives a request or response to whatever is annotated as one. Starlette gives a request by position.
"""

OUTAGE_WAIT_S = "5"
"""What a client is told to wait where the store is down and nobody of ours stands in front: a few seconds."""


def plain(endpoint: Any) -> Any:
    """The function, or class, below wrappers, partials and bound methods: what an endpoint is known by."""
    while True:
        inner = inspect.unwrap(endpoint)
        inner = getattr(inner, "__func__", inner)
        if isinstance(inner, functools.partial):
            inner = inner.func
        if inner is endpoint:
            return inner
        endpoint = inner


def named(endpoint: Any) -> str:
    """How slowapi calls *endpoint*, by its module and name."""
    return f"{endpoint.__module__}.{getattr(endpoint, '__name__', type(endpoint).__name__)}"


LIMITED = "__asgi_metering_slowapi_limited__"
"""Where a wrapper tells what limits it, by each limiter; what is wrapped around it has it as well."""


def limited_on(endpoint: Any, limiter: AdoptedLimiter) -> Limited | None:
    """What the decorators of *limiter* have written on *endpoint*; None for one that has none, or is another's."""
    for limited in getattr(endpoint, LIMITED, ()):
        if limited.limiter is limiter:
            found: Limited = limited
            return found
    return None


def write_on(endpoint: Any, limited: Limited) -> None:
    """Have *endpoint* tell that *limited* limits it."""
    setattr(endpoint, LIMITED, (*getattr(endpoint, LIMITED, ()), limited))


class Limited:
    """
    What one limiter says of one endpoint: a `LimitAsker`.

    Args:
        limiter: Whose.
        endpoint: The function, or class; see `plain`.
        rules: What its decorators say, in the order in which they ran; empty for one that has none.
    """

    def __init__(self, limiter: AdoptedLimiter, endpoint: Any, rules: Sequence[Rule] = ()) -> None:
        self.limiter, self.endpoint = limiter, endpoint
        self.rules = list(rules)
        # Two of a name are two.
        name = f"{endpoint.__module__}.{getattr(endpoint, '__qualname__', type(endpoint).__qualname__)}"
        name = name.replace("<locals>.", "")
        number = limiter.number_of(name)
        self.place = name if number == 1 else f"{name}#{number}"
        self._is_sync = not (inspect.iscoroutinefunction(endpoint) or inspect.isclass(endpoint))
        self.policy = EndpointPolicy(self.place, rates=(self.rate,))

    @property
    def rate(self) -> RatePolicy:
        """What is written on the endpoint."""
        return RatePolicy((), SCOPE, key="address", on_store_down=self.limiter.on_store_down, asker=self)

    def texts(self) -> list[tuple[str, str]]:
        """Its limits as they may be listed, each with its strategy."""
        return [(text, self.limiter.reading.strategy) for text in static_texts(self._all())]

    def _all(self) -> list[Rule]:
        """Everything that counts, in slowapi's order."""
        limiter = self.limiter
        defaults = [] if any(rule.override_defaults for rule in self.rules) else limiter.default_rules
        return [*limiter.application_rules, *self.rules, *defaults]

    async def asks(self, call: Call, arguments: Mapping[str, Any], now: float) -> list[LimitAsk]:
        """What *call* is counted by; nothing where it is exempt, or the limiter is not enabled."""
        asking = self._asking(call, arguments)
        asking.asked = True
        limiter, request = self.limiter, asking.request
        if not (limiter.enabled and limiter._auto_check) or limiter.exempts(self.endpoint):
            return asking.count(call, ())
        try:
            return asking.count(
                call,
                await self._counted(call, self._all(), request),
                await self._counted(call, limiter.fallback_rules, request),
            )
        except Exception:
            if not limiter._swallow_errors:
                raise
            limiter.logger.exception("Failed to rate limit. Swallowing error")
            return asking.count(call, ())

    def locally(self, call: Call) -> Sequence[LimitAsk]:
        """What counts without the store: the limits of ``in_memory_fallback``, or else the same ones."""
        asking = self._asking(call)
        return asking.fall_back(call) if self.limiter.fallback_rules else [each.ask for each in asking.counted]

    def refused(self, call: Call, refusal: Refusal, decision: Decision | None) -> LimitExceeded | None:
        """What slowapi's handlers take, where a limit of its own is spent."""
        if call.opening.is_session:
            # No handler of an HTTP answer closes a WebSocket.
            return None
        limit = None if decision is None else self._asking(call).refused(call, refusal, decision)
        if limit is None:
            return None
        call.told_by_app = True
        self.limiter.logger.warning("ratelimit %s exceeded at endpoint: %s", limit.limit, self.place)
        return LimitExceeded(limit, call, refusal, decision)

    def _asking(self, call: Call, arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Asking:
        current = ASKING.get()
        asking = None if current is None else current.of(self, call)
        if asking is None:
            # Asked for by a gate of ours that no wrapper of slowapi's decorators stands around.
            request = next((value for value in arguments.values() if isinstance(value, Request)), None)
            asking = Asking(self, request or _connection_of(call.opening), current, call.opening)
            ASKING.set(asking)
        return asking

    async def _counted(self, call: Call, rules: Sequence[Rule], request: HTTPConnection) -> list[Counted]:
        """
        What of *rules* counts.

        An application's own functions run where slowapi runs them: on the event loop for an async endpoint, and in a
        thread for a sync one. Where one is async, which slowapi has not, all of them run on the loop.
        """
        limiter = self.limiter
        endpoint = request["path"] if limiter._key_style == "url" else self.place
        reading = counted(rules, request, endpoint, limiter.reading)
        calls, waits = any(rule.calls for rule in rules), any(rule.waits for rule in rules)
        if self._is_sync and calls and not waits:
            found: list[Counted] = await call.metering.run_sync(functools.partial(driven, reading))
            return found
        return await reading

    async def enforce(self, asking: Asking) -> None:
        """
        Count its request apart from whatever call it may be.

        Raises:
            RateLimitExceeded: A limit is spent.
            HTTPException: 503, where the store gives no answer and its limits may not be left out.
        """
        scope = asking.request.scope
        around = opening_of(scope)
        if _is_free(around, scope) and method_of(asking.request) not in COUNTED_THOUGH_FREE:
            # A test that has opted out.
            return
        opening = asking.opening = Alone(self.limiter.metering_of(scope), scope)
        token = ASKING.set(asking)
        try:
            await opening.open_call().gate(self.policy, {})
        except CallRefused as refused:
            raise _unanswered(refused) from refused
        finally:
            ASKING.reset(token)
            opening.over()


def _connection_of(opening: Opening) -> HTTPConnection:
    """What key functions are handed: the request, or the connection of a WebSocket."""
    scope = getattr(opening, "scope", None)
    if scope is None:
        raise NoCallError(
            "A limit of slowapi's was asked for outside of any request. Its endpoints are for requests alone."
        )
    return Request(scope) if scope["type"] == "http" else HTTPConnection(scope)


def _unanswered(refused: CallRefused) -> Exception:
    """What rises instead of *refused* where no middleware of ours answers it."""
    if refused.refusal.reason is Reason.STORE_DOWN:
        return HTTPException(503, "The rate limits cannot be asked for.", headers={"Retry-After": OUTAGE_WAIT_S})
    return refused


# -- what runs instead of an endpoint ------------------------------------------------------------------------


def wrapped(limited: Limited, endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """
    Guard *endpoint*, whose limits are *limited*, and answer what runs instead of it.

    One guard for both kinds of decorators: whatever else is written on the endpoint is asked for in one admission.
    """
    guarded = Part(rates=limited.rate)(endpoint)
    guard = guard_of(guarded)
    if guard is None:
        raise AssertionError(f"{endpoint!r} was not guarded")
    if inspect.isgeneratorfunction(limited.endpoint) or inspect.isasyncgenfunction(limited.endpoint):
        asked = asked_first(guarded, endpoint, functools.partial(_asked_alone, limited, guard))
        write_on(asked, limited)
        return asked
    run: Callable[..., Any] = guarded
    signature = inspect.signature(guarded)
    added = _missing(signature, limited.limiter)

    @functools.wraps(guarded)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        limiter = limited.limiter
        given = {name: kwargs.pop(name, None) for name in added}
        request = given.get(REQUEST) or _request_in(args, kwargs)
        if request is None:
            # A WebSocket, or nothing at all: the guard says what is wrong with it.
            return await run(*args, **kwargs)
        around = ASKING.get()
        if around is not None and around.covers(limited, request) and _limits_alone(guard, limited):
            # Called by an endpoint that was counted: once per request, as slowapi does.
            return await _as_it_is(endpoint, args, kwargs)
        asking = Asking(limited, request, around)
        token = ASKING.set(asking)
        try:
            result = await _run(asking, run, args, kwargs)
        finally:
            ASKING.reset(token)
        response = result if isinstance(result, Response) else given.get(RESPONSE) or _response_in(kwargs)
        limiter.show(response, asking.shown)
        return result

    wrapper.__signature__ = _with(signature, added)  # type: ignore[attr-defined]
    write_on(wrapper, limited)
    return wrapper


async def _asked_alone(limited: Limited, guard: Guard, request: Request, response: Response) -> bool:
    """
    Count *request*, which a generator will answer; False where the call of a middleware of ours does so.

    What is written beside limits of slowapi's has to be asked for in one admission, which is that call's.
    """
    opening, policy = opening_of(request.scope), guard.policy
    if opening is None:
        counts = policy.charge is None and not policy.upstreams and all(each.asker for each in policy.rates)
    else:
        # Nothing is charged for a HEAD, but it runs the endpoint: slowapi counts it.
        counts = request.method in COUNTED_THOUGH_FREE and _is_free(opening, request.scope)
    if counts:
        asking = Asking(limited, request, ASKING.get())
        await limited.enforce(asking)
        limited.limiter.show(response, asking.shown)
    return counts and opening is None


def _limits_alone(guard: Guard, limited: Limited) -> bool:
    """Whether nothing but *limited* is written on the endpoint of *guard*: prices and other limits are asked for."""
    policy = guard.policy
    asked_for = policy.charge is not None or policy.upstreams
    return not asked_for and all(rate.asker is limited for rate in policy.rates)


async def _as_it_is(endpoint: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if inspect.iscoroutinefunction(endpoint):
        return await endpoint(*args, **kwargs)
    return await run_in_threadpool(endpoint, *args, **kwargs)


async def _run(asking: Asking, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the guarded endpoint in the call of its request, or alone where no middleware of ours stands in front."""
    request, limiter = asking.request, asking.limited.limiter
    opening = opening_of(request.scope)
    alone: Alone | None = None
    if opening is None:
        opening = alone = Alone(limiter.metering, request.scope)
    elif not _is_free(opening, request.scope):
        limiter.check_shared(opening.metering)
    else:
        if method_of(request) in COUNTED_THOUGH_FREE:
            # Nothing is charged for a HEAD, but it runs the endpoint: slowapi counts it.
            await asking.limited.enforce(asking)
        return await run(*args, **kwargs)
    asking.opening = opening
    token = CURRENT.set(opening)
    try:
        return await run(*args, **kwargs)
    except CallRefused as refused:
        failure = _unanswered(refused) if isinstance(opening, Alone) else refused
        if failure is refused:
            raise
        raise failure from refused
    finally:
        CURRENT.reset(token)
        if alone is not None:
            alone.over()


COUNTED_THOUGH_FREE = frozenset({"HEAD", "OPTIONS"})
"""Methods that are never charged (X.4)."""


def _is_free(opening: Opening | None, scope: Any) -> bool:
    """Whether nothing is charged at the endpoint whose request has *scope*: it may be free no more by then."""
    return opening is not None and opening.free and opening.stays_free(scope)


def opening_of(scope: Any) -> Opening | None:
    """
    What is open for the request of *scope*, by a middleware of ours or alone; None where nothing is.

    What the context shows is another request's where the scope has none: one that asks an application in its own
    process. Unless it is free: then a test has opted out.
    """
    told, current = scope.get(SCOPE_KEY), CURRENT.get()
    if isinstance(told, Opening):
        return told
    own = getattr(current, "scope", None)
    is_ours = isinstance(current, Alone) and own is scope
    opted_out = current is not None and current.free and own is None
    return current if opted_out or is_ours else None


def request_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request:
    """The request that an endpoint was handed; raises `NoCallError` where it was handed none."""
    request = _request_in(args, kwargs)
    if request is None:
        raise NoCallError("An endpoint that slowapi limits was called without a request. Hand it one.")
    return request


def _request_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Request | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Request):
            return value
    for value in (*args, *kwargs.values()):
        if isinstance(value, HTTPConnection) and value.scope["type"] == "http":
            return Request(value.scope)
    opening = CURRENT.get()
    scope = None if opening is None else getattr(opening, "scope", None)
    return Request(scope) if scope is not None and scope.get("type") == "http" else None


def _response_in(kwargs: dict[str, Any]) -> Response | None:
    return next((value for value in kwargs.values() if isinstance(value, Response)), None)


def _missing(signature: inspect.Signature, limiter: AdoptedLimiter) -> dict[str, type]:
    """What the wrapper needs of its framework, by name, and the endpoint does not ask for itself."""
    needed: dict[str, type] = {REQUEST: Request}
    if limiter._headers_enabled:
        needed[RESPONSE] = Response
    annotations = [parameter.annotation for parameter in signature.parameters.values()]
    return {name: kind for name, kind in needed.items() if not any(_is_a(each, kind) for each in annotations)}


def _with(signature: inspect.Signature, added: Mapping[str, type]) -> inspect.Signature:
    """*signature* with these parameters, by name alone."""
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=kind) for name, kind in added.items()]
    return with_parameters(signature, *more)


def _is_a(annotation: Any, kind: type) -> bool:
    if isinstance(annotation, str):
        # One that cannot be resolved here: the framework may.
        return annotation.rpartition(".")[2] == kind.__name__
    told = [annotation, *get_args(annotation)]
    return any(isinstance(each, type) and issubclass(each, kind) for each in told)
