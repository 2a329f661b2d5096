"""
Ready-made holds: what a request of one dialect may cost at most, or what a line usually does.

Each answers a function for ``billable(hold=...)``, `up_to` or `slices`. Decides nothing of what is charged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from decimal import ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Any, Final

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.arguments import From
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.estimates.bodies import (
    DEFAULT_OUTPUT_TOKENS,
    asked_searches,
    asked_service,
    body_of,
    estimate_body,
)
from asgi_metering.prices import FixedPrice, MeasuredPrice
from asgi_metering.prices.values import EXACT
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = [
    "anthropic_messages",
    "by_line",
    "embeddings",
    "flat",
    "flat_tokens",
    "gemini",
    "openai_chat",
    "openai_responses",
]

SLACK: Final = Decimal("0.25")
"""
By how much a prompt may be longer than our tokenizer says before it counts as a long context.

Other families' tokenizers make 10 to 30 % more of the same text; a hold that misses its tier is half of what it costs.
"""

GEMINI_OUTPUT: Final = 8_192
"""What Gemini writes at most where a request does not say, thinking apart."""

Estimate = Callable[..., Awaitable[Decimal]]
"""What these answer: a hold in whole units, from the call and the endpoint's arguments."""


def openai_chat(
    price: MeasuredPrice | None = None,
    *,
    default_output: int = DEFAULT_OUTPUT_TOKENS,
    slack: Amount = SLACK,
    scale: Amount = 1,
) -> Estimate:
    """
    Hold what a request to OpenAI's chat completions may cost at most: ``hold=openai_chat()``.

    Messages, tools and schemas are counted, images by their documented formula, and the output's bound is taken (the
    larger of ``max_completion_tokens`` and ``max_tokens``) for each of its ``n`` answers; all at the dearest tier that
    is within reach, and the output as if it were all reasoning. A dearer ``service_tier`` that the request asks for
    counts, and searches of the web that it allows.

    Args:
        price: What tokens cost; the route's own by default, of the model that the request names.
        default_output: Output tokens of a request that names no bound, or where no request is found.
        slack: By what part a prompt may turn out longer, and so reach a tier.
        scale: What part of all this is held, once it is known what calls use: what ``asgi-metering routes --store``
            suggests. A call that needs more is charged in full all the same.

    Raises:
        AmountError: *slack* or *scale* is no amount.
    """
    return _of_body(price, default_output, slack, scale)


def openai_responses(
    price: MeasuredPrice | None = None,
    *,
    default_output: int = DEFAULT_OUTPUT_TOKENS,
    slack: Amount = SLACK,
    scale: Amount = 1,
) -> Estimate:
    """The same for OpenAI's Responses: ``input``, ``instructions``, ``tools``, ``max_output_tokens``."""
    return _of_body(price, default_output, slack, scale)


def anthropic_messages(
    price: MeasuredPrice | None = None,
    *,
    default_output: int = DEFAULT_OUTPUT_TOKENS,
    slack: Amount = SLACK,
    scale: Amount = 1,
) -> Estimate:
    """
    The same for Anthropic's Messages, whose ``max_tokens`` also bounds thinking.

    A request with ``cache_control`` is held for as if all that it brings were written to the cache.
    """
    return _of_body(price, default_output, slack, scale)


def gemini(
    price: MeasuredPrice | None = None, *, default_output: int = GEMINI_OUTPUT, slack: Amount = SLACK, scale: Amount = 1
) -> Estimate:
    """The same for Gemini's ``generateContent``: ``contents``, ``systemInstruction``, ``generationConfig``."""
    return _of_body(price, default_output, slack, scale)


def embeddings(price: MeasuredPrice | None = None, *, slack: Amount = SLACK, scale: Amount = 1) -> Estimate:
    """The same for embeddings, which have no output: text, a list of texts, or token ids."""
    return _of_body(price, 0, slack, scale, has_output=False)


def _of_body(
    price: MeasuredPrice | None, default_output: int, slack: Amount, scale: Amount, *, has_output: bool = True
) -> Estimate:
    margin, factor = exact_amount(slack, "slack"), exact_amount(scale, "scale")
    if type(default_output) is not int or default_output < 0:
        raise ConfigurationError(f"default_output={default_output!r} is not an int from 0 up.")

    async def estimated(call: Call, **arguments: Any) -> Decimal:
        body = await body_of(arguments)
        found = (
            TokenUsage(input=0, output=default_output)
            if body is None
            else await estimate_body(body, default_output, at_most=True)
        )
        expected = found if has_output else TokenUsage(input=found.input, output=0)
        service = None if body is None else asked_service(body)
        searches = 0 if body is None else asked_searches(body)
        return EXACT.multiply(factor, _at_most(_measured(price, call), expected, margin, service, searches))

    return estimated


