"""
``asgi-metering routes``: which route of an application is metered how.

Imports the application, and asks the audit that its startup asks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib
import inspect
import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from asgi_metering.amounts import Unit
from asgi_metering.calibrating import HoldUse, read_hold_use
from asgi_metering.cli.showing import print_table
from asgi_metering.cli.stores import check_usable
from asgi_metering.errors import ConfigurationError
from asgi_metering.metering import ALL_FEATURES, Metering
from asgi_metering.prices import TokenPrice
from asgi_metering.prices.tokens import TokenPrices

__all__ = ["run_routes"]


COLUMNS = ("path", "methods", "line", "price", "unit", "limits", "concurrency")

SHOWN = ("limit", "source", "key", "level", "strategy", "cost", "scope", "applies")
"""What is told of each limit."""

MAX_SHOWN = 300
"""Characters of a foreign error that one line repeats."""


def run_routes(given: argparse.Namespace) -> int:
    """Show how each route of an application is metered; 1 where the audit finds a mistake."""
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
    report.errors += _ungated(app, report.rows)
    report.errors += _misnamed(report.rows)
    rows = [_route(row) for row in report.rows]
    rows += _others(app)
    if given.store:
        report.warnings += _calibrate(rows, given)
    if given.json:
        print(json.dumps({"routes": rows, "errors": report.errors, "warnings": report.warnings}, indent=2))
    else:
        print_table(_columns(rows), rows)
        if given.verbose:
            _details(rows)
        for row in rows:
            if "hold_use" in row:
                print(f"{row['path']}  {row['methods']}: {row['hold_use']['told']}")
        for sentence in (*report.errors, *report.warnings):
            print(f"! {sentence}")
    return 1 if report.errors else 0


def _calibrate(rows: Iterable[dict[str, Any]], given: argparse.Namespace) -> list[str]:
    """
    Tell what the latest calls of each measured route used of their holds, out of the store: here nobody calls.

    Returns a sentence for each route of which nothing can be told.
    """
    metering = Metering(given.store, sinks=(), share_readings=False)
    check_usable(metering.store, given.store, makes=False)

    async def run() -> list[HoldUse]:
        async with metering:
            return await read_hold_use(metering.store)

    uses = {(use.line, use.unit): use for use in asyncio.run(run())}
    silent = []
    for row in rows:
        if not row.get("measured"):
            continue
        unit = row["unit"].partition(":")[0]
        found = [use for (line, counted), use in uses.items() if line == row["line"] and unit in ("", counted)]
        if found:
            use = found[0]
            row["hold_use"] = {**use._asdict(), "suggestion": str(use.suggestion or ""), "told": use.sentence}
        else:
            silent.append(
                f"Nothing is told of the holds of {row['path']}: no call of {row['line']!r} in that store was charged "
                f"by what it used."
            )
    return silent


def _columns(rows: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    """What the table shows: of providers only where something is required."""
    return (*COLUMNS, "upstream") if any(row.get("upstream") for row in rows) else COLUMNS


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
    from asgi_metering.asgi.effective import limits_of_row

    policy = row.policy or next(iter(row.policies), None)
    charge = policy.charge if policy is not None else None
    rates = policy.rates if policy is not None else ()
    slots = [
        f"{each.limit}{' of everybody' if each.level == 'global' else ''}{_shadow(rate)}"
        for rate in rates
        for each in rate.concurrency
    ]
    shown: dict[str, Any] = {
        "path": row.path,
        "methods": ",".join(row.methods),
        "line": charge.line if charge is not None else "",
        "price": f"{_price(charge)}{_shadow(charge)}" if charge is not None else "",
        # Which one the metering counts is not seen from here.
        "unit": _unit(charge.unit) if charge is not None else "",
        "concurrency": ", ".join(slots),
        **_limits(list(limits_of_row(row))),
        "upstream": ", ".join(map(_upstream, policy.upstreams if policy is not None else ())),
    }
    if charge is not None:
        from asgi_metering.rules.ending import DRAIN, END_OF_CALL

        shown["hold"] = _hold(charge)
        shown["measured"] = charge.measured
        shown["sources"] = ", ".join(_source(source) for source in charge.sources)
        shown["payer"] = "the caller's" if charge.payer is None else _function(charge.payer)
        shown["callers"] = ", ".join(sorted(charge.callers or ()))
        shown["idempotency"] = _idempotency(charge.idempotency)
        shown["charge_key"] = _charge_key(charge.key)
        basis = charge.end.session_basis if row.is_websocket else charge.end.basis
        drains = charge.end.drains
        shown["end"] = {row.value: DRAIN if row in drains else basis(row).value for row in END_OF_CALL}
    return shown


def _shadow(part: Any) -> str:
    """Marks what only tells."""
    return " (shadow)" if part.shadow else ""


def _upstream(required: Any) -> str:
    """What a provider must have left."""
    label = required.label if isinstance(required.label, str) else None
    name = required.provider if required.label is None else f"{required.provider}/{label or _function(required.label)}"
    models = required.models
    of_models = "" if not models else f"@{'+'.join(models) if isinstance(models, tuple) else _function(models)}"
    return f"{name}{of_models}{_shadow(required)}"


def _ungated(app: Any, rows: Any) -> Iterator[str]:
    """What makes every call of a decorated route fail: no middleware, or one without a metering."""
    from asgi_metering.asgi.audit import layers_of
    from asgi_metering.asgi.effective import distinct

    layers = distinct((*layers_of(app), *(layer for row in rows for layer in row.layers)))
    metered = [row for row in rows if row.policy is not None]
    if metered and not layers:
        yield (
            f"Nothing gates {metered[0].path} ({metered[0].policy.name}): no middleware of ours is on the application "
            f"or around it. Write app.add_middleware(MeteringMiddleware, metering=metering); or name here what the "
            f"server runs."
        )
    for layer in layers:
        if not isinstance(layer.metering, Metering):
            told = "" if layer.metering is None else f"{layer.metering!r}, which is no Metering"
            yield (
                f"The {layer.name} has {f'metering={told}' if told else 'no metering='}. Make one, "
                f"Metering('sqlite:///metering.db'), and pass it there."
            )


def _misnamed(rows: Any) -> list[str]:
    """What of the limits' names the metering does not know, where one can be seen."""
    from asgi_metering.asgi.effective import check_names

    meterings = [layer.metering for row in rows for layer in row.layers if isinstance(layer.metering, Metering)]
    return check_names(rows, (), meterings[0])[0] if meterings else []


