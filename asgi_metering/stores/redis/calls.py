"""
Calls: the operations that scripts run, as commands, and their replies as answers.

What a script tells is as short as the rules allow: refusals, windows and resets are computed here, by the rules, from
the very rows that the script saw. Knows texts and arguments. Decides nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from asgi_metering.amounts import MAX_AMOUNT, check_parts
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.errors import StoreError
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.admission import admit
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.keys import key_rows
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Claim,
    Emit,
    End,
    KeyAsk,
    LimitAsk,
    Operation,
    Renew,
    SourceAsk,
)
from asgi_metering.rules.state import NEVER, Counter, Lease, State
from asgi_metering.rules.windows import look, window_state
from asgi_metering.sources import WALLET
from asgi_metering.stores.redis.link import Command, Reply
from asgi_metering.stores.redis.names import GLUE, Names, escaped, restored
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.texts import Texts, json_text, json_texts, receipt_of, time_text
from asgi_metering.stores.redis.working_copy import take

__all__ = ["BUSY", "HALTED", "PUNTED", "Calls"]

MAX_REMEMBERED = 8_192
"""Of each kind of words that come again: a few hundred bytes each."""

HALTED, BUSY, PUNTED = b"H", b"B", b"S"
"""Not run: something before it in its batch was not; somebody else works alone; the whole rules are needed."""


class Calls:
    """
    Commands for operations.

    Args:
        names, texts, scripts: Of the store.
        halt: The key by which its own batches are told to stop.
    """

    def __init__(self, names: Names, texts: Texts, scripts: Scripts, halt: str) -> None:
        self._names = names
        self._texts = texts
        self._sha = scripts.sha
        self._gates = (names.gate, halt)
        self._outbox = (*self._gates, names.events, names.event_order)
        # The same few accounts pay from the same few sources, until the calendar moves on.
        self._sources = lru_cache(maxsize=MAX_REMEMBERED)(self._make_sources)

    def command(self, operation: Operation, now: str, token: str) -> Command | None:
        """
        The command for *operation*; None if no script runs it.

        Args:
            operation: One atomic step.
            now: The time of tests; empty for the server's.
            token: Of the batch; empty for an operation alone.

        Raises:
            AmountError: The operation is a mistake.
            TypeError, ValueError: Something in it is not JSON-safe.
        """
        encode = _ENCODE.get(type(operation))
        return None if encode is None else encode(self, operation, now, token)

    def answer(self, operation: Operation, reply: Reply) -> Answer:
        """What *reply* says about *operation*."""
        return _DECODE[type(operation)](self, operation, reply)

    # -- admissions ----------------------------------------------------------------------------------------

    def _admit(self, ask: Admit, now: str, token: str) -> Command | None:
        if not 0 <= ask.minimum <= ask.amount <= MAX_AMOUNT:
            # The rules say what is wrong with it.
            return None
        names = self._names
        keys = [*self._gates, names.hold(ask.id), names.account(ask.payer, ask.unit)]
        keys += [names.counter(limit.key) for limit in ask.limits]
        idempotency_at, charge_at, charge, claim = 0, 0, "", ""
        if ask.idempotency is not None:
            keys.append(names.idempotency(ask.idempotency.key))
            idempotency_at = len(keys)
            claim = f"{time_text(ask.idempotency.ttl_s)}\t{keys[2]}\t{json_texts(ask.idempotency.fingerprint)}"
        if ask.charge_key is not None:
            charge_at = len(keys) + 1
            keys.extend(map(names.charge_key, key_rows(ask.charge_key)))
            charge = _charge_words(ask.charge_key)
        base = len(keys)
        source_keys, source_words = self._sources(ask.sources, ask.payer, ask.unit)
        keys += source_keys
        words: list[str | bytes | int] = [now, token, ask.amount, ask.minimum, repr(ask.ttl_s), repr(ask.grace_s)]
        words += (len(ask.limits), len(ask.leases), len(ask.sources), idempotency_at, charge_at, base)
        words.append(f"{ask.ttl_s!r}\t{ask.grace_s!r}\t{ask.in_doubt}")
        words += (json_texts(ask.unit), json_texts(ask.line), json_text(ask.facts))
        words += (self._who(ask.payer, ask.unit, ""), charge, claim)
        for limit in ask.limits:
            words += _limit_words(limit)
        for lease in ask.leases:
            words += (names.pool(lease.pool), str(lease.limit))
        words += source_words
        return ("EVALSHA", self._sha["admit"], len(keys), *keys, *words)

    def _who(self, payer: str, unit: str, group: str) -> str:
        return f"{self._names.account(payer, unit)}\t{json_texts(payer)}\t{json_texts(group)}"

    def _make_sources(self, sources: tuple[SourceAsk, ...], payer: str, unit: str) -> tuple[list[str], list[str]]:
        """The keys that sources name, and the words that say what to do with them."""
        names = self._names
        keys: list[str] = []
        words: list[str] = []
        last: tuple[str, str] | None = None
        for source in sources:
            who = source.payer or payer
            account = len(keys) + 1
            keys.append(names.account(who, unit))
            own = len(keys) + 1
            kind, limit, name, span, start = "w", "0", WALLET, "", ""
            if isinstance(source, AllowanceSource):
                kind, limit, name = "c" if source.boundaries else "r", str(source.limit), source.name
                bucket = names.bucket(who, unit, name)
                keys.append(bucket)
                keys.extend(names.window(who, unit, name, edge) for edge in source.boundaries[:-1])
                span = _edges(source.boundaries) if source.boundaries else time_text(source.window_s)
                start = f"{names.prefix}w:{names.rest(bucket)}{GLUE}"
            else:
                limit = str(source.overdraft)
            place = (source.payer, source.group)
            first, split = "01"[place != last], "01"[source.split]
            last = place
            told = (kind, first, split, limit, str(account), str(own), self._who(who, unit, source.group))
            words += (*told, json_texts(name), span, start)
        return keys, words

    def _decided(self, ask: Admit, reply: Reply) -> Decision:
        if reply[0] == b"R":
            return self._refused(ask, reply)
        _, time, held, available, last, who, joined, *texts = reply
        now = float(time)
        windows = self._windows(ask, texts, now) if texts else ()
        if joined:
            payer, group = map(json.loads, who.decode().split("\t")[1:])
            return Decision(ask.id, now, windows=windows, payer=payer, group=group, joined=True)
        if not last:
            return Decision(ask.id, now, windows=windows)
        source = ask.sources[last - 1]
        name = source.name if isinstance(source, AllowanceSource) else WALLET
        payer = source.payer or ask.payer
        return Decision(ask.id, now, None, int(held), int(available), name, windows, False, payer, source.group)

    def _windows(self, ask: Admit, texts: list[bytes | None], now: float) -> tuple[WindowState, ...]:
        """What the limits tell after the call: from the counters as they were, by the rules."""
        windows = []
        for limit, text in zip(ask.limits, texts, strict=True):
            counter = None
            if text is not None:
                start, end, used, previous = text.split(b"\t")
                counter = Counter(limit.key, float(start), float(end), int(used), int(previous))
            seen = look(limit, counter, now)
            if seen is None:
                raise StoreError(
                    f"The scripts of the Redis store know a window of limit {limit!r} at {now}, the rules none."
                )
            windows.append(window_state(seen, taken=True))
        return tuple(windows)

    def _refused(self, ask: Admit, reply: Reply) -> Decision:
        """Why the call may not run: the rules, on the rows that the script saw."""
        _, time, counts, rows, further = reply
        command = self._admit(ask, "", "")
        if command is None:
            raise AssertionError(f"{ask!r} was never sent")
        keys = [str(key) for key in command[5 : 3 + int(command[2])]]
        state = State()
        pairs = [*zip(keys, rows[2:], strict=True), *zip(further[::2], further[1::2], strict=True)]
        for key, text in pairs:
            if text is not None:
                take(state, self._texts, key if isinstance(key, str) else key.decode(), text.decode())
        for lease, live in zip(ask.leases, counts, strict=False):
            state.leases[lease.pool] = {str(n): Lease(lease.pool, str(n), NEVER) for n in range(live)}
        decision, _ = admit(state, ask, float(time))
        if decision.admitted:
            raise StoreError(f"The scripts of the Redis store refuse {ask!r}, which the rules admit. Report this.")
        return decision

    # -- ends ----------------------------------------------------------------------------------------------

    def _end(self, ask: End, now: str, token: str) -> Command:
        amount = "" if ask.amount is None else str(check_parts(ask.amount, "charge"))
        words = [
            now,
            token,
            json_text(ask.id),
            amount,
            ask.basis.value,
            "true" if ask.estimated else "false",
            ask.by.value,
            "1" if ask.failed else "0",
            "" if ask.event is None else json_text(ask.event),
            "" if ask.reply is None else json_text(ask.reply),
        ]
        for meter, used in ask.actual.items():
            words += (json_texts(meter), str(used))
        return ("EVALSHA", self._sha["end"], 3, *self._gates, self._names.hold(ask.id), *words)

    def _ended(self, ask: End, reply: Reply) -> Receipt:
        kind, told = reply
        if kind == b"U":
            return Receipt(
                ask.id, "", "", 0, 0, Basis.NONE, False, ask.by, (), None, float(told), None, applied=False, known=False
            )
        receipt = receipt_of(told.decode())
        if receipt is None:
            raise AssertionError(f"the end of {ask.id!r} has no receipt")
        return receipt if kind == b"E" else receipt._replace(applied=False)

    # -- heartbeats and the outbox -------------------------------------------------------------------------

    def _renew(self, beat: Renew, now: str, token: str) -> Command:
        observed = check_parts(beat.observed, "observed amount")
        return ("EVALSHA", self._sha["renew"], 3, *self._gates, self._names.hold(beat.id), now, token, observed)

    def _renewed(self, _: Renew, reply: Reply) -> bool:
        return bool(reply)

    def _emit(self, ask: Emit, now: str, token: str) -> Command:
        words = [word for event_id, told in ask.events for word in (escaped(event_id), json_text(told))]
        return ("EVALSHA", self._sha["emit"], 4, *self._outbox, now, token, *words)

    def _emitted(self, ask: Emit, _: Reply) -> int:
        return len(ask.events)

    def _claim(self, ask: Claim, now: str, token: str) -> Command:
        return ("EVALSHA", self._sha["claim"], 4, *self._outbox, now, token, ask.limit, time_text(ask.lease_s))

    def _claimed(self, _: Claim, reply: Reply) -> Answer:
        found = reply[1]
        pairs = zip(found[::2], found[1::2], strict=True)
        return tuple([self._texts.event(restored(key.decode()), text.decode()) for key, text in pairs])

    def _acknowledge(self, ask: Acknowledge, now: str, token: str) -> Command:
        return ("EVALSHA", self._sha["acknowledge"], 4, *self._outbox, now, token, *map(escaped, ask.ids))

    def _acknowledged(self, _: Acknowledge, reply: Reply) -> int:
        return int(reply[1])


def _edges(boundaries: tuple[float, ...]) -> str:
    return " ".join(map(time_text, boundaries))


def _charge_words(ask: KeyAsk) -> str:
    return f"c\t{_edges(ask.boundaries)}" if ask.boundaries else f"r\t{time_text(ask.window_s)}"


@lru_cache(maxsize=MAX_REMEMBERED)
def _limit_words(ask: LimitAsk) -> tuple[str, ...]:
    meter = "" if ask.meter == "requests" else json_texts(ask.meter)
    return (ask.kind[0], str(ask.limit), repr(ask.window_s), str(ask.cost), meter, _edges(ask.boundaries))


_ENCODE: Mapping[type, Callable[[Calls, Any, str, str], Command | None]] = {
    Admit: Calls._admit,
    End: Calls._end,
    Renew: Calls._renew,
    Emit: Calls._emit,
    Claim: Calls._claim,
    Acknowledge: Calls._acknowledge,
}

_DECODE: Mapping[type, Callable[[Calls, Any, Reply], Answer]] = {
    Admit: Calls._decided,
    End: Calls._ended,
    Renew: Calls._renewed,
    Emit: Calls._emitted,
    Claim: Calls._claimed,
    Acknowledge: Calls._acknowledged,
}
