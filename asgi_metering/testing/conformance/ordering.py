"""What a store must answer to a call that several things refuse: the first reason of the documented order, and why."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from itertools import combinations
from typing import Any

from asgi_metering.decisions import Reason, Refusal
from asgi_metering.rules.operations import IdempotencyAsk, LeaseAsk, WindowKind
from asgi_metering.testing.conformance.scene import MINUTE_S, WALLET, Scene, Suite, scenario

__all__ = ["Ordering"]

RUNS = IdempotencyAsk("runs", "print")
DONE = IdempotencyAsk("done", "print")

PASSED_S = 20.0
"""Of the minute in which the one call of the spent limit was made."""

ORDER = ("in flight", "done otherwise", "slots", "everybody's slots", "exceeds", "spent", "allowance", "credits")
"""What may refuse, as DESIGN "Admission" orders it. Two of a kind that exclude each other are never asked together."""

EXCLUSIVE = ({"in flight", "done otherwise"}, {"allowance", "credits"})

REASONS = {
    "in flight": Reason.IN_FLIGHT,
    "done otherwise": Reason.FINGERPRINT,
    "slots": Reason.CONCURRENCY,
    "everybody's slots": Reason.CONCURRENCY,
    "exceeds": Reason.EXCEEDS_LIMIT,
    "spent": Reason.RATE_LIMIT,
    "allowance": Reason.ALLOWANCE,
    "credits": Reason.CREDITS,
}


def _asked(scene: Scene, *failing: str) -> dict[str, Any]:
    """What a call asks that all of these refuse, in an order that is not theirs."""
    limits = {
        "spent": scene.limit(WindowKind.FIXED, 1, name="spent"),
        "exceeds": scene.limit(WindowKind.FIXED, 5, name="small", cost=6),
    }
    leases = {
        "slots": LeaseAsk("slots", "one", 1),
        "everybody's slots": LeaseAsk("everybody's slots", "all", 1, "global"),
    }
    keys = {"in flight": RUNS, "done otherwise": DONE._replace(fingerprint="another")}
    asked: dict[str, Any] = {
        "amount": 0,
        "limits": [
            scene.limit(WindowKind.FIXED, 99, name="roomy"),
            *(limits[each] for each in limits if each in failing),
        ],
        "leases": [LeaseAsk("roomy", "many", 99), *(leases[each] for each in leases if each in failing)],
        "idempotency": next((keys[each] for each in keys if each in failing), None),
    }
    if "allowance" in failing:
        asked.update(amount=5, sources=[scene.allowance(4)])
    if "credits" in failing:
        asked.update(amount=500, sources=WALLET)
    return asked


class Ordering(Suite):
    """The order of reasons, and the wait that each of them tells."""

    @scenario
    async def test_refuse_by_the_first_of_any_two_reasons(self, scene: Scene) -> None:
        """Of any two things that refuse, the first in the order is told, with its wait, and nothing is consumed."""
        await scene.grant(100)
        spent = [scene.limit(WindowKind.FIXED, 1, name="spent")]
        await scene.admit("past", 10, idempotency=DONE)
        await scene.settle("past", 10)
        slots = [LeaseAsk("slots", "one", 1), LeaseAsk("everybody's slots", "all", 1, "global")]
        await scene.admit("runs", 10, idempotency=RUNS, limits=spent, leases=slots)
        scene.clock.advance(PASSED_S)
        waits = {"spent": MINUTE_S - PASSED_S}
        told: list[tuple[str, Refusal | None]] = []
        async with scene.nothing_changes():
            for first, second in combinations(ORDER, 2):
                if {first, second} in EXCLUSIVE:
                    continue
                decision = await scene.admit(f"{first}, {second}", **_asked(scene, first, second))
                told.append((first, decision.refusal))
        for first, refusal in told:
            assert refusal is not None, first
            assert (refusal.reason, refusal.retry_after_s) == (REASONS[first], waits.get(first)), first
            if first in ("slots", "everybody's slots", "spent"):
                assert refusal.name == first
        assert {first for first, _ in told} == set(ORDER) - {"credits"} - {"allowance"}
