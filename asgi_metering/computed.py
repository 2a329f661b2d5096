"""
Computed arguments: what the callables of a policy answer for one endpoint, checked before anything is asked.

Knows which argument of which endpoint a callable computes, and what it may answer. Never asks for an admission, and
never charges.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from asgi_metering.arguments import From, NamedKey
from asgi_metering.chosen import LimitReading
from asgi_metering.errors import ConfigurationError, MeteringError
from asgi_metering.names import check_name
from asgi_metering.policies import ChargePolicy, ComputedLimit, RatePolicy, UpstreamPolicy
from asgi_metering.rates import is_item
from asgi_metering.usage import TokenUsage

__all__ = [
    "Computed",
    "bound_charge",
    "bound_rates",
    "bound_upstream",
    "check_answers",
    "check_models",
    "check_sync",
    "is_async",
    "name_of",
]

log = logging.getLogger("asgi_metering")

MAX_SHOWN = 60
"""Characters of a wrong cost that an error repeats: enough to recognise it, never a request's whole body."""

MAX_FAILURE_SHOWN = 200
"""The same of what a callable raised; the traceback has all of it."""


_READING = LimitReading()


@dataclass(frozen=True, slots=True)
class Computed(From):
    """
    A computed argument that knows its endpoint: a wrong answer is told with both names, the value and the mend.

    Attributes:
        endpoint: The policy's name.
    """

    endpoint: str

    async def compute(self, call: Any, arguments: Mapping[str, Any]) -> Any:
        """
        Compute, and check the answer for *call*. Nothing has been asked of the store yet, so nothing is charged.

        Raises:
            AmountError: A price or hold that is no amount, or none that the call's unit can count.
            ConfigurationError: A key or cost that cannot be counted by.

        What the callable itself raises rises unchanged, with a note: it may be the framework's own answer.
        """
        try:
            # Not super(): slots make another class of this one.
            answered = await From.compute(self, call, arguments)
        except Exception as failure:
            told = (
                f"The {self.what} of {self.endpoint} could not be computed: {name_of(self.function)} raised "
                f"{failure!r:.{MAX_FAILURE_SHOWN}}. The endpoint did not run, and nothing was charged. Answer every "
                f"call, or raise your framework's own answer, such as its HTTPException."
            )
            failure.add_note(told)
            log.warning(told)
            raise
        try:
            _CHECKS[self.what](call, answered)
        except MeteringError as wrong:
            error = type(wrong)(
                f"The {self.what} of {self.endpoint}, computed by {name_of(self.function)}, cannot be used. {wrong}"
            )
            # Frameworks may make an answer of any ValueError, and then no server logs it.
            log.error("%s The endpoint did not run, and nothing was charged.", error)
            raise error from None
        return answered


def bound_charge(charge: ChargePolicy, endpoint: str) -> ChargePolicy:
    """
    *charge* with everything that is computed bound to *endpoint*.

    The payer stays as it is: one who cannot be resolved is refused, and told, at the gate.

    Raises:
        ConfigurationError: A callable that is a generator, which answers no value.
    """
    if not charge.callables():
        return charge
    check_answers(charge.callables(), endpoint)
    once, key = charge.idempotency, charge.key
    return replace(
        charge,
        price=_bound(charge.price, endpoint),
        hold=replace(charge.hold, estimate=_bound(charge.hold.estimate, endpoint)),
        idempotency=None if once is None else replace(once, fingerprint=_bound(once.fingerprint, endpoint)),
        key=None if key is None else replace(key, key=_bound(key.key, endpoint)),
        skip_if=_bound(charge.skip_if, endpoint),
        request_id=_bound(charge.request_id, endpoint),
        session_id=_bound(charge.session_id, endpoint),
    )


def bound_rates(rates: RatePolicy, endpoint: str) -> RatePolicy:
    """*rates* with their computed key and cost bound to *endpoint*; raises as `bound_charge`."""
    if not rates.callables():
        return rates
    check_answers(rates.callables(), endpoint)
    chosen = [
        replace(each, function=_bound(each.function, endpoint)) if isinstance(each, ComputedLimit) else each
        for each in rates.chosen
    ]
    return replace(
        rates,
        key=_bound(rates.key, endpoint),
        cost=_bound(rates.cost, endpoint),
        exempt_when=_bound(rates.exempt_when, endpoint),
        chosen=tuple(chosen),
    )


def bound_upstream(upstream: UpstreamPolicy, endpoint: str) -> UpstreamPolicy:
    """*upstream* with its computed tokens, label and models bound to *endpoint*; raises as `bound_charge`."""
    if not upstream.callables():
        return upstream
    check_answers(upstream.callables(), endpoint)
    return replace(
        upstream,
        tokens=_bound(upstream.tokens, endpoint),
        label=_bound(upstream.label, endpoint),
        models=_bound(upstream.models, endpoint),
    )


def _bound(value: Any, endpoint: str) -> Any:
    if isinstance(value, NamedKey):
        return NamedKey.of(value.name, endpoint)
    return Computed(value.function, value.what, endpoint) if isinstance(value, From) else value


