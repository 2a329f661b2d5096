"""
Packing: how each row is kept under its key, in bytes that scripts take apart with one call.

Numbers are doubles, which are exact for every amount there is (2^53 - 1 smallest parts) and for every time; texts are
their length and their bytes; what is JSON-safe is JSON. ``lua/common.lua`` has the same formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, EndedBy, Entry, EntryKind, Part, Receipt, Source
from asgi_metering.rules.book import burn_order
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.state import (
    Account,
    AllowanceWindow,
    ChargeKey,
    Checkpoint,
    Counter,
    Event,
    Grant,
    Hold,
    IdempotencyKey,
    PinnedWindow,
)
from asgi_metering.stores.redis.names import Names, escaped, restored

__all__ = ["BASES", "ENDERS", "WINDOW", "Packing", "doubles", "exact", "json_text", "receipt_of", "time_text", "who_of", "words"]

_loads = json.JSONDecoder().decode


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is not JSON-safe. Convert it first.")


def _json() -> Callable[[Any], str]:
    make = json.encoder.c_make_encoder
    if make is None:
        return json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_plain).encode
    # An encoder of the json module makes this anew for each text, which takes longer than the text.
    encode = make(None, _plain, json.encoder.encode_basestring_ascii, None, ":", ",", False, False, True)
    return lambda value: "".join(encode(value, 0))


json_text = _json()
"""JSON text on one line."""

MAX_REMEMBERED = 512
"""Tuples remembered: most calls are paid from one grant."""

ACCOUNT = Struct(">9d")
GRANT = Struct(">10d")
HOLD = Struct(">IB7d")
RECEIPT = Struct(">BBBBBB6dI")
"""The last number is the length of the id that follows."""

PART = Struct(">Bdd")
PINNED = Struct(">dd")
ENTRY = Struct(">BBB4d")
WINDOW = Struct(">4d")
CHARGE_KEY = Struct(">dddB")
EVENT = Struct(">ddB")
DOUBLE = Struct(">d")
_LENGTH = Struct(">I")

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
        packed.append(_LENGTH.pack(len(raw)))
        packed.append(raw)
    return b"".join(packed)


def doubles(numbers: Iterable[float]) -> bytes:
    """Numbers, one after the other."""
    return b"".join(map(DOUBLE.pack, numbers))


class _Unpacking:
    """One row while it is taken apart, from its beginning on."""

    __slots__ = ("at", "raw")

    def __init__(self, raw: bytes, at: int = 0) -> None:
        self.raw = raw
        self.at = at

    def __bool__(self) -> bool:
        return self.at < len(self.raw)

    def numbers(self, kind: Struct) -> tuple[Any, ...]:
        at = self.at
        self.at = at + kind.size
        return kind.unpack_from(self.raw, at)

    def word(self) -> bytes:
        (length,) = self.numbers(_LENGTH)
        at = self.at
        self.at = at + length
        return self.raw[at : self.at]

    def text(self) -> str:
        return self.word().decode()

    def name(self) -> str:
        return restored(self.word().decode())

    def rest(self) -> bytes:
        return self.raw[self.at :]


def _parts(parts: Iterable[Part]) -> bytes:
    return b"".join(
        PART.pack(SOURCES.index(part.source), part.start, exact(part.amount)) + words(escaped(part.name))
        for part in parts
    )


@lru_cache(maxsize=MAX_REMEMBERED)
def _parts_of(raw: bytes) -> tuple[Part, ...]:
    parts = []
    row = _Unpacking(raw)
    while row:
        source, start, amount = row.numbers(PART)
        parts.append(Part(SOURCES[source], row.name(), start, int(amount)))
    return tuple(parts)


_policy = lru_cache(maxsize=MAX_REMEMBERED)(words)


def _known(value: Basis | None) -> int:
    return BASES.index(value)


def _receipt(row: Receipt, state: HoldState) -> bytes:
    known = HAS_AVAILABLE * (row.available is not None) + HAS_ENTRY * (row.entry is not None)
    known += HAS_LATE * (row.late is not None)
    # Whether the call's own end may still come after another one.
    is_closed = row.ended_by is EndedBy.CALL or row.late is not None
    codes = (ENDS.index(state), is_closed, _known(row.basis), row.estimated, ENDERS.index(row.ended_by), known)
    amounts = (row.amount, row.held, row.available or 0)
    numbers = (*map(exact, amounts), row.at, row.entry or 0, exact(row.late or 0))
    call_id = escaped(row.id).encode()
    return RECEIPT.pack(*codes, *numbers, len(call_id)) + call_id + words(_parts(row.parts))


def receipt_of(raw: bytes, payer: str, unit: str, at: int = 0) -> Receipt | None:
    """The receipt that begins at *at*; None where nothing does."""
    if at == len(raw):
        return None
    _, _, basis, estimated, by, known, amount, held, available, time, entry, late, length = RECEIPT.unpack_from(raw, at)
    at += RECEIPT.size
    parts = at + length + _LENGTH.size
    return Receipt(
        restored(raw[at : at + length].decode()),
        payer,
        unit,
        int(amount),
        int(held),
        BASES[basis] or Basis.NONE,
        estimated == 1,
        ENDERS[by],
        _parts_of(raw[parts:]),
        int(available) if known & HAS_AVAILABLE else None,
        time,
        int(entry) if known & HAS_ENTRY else None,
        True,
        int(late) if known & HAS_LATE else None,
    )


class Packing:
    """
    Rows to bytes and back.

    Args:
        names: The namespace's keys: some rows name others by what follows the letter of their key.
    """

    def __init__(self, names: Names) -> None:
        self.names = names

    # -- accounts and their grants -------------------------------------------------------------------------

    def account(self, row: Account, grants: Iterable[Grant]) -> bytes:
        """An account and its open grants, in burn order."""
        sums = map(exact, (row.granted, row.settled, row.held, row.expired, row.debt, row.entries))
        first = ACCOUNT.pack(*sums, row.next_change_at, row.next_due_at, row.seen_at)
        return b"".join((first, *map(self.grant, sorted(grants, key=burn_order))))

    def account_of(self, key: str, raw: bytes) -> tuple[Account, list[Grant]]:
        """The account and its open grants."""
        payer, unit = self.names.pair(key)
        row = _Unpacking(raw)
        *sums, change, due, seen = row.numbers(ACCOUNT)
        grants = []
        while row:
            grants.append(_grant_of(row, payer, unit))
        return Account(payer, unit, *map(int, sums), change, due, seen), grants

    def grant(self, row: Grant) -> bytes:
        """One grant."""
        numbers = (exact(row.amount), row.priority, row.effective_at, row.expires_at, row.number)
        moving = (*map(exact, (row.settled, row.held, row.expired)), row.begun, exact(row.reversed))
        return GRANT.pack(*numbers, *moving) + words(escaped(row.id), words(row.kind, row.actor))

    def grant_of(self, payer: str, unit: str, raw: bytes) -> Grant:
        """The grant of *payer* in *unit*."""
        return _grant_of(_Unpacking(raw), payer, unit)

    # -- holds ---------------------------------------------------------------------------------------------

    def hold(self, row: Hold) -> bytes:
        """A hold: what changes first, what admission decided, what the call brought, the receipt last."""
        numbers = (row.expires_at, row.due_at, exact(row.observed), exact(row.amount), row.created_at)
        rest = words(_parts(row.parts), self.who(row.payer, row.unit, row.group), self._rare(row)) + self.kept(row)
        is_in_doubt = row.state is HoldState.IN_DOUBT
        first = HOLD.pack(HOLD.size + len(rest), is_in_doubt, *numbers, row.ttl_s, row.grace_s)
        return first + rest + (b"" if row.receipt is None else _receipt(row.receipt, row.state))

    @staticmethod
    def kept(row: Any) -> bytes:
        """What a hold keeps as the call brought it: line, basis in doubt and facts, of the hold or of its admission."""
        facts = json_text(row.facts).encode()
        return _policy(row.line, str(row.in_doubt)) + _LENGTH.pack(len(facts)) + facts

    def who(self, payer: str, unit: str, group: str) -> bytes:
        """Who pays."""
        return words(self.names.rest(self.names.account(payer, unit)), payer, unit, group)

    @staticmethod
    def _rare(row: Hold) -> bytes:
        if not (row.windows or row.pools or row.charge_key or row.idempotency_key):
            return b""
        windows = [PINNED.pack(pin.start, exact(pin.taken)) + words(pin.meter, escaped(pin.key)) for pin in row.windows]
        pools = words(*map(escaped, row.pools))
        return words(b"".join(windows), pools, escaped(row.charge_key), escaped(row.idempotency_key))

    def hold_of(self, call_id: str, raw: bytes) -> Hold:
        """The hold of *call_id*."""
        row = _Unpacking(raw)
        size, is_in_doubt, expires, due, observed, amount, created, ttl, grace = row.numbers(HOLD)
        parts, who, rare, line, in_doubt, facts = (row.word() for _ in range(6))
        payer, unit, group = who_of(who)
        more = _Unpacking(rare)
        windows, pools = (more.word(), more.word()) if more else (b"", b"")
        charge_key, idempotency_key = (more.name(), more.name()) if more else ("", "")
        return Hold(
            call_id,
            payer,
            unit,
            int(amount),
            _parts_of(parts),
            LIVES[is_in_doubt] if size == len(raw) else ENDS[raw[size]],
            created,
            expires,
            due,
            ttl,
            grace,
            Basis(in_doubt.decode()),
            line.decode(),
            int(observed),
            tuple(_pinned_of(windows)),
            tuple(_names_of(pools)),
            _loads(facts.decode()),
            receipt_of(raw, payer, unit, size),
            group,
            charge_key,
            idempotency_key,
        )

    # -- counters, windows and keys ------------------------------------------------------------------------

    def counter(self, row: Counter) -> bytes:
        """A rate limit's counter."""
        return WINDOW.pack(row.start, row.end, exact(row.used), exact(row.previous))

    def counter_of(self, key: str, raw: bytes) -> Counter:
        """The counter."""
        start, end, used, previous = WINDOW.unpack(raw)
        return Counter(self.names.text(key), start, end, int(used), int(previous))

    def window(self, row: AllowanceWindow) -> bytes:
        """An allowance's window."""
        return WINDOW.pack(row.start, row.end, exact(row.settled), exact(row.held))

    def window_of(self, key: str, raw: bytes) -> AllowanceWindow:
        """The window."""
        start, end, settled, held = WINDOW.unpack(raw)
        payer, unit, name, _ = self.names.texts(key)
        return AllowanceWindow(payer, unit, name, start, end, int(settled), int(held))

    def charge_key(self, row: ChargeKey) -> bytes:
        """A charge key."""
        return CHARGE_KEY.pack(row.start, row.end, row.members, row.settled) + escaped(row.hold).encode()

    def charge_key_of(self, key: str, raw: bytes) -> ChargeKey:
        """The charge key."""
        start, end, members, settled = CHARGE_KEY.unpack_from(raw)
        hold = restored(raw[CHARGE_KEY.size :].decode())
        return ChargeKey(self.names.text(key), start, end, hold, int(members), settled == 1)

    def idempotency(self, row: IdempotencyKey) -> bytes:
        """An idempotency key: what is known when it is claimed, the kept reply, who pays, the receipt."""
        reply = "" if row.reply is None else json_text(row.reply)
        receipt = row.receipt
        who = b"" if receipt is None else self.who(receipt.payer, receipt.unit, "")
        first = DOUBLE.pack(row.expires_at) + words(escaped(row.call), row.fingerprint, reply, who)
        # What became of the hold is nobody's question here.
        return first if receipt is None else first + _receipt(receipt, HoldState.SETTLED)

    def idempotency_of(self, key: str, raw: bytes) -> IdempotencyKey:
        """The idempotency key."""
        row = _Unpacking(raw)
        (expires,) = row.numbers(DOUBLE)
        call, fingerprint, reply, who = row.name(), row.text(), row.text(), row.word()
        payer, unit, _ = who_of(who) if who else ("", "", "")
        receipt = receipt_of(raw, payer, unit, row.at)
        return IdempotencyKey(
            self.names.text(key), fingerprint, call, expires, receipt, _loads(reply) if reply else None
        )

    # -- ledger lines, their checkpoint, and events --------------------------------------------------------

    def checkpoint(self, row: Checkpoint) -> str:
        """A checkpoint."""
        for amount in row.sums.values():
            exact(amount)
        return "\t".join((str(row.number), time_text(row.at), json_text(row.sums)))

    def checkpoint_of(self, key: str, raw: bytes) -> Checkpoint:
        """The checkpoint."""
        number, at, sums = raw.decode().split("\t")
        payer, unit = self.names.pair(key)
        return Checkpoint(payer, unit, int(number), float(at), _loads(sums))

    def entry(self, row: Entry) -> bytes:
        """A ledger line, without the account whose list it is in."""
        codes = (KINDS.index(row.kind), _known(row.basis), row.estimated)
        numbers = (row.number, row.at, exact(row.amount), exact(row.available))
        texts = words(escaped(row.ref), row.line, _parts(row.parts), row.actor, row.id)
        return ENTRY.pack(*codes, *numbers) + texts

    def entry_of(self, account: str, raw: bytes) -> Entry:
        """The ledger line of *account*."""
        row = _Unpacking(raw)
        kind, basis, estimated, number, at, amount, available = row.numbers(ENTRY)
        ref, line, parts, actor, posting = row.name(), row.text(), _parts_of(row.word()), row.text(), row.text()
        payer, unit = self.names.pair(account)
        return Entry(
            payer,
            unit,
            int(number),
            at,
            KINDS[kind],
            int(amount),
            ref,
            line,
            BASES[basis],
            estimated == 1,
            int(available),
            actor,
            parts,
            posting,
        )

    def event(self, row: Event) -> bytes:
        """An event of the outbox."""
        return EVENT.pack(row.at, row.claimed_until, AS_JSON) + json_text(row.payload).encode()

    def event_of(self, event_id: str, raw: bytes) -> Event:
        """The event."""
        at, claimed_until, kept_as = EVENT.unpack_from(raw)
        if kept_as == AS_JSON:
            return Event(event_id, at, _loads(raw[EVENT.size :].decode()), claimed_until)
        row = _Unpacking(raw, EVENT.size)
        told = _loads(row.text())
        return Event(event_id, at, _told(self.hold_of(event_id, row.rest()), told), claimed_until)


