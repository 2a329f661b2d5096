"""
The runtime: what works for the calls of one event loop, off their path.

Ends calls, beats for their holds, sweeps what is overdue, exports events. Owns the loop's pump and every background
task, with strong references (pitfall 30); is drained and stopped with the application's lifespan, or starts by itself
where none comes (pitfall 32). Decides nothing about money.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from asgi_metering.admission import leaves_hold
from asgi_metering.attributes import plain_attributes
from asgi_metering.billing import beyond_count, bill, bill_now
from asgi_metering.delivery import Delivery
from asgi_metering.errors import AmountError, MeteringError, StoreError, StoreUnavailableError
from asgi_metering.events.exporter import Exporter
from asgi_metering.growing import growth_of
from asgi_metering.heartbeats import Heartbeats
from asgi_metering.overdue import Overdue
from asgi_metering.receipts import Receipt
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.ending import Cause
from asgi_metering.rules.operations import Admit, Emit, End, Operation, Undo
from asgi_metering.shadow import end_shadow, settle_shadow
from asgi_metering.stores.breaker import BreakerState
from asgi_metering.stores.contract import Store
from asgi_metering.stores.pump import Pump

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.journal import Journal
    from asgi_metering.journal.records import Steps
    from asgi_metering.metering import Metering

__all__ = ["Runtime"]

log = logging.getLogger("asgi_metering")

CLOSE_S = 10.0
"""
What a shutdown gives a store, a journal or a task to close and to end: twice as long as those wait for a server that
says nothing. A driver that takes longer than that is left to the end of the process.
"""

LAST_READINGS_S = 1.0
"""What a shutdown gives the store to keep the last readings of upstream quotas: nobody's money."""

BOOK_S = 5.0
"""What the drain still gives the store to book the ends after the calls are over (S2.21)."""


_Seconds = TypeVar("_Seconds", float, "float | None")


def _looked_at(task: asyncio.Task[None]) -> None:
    """Whoever waited for it may be gone."""
    if not task.cancelled():
        task.exception()


