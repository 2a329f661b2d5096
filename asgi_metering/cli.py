"""
The command line: thin over `Metering`. Tables for people, ``--json`` for programs.

Every command but ``demo`` and ``routes`` opens the store that ``--store`` or ``ASGI_METERING_STORE`` names.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.errors import ConfigurationError, MeteringError, MissingExtraError
from asgi_metering.metering import ALL_FEATURES, Metering

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command.

    Returns:
        0 when it did what was asked; 1 when what it checked is not so; 2 for a mistake in the arguments or set-up.
    """
    given = _parser().parse_args(arguments)
    try:
        return int(given.run(given))
    except MeteringError as failure:
        print(f"asgi-metering: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="asgi-metering", description=__doc__.splitlines()[1])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="play the demo: a gateway, a provider, a client, a ledger")
    demo.add_argument("--serve", action="store_true", help="keep the gateway up afterwards")
    demo.add_argument("--port", type=int, default=0, help="the gateway's port; a free one by default")
    demo.set_defaults(run=_demo)
    routes = commands.add_parser("routes", help="audit an application: which route is metered how")
    routes.add_argument("app", help="module:attribute of the ASGI application")
    routes.add_argument("--json", action="store_true")
    routes.set_defaults(run=_routes)
    migrate = commands.add_parser("migrate", help="make the tables of a PostgreSQL store, or bring them up to date")
    migrate.add_argument("--store", default=os.environ.get("ASGI_METERING_STORE"), help="store URL")
    migrate.add_argument("--sql", action="store_true", help="print what would be done, for psql, and do nothing")
    migrate.add_argument("--json", action="store_true")
    migrate.set_defaults(run=_migrate)
    for name, run, help_text in (
        ("grant", _grant, "give units to a payer"),
        ("balance", _balance, "what a payer has"),
        ("statement", _statement, "the ledger of a payer"),
        ("holds", _holds, "holds that have not ended"),
        ("check", _check, "prove that the books balance"),
    ):
        command = commands.add_parser(name, help=help_text)
        _store_options(command)
        command.set_defaults(run=run)
        if name in ("grant", "balance", "statement"):
            command.add_argument("payer")
        if name == "grant":
            command.add_argument("amount", help="whole units, such as 12.5")
            command.add_argument("--id", required=True, help="the payment's id: the same id grants once")
            command.add_argument("--priority", type=int, default=0)
            command.add_argument("--expires", type=_moment, help="ISO 8601, with a zone")
            command.add_argument("--actor", default="cli")
    return parser


def _store_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--store", default=os.environ.get("ASGI_METERING_STORE"), help="store URL")
    command.add_argument("--unit", default=f"{CREDITS.name}:{CREDITS.scale}", help="name:scale of the unit")
    command.add_argument("--json", action="store_true")


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no zone; write 2027-01-01T00:00:00+00:00")
    return moment


def _demo(given: argparse.Namespace) -> int:
    try:
        from asgi_metering.demo.run import demo
    except ImportError as missing:
        raise MissingExtraError("The demo", "demo") from missing
    return asyncio.run(demo(serve=given.serve, port=given.port))


# -- the audit ---------------------------------------------------------------------------------------------


def _routes(given: argparse.Namespace) -> int:
    from asgi_metering.asgi.audit import audit

    report = audit(_load(given.app), ALL_FEATURES, frozenset())
    rows = [_route(row) for row in report.rows]
    if given.json:
        print(json.dumps({"routes": rows, "errors": report.errors, "warnings": report.warnings}, indent=2))
    else:
        _table(("path", "methods", "line", "price", "limits"), rows)
        for sentence in (*report.errors, *report.warnings):
            print(f"! {sentence}")
    return 1 if report.errors else 0


def _route(row: Any) -> dict[str, Any]:
    policy = row.policy
    charge = policy.charge if policy is not None else None
    limits = [limit.text for rates in (policy.rates if policy is not None else ()) for limit in rates.limits]
    shown: dict[str, Any] = {
        "path": row.path,
        "methods": ",".join(row.methods),
        "line": charge.line if charge is not None else "",
        "price": _price(charge.price) if charge is not None else "",
        "limits": ", ".join(limits),
    }
    if charge is not None:
        from asgi_metering.rules.ending import END_OF_CALL

        shown["end"] = {situation.value: charge.end.basis(situation).value for situation in END_OF_CALL}
    return shown


def _price(price: Any) -> str:
    from asgi_metering.prices import FixedPrice

    return format(price.amount, "f") if isinstance(price, FixedPrice) else type(price).__name__


def _load(target: str) -> Any:
    module, _, attribute = target.partition(":")
    if not attribute:
        raise ConfigurationError(f"{target!r} names no application. Write module:attribute, such as main:app.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as missing:
        raise ConfigurationError(f"{target!r} cannot be imported: {missing}.") from missing


# -- the ledger --------------------------------------------------------------------------------------------


def _metering(given: argparse.Namespace) -> tuple[Metering, Unit]:
    if not given.store:
        raise ConfigurationError("No store is named. Pass --store sqlite:///metering.db, or set ASGI_METERING_STORE.")
    name, _, scale = given.unit.partition(":")
    if not scale.isdigit():
        raise ConfigurationError(f"--unit {given.unit!r} is not name:scale, such as credits:6.")
    unit = Unit(name, int(scale))
    metering = Metering(given.store, unit=unit, sinks=())
    if not metering.store.durable:
        raise ConfigurationError(f"The {metering.store.name} store keeps nothing between commands. Name a durable one.")
    return metering, unit


def _migrate(given: argparse.Namespace) -> int:
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
    _show(given, ("number", "name"), [{"number": number, "name": name} for number, name in done])
    return 0


def _grant(given: argparse.Namespace) -> int:
    metering, unit = _metering(given)

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
    _show(given, ("id", "granted", "applied", "available"), [{**row, "available": unit.text(receipt.available)}])
    return 0


def _balance(given: argparse.Namespace) -> int:
    metering, unit = _metering(given)

    async def run() -> Any:
        async with metering:
            return await metering.balance(given.payer)

    found = asyncio.run(run())
    names = ("granted", "settled", "held", "expired", "available", "debt")
    _show(given, names, [{name: unit.text(getattr(found, name)) for name in names}])
    return 0


def _statement(given: argparse.Namespace) -> int:
    metering, unit = _metering(given)

    async def run() -> Any:
        async with metering:
            return [entry async for entry in metering.statement(given.payer)]

    rows = [
        {
            "number": entry.number,
            "at": _time(entry.at),
            "kind": entry.kind.value,
            "amount": unit.text(entry.amount),
            "line": entry.line,
            "basis": entry.basis.value if entry.basis is not None else "",
            "available": unit.text(entry.available),
            "ref": entry.ref,
        }
        for entry in asyncio.run(run())
    ]
    _show(given, ("number", "at", "kind", "amount", "line", "basis", "available", "ref"), rows)
    return 0


def _holds(given: argparse.Namespace) -> int:
    metering, unit = _metering(given)

    async def run() -> Any:
        async with metering:
            return await metering.holds()

    rows = [
        {
            "id": hold.id,
            "payer": hold.payer,
            "line": hold.line,
            "amount": unit.text(hold.amount),
            "state": hold.state.value,
            "since": _time(hold.created_at),
        }
        for hold in asyncio.run(run())
    ]
    _show(given, ("id", "payer", "line", "amount", "state", "since"), rows)
    return 0


def _check(given: argparse.Namespace) -> int:
    metering, _ = _metering(given)

    async def run() -> list[str]:
        async with metering:
            return await metering.check()

    wrong = asyncio.run(run())
    if given.json:
        print(json.dumps({"balanced": not wrong, "discrepancies": wrong}, indent=2))
    else:
        print("\n".join(wrong) or "The books balance.")
    return 1 if wrong else 0


# -- showing -----------------------------------------------------------------------------------------------


def _time(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds")


def _show(given: argparse.Namespace, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    if given.json:
        print(json.dumps(rows, indent=2))
    else:
        _table(columns, rows)


def _table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    lines = [tuple(columns), *(tuple(str(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
