"""
Continuing: who pays for what a call does that continues a turn which was charged (S0.16).

Looks up the session of such a call, where its route has several payers. Holds nothing, and changes nothing there.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from asgi_metering.asking import source_asks
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import StoreError
from asgi_metering.keying import key_ask
from asgi_metering.policies import ChargePolicy
from asgi_metering.rules.operations import Admit, Preview

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["continued", "go_on"]


async def continued(call: Call, charge: ChargePolicy) -> None:
    """
    Find out who pays the session of *call*, which skips its charge; the first choice where it has none in this window.

    Raises:
        CallRefused: The store gives no answer, and the route denies then: its credential may be another payer's.

    One round trip, and none on routes whose payers are one.
    """
    if call.shared is None or not charge.has_payers or call.exempt:
        return
    metering = call.metering
    try:
        decision = await metering.decide(_look(call, charge, time.time()))
        if decision.stale_calendar:
            decision = await metering.decide(_look(call, charge, decision.now))
    except StoreError as failure:
        metering.meters.count("store_failures", line=call.line)
        if (charge.on_store_down or metering.on_store_down["credits"]) == "deny":
            raise call.refused(Refusal(Reason.STORE_DOWN, "credits")) from failure
        return
    if decision.joined:
        call.continues = decision


def _look(call: Call, charge: ChargePolicy, now: float) -> Preview:
    """What a call of the session would be told around *now*: nothing is held for one that joins."""
    asked = Admit(
        call.id,
        call.payer or "",
        call.unit.name,
        1,
        1,
        source_asks(call, charge, now),
        ttl_s=charge.ttl_s,
        line=call.line,
        charge_key=key_ask(call, charge.key, now),
    )
    return Preview(asked)


def go_on(call: Call, decision: Decision) -> None:
    """Tell *call*, which was let in by *decision*, that it has the payer of its session."""
    found = call.continues
    if found is not None:
        call.decision = decision._replace(payer=found.payer, group=found.group, joined=True)
        call.payer = found.payer
