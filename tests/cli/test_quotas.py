"""init, quotas, poll: catalogues of what upstreams still allow."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from asgi_metering import Metering
from asgi_metering.testing.provider.balances import Balances
from asgi_metering.upstream.catalogue import template
from asgi_metering.upstream.turns import Turn
from asgi_metering.upstream.usage_log import UsageLog
from tests.cli.commands import Run, rows, table
from tests.harness.servers import serve_in_thread
from tests.upstream.test_usage_log import event

KEY = "sk-secret"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a catalogue may be."""
    return tmp_path / "quotas.json"


def test_init_writes_the_template(run: Run, path: Path) -> None:
    """A new file is the template, which quotas shows whole; again changes nothing (S1.18, S1.49)."""
    code, output, errors = run("init", str(path))
    assert (code, errors) == (0, "")
    assert "eleven packages" in output
    assert path.read_text() == template()
    assert run("init", str(path)) == (0, f"{path} is the template already.\n", "")
    head, *lines = table(run("quotas", str(path)))
    assert head[:5] == ["alert", "provider", "package", "left", "total"]
    assert len(lines) == 11
    assert rows(run("quotas", str(path), "--json"))["by_alert"] == {"ok": 11}
    assert [each.name for each in path.parent.iterdir()] == ["quotas.json"]


def test_init_refuses_what_it_did_not_write(run: Run, path: Path) -> None:
    """All that is found is listed, nothing is written, and it fails; force makes a backup first (S1.58, S1.59)."""
    path.write_text("mine")
    path.with_suffix(".toml").write_text("too")
    turn = Turn(path)
    assert turn.take()
    code, output, errors = run("init", str(path))
    assert (code, output) == (2, "")
    for finding in ("quotas.json exists", "quotas.toml is a catalogue beside it", "a running process polls"):
        assert finding in errors
    assert path.read_text() == "mine"
    assert not list(path.parent.glob("*.bak.*"))
    code, output, errors = run("init", str(path), "--force")
    turn.give_back()
    (backup,) = path.parent.glob("*.bak.*")
    assert (code, errors) == (0, "")
    assert backup.name in output
    assert (backup.read_text(), path.read_text()) == ("mine", template())
    code, _, errors = run("init", str(path.parent))
    assert code == 2
    assert "is a folder" in errors


def test_quotas_shows_the_most_urgent_first(run: Run, path: Path) -> None:
    """Alerts are in order, burn comes from the log, broken entries are told of beside the table (S1.17, S1.19)."""
    packages = {
        "fine": {"provider_id": "a", "total_credits": 5},
        "gone": {"provider_id": "a", "expiry_date": "2001-01-01", "total_credits": 5},
        "burning": {"provider_id": "acme", "total_credits": 100, "used_credits": 98},
        "broken": {"source": "?"},
    }
    path.write_text(json.dumps({"packages": packages}))
    log = UsageLog(path.with_name("log.db"))
    log.add([event(1, at=time.time() - 60)])
    log.close()
    code, output, errors = run("quotas", str(path), "--log", str(path.with_name("log.db")))
    assert code == 0
    assert errors.startswith("asgi-metering: quotas.json: packages.broken.source is '?'.")
    lines = [line.split() for line in output.splitlines()][1:]
    assert [line[:3] for line in lines] == [
        ["exhausted", "a", "gone"],
        ["watch", "acme", "burning"],
        ["ok", "a", "fine"],
    ]
    assert lines[1][3:10] == ["2", "100", "-", "0.286/d", "7", "d", "-"]


def test_quotas_shows_what_workers_were_told(run: Run, path: Path) -> None:
    """With the application's store, limits are those that providers told any of its workers (S1.41, S1.43)."""
    entry = {"provider_id": "acme", "package_type": "rolling_window", "source": "header_capture"}
    path.write_text(json.dumps({"packages": {"w": entry}}))
    url = f"sqlite:///{path.parent}/metering.db"

    async def tell() -> None:
        async with Metering(url, sinks=()) as metering:
            headers = [(b"x-ratelimit-limit-requests", b"60"), (b"x-ratelimit-remaining-requests", b"6")]
            metering.quotas.record("acme", headers, 200)

    asyncio.run(tell())
    code, output, errors = run("quotas", str(path), "--store", url)
    assert (code, errors) == (0, "")
    assert output.splitlines()[1].split()[:5] == ["watch", "acme", "w", "6", "60"]
    assert run("quotas", str(path), "--store", "memory://")[0] == 2
    code, _, errors = run("quotas", str(path), "--store", f"sqlite:///{path.parent}/other.db")
    assert code == 2
    assert "There is no database" in errors


def test_quotas_of_a_file_that_is_none(run: Run, path: Path) -> None:
    """A catalogue that is not there, or cannot be read, is a mistake in one line."""
    for name in ("quotas", "poll"):
        code, output, errors = run(name, str(path))
        assert (code, output) == (2, "")
        assert "asgi-metering init FILE" in errors


@pytest.fixture
def balances() -> Iterator[tuple[Balances, str]]:
    """A provider of balances, and where it is."""
    app = Balances(key=KEY)
    with serve_in_thread(app) as server:
        yield app, server.url


def test_poll_says_by_its_exit_code_whether_all_told(
    run: Run, path: Path, balances: tuple[Balances, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 where nothing is polled and where all told, 1 where one failed; no key is no failure (S1.27, S1.33)."""
    app, url = balances
    monkeypatch.setenv("DEEPSEEK_API_KEY", KEY)
    monkeypatch.delenv("MOONSHOT_API_KEY", raising=False)

    def catalogue(**paths: str) -> None:
        packages = {
            name: {"source": "api_poll", "poll": name, "url": url + place, "total_credits": 20}
            for name, place in paths.items()
        }
        path.write_text(json.dumps({"packages": packages}))

    catalogue()
    assert rows(run("poll", str(path), "--json")) == []
    catalogue(deepseek="/user/balance", moonshot="/v1/users/me/balance")
    code, output, errors = run("poll", str(path))
    assert (code, errors) == (0, "")
    assert [line.split()[:4] for line in output.splitlines()[1:]] == [
        ["deepseek", "told", "10", "25"],
        ["moonshot", "skipped", "0", "20"],
    ]
    app.failures["/user/balance"] = 500
    code, output, errors = run("poll", str(path), "--json")
    assert (code, errors) == (1, "")
    assert [row["result"] for row in json.loads(output)] == ["failed", "skipped"]
    assert KEY not in output + path.read_text()
