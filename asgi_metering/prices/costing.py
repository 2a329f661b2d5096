"""
Costing: what each call of a model behind one metered call used and costs, and what all of them add up to.

Values only. Knows no price.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from asgi_metering.amounts import exact_amount
from asgi_metering.errors import UsageError
from asgi_metering.prices.values import EXACT
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.values import AXES

__all__ = ["BilledPrice", "CostedCall", "Costing", "Flag", "ModelCall", "breakdown", "plain_costing", "read_units"]

NO_UNITS: Final[Mapping[str, Decimal]] = MappingProxyType({})

WEB_SEARCHES: Final = "web_searches"
"""The unit of searches that a provider makes for an answer."""

CITATIONS: Final = "citation_tokens"
"""The unit of what an answer cites, where a provider counts its tokens apart."""

SECONDS: Final = "seconds"
"""The unit of time: what transcriptions report, and what `per_minute` prices."""

MAX_BREAKDOWN: Final = 1_000
"""Characters of the breakdown by model on an event: what exporters send whole (`events.records.MAX_TEXT`)."""

OTHER: Final = "_OTHER"
"""Stands for the models that have no room in it."""

Flag: TypeAlias = str
"""``unknown_model``, ``default_price``, ``dearest_kind``, ``unknown_service`` and others: see `Costing`."""


@dataclass(frozen=True, slots=True)
class ModelCall:
    """
    One call of a model behind a metered call.

    Args:
        usage: Its tokens.
        model, provider: Who answered, as its source names them; None if it does not.
        cost: What the provider says that it charges, in USD; None if it does not.
        hidden_cost: What a library says of that, beside the answer.
        units: What it used besides tokens, by names such as ``"images"``, ``"seconds"``, ``"searches"``.
        service: By which service tier it was answered, such as ``"flex"``; None where nobody said.
        is_media: It answered with images or other media, which counted tokens never price (S3.20).
        estimated: We counted, rather than the provider.
        count: Of how many calls it is the sum, where a metered call makes very many (`ModelCall.plus`).
        longest: Input of the longest of these, whose tier counts; None for a single one.
    """

    usage: TokenUsage = TokenUsage()
    model: str | None = None
    provider: str | None = None
    cost: Decimal | None = None
    hidden_cost: Decimal | None = None
    units: Mapping[str, Decimal] = field(default_factory=lambda: NO_UNITS)
    is_media: bool = False
    estimated: bool = False
    count: int = 1
    longest: int | None = None
    service: str | None = None

    @property
    def context(self) -> int:
        """Tokens of input by which a tier is chosen."""
        return (self.usage.input or 0) if self.longest is None else self.longest

    def plus(self, other: ModelCall) -> ModelCall:
        """
        Add another call of the same model, which the same prices count for.

        Raises:
            UsageError: It adds up to more than can be counted.
        """
        units = dict(self.units)
        for name, count in other.units.items():
            units[name] = EXACT.add(units.get(name, Decimal(0)), count)
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        hidden = [cost for cost in (self.hidden_cost, other.hidden_cost) if cost is not None]
        return replace(
            self,
            usage=self.usage + other.usage,
            cost=sum(costs[1:], costs[0]) if costs else None,
            hidden_cost=sum(hidden[1:], hidden[0]) if hidden else None,
            units=MappingProxyType(units) if units else NO_UNITS,
            count=self.count + other.count,
            longest=max(self.context, other.context),
        )

    @property
    def used_anything(self) -> bool:
        """Whether it reported a token, a unit or a cost."""
        return bool(self.usage.total or any(self.units.values()) or self.cost or self.hidden_cost)


@dataclass(frozen=True, slots=True)
class CostedCall:
    """
    One such call with its cost.

    Args:
        call: Which.
        cost: Exactly, in the currency of its prices: USD of models that are priced by name, else whole units.
        how: What said so: ``reported``, ``hidden``, ``response``, ``tokens``, ``price``; empty where nothing did.
        flags: What is wrong with it, as of `Costing`.
    """

    call: ModelCall
    cost: Decimal
    how: str
    flags: tuple[Flag, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe, every count by its name; what was not reported is absent (S3.27)."""
        call = self.call
        told = {"model": call.model, "provider": call.provider, "cost": f"{self.cost:f}", "how": self.how}
        told |= {} if call.service is None else {"service": call.service}
        tokens = {axis: count for axis in AXES if (count := getattr(call.usage, axis)) is not None}
        units = {name: f"{count:f}" for name, count in call.units.items()}
        return {**told, **tokens, **({"units": units} if units else {}), "flags": list(self.flags)}


