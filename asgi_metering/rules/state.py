"""
The rows that the rules read and write, and the state that holds them.

Every store keeps exactly these rows. Memory keeps a whole `State`; a database loads the rows that a batch
touches into one, lets the rules decide on it, and writes the changes. Knows no rule.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

from asgi_metering.receipts import Entry, Part, Receipt
from asgi_metering.rules.hold import HoldState

__all__ = [
    "NEVER",
    "TAKEN_BACK",
    "Account",
    "AccountKey",
    "AllowanceKey",
    "AllowanceWindow",
    "BucketKey",
    "Change",
    "ChargeKey",
    "Checkpoint",
    "Counter",
    "DeclaredUnit",
    "Event",
    "Grant",
    "Hold",
    "IdempotencyKey",
    "Lease",
    "PinnedWindow",
    "ReadingKey",
    "SharedReading",
    "State",
    "Table",
    "build",
]

build = tuple.__new__
"""
Makes a row of its class and all its fields in order: ``build(Counter, (key, start, end, used, previous, extra))``.

A named tuple's own constructor is a function of Python around this, and takes twice as long; a call makes twenty rows.
"""

NEVER = float("inf")
"""A time that does not come: the expiry of a grant without one."""

TAKEN_BACK = 0.0
"""The expiry of a grant that was taken back: over ever since, and no expiry that a grant can be given with."""

AccountKey: TypeAlias = tuple[str, str]
"""(payer, unit name)."""

AllowanceKey: TypeAlias = tuple[str, str, str, float]
"""(payer, unit name, allowance name, start of the window)."""

BucketKey: TypeAlias = tuple[str, str, str]
"""(payer, unit name, allowance name)."""

ReadingKey: TypeAlias = tuple[str, str]
"""(series, part)."""


class Account(NamedTuple):
    """
    The sums of one payer in one unit. Each is the sum of rows and can be proven from them.

    ``next_change_at`` and ``next_due_at`` are lower bounds: no grant begins or lapses, and no hold falls due,
    before them. They spare the common decision from looking at every row.
    """

    payer: str
    unit: str
    granted: int = 0
    settled: int = 0
    held: int = 0
    expired: int = 0
    debt: int = 0
    entries: int = 0
    next_change_at: float = NEVER
    next_due_at: float = NEVER
    seen_at: float = 0.0

    @property
    def available(self) -> int:
        """What a new hold may take; negative by debt."""
        return self.granted - self.settled - self.expired - self.held


class Grant(NamedTuple):
    """Units given to an account. ``number`` orders grants of equal priority and expiry by age."""

    payer: str
    unit: str
    id: str
    amount: int
    priority: int
    effective_at: float
    expires_at: float
    number: int
    kind: str = "purchased"
    actor: str = ""
    settled: int = 0
    held: int = 0
    expired: int = 0
    begun: bool = True
    reversed: int = 0

    @property
    def free(self) -> int:
        """What is neither spent, held, lapsed nor taken back."""
        _, _, _, amount, _, _, _, _, _, _, settled, held, expired, _, taken_back = self
        return amount - settled - held - expired - taken_back

    @property
    def is_open(self) -> bool:
        """Whether it can still change by itself: something of it is free or held."""
        _, _, _, amount, _, _, _, _, _, _, settled, _, expired, _, taken_back = self
        return settled + expired + taken_back < amount

    def moved(self, settled: int = 0, held: int = 0, expired: int = 0) -> Grant:
        """This grant after units moved between its sums. Every call does it, and `_replace` takes six times as long."""
        # fmt: off
        (payer, unit, grant_id, amount, priority, effective_at, expires_at, number, kind, actor,
            was_settled, was_held, was_expired, begun, taken_back) = self
        return build(Grant, (
            payer, unit, grant_id, amount, priority, effective_at, expires_at, number, kind, actor,
            was_settled + settled, was_held + held, was_expired + expired, begun, taken_back,
        ))
        # fmt: on


class PinnedWindow(NamedTuple):
    """A weighted limit's window at admission, so that the call's end corrects that window and no other."""

    key: str
    start: float
    meter: str
    taken: int


class Hold(NamedTuple):
    """
    Units set aside for one call, and everything its end needs when the process that admitted it is gone.

    ``expires_at`` is the heartbeat's deadline: past it the hold is in doubt. ``due_at`` is when the policy may
    end it. ``group`` names the payer object whose account, ``payer``, pays; ``charge_key`` and ``idempotency_key``
    name the rows that wait for this call's end. ``facts`` is what the usage event says of the admission: JSON-safe,
    without secrets.
    """

    id: str
    payer: str
    unit: str
    amount: int
    parts: tuple[Part, ...]
    state: HoldState
    created_at: float
    expires_at: float
    due_at: float
    ttl_s: float
    grace_s: float
    in_doubt: str
    line: str = ""
    observed: int = 0
    windows: tuple[PinnedWindow, ...] = ()
    pools: tuple[str, ...] = ()
    facts: Mapping[str, Any] = {}
    receipt: Receipt | None = None
    group: str = ""
    charge_key: str = ""
    idempotency_key: str = ""

    def ended(self, state: HoldState, receipt: Receipt) -> Hold:
        """This hold after its end. Every call does it, and `_replace` takes five times as long."""
        # fmt: off
        (call, payer, unit, amount, parts, _, created_at, expires_at, due_at, ttl_s, grace_s, in_doubt, line,
            observed, windows, pools, facts, _, group, charge_key, idempotency_key) = self
        return build(Hold, (
            call, payer, unit, amount, parts, state, created_at, expires_at, due_at, ttl_s, grace_s, in_doubt, line,
            observed, windows, pools, facts, receipt, group, charge_key, idempotency_key,
        ))
        # fmt: on


class AllowanceWindow(NamedTuple):
    """What one payer used of one allowance in one window. The limit is not kept: it is resolved per decision."""

    payer: str
    unit: str
    name: str
    start: float
    end: float
    settled: int = 0
    held: int = 0


class Counter(NamedTuple):
    """
    What one rate limit counted for one key: the window that runs, and the one before it.

    ``extra`` is what only a moving log (`rules.logs`) and a token bucket (`rules.buckets`) keep beside; they also say
    what the other fields mean to them. It is ASCII text, so that every store and every file keeps it as it is.
    """

    key: str
    start: float
    end: float
    used: int
    previous: int = 0
    extra: str = ""


class Lease(NamedTuple):
    """One slot of a concurrency pool, with a life. It bears its call's id: a late release frees no other's slot."""

    pool: str
    id: str
    expires_at: float


class Event(NamedTuple):
    """A usage event in the outbox: waiting to be delivered, until it was ``acknowledged_at``."""

    id: str
    at: float
    payload: Mapping[str, Any]
    claimed_until: float = 0.0
    acknowledged_at: float | None = None


class ChargeKey(NamedTuple):
    """
    A key that is charged once per window, however many calls bring it (DESIGN "charge_key").

    ``hold`` is the hold that the key owns: it is settled by the first of its members that succeeds, and released when
    the last of ``members`` leaves without success. ``settled`` keys let calls join free until their window ends. One
    that was given back begins anew with the next call; it is kept, so that the first late end of a call that was given
    up pays for its window, and no further one.
    """

    key: str
    start: float
    end: float
    hold: str
    members: int = 0
    settled: bool = False

    @property
    def is_given_back(self) -> bool:
        """Whether nobody pays for it, and nobody has."""
        return not self.settled and not self.members


class IdempotencyKey(NamedTuple):
    """
    One request's ``Idempotency-Key``, claimed by its admission (DESIGN "Idempotency").

    ``receipt`` is None while the call runs, and while it is in doubt; ``reply`` is what a replay sends, if it was kept.
    ``call`` is empty where that failed for nothing: the key is free, and the late end of a call that was given up finds
    it (`keys.GIVEN_BACK`).
    """

    key: str
    fingerprint: str
    call: str
    expires_at: float
    receipt: Receipt | None = None
    reply: Mapping[str, Any] | None = None


class Checkpoint(NamedTuple):
    """
    The ledger lines of an account up to *number*, folded (DESIGN "Retention").

    ``sums`` is what they did to the account, by name of its sum, so that checkpoint and later lines still prove it.
    """

    payer: str
    unit: str
    number: int
    at: float
    sums: Mapping[str, int]


class DeclaredUnit(NamedTuple):
    """A unit that this store counts in. Its scale is fixed by its first use: another would move every amount."""

    name: str
    scale: int


class SharedReading(NamedTuple):
    """
    One part of what a provider's answer said about its quotas, as a worker told the others (DESIGN 6).

    Attributes:
        series: Whose: ``"provider"``, or ``"provider/label"``; either with ``"@model"`` behind, where it is one's own.
        part: ``"status"`` or ``"limits"``: each is that of the newest answer that told it, and they may differ.
        observed_at: When the request of that answer was started. Never ahead of the store's time as it was kept.
        told: The reading as JSON text in ASCII: `Reading.to_dict`, which has no credential (S1.50).
    """

    series: str
    part: str
    observed_at: float
    told: str


_NO_GRANTS: Mapping[str, Grant] = {}


class Table:
    """Names of the tables, as changes and stores call them."""

    ACCOUNT = "account"
    GRANT = "grant"
    HOLD = "hold"
    ALLOWANCE = "allowance"
    COUNTER = "counter"
    LEASE = "lease"
    ENTRY = "entry"
    EVENT = "event"
    CHARGE_KEY = "charge_key"
    IDEMPOTENCY = "idempotency"
    CHECKPOINT = "checkpoint"
    UNIT = "unit"
    READING = "reading"


Change: TypeAlias = tuple[str, Any, Any]
"""(table, key, new row or None to delete it). Keys are those of `State`'s dicts; entries have none."""


