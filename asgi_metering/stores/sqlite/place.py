"""
A connection that knows whether its file still stands where it was opened.

SQLite goes on in a file that somebody has moved, removed or replaced, and its commits succeed: nobody would ever find
them again. (It looks only when it closes: the log of the file that took the place stays.) Knows nothing of what is in
files.
"""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

__all__ = ["PlacedConnection", "connected"]


class PlacedConnection(sqlite3.Connection):
    """Made by `connected`."""

    _path: str
    _file: tuple[int, int]

    def place(self, path: Path) -> None:
        """Note which file it is that stands at *path*."""
        self._path = str(path)
        self._file = self._standing()

    def _standing(self) -> tuple[int, int]:
        found = os.stat(self._path)  # noqa: PTH116 -- once for each batch: a path of pathlib costs twice as much
        return found.st_dev, found.st_ino

    def is_in_place(self) -> bool:
        """Whether the file that was opened is the one that stands there."""
        try:
            return self._standing() == self._file
        except OSError:
            return False


def connected(path: Path) -> PlacedConnection:
    """
    Connect to the file at *path*; one that is missing is made.

    Raises:
        sqlite3.Error: It cannot be opened.
    """
    # No waiting inside SQLite: its pauses grow to 100 ms, ours do not. No implicit transactions either.
    connection = sqlite3.connect(path, timeout=0.0, isolation_level=None, factory=PlacedConnection)
    try:
        connection.place(path)
    except OSError as error:
        connection.close()
        raise sqlite3.OperationalError(f"it went away: {error}") from error
    return connection
