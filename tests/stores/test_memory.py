"""The memory store: what only it does, and what it forgets."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering import Metering
from asgi_metering.call import CallRefused
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.conservation import ledger_discrepancies
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    AllowanceSource,
    Emit,
    End,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Renew,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import AccountRows, EntriesAfter, EverythingKept
from asgi_metering.stores.forgetting import IDLE_S, LATE_S, Bounds
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing.clock import FakeClock
from tests.rules.side_by_side import ordered, plain_calls
from tests.stores.operations import CLOCK_STEPS_S, comparable, operations

FEW = Bounds(entries=5, ended_holds=5, counters=5, windows=5, strangers=5, delivered=5)
"""So few that a test meets them."""


def kept(store: MemoryStore) -> State:
    """All that the store keeps."""
    return asyncio.run(store.read(EverythingKept())).state


def call(number: int, **more: Any) -> Admit:
    """A call for 1 of the credits of p."""
    return Admit(f"c{number}", "p", "credits", 1, 1, (WalletSource(),), **more)


def hit(address: int, kind: WindowKind = WindowKind.FIXED, window_s: float = 60.0) -> Admit:
    """A call that is only limited, by an address."""
    limits = (LimitAsk("per address", f"address {address}", kind, 10, window_s),)
    return Admit(f"h{address}", "p", "credits", 0, 0, (), limits)


def free(payer: int, now: float, window_s: float = 60.0) -> Admit:
    """A call for 1 of the allowance that begins now, of a payer that has nothing else."""
    source = AllowanceSource("free", 10, (now - window_s, now, now + window_s, now + 2 * window_s))
    return Admit(f"f{payer}", f"payer {payer}", "credits", 1, 1, (source,))


def rich(clock: FakeClock, bounds: Bounds = FEW) -> MemoryStore:
    """A store where p has 1,000."""
    store = MemoryStore(clock, bounds=bounds)
    store.run_now(PostGrant("g", "p", "credits", 1_000))
    return store


def test_run_folds_old_ledger_lines() -> None:
    """Old ledger lines fold into a checkpoint once twice the bound is passed: it and the rest still prove the sums."""

    async def scene() -> None:
        store = MemoryStore(FakeClock(), bounds=FEW)
        for number in range(11):
            await store.post([PostGrant(f"g{number}", "p", "credits", 1)])
        lines = (await store.read(EntriesAfter("p", "credits"))).state.entries["p", "credits"]
        assert [line.number for line in lines] == [7, 8, 9, 10, 11]
        state = (await store.read(AccountRows("p", "credits"))).state
        account, checkpoint = state.accounts["p", "credits"], state.checkpoints["p", "credits"]
        assert (account.granted, checkpoint.number, checkpoint.sums) == (11, 6, {"given": 6})
        assert ledger_discrepancies(account, state.grants["p", "credits"].values(), checkpoint, lines) == []
        refs = (await store.read(EverythingKept())).state.refs
        assert sorted(ref for _, _, ref in refs) == ["g10", "g6", "g7", "g8", "g9"]

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


RULES = str(Path("asgi_metering", "rules"))


def test_run_from_several_threads_at_once() -> None:
    """However threads take turns, no more is admitted than was granted, and the books balance (DESIGN 7)."""
    granted, admitted = 150, [0] * 4

    async def caller(metering: Metering, thread: int) -> None:
        try:
            async with metering.charge(payer="p", line="work", price=1):
                admitted[thread] += 1
        except CallRefused:
            pass

    async def loop(metering: Metering, thread: int) -> None:
        for _ in range(7):
            await asyncio.gather(*(caller(metering, thread) for _ in range(10)))

    async def scene() -> None:
        async with Metering("memory://", sinks=()) as metering:
            await metering.grant("p", granted, id="g")
            await asyncio.gather(*(asyncio.to_thread(play, metering, thread) for thread in range(4)))
            assert await metering.check() == []
            assert sum(admitted) == granted

    def play(metering: Metering, thread: int) -> None:
        sys.setprofile(hand_over)
        try:
            asyncio.run(loop(metering, thread))
        finally:
            sys.setprofile(None)

    def hand_over(frame: FrameType, _event: str, _what: object) -> None:
        # Inside of a decision, at whatever it calls: chance alone would seldom take turns there.
        if RULES in frame.f_code.co_filename:
            time.sleep(0)

    asyncio.run(scene())


def test_run_now_answers_at_once() -> None:
    """The memory store needs no loop for one operation."""
    store = MemoryStore(FakeClock())
    receipt: Any = store.run_now(PostGrant("g", "p", "credits", 100))
    assert receipt.available == 100


class Plodding(MemoryStore):
    """A memory store whose every operation goes the long way."""

    def run_now(self, operation: Operation) -> Answer:
        """See `MemoryStore.run_now`."""
        return self._decided(operation, self._clock())


class Direct(MemoryStore):
    """A memory store that knows no long way."""

    def _decided(self, operation: Operation, now: float) -> Answer:
        raise AssertionError(f"{operation!r} at {now} went the long way")


def test_run_plain_calls_without_the_long_way() -> None:
    """A common call and its end are decided in one pass each (DESIGN 9)."""
    store = Direct(FakeClock())
    store._state = rich(FakeClock())._state
    decision: Any = store.run_now(call(1, leases=(LeaseAsk("a", "one", 2),), facts={"a": 1}))
    receipt: Any = store.run_now(End("c1", 1, Basis.USAGE, event={"outcome": "completed"}))
    assert (decision.admitted, receipt.applied) == (True, True)
    with pytest.raises(AssertionError):
        store.run_now(Renew("c1"))


@settings(max_examples=20)
@given(st.data())
def test_forget_on_the_fast_path_as_on_the_long_way(data: st.DataObject) -> None:
    """Whichever way operations go, the same is answered, kept and forgotten."""
    clock = FakeClock()
    store, plodding = rich(clock), Plodding(clock, bounds=FEW)
    plodding.run_now(PostGrant("g", "p", "credits", 1_000))
    for _ in range(data.draw(st.integers(1, 8))):
        clock.advance(data.draw(st.sampled_from(CLOCK_STEPS_S)))
        kind = data.draw(st.sampled_from((plain_calls, plain_calls, operations)))
        batch = data.draw(kind(clock()))
        answers = [comparable(asyncio.run(each.run(batch))) for each in (store, plodding)]
        assert answers[0] == answers[1]
        assert ordered(store._state) == ordered(plodding._state)
        assert list(store._forgetting._ended) == list(plodding._forgetting._ended)


# -- ended calls -------------------------------------------------------------------------------------------


def test_forget_the_calls_that_ended_first() -> None:
    """Beyond the bound the calls that ended first go, whenever they began, and one that has not ended never does."""
    store = rich(FakeClock())
    for number in range(10):
        store.run_now(call(number))
    for number in (3, 9, 8, 1, 2, 4, 5, 6):
        store.run_now(End(f"c{number}", 1, Basis.USAGE))
    assert set(kept(store).holds) == {"c0", "c7", "c1", "c2", "c4", "c5", "c6"}
    receipts: list[Any] = [store.run_now(End(call_id, 1, Basis.USAGE)) for call_id in ("c8", "c1", "c0")]
    assert [(receipt.known, receipt.applied) for receipt in receipts] == [(False, False), (True, False), (True, True)]


def test_forget_no_call_sooner_for_ending_twice() -> None:
    """A late end takes no place of its own among the ended calls, and does not prolong the first one's."""
    store = rich(clock := FakeClock())
    store.run_now(call(0, ttl_s=1.0, grace_s=0.0))
    clock.advance(2.0)
    store.run_now(Sweep())
    for number in range(1, 5):
        store.run_now(call(number))
        store.run_now(End(f"c{number}", 1, Basis.USAGE))
    late: Any = store.run_now(End("c0", 1, Basis.USAGE))
    assert late.late == 1
    assert len(kept(store).holds) == 5
    store.run_now(call(5))
    store.run_now(End("c5", 1, Basis.USAGE))
    assert set(kept(store).holds) == {"c1", "c2", "c3", "c4", "c5"}


