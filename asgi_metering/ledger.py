"""
The ledger's verbs: what operators, webhooks and jobs do with accounts, in whole units.

Turns what people write into operations, and answers into receipts. Decides nothing, and knows no call, no HTTP and no
background: whoever owns a store gives it the way to run operations.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from typing import Any, TypeVar

from asgi_metering.amounts import Amount, Unit
from asgi_metering.errors import AmountError, ConfigurationError, UnknownHoldError
from asgi_metering.names import check_key, check_text
from asgi_metering.receipts import (
    Balance,
    Basis,
    EndedBy,
    Entry,
    GrantLeft,
    GrantReceipt,
    Posting,
    Receipt,
    WindowUsed,
)
from asgi_metering.rules.book import Book
from asgi_metering.rules.conservation import discrepancies
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Backfill,
    Correct,
    End,
    Operation,
    PostGrant,
    Refund,
    ReverseGrant,
    Sweep,
)
from asgi_metering.rules.state import NEVER, Account, AllowanceWindow, Grant, Hold
from asgi_metering.stores.contract import AccountRows, AccountsAfter, EntriesAfter, HoldRow, LiveHolds, Store

__all__ = ["Checked", "Ledger"]

_Answer = TypeVar("_Answer")

POSTED = {"reason": "posted"}
"""What the usage event of a posting says of its admission: there was none."""

MAX_PRIORITY = 2**31 - 1
"""Either way: what every store keeps and orders exactly, and more than anybody ranks by hand."""

LOOKED_AT = 10_000
"""Live holds that are looked through at once for those that are due; four times as many while there are more."""


class Checked(list[str]):
    """
    What `Ledger.check` found: a sentence per discrepancy.

    Attributes:
        accounts: How many accounts were looked at: an empty list proves these.
    """

    accounts = 0


class Ledger(abc.ABC):
    """
    The accounts of one store. `Metering` is one.

    Attributes:
        store: Where the accounts are.
        unit: What is counted where nothing else is said.
    """

    store: Store
    unit: Unit

    @abc.abstractmethod
    async def start(self) -> None:
        """Open the store; again changes nothing. Raises as `Store.open`."""

    @abc.abstractmethod
    async def _submit(self, operation: Operation) -> Answer:
        """Run one operation. Raises `MeteringError` for a mistake, `StoreError` where no answer came."""

    @abc.abstractmethod
    def counted(self, unit: Unit | None) -> Unit:
        """The unit to count in: *unit*, or the ledger's own. Raises `ConfigurationError` for one that cannot be."""

    @property
    @abc.abstractmethod
    def tells(self) -> bool:
        """Whether anybody wants usage events."""

    async def _ask(self, operation: Operation, kind: type[_Answer]) -> _Answer:
        answer = await self._submit(operation)
        if not isinstance(answer, kind):
            raise AssertionError(f"{operation!r} was answered with {answer!r}")
        return answer

    # -- giving and taking back ----------------------------------------------------------------------------

    async def grant(
        self,
        payer: str,
        amount: Amount,
        *,
        id: str,  # noqa: A002 -- the field's word; a grant has an id as a webhook has
        unit: Unit | None = None,
        priority: int = 0,
        effective_at: datetime | float | None = None,
        expires_at: datetime | float | None = None,
        kind: str = "purchased",
        actor: str = "",
    ) -> GrantReceipt:
        """
        Give *payer* units, once per payer and *id*: the id of the payment or webhook behind it.

        Args:
            payer: 1 to 255 printable characters. Its account is made by its first grant.
            amount: Whole units, above 0.
            id: The same id and body again changes nothing and answers ``applied=False``.
            unit: The metering's by default.
            priority: Lower burns first; then soonest expiry, then oldest.
            effective_at: When it begins: an aware datetime or epoch seconds; now by default.
            expires_at: When what is left lapses; never by default.
            kind: A word for the statement: purchased, promotional...
            actor: Who gave it, for the statement.

        Raises:
            IdempotencyConflictError: The id exists with another body.
            AmountError: The amount is no usable amount, or 0.
            InvalidKeyError: The payer or id cannot be a key.
            ConfigurationError: It would expire before it begins; a naive datetime; too many live grants; a *unit* that
                is no `Unit`, or one of a name that is known here with another scale; a priority that is no int of 32
                bits; a *kind* or *actor* that is no printable text of at most 255 characters (as of all postings).
            StoreUnavailableError: No answer came; repeat it with the same id.

        Atomic, one round trip.
        """
        counted = self.counted(unit)
        parts = _above_zero(counted, amount, "grant", id)
        if type(priority) is not int or not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
            raise ConfigurationError(
                f"The priority {priority!r} of grant {id!r} is not an int from {-MAX_PRIORITY} to {MAX_PRIORITY}. Use "
                f"a small number: lower ones burn first."
            )
        ask = PostGrant(
            check_key(id, "grant id"),
            check_key(payer, "payer"),
            counted.name,
            parts,
            priority,
            None if effective_at is None else _epoch(effective_at, "effective_at"),
            NEVER if expires_at is None else _epoch(expires_at, "expires_at"),
            check_text(kind, "kind"),
            check_text(actor, "actor"),
        )
        return await self._ask(ask, GrantReceipt)

    async def reverse_grant(
        self,
        payer: str,
        grant: str,
        *,
        id: str,  # noqa: A002 -- as of `grant`
        unit: Unit | None = None,
        actor: str = "",
    ) -> Posting:
        """
        Take a whole grant back, once per *id*: the payment behind it was charged back.

        What is free of it goes, what was spent of it becomes debt, and what calls hold of it stays with them and lapses
        when they give it back.

        Raises:
            ConfigurationError: There is no such grant, or it was taken back under another id.
            InvalidKeyError: The payer, grant or id cannot be a key.
            StoreUnavailableError: No answer came; repeat it with the same id.

        Atomic, one round trip.
        """
        ask = ReverseGrant(
            check_key(id, "posting id"),
            check_key(grant, "grant id"),
            check_key(payer, "payer"),
            self.counted(unit).name,
            check_text(actor, "actor"),
        )
        return await self._ask(ask, Posting)

    async def refund(
        self,
        call: str,
        *,
        id: str,  # noqa: A002 -- as of `grant`
        amount: Amount | None = None,
        payer: str | None = None,
        unit: Unit | None = None,
        actor: str = "",
    ) -> Posting:
        """
        Give back what a call was charged, or a part of it, once per call and *id*: to its sources, the last one first.

        Args:
            call: The call's id, which is its receipt's.
            id: Of the refund; the same again changes nothing and answers ``applied=False``.
            amount: Whole units; all that is left of the charge by default.
            payer: Whose account paid. Needed once the call's hold is forgotten (7 days after its end).
            unit: Of that account, where *payer* is given; the metering's by default.
            actor: Who decided it, for the statement.

        Raises:
            UnknownHoldError: The call is not known, and no *payer* is given.
            ConfigurationError: Nothing is left of its charge.
            AmountError: More than is left of it; no usable amount.
            IdempotencyConflictError: The id was used for another amount.
            StoreUnavailableError: No answer came; repeat it with the same id.

        The posting says what can be spent again (``returned``) and what came to a grant or window that is over
        (``lapsed``). Atomic; one round trip with *payer*, two without.
        """
        check_key(call, "call id")
        check_text(actor, "actor")
        if payer is None:
            hold = await self._hold(call)
            paid, counted = hold.payer, self._named(hold.unit, unit)
        else:
            paid, counted = check_key(payer, "payer"), self.counted(unit)
        parts = None if amount is None else counted.parts(amount, "refund")
        told = POSTED if self.tells else None
        return await self._ask(
            Refund(check_key(id, "posting id"), call, paid, counted.name, parts, actor, told), Posting
        )

    async def correct(
        self,
        payer: str,
        amount: Amount,
        *,
        id: str,  # noqa: A002 -- as of `grant`
        give_back: bool = False,
        unit: Unit | None = None,
        line: str = "",
        actor: str = "",
    ) -> Posting:
        """
        Charge *payer* more, or with *give_back* less, than was charged, without a call behind it; once per *id*.

        Raises:
            AmountError: The amount is none, 0, or more is given back than the account has spent.
            IdempotencyConflictError: The id was used for another amount.
            StoreUnavailableError: No answer came; repeat it with the same id.

        Atomic, one round trip.
        """
        counted = self.counted(unit)
        parts = _above_zero(counted, amount, "correction", id)
        ask = Correct(
            check_key(id, "posting id"),
            check_key(payer, "payer"),
            counted.name,
            -parts if give_back else parts,
            check_text(line, "line"),
            check_text(actor, "actor"),
            POSTED if self.tells else None,
        )
        return await self._ask(ask, Posting)

    async def backfill(
        self,
        payer: str,
        amount: Amount,
        *,
        id: str,  # noqa: A002 -- as of `grant`
        line: str,
        occurred_at: datetime | float | None = None,
        unit: Unit | None = None,
        actor: str = "",
    ) -> Posting:
        """
        Charge *payer* for work that was done without an admission, once per *id*; what is not there becomes debt.

        Args:
            payer: Whose account.
            amount: Whole units, above 0.
            id: Of the work, so that importing it twice charges once.
            line: The billing line.
            occurred_at: When it was done, for the usage event; now by default. The ledger's line bears the time of
                posting.
            unit: The metering's by default.
            actor: Who imports it, for the statement.

        Raises:
            AmountError: The amount is none, or 0.
            IdempotencyConflictError: The id was used for another amount.
            StoreUnavailableError: No answer came; repeat it with the same id.

        Atomic, one round trip.
        """
        counted = self.counted(unit)
        told: dict[str, Any] = dict(POSTED)
        if occurred_at is not None:
            told["started_at"] = _epoch(occurred_at, "occurred_at")
        ask = Backfill(
            check_key(id, "posting id"),
            check_key(payer, "payer"),
            counted.name,
            _above_zero(counted, amount, "backfill", id),
            check_text(line, "line"),
            check_text(actor, "actor"),
            told if self.tells else None,
        )
        return await self._ask(ask, Posting)

    # -- holds ---------------------------------------------------------------------------------------------

    async def holds(self, limit: int = 1_000) -> list[Hold]:
        """
        Holds that have not ended, oldest first, at most *limit*: what is in flight, and what is in doubt.

        Raises:
            ConfigurationError: The limit is no int from 1 up.
        """
        _check_count(limit, "limit", 1)
        await self.start()
        _, state = await self.store.read(LiveHolds(limit))
        return list(state.holds.values())

    async def reconcile(self, limit: int = 500) -> list[str]:
        """
        End what is overdue by the policies of its routes, in batches of *limit*, until nothing is.

        Holds whose grace is not over yet stay in doubt. Returns the ids of the calls that were ended. Every process
        does the same by itself now and then; this does it now.

        Raises:
            ConfigurationError: The limit is no int from 1 up.
        """
        _check_count(limit, "limit", 1)
        ended: list[str] = []
        await self.start()
        due = await self._due()
        while due:
            await self._submit(Sweep(limit))
            left = await self._due()
            gone = [hold_id for hold_id in due if hold_id not in left]
            ended.extend(gone)
            if not gone:
                break
            due = left
        return ended

    async def _due(self) -> dict[str, Hold]:
        """Holds whose grace is over, by id. They may stand anywhere among those that live, so all of these are read."""
        limit = LOOKED_AT
        while True:
            now, state = await self.store.read(LiveHolds(limit))
            if len(state.holds) < limit:
                return {hold.id: hold for hold in state.holds.values() if hold.due_at <= now}
            limit *= 4

    async def resolve(self, call: str, *, charge: Amount | None = None, unit: Unit | None = None) -> Receipt:
        """
        End the hold of a call as a person decides: charge so much, or nothing.

        Args:
            call: The call's id.
            charge: Whole units; None gives everything back.
            unit: Of the call, where it is not the metering's.

        What the call's own end says later is recorded, and not charged (DESIGN "Holds"). A hold that has ended already
        answers its receipt with ``applied=False``.

        Raises:
            UnknownHoldError: The call is not known.
            AmountError: No usable amount.
            ConfigurationError: Nobody pays for the call, which has slots or limits alone.
        """
        hold = await self._hold(check_key(call, "call id"))
        amount = None if charge is None else self._named(hold.unit, unit).parts(charge, "charge")
        if amount and not hold.payer:
            raise ConfigurationError(
                f"Call {call!r} was limited and has no payer that could be charged. Leave out charge= to end it."
            )
        basis = Basis.NONE if charge is None else Basis.OBSERVED
        event = {"outcome": "aborted", "reason": "resolved"} if self.tells else None
        ask = End(call, amount, basis, by=EndedBy.PERSON, event=event, failed=charge is None)
        return await self._ask(ask, Receipt)

    async def _hold(self, call: str) -> Hold:
        await self.start()
        _, state = await self.store.read(HoldRow(call))
        hold = state.holds.get(call)
        if hold is None:
            raise UnknownHoldError(
                f"No hold of call {call!r} is kept: it never held anything, or ended long ago. Check the id; for a "
                f"refund of an old charge say whose it was: payer=..."
            )
        return hold

    def _named(self, name: str, unit: Unit | None) -> Unit:
        """The unit called *name*: the one given, or the one known here."""
        counted = self.unit if unit is None and self.unit.name == name else self.counted(unit)
        if counted.name != name:
            raise ConfigurationError(
                f"That call is counted in {name!r}, not in {counted.name!r}. Pass its unit: unit=Unit({name!r}, ...)."
            )
        return counted

    # -- looking -------------------------------------------------------------------------------------------

    async def balance(self, payer: str, *, unit: Unit | None = None) -> Balance:
        """
        What *payer* has, in smallest parts of the unit; zeros for an unknown account. Changes nothing.

        With what is left of its grants, and when that lapses, and what it used of its allowances, and when these begin
        anew. A grant whose time has come or gone since the last operation is counted as of now.
        """
        counted = self.counted(unit)
        await self.start()
        now, state = await self.store.read(AccountRows(check_key(payer, "payer"), counted.name))
        account = state.accounts.get((payer, counted.name)) or Account(payer, counted.name)
        book = Book(state, (payer, counted.name), max(now, account.seen_at))
        return Balance(
            payer,
            counted.name,
            book.granted,
            book.settled,
            book.held,
            book.expired,
            book.available,
            book.debt,
            now,
            tuple(_left(grant) for grant in book.grants_left),
            _running(state.allowances.values(), book.now),
        )

    async def statement(self, payer: str, *, unit: Unit | None = None, after: int = 0) -> AsyncIterator[Entry]:
        """
        The lines of *payer*'s ledger above number *after*, oldest first, read page by page.

        The number of the last line that was read is the cursor of the next reading. Lines older than the retention are
        folded into the account's checkpoint and are not listed.

        Raises:
            ConfigurationError: *after* is no int from 0 up.
        """
        _check_count(after, "after", 0)
        counted = self.counted(unit)
        await self.start()
        while True:
            _, state = await self.store.read(EntriesAfter(check_key(payer, "payer"), counted.name, after))
            lines = state.entries.get((payer, counted.name), [])
            for line in lines:
                yield line
            if not lines:
                return
            after = lines[-1].number

    async def check(self) -> Checked:
        """
        Prove that the books balance: each account with its allowance windows atomically, the accounts in turn.

        Returns a sentence per discrepancy, and how many accounts were looked at; an empty list is the proof.
        """
        await self.start()
        wrong = Checked()
        last = ("", "")
        while True:
            _, page = await self.store.read(AccountsAfter(*last))
            if not page.accounts:
                return wrong
            for key in sorted(page.accounts):
                _, rows = await self.store.read(AccountRows(*key))
                account = rows.accounts.get(key)
                # The memory store may have forgotten a payer without grants since the page was read.
                if account is not None:
                    wrong.accounts += 1
                    grants = [*rows.grants.get(key, {}).values(), *rows.closed_grants.get(key, {}).values()]
                    wrong.extend(discrepancies(account, grants, rows.holds.values(), rows.allowances.values()))
                last = key


