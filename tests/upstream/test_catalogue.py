"""Catalogue files: read, read again, and written."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.upstream.catalogue import CatalogueFile, back_up, load_catalogue, template, write_usage

CATALOGUE = {
    "schema_version": "1.1",
    "_notes": ["mine", {"deep": [1, None]}],
    "packages": {
        "kilo": {"provider_id": "kilocode", "total_credits": 25, "used_credits": 1, "colour": "red"},
        "key": {"package_id": "daily", "package_type": "daily", "limit_per_day": 10},
        "broken": {"total_credits": "x"},
        "odd": 3,
    },
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A catalogue of two packages, and two that are broken."""
    path = tmp_path / "quotas.json"
    path.write_text(json.dumps(CATALOGUE))
    return path


def test_template_covers_eleven_packages_of_seven_providers() -> None:
    """The template loads without a problem, and says what its fields mean (S1.18)."""
    payload = json.loads(template())
    assert payload["schema_version"] == "1.1"
    assert len(payload["packages"]) == 11
    vendors = {"deepseek", "openrouter", "kilo", "moonshot", "anthropic", "openai", "gemini"}
    aliases = {"kilocode": "kilo", "claude-code": "anthropic", "openai-codex": "openai"}
    named = {entry["provider_id"] for entry in payload["packages"].values()}
    assert {aliases.get(name, name) for name in named} == vendors
    assert any("package_type" in note for note in payload["_notes"])


def test_load_reads_json_and_toml_alike(path: Path, tmp_path: Path) -> None:
    """A catalogue may be TOML, with dates of its own (S1.18)."""
    toml = tmp_path / "quotas.toml"
    toml.write_text(
        'schema_version = "1.1"\n[packages.kilo]\nprovider_id = "kilocode"\ntotal_credits = 25\nused_credits = 1\n'
        "expiry_date = 2026-12-31\n"
    )
    kilo = load_catalogue(toml).packages["kilo"]
    assert kilo.expiry_date == "2026-12-31"
    assert replace(kilo, expiry_date=None) == replace(load_catalogue(path).packages["kilo"], extras={})


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("q.json", "{", "q.json cannot be parsed: Expecting property name"),
        ("q.toml", "=", "q.toml cannot be parsed: "),
        ("q.json", '{"packages": 3}', "q.json: packages is no mapping"),
        ("q.json", "[" * 100_000, "q.json cannot be parsed: "),
        ("q.json", " " * (5 << 20), "q.json has more than"),
        ("missing.json", None, "cannot be read: No such file or directory. Write one with: asgi-metering init"),
    ],
)
def test_load_says_what_is_wrong_with_a_file(tmp_path: Path, name: str, text: str | None, sentence: str) -> None:
    """A file that is none, too large or not there is one sentence (S1.18)."""
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigurationError) as wrong:
        load_catalogue(tmp_path / name)
    assert sentence in str(wrong.value)


def test_write_usage_keeps_everything_else(path: Path) -> None:
    """Only the numbers of the packages named change, also under a key that is not the id; the mode stays (S1.30)."""
    path.chmod(0o640)
    packages = load_catalogue(path).packages
    changes = {
        name: replace(package, used=3.5, total=30, source="api_poll", confidence="high", last_updated="now")
        for name, package in packages.items()
    }
    write_usage(path, {**changes, "gone": changes["kilo"]})
    written = json.loads(path.read_text())
    told = {"used_credits": 3.5, "source": "api_poll", "confidence": "high", "last_updated": "now"}
    assert written == {
        **CATALOGUE,
        "packages": {
            **CATALOGUE["packages"],  # type: ignore[dict-item]
            "kilo": {"provider_id": "kilocode", "colour": "red", "total_credits": 30, **told},
            "key": {"package_id": "daily", "package_type": "daily", "limit_per_day": 30, **told},
        },
    }
    assert path.stat().st_mode & 0o777 == 0o640
    assert [each.name for each in path.parent.iterdir()] == ["quotas.json"]


def test_write_usage_that_is_cut_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the new file takes its place the old one is whole; what could not be written is told of (S1.30)."""
    before = path.read_bytes()
    changes = {"kilo": load_catalogue(path).packages["kilo"]}
    seen: list[tuple[str, bytes]] = []

    def cut(source: Path, target: Path) -> None:
        seen.append((Path(source).name, path.read_bytes()))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", cut)
    with pytest.raises(ConfigurationError, match="cannot be written: No space left"):
        write_usage(path, changes)
    ((written, stood),) = seen
    assert (written.startswith("quotas.json."), stood) == (True, before)
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == ["quotas.json"]


def test_write_usage_touches_no_other_file(path: Path, tmp_path: Path) -> None:
    """What stands beside the catalogue stays, and a link stays one: the file that it names is written (S1.30)."""
    beside = tmp_path / "quotas.json.tmp"
    beside.write_text("mine")
    link = tmp_path / "link.json"
    link.symlink_to(path)
    changes = {"kilo": replace(load_catalogue(path).packages["kilo"], used=7)}
    write_usage(link, changes)
    assert link.is_symlink()
    assert load_catalogue(path).packages["kilo"].used == 7
    assert beside.read_text() == "mine"


def test_write_usage_twice_at_once_writes_whole_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two polls at once, by hand and by the application, each write a file of their own before it takes the place."""
    replace_, names = os.replace, []

    def taking(source: Path, target: Path) -> None:
        names.append(Path(source).name)
        if len(names) == 1:
            write_usage(path, {})
        replace_(source, target)

    monkeypatch.setattr(os, "replace", taking)
    write_usage(path, {})
    assert len(set(names)) == 2
    assert json.loads(path.read_text()) == CATALOGUE


def test_write_usage_into_toml_is_refused(tmp_path: Path) -> None:
    """There is no writer of TOML: the sentence says what to do."""
    with pytest.raises(ConfigurationError, match="Keep it as JSON"):
        write_usage(tmp_path / "quotas.toml", {})


def test_file_is_read_again_when_it_changes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Other processes see what the poller wrote; broken entries are told of once for each state (S1.17, S1.41)."""
    file = CatalogueFile(path)
    with caplog.at_level(logging.WARNING):
        first = file.read()
        assert file.read() is first
    assert list(first.packages) == ["kilo", "daily"]
    assert [record.getMessage()[:22] for record in caplog.records] == ["A package is left out:"] * 2
    write_usage(path, {"kilo": replace(first.packages["kilo"], used=7)})
    assert file.read().packages["kilo"].used == 7


def test_file_that_breaks_keeps_what_was_read(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A broken file changes nothing, one that is gone has no packages, and neither raises (S1.49)."""
    file = CatalogueFile(path)
    assert len(file.read().packages) == 2
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert len(file.read().packages) == 2
    assert "The packages stay as they were" in caplog.text
    path.unlink()
    assert file.read().packages == {}


def test_back_up_copies_a_file_with_its_times(path: Path) -> None:
    """The copy has the time in its name and the original's times and mode; those of one second differ (S1.59)."""
    os.utime(path, (1_000_000_000, 1_000_000_000))
    path.chmod(0o600)
    backups = [back_up(path) for _ in range(3)]
    assert len(set(backups)) == 3
    for backup in backups:
        assert backup is not None
        assert backup.name.startswith("quotas.json.bak." + time.strftime("%Y", time.gmtime()))
        assert len(backup.name.split(".")[3]) == 14
        assert backup.read_bytes() == path.read_bytes()
        assert (backup.stat().st_mtime, backup.stat().st_mode & 0o777) == (1_000_000_000, 0o600)
    assert back_up(path.with_name("absent")) is None
