"""
The decorators: what an endpoint charges and how often it may be called, written on the endpoint.

They write one policy and one wrapper per endpoint, in any order. The wrapper is the gate: when the framework calls
it, it asks the request's call for admission with the endpoint's own arguments, and no line of the endpoint runs on
refusal. Mistakes fail at import, with the mend. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import re
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, TypeVar

from asgi_metering.admission import check_amounts
from asgi_metering.amounts import Unit
from asgi_metering.call import CURRENT, SCOPE_KEY, Call, Opening
from asgi_metering.errors import ConfigurationError, NoCallError
from asgi_metering.policies import (
    ERROR_SHAPES,
    ChargePolicy,
    ConcurrencyLimit,
    EndpointPolicy,
    ErrorShape,
    From,
    RatePolicy,
    check_line,
    read_hold,
    read_price,
)
from asgi_metering.prices import MeasuredPrice
from asgi_metering.rates import parse_limit
from asgi_metering.receipts import Basis
from asgi_metering.rules.calendars import zone as find_zone
from asgi_metering.rules.ending import END_OF_CALL, EndPolicy, Situation
from asgi_metering.sources import Allowance, PaymentSource, Wallet
from asgi_metering.usage.dialects import named

__all__ = ["Guard", "billable", "decorated", "gather", "guard_of", "rate_limited"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

GUARD = "__asgi_metering__"
KEPT = "__asgi_metering_guards__"

KEYS = ("caller", "payer", "address")

_DECORATED: weakref.WeakValueDictionary[str, Guard] = weakref.WeakValueDictionary()
"""Live guards by endpoint name: for the startup audit, and so that no two endpoints share a name by accident."""


# -- what users write --------------------------------------------------------------------------------------


def billable(
    price: Any,
    *,
    hold: Any = None,
    line: str | None = None,
    unit: Unit | None = None,
    sources: Sequence[PaymentSource] | None = None,
    payer: Callable[..., Any] | None = None,
    on_missing_usage: str | None = None,
    on_error: str | None = None,
    on_late_error: str | None = None,
    on_disconnect: str | None = None,
    on_early_disconnect: str | None = None,
    on_cut: str | None = None,
    on_abort: str | None = None,
    errors: ErrorShape = "problem",
    customise: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]] | None = None,
    usage: str | None = None,
    forward_quota_headers: bool = False,
    ttl_s: float = 60.0,
    grace_s: float = 30.0,
) -> Part:
    """
    Charge for an endpoint; without the money it answers 402 before its first line runs.

    Args:
        price: Whole units (int, Decimal or str), a measured price such as `per_million_tokens`, or a callable of the
            endpoint's arguments that answers an amount.
        hold: For measured prices: whole units, a `TokenUsage`, a callable of the endpoint's arguments, or `up_to`;
            estimated from the request's own body by default.
        line: The billing line; the endpoint's name by default.
        unit: The metering's by default.
        sources: Where the units come from, in order; the payer's wallet by default.
        payer: Computes who pays from the endpoint's arguments.
        on_missing_usage: Completed, but no usage was reported: ``estimate``, ``observed``, ``hold`` or ``none``.
        on_error: Answered with 400 or above, or failed before the first byte: ``none``, or any basis.
        on_late_error: Failed after the first byte, or ``call.fail()``: ``none``, ``observed`` or ``hold``.
        on_disconnect: The client left: ``observed``, ``none``, ``usage``, ``estimate`` or ``hold``.
        on_early_disconnect: The same before the first byte; as *on_disconnect* where that is a choice there.
        on_cut: We cut the stream: ``observed`` or ``hold``.
        on_abort: The process stopped or died: ``observed``, ``none`` or ``hold``.
        errors: Shape of refusals: ``problem``, ``openai`` or ``anthropic``.
        customise: Rewrites a refusal's body and adds header fields, for clients that expect others (S4.4).
        usage: Names the dialect of the response body, where its shape alone would mislead.
        forward_quota_headers: Let a provider's own quota fields pass to the client.
        ttl_s: Seconds that a hold lives without a heartbeat.
        grace_s: Seconds in doubt before the policy ends a hold.

    Raises:
        AmountError: A price or hold that is a float, negative, NaN or too large, or too fine for *unit*. Without a
            *unit* the metering's own is asked when the application starts.
        ConfigurationError: Anything else that cannot work, at import.
    """
    chosen = {
        Situation.UNREPORTED: on_missing_usage,
        Situation.FAILED_EARLY: on_error,
        Situation.FAILED_LATE: on_late_error,
        Situation.GONE_EARLY: _early(on_disconnect) if on_early_disconnect is None else on_early_disconnect,
        Situation.GONE_LATE: on_disconnect,
        Situation.CUT: on_cut,
        Situation.ABORTED: on_abort,
    }
    read = read_price(price)
    if hold is not None and not isinstance(read, MeasuredPrice):
        raise ConfigurationError("A fixed price holds itself. Leave out hold=, or use a measured price.")
    _check_errors(errors)
    _check_seconds(ttl_s=ttl_s, grace_s=grace_s)
    for name, function in {"payer": payer, "customise": customise}.items():
        if function is not None and not callable(function):
            raise ConfigurationError(f"{name}={function!r} cannot be called. Pass a function.")
    if unit is not None and not isinstance(unit, Unit):
        raise ConfigurationError(f"unit={unit!r} is no Unit. Declare one: Unit('credits', scale=6).")
    charge = ChargePolicy(
        price=read,
        line="" if line is None else check_line(line),
        end=EndPolicy({row: _basis(row, basis) for row, basis in chosen.items() if basis is not None}),
        unit=unit,
        hold=read_hold(hold),
        sources=_sources(sources),
        payer=None if payer is None else From(payer, "payer"),
        errors=errors,
        customise=customise,
        dialect=None if usage is None else named(usage).name,
        forward_quota_headers=forward_quota_headers,
        ttl_s=float(ttl_s),
        grace_s=float(grace_s),
    )
    if unit is not None:
        check_amounts(charge, unit)
    return Part(charge=charge)


MAX_TTL_S = 86_400
"""A day: a hold that lives longer without a sign of life is not a hold."""


def _check_errors(errors: str) -> None:
    if errors not in ERROR_SHAPES:
        raise ConfigurationError(f"errors={errors!r} is not a shape. Use one of {', '.join(ERROR_SHAPES)}.")


def _check_seconds(**spans: float) -> None:
    for name, seconds in spans.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_TTL_S:
            raise ConfigurationError(f"{name}={seconds!r} is not a number of seconds above 0, up to {MAX_TTL_S}.")


def rate_limited(
    *limits: str,
    concurrency: int | None = None,
    global_concurrency: int | None = None,
    key: str | Callable[..., Any] = "caller",
    cost: int | Callable[..., Any] = 1,
    strategy: str = "fixed",
    zone: str = "UTC",
    scope: str | None = None,
    errors: ErrorShape = "problem",
) -> Part:
    """
    Limit how often and how many at once.

    Args:
        limits: ``"60/minute"``, ``"5000/day"``, ``"200000/minute of tokens"``.
        concurrency: Calls at once, per key.
        global_concurrency: Calls at once, of everybody together.
        key: ``"caller"`` (the address where nobody is known), ``"payer"``, ``"address"``, or a callable of the
            endpoint's arguments.
        cost: What a call takes of each request limit; an int or a callable.
        strategy: ``"fixed"``, ``"calendar"`` or ``"sliding"``.
        zone: Where calendar days begin.
        scope: Endpoints with the same scope share their counts; the endpoint's own by default.
        errors: Shape of refusals where no `billable` says.

    Raises:
        ConfigurationError: No limit at all, a text that is not in the grammar, or another argument that cannot work.
    """
    if not limits and concurrency is None and global_concurrency is None:
        raise ConfigurationError("rate_limited() limits nothing. Give it '60/minute', say, or concurrency=4.")
    _check_errors(errors)
    # Unknown zones are refused here; windows are made when a call comes.
    find_zone(zone)
    if not callable(key) and key not in KEYS:
        raise ConfigurationError(f"key={key!r} is not known. Use one of {', '.join(KEYS)}, or a function.")
    if not callable(cost) and (type(cost) is not int or cost < 0):
        raise ConfigurationError(f"cost={cost!r} is not an int from 0 up.")
    slots = []
    if concurrency is not None:
        slots.append(ConcurrencyLimit(concurrency))
    if global_concurrency is not None:
        slots.append(ConcurrencyLimit(global_concurrency, "global"))
    return Part(
        rates=RatePolicy(
            limits=tuple(parse_limit(limit, strategy, zone) for limit in limits),
            scope=scope or "",
            concurrency=tuple(slots),
            key=From(key, "key") if callable(key) else key,
            cost=From(cost, "cost") if callable(cost) else cost,
            errors=errors,
        )
    )


def _early(on_disconnect: str | None) -> str | None:
    """*on_disconnect* for a client that left before the first byte, where it is a choice there."""
    offered = {basis.value for basis in END_OF_CALL[Situation.GONE_EARLY]}
    return on_disconnect if on_disconnect in offered else None


def _basis(row: Situation, basis: str) -> Basis:
    try:
        return Basis(basis)
    except ValueError:
        offered = ", ".join(repr(choice.value) for choice in END_OF_CALL[row])
        raise ConfigurationError(
            f"{basis!r} is no policy for a call that ends as {row.value!r}. Choose one of {offered}."
        ) from None


def _sources(sources: Sequence[PaymentSource] | None) -> tuple[PaymentSource, ...]:
    if sources is None:
        return (Wallet(),)
    if not sources:
        raise ConfigurationError("sources=[] leaves nothing to pay with. Leave it out, or name a source.")
    for source in sources:
        if not isinstance(source, PaymentSource):
            raise ConfigurationError(f"{source!r} is no source. Use Wallet() or Allowance(...).")
        if isinstance(source, Allowance):
            find_zone(source.zone)
    return tuple(sources)


# -- how an endpoint is guarded ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """What one decorator says. Used as a decorator, or handed to `metered_app` and `Call.admit`."""

    charge: ChargePolicy | None = None
    rates: RatePolicy | None = None

    def __call__(self, endpoint: Endpoint) -> Endpoint:
        """Guard *endpoint*: a function, async function, generator function or async generator function."""
        guard = guard_of(endpoint)
        if guard is not None:
            guard.add(self)
            return endpoint
        guard = Guard(endpoint)
        guard.add(self)
        _keep(guard, endpoint)
        wrapper = _wrap(endpoint, guard)
        setattr(wrapper, GUARD, guard)
        return wrapper  # type: ignore[return-value]


class Guard:
    """
    The policy of one endpoint while its decorators write it, and what its wrapper asks.

    Attributes:
        endpoint: The function that was decorated first.
        policy: What has been written so far.
    """

    def __init__(self, endpoint: Callable[..., Any]) -> None:
        _check_endpoint(endpoint)
        self.endpoint = endpoint
        self.signature = _signature(endpoint)
        self.policy = EndpointPolicy(_free_name(endpoint))
        self._needs_arguments = False
        rest = (each.name for each in self.signature.parameters.values() if each.kind is each.VAR_KEYWORD)
        self._rest = next(rest, None)
        _DECORATED[self.policy.name] = self

    def add(self, part: Part) -> None:
        """Write one more decorator down; raises `ConfigurationError` for the same line twice."""
        self.policy = _merged(self.policy, part, self.signature.parameters, _plain(self.endpoint).__name__)
        charge = self.policy.charge
        estimated = charge is not None and charge.measured and charge.hold.estimate is None
        weighted = any(limit.meter != "requests" for rates in self.policy.rates for limit in rates.limits)
        self._needs_arguments = bool(self.policy.callables()) or estimated or weighted

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
        """
        opening = _opening_in(args) or _opening_in(kwargs.values()) or CURRENT.get()
        if opening is None:
            raise NoCallError(
                f"{self.policy.name} is metered, but no middleware opened a call. Add MeteringMiddleware to the "
                f"application; in a unit test of the endpoint alone use asgi_metering.testing.unmetered()."
            )
        opening.check()
        return opening


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


