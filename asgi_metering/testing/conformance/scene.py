"""
A scene: one fresh store, its clock, and the verbs of a test in one line each.

Knows operations and how states are compared. Never knows which store it plays on.
"""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, cast

from asgi_metering.decisions import Decision
from asgi_metering.errors import ConfigurationError
from asgi_metering.receipts import Basis, Entry, GrantReceipt, Receipt
from asgi_metering.rules.calendars import Period, boundaries
from asgi_metering.rules.conservation import discrepancies, ledger_discrepancies
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    End,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    SourceAsk,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.state import NEVER, Account, Grant, Hold, State
from asgi_metering.stores.contract import EverythingKept, Store
from asgi_metering.testing.clock import FakeClock

__all__ = [
    "DAY_S",
    "GRACE_S",
    "LIFE_S",
    "PAYER",
    "UNIT",
    "WALLET",
    "Scene",
    "Suite",
    "play",
    "scenario",
    "tables",
]

PAYER = "org_7"
UNIT = "credits"
WALLET: tuple[SourceAsk, ...] = (WalletSource(),)

MINUTE_S = 60.0
DAY_S = 86_400.0
LIFE_S = 60.0
GRACE_S = 30.0

_AnySuite = TypeVar("_AnySuite", bound="Suite")


class Suite:
    """What all parts of the suite share: the way to a store."""

    async def make_store(self, clock: FakeClock) -> Store:
        """
        Make a store for one test.

        Args:
            clock: What the store must read the time from: tests move it.

        Returns:
            A store that is open and empty. The test closes it.

        Raises:
            ConfigurationError: The subclass does not say how its store is made.
        """
        raise ConfigurationError(f"{type(self).__name__} must say how its store is made. Write make_store().")


def tables(state: State) -> dict[str, Any]:
    """
    A whole state as plain mappings that compare equal when the rows do.

    Rows by key, an entry by its place in its account; events are listed, because their order is part of what is kept.
    """
    grants = [
        grant for kept in (state.grants, state.closed_grants) for rows in kept.values() for grant in rows.values()
    ]
    return {
        "account": dict(state.accounts),
        "grant": {(grant.payer, grant.unit, grant.id): grant for grant in grants},
        "hold": dict(state.holds),
        "live": {hold_id for ids in state.live.values() for hold_id in ids},
        "allowance": dict(state.allowances),
        "counter": dict(state.counters),
        "lease": {(pool, lease.id): lease for pool, rows in state.leases.items() for lease in rows.values()},
        "entry": {key: rows for key, rows in state.entries.items() if rows},
        "event": list(state.events.values()),
        "delivered": dict(state.delivered),
        "charge_key": dict(state.charge_keys),
        "idempotency": dict(state.idempotency_keys),
        "checkpoint": dict(state.checkpoints),
        "unit": dict(state.units),
        "reading": dict(state.readings),
    }


