"""
Packing: how each row is kept under its key.

What changes comes first and at a fixed place, names come last; ``lua/common.lua`` has the same formats. Knows what
fields a row has, and nothing of who reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from asgi_metering.receipts import Basis, Entry
from asgi_metering.rules.book import burn_order
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.settlement import event_payload
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
    SharedReading,
)
from asgi_metering.stores.redis.names import GLUE, Names, escaped, restored
from asgi_metering.stores.redis.packed import (
    ACCOUNT,
    AS_JSON,
    BASES,
    CHARGE_KEY,
    DOUBLE,
    ENDS,
    ENTRY,
    EVENT,
    GRANT,
    HOLD,
    KINDS,
    LENGTH,
    LIVES,
    MAX_REMEMBERED,
    PINNED,
    WINDOW,
    Unpacking,
    basis_code,
    exact,
    json_text,
    parts_of,
    parts_packed,
    receipt_of,
    receipt_packed,
    time_text,
    who_of,
    words,
)

__all__ = ["Packing"]

_loads = json.JSONDecoder().decode

_policy = lru_cache(maxsize=MAX_REMEMBERED)(words)


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
        row = Unpacking(raw)
        *sums, change, due, seen = row.numbers(ACCOUNT)
        grants = []
        while row:
            grants.append(_grant_of(row, payer, unit))
        granted, settled, held, expired, debt, entries = map(int, sums)
        account = Account(payer, unit, granted, settled, held, expired, debt, entries, change, due, seen)
        return account, grants

    def grant(self, row: Grant) -> bytes:
        """One grant."""
        numbers = (exact(row.amount), row.priority, row.effective_at, row.expires_at, row.number)
        moving = (*map(exact, (row.settled, row.held, row.expired)), row.begun, exact(row.reversed))
        return GRANT.pack(*numbers, *moving) + words(escaped(row.id), words(row.kind, row.actor))

    def grant_of(self, payer: str, unit: str, raw: bytes) -> Grant:
        """The grant of *payer* in *unit*."""
        return _grant_of(Unpacking(raw), payer, unit)

    # -- holds ---------------------------------------------------------------------------------------------

    def hold(self, row: Hold) -> bytes:
        """A hold: what changes first, what admission decided, what the call brought, the receipt last."""
        numbers = (row.expires_at, row.due_at, exact(row.observed), exact(row.amount), row.created_at)
        rest = words(parts_packed(row.parts), self.who(row.payer, row.unit, row.group), self._rare(row))
        rest += self.kept(row.line, row.in_doubt, row.facts)
        is_in_doubt = row.state is HoldState.IN_DOUBT
        first = HOLD.pack(HOLD.size + len(rest), is_in_doubt, *numbers, row.ttl_s, row.grace_s)
        return first + rest + (b"" if row.receipt is None else receipt_packed(row.receipt, row.state))

    @staticmethod
    def kept(line: str, in_doubt: str, facts: Mapping[str, Any]) -> bytes:
        """What a hold keeps as the call brought it."""
        told = json_text(facts).encode()
        return _policy(line, in_doubt) + LENGTH.pack(len(told)) + told

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
        row = Unpacking(raw)
        size, is_in_doubt, expires, due, observed, amount, created, ttl, grace = row.numbers(HOLD)
        parts, who, rare, line, in_doubt, facts = (row.word() for _ in range(6))
        payer, unit, group = who_of(who)
        more = Unpacking(rare)
        windows, pools = (more.word(), more.word()) if more else (b"", b"")
        charge_key, idempotency_key = (more.name(), more.name()) if more else ("", "")
        return Hold(
            call_id,
            payer,
            unit,
            int(amount),
            parts_of(parts),
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
        packed = WINDOW.pack(row.start, row.end, exact(row.used), exact(row.previous))
        return packed + row.extra[:1].encode() + bytes.fromhex(row.extra[1:]) if row.extra else packed

    def counter_of(self, key: str, raw: bytes) -> Counter:
        """The counter."""
        start, end, used, previous = WINDOW.unpack_from(raw)
        at = WINDOW.size
        extra = raw[at : at + 1].decode() + raw[at + 1 :].hex() if len(raw) > at else ""
        return Counter(self.names.text(key), start, end, int(used), int(previous), extra)

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
        return first if receipt is None else first + receipt_packed(receipt, HoldState.SETTLED)

    def idempotency_of(self, key: str, raw: bytes) -> IdempotencyKey:
        """The idempotency key."""
        row = Unpacking(raw)
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
        codes = (KINDS.index(row.kind), basis_code(row.basis), row.estimated)
        numbers = (row.number, row.at, exact(row.amount), exact(row.available))
        texts = words(escaped(row.ref), row.line, parts_packed(row.parts), row.actor, row.id)
        return ENTRY.pack(*codes, *numbers) + texts

    def entry_of(self, account: str, raw: bytes) -> Entry:
        """The ledger line of *account*."""
        row = Unpacking(raw)
        kind, basis, estimated, number, at, amount, available = row.numbers(ENTRY)
        ref, line, parts, actor, posting = row.name(), row.text(), parts_of(row.word()), row.text(), row.text()
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
        row = Unpacking(raw, EVENT.size)
        told = _loads(row.text())
        return Event(event_id, at, _told(self.hold_of(event_id, row.rest()), told), claimed_until)

    # -- readings ------------------------------------------------------------------------------------------

    @staticmethod
    def reading(row: SharedReading) -> bytes:
        """A part of a reading."""
        return DOUBLE.pack(row.observed_at) + row.told.encode()

    @staticmethod
    def reading_of(name: str, raw: bytes) -> SharedReading:
        """The part of that name."""
        series, part = name.split(GLUE)
        (observed_at,) = DOUBLE.unpack_from(raw)
        return SharedReading(restored(series), part, observed_at, raw[DOUBLE.size :].decode())


def _grant_of(row: Unpacking, payer: str, unit: str) -> Grant:
    amount, priority, begins, ends, number, settled, held, expired, begun, back = row.numbers(GRANT)
    grant_id, names = row.name(), Unpacking(row.word())
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
    row = Unpacking(raw)
    while row:
        start, taken = row.numbers(PINNED)
        meter = row.text()
        yield PinnedWindow(row.name(), start, meter, int(taken))


def _names_of(raw: bytes) -> Iterable[str]:
    row = Unpacking(raw)
    while row:
        yield row.name()


def _told(hold: Hold, told: Mapping[str, Any]) -> Mapping[str, Any]:
    receipt = hold.receipt
    if receipt is None:
        raise AssertionError(f"an event tells of the end of {hold.id!r}, which has not ended")
    _, _, _, amount, held, basis, estimated, _, _, _, at, _, _, _, _ = receipt
    return event_payload(hold, told, receipt.id, amount, held, basis, estimated, at)
