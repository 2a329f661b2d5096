"""
Packed: what rows consist of, in bytes that scripts take apart with one call.

Numbers are doubles, which are exact for every amount there is (2^53 - 1 smallest parts) and for every time; texts are
their length and their bytes; what is JSON-safe is JSON. ``lua/common.lua`` has the same formats. Knows no row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, EndedBy, EntryKind, Part, Receipt, Source
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.state import build
from asgi_metering.stores.redis.names import escaped, restored

__all__ = [
    "ACCOUNT",
    "AS_HOLD",
    "AS_JSON",
    "BASES",
    "CHARGE_KEY",
    "DOUBLE",
    "ENDERS",
    "ENDS",
    "ENTRY",
    "EVENT",
    "GRANT",
    "HOLD",
    "KINDS",
    "LENGTH",
    "LIVES",
    "MAX_REMEMBERED",
    "PINNED",
    "WINDOW",
    "Unpacking",
    "basis_code",
    "doubles",
    "exact",
    "json_text",
    "parts_of",
    "parts_packed",
    "receipt_of",
    "receipt_packed",
    "time_text",
    "who_of",
    "words",
]

_loads = json.JSONDecoder().decode


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is not JSON-safe. Convert it first.")


def _json() -> Callable[[Any], str]:
    make = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_plain).encode
    # An encoder of the json module makes this anew for each text, which takes longer than the text.
    encode = make(None, _plain, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return lambda value: "".join(encode(value, 0))


json_text = _json()
"""JSON text on one line."""

MAX_REMEMBERED = 512
"""Tuples remembered: most calls are paid from one grant."""

MAX_PAYERS = 8_192
"""Payers remembered, some hundred bytes each: those that call now, call again."""

ACCOUNT = Struct(">9d")
GRANT = Struct(">10d")
HOLD = Struct(">IB7d")
RECEIPT = Struct(">BBBBBB6dI")
"""The last number is the length of the id that follows."""

_RECEIPT_SIZE = RECEIPT.size
PART = Struct(">Bdd")
PINNED = Struct(">dd")
ENTRY = Struct(">BBB4d")
WINDOW = Struct(">4d")
CHARGE_KEY = Struct(">dddB")
EVENT = Struct(">ddB")
DOUBLE = Struct(">d")
LENGTH = Struct(">I")
_LENGTH_SIZE = LENGTH.size

LIVES = (HoldState.HELD, HoldState.IN_DOUBT)
ENDS = (HoldState.SETTLED, HoldState.RELEASED)
BASES = (None, Basis.USAGE, Basis.OBSERVED, Basis.ESTIMATE, Basis.HOLD, Basis.NONE)
ENDERS = (EndedBy.CALL, EndedBy.POLICY, EndedBy.PERSON)
SOURCES = (Source.GRANT, Source.ALLOWANCE, Source.DEBT)
KINDS = tuple(EntryKind)
"""Each is kept as its place here; new ones come last."""

HAS_AVAILABLE, HAS_ENTRY, HAS_LATE = 1, 2, 4
"""Which numbers of a receipt are there."""

AS_JSON, AS_HOLD = 0, 1
"""How an event's payload is kept: as it is, or as the hold that it tells of, with what the end said."""


def exact(amount: int) -> int:
    """
    *amount*, if it is counted exactly.

    Raises:
        AmountError: Beyond what scripts count exactly.
    """
    if not -MAX_AMOUNT <= amount <= MAX_AMOUNT:
        raise AmountError(
            f"The store would have to keep {amount} smallest parts, and it counts exactly up to {MAX_AMOUNT}. "
            f"Declare the unit with a smaller scale."
        )
    return amount


def time_text(seconds: float) -> str:
    """A time as a score, with all its digits; infinity is ``inf``."""
    return repr(float(seconds))


def words(*texts: str | bytes) -> bytes:
    """Texts, each after its length."""
    packed = []
    for text in texts:
        raw = text if isinstance(text, bytes) else text.encode()
        packed.append(LENGTH.pack(len(raw)))
        packed.append(raw)
    return b"".join(packed)


