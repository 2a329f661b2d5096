"""
Rules: what an application told slowapi of its limits, and which of them count for one request.

Knows slowapi's words and the order in which it reads them. Counts nothing, and asks nobody but the application's own
functions.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any, NamedTuple

from limits import RateLimitItem, parse_many
from slowapi.util import get_ipaddr, get_remote_address
from slowapi.wrappers import Limit, LimitGroup
from starlette.requests import HTTPConnection

from asgi_metering.asking import hashed, limit_ask
from asgi_metering.computed import is_async
from asgi_metering.errors import ConfigurationError
from asgi_metering.policies import RatePolicy
from asgi_metering.rates import Strategy, parse_limit
from asgi_metering.rules.operations import LimitAsk

__all__ = [
    "SCOPE",
    "STRATEGIES",
    "Counted",
    "Reading",
    "Rule",
    "counted",
    "driven",
    "method_of",
    "read_group",
    "read_limit",
]

SCOPE = "slowapi"
"""Where all of its limits are counted: what shares a count is said by their keys."""

STRATEGIES: dict[str, Any] = {
    "fixed-window": "fixed",
    "sliding-window-counter": "sliding",
    "moving-window": "moving",
}
"""slowapi's strategies, which are those of `limits`, by our names."""

AT_ONCE = (get_ipaddr, get_remote_address)
"""Functions of slowapi's own: they only look at the request."""

log = logging.getLogger("slowapi")


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """
    What one decorator, or one entry of a setting, says.

    Attributes:
        provider: The limits: a text, `RateLimitItem` objects, or a function that answers either, of nothing or of the
            ``key`` that is counted.
        key_func: Whom to count: a function of nothing or of the ``request``.
        scope: What shares the counts, or a function that answers it; None for the endpoint itself.
        per_method, methods, error_message, exempt_when, cost, override_defaults: As slowapi's decorators take them.
        waits: Whether one of its functions is async, which slowapi cannot have.
        calls: Whether it has functions of the application's own.
    """

    provider: Any
    key_func: Callable[..., Any]
    scope: str | Callable[..., Any] | None = None
    per_method: bool = False
    methods: tuple[str, ...] | None = None
    error_message: str | Callable[..., str] | None = None
    exempt_when: Callable[..., Any] | None = None
    cost: Any = 1
    override_defaults: bool = True
    waits: bool = field(init=False)
    calls: bool = field(init=False)
    _of_request: frozenset[str] = field(init=False)
    _limits: dict[RateLimitItem, Limit] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.key_func):
            raise ConfigurationError(f"key_func={self.key_func!r} cannot be called. Pass a function of the request.")
        if not callable(self.provider):
            read_items(self.provider)
        if not callable(self.cost):
            read_cost(self.cost)
        if self.methods is not None:
            object.__setattr__(self, "methods", tuple(method.lower() for method in self.methods))
        functions = {
            name: function
            for name in ("provider", "key_func", "scope", "exempt_when", "cost")
            if callable(function := getattr(self, name))
        }
        asked = {name for name, function in functions.items() if _asks_for(name, function)}
        object.__setattr__(self, "_of_request", frozenset(asked))
        object.__setattr__(self, "waits", any(is_async(function) for function in functions.values()))
        object.__setattr__(self, "calls", any(function not in AT_ONCE for function in functions.values()))

    async def is_exempt(self, request: HTTPConnection) -> bool:
        """Whether it does not count *request* at all."""
        if self.methods is not None and method_of(request).lower() not in self.methods:
            return True
        if self.exempt_when is None:
            return False
        return bool(await _answer(self.exempt_when(*self._given("exempt_when", request))))

    async def key(self, request: HTTPConnection) -> Any:
        """Whom it counts; empty for nobody."""
        return await _answer(self.key_func(*self._given("key_func", request)))

    async def items(self, request: HTTPConnection) -> tuple[RateLimitItem, ...]:
        """The limits that it has for *request*; raises `ConfigurationError` for what is none."""
        provided = self.provider
        if callable(provided):
            key = (await self.key(request),) if "provider" in self._of_request else ()
            provided = await _answer(provided(*key))
        return read_items(provided)

    async def place(self, request: HTTPConnection, endpoint: str) -> str:
        """What shares its counts."""
        scope = self.scope
        if callable(scope):
            scope = await _answer(scope(*((endpoint,) if "scope" in self._of_request else ())))
        place = scope or endpoint
        return f"{place}:{method_of(request)}" if self.per_method else str(place)

    async def taken(self, request: HTTPConnection) -> int:
        """What *request* takes of its limits."""
        return read_cost(await _answer(self.cost(request)) if callable(self.cost) else self.cost)

    def limit(self, item: RateLimitItem) -> Limit:
        """*item* as slowapi hands it to handlers of its exception."""
        found = self._limits.get(item)
        if found is None:
            if len(self._limits) >= MAX_LIMITS:
                self._limits.clear()
            methods = None if self.methods is None else list(self.methods)
            scope, message = self.scope, self.error_message
            found = self._limits[item] = Limit(
                item, self.key_func, scope, self.per_method, methods, message, self.exempt_when, self.cost,
                self.override_defaults,
            )  # fmt: skip
        return found

    def _given(self, function: str, request: HTTPConnection) -> tuple[HTTPConnection, ...]:
        return (request,) if function in self._of_request else ()


MAX_LIMITS = 256
"""Limits that are kept of one rule: functions that answer others for everybody shall not fill the memory."""


def _asks_for(name: str, function: Any) -> bool:
    """Whether *function* wants its argument, by slowapi's rules: a limit's key and the request by their names."""
    if name == "cost":
        return True
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return name != "provider"
    if name == "key_func":
        return "request" in parameters
    return "key" in parameters if name == "provider" else len(parameters) == 1


