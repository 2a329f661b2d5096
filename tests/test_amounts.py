"""Amounts: whole numbers of a unit's smallest part, exactly, or a sentence that says why not."""

from __future__ import annotations

import decimal
import sys
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from decimal import Decimal
from enum import IntEnum

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asgi_metering.amounts import CREDITS, MAX_AMOUNT, MAX_DIGITS, MAX_SCALE, MAX_SHOWN, Unit, check_parts, exact_amount
from asgi_metering.errors import AmountError, ConfigurationError

scales = st.integers(0, MAX_SCALE)
parts = st.integers(0, MAX_AMOUNT)


class Level(IntEnum):
    """An int that is not just an int."""

    ONE = 1


@pytest.fixture(params=["narrow", "trapping", "rounding down", "tiny exponents"])
def hostile_context(request: pytest.FixtureRequest) -> Iterator[None]:
    """A decimal context as an application may have left it in this thread."""
    with decimal.localcontext() as context:
        if request.param == "narrow":
            context.prec = 1
        elif request.param == "trapping":
            context.traps[decimal.Inexact] = context.traps[decimal.Rounded] = context.traps[decimal.Subnormal] = True
            context.traps[decimal.FloatOperation] = True
        elif request.param == "rounding down":
            context.rounding = decimal.ROUND_DOWN
            context.traps[decimal.InvalidOperation] = False
        else:
            context.prec, context.Emin, context.Emax = 1, 0, 0
        yield


# -- a unit ------------------------------------------------------------------------------------------------


def test_declare_the_default_unit() -> None:
    """Credits are counted in millionths (DESIGN "Amounts")."""
    assert (CREDITS.name, CREDITS.scale) == ("credits", 6)
    assert CREDITS.parts(1) == 1_000_000


@pytest.mark.parametrize("scale", [-1, 13, 2.0, True, "6", None])
def test_refuse_a_unit_whose_scale_is_not_0_to_12(scale: object) -> None:
    """A scale is an int from 0 to 12, and the error names the unit."""
    with pytest.raises(AmountError, match=r"The scale .* of unit 'usd' is not an int from 0 to 12"):
        Unit("usd", scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", [0, 12])
def test_accept_the_edges_of_the_scale(scale: int) -> None:
    """Both ends of the range are units."""
    assert Unit("usd", scale).parts(1) == 10**scale


def test_never_change_a_unit() -> None:
    """A unit is a value: what was counted in it keeps its meaning."""
    unit = Unit("usd", 2)
    with pytest.raises(FrozenInstanceError):
        unit.scale = 3  # type: ignore[misc]
    assert not hasattr(unit, "__dict__")


def test_refuse_a_unit_without_a_usable_name() -> None:
    """A unit's name stands in metrics and SQL, so it is checked as one."""
    with pytest.raises(ConfigurationError, match="The unit name 'two words'"):
        Unit("two words")


# -- whole units to smallest parts -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "counted"),
    [
        (0, 0),
        (2, 2_000_000),
        ("0.25", 250_000),
        ("1e3", 1_000_000_000),
        (" 7 ", 7_000_000),
        (Decimal("0.000001"), 1),
        (Decimal("1.50000000000000000000000000000000000000000000000000000000000000000000000000"), 1_500_000),
        ("0e9999", 0),
        ("0e-9999", 0),
        ("-0", 0),
        ("9007199254.740991", MAX_AMOUNT),
        (Level.ONE, 1_000_000),
    ],
)
def test_convert_whole_units_exactly(amount: int | Decimal | str, counted: int) -> None:
    """An int, a Decimal or a str in whole units becomes its number of smallest parts (S3.16)."""
    result = CREDITS.parts(amount)
    assert result == counted
    assert type(result) is int


