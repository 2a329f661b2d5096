"""
The command line: thin over `Metering`. Tables for people, ``--json`` for programs.

Every command but ``demo``, ``routes`` and ``journal`` opens the store that ``--store`` or ``ASGI_METERING_STORE``
names, and so does ``journal --replay``; only ``grant`` and ``import`` make a new one. Every command but ``demo`` has
``--json``, whose output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.errors import ConfigurationError, MeteringError, MissingExtraError, StoreUnavailableError
from asgi_metering.ledger import Checked
from asgi_metering.metering import ALL_FEATURES, Metering
from asgi_metering.receipts import Posting, Receipt
from asgi_metering.stores.contract import Store
from asgi_metering.stores.moving import Moved, export_books, import_books

__all__ = ["main"]


EXIT_CODES = """\
exit codes:
  0    it did what was asked
  1    what it checked is not so: errors of routes, books that do not balance, a step of the demo
  2    it could not be done: a mistake in the arguments or set-up, or no answer from the store
  130  Ctrl-C
  141  whoever read the output left
"""

STORE_HELP = "store URL; ASGI_METERING_STORE by default"

MAX_PORT = 65_535

MAX_SHOWN = 300
"""Characters of a foreign error that one line repeats."""


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
        description=__doc__.splitlines()[1],
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    routes.set_defaults(run=_routes)
    migrate = commands.add_parser("migrate", help="make the tables of a PostgreSQL store, or bring them up to date")
    migrate.add_argument("--store", default=os.environ.get("ASGI_METERING_STORE"), help="store URL")
    migrate.add_argument("--sql", action="store_true", help="print what would be done, for psql, and do nothing")
    migrate.add_argument("--json", action="store_true")
    migrate.set_defaults(run=_migrate)
    for name, run, help_text, file_text in (
        ("export", _export, "write everything that a store keeps into a file", "what stands there is kept beside it"),
        ("import", _import, "fill an empty store with what was exported of another", "what export wrote"),
    ):
        command = command_of(name, help_text)
        command.add_argument("file", metavar="FILE", help=file_text)
        command.add_argument("--store", default=os.environ.get("ASGI_METERING_STORE"), help=STORE_HELP)
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "import":
            command.add_argument("--resume", action="store_true", help="go on with an import of this file that was cut")
            command.add_argument("--unbalanced", action="store_true", help="also import books that do not balance")
        command.set_defaults(run=run)
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
    journal.set_defaults(run=_journal)
    for name, run, help_text in (
        ("grant", _grant, "give units to a payer"),
        ("balance", _balance, "what a payer has"),
        ("statement", _statement, "the ledger of a payer"),
        ("refund", _refund, "give back what a call was charged, or a part of it"),
        ("holds", _holds, "holds that have not ended"),
        ("reconcile", _reconcile, "end the calls in doubt whose grace is over, each by the policy of its route"),
        ("resolve", _resolve, "end one call as you decide, whatever its policy says"),
        ("check", _check, "prove that the books balance"),
    ):
        command = command_of(name, help_text)
        _store_options(command)
        command.set_defaults(run=run)
        if name in ("grant", "balance", "statement"):
            command.add_argument("payer")
        if name == "grant":
            command.add_argument("amount", help="whole units, such as 12.5")
            command.add_argument("--id", required=True, help="the payment's id: the same id grants once")
            command.add_argument("--priority", type=int, default=0)
            command.add_argument("--expires", type=_moment, help="when what is left lapses: ISO 8601 with a zone")
            command.add_argument("--actor", default="cli")
        if name in ("refund", "resolve"):
            command.add_argument("call", help="the call's id: of its hold, its receipt and its event")
        if name == "refund":
            command.add_argument("--id", required=True, help="the refund's id: the same id refunds once")
            command.add_argument("--amount", help="whole units; all that is left of the charge by default")
            command.add_argument("--payer", help="whose account paid; needed once the call's hold is forgotten")
            command.add_argument("--actor", default="cli")
        if name == "resolve":
            decision = command.add_mutually_exclusive_group(required=True)
            decision.add_argument("--charge", metavar="AMOUNT", help="charge so many whole units")
            decision.add_argument("--release", action="store_true", help="charge nothing, and give all of it back")
    return parser


def _store_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--store", default=os.environ.get("ASGI_METERING_STORE"), help=STORE_HELP)
    command.add_argument("--unit", default=f"{CREDITS.name}:{CREDITS.scale}", help="name:scale of the unit")
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


# -- the audit ---------------------------------------------------------------------------------------------


def _routes(given: argparse.Namespace) -> int:
    from asgi_metering.asgi.audit import audit

    app = _load(given.app, verbose=given.verbose)
    if not callable(app) or isinstance(app, type):
        raise ConfigurationError(
            f"{given.app!r} is {_kind(app)}, no ASGI application. Name the application itself, such as main:app."
        )
    report = audit(app, ALL_FEATURES, frozenset())
    if not report.rows and inspect.isroutine(app) and not _takes_three(app):
        raise ConfigurationError(
            f"{given.app!r} is a function, but no ASGI application: it does not take scope, receive and send. Where it "
            f"makes the application, call it in a module, app = {given.app.partition(':')[2]}(), and name that."
        )
    if not report.rows:
        report.warnings.append(f"{given.app} has no route table that can be read, so nothing was checked.")
    rows = [_route(row) for row in report.rows]
    if given.json:
        print(json.dumps({"routes": rows, "errors": report.errors, "warnings": report.warnings}, indent=2))
    else:
        _table(("path", "methods", "line", "price", "unit", "limits", "concurrency"), rows)
        if given.verbose:
            _details(rows)
        for sentence in (*report.errors, *report.warnings):
            print(f"! {sentence}")
    return 1 if report.errors else 0


def _kind(found: Any) -> str:
    return f"the class {found.__qualname__}" if isinstance(found, type) else f"of type {type(found).__qualname__}"


def _takes_three(function: Any) -> bool:
    """Whether *function* can be called as an ASGI application is."""
    try:
        inspect.signature(function).bind({}, None, None)
    except TypeError:
        return False
    except ValueError:
        # It has no signature to read.
        return True
    return True


def _route(row: Any) -> dict[str, Any]:
    policy = row.policy or next(iter(row.policies), None)
    charge = policy.charge if policy is not None else None
    rates = policy.rates if policy is not None else ()
    slots = [
        f"{each.limit}{' of everybody' if each.level == 'global' else ''}"
        for rate in rates
        for each in rate.concurrency
    ]
    shown: dict[str, Any] = {
        "path": row.path,
        "methods": ",".join(row.methods),
        "line": charge.line if charge is not None else "",
        "price": _price(charge.price) if charge is not None else "",
        # Which one the metering counts is not seen from here.
        "unit": _unit(charge.unit) if charge is not None else "",
        "limits": ", ".join(limit.text for rate in rates for limit in rate.limits),
        "concurrency": ", ".join(slots),
    }
    if charge is not None:
        from asgi_metering.rules.ending import END_OF_CALL

        shown["hold"] = _hold(charge)
        shown["sources"] = ", ".join(_source(source) for source in charge.sources)
        shown["payer"] = "the caller's" if charge.payer is None else _function(charge.payer)
        shown["idempotency"] = _idempotency(charge.idempotency)
        shown["charge_key"] = _charge_key(charge.key)
        shown["end"] = {situation.value: charge.end.basis(situation).value for situation in END_OF_CALL}
    return shown


def _unit(unit: Unit | None) -> str:
    return "" if unit is None else f"{unit.name}:{unit.scale}"


def _hold(charge: Any) -> str:
    """What a call sets aside."""
    from asgi_metering.policies import From

    estimate, least = charge.hold.estimate, charge.hold.at_least
    if not charge.measured:
        return "the price"
    text = "estimated from the request" if estimate is None else str(estimate)
    if isinstance(estimate, From):
        text = _function(estimate)
    if charge.hold.slices is not None:
        return f"{text} at first, and more while it runs"
    return text if least is None else f"up to {text}, at least {least}"


def _idempotency(policy: Any) -> str:
    """What an ``Idempotency-Key`` does."""
    if policy is None:
        return ""
    told = [f"{'required' if policy.required else 'taken'}, for {policy.ttl_s:g} s"]
    if policy.fingerprint is not None:
        told.append(f"fingerprint {_function(policy.fingerprint)}")
    told.append("answers not kept" if policy.store_body is None else f"answers kept up to {policy.store_body} bytes")
    return ", ".join(told)


def _charge_key(policy: Any) -> str:
    """What is charged once."""
    if policy is None:
        return ""
    key = policy.key if isinstance(policy.key, str) else _function(policy.key)
    if not isinstance(policy.per, str):
        return f"{key} per {policy.per:g} s"
    return f"{key} per {policy.per}" + ("" if policy.zone == "UTC" else f" in {policy.zone}")


def _function(computed: Any) -> str:
    function = computed.function
    return f"{getattr(function, '__qualname__', type(function).__qualname__)}()"


def _source(source: Any) -> str:
    return source.name if source.payer is None else f"{source.name} of {source.payer.name}"


def _details(rows: Iterable[dict[str, Any]]) -> None:
    """The rest of each charge, a line for each part: what does not fit into a table."""
    for row in rows:
        if "end" not in row:
            continue
        print(f"\n{row['path']}  {row['methods']}".rstrip())
        for name in ("hold", "sources", "payer", "idempotency", "charge_key"):
            if row[name]:
                print(f"  {name.replace('_', ' ')}: {row[name]}")
        for situation, basis in row["end"].items():
            print(f"  {situation}: {basis}")


def _price(price: Any) -> str:
    from asgi_metering.policies import From
    from asgi_metering.prices import FixedPrice

    if isinstance(price, From):
        return _function(price)
    return format(price.amount, "f") if isinstance(price, FixedPrice) else type(price).__name__


def _load(target: str, *, verbose: bool) -> Any:
    """
    Import what *target* names.

    Raises:
        ConfigurationError: It is not there, or its module failed: in one line with the place, since most mistakes are
            seen from there. With *verbose* the traceback comes before it, on the standard error.
    """
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ConfigurationError(f"{target!r} names no application. Write module:attribute, such as main:app.")
    sys.path.insert(0, str(Path.cwd()))
    try:
        # What a module prints while it is imported is no part of our answer.
        with contextlib.redirect_stdout(sys.stderr):
            imported = importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name is None or not f"{module}.".startswith(f"{missing.name}."):
            raise _import_failed(target, missing, verbose=verbose) from missing
        raise ConfigurationError(f"{target!r} cannot be imported: {missing}. Look at its spelling.") from missing
    except (Exception, SystemExit) as failure:
        raise _import_failed(target, failure, verbose=verbose) from failure
    try:
        return getattr(imported, attribute)
    except AttributeError as missing:
        raise ConfigurationError(f"{target!r} cannot be imported: {missing}. Look at its spelling.") from missing


def _import_failed(target: str, failure: BaseException, *, verbose: bool) -> ConfigurationError:
    mend = "Mend that module."
    if verbose:
        traceback.print_exception(failure)
    else:
        mend = "Mend that module; --verbose shows the traceback."
    said = " ".join(str(failure).split())
    said = said if len(said) <= MAX_SHOWN else f"{said[:MAX_SHOWN]}..."
    return ConfigurationError(
        f"{target!r} cannot be imported, since its code raised {type(failure).__name__}{_place(failure)}: "
        f"{said or 'without a word'}{'' if said.endswith('.') else '.'} {mend}"
    )


def _place(failure: BaseException) -> str:
    """Where the user's own code was: the innermost line that belongs neither to Python nor to a package."""
    if isinstance(failure, SyntaxError):
        # Its words name the line already.
        return ""
    steps = traceback.extract_tb(failure.__traceback__)
    own = [
        step
        for step in steps
        if Path(step.filename).is_relative_to(Path.cwd()) and "site-packages" not in step.filename
    ]
    return f" at {Path(own[-1].filename).relative_to(Path.cwd())}, line {own[-1].lineno}" if own else ""


