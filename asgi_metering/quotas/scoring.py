"""
Scores: which provider to send the next call to, by what its packages still allow.

Pure functions of statuses, which are those that tables and the API show, burn included (S1.56). Never knows a clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from asgi_metering.quotas.status import QuotaStatus

__all__ = ["DEFAULT_WEIGHTS", "PackageScore", "Score", "ScoreWeights", "ranked", "score_of"]

_SOON_DAYS = 7
_LATER_DAYS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreWeights:
    """
    What counts how much (S1.53, S1.54).

    Attributes:
        fill: A full package; parts of it in whole points.
        expires_soon: Credits that expire within 7 days.
        expires_later: Credits that expire within 30.
        use_or_lose: On top, credits that would expire unused.
    """

    fill: int = 5
    expires_soon: int = 5
    expires_later: int = 2
    use_or_lose: int = 3


DEFAULT_WEIGHTS = ScoreWeights()
"""Those of the requirements."""


class PackageScore(NamedTuple):
    """The points of one package: for what is left, for its expiry, and for being lost otherwise."""

    package_id: str
    alert: str
    fill: int
    expiry: int
    boost: int

    @property
    def points(self) -> int:
        """All of them."""
        return self.fill + self.expiry + self.boost


class Score(NamedTuple):
    """
    The score of one provider.

    Attributes:
        provider: Its name.
        points: The sum over its packages; 0 of one that has none.
        packages: Each one's share.
    """

    provider: str
    points: int
    packages: tuple[PackageScore, ...]

    @property
    def is_exhausted(self) -> bool:
        """Whether it has packages, and nothing is left of any."""
        return bool(self.packages) and all(each.alert == "exhausted" for each in self.packages)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        packages = [{**each._asdict(), "points": each.points} for each in self.packages]
        return {"provider": self.provider, "points": self.points, "packages": packages}


def score_of(provider: str, statuses: Iterable[QuotaStatus], weights: ScoreWeights = DEFAULT_WEIGHTS) -> Score:
    """
    Score *provider* by the *statuses* of its packages (S1.53, S1.54).

    One of which nothing is left has no points, also where it would expire soon: there is nothing to be lost.
    """
    packages = tuple(_score(status, weights) for status in statuses)
    return Score(provider, sum(each.points for each in packages), packages)


def ranked(scores: Sequence[Score]) -> list[Score]:
    """The best first; those of which nothing is left last; equal ones in the order given (S1.57)."""
    return sorted(scores, key=lambda score: (score.is_exhausted, -score.points))


def _score(status: QuotaStatus, weights: ScoreWeights) -> PackageScore:
    fill = min(weights.fill, int(status.remaining_ratio * weights.fill))
    expiry = boost = 0
    if status.package_type == "credits" and status.alert != "exhausted":
        days = status.days_until_expiry
        if days is not None and 0 < days <= _LATER_DAYS:
            expiry = weights.expires_soon if days <= _SOON_DAYS else weights.expires_later
        boost = weights.use_or_lose if status.alert == "use_or_lose" else 0
    return PackageScore(status.package_id, status.alert, fill, expiry, boost)
