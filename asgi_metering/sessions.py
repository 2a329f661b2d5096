"""
Sessions: the hold of a call that is charged per message or per second, kept ahead of what it uses.

Asks for more off the path of messages, and says when nothing more can be held. Knows no WebSocket, and never closes
anything: who serves the session does, and is told.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from typing import TYPE_CHECKING, Any, Final

from asgi_metering.decisions import Reason, Refusal
from asgi_metering.growing import Growth, Spawn
from asgi_metering.prices import FixedPrice
from asgi_metering.tally import SLICE, Tally, parts_of_one

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.policies import ChargePolicy

__all__ = ["SessionGrowth"]

log = logging.getLogger("asgi_metering")

ASK_AGAIN_S: Final = 1.0
"""How often the store is asked again for a session that runs on without its answer, as its route allows."""


class SessionGrowth(Growth):
    """
    The hold of one session, while it grows. Whatever is let in was held for before.

    Args:
        call: Admitted, with a hold.
        charge: Its policy, with a price per message or second.
        price: For one.
        loop: Where it runs.
        spawn: Starts the looks there.

    Attributes:
        tally: What was used.
    """

    __slots__ = ("_seen", "_timer", "tally")

    def __init__(
        self, call: Call, charge: ChargePolicy, price: FixedPrice, loop: asyncio.AbstractEventLoop, spawn: Spawn
    ) -> None:
        one = parts_of_one(call, price)
        self._prepare(call, charge, loop, spawn)
        slices = charge.hold.slices
        self._step = SLICE[charge.per] * one if slices is None else max(one, _step(call, charge))
        low = None if slices is None or slices.low_water is None else _parts(call, slices.low_water, "low-water mark")
        # What does not pay for one more has to grow, whatever the mark says.
        self._low = max(one - 1, self._step // 2 if low is None else low)
        self._debt = 0 if slices is None else call.unit.parts(slices.debt, "debt")
        self.tally = call.tally = Tally(charge.per, one, loop.time)
        self._timer: asyncio.TimerHandle | None = None
        self._seen = -1
        if call.opening.accepted:
            self.begin()

    @property
    def has_next(self) -> bool:
        """Whether the hold pays for one message more."""
        return self._call.held - self.tally.due >= self.tally.price

    @property
    def counts_time(self) -> bool:
        """Whether the session may be closed at any time, and not only when a message comes."""
        return self.tally.per == "second"

    # -- what the session does -----------------------------------------------------------------------------

    def begin(self) -> None:
        """The session is open."""
        self.tally.begin()
        if self.counts_time and self._timer is None:
            self._wait()

    def spend(self) -> None:
        """One message more is let in."""
        self.tally.add()
        self.nudge()

    def stop(self) -> None:
        """The connection is over."""
        self.tally.stop()
        if self._timer is not None:
            self._timer.cancel()

    async def cover_next(self) -> bool:
        """
        Wait, at most as long as an admission does, until the hold pays for one message more.

        False where it cannot, as `refusal` says. A store that gives no answer lets nothing in, unless the route's
        ``on_store_down`` says so: then all is charged at the end.
        """
        return await self._covered(self.tally.price)

    def give_up(self) -> None:
        """Nothing more can be held, and what was held is used up: have the session closed."""
        call = self._call
        self.is_cut = self._over = True
        # What the timer came late is not the payer's.
        self.tally.stop(call.held // self.tally.price)
        held = f"{call.unit.whole(call.held):f} {call.unit.name}"
        log.info("Call %s has used up the %s that could be held for it, and is closed.", call.id, held)
        call.opening.cut()

    # -- looks ---------------------------------------------------------------------------------------------

    def nudge(self) -> None:
        """Have more held, if little is left and something was used since that was asked last."""
        count = self.tally.count
        if count != self._seen and self._call.held - count * self.tally.price <= self._low:
            self._seen = count
            super().nudge()

    async def _measure(self) -> None:
        self.used = self.tally.due

    def _lack(self, refusal: Refusal) -> None:
        """Nothing more can be held now. What is held is still the session's, to its last message or second."""
        self._note(refusal, "The session was closed")

    async def _covered(self, parts: int) -> bool:
        call = self._call
        self.used = self.tally.due
        if self.left >= parts:
            return True
        self.refusal, self._down = None, False
        self._begin()
        look = self._look
        if look is not None:
            _, waiting = await asyncio.wait([look], timeout=call.metering.store_timeout_s)
            self._down = self._down or bool(waiting)
        if self.left >= parts:
            return True
        if self._down:
            choice = self._charge.on_store_down or call.metering.on_store_down["credits"]
            self.refusal = Refusal(Reason.STORE_DOWN, "credits")
            return choice != "deny"
        if self.refusal is None:
            # Its policy has ended its hold, for no heartbeat came through for too long.
            self.refusal = Refusal(Reason.ENDED, "credits")
        return False

    # -- time ----------------------------------------------------------------------------------------------

    def _wait(self, least_s: float = 0.0) -> None:
        paid_until = self.tally.ends_at(self._call.held // self.tally.price)
        when = max(paid_until, self._loop.time() + least_s)
        # In an empty context: the loop keeps a cancelled timer until its time, and would keep the session with it.
        self._timer = self._loop.call_at(when, self._time_is_up, context=contextvars.Context())

    def _time_is_up(self) -> None:
        """Another second begins that is not held for, unless the hold has grown meanwhile."""
        call = self._call
        if self.is_cut or call.closed or call.cause is not None:
            return
        # A hold that its policy has ended still pays for what it held, and then the session is closed like any other.
        if self.tally.due <= call.held:
            self._wait()
        else:
            self._spawn(self._hold_or_close(), f"seconds of {call.id}")

    async def _hold_or_close(self) -> None:
        if await self._covered(0):
            self._wait(ASK_AGAIN_S if self.left < 0 else 0.0)
        elif not self._call.closed and self._call.cause is None:
            self.give_up()


def _step(call: Call, charge: ChargePolicy) -> int:
    slices = charge.hold.slices
    assert slices is not None  # noqa: S101 -- asked before
    return _parts(call, charge.hold.estimate if slices.step is None else slices.step, "step")


def _parts(call: Call, amount: Any, what: str) -> int:
    return call.unit.parts(amount, what)