def _measured(price: MeasuredPrice | None, call: Call) -> MeasuredPrice:
    own = call.price if price is None else price
    if own is None or isinstance(own, FixedPrice):
        raise ConfigurationError("The route has no price of tokens to estimate by. Pass one: openai_chat(price), say.")
    return own


def _at_most(price: MeasuredPrice, expected: TokenUsage, slack: Decimal, service: str | None, searches: int) -> Decimal:
    most = getattr(price, "cost_at_most", None)
    # Whatever else has such a method need not know of these.
    asked = {"service": service, "searches": searches} if service is not None or searches else {}
    cost: Decimal = price.cost(expected) if most is None else most(expected, slack, **asked)
    return cost


DEFAULT_TOKENS: Final = 8_000
"""Tokens of a call of which nobody says how many it takes (S3.18)."""


def flat_tokens(
    tokens: int | Callable[..., Any] | None = None,
    *,
    floor: Amount,
    ceiling: Amount,
    price: MeasuredPrice | None = None,
    default_tokens: int = DEFAULT_TOKENS,
) -> Estimate:
    """
    Hold so many tokens at the price of input and output together, between bounds (S3.18).

    Args:
        tokens: How many, or a sync or async callable of the endpoint's arguments that tells; None, 0 or less is
            *default_tokens*.
        floor: Whole units at least; also for a model without a price, or a free one.
        ceiling: Whole units at most.
        price: What tokens cost; the route's own by default, of the model that the request names.
        default_tokens: Tokens where nobody says.

    Raises:
        AmountError: A bound that is no amount.
        ConfigurationError: Bounds that cross, or a callable that takes parameters by position.
    """
    least, most = exact_amount(floor, "floor"), exact_amount(ceiling, "ceiling")
    if least > most:
        raise ConfigurationError(f"floor={floor!r} is above ceiling={ceiling!r}. Turn them round.")
    asked = From(tokens, "tokens of a hold") if callable(tokens) else None

    async def estimated(call: Call, **arguments: Any) -> Decimal:
        told = tokens if asked is None else await asked.compute(call, arguments)
        count = told if type(told) is int and told > 0 else default_tokens
        cost = _measured(price, call).cost(TokenUsage(input=count, output=count))
        return min(most, max(least, cost))

    return estimated


def flat(value: Amount | Callable[..., Any]) -> Estimate:
    """
    Hold exactly so much, rounded down, and the unit's smallest part at least: 0 and less are that as well (S3.17).

    Args:
        value: Whole units, or a sync or async callable of the endpoint's arguments that answers them.

    Raises:
        ConfigurationError: A callable that takes parameters by position.
    """
    asked = From(value, "hold") if callable(value) else None

    async def held(call: Call, **arguments: Any) -> Decimal:
        told = value if asked is None else await asked.compute(call, arguments)
        smallest = call.unit.whole(1)
        try:
            exact = Decimal(told) if isinstance(told, int | str | Decimal) and told is not True else None
        except (ArithmeticError, TypeError, ValueError):
            exact = None
        if exact is None or not exact.is_finite():
            raise AmountError(f"The hold {told!r:.60} is no amount. Answer an int, a Decimal or a str.")
        return max(smallest, exact.quantize(smallest, ROUND_FLOOR)) if exact > smallest else smallest

    return held


def by_line(amounts: Mapping[str, Amount], *, otherwise: Amount | None = None) -> Estimate:
    """
    Hold what calls of a billing line usually cost: ``by_line({"image": "0.05", "podcast": "0.2"})`` (S3.19).

    Args:
        amounts: Whole units by line.
        otherwise: For other lines; without it such a call raises `ConfigurationError`.

    Raises:
        AmountError: One that is no amount.
    """
    known = {line: exact_amount(amount, f"hold of {line!r}") for line, amount in amounts.items()}
    rest = None if otherwise is None else exact_amount(otherwise, "hold of other lines")

    async def held(call: Call) -> Decimal:
        amount = known.get(call.line, rest)
        if amount is None:
            raise ConfigurationError(
                f"by_line() knows no hold for the line {call.line!r}. Add it, or say what is held otherwise."
            )
        return amount

    return held
