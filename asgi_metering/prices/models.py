"""
Prices of models by their names: what providers report that they charge, else what their prices say.

Works in USD, and converts once. Knows where a name is looked for; never asks a network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.prices.aliases import Aliases, candidates
from asgi_metering.prices.costing import CITATIONS, WEB_SEARCHES, CostedCall, Costing, Flag, ModelCall, summed
from asgi_metering.prices.published import Rate, find_published, load_published, published_version
from asgi_metering.prices.tokens import TokenPrice, dearest_of, factor_of, read_factors
from asgi_metering.prices.units import UnitPrice
from asgi_metering.prices.values import EXACT, FLOOR, MAX_AFFORDABLE, FixedPrice
from asgi_metering.usage import TokenUsage

__all__ = ["RESOLVERS", "ModelPrices", "OwnPrice", "PinnedPrices", "model_prices"]

OnePrice: TypeAlias = Amount | FixedPrice | TokenPrice | UnitPrice

OwnPrice: TypeAlias = OnePrice | Sequence[OnePrice]
"""What a model costs in USD: an amount for each call, tokens, units, or several of these together."""

BELIEVED_USD: Final = Decimal(1_000)
"""The most that one call of a model is believed to cost: the longest contexts with the dearest prices stay below."""


WEB_SEARCH_USD: Final = Decimal("0.01")
"""What OpenAI and Anthropic charge for a search; Google a little more, which its published prices say."""

_ONE: Final = Decimal(1)
_HALF: Final = Decimal("0.5")

SERVICES: Final[Mapping[str, Decimal]] = MappingProxyType(
    {
        **dict.fromkeys(("default", "standard", "standard_only", "auto", "on_demand", "scale"), _ONE),
        **dict.fromkeys(("provisioned_throughput", "flex", "batch", "anthropic/priority"), _ONE),
        **dict.fromkeys(("openai/flex", "openai/batch", "anthropic/batch"), _HALF),
        "priority": Decimal(2),
        "fast": Decimal(6),
    }
)
"""
By what the price of tokens is multiplied in a service tier, as its provider prints it; "openai/flex" is for one
provider alone, by the name of its client.

What is cheaper is so where it is certain alone: Groq's flex costs the usual. Anthropic's priority was paid for by
contract; OpenAI's is 1.7 to 2 times the usual. ``fast`` is Anthropic's fast mode.
"""


class _Lookup(NamedTuple):
    """What is known of a model's price: None where its name is not."""

    rate: Rate | None
    is_default: bool


_Resolver: TypeAlias = Callable[[ModelCall, "Rate | None", Decimal], Decimal]
"""What a call costs by its rate, its tokens multiplied by a factor."""


def _reported(call: ModelCall, _rate: Rate | None, _factor: Decimal) -> Decimal:
    return call.cost or _NOTHING


def _hidden(call: ModelCall, _rate: Rate | None, _factor: Decimal) -> Decimal:
    return call.hidden_cost or _NOTHING


def _response(call: ModelCall, rate: Rate | None, factor: Decimal) -> Decimal:
    """By everything that the answer reported; what we counted ourselves is for `_counted`."""
    if rate is None or call.estimated or not call.used_anything:
        return _NOTHING
    units = _NOTHING if rate.units is None else rate.units.cost_of(call.units)
    return EXACT.add(EXACT.add(units, _token_cost(call, rate, factor)), EXACT.multiply(rate.call, call.count))


def _counted(call: ModelCall, rate: Rate | None, factor: Decimal) -> Decimal:
    """By tokens alone, whoever counted them; never of images, whose tokens are none of a text's (S3.20)."""
    tokens = _NOTHING if rate is None or rate.is_media or call.is_media else _token_cost(call, rate, factor)
    if rate is None or not tokens:
        return _NOTHING
    if rate.units is not None and CITATIONS in rate.units.prices:
        tokens = EXACT.add(tokens, rate.units.cost_of({CITATIONS: call.units.get(CITATIONS, _NOTHING)}))
    return EXACT.fma(rate.call, call.count, tokens)


def _token_cost(call: ModelCall, rate: Rate, factor: Decimal) -> Decimal:
    return _NOTHING if rate.tokens is None else rate.tokens.cost_by(call, factor)


_NOTHING: Final = Decimal(0)

