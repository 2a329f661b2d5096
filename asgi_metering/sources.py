"""
Sources: where the units of a call may come from.

Plain declarations that a route names in order. Knows nothing of balances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name

__all__ = ["Allowance", "PaymentSource", "Wallet"]

PERIODS = ("day", "month")
"""Windows that an allowance may have."""


@dataclass(frozen=True, slots=True)
class Wallet:
    """The payer's grants, in burn order. The default source."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """
    So many units per payer and calendar window, by plan.

    Args:
        limit: Whole units per window: one amount for everybody, or a mapping from plan to amount. 0 grants nothing;
            an unknown, empty or missing plan gets the smallest amount of the mapping (S0.2).
        per: ``"day"`` or ``"month"``.
        name: Names the bucket; routes that use the same name share it (S0.9, S4.11).
        zone: IANA name of the zone whose calendar counts (S0.5).
        status: What a spent allowance answers: 429, or 402.

    Raises:
        ConfigurationError: Another period or status, an empty mapping, a name with other characters.
        AmountError: An amount that is not usable.

    Source: S0.1, S0.2, S0.5, S0.9, S4.1, S4.13.
    """

    limit: Amount | Mapping[str, Amount]
    per: str = "day"
    name: str = "allowance"
    zone: str = "UTC"
    status: int = 429

    def __post_init__(self) -> None:
        check_name(self.name, "allowance name")
        if self.per not in PERIODS:
            raise ConfigurationError(f"An allowance per {self.per!r} is not known. Use one of {', '.join(PERIODS)}.")
        if self.status not in (402, 429):
            raise ConfigurationError(f"A spent allowance cannot answer {self.status!r}. Use 429 or 402.")
        if isinstance(self.limit, Mapping):
            if not self.limit:
                raise ConfigurationError(f"Allowance {self.name!r} has no plans. Give at least one.")
            for plan, amount in self.limit.items():
                exact_amount(amount, f"allowance of plan {plan!r}")
        else:
            exact_amount(self.limit, "allowance")

    def limit_for(self, plan: str | None) -> Amount:
        """What one window allows to *plan*, in whole units."""
        if not isinstance(self.limit, Mapping):
            return self.limit
        if plan is not None and plan in self.limit:
            return self.limit[plan]
        return min(self.limit.values(), key=exact_amount)


PaymentSource: TypeAlias = Wallet | Allowance
