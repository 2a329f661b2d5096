"""
The usage log: how many calls went to each provider and model, minute by minute, and what they cost.

A sink of usage events on a local SQLite file, or in memory. Several processes may write and read one file; reading
never blocks who writes, and a log that is missing or broken counts nothing (S1.15). Knows no package.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices.aliases import candidates
from asgi_metering.quotas.status import Counted
from asgi_metering.usage.event import CALLS, MODELS, UsageEvent

__all__ = ["KEEP_DAYS", "UsageLog"]

log = logging.getLogger("asgi_metering.quotas")

MEMORY: Final = ":memory:"

KEEP_DAYS: Final = 35.0
"""
How long minutes are kept at least: a month of burn, with slack. A provider and model used all the time take 50,000
rows.
"""

_SLACK_DAYS: Final = 1.0

SEEN_S: Final = 86_400.0
"""How long an event's id is remembered: delivered again after that, it would count twice."""

BUSY_S: Final = 5.0
"""What one process waits for another that writes."""

_MINUTE_S: Final = 60
_PRUNE_EVERY: Final = 1_000
"""Batches between looks at what is too old."""

_TABLES: Final = (
    """CREATE TABLE IF NOT EXISTS used (provider TEXT, model TEXT, minute INTEGER, calls INTEGER, cost REAL,
    first_at REAL, PRIMARY KEY (provider, model, minute)) WITHOUT ROWID""",
    "CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, at REAL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS used_by_minute ON used (minute)",
)
_ADD: Final = (
    "INSERT INTO used VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (provider, model, minute) DO UPDATE SET"
    " calls = calls + excluded.calls, cost = cost + excluded.cost, first_at = min(first_at, excluded.first_at)"
)


class _Used(NamedTuple):
    """What one call used of one model: so many upstream calls, and its share of the cost."""

    provider: str
    model: str
    calls: int
    share: float


def _used_by(event: UsageEvent) -> list[_Used]:
    """What *event* tells of upstream calls, by provider and model; nothing where nobody named a provider."""
    try:
        rows = json.loads(str(event.attributes[MODELS]))
        weights = _weights(rows)
        used = [
            _Used(
                str(row["provider"] or event.provider or ""),
                str(row["model"] or ""),
                int(row["calls"]),
                weight / sum(weights),
            )
            for row, weight in zip(rows, weights, strict=True)
        ]
    except (AttributeError, KeyError, TypeError, ValueError, ArithmeticError):
        # Of one model; or an attribute that is not ours, which must not keep the batch from being counted.
        used = []
    if not used and event.provider:
        calls = event.attributes.get(CALLS)
        used = [_Used(event.provider, event.model or "", calls if type(calls) is int and calls > 0 else 1, 1.0)]
    return [each for each in used if each.provider]


