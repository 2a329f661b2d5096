"""The tracker: what packages still allow, out of everything that is known here."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas import packages
from asgi_metering.quotas.packages import Package, read_package
from asgi_metering.upstream.catalogue import template, write_usage
from asgi_metering.upstream.readings import QuotaReadings
from asgi_metering.upstream.tracker import QuotaTracker
from asgi_metering.upstream.usage_log import UsageLog
from tests.upstream.test_usage_log import NOW, clock, event


def package(name: str, **fields: object) -> Package:
    """A package of acme."""
    return read_package({"provider_id": "acme", **fields}, name)


def test_status_takes_the_burn_of_our_own_calls() -> None:
    """What seven days cost, divided by them, says how long credits last, and if they would be lost (S1.7, S1.56)."""
    log = UsageLog(clock=clock)
    log.add([event(day, at=NOW - 86_400 * day) for day in range(1, 8)] + [event(99, at=NOW - 86_400 * 9)])
    mine = package("c", total_credits=100, used_credits=50, expiry_date="2025-08-31")
    tracker = QuotaTracker([mine], log=log, clock=clock)
    (status,) = tracker.statuses()
    assert (status.burn_per_day, status.projected_days_left, status.alert) == (2, 25, "use_or_lose")
    assert tracker.snapshot()["packages"][0]["alert"] == tracker.score("acme").packages[0].alert == "use_or_lose"
    assert tracker.score("acme").points == 2 + 2 + 3
    month = QuotaTracker([mine], log=log, burn_days=30, clock=clock).status("c")
    assert month is not None
    assert month.burn_per_day == 16 / 30
    without = QuotaTracker([mine], clock=clock).status("c")
    assert without is not None
    assert (without.burn_per_day, without.alert) == (None, "ok")
    log.close()


def test_status_counts_our_own_calls_by_window() -> None:
    """Windows and days count what went to all of their names, by the package's weights (S1.11 to S1.13, S1.20)."""
    log = UsageLog(clock=clock)
    log.add(
        [
            event(1, at=NOW - 6 * 3600),
            event(2, at=NOW - 3600, model="opus"),
            event(3, "acme-free", at=NOW - 60),
            event(4, at=NOW - 13 * 3600),
        ]
    )
    window = package("w", package_type="rolling_window", limit_per_window=40, model_weights={"opus": 5})
    both = package("b", package_type="rolling_window", limit_per_window=40, extra_provider_ids=["acme-free"])
    day = package("d", package_type="daily", limit_per_day=10)
    tracker = QuotaTracker([window, both, day], log=log, clock=clock)
    assert {status.package_id: status.used for status in tracker.statuses()} == {"w": 5, "b": 2, "d": 2}
    assert [score.points for score in tracker.scores(["acme", "acme-free"])] == [4 + 4 + 4, 4]
    log.close()


def test_status_of_a_captured_package_follows_the_readings() -> None:
    """What a worker's own answers said is what status, API and routing show, by provider and label (S1.42, S1.43)."""
    readings = QuotaReadings(clock=clock)
    fields = {"package_type": "rolling_window", "limit_per_window": 40, "source": "header_capture"}
    eu = package("eu", **fields, label="eu")
    log = UsageLog(clock=clock)
    log.add([event(1)])
    tracker = QuotaTracker(
        [package("all", **fields), eu, package("tokens", **fields, resource="tokens")],
        readings=readings,
        log=log,
        clock=clock,
    )
    assert [status.used for status in tracker.statuses()] == [1, 1, 0]
    headers = [(b"x-ratelimit-limit-requests", b"60"), (b"x-ratelimit-remaining-requests", b"6")]
    readings.record("acme", headers, 200, NOW)
    readings.record("acme", [(b"retry-after", b"9")], 429, NOW, label="eu")
    assert [(status.total, status.used) for status in tracker.statuses()] == [(60, 54), (40, 1), (40, 0)]
    snapshot = tracker.snapshot()
    assert snapshot["by_alert"] == {"watch": 1, "ok": 2}
    assert snapshot["header_snapshots"]["acme"]["remaining_requests"] == 6
    assert snapshot["header_snapshots"]["acme/eu"]["retry_after_seconds"] == 9
    log.close()


