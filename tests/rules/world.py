"""
One state and a clock that only the test moves, with a short name for every operation.

Accounts are ("ada", "credits") unless a test says otherwise, so that a test shows only what it is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asgi_metering.decisions import Decision, Refusal
from asgi_metering.receipts import Basis, EndedBy, Entry, EntryKind, GrantReceipt, Receipt
from asgi_metering.rules.conservation import discrepancies, ledger_discrepancies
from asgi_metering.rules.decide import Answer, run
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    End,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Renew,
    SourceAsk,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.state import NEVER, Account, AccountKey, Change, Counter, Grant, Hold, State

__all__ = [
    "DAY_S",
    "HOUR_S",
    "MIDNIGHT",
    "WALLET",
    "World",
    "bucket",
    "calendar",
    "days",
    "fixed",
    "imbalances",
    "moving",
    "sliding",
    "slots",
    "snapshot",
]

MIDNIGHT = 1_700_006_400.0
"""A UTC midnight: 2023-11-15."""

HOUR_S = 3_600.0
DAY_S = 86_400.0

WALLET = WalletSource()


def days(now: float) -> tuple[float, ...]:
    """The four UTC midnights around *now* that a caller sends."""
    today = now // DAY_S * DAY_S
    return (today - DAY_S, today, today + DAY_S, today + 2 * DAY_S)


def fixed(limit: int, window_s: float = 60.0, **more: Any) -> LimitAsk:
    """A limit whose window begins with the first hit."""
    return LimitAsk(**{"name": "calls", "key": "k", **more}, kind=WindowKind.FIXED, limit=limit, window_s=window_s)


def sliding(limit: int, window_s: float = 60.0, **more: Any) -> LimitAsk:
    """A limit of two weighted neighbours."""
    return LimitAsk(**{"name": "calls", "key": "k", **more}, kind=WindowKind.SLIDING, limit=limit, window_s=window_s)


def moving(limit: int, window_s: float = 60.0, **more: Any) -> LimitAsk:
    """A limit that remembers every call."""
    return LimitAsk(**{"name": "calls", "key": "k", **more}, kind=WindowKind.MOVING, limit=limit, window_s=window_s)


def bucket(refill: int, burst: int, window_s: float = 60.0, **more: Any) -> LimitAsk:
    """A bucket that holds *burst* and gets *refill* back in each window."""
    asked = {"name": "calls", "key": "k", "refill": refill, **more}
    return LimitAsk(**asked, kind=WindowKind.BUCKET, limit=burst, window_s=window_s)


def calendar(limit: int, now: float, **more: Any) -> LimitAsk:
    """A limit per UTC day, with the boundaries that a caller sends at *now*."""
    asked = {"name": "calls", "key": "k", "boundaries": days(now), **more}
    return LimitAsk(**asked, kind=WindowKind.CALENDAR, limit=limit, window_s=DAY_S)


def slots(limit: int, pool: str = "pool", level: str = "caller") -> LeaseAsk:
    """One slot of a pool."""
    return LeaseAsk("concurrency", pool, limit, level)


def snapshot(state: State) -> dict[str, Any]:
    """Every row of *state*, as a value of its own that later steps do not change; tables without rows are absent."""
    kept: dict[str, Any] = {}
    for table in State.__slots__:
        rows = {key: _own(row) for key, row in getattr(state, table).items()}
        kept[table] = {key: row for key, row in rows.items() if row not in ({}, [], set())}
    return kept


def _own(row: Any) -> Any:
    return type(row)(row) if type(row) in (dict, list, set) else row


class World:
    """
    A state and its time.

    Args:
        now: Epoch seconds of the beginning.
    """

    def __init__(self, now: float = MIDNIGHT + 10 * HOUR_S) -> None:
        self.state = State()
        self.now = now
        self.written: list[Change] = []
        self._calls = 0

    # -- operations ----------------------------------------------------------------------------------------

    def run(self, operation: Operation) -> Any:
        """Run one operation now; what it wrote is in `written`."""
        self.written = []
        answer: Answer = run(self.state, operation, self.now, self.written)
        return answer

    def wait(self, seconds: float) -> None:
        """Let *seconds* pass; a negative number steps back."""
        self.now += seconds

    def grant(
        self,
        amount: int,
        id: str = "gift",  # noqa: A002 -- as in the operation
        *,
        payer: str = "ada",
        starts_in: float | None = None,
        ends_in: float = NEVER,
        priority: int = 0,
        **more: Any,
    ) -> GrantReceipt:
        """Give units; times are seconds from now."""
        begins = None if starts_in is None else self.now + starts_in
        ask = PostGrant(id, payer, "credits", amount, priority, begins, self.now + ends_in, **more)
        receipt: GrantReceipt = self.run(ask)
        return receipt

    def ask(
        self,
        amount: int = 0,
        id: str | None = None,  # noqa: A002 -- as in the operation
        *,
        payer: str = "ada",
        at_least: int | None = None,
        sources: Sequence[SourceAsk] | None = None,
        limits: Sequence[LimitAsk] = (),
        leases: Sequence[LeaseAsk] = (),
        **more: Any,
    ) -> Admit:
        """The operation that `admit` runs."""
        if id is None:
            self._calls += 1
            id = f"call-{self._calls}"  # noqa: A001 -- as in the operation
        minimum = amount if at_least is None else at_least
        if sources is None:
            sources = (WALLET,) if amount else ()
        return Admit(id, payer, "credits", amount, minimum, tuple(sources), tuple(limits), tuple(leases), **more)

    def admit(self, amount: int = 0, id: str | None = None, **more: Any) -> Decision:  # noqa: A002
        """Ask for one call, with an id of its own unless one is given."""
        decision: Decision = self.run(self.ask(amount, id, **more))
        return decision

    def refused(self, amount: int = 0, **more: Any) -> Refusal:
        """Ask for one call that must be refused, and must leave no trace."""
        before = snapshot(self.state)
        decision = self.admit(amount, **more)
        assert decision.refusal is not None
        assert not decision.admitted
        assert snapshot(self.state) == before
        assert self.written == []
        return decision.refusal

    def end(self, id: str, amount: int | None, basis: Basis = Basis.USAGE, **more: Any) -> Receipt:  # noqa: A002
        """End a call: settle it for *amount*, or release it with None."""
        receipt: Receipt = self.run(End(id, amount, basis, **more))
        return receipt

    def person_ends(self, id: str, amount: int | None) -> Receipt:  # noqa: A002
        """End a call by a person's decision."""
        return self.end(id, amount, by=EndedBy.PERSON)

    def beat(self, id: str, observed: int = 0) -> bool:  # noqa: A002
        """Send a heartbeat."""
        lives: bool = self.run(Renew(id, observed))
        return lives

    # -- what is there -------------------------------------------------------------------------------------

    def account(self, payer: str = "ada") -> Account:
        """The account's row; zeros if it has none."""
        return self.state.accounts.get((payer, "credits"), Account(payer, "credits"))

    def sums(self, payer: str = "ada") -> tuple[int, int, int, int, int]:
        """(granted, settled, held, expired, debt) of an account."""
        row = self.account(payer)
        return row.granted, row.settled, row.held, row.expired, row.debt

    def a_grant(self, id: str = "gift", payer: str = "ada") -> Grant:  # noqa: A002
        """One grant's row."""
        row = self.state.grant((payer, "credits"), id)
        assert row is not None
        return row

    def spent(self, *ids: str) -> tuple[tuple[int, int, int], ...]:
        """(settled, held, expired) of each named grant."""
        rows = [self.a_grant(id) for id in ids]  # noqa: A001
        return tuple((row.settled, row.held, row.expired) for row in rows)

    def hold(self, id: str) -> Hold:  # noqa: A002
        """One hold's row."""
        return self.state.holds[id]

    def counter(self, key: str = "k") -> Counter:
        """One counter's row."""
        return self.state.counters[key]

    def lines(self, payer: str = "ada") -> list[tuple[EntryKind, int]]:
        """(kind, amount) of the account's ledger, oldest first."""
        return [(line.kind, line.amount) for line in self.entries(payer)]

    def entries(self, payer: str = "ada") -> list[Entry]:
        """The account's ledger, oldest first."""
        return self.state.entries.get((payer, "credits"), [])

    def today(self, name: str = "free", payer: str = "ada") -> tuple[int, int]:
        """(settled, held) of an allowance in the UTC day that is now."""
        row = self.state.allowances.get((payer, "credits", name, days(self.now)[1]))
        return (0, 0) if row is None else (row.settled, row.held)

    def free(self, limit: int, name: str = "free") -> AllowanceSource:
        """An allowance per UTC day, with the boundaries that a caller sends now."""
        return AllowanceSource(name, limit, days(self.now))


