"""
Partitions: which slot of a Cluster has what, and what of an admission belongs to which.

A namespace is a fixed number of partitions, each with a hash tag, and so a slot, of its own; they spread over all
nodes. A payer's partition is its account root: accounts in all units, their grants, allowances, ledgers and live holds,
the holds of the calls that it pays, its idempotency and charge keys, the events of these calls, and the limits and
pools that are counted for it (`LimitAsk.root`). Everything in one partition is decided by one script in one round trip,
exactly as on one server; two payers of one partition as well. What is counted for nobody's account, an address or a
pool for all, has the partition of its own name. Indexes are one for each partition, so that sweeps, outbox and reads
walk a known list. Does not know how a partition is asked.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from asgi_metering.rules.operations import Admit, LeaseAsk, LimitAsk, SourceAsk

__all__ = ["PARTITIONS", "Partitions", "Plan", "Run"]

PARTITIONS = 64
"""
As many shards as a namespace can use. Whatever looks at all of it asks each of them, so more would cost small ones.
"""

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
        root: The partition of its payer.
        runs: Where the call's hold may be, in the order in which they are asked; at least one.
        limits, leases: By partition.
    """

    root: int
    runs: tuple[Run, ...]
    limits: Mapping[int, tuple[LimitAsk, ...]]
    leases: Mapping[int, tuple[LeaseAsk, ...]]

    def foreign(self, home: int, *, is_once: bool) -> list[int]:
        """The partitions that are asked beside *home*, ascending; *is_once*: the call has an idempotency key."""
        beside = {*self.limits, *self.leases, *([self.root] if is_once else [])}
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

    def single(self, ask: Admit) -> int | None:
        """The partition that all of *ask* is in; None if it is in several. What nobody pays for needs no payer's."""
        if not (ask.sources or ask.amount or ask.idempotency is not None):
            places = {self.of(limit.root or limit.key) for limit in ask.limits}
            places |= {self.of(lease.root or lease.pool) for lease in ask.leases}
            return places.pop() if len(places) == 1 else None if places else self.of(ask.payer)
        home = self.of(ask.payer)
        for limit in ask.limits:
            if self.of(limit.root or limit.key) != home:
                return None
        for lease in ask.leases:
            if self.of(lease.root or lease.pool) != home:
                return None
        for source in ask.sources:
            if source.payer and self.of(source.payer) != home:
                return None
        return home

    def plan(self, ask: Admit) -> Plan:
        """What of *ask* is where."""
        of, root = self.of, self.of(ask.payer)
        limits: dict[int, tuple[LimitAsk, ...]] = {}
        leases: dict[int, tuple[LeaseAsk, ...]] = {}
        for limit in ask.limits:
            place = of(limit.root or limit.key)
            limits[place] = (*limits.get(place, ()), limit)
        for lease in ask.leases:
            place = of(lease.root or lease.pool)
            leases[place] = (*leases.get(place, ()), lease)
        runs = [Run(home, tuple(some)) for home, some in groupby(ask.sources, key=lambda s: of(s.payer or ask.payer))]
        if not runs:
            runs = [Run(_home_of_free(ask, root, limits, leases), ())]
        return Plan(root, tuple(runs), limits, leases)


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
