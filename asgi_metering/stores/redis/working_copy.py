"""
The working copy: the rows that one operation looks at, read from the server, and what their changes come to there.

What each operation looks at is said in `loading`. Decides nothing. Remembers every command that it has read by, so
that the write can be refused if one of them would answer otherwise by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from asgi_metering.receipts import Entry
from asgi_metering.rules.state import (
    AccountKey,
    AllowanceKey,
    Change,
    DeclaredUnit,
    Hold,
    Lease,
    ReadingKey,
    State,
    Table,
)
from asgi_metering.stores.redis.link import Command, Link, Reply
from asgi_metering.stores.redis.names import GLUE, Names, escaped, restored, start_text
from asgi_metering.stores.redis.packed import time_text
from asgi_metering.stores.redis.packing import Packing

__all__ = ["WorkingCopy", "take"]


class WorkingCopy:
    """
    Rows of one operation.

    Args:
        link, names, packing: Of the store.
        clock: The time of tests; None reads the server's, with the first rows.

    Attributes:
        state: What was loaded; the rules change it.
        now: The store's time. Read with the first rows.
        reads: What was read, by command.
        trips: How many round trips that took.
        folded: By account, the ledger lines that its new checkpoint folds.
        commands: What else is to be written, after the changes: indexes that are only ever behind.
    """

    def __init__(self, link: Link, names: Names, packing: Packing, clock: Callable[[], float] | None) -> None:
        self._link = link
        self.names = names
        self.packing = packing
        self._clock = clock
        self.state = State()
        self.now = 0.0
        self.reads: dict[Command, Reply] = {}
        self.trips = 0
        self.folded: dict[AccountKey, list[Entry]] = {}
        self.commands: list[Command] = []
        self._known: set[str] = set()
        self._stored: set[str] = set()
        self._holds: dict[str, Hold] = {}

    # -- reading -------------------------------------------------------------------------------------------

    async def read(self, *commands: Command) -> list[Reply]:
        """What *commands* answer; each is asked once."""
        new = [command for command in dict.fromkeys(commands) if command not in self.reads]
        is_first = not self.trips
        if new or is_first:
            self.trips += 1
            asked: list[Command] = [*new, ("TIME",)] if is_first else new
            replies = await self._link.exchange(asked)
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            if is_first:
                seconds, micros = replies.pop()
                self.now = int(seconds) + int(micros) / 1e6 if self._clock is None else self._clock()
            self.reads.update(zip(new, replies, strict=True))
        return [self.reads[command] for command in commands]

    async def rows(self, keys: Iterable[str]) -> None:
        """Take in the rows that are kept as texts under *keys*, each once."""
        new = [key for key in dict.fromkeys(keys) if key not in self._known]
        found = await self.read(*[("GET", key) for key in new])
        self._known.update(new)
        for key, text in zip(new, found, strict=True):
            if text is not None:
                self._stored.add(key)
                self.take(key, text)

    def take(self, key: str, raw: bytes) -> None:
        """Take in one row, as it is kept under *key*."""
        take(self.state, self.packing, key, raw)
        if self.names.kind(key) == "h":
            call_id = self.names.text(key)
            self._holds[call_id] = self.state.holds[call_id]

    async def grant(self, account: AccountKey, grant_id: str) -> None:
        """A grant of an account that is loaded, if it is a closed one."""
        if self.state.grant(account, grant_id) is None:
            key = self.names.of_account("G", self.names.account(*account))
            (text,) = await self.read(("HGET", key, escaped(grant_id)))
            if text is not None:
                self._take_closed(account, text)

    async def closed_grants(self, account: AccountKey) -> None:
        """All closed grants of an account."""
        key = self.names.of_account("G", self.names.account(*account))
        for text in (await self.read(("HVALS", key)))[0]:
            self._take_closed(account, text)

    def _take_closed(self, account: AccountKey, raw: bytes) -> None:
        grant = self.packing.grant_of(*account, raw)
        if self.state.grant(account, grant.id) is None:
            self.state.apply([(Table.GRANT, account, grant)])

    async def leases(self, pool: str) -> None:
        """The live leases of a pool."""
        key = self.names.pool(pool)
        await self.read()
        (found,) = await self.read(("ZRANGEBYSCORE", key, f"({time_text(self.now)}", "+inf", "WITHSCORES"))
        self.take_leases(key, found)

    def take_leases(self, key: str, found: Sequence[bytes]) -> None:
        """Take in leases, as members and scores."""
        pool = self.names.text(key)
        for member, score in zip(found[::2], found[1::2], strict=True):
            call_id = restored(member.decode())
            self.state.apply([(Table.LEASE, (pool, call_id), Lease(pool, call_id, float(score)))])

    async def lines(self, account: AccountKey, ref: str) -> None:
        """The ledger lines of an account about *ref*."""
        names = self.names
        key = names.account(*account)
        word = escaped(ref)
        refs = ("ZRANGEBYLEX", names.of_account("r", key), f"[{word}{GLUE}", f"({word} ")
        beside = (names.of_account("p", key), names.hold(ref))
        found, *_ = await self.read(refs, *[("GET", name) for name in beside])
        await self.rows(beside)
        checkpoint = self.state.checkpoints.get(account)
        folded = 0 if checkpoint is None else checkpoint.number
        numbers = {int(member.rpartition(GLUE.encode())[2]) for member in found}
        hold = self._holds.get(ref)
        if hold is not None and (hold.payer, hold.unit) == account:
            numbers.add(_line_of(hold) or 0)
        lines = names.of_account("e", key)
        places = [str(number - folded - 1) for number in sorted(numbers) if number > folded]
        for text in await self.read(*[("LINDEX", lines, place) for place in places]):
            if text is None:
                # Folded between the two reads: the write will see that.
                continue
            self.state.apply([(Table.ENTRY, account, self.packing.entry_of(key, text))])

    def take_lines(self, account: AccountKey, found: Sequence[bytes]) -> None:
        """Take in ledger lines in their order."""
        key = self.names.account(*account)
        self.state.apply([(Table.ENTRY, account, self.packing.entry_of(key, raw)) for raw in found])

    async def window(self, key: AllowanceKey) -> None:
        """One window of an allowance, and which one is its last."""
        await self.rows([self.names.bucket(*key[:3]), self.names.window(*key)])

    async def event(self, event_id: str) -> None:
        """One event of the outbox."""
        (text,) = await self.read(("HGET", self.names.events, escaped(event_id)))
        if text is not None:
            self.state.events[event_id] = self.packing.event_of(event_id, text)

    async def readings(self, members: Iterable[str]) -> None:
        """Parts of readings, by name."""
        asked = list(members)
        found = await self.read(*[("HGET", self.names.readings, member) for member in asked])
        for member, text in zip(asked, found, strict=True):
            if text is not None:
                self.take_reading(member, text)

    def take_reading(self, member: str, raw: bytes) -> None:
        """Take in one part of a reading."""
        reading = self.packing.reading_of(member, raw)
        self.state.readings[reading.series, reading.part] = reading

    # -- writing -------------------------------------------------------------------------------------------

    def writes(self, changes: Iterable[Change]) -> list[Command]:
        """
        The commands that *changes* come to: of many changes to a row the last one.

        Raises:
            AmountError: A row would need more than what is counted exactly.
        """
        commands: list[Command] = []
        last: dict[tuple[str, Any], Any] = {}
        for table, key, row in changes:
            if table == Table.ENTRY:
                commands.extend(self._entry(key, row))
            elif table == Table.GRANT:
                last[table, (key, row.id)] = row
            elif table == Table.HOLD and row is None:
                # Another hold of the same id may follow: this one goes first, with all that points at it.
                last.pop((table, key), None)
                commands.extend(self._gone(key))
            else:
                last.pop((table, key), None)
                last[table, key] = row
        accounts = {key for (table, key) in last if table == Table.ACCOUNT}
        accounts |= {key[0] for (table, key) in last if table == Table.GRANT}
        for account in sorted(accounts):
            commands.extend(self._account(account))
        for (table, key), row in last.items():
            if table != Table.ACCOUNT:
                commands.extend(_WRITE[table](self, key, row))
        return [*commands, *self.commands]

    def _account(self, key: AccountKey) -> Iterable[Command]:
        account = self.state.accounts.get(key)
        if account is None:
            # Closed grants may be put before it.
            return
        name = self.names.account(*key)
        text = self.packing.account(account, self.state.grants.get(key, {}).values())
        yield ("SET", name, text)
        if name not in self._stored:
            yield ("ZADD", self.names.accounts, "0", self.names.rest(name))

    def _grant(self, key: tuple[AccountKey, str], row: Any) -> Iterable[Command]:
        closed = self.names.of_account("G", self.names.account(*key[0]))
        if row.is_open:
            yield ("HDEL", closed, escaped(row.id))
        else:
            yield ("HSET", closed, escaped(row.id), self.packing.grant(row))

    def _entry(self, account: AccountKey, row: Any) -> Iterable[Command]:
        names = self.names
        key = names.account(*account)
        rest = names.rest(key)
        yield ("RPUSH", names.of_account("e", key), self.packing.entry(row))
        yield ("ZADD", names.of_account("r", key), "0", f"{escaped(row.ref)}{GLUE}{row.number}")
        yield ("ZADD", names.oldest_lines, "NX", time_text(row.at), rest)

    def _gone(self, key: str) -> Iterable[Command]:
        names = self.names
        name = names.hold(key)
        yield ("DEL", name)
        yield ("ZREM", names.ended, names.rest(name))
        hold = self._holds.get(key)
        if hold is None:
            return
        account = names.account(hold.payer, hold.unit)
        if hold.receipt is None:
            live = names.of_account("l", account)
            yield ("ZREM", live, names.rest(name))
            yield ("FIRST", names.due, names.rest(account), live)
        elif _line_of(hold) is not None:
            # The hold said where its line is; from now on the index does.
            number = str(hold.receipt.entry)
            refs, checkpoint = names.of_account("r", account), names.of_account("p", account)
            yield ("REF", refs, checkpoint, f"{escaped(key)}{GLUE}{number}", number)

    def _hold(self, key: str, row: Hold) -> Iterable[Command]:
        names = self.names
        name = names.hold(key)
        member = names.rest(name)
        account = names.account(row.payer, row.unit)
        live = names.of_account("l", account)
        yield ("SET", name, self.packing.hold(row))
        if row.receipt is None:
            yield ("ZADD", live, time_text(row.expires_at), member)
        else:
            yield ("ZREM", live, member)
            yield ("ZADD", names.ended, time_text(row.receipt.at), member)
        yield ("FIRST", names.due, names.rest(account), live)

    def _allowance(self, key: AllowanceKey, row: Any) -> Iterable[Command]:
        names = self.names
        name, bucket = names.window(*key), names.bucket(*key[:3])
        windows = names.of_account("v", names.account(*key[:2]))
        member = f"{escaped(key[2])}{GLUE}{start_text(key[3])}"
        latest = self.state.latest.get(key[:3])
        if row is None:
            yield ("DEL", name)
            yield ("ZREM", names.past_windows, name)
            yield ("SREM", windows, member)
        else:
            yield ("SET", name, self.packing.window(row))
            if name not in self._stored:
                yield ("ZADD", names.past_windows, time_text(row.end), name)
                yield ("SADD", windows, member)
        yield ("DEL", bucket) if latest is None else ("SET", bucket, start_text(latest))

    def _counter(self, key: str, row: Any) -> Iterable[Command]:
        names = self.names
        name = names.counter(key)
        if row is None:
            yield ("DEL", name)
            yield ("ZREM", names.past_counters, name)
        else:
            yield ("SET", name, self.packing.counter(row))
            yield ("ZADD", names.past_counters, time_text(row.end + (row.end - row.start)), name)

    def _lease(self, key: tuple[str, str], row: Any) -> Iterable[Command]:
        pool, member = self.names.pool(key[0]), escaped(key[1])
        yield ("ZREM", pool, member) if row is None else ("ZADD", pool, time_text(row.expires_at), member)
        yield ("FIRST", self.names.pools, pool, pool)

    def _event(self, key: str, row: Any) -> Iterable[Command]:
        names = self.names
        if row is None:
            # Only what was delivered goes, so it is none of those that wait.
            yield ("HDEL", names.events, escaped(key))
            yield ("ZREM", names.delivered, escaped(key))
        else:
            text = self.packing.event(row)
            yield ("EVENT", names.events, names.event_order, escaped(key), text, names.delivered)

    def _charge_key(self, key: str, row: Any) -> Iterable[Command]:
        name = self.names.charge_key(key)
        if row is None:
            yield ("DEL", name)
            yield ("ZREM", self.names.past_charge_keys, name)
        else:
            yield ("SET", name, self.packing.charge_key(row))
            yield ("ZADD", self.names.past_charge_keys, time_text(row.end), name)

    def _idempotency(self, key: str, row: Any) -> Iterable[Command]:
        name = self.names.idempotency(key)
        if row is None:
            yield ("DEL", name)
            yield ("ZREM", self.names.past_idempotency, name)
        else:
            yield ("SET", name, self.packing.idempotency(row))
            yield ("ZADD", self.names.past_idempotency, time_text(row.expires_at), name)

    def _checkpoint(self, key: AccountKey, row: Any) -> Iterable[Command]:
        """The lines that it folds are those that were loaded, up to its number."""
        names = self.names
        account = names.account(*key)
        refs, lines = names.of_account("r", account), names.of_account("e", account)
        folded = self.folded.pop(key)
        yield ("SET", names.of_account("p", account), self.packing.checkpoint(row))
        yield ("LTRIM", lines, str(len(folded)), "-1")
        for line in folded:
            yield ("ZREM", refs, f"{escaped(line.ref)}{GLUE}{line.number}")
        yield ("OLDEST", names.oldest_lines, names.rest(account), lines)

    def _unit(self, key: str, row: Any) -> Iterable[Command]:
        yield ("SET", self.names.unit(key), str(row.scale))

    def _reading(self, key: ReadingKey, row: Any) -> Iterable[Command]:
        names = self.names
        name = names.reading(*key)
        if row is None:
            yield ("HDEL", names.readings, name)
            yield ("ZREM", names.past_readings, name)
        else:
            yield ("HSET", names.readings, name, self.packing.reading(row))
            yield ("ZADD", names.past_readings, time_text(row.observed_at), name)


def _line_of(hold: Hold) -> int | None:
    """Number of the ledger line of a hold's own settlement."""
    return hold.receipt.entry if hold.receipt is not None and hold.receipt.id == hold.id else None


