"""
What commands print: tables for people, JSON for programs.

Knows nothing of what is shown.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

from asgi_metering.amounts import Unit

__all__ = ["amount_text", "counted", "print_table", "show", "time_text"]


def amount_text(unit: Unit, name: str, parts: int) -> str:
    """Whole units where the unit is the one that was named; another one's scale is not known here."""
    return unit.text(parts) if unit.name == name else f"{parts} smallest parts of {name}"


def time_text(epoch_s: float) -> str:
    """Epoch seconds as ISO 8601, in UTC."""
    return datetime.fromtimestamp(epoch_s, UTC).isoformat(timespec="seconds")


def show(given: argparse.Namespace, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Print *rows* as a table of *columns*, or as JSON with all that they have."""
    if given.json:
        print(json.dumps(rows, indent=2))
    else:
        print_table(columns, rows)


def print_table(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    """Print a table for people."""
    lines = [tuple(columns), *(tuple(str(row[column]) for column in columns) for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def counted(count: int, what: str) -> str:
    """A number of things, in words: ``1 row``, ``2 rows``."""
    return f"{count} {what}{'' if count == 1 else 's'}"
