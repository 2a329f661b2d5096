"""
Rows as columns: how a database keeps the rows that the rules work on, and gets them back unchanged.

One mapping for all of them, built from the fields' types: amounts are integers, times are floats (infinity
included), enums are their text, nested values are JSON text. Does not know any database.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import lru_cache
from operator import attrgetter
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from asgi_metering.receipts import Entry
from asgi_metering.rules.state import (
    NEVER,
    Account,
    AllowanceWindow,
    ChargeKey,
    Checkpoint,
    Counter,
    DeclaredUnit,
    Event,
    Grant,
    Hold,
    IdempotencyKey,
    Lease,
    SharedReading,
    Table,
)

__all__ = ["CODED_TUPLES", "MAPS", "RowMap", "text", "without_none"]

Row = TypeVar("Row", bound="tuple[Any, ...]")

_Codec = Callable[[Any], Any]

CODED_TUPLES = 512
"""Tuples, and texts of tuples, remembered for each column that keeps them: a few hundred bytes each."""


class RowMap(Generic[Row]):
    """
    How one kind of row is kept.

    Args:
        table: The table's name.
        row: The NamedTuple of the row; its fields are the columns.
        key: The columns that identify a row.
        derived: Further columns, computed from the row, for queries to look by.
        changing: The fields that may change in the row's life; all but the key where it is left out.
        later: The fields that older versions did not have; their default says what those meant.

    Attributes:
        place: Where a row stands in a `State`: the key that a change of it names.
        fields: The columns that are the row, in its order.
        columns: All of them: *fields*, then the derived ones.
        changing: The columns that may change: of *fields*, then the derived ones.
    """

    def __init__(
        self,
        table: str,
        row: type[Row],
        key: tuple[str, ...],
        derived: Mapping[str, Callable[[Row], Any]] = MappingProxyType({}),
        changing: tuple[str, ...] = (),
        later: tuple[str, ...] = (),
    ) -> None:
        hints = get_type_hints(row)
        self.table = table
        self.row = row
        self.key = key
        self.place: Callable[[Row], Any] = attrgetter(*(key[:2] if table in (Table.GRANT, Table.ENTRY) else key))
        self.fields: tuple[str, ...] = tuple(hints)
        self.columns: tuple[str, ...] = (*hints, *derived)
        self.changing: tuple[str, ...] = (*(changing or (name for name in hints if name not in key)), *derived)
        self._derived = tuple(derived.values())
        self._changes = [(self.fields.index(name), _column_encoder(hints[name])) for name in changing]
        self._decoders = _only_some(_column_decoder(hint) for hint in hints.values())
        self._encoders = _only_some(_column_encoder(hint) for hint in hints.values())
        self._times = [name for name, hint in hints.items() if hint is float]
        readers = {name: _decoder_or_none(hint) for name, hint in hints.items()}
        # What files of older versions do not have, and those of this one only where a row has something to say there.
        defaults: Mapping[str, Any] = row._field_defaults  # type: ignore[attr-defined]
        self._later = [(name, defaults[name]) for name in later]
        self._readers = [(name, reader) for name, reader in readers.items() if reader is not None]

    def encode(self, row: Row) -> list[Any]:
        """
        Turn *row* into what its columns keep, in their order.

        Raises:
            TypeError, ValueError: A mapping in it is not JSON-safe.
        """
        values: list[Any] = list(row)
        for index, codec in self._encoders:
            values[index] = codec(values[index])
        for derive in self._derived:
            values.append(derive(row))
        return values

    def encode_change(self, row: Row) -> list[Any]:
        """Turn what of *row* may change into what its columns keep, then its key."""
        values: list[Any] = [row[index] if codec is None else codec(row[index]) for index, codec in self._changes]
        for derive in self._derived:
            values.append(derive(row))
        values.extend([getattr(row, name) for name in self.key])
        return values

    def plain(self, row: Row) -> dict[str, Any]:
        """*row* by its fields' names, for JSON: a time that does not come is None, a nested tuple is an array."""
        values = dict(zip(self.fields, row, strict=True))
        for name in self._times:
            time = float(values[name])
            values[name] = None if time == NEVER else time
        for name, default in self._later:
            if values[name] == default:
                del values[name]
        return values

    def of_plain(self, values: dict[str, Any]) -> Row:
        """
        The row that `plain` said, after its way through JSON. Takes *values* as its own.

        Raises:
            KeyError, TypeError, ValueError: It is none.
        """
        for name, default in self._later:
            values.setdefault(name, default)
        for name, reader in self._readers:
            values[name] = reader(values[name])
        for name in self._times:
            time = values[name]
            values[name] = NEVER if time is None else float(time)
        if len(values) != len(self.fields):
            raise ValueError(f"the fields {sorted(values)} are not those of {self.table!r}")
        return self.row(**values)

    def decode(self, values: Sequence[Any]) -> Row:
        """Turn what the columns of the fields keep, in their order, into the row."""
        if self._decoders:
            values = list(values)
            for index, codec in self._decoders:
                values[index] = codec(values[index])
        return self.row(*values)


def _only_some(codecs: Any) -> tuple[tuple[int, _Codec], ...]:
    return tuple((index, codec) for index, codec in enumerate(codecs) if codec is not None)