# -- the ledger --------------------------------------------------------------------------------------------


def _metering(given: argparse.Namespace, *, makes: bool = False) -> tuple[Metering, Unit]:
    """The metering of the named store; one that is not there yet is an error unless the command *makes* it."""
    _check_named(given)
    unit = _unit_of(given)
    metering = Metering(given.store, unit=unit, sinks=())
    _check_usable(metering.store, given.store, makes=makes)
    return metering, unit


def _unit_of(given: argparse.Namespace) -> Unit:
    name, _, scale = given.unit.partition(":")
    if not scale.isdigit():
        raise ConfigurationError(f"--unit {given.unit!r} is not name:scale, such as credits:6.")
    return Unit(name, int(scale))


def _check_named(given: argparse.Namespace) -> None:
    if not given.store:
        raise ConfigurationError("No store is named. Pass --store sqlite:///metering.db, or set ASGI_METERING_STORE.")


def _check_usable(store: Store, url: str, *, makes: bool) -> None:
    if not store.durable:
        raise ConfigurationError(f"The {store.name} store keeps nothing between commands. Name a durable one.")
    if not makes:
        _check_there(url)


def _check_there(url: str) -> None:
    """Refuse a database that is not there: opening it would make it, and show the empty books of a mistyped name."""
    parts = urlsplit(url)
    file = Path(unquote(parts.path)[1:])
    if parts.scheme == "sqlite" and not file.exists():
        raise ConfigurationError(
            f"There is no database '{file}'. Look at its spelling; the first grant or the application makes one."
        )


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
    metering, unit = _metering(given, makes=True)

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


