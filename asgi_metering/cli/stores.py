"""
The store that a command works on, and the unit that it counts in.

Refuses what is not named, not there or not durable.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from urllib.parse import unquote, urlsplit

from asgi_metering.amounts import Unit
from asgi_metering.errors import ConfigurationError
from asgi_metering.metering import Metering
from asgi_metering.stores.contract import Store

__all__ = ["check_named", "check_usable", "metering_of", "unit_of"]


def metering_of(given: argparse.Namespace, *, makes: bool = False) -> tuple[Metering, Unit]:
    """The metering of the named store; one that is not there yet is an error unless the command *makes* it."""
    check_named(given)
    unit = unit_of(given)
    metering = Metering(given.store, unit=unit, sinks=(), share_readings=False)
    check_usable(metering.store, given.store, makes=makes)
    return metering, unit


def unit_of(given: argparse.Namespace) -> Unit:
    """The unit that ``--unit`` names."""
    name, _, scale = given.unit.partition(":")
    if not scale.isdigit():
        raise ConfigurationError(f"--unit {given.unit!r} is not name:scale, such as credits:6.")
    return Unit(name, int(scale))


def check_named(given: argparse.Namespace) -> None:
    """Refuse a command without a store."""
    if not given.store:
        raise ConfigurationError("No store is named. Pass --store sqlite:///metering.db, or set ASGI_METERING_STORE.")


def check_usable(store: Store, url: str, *, makes: bool) -> None:
    """Refuse a store that keeps nothing, or one that is not there, unless the command *makes* it."""
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