def check_answers(computed: Iterable[From], endpoint: str) -> None:
    """
    Refuse what answers no value.

    Raises:
        ConfigurationError: A generator.
    """
    for each in computed:
        if _is_a(each.function, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
            raise ConfigurationError(
                f"The {each.what} of {endpoint} is computed by {name_of(each.function)}, a generator, which answers no "
                f"value. Return it instead of yielding it."
            )


def check_sync(function: Callable[..., Any], what: str) -> None:
    """
    Refuse a function whose result nobody awaits or iterates.

    Raises:
        ConfigurationError: An async function or a generator, also in a partial or as an object's ``__call__``.
    """
    if _is_a(function, inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction):
        raise ConfigurationError(
            f"{what} is {name_of(function)}, an async function or generator, and nobody awaits what it answers. Pass a "
            f"plain function that returns its answer."
        )


def is_async(function: Any) -> bool:
    """Whether *function* is an async function, also in a partial or as an object's ``__call__``."""
    return callable(function) and _is_a(function, inspect.iscoroutinefunction)


def _is_a(function: Any, *kinds: Callable[[Any], bool]) -> bool:
    function = _unpacked(function)
    return any(kind(each) for kind in kinds for each in (function, type(function).__call__))


def _unpacked(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def name_of(function: Any) -> str:
    """What a function, or an object that is called like one, is called in sentences."""
    plain = _unpacked(function)
    if not hasattr(plain, "__qualname__"):
        plain = type(plain)
    return f"{plain.__module__}.{plain.__qualname__}"


def _check_price(call: Any, price: Any) -> None:
    # Like every computed sum it may be finer than the unit: the gate rounds it once, half up (DESIGN 2).
    call.unit.round(call.unit.exact(price, "price"))


def _check_estimate(call: Any, estimate: Any) -> None:
    if estimate is not None and not isinstance(estimate, TokenUsage):
        call.unit.round(call.unit.exact(estimate, "hold estimate"))


def _check_key(_: Any, key: Any) -> None:
    if isinstance(key, bool) or not isinstance(key, str | int) or key == "":
        # Of another type it may still be what a caller is known by, perhaps a credential: not for the log.
        shown = repr(key) if key is None or key == "" else f"a {type(key).__name__}"
        raise ConfigurationError(
            f"The key is {shown}. It has to be a non-empty str or an int: an empty key would put everybody together."
        )


def _check_cost(_: Any, cost: Any) -> None:
    if type(cost) is not int or cost < 0:
        raise ConfigurationError(f"The cost {cost!r:.{MAX_SHOWN}} is not an int from 0 up. Round it up first.")


def _check_charge_key(_: Any, key: Any) -> None:
    if key is not None and (isinstance(key, bool) or not isinstance(key, str | int) or key == ""):
        shown = repr(key) if key == "" else f"a {type(key).__name__}"
        raise ConfigurationError(
            f"The charge key is {shown}. It has to be a non-empty str, an int, or None for a call that pays for itself."
        )


def _check_id(_: Any, found: Any) -> None:
    if found is not None and (isinstance(found, bool) or not isinstance(found, str | int)):
        raise ConfigurationError(f"The id is a {type(found).__name__}. It has to be a str, an int, or None for none.")


def _check_fingerprint(_: Any, fingerprint: Any) -> None:
    if isinstance(fingerprint, bool) or not isinstance(fingerprint, str | bytes | int):
        raise ConfigurationError(
            f"The fingerprint is a {type(fingerprint).__name__}. It has to be a str, bytes or int."
        )


def _check_skip(_: Any, skips: Any) -> None:
    if type(skips) is not bool:
        # What is merely true, the text 'false' for one, would be a call for nothing.
        raise ConfigurationError(f"What skip_if answers is a {type(skips).__name__}. It has to be True or False.")


def _check_tokens(_: Any, tokens: Any) -> None:
    if tokens is not None and not isinstance(tokens, TokenUsage) and (type(tokens) is not int or tokens < 0):
        raise ConfigurationError(
            f"The tokens {tokens!r:.{MAX_SHOWN}} are no int from 0 up, no TokenUsage and not None. Round them up first."
        )


def _check_label(_: Any, label: Any) -> None:
    if label is not None:
        check_name(label, "quota label")


def _check_models(_: Any, models: Any) -> None:
    # A client that names none by an empty text is one that names none.
    check_models(models or None)


def check_models(models: Any) -> tuple[str, ...]:
    """
    The models that *models* names: one by a text, several, or none by None.

    Raises:
        ConfigurationError: It names none.
    """
    named = () if models is None else (models,) if isinstance(models, str) else models
    if not isinstance(named, list | tuple) or any(not isinstance(each, str) or not each for each in named):
        raise ConfigurationError(
            f"model={models!r:.{MAX_SHOWN}} names no model. Use a name such as 'gemini-2.5-flash', a list of them, or "
            f"None for any."
        )
    return tuple(named)


def _check_exemption(_: Any, exempt: Any) -> None:
    if type(exempt) is not bool:
        raise ConfigurationError(f"What exempt_when answers is a {type(exempt).__name__}. It has to be True or False.")


def _check_limit(_: Any, limit: Any) -> None:
    texts = list(limit) if isinstance(limit, list | tuple) else [limit]
    if not texts:
        raise ConfigurationError("The limit is an empty list. Answer at least one; exempt_when= tells who has none.")
    for text in texts:
        is_limit = isinstance(text, str) or is_item(text)
        if not is_limit or any(limit.meter != "requests" for limit in _READING.read_all(text)):
            raise ConfigurationError(
                f"The limit {text!r:.{MAX_SHOWN}} is no limit of requests. Answer a text such as '60/minute', or a "
                f"list of them; exempt_when= tells who has none."
            )


_CHECKS: Mapping[str, Callable[[Any, Any], None]] = {
    "price": _check_price,
    "hold estimate": _check_estimate,
    "key": _check_key,
    "cost": _check_cost,
    "charge key": _check_charge_key,
    "fingerprint": _check_fingerprint,
    "request id": _check_id,
    "session id": _check_id,
    "skip_if": _check_skip,
    "upstream tokens": _check_tokens,
    "upstream label": _check_label,
    "upstream model": _check_models,
    "exempt_when": _check_exemption,
    "limit": _check_limit,
}
"""By what is computed, as `From` names it."""