class Scene:
    """
    One store and its clock.

    Attributes:
        store: The store that is tested.
        clock: What it reads the time from.
        fellow: Makes another fresh store on the same clock, to compare with.
    """

    def __init__(self, store: Store, clock: FakeClock, fellow: Callable[[], Awaitable[Scene]]) -> None:
        self.store = store
        self.clock = clock
        self.fellow = fellow

    # -- what a test does ----------------------------------------------------------------------------------

    async def run(self, *operations: Operation) -> list[Any]:
        """Run operations in one sequence; mistakes are answers."""
        return list(await self.store.run(operations))

    async def one(self, operation: Operation) -> Any:
        """Run one operation; raise if it is a mistake."""
        (answer,) = await self.store.run([operation])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def grant(
        self,
        amount: int,
        grant_id: str = "grant_1",
        *,
        payer: str = PAYER,
        priority: int = 0,
        begins_in_s: float | None = None,
        expires_in_s: float = NEVER,
    ) -> GrantReceipt:
        """Give units to the payer."""
        now = self.clock()
        begins = None if begins_in_s is None else now + begins_in_s
        ask = PostGrant(grant_id, payer, UNIT, amount, priority, begins, now + expires_in_s)
        return cast("GrantReceipt", await self.one(ask))

    def ask(
        self,
        call_id: str,
        amount: int,
        *,
        at_least: int | None = None,
        sources: Sequence[SourceAsk] | None = None,
        limits: Sequence[LimitAsk] = (),
        leases: Sequence[LeaseAsk] = (),
        in_doubt: Basis = Basis.OBSERVED,
        payer: str = PAYER,
        facts: Mapping[str, Any] | None = None,
        charge_key: KeyAsk | None = None,
        idempotency: IdempotencyAsk | None = None,
    ) -> Admit:
        """An admission; it holds *amount* or nothing unless *at_least* says otherwise."""
        return Admit(
            call_id,
            payer,
            UNIT,
            amount,
            amount if at_least is None else at_least,
            tuple((WALLET if amount else ()) if sources is None else sources),
            tuple(limits),
            tuple(leases),
            LIFE_S,
            GRACE_S,
            in_doubt,
            "chat",
            {"caller": "key_1"} if facts is None else facts,
            charge_key,
            idempotency,
        )

    async def admit(self, call_id: str, amount: int = 0, **more: Any) -> Decision:
        """Ask to run a call; see `ask`."""
        return cast("Decision", await self.one(self.ask(call_id, amount, **more)))

    async def settle(self, call_id: str, amount: int, **more: Any) -> Receipt:
        """End a call and charge *amount*."""
        return cast("Receipt", await self.one(End(call_id, amount, Basis.USAGE, **more)))

    async def release(self, call_id: str, **more: Any) -> Receipt:
        """End a call and charge nothing."""
        return cast("Receipt", await self.one(End(call_id, None, **more)))

    def limit(self, kind: WindowKind, limit: int, *, name: str = "calls", cost: int = 1, **more: Any) -> LimitAsk:
        """A limit per minute; a calendar one is per UTC day."""
        if kind is WindowKind.CALENDAR:
            return LimitAsk(name, name, kind, limit, DAY_S, cost, boundaries=self.days(), **more)
        return LimitAsk(name, name, kind, limit, MINUTE_S, cost, **more)

    def allowance(self, limit: int, name: str = "free") -> AllowanceSource:
        """An allowance per UTC day."""
        return AllowanceSource(name, limit, self.days())

    def days(self) -> tuple[float, ...]:
        """Four UTC midnights around now."""
        return boundaries(Period.DAY, "UTC", self.clock())

    # -- what a test looks at ------------------------------------------------------------------------------

    async def state(self) -> State:
        """Everything that the store keeps."""
        return (await self.store.read(EverythingKept())).state

    async def account(self, payer: str = PAYER) -> Account:
        """The payer's account; one that nobody touched yet is all zeros."""
        return (await self.state()).accounts.get((payer, UNIT), Account(payer, UNIT))

    async def grant_row(self, grant_id: str = "grant_1") -> Grant:
        """One grant of the payer."""
        grant = (await self.state()).grant((PAYER, UNIT), grant_id)
        assert grant is not None, f"no grant {grant_id!r}"
        return grant

    async def hold(self, call_id: str) -> Hold:
        """The hold of one call."""
        return (await self.state()).holds[call_id]

    async def entries(self, payer: str = PAYER) -> list[Entry]:
        """The payer's ledger lines."""
        return (await self.state()).entries.get((payer, UNIT), [])

    async def settled_and_held(self, name: str = "free") -> list[tuple[int, int]]:
        """Per window of an allowance, oldest first, what was used and what is held."""
        windows = (await self.state()).allowances.values()
        mine = sorted((window for window in windows if window.name == name), key=lambda window: window.start)
        return [(window.settled, window.held) for window in mine]

    async def events(self) -> list[Mapping[str, Any]]:
        """What the events in the outbox say, oldest first."""
        return [event.payload for event in (await self.state()).events.values()]

    @asynccontextmanager
    async def nothing_changes(self) -> AsyncIterator[None]:
        """Compare the whole state before and after."""
        before = tables(await self.state())
        yield
        assert tables(await self.state()) == before

    async def assert_conserved(self) -> None:
        """Prove every account from its rows."""
        state = await self.state()
        for key, account in state.accounts.items():
            grants = [*state.grants.get(key, {}).values(), *state.closed_grants.get(key, {}).values()]
            windows = [row for place, row in state.allowances.items() if place[:2] == key]
            assert discrepancies(account, grants, state.live_holds(key), windows) == []
            entries = state.entries.get(key, [])
            assert ledger_discrepancies(account, grants, state.checkpoints.get(key), entries) == []


async def play(suite: Suite, test: Callable[[Any, Scene], Awaitable[None]]) -> None:
    """Play *test* on a fresh store, prove that its books balance, and close it."""
    clock = FakeClock()
    opened: list[Store] = []

    async def scene() -> Scene:
        opened.append(await suite.make_store(clock))
        return Scene(opened[-1], clock, scene)

    try:
        played = await scene()
        await test(suite, played)
        await played.assert_conserved()
    finally:
        for store in opened:
            await store.close()


def scenario(test: Callable[[_AnySuite, Scene], Awaitable[None]]) -> Callable[[_AnySuite], None]:
    """Make an async test of a scene into one that any test runner can call."""

    def run(self: _AnySuite) -> None:
        asyncio.run(play(self, test))

    run.__name__ = test.__name__
    run.__qualname__ = test.__qualname__
    run.__doc__ = test.__doc__
    return run