def without_none(hint: Any) -> Any:
    """The type behind ``X | None``; *hint* itself where it is no such union."""
    if get_origin(hint) is UnionType:
        (hint,) = [arm for arm in get_args(hint) if arm is not NoneType]
    return hint


def _is_nested(hint: Any) -> bool:
    return get_origin(hint) in (tuple, Mapping) or hasattr(hint, "_fields")


def _column_encoder(hint: Any) -> _Codec | None:
    kind = without_none(hint)
    if get_origin(kind) is tuple:
        return _remembering(text)
    if _is_nested(kind):
        return text if kind is hint else _text_or_none
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        # A driver would look for an adapter of each enum it does not know; its text it takes as it is.
        return str if kind is hint else _str_or_none
    return None


def _column_decoder(hint: Any) -> _Codec | None:
    kind = without_none(hint)
    inner = _decoder(kind)
    if get_origin(kind) is tuple:
        return _remembering(lambda text: inner(_loads(text)) if inner is not None else None)
    if _is_nested(kind):
        return _optional(lambda text: inner(_loads(text)) if inner is not None else _loads(text))
    return inner if kind is hint or inner is None else _optional(inner)


def _decoder(kind: Any) -> _Codec | None:
    """What turns a plain value into one of *kind*; None where it is one already."""
    if hasattr(kind, "_fields"):
        fields = _only_some(_decoder_or_none(hint) for hint in get_type_hints(kind).values())
        return lambda values: _named(kind, values, fields)
    if get_origin(kind) is tuple:
        element = _decoder(get_args(kind)[0])
        return tuple if element is None else lambda values: tuple([element(value) for value in values])
    if isinstance(kind, type) and (kind is bool or issubclass(kind, StrEnum)):
        return kind
    return None


def _decoder_or_none(hint: Any) -> _Codec | None:
    kind = without_none(hint)
    decoder = _decoder(kind)
    return decoder if kind is hint or decoder is None else _optional(decoder)


def _named(kind: Any, values: list[Any], fields: tuple[tuple[int, _Codec], ...]) -> Any:
    for index, codec in fields:
        values[index] = codec(values[index])
    return kind(*values)


def _optional(codec: _Codec) -> _Codec:
    return lambda value: None if value is None else codec(value)


def _str_or_none(value: Any) -> str | None:
    return None if value is None else str(value)


def _text_or_none(value: Any) -> str | None:
    return None if value is None else text(value)


def _remembering(codec: _Codec) -> _Codec:
    """The tuples of a hold and of a ledger line are few and come again: most calls are paid from one grant."""
    return lru_cache(maxsize=CODED_TUPLES)(codec)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is not JSON-safe. Convert it first.")


_loads = json.JSONDecoder().decode
_encoder = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_plain)


def _chunks_of(encoder: json.JSONEncoder) -> Callable[[Any, bool], Iterable[str]]:
    """Its `iterencode`, with the part in C made once: for each text anew, that takes half as long as a short text."""
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return encoder.iterencode
    separators = (encoder.key_separator, encoder.item_separator)
    chunks: Callable[[Any, bool], Iterable[str]] = make(
        None, encoder.default, json.encoder.encode_basestring_ascii, None, *separators, False, False, True
    )
    return chunks


_chunks = _chunks_of(_encoder)


def text(value: Any) -> str:
    """JSON text; a named tuple is the array of its fields."""
    return "".join(_chunks(value, False)) if value else "{}" if isinstance(value, Mapping) else "[]"


def _ended_at(hold: Hold) -> float | None:
    return None if hold.receipt is None else hold.receipt.at


_CHANGING = ("amount", "parts", "state", "expires_at", "due_at", "observed", "receipt")
"""What the rules change of a hold. What else was decided at its admission, most of it nested, is written once."""

MAPS: Mapping[str, RowMap[Any]] = {
    rows.table: rows
    for rows in (
        RowMap[Any](Table.ACCOUNT, Account, ("payer", "unit")),
        RowMap[Any](Table.GRANT, Grant, ("payer", "unit", "id")),
        RowMap[Any](Table.HOLD, Hold, ("id",), {"ended_at": _ended_at}, _CHANGING),
        RowMap[Any](Table.ALLOWANCE, AllowanceWindow, ("payer", "unit", "name", "start")),
        RowMap[Any](Table.COUNTER, Counter, ("key",), later=("extra",)),
        RowMap[Any](Table.LEASE, Lease, ("pool", "id")),
        RowMap[Any](Table.ENTRY, Entry, ("payer", "unit", "number")),
        RowMap[Any](Table.EVENT, Event, ("id",)),
        RowMap[Any](Table.CHARGE_KEY, ChargeKey, ("key",)),
        RowMap[Any](Table.IDEMPOTENCY, IdempotencyKey, ("key",)),
        RowMap[Any](Table.CHECKPOINT, Checkpoint, ("payer", "unit")),
        RowMap[Any](Table.UNIT, DeclaredUnit, ("name",)),
        RowMap[Any](Table.READING, SharedReading, ("series", "part")),
    )
}
"""By table name."""