class State:
    """
    Rows by key. Rules read it and return changes; only `apply` writes.

    Attributes:
        accounts: By (payer, unit).
        grants: Open ones by (payer, unit), then by grant id: what admission looks through.
        closed_grants: Spent or lapsed ones, likewise: what refunds and proofs look up.
        holds: By id, ended ones included while they are kept.
        live: Ids of the holds of an account that have not ended.
        allowances: By (payer, unit, name, start).
        latest: Start of the last window of each allowance, by (payer, unit, name): where a rolling one is found.
        counters: By key.
        leases: By pool, then by call id.
        entries: New ledger lines by (payer, unit), oldest first.
        refs: The same by (payer, unit, ref): what refunds and corrections look up.
        events: The outbox: events that wait, oldest first.
        delivered: Events that were acknowledged and are still kept, by id.
        charge_keys, idempotency_keys: By key.
        checkpoints: By (payer, unit).
        units: By name.
        readings: By (series, part).
    """

    __slots__ = (
        "accounts",
        "allowances",
        "charge_keys",
        "checkpoints",
        "closed_grants",
        "counters",
        "delivered",
        "entries",
        "events",
        "grants",
        "holds",
        "idempotency_keys",
        "latest",
        "leases",
        "live",
        "readings",
        "refs",
        "units",
    )

    def __init__(self) -> None:
        self.accounts: dict[AccountKey, Account] = {}
        self.grants: dict[AccountKey, dict[str, Grant]] = {}
        self.closed_grants: dict[AccountKey, dict[str, Grant]] = {}
        self.holds: dict[str, Hold] = {}
        self.live: dict[AccountKey, set[str]] = {}
        self.allowances: dict[AllowanceKey, AllowanceWindow] = {}
        self.latest: dict[BucketKey, float] = {}
        self.counters: dict[str, Counter] = {}
        self.leases: dict[str, dict[str, Lease]] = {}
        self.entries: dict[AccountKey, list[Entry]] = {}
        self.refs: dict[tuple[str, str, str], list[Entry]] = {}
        self.events: dict[str, Event] = {}
        self.delivered: dict[str, Event] = {}
        self.charge_keys: dict[str, ChargeKey] = {}
        self.idempotency_keys: dict[str, IdempotencyKey] = {}
        self.checkpoints: dict[AccountKey, Checkpoint] = {}
        self.units: dict[str, DeclaredUnit] = {}
        self.readings: dict[ReadingKey, SharedReading] = {}

    def apply(self, changes: list[Change]) -> None:
        """Make *changes*, in order."""
        for table, key, row in changes:
            put = _PUT.get(table)
            if put is not None:
                put(self, key, row)
            elif row is not None:
                getattr(self, _PLAIN[table])[key] = row
            else:
                getattr(self, _PLAIN[table]).pop(key, None)

    def grant(self, account: AccountKey, grant_id: str) -> Grant | None:
        """The grant of *account* with this id, open or closed."""
        grant = self.grants.get(account, _NO_GRANTS).get(grant_id)
        return grant or self.closed_grants.get(account, _NO_GRANTS).get(grant_id)

    def lines_of(self, account: AccountKey, ref: str) -> list[Entry]:
        """The ledger lines of *account* about one call, grant or posting, oldest first."""
        return self.refs.get((*account, ref), [])

    def live_holds(self, account: AccountKey) -> Iterator[Hold]:
        """The holds of *account* that have not ended, in doubt included."""
        for hold_id in self.live.get(account, ()):
            yield self.holds[hold_id]