def test_log_keeps_what_packages_and_the_burn_look_back_at(tmp_path: Path) -> None:
    """A burn over 90 days and a window of 60 are taken of all of these days, however long a log keeps (S1.7, S1.11)."""
    catalogue, day = tmp_path / "quotas.json", 86_400.0
    entry = {"provider_id": "acme", "package_type": "rolling_window", "limit_per_window": 100, "window_hours": 60 * 24}
    catalogue.write_text(json.dumps({"packages": {"w": entry, "c": {"provider_id": "acme", "total_credits": 900}}}))
    log = UsageLog(tmp_path / "log.db", clock=lambda: NOW)
    tracker = QuotaTracker(catalogue, log=log, burn_days=90, clock=lambda: NOW)
    log.add([event(number, at=NOW - days * day) for number, days in enumerate((89, 59, 1))])
    # As a process that starts anew, whose first batch throws away what is too old.
    log.close()
    again = UsageLog(tmp_path / "log.db", clock=lambda: NOW)
    later = QuotaTracker(catalogue, log=again, burn_days=90, clock=lambda: NOW)
    again.add([event(9, at=NOW)])
    window, prepaid = later.statuses()
    assert (window.used, prepaid.burn_per_day) == (3, pytest.approx(8 / 90))
    # A catalogue that asks for more from now on is heard as well.
    catalogue.write_text(json.dumps({"packages": {"w": {**entry, "window_hours": 200 * 24}}}))
    assert later.status("w") is not None
    assert again.keep_days >= 200
    assert tracker.log is log
    again.close()


def test_update_changes_a_package_that_is_there(caplog: pytest.LogCaptureFixture) -> None:
    """Used, source, confidence and the moment change; a package that is not there is told of and not made (S1.16)."""
    tracker = QuotaTracker([package("c", total_credits=10)], clock=clock)
    assert tracker.update("c", used=4, source="api_poll", confidence="high")
    status = tracker.status("c")
    assert status is not None
    assert (status.total, status.used, status.source, status.confidence) == (10, 4, "api_poll", "high")
    assert status.last_updated == "2025-08-21T12:40:00Z"
    with caplog.at_level(logging.WARNING):
        assert not tracker.update("nobody", used=4)
    assert "'nobody'" in caplog.text
    assert tracker.status("nobody") is None
    assert list(tracker.packages()) == ["c"]


def test_update_gives_way_to_a_newer_file(tmp_path: Path) -> None:
    """What another worker wrote later is what counts; another field of the file may change meanwhile (S1.41)."""
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"packages": {"c": {"total_credits": 10}}}))
    tracker = QuotaTracker(path, clock=clock)
    tracker.update("c", used=4)
    assert tracker.packages()["c"].used == 4
    path.write_text(json.dumps({"packages": {"c": {"total_credits": 10, "notes": "mine"}}}))
    assert (tracker.packages()["c"].used, tracker.packages()["c"].notes) == (4, "mine")
    entry = {"total_credits": 10, "used_credits": 7, "last_updated": "2025-08-21T12:41:00Z"}
    path.write_text(json.dumps({"packages": {"c": entry}}))
    assert tracker.packages()["c"].used == 7
    path.write_text(json.dumps({"packages": {}}))
    assert tracker.packages() == {}