def _others(app: Any) -> list[dict[str, Any]]:
    """A row for the requests whose route cannot be told, where a middleware counts them."""
    from asgi_metering.asgi.effective import ANY_OTHER, effective_limits

    found = [limit for limit in effective_limits(app) if limit.path == ANY_OTHER]
    return [{**dict.fromkeys((*COLUMNS, "upstream"), ""), "path": ANY_OTHER, **_limits(found)}] if found else []


def _limits(found: Any) -> dict[str, Any]:
    """What limits a route: in short, and in full."""
    short = [limit.limit for limit in found if limit.strategy]
    return {
        "limits": ", ".join(dict.fromkeys(short)),
        "effective": [{name: getattr(limit, name) for name in SHOWN} for limit in found],
    }


def _unit(unit: Unit | None) -> str:
    return "" if unit is None else f"{unit.name}:{unit.scale}"


def _hold(charge: Any) -> str:
    """What a call sets aside."""
    from asgi_metering.arguments import From

    estimate, least = charge.hold.estimate, charge.hold.at_least
    if charge.per != "call":
        first = "a slice" if estimate is None else estimate
        return f"{first} at first, the price at least, and more while it is open"
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
    """The rest of each route, a line for each part: what does not fit into a table."""
    for row in rows:
        if not ("end" in row or row["effective"]):
            continue
        print(f"\n{row['path']}  {row['methods']}".rstrip())
        for name in ("hold", "sources", "payer", "callers", "idempotency", "charge_key"):
            if row.get(name):
                print(f"  {name.replace('_', ' ')}: {row[name]}")
        for situation, basis in row.get("end", {}).items():
            print(f"  {situation}: {basis}")
        for limit in row["effective"]:
            told = ", ".join(f"{name} {limit[name]}" for name in SHOWN[2:] if limit[name])
            print(f"  {limit['limit']} ({limit['source']}): {told}")


def _price(charge: Any) -> str:
    from asgi_metering.arguments import From
    from asgi_metering.prices import FixedPrice

    price = charge.price
    if isinstance(price, From):
        return f"{_function(price)}{_per(charge)}"
    if isinstance(price, FixedPrice):
        return f"{price.amount:f}{_per(charge)}"
    return _tokens(price) if isinstance(price, TokenPrice) else type(price).__name__


def _tokens(price: TokenPrice) -> str:
    """A price of tokens by its kinds, as they were written."""
    kinds = [f"{kind} {amount:f}" for kind in TokenPrices.__annotations__ if (amount := getattr(price, kind))]
    per = {1: "token", 1_000_000: "million tokens"}.get(price.per, f"{price.per} tokens")
    return f"{', '.join(kinds) or '0'} per {per}{', by tiers' if price.tiers else ''}"


def _per(policy: Any) -> str:
    """Of what it is charged or counted for each, where that is not the call."""
    return "" if policy.per == "call" else f" per {policy.per}"


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
