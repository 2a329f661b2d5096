"""Reading: the answers to a store's queries, each as of one instant. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from asgi_metering.rules.state import Table
from asgi_metering.stores.contract import (
    AccountRows,
    AccountsAfter,
    EntriesAfter,
    HoldRow,
    LinesOf,
    LiveHolds,
    PendingEvents,
    Query,
    ReadingsKept,
    Snapshot,
)
from asgi_metering.stores.redis.link import Link, Reply
from asgi_metering.stores.redis.names import GLUE, Names, escaped, restored
from asgi_metering.stores.redis.packing import Packing
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["Reader"]

SOME = 1_000
"""Rows asked for at once."""


class Reader:
    """
    Answers queries over one link.

    Args:
        link, names, packing, scripts: Of the store.
        clock: The time of tests; None reads the server's.
    """

    def __init__(
        self, link: Link, names: Names, packing: Packing, scripts: Scripts, clock: Callable[[], float] | None
    ) -> None:
        self._link = link
        self._names = names
        self._packing = packing
        self._scripts = scripts
        self._clock = clock

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`."""
        copy = WorkingCopy(self._link, self._names, self._packing, self._clock)
        match query:
            case AccountRows(payer, unit):
                time = await self._account((payer, unit), copy)
            case AccountsAfter(payer, unit, limit):
                time = await self._accounts((payer, unit), limit, copy)
            case EntriesAfter(payer, unit, number, limit):
                key = self._names.account(payer, unit)
                keys = [self._names.of_account(kind, key) for kind in "pe"]
                time, found = await self._script("lines", keys, number, limit)
                copy.state.entries[payer, unit] = []
                copy.take_lines((payer, unit), found)
            case LinesOf(payer, unit, ref):
                copy.state.entries[payer, unit] = []
                await copy.lines((payer, unit), ref)
                copy.state.checkpoints.clear()
                copy.state.holds.clear()
                copy.state.live.clear()
                return Snapshot(copy.now, copy.state)
            case HoldRow(hold_id):
                await copy.rows([self._names.hold(hold_id)])
                copy.state.live.clear()
                return Snapshot(copy.now, copy.state)
            case LiveHolds(limit):
                time = await self._live_holds(limit, copy)
            case PendingEvents(limit):
                time = await self._events(limit, copy)
            case ReadingsKept():
                (found,) = await copy.read(("HGETALL", self._names.readings))
                _readings(copy, "", found)
                time = await self._now()
            case _:
                time = await self._everything(copy)
        return Snapshot(_time(time) if self._clock is None else self._clock(), copy.state)

    async def _script(self, name: str, keys: Sequence[str], *words: str | int) -> Any:
        (reply,) = await self._link.exchange([("EVALSHA", self._scripts.sha[name], len(keys), *keys, *words)])
        if isinstance(reply, Exception):
            raise reply
        return reply

    async def _account(self, key: tuple[str, str], copy: WorkingCopy) -> Reply:
        names, state = self._names, copy.state
        name = names.account(*key)
        keys = [name, *(names.of_account(kind, name) for kind in "Glvp")]
        prefixes = (f"{names.prefix}h:", f"{names.prefix}w:{names.rest(name)}{GLUE}")
        time, account, closed, holds, windows, checkpoint = await self._script("read_account", keys, *prefixes)
        state.grants[key], state.closed_grants[key], state.live[key] = {}, {}, set()
        if account is not None:
            copy.take(name, account)
        state.apply([(Table.GRANT, key, self._packing.grant_of(*key, text)) for text in closed])
        for rows in (holds, windows):
            for row_key, text in zip(rows[::2], rows[1::2], strict=True):
                if text is not None:
                    copy.take(row_key.decode(), text)
        if checkpoint is not None:
            copy.take(keys[-1], checkpoint)
        return time

    async def _accounts(self, after: tuple[str, str], limit: int, copy: WorkingCopy) -> Reply:
        names = self._names
        above = f"({GLUE.join(map(escaped, after))}" if any(after) else "-"
        (members,) = await copy.read(("ZRANGEBYLEX", names.accounts, above, "+", "LIMIT", "0", str(limit)))
        await copy.rows([f"{names.prefix}a:{member.decode()}" for member in members])
        copy.state.grants.clear()
        return await self._now()

    async def _now(self) -> Reply:
        (time,) = await self._link.exchange([("TIME",)])
        return time

    async def _live_holds(self, limit: int, copy: WorkingCopy) -> Reply:
        names = self._names
        (accounts,) = await copy.read(("ZRANGE", names.due, "0", "-1"))
        live = [names.of_account("l", f"{names.prefix}a:{member.decode()}") for member in accounts]
        for members in await copy.read(*[("ZRANGE", key, "0", "-1") for key in live]):
            await copy.rows([f"{names.prefix}h:{member.decode()}" for member in members])
        holds = [hold for hold in copy.state.holds.values() if hold.receipt is None]
        holds.sort(key=lambda hold: hold.created_at)
        copy.state.holds = {hold.id: hold for hold in holds[:limit]}
        copy.state.live.clear()
        return await self._now()

    async def _events(self, limit: int, copy: WorkingCopy) -> Reply:
        names = self._names
        (ids,) = await copy.read(("LRANGE", names.event_order, "0", str(limit - 1)))
        if ids:
            (texts,) = await copy.read(("HMGET", names.events, *ids))
            for event_id, text in zip(ids, texts, strict=True):
                if text is not None:
                    key = restored(event_id.decode())
                    copy.state.events[key] = self._packing.event_of(key, text)
        return await self._now()

    async def _everything(self, copy: WorkingCopy) -> Reply:
        pattern = "".join(f"\\{char}" if char in "[]*?\\" else char for char in self._names.prefix) + "*"
        time, *found = await self._script("everything", [self._names.gate], pattern)
        content = {key.decode(): rows for key, _, rows in found}
        state = copy.state
        for key, rows in content.items():
            _WHOLE.get(self._names.kind(key), _nothing)(copy, key, rows)
        texts = content.get(self._names.events, [])
        events = dict(zip(texts[::2], texts[1::2], strict=True))
        for event_id in content.get(self._names.event_order, []):
            key = restored(event_id.decode())
            state.events[key] = self._packing.event_of(key, events[event_id])
        delivered = content.get(self._names.delivered, [])
        for event_id, score in zip(delivered[::2], delivered[1::2], strict=True):
            key = restored(event_id.decode())
            event = self._packing.event_of(key, events[event_id])
            state.delivered[key] = event._replace(acknowledged_at=float(score))
        return time