def doubles(numbers: Iterable[float]) -> bytes:
    """Numbers, one after the other."""
    return b"".join(map(DOUBLE.pack, numbers))


class Unpacking:
    """One row while it is taken apart, from its beginning on."""

    __slots__ = ("at", "raw")

    def __init__(self, raw: bytes, at: int = 0) -> None:
        self.raw = raw
        self.at = at

    def __bool__(self) -> bool:
        return self.at < len(self.raw)

    def numbers(self, kind: Struct) -> tuple[Any, ...]:
        """The next numbers."""
        at = self.at
        self.at = at + kind.size
        return kind.unpack_from(self.raw, at)

    def word(self) -> bytes:
        """The next text, or what is packed as one."""
        (length,) = self.numbers(LENGTH)
        at = self.at
        self.at = at + length
        return self.raw[at : self.at]

    def text(self) -> str:
        """The next text."""
        return self.word().decode()

    def name(self) -> str:
        """The next text, where scripts make keys of it."""
        return restored(self.word().decode())

    def rest(self) -> bytes:
        """Everything that follows."""
        return self.raw[self.at :]


def parts_packed(parts: Iterable[Part]) -> bytes:
    """Parts of a hold or of a charge."""
    return b"".join(
        PART.pack(SOURCES.index(part.source), part.start, exact(part.amount)) + words(escaped(part.name))
        for part in parts
    )


@lru_cache(maxsize=MAX_REMEMBERED)
def parts_of(raw: bytes) -> tuple[Part, ...]:
    """The parts."""
    parts = []
    row = Unpacking(raw)
    while row:
        source, start, amount = row.numbers(PART)
        parts.append(Part(SOURCES[source], row.name(), start, int(amount)))
    return tuple(parts)


def basis_code(value: Basis | None) -> int:
    """How a basis is kept."""
    return BASES.index(value)


def receipt_packed(row: Receipt, state: HoldState) -> bytes:
    """A receipt, and how its hold has ended; without payer and unit, which stand beside it."""
    known = HAS_AVAILABLE * (row.available is not None) + HAS_ENTRY * (row.entry is not None)
    known += HAS_LATE * (row.late is not None)
    # Whether the call's own end may still come after another one.
    is_closed = row.ended_by is EndedBy.CALL or row.late is not None
    codes = (ENDS.index(state), is_closed, basis_code(row.basis), row.estimated, ENDERS.index(row.ended_by), known)
    amounts = (row.amount, row.held, row.available or 0)
    numbers = (*map(exact, amounts), row.at, row.entry or 0, exact(row.late or 0))
    call_id = escaped(row.id).encode()
    return RECEIPT.pack(*codes, *numbers, len(call_id)) + call_id + words(parts_packed(row.parts))


def receipt_of(raw: bytes, payer: str, unit: str, at: int = 0) -> Receipt | None:
    """The receipt that begins at *at*; None where nothing does."""
    if at == len(raw):
        return None
    _, _, basis, estimated, by, known, amount, held, available, time, entry, late, length = RECEIPT.unpack_from(raw, at)
    at += _RECEIPT_SIZE
    behind = at + length
    call_id = raw[at:behind].decode()
    # fmt: off
    return build(Receipt, (
        restored(call_id) if "%" in call_id else call_id, payer, unit, int(amount), int(held),
        BASES[basis] or Basis.NONE, estimated == 1, ENDERS[by], parts_of(raw[behind + _LENGTH_SIZE :]),
        int(available) if known & HAS_AVAILABLE else None, time, int(entry) if known & HAS_ENTRY else None, True,
        int(late) if known & HAS_LATE else None, True,
    ))
    # fmt: on


@lru_cache(maxsize=MAX_PAYERS)
def who_of(raw: bytes) -> tuple[str, str, str]:
    """Payer, unit and group of who pays."""
    row = Unpacking(raw)
    row.word()
    return row.text(), row.text(), row.text()
