"""Signals of an application's own: lines that it names, how surely they are told, and who is charged for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import pytest
from fastapi import FastAPI

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call
from asgi_metering.errors import IdempotencyConflictError, SettlementError, StoreUnavailableError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_token, per_unit
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Backfill, End, Operation
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.usage import UsageEvent
from tests.harness.drive import drive, http_scope, status

CREDIT = 1_000_000


class Deaf(MemoryStore):
    """A store that takes no ends and no postings while it is deaf."""

    deaf = False

    def run_now(self, operation: Operation) -> Answer:
        if self.deaf and isinstance(operation, Backfill | End):
            raise StoreUnavailableError("The store is down.")
        return super().run_now(operation)


def play(scene: Callable[[Metering], Awaitable[None]], store: Any = "memory://", **options: Any) -> list[UsageEvent]:
    """Play *scene* on a metering where acme has a hundred credits; what was told, in order."""
    told: list[UsageEvent] = []

    async def run() -> None:
        async with Metering(store, sinks=(CallbackSink(told.extend),), drain_s=0.05, **options) as metering:
            metering.end_timeout_s = 0.05
            await metering.grant("acme", 100, id="g")
            await scene(metering)
            await metering.runtime().booked()
            assert await metering.check() == []

    asyncio.run(run())
    return told


def test_tell_signals_of_lines_that_the_application_names() -> None:
    """Cost by tokens read, value by items made, application by items shown: each a line, with its own count (S2.1)."""

    async def scene(metering: Metering) -> None:
        async with metering.charge(payer="acme", line="learning-cost", price=per_token(input="0.01"), hold=9) as cost:
            cost.record(TokenUsage(input=300, output=20))
        async with metering.charge(payer="acme", line="learning-value", price=per_unit(items=1), hold=9) as value:
            value.record(units={"items": 2})
        async with metering.charge(payer="acme", line="application", price=0) as shown:
            shown.record(units={"items": 5})

    told = {event.line: event for event in play(scene)}
    assert {line: event.amount // CREDIT for line, event in told.items()} == {
        "learning-cost": 3,
        "learning-value": 2,
        "application": 0,
    }
    assert told["learning-cost"].usage == TokenUsage(input=300, output=20)
    items = [told[line].attributes["metering.units.items"] for line in ("learning-value", "application")]
    assert items == [2, 5]


def test_tell_work_that_has_a_receipt_or_raise() -> None:
    """Strict: what is charged, or backfilled, is booked with its event, or raises; a repeat is answered so (S2.6)."""
    store = Deaf()

    async def scene(metering: Metering) -> None:
        first = await metering.backfill("acme", 1, id="learn:note:1", line="learnings")
        again = await metering.backfill("acme", 1, id="learn:note:1", line="learnings")
        assert (first.applied, again.applied) == (True, False)
        with pytest.raises(IdempotencyConflictError):
            await metering.backfill("acme", 2, id="learn:note:1", line="learnings")
        store.deaf = True
        with pytest.raises(StoreUnavailableError):
            await metering.backfill("acme", 1, id="learn:note:2", line="learnings")
        with pytest.raises(SettlementError):
            async with metering.charge(payer="acme", line="publish", price=1):
                pass
        store.deaf = False

    told = play(scene, store)
    assert [event.line for event in told if event.line == "learnings"] == ["learnings"]


def test_tell_free_work_as_far_as_anybody_listens() -> None:
    """Fail-open: what costs nothing is told behind its back, and a store that takes nothing breaks it not (S2.6)."""
    store = Deaf()

    async def scene(metering: Metering) -> None:
        store.deaf = True
        async with metering.charge(payer="acme", line="seen", price=0) as call:
            call.attributes["count"] = 3
        store.deaf = False

    assert [event.line for event in play(scene, store)] == ["seen"]


def test_collapse_what_is_told_under_one_key_alone() -> None:
    """Two signals of one request are two events; a record's own key, its type included, makes one of many (S2.14)."""

    async def scene(metering: Metering) -> None:
        for _ in range(2):
            async with metering.charge(payer="acme", line="cost", price=1, request_id="r1"):
                pass
        for key in ("learn:note:7", "learn:note:7", "learn:rule:7", "learn:rule:_"):
            await metering.backfill("acme", 1, id=key, line="learnings")

    told = play(scene)
    costs = [event for event in told if event.line == "cost"]
    assert len({event.id for event in costs}) == 2
    assert {event.request_id for event in costs} == {"r1"}
    assert len({event.id for event in told if event.line == "learnings"}) == 3
    assert len(told) == 5


def served(*routes: Any, config: Any = None) -> Any:
    """A scene that asks each of *routes* once, with this *config* of the customer."""

    async def scene(metering: Metering) -> None:
        api = FastAPI()
        for number, endpoint in enumerate(routes):
            api.post(f"/{number}")(endpoint)
        app = MeteringMiddleware(api, metering=metering)
        for number in range(len(routes)):
            ended = await drive(app, http_scope(f"/{number}", "POST"))
            assert status(ended.log) == 200

    return scene


def is_platform_paid(config: Any) -> bool:
    """Whether the platform supplies the model: unless a provider of the customer's own is filled in."""
    providers = config.get("providers") if isinstance(config, Mapping) else None
    return not (isinstance(providers, Mapping) and any(providers.values()))


@pytest.mark.parametrize(
    ("config", "amount"),
    [
        (None, 2),
        ({}, 2),
        ({"providers": {"openai": None}}, 2),
        ({"providers": {"openai": {"api_key": "sk"}}}, 0),
        ("not a mapping", 2),
    ],
    ids=["missing", "empty", "unfilled", "own", "no mapping"],
)
def test_record_what_a_customer_runs_on_its_own_model(config: Any, amount: int) -> None:
    """A hook of the application says who supplies the model; own ones are recorded, and free (S2.15, S2.16)."""

    @billable(2, line="search", skip_if=lambda call: not is_platform_paid(config))
    async def search() -> None:
        current_call().attributes["platform_llm"] = is_platform_paid(config)
        current_call().record(TokenUsage(input=9))

    (event,) = play(served(search), identify=lambda connection: Caller("acme"))
    assert (event.amount, event.attributes["platform_llm"]) == (amount * CREDIT, amount > 0)
    assert event.usage == TokenUsage(input=9)


def test_charge_each_line_by_what_is_injected_for_it() -> None:
    """A table of prices by line, given when the application is made, fires on a served route of each (S2.25, S2.28)."""
    prices = {"application": 2, "learnings": 3}

    def by_line(call: Any) -> int:
        return prices[call.line]

    lines = ("application", "learnings", "application")
    routes = [billable(by_line, line=line)(lambda: None) for line in lines]
    told = play(served(*routes), identify=lambda connection: Caller("acme"))
    assert [(event.line, event.amount // CREDIT) for event in told] == [
        ("application", 2),
        ("learnings", 3),
        ("application", 2),
    ]
    # Known by the name of the line and not by a function: whoever replaces a price reaches all of its routes (S2.24).
    prices["application"] = 7
    told = play(served(*routes), identify=lambda connection: Caller("acme"))
    assert [event.amount // CREDIT for event in told] == [7, 3, 7]
