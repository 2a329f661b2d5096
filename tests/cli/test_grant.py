"""grant: units are given once, and shown."""

from __future__ import annotations

import pytest

from tests.cli.commands import GRANT, Run, rows, table


@pytest.mark.usefixtures("store")
def test_grant_once(run: Run) -> None:
    """A grant shows what it gave and what there is now; its repeat is not applied and changes nothing."""
    head = ["id", "granted", "applied", "available"]
    assert table(run(*GRANT)) == [head, ["payment-1", "12.5", "True", "12.5"]]
    assert table(run(*GRANT)) == [head, ["payment-1", "12.5", "False", "12.5"]]


@pytest.mark.usefixtures("store")
def test_grant_for_programs(run: Run) -> None:
    """With --json the same is read by programs, amounts as text so that no digit is lost."""
    (row,) = rows(run(*GRANT, "--json"))
    assert row == {"id": "payment-1", "granted": "12.5", "applied": True, "available": "12.5"}


@pytest.mark.usefixtures("store")
def test_grant_with_an_end_and_a_priority(run: Run) -> None:
    """Priority, expiry and actor are the grant's: the same id with another priority is another grant, and refused."""
    options = ("--priority", "5", "--expires", "2100-01-01T00:00:00+01:00", "--actor", "stripe")
    assert rows(run(*GRANT, *options, "--json"))[0]["applied"] is True
    assert rows(run(*GRANT, *options, "--json"))[0]["applied"] is False
    code, output, errors = run(*GRANT, "--priority", "6", *options[2:])
    assert (code, output) == (2, "")
    assert "'payment-1' exists with priority=5, and came again with priority=6" in errors


@pytest.mark.usefixtures("store")
def test_grant_in_a_unit_of_its_own(run: Run) -> None:
    """A unit has books of its own, and counts in its own parts."""
    run(*GRANT)
    assert rows(run("grant", "ann", "7", "--id", "payment-1", "--unit", "usd_micros:0", "--json"))[0]["granted"] == "7"
    assert rows(run("balance", "ann", "--unit", "usd_micros:0", "--json"))[0]["available"] == "7"
    assert rows(run("balance", "ann", "--json"))[0]["available"] == "12.5"


@pytest.mark.usefixtures("store")
def test_tell_a_grant_that_conflicts(run: Run) -> None:
    """The same id with another amount names both amounts and changes nothing."""
    run(*GRANT)
    code, output, errors = run("grant", "ann", "13", "--id", "payment-1")
    assert (code, output) == (2, "")
    assert "'payment-1' exists with amount=12500000, and came again with amount=13000000, in smallest parts." in errors
    assert rows(run("balance", "ann", "--json"))[0]["granted"] == "12.5"
