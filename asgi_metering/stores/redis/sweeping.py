"""
Sweeping: ending what is overdue and forgetting what is old, one short transaction after another.

One transaction for everything would never find all of it unchanged on a busy server. The rules say what goes, on the
rows that the indexes show. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from asgi_metering.rules.operations import Sweep
from asgi_metering.rules.retention import forgotten
from asgi_metering.rules.settlement import end_overdue
from asgi_metering.rules.state import AccountKey, Change, Event, Table
from asgi_metering.stores.redis.loading import load_overdue
from asgi_metering.stores.redis.names import Names, restored
from asgi_metering.stores.redis.packed import time_text
from asgi_metering.stores.redis.parts import NOBODY, taken_back
from asgi_metering.stores.redis.transaction import Transactions
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = ["sweep"]

CANDIDATES = 4
"""Rows looked at for each one that may be forgotten: some that are past are still in use, and stay."""


async def sweep(transactions: Transactions, ask: Sweep) -> int:
    """See `operations.Sweep`. Atomic per account, and per kind of what is forgotten. Returns rows touched."""
    touched = 0
    left = ask.limit
    for account in await transactions.run(_due_accounts):
        changes = await transactions.run(_ended(account, left))
        touched += len(changes)
        left -= sum(1 for table, _, _ in changes if table == Table.HOLD)
        if not left:
            break
    for load in (
        _old_holds,
        _dead_leases,
        _past_counters,
        _past_windows,
        _past_charge_keys,
        _past_keys,
        _delivered_events,
        _past_readings,
        _old_lines,
    ):
        touched += await transactions.run(_forgotten(load, ask))
    return touched


async def _due_accounts(copy: WorkingCopy) -> tuple[list[AccountKey], list[Change]]:
    await copy.read()
    (found,) = await copy.read(("ZRANGEBYSCORE", copy.names.due, "-inf", time_text(copy.now)))
    # Only the time counts here: each account is read again on its own.
    copy.reads.clear()
    return sorted(_account(copy.names, member) for member in found), []


def _account(names: Names, member: bytes) -> AccountKey:
    return names.pair(f"{names.prefix}a:{member.decode()}")


def _ended(key: AccountKey, limit: int) -> Callable[[WorkingCopy], Awaitable[tuple[list[Change], list[Change]]]]:
    """Look at one account, if one of its holds is overdue by the store's time, not only by its own."""

    async def work(copy: WorkingCopy) -> tuple[list[Change], list[Change]]:
        names = copy.names
        name = names.account(*key)
        live = names.of_account("l", name)
        await copy.rows([name])
        (overdue,) = await copy.read(("ZRANGEBYSCORE", live, "-inf", time_text(copy.now), "LIMIT", "0", "1"))
        copy.commands.append(("FIRST", names.due, names.rest(name), live))
        if not overdue:
            return [], []
        account = copy.state.accounts.get(key)
        now = copy.now if account is None else max(copy.now, account.seen_at)
        await load_overdue(copy, key, now, limit)
        if key == NOBODY:
            return await taken_back(copy, limit)
        changes = end_overdue(copy.state, key, now, limit)
        return changes, changes

    return work


def _forgotten(
    load: Callable[[WorkingCopy, Sweep], Awaitable[None]], ask: Sweep
) -> Callable[[WorkingCopy], Awaitable[tuple[int, list[Change]]]]:
    """Load one kind of what is old, and let the rules say what of it goes."""

    async def work(copy: WorkingCopy) -> tuple[int, list[Change]]:
        await copy.read()
        await load(copy, ask)
        lines = {key: list(rows) for key, rows in copy.state.entries.items()}
        written: list[Change] = []
        for changes in forgotten(copy.state, ask, copy.now):
            copy.state.apply(changes)
            written.extend(changes)
        for table, key, row in written:
            if table == Table.CHECKPOINT:
                copy.folded[key] = [line for line in lines[key] if line.number <= row.number]
        return len(written), written

    return work