RESOLVERS: Final[Mapping[str, _Resolver]] = MappingProxyType(
    {"reported": _reported, "hidden": _hidden, "response": _response, "tokens": _counted}
)
"""
What may tell the cost of a call, in the order in which it is asked; the first that tells more than 0 counts (S3.20).

``reported``: what the provider says that it charges. ``hidden``: what a library says beside the answer. ``response``:
by what the answer reports. ``tokens``: by tokens that were counted, never of images.
"""


@dataclass(frozen=True, slots=True, eq=False)
class ModelPrices:
    """
    Prices by the names of models: see `model_prices`, which makes one.

    Attributes:
        version: Names the prices, on every event that is charged by them.
    """

    units_per_usd: Decimal
    own: Mapping[str, Rate]
    aliases: Aliases
    default: Rate | None
    published: bool
    factor: Decimal
    fee: Decimal
    order: tuple[str, ...]
    believed: Decimal
    web_search: Decimal
    services: Mapping[str, Decimal]
    version: str

    def pin(self, at: float, model: str | None = None, provider: str | None = None) -> PinnedPrices:
        """
        What counts for one metered call, whatever becomes of prices meanwhile.

        Args:
            at: Seconds since the epoch.
            model: What the request asks for: what its hold, and what it can afford, go by.
            provider: Whose.
        """
        return PinnedPrices(self, at, model, provider)

    def cost(self, usage: TokenUsage) -> Decimal:
        """Whole units that *usage* costs by the default: of which model, nobody said."""
        return self.pin(0.0).cost(usage)

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """How many tokens more fit, likewise."""
        return self.pin(0.0).affordable(kind, units, used)

    def lookup(self, model: str | None, provider: str | None, at: float) -> _Lookup:
        """What *model* costs at that time: by its own price, an alias, a published price, else by the default."""
        rate = None if model is None else self._found(model, provider, at)
        return _Lookup(self.default, is_default=True) if rate is None else _Lookup(rate, is_default=False)

    def _found(self, model: str, provider: str | None, at: float) -> Rate | None:
        for name, whose in self._names(model, provider):
            own = self._own(name, whose)
            if own is not None:
                return own
        if not self.published:
            return None
        for name, whose in self._names(model, provider):
            found = find_published(name, whose)
            if found is not None:
                return found.rate(at)
        return None

    def _names(self, model: str, provider: str | None) -> Iterator[tuple[str, str | None]]:
        """By what *model* may be known: as it is, by its alias, without its provider, without its date."""
        yield model, provider
        alias = self.aliases.of(model, provider)
        if alias is not None:
            yield from ((each, None) for each in candidates(alias))
        yield from ((each, provider) for each in candidates(model)[1:])

    def _own(self, name: str, provider: str | None) -> Rate | None:
        exact = self.own.get(name) or (None if provider is None else self.own.get(f"{provider}/{name}"))
        return exact or self.own.get(self.aliases.bare.get(name, ""))

    def to_units(self, usd: Decimal) -> Decimal:
        """USD as whole units, with the markup and without the fee, exactly."""
        return EXACT.multiply(EXACT.multiply(usd, self.factor), self.units_per_usd)


