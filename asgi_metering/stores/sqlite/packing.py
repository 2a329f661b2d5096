"""
The rows that every call writes, in few columns: to bind a value costs as much as to keep some more bytes.

A column of its own has what a query looks by, what changes, and each time and amount that differs from call to call.
What is the same for most calls of a route is one JSON text, made once; what most calls have nothing of is one as well.
Knows the columns of holds and ledger lines, and no statement.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from asgi_metering.receipts import Basis, EndedBy, Entry, EntryKind, Part, Receipt, Source
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.state import Hold, PinnedWindow, Table, build
from asgi_metering.stores.rows import CODED_TUPLES, MAPS, RowMap, text

__all__ = ["EntryRows", "HoldRows"]

_loads: Callable[[str], Any] = json.loads
_text = lru_cache(CODED_TUPLES)(text)


def _parts(values: Sequence[Sequence[Any]]) -> tuple[Part, ...]:
    return tuple([Part(Source(source), name, start, amount) for source, name, start, amount in values])


@lru_cache(CODED_TUPLES)
def _parts_of(told: str) -> tuple[Part, ...]:
    return _parts(_loads(told))


class HoldRows(RowMap[Hold]):
    """
    Holds: ``terms`` is what was decided of the route, ``rest`` what most calls do not have, and empty for those.

    ``receipt`` leaves out what the hold says itself, and when it ended, which has a column.
    """

    def __init__(self) -> None:
        super().__init__(Table.HOLD, Hold, ("id",))
        self.fields = (
            *("id", "payer", "unit", "amount", "parts", "state", "created_at", "expires_at", "due_at", "observed"),
            *("terms", "rest", "receipt", "ended_at"),
        )
        self.columns = self.fields
        self.changing = ("amount", "parts", "state", "expires_at", "due_at", "observed", "receipt", "ended_at")

    def encode(self, row: Hold) -> list[Any]:
        """See `RowMap.encode`."""
        _, _, _, _, _, state, _, _, _, _, _, _, _, observed, _, _, _, receipt, _, _, _ = row
        call, payer, unit, amount, parts, created_at, expires_at, due_at, terms, rest = self.encode_new(row)
        told, ended_at = (None, None) if receipt is None else (self.receipt(row, receipt), receipt.at)
        return [
            *(call, payer, unit, amount, parts, state.value, created_at, expires_at, due_at, observed),
            *(terms, rest, told, ended_at),
        ]

    def encode_new(self, row: Hold) -> tuple[Any, ...]:
        """What is not the same for all holds that were just admitted."""
        # fmt: off
        (call, payer, unit, amount, parts, _, created_at, expires_at, due_at, ttl_s, grace_s, in_doubt, line, _,
            windows, pools, facts, _, group, charge_key, idempotency_key) = row
        # fmt: on
        rest = ""
        if windows or facts or charge_key or idempotency_key:
            rest = text((windows, facts, charge_key, idempotency_key))
        # fmt: off
        return (
            call, payer, unit, amount, _text(parts), created_at, expires_at, due_at,
            _text((ttl_s, grace_s, in_doubt, line, pools, group)), rest,
        )
        # fmt: on

    def encode_change(self, row: Hold) -> list[Any]:
        """See `RowMap.encode_change`."""
        receipt = row.receipt
        return [
            *(row.amount, _text(row.parts), row.state.value, row.expires_at, row.due_at, row.observed),
            *((None, None) if receipt is None else (self.receipt(row, receipt), receipt.at)),
            row.id,
        ]

    def encode_end(self, row: Hold, receipt: Receipt) -> tuple[Any, ...]:
        """What a plain end changes of a hold, then its key."""
        return (row[5].value, self.receipt(row, receipt), receipt[10], row[0])

    def receipt(self, hold: Hold, receipt: Receipt) -> str:
        """The receipt of *hold* as its column keeps it."""
        # fmt: off
        (call, payer, unit, amount, held, basis, estimated, by, parts, available, _, entry, applied, late,
            known) = receipt
        # fmt: on
        if held != hold[3] or payer != hold[1] or unit != hold[2] or call != hold[0]:
            return text(receipt)
        rest = _text((basis, estimated, by, parts, applied, late, known))
        # Put together by hand: JSON's encoder takes twice as long.
        return (
            f"[{amount},{'null' if available is None else available},{'null' if entry is None else entry},{rest[1:-1]}]"
        )

    def decode(self, values: Sequence[Any]) -> Hold:
        """See `RowMap.decode`."""
        # fmt: off
        (call, payer, unit, amount, parts, state, created_at, expires_at, due_at, observed, terms, rest, told,
            ended_at) = values
        # fmt: on
        ttl_s, grace_s, in_doubt, line, pools, group = _terms_of(terms)
        windows: tuple[PinnedWindow, ...] = ()
        facts, charge_key, idempotency_key = {}, "", ""
        if rest:
            pinned, facts, charge_key, idempotency_key = _loads(rest)
            windows = tuple([PinnedWindow(*window) for window in pinned])
        receipt = None if told is None else _receipt_of(told, call, payer, unit, amount, ended_at)
        # fmt: off
        return build(Hold, (
            call, payer, unit, amount, _parts_of(parts), HoldState(state), created_at, expires_at, due_at, ttl_s,
            grace_s, in_doubt, line, observed, windows, pools, facts, receipt, group, charge_key, idempotency_key,
        ))
        # fmt: on


def _receipt_of(told: str, call: str, payer: str, unit: str, held: int, at: float) -> Receipt:
    found = _loads(told)
    if len(found) == len(Receipt._fields):
        call, payer, unit, amount, held, basis, estimated, by, parts, available, at, entry, applied, late, known = found
    else:
        amount, available, entry, basis, estimated, by, parts, applied, late, known = found
    # fmt: off
    return build(Receipt, (
        call, payer, unit, amount, held, Basis(basis), estimated, EndedBy(by), _parts(parts), available, at, entry,
        applied, late, known,
    ))
    # fmt: on


@lru_cache(CODED_TUPLES)
def _terms_of(told: str) -> tuple[float, float, str, str, tuple[str, ...], str]:
    ttl_s, grace_s, in_doubt, line, pools, group = _loads(told)
    # A whole number of seconds may have been said without its fraction.
    return float(ttl_s), float(grace_s), in_doubt, line, tuple(pools), group


class EntryRows(RowMap[Entry]):
    """Ledger lines: ``what`` is all that is the same for most charges of a route."""

    def __init__(self) -> None:
        super().__init__(Table.ENTRY, Entry, MAPS[Table.ENTRY].key)
        self.fields = ("payer", "unit", "number", "at", "amount", "ref", "available", "what")
        self.columns = self.fields

    def encode(self, row: Entry) -> list[Any]:
        """See `RowMap.encode`."""
        payer, unit, number, at, kind, amount, ref, line, basis, estimated, available, actor, parts, posting = row
        what = _text((kind, line, basis, estimated, actor, parts, posting))
        return [payer, unit, number, at, amount, ref, available, what]

    def decode(self, values: Sequence[Any]) -> Entry:
        """See `RowMap.decode`."""
        payer, unit, number, at, amount, ref, available, told = values
        kind, line, basis, estimated, actor, parts, posting = _what_of(told)
        # fmt: off
        return build(Entry, (
            payer, unit, number, at, kind, amount, ref, line, basis, estimated, available, actor, parts, posting,
        ))
        # fmt: on


@lru_cache(CODED_TUPLES)
def _what_of(told: str) -> tuple[EntryKind, str, Basis | None, bool, str, tuple[Part, ...], str]:
    kind, line, basis, estimated, actor, parts, posting = _loads(told)
    return EntryKind(kind), line, None if basis is None else Basis(basis), estimated, actor, _parts(parts), posting