async def _past(copy: WorkingCopy, index: str, before: float, limit: int) -> list[str]:
    """Members of *index* up to *before*: more than may go now."""
    (found,) = await copy.read(
        ("ZRANGEBYSCORE", index, "-inf", time_text(before), "LIMIT", "0", str(CANDIDATES * limit))
    )
    # Others may add to the index, or take from it: what counts is that the rows are as they were.
    del copy.reads["ZRANGEBYSCORE", index, "-inf", time_text(before), "LIMIT", "0", str(CANDIDATES * limit)]
    return [member.decode() for member in found]


async def _old_holds(copy: WorkingCopy, ask: Sweep) -> None:
    names = copy.names
    # A little more than what is old enough: the rule itself compares with its own rounding.
    old = await _past(copy, names.ended, copy.now - ask.keep_holds_s + 1.0, ask.limit)
    await copy.rows([f"{names.prefix}h:{member}" for member in old])


async def _dead_leases(copy: WorkingCopy, ask: Sweep) -> None:
    for pool in await _past(copy, copy.names.pools, copy.now, ask.limit):
        (found,) = await copy.read(
            ("ZRANGEBYSCORE", pool, "-inf", time_text(copy.now), "WITHSCORES", "LIMIT", "0", str(ask.limit))
        )
        copy.take_leases(pool, found)
        copy.commands.append(("FIRST", copy.names.pools, pool, pool))


async def _past_counters(copy: WorkingCopy, ask: Sweep) -> None:
    await copy.rows(await _past(copy, copy.names.past_counters, copy.now, ask.limit))


async def _past_windows(copy: WorkingCopy, ask: Sweep) -> None:
    names = copy.names
    for name in await _past(copy, names.past_windows, copy.now - ask.keep_windows_s + 1.0, ask.limit):
        payer, unit, window, start = names.texts(name)
        await copy.window((payer, unit, window, float(start)))


async def _past_charge_keys(copy: WorkingCopy, ask: Sweep) -> None:
    await copy.rows(await _past(copy, copy.names.past_charge_keys, copy.now - ask.keep_holds_s + 1.0, ask.limit))


async def _past_keys(copy: WorkingCopy, ask: Sweep) -> None:
    await copy.rows(await _past(copy, copy.names.past_idempotency, copy.now, ask.limit))


async def _delivered_events(copy: WorkingCopy, ask: Sweep) -> None:
    """Without what they say: the rule looks at the time alone, and nothing changes it."""
    before = time_text(copy.now - ask.keep_events_s + 1.0)
    limit = str(CANDIDATES * ask.limit)
    look = ("ZRANGEBYSCORE", copy.names.delivered, "-inf", before, "WITHSCORES", "LIMIT", "0", limit)
    (found,) = await copy.read(look)
    del copy.reads[look]
    for member, score in zip(found[::2], found[1::2], strict=True):
        event_id = restored(member.decode())
        copy.state.delivered[event_id] = Event(event_id, 0.0, {}, acknowledged_at=float(score))


async def _past_readings(copy: WorkingCopy, ask: Sweep) -> None:
    before = copy.now - ask.keep_readings_s + 1.0
    await copy.readings(await _past(copy, copy.names.past_readings, before, ask.limit))


async def _old_lines(copy: WorkingCopy, ask: Sweep) -> None:
    """The oldest lines of the accounts that the rules look at first."""
    names = copy.names
    before = copy.now - ask.keep_entries_s
    old = await _past(copy, names.oldest_lines, before, ask.limit)
    for key in sorted(_account(names, member.encode()) for member in old)[: ask.limit]:
        account = names.account(*key)
        lines = names.of_account("e", account)
        await copy.rows([names.of_account("p", account)])
        (found,) = await copy.read(("LRANGE", lines, "0", str(ask.limit - 1)))
        copy.take_lines(key, found)
