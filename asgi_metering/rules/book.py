"""
One account while an operation works on it: burn order, holding, spending, giving back, debt.

The only place that moves units between granted, held, settled and expired, so that
``granted - settled - expired - held = available`` needs to be right only here.
Does not know holds' lives, calls or limits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import AmountError
from asgi_metering.receipts import Basis, Entry, EntryKind, Part, Source
from asgi_metering.rules.state import NEVER, TAKEN_BACK, Account, AccountKey, Change, Grant, State, Table, build

__all__ = ["Book", "burn_order"]

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_GRANT, _DEBT = Source.GRANT, Source.DEBT

_NO_GRANTS: Mapping[str, Grant] = {}


def burn_order(grant: Grant) -> tuple[int, float, int]:
    """Sort key: lower priority number first, then soonest expiry, then oldest."""
    return (grant.priority, grant.expires_at, grant.number)


class Book:
    """
    The account and the grants it touches, as they will be.

    Args:
        state: Read, never written.
        key: (payer, unit).
        now: The store's time, already clamped.
    """

    __slots__ = (
        "_entries",
        "_is_rescheduled",
        "_state",
        "_touched",
        "account",
        "debt",
        "entries",
        "expired",
        "granted",
        "held",
        "key",
        "now",
        "settled",
    )

    def __init__(self, state: State, key: AccountKey, now: float) -> None:
        account = state.accounts.get(key)
        if account is None:
            account = Account(*key)
        self._state = state
        self.key = key
        self.now = now
        self.account = account
        (_, _, self.granted, self.settled, self.held, self.expired, self.debt, self.entries, changes_at, _, _) = account
        self._touched: dict[str, Grant] = {}
        self._entries: list[Entry] = []
        self._is_rescheduled = now >= changes_at
        if self._is_rescheduled:
            self._mature()

    @property
    def available(self) -> int:
        """What a new hold may take; negative by debt."""
        return self.granted - self.settled - self.expired - self.held

    @property
    def room(self) -> int:
        """What may still be spent or held beside what is: both together stay within what stores count exactly."""
        return MAX_AMOUNT - self.settled - self.held

    @property
    def returnable(self) -> int:
        """What of the held units would be free again if every hold ended unused now: the rest would lapse."""
        return self.held - sum(grant.held for grant in self._open_grants() if grant.expires_at <= self.now)

    @property
    def open_grants(self) -> int:
        """How many grants have units left."""
        return len(self._open_grants())

    @property
    def grants_left(self) -> list[Grant]:
        """Grants of which something is left or held, those that begin later included, in burn order."""
        return sorted(self._open_grants(), key=burn_order)

    @property
    def promised(self) -> int:
        """What was given so far, grants that begin later included."""
        return self.granted + sum(grant.amount for grant in self._open_grants() if not grant.begun)

    # -- grants by time ------------------------------------------------------------------------------------

    def _mature(self) -> None:
        """
        Begin grants whose time has come, and lapse what is free of those whose time is over.

        As if somebody had looked at each of these instants: a grant pays debt when it begins, in the order in which
        they began, also if it has lapsed since. When the account is looked at must not change what it has.
        """
        beginning = [grant for grant in self._open_grants() if not grant.begun and grant.effective_at <= self.now]
        for grant in sorted(beginning, key=lambda grant: (grant.effective_at, *burn_order(grant))):
            self.granted += grant.amount
            self._touched[grant.id] = grant._replace(begun=True)
            self._pay_debt(self._touched[grant.id])
        for grant in sorted(self._open_grants(), key=burn_order):
            if grant.begun and grant.expires_at <= self.now and grant.free:
                self._lapse(grant)

    def _lapse(self, grant: Grant) -> None:
        lapsed = grant.free
        self._touched[grant.id] = grant.moved(expired=lapsed)
        self.expired += lapsed
        self.write(EntryKind.EXPIRE, lapsed, grant.id)

    def _open_grants(self) -> Collection[Grant]:
        """Open grants of the account as they are by now, in no order."""
        stored = self._state.grants.get(self.key, _NO_GRANTS)
        if not self._touched:
            return stored.values()
        merged = {**stored, **self._touched}
        return [grant for grant in merged.values() if grant.is_open]

    def _spendable(self) -> list[Grant]:
        """Grants with free units, in burn order."""
        now = self.now
        grants = [g for g in self._open_grants() if g.begun and g.expires_at > now and g.free]
        if len(grants) > 1:
            grants.sort(key=burn_order)
        return grants

    def _grant(self, grant_id: str) -> Grant:
        grant = self._touched.get(grant_id) or self._state.grant(self.key, grant_id)
        if grant is None:
            raise AssertionError(f"a part names grant {grant_id!r}, which account {self.key!r} does not have")
        return grant

    # -- moving units --------------------------------------------------------------------------------------

    def hold(self, amount: int) -> tuple[Part, ...]:
        """
        Set *amount* aside, over the grants in burn order; what they do not have is held as debt to come.

        The caller has checked that it is available, or may be overdrawn.
        """
        parts: list[Part] = []
        left = amount
        for grant in self._spendable() if left else ():
            take = grant.free
            if take > left:
                take = left
            self._touched[grant.id] = grant.moved(0, take)
            parts.append(build(Part, (_GRANT, grant.id, 0.0, take)))
            left -= take
            if not left:
                break
        if left:
            parts.append(Part(_DEBT, "", 0.0, left))
        self.held += amount
        return tuple(parts)

    def settle(self, parts: tuple[Part, ...], amount: int) -> tuple[Part, ...]:
        """
        Spend *amount* of the held *parts* in their order, give back what is left of them, from the last backwards.

        What exceeds them is spent from free grants in burn order, and what exceeds those becomes debt.
        Returns where the charge came from.
        """
        spent = []
        left = amount
        for part in parts:
            take = part.amount
            if take > left:
                take = left
            left -= take
            if part.source is _DEBT:
                # Nothing is behind it: it is spent like what no hold covered.
                self.held -= part.amount
                left += take
                continue
            self._unhold(part, take)
            if take:
                spent.append(part if take == part.amount else build(Part, (*part[:3], take)))
        if left:
            spent.extend(self.spend(left))
        if self.debt:
            self._repay()
        return tuple(spent)

    def _unhold(self, part: Part, take: int) -> None:
        """End one held part: *take* of it is spent, the rest is free again, or lapses with its grant."""
        grant, amount = self._grant(part.name), part.amount
        lapsed = amount - take if grant.expires_at <= self.now else 0
        self._touched[part.name] = grant.moved(take, -amount, lapsed)
        self.held -= amount
        self.settled += take
        if lapsed:
            self.expired += lapsed
            self.write(EntryKind.EXPIRE, lapsed, grant.id)

    def spend(self, amount: int) -> list[Part]:
        """Spend *amount* without a hold: free grants in burn order, then debt. Always succeeds."""
        spent = []
        left = amount
        for grant in self._spendable():
            take = min(grant.free, left)
            self._touched[grant.id] = grant.moved(settled=take)
            spent.append(Part(_GRANT, grant.id, 0.0, take))
            left -= take
            if not left:
                break
        if left:
            self.debt += left
            spent.append(Part(_DEBT, "", 0.0, left))
        self.settled += amount
        return spent

    def give_back(self, parts: tuple[Part, ...], amount: int) -> None:
        """Take back *amount* of a charge, from its last part backwards; what its grant's expiry overtook lapses."""
        left = amount
        for part in reversed(parts):
            take = min(part.amount, left)
            left -= take
            if part.source is not _DEBT:
                grant = self._grant(part.name)
                # Less than the part where another charge's paid debt was given back to this grant.
                back = min(grant.settled, take)
                if back:
                    self._unspend(grant, back)
                take -= back
            self._forgive(take)
        if self.debt:
            self._repay()

    def _forgive(self, amount: int) -> None:
        """Owe *amount* less. What of it grants have paid meanwhile goes back to them: which ones, nobody keeps."""
        cancelled = min(self.debt, amount)
        self.debt -= cancelled
        self.settled -= cancelled
        left = amount - cancelled
        if left:
            for grant in sorted(self._paid_grants(), key=burn_order, reverse=True):
                back = min(grant.settled, left)
                self._unspend(grant, back)
                left -= back
                if not left:
                    break
            else:
                raise AssertionError(f"{left} to give back were never charged to account {self.key!r}")

    def _paid_grants(self) -> list[Grant]:
        state, key = self._state, self.key
        merged = {**state.closed_grants.get(key, {}), **state.grants.get(key, {}), **self._touched}
        return [grant for grant in merged.values() if grant.settled]

    def _unspend(self, grant: Grant, amount: int) -> None:
        lapsed = amount if grant.expires_at <= self.now else 0
        self._touched[grant.id] = grant.moved(settled=-amount, expired=lapsed)
        # It may have been closed, so that its expiry was no longer awaited.
        self._is_rescheduled = True
        self.settled -= amount
        if lapsed:
            self.expired += lapsed
            self.write(EntryKind.EXPIRE, lapsed, grant.id)

    def reverse(self, grant_id: str) -> int:
        """
        Take a grant back: its free units go, its spent ones become debt. Returns how many.

        What is held of it stays with its holds, and lapses when they give it back.
        """
        grant = self._grant(grant_id)
        spent, free = grant.settled, grant.free
        taken = spent + free
        self._touched[grant_id] = grant._replace(settled=0, reversed=taken, expires_at=TAKEN_BACK, begun=True)
        if grant.begun:
            self.granted -= taken
        self.debt += spent
        self._is_rescheduled = True
        if self.debt:
            self._repay()
        return taken

    def add(self, grant: Grant) -> int:
        """Take in a new grant; what it pays of the debt is returned."""
        self._touched[grant.id] = grant
        self._is_rescheduled = True
        if grant.begun:
            self.granted += grant.amount
        self.write(EntryKind.GRANT, grant.amount, grant.id, actor=grant.actor)
        return self._pay_debt(grant) if grant.begun else 0

    def _repay(self) -> None:
        """Pay debt from units that came free, in burn order: debt exists only where nothing is free."""
        for grant in self._spendable():
            self._pay_debt(grant)

    def _pay_debt(self, grant: Grant) -> int:
        paid = min(grant.free, self.debt)
        if paid:
            self._touched[grant.id] = grant.moved(settled=paid)
            self.debt -= paid
            self.write(EntryKind.DEBT_PAYMENT, paid, grant.id)
        return paid

    # -- writing down --------------------------------------------------------------------------------------

    def write(
        self,
        kind: EntryKind,
        amount: int,
        ref: str,
        *,
        line: str = "",
        basis: Basis | None = None,
        estimated: bool = False,
        actor: str = "",
        parts: tuple[Part, ...] = (),
        id: str = "",  # noqa: A002 -- the field's own name
    ) -> int:
        """Add a ledger line and return its number; the time, and what the account has left, are filled in."""
        self.entries += 1
        payer, unit = self.key
        number, now, available = self.entries, self.now, self.available
        self._entries.append(
            build(
                Entry,
                (payer, unit, number, now, kind, amount, ref, line, basis, estimated, available, actor, parts, id),
            )
        )
        return number

    def changes(self, due_at: float = NEVER) -> list[Change]:
        """
        What the operation did to the account, for the store to write.

        Args:
            due_at: When a new hold of the account falls due.

        Raises:
            AmountError: More is spent and held now than stores count exactly. What is held is never refused its end.
        """
        key, before = self.key, self.account
        payer, unit = key
        changes_at = self._next_change() if self._is_rescheduled else before.next_change_at
        if due_at > before.next_due_at:
            due_at = before.next_due_at
        granted, settled, held, expired, debt = self.granted, self.settled, self.held, self.expired, self.debt
        if settled + held > MAX_AMOUNT and settled + held > before.settled + before.held:
            raise AmountError(
                f"Account {payer!r} would have spent and held {settled + held} smallest parts of {unit!r}, and stores "
                f"count exactly up to {MAX_AMOUNT}. Declare the unit with a smaller scale."
            )
        account = build(
            Account,
            (payer, unit, granted, settled, held, expired, debt, self.entries, changes_at, due_at, self.now),
        )
        changes: list[Change] = []
        for grant in self._touched.values():
            changes.append((Table.GRANT, key, grant))
        changes.append((Table.ACCOUNT, key, account))
        for entry in self._entries:
            changes.append((Table.ENTRY, key, entry))
        return changes

    def _next_change(self) -> float:
        """The first instant at which an open grant begins or lapses."""
        return min(
            (
                grant.effective_at if not grant.begun else grant.expires_at
                for grant in self._open_grants()
                if not grant.begun or grant.expires_at > self.now
            ),
            default=NEVER,
        )
