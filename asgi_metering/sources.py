"""
Sources: where the units of a call may come from, and whose they are.

Plain declarations that a route names in order. Knows nothing of balances.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from asgi_metering.amounts import Amount, Unit, exact_amount
from asgi_metering.errors import AmountError, ConfigurationError, PayerError
from asgi_metering.names import check_key, check_name, is_field_name

if TYPE_CHECKING:
    from asgi_metering.arguments import From

__all__ = [
    "WALLET",
    "Allowance",
    "Payer",
    "PaymentSource",
    "Wallet",
    "check_allowances",
    "check_payers",
    "check_zone",
    "from_environment",
    "what_differs",
]

log = logging.getLogger("asgi_metering")

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


@dataclass(frozen=True, slots=True, eq=False)
class Payer:
    """
    Somebody who may pay: an account, the credential that its work runs on, and header fields, as one (S0.23).

    Sources that name the same object, one behind the other, are one group: the call is paid by one group, and
    `current_call().paid_by` says by which.

    Args:
        name: Says who it is in answers and logs: ``"platform"``. One name is one object in a route.
        account: Whose balance pays: its key, or a sync or async function of ``call`` that answers it; None is the
            call's own payer. An account that cannot be resolved is refused with 503 before anything starts, and nobody
            else pays (S0.25, S3.38).
        credential: Such a function, which answers what work that this payer pays for is done with: an API key, say. A
            function, so that no credential stands in a declaration. Asked when `Call.credential` is.
        headers: Go with that credential and with no other (S0.24): a bill-to header, say.
        told: Whether callers are told what the *account* has, in refusals and ``Metering-Available``. Of their own
            account they always are; of another one no number is told unless this says so (S0.40).

    Raises:
        ConfigurationError: The name has other characters; what should be a function is none, or takes parameters by
            position; a header field that cannot be sent.
        InvalidKeyError: The account cannot be a key.

    Source: S0.23 to S0.28.
    """

    name: str
    account: str | Callable[..., Any] | None = None
    credential: Callable[..., Any] | None = field(default=None, repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    told: bool = field(default=False, repr=False)
    _account: From | None = field(init=False, repr=False, default=None)
    _credential: From | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        # Policies know sources; what computes an argument is theirs.
        from asgi_metering.arguments import From

        check_name(self.name, "payer's name")
        if type(self.told) is not bool:
            raise ConfigurationError(f"told={self.told!r} of payer {self.name!r} is no bool. Pass True or False.")
        if callable(self.account):
            object.__setattr__(self, "_account", From(self.account, f"account of payer {self.name!r}"))
        elif self.account is not None:
            check_key(self.account, f"account of payer {self.name!r}")
        if callable(self.credential):
            object.__setattr__(self, "_credential", From(self.credential, f"credential of payer {self.name!r}"))
        elif self.credential is not None:
            # Its value stays out of the sentence: somebody may have written the credential itself.
            raise ConfigurationError(
                f"The credential of payer {self.name!r} is a {type(self.credential).__name__}. Pass a function that "
                f"answers it."
            )
        object.__setattr__(self, "headers", MappingProxyType(_checked_headers(self.headers, self.name)))

    def callables(self) -> tuple[From, ...]:
        """The parts that are computed for each call."""
        return tuple(part for part in (self._account, self._credential) if part is not None)

    async def account_of(self, call: object, arguments: Mapping[str, Any]) -> str:
        """
        Whose balance pays for *call*; empty for the call's own payer.

        Raises:
            InvalidKeyError: What was answered is no key.
            Exception: Whatever the function raises.
        """
        if self._account is not None:
            return check_key(await self._account.compute(call, arguments), f"account of payer {self.name!r}")
        return self.account if isinstance(self.account, str) else ""

    async def credential_of(self, call: object, arguments: Mapping[str, Any]) -> Any:
        """
        What work that this payer pays for is done with; a text without white space around it (S0.41).

        Raises:
            PayerError: It has none, or its function failed or answered nothing. There is no other one to use (S0.25).
        """
        if self._credential is None:
            raise PayerError(f"Payer {self.name!r} has no credential. Give it one: Payer(..., credential=function).")
        try:
            found = await self._credential.compute(call, arguments)
        except Exception as failure:
            raise PayerError(f"The credential of payer {self.name!r} could not be resolved.") from failure
        found = found.strip() if isinstance(found, str) else found
        if found is None or found == "":
            raise PayerError(f"Payer {self.name!r} has no credential for this call, and no other one may be used.")
        return found


def _checked_headers(headers: Mapping[str, str], name: str) -> dict[str, str]:
    if not isinstance(headers, Mapping):
        raise ConfigurationError(f"The headers of payer {name!r} are no mapping. Pass a dict of names to values.")
    for key, value in headers.items():
        if not is_field_name(key):
            raise ConfigurationError(f"Payer {name!r} has a header field {key!r}, which is no name of one. Rename it.")
        if not isinstance(value, str) or not value.isprintable():
            raise ConfigurationError(
                f"The header field {key!r} of payer {name!r} is no printable str. Pass text without line breaks."
            )
    return dict(headers)


@dataclass(frozen=True, slots=True)
class Wallet:
    """
    The payer's grants, in burn order. The default source.

    Args:
        warn_below: Whole units below which what is left is worth a warning; None never warns (S3.6).
        overdraft: Whole units that may be held beyond what is there; what is spent of them becomes debt.
        payer: Whose grants; None is the call's own payer.
        split: Together with its neighbours of the same payer it may pay one hold, each what it has; said of one source
            it holds for all of them. Otherwise one source pays the whole.

    Raises:
        AmountError: *warn_below* or *overdraft* is no usable amount.
        ConfigurationError: *payer* is no `Payer`.
    """

    name: ClassVar[str] = WALLET
    each: ClassVar[bool] = False
    """Grants are of whom they were given to: see `Allowance`."""

    warn_below: Amount | None = None
    overdraft: Amount = 0
    payer: Payer | None = None
    split: bool = False

    def __post_init__(self) -> None:
        if self.warn_below is not None:
            exact_amount(self.warn_below, "warning level")
        exact_amount(self.overdraft, "overdraft")
        _check_payer(self.payer)

    @property
    def has_level(self) -> bool:
        """Whether what is left of it is told as more than a number: by a warning, or a debt that it may be in."""
        return self.warn_below is not None or bool(self.overdraft)

    def warning_level(self, unit: Unit, plan: str | None = None) -> int | None:
        """Smallest parts below which what is left is worth a warning; None: never. The same for every *plan*."""
        return None if self.warn_below is None else unit.parts(self.warn_below, "warning level")


@dataclass(frozen=True, slots=True)
class Allowance:
    """
    So many units per payer and window, by plan. Windows are a calendar's, or roll from the first use on.

    Args:
        limit: Whole units per window: one amount for everybody, or a mapping from plan to amount. 0 grants nothing;
            an unknown, empty or missing plan gets the smallest amount of the mapping (S0.2). Or a sync or async
            function of any of ``payer``, ``plan`` and ``call`` that answers the amount: asked at each decision, and
            whenever it is shown (S4.2, S4.17). What it raises rises, and an answer that is no amount is an error.
        per: ``"day"``, ``"week"`` (from Monday) or ``"month"``.
        name: Names the bucket; routes that use the same name share it (S0.9, S4.11), and say the same of it: other
            windows or limits are refused at startup.
        zone: IANA name of the zone whose calendar counts (S0.5).
        status: What a spent allowance answers: 429, or 402.
        warn_at: Percent of the limit, used or held, from which on responses warn; 100 never does.
        anchor: Day on which months begin, 1 to 31, such as a billing day; a month without it begins on its last day.
        days: Instead of a calendar's, a window of so many times 24 hours: the first use after the last one's end
            begins it (S4.13).
        payer: Whose allowance; None is the call's own payer. One that names an ``account`` has one allowance, which is
            used up by whoever comes first; one that has a credential alone is each call's own payer, and so is the
            allowance (S0.9).
        split: As of `Wallet`.
        each: True counts for each of the calls' own payers, though *payer* is somebody else: so many uses of each user
            run on the platform's credential, and work inside of them is paid from its account (S0.9, S0.27).

    Raises:
        ConfigurationError: Another period or status, a zone that is no text, an empty mapping, a name with other
            characters, a percentage that is not an int from 1 to 100, a *payer* that is no `Payer`, a function that
            asks for something else.
        AmountError: An amount that is not usable.

    Source: S0.1, S0.2, S0.5, S0.9, S3.6, S4.1, S4.13, S4.17.
    """

    limit: Amount | Mapping[str, Amount] | Callable[..., Any]
    per: Literal["day", "week", "month"] = "day"
    name: str = "allowance"
    zone: str = "UTC"
    status: Literal[402, 429] = 429
    warn_at: int = 80
    anchor: int = 1
    days: int | None = None
    payer: Payer | None = None
    split: bool = False
    each: bool = False
    _limit: From | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        _check_payer(self.payer)
        if type(self.each) is not bool:
            raise ConfigurationError(f"each={self.each!r} of allowance {self.name!r} is no bool. Use True or False.")
        if self.each and self.payer is None:
            raise ConfigurationError(
                f"Allowance {self.name!r} names no payer, and is each payer's own. Leave each= out."
            )
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
        elif callable(self.limit):
            object.__setattr__(self, "_limit", _computed_limit(self.limit, f"limit of allowance {self.name!r}"))
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

    @property
    def is_computed(self) -> bool:
        """Whether a function says what it allows; `limit_of` asks it, and `limit_for` cannot."""
        return self._limit is not None

    async def limit_of(self, call: object, payer: str, plan: str | None) -> Amount:
        """
        What one window allows to *payer* with *plan* now, in whole units: by the function, where one says it.

        Raises:
            AmountError: It answered what is no amount.
            Exception: Whatever it raises.
        """
        if self._limit is None:
            return self.limit_for(plan)
        found: Amount = await self._limit.compute(call, {"payer": payer, "plan": plan})
        exact_amount(found, f"limit of allowance {self.name!r}")
        return found

    def limit_for(self, plan: str | None) -> Amount:
        """What one window allows to *plan*, in whole units."""
        if callable(self.limit):
            raise ConfigurationError(f"The limit of allowance {self.name!r} is computed. Ask limit_of() for it.")
        if not isinstance(self.limit, Mapping):
            return self.limit
        if plan is not None and plan in self.limit:
            return self.limit[plan]
        return min(self.limit.values(), key=exact_amount)

    @property
    def has_level(self) -> bool:
        """As of `Wallet`."""
        return self.warn_at != 100

    def warning_level(self, unit: Unit, plan: str | None = None) -> int | None:
        """Smallest parts below which what is left to *plan* is worth a warning; None: never."""
        return self.warning_level_of(unit, self.limit_for(plan))

    def warning_level_of(self, unit: Unit, limit: Amount) -> int | None:
        """
        The same, of *limit*.

        Used and held reach the whole part of `warn_at` percent of the limit there (S3.6: ``int(limit * 0.8)``).
        """
        if self.warn_at == 100:
            return None
        parts = unit.parts(limit, f"allowance {self.name!r}")
        return parts - parts * self.warn_at // 100 + 1


PaymentSource: TypeAlias = Wallet | Allowance


def _computed_limit(function: Callable[..., Any], what: str) -> From:
    # Policies know sources; what computes an argument is theirs.
    from asgi_metering.arguments import From

    computed = From(function, what)
    computed.check("an allowance", dict.fromkeys(("payer", "plan"), Parameter("_", Parameter.KEYWORD_ONLY)))
    return computed


def from_environment(variable: str, default: Amount, *, environ: Mapping[str, str] = os.environ) -> Amount:
    """
    Read a limit, a price or any other amount that operators may change: ``from_environment("MONTHLY_LIMIT", 999_999)``.

    Args:
        variable: Its name.
        default: Whole units where it is unset, empty, negative or no number; each of the last two is logged.
        environ: Where it is looked for.

    0 is an amount like any other: nothing is allowed then (S4.1). A process has the environment that it was started
    with; what changes later is a function's to answer (`Allowance`).

    Raises:
        AmountError: The *default* is no usable amount.
    """
    exact_amount(default, f"default of {variable}")
    written = environ.get(variable, "").strip()
    if not written:
        return default
    try:
        return exact_amount(written, f"value of {variable}")
    except AmountError as wrong:
        log.warning("%s counts as %s: %s", variable, default, wrong)
        return default


def _check_payer(payer: object) -> None:
    if not isinstance(payer, Payer | None):
        raise ConfigurationError(
            f"payer={payer!r} is no Payer. Declare one: Payer('platform', account='acme'); who pays for a route's "
            f"calls without one is what identify says."
        )


def check_payers(sources: Sequence[PaymentSource]) -> None:
    """
    Refuse two payers of one name: decisions, and the calls that come back to them, know payers by name. And one payer
    whose sources are of several accounts.

    Raises:
        ConfigurationError: With the name.
    """
    known: dict[str, Payer] = {}
    for source in sources:
        if source.payer is None:
            continue
        if any(other.payer is source.payer and other.each is not source.each for other in sources):
            raise ConfigurationError(
                f"The payer {source.payer.name!r} has an allowance of each payer, and has other sources of its own "
                f"account. A call takes from one account: say each=True of all its allowances, or of none."
            )
        if known.setdefault(source.payer.name, source.payer) is not source.payer:
            raise ConfigurationError(
                f"Two payers are called {source.payer.name!r}. Declare it once and name that object in all of its "
                f"sources, or rename one."
            )


def check_allowances(sources: Iterable[PaymentSource]) -> None:
    """
    Refuse two windows of one name: a day and a month that begin at the same midnight would be one count.

    Raises:
        ConfigurationError: With the name.
    """
    known: dict[tuple[str, str], Allowance] = {}
    for source in sources:
        if isinstance(source, Allowance):
            payer = "" if source.payer is None else source.payer.name
            first = known.setdefault((payer, source.name), source)
            if _window(first) != _window(source):
                raise ConfigurationError(
                    f"Two allowances of one payer are called {source.name!r} and count in different windows. Name them "
                    f"apart: Allowance(..., name='monthly')."
                )


def what_differs(first: Allowance, other: Allowance) -> str | None:
    """
    What keeps two allowances from being one bucket: ``"window"``, or ``"limit"``; None where nothing does.

    A limit differs where some plan, or a caller without one, would be allowed two amounts of the same window.
    """
    if _window(first) != _window(other):
        return "window"
    if first.is_computed or other.is_computed:
        # What two functions answer cannot be told before they are asked.
        return None if first.limit is other.limit else "limit"
    plans = {plan for each in (first, other) if isinstance(each.limit, Mapping) for plan in each.limit}
    limits = ((first.limit_for(plan), other.limit_for(plan)) for plan in (None, *plans))
    return "limit" if any(exact_amount(one) != exact_amount(two) for one, two in limits) else None


def _window(source: Allowance) -> tuple[str, str, int, int | None]:
    return source.per, source.zone, source.anchor, source.days