def test_count_no_call_that_a_sweep_forgot() -> None:
    """What a sweep forgets by age no longer stands among the ended calls."""
    store = rich(clock := FakeClock())
    for number in range(5):
        store.run_now(call(number))
        store.run_now(End(f"c{number}", 1, Basis.USAGE))
    clock.advance(100.0)
    store.run_now(Sweep(keep_holds_s=50.0))
    assert not kept(store).holds
    for number in range(5, 10):
        store.run_now(call(number))
        store.run_now(End(f"c{number}", 1, Basis.USAGE))
    assert set(kept(store).holds) == {"c5", "c6", "c7", "c8", "c9"}


def test_count_a_call_that_ended_on_the_way_to_a_mistake() -> None:
    """An admission that fails has ended overdue calls by then, and they count like others that ended."""
    store = rich(clock := FakeClock(), FEW._replace(ended_holds=1))
    store.run_now(call(0, ttl_s=1.0, grace_s=0.0))
    clock.advance(2.0)
    wrong: Any = "soon"
    with pytest.raises(TypeError):
        store.run_now(call(1, ttl_s=wrong))
    store.run_now(call(2))
    store.run_now(End("c2", 1, Basis.USAGE))
    assert set(kept(store).holds) == {"c2"}


# -- counters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [WindowKind.FIXED, WindowKind.SLIDING])
def test_forget_counters_whose_window_is_over(kind: WindowKind) -> None:
    """However many addresses come by, a few times those of the last two windows are kept; no sweep is needed."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW)
    most = 0
    for address in range(3_000):
        clock.advance(1.0)
        store.run_now(hit(address, kind, 10.0))
        most = max(most, len(store._state.counters))
    assert most <= 60


def test_forget_no_counter_that_still_counts() -> None:
    """A counter stays while its window runs, and for one window more, where a sliding limit weighs it."""
    store = MemoryStore(clock := FakeClock(start=6_000.0), bounds=FEW)
    for address in range(100):
        for _ in range(10):
            store.run_now(hit(address, WindowKind.SLIDING))
    clock.advance(119.0)
    for address in range(1_000, 1_200):
        store.run_now(hit(address, WindowKind.SLIDING))
    assert len(store._state.counters) == 300
    clock.advance(1.0)
    for address in range(2_000, 2_100):
        store.run_now(hit(address, WindowKind.SLIDING))
    store.run_now(Sweep(limit=1))
    assert sorted(int(key.split()[1]) for key in store._state.counters) == [*range(1_000, 1_200), *range(2_000, 2_100)]


def test_look_at_counters_in_turn() -> None:
    """A counter that is used for ever, at the front of the others, hides none of those that are over."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW)
    for address in range(1_000):
        clock.advance(1.0)
        store.run_now(hit(0, WindowKind.FIXED, 1e6))
        store.run_now(hit(1 + address, WindowKind.FIXED, 1.0))
    state = kept(store)
    assert len(state.counters) <= 10
    assert state.counters["address 0"].used == 10


