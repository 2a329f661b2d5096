"""
What operations look at: the keys of a batch, gathered before its first trip, so that all of them are locked and
loaded at once.

What an operation needs beyond that is rare, and loaded at its turn (`working_copy`). Knows operations, no SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from asgi_metering.rules.keys import key_rows
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Backfill,
    Claim,
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
    Share,
    SourceAsk,
    Undo,
)
from asgi_metering.rules.state import AccountKey, AllowanceKey, BucketKey, Table

__all__ = ["Wants", "account_lock"]

_BETWEEN: Final = "\x1f"
"""Between payer and unit in the name of a lock; keys are printable, so they have none."""


_KINDS: Final = {Table.UNIT: "u", Table.CHARGE_KEY: "k", Table.IDEMPOTENCY: "i"}
"""What the names of locks begin with."""


def account_lock(key: AccountKey) -> str:
    """The name of an account's lock: whoever has it may change the account, and all that belongs to it."""
    payer, unit = key
    return f"a{payer}{_BETWEEN}{unit}"


class Wants:
    """
    The keys of a batch.

    Attributes:
        accounts: To be locked and loaded, with their open grants.
        holds: Ids; each comes with its account and the allowance windows that its parts name.
        pinned: Those of them whose pinned windows come too.
        grants, windows, rolling, counters, pools: By key. Of *rolling* allowances the last window comes.
        texts: By table, keys of rows that are found by one text and by nothing else.
        others: Names of locks of what is nobody's: the outbox, readings, and accounts that a sweep has found.
        readings: Whether all shared readings come.
    """

    def __init__(self, operations: Iterable[Operation] = ()) -> None:
        self.accounts: set[AccountKey] = set()
        self.holds: set[str] = set()
        self.pinned: set[str] = set()
        self.grants: set[tuple[str, str, str]] = set()
        self.windows: set[AllowanceKey] = set()
        self.rolling: set[BucketKey] = set()
        self.counters: set[str] = set()
        self.pools: set[str] = set()
        self.texts: dict[str, set[str]] = {Table.UNIT: set(), Table.CHARGE_KEY: set(), Table.IDEMPOTENCY: set()}
        self.others: set[str] = set()
        self.readings = False
        for operation in operations:
            gather = _GATHER.get(type(operation))
            if gather is not None:
                gather(self, operation)

    def plain(self, table: str, keys: Iterable[str]) -> None:
        """Rows of *table* that are found by one text."""
        self.texts[table].update(keys)

    def _account(self, payer: str, unit: str) -> None:
        self.accounts.add((payer, unit))

    @property
    def locks(self) -> set[str]:
        """Names of all locks that can be told from the operations alone."""
        named = {account_lock(key) for key in self.accounts}
        named.update(f"c{key}" for key in self.counters)
        named.update(f"p{pool}" for pool in self.pools)
        for table, keys in self.texts.items():
            named.update(_KINDS[table] + key for key in keys)
        return named | self.others

    def admit(self, ask: Admit) -> None:
        """A call to be admitted; its hold, should it be a repeat."""
        self.holds.add(ask.id)
        self._account(ask.payer, ask.unit)
        self.counters.update(limit.key for limit in ask.limits)
        self.pools.update(lease.pool for lease in ask.leases)
        self._sources(ask.sources, ask.payer, ask.unit)
        if ask.idempotency is not None:
            self.plain(Table.IDEMPOTENCY, [ask.idempotency.key])
        if ask.charge_key is not None:
            self.plain(Table.CHARGE_KEY, key_rows(ask.charge_key))

    def _sources(self, sources: Iterable[SourceAsk], payer: str, unit: str) -> None:
        for source in sources:
            owner = source.payer or payer
            self._account(owner, unit)
            if isinstance(source, AllowanceSource):
                if source.boundaries:
                    self.windows.update((owner, unit, source.name, start) for start in source.boundaries[:-1])
                else:
                    self.rolling.add((owner, unit, source.name))

    def preview(self, ask: Preview) -> None:
        """As an admission."""
        self.admit(ask.ask)

    def undo(self, ask: Undo) -> None:
        """A call whose admission is taken back, and what it counted."""
        self.holds.add(ask.ask.id)
        self.counters.update(limit.key for limit in ask.ask.limits)

    def end(self, ask: End) -> None:
        """A call's hold, and the windows that it corrects."""
        self.holds.add(ask.id)
        if ask.actual:
            self.pinned.add(ask.id)

    def hold(self, ask: Renew | Grow) -> None:
        """A hold alone."""
        self.holds.add(ask.id)

    def grant(self, ask: PostGrant) -> None:
        """A grant, should it be a repeat, and its account."""
        self._account(ask.payer, ask.unit)
        self.grants.add((ask.payer, ask.unit, ask.id))

    def reversal(self, ask: ReverseGrant) -> None:
        """A grant and its account."""
        self._account(ask.payer, ask.unit)
        self.grants.add((ask.payer, ask.unit, ask.grant))

    def account(self, ask: Refund | Correct | Backfill) -> None:
        """An account; the lines and the grants come at its turn."""
        self._account(ask.payer, ask.unit)

    def declare(self, ask: Declare) -> None:
        """The units."""
        self.plain(Table.UNIT, [name for name, _ in ask.units])

    def share(self, _: Share) -> None:
        """All readings: they are few, and the oldest makes room for a new one."""
        self.others.add("r")
        self.readings = True

    def outbox(self, _: Claim | Acknowledge) -> None:
        """The order of the outbox: what one claims, no other does."""
        self.others.add("o")


_GATHER: Final[Mapping[type, Callable[[Wants, Any], None]]] = {
    Admit: Wants.admit,
    Preview: Wants.preview,
    Undo: Wants.undo,
    Grow: Wants.hold,
    Renew: Wants.hold,
    End: Wants.end,
    PostGrant: Wants.grant,
    ReverseGrant: Wants.reversal,
    Refund: Wants.account,
    Correct: Wants.account,
    Backfill: Wants.account,
    Declare: Wants.declare,
    Share: Wants.share,
    Claim: Wants.outbox,
    Acknowledge: Wants.outbox,
}
