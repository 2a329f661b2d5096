"""What the processes of the races do: traffic on one namespace of one server, told line by line on their output."""

from __future__ import annotations

import asyncio
import sys
import time

from asgi_metering.decisions import Decision, Reason
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.operations import (
    Admit,
    End,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    PostGrant,
    Renew,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.urls import store_from_url
from tests.stores.traffic import KINDS, tell


async def keys(pump: Pump, name: str, tries: int) -> None:
    """Bring one charge key, and one idempotency key, many times at once; every call of the former succeeds."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)

    async def session(number: int) -> None:
        call_id = f"{name}.session.{number}"
        ask = Admit(call_id, "payer", "credits", 7, 7, (WalletSource(),), charge_key=KeyAsk("session", window_s=1e6))
        decision = await pump.submit(ask)
        assert isinstance(decision, Decision)
        tell("joined" if decision.joined else "first")
        receipt = await pump.submit(End(call_id, 7, Basis.USAGE, event={"outcome": "completed"}))
        assert isinstance(receipt, Receipt)
        tell("charged", receipt.amount)

    async def once(number: int) -> None:
        ask = Admit(
            f"{name}.once.{number}", "payer", "credits", 1, 1, (WalletSource(),), idempotency=IdempotencyAsk("k", "f")
        )
        decision = await pump.submit(ask)
        assert isinstance(decision, Decision)
        tell("ran" if decision.admitted else "refused")

    await asyncio.gather(*(work(number) for number in range(tries) for work in (session, once)))


async def ends(pump: Pump, name: str, tries: int) -> None:
    """End the same calls in every process, each in its own way, while sweeps and heartbeats come by."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)
    way = int(name.removeprefix("worker"))

    async def one(number: int) -> None:
        call_id = f"c{number}"
        if way == 0:
            answer = await pump.submit(End(call_id, 3, Basis.USAGE, event={"outcome": "completed"}))
        elif way == 1:
            answer = await pump.submit(End(call_id, None))
        elif way == 2:
            await pump.submit(Renew(call_id, 2))
            answer = await pump.submit(End(call_id, 5, Basis.USAGE))
        else:
            answer = await pump.submit(Sweep())
            await pump.submit(PostGrant(f"more{number}", "payer", "credits", 1))
        if isinstance(answer, Receipt) and answer.applied:
            tell("applied", call_id, answer.amount)

    await asyncio.gather(*(one(number) for number in range(tries)))


async def slots(pump: Pump, name: str, limit: int) -> None:
    """Run calls over three slots of a Cluster until there is nothing left, and tell from when to when each ran."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)
    limits = (LimitAsk("calls", "everybody", WindowKind.FIXED, limit, 1e6),)
    leases = (LeaseAsk("at once", "slots", 4),)

    async def caller(number: int) -> None:
        refused = turn = 0
        # What another call gives back may be refused for a moment, and not for long.
        while refused < 12:
            turn += 1
            call_id = f"{name}.{number}.{turn}"
            decision = await pump.submit(Admit(call_id, "payer", "credits", 1, 1, (WalletSource(),), limits, leases))
            assert isinstance(decision, Decision)
            if decision.admitted:
                refused, start = 0, time.monotonic()
                await asyncio.sleep(0.001)
                tell("ran", start, time.monotonic())
                await pump.submit(End(call_id, 1, Basis.USAGE))
            else:
                refused += decision.refusal is not None and decision.refusal.reason is not Reason.CONCURRENCY
                await asyncio.sleep(0.002)

    await asyncio.gather(*(caller(number) for number in range(3)))


async def main(kind: str, url: str, name: str, tries: str) -> None:
    """Open a store of this process's own on *url* and run one kind of traffic."""
    store = store_from_url(url)
    await store.open()
    pump = Pump(store)
    await {**KINDS, "keys": keys, "ends": ends, "slots": slots}[kind](pump, name, int(tries))
    await pump.close()
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
