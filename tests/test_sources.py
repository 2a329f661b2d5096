"""Allowances by plan: an unknown plan gets the smallest, never an error and never without limit."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering import Allowance, Unit, Wallet
from asgi_metering.errors import AmountError, ConfigurationError, InvalidKeyError, MeteringError, PayerError
from asgi_metering.sources import Payer, check_payers, from_environment, what_differs

PLANS = Allowance({"free": 1, "pro": "20", "team": 5})


@pytest.mark.parametrize(
    ("plan", "limit"), [("free", 1), ("pro", "20"), (None, 1), ("", 1), ("org", 1), ("mystery", 1)]
)
def test_unknown_plan_gets_the_smallest(plan: str | None, limit: object) -> None:
    """Each plan has its own amount; one that is unknown, empty or missing gets the smallest (S0.1, S0.2)."""
    assert PLANS.limit_for(plan) == limit
    assert Allowance({"free": 1, "pro": "20"}).limit_for(plan) == limit


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
        ({"limit": 1, "zone": ""}, ConfigurationError, "The time zone '' is no name"),
        ({"limit": 1, "zone": 1}, ConfigurationError, "Use an IANA name such as 'Europe/Berlin'"),
        ({"limit": lambda body: 1}, ConfigurationError, "asks for 'body'.* It can have 'payer', 'plan', 'call'"),
        ({"limit": lambda *plans: 1}, ConfigurationError, "by position"),
        ({"limit": 1, "payer": "acme"}, ConfigurationError, "payer='acme' is no Payer"),
    ],
)
def test_what_cannot_work_is_refused_at_import(arguments: dict[str, Any], error: type, mend: str) -> None:
    """A mistake in an allowance is a sentence where it is written."""
    with pytest.raises(error, match=mend):
        Allowance(**arguments)


@pytest.mark.parametrize("days", [1, 30, 3_660])
def test_rolling_window_of_any_days_up_to_ten_years(days: int) -> None:
    """An allowance may roll over its last days instead of following a calendar, up to the bound and with it."""
    rolling = Allowance(100, days=days)
    assert (rolling.days, rolling.limit_for(None)) == (days, 100)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        (None, 999_999),
        ("", 999_999),
        ("  ", 999_999),
        ("many", 999_999),
        ("-5", 999_999),
        ("nan", 999_999),
        ("Infinity", 999_999),
        ("1" * 30, 999_999),
        ("0", 0),
        (" 250 ", 250),
        ("12.5", Decimal("12.5")),
    ],
)
def test_limit_of_the_environment(written: str | None, limit: object, caplog: pytest.LogCaptureFixture) -> None:
    """Unset, empty, no number or negative is the default, told in the log if it was a mistake; 0 is a limit (S4.1)."""
    environ = {} if written is None else {"MONTHLY_MESSAGE_CREDIT_LIMIT": written}
    assert from_environment("MONTHLY_MESSAGE_CREDIT_LIMIT", 999_999, environ=environ) == limit
    is_mistaken = bool((written or "").strip()) and limit == 999_999
    assert ("MONTHLY_MESSAGE_CREDIT_LIMIT counts as 999999" in caplog.text) is is_mistaken
    plans = {"free": from_environment("FREE", 1, environ={}), "pro": from_environment("PRO", 20, environ={"PRO": "50"})}
    assert Allowance(plans).limit_for("pro") == 50


def test_default_of_the_environment_is_checked_where_it_is_written() -> None:
    """A default that is no amount is refused even where the variable is set (S4.1)."""
    with pytest.raises(AmountError, match="default of LIMIT"):
        from_environment("LIMIT", -1, environ={"LIMIT": "5"})


def test_limit_that_a_function_answers() -> None:
    """A limit may be a function of payer, plan and call, sync or async; what it answers has to be an amount (S4.17)."""

    async def limit(payer: str, plan: str | None) -> object:
        return {"pro": "20"}.get(plan or "", -1 if payer == "bob" else 1)

    computed = Allowance(limit)
    assert (computed.is_computed, PLANS.is_computed) == (True, False)
    assert asyncio.run(computed.limit_of(None, "ann", "pro")) == "20"
    assert asyncio.run(computed.limit_of(None, "ann", None)) == 1
    assert asyncio.run(PLANS.limit_of(None, "ann", "team")) == 5
    assert asyncio.run(Allowance(lambda call: call).limit_of(7, "ann", None)) == 7
    with pytest.raises(AmountError, match="limit of allowance 'allowance' -1 is negative"):
        asyncio.run(computed.limit_of(None, "bob", None))
    with pytest.raises(ConfigurationError, match=r"is computed\. Ask limit_of"):
        computed.limit_for("pro")
    assert computed.warning_level_of(Unit("parts", 0), "20") == 5


def test_limits_of_two_functions_are_two_limits() -> None:
    """Two allowances of one name are one bucket only where one function says both limits (S0.9, S4.17)."""

    def limit() -> int:
        return 1

    assert what_differs(Allowance(limit), Allowance(limit)) is None
    assert what_differs(Allowance(limit), Allowance(lambda: 1)) == "limit"
    assert what_differs(Allowance(limit), Allowance(1)) == "limit"


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


@pytest.mark.parametrize(
    ("arguments", "error", "mend"),
    [
        ({"overdraft": 0.5}, AmountError, "Write it as a str"),
        ({"overdraft": -1}, AmountError, "overdraft"),
        ({"payer": "acme"}, ConfigurationError, "payer='acme' is no Payer. Declare one"),
    ],
    ids=["float", "negative", "a name"],
)
def test_wallet_that_cannot_work_is_refused_at_import(arguments: dict[str, Any], error: type, mend: str) -> None:
    """A mistake in a wallet is a sentence where it is written."""
    with pytest.raises(error, match=mend):
        Wallet(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "mend"),
    [
        ({"name": "a b"}, ConfigurationError, "Choose another"),
        ({"account": ""}, InvalidKeyError, "account of payer 'p'"),
        ({"account": 7}, InvalidKeyError, "is a int, not a str"),
        ({"account": lambda *parts: "x"}, ConfigurationError, "by position"),
        ({"credential": "sk-secret"}, ConfigurationError, "is a str. Pass a function that answers it"),
        ({"headers": [("a", "b")]}, ConfigurationError, "are no mapping"),
        ({"headers": {"a b": "x"}}, ConfigurationError, "is no name of one"),
        ({"headers": {"x-bill-to": "acme\r\nx: y"}}, ConfigurationError, "without line breaks"),
    ],
    ids=["name", "empty", "number", "position", "credential", "pairs", "field name", "line break"],
)
def test_payer_that_cannot_work_is_refused_at_import(arguments: dict[str, Any], error: type, mend: str) -> None:
    """A mistake in a payer is a sentence where it is written, without the credential in it."""
    with pytest.raises(error, match=mend) as refused:
        Payer(**{"name": "p", **arguments})
    assert "sk-secret" not in str(refused.value)


def test_payer_keeps_what_is_secret_to_itself() -> None:
    """Neither functions nor header fields show in what a payer prints as, and its header fields stay as they are."""
    payer = Payer("p", account="acme", credential=lambda: "k", headers={"X-Bill-To": "acme"})
    assert repr(payer) == "Payer(name='p', account='acme')"
    with pytest.raises(TypeError):
        payer.headers["X-Bill-To"] = "other"  # type: ignore[index]
    assert len(payer.callables()) == 1


def test_refuse_a_payer_that_may_or_may_not_be_told() -> None:
    """Whether numbers are told is said by True or False (S0.40)."""
    with pytest.raises(ConfigurationError, match="is no bool"):
        Payer("owner", account="owner-7", told="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("account", "found"),
    [(None, ""), ("acme", "acme"), (lambda team: f"team_{team}", "team_7"), (lambda call: call, "call")],
    ids=["own", "named", "of the arguments", "of the call"],
)
def test_account_of_a_payer(account: Any, found: str) -> None:
    """An account is named, computed from the call and its arguments, or the call's own."""
    assert asyncio.run(Payer("p", account=account).account_of("call", {"team": 7})) == found


