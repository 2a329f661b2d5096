"""Readings that the workers of a machine share."""

from __future__ import annotations

import json
import sqlite3
import threading
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.cli import main
from asgi_metering.quotas import QuotaLimit, Reading
from asgi_metering.quotas.packages import read_package
from asgi_metering.quotas.verdicts import Verdict
from asgi_metering.upstream.readings import QuotaReadings
from asgi_metering.upstream.shared import KEEP_S, SharedReadings
from asgi_metering.upstream.tracker import QuotaTracker
from asgi_metering.upstream.usage_log import UsageLog
from tests.quotas.refusals import GOOGLE_DAY
from tests.upstream.test_usage_log import NOW, clock

NEVER_S = 3_600.0
"""Nothing is shared by itself while a test runs."""


def worker(path: Path, **options: float) -> tuple[QuotaReadings, SharedReadings]:
    """The readings of one worker, and what shares them."""
    readings = QuotaReadings(clock=clock)
    return readings, SharedReadings(path, readings, clock=clock, **{"share_after_s": NEVER_S, **options})


def left(count: int) -> list[tuple[bytes, bytes]]:
    """Headers that tell how many requests are left."""
    return [(b"x-ratelimit-remaining-requests", str(count).encode())]


def test_workers_see_what_others_were_told(tmp_path: Path) -> None:
    """What one reads the other has, label and all, once both have looked (S1.41)."""
    (here, mine), (there, theirs) = worker(tmp_path / "q.db"), worker(tmp_path / "q.db")
    here.record("openai", left(9), 200, NOW)
    here.record("openai", [(b"retry-after", b"7")], 429, NOW, label="eu")
    here.record("google", [], 429, NOW, label="eu", body=GOOGLE_DAY)
    mine.share()
    theirs.look()
    assert there.all() == here.all()
    there.record("openai", left(8), 200, NOW + 1)
    theirs.share()
    mine.share()
    assert here.latest("openai") == there.latest("openai")
    assert here.all().keys() == {"openai", "openai/eu", "google/eu@gemini-2.5-flash"}


def test_older_answer_of_another_worker_replaces_nothing(tmp_path: Path) -> None:
    """Whoever writes last, the newest answer stays, each part of it by itself (S1.45)."""
    (here, mine), (there, theirs) = worker(tmp_path / "q.db"), worker(tmp_path / "q.db")
    here.record("openai", left(5), 200, NOW - 1)
    there.record("openai", [(b"retry-after", b"7")], 429, NOW)
    there.record("openai", left(9), 200, NOW - 2)
    for each in (mine, theirs, mine):
        each.share()
    for readings in (here, there):
        latest = readings.latest("openai")
        assert latest is not None
        assert (latest.status, latest.retry_after_s, latest.limits[0].remaining) == (429, 7, 5)


def test_readings_are_shared_by_themselves(tmp_path: Path) -> None:
    """A new reading is written a moment later, in a thread that ends; nothing is written on the response's path."""
    readings, shared = worker(tmp_path / "q.db", share_after_s=0.0)
    written = threading.Event()
    share = shared.share

    def sharing() -> None:
        share()
        written.set()

    shared.share = sharing  # type: ignore[method-assign]
    readings.record("openai", left(9), 200, NOW)
    assert written.wait(10)
    other, theirs = worker(tmp_path / "q.db")
    theirs.look()
    assert other.latest("openai") == readings.latest("openai")


