"""Reasons: what programs act on has names of its own, which do not change with sentences."""

from __future__ import annotations

import asyncio

from asgi_metering import Metering
from asgi_metering.call import CallRefused
from asgi_metering.decisions import Reason
from asgi_metering.errors import SettlementError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import End, Operation
from asgi_metering.stores.memory import MemoryStore


def test_name_every_reason_for_good() -> None:
    """S3.42: clients, jobs and metrics act on these words; one that is renamed here breaks them."""
    assert [reason.value for reason in Reason] == [
        "unauthenticated",
        "identity_unavailable",
        "payer_unresolved",
        "idempotency_key_missing",
        "idempotency_key_invalid",
        "body_not_fingerprinted",
        "replayed",
        "in_flight",
        "fingerprint_mismatch",
        "policy",
        "upstream_headroom",
        "concurrency",
        "exceeds_limit",
        "rate_limit",
        "allowance",
        "insufficient_credits",
        "store_unavailable",
        "call_ended",
    ]


class Unsettled(MemoryStore):
    """A store that cannot write an end."""

    def run_now(self, operation: Operation) -> Answer:
        if isinstance(operation, End):
            raise LookupError("gone")
        return super().run_now(operation)


def test_tell_a_job_why_it_failed() -> None:
    """S3.42: a job can tell that it was refused, and why, from that its work was done and is not booked."""

    async def outcome(metering: Metering, price: int) -> str:
        try:
            async with metering.charge(payer="ann", line="podcast", price=price):
                return "done"
        except CallRefused as refused:
            return refused.refusal.reason.value
        except SettlementError:
            return "settlement_failed"

    async def run() -> list[str]:
        async with Metering(Unsettled(), sinks=()) as metering:
            await metering.grant("ann", 5, id="g")
            return [await outcome(metering, price) for price in (0, 4, 6)]

    assert asyncio.run(run()) == ["done", "settlement_failed", "insufficient_credits"]
