"""
Looking into a journal from outside of the processes that use it: what waits there, and for whom.

Reads without a lock that anybody could notice. Knows the file and its records; nothing of stores.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Final, NamedTuple

from asgi_metering.errors import ConfigurationError, JournalError
from asgi_metering.journal.file import APPLICATION_ID
from asgi_metering.journal.records import Step, decode
from asgi_metering.rules.operations import Admit, Backfill, Emit, End

__all__ = ["Waiting", "give_up", "look"]

RUNS, SET_ASIDE, WAITS = "runs", "set aside", "waits"

BUSY_S: Final = 1.0
"""How long somebody who looks waits for those who write, which take milliseconds each."""


class Waiting(NamedTuple):
    """
    What a journal keeps of one call.

    Attributes:
        call: Its id.
        state: ``waits`` to be handed to the store; ``runs``: what is to be done if its process dies before its end, or
            has died; ``set aside``: the store refused it for good, or nobody can read it.
        due_at: When it is handed to the store at the latest, epoch seconds.
        payer, line, unit: Of a call that was let in without the store; of others the store knows.
        amount: Smallest parts that it is charged; 0 is nothing.
        why: It was set aside, or cannot be read.
    """

    call: str
    state: str
    due_at: float
    payer: str = ""
    line: str = ""
    unit: str = ""
    amount: int = 0
    why: str = ""


def look(path: Path) -> list[Waiting]:
    """
    Read all that waits in the journal at *path*, in the order in which it came. Changes nothing, and makes no file.

    Raises:
        ConfigurationError: There is no journal.
        JournalError: It cannot be read.
    """
    if not path.is_file():
        raise ConfigurationError(f"There is no journal '{path}'. Look at its spelling; the application makes it.")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_S)) as connection:
            _check_ours(connection, path)
            found = connection.execute("SELECT id, steps, due_at, set_aside FROM entry ORDER BY number").fetchall()
    except sqlite3.Error as failure:
        raise _unusable(path, failure) from failure
    now = time.time()
    return [_waiting(row, now) for row in found]


def give_up(path: Path) -> int:
    """
    Have what is kept of calls that run be due at once: their processes have died. Returns how many there were.

    Raises:
        JournalError: A process has the journal open: its calls may run still.
    """
    try:
        with closing(sqlite3.connect(path, timeout=BUSY_S, isolation_level=None)) as connection:
            # Who has a journal in WAL mode open keeps a lock on it, and this one suffers none beside it.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
            now = time.time()
            lost = connection.execute("UPDATE entry SET due_at = ? WHERE due_at > ?", (now, now)).rowcount
            connection.execute("COMMIT")
    except sqlite3.OperationalError as failure:
        if "locked" not in str(failure):
            raise _unusable(path, failure) from failure
        raise JournalError(
            f"A process has the journal '{path}' open, so that its calls may run still. Stop it first."
        ) from failure
    return lost


def _check_ours(connection: sqlite3.Connection, path: Path) -> None:
    ((owner,),) = connection.execute("PRAGMA application_id")
    if owner != APPLICATION_ID:
        raise ConfigurationError(f"The file '{path}' is no journal of this version. Name the application's journal=.")


def _unusable(path: Path, failure: sqlite3.Error) -> JournalError | ConfigurationError:
    if "not a database" in str(failure):
        return ConfigurationError(f"The file '{path}' is no journal. Name the application's journal=.")
    return JournalError(f"The journal '{path}' cannot be read: {failure}. Look at its disk first.")


def _waiting(found: tuple[str, str, float, str | None], now: float) -> Waiting:
    call, text, due_at, set_aside = found
    state = SET_ASIDE if set_aside is not None else RUNS if due_at > now else WAITS
    row = Waiting(call, state, due_at, why=set_aside or "")
    try:
        steps = decode(text)
    except ValueError as failure:
        return row._replace(why=set_aside or str(failure))
    for step in steps:
        row = _told(row, step)
    return row


def _told(row: Waiting, step: Step) -> Waiting:
    match step:
        case Admit():
            return row._replace(payer=step.payer, line=step.line, unit=step.unit)
        case Backfill():
            return row._replace(payer=step.payer, line=step.line, unit=step.unit, amount=step.amount)
        case End():
            return row._replace(amount=step.amount or 0)
        case Emit():
            told = step.events[0][1] if step.events else {}
            return row._replace(payer=str(told.get("payer", "")), line=str(told.get("line", "")))
