"""
Turns: which of several processes of a machine does what one is enough for.

Knows a lock on a file, which the system gives back when its process ends, however it ends.
"""

from __future__ import annotations

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where every process takes every turn
    fcntl = None  # type: ignore[assignment]

__all__ = ["Turn"]


class Turn:
    """
    Whose turn it is.

    Args:
        path: What it is about; the lock is on a file ``NAME.lock`` beside it, which stays there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + ".lock")
        self._number: int | None = None

    def take(self) -> bool:
        """Whether it is ours, now and until it is given back. Where no lock can be had it is everybody's."""
        if self._number is not None or fcntl is None:
            return True
        try:
            number = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return True
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(number)
            return False
        self._number = number
        return True

    def is_known(self) -> bool:
        """Whether anybody ever asked for it here."""
        return self._path.exists()

    def give_back(self) -> None:
        """Let others have it."""
        number, self._number = self._number, None
        if number is not None:
            os.close(number)
