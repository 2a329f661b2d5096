"""
Messages: the rate limits that each message of a session is let in by.

One operation of the store for each message, by the same windows as any other limit. Knows no WebSocket, holds nothing,
and never says what becomes of a message too many.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from asgi_metering.asking import distinct, leveled, limit_ask
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import StoreError
from asgi_metering.policies import RatePolicy
from asgi_metering.rates import RateLimit
from asgi_metering.rules.operations import Admit, LimitAsk
from asgi_metering.rules.state import NEVER

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.policies import OnExcess

__all__ = ["Counted", "MessageLimits"]


class Counted(NamedTuple):
    """One limit, the key by which one session is counted there, and what each message takes."""

    rate: RatePolicy
    limit: RateLimit
    key: str
    cost: int


class MessageLimits:
    """
    The limits of one session's messages.

    Args:
        call: Whose.
        counted: The limits, in the order written.
    """

    __slots__ = ("_asks", "_call", "_counted", "_keys", "_until")

    def __init__(self, call: Call, counted: Sequence[Counted]) -> None:
        self._call = call
        self._counted = tuple(counted)
        self._asks: tuple[LimitAsk, ...] = ()
        self._keys: tuple[str, ...] = ()
        self._until = 0.0

    def decided_now(self) -> Decision | None:
        """What the store decides on one more message, where it answers at once; None where not."""
        metering = self._call.metering
        store = metering.runtime().at_hand
        if store is None or metering.new_units:
            return None
        decision = store.run_now(self._ask(time.time()))
        return self._leveled(decision) if isinstance(decision, Decision) and not decision.stale_calendar else None

    async def decided(self) -> Decision:
        """The same of any store; without an answer, what the routes' ``on_store_down`` say."""
        metering = self._call.metering
        ask = self._ask(time.time())
        try:
            decision = await metering.decide(ask)
            if decision.stale_calendar:
                # Our clock and the store's disagree about the day: once more, around the store's time.
                self._until = 0.0
                decision = await metering.decide(self._ask(decision.now))
                self._until = 0.0
        except StoreError as failure:
            metering.meters.count("store_failures", line=self._call.line)
            metering.alarms.raised("store", f"The store decided on no message: {failure}", failure)
            return self._leveled(self._without_store(ask))
        return self._leveled(decision)

    def on_excess(self, name: str) -> OnExcess:
        """What becomes of a message that the limit *name* does not let in; the strictest, where several have it."""
        chosen = [counted.rate.on_excess for counted in self._counted if counted.limit.name == name]
        return min(chosen, key=_STRICTNESS.index, default="close")

    def _leveled(self, decision: Decision) -> Decision:
        if decision.refusal is None:
            return decision
        return decision._replace(refusal=leveled(decision.refusal, [counted.rate for counted in self._counted]))

    def _ask(self, now: float) -> Admit:
        call = self._call
        if now >= self._until:
            asks = [limit_ask(rate, limit, key, cost, now) for rate, limit, key, cost in self._counted]
            self._keys = tuple([ask.key for ask in asks])
            self._asks = tuple(distinct(asks))
            self._until = min((ask.boundaries[2] for ask in self._asks if ask.boundaries), default=NEVER)
        return Admit(call.metering.new_id(), call.payer or "", call.unit.name, 0, 0, limits=self._asks)

    def _without_store(self, ask: Admit) -> Decision:
        """The strictest layer answers for those that it limits (X.6)."""
        metering = self._call.metering
        chosen = [each.rate.on_store_down or metering.on_store_down["rates"] for each in self._counted]
        if "deny" in chosen:
            return Decision(ask.id, time.time(), Refusal(Reason.STORE_DOWN, "rates"))
        # Of several limits on one count, which the store is asked for once, one that counts here is enough.
        here = {key for key, choice in zip(self._keys, chosen, strict=True) if choice == "local"}
        local = tuple([limit for limit in ask.limits if limit.key in here])
        return metering.local.decide(ask._replace(limits=local)) if local else Decision(ask.id, time.time())


_STRICTNESS: tuple[OnExcess, ...] = ("close", "answer", "drop")