def take(state: State, packing: Packing, key: str, raw: bytes) -> None:
    """Take one row into *state*, as it is kept under *key*."""
    _TAKE[packing.names.kind(key)](state, packing, key, raw)


# -- rows by the letter of their key -----------------------------------------------------------------------


def _take_account(state: State, packing: Packing, key: str, raw: bytes) -> None:
    account, grants = packing.account_of(key, raw)
    place = (account.payer, account.unit)
    state.apply([(Table.ACCOUNT, place, account), *((Table.GRANT, place, grant) for grant in grants)])


def _take_hold(state: State, packing: Packing, key: str, raw: bytes) -> None:
    hold = packing.hold_of(packing.names.text(key), raw)
    state.apply([(Table.HOLD, hold.id, hold)])


def _take_window(state: State, packing: Packing, key: str, raw: bytes) -> None:
    window = packing.window_of(key, raw)
    # Which window is the last one is kept apart: here, not all of them are known.
    state.allowances[window.payer, window.unit, window.name, window.start] = window


def _take_bucket(state: State, packing: Packing, key: str, raw: bytes) -> None:
    payer, unit, name = packing.names.texts(key)
    state.latest[payer, unit, name] = float(raw)


def _take_counter(state: State, packing: Packing, key: str, raw: bytes) -> None:
    counter = packing.counter_of(key, raw)
    state.counters[counter.key] = counter


