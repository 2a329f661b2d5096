"""Charging from code without an event loop: threads, scripts, workers that fork."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import Metering, TokenUsage, current_call
from asgi_metering.call import CallRefused
from asgi_metering.errors import ConfigurationError, PayerError, SettlementError, StoreUnavailableError
from asgi_metering.opening import CURRENT
from asgi_metering.portal import Portal
from asgi_metering.prices import per_token
from asgi_metering.receipts import Balance
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import End, Operation
from asgi_metering.stores.memory import MemoryStore

pytestmark = pytest.mark.uncounted

CREDIT = 1_000_000


@pytest.fixture(params=["memory", "sqlite"])
def metering(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Metering]:
    """A metering with a hundred credits of ann's, used without an event loop."""
    url = "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/metering.db?synchronous=OFF"
    metering = Metering(url, sinks=())
    metering.portal().call(metering.grant, "ann", 100, id="g")
    yield metering
    assert metering.portal().call(metering.check) == []
    metering.close()


def balance(metering: Metering, payer: str = "ann") -> Balance:
    """What a payer has."""
    return metering.portal().call(metering.balance, payer)


def test_charge_without_a_loop(metering: Metering) -> None:
    """A block is charged what it recorded, is current inside, and leaves nothing behind (S3.24)."""
    with metering.charge_sync(payer="ann", line="job", price=per_token(output=1), hold=5) as call:
        assert current_call() is call
        call.record(TokenUsage(output=3))
        assert balance(metering).held == 5 * CREDIT
    assert CURRENT.get() is None
    assert call.receipt is not None
    assert (call.receipt.amount, balance(metering).held) == (3 * CREDIT, 0)


def test_refuse_without_a_loop(metering: Metering) -> None:
    """Who cannot pay is refused before the block, in the thread that asked."""
    with (
        pytest.raises(CallRefused, match="It needs 101 credits"),
        metering.charge_sync(payer="ann", line="job", hold=101),
    ):
        raise AssertionError("It ran.")
    with pytest.raises(PayerError), metering.charge_sync(line="job", hold=1):
        raise AssertionError("It ran.")
    assert CURRENT.get() is None