def gather(parts: Sequence[Any], name: str, offered: Iterable[str]) -> EndpointPolicy:
    """
    One policy from parts, for what is no function: an app, an explicit gate. A bare amount is a fixed price.

    Args:
        parts: What the decorators take.
        name: Names it in answers and audits.
        offered: Names that callables of the parts may ask for, besides ``call``.

    Raises:
        ConfigurationError: No part at all, or parts that contradict each other.
    """
    if not parts:
        raise ConfigurationError(f"{name} got no policy. Give it billable(...) or rate_limited(...).")
    policy = EndpointPolicy(name)
    parameters = {each: inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in offered}
    for part in parts:
        policy = _merged(policy, part if isinstance(part, Part) else billable(part), parameters, name)
    return policy


def _merged(
    policy: EndpointPolicy, part: Part, parameters: Mapping[str, inspect.Parameter], short_name: str
) -> EndpointPolicy:
    if part.charge is not None:
        charge = part.charge if part.charge.line else replace(part.charge, line=_line_of(short_name))
        if policy.charge is not None:
            raise ConfigurationError(
                f"{policy.name} is billable twice, as {charge.line!r} and as {policy.charge.line!r}. A call is charged "
                f"once: put the price into one billable()."
            )
        policy = replace(policy, charge=charge)
    if part.rates is not None:
        rates = part.rates if part.rates.scope else replace(part.rates, scope=policy.name)
        _check_twice(policy, rates)
        policy = replace(policy, rates=(rates, *policy.rates))
    for function in policy.callables():
        function.check(policy.name, parameters)
    return policy


