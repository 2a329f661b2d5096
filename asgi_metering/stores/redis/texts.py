"""
Rows as texts: how each row is kept under its key, so that scripts read it with patterns and people read it at all.

Numbers are separated by tabs, the rest is JSON text, which contains no tab and no line break of its own. Integers are
written as digits, times with all their digits: both come back unchanged. The scripts write the same texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
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
from asgi_metering.stores.redis.names import GLUE, Names

__all__ = ["Texts", "amount_text", "json_text", "json_texts", "receipt_of", "time_text"]

_loads = json.JSONDecoder().decode


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is not JSON-safe. Convert it first.")


json_text = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_plain).encode
"""JSON text on one line."""

json_texts = lru_cache(maxsize=8_192)(json_text)
"""The same for texts, remembered: names come again and again."""

MAX_REMEMBERED = 512
"""Tuples remembered in each direction: most calls are paid from one grant, and limited by the same limits."""


def amount_text(amount: int) -> str:
    """
    An amount as digits.

    Raises:
        AmountError: Beyond what scripts count exactly.
    """
    if not -MAX_AMOUNT <= amount <= MAX_AMOUNT:
        raise AmountError(
            f"The store would have to keep {amount} smallest parts, and it counts exactly up to {MAX_AMOUNT}. "
            f"Declare the unit with a smaller scale."
        )
    return str(amount)


def time_text(seconds: float) -> str:
    """A time with all its digits; infinity is ``inf``."""
    return repr(float(seconds))


def _parts_text(parts: Iterable[Part]) -> str:
    return "\t".join(
        GLUE.join((str(part.source), time_text(part.start), amount_text(part.amount), json_texts(part.name)))
        for part in parts
    )


@lru_cache(maxsize=MAX_REMEMBERED)
def _parts(text: str) -> tuple[Part, ...]:
    parts = []
    for item in text.split("\t") if text else ():
        source, start, amount, name = item.split(GLUE)
        parts.append(Part(Source(source), _loads(name), float(start), int(amount)))
    return tuple(parts)


def _listed_parts(values: Iterable[Sequence[Any]]) -> tuple[Part, ...]:
    return tuple([Part(Source(source), name, float(start), amount) for source, name, start, amount in values])


def _receipt(values: list[Any]) -> Receipt:
    values[5] = Basis(values[5])
    values[7] = EndedBy(values[7])
    values[8] = _listed_parts(values[8])
    values[10] = float(values[10])
    return Receipt(*values)


def receipt_of(text: str) -> Receipt | None:
    """The receipt that *text* is; None where it is empty."""
    return _receipt(_loads(text)) if text else None


def _late_mark(receipt: Receipt | None) -> str:
    """Whether the call's own end may still come: ``o``, or not any more: ``c``; empty while the hold lives."""
    if receipt is None:
        return "-"
    return "c" if receipt.ended_by is EndedBy.CALL or receipt.late is not None else "o"