@dataclass(frozen=True, slots=True)
class Costing:
    """
    What all calls of models behind one metered call cost.

    Args:
        amount: Whole units to charge, exactly; rounded once, by whoever charges.
        calls: Each with its cost, in their order.
        version: Of the prices that were used, where they have one.
        flags: What is wrong with it, each once: ``unknown_model`` (no price by its name), ``default_price`` (charged by
            the default instead), ``dearest_kind`` (nobody said what of the output is an image, so that all of it is
            charged as what costs most), ``unknown_service`` (a service tier without a factor, so that tokens cost the
            usual), ``unpriced_citations`` (what it cites is counted apart, and has no price), ``cost_refused`` (a
            reported cost that nobody can believe), ``cost_unresolved`` (nothing told the cost, so nothing is charged
            for it), ``unpriced_units`` (units were reported, and none that has a price).
    """

    amount: Decimal
    calls: tuple[CostedCall, ...] = ()
    version: str | None = None
    flags: tuple[Flag, ...] = ()


@runtime_checkable
class BilledPrice(Protocol):
    """A measured price that is asked about each call of a model by itself, rather than about their sum."""

    def cost(self, usage: TokenUsage) -> Decimal:
        """As of `MeasuredPrice`."""

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """As of `MeasuredPrice`."""

    def bill(self, calls: tuple[ModelCall, ...], context: Any = None) -> Costing | Awaitable[Costing]:
        """
        What *calls* cost together.

        Args:
            calls: Every call of a model behind one metered call; empty where there was none.
            context: The metered call, where there is one.
        """


def plain_costing(calls: Iterable[ModelCall], cost: Callable[[ModelCall], Decimal]) -> Costing:
    """Each call at its own *cost*, in whole units, and their sum (S3.22)."""
    costed = tuple([CostedCall(call, cost(call), "price") for call in calls])
    return Costing(summed(costed), costed)


def summed(calls: Iterable[CostedCall]) -> Decimal:
    """What they cost together, exactly."""
    total = Decimal(0)
    for each in calls:
        total = EXACT.add(total, each.cost)
    return total


def breakdown(calls: Sequence[CostedCall]) -> str:
    """
    Tokens and cost summed by model, as JSON of at most `MAX_BREAKDOWN` characters, the dearest first (S3.27).

    The models beyond that are summed under ``_OTHER``.
    """
    by_model: dict[str, dict[str, Any]] = {}
    for each in calls:
        _add(by_model, each.call.model or OTHER, _share(each))
    ordered = sorted(by_model.items(), key=lambda item: (item[0] == OTHER, -item[1]["cost"], item[0]))
    for shown in range(len(ordered), -1, -1):
        told: dict[str, dict[str, Any]] = {}
        for index, (model, share) in enumerate(ordered):
            _add(told, model if index < shown else OTHER, share)
        text = json.dumps({model: _written(share) for model, share in told.items()}, separators=(",", ":"))
        if len(text) <= MAX_BREAKDOWN:
            return text
    raise AssertionError("one model has room")


def _share(each: CostedCall) -> dict[str, Any]:
    usage = each.call.usage
    counts = {axis: count for axis in AXES if (count := getattr(usage, axis)) is not None}
    return {"calls": each.call.count, "cost": each.cost, **counts}


def _add(shares: dict[str, dict[str, Any]], model: str, more: Mapping[str, Any]) -> None:
    share = shares.setdefault(model, {})
    for name, value in more.items():
        share[name] = EXACT.add(share.get(name, Decimal(0)), value) if name == "cost" else share.get(name, 0) + value


def _written(share: Mapping[str, Any]) -> dict[str, Any]:
    return {**share, "cost": f"{share['cost'].normalize(EXACT):f}"}


MAX_UNITS: Final = 50
"""Names of units of one report: prices have a handful."""

MAX_UNIT_NAME: Final = 64
"""Characters of such a name."""

MAX_COUNT: Final = 10**12
"""The most of one unit that is believed, like tokens."""


def read_units(units: Mapping[str, Any]) -> Mapping[str, Decimal]:
    """
    Check what a handler reports besides tokens.

    Raises:
        UsageError: No mapping, a name that is none, or a count above `MAX_COUNT`.
        AmountError: A count that is no int, Decimal or str from 0 up.
    """
    if not isinstance(units, Mapping) or len(units) > MAX_UNITS:
        raise UsageError(f"The units are no mapping of at most {MAX_UNITS} names. Pass {{'seconds': '93.5'}}, say.")
    read: dict[str, Decimal] = {}
    for name, count in units.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_UNIT_NAME:
            raise UsageError(f"A unit's name is no str of 1 to {MAX_UNIT_NAME} characters. Pass 'seconds', say.")
        exact = exact_amount(count, f"count of {name!r}")
        if exact > MAX_COUNT:
            raise UsageError(f"The count of {name!r} is above {MAX_COUNT}. Pass what one call really used.")
        read[name] = exact
    return MappingProxyType(read)