def test_leave_few_counters_to_the_sweep() -> None:
    """Up to the bound nothing is looked at; a sweep forgets what is over, as in any store."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW)
    for address in range(5):
        store.run_now(hit(address))
        clock.advance(1_000.0)
    assert len(store._state.counters) == 5
    store.run_now(Sweep())
    assert not store._state.counters


def test_forget_after_a_peak_when_nothing_new_comes() -> None:
    """Sweeps come to the end of what a peak has left, a share at a time, also beyond their own limit."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW)
    for address in range(500):
        store.run_now(hit(address))
    clock.advance(1_000.0)
    store.run_now(Sweep(limit=1))
    assert len(store._state.counters) == 5


def test_forget_again_after_a_sweep_has_forgotten() -> None:
    """Rows that a sweep took away are not taken for rows that were looked at."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW._replace(counters=20))
    for address in range(20):
        store.run_now(hit(address))
    clock.advance(1_000.0)
    store.run_now(Sweep())
    for address in range(1_000, 1_300):
        clock.advance(1.0)
        store.run_now(hit(address, window_s=1.0))
    assert len(store._state.counters) <= 21


def test_look_on_where_a_sweep_has_forgotten_meanwhile() -> None:
    """Counters that a sweep takes away in the midst of a round are passed over, and the round goes on behind them."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW)
    for address in range(20):
        store.run_now(hit(address, window_s=10.0 if address % 2 else 1e6))
    clock.advance(100.0)
    # Ten are over: the sweep takes the first five, of which some were looked at and some were to come.
    store.run_now(Sweep(limit=5))
    for address in range(1_000, 1_300):
        clock.advance(1.0)
        store.run_now(hit(address, window_s=1.0))
    assert len(store._state.counters) <= 2 * 10 + 1
    assert {f"address {address}" for address in range(0, 20, 2)} <= store._state.counters.keys()


# -- windows and accounts ----------------------------------------------------------------------------------


