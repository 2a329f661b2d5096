"""
Partitions: which slot of a Cluster has what, and what of an admission belongs to which.

A namespace is a fixed number of partitions, each with a hash tag, and so a slot, of its own; they spread over all
nodes. A payer's partition is its account root: accounts in all units, their grants, allowances, ledgers and live holds,
the holds of the calls that it pays, the events of these calls, and the keys, limits and pools that say that they are
its own (`rules.roots`). Everything in one partition is decided by one script in one round trip, exactly as on one
server; two payers of one partition as well. What is nobody's, a limit on an address or a pool for all, has the
partition of its own name. Where a row is, it says itself, so that rows can be moved. Indexes are one for each
partition, so that sweeps, outbox and reads walk a known list. Does not know how a partition is asked.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from asgi_metering.rules.operations import Admit, LeaseAsk, LimitAsk, SourceAsk
from asgi_metering.rules.roots import root_of

__all__ = ["PARTITIONS", "Partitions", "Plan", "Run"]

PARTITIONS = 64
"""
As many shards as a namespace can use. Whatever looks at all of it asks each of them, so more would cost small ones.
"""

NOWHERE = -1

MAX_REMEMBERED = 65_536
"""Names whose partition is remembered: to tell it anew takes a microsecond."""


class Run(NamedTuple):
    """Neighbouring payer objects of one partition: that is where they are asked, and where the call's hold is."""

    home: int
    sources: tuple[SourceAsk, ...]


class Plan(NamedTuple):
    """
    Where an admission is decided.

    Attributes:
        runs: Where the call's hold may be, in the order in which they are asked; at least one.
        claim: The partition of its idempotency key; None if it has none.
        charged: The partition of its charge key; None if it has none, or is free.
        limits, leases: By partition.
    """

    runs: tuple[Run, ...]
    claim: int | None
    charged: int | None
    limits: Mapping[int, tuple[LimitAsk, ...]]
    leases: Mapping[int, tuple[LeaseAsk, ...]]

    @property
    def homes(self) -> list[int]:
        """The partitions of those who may pay, each once, in the order of `runs`."""
        return list(dict.fromkeys(run.home for run in self.runs))

    def first_at(self, home: int) -> Plan:
        """The same, with those who are at *home* asked first."""
        return self._replace(runs=tuple(sorted(self.runs, key=lambda run: run.home != home)))

    def foreign(self, home: int) -> list[int]:
        """The partitions that are asked beside *home*, ascending."""
        beside = {*self.limits, *self.leases, *([] if self.claim is None else [self.claim])}
        return sorted(beside - {home})


class Partitions:
    """
    The partitions of one namespace.

    Args:
        count: How many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.of = lru_cache(maxsize=MAX_REMEMBERED)(self._of)

    def _of(self, name: str) -> int:
        return crc_hqx(name.encode(), 0) % self.count

    def of_key(self, key: str) -> int:
        """The partition of the one whose *key* it is; of its own name if it is nobody's."""
        return self.of(root_of(key) or key)

    def charged_at(self, key: str) -> int:
        """The partition of a charge key; `NOWHERE` if it is nobody's: the rows of one key would be in several."""
        root = root_of(key)
        return self.of(root) if root else NOWHERE

    def single(self, ask: Admit) -> int | None:
        """The partition that all of *ask* is in; None if it is in several. What nobody pays for needs no payer's."""
        once = ask.idempotency
        if not (ask.sources or ask.amount or once is not None):
            places = {self.of_key(limit.key) for limit in ask.limits}
            places |= {self.of_key(lease.pool) for lease in ask.leases}
            return places.pop() if len(places) == 1 else None if places else self.of(ask.payer)
        home = self.of(ask.payer)
        for limit in ask.limits:
            if self.of_key(limit.key) != home:
                return None
        for lease in ask.leases:
            if self.of_key(lease.pool) != home:
                return None
        for source in ask.sources:
            if source.payer and self.of(source.payer) != home:
                return None
        if once is not None and self.of_key(once.key) != home:
            return None
        return home if self._charged_of(ask) in (None, home) else None

    def _charged_of(self, ask: Admit) -> int | None:
        """The partition of its charge key; None if it has none, or if there is nothing to charge."""
        is_free = not (ask.sources or ask.amount)
        return None if ask.charge_key is None or is_free else self.charged_at(ask.charge_key.key)

    def plan(self, ask: Admit) -> Plan:
        """What of *ask* is where."""
        of, of_key = self.of, self.of_key
        limits: dict[int, tuple[LimitAsk, ...]] = {}
        leases: dict[int, tuple[LeaseAsk, ...]] = {}
        for limit in ask.limits:
            place = of_key(limit.key)
            limits[place] = (*limits.get(place, ()), limit)
        for lease in ask.leases:
            place = of_key(lease.pool)
            leases[place] = (*leases.get(place, ()), lease)
        runs = [Run(home, tuple(some)) for home, some in groupby(ask.sources, key=lambda s: of(s.payer or ask.payer))]
        if not runs:
            runs = [Run(_home_of_free(ask, of(ask.payer), limits, leases), ())]
        claim = None if ask.idempotency is None else of_key(ask.idempotency.key)
        return Plan(tuple(runs), claim, self._charged_of(ask), limits, leases)


def _home_of_free(
    ask: Admit,
    root: int,
    limits: Mapping[int, tuple[LimitAsk, ...]],
    leases: Mapping[int, tuple[LeaseAsk, ...]],
) -> int:
    """Nobody pays: the hold is where there is something to end, if there is."""
    if ask.amount or ask.idempotency is not None:
        return root
    weighted = [place for place, some in limits.items() if any(limit.meter != "requests" for limit in some)]
    asked = [*leases, *weighted] or [*limits]
    return root if root in asked or not asked else asked[0]
