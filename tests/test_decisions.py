"""Reasons: what programs act on has names of its own, which do not change with sentences."""

from __future__ import annotations

import asyncio
import pickle

import pytest

from asgi_metering import Caller, Metering, TokenUsage, slices
from asgi_metering.call import CallCut, CallRefused
from asgi_metering.decisions import Reason
from asgi_metering.errors import SettlementError
from asgi_metering.prices import per_million_tokens
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


def test_refusal_crosses_processes() -> None:
    """S3.42: what was refused, and why, reaches whoever waits for a job in another process, with its numbers (S3.2)."""

    async def refused() -> CallRefused:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 5, id="g")
            with pytest.raises(CallRefused) as found:
                async with metering.charge(payer="ann", line="podcast", price=6, caller=Caller("bob")):
                    raise AssertionError("It ran.")
        return found.value

    here = asyncio.run(refused())
    there = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(here))))
    assert type(there) is CallRefused
    assert (str(there), there.refusal, there.decision) == (str(here), here.refusal, here.decision)
    assert (there.call.id, there.call.line, there.call.payer) == (here.call.id, "podcast", "ann")
    assert there.call.unit == here.call.unit


def test_cut_crosses_processes() -> None:
    """A job that was cut says so in another process as well, by its call's id and line."""

    async def write(metering: Metering) -> None:
        price = per_million_tokens(output=1)
        async with metering.charge(payer="ann", line="essay", price=price, hold=slices("2", step="1")) as call:
            while True:
                call.record(TokenUsage(output=1_000_000))
                await asyncio.sleep(0)

    async def cut() -> CallCut:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 5, id="g")
            with pytest.raises(CallCut) as found:
                await write(metering)
        return found.value

    here = asyncio.run(cut())
    there = pickle.loads(pickle.dumps(here))
    assert (type(there), str(there), there.call.line) == (CallCut, str(here), "essay")


def test_tell_a_job_why_it_failed() -> None:
    """S3.42: a job can tell that it was refused, and why, from that its work was done and is not booked."""

    async def outcome(metering: Metering, price: int) -> str:
        try:
            async with metering.charge(payer="ann", line="podcast", price=price):
                return "done"
        except CallRefused as refused:
            return refused.refusal.reason.value
        except SettlementError as unsettled:
            return unsettled.reason

    async def run() -> list[str]:
        async with Metering(Unsettled(), sinks=()) as metering:
            await metering.grant("ann", 5, id="g")
            return [await outcome(metering, price) for price in (0, 4, 6)]

    assert asyncio.run(run()) == ["done", "settlement_failed", "insufficient_credits"]