def test_forget_windows_when_no_late_end_is_awaited() -> None:
    """Allowance windows stay as long as a late end may correct them, then they are forgotten beyond the bound."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW)
    for payer in range(50):
        store.run_now(free(payer, clock()))
        store.run_now(End(f"f{payer}", 1, Basis.USAGE))
    clock.advance(60.0 + LATE_S - 1.0)
    store.run_now(Sweep())
    assert len(store._state.allowances) == len(store._state.latest) == 50
    clock.advance(1.0)
    store.run_now(Sweep())
    assert len(store._state.allowances) == len(store._state.latest) == 5


def test_forget_no_window_that_a_call_holds() -> None:
    """A window of which a call holds units stays, however long the call runs, and its end is booked there."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW._replace(windows=0))
    store.run_now(free(0, clock())._replace(ttl_s=2 * LATE_S))
    clock.advance(1.5 * LATE_S)
    store.run_now(Renew("f0"))
    store.run_now(Sweep())
    receipt: Any = store.run_now(End("f0", 1, Basis.USAGE))
    assert receipt.applied
    (window,) = store._state.allowances.values()
    assert (window.settled, window.held) == (1, 0)
    store.run_now(Sweep())
    assert not store._state.allowances


def test_forget_strangers_with_their_lines() -> None:
    """Payers that were never granted anything and have not called for long go, beyond the bound, with their ledger."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW._replace(strangers=0))
    for payer in range(20):
        store.run_now(free(payer, clock()))
        store.run_now(End(f"f{payer}", 1, Basis.USAGE))
    clock.advance(IDLE_S - 1.0)
    store.run_now(free(0, clock())._replace(id="again"))
    store.run_now(End("again", 1, Basis.USAGE))
    clock.advance(1.0)
    store.run_now(Sweep())
    state = kept(store)
    assert set(state.accounts) == set(state.entries) == {("payer 0", "credits")}
    assert [line.number for line in state.entries["payer 0", "credits"]] == [1, 2]
    assert {payer for payer, _, _ in state.refs} == {"payer 0"}
    assert not state.checkpoints


@pytest.mark.parametrize("spent", [False, True])
def test_forget_no_payer_with_a_grant(spent: bool) -> None:
    """What was ever granted can still be proven: an account with a grant stays, also a spent one."""
    store = rich(clock := FakeClock(), FEW._replace(strangers=0))
    if spent:
        store.run_now(call(0)._replace(amount=1_000, minimum=1_000))
        store.run_now(End("c0", 1_000, Basis.USAGE))
    clock.advance(10 * IDLE_S)
    store.run_now(Sweep())
    state = kept(store)
    assert set(state.accounts) == set(state.entries) == {("p", "credits")}


def test_forget_no_payer_in_debt_or_with_a_call_in_flight() -> None:
    """An account that owes, or whose call still runs, stays although it was never granted anything."""
    store = MemoryStore(clock := FakeClock(), bounds=FEW._replace(strangers=0))
    slot = (LeaseAsk("a", "one", 9),)
    store.run_now(Admit("owes", "debtor", "credits", 0, 0, (WalletSource(),), leases=slot))
    store.run_now(End("owes", 7, Basis.USAGE))
    store.run_now(free(1, clock())._replace(ttl_s=100 * IDLE_S))
    store.run_now(free(2, clock())._replace(ttl_s=100 * IDLE_S))
    store.run_now(End("f2", None, by=EndedBy.PERSON))
    clock.advance(10 * IDLE_S)
    store.run_now(Sweep())
    assert {payer for payer, _ in kept(store).accounts} == {"debtor", "payer 1"}


# -- events that were delivered ------------------------------------------------------------------------------


def test_forget_the_events_that_were_delivered_first() -> None:
    """Of delivered events only the last ones stay, however little time has passed; those that wait all stay."""
    store = MemoryStore(FakeClock(), bounds=FEW)
    names = [f"e{number}" for number in range(12)]
    store.run_now(Emit(tuple((name, {}) for name in [*names, "waits"])))
    for name in names:
        store.run_now(Acknowledge((name,)))
    assert list(kept(store).delivered) == names[-5:]
    store.run_now(Emit(tuple((name, {}) for name in names)))
    store.run_now(Acknowledge(tuple(names)))
    assert (list(kept(store).events), len(kept(store).delivered)) == (["waits"], 5)
