"""
The command line: thin over `Metering`. Tables for people, ``--json`` for programs.

Every command but ``demo``, ``routes``, ``journal``, ``init``, ``quotas`` and ``poll`` opens the store that ``--store``
or ``ASGI_METERING_STORE`` names, and so do ``journal --replay`` and ``quotas --store``; only ``grant`` and ``import``
make a new one. Every command but ``demo`` and ``init`` has ``--json``, whose output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime

from asgi_metering._version import __version__
from asgi_metering.amounts import CREDITS
from asgi_metering.cli.accounts import (
    run_balance,
    run_check,
    run_grant,
    run_holds,
    run_migrate,
    run_reconcile,
    run_refund,
    run_resolve,
    run_statement,
)
from asgi_metering.cli.audit import run_routes
from asgi_metering.cli.journal import run_journal
from asgi_metering.cli.moving import run_export, run_import
from asgi_metering.cli.quotas import run_init, run_poll, run_quotas
from asgi_metering.errors import MeteringError, MissingExtraError

__all__ = ["main"]

EXIT_CODES = """\
exit codes:
  0    it did what was asked
  1    what it checked is not so: errors of routes, books that do not balance, a step of the demo, a poll that failed
  2    it could not be done: a mistake in the arguments or set-up, or no answer from the store
  130  Ctrl-C
  141  whoever read the output left
