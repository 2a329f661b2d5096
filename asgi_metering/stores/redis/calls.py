"""
Calls: the operations that scripts run, as keys and words, and their replies as answers.

What a script tells is as short as the rules allow: refusals, windows and resets are computed here, by the rules, from
the very rows that the script saw. Knows how both sides pack. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

from asgi_metering.amounts import MAX_AMOUNT, check_parts
from asgi_metering.decisions import Decision, WindowState
from asgi_metering.errors import StoreError
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules import readings
from asgi_metering.rules.admission import admit
from asgi_metering.rules.buckets import Filling
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
    Share,
    SourceAsk,
    WindowKind,
)
from asgi_metering.rules.state import NEVER, Counter, Lease, State, build
from asgi_metering.rules.windows import in_bucket, leaves_after_s, look, window_state
from asgi_metering.sources import WALLET
from asgi_metering.stores.redis.link import Command, Reply
from asgi_metering.stores.redis.names import Names, escaped, restored
from asgi_metering.stores.redis.packed import (
    BASES,
    ENDERS,
    WINDOW,
    doubles,
    json_text,
    receipt_of,
    time_text,
    who_of,
    words,
)
from asgi_metering.stores.redis.packing import Packing
from asgi_metering.stores.redis.parts import Part
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.working_copy import take

__all__ = ["Call", "Calls"]

MAX_REMEMBERED = 8_192
"""Of each kind of words that come again: a few hundred bytes each."""

_ADMISSION = Struct(">cHH4d")
_LIMIT = Struct(">B3d")
_SOURCE = Struct(">BBBdHH")
_POOL = Struct(">d")
_END = Struct(">cHHBd4B")
_BEAT = Struct(">cHHd")
_PART = Struct(">cHHBdd")
_ADMITTED = Struct(">x3dB")
_JOINED = Struct(">xd")
_ENDED = Struct(">cI")
_LENGTH = Struct(">I")
_TIME = Struct(">d")

_LIMIT_KINDS = (
    WindowKind.FIXED,
    WindowKind.CALENDAR,
    WindowKind.SLIDING,
    WindowKind.MOVING,
    WindowKind.BUCKET,
)
_MOVING, _BUCKET = WindowKind.MOVING, WindowKind.BUCKET
_SIMPLE = (WindowKind.FIXED, WindowKind.CALENDAR)
_WALLET, _CALENDAR, _ROLLING = range(3)
_SETTLED, _RELEASED = range(2)
_JOIN = ord("J")
_NO_KEYS: list[str] = []
_BASIS_CODES = {basis: code for code, basis in enumerate(BASES)}
"""As the scripts call them."""


Tell: TypeAlias = Callable[[Any, list[str], list[bytes]], bool]


class Call(NamedTuple):
    """Admissions, ends and heartbeats, one or several: the keys that they touch for certain, and their words."""

    keys: list[str]
    words: list[bytes]


class Calls:
    """
    Commands for operations.

    Args:
        names, packing, scripts: Of the store.
        halt: The key by which the store's own commands are told to stop.

    Attributes:
        tell: By type, what adds an operation to keys and words of the script of calls, and returns whether it runs it.
            It raises as `call` does, and then adds nothing.
    """

    def __init__(self, names: Names, packing: Packing, scripts: Scripts, halt: str) -> None:
        self._names = names
        self._packing = packing
        self._sha = scripts.sha
        self._function = scripts.calls
        self._gates = (names.gate, halt)
        self._outbox = (*self._gates, names.events, names.event_order)
        self._delivered = names.delivered
        self._readings = (names.readings, names.past_readings)
        # The same few accounts pay from the same few sources, until the calendar moves on.
        self._sources = lru_cache(maxsize=MAX_REMEMBERED)(self._make_sources)
        self._limits = lru_cache(maxsize=MAX_REMEMBERED)(self._make_limits)
        self.tell: Mapping[type, Tell] = {Admit: self._admit, End: self._end, Renew: self._renew, Part: self._part}

    def call(self, operation: Operation) -> Call | None:
        """
        *operation* for the script of calls; None if that does not run it.

        Raises:
            AmountError: The operation is a mistake.
            TypeError, ValueError: Something in it is not JSON-safe.
        """
        call, tell = Call([], []), self.tell.get(type(operation))
        return None if tell is None or not tell(operation, *call) else call

    def together(self, call: Call, now: str, token: str) -> Command:
        """
        The command that runs them.

        Args:
            call: One, or several in their order.
            now: The time of tests; empty for the server's.
            token: Of the commands that are sent together; empty for a lone one.
        """
        keys, told = call
        gates = self._gates
        return ("FCALL", self._function, len(gates) + len(keys), *gates, *keys, now, token, *told)

    def command(self, operation: Operation, now: str, token: str) -> Command | None:
        """The command for an *operation* that has a script of its own; None if no script runs it."""
        encode = _COMMANDS.get(type(operation))
        return None if encode is None else encode(self, operation, now, token)

    def answer(self, operation: Operation, reply: Reply) -> Answer:
        """What *reply* says about *operation*."""
        return _DECODE[type(operation)](self, operation, reply)

    # -- admissions ----------------------------------------------------------------------------------------

    def _admit(self, ask: Admit, keys: list[str], told: list[bytes]) -> bool:
        # fmt: off
        # Together: by their names they cost several times as much.
        (call_id, payer, unit, amount, minimum, sources, limits, leases, ttl_s, grace_s, in_doubt, line, facts,
         charge_key, claim) = ask
        # fmt: on
        if not 0 <= minimum <= amount <= MAX_AMOUNT:
            # The rules say what is wrong with it.
            return False
        counters, limits_told = self._limits(limits)
        account, source_keys, sources_told, who = self._sources(sources, payer, unit)
        hold, rare_keys, rare = self._names.hold(call_id), _NO_KEYS, b""
        if leases or charge_key is not None or claim is not None:
            rare_keys, rare = self._rare(ask)
        count = 2 + len(counters) + len(rare_keys) + len(source_keys)
        numbers = _ADMISSION.pack(b"A", count, 4, amount, minimum, ttl_s, grace_s) + rare
        told += (numbers, limits_told, sources_told, who + self._packing.kept(line, in_doubt, facts))
        keys += (hold, account, *counters, *rare_keys, *source_keys)
        return True

    def _rare(self, ask: Admit) -> tuple[list[str], bytes]:
        """Slots and keys, which most calls do not have."""
        keys: list[str] = []
        names, claim, charge = self._names, ask.idempotency, ask.charge_key
        claimed = b"\0" + _TIME.pack(0.0) + words("")
        if claim is not None:
            keys.append(names.idempotency(claim.key))
            claimed = b"\1" + _TIME.pack(claim.ttl_s) + words(claim.fingerprint)
        charged = b"\0" + words("")
        if charge is not None:
            keys.extend(map(names.charge_key, key_rows(charge)))
            charged = _charge_words(charge)
        pools = [words(names.pool(lease.pool)) + _POOL.pack(lease.limit) for lease in ask.leases]
        return keys, words(b"".join(pools)) + charged + claimed

    def _make_limits(self, limits: tuple[LimitAsk, ...]) -> tuple[list[str], bytes]:
        """The keys of the counters, and the words that say how they count."""
        told = []
        for _, _, kind, limit, window_s, cost, meter, boundaries, refill in limits:
            counted = "" if meter == "requests" else meter
            told.append(_LIMIT.pack(_LIMIT_KINDS.index(kind), limit, window_s, cost))
            # A bucket has no boundaries, and nothing else flows back.
            told.append(words(counted, doubles((refill,) if refill else boundaries)))
        return [self._names.counter(limit.key) for limit in limits], b"".join(told)

    def _make_sources(
        self, sources: tuple[SourceAsk, ...], payer: str, unit: str
    ) -> tuple[str, list[str], bytes, bytes]:
        """Who pays: the account, the keys that sources name, what to do with them, and what a hold says of it."""
        names = self._names
        keys: list[str] = []
        told: list[bytes] = []
        last: tuple[str, str] | None = None
        for source in sources:
            account = own = 0
            if source.payer and source.payer != payer:
                keys.append(names.account(source.payer, unit))
                account = len(keys)
            who = source.payer or payer
            # The call's own payer is told once for all sources, and again only with the name of a group.
            pays = self._packing.who(who, unit, source.group) if source.group or account else b""
            kind, limit, name, span = _WALLET, 0, WALLET, b""
            if isinstance(source, AllowanceSource):
                limit, name = source.limit, source.name
                keys.append(names.bucket(who, unit, name))
                own = len(keys)
                keys.extend(names.window(who, unit, name, edge) for edge in source.boundaries[:-1])
                kind = _CALENDAR if source.boundaries else _ROLLING
                span = doubles(source.boundaries or (source.window_s,))
            else:
                limit = source.overdraft
            place = (source.payer, source.group)
            told.append(_SOURCE.pack(kind, place != last, source.split, limit, account, own))
            told.append(words(pays, escaped(name), span))
            last = place
        # Behind who pays stands what is rare, for which most calls have nothing to say.
        pays = words(self._packing.who(payer, unit, ""), b"")
        return names.account(payer, unit), keys, b"".join(told), pays

    def _decided(self, ask: Admit, reply: Reply) -> Decision:
        if type(reply) is list:
            return self._refused(ask, reply)
        if reply[0] == _JOIN:
            (now,) = _JOINED.unpack_from(reply)
            (length,) = _LENGTH.unpack_from(reply, _JOINED.size)
            at = _JOINED.size + _LENGTH.size
            payer, _, group = who_of(reply[at : at + length])
            windows = self._windows(ask, reply, at + length, now)
            return Decision(ask.id, now, windows=windows, payer=payer, group=group, joined=True)
        now, held, available, last = _ADMITTED.unpack_from(reply)
        windows = self._windows(ask, reply, _ADMITTED.size, now) if ask.limits else ()
        if not last:
            return Decision(ask.id, now, windows=windows)
        source = ask.sources[last - 1]
        name = source.name if isinstance(source, AllowanceSource) else WALLET
        payer, group = source.payer or ask.payer, source.group
        # fmt: off
        return build(Decision, (
            ask.id, now, None, int(held), int(available), name, windows, False, payer, group, False, None, None, (),
        ))
        # fmt: on

    def _windows(self, ask: Admit, reply: bytes, at: int, now: float) -> tuple[WindowState, ...]:
        """What the limits tell after the call, from the counters as it left them."""
        windows = []
        for limit, (start, end, count, previous) in zip(ask.limits, WINDOW.iter_unpack(reply[at:]), strict=True):
            name, key, kind, most, window_s, cost, meter, _, _ = limit
            if kind in _SIMPLE:
                left = int(most - count) if count < most else 0
                resets = end - now if now > start else end - start
                windows.append(build(WindowState, (name, most, left, resets, window_s, meter)))
            elif kind is _BUCKET:
                # Since when it is not full, the time that counts, and what was taken.
                found = Filling(start, int(count) - cost, end)
                windows.append(window_state(in_bucket(limit, found, now), taken=True))
            elif kind is _MOVING:
                # When the oldest call leaves, instead of an end.
                left, resets = max(0, most - int(count)), leaves_after_s(end, now)
                windows.append(build(WindowState, (name, most, left, resets, window_s, meter)))
            else:
                before = Counter(key, start, end, int(count) - cost, int(previous))
                seen = look(limit, before, now)
                if seen is None:
                    raise AssertionError(f"a sliding window has no calendar: {limit!r}")
                windows.append(window_state(seen, taken=True))
        return tuple(windows)

    def _refused(self, ask: Admit, reply: Reply) -> Decision:
        """Why the call may not run: the rules, on the rows that the script saw."""
        _, time, counts, rows, further = reply
        call = self.call(ask)
        if call is None:
            raise AssertionError(f"{ask!r} was never sent")
        state = State()
        pairs = [*zip(call.keys, rows, strict=True), *zip(further[::2], further[1::2], strict=True)]
        for key, row in pairs:
            if row is not None:
                take(state, self._packing, key if isinstance(key, str) else key.decode(), row)
        for lease, live in zip(ask.leases, counts, strict=False):
            state.leases[lease.pool] = {str(n): Lease(lease.pool, str(n), NEVER) for n in range(live)}
        decision, _ = admit(state, ask, *_TIME.unpack(time))
        if decision.admitted:
            raise StoreError(f"The scripts of the Redis store refuse {ask!r}, which the rules admit. Report this.")
        return decision

    # -- ends ----------------------------------------------------------------------------------------------

    def _end(self, ask: End, keys: list[str], told: list[bytes]) -> bool:
        call_id, amount, basis, estimated, by, actual, event, failed, reply = ask
        state = _SETTLED
        if amount is None:
            state, amount, basis = _RELEASED, 0, Basis.NONE
        else:
            check_parts(amount, "charge")
        hold = self._names.hold(call_id)
        numbers = _END.pack(b"E", 1, 2, state, amount, _BASIS_CODES[basis], estimated, ENDERS.index(by), failed)
        if actual or reply is not None:
            used = [words(meter) + _POOL.pack(count) for meter, count in actual.items()]
            numbers += words("" if reply is None else json_text(reply)) + b"".join(used)
        told += (numbers, b"" if event is None else json_text(event).encode())
        keys.append(hold)
        return True

    def _ended(self, ask: End, reply: Reply) -> Receipt:
        kind, length = _ENDED.unpack_from(reply)
        if kind == b"U":
            (now,) = _TIME.unpack_from(reply, 1)
            return Receipt(
                ask.id, "", "", 0, 0, Basis.NONE, False, ask.by, (), None, now, None, applied=False, known=False
            )
        at = _ENDED.size + length
        payer, unit, _ = who_of(reply[_ENDED.size : at])
        receipt = receipt_of(reply, payer, unit, at)
        if receipt is None:
            raise AssertionError(f"the end of {ask.id!r} has no receipt")
        return receipt if kind == b"E" else receipt._replace(applied=False)

    # -- heartbeats and the outbox -------------------------------------------------------------------------

    def _renew(self, beat: Renew, keys: list[str], told: list[bytes]) -> bool:
        hold = self._names.hold(beat.id)
        told.append(_BEAT.pack(b"R", 1, 1, check_parts(beat.observed, "observed amount")))
        keys.append(hold)
        return True

    def _part(self, ask: Part, keys: list[str], told: list[bytes]) -> bool:
        hold = self._names.hold(ask.id)
        used = [words(meter) + _POOL.pack(count) for meter, count in ask.actual.items()]
        told.append(_PART.pack(b"P", 1, 1, ask.what, ask.ttl_s, ask.grace_s) + b"".join(used))
        keys.append(hold)
        return True

    def _done(self, _: Any, reply: Reply) -> bool:
        return bool(reply)

    def _emit(self, ask: Emit, now: str, token: str) -> Command:
        told = [word for event_id, event in ask.events for word in (escaped(event_id), json_text(event))]
        return ("EVALSHA", self._sha["emit"], 5, *self._outbox, self._delivered, now, token, *told)

    def _emitted(self, ask: Emit, _: Reply) -> int:
        return len(ask.events)

    def _claim(self, ask: Claim, now: str, token: str) -> Command:
        return ("EVALSHA", self._sha["claim"], 4, *self._outbox, now, token, ask.limit, time_text(ask.lease_s))

    def _claimed(self, _: Claim, reply: Reply) -> Answer:
        found = reply[1]
        pairs = zip(found[::2], found[1::2], strict=True)
        return tuple([self._packing.event_of(restored(key.decode()), row) for key, row in pairs])

    def _acknowledge(self, ask: Acknowledge, now: str, token: str) -> Command:
        keys = (*self._outbox, self._delivered)
        return ("EVALSHA", self._sha["acknowledge"], 5, *keys, now, token, *map(escaped, ask.ids))

    def _acknowledged(self, _: Acknowledge, reply: Reply) -> int:
        return int(reply[1])

    def _share(self, ask: Share, now: str, token: str) -> Command:
        readings.check(ask)
        told: list[str] = []
        for series, part, observed_at, text in ask.readings:
            told += (self._names.reading(series, part), time_text(observed_at), text)
        keys = (*self._gates, *self._readings)
        return ("EVALSHA", self._sha["share"], 4, *keys, now, token, readings.MAX_KEPT, *told)

    def _shared(self, ask: Share, reply: Reply) -> Answer:
        pairs = zip(ask.readings, reply[1], strict=True)
        return tuple([self._packing.reading_of(self._names.reading(*each[:2]), raw) for each, raw in pairs])


def _charge_words(ask: KeyAsk) -> bytes:
    kind = _CALENDAR if ask.boundaries else _ROLLING
    return bytes((kind,)) + words(doubles(ask.boundaries or (ask.window_s,)))


_COMMANDS: Mapping[type, Callable[[Calls, Any, str, str], Command]] = {
    Emit: Calls._emit,
    Claim: Calls._claim,
    Acknowledge: Calls._acknowledge,
    Share: Calls._share,
}

_DECODE: Mapping[type, Callable[[Calls, Any, Reply], Answer]] = {
    Admit: Calls._decided,
    End: Calls._ended,
    Renew: Calls._done,
    Part: Calls._done,
    Emit: Calls._emitted,
    Claim: Calls._claimed,
    Acknowledge: Calls._acknowledged,
    Share: Calls._shared,
}
