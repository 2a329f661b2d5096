"""
Shadow mode: what limits, slots and prices would have done, had they been live (S4.16).

The parts of an endpoint that have ``shadow=True``, or all of them by ``Metering(shadow=True)``, refuse and charge
nothing. When a call was admitted, what they would have asked is asked of the store behind its back:

- whether its payer could have paid, as a preview: nothing is held, and the call is free;
- its limits and slots, as an admission of their own under the id ``<call id>.shadow``, which is renewed and ended with
  the call. Its keys are those that it has when it is live, so that to take the flag away goes on counting; what it
  refuses has consumed nothing, as live.

Nobody waits for any of this, nothing of it is told to the client, and whatever becomes of it the call goes on: what the
store does not answer, or a function of the application's own cannot compute, is counted and forgotten. Those functions
run before the endpoint, as they do when live: nobody else may use its arguments at the same time.

What came of it is in ``Call.would_deny`` as soon as it is known, on the usage event of a billable call
(``metering.shadow.*``: with what it would have cost by what it really used), and in the metrics
``metering.shadow.admitted``, ``.denied`` (by line and reason) and ``.lost``. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asgi_metering.admission import leaves_hold, would_ask
from asgi_metering.asking import leveled
from asgi_metering.beside import is_cancellation
from asgi_metering.billing import bill
from asgi_metering.call import Call, CallRefused
from asgi_metering.decisions import Decision, Refusal
from asgi_metering.errors import MeteringError, StoreError
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, Preview

if TYPE_CHECKING:
    from asgi_metering.beside import Beside

__all__ = ["ask_shadow", "end_shadow", "settle_shadow", "would_deny"]

log = logging.getLogger("asgi_metering.shadow")

SUFFIX = ".shadow"
"""Behind a call's id: the id of what its shadow has taken."""

MAX_WAITING = 1_000
"""Admissions that may wait for the store when a shadow asks as well: a tenth of what the pump lets wait for itself."""

ANSWER_S = 0.25
"""How long the end of a call, which nobody waits for, gives the store to say what the shadow would have done."""