@pytest.mark.parametrize("kind", [KeyError, StopIteration, KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_raise_what_the_block_raised(metering: Metering, kind: type[BaseException]) -> None:
    """Any exception releases the hold and rises unchanged (S3.8), and the portal goes on (S3.31)."""
    mine = kind("mine")
    with pytest.raises(kind) as raised, metering.charge_sync(payer="ann", line="job", hold=5) as call:
        raise mine
    assert raised.value is mine
    assert call.receipt is not None
    assert (balance(metering).settled, balance(metering).held) == (0, 0)


def test_inherit_the_payer_without_a_loop(metering: Metering) -> None:
    """A block inside a block is paid by the same, and the outer one is current again after it (S0.27)."""
    with metering.charge_sync(payer="ann", line="job", hold=5) as outer:
        with metering.charge_sync(line="sub", hold=1) as inner:
            assert (inner.payer, current_call()) == ("ann", inner)
        assert current_call() is outer
    assert balance(metering).settled == 6 * CREDIT


def test_charge_in_many_threads(metering: Metering) -> None:
    """Threads share one portal, each with a current call of its own, and no unit is lost or spent twice."""

    def job(number: int) -> bool:
        try:
            with metering.charge_sync(payer="ann", line=f"job{number}", hold=3) as call:
                assert current_call() is call
        except CallRefused:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(job, range(40)))
    assert done.count(True) == 33
    assert balance(metering).available == CREDIT
    assert sum(thread.name == "asgi_metering portal" for thread in threading.enumerate()) == 1


def test_tell_a_block_whose_end_is_not_booked() -> None:
    """Work that was done and cannot be booked yet is an error of its own, and is booked later (S3.10)."""

    class Failing(MemoryStore):
        """A store that takes no end while it is down."""

        down = True

        def run_now(self, operation: Operation) -> Answer:
            if self.down and isinstance(operation, End):
                raise StoreUnavailableError("The store is down.")
            return super().run_now(operation)

    store = Failing()
    metering = Metering(store, sinks=())
    metering.end_timeout_s = 0.05
    metering.portal().call(metering.grant, "ann", 100, id="g")
    with (
        pytest.raises(SettlementError, match="its end is not booked"),
        metering.charge_sync(payer="ann", line="j", hold=2),
    ):
        pass
    store.down = False
    metering.close()
    assert balance(metering).settled == 2 * CREDIT
    metering.close()


def test_refuse_to_block_an_event_loop(metering: Metering) -> None:
    """Where a loop runs, blocking it is a mistake with its mend; nothing is held."""

    async def scene() -> None:
        with (
            pytest.raises(ConfigurationError, match="Await there"),
            metering.charge_sync(payer="ann", line="j", hold=1),
        ):
            raise AssertionError("It ran.")
        for use in (metering.close, lambda: metering.portal().call(metering.holds)):
            with pytest.raises(ConfigurationError, match="which would stand still"):
                use()

    asyncio.run(scene())
    assert metering.portal().call(metering.holds) == []


def test_share_a_metering_with_an_event_loop(metering: Metering) -> None:
    """An application's loop and its threads use one metering; the loop's stop leaves the portal at work."""

    def job() -> None:
        with metering.charge_sync(payer="ann", line="job", hold=1):
            pass

    async def scene() -> None:
        async with metering:
            await asyncio.to_thread(job)
            async with metering.charge(payer="ann", line="job", hold=1):
                await asyncio.to_thread(job)

    asyncio.run(scene())
    job()
    assert balance(metering).settled == 4 * CREDIT


def test_start_again_after_a_close(metering: Metering) -> None:
    """A closed portal ends its thread, is closed once, and starts with its next use."""
    (thread,) = [each for each in threading.enumerate() if each.name == "asgi_metering portal"]
    metering.close()
    metering.close()
    assert not thread.is_alive()
    metering.portal().call(metering.grant, "ann", 1, id="h")


def test_answer_and_raise_what_the_function_does() -> None:
    """A call returns what its function returns, takes its arguments, and raises what it raises."""

    async def divide(one: int, *, by: int) -> float:
        return one / by

    async def nothing() -> None:
        """Nothing to stop."""

    portal = Portal(nothing)
    assert portal.call(divide, 6, by=4) == 1.5
    with pytest.raises(ZeroDivisionError):
        portal.call(divide, 1, by=0)
    portal.close()


def test_close_tells_what_stopping_raised() -> None:
    """A stop that fails is an error of whoever closes, and the thread has ended all the same."""

    async def fails() -> None:
        raise OSError("mine")

    async def nothing() -> None:
        """Nothing to do."""

    portal = Portal(fails)
    portal.call(nothing)
    with pytest.raises(OSError, match="mine"):
        portal.close()
    portal.close()


class Interrupt(BaseException):
    """What a job's time limit raises, in whatever line the thread is."""


def test_cancel_what_an_interrupted_thread_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is interrupted while it is entered is not left running: its hold would live as long as its beats."""
    left = threading.Event()
    reached = threading.Event()

    @asynccontextmanager
    async def slow() -> AsyncIterator[int]:
        try:
            reached.set()
            await asyncio.Event().wait()
            yield 1
        finally:
            left.set()

    async def nothing() -> None:
        """Nothing to stop."""

    class Interrupted:
        """A future whose waiter is interrupted."""

        def __init__(self) -> None:
            self.done = lambda: False

        def result(self) -> int:
            reached.wait(10)
            raise Interrupt

    portal = Portal(nothing)
    import asgi_metering.portal as module

    real = module.Future
    made: list[Any] = []

    def future() -> Any:
        made.append(real())
        # The first one is what the waiting thread looks at.
        return made[-1] if len(made) > 1 else Interrupted()

    portal.call(asyncio.sleep, 0)
    monkeypatch.setattr(module, "Future", future)
    with pytest.raises(Interrupt), portal.within(slow()):
        raise AssertionError("It ran.")
    assert left.wait(10)
    portal.close()


def test_close_amid_a_block() -> None:
    """Who closes the portal under a block ends it; the block is told instead of waiting for ever."""
    metering = Metering("memory://", sinks=(), drain_s=0.01)
    metering.portal().call(metering.grant, "ann", 100, id="g")
    with pytest.raises(CancelledError), metering.charge_sync(payer="ann", line="job", hold=1):
        metering.close()
    assert metering.portal().call(metering.holds) == []
    metering.close()


# -- processes ---------------------------------------------------------------------------------------------


def _child(metering: Metering, answers: Any) -> None:
    with metering.charge_sync(payer="ann", line="child", hold=2) as call:
        pass
    metering.close()
    answers.put((call.receipt is not None, metering.portal().call(metering.holds)))
    metering.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_charge_after_a_fork(tmp_path: Path) -> None:
    """A child that was forked while its parent's portal ran has one of its own, on the same file."""
    metering = Metering(f"sqlite:///{tmp_path}/metering.db?synchronous=OFF", sinks=(), store_timeout_s=10.0)
    metering.portal().call(metering.grant, "ann", 100, id="g")
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_child, args=(metering, answers))
    child.start()
    assert answers.get(timeout=60) == (True, [])
    child.join(60)
    assert child.exitcode == 0
    with metering.charge_sync(payer="ann", line="parent", hold=1):
        pass
    assert balance(metering).settled == 3 * CREDIT
    metering.close()


SCRIPT = """
import sys
from asgi_metering import Metering

metering = Metering(sys.argv[1], sinks=())
metering.portal().call(metering.grant, "ann", 100, id="g")
with metering.charge_sync(payer="ann", line="job", hold=3):
    pass
"""


def test_script_that_closes_nothing(tmp_path: Path) -> None:
    """A script that forgets to close ends by itself, and leaves one whole file: the store was closed for it."""
    url = f"sqlite:///{tmp_path}/metering.db?synchronous=OFF"
    ended = subprocess.run([sys.executable, "-c", SCRIPT, url], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["metering.db"]
    shown = subprocess.run(
        [sys.executable, "-m", "asgi_metering.cli", "balance", "ann", "--json", "--store", url],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(shown.stdout)[0]["settled"] == "3"
