"""
Operations: what a store is asked to do, one atomic step each.

Plain values in smallest parts and epoch seconds. They carry everything that a rule needs and that the state
does not hold: resolved limits, boundaries of calendar windows, the policy pinned at admission.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.state import NEVER, SharedReading

__all__ = [
    "Acknowledge",
    "Admit",
    "AllowanceSource",
    "Backfill",
    "Claim",
    "Correct",
    "Declare",
    "Emit",
    "End",
    "Grow",
    "IdempotencyAsk",
    "KeyAsk",
    "LeaseAsk",
    "LimitAsk",
    "Operation",
    "PostGrant",
    "Preview",
    "Refund",
    "Renew",
    "ReverseGrant",
    "Share",
    "SourceAsk",
    "Sweep",
    "Undo",
    "WalletSource",
    "WindowKind",
]


class WindowKind(StrEnum):
    """How a limit's window moves."""

    # That of its text, as its equality is: stores remember the limits that come again, and look them up for each call.
    __hash__ = str.__hash__

    FIXED = "fixed"
    CALENDAR = "calendar"
    SLIDING = "sliding"
    MOVING = "moving"
    BUCKET = "bucket"


class LimitAsk(NamedTuple):
    """
    One rate limit to take from.

    Attributes:
        name: Unique on the route; names the limit in answers.
        key: What is counted together: limit and key value, already hashed where it is personal. Whose it is, it says
            itself (`roots`), for stores that keep payers apart.
        kind: How the window moves.
        limit: What one window allows; what a bucket holds.
        window_s: The window's length in seconds, for a calendar window the current one's.
        cost: What this call takes; 0 looks without taking.
        meter: What is counted. Anything but ``"requests"`` is corrected at the call's end.
        boundaries: For calendar windows: four instants around the caller's time, ascending.
        refill: For buckets: how much comes back in each *window_s*, 1 or more.
    """

    name: str
    key: str
    kind: WindowKind
    limit: int
    window_s: float
    cost: int = 1
    meter: str = "requests"
    boundaries: tuple[float, ...] = ()
    refill: int = 0


class LeaseAsk(NamedTuple):
    """One slot of *pool*, a key as of `LimitAsk`. *level* is ``"caller"`` or ``"global"``; *limit* 0 admits nobody."""

    name: str
    pool: str
    limit: int
    level: str = "caller"


class WalletSource(NamedTuple):
    """
    Pay from the grants of an account.

    Attributes:
        overdraft: Smallest parts that may be held beyond what is there; they become debt when they are spent.
        payer: The account; empty is the call's own.
        group: Name of the payer object that this source belongs to; neighbours with equal *payer* and *group* are one.
        split: Its group may pay one hold together; otherwise one source of it pays the whole.
    """

    overdraft: int = 0
    payer: str = ""
    group: str = ""
    split: bool = False


class AllowanceSource(NamedTuple):
    """
    Pay from the allowance *name*: *limit* smallest parts per window.

    Attributes:
        boundaries: Of a calendar window: four instants around the caller's time. Empty for a window that rolls.
        window_s: Seconds that a rolling window lasts; the first use after the last one's end begins it (S4.13).
        payer, group, split: As of `WalletSource`.
    """

    name: str
    limit: int
    boundaries: tuple[float, ...] = ()
    window_s: float = 0.0
    payer: str = ""
    group: str = ""
    split: bool = False


SourceAsk: TypeAlias = WalletSource | AllowanceSource


class KeyAsk(NamedTuple):
    """
    Charge once for all calls that bring this key within a window (S0.3, S0.10).

    Attributes:
        key: Scoped to what it counts for, and hashed where it is personal; it says whose it is (`roots`).
        boundaries: Of a calendar window: four instants around the caller's time. Empty for one that rolls.
        window_s: Seconds that a rolling window lasts from the first call on.
    """

    key: str
    boundaries: tuple[float, ...] = ()
    window_s: float = 0.0


