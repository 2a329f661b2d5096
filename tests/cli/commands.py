"""What tests of commands share: how one is run, what it printed, and calls for it to show."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from asgi_metering import Metering
from asgi_metering.rules.operations import Admit, WalletSource

__all__ = ["GRANT", "Run", "charge", "charged", "held", "rows", "table"]

GRANT = ("grant", "ann", "12.5", "--id", "payment-1")


Run = Callable[..., tuple[int, str, str]]


def rows(answer: tuple[int, str, str]) -> Any:
    """What a program reads of a command that did what was asked."""
    code, output, errors = answer
    assert (code, errors) == (0, "")
    return json.loads(output)


def table(answer: tuple[int, str, str]) -> list[list[str]]:
    """The cells of a table, its head first, of a command that did what was asked."""
    code, output, errors = answer
    assert (code, errors) == (0, "")
    return [line.split() for line in output.splitlines()]


def charge(store: str, payer: str, amount: str) -> None:
    """Run one call of the line ``search`` to its end."""

    async def work() -> None:
        async with Metering(store, sinks=()) as metering, metering.charge(payer=payer, line="search", price=amount):
            pass

    asyncio.run(work())


def held(store: str, call: str, *, parts: int = 3_000_000, ttl_s: float = 60.0, **options: Any) -> None:
    """Leave a call of ann's that nobody ends."""

    async def hold() -> None:
        async with Metering(store, sinks=()) as metering:
            ask = Admit(call, "ann", "credits", parts, parts, (WalletSource(),), ttl_s=ttl_s, **options)
            assert (await metering.decide(ask)).admitted

    asyncio.run(hold())


def charged(run: Run) -> str:
    """Id of ann's last charge."""
    return str(rows(run("statement", "ann", "--json"))[-1]["ref"])