@dataclass(frozen=True, slots=True, eq=False)
class PinnedPrices:
    """
    `ModelPrices` as they stood when one metered call was admitted.

    Attributes:
        prices: Whose.
        at: When, in seconds since the epoch.
        model, provider: What the request asked for.
    """

    prices: ModelPrices
    at: float
    model: str | None = None
    provider: str | None = None

    @property
    def version(self) -> str:
        """Of the prices."""
        return self.prices.version

    @property
    def tokens(self) -> TokenPrice | None:
        """What the model that was asked for costs by its tokens, in USD; None where it has no such price."""
        return None if self._asked is None else self._asked.tokens

    @property
    def _asked(self) -> Rate | None:
        return self.prices.lookup(self.model, self.provider, self.at).rate

    @property
    def is_known(self) -> bool:
        """Whether the model that was asked for has a price by its name."""
        return not self.prices.lookup(self.model, self.provider, self.at).is_default

    def cost(self, usage: TokenUsage) -> Decimal:
        """Whole units that *usage*, of one call of the model that was asked for, costs, exactly."""
        return self.bill((ModelCall(usage, self.model, self.provider),)).amount

    def cost_at_most(
        self, usage: TokenUsage, slack: Decimal = _NOTHING, *, service: str | None = None, searches: int = 0
    ) -> Decimal:
        """The most that it may come to, as of `TokenPrice`; what is not priced by tokens as `cost`."""
        rate = self._asked
        if rate is None or rate.tokens is None:
            return self.cost(usage)
        tokens = EXACT.multiply(rate.tokens.cost_at_most(usage, slack), self.dearer(service))
        usd = EXACT.add(EXACT.add(tokens, rate.call), self._searching_usd(searches, rate))
        return EXACT.add(self.prices.to_units(usd), self.prices.fee)

    def searching(self, searches: Decimal | int) -> Decimal:
        """As of `TokenPrice`: by the price of the model that was asked for, else by that of all."""
        rate = self._asked
        return _NOTHING if rate is None else self.prices.to_units(self._searching_usd(searches, rate))

    def _searching_usd(self, searches: Decimal | int, rate: Rate) -> Decimal:
        found = ModelCall(units={WEB_SEARCHES: Decimal(searches)})
        usd = self._searching(found, rate)
        if rate.tokens is not None:
            usd = EXACT.add(usd, rate.tokens.searching(searches))
        return usd if rate.units is None else EXACT.add(usd, rate.units.cost_of(found.units))

    def dearer(self, service: str | None) -> Decimal:
        """As of `TokenPrice`: by its own factors where it has one for that tier, else by those of all."""
        if service is None:
            return _ONE
        rate = self._asked
        own = {} if rate is None or rate.tokens is None else dict(rate.tokens.services)
        return dearest_of({**self.prices.services, **own}, service, self.provider)

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """How many tokens more of the model that was asked for fit in *units* after *used*; never negative."""
        prices, rate = self.prices, self._asked
        scale = EXACT.multiply(prices.factor, prices.units_per_usd)
        call = _NOTHING if rate is None else prices.to_units(rate.call)
        left = EXACT.subtract(EXACT.subtract(units, prices.fee), call)
        if left < 0:
            return 0
        if rate is None or rate.tokens is None or not scale:
            return MAX_AFFORDABLE
        return rate.tokens.affordable(kind, FLOOR.divide(left, scale), used)

    def bill(self, calls: tuple[ModelCall, ...], context: object = None) -> Costing:
        """
        What all *calls* cost: each at its own price, the sum converted, and the fee once (S3.22, S3.27).

        An answer that names no model (Cohere's, Bedrock's) was given by the one that the request asked for.
        """
        prices = self.prices
        costed = tuple([self._costed(self._named(call)) for call in calls])
        amount = prices.to_units(summed(costed))
        if any(call.used_anything for call in calls):
            amount = EXACT.add(amount, prices.fee)
        flags = tuple(dict.fromkeys(flag for each in costed for flag in each.flags))
        return Costing(amount, costed, prices.version, flags)

    def kind_of(self, call: ModelCall) -> Hashable:
        """As of `TokenPrice`; and a cost that nobody believes makes no other one doubtful, nor larger."""
        rate = self.prices.lookup(call.model or self.model, call.provider, self.at).rate
        tier = None if rate is None or rate.tokens is None else rate.tokens.kind_of(call)
        costs = tuple([_sort_of(cost, self.prices.believed) for cost in (call.cost, call.hidden_cost)])
        alone = self._costed(self._named(call))
        return tier, call.used_anything, alone.how, "cost_refused" in alone.flags, *costs

    def _named(self, call: ModelCall) -> ModelCall:
        return call if call.model else replace(call, model=self.model)

    def _factor(self, call: ModelCall, rate: Rate | None) -> tuple[Decimal, bool]:
        """By what its tokens are multiplied in its service tier, and whether that is known."""
        own = None if rate is None or rate.tokens is None else rate.tokens.factor(call.service, call.provider)
        factor = factor_of(self.prices.services, call.service, call.provider) if own is None else own
        return (_ONE, call.service is None) if factor is None else (factor, True)

    def _searching(self, call: ModelCall, rate: Rate | None, *, is_counted: bool = False) -> Decimal:
        """What searches of the web cost where the model's own price does not say, or does not for what was counted."""
        count = call.units.get(WEB_SEARCHES)
        if not count or rate is None or rate.call:
            # A price for each request has its searches in it.
            return _NOTHING
        if rate.units is not None and WEB_SEARCHES in rate.units.prices:
            return rate.units.cost_of({WEB_SEARCHES: count}) if is_counted else _NOTHING
        priced = rate.tokens is not None and rate.tokens.web_search is not None
        return _NOTHING if priced else EXACT.multiply(self.prices.web_search, count)

    def _costed(self, call: ModelCall) -> CostedCall:
        prices, flags = self.prices, list[Flag]()
        found: _Lookup | None = None
        for name in prices.order:
            if name in ("response", "tokens") and found is None:
                found = prices.lookup(call.model, call.provider, self.at)
                if found.is_default and call.used_anything:
                    flags.append("unknown_model")
            by_price = name in ("response", "tokens")
            rate = None if found is None else found.rate
            factor, is_served = self._factor(call, rate)
            cost = RESOLVERS[name](call, rate, factor)
            if by_price and not (call.estimated and name == "response"):
                # Behind the tokens that they come with: what we counted is told by "tokens".
                cost = EXACT.add(cost, self._searching(call, rate, is_counted=name == "tokens"))
            if not cost.is_finite() or not 0 <= cost <= prices.believed * call.count:
                flags.append("cost_refused")
                continue
            if cost:
                if found is not None and found.is_default:
                    flags.append("default_price")
                if by_price and _is_guess(rate, call.usage):
                    flags.append("dearest_kind")
                if by_price and _lacks_citations(rate, call):
                    flags.append("unpriced_citations")
                if by_price and not is_served:
                    flags.append("unknown_service")
                return CostedCall(call, cost, name, tuple(flags))
        if self._is_unresolved(call, found, flags):
            flags.append("cost_unresolved")
        return CostedCall(call, _NOTHING, "", tuple(dict.fromkeys(flags)))

    def _is_unresolved(self, call: ModelCall, found: _Lookup | None, flags: Sequence[Flag]) -> bool:
        """Whether nothing told a cost that there should be; a model whose price is 0 has told it."""
        if not call.used_anything:
            return False
        rate = None if found is None else found.rate
        if flags or rate is None or rate.is_media or (call.is_media and call.estimated):
            return True
        if call.units and (rate.units is None or not rate.units.prices.keys() >= call.units.keys()):
            return True
        return rate.tokens is None and not call.units


