"""
Amounts: whole numbers of a unit's smallest part.

Knows how a public amount (int, Decimal or str, in whole units) becomes the integer that every store keeps,
and back. Never knows who owns an amount or what it buys.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from typing import TypeAlias

from asgi_metering.errors import AmountError
from asgi_metering.names import check_name

__all__ = ["CREDITS", "MAX_AMOUNT", "Amount", "Unit", "check_parts"]

Amount: TypeAlias = int | Decimal | str
"""What a user may write where an amount is asked: whole units, exactly. A float is refused."""

MAX_AMOUNT = 2**53 - 1
"""
The largest amount of smallest parts that any operation accepts.

Redis scripts count in IEEE doubles, which are exact up to here; beyond it money would be rounded (X.7).
"""

MAX_SCALE = 12
"""Digits after the point of the finest unit: twelve leave 9,007 whole units below MAX_AMOUNT."""

# Wide enough that scaling a bounded amount is exact; never the caller's own (mutable, global) context.
_EXACT = Context(prec=60, rounding=ROUND_HALF_UP)


def check_parts(parts: int, what: str = "amount") -> int:
    """Return *parts* if it is an int from 0 to `MAX_AMOUNT`, else raise `AmountError` that names *what*."""
    if type(parts) is not int:
        raise AmountError(f"The {what} {parts!r} is not an int. Stores count whole smallest parts.")
    if not 0 <= parts <= MAX_AMOUNT:
        raise AmountError(f"The {what} {parts} is outside 0 to {MAX_AMOUNT} smallest parts. Use a coarser unit.")
    return parts


@dataclass(frozen=True, slots=True)
class Unit:
    """
    What is counted, and how finely.

    Args:
        name: The unit's name, 1 to 64 characters of ``[A-Za-z0-9_.-]``.
        scale: Decimal digits after the point, 0 to 12. One whole unit is ``10 ** scale`` smallest parts.

    Raises:
        AmountError: The scale is not an int from 0 to 12.
        ConfigurationError: The name is empty, too long or has other characters.

    Source: S3.16 (integers only in stores), X.7 (bounds).
    """

    name: str
    scale: int = 6

    def __post_init__(self) -> None:
        check_name(self.name, "unit name")
        if type(self.scale) is not int or not 0 <= self.scale <= MAX_SCALE:
            raise AmountError(f"The scale {self.scale!r} of unit {self.name!r} is not an int from 0 to {MAX_SCALE}.")

    def parts(self, amount: Amount, what: str = "amount") -> int:
        """
        Convert whole units to smallest parts, exactly.

        Args:
            amount: int, Decimal or str in whole units, from 0 up.
            what: What the amount is, for the error's sentence.

        Raises:
            AmountError: A float or bool, not a number, NaN, infinite, negative, finer than the unit's scale, or
                more than `MAX_AMOUNT` smallest parts.
        """
        exact = self.exact(amount, what)
        scaled = exact.scaleb(self.scale, _EXACT)
        whole = int(scaled)
        if whole != scaled:
            raise AmountError(
                f"The {what} {amount!r} is finer than unit {self.name!r} counts ({self.scale} digits after the "
                f"point). Round it first, or declare the unit with a larger scale."
            )
        return check_parts(whole, what)

    def exact(self, amount: Amount, what: str = "amount") -> Decimal:
        """
        Read *amount* as an exact, finite Decimal from 0 up to the unit's bound; it may be finer than the scale.

        Prices are such numbers: they are multiplied first and rounded once, by `round`.

        Raises:
            AmountError: As `parts`, except for the fineness.
        """
        if isinstance(amount, bool) or not isinstance(amount, int | Decimal | str):
            mend = (
                "Write it as a str or a Decimal, so that it is exact."
                if isinstance(amount, float)
                else "Use int, Decimal or str."
            )
            raise AmountError(f"The {what} {amount!r} is a {type(amount).__name__}. {mend}")
        try:
            exact = Decimal(amount)
        except InvalidOperation:
            raise AmountError(f"The {what} {amount!r} is not a number. Write whole units, such as '0.25'.") from None
        if not exact.is_finite():
            raise AmountError(f"The {what} {amount!r} is not finite. Write whole units, such as '0.25'.")
        if exact < 0:
            raise AmountError(f"The {what} {amount!r} is negative. Amounts start at 0.")
        if exact.adjusted() > 24 or exact.scaleb(self.scale, _EXACT) > MAX_AMOUNT:
            raise AmountError(
                f"The {what} {amount!r} is more than unit {self.name!r} can count: "
                f"at most {self.text(MAX_AMOUNT)}. Use a unit with a smaller scale."
            )
        return exact

    def round(self, exact: Decimal) -> int:
        """
        Round an exact sum of whole units to smallest parts, half up, once per call.

        Raises:
            AmountError: More than `MAX_AMOUNT` smallest parts, negative, or not finite.
        """
        return self.parts(
            exact.quantize(Decimal(1).scaleb(-self.scale), context=_EXACT) if exact.is_finite() else exact
        )

    def whole(self, parts: int) -> Decimal:
        """Convert smallest parts (any sign) to whole units, without trailing zeros."""
        value = Decimal(parts).scaleb(-self.scale, _EXACT)
        return value.quantize(Decimal(1)) if value == value.to_integral_value() else value.normalize(_EXACT)

    def text(self, parts: int) -> str:
        """Write smallest parts as whole units in plain digits: ``Unit("credits").text(1_500_000) == "1.5"``."""
        return format(self.whole(parts), "f")


CREDITS = Unit("credits")
"""The default unit: credits, counted in millionths."""
