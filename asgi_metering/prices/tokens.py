"""
Prices of tokens: by kind, and in tiers by the length of the context.

Exact arithmetic in whole units. Knows no model by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict, Unpack

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices.costing import SECONDS, WEB_SEARCHES, Costing, ModelCall, plain_costing
from asgi_metering.prices.values import EXACT, MAX_AFFORDABLE, capped
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.values import MAX_TOKENS

__all__ = ["KINDS", "TokenPrice", "TokenTier", "above", "per_million_tokens", "per_token"]

KINDS = (
    "input",
    "output",
    "cached",
    "cache_write",
    "reasoning",
    "audio_input",
    "audio_output",
    "image_input",
    "image_output",
    "cache_write_1h",
)
"""Kinds of tokens that have prices of their own."""

FOR_AN_HOUR = Decimal("1.6")
"""
What is written to a cache for an hour costs so many times what is written for minutes, where nobody says: Anthropic's
2 times the input against 1.25 times.
"""

NO_SLACK = Decimal(0)

# What a kind costs that has no price of its own.
_WHOLE = dict.fromkeys(("cached", "cache_write", "audio_input", "image_input"), "input")

AFFORDABLE = {
    "input": ("input", "cached", "cache_write", "audio_input", "image_input"),
    "output": ("output", "reasoning", "audio_output", "image_output"),
    "reasoning": ("output", "reasoning"),
}
"""What can be afforded token by token, and what such a token may become."""


class _Rates(NamedTuple):
    """Whole units for each kind, none of them missing."""

    input: Decimal
    output: Decimal
    cached: Decimal
    cache_write: Decimal
    reasoning: Decimal
    audio_input: Decimal
    audio_output: Decimal
    image_input: Decimal
    image_output: Decimal
    cache_write_1h: Decimal

    def dearest(self, kind: str) -> Decimal:
        rates: dict[str, Decimal] = self._asdict()
        return max(rates[each] for each in AFFORDABLE[kind])

    def dearest_input(self, *, hour: bool) -> Decimal:
        dearest = self.dearest("input")
        return max(dearest, self.cache_write_1h) if hour else dearest


class _Band(NamedTuple):
    """The rates of requests with so many input tokens, both included."""

    least: int
    most: int
    rates: _Rates


@dataclass(frozen=True, slots=True)
class TokenTier:
    """
    Other prices for requests whose context is long: for all of their tokens, not only those beyond.

    Args:
        above: Input tokens of one request, cached ones included, of which it has more.
        input, output, cached, cache_write, reasoning, audio_input, audio_output, image_input, image_output,
            cache_write_1h: As of `TokenPrice`; what is not given is as without the tier.
    """

    above: int
    input: Decimal | None = None
    output: Decimal | None = None
    cached: Decimal | None = None
    cache_write: Decimal | None = None
    reasoning: Decimal | None = None
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    image_input: Decimal | None = None
    image_output: Decimal | None = None
    cache_write_1h: Decimal | None = None


@dataclass(frozen=True, slots=True)
class TokenPrice:
    """
    A price per token, by kind.

    Args:
        input, output: Whole units for *per* tokens.
        cached, cache_write: For the parts of the input read from or written to a cache; the input's price by default.
        reasoning: For the part of the output spent on reasoning; the output's price by default.
        per: How many tokens a price is for.
        audio_input, audio_output: For spoken tokens of either direction; the price of its direction by default.
        tiers: Other prices for long contexts, the shortest first.
        image_input, image_output: For tokens of images and films; the price of its direction by default.
        cache_write_1h: For what is written to a cache for an hour; by default `FOR_AN_HOUR` times *cache_write*, and
            the input's price where that has none.
        web_search: Whole units for each search that the provider made for an answer; nothing by default.
        services: By what the price of tokens is multiplied, for each service tier: ``(("flex", Decimal("0.5")),)``.

    Parts are inside their whole (S2.43): a cached token is priced as cached and not also as input. What was not
    reported counts as none; whether a report is complete enough to charge on is for the caller to say. Audio tokens
    whose direction was not told are taken for input as far as there is any that is neither read from a cache nor
    written to one, and for output beyond; where only one direction has a price, for that one. Where images have a
    price, output of which nobody says what is an image costs the dearer of both, so that none is too cheap.

    Raises:
        ConfigurationError: Tiers that do not rise.
    """

    input: Decimal
    output: Decimal
    cached: Decimal | None = None
    cache_write: Decimal | None = None
    reasoning: Decimal | None = None
    per: int = 1
    audio_input: Decimal | None = None
    audio_output: Decimal | None = None
    tiers: tuple[TokenTier, ...] = ()
    image_input: Decimal | None = None
    image_output: Decimal | None = None
    cache_write_1h: Decimal | None = None
    web_search: Decimal | None = None
    services: tuple[tuple[str, Decimal], ...] = ()
    _bands: tuple[_Band, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        starts = [0, *(tier.above for tier in self.tiers)]
        if any(type(start) is not int or start < 0 for start in starts) or any(a >= b for a, b in pairwise(starts)):
            raise ConfigurationError(
                f"Tiers above {', '.join(map(repr, starts[1:]))} input tokens do not rise from above 0. Sort them."
            )
        rates = [_rates(self, None), *(_rates(self, tier) for tier in self.tiers)]
        least = [0, *(start + 1 for start in starts[1:])]
        most = [*starts[1:], MAX_TOKENS]
        object.__setattr__(self, "_bands", tuple(map(_Band, least, most, rates)))

    def cost(self, usage: TokenUsage) -> Decimal:
        """Whole units that *usage*, of one request, costs, exactly."""
        return self._priced(usage, self._at(usage.input or 0))

    def bill(self, calls: tuple[ModelCall, ...], context: object = None) -> Costing:
        """
        What all *calls* cost, each in the tier of its own input: see `BilledPrice`.

        Voices that are counted by seconds alone have no price here, which is told as ``cost_unresolved``.
        """
        costing = plain_costing(calls, self.cost_of)
        if any(each.units.get(SECONDS) and not each.usage.total for each in calls):
            return replace(costing, flags=("cost_unresolved",))
        return costing

    def cost_of(self, call: ModelCall) -> Decimal:
        """Whole units that one call of a model costs, or the sum of several of one kind, exactly."""
        factor = self.factor(call.service, call.provider)
        return self.cost_by(call, ONE if factor is None else factor)

    def cost_by(self, call: ModelCall, factor: Decimal) -> Decimal:
        """The same with its tokens at *factor* times their price."""
        tokens = self._priced(call.usage, self._at(call.context))
        tokens = tokens if factor == 1 else EXACT.multiply(tokens, factor)
        searches = call.units.get(WEB_SEARCHES) if self.web_search is not None else None
        return tokens if not searches else EXACT.fma(self.web_search, searches, tokens)  # type: ignore[arg-type]

    def factor(self, service: str | None, provider: str | None = None) -> Decimal | None:
        """By what tokens are multiplied in that service tier: by ``"openai/flex"``, else ``"flex"``; None: unknown."""
        return factor_of(dict(self.services), service, provider) if self.services else None

    def dearer(self, service: str | None) -> Decimal:
        """By what a request multiplies its tokens that asks for *service*; a cheaper one may be refused: no relief."""
        return dearest_of(dict(self.services), service, None) if self.services else ONE

    def kind_of(self, call: ModelCall) -> tuple[int, bool, bool]:
        """Tell calls apart whose sum costs something else than they do: by tier, and by what is told of their parts."""
        usage = call.usage
        tier = sum(1 for band in self._bands if band.least <= call.context)
        return tier, usage.audio is not None and usage.audio_output is None, self.is_guess(usage)

    def is_guess(self, usage: TokenUsage) -> bool:
        """Whether images of the output have a price, and nobody said what of it is one, so that the dearer counts."""
        return self.image_output is not None and usage.image_output is None and bool(usage.output)

    def cost_at_most(
        self, usage: TokenUsage, slack: Decimal = NO_SLACK, *, service: str | None = None, searches: int = 0
    ) -> Decimal:
        """
        The most that an expected *usage* may come to, exactly: for holds.

        Its output may all be spent on reasoning.

        Args:
            usage: As expected.
            slack: By what part the real input may be longer, so that a tier is reached; it stays as many tokens.
            service: The service tier that the request asks for; a cheaper one may be refused, and is no relief.
            searches: How many searches of the web it may make.
        """
        tokens = EXACT.multiply(self._most(usage, slack), self.dearer(service))
        return EXACT.add(tokens, self.searching(searches))

    def searching(self, searches: Decimal | int) -> Decimal:
        """Whole units that so many searches of the web cost, beside the tokens of their answer."""
        return EXACT.multiply(self.web_search or 0, searches)

    def _most(self, usage: TokenUsage, slack: Decimal) -> Decimal:
        reach = int(EXACT.multiply(usage.input or 0, 1 + slack))
        thinking = replace(usage, reasoning=usage.output)
        rates = [band.rates for band in self._bands if band.least <= reach]
        return max(self._priced(each, rate) for each in (usage, thinking) for rate in rates)

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        """
        How many more ``"input"``, ``"output"`` or ``"reasoning"`` tokens fit in *units* after *used*; never negative.

        Each counts at the dearest that it may become: an output token as reasoning, an input token as a cache write,
        for an hour where that has a price of its own. More input may reach a tier, in which everything costs what it
        costs there.
        """
        if kind not in AFFORDABLE:
            known = ", ".join(map(repr, sorted(AFFORDABLE.keys() - {"input", "output"})))
            raise ConfigurationError(
                f"Tokens of kind {kind!r} cannot be afforded one by one. Use 'input' or 'output', or {known}."
            )
        before = used.input or 0
        if kind != "input":
            rates = self._at(before)
            return _fitting(EXACT.subtract(units, self._priced(used, rates)), rates.dearest(kind), self.per)
        fits, hour = 0, self.cache_write_1h is not None
        for band in self._bands:
            if band.most < before:
                continue
            left = EXACT.subtract(units, self._priced(used, band.rates))
            least = max(0, band.least - before)
            most = min(band.most - before, _fitting(left, band.rates.dearest_input(hour=hour), self.per))
            if most < least or left <= 0:
                break
            fits = most
        return min(fits, MAX_AFFORDABLE)

    def _at(self, context: int) -> _Rates:
        bands = self._bands
        if len(bands) == 1:
            return bands[0].rates
        return next(band.rates for band in reversed(bands) if band.least <= context)

    def _priced(self, usage: TokenUsage, rates: _Rates) -> Decimal:
        read, saved = usage.cached or 0, usage.cache_write or 0
        thought = usage.reasoning or 0
        plain_input = max(0, (usage.input or 0) - read - saved)
        plain_output = max(0, (usage.output or 0) - thought)
        heard, spoken = self._audio(usage, plain_input, plain_output)
        long = min(usage.cache_write_1h or 0, saved)
        seen = min(usage.image_input or 0, plain_input - heard)
        drawn = plain_output - spoken
        if usage.image_output is not None:
            drawn = min(usage.image_output, drawn)
        elif rates.image_output <= rates.output:
            drawn = 0
        total = Decimal(0)
        for price, tokens in (
            (rates.input, plain_input - heard - seen),
            (rates.output, plain_output - spoken - drawn),
            (rates.image_input, seen),
            (rates.image_output, drawn),
            (rates.cached, read),
            (rates.cache_write, saved - long),
            (rates.cache_write_1h, long),
            (rates.reasoning, thought),
            (rates.audio_input, heard),
            (rates.audio_output, spoken),
        ):
            if tokens:
                total = EXACT.fma(price, tokens, total)
        return EXACT.divide(total, self.per)

    def _audio(self, usage: TokenUsage, given: int, written: int) -> tuple[int, int]:
        """How many audio tokens came in and went out, as far as that matters to the price."""
        audio = usage.audio or 0
        if not audio:
            return 0, 0
        if usage.audio_output is not None:
            return min(max(0, audio - usage.audio_output), given), min(usage.audio_output, written)
        heard = min(audio, given) if self.audio_input is not None else 0
        spoken = min(audio - heard, written) if self.audio_output is not None else 0
        return heard, spoken


def _fitting(left: Decimal, price: Decimal, per: int) -> int:
    return capped(left, price, per) if left > 0 else 0


def _rates(price: TokenPrice, tier: TokenTier | None) -> _Rates:
    found: dict[str, Any] = {}
    for kind in KINDS:
        own = None if tier is None else getattr(tier, kind)
        found[kind] = getattr(price, kind) if own is None else own
    if found["cache_write_1h"] is None:
        own = found["cache_write"]
        found["cache_write_1h"] = found["input"] if own is None else EXACT.multiply(own, FOR_AN_HOUR)
    return _Rates(*(found[_WHOLE.get(kind, "output")] if rate is None else rate for kind, rate in found.items()))


class TokenPrices(TypedDict, total=False):
    """Whole units by kind of token, as `TokenPrice` says."""

    input: Amount
    output: Amount
    cached: Amount | None
    cache_write: Amount | None
    reasoning: Amount | None
    audio_input: Amount | None
    audio_output: Amount | None
    image_input: Amount | None
    image_output: Amount | None
    cache_write_1h: Amount | None


_TOLD = {
    "input": "input price",
    "output": "output price",
    "cached": "price of cached input",
    "cache_write": "price of cache writes",
    "reasoning": "reasoning price",
    "audio_input": "price of audio input",
    "audio_output": "price of audio output",
    "image_input": "price of image input",
    "image_output": "price of image output",
    "cache_write_1h": "price of cache writes for an hour",
}


def _read(prices: TokenPrices) -> dict[str, Decimal | None]:
    unknown = [name for name in prices if name not in _TOLD]
    if unknown:
        raise ConfigurationError(f"There is no kind of token {unknown[0]!r}. Use {', '.join(map(repr, _TOLD))}.")
    whole = {"input": 0, "output": 0}
    return {
        kind: None if amount is None and kind not in whole else exact_amount(amount, _TOLD[kind])  # type: ignore[arg-type]
        for kind, amount in prices.items()
    }


ONE = Decimal(1)


def factor_of(factors: Mapping[str, Decimal], service: str | None, provider: str | None) -> Decimal | None:
    """By what tokens are multiplied in *service*, of *provider* or of anybody; None where neither is there."""
    if service is None:
        return None
    own = factors.get(f"{provider}/{service}")
    return factors.get(service) if own is None else own


def dearest_of(factors: Mapping[str, Decimal], service: str | None, provider: str | None) -> Decimal:
    """The same for a request, of no less than 1; where nobody knows its provider that of the dearest."""
    if provider is not None:
        return max(ONE, factor_of(factors, service, provider) or ONE)
    return max([ONE, *(each for name, each in factors.items() if name.rpartition("/")[2] == service)])


def read_factors(services: Mapping[str, Amount]) -> dict[str, Decimal]:
    """
    Check factors by service tiers.

    Raises:
        AmountError: One that is no amount.
        ConfigurationError: A tier without a name.
    """
    if not isinstance(services, Mapping) or not all(isinstance(name, str) and name for name in services):
        raise ConfigurationError(f"services={services!r} are no factors by tiers. Pass {{'flex': '0.5'}}, say.")
    return {name.lower(): exact_amount(factor, f"factor of {name!r}") for name, factor in services.items()}


def above(tokens: int, **prices: Unpack[TokenPrices]) -> TokenTier:
    """
    Other prices for requests with more than *tokens* of input: ``above(200_000, input=6, output="22.5")``.

    Kinds that are not given cost what they cost without it. Floats are refused.

    Raises:
        AmountError: A price that is no amount.
        ConfigurationError: No such kind.
    """
    return TokenTier(tokens, **_read(prices))


def _token_price(
    per: int,
    tiers: Sequence[TokenTier],
    web_search: Amount | None,
    services: Mapping[str, Amount] | None,
    prices: TokenPrices,
) -> TokenPrice:
    if not (prices or tiers or web_search is not None):
        raise ConfigurationError(
            "A price of tokens prices nothing. Name a kind: per_million_tokens(input=3, output=15), say. 0 is free."
        )
    read = {"input": Decimal(0), "output": Decimal(0), **_read(prices)}
    for tier in tiers:
        if not isinstance(tier, TokenTier):
            raise ConfigurationError(f"The tier {tier!r} is none. Write above(200_000, input=6, output='22.5'), say.")
    search = None if web_search is None else exact_amount(web_search, "price of a search")
    factors = tuple(read_factors(services or {}).items())
    return TokenPrice(**read, per=per, tiers=tuple(tiers), web_search=search, services=factors)  # type: ignore[arg-type]


def per_million_tokens(
    *,
    tiers: Sequence[TokenTier] = (),
    web_search: Amount | None = None,
    services: Mapping[str, Amount] | None = None,
    **prices: Unpack[TokenPrices],
) -> TokenPrice:
    """
    Price tokens by the million, in whole units: the way providers print their lists. Floats are refused.

    ``per_million_tokens(input=3, output=15, cached="0.3", tiers=[above(200_000, input=6, output="22.5")])``. Kinds
    are those of `TokenPrice`; each call of a model has the tier of its own input. ``web_search`` is for each search
    that the provider made, ``services={"flex": "0.5", "openai/priority": 2}`` multiplies tokens of a service tier; what
    is in none of them costs the usual.

    Raises:
        AmountError: A price that is no amount.
        ConfigurationError: No kind, none of that name, or tiers that do not rise.
    """
    return _token_price(1_000_000, tiers, web_search, services, prices)


def per_token(
    *,
    tiers: Sequence[TokenTier] = (),
    web_search: Amount | None = None,
    services: Mapping[str, Amount] | None = None,
    **prices: Unpack[TokenPrices],
) -> TokenPrice:
    """Price single tokens, in whole units; else as `per_million_tokens`."""
    return _token_price(1, tiers, web_search, services, prices)