class IdempotencyAsk(NamedTuple):
    """
    Run one request of this key, and answer its repeats from what it did (DESIGN "Idempotency").

    Attributes:
        key: Scoped to payer and route, and hashed; it says whose it is (`roots`).
        fingerprint: Of the request: the same key with another one is a mistake.
        ttl_s: Seconds that the key is remembered.
    """

    key: str
    fingerprint: str
    ttl_s: float = 86_400.0


class Admit(NamedTuple):
    """
    Ask to run one call. All of it is decided in one step, all or nothing.

    Attributes:
        id: The call's id, new for every call; a repeat answers the first decision again.
        payer, unit: The account.
        amount: Smallest parts to hold. 0 with *sources* holds nothing and pins who pays for what will be measured.
        minimum: Admit from here on, holding what is there; equal to *amount* without ``up_to``.
        sources: Tried group by group in order (S0.19); see `WalletSource` for what a group is.
        limits, leases: What else must have room.
        ttl_s: Seconds that the hold lives without a heartbeat.
        grace_s: Seconds in doubt before the policy may end it.
        in_doubt: Basis on which the policy ends it: observed, hold or none.
        facts: What the usage event says of the admission: JSON-safe, without secrets.
        charge_key: Charge once for all calls of this key; only with *minimum* equal to *amount*: fixed prices (S0.3).
        idempotency: Run once, and answer repeats.
    """

    id: str
    payer: str
    unit: str
    amount: int
    minimum: int
    sources: tuple[SourceAsk, ...] = ()
    limits: tuple[LimitAsk, ...] = ()
    leases: tuple[LeaseAsk, ...] = ()
    ttl_s: float = 60.0
    grace_s: float = 30.0
    in_doubt: Basis = Basis.OBSERVED
    line: str = ""
    facts: Mapping[str, Any] = {}
    charge_key: KeyAsk | None = None
    idempotency: IdempotencyAsk | None = None


class Renew(NamedTuple):
    """A heartbeat: the hold and its leases live on, and *observed* (smallest parts) is what was seen so far."""

    id: str
    observed: int = 0


class End(NamedTuple):
    """
    End a call's hold; the first end wins.

    Attributes:
        id: The call's id.
        amount: Smallest parts to charge; None releases everything.
        basis: What the amount is based on.
        estimated: Whether that is an estimate.
        by: Who ends it.
        actual: What weighted limits should have counted, by meter; a meter that is absent stays as it was held.
        event: What the usage event says of the end, over the facts of the admission; None writes no event.
        failed: The call did not do its work. If it charges nothing either, its idempotency key is free again.
        reply: What a repeat under its idempotency key is answered with, if that was kept.
    """

    id: str
    amount: int | None
    basis: Basis = Basis.NONE
    estimated: bool = False
    by: EndedBy = EndedBy.CALL
    actual: Mapping[str, int] = {}
    event: Mapping[str, Any] | None = None
    failed: bool = False
    reply: Mapping[str, Any] | None = None


class PostGrant(NamedTuple):
    """Give units to an account, once per *id*. Debt is paid first."""

    id: str
    payer: str
    unit: str
    amount: int
    priority: int = 0
    effective_at: float | None = None
    expires_at: float = NEVER
    kind: str = "purchased"
    actor: str = ""


class Emit(NamedTuple):
    """
    Append usage events that belong to no hold (free work is audited), each with a stable id.

    One that was acknowledged, and is still kept, is not delivered again.
    """

    events: tuple[tuple[str, Mapping[str, Any]], ...]


class Claim(NamedTuple):
    """Take up to *limit* undelivered events for *lease_s* seconds; nobody else gets them meanwhile."""

    limit: int
    lease_s: float


class Acknowledge(NamedTuple):
    """Nobody gets these events again; they are kept for a while (DESIGN "Retention")."""

    ids: tuple[str, ...]


