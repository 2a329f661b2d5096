"""holds: calls in flight."""

from __future__ import annotations

import asyncio

from asgi_metering import Metering
from asgi_metering.rules.operations import Admit, WalletSource
from tests.cli.commands import GRANT, Run, rows, table


def test_holds_in_flight(run: Run, store: str) -> None:
    """A hold that has not ended is shown with its payer, line, amount and state."""
    run(*GRANT)
    assert rows(run("holds", "--json")) == []

    async def hold() -> None:
        async with Metering(store, sinks=()) as metering:
            ask = Admit("call-1", "ann", "credits", 3_000_000, 3_000_000, (WalletSource(),), line="chat")
            assert (await metering.decide(ask)).admitted

    asyncio.run(hold())
    head, line = table(run("holds"))
    assert head == ["id", "payer", "line", "amount", "state", "since"]
    assert line[:5] == ["call-1", "ann", "chat", "3", "held"]
    (row,) = rows(run("holds", "--json"))
    assert (row["id"], row["amount"], row["state"]) == ("call-1", "3", "held")


def test_amounts_of_another_unit_are_not_scaled(run: Run, store: str) -> None:
    """A hold in a unit that was not named shows its smallest parts: a wrong scale would show wrong money."""
    run("grant", "ann", "7", "--id", "m", "--unit", "messages:0")

    async def hold() -> None:
        async with Metering(store, sinks=()) as metering:
            assert (await metering.decide(Admit("c", "ann", "messages", 3, 3, (WalletSource(),)))).admitted

    asyncio.run(hold())
    assert rows(run("holds", "--json"))[0]["amount"] == "3 smallest parts of messages"
    assert rows(run("holds", "--unit", "messages:0", "--json"))[0]["amount"] == "3"
