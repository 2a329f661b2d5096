"""
Forgetting: what keeps a state in memory from growing with everything it has ever met.

Bounds the number of rows that no longer matter, and drops none that does; ledger lines fold into a checkpoint that
still proves their account. Knows rows; nothing of operations, and never how long anything is kept in other stores.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Generic, NamedTuple, TypeVar

from asgi_metering.receipts import Receipt
from asgi_metering.rules.retention import fold, is_past
from asgi_metering.rules.state import (
    Account,
    AccountKey,
    AllowanceKey,
    AllowanceWindow,
    Change,
    Counter,
    State,
    Table,
)

__all__ = ["Bounds", "Forgetting"]

LOOKS_PER_ROW = 2
"""
Old rows that are looked at for each new one. With two, rows that are over are found in time to keep no more of them
than of those that still matter; the work of an operation stays the same however many rows there are.
"""

LATE_S = 7 * 86_400.0
"""How long a late end is awaited (DESIGN "Retention"): until then it may still correct an allowance window."""

IDLE_S = 86_400.0
"""After this long without a call, a payer that was never granted anything is a stranger again."""

Key = TypeVar("Key")
Row = TypeVar("Row")

# Read once: every change of every operation asks.
_ENTRY, _HOLD = Table.ENTRY, Table.HOLD


class Bounds(NamedTuple):
    """
    Rows that stay whether they matter or not.

    Attributes:
        entries: Ledger lines of one account; older ones fold into its checkpoint (DESIGN "Retention").
        ended_holds: Calls that have ended. About 100 MB, and at 1,000 calls a second the last 100 s: the policy ends a
            lost call after 90 s by default, and that is when its own end may still come late.
        counters: Rate-limit counters; below it only the sweep looks for those whose window is over.
        windows: Allowance windows.
        strangers: Accounts, with those that were never granted anything among them.
        delivered: Usage events that were acknowledged: some 10 MB.
    """

    entries: int = 10_000
    ended_holds: int = 100_000
    counters: int = 10_000
    windows: int = 100_000
    strangers: int = 100_000
    delivered: int = 10_000


class _Ring(Generic[Key, Row]):
    """
    Rows of one kind that are looked at in turn, a few for every new one.

    Args:
        rows: The state's own.
        bound: As long as there are no more, nothing is looked at.
        is_over: Whether a row no longer matters at a time.
        drop: Forgets one.
    """

    __slots__ = ("_bound", "_drop", "_is_over", "_round", "known", "rows")

    def __init__(
        self,
        rows: dict[Key, Row],
        bound: int,
        is_over: Callable[[Key, Row, float], bool],
        drop: Callable[[Key], object],
    ) -> None:
        self.rows = rows
        self.known = 0
        self._bound = bound
        self._is_over = is_over
        self._drop = drop
        self._round: deque[Key] = deque()

    def turn(self, now: float, looks: int) -> None:
        """Look at up to *looks* rows: at each of them once in a round, the oldest first."""
        rows = self.rows
        for _ in range(looks):
            if len(rows) <= self._bound:
                break
            if not self._round:
                # Some milliseconds for a million, once in so many looks: an ordered dict makes each write dearer.
                self._round.extend(rows)
            key = self._round.popleft()
            row = rows.get(key)
            if row is not None and self._is_over(key, row, now):
                self._drop(key)
        self.known = len(rows)


class Forgetting:
    """
    Keeps one state bounded, a little after every operation.

    Args:
        state: Empty.
        bounds: How much of each kind stays.
    """

    def __init__(self, state: State, bounds: Bounds) -> None:
        self._state = state
        self._bounds = bounds
        self._most_ended = bounds.ended_holds
        # Halving seldom costs less than folding one line each time.
        self._most_entries = 2 * bounds.entries
        self._ended: OrderedDict[str, None] = OrderedDict()
        counters = state.counters
        self._adding: tuple[_Ring[Any, Any], _Ring[Any, Any]] = (
            _Ring(counters, bounds.counters, _is_past, counters.__delitem__),
            _Ring(state.allowances, bounds.windows, _is_settled, self._drop_window),
        )
        self._rings = (
            *self._adding,
            _Ring(state.accounts, bounds.strangers, self._is_stranger, self._drop_account),
        )

    def after(self, written: list[Change], now: float) -> None:
        """Forget about as much as *written* added. Rows that a sweep deleted are counted off by `turn`."""
        for table, key, row in written:
            if table == _HOLD:
                if row is None:
                    self._ended.pop(key, None)
                elif row.receipt is not None:
                    self._keep_ended(key)
            elif table == _ENTRY:
                self._keep_entries(key)
        for ring in self._rings:
            new = len(ring.rows) - ring.known
            if new > 0:
                ring.turn(now, LOOKS_PER_ROW * new)

    def after_admission(self, now: float) -> None:
        """As `after` an admission by the fast path, which adds nothing but counters and windows."""
        counters, windows = self._adding
        if len(counters.rows) > counters.known:
            counters.turn(now, LOOKS_PER_ROW * (len(counters.rows) - counters.known))
        if len(windows.rows) > windows.known:
            windows.turn(now, LOOKS_PER_ROW * (len(windows.rows) - windows.known))

    def after_end(self, receipt: Receipt) -> None:
        """As `after` an end by the fast path, which adds an ended call and a ledger line."""
        ended = self._ended
        ended[receipt[0]] = None
        if len(ended) > self._most_ended:
            self._drop_oldest_ended()
        number = receipt[11]
        # An account has no more lines than the number of its last one says.
        if number is not None and number > self._most_entries:
            self._keep_entries((receipt[1], receipt[2]))

    def after_delivery(self, acknowledged: int) -> None:
        """As `after`, when so many events were acknowledged; nothing else adds to those that were."""
        delivered = self._state.delivered
        surplus = len(delivered) - self._bounds.delivered
        if surplus > 0:
            for key in tuple(islice(delivered, min(surplus, LOOKS_PER_ROW * acknowledged))):
                del delivered[key]

    def adopt(self) -> None:
        """Look after rows that came into the state without an operation; none of them is forgotten at once."""
        ended = [(hold.receipt.at, hold.id) for hold in self._state.holds.values() if hold.receipt is not None]
        self._ended = OrderedDict.fromkeys(call_id for _, call_id in sorted(ended))
        for ring in self._rings:
            ring.known = len(ring.rows)

    def turn(self, now: float, looks: int) -> None:
        """Look at up to *looks* rows of each kind: what a peak has left is also forgotten when nothing new comes."""
        for ring in self._rings:
            ring.turn(now, looks)

    def _keep_ended(self, call_id: str) -> None:
        """A call that ends again, late, keeps its place."""
        ended = self._ended
        ended[call_id] = None
        if len(ended) > self._most_ended:
            self._drop_oldest_ended()

    def _drop_oldest_ended(self) -> None:
        oldest, _ = self._ended.popitem(last=False)
        del self._state.holds[oldest]

    def _keep_entries(self, account: AccountKey) -> None:
        state, bound = self._state, self._bounds.entries
        entries = state.entries[account]
        if len(entries) > self._most_entries:
            state.apply(fold(state, account, entries[-bound - 1].number))

    def _drop_window(self, key: AllowanceKey) -> None:
        self._state.apply([(Table.ALLOWANCE, key, None)])

    def _is_stranger(self, key: AccountKey, account: Account, now: float) -> bool:
        """Whether there is nothing to prove of it: no grant, no debt, no call in flight, and none for long."""
        # Spent grants leave an empty place among the open ones; one that debt took whole leaves what was settled.
        state = self._state
        return (
            key not in state.grants
            and key not in state.live
            and not account.settled
            and account.seen_at + IDLE_S <= now
        )

    def _drop_account(self, key: AccountKey) -> None:
        state = self._state
        del state.accounts[key]
        state.checkpoints.pop(key, None)
        for line in state.entries.pop(key, ()):
            state.refs.pop((*key, line.ref), None)


def _is_past(_: str, counter: Counter, now: float) -> bool:
    return is_past(counter, now)


def _is_settled(_: object, window: AllowanceWindow, now: float) -> bool:
    """It is over, no call holds any of it, and no late end is awaited."""
    return window.end + LATE_S <= now and not window.held