def test_update_gives_way_to_what_a_person_writes(tmp_path: Path) -> None:
    """Who edits a catalogue is heard, also if the time of the last poll still stands in it (S1.16, S1.30)."""
    path = tmp_path / "quotas.json"

    def write(**fields: object) -> None:
        path.write_text(json.dumps({"packages": {"c": {"provider_id": "acme", **fields}}}))

    told = {"total_credits": 25, "used_credits": 10, "source": "api_poll", "last_updated": "2025-08-01T00:00:00Z"}
    write(**told)
    tracker = QuotaTracker(path, clock=clock)
    assert tracker.update("c", used=12, total=25, confidence="high")
    # Not yet in the file; then the poller's own write, which changes nothing.
    assert tracker.packages()["c"].used == 12
    write_usage(path, tracker.packages())
    assert tracker.packages()["c"].used == 12
    written = json.loads(path.read_text())["packages"]["c"]
    # A top-up and a new source, noted by hand.
    write(**{**written, "total_credits": 100, "source": "manual", "notes": "paid"})
    found = tracker.packages()["c"]
    assert (found.total, found.used, found.source, found.notes) == (100, 12, "manual", "paid")
    # What is told after that counts again.
    assert tracker.update("c", used=13)
    assert (tracker.packages()["c"].used, tracker.packages()["c"].total) == (13, 100)


def test_update_outlives_a_change_of_what_it_does_not_tell(tmp_path: Path) -> None:
    """Notes, weights and dates are the catalogue's own: to edit them takes back nothing that was told (S1.16)."""
    path = tmp_path / "quotas.json"
    entry = {"provider_id": "acme", "total_credits": 25, "used_credits": 10}
    path.write_text(json.dumps({"packages": {"c": entry}}))
    tracker = QuotaTracker(path, clock=clock)
    assert tracker.update("c", used=12)
    path.write_text(json.dumps({"packages": {"c": {**entry, "notes": "mine"}}}))
    assert (tracker.packages()["c"].used, tracker.packages()["c"].notes) == (12, "mine")


def test_one_broken_package_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that cannot be read, and one that has no status, are logged; the others have theirs (S1.17)."""
    path = tmp_path / "q.json"
    path.write_text(json.dumps({"packages": {"good": {"total_credits": 1}, "bad": {"source": "?"}}}))
    tracker = QuotaTracker(path, clock=clock)
    assert [status.package_id for status in tracker.statuses()] == ["good"]
    assert len(tracker.problems()) == 1
    monkeypatch.setitem(packages.WINDOWS, "leap", lambda package, now: 1 / 0)
    broken = Package(package_id="zone", package_type="leap")
    with caplog.at_level(logging.ERROR):
        statuses = QuotaTracker([broken, package("c", total_credits=1)], clock=clock).statuses()
    assert [status.package_id for status in statuses] == ["c"]
    assert "'zone' has no status" in caplog.text
    assert QuotaTracker([broken]).problems() == ()


class CountedLog(UsageLog):
    """A log that counts how often it is asked."""

    asked = 0

    def cost(self, providers: Sequence[str], since: float) -> float:
        """Count."""
        self.asked += 1
        return super().cost(providers, since)


def test_status_asks_the_log_once_a_second() -> None:
    """A router asks for every call: the log is looked into again when it was written here, and a second later."""
    now = [NOW]
    log = CountedLog(clock=lambda: now[0])
    tracker = QuotaTracker([package("c", total_credits=5)], log=log, clock=lambda: now[0])
    for _ in range(3):
        tracker.rank(["acme"])
    assert log.asked == 1
    log.add([event(1)])
    tracker.statuses()
    assert log.asked == 2
    now[0] += 0.9
    tracker.statuses()
    assert log.asked == 2
    now[0] += 0.2
    tracker.statuses()
    assert log.asked == 3
    log.close()


class BrokenLog(UsageLog):
    """A log that fails as no log should."""

    def cost(self, providers: object, since: float) -> float:
        """Fail."""
        raise sqlite3.DatabaseError("malformed")


def test_score_goes_on_where_the_tracker_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Credits are scored by the catalogue alone then, and nothing is raised (S1.55)."""
    mine = package("c", total_credits=100, used_credits=50, expiry_date="2025-08-25")
    tracker = QuotaTracker([mine], clock=clock)
    whole = tracker.score("acme")

    def fails() -> object:
        raise RuntimeError("no statuses today")

    monkeypatch.setattr(tracker, "statuses", fails)
    with caplog.at_level(logging.ERROR):
        assert tracker.score("acme") == whole == ("acme", 2 + 5, whole.packages)
    assert "by the catalogue alone" in caplog.text
    assert QuotaTracker([mine], log=BrokenLog(), clock=clock).score("acme").points == 7