def _time(reply: Reply) -> float:
    return int(reply[0]) + int(reply[1]) / 1e6


def _nothing(copy: WorkingCopy, key: str, rows: Any) -> None:
    """An index, or what is read elsewhere."""


def _row(copy: WorkingCopy, key: str, rows: Any) -> None:
    copy.take(key, rows)


def _closed_grants(copy: WorkingCopy, key: str, rows: Any) -> None:
    account = copy.names.pair(key)
    copy.state.apply([(Table.GRANT, account, copy.packing.grant_of(*account, text)) for text in rows[1::2]])


def _pool(copy: WorkingCopy, key: str, rows: Any) -> None:
    copy.take_leases(key, rows)


def _lines(copy: WorkingCopy, key: str, rows: Any) -> None:
    payer, unit = copy.names.pair(key)
    copy.take_lines((payer, unit), rows)


def _readings(copy: WorkingCopy, _: str, rows: Any) -> None:
    for member, text in zip(rows[::2], rows[1::2], strict=True):
        copy.take_reading(member.decode(), text)


_WHOLE: Mapping[str, Callable[[WorkingCopy, str, Any], None]] = {
    **dict.fromkeys("ahwWckipu", _row),
    "G": _closed_grants,
    "q": _pool,
    "e": _lines,
    "readings": _readings,
}