class Twin(Call):
    """The call as it would have been: sized, priced and ended as a live one, by what the live one shows."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.opening)
        self.id = f"{call.id}{SUFFIX}"
        self.policy, self.asked = call.policy, call.asked
        self.started_at = call.started_at
        self.caller, self.payer, self._inherited = call.caller, call.payer, call._inherited
        self._identified = True
        # The same objects: what is reported later, by whomever, is seen by both.
        self.attributes, self.reports, self.exchanges = call.attributes, call.reports, call.exchanges

    def refused(self, refusal: Refusal, decision: Decision | None = None) -> CallRefused:
        """Say so, and count no refusal: nobody was refused."""
        return CallRefused(self, refusal, decision)

    def follow(self, call: Call) -> None:
        """See what was seen of *call* until its end."""
        self.cause, self.status, self.first_byte, self.failure = call.cause, call.status, call.first_byte, call.failure
        self.drained, self.observer, self.witnesses = call.drained, call.observer, call.witnesses
        self.closed = True


async def ask_shadow(call: Call, arguments: Mapping[str, Any]) -> None:
    """Find out what the shadow of *call*, which was admitted, would have done; never raises for it."""
    beside = call.beside
    if beside is None or not beside.has_shadow:
        return
    if beside.charge is None and not beside.rates:
        _admitted(call, beside)
        return
    twin = Twin(call)
    try:
        asked = await would_ask(twin, beside, arguments, call.started_at)
    except CallRefused as refused:
        would_deny(call, beside, refused.refusal)
        return
    except (Exception, asyncio.CancelledError) as failure:
        # The application's own, and its call goes on; unless somebody cancels that.
        if is_cancellation(failure):
            raise
        _lost(call, beside, "computing", failure)
        return
    if _is_over(call):
        # Its functions outlived the request (pitfall 1): nobody would end what it took now.
        return
    twin.held = 0 if asked is None else asked.amount
    beside.twin = twin
    # As of a call that nothing is held for, until the store has said who would pay.
    twin.decision = Decision(twin.id, call.started_at)
    if beside.would_deny is not None:
        return
    if asked is None:
        _admitted(call, beside)
        return
    deciding = _decide(call, beside, asked, arguments)
    if call.metering.store.immediate:
        await deciding
        if _is_over(call):
            # The request ended in between, and its end saw nothing to give back.
            await end_shadow(call)
    else:
        beside.task = call.metering.runtime().spawn(deciding, f"shadow of {call.id}")


def _is_over(call: Call) -> bool:
    return call.closed or call.opening.closed


async def _decide(call: Call, beside: Beside, asked: Admit, arguments: Mapping[str, Any]) -> None:
    try:
        if call.metering.runtime().pump.waiting > MAX_WAITING:
            raise StoreError("Too many live admissions wait for the store.")
        refusal = await _refusal(call, beside, asked, arguments)
    except Exception as failure:  # noqa: BLE001 -- nothing of the shadow may harm its call
        _lost(call, beside, "store", failure)
        return
    if refusal is None:
        _admitted(call, beside)
    else:
        would_deny(call, beside, leveled(refusal, beside.rates))


async def _refusal(call: Call, beside: Beside, asked: Admit, arguments: Mapping[str, Any]) -> Refusal | None:
    """Why the shadow would have refused. First it is asked for as a whole, so that a refusal takes nothing anywhere."""
    metering = call.metering
    if asked.sources:
        decision, asked = await _fitting(call, beside, asked, arguments, is_preview=True)
        if decision.refusal is not None:
            return decision.refusal
        if beside.twin is not None:
            beside.twin.held, beside.twin.decision = decision.held, decision
            beside.twin.payer = decision.payer or beside.twin.payer
    if not asked.limits and not asked.leases:
        return None
    counted = asked._replace(amount=0, minimum=0, sources=())
    decision, counted = await _fitting(call, beside, counted, arguments)
    if decision.refusal is None and leaves_hold(counted):
        beside.asked, beside.last_beat = counted, metering.runtime().loop.time()
    return decision.refusal


async def _fitting(
    call: Call, beside: Beside, asked: Admit, arguments: Mapping[str, Any], *, is_preview: bool = False
) -> tuple[Decision, Admit]:
    """What the store decides, around its own time; and on what. Raises `StoreError` without an answer."""
    metering, twin = call.metering, beside.twin
    decision = await metering.decide_beside(Preview(asked) if is_preview else asked)
    policy = call.policy
    # Functions of the application's own have had their turn: by now others use the arguments.
    if decision.stale_calendar and twin is not None and policy is not None and not policy.callables():
        again = await would_ask(twin, beside, arguments, decision.now)
        if again is not None:
            asked = again if is_preview else again._replace(amount=0, minimum=0, sources=())
            decision = await metering.decide_beside(Preview(asked) if is_preview else asked)
    if decision.stale_calendar:
        raise StoreError(f"The store's time {decision.now} does not fit any calendar around ours.")
    return decision, asked


def would_deny(call: Call, beside: Beside, refusal: Refusal) -> None:
    """Note that the shadow would have refused *call*; the first reason counts."""
    if beside.is_known:
        return
    beside.would_deny, beside.is_known = refusal, True
    call.metering.meters.count("shadow_denied", reason=refusal.reason.value, line=beside.line)


def _admitted(call: Call, beside: Beside) -> None:
    if not beside.is_known:
        beside.is_known = True
        call.metering.meters.count("shadow_admitted", line=beside.line)


def _lost(call: Call, beside: Beside, cause: str, failure: BaseException) -> None:
    """What the shadow would have done is not known: no alarm, since nobody lost anything."""
    call.metering.meters.count("shadow_lost", line=beside.line, cause=cause)
    log.debug("What the shadow of call %s would have done is not known.", call.id, exc_info=failure)


async def settle_shadow(call: Call, *, is_awaited: bool) -> None:
    """
    Work out how the shadow of *call*, which is over, would have ended; never raises.

    Where somebody waits for the end, nobody waits for what the store has not said yet.
    """
    beside = call.beside
    if beside is None or beside.twin is None:
        return
    if beside.task is not None and not is_awaited:
        await asyncio.wait((beside.task,), timeout=ANSWER_S)
    beside.twin.follow(call)
    try:
        beside.end, _ = await bill(beside.twin)
    except Exception as failure:  # noqa: BLE001 -- an end that is not known is none
        _lost(call, beside, "computing", failure)


async def end_shadow(call: Call) -> None:
    """Give back what the shadow of *call* has taken, when that is known; never raises."""
    beside = call.beside
    if beside is None:
        return
    if beside.task is not None:
        await asyncio.wait((beside.task,))
    asked, beside.asked = beside.asked, None
    if asked is None:
        return
    end = End(asked.id, None, failed=True)
    if beside.end is not None:
        # What weighted limits should have counted.
        end = end._replace(actual=beside.end.actual, failed=beside.end.failed, basis=Basis.NONE)
    try:
        await call.metering.runtime().submit(end, call.metering.end_timeout_s)
    except MeteringError as failure:
        _lost(call, beside, "store", failure)