# -- proofs ------------------------------------------------------------------------------------------------


def imbalances(state: State) -> list[str]:
    """What is wrong with the books of *state*, beyond what `discrepancies` looks at; an empty list is the proof."""
    wrong: list[str] = []
    for key, account in state.accounts.items():
        grants = [*state.grants.get(key, {}).values(), *state.closed_grants.get(key, {}).values()]
        allowances = [row for place, row in state.allowances.items() if place[:2] == key]
        wrong.extend(discrepancies(account, grants, state.live_holds(key), allowances))
        wrong.extend(ledger_discrepancies(account, grants, state.checkpoints.get(key), state.entries.get(key, [])))
        if min(account.granted, account.settled, account.held, account.expired, account.debt) < 0:
            wrong.append(f"{account!r} has a negative sum.")
    for key, ids in state.live.items():
        wrong.extend(f"{id!r} is live and has ended." for id in ids if state.holds[id].receipt is not None)  # noqa: A001
        wrong.extend(f"{id!r} lives elsewhere." for id in ids if _account_of(state.holds[id]) != key)  # noqa: A001
    live = {id for ids in state.live.values() for id in ids}  # noqa: A001
    wrong.extend(
        f"{hold.id!r} is not live." for hold in state.holds.values() if not hold.receipt and hold.id not in live
    )
    wrong.extend(f"{row!r} counts below zero." for row in state.counters.values() if min(row.used, row.previous) < 0)
    return wrong


def _account_of(hold: Hold) -> AccountKey:
    return hold.payer, hold.unit
