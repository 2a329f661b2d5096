"""What the processes of a race over several slots of a Cluster do."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from multiprocessing.connection import Connection
from threading import Barrier

from asgi_metering.decisions import Decision, Reason
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import Admit, End, LeaseAsk, LimitAsk, WalletSource, WindowKind
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.urls import store_from_url

__all__ = ["SLOTS", "Span", "race"]

SLOTS = 4
"""Of the pool that is raced for."""

CALLERS = 3
"""Tasks at once in each process."""

PATIENCE = 12
"""Refusals before a caller gives up: what another call gives back may be refused for a moment, and not for long."""

START_S = 60.0

Span = tuple[float, float]
"""From when to when a call ran, by the clock that all processes of a machine share."""


def race(url: str, processes: int, limit: int) -> list[Span]:
    """Let *processes* run calls until nothing is left of a *limit*, or of the wallet; when each call ran."""
    context = multiprocessing.get_context("forkserver")
    go = context.Barrier(processes)
    runners = []
    try:
        for number in range(processes):
            told, tells = context.Pipe(duplex=False)
            process = context.Process(target=_run, args=(url, f"p{number}", limit, go, tells), daemon=True)
            process.start()
            tells.close()
            runners.append((process, told))
        return [span for _, told in runners for span in told.recv()]
    finally:
        for process, told in runners:
            process.join(START_S)
            process.kill()
            process.join()
            process.close()
            told.close()


def _run(url: str, name: str, limit: int, go: Barrier, told: Connection) -> None:
    told.send(asyncio.run(_calls(url, name, limit, go)))


async def _calls(url: str, name: str, limit: int, go: Barrier) -> list[Span]:
    store = store_from_url(url)
    await store.open()
    pump = Pump(store)
    spans: list[Span] = []
    limits = (LimitAsk("calls", "everybody", WindowKind.FIXED, limit, 1e6),)
    leases = (LeaseAsk("at once", "slots", SLOTS),)

    async def caller(number: int) -> None:
        refused = turn = 0
        while refused < PATIENCE:
            turn += 1
            call_id = f"{name}.{number}.{turn}"
            decision = await pump.submit(Admit(call_id, "payer", "credits", 1, 1, (WalletSource(),), limits, leases))
            assert isinstance(decision, Decision)
            if decision.admitted:
                refused, start = 0, time.monotonic()
                await asyncio.sleep(0.001)
                spans.append((start, time.monotonic()))
                await pump.submit(End(call_id, 1, Basis.USAGE))
            else:
                refused += decision.refusal is not None and decision.refusal.reason is not Reason.CONCURRENCY
                await asyncio.sleep(0.002)

    await asyncio.to_thread(go.wait, START_S)
    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    await pump.close()
    await store.close()
    return spans