def _above_zero(unit: Unit, amount: Amount, what: str, posting: str) -> int:
    parts = unit.parts(amount, what)
    if not parts:
        raise AmountError(f"The {what} {posting!r} of {amount!r} moves nothing. Use an amount above 0.")
    return parts


def _left(grant: Grant) -> GrantLeft:
    expires_at = None if grant.expires_at == NEVER else grant.expires_at
    return GrantLeft(
        grant.id,
        grant.kind,
        grant.amount,
        grant.free,
        grant.held,
        grant.priority,
        grant.effective_at,
        expires_at,
    )


def _running(windows: Iterable[AllowanceWindow], now: float) -> tuple[WindowUsed, ...]:
    used = [
        WindowUsed(window.name, window.settled, window.held, window.start, window.end)
        for window in windows
        if window.start <= now < window.end and (window.settled or window.held)
    ]
    return tuple(sorted(used))


def _check_count(count: int, what: str, least: int) -> None:
    if type(count) is not int or count < least:
        raise ConfigurationError(f"{what}={count!r} is not an int from {least} up. Pass one, or leave it out.")


def _epoch(moment: datetime | float, what: str) -> float:
    if isinstance(moment, datetime):
        if moment.tzinfo is None:
            raise ConfigurationError(f"{what}={moment!r} has no time zone. Give it one: moment.replace(tzinfo=UTC).")
        return moment.timestamp()
    if isinstance(moment, bool) or not isinstance(moment, int | float) or not 0 <= moment < NEVER:
        raise ConfigurationError(f"{what}={moment!r} is neither an aware datetime nor epoch seconds.")
    return float(moment)
