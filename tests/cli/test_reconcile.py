"""reconcile: what is overdue is ended by its policy."""

from __future__ import annotations

from tests.cli.commands import GRANT, Run, held, rows, table


def test_reconcile_calls_in_doubt(run: Run, store: str) -> None:
    """What is overdue is ended by its policy and named; a second time there is nothing to do."""
    run(*GRANT)
    held(store, "alive")
    held(store, "dead", ttl_s=0.0, grace_s=0.0)
    assert table(run("reconcile")) == [["ended"], ["dead"]]
    assert rows(run("reconcile", "--json")) == []
    assert [row["id"] for row in rows(run("holds", "--json"))] == ["alive"]
    assert rows(run("balance", "ann", "--json"))[0]["held"] == "3"
