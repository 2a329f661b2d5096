"""Allowances by plan: an unknown plan gets the smallest, never an error and never without limit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering import Allowance, Unit, Wallet
from asgi_metering.errors import AmountError, ConfigurationError

PLANS = Allowance({"free": 1, "pro": "20", "team": 5})


@pytest.mark.parametrize(
    ("plan", "limit"), [("free", 1), ("pro", "20"), (None, 1), ("", 1), ("org", 1), ("mystery", 1)]
)
def test_unknown_plan_gets_the_smallest(plan: str | None, limit: object) -> None:
    """A plan that is unknown, empty or missing gets the smallest amount (S0.2)."""
    assert PLANS.limit_for(plan) == limit


def test_one_amount_is_everybodys() -> None:
    """Without plans the amount is the same for all, and zero is a real limit (S0.8, S4.1)."""
    assert Allowance(0).limit_for("pro") == 0


@pytest.mark.parametrize(
    ("arguments", "error", "mend"),
    [
        ({"limit": {}}, ConfigurationError, "Give at least one"),
        ({"limit": 0.5}, AmountError, "Write it as a str"),
        ({"limit": {"free": -1}}, AmountError, "plan 'free'"),
        ({"limit": 1, "per": "fortnight"}, ConfigurationError, "Use one of day, week, month"),
        ({"limit": 1, "status": 403}, ConfigurationError, "Use 429 or 402"),
        ({"limit": 1, "name": "wallet"}, ConfigurationError, "Rename it"),
        ({"limit": 1, "warn_at": 0}, ConfigurationError, "Use an int from 1 to 100"),
        ({"limit": 1, "warn_at": 80.0}, ConfigurationError, "cannot warn at 80.0 percent"),
        ({"limit": 1, "name": "a b"}, ConfigurationError, "Choose another"),
        ({"limit": 1, "per": "month", "anchor": 32}, ConfigurationError, "from 1 to 31"),
        ({"limit": 1, "per": "month", "anchor": 1.5}, ConfigurationError, "cannot begin on day 1.5"),
        ({"limit": 1, "per": "week", "anchor": 2}, ConfigurationError, "and other periods none"),
        ({"limit": 1, "days": 0}, ConfigurationError, "Use an int from 1 to 3660"),
        ({"limit": 1, "days": 30.0}, ConfigurationError, "cannot last 30.0 days"),
        ({"limit": 1, "days": 30, "per": "month"}, ConfigurationError, "or leave out days"),
        ({"limit": 1, "days": 30, "zone": "Europe/Berlin"}, ConfigurationError, "or leave out days"),
    ],
)
def test_what_cannot_work_is_refused_at_import(arguments: dict[str, Any], error: type, mend: str) -> None:
    """A mistake in an allowance is a sentence where it is written."""
    with pytest.raises(error, match=mend):
        Allowance(**arguments)


def test_wallets_are_alike() -> None:
    """A wallet has nothing to choose."""
    assert Wallet() == Wallet()


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 99))
def test_allowance_warns_from_its_percentage_on(limit: int, used: int, percent: int) -> None:
    """It warns where used plus held reach the whole part of so many percent of the limit, 80 by default (S3.6)."""
    level = Allowance(limit, warn_at=percent).warning_level(Unit("parts", 0))
    assert level is not None
    assert (limit - used < level) is (used >= limit * percent // 100)
    assert Allowance(limit) == Allowance(limit, warn_at=80)


def test_allowance_warns_by_plan_or_never() -> None:
    """The level follows the plan's own limit, and at 100 percent nothing warns before nothing is left (S3.6)."""
    unit = Unit("parts", 0)
    assert [PLANS.warning_level(unit, plan) for plan in ("pro", "free", None)] == [5, 2, 2]
    assert Allowance(10, warn_at=100).warning_level(unit) is None


def test_wallet_warns_below_an_amount() -> None:
    """A wallet has no limit to take a percentage of: it warns below an absolute balance, if one is given (S3.6)."""
    assert Wallet().warning_level(Unit("credits")) is None
    assert Wallet(warn_below="0.5").warning_level(Unit("credits")) == 500_000
    with pytest.raises(AmountError, match="Write it as a str"):
        Wallet(warn_below=0.5)  # type: ignore[arg-type]
