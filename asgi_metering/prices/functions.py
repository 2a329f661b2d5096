"""
Prices that a function of the application works out, once a call has ended.

Knows how such a function is called. Never knows what it computes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

from asgi_metering.amounts import exact_amount
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices.costing import CostedCall, Costing, ModelCall
from asgi_metering.prices.values import MAX_AFFORDABLE
from asgi_metering.usage import TokenUsage

__all__ = ["UsagePrice", "by_usage"]

WANTED: Final = ("usage", "call", "calls")
"""What such a function may ask for, by the names of its parameters."""


@dataclass(frozen=True, slots=True)
class UsagePrice:
    """
    A price that *function* works out: see `by_usage`.

    Args:
        function: Sync or async.
    """

    function: Callable[..., Any]
    wants: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ConfigurationError(f"The price {self.function!r} cannot be called. Pass a function of the usage.")
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):
            raise ConfigurationError(
                f"The price {self.function!r} has no signature to read. Wrap it in a function of usage."
            ) from None
        missing = [each for each in parameters if each.default is each.empty and each.name not in WANTED]
        named = [each for each in parameters if each.kind not in (each.POSITIONAL_ONLY, each.VAR_POSITIONAL)]
        if missing or len(named) < len(parameters):
            raise ConfigurationError(
                f"The price {self.function!r} asks for what it cannot have. Name its parameters: "
                f"{', '.join(map(repr, WANTED))}, those of them that it needs."
            )
        object.__setattr__(self, "wants", tuple(each.name for each in named if each.name in WANTED))

    @property
    def is_known_before(self) -> bool:
        """Whether it can be asked of an estimate: it does not wait, and needs no call."""
        return "call" not in self.wants and not _is_async(self.function)

    def cost(self, usage: TokenUsage) -> Decimal:
        """
        What the function says of *usage* alone.

        Raises:
            ConfigurationError: It needs the call, or is async: then hold an amount, ``hold="0.2"``.
            AmountError: It answers what is no amount.
        """
        if not self.is_known_before:
            raise ConfigurationError(
                f"The price {self.function!r} is known at the end of a call alone, since it is async or needs the "
                f"call. Hold an amount: hold='0.2', say."
            )
        return exact_amount(self.function(**self._given(usage, (ModelCall(usage),), None)), "price")

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """Nobody can tell what a function will say: a number without effect."""
        return MAX_AFFORDABLE

    def bill(self, calls: tuple[ModelCall, ...], context: Any = None) -> Costing | Awaitable[Costing]:
        """See `BilledPrice`; awaitable where the function is async."""
        usage = TokenUsage.sum(call.usage for call in calls)
        answer = self.function(**self._given(usage, calls, context))
        return _awaited(answer, calls) if isinstance(answer, Awaitable) else _costing(answer, calls)

    def _given(self, usage: TokenUsage, calls: tuple[ModelCall, ...], call: Any) -> dict[str, Any]:
        offered = {"usage": usage, "calls": calls, "call": call}
        return {name: offered[name] for name in self.wants}


async def _awaited(answer: Awaitable[Any], calls: tuple[ModelCall, ...]) -> Costing:
    return _costing(await answer, calls)


def _costing(answer: Any, calls: tuple[ModelCall, ...]) -> Costing:
    amount = exact_amount(answer, "price")
    # What each of several calls contributed, nobody knows.
    costed = tuple([CostedCall(call, amount if len(calls) == 1 else Decimal(0), "price") for call in calls])
    return Costing(amount, costed)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def by_usage(function: Callable[..., Any]) -> UsagePrice:
    """
    Price a call by a function of what it used, sync or async, which is asked when the call has ended.

    Args:
        function: Answers whole units (int, Decimal or str). Its parameters are matched by name: ``usage`` (the sum, a
            `TokenUsage`), ``calls`` (a tuple of `ModelCall`, one for each call of a model), ``call`` (the metered
            call). It is also asked what a hold or a running call costs, so it should tell the same of the same.

    What it raises, or an answer that is no amount, falls back to the policy for missing usage, with an alarm (S3.21).

    Raises:
        ConfigurationError: It asks for something else.
    """
    return UsagePrice(function)
