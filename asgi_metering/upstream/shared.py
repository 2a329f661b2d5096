"""
Shared readings: what processes of one machine that have no store in common, such as a tracker of its own beside an
application, let each other know of providers' answers. Workers of one store share by that (`asgi_metering.sharing`).

Knows a table in a local SQLite file, and how seldom it is looked at. Nothing is written or read on the path of a
response, and nothing that is wrong with the file reaches one (S1.39, S1.41).
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.reading import Reading
from asgi_metering.upstream.readings import QuotaReadings, label_of, newer_of

__all__ = ["SHARE_AFTER_S", "SharedReadings"]

log = logging.getLogger("asgi_metering.quotas")

SHARE_AFTER_S: Final = 0.5
"""How long a new reading waits for more of them before they are written: a busy worker has hundreds a second."""

KEEP_S: Final = 7 * 86_400.0
"""How long a reading is kept that nobody renews."""

BUSY_S: Final = 5.0
"""What one process waits for another that writes."""

_TABLE: Final = "CREATE TABLE IF NOT EXISTS readings (series TEXT PRIMARY KEY, observed_at REAL, reading TEXT)"
_SELECT: Final = "SELECT series, reading FROM readings"
_PUT: Final = "INSERT OR REPLACE INTO readings VALUES (?, ?, ?)"
_FORGET: Final = "DELETE FROM readings WHERE observed_at < ?"


class SharedReadings:
    """
    Keeps *readings* and those of other processes alike, by one file.

    Args:
        path: A file on a local disk, which may be that of a `UsageLog`.
        readings: Of this process. What others read is taken into them, by the same rule as its own (S1.45).
        share_after_s: How long a new reading waits before it is written, in a thread of its own.
        clock: Epoch seconds.
    """

    def __init__(
        self,
        path: Path,
        readings: QuotaReadings,
        *,
        share_after_s: float = SHARE_AFTER_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._readings = readings
        self._share_after_s = share_after_s
        self._clock = clock
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._known: dict[str, Reading] = {}
        readings.on_reading(self._note)

    def _note(self, _reading: Reading) -> None:
        """Have what is new written soon; called on the path of a response."""
        timer = self._timer
        # In the child of a fork the parent's timer is dead.
        if timer is None or not timer.is_alive():
            self._timer = timer = threading.Timer(self._share_after_s, self.share)
            timer.daemon = True
            timer.start()

    def share(self) -> None:
        """Write what is new here, and take what is new elsewhere. Blocking; what fails is tried again by the next."""
        self._timer = None
        with self._lock:
            mine = {series: each for series, each in self._readings.all().items() if self._known.get(series) != each}
            if mine:
                try:
                    self._write(mine)
                except sqlite3.Error as failure:
                    log.debug("Readings are not shared by %s: %s", self._path, failure)
                    return
            self._take()

    def look(self) -> None:
        """Take what is new elsewhere. Blocking, and makes nothing where there is no file."""
        with self._lock:
            self._take()

    def _write(self, mine: dict[str, Reading]) -> None:
        """Each part of a reading is that of the newest answer, whoever got it."""
        file = sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)
        try:
            file.execute("PRAGMA journal_mode=WAL")
            file.execute("PRAGMA synchronous=OFF")
            file.execute("BEGIN IMMEDIATE")
            file.execute(_TABLE)
            there = _decoded(file.execute(_SELECT).fetchall())
            now = self._clock()
            file.execute(_FORGET, (now - KEEP_S,))
            for series, each in mine.items():
                known = there.get(series)
                newest = each if known is None else newer_of(known, each, now)
                file.execute(_PUT, (series, newest.observed_at, json.dumps(newest.to_dict())))
            file.execute("COMMIT")
            self._known.update(mine)
        finally:
            file.close()

    def _take(self) -> None:
        try:
            file = sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)
            try:
                rows = file.execute(_SELECT).fetchall()
            finally:
                file.close()
        except sqlite3.Error as failure:
            log.debug("Readings of others cannot be read from %s: %s", self._path, failure)
            return
        for series, each in _decoded(rows).items():
            if self._known.get(series) != each:
                self._known[series] = each
                try:
                    self._readings.take(each, label=label_of(series))
                except ConfigurationError:
                    log.debug("The shared reading of %r has a name that none may have.", series)


def _decoded(rows: list[tuple[str, str]]) -> dict[str, Reading]:
    """The readings by their series; a row that another version wrote is passed over."""
    found = {}
    for series, text in rows:
        try:
            found[series] = Reading.from_dict(json.loads(text))
        except (ValueError, TypeError, KeyError, ArithmeticError):
            log.debug("The shared reading of %r cannot be read.", series)
    return found
