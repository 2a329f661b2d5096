"""
Prepared statements of one connection: which texts the server keeps there, and under which names.

A plan made once and used again saves the server most of its time, as long as it is a good one: what is planned for a
small table is a bad plan for a large one. Knows texts and counts, and nothing of how they are sent.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Final

__all__ = ["CHANGED", "FORGOTTEN", "Prepared"]

CHANGED: Final = "0A000"
"""feature_not_supported: a column has another type since, as after a migration: "cached plan must not change result
type". Prepared anew, the statement is as good as ever."""

FORGOTTEN: Final = frozenset(
    (
        "26000",  # invalid_sql_statement_name: the next transaction met another server connection
        "42P05",  # duplicate_prepared_statement: or one where somebody else has prepared it
    )
)
"""Codes that say that prepared statements do not stay as they were made: that of poolers which know nothing of them."""

_PLANNED: Final = ("SELECT ", "INSERT ", "UPDATE ", "DELETE ")
"""What is planned, and so worth it. Never what ends a transaction: a failure must not leave open how it ended."""

_LONGEST: Final = 1_024
"""
Transactions until everything is planned anew, at the latest; before, at each doubling. So no plan is older than half
of what the connection has written to its tables, and planning costs a thousandth.
"""


_RENEWALS: Final = 3
"""
How often all statements are prepared anew with few transactions in between: fewer than a batch is begun again for. What
is stale more often than that is kept by somebody in between, a pooler that knows the text already.
"""

_FEW: Final = 64
"""Transactions within which a migration may alter several tables, one by one."""


class Prepared:
    """The prepared statements of one connection, from the second time on that each is sent."""

    def __init__(self) -> None:
        self._names: dict[str, bytes] = {}
        self._kept: set[str] = set()
        self._transactions = self._renewed_at = self._renewals = 0

    def renew(self) -> bool:
        """Forget all of them, which the server is to forget as well; False where that was of no use of late."""
        if self._transactions - self._renewed_at > _FEW:
            self._renewals = 0
        self._renewed_at = self._transactions
        self._renewals += 1
        # Their names stay, for they come again.
        self._kept.clear()
        return self._renewals <= _RENEWALS

    def name(self, text: str) -> bytes | None:
        """
        The name that *text* is to be run by; None: as it is.

        It says what the text is, so that two who share a server connection can never run each other's.
        """
        name = self._names.get(text)
        if name is None and text.lstrip("( \n").startswith(_PLANNED):
            # The first time: most connections that are made for one thing end before the second.
            self._names[text] = b"asgi_metering_" + sha256(text.encode()).hexdigest()[:24].encode()
        return name

    def is_kept(self, text: str) -> None:
        """Note that the server has prepared *text*."""
        self._kept.add(text)

    def __contains__(self, text: str) -> bool:
        """Whether the server has prepared *text*."""
        return text in self._kept

    def is_due(self) -> bool:
        """Count one transaction more; whether everything is to be planned anew in it."""
        self._transactions += 1
        number = self._transactions
        return bool(self._kept) and number % min(_LONGEST, 1 << (number.bit_length() - 1)) == 0