class Texts:
    """
    Rows to texts and back.

    Args:
        names: The namespace's keys: some texts name other rows by their key.
    """

    def __init__(self, names: Names) -> None:
        self.names = names

    # -- accounts and their grants -------------------------------------------------------------------------

    def account_text(self, row: Account, grants: Iterable[Grant]) -> str:
        """An account and its open grants, in burn order."""
        sums = map(amount_text, (row.granted, row.settled, row.held, row.expired, row.debt, row.entries))
        times = map(time_text, (row.next_change_at, row.next_due_at, row.seen_at))
        return "\n".join(("\t".join((*sums, *times)), *map(self.grant_text, sorted(grants, key=burn_order))))

    def account(self, key: str, text: str) -> tuple[Account, list[Grant]]:
        """The account and its open grants."""
        payer, unit = self.names.pair(key)
        sums, *grants = text.split("\n")
        granted, settled, held, expired, debt, entries, change, due, seen = sums.split("\t")
        account = Account(
            payer,
            unit,
            int(granted),
            int(settled),
            int(held),
            int(expired),
            int(debt),
            int(entries),
            float(change),
            float(due),
            float(seen),
        )
        return account, [self.grant(payer, unit, line) for line in grants]

    def grant_text(self, row: Grant) -> str:
        """One grant, on one line."""
        return "\t".join(
            (
                amount_text(row.amount),
                str(row.priority),
                time_text(row.effective_at),
                time_text(row.expires_at),
                str(row.number),
                *map(amount_text, (row.settled, row.held, row.expired)),
                "1" if row.begun else "0",
                amount_text(row.reversed),
                *map(json_texts, (row.id, row.kind, row.actor)),
            )
        )

    def grant(self, payer: str, unit: str, text: str) -> Grant:
        """The grant of *payer* in *unit*."""
        amount, priority, begins, ends, number, settled, held, expired, begun, back, *names = text.split("\t")
        grant_id, kind, actor = map(_loads, names)
        return Grant(
            payer,
            unit,
            grant_id,
            int(amount),
            int(priority),
            float(begins),
            float(ends),
            int(number),
            kind,
            actor,
            int(settled),
            int(held),
            int(expired),
            begun == "1",
            int(back),
        )

    # -- holds ---------------------------------------------------------------------------------------------

    def hold_text(self, row: Hold) -> str:
        """A hold: what changes first, what admission decided, what the call brought, the receipt last."""
        names = self.names
        times = (time_text(row.expires_at), time_text(row.due_at), amount_text(row.observed))
        first = (str(row.state), *times, amount_text(row.amount), time_text(row.created_at), _late_mark(row.receipt))
        windows = (
            GLUE.join((time_text(pin.start), amount_text(pin.taken), json_texts(pin.meter), names.counter(pin.key)))
            for pin in row.windows
        )
        payer = (names.account(row.payer, row.unit), json_texts(row.payer), json_texts(row.group))
        return "\n".join(
            (
                "\t".join(first),
                _parts_text(row.parts),
                "\t".join(windows),
                "\t".join(payer),
                self.brought(row),
                "" if row.receipt is None else json_text(row.receipt),
            )
        )

    def brought(self, row: Hold) -> str:
        """What of a hold's text the call brought: policy, names, pools and facts."""
        names = self.names
        own = (
            time_text(row.ttl_s),
            time_text(row.grace_s),
            str(row.in_doubt),
            json_texts(row.unit),
            json_texts(row.line),
            names.charge_key(row.charge_key) if row.charge_key else "",
            names.idempotency(row.idempotency_key) if row.idempotency_key else "",
        )
        return "\n".join(("\t".join(own), "\t".join(map(names.pool, row.pools)), json_text(row.facts)))

    def hold(self, key: str, text: str) -> Hold:
        """The hold."""
        names = self.names
        first, parts, windows, payer, own, pools, facts, receipt = text.split("\n")
        state, expires, due, observed, amount, created, _ = first.split("\t")
        ttl, grace, in_doubt, unit, line, charge, idempotency = own.split("\t")
        _, payer_name, group = payer.split("\t")
        call_id = names.text(key)
        return Hold(
            call_id,
            _loads(payer_name),
            _loads(unit),
            int(amount),
            _parts(parts),
            HoldState(state),
            float(created),
            float(expires),
            float(due),
            float(ttl),
            float(grace),
            Basis(in_doubt),
            _loads(line),
            int(observed),
            tuple([self._pinned(item) for item in windows.split("\t")]) if windows else (),
            tuple([names.text(pool) for pool in pools.split("\t")]) if pools else (),
            _loads(facts),
            receipt_of(receipt),
            _loads(group),
            names.text(charge) if charge else "",
            names.text(idempotency) if idempotency else "",
        )

    def _pinned(self, item: str) -> PinnedWindow:
        start, taken, meter, counter = item.split(GLUE)
        return PinnedWindow(self.names.text(counter), float(start), _loads(meter), int(taken))

    # -- what is one line ----------------------------------------------------------------------------------

    def counter_text(self, row: Counter) -> str:
        """A rate limit's counter."""
        return "\t".join((time_text(row.start), time_text(row.end), str(row.used), str(row.previous)))

    def counter(self, key: str, text: str) -> Counter:
        """The counter."""
        start, end, used, previous = text.split("\t")
        return Counter(self.names.text(key), float(start), float(end), int(used), int(previous))

    def window_text(self, row: AllowanceWindow) -> str:
        """An allowance's window."""
        return "\t".join((time_text(row.start), time_text(row.end), amount_text(row.settled), amount_text(row.held)))

    def window(self, key: str, text: str) -> AllowanceWindow:
        """The window."""
        start, end, settled, held = text.split("\t")
        payer, unit, name, _ = self.names.texts(key)
        return AllowanceWindow(payer, unit, name, float(start), float(end), int(settled), int(held))

    def charge_key_text(self, row: ChargeKey) -> str:
        """A charge key."""
        times = (time_text(row.start), time_text(row.end))
        return "\t".join((*times, str(row.members), "1" if row.settled else "0", self.names.hold(row.hold)))

    def charge_key(self, key: str, text: str) -> ChargeKey:
        """The charge key."""
        start, end, members, settled, hold = text.split("\t")
        names = self.names
        return ChargeKey(names.text(key), float(start), float(end), names.text(hold), int(members), settled == "1")

    def idempotency_text(self, row: IdempotencyKey) -> str:
        """An idempotency key: what is known when it is claimed, the receipt, the kept reply."""
        first = "\t".join((time_text(row.expires_at), self.names.hold(row.call), json_texts(row.fingerprint)))
        receipt = "" if row.receipt is None else json_text(row.receipt)
        return "\n".join((first, receipt, "" if row.reply is None else json_text(row.reply)))

    def idempotency(self, key: str, text: str) -> IdempotencyKey:
        """The idempotency key."""
        first, receipt, reply = text.split("\n")
        expires, hold, fingerprint = first.split("\t")
        return IdempotencyKey(
            self.names.text(key),
            _loads(fingerprint),
            self.names.text(hold),
            float(expires),
            receipt_of(receipt),
            _loads(reply) if reply else None,
        )

    def checkpoint_text(self, row: Checkpoint) -> str:
        """A checkpoint."""
        for amount in row.sums.values():
            amount_text(amount)
        return "\t".join((str(row.number), time_text(row.at), json_text(row.sums)))

    def checkpoint(self, key: str, text: str) -> Checkpoint:
        """The checkpoint."""
        number, at, sums = text.split("\t")
        payer, unit = self.names.pair(key)
        return Checkpoint(payer, unit, int(number), float(at), _loads(sums))

    def entry_text(self, row: Entry) -> str:
        """A ledger line, without the account whose list it is in."""
        amount_text(row.amount)
        return json_text(row[2:])

    def entry(self, account: str, text: str) -> Entry:
        """The ledger line of *account*."""
        values = _loads(text)
        values[1] = float(values[1])
        values[2] = EntryKind(values[2])
        values[6] = None if values[6] is None else Basis(values[6])
        values[10] = _listed_parts(values[10])
        payer, unit = self.names.pair(account)
        return Entry(payer, unit, *values)

    def event_text(self, row: Event) -> str:
        """An event of the outbox."""
        return "\t".join((time_text(row.at), time_text(row.claimed_until), json_text(row.payload)))

    def event(self, event_id: str, text: str) -> Event:
        """The event."""
        at, claimed_until, payload = text.split("\t")
        return Event(event_id, float(at), _loads(payload), float(claimed_until))