def method_of(request: HTTPConnection) -> str:
    """The method of a request; WebSockets have one of their own."""
    return str(request.scope.get("method", "WEBSOCKET"))


def check_rule(rule: Rule, strategy: Strategy) -> Rule:
    """
    Return *rule* if its windows can move by *strategy*, as far as it is written and not computed.

    Raises:
        ConfigurationError: With the mend.
    """
    if not callable(rule.provider):
        for item in read_items(rule.provider):
            rate_of(item, strategy)
    return rule


async def _answer(given: Any) -> Any:
    return await given if isinstance(given, Awaitable) else given


def read_group(group: LimitGroup) -> Rule:
    """What slowapi keeps of a setting, or of a decorator whose limits a function answers."""
    # It has no other way to them; that these names are there is what the lower bound of the extra is tested for.
    told: Any = group
    return _rule(told._LimitGroup__limit_provider, told.key_function, told._LimitGroup__scope, told)


def read_limit(limit: Limit) -> Rule:
    """What slowapi keeps of a decorator whose limits are written in it."""
    told: Any = limit
    return _rule(limit.limit, limit.key_func, told._Limit__scope, told)


def _rule(provider: Any, key_func: Any, scope: Any, told: Any) -> Rule:
    methods = None if told.methods is None else tuple(told.methods)
    return Rule(
        provider, key_func, scope, told.per_method, methods, told.error_message, told.exempt_when, told.cost,
        getattr(told, "override_defaults", True),
    )  # fmt: skip


def read_items(value: Any) -> tuple[RateLimitItem, ...]:
    """
    The limits that *value* names: a text in slowapi's grammar, a `RateLimitItem`, or several of them.

    Raises:
        ConfigurationError: It names none.
    """
    if isinstance(value, str):
        return _parsed(value)
    if isinstance(value, RateLimitItem):
        return (value,)
    if isinstance(value, list | tuple) and value:
        return tuple(item for each in value for item in read_items(each))
    raise ConfigurationError(f"The limit {value!r} is none. Write '5/minute', or '2/second; 100/hour' for several.")


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> tuple[RateLimitItem, ...]:
    try:
        items = tuple(parse_many(text))
    except ValueError:
        raise ConfigurationError(
            f"The limit {text!r} is not in slowapi's grammar. Write '5/minute', or '2/second; 100/hour' for several; "
            f"default_limits and application_limits are lists of such texts."
        ) from None
    for item in items:
        rate_of(item, "fixed")
    return items


@functools.lru_cache(maxsize=1024)
def rate_of(item: RateLimitItem, strategy: Strategy) -> RatePolicy:
    """*item* as we count it; raises `ConfigurationError`."""
    return RatePolicy((parse_limit(item, strategy),), SCOPE)


def read_cost(cost: Any) -> int:
    """
    A cost in whole hits, rounded up: what slowapi counts in fractions must not fit where it does not there.

    Raises:
        ConfigurationError: It is no number from 0 up.
    """
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not isfinite(cost) or cost < 0:
        raise ConfigurationError(f"The cost {cost!r} is no number from 0 up. Answer how many hits a request counts as.")
    return ceil(cost)


class Reading(NamedTuple):
    """
    How the rules of one limiter are read.

    Attributes:
        strategy: How windows move.
        prefix: What stands before all keys.
        epoch: How often the counts were set back.
    """

    strategy: Strategy
    prefix: str
    epoch: int


class Counted(NamedTuple):
    """
    One limit that counts for one request.

    Attributes:
        limit: As slowapi hands it out.
        identifiers: By what slowapi would count it.
        ask: What the store is asked.
    """

    limit: Limit
    identifiers: tuple[str, ...]
    ask: LimitAsk


async def counted(rules: Iterable[Rule], request: HTTPConnection, endpoint: str, reading: Reading) -> list[Counted]:
    """
    The limits that count for *request*, in slowapi's order; each count once, however often it was written.

    Raises:
        ConfigurationError: A function of the application answered what is no limit, or no cost.

    What the functions raise rises as it is.
    """
    found: dict[str, Counted] = {}
    for rule in rules:
        if await rule.is_exempt(request):
            continue
        place = await rule.place(request, endpoint)
        key = await rule.key(request)
        items = await rule.items(request)
        if not key or not place:
            log.error("Skipping limits %s: nobody to count, or nowhere.", items)
            continue
        cost = await rule.taken(request)
        for item in items:
            identifiers = (*((reading.prefix,) if reading.prefix else ()), str(key), place)
            ask = _ask(item, identifiers, cost, reading, len(found))
            found.setdefault(ask.key, Counted(rule.limit(item), identifiers, ask))
    return list(found.values())


def _ask(item: RateLimitItem, identifiers: tuple[str, ...], cost: int, reading: Reading, number: int) -> LimitAsk:
    # As a tuple and not joined: a key with a slash in it is nobody else's.
    key = hashed((reading.epoch, item.namespace, *identifiers))
    rate = rate_of(item, reading.strategy)
    ask = limit_ask(rate, rate.limits[0], key, cost, 0.0)
    return ask._replace(name=f"{ask.name}#{number + 1}") if number else ask


def driven(coroutine: Any) -> Any:
    """
    What *coroutine* returns, run to its end at once, in a thread without an event loop.

    Raises:
        ConfigurationError: It would have to wait.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise ConfigurationError(
        "A plain function of a sync endpoint's limits answered something to be awaited. Make it an async function."
    )


def static_texts(rules: Iterable[Rule]) -> Iterator[str]:
    """The limits that are written in *rules*, for lists of what an endpoint is limited by."""
    for rule in rules:
        if callable(rule.provider):
            yield "computed"
        else:
            yield from (str(item) for item in read_items(rule.provider))
