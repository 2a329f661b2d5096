"""Catalogues: which entries are read, and what is said of those that are not."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas import packages
from asgi_metering.quotas.packages import Package, midnight, read_catalogue, read_package, register_package_type
from asgi_metering.quotas.scoring import score_of
from asgi_metering.quotas.status import Counted, status_of
from tests.quotas.captures import NOW

DAY_S = 86_400


def test_read_package_fills_in_what_is_not_told() -> None:
    """Types, sources, confidences and ids have their defaults, always the same (S1.2, S1.3, S1.5)."""
    bare = read_package({})
    assert (bare.package_id, bare.provider_id, bare.package_type) == ("unknown-credits", "unknown", "credits")
    assert (bare.source, bare.confidence, bare.total, bare.used) == ("manual", "medium", 0, 0)
    window = read_package({"provider_id": "acme", "package_type": "rolling_window"})
    assert (window.package_id, window.window_hours) == ("acme-rolling_window", 5)
    assert read_package({"provider_id": "acme"}, "mine").package_id == "mine"
    assert read_package({"package_id": "own"}, "key").package_id == "own"
    assert (bare.api_key_env, read_package({"api_key_env": "ACME_KEY"}).api_key_env) == (None, "ACME_KEY")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"package_type": "weird"}, "package_type is 'weird'. Use one of credits, rolling_window, daily"),
        ({"source": "guess"}, "source is 'guess'"),
        ({"confidence": 1}, "confidence is 1"),
        ({"total": math.nan}, "total is nan, and no number from 0 up"),
        ({"used": -1}, "used is -1"),
        ({"total": True}, "total is True"),
        ({"window_hours": 0}, "window_hours is 0"),
        ({"zone": "Nowhere/At_all"}, "zone is 'Nowhere/At_all', and no zone"),
        ({"expiry_date": 20300101}, "expiry_date is 20300101"),
        ({"model_weights": {"m": "heavy"}}, "model_weights.m is 'heavy'"),
        ({"extra_provider_ids": "acme"}, "extra_provider_ids is 'acme', and no list"),
        ({"api_key_env": "sk-secret"}, "api_key_env is no name of a variable"),
        ({"package_id": ""}, "package_id is empty"),
    ],
)
def test_package_of_code_is_checked_as_one_of_a_file(fields: dict[str, Any], sentence: str) -> None:
    """What cannot be is refused where it is written, and shown to nobody as a status (S1.3)."""
    with pytest.raises(ConfigurationError, match=re.escape(sentence)) as refused:
        Package(**{"package_id": "p", **fields})
    assert "sk-secret" not in str(refused.value)


def test_package_of_code_holds_what_can_be_shown() -> None:
    """Dates and extras of code become what JSON can say, and what is named like a credential is left out (S1.1)."""
    made = Package(
        package_id="p",
        total="25",  # type: ignore[arg-type]
        expiry_date=date(2030, 1, 1),  # type: ignore[arg-type]
        extra_provider_ids=["other"],  # type: ignore[arg-type]
        extras={"bought": date(2029, 1, 1), "api_key": "secret"},
    )
    assert (made.total, made.expiry_date, made.providers) == (25, "2030-01-01", ("unknown", "other"))
    assert made.extras == {"bought": "2029-01-01"}
    json.dumps(status_of(made, NOW).to_dict(), allow_nan=False)


def month(package: Package, now: float) -> tuple[float, float]:
    """The calendar month of UTC."""
    first = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return first.timestamp(), (first + timedelta(days=32)).replace(day=1).timestamp()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A type of one's own, for one test."""
    monkeypatch.setattr(packages, "WINDOWS", dict(packages.WINDOWS))
    register_package_type("test-month", month)