def _put_grant(state: State, key: AccountKey, row: Grant) -> None:
    home, other = (state.grants, state.closed_grants) if row.is_open else (state.closed_grants, state.grants)
    grants = home.get(key)
    if grants is None:
        grants = home[key] = {}
    if row.id not in grants and key in other:
        other[key].pop(row.id, None)
    grants[row.id] = row


def _put_hold(state: State, key: str, row: Hold | None) -> None:
    if row is None:
        state.holds.pop(key, None)
        return
    state.holds[key] = row
    account = (row.payer, row.unit)
    if row.receipt is None:
        live = state.live.get(account)
        if live is None:
            live = state.live[account] = set()
        live.add(key)
    else:
        live = state.live.get(account)
        if live is not None:
            live.discard(key)
            if not live:
                del state.live[account]


def _put_allowance(state: State, key: AllowanceKey, row: AllowanceWindow | None) -> None:
    bucket, start = key[:3], key[3]
    if row is None:
        state.allowances.pop(key, None)
        if state.latest.get(bucket) == start:
            del state.latest[bucket]
        return
    state.allowances[key] = row
    if start >= state.latest.get(bucket, start):
        state.latest[bucket] = start


def _put_lease(state: State, key: tuple[str, str], row: Lease | None) -> None:
    pool, call_id = key
    leases = state.leases.get(pool)
    if row is not None:
        if leases is None:
            leases = state.leases[pool] = {}
        leases[call_id] = row
    elif leases is not None:
        leases.pop(call_id, None)
        if not leases:
            del state.leases[pool]