def _is_guess(rate: Rate | None, usage: TokenUsage) -> bool:
    return rate is not None and rate.tokens is not None and rate.tokens.is_guess(usage)


def _lacks_citations(rate: Rate | None, call: ModelCall) -> bool:
    """Whether what it cites is counted apart and has no price; one for each request has it in it."""
    if rate is None or rate.call or not call.units.get(CITATIONS):
        return False
    return rate.units is None or CITATIONS not in rate.units.prices


def _sort_of(cost: Decimal | None, believed: Decimal) -> int:
    """0 for no cost, 1 for one that is believed, 2 for another one."""
    if not cost:
        return 0
    return 1 if cost.is_finite() and 0 < cost <= believed else 2


def model_prices(
    own: Mapping[str, OwnPrice] | None = None,
    *,
    units_per_usd: Amount,
    default: OwnPrice | None = None,
    aliases: Mapping[str, str] | Callable[[str, str | None], str | None] | None = None,
    markup: Amount = 1,
    fee: Amount = 0,
    published: bool = True,
    order: Sequence[str] = tuple(RESOLVERS),
    believed_usd: Amount = BELIEVED_USD,
    web_search: Amount = WEB_SEARCH_USD,
    services: Mapping[str, Amount] | None = None,
    version: str | None = None,
) -> ModelPrices:
    """
    Price calls by the model that answered: ``model_prices(units_per_usd=100, markup="1.2", default=DEAREST)``.

    What the provider says that it charged counts first (OpenRouter, xAI, LiteLLM), then its price by name, which comes
    with the package ``genai-prices`` (extra ``prices``) as data: the network is never asked, and newer prices come with
    a newer version of that package. Each call of a model behind one metered call is priced by itself, at the prices of
    the moment when the metered call was admitted, in the tier of its own input. The sum is multiplied by *markup* and
    *units_per_usd*, *fee* is added once, and the result is rounded once, half up, to the unit's smallest part.

    Args:
        own: USD by name of a model, before the published ones: a `TokenPrice`, a `UnitPrice`, an amount for each call,
            or a list of these that are added. ``"provider/model"`` also stands for the bare name (S3.27).
        units_per_usd: How many whole units one USD is.
        default: The same for models that are known by no name; an answer that names none is of the model that the
            request asked for. Without one such a call costs nothing but the fee, which the log, the metric
            ``metering.costs.doubtful`` and the event tell; so name a dear one.
        aliases: Other names of models: a mapping, or a function of a model's name and its provider's (None where that
            is not known) that answers another name, or None. Exact names win; then aliases; then names without the
            provider before a slash, and without the date at their end.
        markup: What the sum is multiplied by, such as ``"1.2"``.
        fee: Whole units that are added to each metered call that used a model.
        published: Whether published prices count; False needs no extra.
        order: What tells the cost, first come first served: see `RESOLVERS`. Leave out ``"reported"`` to charge by
            prices alone.
        believed_usd: The most that one call of a model may cost; more is refused, with an alarm (S3.21).
        web_search: USD of a search that the provider made for an answer, where the model's price does not say.
        services: By what the price of tokens is multiplied in a service tier, on top of `SERVICES`: ``{"flex": 1}``,
            ``{"openai/priority": "1.75"}`` for one provider alone. One that is in neither costs the usual, which the
            event tells.
        version: Names these prices on events; made of all of them by default, so that it changes with any.

    Raises:
        AmountError: An amount that is none, a float for instance.
        ConfigurationError: Another argument that cannot work.
        MissingExtraError: The extra ``prices`` is not installed.

    Loads the published prices at once, which takes a quarter of a second.
    """
    unknown = [name for name in order if name not in RESOLVERS]
    if unknown or not order or len(set(order)) < len(order):
        raise ConfigurationError(
            f"order={order!r} is no order of {', '.join(map(repr, RESOLVERS))}. Name some of them."
        )
    rates = {_model(name): _own_rate(price, f"price of {name!r}") for name, price in (own or {}).items()}
    if published:
        load_published()
    amounts = {
        "units_per_usd": exact_amount(units_per_usd, "units_per_usd"),
        "markup": exact_amount(markup, "markup"),
        "fee": exact_amount(fee, "fee"),
        "believed_usd": exact_amount(believed_usd, "believed_usd"),
        "web_search": exact_amount(web_search, "web_search"),
    }
    factors = {**SERVICES, **read_factors(services or {})}
    if not amounts["units_per_usd"]:
        raise AmountError("units_per_usd=0 would make every call free. Write how many units one USD is.")
    fallback = None if default is None else _own_rate(default, "default price")
    told = aliases if isinstance(aliases, Mapping) else ""
    made = f"{rates!r} {fallback!r} {amounts!r} {factors!r} {tuple(order)!r} {told!r}"
    named = version or f"{published_version()}+" * published + hashlib.sha256(made.encode()).hexdigest()[:12]
    return ModelPrices(
        amounts["units_per_usd"],
        MappingProxyType(rates),
        Aliases.of_names(rates, aliases),
        fallback,
        published,
        amounts["markup"],
        amounts["fee"],
        tuple(order),
        amounts["believed_usd"],
        amounts["web_search"],
        MappingProxyType(factors),
        named,
    )


def _model(name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"The model {name!r} has no name. Use the one that its provider reports.")
    return name


def _own_rate(price: Any, what: str) -> Rate:
    """What the user wrote for one model; raises as `exact_amount`."""
    several = list(price) if isinstance(price, list | tuple) else [price]
    tokens: TokenPrice | None = None
    units: UnitPrice | None = None
    call = _NOTHING
    for each in several:
        if isinstance(each, TokenPrice) and tokens is None:
            tokens = each
        elif isinstance(each, UnitPrice) and units is None:
            units = each
        elif isinstance(each, FixedPrice):
            call = EXACT.add(call, each.amount)
        elif isinstance(each, TokenPrice | UnitPrice) or callable(each):
            raise ConfigurationError(f"The {what} has {each!r}. Use an amount, one TokenPrice and one UnitPrice.")
        else:
            call = EXACT.add(call, exact_amount(each, what))
    return Rate(tokens, units, call)