@pytest.mark.usefixtures("registered")
def test_register_a_type_of_ones_own() -> None:
    """A type is a window that a function tells; a package of it is read and shown as any other window (S1.2)."""
    now = datetime(2026, 11, 16, tzinfo=UTC).timestamp()
    package = read_package({"provider_id": "acme", "package_type": "test-month", "limit_per_window": 100})
    assert (package.package_id, package.total) == ("acme-test-month", 100)
    assert package.window_start(now) == datetime(2026, 11, 1, tzinfo=UTC).timestamp()
    found = status_of(package, now, counted=Counted(75, now - 60))
    assert (found.package_type, found.used, found.alert) == ("test-month", 75, "watch")
    assert (found.reset_at, found.window_hours) == ("2026-12-01T00:00:00Z", None)
    assert found.pace == pytest.approx(0.25)
    assert score_of("acme", [found]).points == 1
    register_package_type("test-month", month)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "window", "sentence"),
    [
        ("daily", month, "'daily' is known already"),
        ("credits", month, "'credits' is known already"),
        ("test-month", lambda package, now: (0, 1), "'test-month' is known already"),
        ("a b", month, "Choose another"),
        ("other", 3, "window=3 cannot be called"),
    ],
)
def test_refuse_a_type_that_is_none(name: str, window: Any, sentence: str) -> None:
    """A type has a name of its own, and a function (S1.2)."""
    with pytest.raises(ConfigurationError, match=sentence):
        register_package_type(name, window)


@pytest.mark.parametrize(
    ("entry", "total", "used"),
    [
        ({"total_credits": 25, "used_credits": "12.40"}, 25, 12.4),
        ({"package_type": "rolling_window", "limit_per_window": 40}, 40, 0),
        ({"package_type": "daily", "limit_per_day": 1500, "used_credits": 3}, 1500, 3),
        ({"total": 7, "used": 2}, 7, 2),
        ({"total_credits": None, "expiry_date": ""}, 0, 0),
    ],
)
def test_read_package_takes_the_names_of_older_files(entry: dict[str, object], total: float, used: float) -> None:
    """Totals have a name for each type, and numbers may be text (S1.18)."""
    package = read_package(entry)
    assert (package.total, package.used) == (total, used)


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"package_type": "weekly"}, "package_type is 'weekly'. Use one of credits, rolling_window, daily."),
        ({"source": "guess"}, "source is 'guess'. Use one of api_poll, header_capture, local_count, manual."),
        ({"confidence": 1}, "confidence is 1. Use one of high, medium, low, estimated."),
        ({"total_credits": "many"}, "total_credits is 'many', and no number from 0 up. Write one such as 25."),
        ({"used_credits": -1}, "used_credits is -1, and no number from 0 up. Write one such as 25."),
        ({"total_credits": True}, "total_credits is True, and no number from 0 up. Write one such as 25."),
        ({"total_credits": "nan"}, "total_credits is 'nan', and no number from 0 up. Write one such as 25."),
        ({"total_credits": [1]}, "total_credits is [1], and no number from 0 up. Write one such as 25."),
        ({"window_hours": 0}, "window_hours is 0, and no window is that short. Write 5, say."),
        ({"provider_id": 3}, "provider_id is 3, and no text of at most 2000 characters. Write one."),
        ({"extra_provider_ids": "b"}, "extra_provider_ids is 'b', and no list. Write one of names."),
        ({"model_weights": [1]}, "model_weights is [1], and no object of models and numbers. Write one."),
        (
            {"model_weights": {"m": "x"}},
            "model_weights.m is 'x', and no number from 0 up. Write one such as 25.",
        ),
        (
            {"api_key_env": "sk-secret"},
            "api_key_env is no name of a variable. Write the one that has the key, not the key.",
        ),
        ({"zone": "Mars/Olympus"}, "zone is 'Mars/Olympus', and no zone. Write 'UTC' or 'Europe/Berlin', say."),
        ([], " is [], and no object. Write its fields by name."),
    ],
)
def test_read_package_says_which_field_is_wrong(entry: object, sentence: str) -> None:
    """Each mistake is one sentence with the field and its value, and one that mends it (S1.3, S1.18)."""
    with pytest.raises(ConfigurationError) as wrong:
        read_package(entry)
    assert str(wrong.value) == sentence