def _take_charge_key(state: State, packing: Packing, key: str, raw: bytes) -> None:
    row = packing.charge_key_of(key, raw)
    state.charge_keys[row.key] = row


def _take_idempotency(state: State, packing: Packing, key: str, raw: bytes) -> None:
    row = packing.idempotency_of(key, raw)
    state.idempotency_keys[row.key] = row


def _take_checkpoint(state: State, packing: Packing, key: str, raw: bytes) -> None:
    row = packing.checkpoint_of(key, raw)
    state.checkpoints[row.payer, row.unit] = row


def _take_unit(state: State, packing: Packing, key: str, raw: bytes) -> None:
    name = packing.names.text(key)
    state.units[name] = DeclaredUnit(name, int(raw))


_TAKE: Mapping[str, Callable[[State, Packing, str, bytes], None]] = {
    "a": _take_account,
    "h": _take_hold,
    "w": _take_window,
    "W": _take_bucket,
    "c": _take_counter,
    "k": _take_charge_key,
    "i": _take_idempotency,
    "p": _take_checkpoint,
    "u": _take_unit,
}

_WRITE: Mapping[str, Callable[[WorkingCopy, Any, Any], Iterable[Command]]] = {
    Table.GRANT: WorkingCopy._grant,
    Table.HOLD: WorkingCopy._hold,
    Table.ALLOWANCE: WorkingCopy._allowance,
    Table.COUNTER: WorkingCopy._counter,
    Table.LEASE: WorkingCopy._lease,
    Table.EVENT: WorkingCopy._event,
    Table.CHARGE_KEY: WorkingCopy._charge_key,
    Table.IDEMPOTENCY: WorkingCopy._idempotency,
    Table.CHECKPOINT: WorkingCopy._checkpoint,
    Table.UNIT: WorkingCopy._unit,
    Table.READING: WorkingCopy._reading,
}
