"""
``asgi-metering init``, ``quotas`` and ``poll``: catalogues of what upstreams sold or allow us.

Thin over `asgi_metering.tracking`; overwrites no file that it did not write, unless it is told to (S1.58, S1.59).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asgi_metering.cli.showing import print_table, show
from asgi_metering.cli.stores import check_usable
from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.alerts import ALERTS
from asgi_metering.quotas.status import QuotaStatus

if TYPE_CHECKING:
    from asgi_metering.upstream.readings import QuotaReadings

__all__ = ["run_init", "run_poll", "run_quotas"]

_COLUMNS = (
    "alert",
    "provider",
    "package",
    "left",
    "total",
    "expires",
    "burn",
    "lasts",
    "resets",
    "source",
    "confidence",
)
_UNKNOWN = "-"


def run_init(given: argparse.Namespace) -> int:
    """Write the template of a catalogue; refuses where something stands that it did not write (S1.58)."""
    from asgi_metering.upstream.catalogue import back_up, put_in_place, template
    from asgi_metering.upstream.turns import Turn

    path, text = Path(given.file), template()
    findings = []
    if path.is_dir():
        raise ConfigurationError(f"{given.file!r} is a folder. Name a file in it.")
    if path.exists():
        if path.read_bytes() == text.encode():
            print(f"{path} is the template already.")
            return 0
        findings.append(f"{path} exists, and is not the template")
    if path.with_suffix(".toml").exists() and path.suffix != ".toml":
        findings.append(f"{path.with_suffix('.toml')} is a catalogue beside it")
    turn = Turn(path)
    if turn.is_known() and not turn.take():
        findings.append(f"a running process polls for {path}")
    turn.give_back()
    if findings and not given.force:
        raise ConfigurationError(
            f"{'; '.join(findings)}. Nothing was written. Choose another name, or --force it: what stands there is "
            f"copied beside it."
        )
    backup = back_up(path)
    put_in_place(path, text)
    kept = "" if backup is None else f" What stood there is kept as {backup.name}."
    print(f"{path} has eleven packages to choose from.{kept} Edit it, and look: asgi-metering quotas {path}")
    return 0


def run_quotas(given: argparse.Namespace) -> int:
    """Show what packages still allow, the most urgent first; broken entries are told on the standard error."""
    from asgi_metering.upstream.catalogue import load_catalogue
    from asgi_metering.upstream.tracker import QuotaTracker

    # Said here, where the tracker would only log it.
    problems = load_catalogue(given.file).problems
    tracker = QuotaTracker(given.file, log=given.log)
    if given.store:
        asyncio.run(_take_shared(given.store, tracker.readings))
    for problem in problems:
        print(f"asgi-metering: {problem}", file=sys.stderr)
    if given.json:
        print(json.dumps(tracker.snapshot(), indent=2))
        return 0
    statuses = sorted(tracker.statuses(), key=lambda status: ALERTS.index(status.alert))
    print_table(_COLUMNS, [_row(status) for status in statuses])
    return 0


async def _take_shared(url: str, readings: QuotaReadings) -> None:
    """What the workers of the store let each other know."""
    from asgi_metering.stores.contract import ReadingsKept
    from asgi_metering.stores.urls import store_from_url
    from asgi_metering.upstream.parts import take_parts

    store = store_from_url(url)
    check_usable(store, url, makes=False)
    try:
        await store.open()
        rows = (await store.read(ReadingsKept())).state.readings
    finally:
        await store.close()
    take_parts(readings, rows, dict.fromkeys(series for series, _ in rows))


def run_poll(given: argparse.Namespace) -> int:
    """Ask once for the balances of a catalogue, and write them into it; 1 where one failed (S1.33)."""
    from asgi_metering.upstream.catalogue import load_catalogue
    from asgi_metering.upstream.poller import QuotaPoller
    from asgi_metering.upstream.tracker import QuotaTracker

    load_catalogue(given.file)
    results = asyncio.run(QuotaPoller(QuotaTracker(given.file)).poll())
    rows = [
        {
            "package": each.package_id,
            "result": "skipped" if each.is_skipped else "told" if each.is_ok else "failed",
            "used": f"{each.used:g}",
            "total": f"{each.total:g}",
            "error": each.error or ("no key" if each.is_skipped else ""),
        }
        for each in results
    ]
    show(given, ("package", "result", "used", "total", "error"), rows)
    return 1 if any(row["result"] == "failed" for row in rows) else 0


def _row(status: QuotaStatus) -> dict[str, Any]:
    days, lasts = status.days_until_expiry, status.projected_days_left
    return {
        "alert": status.alert,
        "provider": status.provider_id,
        "package": status.package_id,
        "left": f"{status.remaining:g}",
        "total": f"{status.total:g}",
        "expires": _UNKNOWN if days is None else f"{days} d",
        "burn": _UNKNOWN if status.burn_per_day is None else f"{status.burn_per_day:.3g}/d",
        "lasts": _UNKNOWN if lasts is None else f"{lasts:.3g} d",
        "resets": status.reset_at or _UNKNOWN,
        "source": status.source,
        "confidence": status.confidence,
    }