@pytest.mark.parametrize(
    ("amount", "sentence"),
    [
        (0.5, r"The price 0\.5 is a float\. Write it as a str or a Decimal, so that it is exact\."),
        (float("nan"), "is a float"),
        (True, r"The price True is a bool\. Use int, Decimal or str\."),
        (None, r"The price None is a NoneType\. Use int, Decimal or str\."),
        (b"1", "is a bytes"),
        ([1], "is a list"),
        ("", "is not a number. Write whole units, such as '0.25'"),
        ("one", "The price 'one' is not a number"),
        ("1,5", "is not a number"),
        ("0x10", "is not a number"),
        ("NaN", "is not finite"),
        (Decimal("sNaN"), "is not finite"),
        ("Infinity", "is not finite"),
        (Decimal("-Infinity"), "is not finite"),
        (-1, "The price -1 is negative. Amounts start at 0"),
        ("-0.000001", "is negative"),
        (Decimal("-1e-99999"), "is negative"),
        ("0.0000001", r"The price '0\.0000001' is finer than unit 'credits' counts \(6 digits after the point\)"),
        ("1e-1000100", "is finer"),
        (Decimal("1e-999999999999"), "is finer"),
        ("1." + "0" * 80 + "1", "is finer"),
        ("9007199254.740992", r"is more than unit 'credits' can count: at most 9007199254\.740991"),
        ("9007199254.7409910000001", "is more than unit 'credits' can count"),
        ("1e24", "has 25 digits before the point; no unit counts that far"),
        ("1e999999", "no unit counts that far"),
        pytest.param(10**5000, "has 5001 digits before the point", id="10**5000"),
    ],
)
def test_refuse_what_is_no_amount(amount: object, sentence: str) -> None:
    """Whatever is not an exact, countable number from 0 up is refused with a sentence that says so."""
    with pytest.raises(AmountError, match=sentence):
        CREDITS.parts(amount, "price")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("amount", "shown"),
    [
        pytest.param("9" * 1_000_000 + "x", r"'9{59}\.\.\. \(1000003 characters\)", id="a megabyte"),
        pytest.param(-(10**5000), "of 16610 bits", id="-10**5000"),
        ("-" + "1" * (MAX_SHOWN - 3), r"'-1{57}' is negative"),
    ],
)
def test_name_a_long_amount_in_a_short_sentence(amount: object, shown: str) -> None:
    """An error stays readable, and is an `AmountError`, also where Python would not write the number at all."""
    with pytest.raises(AmountError, match=shown) as caught:
        CREDITS.parts(amount)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 200


def test_bound_the_digits_of_any_amount() -> None:
    """Without a unit an amount has up to 24 digits before the point, and any number after it."""
    assert exact_amount("9" * MAX_DIGITS + ".123456789") == Decimal("9" * MAX_DIGITS + ".123456789")
    with pytest.raises(AmountError, match="The price has 25 digits"):
        exact_amount(10**MAX_DIGITS, "price")


@given(scale=scales, counted=parts)
@example(scale=MAX_SCALE, counted=MAX_AMOUNT)
@example(scale=0, counted=MAX_AMOUNT)
def test_return_from_parts_to_whole_units_and_back(scale: int, counted: int) -> None:
    """Every number of smallest parts survives its writing, in text and as a Decimal, at every scale (X.7)."""
    unit = Unit("u", scale)
    assert unit.parts(unit.whole(counted)) == counted
    assert unit.parts(unit.text(counted)) == counted
    assert unit.exact(unit.whole(counted)) == unit.whole(counted)


@given(scale=scales, excess=st.integers(1, 10**20))
def test_refuse_more_than_any_store_counts(scale: int, excess: int) -> None:
    """From 2^53 smallest parts on an amount is refused, at every scale (X.7)."""
    unit = Unit("u", scale)
    amount = Decimal(MAX_AMOUNT + excess).scaleb(-scale)
    with pytest.raises(AmountError):
        unit.parts(amount)
    with pytest.raises(AmountError):
        unit.exact(amount)
    with pytest.raises(AmountError):
        unit.round(amount)


@given(scale=scales, counted=parts, digits=st.integers(1, 40), finer=st.integers(1, 9))
def test_refuse_what_is_finer_than_the_unit(scale: int, counted: int, digits: int, finer: int) -> None:
    """A fraction of a smallest part is refused however small it is; as a price it may be written."""
    unit = Unit("u", scale)
    with decimal.localcontext(prec=100):
        amount = Decimal(unit.text(min(counted, MAX_AMOUNT - 1))) + Decimal((0, (finer,), -scale - digits))
    with pytest.raises(AmountError, match="finer"):
        unit.parts(amount)
    assert unit.exact(amount) == amount


# -- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exact", "rounded"),
    [
        ("0", 0),
        ("0.0000004999999999999999999999999999999999999999999999999999999999999999999", 0),
        ("0.0000005", 1),
        ("0.0000014", 1),
        ("0.0000015", 2),
        ("0.0000025", 3),
        ("1e-999999", 0),
        ("9007199254.740991", MAX_AMOUNT),
    ],
)
def test_round_half_up_once(exact: str, rounded: int) -> None:
    """A sum is rounded once and half up: never to even, never twice (0.49...9 stays below a half)."""
    result = CREDITS.round(Decimal(exact))
    assert result == rounded
    assert type(result) is int


