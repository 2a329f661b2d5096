"""
Parts: what a call takes in slots other than that of its hold, on a Cluster.

A part is a hold of its own: it holds no money, belongs to nobody's account, and remembers what it took: slots of pools,
counts of limits, an idempotency key. It is *reserved* for some seconds, then *kept* as long as its call lives, and ends
with it; a reservation that nobody keeps is taken back. Does not know which slot is whose, nor who decides: see `dance`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from typing import NamedTuple

from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.hold import HoldState
from asgi_metering.rules.keys import answer_key
from asgi_metering.rules.operations import Admit, End, IdempotencyAsk, LeaseAsk, LimitAsk
from asgi_metering.rules.settlement import end
from asgi_metering.rules.state import AccountKey, Change, Hold, State, Table
from asgi_metering.rules.windows import may_be_corrected
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = [
    "COPIED",
    "NOBODY",
    "POOLS",
    "REQUESTS",
    "RESERVED_S",
    "WINDOWS",
    "Part",
    "What",
    "answered",
    "apart",
    "call_of",
    "is_part",
    "metered",
    "part_of",
    "reservation",
    "taken_back",
    "told_to_parts",
    "unmetered",
]

NOBODY: AccountKey = ("", "")
"""Whose live holds parts are among; no unit is called like that."""

RESERVED_S = 10.0
"""
Life of a reservation. Thousands of times what the rest of an admission takes; after a crash others wait for no longer.
"""

CORRECTED_S = 7 * 86_400.0
"""As long as the hold of a call that has ended is kept by default: a bucket may be in use for ever, no call is."""

REQUESTS = "requests"
"""The meter that no end corrects."""

WINDOWS, POOLS, COPIED = "windows", "pools", "copied"
"""
What a part that came from another store knows beside: where among all of its call's its own windows and pools were, so
that the call's hold is told as it came; and whether that has ended, and has them all itself.
"""

_SUFFIX = "\x1fpart"
_COUNTED, _BEGUN = "#", "+"
"""
Before the meters of a part: all its counts are remembered with it, those of requests too. The second one says that its
window began with the part; ``lua/limits.lua`` writes it.
"""


class What(IntEnum):
    """What is done with a part."""

    KEEP = 0
    END = 1
    TAKE_BACK = 2
    """As if it had not been: a refusal leaves no trace."""

    UNDO = 3
    """The same, and windows that it began go on, as at any `Undo`."""


class Part(NamedTuple):
    """
    Keep a part, end it, or take it back. Answers whether there was one: kept, it is there for certain.

    Attributes:
        id: Of the part.
        what: What to do.
        ttl_s, grace_s: Of its call, to keep it for.
        actual: To end it with: what its limits should have counted, by meter.
    """

    id: str
    what: What
    ttl_s: float = 0.0
    grace_s: float = 0.0
    actual: Mapping[str, int] = {}


def part_of(call: str) -> str:
    """The id of the parts of a call: each of its slots has at most one."""
    return call + _SUFFIX


def call_of(part: str) -> str:
    """The call that a part, or a hold, belongs to."""
    return part.removesuffix(_SUFFIX)


def is_part(hold: str) -> bool:
    """Whether it is the id of a part."""
    return hold.endswith(_SUFFIX)


def metered(meter: str) -> str:
    """How a part calls a meter."""
    return _COUNTED + meter


def unmetered(meter: str) -> str:
    """How everybody else calls it."""
    return meter[1:] if meter.startswith((_COUNTED, _BEGUN)) else meter


def told_to_parts(actual: Mapping[str, int]) -> dict[str, int]:
    """What was used by meter, as parts call the meters."""
    return {mark + meter: used for meter, used in actual.items() for mark in (_COUNTED, _BEGUN)}


def reservation(
    ask: Admit, limits: tuple[LimitAsk, ...], leases: tuple[LeaseAsk, ...], claim: IdempotencyAsk | None
) -> Admit:
    """The admission by which *limits*, *leases* and *claim* of *ask* are reserved in their slot."""
    counted = tuple(limit._replace(meter=metered(limit.meter)) for limit in limits)
    payer, unit = NOBODY
    nothing = Admit(part_of(ask.id), payer, unit, 0, 0, (), counted, leases)
    return nothing._replace(ttl_s=RESERVED_S, grace_s=0.0, in_doubt=Basis.NONE, idempotency=claim)


def apart(hold: Hold, home: int, place_of: Callable[[str], int]) -> tuple[Hold, dict[int, Hold]]:
    """
    A hold that another store kept in one place, as its call would have left it at *home*, and its parts elsewhere.

    Args:
        hold: Live, or ended.
        home: The partition of who pays.
        place_of: The partition of a key.

    What has ended is kept whole: a part only corrects the windows of a call whose own end may still come.
    """
    receipt = hold.receipt
    if receipt is not None and (receipt.ended_by is not EndedBy.POLICY or receipt.late is not None):
        return hold, {}
    is_live = receipt is None
    key = hold.idempotency_key if is_live else ""
    pools = hold.pools if is_live else ()
    places = {place_of(name) for name in (*(window.key for window in hold.windows), *pools, *([key] if key else []))}
    parts = {}
    for place in places - {home}:
        windows = [(at, window) for at, window in enumerate(hold.windows) if place_of(window.key) == place]
        slots = [(at, pool) for at, pool in enumerate(pools) if place_of(pool) == place]
        parts[place] = hold._replace(
            id=part_of(hold.id),
            payer=NOBODY[0],
            unit=NOBODY[1],
            group="",
            amount=0,
            parts=(),
            state=HoldState.HELD,
            in_doubt=Basis.NONE,
            line="",
            observed=1,
            windows=tuple(window._replace(meter=metered(window.meter)) for _, window in windows),
            pools=tuple(pool for _, pool in slots),
            facts={WINDOWS: [at for at, _ in windows], POOLS: [at for at, _ in slots], COPIED: not is_live},
            receipt=None,
            charge_key="",
            idempotency_key=key if key and place_of(key) == place else "",
        )
    if not is_live:
        return hold, parts
    own = hold._replace(
        windows=tuple(window for window in hold.windows if place_of(window.key) == home),
        pools=tuple(pool for pool in pools if place_of(pool) == home),
        idempotency_key=key if key and place_of(key) == home else "",
    )
    return own, parts


async def taken_back(copy: WorkingCopy, limit: int) -> tuple[list[Change], list[Change]]:
    """
    Forget parts that nobody renewed, at most *limit*, of those that are loaded.

    A reservation gives back what it counted. Of a part that was kept, what it counted stays, as at any end by time, and
    so does the part while its windows run: the call's own end may still come and correct them. One that has an
    idempotency key waits: what its call did is known elsewhere.
    """
    now, state = copy.now, copy.state
    overdue = [hold for hold in state.live_holds(NOBODY) if (hold.due_at if hold.observed else hold.expires_at) <= now]
    over = [hold for hold in overdue if not (hold.observed and hold.idempotency_key)]
    await copy.rows(copy.names.counter(pinned.key) for hold in over for pinned in hold.windows)
    done: list[Change] = []
    for hold in sorted((hold for hold in over if not _may_be_corrected(state, hold, now)), key=_by_expiry)[:limit]:
        changes = _gone(state, hold, now)
        state.apply(changes)
        done.extend(changes)
    return done, done


def _by_expiry(hold: Hold) -> tuple[float, str]:
    return hold.expires_at, hold.id


def _may_be_corrected(state: State, hold: Hold, now: float) -> bool:
    return (
        bool(hold.observed)
        and now < hold.due_at + CORRECTED_S
        and any(
            unmetered(pinned.meter) != REQUESTS and may_be_corrected(pinned, state.counters.get(pinned.key), now)
            for pinned in hold.windows
        )
    )


def _gone(state: State, hold: Hold, now: float) -> list[Change]:
    actual = {} if hold.observed else {pinned.meter: 0 for pinned in hold.windows}
    _, changes = end(state, End(hold.id, None, by=EndedBy.POLICY, actual=actual, failed=True), now)
    begun = {pinned.key for pinned in hold.windows if pinned.meter.startswith(_BEGUN)}
    rest = [_unless_unused(change, begun) for change in changes if change[0] != Table.HOLD]
    return [*rest, (Table.HOLD, hold.id, None)]


def _unless_unused(change: Change, begun: set[str]) -> Change:
    """A window that a part has begun has not begun if nobody else counts in it; a key that it claimed is nobody's."""
    table, key, row = change
    if table == Table.IDEMPOTENCY:
        return (table, key, None)
    if table == Table.COUNTER and key in begun and not (row.used or row.previous):
        return (table, key, None)
    return change


def answered(state: State, part: str, ask: End, receipt: Receipt, now: float) -> list[Change]:
    """The end of a part that has the idempotency key of its call, which got *receipt*. Again changes nothing."""
    hold = state.holds.get(part)
    if hold is None:
        return []
    _, changes = end(state, End(part, None, by=ask.by, actual=told_to_parts(ask.actual)), now)
    kept = [change for change in changes if change[0] not in (Table.HOLD, Table.IDEMPOTENCY)]
    return [*kept, *answer_key(state, hold, ask, receipt), (Table.HOLD, part, None)]
