"""
Parts: what a call takes in slots other than that of its hold, on a Cluster.

A part is a hold of its own: it holds no money, belongs to nobody's account, and remembers what it took: slots of pools,
counts of limits, an idempotency key. It is *reserved* for some seconds, then *kept* as long as its call lives, and ends
with it; a reservation that nobody keeps is taken back. Does not know which slot is whose, nor who decides: see `dance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.keys import answer_key
from asgi_metering.rules.operations import Admit, End, IdempotencyAsk, LeaseAsk, LimitAsk
from asgi_metering.rules.settlement import end
from asgi_metering.rules.state import AccountKey, Change, Hold, State, Table
from asgi_metering.rules.windows import correct
from asgi_metering.stores.redis.working_copy import WorkingCopy

__all__ = [
    "NOBODY",
    "REQUESTS",
    "RESERVED_S",
    "Part",
    "What",
    "answered",
    "call_of",
    "is_part",
    "metered",
    "part_of",
    "reservation",
    "taken_back",
    "unmetered",
]

NOBODY: AccountKey = ("", "")
"""Whose live holds parts are among; no unit is called like that."""

RESERVED_S = 10.0
"""
Life of a reservation. Thousands of times what the rest of an admission takes; after a crash others wait for no longer.
"""

REQUESTS = "requests"
"""The meter that no end corrects."""

_SUFFIX = "\x1fpart"
_MARK = "#"
"""Before the meters of a part: all its counts are remembered with it, those of requests too."""


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
        actual: To end it with: what its limits should have counted, by `metered` meter.
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
    return _MARK + meter


def unmetered(meter: str) -> str:
    """How everybody else calls it."""
    return meter.removeprefix(_MARK)


def reservation(
    ask: Admit, limits: tuple[LimitAsk, ...], leases: tuple[LeaseAsk, ...], claim: IdempotencyAsk | None
) -> Admit:
    """The admission by which *limits*, *leases* and *claim* of *ask* are reserved in their slot."""
    counted = tuple(limit._replace(meter=metered(limit.meter)) for limit in limits)
    payer, unit = NOBODY
    nothing = Admit(part_of(ask.id), payer, unit, 0, 0, (), counted, leases)
    return nothing._replace(ttl_s=RESERVED_S, grace_s=0.0, in_doubt=Basis.NONE, idempotency=claim)


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
    for hold in sorted((hold for hold in over if not _may_be_corrected(state, hold)), key=_by_expiry)[:limit]:
        changes = _gone(state, hold, now)
        state.apply(changes)
        done.extend(changes)
    return done, done


def _by_expiry(hold: Hold) -> tuple[float, str]:
    return hold.expires_at, hold.id


def _may_be_corrected(state: State, hold: Hold) -> bool:
    return bool(hold.observed) and any(
        unmetered(pinned.meter) != REQUESTS and correct(pinned, state.counters.get(pinned.key), 0) is not None
        for pinned in hold.windows
    )


def _gone(state: State, hold: Hold, now: float) -> list[Change]:
    actual = {} if hold.observed else {pinned.meter: 0 for pinned in hold.windows}
    _, changes = end(state, End(hold.id, None, by=EndedBy.POLICY, actual=actual, failed=True), now)
    rest = [_unless_unused(change) for change in changes if change[0] != Table.HOLD]
    return [*rest, (Table.HOLD, hold.id, None)]


def _unless_unused(change: Change) -> Change:
    """A window that only a part has begun has not begun."""
    table, key, row = change
    if table == Table.COUNTER and not (row.used or row.previous):
        return (table, key, None)
    return change


def answered(state: State, part: str, ask: End, receipt: Receipt, now: float) -> list[Change]:
    """The end of a part that has the idempotency key of its call, which got *receipt*. Again changes nothing."""
    hold = state.holds.get(part)
    if hold is None:
        return []
    actual = {metered(meter): used for meter, used in ask.actual.items()}
    _, changes = end(state, End(part, None, by=ask.by, actual=actual), now)
    kept = [change for change in changes if change[0] not in (Table.HOLD, Table.IDEMPOTENCY)]
    return [*kept, *answer_key(state, hold, ask, receipt), (Table.HOLD, part, None)]