class Runtime:
    """
    The background of one event loop.

    Args:
        metering: Whose calls these are.
        loop: The running loop.

    Attributes:
        in_flight: Admitted calls that have not ended, by id.
        last_sends, graces: Where the edge waits for servers to take last messages, and for apps to end behind them.
        busy: How many ends are not booked yet.
        is_open: The store was opened.
        at_hand: The store, while it is open and if it answers at once; else None.
        draining: How many handlers go on for a client that left.
        managed: A lifespan holds the shutdown until calls are drained.
        lifespans: How many applications have begun theirs and use this; the last of them stops it.
        blocks: How many blocks of ``async with metering`` run; the last of them stops it, where no lifespan does.
    """

    def __init__(self, metering: Metering, loop: asyncio.AbstractEventLoop) -> None:
        self._metering = metering
        self.loop = loop
        self.pump = Pump(metering.store, self._release)
        self.in_flight: dict[str, Call] = {}
        self.last_sends, self.graces = Overdue(loop), Overdue(loop)
        self.managed = False
        self.draining = 0
        self.lifespans = self.blocks = 0
        self._ended: deque[Call] = deque()
        self.busy = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._wake: asyncio.Event = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._worker: asyncio.Task[None] | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._exporter: Exporter | None = None
        self._exporting: asyncio.Task[None] | None = None
        self._stop_exporting = asyncio.Event()
        self._opened: asyncio.Future[None] | None = None
        self.is_open = False
        self.at_hand: Store | None = None
        self._opening: asyncio.Task[None] | None = None
        self._delivery = Delivery(metering, self._submit_again, self._tell_exporter)
        self._replaying: asyncio.Task[None] | None = None
        self._heartbeats = Heartbeats(
            metering, loop, self.in_flight, self._quietly, self.finish, self._spawn, self._share_readings
        )

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """
        Open the store and the journal, and start the background; again changes nothing.

        Raises:
            ConfigurationError: Either is not usable as configured.
            StoreError: The store cannot be reached. Where there is a journal the background has started all the same.
            JournalError: The journal cannot be used.
        """
        try:
            await self._open_all()
        except StoreError:
            if self._metering.journal is not None:
                # It may come later; what ends until then is kept.
                self._begin()
            raise

    async def _open_all(self) -> None:
        if self._metering.journal_use is not None and self._replaying is None:
            await self._metering.journal_use.open()
            # Asked again: somebody else may have waited for it too.
            if self._replaying is None:
                self._replaying = self._spawn(self._delivery.replay(), "journal")
        await self._open()

    async def _open(self) -> None:
        if self._opened is None:
            self._opened = self.loop.create_future()
            try:
                await self._metering.store_use.open()
                await self._declare_units()
            except BaseException as failure:
                opened, self._opened = self._opened, None
                opened.set_result(None)
                if isinstance(failure, StoreError):
                    log.error("The store could not be opened: %s", failure)
                raise
            self._opened.set_result(None)
            self.is_open = True
            if self._metering.store.immediate:
                self.at_hand = self._metering.store
            self._begin()
            if self._metering.sinks and self._exporter is None:
                self._start_exporter()
        elif not self._opened.done():
            await asyncio.shield(self._opened)
            await self._open()

    def _begin(self) -> None:
        if self._worker is None:
            self._worker = self._spawn(self._work(), "ends")
            self._ticker = self._spawn(self._heartbeats.run(), "heartbeats")

    async def _declare_units(self) -> None:
        """A store that opens and gives no answer is asked again before the first admission."""
        try:
            await self._metering.declare_units(self._metering.store_timeout_s)
        except StoreError as failure:
            log.warning("The store was not told the units yet: %s", failure)

    def _start_exporter(self) -> None:
        metering = self._metering
        self._stop_exporting = asyncio.Event()
        self._exporter = Exporter(
            self.submit,
            metering.sinks,
            on_drop=metering.on_event_dropped,
            read=metering.store.read,
            meters=metering.meters,
            timeout_s=metering.delivery_timeout_s,
        )
        self._exporting = self._spawn(self._exporter.run(self._stop_exporting), "events")

    def _spawn(self, work: Coroutine[Any, Any, object], what: str) -> asyncio.Task[Any]:
        # In an empty context: a task started by a request must not keep that request's variables alive.
        task = self.loop.create_task(work, name=f"asgi_metering {what}", context=contextvars.Context())
        self.keep(task)
        task.add_done_callback(self._report)
        return task

    def spawn(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Run *work* in the background, as long as this runs; what it raises is logged."""
        return self._spawn(work, what)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a strong reference to *task* until it is done (pitfall 30)."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _report(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("The background task %r died.", task.get_name(), exc_info=task.exception())

    async def drain(self, timeout_s: float) -> int:
        """
        Wait until the calls in flight have ended and their ends are booked, at most *timeout_s*.

        Calls that are still in flight then are ended as aborted. Returns how many ends could not be booked; those
        holds go in doubt when their heartbeats stop (S2.21).
        """
        deadline = self.loop.time() + timeout_s
        while self.in_flight and self.loop.time() < deadline:  # noqa: ASYNC110 -- once, at shutdown
            await asyncio.sleep(min(DRAIN_STEP_S, timeout_s))
        for call in list(self.in_flight.values()):
            call.see(Cause.ABORTED)
            self.finish(call)
        left = max(DRAIN_STEP_S, deadline - self.loop.time())
        return await self.booked(left + BOOK_S)

    async def booked(self, timeout_s: float = BOOK_S) -> int:
        """Wait until every end that was queued is booked, at most *timeout_s*; returns how many are not."""
        try:
            await asyncio.wait_for(self._quiet.wait(), timeout_s)
        except TimeoutError:
            log.error("%d ends were not booked before the shutdown; their holds go in doubt.", self.busy)
        return self.busy

    async def stop(self) -> None:
        """
        Stop the background of this loop, and close the store if no other loop uses it (`StoreUse`).

        What was not drained is left to expiry.
        """
        if self._opened is None and self._worker is None and self._replaying is None:
            return
        await self._share_last_readings()
        if self._exporter is not None:
            self._stop_exporting.set()
            await self._exporter.drain(EXPORT_S)
        background = (self._worker, self._ticker, self._exporting, self._replaying, self._opening)
        tasks = [task for task in background if task is not None]
        await self._ended_all(tasks)
        await self._stop_asking()
        await self._closed(self._metering.store_use.close(), f"{self._metering.store.name} store")
        if self._metering.journal_use is not None:
            await self._closed(self._metering.journal_use.close(), "journal")
        self._opened = self._worker = self._ticker = self._exporter = self._exporting = None
        self.is_open = False
        self.at_hand = self._replaying = self._opening = None

    async def _stop_asking(self) -> None:
        """Nobody asks the store from here on: that would open it again. One that says nothing is not waited for."""
        left_s = BOOK_S
        try:
            async with asyncio.timeout(left_s):
                await self.pump.drain()
        except TimeoutError:
            left_s = DRAIN_STEP_S
            log.error("The %s store gave no answer before the shutdown.", self._metering.store.name)
        await self._ended_all([task for task in self._tasks if task is not asyncio.current_task()])
        with suppress(TimeoutError):
            async with asyncio.timeout(left_s):
                await self.pump.close()

    async def _ended_all(self, tasks: Sequence[asyncio.Task[Any]]) -> None:
        """Cancel *tasks*, and wait for them, bounded: one may clean up after itself on a disk that says nothing."""
        for task in tasks:
            task.cancel()
        _, left = await asyncio.wait(tasks, timeout=CLOSE_S) if tasks else (set(), set())
        for task in left:
            log.error("The background task %r does not end at the shutdown.", task.get_name())

    # -- readings of upstream quotas -----------------------------------------------------------------------

    def _share_readings(self) -> None:
        """Begin to tell other processes what is new here, and to listen to them, if it is time. Never waits."""
        metering = self._metering
        sharing = metering.sharing
        # A store that is avoided has other things to do when it comes back.
        if sharing is not None and self.is_open and metering.breaker.state is BreakerState.CLOSED and sharing.begins():
            work = sharing.turn(self.submit, metering.store.read, metering.end_timeout_s)
            self._spawn(work, "readings").add_done_callback(sharing.ended)

    async def _share_last_readings(self) -> None:
        """Tell others what is new here before the end, bounded."""
        metering = self._metering
        sharing = metering.sharing
        if sharing is not None and sharing.has_news and self.is_open and metering.breaker.state is BreakerState.CLOSED:
            try:
                async with asyncio.timeout(LAST_READINGS_S):
                    await sharing.tell(self.submit, LAST_READINGS_S)
            except (MeteringError, TimeoutError) as failure:
                log.debug("The last readings of upstream quotas were not shared: %s", failure)

    async def _closed(self, closing: Coroutine[Any, Any, None], what: str) -> None:
        """Wait until the *closing* is over, bounded; raises what it raises."""
        task = self.loop.create_task(closing, name=f"asgi_metering closing the {what}")
        try:
            done, _ = await asyncio.wait([task], timeout=CLOSE_S)
            if done:
                task.result()
                return
            log.error("The %s could not be closed within %g s; the end of the process does it.", what, CLOSE_S)
        finally:
            task.cancel()
        task.add_done_callback(_looked_at)

    # -- calls ---------------------------------------------------------------------------------------------

    async def submit(
        self, operation: Operation, deadline_s: float | None = None, *, is_repeated: bool = False
    ) -> Answer:
        """Run one operation through the pump, within so many seconds, opening the store first if nobody did."""
        if self._opened is None or not self._opened.done():
            deadline_s = await self._opened_within(deadline_s)
        return await self.pump.submit(operation, deadline_s, is_repeated=is_repeated)

    async def _submit_again(self, operation: Operation, deadline_s: float | None = None) -> Answer:
        """
        The same for what is asked until it is answered.

        Why the store cannot be opened, such as tables that nobody has migrated yet, says nothing of the operation.
        """
        if self._opened is None or not self._opened.done():
            try:
                deadline_s = await self._opened_within(deadline_s)
            except StoreError:
                raise
            except MeteringError as failure:
                raise StoreUnavailableError(
                    f"The {self._metering.store.name} store cannot be opened: {failure}"
                ) from failure
        return await self.pump.submit(operation, deadline_s, is_repeated=True)

    async def opened(self) -> None:
        """Open the store if nobody did; raises as `Store.open`, also where there is a journal."""
        await self._opened_within(None)

    async def submit_known(self, operation: Operation, deadline_s: float) -> Answer:
        """The same, after the store was told of the units that it does not know: all of it within the deadline."""
        if self._opened is None or not self._opened.done():
            deadline_s = await self._opened_within(deadline_s)
        if self._metering.new_units:
            began = self.loop.time()
            await self._metering.declare_units(deadline_s)
            deadline_s = max(0.0, deadline_s - (self.loop.time() - began))
        return await self.pump.submit(operation, deadline_s)

    async def _opened_within(self, deadline_s: _Seconds) -> _Seconds:
        """Open the store; what is left of the deadline is returned. It goes on opening for whoever comes next."""
        began = self.loop.time()
        if self._opening is None or self._opening.done():
            self._opening = self.loop.create_task(self._open_all(), context=contextvars.Context())
            self._opening.add_done_callback(_looked_at)
        try:
            async with asyncio.timeout(deadline_s):
                await asyncio.shield(self._opening)
        except TimeoutError:
            raise StoreUnavailableError(
                f"The {self._metering.store.name} store gave no answer within {deadline_s} s to being opened."
            ) from None
        return deadline_s if deadline_s is None else max(0.0, deadline_s - (self.loop.time() - began))

    def register(self, call: Call) -> None:
        """Beat for *call* until it ends."""
        call.runtime = self
        call.last_beat = self.loop.time()
        if not call.is_plain:
            call.growth = growth_of(call, self.loop, self._spawn)
        self.in_flight[call.id] = call

    def finish(self, call: Call) -> None:
        """
        Queue the end of *call*; only the first time counts. Never waits, never raises.

        The store is asked again while it does not answer. An end that it refuses as a mistake loses its event and
        keeps its charge; one of more than the account can count is charged as one whose usage cannot be believed; one
        that cannot be booked even so, or whose price raises, is logged, and its hold is left to its policy. Whatever
        becomes of one end, others go on.
        """
        if call.closed:
            return
        call.closed = True
        self.in_flight.pop(call.id, None)
        if call.beside is not None:
            call.beside.release(self._metering.headroom)
        elif self._ends_now(call):
            return
        self._ended.append(call)
        self.busy += 1
        self._quiet.clear()
        self._wake.set()
        if self._worker is None or self._worker.done():
            self.keep(self.loop.create_task(self._end_all(), context=contextvars.Context()))

    def _ends_now(self, call: Call) -> bool:
        """End *call* here, where its store answers at once and nothing is to be read for it; False where not."""
        store = self.at_hand
        if store is None or call.queued is not None or call.attributes:
            return False
        receipt: Receipt | None = None
        try:
            end = bill_now(call)
            if end is None or not (self._metering.journal is None or self._delivery.takes_now):
                return False
            for step in (end,) if call.has_hold else self._steps(call, end):
                answer = store.run_now(step)
                if type(answer) is Receipt:
                    receipt = answer
                    if not receipt.known:
                        self._delivery.looked_at(step, receipt)
                if self._exporter is not None:
                    self._exporter.notify()
        except Exception:  # noqa: BLE001 -- what is wrong is found and told on the way for everything else
            return False
        if call.local:
            self._metering.local.end(call, end.actual)
        call.ended(receipt)
        return True

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self._end_all()

    async def _end_all(self) -> None:
        while self._ended:
            call = self._ended.popleft()
            if self._can_end_now(call):
                await self._end(call)
            else:
                # A slow end (a store with round trips, text to count) must not make the others wait.
                self._spawn(self._end(call), f"end of {call.id}")

    def _can_end_now(self, call: Call) -> bool:
        return self._metering.store.immediate and call.observer is None and call.witnesses is None

    async def _end(self, call: Call) -> None:
        receipt: Receipt | None = None
        try:
            if call.witnesses is not None:
                await call.witnesses.settled()
            if call.beside is not None:
                await settle_shadow(call, is_awaited=call.is_awaited)
            self._make_plain(call)
            end, _ = await bill(call)
            self._metering.local.end(call, end.actual)
            try:
                receipt = await self._booked(call, end)
            except AmountError as failure:
                receipt = await self._booked(call, beyond_count(call, end, failure))
        except Exception as failure:
            self._metering.meters.count("ends_lost", line=call.line)
            call.unbooked = failure
            told = f"The end of call {call.id} could not be booked; what it holds is left to its policy, by its expiry."
            if isinstance(failure, StoreUnavailableError):
                # More wait than there is room for: each would say the same.
                self._metering.alarms.raised("ends_lost", told, failure)
            else:
                log.error("%s", told, exc_info=failure)
        finally:
            call.ended(receipt)
            if call.beside is not None:
                await end_shadow(call)
            self.busy -= 1
            if not self.busy:
                self._quiet.set()

    async def _booked(self, call: Call, end: End) -> Receipt | None:
        steps = self._steps(call, end)
        if not steps and call.queued is None:
            return None
        answer = await self._delivery.book(call.id, steps, begun=call.queued is not None, failed=call.waits_for)
        self._tell_exporter()
        return answer if isinstance(answer, Receipt) else None

    def _tell_exporter(self) -> None:
        if self._exporter is not None:
            self._exporter.notify()

    def _make_plain(self, call: Call) -> None:
        """What a handler put on its call must not keep the end from any store: it becomes text, with an alarm."""
        if not call.attributes:
            return
        call.attributes, converted = plain_attributes(call.attributes)
        if converted:
            log.error(
                "Attributes of call %s are no str, int, finite float or bool, and were told as text: %s. Convert them "
                "where they are set.",
                call.id,
                ", ".join(converted),
            )

    def _steps(self, call: Call, end: End) -> Steps:
        """How the end reaches the store: against its hold, with its admission, as an event of free work, or not."""
        if call.has_hold:
            return (end,)
        if call.queued is not None and end.amount:
            return call.queued, end
        if end.event is None:
            return ()
        told = {
            **call.facts,
            **end.event,
            "id": call.id,
            "payer": call.payer or "",
            "unit": call.unit.name,
            "line": call.line,
            "amount": 0,
            "held": 0,
            "basis": end.basis.value,
            "estimated": end.estimated,
            "ended_at": time.time(),
        }
        return (Emit(((call.id, told),)),)

    def give_back(self, ask: Admit, at: float) -> None:
        """Undo the admission, decided *at* that time, of a call whose request is over (pitfall 1)."""
        self._spawn(self._quietly(Undo(ask, at)), f"undoing of {ask.id}")

    async def remember(self, call_id: str, steps: Steps) -> bool:
        """
        Have the journal keep *steps* for a call that begins; False where it cannot.

        They are read off if this process dies before the call has ended: no call is older than that.
        """
        return await self._delivery.keep(call_id, steps, due_in_s=self._metering.max_call_s)

    async def read_off(self, journal: Journal) -> bool:
        """
        Hand what is due in *journal* to the store; False where that does not take it.

        For whoever has its turn, and uses it without a metering of its own: an operator.
        """
        return await self._delivery.deliver(journal)

    def take_back(self, ask: Admit) -> None:
        """
        Have the journal keep that *ask* is given back, should the store have admitted it. Never waits.

        It stands there before whatever is kept in its place in the same turn of the loop: it is due.
        """
        self._spawn(self._delivery.keep(ask.id, (End(ask.id, None, failed=True),)), f"taking back of {ask.id}")

    def forget(self, call_id: str) -> None:
        """Have the journal keep nothing of a call that never began."""
        self._spawn(self._delivery.book(call_id, (), begun=True), f"forgetting of {call_id}")

    def _release(self, ask: Admit) -> None:
        """
        Give back what an admission without an answer may hold, when the store answers again.

        What it counted of limits stays counted: whether it did is not known, and nothing is given back twice.
        """
        if leaves_hold(ask):
            self._spawn(self._released(End(ask.id, None, failed=True)), f"release of {ask.id}")

    async def _released(self, end: End) -> None:
        try:
            await self._delivery.book(end.id, (end,), durable=False)
        except MeteringError as failure:
            self._metering.alarms.raised("release", f"What {end.id!r} may hold is left to its expiry.", failure)

    async def _quietly(self, operation: Operation) -> Answer | None:
        """The answer to *operation*, or None and an alarm."""
        try:
            return await self.submit(operation, self._metering.end_timeout_s)
        except MeteringError as failure:
            self._metering.meters.count("store_failures")
            told = f"The store did not take {type(operation).__name__}: {failure}"
            self._metering.alarms.raised(type(operation).__name__, told, failure)
            return None


DRAIN_STEP_S = 0.02
"""How often the drain looks whether the calls in flight are over."""

EXPORT_S = 5.0
"""What a shutdown gives the exporters; what they do not take stays in the outbox."""
