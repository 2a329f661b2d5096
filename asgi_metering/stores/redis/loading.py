"""
Loading: which rows each operation looks at, so that the rules can decide it as if they saw everything.

Held to the memory store by the differential tests. Decides nothing, writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from asgi_metering.receipts import Part, Source
from asgi_metering.rules.decide import OVERDUE_PER_ADMISSION
from asgi_metering.rules.keys import hold_of_key, key_rows
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    Backfill,
    Correct,
    Declare,
    End,
    Grow,
    Operation,
    PostGrant,
    Preview,
    Refund,
    Renew,
    ReverseGrant,
    SourceAsk,
    Undo,
)
from asgi_metering.rules.state import AccountKey, Hold
from asgi_metering.stores.redis.packed import time_text
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["load", "load_overdue"]

MORE_OVERDUE = 500
"""Overdue holds that are looked at beyond those that may be ended now: enough to tell the order, and bounded."""


async def load(copy: WorkingCopy, operation: Operation) -> None:
    """Take in what *operation* looks at."""
    names = copy.names
    match operation:
        case Admit():
            await _admit(copy, operation)
        case Preview():
            await _admit(copy, operation.ask)
        case End():
            await _end(copy, operation)
        case Renew():
            await copy.rows([names.hold(operation.id)])
        case Undo():
            ask = operation.ask
            await copy.rows([names.hold(ask.id), *(names.counter(limit.key) for limit in ask.limits)])
            await _hold_whole(copy, ask.id)
        case Grow():
            hold = await _hold_whole(copy, operation.id)
            if hold is not None:
                await _due(copy, {(hold.payer, hold.unit)})
                await _sources(copy, [(hold.payer, source) for source in operation.sources], hold.unit)
        case PostGrant():
            key = (operation.payer, operation.unit)
            await copy.rows([names.account(*key)])
            await copy.grant(key, operation.id)
        case ReverseGrant():
            key = (operation.payer, operation.unit)
            await copy.rows([names.account(*key)])
            await copy.grant(key, operation.grant)
            await copy.lines(key, operation.grant)
        case Refund():
            await _refund(copy, operation)
        case Correct() | Backfill():
            key = (operation.payer, operation.unit)
            await copy.rows([names.account(*key)])
            await copy.lines(key, operation.id)
            if operation.amount < 0:
                await copy.closed_grants(key)
        case Declare():
            await copy.rows([names.unit(name) for name, _ in operation.units])
        case _:
            raise AssertionError(f"{operation!r} is run by a script of its own")


async def _admit(copy: WorkingCopy, ask: Admit) -> None:
    names = copy.names
    key = (ask.payer, ask.unit)
    wanted = [names.hold(ask.id), *(names.counter(limit.key) for limit in ask.limits)]
    if ask.idempotency is not None:
        wanted.append(names.idempotency(ask.idempotency.key))
    if ask.charge_key is not None:
        wanted.append(names.hold(hold_of_key(ask.id)))
        wanted.extend(map(names.charge_key, key_rows(ask.charge_key)))
    await copy.rows(wanted)
    await _hold_whole(copy, ask.id)
    await _due(copy, {key, *((source.payer, ask.unit) for source in ask.sources if source.payer)})
    for lease in ask.leases:
        await copy.leases(lease.pool)
    await _sources(copy, [(source.payer or ask.payer, source) for source in ask.sources], ask.unit)
    for row_key in key_rows(ask.charge_key) if ask.charge_key is not None else ():
        await _charge_key(copy, row_key)


async def _due(copy: WorkingCopy, keys: set[AccountKey]) -> None:
    """Accounts that are taken from, and their calls that are overdue at the latest time that any of them has seen."""
    await copy.rows([copy.names.account(*key) for key in sorted(keys)])
    accounts = [account for account in map(copy.state.accounts.get, keys) if account is not None]
    now = max([copy.now, *(account.seen_at for account in accounts)])
    for account in accounts:
        if account.next_due_at <= now:
            await load_overdue(copy, (account.payer, account.unit), now, OVERDUE_PER_ADMISSION)


async def _charge_key(copy: WorkingCopy, row_key: str) -> None:
    """A charge key with the hold that it owns, and what an end of that moves."""
    await copy.rows([copy.names.charge_key(row_key)])
    row = copy.state.charge_keys.get(row_key)
    if row is not None:
        await _hold_whole(copy, row.hold)


async def _sources(copy: WorkingCopy, sources: Iterable[tuple[str, SourceAsk]], unit: str) -> None:
    names = copy.names
    wanted: list[str] = []
    rolling = []
    for who, source in sources:
        wanted.append(names.account(who, unit))
        if isinstance(source, AllowanceSource):
            bucket = (who, unit, source.name)
            wanted.append(names.bucket(*bucket))
            wanted.extend(names.window(*bucket, start) for start in source.boundaries[:-1])
            if not source.boundaries:
                rolling.append(bucket)
    await copy.rows(wanted)
    latest = copy.state.latest
    await copy.rows([names.window(*bucket, latest[bucket]) for bucket in rolling if bucket in latest])


async def _end(copy: WorkingCopy, ask: End) -> None:
    hold = await _hold_whole(copy, ask.id)
    if hold is None:
        return
    await copy.rows([copy.names.counter(pinned.key) for pinned in hold.windows if pinned.meter in ask.actual])
    first = hold.receipt
    if first is not None and (ask.amount or 0) < first.amount:
        # A late end that gives back, unless a refund has: to its own grants, and to those that paid debt since.
        await copy.lines((hold.payer, hold.unit), hold.id)
        await copy.closed_grants((hold.payer, hold.unit))


async def _hold_whole(copy: WorkingCopy, hold_id: str) -> Hold | None:
    """A hold, its account, the sources of its parts, and the keys that wait for it: what an end of it moves."""
    names, state = copy.names, copy.state
    await copy.rows([names.hold(hold_id)])
    hold = state.holds.get(hold_id)
    if hold is None:
        return None
    key = (hold.payer, hold.unit)
    wanted = [names.account(*key)]
    if hold.idempotency_key:
        wanted.append(names.idempotency(hold.idempotency_key))
    await copy.rows(wanted)
    if hold.charge_key:
        await _hold_whole(copy, hold_of_key(hold.id))
        await _charge_key(copy, hold.charge_key)
    parts = hold.parts if hold.receipt is None else (*hold.parts, *hold.receipt.parts)
    await _parts(copy, key, parts)
    return hold


async def _parts(copy: WorkingCopy, key: AccountKey, parts: Iterable[Part]) -> None:
    for part in parts:
        if part.source is Source.ALLOWANCE:
            await copy.window((*key, part.name, part.start))
        elif part.source is Source.GRANT:
            await copy.grant(key, part.name)


async def _refund(copy: WorkingCopy, ask: Refund) -> None:
    """The lines of the charge, and where its parts go back to."""
    key = (ask.payer, ask.unit)
    await copy.rows([copy.names.account(*key)])
    await copy.lines(key, ask.call)
    parts = [part for line in copy.state.lines_of(key, ask.call) for part in line.parts if part.amount > 0]
    await _parts(copy, key, parts)
    await copy.closed_grants(key)


async def load_overdue(copy: WorkingCopy, key: AccountKey, now: float, limit: int) -> None:
    """
    The holds of an account that are overdue, and the hold behind them: what says when to look next.

    More of them than may be ended: which ones are ended first, their due times tell, and those only their rows.
    """
    names = copy.names
    live = names.of_account("l", names.account(*key))
    at = time_text(now)
    overdue, behind = await copy.read(
        ("ZRANGEBYSCORE", live, "-inf", at, "LIMIT", "0", str(limit + MORE_OVERDUE)),
        ("ZRANGEBYSCORE", live, f"({at}", "+inf", "LIMIT", "0", "1"),
    )
    await copy.rows([f"{names.prefix}h:{member.decode()}" for member in (*overdue, *behind)])
    for hold in list(copy.state.live_holds(key)):
        await _hold_whole(copy, hold.id)
