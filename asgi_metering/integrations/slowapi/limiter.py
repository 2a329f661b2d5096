"""
The adopted limiter: slowapi's own object, whose decorators write our policies and whose counts are ours.

Knows which endpoint has which rules. Never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from slowapi import Limiter
from starlette.datastructures import MutableHeaders
from starlette.responses import Response

from asgi_metering.errors import ConfigurationError
from asgi_metering.integrations.slowapi.endpoints import Limited, limited_on, named, opening_of, plain, wrapped
from asgi_metering.integrations.slowapi.headers import write_fields
from asgi_metering.integrations.slowapi.rules import Reading, Rule, check_rule, read_group
from asgi_metering.integrations.slowapi.storage import metering_for, storage_of, strategy_of, without_store
from asgi_metering.metering import Metering
from asgi_metering.policies import RatesDown
from asgi_metering.stores.memory import MemoryStore

__all__ = ["GATED", "AdoptedLimiter", "become_adopted"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])

GATED = "__asgi_metering_slowapi__"
"""What a function has that a wrapper of slowapi's own runs in its place, where it asks us before."""


class AdoptedLimiter(Limiter):
    """
    A `slowapi.Limiter` whose limits are enforced by asgi_metering; see `adopt`.

    Attributes:
        metering: That counts, where no middleware of ours stands in front with the same or another one.
        on_store_down: What its limits do while the store is down.
        application_rules, default_rules, fallback_rules: Of its settings.
    """

    metering: Metering
    on_store_down: RatesDown
    application_rules: list[Rule]
    default_rules: list[Rule]
    fallback_rules: list[Rule]
    reading: Reading
    _own_metering: bool
    _known: dict[Any, Limited]
    _exempt: set[Any]
    _numbers: dict[str, int]

    # -- decorators ----------------------------------------------------------------------------------------

    def limit(
        self,
        limit_value: Any,
        key_func: Callable[..., Any] | None = None,
        per_method: bool = False,
        methods: Iterable[str] | None = None,
        error_message: str | Callable[..., str] | None = None,
        exempt_when: Callable[..., Any] | None = None,
        cost: int | Callable[..., Any] = 1,
        override_defaults: bool = True,
    ) -> Callable[[Endpoint], Endpoint]:
        """
        Limit one endpoint; the arguments are slowapi's.

        Beside them *limit_value* may be `RateLimitItem` objects, or a function that answers some; every function may be
        async; the endpoint needs no ``request``.

        Raises:
            ConfigurationError: At import, where slowapi logs that nothing will be limited: no limit at all, or a cost
                that is none.
        """
        rule = Rule(
            limit_value, key_func or self._key_func, None, per_method, None if methods is None else tuple(methods),
            error_message, exempt_when, cost, override_defaults,
        )  # fmt: skip
        return self._writing(rule)

    def shared_limit(
        self,
        limit_value: Any,
        scope: str | Callable[..., Any],
        key_func: Callable[..., Any] | None = None,
        error_message: str | Callable[..., str] | None = None,
        exempt_when: Callable[..., Any] | None = None,
        cost: int | Callable[..., Any] = 1,
        override_defaults: bool = True,
    ) -> Callable[[Endpoint], Endpoint]:
        """Limit several endpoints together; the arguments are slowapi's, as for `limit`."""
        rule = Rule(
            limit_value, key_func or self._key_func, scope, False, None,
            error_message, exempt_when, cost, override_defaults,
        )  # fmt: skip
        return self._writing(rule)

    def _writing(self, rule: Rule) -> Callable[[Endpoint], Endpoint]:
        check_rule(rule, self.reading.strategy)

        def decorator(func: Endpoint) -> Endpoint:
            limited = limited_on(func, self)
            if limited is not None:
                # A decorator above another one of this limiter.
                limited.rules.append(rule)
                return func
            return wrapped(Limited(self, plain(func), [rule]), func)  # type: ignore[return-value]

        return decorator

    def exempt(self, obj: Endpoint) -> Endpoint:
        """Limit *obj*, an endpoint or a class of them, by nothing of this limiter; it is returned as it is."""
        self._exempt.add(plain(obj))
        return obj

    # -- what its endpoints and middleware ask ---------------------------------------------------------------

    def known(self, endpoint: Any) -> Limited:
        """What is said of *endpoint*, as its route has it."""
        limited = limited_on(endpoint, self)
        if limited is not None:
            return limited
        endpoint = plain(endpoint)
        limited = self._known.get(endpoint)
        if limited is None:
            limited = self._known[endpoint] = Limited(self, endpoint)
        return limited

    def exempts(self, endpoint: Any) -> bool:
        """Whether nothing of this limiter counts at *endpoint*, a `plain` one."""
        # Names were written before it was adopted.
        is_named = bool(self._exempt_routes) and named(endpoint) in self._exempt_routes
        return endpoint in self._exempt or is_named or any(passes() for passes in self._request_filters)

    def number_of(self, name: str) -> int:
        """How many endpoints of this whole name there are, with this one."""
        self._numbers[name] = self._numbers.get(name, 0) + 1
        return self._numbers[name]

    def metering_of(self, scope: Any) -> Metering:
        """Who counts for the request of *scope*: the metering of the middleware around it, or else its own."""
        opening = opening_of(scope)
        if opening is None:
            return self.metering
        self.check_shared(opening.metering)
        return opening.metering

    def share(self, metering: Metering) -> None:
        """Count everything in *metering*, that of a middleware, from now on; raises as `check_shared`."""
        self.check_shared(metering)
        self.metering, self._own_metering = metering, False

    def check_shared(self, metering: Metering) -> None:
        """
        Refuse counts that were meant to be elsewhere.

        Raises:
            ConfigurationError: The middleware has another metering than the limiter was given, or shares with
                another application, or than its storage says.
        """
        if metering is not self.metering and not self._own_metering:
            raise ConfigurationError(
                "The middleware in front of an adopted slowapi Limiter has another Metering than the limiter. Pass "
                "the same object to both: adopt(limiter, metering)."
            )

    def show(self, response: Response | None, shown: Any) -> None:
        """Write what may be shown of *shown* on *response*, where there is one."""
        if response is not None:
            write_fields(self, response.headers, shown)

    # -- what slowapi calls ----------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begin all counts anew, in memory; what a shared store has counted is not this process' to forget."""
        if not isinstance(self.metering.store, MemoryStore):
            self.logger.warning("This storage type does not support being reset")
            return
        self.reading = self.reading._replace(epoch=self.reading.epoch + 1)
        self.logger.info("Storage has been reset and all limits cleared")

    def _check_request_limit(self, request: Any, endpoint_func: Any, in_middleware: bool = True) -> None:
        """
        Nothing: the endpoint that comes asks by itself.

        Raises:
            ConfigurationError: It would not.
        """
        if not hasattr(endpoint_func, GATED):
            raise ConfigurationError(
                f"Nobody asks for the limits of {endpoint_func!r}, which slowapi decorated before its Limiter was "
                f"adopted. Put adopt() before the decorators, or pass it the application that has the endpoint: "
                f"adopt(limiter, app=app)."
            )

    def _inject_headers(self, response: Response, current_limit: Any) -> Response:
        if self.enabled and self._headers_enabled and current_limit is not None:
            if not isinstance(response, Response):
                raise ConfigurationError("parameter `response` must be an instance of starlette.responses.Response")
            self.show(response, current_limit)
        return response

    def _inject_asgi_headers(self, headers: MutableHeaders, current_limit: Any) -> MutableHeaders:
        write_fields(self, headers, current_limit)
        return headers


def become_adopted(limiter: Limiter, metering: Metering | None) -> AdoptedLimiter:
    """
    Make *limiter* an adopted one: the same object, of a class that has its own among its bases.

    Raises:
        ConfigurationError: Its limits, strategy or storage are none of ours.
    """
    found: Any = limiter
    strategy = strategy_of(limiter)
    rules = {
        name: [check_rule(read_group(group), strategy) for group in getattr(limiter, name)]
        for name in ("_application_limits", "_default_limits", "_in_memory_fallback")
    }
    counts = metering or metering_for(limiter)
    own = type(limiter)
    # What a class of the application's own changes stays so, and its `super()` is ours.
    found.__class__ = AdoptedLimiter if own is Limiter else type(own.__name__, (own, AdoptedLimiter), {})
    found.metering = counts
    found._own_metering = metering is None and storage_of(limiter).startswith("memory:")
    found.on_store_down = without_store(limiter)
    found.application_rules, found.default_rules, found.fallback_rules = rules.values()
    found.reading = Reading(strategy, limiter._key_prefix or "", 0)
    found._known, found._exempt, found._numbers = {}, set(), {}
    adopted: AdoptedLimiter = found
    return adopted
