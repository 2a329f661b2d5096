"""The benchmark runs: each of its subjects has a row with figures. What they say is for people to judge."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import tokens, upstream

pytestmark = pytest.mark.uncounted

ROOT = Path(__file__).parents[1]

NUMBER = r"[+-]?\d+(?:\.\d+)?"
SPREAD = rf"{NUMBER} \[{NUMBER} {NUMBER}\]"

PER_REQUEST = (
    "bare Starlette",
    "bare Starlette again",
    "no-op ASGI middleware",
    "asgi_metering, unmetered route",
    "asgi_metering, 1 limit",
    "asgi_metering, 3 limits",
    "asgi_metering, 1 limit, lease, hold, settlement, event",
    "asgi_metering, 3 limits, lease, hold, settlement, event",
    "limits, 1 limit",
    "limits, 3 limits",
    "slowapi decorator, 1 limit",
    "slowapi decorator, 3 limits",
    "slowapi ASGI middleware, 3 limits",
    "slowapi middleware, 3 limits",
)

PER_CHUNK = (
    "bare app",
    "no-op ASGI middleware",
    "asgi_metering, unmetered",
    "asgi_metering, fixed price",
    "asgi_metering, usage extracted, off the path included",
    "asgi_metering, usage in every chunk, off the path included",
)

TABLES = {
    "Per request, 1 route(s)": PER_REQUEST,
    "Per request, 200 route(s)": PER_REQUEST,
    "Per chunk of 50 bytes": PER_CHUNK,
    "Per chunk of 4 KiB": PER_CHUNK,
    "Memory while a stream": ("50", "100"),
}

BASES = ("bare Starlette", "bare app")


@pytest.fixture(scope="module")
def printed() -> str:
    """What a run of almost nothing prints."""
    tiny = ("--rounds", "2", "--requests", "5", "--chunks", "50", "--memory", "50", "100")
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", *tiny], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(printed: str, title: str) -> dict[str, list[str]]:
    """The cells of each row of one table, by the row's name."""
    (found,) = [part for part in printed.split("### ") if part.startswith(title)]
    lines = [line for line in found.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize(("title", "names"), TABLES.items(), ids=list(TABLES))
def test_print_a_row_of_each_subject(title: str, names: tuple[str, ...], printed: str) -> None:
    """Every table has the rows of its subjects, in order, and no other."""
    assert tuple(rows(printed, title)) == names


@pytest.mark.parametrize("title", [title for title in TABLES if title.startswith("Per")])
def test_print_median_and_quartiles_of_what_each_subject_adds(title: str, printed: str) -> None:
    """Each subject has its time, and but for the base what it adds to another's, with quartiles."""
    for name, (absolute, added, _) in rows(printed, title).items():
        assert re.fullmatch(NUMBER, absolute), name
        assert re.fullmatch(SPREAD if name not in BASES else "", added), name


@pytest.mark.parametrize("title", [title for title in TABLES if title.startswith("Per chunk")])
def test_print_the_ratio_of_chunks_over_the_no_op(title: str, printed: str) -> None:
    """Each subject but the no-op itself has its ratio over the no-op, with quartiles."""
    for name, (_, _, ratio) in rows(printed, title).items():
        assert re.fullmatch(SPREAD if name != "no-op ASGI middleware" else "", ratio), name


def test_print_the_memory_of_the_bare_app_beside_ours(printed: str) -> None:
    """Both peaks are medians of three runs with their quartiles."""
    for runs, bare, ours in rows(printed, "Memory").values():
        assert runs == "3"
        assert re.fullmatch(SPREAD, bare)
        assert re.fullmatch(SPREAD, ours)


def test_refuse_one_round() -> None:
    """Quartiles of one round are none: the mistake is told before anything runs."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--rounds", "1"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Quartiles need two rounds" in done.stderr


def _rows_of(module: str, *options: str) -> list[tuple[str, ...]]:
    """The rows of the one table that *module* prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, *options], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [tuple(part.strip() for part in line.strip("|").split("|")) for line in table[2:]]


def test_print_a_row_of_each_store() -> None:
    """Every store is measured against its own row-at-a-time way, on one account and on several."""
    tiny = ("--rounds", "1", "--seconds", "0.05", "--callers", "1", "4", "--accounts", "1", "20")
    rows = _rows_of("tests.bench.stores", *tiny)
    assert [row[:3] for row in rows] == [
        (store, accounts, callers)
        for store in ("memory", "sqlite", "postgresql", "redis")
        for accounts in ("1", "20")
        for callers in ("1", "4")
    ]
    assert all(re.fullmatch(NUMBER, figure) for row in rows for figure in row[3:])


def test_print_what_quotas_take() -> None:
    """Answers with and without quotas, refusals, and questions to the tracker each have a row."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.quotas", "--rounds", "2", "--answers", "20"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows(done.stdout, "Per answer of a provider")) == 7
    assert all(re.fullmatch(NUMBER, row[0]) for row in rows(done.stdout, "Per question to the tracker").values())


def test_print_what_an_end_takes_on_a_busy_loop() -> None:
    """Every store that waits, and a bare client, is measured with the loop idle, and with turns of each length."""
    tiny = ("--rounds", "1", "--ends", "4", "--turns", "0.05", "0.2")
    rows = _rows_of("tests.bench.busy", *tiny)
    assert [row[:2] for row in rows] == [
        (store, turn) for store in ("sqlite", "postgresql", "redis", "bare") for turn in ("0.05", "0.2")
    ]
    assert all(re.fullmatch(NUMBER, figure) for row in rows for figure in row[2:])


def test_print_the_steps_of_each_subject() -> None:
    """The interpreter's steps are counted for every subject; those of a bare application are none of ours."""
    counted = {row[0]: row[1:] for row in _rows_of("tests.bench.steps", "--requests", "8")}
    assert len(counted) == 7
    assert counted["bare Starlette"][1:] == ("0", "0.00", "0")
    assert counted["limits, 3 limits"][2:] == ("1.00", "0")
    assert all(int(ours) > 0 for name, (*_, ours) in counted.items() if name.startswith("asgi_metering"))


def test_print_what_is_decided_and_settled_beside_limits() -> None:
    """The decision and the settlement are timed alone, over the same three limits called directly."""
    rows = {row[0]: row[1:] for row in _rows_of("tests.bench.decision", "--rounds", "2", "--requests", "20")}
    assert list(rows) == ["limits", "the decision", "the settlement", "both"]
    assert all(re.fullmatch(NUMBER, us) and re.fullmatch(SPREAD, ratio) for us, ratio in rows.values())


def test_upstream_benchmark_prints_each_subject() -> None:
    """What the upstream client costs for an answer is shown in a call and outside of one, beside the bare transport."""
    printed = asyncio.run(upstream.tables(rounds=2, requests=2, chunks=3))
    for subject in (upstream.BARE, "upstream client, in no call", "upstream client, in a metered call"):
        assert len(re.findall(rf"^\| {subject} \| {NUMBER} \|", printed, re.MULTILINE)) == 2


def test_counts_tokens_of_each_kind_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Each encoding and kind of text has a row with a figure for each length, estimates marked (S2.38)."""
    tokens.main(["--rounds", "1", "--chars", "10", "200001"])
    printed = capsys.readouterr().out
    found = re.findall(rf"^\| (\w+) \| ([\w ]+) \| {NUMBER} \| ~{NUMBER} \|$", printed, re.MULTILINE)
    assert len(found) == len(set(found)) == 2 * len(tokens.texts(1))
    assert len(re.findall(r"^loading \w+: \d+ ms$", printed, re.MULTILINE)) == 2
