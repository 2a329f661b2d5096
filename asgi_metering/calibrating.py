"""
Calibrating: how much of what calls hold they use, so that estimates may be set right.

Reads what a store keeps of calls that have ended, which it keeps for some days. Changes nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Decimal
from typing import NamedTuple, TypeAlias

from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.state import Hold, Table
from asgi_metering.stores.contract import Store

__all__ = ["LEAST_CALLS", "HoldUse", "hold_use", "read_hold_use"]

MAX_CALLS = 10_000
"""Calls of one line that are looked at, the latest ones: a percentile needs no more."""

LEAST_CALLS = 20
"""Calls below which nothing is suggested: the dearest twentieth of fewer is chance."""

MARGIN = Decimal("1.1")
"""What is suggested is a tenth above what 95 of 100 calls use."""

_USED = (Basis.USAGE, Basis.OBSERVED)


class HoldUse(NamedTuple):
    """
    What calls of one line used of their holds.

    Attributes:
        line, unit: Which.
        calls: How many were looked at.
        ratio: What they held together, for each unit that they used together.
        p50, p95: What a call in the middle, and one of the dearest twentieth, used of its own hold; 1 is all of it.
        suggestion: By what to multiply what is held, so that it is enough for 95 of 100; None for too few calls.
    """

    line: str
    unit: str
    calls: int
    ratio: float
    p50: float
    p95: float
    suggestion: Decimal | None

    @property
    def sentence(self) -> str:
        """The same for people."""
        told = (
            f"holds are {self.ratio:.2f} x what is used, by {self.calls} calls: p50 uses {self.p50:.2f} of its hold, "
            f"p95 {self.p95:.2f}"
        )
        if self.suggestion is None:
            return f"{told}; too few for a suggestion"
        return f"{told}; suggestion: hold {self.suggestion} x as much"


def hold_use(holds: Iterable[Hold]) -> list[HoldUse]:
    """What ended *holds* were used for, by line and unit; only of calls whose own usage was charged, above nothing."""
    seen: _Seen = {}
    _look_at(seen, holds)
    return _uses(seen)


_Seen: TypeAlias = dict[tuple[str, str], deque[tuple[int, int]]]
"""(used, held) of the latest calls, by line and unit."""


def _look_at(seen: _Seen, holds: Iterable[Hold]) -> None:
    for hold in holds:
        end = hold.receipt
        if end is None or end.ended_by is not EndedBy.CALL or end.basis not in _USED:
            continue
        if end.held > 0 and end.amount > 0:
            seen.setdefault((hold.line, hold.unit), deque(maxlen=MAX_CALLS)).append((end.amount, end.held))


def _uses(seen: _Seen) -> list[HoldUse]:
    return [_use(line, unit, list(pairs)) for (line, unit), pairs in sorted(seen.items())]


def _use(line: str, unit: str, pairs: Sequence[tuple[int, int]]) -> HoldUse:
    shares = sorted(used / held for used, held in pairs)
    ratio = sum(held for _, held in pairs) / sum(used for used, _ in pairs)
    p95 = _percentile(shares, 95)
    enough = len(shares) >= LEAST_CALLS
    suggestion = (Decimal(f"{p95:.4f}") * MARGIN).quantize(Decimal("0.01"), ROUND_CEILING) if enough else None
    return HoldUse(line, unit, len(shares), ratio, _percentile(shares, 50), p95, suggestion)


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """The smallest value that so many of a hundred are not above (nearest rank)."""
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


async def read_hold_use(store: Store) -> list[HoldUse]:
    """
    Read what calls used of their holds, out of an open *store*.

    Fixed prices hold what they cost, and use all of it. Reads every hold that is kept, page by page.

    Raises:
        ConfigurationError: This kind of store cannot be read as a whole.
        StoreUnavailableError: No answer came.
    """
    async with store.books() as books:
        seen: _Seen = {}
        async for page in books.rows(Table.HOLD):
            _look_at(seen, page)
    return _uses(seen)