def test_account_that_is_none_is_no_account() -> None:
    """A function that answers nothing names nobody: the call's own payer does not stand in for it (S0.25)."""
    with pytest.raises(MeteringError, match="account of payer 'p'"):
        asyncio.run(Payer("p", account=lambda: None).account_of("call", {}))


async def _asked(call: object) -> str:
    return f" key of {call}\r\n"


@pytest.mark.parametrize(
    ("credential", "found"), [(_asked, "key of it"), (lambda: {"token": 1}, {"token": 1})], ids=["text", "object"]
)
def test_credential_of_a_payer(credential: Any, found: object) -> None:
    """A credential is what its function answers; a text is cleaned (S0.41)."""
    assert asyncio.run(Payer("p", credential=credential).credential_of("it", {})) == found


def _fails() -> str:
    raise KeyError("sk-secret")


@pytest.mark.parametrize(
    ("credential", "mend"),
    [
        (None, "Give it one"),
        (lambda: None, "no other one may be used"),
        (lambda: " \n", "no other one may be used"),
        (_fails, "could not be resolved"),
        (lambda missing: "k", "could not be resolved"),
    ],
    ids=["undeclared", "nothing", "blank", "fails", "asks too much"],
)
def test_payer_without_a_credential_is_a_loud_error(credential: Any, mend: str) -> None:
    """A credential that is not there is an error, and says nothing secret (S0.25)."""
    with pytest.raises(PayerError, match=mend) as failed:
        asyncio.run(Payer("p", credential=credential).credential_of("it", {}))
    assert "sk-secret" not in str(failed.value)


def test_one_name_is_one_payer() -> None:
    """Decisions know payers by name, so two of one name in a route are refused."""
    one = Payer("p")
    check_payers([Wallet(payer=one), Allowance(1, payer=one), Wallet()])
    with pytest.raises(ConfigurationError, match="Two payers are called 'p'"):
        check_payers([Wallet(payer=one), Wallet(payer=Payer("p"))])


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (Allowance({"free": 1, "pro": "20", "team": 5}), None),
        (Allowance({"free": 1, "pro": 20, "team": "5.0"}), None),
        (Allowance({"free": 1, "pro": 20}), "limit"),
        (Allowance(1), "limit"),
        (Allowance({"free": 1, "pro": "20", "team": 5}, per="week"), "window"),
    ],
)
def test_one_bucket_has_one_window_and_one_limit(other: Allowance, difference: str | None) -> None:
    """Two allowances of a name are one bucket if no plan would be allowed two amounts of the same window (S0.1)."""
    assert what_differs(PLANS, other) == difference
