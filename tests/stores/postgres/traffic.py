"""What the processes of the multi-process tests do: traffic on one schema, told line by line on their output."""

from __future__ import annotations

import asyncio
import sys

from asgi_metering.decisions import Decision
from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.operations import Admit, End, PostGrant, Sweep, WalletSource
from asgi_metering.stores.postgres import PostgresStore
from asgi_metering.stores.pump import Pump
from tests.stores import traffic
from tests.stores.traffic import tell


async def newcomers(pump: Pump, name: str, tries: int) -> None:
    """Be the first to touch accounts and calls, at the same time as the other processes."""

    async def one(number: int) -> None:
        # Everybody posts the same grant of the same payer, and asks for the same call of it.
        payer = f"newcomer{number}"
        await pump.submit(PostGrant(f"g{number}", payer, "credits", 3))
        decision = await pump.submit(
            Admit(f"same{number}", payer, "credits", 2, 2, (WalletSource(),), ttl_s=1e6, grace_s=1e6)
        )
        assert isinstance(decision, Decision)
        tell("admitted", number, decision.admitted, decision.held)
        own = await pump.submit(
            Admit(f"{name}.{number}", payer, "credits", 1, 1, (WalletSource(),), ttl_s=1e6, grace_s=1e6)
        )
        assert isinstance(own, Decision)
        if own.admitted:
            tell("own", number)

    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(one(number) for number in range(tries)))


async def ends(pump: Pump, name: str, tries: int) -> None:
    """End the same overdue calls as the other processes: by settling, by releasing, and by sweeping."""
    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)

    async def one(number: int) -> None:
        call = f"call{number}"
        if name == "worker0":
            receipt = await pump.submit(End(call, 3, Basis.USAGE, event={"outcome": "completed"}))
        elif name == "worker1":
            receipt = await pump.submit(End(call, None))
        elif name == "worker2":
            await pump.submit(Sweep(limit=3))
            return
        else:
            receipt = await pump.submit(End(call, 1, Basis.USAGE, by=EndedBy.PERSON))
        assert isinstance(receipt, Receipt)
        if receipt.applied:
            tell("applied", call, receipt.amount)

    await asyncio.gather(*(one(number) for number in range(tries)))


KINDS = {**traffic.KINDS, "newcomers": newcomers, "ends": ends}


async def main(kind: str, url: str, schema: str, name: str, tries: str) -> None:
    """Open a store of this process's own on *schema* and run one kind of traffic."""
    store = PostgresStore(url, namespace=schema, busy_timeout_s=60.0, answer_within_s=90.0)
    await store.open()
    pump = Pump(store)
    await KINDS[kind](pump, name, int(tries))
    await pump.close()
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
