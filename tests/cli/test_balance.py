"""balance: the numbers of an account."""

from __future__ import annotations

import pytest

from tests.cli.commands import GRANT, Run, charge, rows, table


def test_balance_of_an_account(run: Run, store: str) -> None:
    """A balance shows the numbers of which it is the difference, in whole units."""
    run(*GRANT)
    charge(store, "ann", "2")
    head = ["granted", "settled", "held", "expired", "available", "debt"]
    assert table(run("balance", "ann")) == [head, ["12.5", "2", "0", "0", "10.5", "0"]]
    assert rows(run("balance", "ann", "--json")) == [
        {"granted": "12.5", "settled": "2", "held": "0", "expired": "0", "available": "10.5", "debt": "0"}
    ]


@pytest.mark.usefixtures("store")
def test_balance_of_nobody(run: Run) -> None:
    """An unknown account of a database that is there has zeros."""
    run(*GRANT)
    assert set(rows(run("balance", "nobody", "--json"))[0].values()) == {"0"}