def _weights(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How the cost of a call divides: by what providers charge where all of them say it, else by tokens, or calls."""
    costs = [row.get("cost_usd_micros") for row in rows]
    if all(costs):
        return [float(cost) for cost in costs if cost]
    tokens = [sum(row["usage"].get(axis) or 0 for axis in ("input", "output")) for row in rows]
    return [float(count) for count in (tokens if any(tokens) else [row["calls"] for row in rows])]


class UsageLog:
    """
    Counts usage events by provider and model. A sink: ``Metering(sinks=[..., log])``.

    Args:
        path: A file on a local disk; by default the counts are in memory, and end with the process.
        unit: Whose amounts are taken for costs.
        cost: What a call cost *us*, in the unit that packages count credits in; None where that is not known. By
            default what its payer was charged in whole units of *unit*, which is near it where those are dollars.
        clock: Epoch seconds.

    Attributes:
        path: Of the file; None in memory.
        batches: How many were counted by this object.
        keep_days: How long minutes are kept; as long as any tracker of the log looks back.

    Each upstream call that an event tells of counts (S1.11), and of what the call cost each model has its share: by
    what the provider says that it cost, else by its tokens. An event counts once, also when it is delivered again
    within a day. Calls without a provider count nowhere.
    """

    name = "usage_log"

    def __init__(
        self,
        path: str | os.PathLike[str] = MEMORY,
        *,
        unit: Unit = CREDITS,
        cost: Callable[[UsageEvent], float | None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if cost is not None and not callable(cost):
            raise ConfigurationError(f"cost={cost!r} cannot be called. Pass a function of a usage event.")
        self._path = str(path)
        self.path = None if self._path == MEMORY else Path(self._path)
        self._unit = unit
        self._cost = self._charged if cost is None else cost
        self._clock = clock
        self._lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        self._reader_of = 0
        self.batches = 0
        self.keep_days = KEEP_DAYS

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """Count *events*, all or none of them. Raises `sqlite3.Error` where the file cannot be written."""
        await asyncio.to_thread(self.add, events)

    def add(self, events: Iterable[UsageEvent]) -> None:
        """Count *events* now, as `deliver`, and blocking."""
        with self._lock:
            file = self._opened()
            with file:
                for event in events:
                    self._count(file, event)
                self.batches += 1
                if self.batches % _PRUNE_EVERY == 1:
                    now = self._clock()
                    file.execute(
                        "DELETE FROM used WHERE minute < ?", (int((now - self.keep_days * 86_400) // _MINUTE_S),)
                    )
                    file.execute("DELETE FROM seen WHERE at < ?", (now - SEEN_S,))

    def keep(self, days: float) -> None:
        """Keep minutes for so many days at least, and a little longer: somebody looks back at them."""
        self.keep_days = max(self.keep_days, days + _SLACK_DAYS)

    def counted(self, providers: Sequence[str], since: float, weights: Mapping[str, float]) -> Counted:
        """
        The weighted calls to *providers* from *since*, epoch seconds; the minute that it lies in counts whole.

        *weights* has those of models, by their names or, as for prices, without provider and date; others weigh 1
        (S1.11). Nothing where the log cannot be read (S1.15).
        """
        used, first_at = 0.0, None
        for model, calls, _, first in self._rows(providers, since):
            used += calls * next((weights[name] for name in candidates(model) if name in weights), 1.0)
            first_at = first if first_at is None else min(first_at, first)
        return Counted(used, first_at)

    def cost(self, providers: Sequence[str], since: float) -> float:
        """What calls to *providers* cost from *since* on; 0 where that is not known."""
        return sum(cost for _, _, cost, _ in self._rows(providers, since))

    def close(self) -> None:
        """Give the file back; whoever comes next opens it again."""
        with self._lock, self._read_lock:
            self._drop_reader()
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()

    def __del__(self) -> None:
        # A metering does not know when the last event has come; a connection that is only dropped is a warning.
        for connection in (getattr(self, "_writer", None), getattr(self, "_reader", None)):
            if connection is not None:
                connection.close()

    def _count(self, file: sqlite3.Connection, event: UsageEvent) -> None:
        used = _used_by(event)
        if not used:
            return
        if not file.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (event.id, self._clock())).rowcount:
            return
        cost = self._cost(event)
        whole = 0.0 if cost is None else float(cost)
        minute = int(event.started_at // _MINUTE_S)
        for provider, model, calls, share in used:
            file.execute(_ADD, (provider, model, minute, calls, whole * share, event.started_at))

    def _charged(self, event: UsageEvent) -> float | None:
        return event.amount / 10**self._unit.scale if event.unit == self._unit.name else None

    def _opened(self) -> sqlite3.Connection:
        if self._writer is None:
            writer = sqlite3.connect(self._path, timeout=BUSY_S, check_same_thread=False)
            # Readers then never wait for writers. What a crash of the machine loses are some counts.
            writer.execute("PRAGMA journal_mode=WAL")
            writer.execute("PRAGMA synchronous=NORMAL")
            for table in _TABLES:
                writer.execute(table)
            self._writer = writer
        return self._writer

    def _rows(self, providers: Sequence[str], since: float) -> list[tuple[str, int, float, float]]:
        places = ", ".join("?" * len(providers))
        query = (
            "SELECT model, sum(calls), sum(cost), min(first_at) FROM used "  # noqa: S608 -- places are marks alone
            f"WHERE provider IN ({places}) AND minute >= ? GROUP BY model"
        )
        try:
            return self._read(query, (*providers, int(since // _MINUTE_S)))
        except sqlite3.Error as failure:
            log.debug("The usage log %r cannot be read: %s", self._path, failure)
            return []

    def _read(self, query: str, values: tuple[object, ...]) -> list[tuple[str, int, float, float]]:
        if self._path == MEMORY:
            with self._lock:
                return self._opened().execute(query, values).fetchall()
        # A lock of its own: who reads never waits for who writes.
        with self._read_lock:
            try:
                return self._opened_reader().execute(query, values).fetchall()
            except sqlite3.Error:
                self._drop_reader()
                raise

    def _opened_reader(self) -> sqlite3.Connection:
        place = Path(self._path)
        try:
            number = place.stat().st_ino
        except OSError:
            number = 0
        if self._reader is None or number != self._reader_of:
            # Another file may stand there by now.
            self._drop_reader()
            uri = f"{place.absolute().as_uri()}?mode=ro"
            self._reader = sqlite3.connect(uri, uri=True, timeout=BUSY_S, check_same_thread=False)
            self._reader_of = number
        return self._reader

    def _drop_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
