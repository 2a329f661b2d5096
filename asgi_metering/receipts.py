"""
Receipts, entries and balances: what the ledger tells about what happened.

Immutable values in smallest parts. Knows nothing of stores.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

__all__ = [
    "Balance",
    "Basis",
    "EndedBy",
    "Entry",
    "EntryKind",
    "GrantLeft",
    "GrantReceipt",
    "Part",
    "Posting",
    "Receipt",
    "Source",
    "WindowUsed",
]


class Basis(StrEnum):
    """What an end of a call was charged on; printed on receipt, statement line and event."""

    # That of its text, as its equality is: an enum's own is a function of Python, and stores look up what they know.
    __hash__ = str.__hash__

    USAGE = "usage"
    OBSERVED = "observed"
    ESTIMATE = "estimate"
    HOLD = "hold"
    NONE = "none"


class EndedBy(StrEnum):
    """Who ended a hold: the call itself, the policy for calls in doubt, or a person."""

    __hash__ = str.__hash__

    CALL = "call"
    POLICY = "policy"
    PERSON = "person"


class Source(StrEnum):
    """One kind of place that units come from."""

    __hash__ = str.__hash__

    GRANT = "grant"
    ALLOWANCE = "allowance"
    DEBT = "debt"


class Part(NamedTuple):
    """
    A part of a hold or of a charge, and where it came from.

    Attributes:
        source: Kind of the source.
        name: Grant id, or allowance name; empty for debt.
        start: Start of the allowance window, epoch seconds; 0 for grants and debt.
        amount: Smallest parts.
    """

    source: Source
    name: str
    start: float
    amount: int


class Receipt(NamedTuple):
    """
    What the end of a call did.

    Attributes:
        id: The call's id.
        payer, unit: The account.
        amount: Charged, smallest parts; 0 when everything was released.
        held: What had been set aside.
        basis: What was charged on.
        estimated: The basis is an estimate somewhere (counted past a bound, or from an estimate).
        ended_by: Who ended it.
        parts: Where the charge came from, in order.
        available: What the account has left; None for an allowance.
        at: The store's time, epoch seconds.
        entry: Number of the ledger entry; None when nothing was charged.
        applied: False when the hold had ended before: this is then the first receipt, unchanged.
        late: What the call's own end, coming after an automatic one, charged on top (either sign), as a linked entry;
            0 where it agreed with that, or came after a person's end. None while it has not come.
        known: False when the store has no such hold, live or kept: nothing happened.
    """

    id: str
    payer: str
    unit: str
    amount: int
    held: int
    basis: Basis
    estimated: bool
    ended_by: EndedBy
    parts: tuple[Part, ...]
    available: int | None
    at: float
    entry: int | None
    applied: bool = True
    late: int | None = None
    known: bool = True


class EntryKind(StrEnum):
    """What a line of the ledger is."""

    __hash__ = str.__hash__

    GRANT = "grant"
    SETTLE = "settle"
    EXPIRE = "expire"
    DEBT_PAYMENT = "debt_payment"
    LATE = "late"
    REFUND = "refund"
    CORRECTION = "correction"
    BACKFILL = "backfill"
    REVERSAL = "reversal"


class Entry(NamedTuple):
    """
    One line of the ledger of an account; never changed, never removed by use.

    Attributes:
        payer, unit: The account.
        number: 1, 2, 3... without gaps within the account.
        at: The store's time, epoch seconds.
        kind: What happened.
        amount: Smallest parts. What the account gained or lost follows from *kind*; a late entry has a sign. What an
            allowance paid (its *parts* say so) is listed and moves none of the account's sums.
        ref: Id of the grant or call behind it.
        line: The billing line, for charges.
        basis: What a charge was based on.
        estimated: Whether that basis is an estimate.
        available: What the account had after this entry.
        actor: Who did it, where a person or a system said so.
        parts: Where a charge came from; negative amounts went back there.
        id: Id of the posting, where one was given (refunds, corrections): the same again changes nothing.
    """

    payer: str
    unit: str
    number: int
    at: float
    kind: EntryKind
    amount: int
    ref: str
    line: str = ""
    basis: Basis | None = None
    estimated: bool = False
    available: int = 0
    actor: str = ""
    parts: tuple[Part, ...] = ()
    id: str = ""


class GrantReceipt(NamedTuple):
    """
    What a grant did.

    Attributes:
        id: The grant's id.
        amount: Smallest parts granted.
        applied: False when the same grant had been given before: nothing changed now.
        paid_debt: What of it paid debt first.
        available: What the account has now; a grant that starts later does not count yet.
    """

    id: str
    amount: int
    applied: bool
    paid_debt: int
    available: int


class Posting(NamedTuple):
    """
    What a refund, a correction, a backfill or the reversal of a grant did.

    Attributes:
        id: Of the posting.
        payer, unit: The account.
        amount: Smallest parts that were charged, or taken back of a grant; negative when they were given back.
        returned: What of a gift back can be spent again.
        lapsed: What of it came to a grant or a window that is over.
        available: What the account has now.
        at: The store's time, epoch seconds.
        entry: Number of the ledger line.
        applied: False when it had been posted before: this is then what it did, as far as the ledger tells.
    """

    id: str
    payer: str
    unit: str
    amount: int
    returned: int
    lapsed: int
    available: int
    at: float
    entry: int
    applied: bool = True


class GrantLeft(NamedTuple):
    """
    A grant that is not used up, as a balance shows it.

    Attributes:
        id: As it was given.
        kind: The word for it.
        amount: Smallest parts that were given.
        left: What is neither spent nor held of it.
        held: What live calls hold of it; what they give back behind its expiry lapses.
        priority: Lower burns first.
        effective_at: When it begins, epoch seconds; what is left of one that has not begun is not available yet.
        expires_at: When what is left lapses; None for never.
    """

    id: str
    kind: str
    amount: int
    left: int
    held: int
    priority: int
    effective_at: float
    expires_at: float | None


class WindowUsed(NamedTuple):
    """
    What was used of one allowance in the window that runs. Its limit is the routes': see `Metering.allowances`.

    Attributes:
        name: The allowance's.
        settled: Smallest parts spent.
        held: Held by live calls.
        starts_at, resets_at: Of the window, epoch seconds.
    """

    name: str
    settled: int
    held: int
    starts_at: float
    resets_at: float


class Balance(NamedTuple):
    """
    One account, in smallest parts: always ``granted - settled - expired - held == available``.

    Attributes:
        payer, unit: The account.
        granted: Sum of the grants that have begun.
        settled: Spent, debt included.
        held: Set aside by live holds, those in doubt included.
        expired: Lapsed with its grant.
        available: May be negative, by debt.
        debt: Settled beyond what was granted.
        at: The store's time, epoch seconds.
        grants: Those that are not used up, those that begin later too, in the order in which they burn.
        allowances: Their windows that run and were used, by name; beside the account, and in none of its sums.
    """

    payer: str
    unit: str
    granted: int
    settled: int
    held: int
    expired: int
    available: int
    debt: int
    at: float
    grants: tuple[GrantLeft, ...] = ()
    allowances: tuple[WindowUsed, ...] = ()
