"""The pump: callers that leave, and deadlines that pass, at every point of an operation's way."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.decisions import Decision
from asgi_metering.errors import (
    StoreUnavailableError,
)
from asgi_metering.rules.operations import (
    Emit,
    LimitAsk,
    PostGrant,
    WindowKind,
)
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.pump import Pump
from asgi_metering.stores.sqlite import SQLiteStore
from tests.stores.gated import GatedStore, ask, play, submit, turns

# -- callers that leave ------------------------------------------------------------------------------------


def test_cancel_before_the_batch_starts() -> None:
    """A caller that leaves before its batch starts is taken out: the store never sees its admission."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        away = submit(pump, Emit(()))
        await turns()
        gone, stays = submit(pump, ask("gone"), ask("stays"))
        await turns()
        gone.cancel()
        store.gate.set()
        await asyncio.gather(*away, stays)
        await pump.drain()
        assert store.batches[1:] == [["stays"]]

    play(scene)


def test_cancel_while_the_batch_is_away() -> None:
    """A caller that leaves while its admission is away leaves no hold: it is released by id at once (pitfall 29)."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        gone, stays = submit(pump, ask("gone", 30), ask("stays", 5))
        await turns()
        gone.cancel()
        store.gate.set()
        await stays
        await pump.drain()
        assert store.batches == [["gone", "stays"], ["Undo"]]
        assert (await store.account()).held == 5

    play(scene)


@pytest.mark.parametrize("meter", ["tokens", "requests"])
def test_cancel_takes_back_what_limits_counted(meter: str) -> None:
    """A call that was given back leaves no trace in any counter, of requests or of tokens (DESIGN 4)."""
    tokens = LimitAsk("tokens", "tokens", WindowKind.FIXED, 100, 60.0, 80, meter=meter)

    async def scene(store: GatedStore, pump: Pump) -> None:
        (gone,) = submit(pump, ask("gone", 30, limits=(tokens,)))
        await turns()
        gone.cancel()
        store.gate.set()
        await turns()
        await pump.drain()
        assert (await store.read(EverythingKept())).state.counters["tokens"].used == 0

    play(scene)


def test_cancel_in_the_turn_of_the_answer() -> None:
    """A caller that is cancelled just when its answer came, and never saw it, leaves no hold either."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        (gone,) = submit(pump, ask("gone", 30))
        await turns()
        store.gate.set()
        while (await store.account()).held == 0:
            await asyncio.sleep(0)
        # The answer is set, the caller has not run yet.
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await pump.drain()
        assert (await store.account()).held == 0

    play(scene)


def test_cancel_an_admission_that_is_refused() -> None:
    """A refused admission of a caller that left has nothing to release."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        gone, other = submit(pump, ask("gone", 9_999), ask("other"))
        await turns()
        gone.cancel()
        store.gate.set()
        await other
        await pump.drain()
        assert store.batches == [["gone", "other"]]

    play(scene)


def test_cancel_many_callers_at_any_time(tmp_path: Path) -> None:
    """Whenever callers leave, on a real store: what is held in the end is what the others hold."""

    async def scene() -> None:
        store = SQLiteStore(tmp_path / "m.db", synchronous="OFF")
        await store.open()
        pump = Pump(store)
        await pump.submit(PostGrant("g", "p", "credits", 10_000))
        kept: list[str] = []

        async def caller(number: int) -> None:
            await turns(number % 7)
            decision = await pump.submit(ask(f"c{number}"))
            assert isinstance(decision, Decision)
            kept.append(decision.id)

        callers = [asyncio.ensure_future(caller(number)) for number in range(300)]
        for number, task in enumerate(callers):
            if number % 3 == 0:
                await turns(number % 4)
                task.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await pump.drain()
        state = (await store.read(EverythingKept())).state
        held = {hold.id for hold in state.holds.values() if hold.receipt is None}
        assert held == set(kept)
        assert len(kept) >= 200
        await pump.close()
        await store.close()

    asyncio.run(scene())


def test_release_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A release for a caller that left, which the store does not take, is logged: the hold ends by its expiry."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        (gone,) = submit(pump, ask("gone", 30))
        await turns()
        gone.cancel()
        store.failures = [None, StoreUnavailableError("The store is down.")]
        store.gate.set()
        await pump.drain()
        await turns()
        assert (await store.account()).held == 30

    with caplog.at_level(logging.WARNING):
        play(scene)
    assert "The hold of a caller that left stays until it expires: The store is down." in caplog.text


def test_release_that_gets_no_answer_is_given_back_later() -> None:
    """Pitfall 29: a release for a caller that left, which a store that went down has lost, is asked for again."""

    async def scene(store: GatedStore, _: Pump) -> None:
        unknown: list[Any] = []
        pump = Pump(store, unknown.append)
        (gone,) = submit(pump, ask("gone", 30))
        await turns()
        gone.cancel()
        store.failures = [None, StoreUnavailableError("The store is down.")]
        store.gate.set()
        await pump.close()
        assert store.batches == [["gone"], ["Undo"]]
        assert unknown == [ask("gone", 30)]

    play(scene)


# -- deadlines ---------------------------------------------------------------------------------------------


def test_deadline_passes_while_the_batch_is_away() -> None:
    """A caller whose deadline passes is told so at once; when its admission is answered later, it is released."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        with pytest.raises(StoreUnavailableError, match=r"The gated store gave no answer within 0\.001 s"):
            await pump.submit(ask("slow", 30), deadline_s=0.001)
        store.gate.set()
        await pump.drain()
        assert store.batches == [["slow"], ["Undo"]]
        assert (await store.account()).held == 0

    play(scene)


def test_deadline_passes_before_the_batch_starts() -> None:
    """An operation whose deadline passed while it waited is never sent."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        away = submit(pump, Emit(()))
        await turns()
        with pytest.raises(StoreUnavailableError):
            await pump.submit(ask("late"), deadline_s=0.001)
        store.gate.set()
        await asyncio.gather(*away)
        await pump.drain()
        assert store.batches == [["Emit"]]

    play(scene)


def test_deadline_that_holds() -> None:
    """An answer in time stops the clock of its deadline."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        decision = await pump.submit(ask("a"), deadline_s=60.0)
        assert isinstance(decision, Decision)
        loop: Any = asyncio.get_running_loop()
        assert [timer for timer in loop._scheduled if not timer.cancelled()] == []

    play(scene)


def test_come_while_the_pump_is_closed() -> None:
    """Who comes while a lane that was ended still goes is told so, and the pump counts its lanes right from then on."""

    async def scene(store: GatedStore, pump: Pump) -> None:
        store.gate.set()
        await pump.submit(ask("a"))
        closing = [asyncio.ensure_future(pump.close()), asyncio.ensure_future(pump.close())]
        (late,) = submit(pump, ask("b"))
        await asyncio.gather(*closing)
        with pytest.raises(StoreUnavailableError, match="was stopped"):
            await late
        async with asyncio.timeout(10):
            await pump.drain()
        assert isinstance(await pump.submit(ask("c")), Decision)

    play(scene)
