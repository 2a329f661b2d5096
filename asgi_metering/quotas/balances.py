"""
What the balance endpoints of providers answer, and where they are.

A table of endpoints and pure parsers of their JSON. Never knows a key, a network or a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple

from asgi_metering.errors import BalanceError

__all__ = ["ENDPOINTS", "Endpoint", "Found", "Parser", "read_generic", "read_with"]

_LARGEST: Final = Decimal(10) ** 15
"""No account holds more, in any unit; what says so is no balance."""


class Found(NamedTuple):
    """
    What an endpoint told. At least one of *total* and *remaining* is known, or *used* alone.

    Attributes:
        total: What was bought, or is allowed.
        used: Of it.
        remaining: What is left, where the total is not told.
    """

    total: Decimal | None = None
    used: Decimal | None = None
    remaining: Decimal | None = None

    def over(self, known_total: float) -> tuple[float, float]:
        """
        The total and what is used of it, where *known_total* is what was known before.

        A provider that tells only what is left says nothing of what it was: then the total is what was known, or what
        is left where that is more, such as after a top-up.
        """
        if self.remaining is not None:
            left = max(Decimal(0), self.remaining)
            total = max(Decimal(repr(known_total)), left) if self.total is None else self.total
            return float(total), float(max(Decimal(0), total - left))
        total = Decimal(repr(known_total)) if self.total is None else self.total
        return float(total), float(self.used or 0)


Parser = Callable[[Any], Found]


class Endpoint(NamedTuple):
    """
    Where a kind of provider tells a balance.

    Attributes:
        urls: Asked in this order, until one answers what is understood (S1.25).
        parse: Reads its JSON. Those of `ENDPOINTS` raise `BalanceError` and nothing else; `read_with` takes any.
        key_env: Environment variable of the key.
        header: The field that carries the key, after *prefix*.
    """

    urls: tuple[str, ...]
    parse: Parser
    key_env: str
    header: str = "authorization"
    prefix: str = "Bearer "


def read_with(endpoint: Endpoint, payload: Any) -> Found:
    """
    What *endpoint* says, whoever wrote its parser.

    Raises:
        BalanceError: The parser raised, or answered no balance (S1.28).
    """
    try:
        found: object = endpoint.parse(payload)
    except BalanceError:
        raise
    except Exception as failure:
        raise BalanceError(f"The answer could not be read: {failure!r:.120}.") from failure
    if not isinstance(found, Found):
        raise BalanceError(f"The parser answered {found!r:.60}, and no Found(total=..., used=...).")
    if found.used is None and found.remaining is None:
        raise BalanceError("The parser tells neither what is used nor what is left. Answer one of them.")
    numbers = {name: _number(told) for name, told in found._asdict().items()}
    for name, told in found._asdict().items():
        least = numbers[name]
        if told is not None and (least is None or (least < 0 and name != "remaining")):
            raise BalanceError(f"The parser tells the {name} {told!s:.40}, which is no number from 0 up.")
    return Found(**numbers)


def _number(value: object) -> Decimal | None:
    """A number as JSON or as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = Decimal(str(value).strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() and abs(number) <= _LARGEST else None


def _at(payload: object, *path: str) -> object:
    for key in path:
        payload = payload.get(key) if isinstance(payload, Mapping) else None
    return payload


def _needed(payload: object, *path: str) -> Decimal:
    number = _number(_at(payload, *path))
    if number is None:
        raise BalanceError(f"The answer has no number {'.'.join(path)!r}. Its provider may have changed it.")
    return number


def read_deepseek(payload: Any) -> Found:
    """The entry in USD, else the first; the total is what was granted and paid in, or the balance (S1.24)."""
    entries = _at(payload, "balance_infos")
    usable = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
    if not usable:
        raise BalanceError("The answer has no 'balance_infos'. Look whether the key is one of DeepSeek.")
    entry = next((each for each in usable if str(each.get("currency", "")).upper() == "USD"), usable[0])
    balance = _needed(entry, "total_balance")
    total = (_number(entry.get("topped_up_balance")) or Decimal(0)) + (
        _number(entry.get("granted_balance")) or Decimal(0)
    )
    if not total:
        total = balance
    return Found(total, max(Decimal(0), total - balance))


def read_openrouter(payload: Any) -> Found:
    """Credits of the account, or the limit of the key where the key may not ask for those; no limit is no number."""
    data = _at(payload, "data")
    if (total := _number(_at(data, "total_credits"))) is not None:
        return Found(total, _needed(data, "total_usage"))
    return Found(_needed(data, "limit"), remaining=_needed(data, "limit_remaining"))


def read_moonshot(payload: Any) -> Found:
    """What is available, which cash that is overdrawn does not lower."""
    return Found(remaining=_needed(payload, "data", "available_balance"))


def read_siliconflow(payload: Any) -> Found:
    """Gifts and paid balance together."""
    return Found(remaining=_needed(payload, "data", "totalBalance"))


def read_kilo(payload: Any) -> Found:
    """The balance; one that is depleted is none."""
    return Found(remaining=Decimal(0) if _at(payload, "isDepleted") is True else _needed(payload, "balance"))


_NOVITA_PARTS: Final = 10_000


def read_novita(payload: Any) -> Found:
    """Ten thousandths of a dollar, or of a yuan at PPIO."""
    return Found(remaining=_needed(payload, "availableBalance") / _NOVITA_PARTS)


def read_vercel(payload: Any) -> Found:
    """The balance, and what was used of it."""
    balance, used = _needed(payload, "balance"), _needed(payload, "total_used")
    return Found(balance + used, used)


def read_deepinfra(payload: Any) -> Found:
    """A negative balance is what was paid in advance."""
    return Found(remaining=-_needed(payload, "stripe_balance"))


def read_poe(payload: Any) -> Found:
    """Points."""
    return Found(remaining=_needed(payload, "current_point_balance"))


_CENTS: Final = 100


def read_xai(payload: Any) -> Found:
    """Cents, with the sign of a debt."""
    return Found(remaining=-_needed(payload, "total", "val") / _CENTS)


def read_minimax(payload: Any) -> Found:
    """The share of its window that the tightest model has left, in percent."""
    rows = _at(payload, "model_remains")
    shares = [
        share
        for row in (rows if isinstance(rows, list) else [])
        for key in ("current_interval_remaining_percent", "current_weekly_remaining_percent")
        if (share := _number(_at(row, key))) is not None
    ]
    if not shares:
        raise BalanceError("The answer has no 'model_remains' with percents. Its provider may have changed it.")
    return Found(Decimal(100), remaining=min(shares))


def read_elevenlabs(payload: Any) -> Found:
    """Characters of the period."""
    return Found(_needed(payload, "character_limit"), _needed(payload, "character_count"))


_NANOS: Final = Decimal(10) ** 9


def read_fireworks(payload: Any) -> Found:
    """What was spent: there is no balance."""
    items = _at(payload, "lineItems")
    if not isinstance(items, list):
        raise BalanceError("The answer has no 'lineItems'. Name the account and the time in the package's url.")
    costs = (_at(item, "totalCost") for item in items)
    spent = sum(
        (
            (_number(_at(cost, "units")) or Decimal(0)) + (_number(_at(cost, "nanos")) or Decimal(0)) / _NANOS
            for cost in costs
        ),
        Decimal(0),
    )
    return Found(used=spent)


_TOTAL: Final = ("total", "total_credits", "initial", "topped_up", "limit", "quota")
_USED: Final = ("used", "consumed", "spent", "used_credits")
_LEFT: Final = ("balance", "remaining", "credits", "available")


def read_generic(payload: Any) -> Found:
    """
    Read whatever looks like a balance: at the root, then inside of ``data``; the first name that has a number counts.

    A total with what is used or left of it, or what is used alone; what is left alone says nothing (S1.26).
    """
    for place in (payload, _at(payload, "data")):
        total, used, left = (_first(place, names) for names in (_TOTAL, _USED, _LEFT))
        if total is not None and used is not None:
            return Found(total, used)
        if total is not None and left is not None:
            return Found(total, max(Decimal(0), total - left))
        if used is not None:
            return Found(used=used)
    raise BalanceError("The answer has no fields of a balance that are known. Name the kind of endpoint with 'poll'.")


def _first(place: object, names: tuple[str, ...]) -> Decimal | None:
    numbers = (_number(_at(place, name)) for name in names)
    return next((number for number in numbers if number is not None), None)


ENDPOINTS: Final[Mapping[str, Endpoint]] = {
    "deepseek": Endpoint(("https://api.deepseek.com/user/balance",), read_deepseek, "DEEPSEEK_API_KEY"),
    "openrouter": Endpoint(
        # The first takes a management key alone.
        ("https://openrouter.ai/api/v1/credits", "https://openrouter.ai/api/v1/key"),
        read_openrouter,
        "OPENROUTER_API_KEY",
    ),
    "moonshot": Endpoint(("https://api.moonshot.ai/v1/users/me/balance",), read_moonshot, "MOONSHOT_API_KEY"),
    "moonshot-cn": Endpoint(("https://api.moonshot.cn/v1/users/me/balance",), read_moonshot, "MOONSHOT_API_KEY"),
    "siliconflow": Endpoint(
        ("https://api.siliconflow.com/v1/user/info", "https://api.siliconflow.cn/v1/user/info"),
        read_siliconflow,
        "SILICONFLOW_API_KEY",
    ),
    "kilocode": Endpoint(
        ("https://api.kilo.ai/api/profile/balance", "https://app.kilo.ai/api/profile/balance"),
        read_kilo,
        "KILOCODE_API_KEY",
    ),
    "novita": Endpoint(("https://api.novita.ai/openapi/v1/billing/balance/detail",), read_novita, "NOVITA_API_KEY"),
    "ppio": Endpoint(("https://api.ppio.com/openapi/v1/billing/balance/detail",), read_novita, "PPIO_API_KEY"),
    "vercel": Endpoint(("https://ai-gateway.vercel.sh/v1/credits",), read_vercel, "AI_GATEWAY_API_KEY"),
    "deepinfra": Endpoint(
        ("https://api.deepinfra.com/payment/checklist?compute_owed=true",), read_deepinfra, "DEEPINFRA_API_KEY"
    ),
    "poe": Endpoint(("https://api.poe.com/usage/current_balance",), read_poe, "POE_API_KEY"),
    "minimax": Endpoint(("https://api.minimax.io/v1/token_plan/remains",), read_minimax, "MINIMAX_API_KEY"),
    "elevenlabs": Endpoint(
        ("https://api.elevenlabs.io/v1/user/subscription",), read_elevenlabs, "ELEVENLABS_API_KEY", "xi-api-key", ""
    ),
    # These name an account in their address, which the package's url has.
    "xai": Endpoint((), read_xai, "XAI_MANAGEMENT_KEY"),
    "fireworks": Endpoint((), read_fireworks, "FIREWORKS_API_KEY"),
    # What they answer is not documented.
    "venice": Endpoint(("https://api.venice.ai/api/v1/billing/balance",), read_generic, "VENICE_API_KEY"),
    "stepfun": Endpoint(("https://api.stepfun.com/v1/accounts",), read_generic, "STEPFUN_API_KEY"),
    "aimlapi": Endpoint(("https://api.aimlapi.com/v2/billing",), read_generic, "AIMLAPI_API_KEY"),
    "kimi-coding": Endpoint(("https://api.kimi.com/coding/v1/usages",), read_generic, "KIMI_API_KEY"),
    "generic": Endpoint((), read_generic, "BALANCE_API_KEY"),
}
"""Every kind that is known. Source: reference/provider-quota-headers.md, section 4."""
