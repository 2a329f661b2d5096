"""Allowances by plan: an unknown plan gets the smallest, never an error and never without limit."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering import Allowance, Wallet
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
        ({"limit": 1, "per": "fortnight"}, ConfigurationError, "Use one of day, month"),
        ({"limit": 1, "status": 403}, ConfigurationError, "Use 429 or 402"),
        ({"limit": 1, "name": "a b"}, ConfigurationError, "Choose another"),
    ],
)
def test_what_cannot_work_is_refused_at_import(arguments: dict[str, Any], error: type, mend: str) -> None:
    """A mistake in an allowance is a sentence where it is written."""
    with pytest.raises(error, match=mend):
        Allowance(**arguments)


def test_wallets_are_alike() -> None:
    """A wallet has nothing to choose."""
    assert Wallet() == Wallet()