def _refund(given: argparse.Namespace) -> int:
    metering, unit = _metering(given)

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
    _show(given, tuple(row), [row])
    return 0


def _reconcile(given: argparse.Namespace) -> int:
    metering, _ = _metering(given)

    async def run() -> list[str]:
        async with metering:
            return await metering.reconcile()

    ended = asyncio.run(run())
    _show(given, ("ended",), [{"ended": call} for call in ended])
    return 0


def _resolve(given: argparse.Namespace) -> int:
    metering, unit = _metering(given)

    async def run() -> Receipt:
        async with metering:
            return await metering.resolve(given.call, charge=given.charge)

    receipt = asyncio.run(run())
    row = {
        "id": receipt.id,
        "payer": receipt.payer,
        "charged": _amount(unit, receipt.unit, receipt.amount),
        "ended_by": receipt.ended_by.value,
        "applied": receipt.applied,
    }
    _show(given, tuple(row), [row])
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
            "amount": _amount(unit, hold.unit, hold.amount),
            "state": hold.state.value,
            "since": _time(hold.created_at),
        }
        for hold in asyncio.run(run())
    ]
    _show(given, ("id", "payer", "line", "amount", "state", "since"), rows)
    return 0


def _check(given: argparse.Namespace) -> int:
    metering, _ = _metering(given)

    async def run() -> Checked:
        async with metering:
            return await metering.check()

    wrong = asyncio.run(run())
    if given.json:
        proof = {"balanced": not wrong, "accounts": wrong.accounts, "discrepancies": wrong}
        print(json.dumps(proof, indent=2))
    else:
        print("\n".join(wrong) or f"The books balance: {_number(wrong.accounts, 'account')} proven.")
    return 1 if wrong else 0


