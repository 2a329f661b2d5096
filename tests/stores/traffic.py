"""What the processes of the multi-process tests do: traffic on one SQLite file, told line by line on their output."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from asgi_metering.decisions import Decision
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.operations import Admit, AllowanceSource, End, LeaseAsk, LimitAsk, WalletSource, WindowKind
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.sqlite import SQLiteStore

CALLERS = 16
"""In each process."""


def tell(*words: object) -> None:
    """Write one line, whole, at once."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


async def race(pump: Pump, name: str, tries: int) -> None:
    """Ask for single units of a wallet, an allowance that nobody used yet, a limit and a pool, all at once."""
    free = (AllowanceSource("free", 40, (0.0, 1.0, 1e11, 2e11)),)
    limits = (LimitAsk("calls", "race", WindowKind.FIXED, 30, 1e6),)
    leases = (LeaseAsk("at once", "race", 20),)
    asks = {
        "wallet": {"amount": 1, "minimum": 1, "sources": (WalletSource(),)},
        "allowance": {"amount": 1, "minimum": 1, "sources": free},
        "limit": {"amount": 0, "minimum": 0, "limits": limits},
        "pool": {"amount": 0, "minimum": 0, "leases": leases},
    }

    async def one(kind: str, number: int) -> None:
        payer = "payer" if kind == "wallet" else "newcomer"
        decision = await pump.submit(
            Admit(f"{name}.{kind}.{number}", payer, "credits", ttl_s=1e6, grace_s=1e6, **asks[kind])
        )
        assert isinstance(decision, Decision)
        if decision.admitted:
            tell("admitted", kind)

    tell("ready")
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(one(kind, number) for number in range(tries) for kind in asks))


async def work(pump: Pump, name: str, tries: int) -> None:
    """Admit and end calls without end; tell of each only when it was answered."""

    async def caller(number: int) -> None:
        for turn in range(tries):
            call_id = f"{name}.{number}.{turn}"
            decision = await pump.submit(Admit(call_id, "payer", "credits", 3, 3, (WalletSource(),), line="work"))
            assert isinstance(decision, Decision)
            assert decision.admitted
            tell("admitted", call_id)
            receipt = await pump.submit(End(call_id, turn % 5, Basis.USAGE, event={"outcome": "completed"}))
            assert isinstance(receipt, Receipt)
            tell("ended", call_id, receipt.amount)

    await asyncio.gather(*(caller(number) for number in range(CALLERS)))


KINDS: dict[str, Callable[[Pump, str, int], Coroutine[Any, Any, None]]] = {"race": race, "work": work}


async def main(kind: str, path: str, name: str, tries: str) -> None:
    """Open a store of this process's own on *path* and run one kind of traffic."""
    store = SQLiteStore(Path(path), busy_timeout_s=60.0)
    await store.open()
    pump = Pump(store)
    await KINDS[kind](pump, name, int(tries))
    await pump.close()
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