def _put_entry(state: State, key: AccountKey, row: Entry) -> None:
    lines = state.entries.get(key)
    if lines is None:
        lines = state.entries[key] = []
    lines.append(row)
    payer, unit = key
    ref = (payer, unit, row.ref)
    about = state.refs.get(ref)
    if about is None:
        state.refs[ref] = [row]
    else:
        about.append(row)


def _put_checkpoint(state: State, key: AccountKey, row: Checkpoint) -> None:
    """What is folded is no line any more."""
    state.checkpoints[key] = row
    lines = state.entries.get(key, [])
    folded = bisect_right(lines, row.number, key=attrgetter("number"))
    for line in lines[:folded]:
        kept = state.refs[*key, line.ref]
        kept.remove(line)
        if not kept:
            del state.refs[*key, line.ref]
    del lines[:folded]


def _put_event(state: State, key: str, row: Event | None) -> None:
    if row is not None and row.acknowledged_at is None:
        # What is told again, by one who never learned that it was told, is not delivered twice.
        if key not in state.delivered:
            state.events[key] = row
        return
    state.events.pop(key, None)
    if row is None:
        state.delivered.pop(key, None)
    else:
        state.delivered[key] = row


_PUT: Mapping[str, Any] = {
    Table.GRANT: _put_grant,
    Table.HOLD: _put_hold,
    Table.ALLOWANCE: _put_allowance,
    Table.LEASE: _put_lease,
    Table.ENTRY: _put_entry,
    Table.EVENT: _put_event,
    Table.CHECKPOINT: _put_checkpoint,
}

# One dict each, by the rows' own keys.
_PLAIN: Mapping[str, str] = {
    Table.ACCOUNT: "accounts",
    Table.COUNTER: "counters",
    Table.CHARGE_KEY: "charge_keys",
    Table.IDEMPOTENCY: "idempotency_keys",
    Table.UNIT: "units",
    Table.READING: "readings",
}