"""

MAX_PORT = 65_535


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run one command, and return its exit code: see `EXIT_CODES`.

    Answers go to the standard output, mistakes in one line to the standard error.
    """
    given = _parser().parse_args(arguments)
    try:
        code = int(given.run(given))
        # Now, and not when the interpreter ends, where a reader that has left would show as a traceback.
        sys.stdout.flush()
    except MeteringError as failure:
        print(f"asgi-metering: {failure}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="asgi-metering",
        description="Look after what an application charges: payers, calls, limits, and the store that keeps them.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"asgi-metering {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command_of(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            epilog=EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = command_of("demo", "play the demo: a gateway, a provider, a client, a ledger")
    demo.add_argument("--serve", action="store_true", help="keep the gateway up afterwards")
    demo.add_argument("--port", type=_port, default=0, help="the gateway's port; a free one by default")
    demo.set_defaults(run=_demo)
    routes = command_of("routes", "audit an application: which route is metered how")
    routes.add_argument("app", help="module:attribute of the ASGI application")
    routes.add_argument("--json", action="store_true", help="print JSON")
    routes.add_argument(
        "-v", "--verbose", action="store_true", help="show all of each policy, and the traceback of a failing import"
    )
    routes.add_argument(
        "--store", metavar="URL", help="the application's store: tell what its calls used of their holds"
    )
    routes.set_defaults(run=run_routes)
    migrate = command_of("migrate", "make the tables of a PostgreSQL store, or bring them up to date")
    _store_option(migrate)
    migrate.add_argument("--sql", action="store_true", help="print what would be done, for psql, and do nothing")
    migrate.add_argument("--json", action="store_true", help="print JSON")
    migrate.set_defaults(run=run_migrate)
    for name, run, help_text, file_text in (
        (
            "export",
            run_export,
            "write everything that a store keeps into a file",
            "what stands there is kept beside it",
        ),
        ("import", run_import, "fill an empty store with what was exported of another", "what export wrote"),
    ):
        command = command_of(name, help_text)
        command.add_argument("file", metavar="FILE", help=file_text)
        _store_option(command)
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "import":
            command.add_argument("--resume", action="store_true", help="go on with an import of this file that was cut")
            command.add_argument("--unbalanced", action="store_true", help="also import books that do not balance")
        command.set_defaults(run=run)
    _quota_commands(command_of)
    journal = command_of("journal", "what waits in a journal for a store that was down")
    journal.add_argument("file", metavar="FILE", help="the application's journal=")
    _store_options(journal)
    journal.add_argument("--replay", action="store_true", help="hand what waits to the store now")
    journal.add_argument("--restore", action="store_true", help="let what was set aside wait again, before that")
    journal.add_argument(
        "--lost",
        action="store_true",
        help="end the calls that run in it by their policy, before that: no process of the application is left",
    )
    journal.set_defaults(run=run_journal)
    for name, run, help_text in (
        ("grant", run_grant, "give units to a payer"),
        ("balance", run_balance, "what a payer has"),
        ("statement", run_statement, "the ledger of a payer"),
        ("refund", run_refund, "give back what a call was charged, or a part of it"),
        ("holds", run_holds, "holds that have not ended"),
        ("reconcile", run_reconcile, "end the calls in doubt whose grace is over, each by the policy of its route"),
        ("resolve", run_resolve, "end one call as you decide, whatever its policy says"),
        ("check", run_check, "prove that the books balance"),
    ):
        command = command_of(name, help_text)
        _store_options(command)
        command.set_defaults(run=run)
        if name in ("grant", "balance", "statement"):
            command.add_argument("payer", help="whose account: as the application names it, Caller(payer=...)")
        if name == "grant":
            command.add_argument("amount", help="whole units, such as 12.5")
            command.add_argument("--id", required=True, help="the payment's id: the same id grants once")
            command.add_argument("--priority", type=int, default=0, help="lower burns first; 0 by default")
            command.add_argument("--expires", type=_moment, help="when what is left lapses: ISO 8601 with a zone")
            command.add_argument("--actor", default="cli", help="who did it, for the statement; cli by default")
        if name in ("refund", "resolve"):
            command.add_argument("call", help="the call's id: ref of its line in the statement, and the id of its hold")
        if name == "refund":
            command.add_argument("--id", required=True, help="the refund's id: the same id refunds once")
            command.add_argument("--amount", help="whole units; all that is left of the charge by default")
            command.add_argument("--payer", help="whose account paid; needed once the call's hold is forgotten")
            command.add_argument("--actor", default="cli", help="who did it, for the statement; cli by default")
        if name == "resolve":
            decision = command.add_mutually_exclusive_group(required=True)
            decision.add_argument("--charge", metavar="AMOUNT", help="charge so many whole units")
            decision.add_argument("--release", action="store_true", help="charge nothing, and give all of it back")
    return parser


def _quota_commands(command_of: Callable[[str, str], argparse.ArgumentParser]) -> None:
    for name, run, help_text, file_text in (
        ("init", run_init, "write a catalogue of upstream packages to begin with", "where to; quotas.json by default"),
        ("quotas", run_quotas, "what upstreams still allow, package by package", "the catalogue"),
        ("poll", run_poll, "ask providers for their balances once, and write them down", "the catalogue, as JSON"),
    ):
        command = command_of(name, help_text)
        command.set_defaults(run=run)
        if name == "init":
            command.add_argument("file", metavar="FILE", nargs="?", default="quotas.json", help=file_text)
            command.add_argument(
                "--force", action="store_true", help="also where something stands already; better choose another name"
            )
            continue
        command.add_argument("file", metavar="FILE", help=file_text)
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "quotas":
            command.add_argument(
                "--log", metavar="FILE", help="the file of the application's UsageLog, for burn and counts"
            )
            command.add_argument(
                "--store", metavar="URL", help="the application's store, for what its workers were told by providers"
            )


def _store_option(command: argparse.ArgumentParser) -> None:
    told = "the store, such as sqlite:///metering.db; ASGI_METERING_STORE by default"
    command.add_argument("--store", metavar="URL", default=os.environ.get("ASGI_METERING_STORE"), help=told)


def _store_options(command: argparse.ArgumentParser) -> None:
    _store_option(command)
    unit = f"{CREDITS.name}:{CREDITS.scale}"
    command.add_argument(
        "--unit", metavar="NAME:SCALE", default=unit, help=f"the unit as the application declares it; {unit} by default"
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def _moment(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a date and time. Write 2027-01-01T00:00:00+00:00, say."
        ) from None
    if moment.tzinfo is None:
        raise argparse.ArgumentTypeError(f"{text!r} has no zone. Write 2027-01-01T00:00:00+00:00, say.")
    return moment


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port. Use a number up to {MAX_PORT}; 0 takes a free one.")
    return int(text)


def _demo(given: argparse.Namespace) -> int:
    try:
        from asgi_metering.demo.run import demo
    except ImportError as missing:
        raise MissingExtraError("The demo", "demo") from missing
    return asyncio.run(demo(serve=given.serve, port=given.port))
