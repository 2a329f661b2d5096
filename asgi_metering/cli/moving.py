"""
``asgi-metering export`` and ``import``: the books of a store, moved to another.

The work is `stores.moving`; this opens the store alone, and shows what was done.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from asgi_metering.cli.showing import counted, print_table
from asgi_metering.cli.stores import check_named, check_usable
from asgi_metering.stores.contract import Store
from asgi_metering.stores.moving import Moved, export_books, import_books

__all__ = ["run_export", "run_import"]


def run_export(given: argparse.Namespace) -> int:
    """Write all that a store keeps into a file; 1 where the books do not balance."""

    async def work(store: Store) -> Moved:
        await store.open()
        return await export_books(store, given.file)

    moved = asyncio.run(_with_store(given, work, makes=False))
    return _show_moved(given, moved, "exported")


def run_import(given: argparse.Namespace) -> int:
    """Fill an empty store with what was exported of another."""

    def work(store: Store) -> Coroutine[Any, Any, Moved]:
        return import_books(store, given.file, resume=given.resume, unbalanced=given.unbalanced)

    moved = asyncio.run(_with_store(given, work, makes=True))
    return _show_moved(given, moved, "imported")


async def _with_store(
    given: argparse.Namespace, work: Callable[[Store], Coroutine[Any, Any, Moved]], *, makes: bool
) -> Moved:
    """Do *work* on the store alone: no worker of a metering shall sweep it meanwhile."""
    from asgi_metering.stores.urls import store_from_url

    check_named(given)
    store = store_from_url(given.store)
    check_usable(store, given.store, makes=makes)
    try:
        return await work(store)
    finally:
        await store.close()


def _show_moved(given: argparse.Namespace, moved: Moved, done: str) -> int:
    if given.json:
        told = {
            done: moved.new,
            "rows": moved.counts,
            "accounts": moved.accounts,
            "balanced": not moved.discrepancies,
            "discrepancies": moved.discrepancies,
            "one_instant": moved.one_instant,
            "backup": None if moved.backup is None else str(moved.backup),
        }
        print(json.dumps(told, indent=2))
    else:
        print_table(
            ("rows", "number"), [{"rows": table, "number": count} for table, count in moved.counts.items() if count]
        )
        print(f"{counted(moved.new, 'row')} {done}; {counted(moved.accounts, 'account')} proven.")
        for sentence in moved.discrepancies:
            print(f"! {sentence}")
        if not moved.one_instant:
            print("! This store cannot be read at one instant. Make sure that nobody wrote to it meanwhile.")
        if moved.backup is not None:
            print(f"What stood there is now {str(moved.backup)!r}.")
    return 1 if moved.discrepancies else 0
