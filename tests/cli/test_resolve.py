"""resolve: a person ends a call."""

from __future__ import annotations

import pytest

from tests.cli.commands import GRANT, Run, held, rows, table


def test_resolve_a_call(run: Run, store: str) -> None:
    """A person charges a call, or releases it; who comes second learns what was decided."""
    run(*GRANT)
    held(store, "a")
    held(store, "b")
    head = ["id", "payer", "charged", "ended_by", "applied"]
    assert table(run("resolve", "a", "--charge", "1.5")) == [head, ["a", "ann", "1.5", "person", "True"]]
    assert table(run("resolve", "a", "--release")) == [head, ["a", "ann", "1.5", "person", "False"]]
    assert rows(run("resolve", "b", "--release", "--json"))[0]["charged"] == "0"
    assert rows(run("balance", "ann", "--json"))[0]["available"] == "11"


@pytest.mark.parametrize("arguments", [(), ("--release", "--charge", "1")], ids=["neither", "both"])
@pytest.mark.usefixtures("store")
def test_resolve_says_how(run: Run, arguments: tuple[str, ...]) -> None:
    """Nothing is released because somebody left an option out."""
    code, output, errors = run("resolve", "a", *arguments)
    assert (code, output) == (2, "")
    assert "--release" in errors
