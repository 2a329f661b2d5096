"""export and import: the books move from one store to another."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

from tests.cli.commands import GRANT, Run, rows


@pytest.fixture
def books(run: Run, store: str, tmp_path: Path) -> str:
    """A file with the books of ann."""
    run(*GRANT)
    file = str(tmp_path / "books.jsonl")
    assert run("export", file, "--store", store)[0] == 0
    return file


def test_move_the_books(run: Run, books: str, tmp_path: Path) -> None:
    """What was exported of one file is imported into another, proven on both ways, and a second import is refused."""
    other = f"sqlite:///{tmp_path}/other.db"
    code, output, errors = run("export", books)
    assert (code, errors) == (0, "")
    *counts, told, kept = output.splitlines()
    assert [line.split() for line in counts] == [
        ["rows", "number"],
        *[[table, "1"] for table in ("unit", "account", "grant", "entry")],
    ]
    assert told == "4 rows exported; 1 account proven."
    assert re.fullmatch(rf"What stood there is now '{books}\.\d{{8}}T\d{{6}}\.\d{{6}}Z\.bak'\.", kept)
    code, output, _ = run("import", books, "--store", other)
    assert (code, output.splitlines()[-1]) == (0, "4 rows imported; 1 account proven.")
    assert rows(run("balance", "ann", "--store", other, "--json")) == rows(run("balance", "ann", "--json"))
    code, _, errors = run("import", books, "--store", other)
    assert code == 2
    assert "The sqlite store is not empty, so nothing was imported" in errors
    assert run("import", books, "--store", other, "--resume")[1].splitlines()[-1] == (
        "0 rows imported; 1 account proven."
    )


def test_move_the_books_for_programs(run: Run, books: str, tmp_path: Path) -> None:
    """With --json both tell the rows of each kind, whether they balance, and where the old file is."""
    other = f"sqlite:///{tmp_path}/other.db"
    exported, imported = rows(run("export", books, "--json")), rows(run("import", books, "--store", other, "--json"))
    assert Path(exported.pop("backup")).exists()
    assert imported.pop("backup") is None
    assert (exported.pop("exported"), imported.pop("imported")) == (4, 4)
    assert exported == imported
    assert exported["rows"]["grant"] == 1
    assert (exported["balanced"], exported["one_instant"], exported["accounts"]) == (True, True, 1)


def test_move_books_that_do_not_balance(run: Run, store: str, books: str, tmp_path: Path) -> None:
    """Books that do not balance are exported and told with 1, refused with 2, and imported with 1 on demand."""
    other = f"sqlite:///{tmp_path}/other.db"
    with sqlite3.connect(tmp_path / "metering.db") as connection:
        connection.execute("UPDATE account SET settled = 7")
    connection.close()
    code, output, _ = run("export", books)
    assert code == 1
    assert "! 'ann' in 'credits': settled is 7 in the account and 0 in its rows." in output.splitlines()
    code, _, errors = run("import", books, "--store", other)
    assert code == 2
    assert "do not balance, so nothing was imported" in errors
    assert not (tmp_path / "other.db").exists()
    assert run("import", books, "--store", other, "--unbalanced")[0] == 1


def test_tell_that_a_store_has_no_instants(
    run: Run, books: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is exported of a store that cannot be read at one instant is told to be looked at."""
    monkeypatch.setattr("asgi_metering.stores.sqlite.books._FileBooks.one_instant", False)
    code, output, _ = run("export", str(tmp_path / "again.jsonl"))
    assert code == 0
    assert output.splitlines()[-1].startswith("! This store cannot be read at one instant.")
