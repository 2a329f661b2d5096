"""The memory store: what only it does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asgi_metering.rules.operations import Admit, PostGrant, WalletSource
from asgi_metering.stores import memory
from asgi_metering.stores.contract import EntriesAfter, EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock


def test_run_keeps_the_last_ledger_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Old ledger lines are dropped once twice the bound is passed; the account's sums stay."""
    monkeypatch.setattr(memory, "KEPT_ENTRIES", 5)

    async def scene() -> None:
        store = MemoryStore(FakeClock())
        for number in range(11):
            await store.post([PostGrant(f"g{number}", "p", "credits", 1)])
        kept = (await store.read(EntriesAfter("p", "credits"))).state.entries["p", "credits"]
        assert [line.number for line in kept] == [7, 8, 9, 10, 11]
        state = (await store.read(EverythingKept())).state
        assert state.accounts["p", "credits"].granted == 11

    asyncio.run(scene())


def test_run_an_operation_that_breaks_a_rule_in_the_middle() -> None:
    """An operation that fails in an unforeseen way is answered with its error; its neighbours do what they would."""

    async def scene() -> None:
        store = MemoryStore(FakeClock())
        await store.post([PostGrant("g", "p", "credits", 100)])
        wrong: Any = "soon"
        asks = [Admit(call, "p", "credits", 10, 10, (WalletSource(),)) for call in ("a", "b", "c")]
        answers = await store.run([asks[0], asks[1]._replace(ttl_s=wrong), asks[2]])
        assert isinstance(answers[1], TypeError)
        state = (await store.read(EverythingKept())).state
        assert state.accounts["p", "credits"].held == 20

    asyncio.run(scene())


def test_run_now_answers_at_once() -> None:
    """The memory store needs no loop for one operation."""
    store = MemoryStore(FakeClock())
    receipt: Any = store.run_now(PostGrant("g", "p", "credits", 100))
    assert receipt.available == 100
