"""
A journal that says when it writes, reads and forgets: what a crash of its process is tied to.

Knows the journal alone, and neither stores nor calls.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from asgi_metering.journal import Journal, JournalEntry
from asgi_metering.journal.records import Steps

__all__ = ["CrashingJournal"]


class CrashingJournal(Journal):
    """
    A `Journal` that tells of its points.

    Args:
        path: As of `Journal`.
        reach: Called with the name of each point.
        clock: As of `Journal`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        reach: Callable[[str], object],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(path, clock=clock)
        self._reach = reach

    async def keep(self, entries: Mapping[str, Steps], *, due_in_s: float = 0.0) -> None:
        """See `Journal.keep`."""
        self._reach("keeping.before")
        await super().keep(entries, due_in_s=due_in_s)
        self._reach("keeping.after")

    async def due(self, limit: int) -> list[JournalEntry]:
        """See `Journal.due`."""
        entries = await super().due(limit)
        if entries:
            self._reach("reading.after")
        return entries

    async def done(self, entries: Sequence[JournalEntry]) -> None:
        """See `Journal.done`."""
        if entries:
            self._reach("removal.before")
        await super().done(entries)
        if entries:
            self._reach("removal.after")
