"""Headroom: what a reading says of one more call, with those that run already."""

from __future__ import annotations

from decimal import Decimal

import pytest

from asgi_metering.quotas import QuotaLimit, Reading
from asgi_metering.quotas.headroom import STALE_S, Lack, Need, lack_of
from asgi_metering.quotas.verdicts import Verdict

NOW = 1_000.0
NOBODY = Need(0, 0, 0, 0)


def reading(*limits: QuotaLimit, **fields: object) -> Reading:
    """Of a request that was sent at `NOW`."""
    given = {"observed_at": NOW, "limits_observed_at": NOW, **fields}
    return Reading(provider="acme", dialect="openai", limits=limits, **given)  # type: ignore[arg-type]


def left(resource: str, remaining: int | None, **fields: object) -> QuotaLimit:
    """A limit that is full again half a minute later."""
    return QuotaLimit(**{"resource": resource, "remaining": remaining, "reset_at": NOW + 30, **fields})  # type: ignore[arg-type]


def test_have_room_where_nothing_is_known() -> None:
    """Nobody has asked the provider yet, or it tells no limits: the first call finds out."""
    assert lack_of(None, Need(), NOBODY, NOW) is None
    assert lack_of(reading(), Need(), NOBODY, NOW) is None


@pytest.mark.parametrize(
    ("resource", "need", "remaining", "fits"),
    [
        ("requests", Need(1), 1, True),
        ("requests", Need(1), 0, False),
        ("requests", Need(3), 2, False),
        ("requests_minute", Need(1), 0, False),
        ("default", Need(1), 0, False),
        ("tokens", Need(tokens=100), 100, True),
        ("tokens", Need(tokens=101), 100, False),
        ("tokens", Need(), 1, True),
        ("tokens", Need(), 0, False),
        ("input_tokens", Need(input=50, output=500, tokens=550), 50, True),
        ("tokens_prompt", Need(input=51), 50, False),
        ("output_tokens", Need(input=500, output=51, tokens=551), 50, False),
        ("tokens_generated", Need(output=50), 50, True),
    ],
)
def test_count_a_call_by_the_name_of_the_limit(resource: str, need: Need, remaining: int, fits: bool) -> None:
    """Requests and tokens of either kind count on limits of their names; what is not known needs one at least."""
    lack = lack_of(reading(left(resource, remaining)), need, NOBODY, NOW)
    assert (lack is None) is fits
    if lack is not None:
        assert (lack.resource, lack.available, lack.retry_after_s) == (resource, remaining, 30.0)


def test_count_what_runs_and_is_in_no_reading() -> None:
    """Of ten requests left nine are taken by calls that the reading does not show: one more fits, and no second."""
    state = reading(left("requests", 10, limit=60), left("tokens", 1_000))
    assert lack_of(state, Need(1, tokens=100), Need(9, tokens=900), NOW) is None
    assert lack_of(state, Need(1, tokens=100), Need(9, tokens=901), NOW) == Lack("tokens", 100, 99, None, 30.0)
    assert lack_of(state, Need(1), Need(12), NOW) == Lack("requests", 1, 0, 60, 30.0)


def test_have_room_once_the_reset_has_passed() -> None:
    """What was full until then is not any more, at the very second of the reset."""
    state = reading(left("requests", 0))
    assert lack_of(state, Need(), NOBODY, NOW + 29.5) == Lack("requests", 1, 0, None, 0.5)
    assert lack_of(state, Need(), NOBODY, NOW + 30) is None


def test_refuse_for_a_minute_where_somebody_has_to_pay() -> None:
    """Out of credit, nobody is sent there for a minute; then one call finds out."""
    state = reading(status=402, verdict=Verdict.OUT_OF_CREDIT)
    assert lack_of(state, Need(), NOBODY, NOW + 20) == Lack("credit", retry_after_s=STALE_S - 20)
    assert lack_of(state, Need(), NOBODY, NOW + STALE_S) is None
    assert lack_of(reading(status=503, verdict=Verdict.CAPACITY), Need(), NOBODY, NOW) is None


def test_forget_a_limit_without_reset_after_a_minute() -> None:
    """Who tells no reset is asked again a minute after its limits were seen, also when newer answers told none."""
    state = reading(left("requests", 0, reset_at=None), received_at=NOW + 50)
    assert lack_of(state, Need(), NOBODY, NOW + 20) == Lack("requests", 1, 0, None, STALE_S - 20)
    assert lack_of(state, Need(), NOBODY, NOW + STALE_S) is None
    assert lack_of(reading(*state.limits, limits_observed_at=None), Need(), NOBODY, NOW + 59) is not None


def test_stay_away_as_long_as_the_provider_asked() -> None:
    """A refusal's wait counts, also without limits; that of an answer that was given does not (S1.40)."""
    refused = reading(status=429, retry_after_s=20.0, received_at=NOW + 5)
    assert lack_of(refused, Need(), NOBODY, NOW + 10) == Lack("retry_after", retry_after_s=15.0)
    assert lack_of(refused, Need(), NOBODY, NOW + 25) is None
    assert lack_of(reading(status=200, retry_after_s=20.0), Need(), NOBODY, NOW) is None
    assert lack_of(reading(retry_after_s=20.0), Need(), NOBODY, NOW) is not None


def test_report_the_limit_that_is_full_for_longest() -> None:
    """Of several, the one after whose reset the same call could pass."""
    state = reading(
        left("requests", 0, reset_at=NOW + 5), left("tokens", 0), left("output_tokens", 0, reset_at=NOW + 9)
    )
    lack = lack_of(state, Need(), NOBODY, NOW)
    assert lack is not None
    assert (lack.resource, lack.retry_after_s) == ("tokens", 30.0)


def test_let_an_estimate_above_the_limit_pass_where_nothing_is_used() -> None:
    """An estimate is no measurement: what is larger than the whole window is the provider's to refuse."""
    assert lack_of(reading(left("tokens", 100, limit=100)), Need(tokens=500), NOBODY, NOW) is None
    assert lack_of(reading(left("tokens", 99, limit=100)), Need(tokens=500), NOBODY, NOW) is not None
    assert lack_of(reading(left("tokens", 0, limit=0)), Need(), NOBODY, NOW) is not None


@pytest.mark.parametrize(
    ("limits", "fits"),
    [
        ([left("unified_5h", None, utilization=Decimal("0.99"))], True),
        ([left("unified_5h", None, utilization=Decimal(1))], False),
        ([left("unified_5h", None, utilization=Decimal(1), state="allowed")], True),
        ([left("unified", None, state="rejected")], False),
        ([left("unified", None, state="allowed"), left("unified_5h", None, utilization=Decimal(1))], True),
        ([left("unified", None, state="allowed"), left("unified_overage", None, state="rejected")], True),
        ([left("priority_input_tokens", 0), left("fast_output_tokens", 0)], True),
        ([left("requests", None, limit=60)], True),
    ],
    ids=["nearly", "spent", "spent but let", "rejected", "judged", "no overage", "other tiers", "limit alone"],
)
def test_understand_spent_shares_and_other_tiers(limits: list[QuotaLimit], fits: bool) -> None:
    """Unified windows tell shares and a judgement of their own; priority and fast limits are those of other calls."""
    assert (lack_of(reading(*limits), Need(), NOBODY, NOW) is None) is fits
