"""
The tracker: what every package still allows, out of the catalogue, the readings and our own usage.

Puts together what `quotas.status` judges, and is what routers, pages and commands ask (S1.56). Awaits nothing, asks
nobody, and never raises where a file or a log is broken. Knows no HTTP.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.alerts import DEFAULT_THRESHOLDS, AlertThresholds, burn_per_day
from asgi_metering.quotas.packages import Confidence, Package, PackageSource
from asgi_metering.quotas.reading import Reading
from asgi_metering.quotas.scoring import DEFAULT_WEIGHTS, Score, ScoreWeights, ranked, score_of
from asgi_metering.quotas.status import Counted, QuotaStatus, iso_time, status_of
from asgi_metering.upstream.catalogue import CatalogueFile
from asgi_metering.upstream.readings import QuotaReadings
from asgi_metering.upstream.shared import SharedReadings
from asgi_metering.upstream.usage_log import UsageLog

__all__ = ["BURN_DAYS", "QuotaTracker", "header_snapshot"]

logger = logging.getLogger("asgi_metering.quotas")

BURN_DAYS = 7.0
"""The days that a burn is taken over (S1.7)."""

FOUND_S = 1.0
"""How long what the usage log said is taken for granted, where other processes may have written meanwhile."""

_DAY_S = 86_400.0

_CALLS = "requests"
"""Beginning of the resources that our own calls are counted in."""


class QuotaTracker:
    """
    What providers still allow, package by package.

    Args:
        packages: A catalogue file, which is read again whenever it changes, or packages.
        readings: What headers said: ``metering.quotas``.
        log: What our own calls used: a `UsageLog` that is also a sink of the metering, or its path; without one
            nothing is counted here. If it is a file, whoever uses it shares readings by it, too: trackers without a
            `Metering`, whose workers share them by its store.
        thresholds: Of alerts.
        weights: Of scores.
        burn_days: How many days back the burn is taken.
        clock: Epoch seconds.

    Raises:
        ConfigurationError: An argument is not usable. A file that is missing has no packages (S1.49).

    Safe from several threads and event loops.
    """

    def __init__(
        self,
        packages: str | os.PathLike[str] | Iterable[Package] = (),
        *,
        readings: QuotaReadings | None = None,
        log: UsageLog | str | os.PathLike[str] | None = None,
        thresholds: AlertThresholds = DEFAULT_THRESHOLDS,
        weights: ScoreWeights = DEFAULT_WEIGHTS,
        burn_days: float = BURN_DAYS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not burn_days > 0:
            raise ConfigurationError(f"burn_days={burn_days!r} is no number of days above 0. Use 7.")
        if isinstance(packages, str | os.PathLike):
            self.file: CatalogueFile | None = CatalogueFile(packages)
            self._given: Mapping[str, Package] = {}
            # What is wrong with it shall be told when the application starts.
            self.file.read()
        else:
            self.file, self._given = None, _by_id(packages)
        self.readings = QuotaReadings() if readings is None else readings
        self.log = UsageLog(log) if isinstance(log, str | os.PathLike) else log
        self._thresholds = thresholds
        self._weights = weights
        self._burn_days = burn_days
        self._clock = clock
        # Beside the counts of all workers what all of them were told.
        path = None if self.log is None else self.log.path
        self._shared = None if path is None else SharedReadings(path, self.readings, clock=clock)
        self._looked_at = -FOUND_S
        self._lock = threading.Lock()
        # By id, what stood there, and what it was changed into.
        self._changed: dict[str, tuple[Package, Package]] = {}
        self._merged: dict[str, tuple[Package, Package, Package]] = {}
        if isinstance(self.log, UsageLog):
            # Before its first batch, which throws away what nobody looks at.
            self.log.keep(burn_days)
            for package in self.packages().values():
                if package.package_type == "rolling_window":
                    self.log.keep(package.window_hours * 3_600 / _DAY_S)
        self._found: dict[str, tuple[Package, int, float, tuple[Counted | None, float | None]]] = {}

    # -- packages ------------------------------------------------------------------------------------------

    def packages(self) -> dict[str, Package]:
        """All packages by their ids, with what updates changed since the file was written."""
        known = self._written()
        with self._lock:
            changed = {
                name: self._current(name, known[name], *each) for name, each in self._changed.items() if name in known
            }
        return {**known, **changed}

    def _current(self, name: str, written: Package, before: Package, changed: Package) -> Package:
        """`_over`, worked out once: routers ask for each call."""
        found = self._merged.get(name)
        if found is None or found[0] is not written or found[1] is not changed:
            found = self._merged[name] = (written, changed, _over(written, before, changed))
        return found[2]

    def _written(self) -> Mapping[str, Package]:
        """All packages as they were given, or stand in the file."""
        return self._given if self.file is None else self.file.read().packages

    def problems(self) -> tuple[str, ...]:
        """A sentence for each entry of the catalogue that is broken, and left out (S1.17)."""
        return () if self.file is None else self.file.read().problems

    def update(
        self,
        package_id: str,
        *,
        used: float | None = None,
        total: float | None = None,
        source: PackageSource | None = None,
        confidence: Confidence | None = None,
        is_told_now: bool = True,
    ) -> bool:
        """
        Change what is known of a package, in this process; `catalogue.write_usage` puts it into the file.

        Args:
            package_id: Of a package that is in the catalogue: another one is not made, and told of (S1.16).
            used: What is used; None stays as it is, as do all of these.
            total: What there is.
            source: Who tells it.
            confidence: How far it is to be believed.
            is_told_now: Whether this is news of the numbers themselves, of which ``last_updated`` tells.

        Raises:
            ConfigurationError: A value that the package cannot have.

        Returns whether there is such a package.
        """
        known = self._written()
        package = self.packages().get(package_id)
        if package is None or package_id not in known:
            logger.warning("There is no package %r to update.", package_id)
            return False
        changes: dict[str, Any] = {"used": used, "total": total, "source": source, "confidence": confidence}
        changes = {name: value for name, value in changes.items() if value is not None}
        if is_told_now:
            changes["last_updated"] = iso_time(self._clock())
        with self._lock:
            self._changed[package_id] = known[package_id], replace(package, **changes)
        return True

    # -- what they still allow -----------------------------------------------------------------------------

    def statuses(self) -> list[QuotaStatus]:
        """What each package still allows, in the catalogue's order; one that fails is left out, and told of (S1.17)."""
        now = self._clock()
        if self._shared is not None and not 0 <= now - self._looked_at < FOUND_S:
            self._looked_at = now
            self._shared.look()
        found = []
        for package in self.packages().values():
            try:
                found.append(self._status(package, now))
            except Exception:
                logger.exception("The package %r has no status.", package.package_id)
        return found

    def status(self, package_id: str) -> QuotaStatus | None:
        """What one package still allows; None where there is none, or it fails."""
        return next((status for status in self.statuses() if status.package_id == package_id), None)

    def _status(self, package: Package, now: float) -> QuotaStatus:
        counted, burn = self._logged(package, now)
        reading = None
        if package.source == "header_capture":
            reading = self.readings.telling(package.provider_id, package.resource, label=package.label)
        return status_of(package, now, burn=burn, counted=counted, reading=reading, thresholds=self._thresholds)

    def _logged(self, package: Package, now: float) -> tuple[Counted | None, float | None]:
        """
        What our own calls used of a package: calls of its window, or a day's burn of credits.

        As it was found last, if that is not older than `FOUND_S` and nothing was counted here since: routers ask for
        each call.
        """
        if self.log is None:
            return None, None
        found = self._found.get(package.package_id)
        batches = self.log.batches
        if found is None or found[:2] != (package, batches) or not 0 <= now - found[2] < FOUND_S:
            found = self._found[package.package_id] = (package, batches, now, self._look_up(self.log, package, now))
        return found[3]

    def _look_up(self, log: UsageLog, package: Package, now: float) -> tuple[Counted | None, float | None]:
        start = package.window_start(now)
        if isinstance(log, UsageLog):
            log.keep((now - start) / _DAY_S)
        try:
            if package.package_type == "credits":
                cost = log.cost(package.providers, now - self._burn_days * _DAY_S)
                return None, burn_per_day(cost, self._burn_days)
            if package.resource.startswith(_CALLS):
                return log.counted(package.providers, start, package.model_weights), None
        except Exception:
            # Whatever a log of somebody's own raises: the catalogue still says something (S1.15, S1.55).
            logger.exception("The usage log says nothing of the package %r.", package.package_id)
        return None, None

    # -- for routers ---------------------------------------------------------------------------------------

    def score(self, provider: str) -> Score:
        """
        How much speaks for sending the next call to *provider*: the points of all its packages (S1.53, S1.54).

        By the same statuses that the API shows (S1.56). Never raises: where those fail, by the catalogue alone (S1.55).
        """
        (score,) = self.scores((provider,))
        return score

    def scores(self, providers: Iterable[str]) -> list[Score]:
        """The scores of *providers*, in their order."""
        names = list(providers)
        try:
            packages = self.packages()
            statuses = self.statuses()
        except Exception:
            logger.exception("Providers are scored by the catalogue alone.")
            packages = dict(self._written())
            statuses = []
            for package in packages.values():
                with suppress(Exception):
                    statuses.append(status_of(package, self._clock()))
        users = {name: package.providers for name, package in packages.items()}
        return [
            score_of(name, [each for each in statuses if name in users.get(each.package_id, ())], self._weights)
            for name in names
        ]

    def rank(self, providers: Iterable[str]) -> list[str]:
        """
        *providers*, the one to use first: credits that would expire before those that last (S1.57).

        Equal ones stay in the order given; those of which nothing is left come last.
        """
        return [score.provider for score in ranked(self.scores(providers))]

    # -- for pages -----------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """
        Everything as plain JSON values (S1.48).

        ``packages``, ``count``, ``by_alert`` (those that there are), ``has_use_or_lose``, ``has_exhausted`` and
        ``header_snapshots``, by provider: `header_snapshot` of each. Holds no header, credential or organisation.
        """
        statuses = self.statuses()
        by_alert: dict[str, int] = {}
        for status in statuses:
            by_alert[status.alert] = by_alert.get(status.alert, 0) + 1
        return {
            "packages": [status.to_dict() for status in statuses],
            "count": len(statuses),
            "by_alert": by_alert,
            "has_use_or_lose": "use_or_lose" in by_alert,
            "has_exhausted": "exhausted" in by_alert,
            "header_snapshots": {name: header_snapshot(reading) for name, reading in self.readings.all().items()},
        }


def header_snapshot(reading: Reading) -> dict[str, Any]:
    """What one provider's headers said last, as plain values: requests and tokens by name, and all limits (S1.48)."""
    shown: dict[str, Any] = {"dialect": reading.dialect, "observed_at": iso_time(reading.observed_at)}
    for resource in ("requests", "tokens"):
        limit = reading.limit(resource)
        reset_at = None if limit is None else limit.reset_at
        shown[f"limit_{resource}"] = None if limit is None else limit.limit
        shown[f"remaining_{resource}"] = None if limit is None else limit.remaining
        shown[f"reset_{resource}"] = None if reset_at is None else iso_time(reset_at)
    shown["retry_after_seconds"] = reading.retry_after_s
    shown["verdict"] = reading.verdict
    shown["limits"] = [limit.to_dict() for limit in reading.limits]
    return shown


def _over(written: Package, before: Package, changed: Package) -> Package:
    """
    What an update *changed* of what stood there *before*, unless the file was *written* since.

    By a poll that is newer, or by a person, who leaves the time of the last poll as it is.
    """
    if _told(written) != _told(before):
        at = written.last_updated or ""
        if at >= (changed.last_updated or "") or at == (before.last_updated or ""):
            return written
    return replace(
        written,
        used=changed.used,
        total=changed.total,
        source=changed.source,
        confidence=changed.confidence,
        last_updated=changed.last_updated,
    )


def _told(package: Package) -> tuple[object, ...]:
    return package.used, package.total, package.source, package.confidence, package.last_updated


def _by_id(packages: Iterable[Package]) -> Mapping[str, Package]:
    known: dict[str, Package] = {}
    for package in packages:
        if not isinstance(package, Package):
            raise ConfigurationError(f"{package!r} is no Package. Pass the name of a catalogue file, or Package(...)s.")
        known[package.package_id] = package
    return known
