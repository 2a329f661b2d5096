"""
What an endpoint returned, counted: for prices of what comes out of a call, such as the results of a search.

Knows the function of a route that counts, and reports what it answers as the call's units. A count that fails breaks no
response: such a call is one of missing usage.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from asgi_metering.arguments import From
from asgi_metering.computed import check_answers, name_of
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices import UnitPrice
from asgi_metering.prices.costing import read_units

if TYPE_CHECKING:
    from asgi_metering.opening import Opening

__all__ = ["RESULT", "check_count", "count_returned"]

RESULT = "result"
"""The parameter name by which such a function asks for what the endpoint returned."""

MEND = "Report it in there instead: current_call().record(units={'items': 3})."


def check_count(
    count: From, name: str, endpoint: Callable[..., Any] | None, parameters: Mapping[str, inspect.Parameter]
) -> None:
    """
    Refuse a count of what is never returned, or by what is not there.

    Args:
        count: The function of the policy.
        name: The policy's.
        endpoint: What is decorated; None for an application, or the explicit gate.
        parameters: Of the endpoint.

    Raises:
        ConfigurationError: With the mend.
    """
    if endpoint is None:
        raise ConfigurationError(f"{name} has count=, and is no function that returns what is counted. {MEND}")
    if inspect.isgeneratorfunction(endpoint) or inspect.isasyncgenfunction(endpoint):
        raise ConfigurationError(f"{name} has count=, and is a generator, which returns nothing. {MEND}")
    check_answers((count,), name)
    count.check(name, {**parameters, RESULT: inspect.Parameter(RESULT, inspect.Parameter.KEYWORD_ONLY)})


async def count_returned(opening: Opening, count: From, result: object, arguments: Mapping[str, Any]) -> None:
    """
    Report what *count* says of *result*, where the route charges its call; work that is free is told of as well.

    Raises:
        CallCut: As `Call.record`.
    """
    call = opening.call
    if call is None or call.charge is None or call.closed:
        return
    try:
        answered = await count.compute(call, {**arguments, RESULT: result})
        units = read_units(
            {_unit_of(call.charge.price): answered} if isinstance(answered, int | str | Decimal) else answered
        )
        if not units:
            raise ConfigurationError("It named no unit.")
    except Exception as failure:  # noqa: BLE001 -- whatever the application's function raises, its answer is whole
        endpoint = call.line if call.policy is None else call.policy.name
        call.metering.alarms.raised(
            f"count {endpoint}",
            f"The count of {endpoint}, by {name_of(count.function)}, cannot be used, so that its call is charged as "
            f"missing usage: {failure!r:.200}. Answer how much of each unit was used, such as {{'items': 3}}.",
            failure,
        )
        call.metering.meters.count("usage_rejected", line=call.line)
        return
    call.record(units=units)


def _unit_of(price: object) -> str:
    """
    The one unit that *price* counts, which a bare number is of.

    Raises:
        ConfigurationError: It counts none, or several.
    """
    if isinstance(price, UnitPrice) and len(price.prices) == 1:
        return next(iter(price.prices))
    raise ConfigurationError("A number says not of which unit it is, where the price is not of one alone.")
