"""
Catalogue files: JSON or TOML on a local disk, read again when they change, and written by the poller alone.

Knows the file system. What an entry means is known by `quotas.packages`.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.packages import Catalogue, Package, read_catalogue, total_key

__all__ = ["CatalogueFile", "back_up", "load_catalogue", "put_in_place", "template", "write_usage"]

log = logging.getLogger("asgi_metering.quotas")

MAX_BYTES: Final = 4 << 20
"""Of a catalogue: a person keeps it."""

_TEMPLATE: Final = "packages.template.json"


def template() -> str:
    """A catalogue to begin with, as JSON: eleven packages of seven providers, with notes (S1.18)."""
    return files("asgi_metering.quotas").joinpath(_TEMPLATE).read_text(encoding="utf-8")


def load_catalogue(path: str | os.PathLike[str]) -> Catalogue:
    """
    Read a catalogue: TOML where the name ends in ``.toml``, else JSON.

    Raises:
        ConfigurationError: There is no such file, it cannot be parsed, or it is no catalogue. Entries that are broken
            are told of in `Catalogue.problems`.
    """
    return read_catalogue(_parsed(Path(path)), Path(path).name)


def write_usage(path: str | os.PathLike[str], changes: Mapping[str, Package]) -> None:
    """
    Put what is used of packages into a JSON catalogue, and leave everything else of it as it is (S1.30).

    Only ``total_credits`` (or the limit of a window), ``used_credits``, ``source``, ``confidence`` and
    ``last_updated`` of the entries named are written; what stands in the file and not in *changes* stays.

    Raises:
        ConfigurationError: The file is TOML, or cannot be read or written.

    Atomic: the file is the old one or the new one, whole, also when the process is killed in between.
    """
    place = Path(path)
    if place.suffix == ".toml":
        raise ConfigurationError(f"{place.name} is TOML, which polls cannot be written into. Keep it as JSON.")
    payload = _parsed(place)
    entries = payload.get("packages") if isinstance(payload, dict) else None
    for package_id, package in changes.items():
        entry = _entry(entries, package_id)
        if entry is not None:
            for key, value in (
                (total_key(package.package_type), package.total),
                ("used_credits", package.used),
                ("source", package.source),
                ("confidence", package.confidence),
                ("last_updated", package.last_updated),
            ):
                entry[key] = value
    put_in_place(place, json.dumps(payload, indent=2, ensure_ascii=False) + "\n")


def back_up(path: Path) -> Path | None:
    """
    Copy a file beside itself as ``NAME.bak.YYYYMMDDHHMMSS``, in UTC, with its times and mode; None where there is none.

    Two in one second get names of their own (S1.59).
    """
    if not path.exists():
        return None
    stamp = f"{path.name}.bak.{datetime.now(UTC):%Y%m%d%H%M%S}"
    for number in range(1_000):
        backup = path.with_name(stamp if not number else f"{stamp}.{number}")
        try:
            os.close(os.open(backup, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            continue
        shutil.copy2(path, backup)
        return backup
    raise ConfigurationError(f"{str(path)!r} has a thousand backups of this second. Move them away.")


class CatalogueFile:
    """
    The packages of a file, read again when it changes. Safe for several threads.

    Args:
        path: Of the file. Where it is missing there are no packages (S1.49); where it cannot be read any more, those
            that were read last.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._told = False
        self._latest = Catalogue({})

    def read(self) -> Catalogue:
        """What the file holds now. Never raises: what is wrong is logged, once for each state of the file."""
        seen = None
        with suppress(OSError):
            found = self.path.stat()
            seen = (found.st_mtime_ns, found.st_size)
        with self._lock:
            if seen is None:
                if self._seen is not None or not self._told:
                    log.warning(
                        "There is no catalogue %r, so that no package is tracked. Write one: asgi-metering init %s",
                        str(self.path),
                        self.path.name,
                    )
                self._seen, self._latest, self._told = None, Catalogue({}), True
            elif seen != self._seen:
                self._seen = seen
                try:
                    self._latest = load_catalogue(self.path)
                except ConfigurationError as wrong:
                    log.warning("The packages stay as they were: %s", wrong)
                for problem in self._latest.problems:
                    log.warning("A package is left out: %s", problem)
            return self._latest


def _parsed(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigurationError(f"{path.name} has more than {MAX_BYTES} bytes. A catalogue is a small file.")
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as failure:
        raise ConfigurationError(
            f"{str(path)!r} cannot be read: {failure.strerror or failure}. Write one with: asgi-metering init FILE"
        ) from failure
    except (ValueError, RecursionError) as wrong:
        if isinstance(wrong, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{path.name} cannot be parsed: {wrong}. Mend it, or begin with the template."
        ) from wrong


def _entry(entries: object, package_id: str) -> dict[str, Any] | None:
    """The entry of a package, by its key or by the id that it has itself."""
    if not isinstance(entries, dict):
        return None
    found = entries.get(package_id)
    if isinstance(found, dict) and found.get("package_id") in (None, "", package_id):
        return found
    return next(
        (each for each in entries.values() if isinstance(each, dict) and each.get("package_id") == package_id), None
    )


def put_in_place(path: Path, text: str) -> None:
    """
    Write *text* beside *path*, and put it in its place; a crash before that leaves the old file whole.

    A link is followed. Whoever else does the same at that time writes beside it under another name.

    Raises:
        ConfigurationError: It could not be written. What stands there is as it was.
    """
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, temporary)
        os.replace(temporary, path)  # noqa: PTH105 -- the requirement's own words
    except OSError as failure:
        temporary.unlink(missing_ok=True)
        raise ConfigurationError(
            f"{str(path)!r} cannot be written: {failure.strerror or failure}. Make its folder writable."
        ) from failure