def _check_twice(policy: EndpointPolicy, rates: RatePolicy) -> None:
    known = {(other.scope, str(other.key), limit.name) for other in policy.rates for limit in other.limits}
    names = [(rates.scope, str(rates.key), limit.name) for limit in rates.limits]
    for at, (scope, key, name) in enumerate(names):
        if (scope, key, name) in known or names.index((scope, key, name)) != at:
            raise ConfigurationError(f"{policy.name} has the limit {name!r} twice. Remove one.")


def _line_of(name: str) -> str:
    return check_line(re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).strip("-.")[:64] or "call")


def _check_endpoint(endpoint: Any) -> None:
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


def _opening_in(values: Any) -> Opening | None:
    for value in values:
        scope = _scope_of(value)
        if isinstance(scope, dict):
            opening = scope.get(SCOPE_KEY)
            if isinstance(opening, Opening):
                return opening
    return None


def _scope_of(value: Any) -> Any:
    """The scope of a request or WebSocket, or of the request behind the context that MCP hands to its tools."""
    if not hasattr(type(value), "request_context"):
        return getattr(value, "scope", None)
    try:
        return value.request_context.request.scope
    except (AttributeError, LookupError, ValueError):
        # Tools run without a request too, over stdio.
        return None


# -- the wrappers ------------------------------------------------------------------------------------------


