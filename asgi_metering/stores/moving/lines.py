"""
Rows as lines of a file: JSON Lines, a header first and a trailer last.

Every row is one line, ``{"kind": "grant", "row": {...}}``, with the fields of `rules.state` by name. Amounts are
integers of any size; times are epoch seconds to the last bit, and null is a time that does not come; text is escaped
to ASCII, so that no editor and no encoding changes a key. Nested tuples (parts, windows, receipts) are arrays of their
fields. The trailer's digest is of every byte before it. Knows rows and text; no file, and no store.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from asgi_metering._version import __version__
from asgi_metering.errors import ConfigurationError, UnwritableError
from asgi_metering.stores.contract import TABLES
from asgi_metering.stores.moving.walk import Page
from asgi_metering.stores.rows import MAPS

__all__ = ["FORMAT", "Header", "Tally", "Trailer", "header_of", "lines_of", "page_of", "trailer_of"]

FORMAT = 1
"""Grows whenever a reader of the last one would read something wrongly."""

MARK = "asgi-metering books"
"""The kind of the header: says whose file this is."""

_SUM_BITS = 128


class Header(NamedTuple):
    """
    The first line.

    Attributes:
        format: See `FORMAT`.
        version: Of the package that wrote the file.
        store: The kind of store that the rows come from.
        namespace: Which books of that store.
        at: The store's time, epoch seconds.
        counts: How many rows there are, by table.
    """

    format: int
    version: str
    store: str
    namespace: str
    at: float
    counts: Mapping[str, int]

    def line(self) -> bytes:
        """The header as a line."""
        return _line({"kind": MARK, **self._asdict()})


class Trailer(NamedTuple):
    """
    The last line: without it the file is cut.

    Attributes:
        counts: How many rows came, by table.
        sums: Of their digests, by table: the same for the same rows in any order.
        discrepancies: How many there were when the books were proven on their way into the file.
        sha256: Of every byte before the trailer.
    """

    counts: Mapping[str, int]
    sums: Mapping[str, str]
    discrepancies: int
    sha256: str

    def line(self) -> bytes:
        """The trailer as a line."""
        return _line({"kind": "end", **self._asdict()})


_Line = TypeVar("_Line", Header, Trailer)


class Tally:
    """
    What passed: how many rows of each table, and the sum of their digests.

    Attributes:
        counts: Rows, by table.
    """

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(TABLES, 0)
        self._sums: dict[str, int] = dict.fromkeys(TABLES, 0)

    def add(self, table: str, lines: Iterable[bytes]) -> None:
        """Count *lines*, which are rows of *table*."""
        for line in lines:
            digest = hashlib.blake2b(line, digest_size=_SUM_BITS // 8).digest()
            self.counts[table] += 1
            self._sums[table] = (self._sums[table] + int.from_bytes(digest)) % (1 << _SUM_BITS)

    @property
    def sums(self) -> dict[str, str]:
        """The sums, as the trailer tells them."""
        return {table: f"{total:0{_SUM_BITS // 4}x}" for table, total in self._sums.items()}


def lines_of(page: Page) -> list[bytes]:
    """
    The lines of the rows of *page*. Equal rows are equal lines, whichever store they come from.

    Raises:
        UnwritableError: A mapping in one of them is not JSON-safe.
    """
    plain, kind = MAPS[page.table].plain, page.table
    try:
        return [f'{{"kind":"{kind}","row":{_row(plain(row))}}}\n'.encode("ascii") for row in page.rows]
    except (TypeError, ValueError) as failure:
        raise UnwritableError(f"A row of {page.table!r} cannot be exported: {failure}. Mend it first.") from failure


def page_of(line: bytes, place: str) -> Page:
    """
    The row of a line.

    Args:
        line: A line that is neither the header nor the trailer.
        place: Where it stands, for the error.

    Raises:
        ConfigurationError: It is no row.
    """
    told = _read(line, place)
    try:
        table = told["kind"]
        return Page(table, (MAPS[table].of_plain(told["row"]),))
    except (KeyError, TypeError, ValueError, AttributeError) as failure:
        raise ConfigurationError(f"{place} is no row of the books: {failure!r}. Export them again.") from failure


def header_of(line: bytes, place: str) -> Header:
    """
    Read the first line.

    Raises:
        ConfigurationError: It is no header of ours, or of a newer format.
    """
    try:
        told = _loads(line.decode("ascii"))
        mark = told.pop("kind")
    except (ValueError, AttributeError, KeyError):
        mark = None
    if mark != MARK:
        raise ConfigurationError(f"{place} is not the header of exported books. Name a file that export wrote.")
    number = told.get("format")
    if number != FORMAT:
        raise ConfigurationError(
            f"{place} says format {number!r}, written by asgi_metering {told.get('version')!r}; this is {__version__}, "
            f"which reads format {FORMAT}. Import it with the version that wrote it, or a later one."
        )
    return _named(Header, told, place)


def trailer_of(line: bytes, place: str) -> Trailer | None:
    """
    Read *line* if it is the trailer. Raises `ConfigurationError` for one that cannot be read.

    Of tables that the version did not know which wrote it there are no rows.
    """
    if not line.startswith(b'{"kind":"end",'):
        return None
    told = _read(line, place)
    del told["kind"]
    trailer, none = _named(Trailer, told, place), Tally()
    try:
        return trailer._replace(counts={**none.counts, **trailer.counts}, sums={**none.sums, **trailer.sums})
    except TypeError:
        # Whoever compares says so.
        return trailer


def _named(kind: type[_Line], told: dict[str, Any], place: str) -> _Line:
    if told.keys() != kind.__annotations__.keys():
        raise ConfigurationError(f"{place} has the fields {sorted(told)}. Export the books again.")
    return kind(**told)


def _read(line: bytes, place: str) -> dict[str, Any]:
    try:
        told = _loads(line.decode("ascii"))
    except ValueError as failure:
        raise ConfigurationError(f"{place} is not JSON: {failure}. Export the books again.") from failure
    if not isinstance(told, dict):
        raise ConfigurationError(f"{place} is no JSON object. Export the books again.")
    return told


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is not JSON-safe")


# Keys in one order, whoever kept the mapping: the lines of equal rows are equal.
_row = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_plain, sort_keys=True).encode
_loads = json.JSONDecoder().decode
_head = json.JSONEncoder(separators=(",", ":")).encode


def _line(told: Mapping[str, Any]) -> bytes:
    return f"{_head(told)}\n".encode("ascii")
