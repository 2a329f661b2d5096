"""The shape of a reading."""

from __future__ import annotations

import json
from decimal import Decimal

from asgi_metering.quotas import QuotaLimit, Reading
from asgi_metering.quotas.reading import MAX_LIMITS, LimitTable

LIMITS = (
    QuotaLimit(resource="requests", limit=10, remaining=3, reset_at=105.0),
    QuotaLimit(resource="unified_5h", utilization=Decimal("0.420"), state="allowed"),
)


def test_to_dict_is_plain_json_and_exact() -> None:
    """Every attribute appears with JSON types, and a share comes back digit by digit (S1.48)."""
    reading = Reading(
        provider="acme",
        dialect="openai",
        observed_at=100.0,
        status=429,
        limits=LIMITS,
        retry_after_s=2.0,
        received_at=101.0,
        limits_observed_at=100.0,
    )
    assert json.loads(json.dumps(reading.to_dict())) == {
        "provider": "acme",
        "model": None,
        "dialect": "openai",
        "observed_at": 100.0,
        "received_at": 101.0,
        "limits_observed_at": 100.0,
        "status": 429,
        "verdict": None,
        "useful": True,
        "retry_after_s": 2.0,
        "retry_at": 103.0,
        "limits": [
            {
                "resource": "requests",
                "limit": 10,
                "remaining": 3,
                "reset_at": 105.0,
                "utilization": None,
                "state": None,
            },
            {
                "resource": "unified_5h",
                "limit": None,
                "remaining": None,
                "reset_at": None,
                "utilization": "0.420",
                "state": "allowed",
            },
        ],
    }


def test_limit_finds_a_resource() -> None:
    """A limit is found by its resource, and one that was not told is None."""
    reading = Reading(provider="acme", dialect="openai", observed_at=100.0, limits=LIMITS)
    assert reading.limit("unified_5h") is LIMITS[1]
    assert reading.limit("tokens") is None


def test_retry_at_counts_from_the_answer_or_else_the_request() -> None:
    """Without a wait there is no moment; without a moment of receipt it counts from the request's start."""
    assert Reading(provider="a", dialect="d", observed_at=100.0).retry_at is None
    assert Reading(provider="a", dialect="d", observed_at=100.0, retry_after_s=5.0).retry_at == 105.0
    assert Reading(provider="a", dialect="d", observed_at=100.0, retry_after_s=5.0, received_at=0.0).retry_at == 5.0


def test_useful_needs_a_count_or_a_share() -> None:
    """A state or a reset alone tells nothing that could update a package; a zero does (S1.40)."""
    for fields, useful in (
        ({"limit": 0}, True),
        ({"remaining": 0}, True),
        ({"utilization": Decimal(0)}, True),
        ({"state": "allowed"}, False),
        ({"reset_at": 1.0}, False),
    ):
        limit = QuotaLimit(resource="x", **fields)  # type: ignore[arg-type]
        reading = Reading(provider="a", dialect="d", observed_at=0.0, limits=(limit,))
        assert (limit.useful, reading.useful) == (useful, useful)


def test_table_is_bounded() -> None:
    """A response that invents resources fills a bounded table, and known resources still take fields."""
    table = LimitTable(0.0)
    for number in range(MAX_LIMITS + 10):
        table.put(f"r{number}", "limit", b"1")
    table.put("r0", "remaining", b"0")
    limits = table.limits()
    assert len(limits) == MAX_LIMITS
    assert limits[0] == QuotaLimit(resource="r0", limit=1, remaining=0)