def _wrap(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """One wrapper per kind of function (pitfall 5); generators are asked for at their first byte (pitfall 7)."""
    if inspect.isasyncgenfunction(endpoint):
        wrapper = _async_generator(endpoint, guard)
    elif inspect.isgeneratorfunction(endpoint):
        wrapper = _sync_generator(endpoint, guard)
    elif inspect.iscoroutinefunction(endpoint):
        wrapper = _async_function(endpoint, guard)
    else:
        wrapper = _sync_function(endpoint, guard)
    functools.update_wrapper(wrapper, endpoint)
    wrapper.__signature__ = guard.signature  # type: ignore[attr-defined]
    return wrapper


def _async_function(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        opening = guard.opening(args, kwargs)
        if not opening.free:
            await opening.open_call().gate(guard.policy, guard.arguments(args, kwargs))
        if CURRENT.get() is opening:
            return await endpoint(*args, **kwargs)
        with _inside(opening):
            return await endpoint(*args, **kwargs)

    return wrapper


def _sync_function(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    """Becomes async, and runs the endpoint in the thread that the metering chose (pitfall 9)."""

    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        opening = guard.opening(args, kwargs)
        if not opening.free:
            await opening.open_call().gate(guard.policy, guard.arguments(args, kwargs))
        with _inside(opening):
            result = await opening.metering.run_sync(functools.partial(endpoint, *args, **kwargs))
            # A plain function may return what its framework awaits.
            return await result if inspect.isawaitable(result) else result

    return wrapper


@contextmanager
def _inside(opening: Opening) -> Iterator[None]:
    """
    Make *opening* the current one, for an endpoint that its framework runs in the context of another request.

    What the endpoint reports, and what its upstream calls use, belongs to the call that was gated (pitfalls 1, 2).
    """
    token = CURRENT.set(opening)
    try:
        yield
    finally:
        CURRENT.reset(token)


def _async_generator(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        opening = guard.opening(args, kwargs)
        if opening.free:
            return endpoint(*args, **kwargs)  # type: ignore[no-any-return]
        call = opening.open_call()
        call.expect(guard.policy, guard.arguments(args, kwargs))
        return _gated(call, endpoint, args, kwargs)

    return wrapper


async def _gated(
    call: Call, endpoint: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    await call.ensure()
    async with aclosing(endpoint(*args, **kwargs)) as items:
        async for item in items:
            yield item


def _sync_generator(endpoint: Callable[..., Any], guard: Guard) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[Any]:
        opening = guard.opening(args, kwargs)
        if opening.free:
            return endpoint(*args, **kwargs)  # type: ignore[no-any-return]
        call = opening.open_call()
        call.expect(guard.policy, guard.arguments(args, kwargs))
        return _gated_in_thread(call, asyncio.get_running_loop(), endpoint, args, kwargs)

    return wrapper


def _runs_here(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _gated_in_thread(
    call: Call,
    loop: asyncio.AbstractEventLoop,
    endpoint: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[Any]:
    if not call.admitted:
        # The framework runs a sync generator in a thread, before or while the response starts.
        if _runs_here(loop):
            raise ConfigurationError(
                "A metered sync generator was iterated on the event loop, which it would block for ever while it waits "
                "for its admission. Iterate it in a thread, or make it an async generator."
            )
        asyncio.run_coroutine_threadsafe(call.ensure(), loop).result()
    yield from endpoint(*args, **kwargs)
