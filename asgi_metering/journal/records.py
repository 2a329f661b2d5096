"""
Records: operations as text, and back, unchanged.

Knows which operations may wait and how their values are built. Text of another version that cannot be read is an
error, and never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, TypeAlias, get_type_hints

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    Backfill,
    Emit,
    End,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    WalletSource,
    WindowKind,
)

__all__ = ["Step", "Steps", "decode", "encode"]

Step: TypeAlias = Admit | Backfill | Emit | End
"""What may wait for a store."""

Steps: TypeAlias = tuple[Step, ...]
"""What is done in this order for one call."""

_STEPS: Final = (Admit, Backfill, Emit, End)

_ROWS: Final[Mapping[str, type[Any]]] = {
    row.__name__: row for row in (*_STEPS, AllowanceSource, WalletSource, LimitAsk, LeaseAsk, KeyAsk, IdempotencyAsk)
}

_ROW, _MAPPING = "row", "mapping"


def encode(steps: Sequence[Step]) -> str:
    """
    Turn *steps* into JSON text.

    Raises:
        TypeError, ValueError: A mapping in one of them is not JSON-safe.
    """
    return json.dumps([_plain(step) for step in steps], separators=(",", ":"))


def decode(text: str) -> Steps:
    """
    Turn what `encode` wrote back into operations.

    Raises:
        ValueError: It is no such text, or names what this version does not know.
    """
    try:
        steps = _value(json.loads(text))
    except (LookupError, TypeError, RecursionError) as failure:
        raise ValueError(f"The record {text[:200]!r} cannot be read: {failure!r}.") from failure
    if not isinstance(steps, tuple) or not steps or not all(isinstance(step, _STEPS) for step in steps):
        raise ValueError(f"The record {text[:200]!r} says no operation that may wait.")
    return steps


def _plain(value: Any) -> Any:
    """*value* as JSON: a row is its name and fields, a mapping stands as it is, and a tuple is an array."""
    if isinstance(value, StrEnum):
        return value.value
    if hasattr(value, "_fields"):
        fields = {name: _plain(each) for name, each in zip(value._fields, value, strict=True)}
        return {_ROW: type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return {_MAPPING: dict(value)} if isinstance(value, Mapping) else value


def _value(plain: Any) -> Any:
    if isinstance(plain, list):
        return tuple([_value(each) for each in plain])
    if not isinstance(plain, dict):
        return plain
    if _MAPPING in plain:
        return plain[_MAPPING]
    row = _ROWS[plain.pop(_ROW)]
    enums = _ENUMS[row]
    # By name: a field that a newer version has, or that an older one did not write, is not mistaken for another.
    return row(**{name: enums.get(name, _same)(_value(each)) for name, each in plain.items()})


def _same(value: Any) -> Any:
    return value


def _enums(row: type[Any]) -> Mapping[str, type[StrEnum]]:
    known = (Basis, EndedBy, WindowKind)
    return {name: hint for name, hint in get_type_hints(row).items() if hint in known}


_ENUMS: Final = {row: _enums(row) for row in _ROWS.values()}
"""Fields that are words of a list; what is read as text is made one of them again."""
