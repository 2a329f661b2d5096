"""
Heartbeats: what calls in flight get now and then, of one event loop, and the sweeping up behind other processes.

Renews holds with what was observed, tells who has lost one, and ends what is older than calls may be. Decides nothing
about money, and keeps no call: whoever has them lends them.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any

from asgi_metering.billing import observed_parts
from asgi_metering.outage import beat_locally
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.ending import Cause
from asgi_metering.rules.operations import Operation, Renew, Sweep

if TYPE_CHECKING:
    from asgi_metering.beside import Beside
    from asgi_metering.call import Call
    from asgi_metering.call_state import Observer
    from asgi_metering.metering import Metering

__all__ = ["Heartbeats"]

log = logging.getLogger("asgi_metering")

TICK_S = 0.25
"""How often calls in flight are looked at: what was observed is parsed at least this often."""

BEATS_PER_LIFE = 3
"""Heartbeats within one life of a hold, so that one may be lost."""

DIGESTS = 128
"""Slices of one body that are read between two looks, with a turn of the loop behind each: all that can wait of it."""

SWEEP_EVERY_S = 30.0
"""
How often this process looks for holds that other processes left behind, and for what is old; processes that start
together do so at times of their own.
"""


class Heartbeats:
    """
    Looks after the calls of one event loop.

    Args:
        metering: Whose calls these are.
        loop: Its loop.
        in_flight: Admitted calls that have not ended, by id, as they are at each look.
        quietly: Runs one operation; None, and an alarm, without an answer.
        finish: Ends a call.
        spawn: Starts a task that somebody keeps.
        share: Begins to share readings of upstream quotas, if it is time.
    """

    def __init__(
        self,
        metering: Metering,
        loop: asyncio.AbstractEventLoop,
        in_flight: Mapping[str, Call],
        quietly: Callable[[Operation], Awaitable[Answer | None]],
        finish: Callable[[Call], None],
        spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]],
        share: Callable[[], None],
    ) -> None:
        self._metering = metering
        self._loop = loop
        self._in_flight = in_flight
        self._quietly = quietly
        self._finish = finish
        self._spawn = spawn
        self._share = share

    async def run(self) -> None:
        """Look after the calls for ever."""
        sweep_at = flush_at = self._loop.time() + SWEEP_EVERY_S * (1.0 + random.random())  # noqa: S311 -- no secret
        while True:
            self._share()
            await asyncio.sleep(TICK_S if self._in_flight else 4 * TICK_S)
            now = self._loop.time()
            for call in list(self._in_flight.values()):
                try:
                    self._look_after(call, now)
                except Exception as failure:  # noqa: BLE001 -- the heartbeats of all other calls hang on this task
                    self._metering.alarms.raised("call", f"Call {call.id} could not be looked after.", failure)
            if now >= sweep_at:
                swept = await self._quietly(Sweep())
                # What was full has left more behind: as much must go as comes, whatever the traffic.
                sweep_at = now if isinstance(swept, int) and swept >= Sweep().limit else now + SWEEP_EVERY_S
            if now >= flush_at:
                flush_at = now + SWEEP_EVERY_S
                try:
                    self._metering.meters.flush()
                except Exception as failure:  # noqa: BLE001 -- a plug-in's, and heartbeats go on
                    self._metering.alarms.raised("tallies", "The tallies could not be handed on.", failure)

    def _look_after(self, call: Call, now: float) -> None:
        # By a steady clock: when that of the machine is set, no call has become older.
        call.watched_since = call.watched_since or now
        age = now - call.watched_since
        if age > self._metering.max_call_s and not call.opening.is_session:
            # A send that never returns, or a handler that was forgotten (pitfall 27).
            call.see(Cause.ABORTED)
            log.error("Call %s is older than %s s; it is ended as it is.", call.id, self._metering.max_call_s)
            self._finish(call)
        elif call.beats and not call.hold_lost and now - call.last_beat >= call.ttl_s / BEATS_PER_LIFE:
            call.last_beat = now
            if not call.is_beating:
                # One at a time: a store that comes back after long shall hear of each call once.
                call.is_beating = True
                self._spawn(self._beat(call), f"heartbeat of {call.id}")
        beside = call.beside
        if beside is not None and beside.is_due(now, BEATS_PER_LIFE):
            beside.last_beat = now
            self._spawn(self._beat_beside(beside), f"heartbeat of {call.id}, beside it")
        if call.growth is not None:
            call.growth.nudge()
        # Last: what a body does to its reader must not cost the call its heartbeat.
        if call.observer is not None and call.observer.digest():
            self._spawn(_digested(call.observer), f"reading of {call.id}")

    async def _beat(self, call: Call) -> None:
        try:
            await self._renew(call)
        finally:
            call.is_beating = False

    async def _renew(self, call: Call) -> None:
        told = call.observed_parts
        try:
            call.observed_parts = max(call.observed_parts, await observed_parts(call))
        except Exception as failure:  # noqa: BLE001 -- a price of the application's own; the call lives, and its hold
            untold = f"What call {call.id} has used so far cannot be told; its heartbeat repeats what was told last."
            self._metering.alarms.raised("heartbeat", untold, failure)
        if call.queued is not None:
            # A session may outlive what the journal keeps of it, which would be read off as if its process had died.
            if call.observed_parts > told or call.opening.is_session:
                await beat_locally(call)
            return
        renewed = await self._quietly(Renew(call.id, call.observed_parts))
        # Its own end may have come between.
        if renewed is False and not call.closed:
            await self._lost(call)

    async def _beat_beside(self, beside: Beside) -> None:
        """Of what a call's shadow has taken: nobody hears if it is lost."""
        if beside.asked is not None:
            await self._quietly(Renew(beside.asked.id))

    async def _lost(self, call: Call) -> None:
        """Say once that *call* runs on without its hold and its slots, which its policy has ended (S0.57)."""
        if call.hold_lost:
            return
        call.hold_lost = True
        self._metering.meters.count("holds_lost", line=call.line)
        log.error(
            "Call %s runs on, and its hold has been ended by its policy: no heartbeat came for longer than it lives. "
            "What its own end says is posted as the difference; others may have its slots. Give it a longer ttl_s.",
            call.id,
        )
        try:
            await self._metering.hold_lost(call)
        except Exception as failure:  # noqa: BLE001 -- the application's own
            self._metering.alarms.raised("on_hold_lost", f"on_hold_lost failed for call {call.id}.", failure)


async def _digested(observer: Observer) -> None:
    """Have *observer* read what is much, slice by slice: half a megabyte of text would keep the loop for 50 ms."""
    for _ in range(DIGESTS):
        await asyncio.sleep(0)
        if not observer.digest():
            break