def _grant_of(row: _Unpacking, payer: str, unit: str) -> Grant:
    amount, priority, begins, ends, number, settled, held, expired, begun, back = row.numbers(GRANT)
    grant_id, names = row.name(), _Unpacking(row.word())
    return Grant(
        payer,
        unit,
        grant_id,
        int(amount),
        int(priority),
        begins,
        ends,
        int(number),
        names.text(),
        names.text(),
        int(settled),
        int(held),
        int(expired),
        begun == 1,
        int(back),
    )


def _pinned_of(raw: bytes) -> Iterable[PinnedWindow]:
    row = _Unpacking(raw)
    while row:
        start, taken = row.numbers(PINNED)
        meter = row.text()
        yield PinnedWindow(row.name(), start, meter, int(taken))


def _names_of(raw: bytes) -> Iterable[str]:
    row = _Unpacking(raw)
    while row:
        yield row.name()


@lru_cache(maxsize=MAX_REMEMBERED)
def who_of(raw: bytes) -> tuple[str, str, str]:
    """Payer, unit and group of who pays."""
    row = _Unpacking(raw)
    row.word()
    return row.text(), row.text(), row.text()


def _told(hold: Hold, told: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the event of a call's end says: as `rules.settlement` puts it together."""
    receipt = hold.receipt
    if receipt is None:
        raise AssertionError(f"an event tells of the end of {hold.id!r}, which has not ended")
    return {
        "started_at": hold.created_at,
        **hold.facts,
        **told,
        "id": receipt.id,
        "payer": hold.payer,
        "unit": hold.unit,
        "line": hold.line,
        "amount": receipt.amount,
        "held": receipt.held,
        "basis": receipt.basis.value,
        "estimated": receipt.estimated,
        "ended_at": receipt.at,
    }