class Undo(NamedTuple):
    """
    Take back an admission whose caller never learned of it: everything, what it counted of every limit included.

    Attributes:
        ask: What was admitted.
        at: The time of that decision, so that its own windows are given back and no others.
    """

    ask: Admit
    at: float


class Preview(NamedTuple):
    """Decide *ask* without doing it (S0.37). Overdue holds on its way are ended, as an admission would."""

    ask: Admit


class Grow(NamedTuple):
    """
    Make a live hold larger, from the payer object that pays it.

    Attributes:
        id: The call's id.
        to: Smallest parts that shall be held in all: repeated it changes nothing.
        minimum: What of that will do; equal to *to* for all or nothing.
        sources: Those of the hold's own payer object, in its order. The hold says who pays: payers named here do not.
    """

    id: str
    to: int
    minimum: int
    sources: tuple[SourceAsk, ...]


class Refund(NamedTuple):
    """
    Give back a charge, or a part of it, once per *id*: to its sources, from the last one backwards.

    Attributes:
        id: Of the posting; the same again changes nothing.
        call: Whose charge.
        payer, unit: The account that paid.
        amount: Smallest parts; None is all that is left of the charge.
        actor: Who decided it.
        event: What a usage event says of it; None writes none.
    """

    id: str
    call: str
    payer: str
    unit: str
    amount: int | None = None
    actor: str = ""
    event: Mapping[str, Any] | None = None


class Correct(NamedTuple):
    """
    Charge more, or less, than was charged, once per *id*.

    Attributes:
        id: Of the posting.
        payer, unit: The account.
        amount: Smallest parts; negative gives back what was spent, and never more than that.
        line: The billing line.
        actor: Who decided it.
        event: As of `Refund`.
    """

    id: str
    payer: str
    unit: str
    amount: int
    line: str = ""
    actor: str = ""
    event: Mapping[str, Any] | None = None


class Backfill(NamedTuple):
    """Charge for work that was done without an admission, once per *id*; what is not there becomes debt."""

    id: str
    payer: str
    unit: str
    amount: int
    line: str = ""
    actor: str = ""
    event: Mapping[str, Any] | None = None


class ReverseGrant(NamedTuple):
    """
    Take a grant back, once per *id*: a payment that was charged back.

    What is free of it goes; what was spent becomes debt; what is held stays with its holds, and lapses when they give
    it back.
    """

    id: str
    grant: str
    payer: str
    unit: str
    actor: str = ""


class Declare(NamedTuple):
    """Say which units are counted, as (name, scale). A name with two scales would move every amount of it."""

    units: tuple[tuple[str, int], ...]


class Share(NamedTuple):
    """
    Let other workers know what providers said about their quotas (DESIGN 6): each part unless a newer one is kept.

    All of them or none: at most `readings.MAX_SHARED`.
    """

    readings: tuple[SharedReading, ...]


class Sweep(NamedTuple):
    """
    End what is overdue and forget what is old, at most *limit* rows of each kind.

    Attributes:
        keep_holds_s: How long ended holds stay, so that a late end still finds its receipt.
        keep_entries_s: How long ledger lines stay; older ones fold into the account's checkpoint.
        keep_windows_s: How long allowance windows stay after their end.
        keep_events_s: How long usage events stay after they were acknowledged.
        keep_readings_s: How long a provider's answer is shared that no newer one has replaced.
    """

    limit: int = 500
    keep_holds_s: float = 7 * 86_400.0
    keep_entries_s: float = 400 * 86_400.0
    keep_windows_s: float = 62 * 86_400.0
    keep_events_s: float = 86_400.0
    keep_readings_s: float = 7 * 86_400.0


Operation: TypeAlias = (
    Admit
    | Preview
    | Undo
    | Grow
    | Renew
    | End
    | PostGrant
    | ReverseGrant
    | Refund
    | Correct
    | Backfill
    | Declare
    | Share
    | Emit
    | Claim
    | Acknowledge
    | Sweep
)
