"""What balance endpoints answer, kind by kind."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.errors import BalanceError
from asgi_metering.quotas.balances import ENDPOINTS, Endpoint, Found, read_with

USD = {"currency": "usd", "total_balance": "7.50", "granted_balance": "2.50", "topped_up_balance": "10.00"}
CNY = {"currency": "CNY", "total_balance": "110.00", "granted_balance": "0", "topped_up_balance": "0"}

TABLE: dict[str, tuple[str, Any, tuple[float, float]]] = {
    "deepseek takes usd": ("deepseek", {"balance_infos": [CNY, USD]}, (12.5, 5)),
    "deepseek takes the first": ("deepseek", {"balance_infos": [CNY]}, (110, 0)),
    "deepseek used is never negative": (
        "deepseek",
        {"balance_infos": [{**USD, "total_balance": "99"}]},
        (12.5, 0),
    ),
    "openrouter credits": ("openrouter", {"data": {"total_credits": 10.0, "total_usage": 2.5}}, (10, 2.5)),
    "openrouter key": ("openrouter", {"data": {"limit": 5, "limit_remaining": 4.9, "usage": 0.1}}, (5, 0.1)),
    "moonshot": ("moonshot", {"code": 0, "data": {"available_balance": 49.58894, "cash_balance": -3}}, (49.58894, 0)),
    "siliconflow": ("siliconflow", {"data": {"balance": "0.88", "totalBalance": "15.00"}}, (20, 5)),
    "kilo": ("kilocode", {"balance": 19.5, "isDepleted": False}, (20, 0.5)),
    "kilo depleted": ("kilocode", {"balance": 19.5, "isDepleted": True}, (20, 20)),
    "novita": ("novita", {"availableBalance": "150000", "creditLimit": "200000"}, (20, 5)),
    "ppio": ("ppio", {"availableBalance": "10000"}, (20, 19)),
    "vercel": ("vercel", {"balance": "95.50", "total_used": "4.50"}, (100, 4.5)),
    "deepinfra": ("deepinfra", {"stripe_balance": -12.5}, (20, 7.5)),
    "deepinfra owes": ("deepinfra", {"stripe_balance": 3}, (20, 20)),
    "poe": ("poe", {"current_point_balance": 123}, (123, 0)),
    "xai": ("xai", {"total": {"val": -1250}}, (20, 7.5)),
    "minimax": (
        "minimax",
        {"model_remains": [{"current_interval_remaining_percent": 90, "current_weekly_remaining_percent": 86}, 3]},
        (100, 14),
    ),
    "elevenlabs": ("elevenlabs", {"character_count": 400, "character_limit": 10000}, (10000, 400)),
    "fireworks": (
        "fireworks",
        {"lineItems": [{"totalCost": {"units": "1", "nanos": 500_000_000}}, {"totalCost": {"nanos": 250_000_000}}, {}]},
        (20, 1.75),
    ),
    "generic total and used": ("generic", {"quota": "10", "consumed": 4, "balance": 1}, (10, 4)),
    "generic total and rest": ("venice", {"total_credits": 10, "remaining": 4}, (10, 6)),
    "generic rest above total": ("stepfun", {"limit": 10, "available": 14}, (10, 0)),
    "generic used": ("aimlapi", {"spent": "3.5"}, (20, 3.5)),
    "generic root first": ("generic", {"total": 1, "used": 1, "data": {"total": 2, "used": 2}}, (1, 1)),
    "generic data": ("kimi-coding", {"balance": 3, "data": {"initial": 2, "used_credits": 2}}, (2, 2)),
    "generic first hit": ("generic", {"total": "x", "initial": 5, "used": True, "spent": 1}, (5, 1)),
}


@pytest.mark.parametrize("name", TABLE)
def test_parse_gives_total_and_used(name: str) -> None:
    """Each kind's answer gives total and use; one that tells the rest alone counts from 20 (S1.24, S1.26)."""
    kind, payload, expected = TABLE[name]
    assert ENDPOINTS[kind].parse(payload).over(20) == expected


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("deepseek", {"is_available": True, "balance_infos": []}),
        ("deepseek", {"balance_infos": [{"currency": "USD"}]}),
        ("openrouter", {"data": {"limit": None, "limit_remaining": None}}),
        ("moonshot", {"data": {"available_balance": "NaN"}}),
        ("kilocode", []),
        ("vercel", {"balance": "1"}),
        ("minimax", {"model_remains": [{}]}),
        ("fireworks", {}),
        ("generic", {"balance": 3}),
        ("generic", {"total": 3}),
        ("generic", {"used": 1e300}),
        ("generic", "3"),
    ],
)
def test_parse_of_what_is_no_balance_fails(kind: str, payload: object) -> None:
    """No entries, no limit, no number, or an unknown shape with a rest alone fail, and are no zero (S1.24 to S1.28)."""
    with pytest.raises(BalanceError):
        ENDPOINTS[kind].parse(payload)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (Found(total=25.0, used="3"), (25, 3)),  # type: ignore[arg-type]
        (Found(remaining=Decimal(-2)), (20, 20)),
        (Found(used=Decimal(4)), (20, 4)),
        (Found(total=Decimal(-1), used=Decimal(1)), "tells the total -1, which is no number"),
        (Found(total=Decimal("NaN"), used=Decimal(1)), "tells the total NaN, which is no number"),
        (Found(used=-1), "tells the used -1, which is no number"),  # type: ignore[arg-type]
        (Found(remaining="much"), "tells the remaining much, which is no number"),  # type: ignore[arg-type]
        (Found(total=Decimal(3)), "neither what is used nor what is left"),
        (12, "answered 12, and no Found"),
        (BalanceError("closed today"), "closed today"),
        (KeyError("balance"), r"could not be read: KeyError\('balance'\)"),
    ],
)
def test_believe_no_parser(found: object, expected: object) -> None:
    """Whoever wrote a parser, what it answers is a balance, or a failure that names what is wrong (S1.24, S1.28)."""

    def parse(payload: object) -> Found:
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    endpoint = Endpoint((), parse, "ACME_KEY")
    if isinstance(expected, str):
        with pytest.raises(BalanceError, match=expected):
            read_with(endpoint, {})
    else:
        assert read_with(endpoint, {}).over(20) == expected


@pytest.mark.parametrize("kind", ENDPOINTS)
def test_every_kind_has_a_key_and_asks_over_https(kind: str) -> None:
    """Keys come from variables, and never go over the wire in the clear (S1.27)."""
    endpoint = ENDPOINTS[kind]
    assert endpoint.key_env
    assert all(url.startswith("https://") for url in endpoint.urls)


@given(
    st.sampled_from(sorted(ENDPOINTS)),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(max_size=8)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["data", "total", "used", "balance", "balance_infos", "lineItems", "model_remains"]),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=10,
    ),
)
def test_parse_raises_nothing_else(kind: str, payload: object) -> None:
    """Whatever an endpoint answers, it is numbers from zero up, or the one error that says so (S1.28)."""
    try:
        total, used = ENDPOINTS[kind].parse(payload).over(5)
    except BalanceError:
        return
    assert abs(total) < 1e16
    assert abs(used) < 1e16


def test_rest_alone_counts_from_what_was_known() -> None:
    """A top-up raises the total; what was spent is the rest of it (S1.29)."""
    from decimal import Decimal

    assert Found(remaining=Decimal("0.1")).over(0.3) == (0.3, 0.2)
    assert Found(remaining=Decimal(30)).over(25) == (30, 0)
    assert Found(total=Decimal(5), remaining=Decimal(9)).over(25) == (5, 0)