def test_read_catalogue_leaves_out_what_is_broken() -> None:
    """A broken entry is told of with file and key, and the others are read (S1.17, S1.18)."""
    catalogue = read_catalogue(
        {"packages": {"good": {"provider_id": "a"}, "bad": {"total_credits": "x"}, "worse": 3}}, "quotas.json"
    )
    assert list(catalogue.packages) == ["good"]
    assert catalogue.problems == (
        "quotas.json: packages.bad.total_credits is 'x', and no number from 0 up. Write one such as 25.",
        "quotas.json: packages.worse is 3, and no object. Write its fields by name.",
    )


def test_read_catalogue_keeps_what_it_does_not_know() -> None:
    """Files of any 1.x load, whatever else they hold; unknown fields of an entry are its extras (S1.18)."""
    entry = {"provider_id": "a", "provider_group": "g", "colour": {"red": 1}}
    for version in ({}, {"schema_version": "1.0"}, {"schema_version": 1.9, "_notes": ["x"]}):
        (package,) = read_catalogue({**version, "packages": {"p": entry}}, "f").packages.values()
        assert package.extras == {"provider_group": "g", "colour": {"red": 1}}
    assert read_catalogue({}, "f").packages == {}


def test_read_package_shows_no_credential_however_deep_it_stands() -> None:
    """What is named like one is no extra, wherever in the entry it is; the rest is what JSON can say."""
    hidden = {"api_key": "s", "headers": {"Authorization": "s", "accept": "a"}, "hosts": [{"token": "s", "name": "h"}]}
    odd = {"bought": date(2026, 1, 2), "most": math.inf, "none": None, "auth": "s", "author": "me", "pwd": "s"}
    extras = read_package({**hidden, **odd}).extras
    assert extras == {
        "headers": {"accept": "a"},
        "hosts": [{"name": "h"}],
        "bought": "2026-01-02",
        "most": "inf",
        "none": None,
        "author": "me",
    }
    assert json.loads(json.dumps(extras, allow_nan=False)) == extras


def test_read_package_ends_where_no_person_would_have_written_on() -> None:
    """Extras of a depth that nothing could show are cut off."""
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    assert len(json.dumps(read_package({"deep": deep}).extras)) < 100


def test_read_package_repeats_no_key_that_stands_where_its_name_should() -> None:
    """Who writes the key itself for the name of its variable is told so, without the key: the log would have it."""
    with pytest.raises(ConfigurationError, match=r"^api_key_env is no name of a variable") as refused:
        read_package({"api_key_env": "sk-live-1"})
    assert "sk-live" not in str(refused.value)


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        ([], "f holds no object"),
        ({"schema_version": "2.0"}, "f: schema_version '2.0' is not 1.x"),
        ({"packages": []}, "f: packages is no mapping"),
        ({"packages": {str(number): {} for number in range(1_001)}}, "f: packages is no mapping of at most 1000"),
    ],
)
def test_read_catalogue_refuses_what_is_none(payload: object, sentence: str) -> None:
    """What is no catalogue, or one of a later format, is refused as a whole."""
    with pytest.raises(ConfigurationError, match=sentence):
        read_catalogue(payload, "f")


def test_window_start_by_type_and_zone() -> None:
    """A day begins at midnight of its zone, UTC by default, and a rolling window so many hours ago (S1.11, S1.13)."""
    assert Package(package_id="r", package_type="rolling_window", window_hours=3).window_start(NOW) == NOW - 3 * 3600
    day = Package(package_id="d", package_type="daily")
    assert day.window_start(NOW) == NOW - NOW % DAY_S
    assert midnight(NOW, "UTC", 1) == NOW - NOW % DAY_S + DAY_S
    berlin = read_package({"package_type": "daily", "zone": "Europe/Berlin"})
    assert berlin.window_start(NOW) == NOW - NOW % DAY_S - 2 * 3600
    assert read_package({"provider_id": "a", "extra_provider_ids": ["b"]}).providers == ("a", "b")
