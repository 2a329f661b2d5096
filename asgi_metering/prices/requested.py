"""
Prices that the request itself tells: so many images of a size, so many characters to speak.

Reads mappings, and objects with such attributes. Never looks at an answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.errors import ConfigurationError, UsageError
from asgi_metering.prices.values import EXACT

__all__ = ["per_image", "per_million_characters"]

MAX_IMAGES = 1_000
"""Images of one request that are believed: providers make ten or so."""

MAX_CHARACTERS = 10**9
"""Characters of one request: far more than any body has."""


def per_image(
    prices: Amount | Mapping[Any, Amount], *, by: Sequence[str] = ("size", "quality"), otherwise: Amount | None = None
) -> Callable[..., Awaitable[Decimal]]:
    """
    Price the images that a request asks for: ``n`` of them, 1 by default. Fixed at admission, whatever is answered.

    Args:
        prices: Whole units for one image; or by what the request says of it, in the order of *by*:
            ``{("1024x1024", "hd"): "0.08", ("1024x1024",): "0.04"}``. The longest that fits counts, so that the second
            one is for every other quality. A text is a tuple of one.
        by: Fields of the request that prices go by.
        otherwise: For images that none fits; the dearest of *prices* by default, so that none is free.

    Raises:
        AmountError: A price that is no amount.
        ConfigurationError: No price, or one that names more fields than *by*.

    The answer is a price for `billable`: a function of the endpoint's arguments, of which the first that has one of
    these fields counts. An ``n`` that is no int from 1 to 1,000 raises `UsageError` on that request.
    """
    if not isinstance(prices, Mapping):
        prices = {(): prices}
    read = {_key(key): exact_amount(price, f"price of {key!r}") for key, price in prices.items()}
    if not read or any(len(key) > len(by) for key in read):
        raise ConfigurationError(
            f"The prices {prices!r} go by other fields than {', '.join(map(repr, by))}. Name a price for each image."
        )
    beyond = max(read.values()) if otherwise is None else exact_amount(otherwise, "price of other images")

    async def images(**arguments: Any) -> Decimal:
        body = await _found(arguments, (*by, "n", "prompt"))
        said = tuple(str(_field(body, name)) for name in by)
        lengths = range(len(by), -1, -1)
        price = next((read[said[:length]] for length in lengths if said[:length] in read), beyond)
        return EXACT.multiply(price, _images(_field(body, "n")))

    return images


def _key(key: Any) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(map(str, key))


def _images(count: Any) -> int:
    if count is None:
        return 1
    if isinstance(count, str) and count.isdecimal():
        # As forms send it.
        count = int(count[:MAX_DIGITS])
    if type(count) is not int or not 1 <= count <= MAX_IMAGES:
        raise UsageError(f"n={count!r:.60} images cannot be asked for. Use an int from 1 to {MAX_IMAGES}.")
    return count


MAX_DIGITS = 10
"""Digits of a number in a form that are looked at."""


def per_million_characters(price: Amount, *, of: str = "input") -> Callable[..., Awaitable[Decimal]]:
    """
    Price the text that a request brings, by its characters: speech, say. Fixed at admission.

    Args:
        price: Whole units for a million of them.
        of: The field with the text, or a list of texts.

    Raises:
        AmountError: A price that is no amount.

    The answer is a price for `billable`, as of `per_image`.
    """
    million = exact_amount(price, "price of a million characters")

    async def characters(**arguments: Any) -> Decimal:
        text = _field(await _found(arguments, (of,)), of)
        texts = text if isinstance(text, list | tuple) else [text]
        count = sum(len(each) for each in texts if isinstance(each, str))
        return EXACT.divide(EXACT.multiply(million, min(count, MAX_CHARACTERS)), 10**6)

    return characters


async def _found(arguments: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The argument that has one of *names*; else the arguments themselves, which may be the fields of a form."""
    for value in arguments.values():
        if isinstance(value, str | bytes | int) or hasattr(value, "read"):
            # An upload's size is none of its image's.
            continue
        body = await _json(value) if hasattr(value, "scope") and hasattr(value, "json") else value
        if any(_field(body, name) is not None for name in names):
            return body
    return arguments


async def _json(request: Any) -> Any:
    """What a request brings as JSON; its body stays available to the endpoint, which complains of anything else."""
    try:
        return await request.json()
    except (ValueError, RecursionError):
        return None


def _field(body: Any, name: str) -> Any:
    return body.get(name) if isinstance(body, Mapping) else getattr(body, name, None)
