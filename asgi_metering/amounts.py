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

__all__ = ["CREDITS", "MAX_AMOUNT", "Amount", "Unit", "check_parts", "exact_amount"]

Amount: TypeAlias = int | Decimal | str
"""What a user may write where an amount is asked: whole units, exactly. A float is refused."""

MAX_AMOUNT = 2**53 - 1
"""
The largest amount of smallest parts that any operation accepts.

Redis scripts count in IEEE doubles, which are exact up to here; beyond it money would be rounded (X.7).
"""

MAX_SCALE = 12
"""Digits after the point of the finest unit: twelve leave 9,007 whole units below MAX_AMOUNT."""

MAX_DIGITS = 24
"""Digits before the point beyond which a number is not even looked at: scaling it must stay cheap and exact."""

MAX_SHOWN = 60
"""Characters of a refused amount that an error repeats: enough to recognise it, never a megabyte of digits."""

# Wide enough that every step on a bounded amount is exact; never the caller's own (mutable, global) context.
_EXACT = Context(prec=60, rounding=ROUND_HALF_UP, Emin=-999_999, Emax=999_999, clamp=0, traps=[InvalidOperation])

# By scale: how many smallest parts make a whole unit; the smallest part and the largest amount, in whole units.
_PARTS = tuple(10**scale for scale in range(MAX_SCALE + 1))
_SMALLEST = tuple(Decimal((0, (1,), -scale)) for scale in range(MAX_SCALE + 1))
_LARGEST = tuple(_EXACT.multiply(Decimal(MAX_AMOUNT), smallest) for smallest in _SMALLEST)


def check_parts(parts: int, what: str = "amount") -> int:
    """Return *parts* if it is an int from 0 to `MAX_AMOUNT`, else raise `AmountError` that names *what*."""
    if type(parts) is not int:
        raise AmountError(f"The {what} {_shown(parts)} is not an int. Stores count whole smallest parts.")
    if not 0 <= parts <= MAX_AMOUNT:
        raise AmountError(
            f"The {what} {_shown(parts)} is outside 0 to {MAX_AMOUNT} smallest parts. Use a coarser unit."
        )
    return parts


def exact_amount(amount: Amount, what: str = "amount") -> Decimal:
    """
    Read a public amount as an exact, finite Decimal from 0 up, whatever its unit.

    Raises:
        AmountError: A float or bool, not a number, NaN, infinite, negative, or with more than 24 digits before the
            point.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | Decimal | str):
        mend = (
            "Write it as a str or a Decimal, so that it is exact."
            if isinstance(amount, float)
            else "Use int, Decimal or str."
        )
        raise AmountError(f"The {what} {_shown(amount)} is a {type(amount).__name__}. {mend}")
    try:
        exact = Decimal(amount)
    except InvalidOperation:
        raise AmountError(f"The {what} {_shown(amount)} is not a number. Write whole units, such as '0.25'.") from None
    if not exact.is_finite():
        raise AmountError(f"The {what} {_shown(amount)} is not finite. Write whole units, such as '0.25'.")
    if exact < 0:
        raise AmountError(f"The {what} {_shown(amount)} is negative. Amounts start at 0.")
    if exact and exact.adjusted() >= MAX_DIGITS:
        raise AmountError(f"The {what} has {exact.adjusted() + 1} digits before the point; no unit counts that far.")
    return exact


def _shown(amount: object) -> str:
    """*amount* for an error's sentence, however long it is."""
    if isinstance(amount, int) and amount.bit_length() > 3 * MAX_SHOWN:
        # Python refuses to write an int of several thousand digits at all.
        return f"of {amount.bit_length()} bits"
    shown = repr(amount)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}... ({len(shown)} characters)"


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
        rounded = self._rounded(exact)
        # Compared with what was given: scaling that first would round what is longer than the context, and hide it.
        if rounded != exact:
            raise AmountError(
                f"The {what} {_shown(amount)} is finer than unit {self.name!r} counts ({self.scale} digits after the "
                f"point). Round it first, or declare the unit with a larger scale."
            )
        return self._count(rounded)

    def exact(self, amount: Amount, what: str = "amount") -> Decimal:
        """
        Read *amount* as an exact, finite Decimal from 0 up to the unit's bound; it may be finer than the scale.

        Prices are such numbers: they are multiplied first and rounded once, by `round`.

        Raises:
            AmountError: As `parts`, except for the fineness.
        """
        exact = exact_amount(amount, what)
        if exact > _LARGEST[self.scale]:
            raise AmountError(
                f"The {what} {_shown(amount)} is more than unit {self.name!r} can count: "
                f"at most {self.text(MAX_AMOUNT)}. Use a unit with a smaller scale."
            )
        return exact

    def round(self, exact: Decimal) -> int:
        """
        Round an exact sum of whole units to smallest parts, half up, once per call.

        Raises:
            AmountError: More than `MAX_AMOUNT` smallest parts, negative, or not finite.
        """
        return self._count(self._rounded(self.exact(exact, "sum")))

    def _rounded(self, exact: Decimal) -> Decimal:
        return exact.quantize(_SMALLEST[self.scale], context=_EXACT)

    def _count(self, rounded: Decimal) -> int:
        return int(rounded.scaleb(self.scale, _EXACT))

    def whole(self, parts: int) -> Decimal:
        """Convert smallest parts (any sign) to whole units, without trailing zeros."""
        value = Decimal(parts).scaleb(-self.scale, _EXACT)
        whole = value.to_integral_value(context=_EXACT)
        return whole if value == whole else value.normalize(_EXACT)

    def text(self, parts: int) -> str:
        """Write smallest parts as whole units in plain digits: ``Unit("credits").text(1_500_000) == "1.5"``."""
        whole, rest = divmod(abs(parts), _PARTS[self.scale])
        digits = f"{whole}.{str(rest).zfill(self.scale).rstrip('0')}" if rest else str(whole)
        return f"-{digits}" if parts < 0 else digits


CREDITS = Unit("credits")
"""The default unit: credits, counted in millionths."""
