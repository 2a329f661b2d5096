"""
Sources: where the units of a call may come from.

Plain declarations that a route names in order. Knows nothing of balances.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

from asgi_metering.amounts import Amount, Unit, exact_amount
from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name

__all__ = ["WALLET", "Allowance", "PaymentSource", "Wallet", "check_zone"]

WALLET = "wallet"
"""What decisions and header fields call the payer's grants."""

PERIODS = ("day", "week", "month")
"""Windows that an allowance may have."""


def check_zone(zone: str) -> str:
    """Return *zone* if it can name a time zone; raises `ConfigurationError` for what is no text at all."""
    if not isinstance(zone, str) or not zone:
        raise ConfigurationError(f"The time zone {zone!r} is no name. Use an IANA name such as 'Europe/Berlin'.")
    return zone


MAX_DAYS = 3_660
"""Ten years: a longer window is a mistake."""


@dataclass(frozen=True, slots=True)
class Wallet:
    """
    The payer's grants, in burn order. The default source.

    Args:
        warn_below: Whole units below which what is left is worth a warning; None never warns (S3.6).

    Raises:
        AmountError: *warn_below* is no usable amount.
    """

    name: ClassVar[str] = WALLET

    warn_below: Amount | None = None

    def __post_init__(self) -> None:
        if self.warn_below is not None:
            exact_amount(self.warn_below, "warning level")

    def warning_level(self, unit: Unit, plan: str | None = None) -> int | None:
        """Smallest parts below which what is left is worth a warning; None: never. The same for every *plan*."""
        return None if self.warn_below is None else unit.parts(self.warn_below, "warning level")


@dataclass(frozen=True, slots=True)
class Allowance:
    """
    So many units per payer and window, by plan. Windows are a calendar's, or roll from the first use on.

    Args:
        limit: Whole units per window: one amount for everybody, or a mapping from plan to amount. 0 grants nothing;
            an unknown, empty or missing plan gets the smallest amount of the mapping (S0.2).
        per: ``"day"``, ``"week"`` (from Monday) or ``"month"``.
        name: Names the bucket; routes that use the same name share it (S0.9, S4.11).
        zone: IANA name of the zone whose calendar counts (S0.5).
        status: What a spent allowance answers: 429, or 402.
        warn_at: Percent of the limit, used or held, from which on responses warn; 100 never does.
        anchor: Day on which months begin, 1 to 31, such as a billing day; a month without it begins on its last day.
        days: Instead of a calendar's, a window of so many times 24 hours: the first use after the last one's end
            begins it (S4.13).

    Raises:
        ConfigurationError: Another period or status, a zone that is no text, an empty mapping, a name with other
            characters, a percentage that is not an int from 1 to 100.
        AmountError: An amount that is not usable.

    Source: S0.1, S0.2, S0.5, S0.9, S3.6, S4.1, S4.13.
    """

    limit: Amount | Mapping[str, Amount]
    per: Literal["day", "week", "month"] = "day"
    name: str = "allowance"
    zone: str = "UTC"
    status: Literal[402, 429] = 429
    warn_at: int = 80
    anchor: int = 1
    days: int | None = None

    def __post_init__(self) -> None:
        if check_name(self.name, "allowance name") == WALLET:
            raise ConfigurationError(f"An allowance cannot be named {WALLET!r}: answers call the grants so. Rename it.")
        if type(self.warn_at) is not int or not 1 <= self.warn_at <= 100:
            raise ConfigurationError(
                f"Allowance {self.name!r} cannot warn at {self.warn_at!r} percent. Use an int from 1 to 100."
            )
        check_zone(self.zone)
        if self.per not in PERIODS:
            raise ConfigurationError(f"An allowance per {self.per!r} is not known. Use one of {', '.join(PERIODS)}.")
        self._check_window()
        if self.status not in (402, 429):
            raise ConfigurationError(f"A spent allowance cannot answer {self.status!r}. Use 429 or 402.")
        if isinstance(self.limit, Mapping):
            if not self.limit:
                raise ConfigurationError(f"Allowance {self.name!r} has no plans. Give at least one.")
            for plan, amount in self.limit.items():
                exact_amount(amount, f"allowance of plan {plan!r}")
        else:
            exact_amount(self.limit, "allowance")

    def _check_window(self) -> None:
        if type(self.anchor) is not int or not 1 <= self.anchor <= 31 or (self.anchor != 1 and self.per != "month"):
            raise ConfigurationError(
                f"Allowance {self.name!r} per {self.per} cannot begin on day {self.anchor!r}. Give months an anchor "
                f"from 1 to 31, and other periods none."
            )
        if self.days is None:
            return
        if type(self.days) is not int or not 1 <= self.days <= MAX_DAYS:
            raise ConfigurationError(
                f"Allowance {self.name!r} cannot last {self.days!r} days. Use an int from 1 to {MAX_DAYS}."
            )
        if (self.per, self.zone, self.anchor) != ("day", "UTC", 1):
            raise ConfigurationError(
                f"Allowance {self.name!r} rolls over {self.days} days and has a calendar besides. Leave out per, zone "
                f"and anchor, or leave out days."
            )

    def limit_for(self, plan: str | None) -> Amount:
        """What one window allows to *plan*, in whole units."""
        if not isinstance(self.limit, Mapping):
            return self.limit
        if plan is not None and plan in self.limit:
            return self.limit[plan]
        return min(self.limit.values(), key=exact_amount)

    def warning_level(self, unit: Unit, plan: str | None = None) -> int | None:
        """
        Smallest parts below which what is left to *plan* is worth a warning; None: never.

        Used and held reach the whole part of `warn_at` percent of the limit there (S3.6: ``int(limit * 0.8)``).
        """
        if self.warn_at == 100:
            return None
        limit = unit.parts(self.limit_for(plan), f"allowance {self.name!r}")
        return limit - limit * self.warn_at // 100 + 1


PaymentSource: TypeAlias = Wallet | Allowance
