"""check: the books are proven."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tests.cli.commands import GRANT, Run, charge, rows


def test_check_books_that_balance(run: Run, store: str) -> None:
    """Books that balance are said to, with 0."""
    run(*GRANT)
    charge(store, "ann", "2")
    assert run("check") == (0, "The books balance: 1 account proven.\n", "")
    run("grant", "bob", "1", "--id", "payment-2")
    assert run("check") == (0, "The books balance: 2 accounts proven.\n", "")
    assert rows(run("check", "--json")) == {"balanced": True, "accounts": 2, "discrepancies": []}


@pytest.mark.usefixtures("store")
def test_check_books_that_do_not_balance(run: Run, tmp_path: Path) -> None:
    """A number that somebody has changed is named with what its rows prove, and the exit code is 1."""
    run(*GRANT)
    with sqlite3.connect(tmp_path / "metering.db") as connection:
        connection.execute("UPDATE account SET settled = 7 WHERE payer = 'ann'")
    connection.close()
    code, output, errors = run("check")
    assert (code, output, errors) == (
        1,
        "'ann' in 'credits': settled is 7 in the account and 0 in its rows.\n",
        "",
    )
    code, output, _ = run("check", "--json")
    assert (code, json.loads(output)["balanced"]) == (1, False)
