"""
Growing: the hold of a call that runs, kept ahead of what the call uses; or the cut, where nothing more can be held.

Counts off the byte path, asks for one growth at a time, and says how far an answer may run ahead of it. Never sends or
stops anything itself: who serves the call does, and is told.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeAlias

from asgi_metering.admission import hold_more
from asgi_metering.amounts import MAX_AMOUNT, Amount
from asgi_metering.decisions import Reason, Refusal
from asgi_metering.errors import StoreError
from asgi_metering.itemised import costed
from asgi_metering.measuring import TextCounts, metered_usage, observed_usage
from asgi_metering.outage import hold_more_locally
from asgi_metering.prices import FixedPrice, MeasuredPrice
from asgi_metering.prices.values import EXACT
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.policies import ChargePolicy

__all__ = ["LEAST_ROOM", "Growth", "Spawn", "growth_of"]

log = logging.getLogger("asgi_metering")

LEAST_ROOM = 256
"""Bytes between two looks at least, however little is left, and before the first one: an event or two."""

MOST_ROOM = 65_536
"""Bytes after which an answer is looked at whatever it costs (DESIGN 4 "Observed")."""

AHEAD = 2
"""An answer may pass an n-th of what its hold still pays for, at the rate seen so far, before it is looked at again."""

Spawn: TypeAlias = "Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]"
"""Starts a task that somebody keeps."""


def growth_of(call: Call, loop: asyncio.AbstractEventLoop, spawn: Spawn) -> Growth | None:
    """How the hold of *call*, which was admitted, grows; None where it does not."""
    charge, price = call.charge, call.price
    if charge is None or (charge.hold.slices is None and charge.per == "call"):
        return None
    if call.exempt or not (call.has_hold or call.queued):
        return None
    if price is None or isinstance(price, FixedPrice):
        if price is None or charge.per == "call" or not price.amount:
            # A turn that costs nothing.
            return None
        # Imported late: it builds upon this.
        from asgi_metering.sessions import SessionGrowth

        return SessionGrowth(call, charge, price, loop, spawn)
    return Growth(call, charge, price, loop, spawn)


def _parts(call: Call, size: Amount | TokenUsage, price: MeasuredPrice) -> int:
    """Smallest parts of a slice: of tokens in the service tier that is asked for, if that is dearer."""
    unit = call.unit
    return unit.round(
        EXACT.multiply(price.cost(size), call.dearer) if isinstance(size, TokenUsage) else unit.exact(size, "slice")
    )


class Growth:
    """
    The hold of one call, while it grows.

    Args:
        call: Admitted, with a hold.
        charge: Its policy, with `Slices`.
        price: What its usage costs.
        loop: Where it runs.
        spawn: Starts the looks there.

    Attributes:
        used: Smallest parts that the call has used, at the last look.
        refusal: Why nothing more could be held, when it was asked last; None where more was.
        is_cut: What is held is used up, and nothing more can be held.
    """

    __slots__ = (
        "_again",
        "_asked",
        "_before",
        "_call",
        "_charge",
        "_counting",
        "_counts",
        "_debt",
        "_down",
        "_look",
        "_loop",
        "_low",
        "_over",
        "_passed",
        "_price",
        "_room",
        "_spawn",
        "_step",
        "is_cut",
        "refusal",
        "used",
    )

    def __init__(
        self, call: Call, charge: ChargePolicy, price: MeasuredPrice, loop: asyncio.AbstractEventLoop, spawn: Spawn
    ) -> None:
        slices = charge.hold.slices
        if slices is None:
            raise AssertionError("only holds in slices grow")
        first = charge.hold.estimate
        step = first if slices.step is None and isinstance(first, TokenUsage) else slices.step
        self._step = max(1, call.held if step is None else _parts(call, step, price))
        low = slices.low_water
        self._low = self._step // 2 if low is None else _parts(call, low, price)
        self._debt = call.unit.parts(slices.debt, "debt")
        self._price = price
        self._prepare(call, charge, loop, spawn)

    def _prepare(self, call: Call, charge: ChargePolicy, loop: asyncio.AbstractEventLoop, spawn: Spawn) -> None:
        """What every hold begins with that grows, by whatever is counted."""
        self._call, self._charge = call, charge
        self._loop, self._spawn = loop, spawn
        self._counts, self._counting = TextCounts(), asyncio.Lock()
        self._look: asyncio.Task[None] | None = None
        self._asked = self._again = self._over = self._down = False
        # Bytes of the answer, and what had been used, when the answer last asked for room.
        self._passed = self._before = 0
        self._room = LEAST_ROOM
        self.used = 0
        self.refusal: Refusal | None = None
        self.is_cut = False

    @property
    def left(self) -> int:
        """Smallest parts of the hold that are not used; below 0 where more was used than is held."""
        return self._call.held - self.used

    # -- looks ---------------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Have what was used looked at soon. From any thread; never waits."""
        if not (self._asked or self._over or self._loop.is_closed()):
            self._asked = True
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._asked = False
        if self._over or self._call.closed:
            return
        if self._look is None:
            self._look = self._spawn(self._looks(), f"growth of {self._call.id}")
        else:
            self._again = True

    async def _looks(self) -> None:
        """One look after the other, as long as somebody asks for one: the store has one growth of a call at a time."""
        try:
            self._again = True
            while self._again and not (self._over or self._call.closed):
                self._again = False
                await self._measure()
                # What it got may be less than it needs, and then no more will come.
                while self.left <= self._low and await self._grow():
                    pass
        finally:
            self._look = None

    async def _measure(self) -> None:
        call = self._call
        try:
            async with self._counting:
                seen = await observed_usage(call, metered_usage(call), self._counts)
                self.used = call.unit.round((await costed(call, self._price, seen)).amount)
        except Exception as failure:  # noqa: BLE001 -- usage that adds up to nonsense, a price of the application's own
            told = f"What call {call.id} has used so far cannot be told, so that its hold does not grow."
            call.metering.alarms.raised("growth", told, failure)

    async def _grow(self) -> bool:
        """Ask for a step more; False where the hold did not grow."""
        call = self._call
        to = min(max(call.held, self.used) + self._step, MAX_AMOUNT)
        if call.queued is not None:
            # Nothing is written behind its end: asked and begun in one turn of the loop.
            if call.closed or to <= call.held:
                return False
            await hold_more_locally(call, to)
            return not call.closed
        try:
            decision = await hold_more(call, self._charge, to, self._debt)
        except StoreError as failure:
            # The client has its bytes: a store that is down cuts nobody, and the end charges in full.
            self._down = True
            call.metering.meters.count("store_failures", line=call.line)
            told = f"The hold of call {call.id} did not grow; it is asked again: {failure}"
            call.metering.alarms.raised("growth_unanswered", told, failure)
            return False
        except Exception as failure:  # noqa: BLE001 -- units that nobody can count together, say; looks go on
            self._down = True
            told = f"The hold of call {call.id} cannot grow, so that nothing cuts it: {failure!r}"
            call.metering.alarms.raised("growth_unasked", told, failure)
            return False
        self._down = False
        if decision.refusal is None:
            self.refusal = None
            call.held = decision.held
            return not call.closed
        if decision.refusal.reason is Reason.ENDED:
            self._over = True
        else:
            self._lack(decision.refusal)
        return False

    @property
    def _held_in_words(self) -> str:
        return f"{self._call.unit.whole(self._call.held):f} {self._call.unit.name}"

    def _note(self, refusal: Refusal, ended: str) -> None:
        """Keep why nothing more can be held; *ended* says what came of it."""
        call = self._call
        told = f"{ended}: it has used up the {self._held_in_words} that could be held for it."
        # What it holds itself is of no help, whoever else lets go.
        others = max(0, (refusal.held or 0) - call.held)
        helps = refusal.transient and others > 0
        self.refusal = refusal._replace(required=self._step, held=others, transient=helps, detail=told)

    def _lack(self, refusal: Refusal) -> None:
        """Nothing more can be held now. As long as the hold lasts somebody may still pay, or another call may end."""
        self._note(refusal, "The answer was cut off")
        if self.left > 0 or self._call.closed:
            return
        self.is_cut = self._over = True
        call = self._call
        log.info("Call %s has used up the %s that could be held for it, and is cut.", call.id, self._held_in_words)
        call.opening.cut()

    # -- the answer ----------------------------------------------------------------------------------------

    async def pace(self, passed: int) -> int:
        """
        How many bytes of the answer may pass now, after *passed* more of them, before this is asked again.

        Seldom waits: an answer that comes no faster than it is looked at finds a look that was made meanwhile. One
        that outruns its hold waits for the store, at most as long as an admission does; not for one that is down.
        """
        self._passed += passed
        if self._over:
            return MOST_ROOM
        if self.used == self._before:
            await self._measure()
            if self.left <= self._low:
                self._begin()
        if self.left <= 0 and self._look is not None and not self._down:
            _, waiting = await asyncio.wait([self._look], timeout=self._call.metering.store_timeout_s)
            # One that says nothing is not waited for again before it has answered.
            self._down = self._down or bool(waiting)
        return self._next_room()

    def _next_room(self) -> int:
        cost = self.used - self._before
        if cost > 0:
            # At the rate of the bytes since the last time.
            self._room = self._passed * max(0, self.left) // (cost * AHEAD)
            self._passed, self._before = 0, self.used
        else:
            self._room *= AHEAD
        self._room = min(MOST_ROOM, max(LEAST_ROOM, self._room))
        return self._room
