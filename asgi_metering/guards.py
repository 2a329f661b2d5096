"""
Guards: the one policy that the decorators of an endpoint write, and the request that the endpoint runs in.

Knows endpoints as functions, and every one that is guarded in this process, for the startup audit. Never asks for an
admission: the wrappers do. Knows no HTTP.
"""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeVar

from asgi_metering.arguments import From, NamedKey
from asgi_metering.asking import counted_as
from asgi_metering.chosen import LimitByPlan
from asgi_metering.computed import bound_charge, bound_rates, bound_upstream
from asgi_metering.errors import ConfigurationError, NoCallError
from asgi_metering.opening import CURRENT, SCOPE_KEY, Opening
from asgi_metering.policies import (
    ESTIMATE,
    ChargePolicy,
    ConcurrencyLimit,
    EndpointPolicy,
    RatePolicy,
    UpstreamPolicy,
    check_line,
)
from asgi_metering.prices.values import reads_request
from asgi_metering.rates import RateLimit
from asgi_metering.returned import check_count
from asgi_metering.wrappers import wrap

__all__ = ["BARE_MEND", "Guard", "Part", "counters_of", "decorated", "guard_of", "merged"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

GUARD = "__asgi_metering__"
KEPT = "__asgi_metering_guards__"

_DECORATED: weakref.WeakValueDictionary[str, Guard] = weakref.WeakValueDictionary()
"""Live guards by endpoint name: for the startup audit, and so that no two endpoints share a name by accident."""


@dataclass(frozen=True, slots=True, repr=False)
class Part:
    """What one decorator says. Used as a decorator, or handed to `metered_app` and `Call.admit`."""

    charge: ChargePolicy | None = None
    rates: RatePolicy | None = None
    more: tuple[RatePolicy, ...] = ()
    upstream: UpstreamPolicy | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        """
        None: a framework that asks for it has a decorator for an endpoint, by ``@billable`` without parentheses.

        Raises:
            ConfigurationError: Always, and so at import; `inspect.signature` says a ValueError where there is none.
        """
        raise ConfigurationError(f"A metering decorator is no endpoint. {self.mend}")

    @property
    def mend(self) -> str:
        """What to write where this stands for an endpoint, which it took for its price or limit."""
        return BARE_MEND if self.charge is not None else BARE_LIMIT_MEND

    def __repr__(self) -> str:
        # By the names that users know it under: all of its policies would fill a page of every error.
        if self.charge is not None:
            return "billable(...)"
        return "requires_upstream(...)" if self.rates is None else "rate_limited(...)"

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        """Guard *endpoint*: a function, async function, generator function or async generator function."""
        guard = guard_of(endpoint)
        if guard is not None:
            guard.add(self)
            return endpoint
        guard = Guard(endpoint)
        guard.add(self)
        _keep(guard, endpoint)
        wrapper = wrap(endpoint, guard)
        setattr(wrapper, GUARD, guard)
        return wrapper  # type: ignore[return-value]


class Guard:
    """
    The policy of one endpoint while its decorators write it, and what its wrapper asks.

    Attributes:
        endpoint: The function that was decorated first.
        policy: What has been written so far.
        count: Counts what the endpoint returns; None for most.
    """

    def __init__(self, endpoint: Callable[..., Any]) -> None:
        _check_endpoint(endpoint)
        self.endpoint = endpoint
        self.signature = _signature(endpoint)
        self.policy = EndpointPolicy(_free_name(endpoint))
        self.count: From | None = None
        self._needs_arguments = False
        rest = (each.name for each in self.signature.parameters.values() if each.kind is each.VAR_KEYWORD)
        self._rest = next(rest, None)
        _DECORATED[self.policy.name] = self

    def add(self, part: Part) -> None:
        """Write one more decorator down; raises `ConfigurationError` for the same line twice."""
        self.policy = merged(self.policy, part, self.signature.parameters, _plain(self.endpoint).__name__)
        charge = self.policy.charge
        self.count = None if charge is None else charge.count
        if self.count is not None:
            check_count(self.count, self.policy.name, self.endpoint, self.signature.parameters)
        # Also where the hold is an amount: what a hang-up pays for its input is estimated from the request.
        estimated = charge is not None and charge.measured and charge.hold.reads_request
        estimated = estimated or (charge is not None and reads_request(charge.price))
        estimated = estimated or any(each.tokens == ESTIMATE for each in self.policy.upstreams)
        asked = any(rate.asker is not None for rate in self.policy.rates)
        self._needs_arguments = (
            bool(self.policy.callables()) or self.count is not None or estimated or self.policy.weighs or asked
        )

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
        """The endpoint's arguments by name, if the policy asks for any."""
        if not self._needs_arguments:
            return NO_ARGUMENTS
        if not args and len(kwargs) == len(self.signature.parameters):
            return kwargs
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        if self._rest is not None:
            return {**bound.arguments, **bound.arguments[self._rest]}
        return bound.arguments

    def opening(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Opening:
        """
        The request that the endpoint runs in.

        Looked up first in the arguments and then in the context: a framework's session may run an endpoint in the
        context of another request (pitfalls 1, 2).

        Raises:
            NoCallError: There is none; the gate fails closed (pitfall 3).
            CallClosedError: The request is over (pitfall 1).
        """
        opening = self._opening_in((*args, *kwargs.values()) if kwargs else args) or CURRENT.get()
        if opening is None:
            raise NoCallError(self._no_call())
        while opening.around is not None:
            # An endpoint belongs to its request, whatever a dependency charges around it.
            opening = opening.around
        if opening.closed:
            opening.check()
        return opening

    def is_free(self, opening: Opening, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """
        Whether *opening*, which was free when its request came in, is free at this endpoint.

        A middleware for overrides may have made another method of it, perhaps on a copy of the scope that the endpoint
        alone is given.
        """
        scopes = [_scope_of(value) for value in (*args, *kwargs.values())]
        own = [scope for scope in scopes if isinstance(scope, dict) and scope.get(SCOPE_KEY) is opening]
        return opening.stays_free(own[0] if own else None)

    def _opening_in(self, values: tuple[Any, ...]) -> Opening | None:
        for value in values:
            scope = getattr(value, "scope", None)
            if scope is None:
                scope = _scope_behind(value)
            if isinstance(scope, dict):
                opening = scope.get(SCOPE_KEY)
                if isinstance(opening, Opening):
                    return opening
                if scope.get("type") == "websocket" and not _is_free(CURRENT.get()):
                    # Whatever call the context may show, it is another request's.
                    raise NoCallError(self._no_call())
        return None

    def _no_call(self) -> str:
        return (
            f"{self.policy.name} is metered, but no middleware opened a call. Add MeteringMiddleware to the "
            f"application; in a unit test of the endpoint alone use asgi_metering.testing.unmetered()."
        )


BARE_MEND = "Write @billable(2), with its price in parentheses, and not @billable alone."
BARE_LIMIT_MEND = "Write @rate_limited('60/minute'), with its limit in parentheses, and not @rate_limited alone."
"""What to do where a decorator stands for the endpoint that it should have decorated."""

NO_ARGUMENTS: Mapping[str, Any] = {}


def _keep(guard: Guard, endpoint: Callable[..., Any]) -> None:
    """
    Let the guard live as long as the function that it guards.

    Decorators above the route's own make a wrapper that nobody keeps, and the route runs the bare function: without
    this the audit of an application that a function builds would find no trace of the mistake (pitfall 4).
    """
    plain = inspect.unwrap(endpoint)
    # A bound method's function outlives its object, and would keep it; others have no place for a guard.
    if isinstance(plain, FunctionType):
        plain.__dict__.setdefault(KEPT, []).append(guard)


def guard_of(endpoint: Any) -> Guard | None:
    """The guard of a decorated endpoint, also through decorators that keep `functools.wraps`' attributes."""
    guard = getattr(endpoint, GUARD, None)
    return guard if isinstance(guard, Guard) else None


def decorated() -> list[Guard]:
    """Every live guard of this process, by name."""
    return sorted(_DECORATED.values(), key=lambda guard: guard.policy.name)


def merged(
    policy: EndpointPolicy, part: Part, parameters: Mapping[str, inspect.Parameter], short_name: str
) -> EndpointPolicy:
    """
    *policy* with *part* written into it.

    Args:
        policy: What was written so far.
        part: What one more decorator says.
        parameters: What callables of the part may ask for, besides ``call``.
        short_name: Names the billing line where the part does not.

    Raises:
        ConfigurationError: A second price, the same limit twice, or a callable that asks for what is not there or
            answers nothing.
    """
    if part.charge is not None:
        charge = part.charge if part.charge.line else replace(part.charge, line=_line_of(short_name))
        charge = bound_charge(charge, policy.name)
        if policy.charge is not None:
            raise ConfigurationError(
                f"{policy.name} is billable twice, as {charge.line!r} and as {policy.charge.line!r}. A call is charged "
                f"once: put the price into one billable()."
            )
        policy = replace(policy, charge=charge)
    added: tuple[RatePolicy, ...] = ()
    for each in () if part.rates is None else (part.rates, *part.more):
        # Connections and their messages are no counts of one thing, unless somebody says so.
        own = policy.name if each.per == "call" else f"{policy.name}.messages"
        rates = bound_rates(each if each.scope else replace(each, scope=own), policy.name)
        _check_twice(replace(policy, rates=(*added, *policy.rates)), rates)
        added = (*added, rates)
    policy = replace(policy, rates=(*added, *policy.rates)) if added else policy
    if part.upstream is not None:
        upstream = bound_upstream(part.upstream, policy.name)
        if any((each.provider, each.label) == (upstream.provider, upstream.label) for each in policy.upstreams):
            raise ConfigurationError(
                f"{policy.name} requires the upstream {upstream.provider!r} twice. Put both into one "
                f"requires_upstream(), or give them labels."
            )
        policy = replace(policy, upstreams=(upstream, *policy.upstreams))
    for function in policy.callables():
        function.check(policy.name, parameters)
    return policy


def _check_twice(policy: EndpointPolicy, rates: RatePolicy) -> None:
    known = {
        (other.scope, str(other.key), counter): name for other in policy.rates for counter, name in counters_of(other)
    }
    _check_names(policy, rates)
    for counter, name in counters_of(rates):
        place = (rates.scope, str(rates.key), counter)
        first = known.get(place)
        if first == name:
            raise ConfigurationError(f"{policy.name} has the limit {name!r} twice. Remove one.")
        if first is not None:
            raise ConfigurationError(
                f"{policy.name} has the limits {first!r} and {name!r} in the scope {rates.scope!r}, where both would "
                f"be one count. Remove one, or give it another scope."
            )
        known[place] = name
        if _is_confused(policy, rates, counter):
            raise ConfigurationError(
                f"{policy.name} has the limit {name!r} by two functions, and what one of them answers may be what the "
                f"other does. Tell them apart by names: level='team' and level='user'."
            )
    pools = {_pool(other, each): each.limit for other in policy.rates for each in other.concurrency}
    for each in rates.concurrency:
        slots = pools.get(_pool(rates, each))
        if slots is not None:
            raise ConfigurationError(
                f"{policy.name} has two {each.level} concurrency limits, {each.limit} and {slots}, on the same slots. "
                f"Remove one."
            )


def _check_names(policy: EndpointPolicy, rates: RatePolicy) -> None:
    """Of limits of its own no endpoint has two of one name, which answers could not tell apart, however they move."""
    known = {_place_of(other, limit) for other in policy.rates for limit in other.limits}
    for limit in () if rates.shares else rates.limits:
        place = _place_of(rates, limit)
        if place in known:
            raise ConfigurationError(f"{policy.name} has the limit {limit.name!r} twice. Remove one.")
        known.add(place)


def _place_of(rates: RatePolicy, limit: RateLimit) -> tuple[str, str, frozenset[str], str]:
    return rates.scope, str(rates.key), rates.methods, limit.name


def counters_of(rates: RatePolicy) -> Iterator[tuple[str, str]]:
    """What each limit of *rates* is counted as, as far as that is known, and its name."""
    for limit in rates.limits:
        yield counted_as(rates, limit), limit.name
    for each in rates.chosen:
        if isinstance(each, LimitByPlan):
            spans = {counted_as(rates, each.reading.read(text)): text for text in each.texts.values()}
            yield from ((counter, f"{text} by plan") for counter, text in spans.items())


def _is_confused(policy: EndpointPolicy, rates: RatePolicy, counter: str) -> bool:
    """Whether another function computes a key of *policy* for the same count."""
    if not _is_computed(rates):
        return False
    others = [other for other in policy.rates if _is_computed(other) and other.key != rates.key]
    return any(
        counter == each
        for other in others
        if (other.scope, other.level) == (rates.scope, rates.level)
        for each, _ in counters_of(other)
    )


def _is_computed(rates: RatePolicy) -> bool:
    return isinstance(rates.key, From) and not isinstance(rates.key, NamedKey)


def _pool(rates: RatePolicy, limit: ConcurrencyLimit) -> tuple[str, str, str]:
    """What two limits share if it is equal; everybody's slots have no key."""
    return rates.scope, limit.level, str(rates.key) if limit.level == "caller" else ""


def _line_of(name: str) -> str:
    return check_line(re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).strip("-.")[:64] or "call")


def _check_endpoint(endpoint: Any) -> None:
    if isinstance(endpoint, Part):
        raise ConfigurationError(f"A metering decorator is no endpoint. {endpoint.mend}")
    if isinstance(endpoint, staticmethod | classmethod):
        raise ConfigurationError(
            f"{endpoint!r} is no plain function yet. Put the decorator below @{type(endpoint).__name__}."
        )
    plain = _plain(endpoint)
    if inspect.isclass(plain):
        raise ConfigurationError(
            f"{plain!r} is a class. Decorate its methods, or wrap the whole application with metered_app()."
        )
    if not inspect.isroutine(plain):
        raise ConfigurationError(
            f"{plain!r} is no function. Decorate a function or method, or wrap an ASGI app with metered_app()."
        )


def _signature(endpoint: Callable[..., Any]) -> inspect.Signature:
    """With annotations resolved where they can be: frameworks read them in the wrapper's module (pitfall 6)."""
    try:
        return inspect.signature(endpoint, eval_str=True)
    except Exception:  # noqa: BLE001 -- an annotation may be any expression; unresolved ones stay strings
        return inspect.signature(endpoint)


def _free_name(endpoint: Callable[..., Any]) -> str:
    """Module and qualified name; a second live endpoint of the same name gets a number, so that they share nothing."""
    plain = _plain(endpoint)
    base = f"{plain.__module__}.{plain.__qualname__.replace('<locals>.', '')}"
    name, number = base, 1
    while name in _DECORATED:
        number += 1
        name = f"{base}#{number}"
    return name


def _plain(endpoint: Any) -> Any:
    """The function below wrappers and partials, which has a name."""
    plain = inspect.unwrap(endpoint)
    while isinstance(plain, functools.partial):
        plain = inspect.unwrap(plain.func)
    return plain


def _is_free(opening: Opening | None) -> bool:
    return opening is not None and opening.free


def _scope_of(value: Any) -> Any:
    """The scope of a request or WebSocket, or of the request behind the context that MCP hands to its tools."""
    scope = getattr(value, "scope", None)
    return _scope_behind(value) if scope is None else scope


def _scope_behind(value: Any) -> Any:
    if not hasattr(type(value), "request_context"):
        return None
    try:
        return value.request_context.request.scope
    except (AttributeError, LookupError, ValueError):
        # Tools run without a request too, over stdio.
        return None
