"""
``asgi-metering journal``: what waits in a journal for a store that was down.

Looks without disturbing the processes that use it.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from asgi_metering.amounts import Unit
from asgi_metering.cli.showing import show, time_text
from asgi_metering.cli.stores import metering_of, unit_of
from asgi_metering.errors import StoreUnavailableError
from asgi_metering.metering import Metering

__all__ = ["run_journal"]


def run_journal(given: argparse.Namespace) -> int:
    """Show what waits in a journal, or hand it to the store; 1 where something is set aside."""
    from asgi_metering.journal import give_up, look

    file = Path(given.file)
    if not (given.replay or given.restore or given.lost):
        unit = unit_of(given)
        rows = [_waiting(unit, each) for each in look(file)]
        show(given, ("call", "state", "payer", "line", "amount", "due", "why"), rows)
        return 0
    metering = metering_of(given)[0] if given.replay else None
    before = look(file)
    if given.lost:
        give_up(file)
    asyncio.run(_changed(given, metering))
    after = look(file)
    states = [each.state for each in after]
    gone = {each.call for each in before} - {each.call for each in after}
    row = {
        "delivered": len(gone),
        "waiting": states.count("waits"),
        "running": states.count("runs"),
        "set_aside": states.count("set aside"),
    }
    if given.replay and row["waiting"]:
        raise StoreUnavailableError(f"The store took {len(gone)} calls, and {row['waiting']} wait still. Try it again.")
    show(given, tuple(row), [row])
    return 1 if row["set_aside"] else 0


async def _changed(given: argparse.Namespace, metering: Metering | None) -> None:
    """Do to the journal what was asked; with a *metering* hand what is due to its store."""
    from asgi_metering.errors import JournalError
    from asgi_metering.journal import Journal

    journal = Journal(given.file)
    try:
        await journal.open()
        if given.restore:
            await journal.restore()
        if metering is None:
            return
        async with metering:
            if not await journal.take_turn():
                raise JournalError(f"Another process reads the journal {given.file!r} off already. Leave it to that.")
            await metering.runtime().read_off(journal)
            await journal.give_turn_back()
    finally:
        await journal.close()


def _waiting(unit: Unit, each: Any) -> dict[str, Any]:
    amount = unit.text(each.amount) if each.unit == unit.name else f"{each.amount} smallest parts"
    return {
        "call": each.call,
        "state": each.state,
        "payer": each.payer,
        "line": each.line,
        "unit": each.unit,
        "amount": amount if each.amount else "0",
        "due": time_text(each.due_at),
        "why": each.why,
    }
