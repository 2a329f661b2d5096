"""
Counting a call: which limits count it, by which keys, and how much it takes of each.

Works out what the policies leave open, by the endpoint's arguments. Takes nothing and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asgi_metering.arguments import From
from asgi_metering.asking import (
    REQUESTS,
    by_identity,
    computed_key,
    key_of,
    lease_asks,
    limit_ask,
    limits_of,
    method_of,
    root_of_rate,
)
from asgi_metering.estimates import estimate_arguments
from asgi_metering.messages import Counted, MessageLimits
from asgi_metering.policies import ComputedLimit, RatePolicy
from asgi_metering.rates import RateLimit
from asgi_metering.rules.operations import LeaseAsk, LimitAsk
from asgi_metering.rules.roots import rooted
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["count_by", "counts", "expected_usage", "message_limits", "needs_caller", "of_everybody", "usage_of"]


def needs_caller(rate: RatePolicy) -> bool:
    """Whether anything of *rate* may depend on who calls: what is flat is asked of every request, known or not."""
    return by_identity(rate) or bool(rate.chosen or rate.callables())


def of_everybody(rate: RatePolicy) -> RatePolicy | None:
    """What of *rate* an exempt caller is counted by: nothing that is counted by who it is (S0.18)."""
    if not by_identity(rate):
        return rate
    shared = tuple([slots for slots in rate.concurrency if slots.level == "global"])
    return replace(rate, limits=(), chosen=(), concurrency=shared) if shared else None


async def counts(call: Call, rate: RatePolicy, arguments: Mapping[str, Any]) -> bool:
    """Whether *call* is one of those that *rate* counts: by its method, and by what the application says of it."""
    if rate.methods and method_of(call, rate.methods) not in rate.methods and call.opening.origin is not None:
        return False
    return rate.exempt_when is None or not await rate.exempt_when.compute(call, arguments)


async def count_by(
    call: Call,
    rate: RatePolicy,
    arguments: Mapping[str, Any],
    now: float,
    limits: list[LimitAsk],
    leases: list[LeaseAsk],
) -> None:
    """Add to *limits* and *leases* what *rate* asks for *call* around *now*."""
    if rate.asker is not None:
        limits += await rate.asker.asks(call, arguments, now)
        return
    key, root, cost = await _counted_by(call, rate, arguments)
    for limit in rate.limits if not rate.chosen else await _chosen(call, rate, arguments):
        taken = cost if limit.meter == REQUESTS else await _weight(call, limit, arguments)
        limits.append(limit_ask(rate, limit, rooted(key, root), taken, now))
    leases += lease_asks(rate, key, root)


async def _counted_by(call: Call, rate: RatePolicy, arguments: Mapping[str, Any]) -> tuple[str, str, int]:
    """The key that *rate* counts *call* by, the payer beside whose accounts that is kept, and what is taken."""
    wanted, cost = rate.key, rate.cost
    key = await computed_key(call, rate, wanted, arguments) if isinstance(wanted, From) else key_of(call, rate)
    if rate.per_method:
        key = f"{method_of(call, rate.methods)} {key}"
    root = root_of_rate(call, rate)
    return key, root, await cost.compute(call, arguments) if isinstance(cost, From) else cost


async def message_limits(
    call: Call, rates: tuple[RatePolicy, ...], arguments: Mapping[str, Any]
) -> MessageLimits | None:
    """What the messages of a session are let in by; all that is computed is, once, from what it began with."""
    counted: list[Counted] = []
    for rate in rates:
        if not rate.is_selective or await counts(call, rate, arguments):
            key, root, cost = await _counted_by(call, rate, arguments)
            limits = rate.limits if not rate.chosen else await _chosen(call, rate, arguments)
            counted += [Counted(rate, limit, rooted(key, root), cost) for limit in limits]
    return MessageLimits(call, counted) if counted else None


async def _chosen(call: Call, rate: RatePolicy, arguments: Mapping[str, Any]) -> list[RateLimit]:
    """The limits of *rate* for *call*, those that are computed last."""
    limits = list(limits_of(call, rate))
    for each in rate.chosen:
        if isinstance(each, ComputedLimit):
            answered = await each.function.compute(call, arguments)
            for text in answered if isinstance(answered, list | tuple) else (answered,):
                limits += each.reading.read_all(text)
    return limits


async def _weight(call: Call, limit: RateLimit, arguments: Mapping[str, Any]) -> int:
    """What a weighted limit takes by estimate; the call's end corrects it."""
    if call.asked is None:
        call.asked = await expected_usage(call, arguments)
    return usage_of(limit.meter, call.asked) or 0


async def expected_usage(call: Call, arguments: Mapping[str, Any]) -> TokenUsage:
    """What a call is expected to use that no layer charges: as its route would hold for it, or as its request says."""
    charge = call.policy.charge if call.policy is not None else None
    if charge is not None and (call.beside is None or call.beside.charge is None):
        estimate = charge.hold.estimate
        if isinstance(estimate, From):
            estimate = await estimate.compute(call, arguments)
        if isinstance(estimate, TokenUsage) and (charge.hold.slices is None or estimate.input is not None):
            return estimate
    return await estimate_arguments(arguments)


def usage_of(meter: str, usage: TokenUsage) -> int | None:
    """What *usage* counts on a meter: ``tokens``, ``input_tokens`` or ``output_tokens``."""
    counts = {"tokens": usage.total, "input_tokens": usage.input, "output_tokens": usage.output}
    return counts.get(meter)
