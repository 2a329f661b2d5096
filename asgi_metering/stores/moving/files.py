"""
The file of exported books: written beside its place and put there whole, and checked whole before it is used.

Blocking: whoever has an event loop runs it in a thread. Knows the file system and lines; no store.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from asgi_metering.errors import ConfigurationError
from asgi_metering.stores.contract import PAGE_ROWS
from asgi_metering.stores.moving.lines import Header, Tally, Trailer, header_of, lines_of, page_of, trailer_of
from asgi_metering.stores.moving.walk import Page, Proof

__all__ = ["BookFile", "NewFile", "Verified", "verify"]


class NewFile:
    """
    A file that takes its place only when it is whole; what stands there is kept beside it, by the time.

    Args:
        path: Its place.
        header: Its first line.

    Attributes:
        tally: What was written.
        proof: Whether it balances, so far.

    Raises:
        ConfigurationError: The folder is missing, or cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.tally = Tally()
        self.proof = Proof()
        self._path = path
        self._digest = hashlib.sha256()
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            if path.is_dir():
                raise IsADirectoryError("it is a folder")
            # Payers, and answers that were kept for replays: for nobody else's eyes.
            number = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as failure:
            raise ConfigurationError(
                f"{str(path)!r} cannot be written: {failure.strerror or failure}. Name a file in a folder that can be."
            ) from failure
        self._file = os.fdopen(number, "wb")
        self._write(header.line())

    def take(self, pages: list[Page]) -> None:
        """Write the rows of *pages*."""
        for page in pages:
            self.proof.take(page)
            lines = lines_of(page)
            self.tally.add(page.table, lines)
            self._write(b"".join(lines))

    def place(self) -> Path | None:
        """Write the trailer, and put the file in its place; return where what stood there is kept, if anything did."""
        self.proof.finish()
        trailer = Trailer(self.tally.counts, self.tally.sums, len(self.proof.discrepancies), self._digest.hexdigest())
        self._file.write(trailer.line())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        backup = self._kept()
        self._temporary.replace(self._path)
        return backup

    def discard(self) -> None:
        """Leave nothing behind, if it is not in its place yet."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, lines: bytes) -> None:
        self._digest.update(lines)
        self._file.write(lines)

    def _kept(self) -> Path | None:
        if not self._path.exists():
            return None
        now = datetime.now(UTC)
        backup = self._path.with_name(f"{self._path.name}.{now:%Y%m%dT%H%M%S.%fZ}.bak")
        # A second name of what stands there: at no time is there no file of the first one.
        os.link(self._path, backup)
        return backup


class BookFile:
    """
    A file that was exported.

    Args:
        path: Where it is.

    Attributes:
        name: The same, for people.
        header: Its first line.

    Raises:
        ConfigurationError: There is none, or it is none of ours, or of a newer format.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.name = str(path)
        try:
            with path.open("rb") as file:
                self.header: Header = header_of(file.readline(), f"Line 1 of {str(path)!r}")
        except OSError as failure:
            raise ConfigurationError(
                f"{str(path)!r} cannot be read: {failure.strerror}. Name a file that export wrote."
            ) from failure

    def lines(self) -> Iterator[tuple[str, bytes]]:
        """Every line, and where it stands."""
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield f"Line {number} of {str(self._path)!r}", line

    def pages(self) -> Iterator[list[Page]]:
        """The rows, some pages at a time; one after another of one table are one page."""
        lines = islice(self.lines(), 1, None)
        while several := list(islice(lines, PAGE_ROWS)):
            pages: list[Page] = []
            for place, line in several:
                if trailer_of(line, place) is not None:
                    break
                table, rows = page_of(line, place)
                if pages and pages[-1].table == table:
                    rows = (*pages.pop().rows, *rows)
                pages.append(Page(table, rows))
            if pages:
                yield pages


class Verified(NamedTuple):
    """A file that is whole, and what its rows prove."""

    header: Header
    trailer: Trailer
    proof: Proof


def verify(file: BookFile) -> Verified:
    """
    Read all of *file*, and check that it is what export wrote.

    Raises:
        ConfigurationError: It is cut, or was changed.
    """
    digest, tally, proof = hashlib.sha256(), Tally(), Proof()
    trailer: Trailer | None = None
    for number, (place, line) in enumerate(file.lines()):
        if trailer is not None:
            raise ConfigurationError(f"{place} stands behind the end. The file was changed: export the books again.")
        # What has no end of its own is where the file was cut.
        is_row = number > 0 and line.endswith(b"\n")
        trailer = trailer_of(line, place) if is_row else None
        if trailer is not None:
            continue
        digest.update(line)
        if is_row:
            page = page_of(line, place)
            tally.add(page.table, [line])
            proof.take(page)
    if trailer is None:
        raise ConfigurationError(
            f"The books in {file.name!r} are cut: {sum(tally.counts.values())} of {sum(file.header.counts.values())} "
            f"rows came, and no end. Nothing was imported. Export them again, or copy the whole file."
        )
    if (trailer.sha256, trailer.counts, trailer.sums) != (digest.hexdigest(), tally.counts, tally.sums):
        raise ConfigurationError(
            f"The books in {file.name!r} are not what was exported: their digest is another one. Nothing was "
            f"imported. Export them again."
        )
    proof.finish()
    return Verified(file.header, trailer, proof)
