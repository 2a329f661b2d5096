"""
The SQLite store beside the memory store: the same operations, the same answers, the same whole state.

SQLite decides on the rows that it loaded. A row that it did not load, or wrote wrongly, makes it differ from the
store that decides on everything.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    End,
    Grow,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Renew,
    Sweep,
    WalletSource,
    WindowKind,
)
from asgi_metering.stores.sqlite import SQLiteStore
from tests.stores.beside import Pair, run_any_sequences, run_as_a_service


def forget(store: SQLiteStore) -> None:
    """Let the store read every row again, instead of keeping what nobody else changed."""
    store._copy = None


def beside(folder: Path, *, forgets: bool) -> Pair:
    """Both stores; SQLite's file is written by two stores in turn."""
    path = folder / "pair.db"
    return Pair(
        lambda clock: SQLiteStore(path, synchronous="OFF", clock=clock), forget if forgets else lambda store: None
    )


def pairs(*, forgets: bool) -> Pair:
    """Both stores, in a folder that goes with them."""
    folder = tempfile.TemporaryDirectory()
    pair = beside(Path(folder.name), forgets=forgets)
    pair._after = folder.cleanup
    return pair


@pytest.mark.timeout(600)  # Making a failure small takes minutes; passing takes seconds.
@pytest.mark.parametrize("forgets", [False, True], ids=["keeps", "forgets"])
def test_run_any_sequences_beside_memory(forgets: bool) -> None:
    """Whatever is run, SQLite answers as memory does and keeps what memory keeps."""
    run_any_sequences(lambda: pairs(forgets=forgets))


@pytest.mark.timeout(1_800)  # For more steps than usual.
def test_serve_beside_memory() -> None:
    """Many thousand steps of a service are answered and kept as in memory, with a clock that also steps back."""
    run_as_a_service(lambda: pairs(forgets=False))


# What is too rare to be met by chance.


