"""statement: the lines of an account."""

from __future__ import annotations

from tests.cli.commands import GRANT, Run, charge, rows, table


def test_statement_of_an_account(run: Run, store: str) -> None:
    """A statement has a line for each grant and each charge, with what was left after it."""
    run(*GRANT)
    charge(store, "ann", "2")
    grant, charged = rows(run("statement", "ann", "--json"))
    assert {**grant, "at": ""} == {
        "number": 1,
        "at": "",
        "kind": "grant",
        "amount": "12.5",
        "line": "",
        "basis": "",
        "available": "12.5",
        "ref": "payment-1",
    }
    assert {**charged, "at": "", "ref": ""} == {
        "number": 2,
        "at": "",
        "kind": "settle",
        "amount": "2",
        "line": "search",
        "basis": "usage",
        "available": "10.5",
        "ref": "",
    }
    head, _, line = table(run("statement", "ann"))
    assert head == ["number", "at", "kind", "amount", "line", "basis", "available", "ref"]
    assert line == ["2", charged["at"], "settle", "2", "search", "usage", "10.5", charged["ref"]]
    assert charged["at"].endswith("+00:00")
