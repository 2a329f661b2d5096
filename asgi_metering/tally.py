"""
The tally of a session that is charged per message or per second: what it has used, and what it begins with.

Counts, and asks nobody. Knows no WebSocket.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from asgi_metering.prices import FixedPrice, MeasuredPrice

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.policies import ChargePolicy, Per

__all__ = ["SLICE", "Tally", "first_slice", "parts_of_one"]

SLICE: Final = {"message": 10, "second": 60}
"""
How many messages or seconds are held for at once where the route does not say: so that the store is asked seldom, and
a session that is idle keeps little from the payer's other calls.
"""


class Tally:
    """
    What one session has used.

    Args:
        per: Of what it is charged for each.
        price: Smallest parts for one.
        clock: Seconds that only go forward.
    """

    __slots__ = ("_began", "_clock", "_count", "_ended", "_most", "per", "price")

    def __init__(self, per: Per, price: int, clock: Callable[[], float]) -> None:
        self.per, self.price = per, price
        self._clock = clock
        self._count = 0
        self._began: float | None = None
        self._ended: float | None = None
        self._most: int | None = None

    def begin(self) -> None:
        """The session is open: its seconds count from here on. Again changes nothing."""
        if self._began is None:
            self._began = self._clock()

    def add(self) -> None:
        """One more message was let in."""
        self._count += 1

    def stop(self, most: int | None = None) -> None:
        """The connection is over: no second more begins, and no more than *most* count. Again changes nothing."""
        if self._ended is None:
            self._ended, self._most = self._clock(), most

    def ends_at(self, count: int) -> float:
        """When by the clock so many seconds will be over."""
        return (self._clock() if self._began is None else self._began) + count

    @property
    def count(self) -> int:
        """Messages that were let in, or seconds that have begun."""
        if self.per == "message":
            return self._count
        if self._began is None:
            return 0
        elapsed = (self._clock() if self._ended is None else self._ended) - self._began
        begun = int(elapsed) + 1
        return begun if self._most is None else min(begun, self._most)

    @property
    def due(self) -> int:
        """Smallest parts that this costs."""
        return self.count * self.price


def first_slice(call: Call, charge: ChargePolicy, price: FixedPrice | MeasuredPrice) -> tuple[int, int]:
    """(smallest parts that a session is let in with, least of them): one message, or one second, at least."""
    one = parts_of_one(call, price)
    if not one or charge.hold.slices is None:
        return SLICE[charge.per] * one, one
    return max(one, call.unit.parts(charge.hold.estimate, "first slice")), one


def parts_of_one(call: Call, price: FixedPrice | MeasuredPrice) -> int:
    """Smallest parts of one message, or one second."""
    if not isinstance(price, FixedPrice):
        raise AssertionError("what is measured has no price per message or second")
    return call.unit.parts(price.amount, "price")