@pytest.fixture(params=["keeps", "forgets"])
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Both stores, with one account of 1,000 units."""
    pair = beside(tmp_path, forgets=request.param == "forgets")
    pair.run(PostGrant("g", "p", "credits", 1_000))
    yield pair
    pair.close()


def _call(call_id: str, amount: int = 10, payer: str = "p", ttl_s: float = 60.0, **more: Any) -> Admit:
    sources = (WalletSource(),) if amount else ()
    return Admit(call_id, payer, "credits", amount, amount, sources, ttl_s=ttl_s, grace_s=10.0, **more)


def test_end_a_call_that_held_nothing(pair: Pair) -> None:
    """A call that holds 0 of a source has a row, and what it used is charged in full, also into debt, as in memory."""
    free = AllowanceSource("free", 5, (0.0, 0.0, 1e10, 2e10))
    for payer, granted, source in (("s", 0, WalletSource()), ("q", 7, WalletSource()), ("r", 0, free)):
        if granted:
            pair.run(PostGrant("g", payer, "credits", granted))
        held, repeated = pair.run(*[Admit(f"of {payer}", payer, "credits", 0, 0, (source,))] * 2)
        assert (held.admitted, held.held, repeated.admitted) == (True, 0, True)
        (receipt,) = pair.run(End(f"of {payer}", 9, Basis.USAGE))
        assert (receipt.applied, receipt.amount) == (True, 9)
        (after,) = pair.run(Admit(f"again {payer}", payer, "credits", 0, 0, (source,)))
        assert not after.admitted


def test_grow_by_sources_that_name_another_payer(pair: Pair) -> None:
    """Growth is decided on the windows of who pays the hold, also where sources name somebody else, as in memory."""
    free, rolls = AllowanceSource("free", 30, (0.0, 0.0, 1e10, 2e10)), AllowanceSource("rolls", 30, window_s=500.0)
    for source in (free, rolls):
        call_id = f"by {source.name}"
        pair.run(Admit(source.name, "q", "credits", 20, 20, (source,)), End(source.name, 20, Basis.USAGE))
        pair.run(Admit(call_id, "q", "credits", 0, 0, (WalletSource(),)))
        (decision,) = pair.run(Grow(call_id, 25, 1, (source._replace(payer="p"),)))
        assert (decision.payer, decision.held, decision.available) == ("q", 10, 0)


@pytest.mark.parametrize("together", [True, False])
def test_admit_into_an_account_with_many_overdue_calls(pair: Pair, together: bool) -> None:
    """Admissions end as many overdue calls as in memory, the same first, and look again at the same time."""
    calls = [_call(f"a{number:02}", ttl_s=50.0 + number % 7) for number in range(70)]
    pair.run(*calls, *(Renew(f"a{number:02}", number % 11) for number in range(0, 70, 3)))
    pair.clock.advance(63.0)
    asked = [_call(f"b{number}") for number in range(8)]
    for batch in [asked] if together else [[ask] for ask in asked]:
        pair.run(*batch)
    pair.clock.advance(5.0)
    pair.run(_call("c"), Sweep())


@pytest.mark.parametrize("operation", [_call("b"), Sweep()])
@pytest.mark.parametrize("back_s", [-50.0, -38.0])
def test_end_what_was_overdue_before_the_clock_stepped_back(pair: Pair, operation: Operation, back_s: float) -> None:
    """What is overdue is decided by the latest time that the account has seen, as in memory."""
    pair.run(*(_call(f"a{ttl_s}", ttl_s=ttl_s) for ttl_s in (60.0, 80.0, 85.0, 90.0, 500.0)))
    pair.clock.advance(100.0)
    pair.run(PostGrant("g2", "p", "credits", 1))
    pair.clock.advance(back_s)
    pair.run(operation)


def test_slot_that_lives_again_when_the_clock_steps_back(pair: Pair) -> None:
    """A slot that was free by time is taken again when the clock steps back before its time, as in memory."""
    leases = (LeaseAsk("a", "one", 1),)
    pair.run(_call("a", 0, ttl_s=5.0, leases=leases))
    pair.swap()
    pair.clock.advance(10.0)
    pair.run(_call("b", 0, leases=leases), End("b", None))
    pair.clock.advance(-8.0)
    (decision,) = pair.run(_call("c", 0, leases=leases))
    assert not decision.admitted


def test_sweep_accounts_a_few_calls_at_a_time(pair: Pair) -> None:
    """A sweep with a small limit ends, and puts in doubt, the same calls of the same accounts as in memory."""
    for payer in ("é", "Z", "q", "a"):
        pair.run(PostGrant("g", payer, "credits", 100))
        pair.run(*(_call(f"{payer}{number}", payer=payer, ttl_s=50.0 + 3 * number) for number in range(6)))
    for seconds in (55.0, 8.0, 8.0, 30.0):
        pair.clock.advance(seconds)
        for limit in (1, 2, 3, 5):
            pair.run(Sweep(limit))
    pair.run(Sweep())


def test_sweep_what_is_old_a_few_rows_at_a_time(pair: Pair) -> None:
    """However few rows a sweep may forget, sweeps come to the same end as one that forgets all at once."""
    leases = (LeaseAsk("a", "one", 9), LeaseAsk("b", "two", 9))
    pair.run(*(_call(f"a{number}", leases=leases) for number in range(5)))
    pair.run(*(End(f"a{number}", 5, Basis.USAGE) for number in range(3)))
    pair.clock.advance(65.0)
    pair.sweep_apart(Sweep(2, keep_holds_s=60.0), times=4)


def test_give_a_late_charge_back_to_spent_grants(pair: Pair) -> None:
    """A late end gives back to grants that are spent by now: those that were charged, and those that paid its debt."""
    grants = [PostGrant(f"h{number}", "q", "credits", 10, priority=number % 2) for number in range(4)]
    pair.run(grants[0], grants[1], _call("late", 5, payer="q"), Renew("late", 45))
    pair.clock.advance(70.0)
    pair.run(Sweep())
    pair.run(grants[2])
    pair.run(grants[3])
    pair.run(PostGrant("h4", "q", "credits", 20))
    pair.run(_call("other", 15, payer="q"), End("other", 15, Basis.USAGE))
    pair.run(End("late", 7, Basis.USAGE), _call("next", 38, payer="q"))


def test_give_a_late_charge_back_to_a_window(pair: Pair) -> None:
    """A late end corrects the allowance window that its call began in, although nobody else asks about it."""
    free = AllowanceSource("free", 50, (0.0, pair.clock() - 5.0, pair.clock() + 5.0, pair.clock() + 9e5))
    pair.run(Admit("late", "p", "credits", 20, 20, (free,), ttl_s=60.0, grace_s=10.0), Renew("late", 15))
    pair.clock.advance(70.0)
    pair.run(Sweep())
    pair.run(End("late", 7, Basis.USAGE))


def test_look_again_at_a_window_that_the_batch_has_begun(pair: Pair) -> None:
    """A rolling window that this process has begun is not read again over what a batch has done to it."""
    rolls = (AllowanceSource("rolls", 50, window_s=500.0),)
    asks = [Admit(call, "p", "credits", 10, 10, rolls, ttl_s=60.0) for call in ("a", "b")]
    pair.run(asks[0])
    pair.run(asks[1], asks[1], End("b", 4, Basis.USAGE))
    pair.run(End("a", 4, Basis.USAGE), asks[0])


@pytest.mark.parametrize("kind", [WindowKind.FIXED, WindowKind.SLIDING, WindowKind.BUCKET])
@pytest.mark.parametrize("is_over", [False, True], ids=["runs", "is over"])
def test_correct_what_is_counted_as_far_as_it_can_be(pair: Pair, kind: WindowKind, is_over: bool) -> None:
    """Up to 2^53 - 1 a window is corrected to the unit by what was used, also the one before of a sliding window."""
    most = 2**53 - 1
    refill = 1 if kind is WindowKind.BUCKET else 0
    cases = [(most - 1, 1, 3), (most - 2, 2, 1), (most - 4, 3, 1), (2**52 + 1, 2**52 - 2, 2**52 - 1), (5, 1, most - 3)]
    for number, (others, estimate, used) in enumerate(cases):
        key = f"{kind.value}{number}"
        limit = LimitAsk("l", key, kind, most - refill, 60.0, 0, "tokens", refill=refill)
        calls = [
            Admit(f"{key}{name}", "p", "credits", 0, 0, limits=(limit._replace(cost=min(cost, most - refill)),))
            for name, cost in (("others", others - refill), ("own", estimate))
        ]
        pair.run(*calls)
        if is_over:
            pair.clock.advance(60.5)
            pair.run(calls[1]._replace(id=f"{key}next"))
        pair.run(End(f"{key}own", None, actual={"tokens": used}), End(f"{key}others", None, actual={"tokens": others}))


def test_fold_a_line_that_the_sweep_has_written(pair: Pair) -> None:
    """A sweep that keeps no lines folds also those that its own ends have written."""
    pair.run(_call("a"), Renew("a", 4))
    pair.clock.advance(100.0)
    pair.run(Sweep(keep_entries_s=0.0))


def test_fold_and_forget_a_few_rows_at_a_time(pair: Pair) -> None:
    """Sweeps with a small limit fold the same lines of the same accounts, and forget the same windows, as in memory."""
    source = AllowanceSource("rolls", 50, window_s=5.0)
    for payer in ("é", "Z", "q"):
        for number in range(4):
            call = f"{payer}{number}"
            pair.run(Admit(call, payer, "credits", 5, 5, (source,)), End(call, 5, Basis.USAGE))
            pair.clock.advance(7.0)
    for limit in (1, 2, 3, 500):
        pair.run(Sweep(limit, keep_entries_s=20.0, keep_windows_s=20.0))