# -- the journal -------------------------------------------------------------------------------------------


def _journal(given: argparse.Namespace) -> int:
    from asgi_metering.journal import give_up, look

    file = Path(given.file)
    if not (given.replay or given.restore or given.lost):
        unit = _unit_of(given)
        rows = [_waiting(unit, each) for each in look(file)]
        _show(given, ("call", "state", "payer", "line", "amount", "due", "why"), rows)
        return 0
    metering = _metering(given)[0] if given.replay else None
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
    _show(given, tuple(row), [row])
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
        "due": _time(each.due_at),
        "why": each.why,
    }


# -- moving ------------------------------------------------------------------------------------------------


def _export(given: argparse.Namespace) -> int:
    async def work(store: Store) -> Moved:
        await store.open()
        return await export_books(store, given.file)

    moved = asyncio.run(_with_store(given, work, makes=False))
    return _show_moved(given, moved, "exported")


def _import(given: argparse.Namespace) -> int:
    def work(store: Store) -> Coroutine[Any, Any, Moved]:
        return import_books(store, given.file, resume=given.resume, unbalanced=given.unbalanced)

    moved = asyncio.run(_with_store(given, work, makes=True))
    return _show_moved(given, moved, "imported")


async def _with_store(
    given: argparse.Namespace, work: Callable[[Store], Coroutine[Any, Any, Moved]], *, makes: bool
) -> Moved:
    """Do *work* on the store alone: no worker of a metering shall sweep it meanwhile."""
    from asgi_metering.stores.urls import store_from_url

    _check_named(given)
    store = store_from_url(given.store)
    _check_usable(store, given.store, makes=makes)
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
        _table(("rows", "number"), [{"rows": table, "number": count} for table, count in moved.counts.items() if count])
        print(f"{_number(moved.new, 'row')} {done}; {_number(moved.accounts, 'account')} proven.")
        for sentence in moved.discrepancies:
            print(f"! {sentence}")
        if not moved.one_instant:
            print("! This store cannot be read at one instant. Make sure that nobody wrote to it meanwhile.")
        if moved.backup is not None:
            print(f"What stood there is now {str(moved.backup)!r}.")
    return 1 if moved.discrepancies else 0


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


# -- showing -----------------------------------------------------------------------------------------------


def _amount(unit: Unit, name: str, parts: int) -> str:
    """Whole units where the unit is the one that was named; another one's scale is not known here."""
    return unit.text(parts) if unit.name == name else f"{parts} smallest parts of {name}"


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


if __name__ == "__main__":
    sys.exit(main())
