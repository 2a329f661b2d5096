"""Several processes on one store, and one killed among them: what is there once is given away once."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.operations import Admit, Emit, End, Operation, PostGrant, Renew, WalletSource
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import EverythingKept, Store
from tests.stores.places import store_at
from tests.stores.proofs import assert_conserved
from tests.stores.takers import CALLERS, LEASED, PRICE, REFUND, Taker, take, take_at

TAKERS = 4
"""Processes at once; threads with a loop each, where a store is of one process."""

GRANTED = 1_000_000
"""To the payer of every race."""

UNITS = 50
"""What is left of it where that is raced for."""

KEY = ("payer", "credits")

LATER_S = 1_000.0
"""Between what is prepared for a race of overdue calls and the race."""

OFTEN_S = 1e-5
"""Between two switches of threads, so that they meet in the middle of everything."""

ENDED_S = 60.0
"""Bound of the end of a process that has told everything."""

Said: TypeAlias = list[tuple[Any, ...]]


@dataclass
class Course:
    """
    A store that is raced on.

    Attributes:
        url: Where.
        store: The store itself, where all who race must share one object.
        ahead_s: How far the clock of the race is ahead.
    """

    url: str
    store: Store | None = None
    ahead_s: float = 0.0

    def prepare(self, *operations: Operation) -> None:
        """Run *operations* before the race."""

        async def run() -> None:
            store = self.store or store_at(self.url, migrate=True)
            await store.open()
            answers = await store.run([PostGrant("g", "payer", "credits", GRANTED), *operations])
            assert [answer for answer in answers if isinstance(answer, Exception)] == []
            await store.close()

        asyncio.run(run())

    def everything(self) -> State:
        """All that the store keeps; its books are found to balance."""

        async def run() -> State:
            store = self.store or store_at(self.url)
            await store.open()
            state = (await store.read(EverythingKept())).state
            await store.close()
            return state

        state = asyncio.run(run())
        assert_conserved(state)
        return state

    def race(self, kind: str, tries: int) -> Said:
        """Let all who race begin at once, and return what they told."""
        if self.store is not None:
            return self._race_of_threads(self.store, kind, tries)
        with self.processes(kind, tries, TAKERS) as runners:
            told = [words for said in heard([runner.told for runner in runners]) for words in said]
            for runner in runners:
                runner.process.join(ENDED_S)
            assert [runner.process.exitcode for runner in runners] == [0] * TAKERS
        return told

    def _race_of_threads(self, store: Store, kind: str, tries: int) -> Said:
        told: Said = []
        go = threading.Barrier(TAKERS)

        def run(number: int) -> None:
            taker = Taker(kind, f"taker{number}", tries)
            asyncio.run(take(store, taker, go, lambda *words: told.append(words)))

        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(OFTEN_S)
        try:
            with ThreadPoolExecutor(TAKERS) as threads:
                list(threads.map(run, range(TAKERS)))
        finally:
            sys.setswitchinterval(interval_s)
        return told

    @contextmanager
    def processes(self, kind: str, tries: int, number: int, *, is_streaming: bool = False) -> Iterator[list[Runner]]:
        """Start *number* processes that race; those that still run afterwards are killed."""
        context = multiprocessing.get_context("forkserver")
        go = context.Barrier(number)
        runners = []
        try:
            for index in range(number):
                told, tells = context.Pipe(duplex=False)
                taker = Taker(kind, f"taker{index}", tries, self.ahead_s)
                process = context.Process(target=take_at, args=(self.url, taker, go, tells, is_streaming), daemon=True)
                process.start()
                tells.close()
                runners.append(Runner(process, told))
            yield runners
        finally:
            for runner in runners:
                runner.process.kill()
                runner.process.join()
                runner.process.close()
                runner.told.close()


@dataclass
class Runner:
    """A process that races, and where it tells what it was answered."""

    process: Any
    told: Connection


def heard(connections: Sequence[Connection]) -> list[Said]:
    """What is told on *connections* until each of them ends; whoever has something to tell never waits for another."""
    said: list[Said] = []
    listening = list(connections)
    while listening:
        for ready in wait(listening):
            assert isinstance(ready, Connection)
            try:
                said.append(ready.recv())
            except (EOFError, OSError):
                # A process that was killed ends wherever it was.
                listening.remove(ready)
    return said


@pytest.fixture(params=["memory", "sqlite", "postgresql", "redis"])
def course(request: pytest.FixtureRequest, tmp_path: Path) -> Course:
    """A fresh store of each kind."""
    if request.param == "memory":
        course = Course("memory://")
        course.store = store_at(course.url, lambda: time.time() + course.ahead_s)
        return course
    return _shared(request, tmp_path)


@pytest.fixture(params=["sqlite", "postgresql", "redis"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Course:
    """A fresh store of each kind that several processes share."""
    return _shared(request, tmp_path)


def _shared(request: pytest.FixtureRequest, tmp_path: Path) -> Course:
    if request.param == "sqlite":
        return Course(f"sqlite:///{tmp_path / 'metering.db'}")
    schema = request.getfixturevalue("schema")
    if request.param == "redis":
        return Course(f"{request.getfixturevalue('server').url}?namespace={schema}")
    return Course(f"{request.getfixturevalue('postgres').url()}?namespace={schema}")


def admission(call: str, amount: int = PRICE, **more: Any) -> Admit:
    """An admission before the race."""
    return Admit(call, "payer", "credits", amount, amount, (WalletSource(),), **more)


def overdue(number: int) -> list[Operation]:
    """That many calls, of each of which 2 were observed, and which end `LATER_S` later at the latest."""
    calls = [f"call{index}" for index in range(number)]
    asks = [admission(call, 5, ttl_s=LATER_S / 2, grace_s=0.0, facts={"a": 1}) for call in calls]
    return [*asks, *(Renew(call, 2) for call in calls)]


def charges(state: State) -> Counter[str]:
    """How many lines charged each call."""
    return Counter(line.ref for line in state.entries[KEY] if line.kind == "settle")


def receipts(state: State) -> dict[str, Receipt]:
    """The receipt of every call; all have ended."""
    found = {call: hold.receipt for call, hold in state.holds.items()}
    assert None not in found.values()
    return {call: receipt for call, receipt in found.items() if receipt is not None}


# -- what is there so many times ---------------------------------------------------------------------------


def test_race_for_the_last_units(course: Course) -> None:
    """All ask at once for more units, slots and counts than there are: each is given away exactly once.

    The allowance belongs to a payer that nobody had seen before (S0.6, S0.44).
    """
    course.prepare(*_leaving(UNITS))
    told = course.race("last_units", tries=30)
    assert Counter(kind for (kind,) in told) == {
        "wallet": UNITS,
        "allowance": 40,
        "limit": 30,
        "log": 25,
        "bucket": 35,
        "pool": 20,
    }
    state = course.everything()
    assert state.accounts[KEY].available == 0
    assert len([hold for hold in state.holds.values() if hold.receipt is None]) == 1 + UNITS + 40 + 20


def _leaving(units: int) -> list[Operation]:
    """A hold that leaves the payer so much and no more."""
    return [admission("all the others", GRANTED - units, ttl_s=1e6)]


def test_race_for_payers_and_calls_that_nobody_has_seen(course: Course) -> None:
    """All post the same grants and ask for the same calls, of payers that do not exist yet.

    Each grant counts once, each call is admitted once and told to all as the same (S3.15), and what is left of the
    grant goes to one of them.
    """
    course.prepare()
    told = course.race("newcomers", tries=30)
    state = course.everything()
    accounts = [account for (payer, _), account in state.accounts.items() if payer.startswith("newcomer")]
    assert [(account.granted, account.held) for account in accounts] == [(3, 3)] * 30
    assert Counter(told) == {("same", True, 2): TAKERS * 30, ("own",): 30}


def test_race_of_growing_holds(course: Course) -> None:
    """Holds that grow at once take no more than there is, all or nothing, and leave less than each of them wanted."""
    course.prepare(*_leaving(UNITS))
    told = course.race("growths", tries=10)
    held = sum(amount for _, amount in told)
    assert UNITS - 2 < held <= UNITS
    account = course.everything().accounts[KEY]
    assert (account.held, account.available) == (GRANTED - UNITS + held, UNITS - held)


def test_race_for_slots(course: Course) -> None:
    """Of a pool that is taken and given back all the time, nobody has more slots at once than there are (S0.45)."""
    course.prepare()
    told = course.race("leases", tries=8)
    # Who gives back in the moment in which another takes comes first.
    moments = sorted([(since, 1) for since, _ in told] + [(until, -1) for _, until in told])
    at_once = most = 0
    for _, step in moments:
        at_once += step
        most = max(most, at_once)
    assert 1 <= most <= LEASED
    assert len(told) >= LEASED
    assert not any(course.everything().leases.values())


def test_race_for_one_account(course: Course) -> None:
    """However many charge one account at once, it has spent exactly the sum, a line and an event for each (S0.6)."""
    course.prepare()
    told = course.race("work", tries=6)
    ended = {call: amount for word, call, *rest in told if word == "ended" for amount in rest}
    assert len(ended) == TAKERS * CALLERS * 6
    state = course.everything()
    account = state.accounts[KEY]
    assert (account.settled, account.held) == (sum(ended.values()), 0)
    assert charges(state) == Counter(call for call, amount in ended.items() if amount)
    assert state.events.keys() == ended.keys()


# -- what happens once -------------------------------------------------------------------------------------


def test_race_of_one_charge_key(course: Course) -> None:
    """Calls that bring one key at once are all let in, and charged once together (S0.3, S0.10)."""
    course.prepare()
    told = course.race("charge_keys", tries=12)
    state = course.everything()
    counts = Counter((word, number) for word, number, *_ in told)
    charged = Counter(number for word, number, *rest in told if word == "charged" for amount in rest if amount)
    assert {counts["first", number] for number in range(12)} == {1}
    assert {counts["joined", number] for number in range(12)} == {TAKERS - 1}
    assert charged == dict.fromkeys(range(12), 1)
    assert (state.accounts[KEY].settled, state.accounts[KEY].held) == (12 * PRICE, 0)
    assert set(charges(state).values()) == {1}


def test_race_of_one_idempotency_key(course: Course) -> None:
    """Of requests that bring one key at once one runs; the others hear that it runs, or what it did."""
    course.prepare()
    told = course.race("idempotency_keys", tries=20)
    state = course.everything()
    counts = Counter((words[0], words[1]) for words in told)
    assert {counts["runs", number] for number in range(20)} == {1}
    assert {words[0] for words in told} <= {"runs", "in_flight", "replayed"}
    assert {words[2] for words in told if words[0] == "replayed"} <= {PRICE}
    assert len(told) == TAKERS * 20
    assert (state.accounts[KEY].settled, state.accounts[KEY].held) == (20 * PRICE, 0)


def test_race_of_ends(course: Course) -> None:
    """Overdue calls are settled, released, ended by a person and swept at once: the first wins, all others get its
    receipt (S3.13).

    A call that the policy ended first tells once what it really used, by a line of its own.
    """
    tries = 60
    course.prepare(*overdue(tries))
    course.ahead_s = LATER_S
    told = course.race("ends", tries)
    state = course.everything()
    done = receipts(state)
    applied = Counter(call for call, was_first, *_ in told if was_first)
    assert set(applied.values()) <= {1}
    assert len(done) == tries
    for call, was_first, amount, by in told:
        assert (amount, by) == (done[call].amount, done[call].ended_by)
        assert was_first or applied[call] or by is EndedBy.POLICY
    assert charges(state) == Counter(call for call, receipt in done.items() if receipt.amount)
    lines = state.entries[KEY]
    late = Counter(line.ref for line in lines if line.kind == "late")
    assert set(late.values()) <= {1}
    assert {done[call].ended_by for call in late} <= {EndedBy.POLICY}
    assert state.accounts[KEY].settled == sum(line.amount for line in lines if line.kind in ("settle", "late"))


def test_race_of_sweeps(course: Course) -> None:
    """Sweeps at once end each overdue call once, by its policy, with one line and one event (S3.13)."""
    number = 80
    course.prepare(*overdue(number))
    course.ahead_s = LATER_S
    course.race("sweeps", tries=12)
    state = course.everything()
    done = receipts(state)
    assert Counter((receipt.amount, receipt.ended_by) for receipt in done.values()) == {(2, EndedBy.POLICY): number}
    assert charges(state) == Counter(done.keys())
    assert sorted(state.events) == sorted(done)
    assert (state.accounts[KEY].settled, state.accounts[KEY].held) == (2 * number, 0)


def test_race_of_refunds(course: Course) -> None:
    """Refunds at once give back no more than was charged, and each id once (S3.15)."""
    number = 12
    calls = [f"call{index}" for index in range(number)]
    course.prepare(*(admission(call) for call in calls), *(End(call, PRICE, Basis.USAGE) for call in calls))
    told = course.race("refunds", tries=number)
    state = course.everything()
    given = Counter((call, posting) for call, posting, applied in told if applied)
    assert set(given.values()) == {1}
    fit = PRICE // REFUND
    assert Counter(call for call, _ in given) == dict.fromkeys(calls, fit)
    assert state.accounts[KEY].settled == number * (PRICE - fit * REFUND)


def test_race_for_events(course: Course) -> None:
    """No event is in two hands at once, and each is in one (S2.22)."""
    ids = [f"event{number}" for number in range(120)]
    course.prepare(Emit(tuple((key, {"n": 1}) for key in ids)))
    told = course.race("claims", tries=1)
    assert Counter(key for (key,) in told) == Counter(ids)


# -- processes that come and go ----------------------------------------------------------------------------


def test_open_a_new_store_in_several_processes(shared: Course) -> None:
    """Processes that find no tables make them together: none fails, and they are there once."""
    assert shared.race("work", tries=0) == []
    shared.prepare()
    assert [account.granted for account in shared.everything().accounts.values()] == [GRANTED]


def test_kill_a_process_in_the_middle_of_its_work(shared: Course) -> None:
    """Nothing that was acknowledged before a kill is lost, nothing is half done, and the others never notice.

    One of two processes is killed with SIGKILL in the middle of its batches. What it told before is read from its
    pipe: every admission it was promised is there, every end is charged once, with its ledger line and its event.
    """
    tries, after = 40, 300
    shared.prepare()
    with shared.processes("work", tries, 2, is_streaming=True) as (victim, survivor):
        told = [victim.told.recv()[0] for _ in range(after)]
        victim.process.kill()
        rest = heard([victim.told, survivor.told])
        survivor.process.join(ENDED_S)
        victim.process.join(ENDED_S)
        assert (victim.process.exitcode, survivor.process.exitcode) == (-signal.SIGKILL, 0)
    told.extend(words for said in rest for words in said)
    assert len(told) < 2 * 2 * CALLERS * tries
    state = shared.everything()
    admitted = {words[1] for words in told if words[0] == "admitted"}
    ended = {words[1]: words[2] for words in told if words[0] == "ended"}
    assert len(ended) >= CALLERS * tries
    assert admitted <= state.holds.keys()
    charged = {call: hold.receipt.amount for call, hold in state.holds.items() if hold.receipt is not None}
    assert ended.items() <= charged.items()
    assert ended.keys() <= state.events.keys()
    assert charges(state) == Counter(call for call, amount in charged.items() if amount)
