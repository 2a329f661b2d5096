"""A store that comes back is not run over: what waited for it comes in order, bounded, each thing once."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from asgi_metering import Metering, billable, rate_limited
from asgi_metering.delivery import RETRY_LAST_S, RETRY_SPREAD, _drawn
from asgi_metering.rules.operations import Admit, End, Renew
from asgi_metering.stores.pump import MAX_BATCH
from tests.harness.drive import status
from tests.harness.valkey import valkey
from tests.outage.gated import Gated, call, identify, metered, until, used

RUNNING = 150
"""Calls that run through an outage: more than one batch takes."""


async def _all_quiet(metering: Metering) -> bool:
    runtime = metering.runtime()
    return not runtime.in_flight and not runtime.busy


def test_hear_once_of_each_call_that_ran_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the store said nothing, each call that runs has one heartbeat waiting, and batches have their bound.

    The one end that went ahead and the others that wait come once each.
    """
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=20) as metering:
            metering.end_timeout_s = 20
            leave = asyncio.Event()
            app = metered(metering, billable("0.1", ttl_s=0.03), work=leave.wait)
            async with asyncio.TaskGroup() as group:
                runs = [group.create_task(call(app)) for _ in range(RUNNING)]

                async def all_in_flight() -> bool:
                    return len(metering.runtime().in_flight) == RUNNING

                await until(all_in_flight)
                store.silent = True
                before = len(store.batches)

                async def all_beat() -> bool:
                    return all(each.is_beating for each in metering.runtime().in_flight.values())

                await until(all_beat)
                loop, arrived = asyncio.get_running_loop(), []
                for _ in range(2):
                    # The first round is for heartbeats that were begun and had not come to the pump yet.
                    since = loop.time()

                    async def several_are_due(since: float = since) -> bool:
                        return all(each.last_beat > since + 0.05 for each in metering.runtime().in_flight.values())

                    await until(several_are_due)
                    arrived.append(metering.runtime().pump._arrived)
                assert arrived[0] == arrived[1]
                monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 60.0)
                store.silent = False
                store.let.set()

                async def all_heard() -> bool:
                    return not any(each.is_beating for each in metering.runtime().in_flight.values())

                await until(all_heard)
                heard = Counter(
                    each.id for batch in store.batches[before:] for each in batch if isinstance(each, Renew)
                )
                assert len(heard) == RUNNING
                # One that was under way, and one behind it at the most.
                assert max(heard.values()) <= 2
                leave.set()
            assert {status(run.result().log) for run in runs} == {200}
            await until(lambda: _all_quiet(metering))
            assert max(map(len, store.batches)) <= MAX_BATCH
            assert Counter(each.id for each in store.seen(End)).most_common(1)[0][1] == 1

    asyncio.run(play())


def test_spread_those_who_ask_again() -> None:
    """Of a hundred processes that wait for the same time none two are sure to come at once, and none comes late."""
    waits = sorted(_drawn(RETRY_LAST_S) for _ in range(100))
    assert len(set(waits)) > 90
    first, last = RETRY_SPREAD
    assert first * RETRY_LAST_S <= waits[0] < waits[-1] <= last * RETRY_LAST_S


def test_let_waiting_admissions_go_with_their_deadline() -> None:
    """Whoever has been answered without the store is not asked for when it comes back: nobody waits for it any more."""

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=0.02) as metering:
            app = metered(metering, rate_limited("1000/minute"))
            store.silent = True
            assert {status((await call(app)).log) for _ in range(4)} == {200}
            store.silent = False
            store.let.set()
            await metering.runtime().pump.drain()
            # The first was with the store; the others were taken out of the queue by their deadline.
            assert len(store.seen(Admit)) == 1

    asyncio.run(play())


def test_stall_nobody_behind_another_store() -> None:
    """Of two meterings in one process, one with a stopped server (SIGSTOP), the other one answers as ever.

    Fifty of its calls are answered while twenty wait for the stopped one, none of which has given up.
    """

    async def play(frozen: Any, other: Any) -> None:
        urls = [f"redis://127.0.0.1:{each.port}" for each in (frozen, other)]
        options: dict[str, Any] = {"identify": identify, "sinks": (), "drain_s": 0.05}
        stuck = Metering(urls[0], store_timeout_s=20, **options)
        well = Metering(urls[1], **options)
        async with well:
            await stuck.start()
            apps = [metered(each, rate_limited("1000/minute", concurrency=100)) for each in (stuck, well)]
            for app in apps:
                assert status((await call(app)).log) == 200
            frozen.freeze()
            try:
                waiting = [asyncio.create_task(call(apps[0])) for _ in range(20)]
                await asyncio.sleep(0)
                for _ in range(50):
                    assert status((await call(apps[1])).log) == 200
                assert not any(each.done() for each in waiting)
                assert well.breaker.state == "closed"
            finally:
                frozen.thaw()
            assert {status((await each).log) for each in waiting} == {200}
            await stuck.stop()

    with valkey() as frozen, valkey() as other:
        asyncio.run(play(frozen, other))
