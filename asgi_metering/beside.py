"""
Beside: what goes on beside a call without being a part of its admission: shadow parts, and what it takes of providers.

Sorts the parts of a policy, and keeps what is known of those that only tell. Asks nobody and decides nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from asgi_metering.attributes import Scalar
from asgi_metering.decisions import Refusal
from asgi_metering.policies import ChargePolicy, EndpointPolicy, RatePolicy
from asgi_metering.rules.operations import Admit, End

if TYPE_CHECKING:
    from asgi_metering.shadow import Twin
    from asgi_metering.upstream.headroom import Headroom, Reservation

__all__ = ["Beside", "is_cancellation"]

PREFIX = "metering.shadow."
"""Before the names of what a usage event tells of the shadow."""


def is_cancellation(failure: BaseException) -> bool:
    """
    Whether *failure*, which a function of the application's own raised, cancels the task that runs.

    A future which that function cancelled, or that its library did, raises the same, and cancels nobody else.
    """
    task = asyncio.current_task()
    return isinstance(failure, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


class Beside:
    """
    What goes on beside one call.

    Args:
        policy: Of the call.
        charge, rates: What of it counts here.
        everything: All of it is in the shadow.

    Attributes:
        charge, rates: What is in the shadow.
        live_charge, live_rates: What is not.
        reserved: What the call takes of providers.
        tells_upstream: What a provider has left is in the shadow.
        would_deny: The first reason for which the shadow would have refused; None where it would not, or it is not
            known.
        is_known: Whether what the shadow would have done is known.
        identity_down: Nobody could be asked who calls.
        twin: The call as it would have been, once what it would ask is known.
        asked: What the shadow has taken at the store, if it has to be ended there.
        last_beat: When the store last heard of it.
        task: Asks the store.
        end: How it would have ended.
    """

    __slots__ = (
        "asked",
        "charge",
        "end",
        "identity_down",
        "is_known",
        "last_beat",
        "line",
        "live_charge",
        "live_rates",
        "rates",
        "reserved",
        "task",
        "tells_upstream",
        "twin",
        "would_deny",
    )

    def __init__(
        self, policy: EndpointPolicy, charge: ChargePolicy | None, rates: tuple[RatePolicy, ...], *, everything: bool
    ) -> None:
        is_free = charge is not None and (everything or charge.shadow)
        self.charge = charge if is_free else None
        self.live_charge = None if is_free else charge
        self.rates = tuple([each for each in rates if everything or each.shadow])
        self.live_rates = tuple([each for each in rates if not (everything or each.shadow)])
        self.tells_upstream = any(each.shadow or everything for each in policy.upstreams)
        self.line = policy.name if charge is None else charge.line
        self.reserved: list[Reservation] = []
        self.would_deny: Refusal | None = None
        self.is_known = self.identity_down = False
        self.twin: Twin | None = None
        self.asked: Admit | None = None
        self.last_beat = 0.0
        self.task: asyncio.Task[None] | None = None
        self.end: End | None = None

    @property
    def has_shadow(self) -> bool:
        """Whether anything has to be found out."""
        return self.charge is not None or bool(self.rates) or self.tells_upstream

    def is_due(self, now: float, beats: int) -> bool:
        """Whether the store has to hear of what it keeps for the shadow, *beats* times in its life."""
        return self.asked is not None and now - self.last_beat >= self.asked.ttl_s / beats

    def reservation(self, provider: str, label: str | None) -> Reservation | None:
        """What the call takes of *provider* under *label*."""
        for each in self.reserved:
            if each.provider == provider and each.label == label:
                return each
        return None

    def release(self, headroom: Headroom) -> None:
        """The call takes nothing of providers any more."""
        for each in self.reserved:
            headroom.release(each)
        self.reserved.clear()

    def told(self) -> dict[str, Scalar]:
        """What the usage event says, as ``metering.shadow.``: outcome, reason, name, payer, amount_parts and basis."""
        denied = self.would_deny
        facts: dict[str, Scalar | None] = {
            "outcome": "denied" if denied is not None else "admitted" if self.is_known else "unknown",
            "reason": None if denied is None else denied.reason.value,
            "name": None if denied is None else denied.name,
            # Who would have paid: the event itself names who pays what is live.
            "payer": None if self.charge is None or self.twin is None else self.twin.payer,
        }
        # What a session costs by its messages or seconds is known by its tally alone, which nobody keeps here.
        if self.charge is not None and self.end is not None and self.charge.per == "call":
            facts["amount_parts"], facts["basis"] = self.end.amount or 0, self.end.basis.value
        if not self.has_shadow and denied is None:
            return {}
        return {PREFIX + name: fact for name, fact in facts.items() if fact is not None}
