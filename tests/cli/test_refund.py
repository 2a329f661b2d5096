"""refund: a charge, or a part of it, is given back once."""

from __future__ import annotations

from tests.cli.commands import GRANT, Run, charge, charged, rows, table


def test_refund_a_part_once(run: Run, store: str) -> None:
    """A refund shows what came back; its repeat is not applied and changes nothing."""
    run(*GRANT)
    charge(store, "ann", "2")
    call = charged(run)
    head = ["id", "payer", "refunded", "returned", "lapsed", "applied", "available"]
    refund = ("refund", call, "--id", "r-1", "--amount", "0.5")
    assert table(run(*refund)) == [head, ["r-1", "ann", "0.5", "0.5", "0", "True", "11"]]
    assert rows(run(*refund, "--json"))[0]["applied"] is False
    assert rows(run("refund", call, "--id", "r-2", "--payer", "ann", "--json"))[0]["refunded"] == "1.5"


def test_refund_what_was_not_charged(run: Run, store: str) -> None:
    """An unknown call, too much, and another amount under one id are mistakes with their mend."""
    run(*GRANT)
    charge(store, "ann", "2")
    call = charged(run)
    assert rows(run("refund", call, "--id", "r", "--amount", "1", "--json"))
    for arguments, mend in (
        (("nobodys", "--id", "x"), "Check the id; for a refund of an old charge say whose it was"),
        ((call, "--id", "x", "--amount", "3"), "Refund less"),
        ((call, "--id", "r", "--amount", "2"), "Use a new id for a new refund"),
    ):
        code, output, errors = run("refund", *arguments)
        assert (code, output, errors.count("\n")) == (2, "", 1)
        assert mend in errors