def test_score_goes_on_by_the_file_where_the_tracker_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A catalogue file is scored by its raw fields as well, and a package that fails costs no other (S1.55, S1.17)."""
    path = tmp_path / "quotas.json"
    entry = {"provider_id": "acme", "total_credits": 100, "used_credits": 50, "expiry_date": "2025-08-25"}
    monkeypatch.setitem(packages.WINDOWS, "leap", lambda package, now: 1 / 0)
    path.write_text(json.dumps({"packages": {"c": entry, "w": {"provider_id": "acme", "package_type": "leap"}}}))
    tracker = QuotaTracker(path, clock=clock)
    whole = tracker.score("acme")
    assert whole.points == 7

    def fails() -> object:
        raise RuntimeError("no statuses today")

    monkeypatch.setattr(tracker, "statuses", fails)
    assert tracker.score("acme") == whole
    monkeypatch.setattr(tracker, "packages", fails)
    assert tracker.score("acme") == whole


def test_rank_sends_calls_to_what_would_expire() -> None:
    """Ten days of expiry and a real burn come before half a year of runway; unknown names keep their order (S1.57)."""
    log = UsageLog(clock=clock)
    log.add([event(1, "kilo", at=NOW - 60), event(2, "deepseek", at=NOW - 60)])
    kilo = read_package({"provider_id": "kilo", "total_credits": 25, "expiry_date": "2025-08-31"}, "k")
    deepseek = read_package({"provider_id": "deepseek", "total_credits": 25}, "d")
    tracker = QuotaTracker([deepseek, kilo], log=log, clock=clock)
    assert tracker.rank(["deepseek", "y", "kilo", "x"]) == ["kilo", "deepseek", "y", "x"]
    log.close()


def test_snapshot_of_the_template_and_of_nothing(tmp_path: Path) -> None:
    """Eleven packages that are all fine; without a catalogue nothing, and no error (S1.48, S1.49)."""
    path = tmp_path / "q.json"
    path.write_text(template())
    snapshot = QuotaTracker(path).snapshot()
    assert (snapshot["count"], snapshot["by_alert"]) == (11, {"ok": 11})
    json.dumps(snapshot, allow_nan=False)
    nothing = {
        "packages": [],
        "count": 0,
        "by_alert": {},
        "has_use_or_lose": False,
        "has_exhausted": False,
        "header_snapshots": {},
    }
    assert QuotaTracker(tmp_path / "missing.json").snapshot() == QuotaTracker().snapshot() == nothing


def test_tell_at_once_what_is_wrong_with_the_catalogue(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A catalogue that is missing or broken is told of when the tracker is made, once, with the mend (DESIGN 2)."""
    tracker = QuotaTracker(tmp_path / "missing.json")
    tracker.statuses()
    (told,) = caplog.messages
    assert told.startswith(f"There is no catalogue '{tmp_path}/missing.json', so that no package is tracked.")
    assert told.endswith("asgi-metering init missing.json")
    (tmp_path / "broken.json").write_text("{")
    caplog.clear()
    QuotaTracker(tmp_path / "broken.json")
    assert "broken.json" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [({"packages": [3]}, "3 is no Package"), ({"burn_days": 0}, "burn_days=0 is no number of days")],
)
def test_tracker_of_what_cannot_work_is_refused(arguments: dict[str, object], sentence: str) -> None:
    """Misuse is told when it is made."""
    with pytest.raises(ConfigurationError, match=sentence):
        QuotaTracker(**arguments)  # type: ignore[arg-type]


def test_tracker_opens_a_log_by_its_path(tmp_path: Path) -> None:
    """A path is a log in that file."""
    tracker = QuotaTracker([package("c", total_credits=5)], log=tmp_path / "log.db")
    assert tracker.log is not None
    tracker.log.add([event(1, at=time.time() - 9)])
    status = tracker.status("c")
    assert status is not None
    assert status.burn_per_day == 2 / 7
    tracker.log.close()
