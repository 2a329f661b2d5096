"""
The commands of the ledger: what operators give, look at, decide and prove.

Each is one verb of `Metering`; nothing is computed here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import Any

from asgi_metering.cli.showing import amount_text, counted, show, time_text
from asgi_metering.cli.stores import metering_of
from asgi_metering.errors import ConfigurationError
from asgi_metering.ledger import Checked
from asgi_metering.receipts import Posting, Receipt

__all__ = [
    "run_balance",
    "run_check",
    "run_grant",
    "run_holds",
    "run_migrate",
    "run_reconcile",
    "run_refund",
    "run_resolve",
    "run_statement",
]


def run_migrate(given: argparse.Namespace) -> int:
    """Bring the tables of a PostgreSQL store up to date, or print how."""
    from asgi_metering.stores.urls import store_from_url

    if not given.store:
        raise ConfigurationError("No store is named. Pass --store postgresql://host/db, or set ASGI_METERING_STORE.")
    store = store_from_url(given.store)
    script, apply = getattr(store, "migration_script", None), getattr(store, "migrate", None)
    if script is None or apply is None:
        raise ConfigurationError(
            f"The {store.name} store brings its tables up to date by itself. Nothing is to be done."
        )
    if given.sql:
        print(script(), end="")
        return 0
    done = asyncio.run(apply())
    if not (done or given.json):
        print("The tables are up to date.")
        return 0
    show(given, ("number", "name"), [{"number": number, "name": name} for number, name in done])
    return 0


def run_grant(given: argparse.Namespace) -> int:
    """Give units to a payer, once per id."""
    metering, unit = metering_of(given, makes=True)

    async def run() -> Any:
        async with metering:
            return await metering.grant(
                given.payer,
                given.amount,
                id=given.id,
                priority=given.priority,
                expires_at=given.expires,
                actor=given.actor,
            )

    receipt = asyncio.run(run())
    row = {"id": receipt.id, "granted": unit.text(receipt.amount), "applied": receipt.applied}
    show(given, ("id", "granted", "applied", "available"), [{**row, "available": unit.text(receipt.available)}])
    return 0


def run_balance(given: argparse.Namespace) -> int:
    """Show what a payer has."""
    metering, unit = metering_of(given)

    async def run() -> Any:
        async with metering:
            return await metering.balance(given.payer)

    found = asyncio.run(run())
    names = ("granted", "settled", "held", "expired", "available", "debt")
    show(given, names, [{name: unit.text(getattr(found, name)) for name in names}])
    return 0


def run_statement(given: argparse.Namespace) -> int:
    """Show the ledger of a payer."""
    metering, unit = metering_of(given)

    async def run() -> Any:
        async with metering:
            return [entry async for entry in metering.statement(given.payer)]

    rows = [
        {
            "number": entry.number,
            "at": time_text(entry.at),
            "kind": entry.kind.value,
            "amount": unit.text(entry.amount),
            "line": entry.line,
            "basis": entry.basis.value if entry.basis is not None else "",
            "available": unit.text(entry.available),
            "ref": entry.ref,
        }
        for entry in asyncio.run(run())
    ]
    show(given, ("number", "at", "kind", "amount", "line", "basis", "available", "ref"), rows)
    return 0


def run_refund(given: argparse.Namespace) -> int:
    """Give back what a call was charged, or a part of it."""
    metering, unit = metering_of(given)

    async def run() -> Posting:
        async with metering:
            return await metering.refund(
                given.call, id=given.id, amount=given.amount, payer=given.payer, actor=given.actor
            )

    posting = asyncio.run(run())
    row = {
        "id": posting.id,
        "payer": posting.payer,
        "refunded": unit.text(-posting.amount),
        "returned": unit.text(posting.returned),
        "lapsed": unit.text(posting.lapsed),
        "applied": posting.applied,
        "available": unit.text(posting.available),
    }
    show(given, tuple(row), [row])
    return 0


def run_reconcile(given: argparse.Namespace) -> int:
    """End the calls in doubt whose grace is over."""
    metering, _ = metering_of(given)

    async def run() -> list[str]:
        async with metering:
            return await metering.reconcile()

    ended = asyncio.run(run())
    show(given, ("ended",), [{"ended": call} for call in ended])
    return 0


def run_resolve(given: argparse.Namespace) -> int:
    """End one call as a person decides."""
    metering, unit = metering_of(given)

    async def run() -> Receipt:
        async with metering:
            return await metering.resolve(given.call, charge=given.charge)

    receipt = asyncio.run(run())
    row = {
        "id": receipt.id,
        "payer": receipt.payer,
        "charged": amount_text(unit, receipt.unit, receipt.amount),
        "ended_by": receipt.ended_by.value,
        "applied": receipt.applied,
    }
    show(given, tuple(row), [row])
    return 0


def run_holds(given: argparse.Namespace) -> int:
    """Show the holds that have not ended."""
    metering, unit = metering_of(given)

    async def run() -> Any:
        async with metering:
            return await metering.holds()

    rows = [
        {
            "id": hold.id,
            "payer": hold.payer,
            "line": hold.line,
            "amount": amount_text(unit, hold.unit, hold.amount),
            "state": hold.state.value,
            "since": time_text(hold.created_at),
        }
        for hold in asyncio.run(run())
    ]
    show(given, ("id", "payer", "line", "amount", "state", "since"), rows)
    return 0


def run_check(given: argparse.Namespace) -> int:
    """Prove that the books balance; 1 where they do not."""
    metering, _ = metering_of(given)

    async def run() -> Checked:
        async with metering:
            return await metering.check()

    wrong = asyncio.run(run())
    if given.json:
        proof = {"balanced": not wrong, "accounts": wrong.accounts, "discrepancies": wrong}
        print(json.dumps(proof, indent=2))
    else:
        print("\n".join(wrong) or f"The books balance: {counted(wrong.accounts, 'account')} proven.")
    return 1 if wrong else 0
