"""
Alarms: log records of a failure that may come with every request, told seldom.

Knows when it last told of what. Never knows what a failure means.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Alarms"]

EVERY_S = 10.0
"""A failure that lasts is told so often: often enough for whoever looks, too seldom to fill a disk."""


class Alarms:
    """
    Tell of failures, each kind at most once in `EVERY_S` seconds; the next record says how many were not told.

    Args:
        log: Where to.
        clock: Steady seconds.

    Safe from several threads.
    """

    def __init__(self, log: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[str, tuple[float, int]] = {}

    def raised(self, kind: str, message: str, failure: BaseException) -> None:
        """Log *message* with the traceback of *failure*, unless this *kind* was told of just now."""
        with self._lock:
            now = self._clock()
            told = self._told.get(kind)
            if told is not None and now - told[0] < EVERY_S:
                self._told[kind] = (told[0], told[1] + 1)
                return
            self._told[kind] = (now, 0)
            untold = told[1] if told is not None else 0
        more = f" ({untold} more of these since the last record.)" if untold else ""
        self._log.error("%s%s", message, more, exc_info=failure)