def test_tracker_that_calls_nobody_shows_what_workers_were_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process, such as the command line, knows the limits of the running workers (S1.41, S1.43)."""
    readings, shared = worker(tmp_path / "usage.db")
    headers = [(b"x-ratelimit-limit-requests", b"60"), (b"x-ratelimit-remaining-requests", b"6")]
    readings.record("acme", headers, 200, NOW)
    shared.share()
    entry = {"provider_id": "acme", "package_type": "rolling_window", "source": "header_capture"}
    tracker = QuotaTracker([read_package(entry, "w")], log=UsageLog(tmp_path / "usage.db"), clock=clock)
    (status,) = tracker.statuses()
    assert (status.total, status.used, status.confidence) == (60, 54, "high")
    # The command line has the time of the machine, by which all of that is over.
    told = QuotaReadings()
    told.record("acme", headers, 200)
    SharedReadings(tmp_path / "usage.db", told).share()
    (tmp_path / "quotas.json").write_text(json.dumps({"packages": {"w": entry}}))
    assert main(["quotas", str(tmp_path / "quotas.json"), "--log", str(tmp_path / "usage.db")]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:5] == ["watch", "acme", "w", "6", "60"]


def test_file_that_is_missing_or_broken_costs_nothing(tmp_path: Path) -> None:
    """Looking makes nothing and raises nothing, and what could not be written is later (S1.15, S1.39)."""
    missing, broken = tmp_path / "missing.db", tmp_path / "folder" / "q.db"
    worker(missing)[1].look()
    assert not missing.exists()
    readings, shared = worker(broken)
    readings.record("openai", left(9), 200, NOW)
    shared.share()
    broken.parent.mkdir()
    shared.share()
    other, theirs = worker(broken)
    theirs.look()
    assert other.latest("openai") == readings.latest("openai")


def test_rows_of_another_version_and_of_last_month_are_passed_over(tmp_path: Path) -> None:
    """What cannot be read is left alone, and what nobody renewed for a week goes."""
    path = tmp_path / "q.db"
    readings, shared = worker(path)
    readings.record("openai", left(9), 200, NOW)
    readings.record("groq", left(9), 200, NOW - KEEP_S - 1)
    shared.share()
    file = sqlite3.connect(path)
    file.execute("INSERT INTO readings VALUES ('odd', ?, '{\"provider\": 1}')", (NOW,))
    named = json.dumps(Reading(provider="no name", dialect="openai", observed_at=NOW).to_dict())
    file.execute("INSERT INTO readings VALUES ('no name', ?, ?)", (NOW, named))
    file.commit()
    readings.record("openai", left(8), 200, NOW)
    shared.share()
    assert {series for (series,) in file.execute("SELECT series FROM readings")} == {"openai", "odd", "no name"}
    file.close()
    other, theirs = worker(path)
    theirs.look()
    assert other.all().keys() == {"openai"}


MOMENTS = st.floats(min_value=0, max_value=4e9)
LIMITS = st.builds(
    QuotaLimit,
    resource=st.from_regex("[a-z_]{1,20}", fullmatch=True),
    limit=st.none() | st.integers(0, 2**53 - 1),
    remaining=st.none() | st.integers(0, 2**53 - 1),
    reset_at=st.none() | MOMENTS,
    utilization=st.none() | st.decimals(0, 1000, places=4),
    state=st.none() | st.just("allowed"),
)


@settings(max_examples=50)
@given(
    st.builds(
        Reading,
        provider=st.just("acme"),
        dialect=st.just("openai"),
        observed_at=MOMENTS,
        status=st.none() | st.integers(100, 599),
        limits=st.lists(LIMITS, max_size=4).map(tuple),
        retry_after_s=st.none() | MOMENTS,
        received_at=st.none() | MOMENTS,
        limits_observed_at=st.none() | MOMENTS,
        verdict=st.none() | st.sampled_from(Verdict),
        model=st.none() | st.just("gemini-2.5-flash"),
    )
)
def test_reading_comes_back_from_json_as_it_was(reading: Reading) -> None:
    """To plain JSON and back nothing is lost, not a digit of a share."""
    again = Reading.from_dict(json.loads(json.dumps(reading.to_dict())))
    assert again == reading
    assert again.verdict is reading.verdict


@pytest.mark.parametrize("change", [{"limits": None}, {"verdict": "odd"}, {"observed_at": "x"}, {"status": []}])
def test_reading_that_was_never_written_is_refused(change: dict[str, object]) -> None:
    """What to_dict never returned raises one of the errors that its docstring names."""
    stored = Reading(provider="a", dialect="openai", observed_at=1.0).to_dict()
    with pytest.raises((ValueError, TypeError, KeyError)):
        Reading.from_dict({**stored, **change})
    limit = QuotaLimit(resource="r", utilization=Decimal("0.5"))
    assert QuotaLimit.from_dict(limit.to_dict()) == limit