@pytest.mark.parametrize("exact", ["NaN", "sNaN", "Infinity", "-Infinity", "-0.0000001", "1e60", "9007199254.7409911"])
def test_refuse_to_round_what_is_no_amount(exact: str) -> None:
    """A sum that no amount can be is an `AmountError`, never an error of the decimal module (S3.21)."""
    with pytest.raises(AmountError, match="The sum"):
        CREDITS.round(Decimal(exact))


@given(scale=scales, exact=st.decimals(0, 900, allow_nan=False, allow_infinity=False, places=20))
def test_round_to_the_nearest_part(scale: int, exact: Decimal) -> None:
    """What is rounded is at most half a part away, and an exact half goes up."""
    rounded = Unit("u", scale).round(exact)
    with decimal.localcontext(prec=100):
        away = Decimal(rounded).scaleb(-scale) - exact
        half = Decimal((0, (5,), -scale - 1))
    assert -half < away <= half


# -- writing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counted", "text"),
    [
        (0, "0"),
        (1, "0.000001"),
        (1_500_000, "1.5"),
        (-1_500_000, "-1.5"),
        (20_000_000, "20"),
        (10**18, "1000000000000"),
        (10**18 + 1, "1000000000000.000001"),
        (-MAX_AMOUNT, "-9007199254.740991"),
    ],
)
def test_write_whole_units_in_plain_digits(counted: int, text: str) -> None:
    """Amounts are written without exponents and without trailing zeros, debts with their sign."""
    assert CREDITS.text(counted) == text
    assert str(CREDITS.whole(counted)) == text


# -- the application's decimal context ---------------------------------------------------------------------


@pytest.mark.usefixtures("hostile_context")
def test_count_the_same_in_any_decimal_context() -> None:
    """What an application does to its decimal context changes no amount (S3.16)."""
    assert CREDITS.parts("9007199254.740991") == MAX_AMOUNT
    assert CREDITS.parts(1234567) == 1_234_567_000_000
    assert CREDITS.round(Decimal("0.1234565")) == 123_457
    assert CREDITS.text(MAX_AMOUNT) == "9007199254.740991"
    assert CREDITS.whole(12_000_000) == 12
    assert Unit("u", MAX_SCALE).text(MAX_AMOUNT) == "9007.199254740991"


@pytest.mark.usefixtures("hostile_context")
@pytest.mark.parametrize("amount", ["x", "nan", "-1", "0.0000001", "9007199254.740992", 0.5, "1e60"])
def test_refuse_the_same_in_any_decimal_context(amount: object) -> None:
    """What is no amount in one context is none in any other, and the error is the same class."""
    with pytest.raises(AmountError):
        CREDITS.parts(amount)  # type: ignore[arg-type]


# -- smallest parts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("counted", [0, 1, MAX_AMOUNT])
def test_accept_smallest_parts_within_the_bound(counted: int) -> None:
    """0 to 2^53 - 1 smallest parts pass unchanged (X.7)."""
    assert check_parts(counted) == counted


@pytest.mark.parametrize(
    ("counted", "sentence"),
    [
        (-1, "The hold -1 is outside 0 to 9007199254740991 smallest parts"),
        (MAX_AMOUNT + 1, "The hold 9007199254740992 is outside"),
        pytest.param(10**5000, "The hold of 16610 bits is outside", id="10**5000"),
        (1.0, r"The hold 1\.0 is not an int"),
        (True, "The hold True is not an int"),
        (Level.ONE, "is not an int"),
        ("1", "The hold '1' is not an int"),
        (None, "The hold None is not an int"),
    ],
)
def test_refuse_smallest_parts_that_no_store_counts(counted: object, sentence: str) -> None:
    """Beyond the bound, below zero or not a plain int: refused, never passed on (X.7)."""
    with pytest.raises(AmountError, match=sentence):
        check_parts(counted, "hold")  # type: ignore[arg-type]


def test_keep_the_bound_that_doubles_count_exactly() -> None:
    """The bound is the largest integer below which every integer is a double: what Redis scripts count in (X.7)."""
    assert float(MAX_AMOUNT) == MAX_AMOUNT
    assert float(MAX_AMOUNT + 1) == float(MAX_AMOUNT + 2)
    assert sys.float_info.mant_dig == 53
