"""Scores of providers, and their order."""

from __future__ import annotations

import pytest

from asgi_metering.quotas.packages import read_package
from asgi_metering.quotas.scoring import ScoreWeights, ranked, score_of
from asgi_metering.quotas.status import QuotaStatus, status_of
from tests.quotas.captures import NOW


def hundred(remaining: float, expiry: str | None = None, burn: float | None = None) -> QuotaStatus:
    """The status of a hundred credits."""
    entry = {"provider_id": "p", "total_credits": 100, "used_credits": 100 - remaining, "expiry_date": expiry}
    return status_of(read_package(entry), NOW, burn=burn)


@pytest.mark.parametrize(
    ("status", "points"),
    [
        (hundred(100), 5),
        (hundred(99), 4),
        (hundred(19), 0),
        (hundred(60, "2025-08-28"), 3 + 5),
        (hundred(60, "2025-08-29"), 3 + 2),
        (hundred(60, "2025-09-20"), 3 + 2),
        (hundred(60, "2025-09-21"), 3),
        (hundred(60, "2025-08-21"), 3),  # its last day
        (hundred(60, "2025-08-20"), 0),  # gone
        (hundred(0, "2025-08-28"), 0),  # nothing to be lost
        (hundred(60, "2025-08-28", burn=1), 3 + 5 + 3),
        (hundred(60, "2025-08-29", burn=1), 3 + 2 + 3),
    ],
)
def test_score_counts_what_is_left_and_when_it_expires(status: QuotaStatus, points: int) -> None:
    """Up to five for what is left, five or two for its expiry, three more where it would be lost (S1.53, S1.54)."""
    score = score_of("p", [status])
    assert score.points == points == score.packages[0].points
    assert score.to_dict()["packages"][0]["points"] == points


def test_score_of_a_window_counts_its_fill_alone() -> None:
    """Windows have no expiry; the packages of a provider are summed, and one without any has none (S1.53)."""
    window = status_of(read_package({"package_type": "daily", "limit_per_day": 10, "used_credits": 4}), NOW)
    assert score_of("p", [window]).points == 3
    assert score_of("p", [window, hundred(100)]).points == 8
    assert score_of("p", []) == ("p", 0, ())


def test_score_with_weights_of_ones_own() -> None:
    """The boost of what would be lost is configurable (S1.54)."""
    assert score_of("p", [hundred(60, "2025-08-28", burn=1)], ScoreWeights(use_or_lose=10)).packages[0].boost == 10


def test_rank_moves_to_what_would_expire_and_is_stable() -> None:
    """Ten days of expiry with a real burn win against six months of runway; equal ones keep their order (S1.57)."""
    kilo = score_of("kilo", [hundred(100, "2025-08-31", burn=1)])
    deepseek = score_of("deepseek", [hundred(100, burn=0.5)])
    empty = score_of("empty", [hundred(0)])
    unknown = score_of("unknown", [])
    other = score_of("other", [hundred(100)])
    names = [score.provider for score in ranked([empty, deepseek, unknown, other, kilo])]
    assert names == ["kilo", "deepseek", "other", "unknown", "empty"]
    assert empty.is_exhausted
    assert not unknown.is_exhausted
