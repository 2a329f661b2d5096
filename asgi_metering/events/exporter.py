"""
The exporter: carries usage events out of the outbox, at least once each, to every sink.

Knows how events are claimed, offered and acknowledged. Never knows what a sink does with them, and runs beside the
requests: nothing that happens here reaches a caller (S2.5, X.10).
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from asgi_metering.errors import ConfigurationError, StoreError
from asgi_metering.events.courier import Courier
from asgi_metering.events.custody import Custody
from asgi_metering.events.metrics import Meters
from asgi_metering.events.outbox import Backlog, Dropped, OnDrop, Outbox, Read, Submit, read_events, tell_of_drop
from asgi_metering.events.sinks import Sink, is_enabled
from asgi_metering.names import check_name
from asgi_metering.usage.event import UsageEvent

__all__ = ["Exporter"]

log = logging.getLogger("asgi_metering.events")

DELIVERY_TIMEOUT_S: Final = 10.0
"""For one delivery to one sink (S3.35)."""

MAX_DELIVERY_S: Final = 3_600.0
"""More is no bound: events would wait behind a sink that hangs for as long."""

LEASE_S: Final = 60.0
"""How long claimed events are ours: a killed process's events wait this long for another."""

BATCH: Final = 500
"""Events in one claim: metrics of so many cost one ``add`` for each attribute set."""

INTERVAL_S: Final = 5.0
"""Between looks into the outbox that nobody asked for: other processes and expired holds write there too."""

LINGER_S: Final = 0.5
"""After a wake-up more events may come before they are claimed: batches are what makes export cheap."""

PATIENCE_S: Final = 1.0
"""After this long a slow sink goes on alone, and the others get the next batch."""

MEASURE_EVERY_S: Final = 30.0
"""Between looks at the backlog: each reads rows."""

REMEMBER_S: Final = 3_600.0
"""How long an id that does not come back is remembered: far longer than a sink's backlog is left alone."""

CLOSE_S: Final = 1.0
"""For cancelled deliveries to end."""

FLUSH_S: Final = 2.0
"""What a shutdown gives sinks to send what they took; a collector that answers takes milliseconds."""

MIN_PAUSE_S: Final = 0.05
"""Between passes of a drain that moved nothing."""

MAX_REJECTIONS: Final = 50
"""Times that one sink rejects one event, in some seven hours, before it is dropped with an alarm."""


class Exporter:
    """
    Deliver every event in the outbox to every sink, at least once, always with the same id.

    An event leaves the outbox when all sinks took it. Sinks are isolated: each has its own timeout, backoff and
    memory, and a batch that one took is not given to it again by this process while others are retried.

    Args:
        submit: Runs an operation on the store.
        sinks: Where events go; without any they stay in the outbox.
        batch: Events in one claim.
        lease_s: How long a claim lasts; at least three times *timeout_s*, and a minute by default. Longer while a sink
            is backing off.
        timeout_s: For one delivery to one sink (S3.35).
        on_drop: Called, or awaited, with each `Dropped` event (S2.7). It is also counted and logged.
        read: Reads rows of the store, for the backlog.
        meters: Where deliveries, failures, drops and the backlog are counted; flushed by `run`.
        max_rejections: Times that a sink may reject one event while it takes others; None keeps trying for ever.
        interval_s: Between unasked looks into the outbox.
        linger_s: How long `run` waits after a wake-up for more events to come.
        clock: Steady seconds, for backoff and leases.

    Raises:
        ConfigurationError: Two sinks have one name, a name is not usable, or the lease is too short.

    Attributes:
        listening: Whether any sink was enabled at the last pass; while none is, events are forgotten unread, and need
            not be written at all.
        notify: Says that the outbox has something new. Costs next to nothing; call it from the exporter's own loop.

    Used from one event loop. Processes that share a store share its outbox, so give all of them the same sinks.
    """

    def __init__(
        self,
        submit: Submit,
        sinks: Sequence[Sink],
        *,
        batch: int = BATCH,
        lease_s: float | None = None,
        timeout_s: float = DELIVERY_TIMEOUT_S,
        on_drop: OnDrop | None = None,
        read: Read | None = None,
        meters: Meters | None = None,
        max_rejections: int | None = MAX_REJECTIONS,
        interval_s: float = INTERVAL_S,
        linger_s: float = LINGER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        lease_s = max(LEASE_S, 3 * timeout_s) if lease_s is None else lease_s
        _check(sinks, lease_s, timeout_s)
        self._outbox = Outbox(submit, read, timeout_s=timeout_s)
        self._batch = batch
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._on_drop = on_drop
        self._meters = Meters() if meters is None else meters
        self._interval_s = interval_s
        self._linger_s = linger_s
        self._clock = clock
        self._custody = Custody(len(sinks), remember_s=max(REMEMBER_S, 2 * lease_s))
        self._couriers = [
            Courier(
                sink,
                1 << number,
                most=batch,
                timeout_s=timeout_s,
                max_rejections=max_rejections,
                clock=clock,
                meters=self._meters,
                took=self._took,
                gave_up=self._gave_up,
            )
            for number, sink in enumerate(sinks)
        ]
        self.listening = bool(sinks)
        self._turns: dict[Courier, asyncio.Task[None]] = {}
        self._alone: set[Courier] = set()
        self._drops: deque[Dropped] = deque()
        self._wake = asyncio.Event()
        # The very function: one more around it would cost every call.
        self.notify = self._wake.set
        self._halt = asyncio.Event()
        self._ended_run: asyncio.Future[None] | None = None
        self._claimed_all = True
        self._measured_at = float("-inf")

    # -- one pass ------------------------------------------------------------------------------------------

    async def run_once(self, patience_s: float | None = None) -> int:
        """
        Claim a batch, offer it and what is still in hand to every sink that is ready, acknowledge what all took.

        Args:
            patience_s: Leave slower sinks to themselves after this long; they are passed over until they are done.
                None waits for all, each bounded by its timeout.

        Returns:
            How many events left the outbox. 0 claims nothing when no sink is ready.

        Raises:
            StoreError: The store gave no answer. Nothing is lost: leases end, and what was delivered is known.

        Cancelling it leaves deliveries running; `close` ends them.
        """
        await self._report_drops()
        gone = await self._acknowledge()
        now = self._clock()
        self._custody.put_down(now)
        ready = [courier for courier in self._couriers if courier not in self._turns and courier.not_before <= now]
        self._claimed_all = True
        if not ready:
            return gone
        self.listening = any(is_enabled(courier.sink) for courier in self._couriers)
        await self._claim(now)
        started = [turn for courier in ready if (turn := self._start(courier)) is not None]
        if started:
            await asyncio.wait(started, timeout=patience_s)
            self._alone.update(self._turns)
        await self._report_drops()
        return gone + await self._acknowledge()

    async def _claim(self, now: float) -> None:
        """Take a batch from the outbox into hand, without what nobody can read (S2.7)."""
        pause_s = max(courier.not_before - now for courier in self._couriers)
        # While a sink is down, its backlog would be claimed round and round: once per backoff is enough.
        lease_s = max(self._lease_s, pause_s)
        claimed = await self._outbox.claim(self._batch, lease_s)
        self._claimed_all = len(claimed) < self._batch
        if not self.listening:
            self._custody.give_up([row.id for row in claimed])
            return
        events, unreadable = read_events(claimed)
        for row, error in unreadable:
            log.error("The usage event %r cannot be read: %r. It is dropped.", row.id, error)
            self._drops.append(Dropped(row.id, row.payload, "undecodable"))
            self._custody.give_up((row.id,))
        self._custody.pick_up(events, now + lease_s)

    def _start(self, courier: Courier) -> asyncio.Task[None] | None:
        events = self._custody.missing(courier.bit)
        # Another pass may have started it while this one claimed.
        if not events or courier in self._turns:
            return None
        if not is_enabled(courier.sink):
            self._took(courier, events)
            return None
        # An empty context: a request's variables are none of a sink's business, and would live as long as it runs.
        turn = asyncio.create_task(
            courier.turn(events), name=f"asgi_metering sink {courier.sink.name}", context=contextvars.Context()
        )
        self._turns[courier] = turn
        turn.add_done_callback(lambda _: self._ended(courier))
        return turn

    def _ended(self, courier: Courier) -> None:
        turn = self._turns.pop(courier)
        if not turn.cancelled() and turn.exception() is not None:
            log.error("Delivering to sink %r failed.", courier.sink.name, exc_info=turn.exception())
        if courier in self._alone:
            # Nobody waits for it any more, and what it brought is to be acknowledged.
            self._alone.remove(courier)
            self._wake.set()

    def _took(self, courier: Courier, events: Sequence[UsageEvent]) -> None:
        self._custody.took(events, courier.bit, self._clock())

    def _gave_up(self, courier: Courier, event: UsageEvent) -> None:
        log.error(
            "The sink %r rejected the usage event %r again and again. It does not get it.",
            courier.sink.name,
            event.id,
        )
        self._drops.append(Dropped(event.id, event.to_dict(), "rejected", courier.sink.name))
        self._took(courier, (event,))

    async def _report_drops(self) -> None:
        while self._drops:
            dropped = self._drops.popleft()
            self._meters.count("events_dropped", sink=dropped.sink or "all", cause=dropped.cause)
            await tell_of_drop(self._on_drop, dropped, self._timeout_s)

    async def _acknowledge(self) -> int:
        ids = self._custody.finished
        if not ids:
            return 0
        forgotten = await self._outbox.acknowledge(ids)
        # Only now: an answer that never came is asked for again.
        self._custody.forget(ids)
        return forgotten

    # -- the worker ----------------------------------------------------------------------------------------

    async def run(self, stop: asyncio.Event) -> None:
        """
        Deliver until *stop* is set, or `drain` begins: on `notify`, and every *interval_s* in any case.

        No failure ends it. Cancelling it leaves deliveries running; `drain` or `close` ends them.
        """
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        stopping = asyncio.ensure_future(stop.wait())
        stopping.add_done_callback(lambda _: self._hurry())
        self._halt.clear()
        self._ended_run = ended
        try:
            while not stop.is_set() and not self._halt.is_set():
                self._wake.clear()
                if not await self._pass() and not self._halt.is_set():
                    await self._idle()
        finally:
            stopping.cancel()
            ended.set_result(None)

    def _hurry(self) -> None:
        self._halt.set()
        self._wake.set()

    async def _pass(self) -> bool:
        """One pass that never fails. True if the outbox may hold more that nobody has claimed."""
        try:
            await self.run_once(PATIENCE_S)
            if self._clock() - self._measured_at >= MEASURE_EVERY_S:
                self._measured_at = self._clock()
                await self.backlog()
        except StoreError as error:
            log.warning("Usage events stay in the outbox: %s", error)
            return False
        except Exception:
            log.exception("Usage events could not be taken out of the outbox. They stay there.")
            return False
        finally:
            self._meters.flush()
        return not self._claimed_all

    async def _idle(self) -> None:
        now = self._clock()
        pauses = [courier.not_before - now for courier in self._couriers if courier.not_before > now]
        if await _within(self._wake, min([self._interval_s, *pauses])):
            await _within(self._halt, self._linger_s)

    # -- the end -------------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> int:
        """
        End `run`, deliver what waits for at most *timeout_s* seconds, then stop every delivery (S2.21).

        Sinks that were backing off are asked once more at once.

        Returns:
            How many events stay in the outbox, for the next process: counted up to `COUNTED` where *read* is given,
            else those that this exporter holds. Also logged.
        """
        self._hurry()
        try:
            async with asyncio.timeout(timeout_s):
                if self._ended_run is not None:
                    # What it has just claimed would else be nobody's.
                    await asyncio.wait([self._ended_run])
                for courier in self._couriers:
                    courier.hurry()
                while await self._pass_again():
                    pass
        except TimeoutError:
            log.warning("Draining the outbox took longer than %s s.", timeout_s)
        await self.close()
        left = await self._left()
        await self._flush()
        return left

    async def _flush(self) -> None:
        """Have sinks that hand events on send what they still hold: the process may end without another chance."""
        sinks = [courier.sink for courier in self._couriers if is_enabled(courier.sink)]
        flushes = [flush for sink in sinks if inspect.iscoroutinefunction(flush := getattr(sink, "flush", None))]
        if not flushes:
            return
        tasks = [asyncio.create_task(flush(), context=contextvars.Context()) for flush in flushes]
        done, late = await asyncio.wait(tasks, timeout=FLUSH_S)
        for task in late:
            task.cancel()
        failures = [task.exception() for task in done if not task.cancelled()]
        if late or any(failures):
            failure = next((each for each in failures if each is not None), None)
            log.warning(
                "A sink may have lost what it took last: it could not send it in %s s.", FLUSH_S, exc_info=failure
            )

    async def _pass_again(self) -> bool:
        """One pass of a drain; False when nothing more can be done."""
        try:
            gone = await self.run_once()
        except Exception:
            log.exception("Usage events could not be taken out of the outbox. They stay there.")
            return False
        if gone or not self._claimed_all:
            return True
        waited_for = [courier.not_before for courier in self._couriers if self._custody.missing(courier.bit)]
        if not waited_for:
            return False
        await asyncio.sleep(max(min(waited_for) - self._clock(), MIN_PAUSE_S))
        return True

    async def _left(self) -> int:
        left = len(self._custody)
        try:
            await self._acknowledge()
            backlog = await self.backlog()
            left = len(self._custody) if backlog is None else backlog.events
        except Exception:
            log.exception("How many usage events stay in the outbox could not be read.")
        self._meters.flush()
        if left:
            log.warning("%d usage events stay in the outbox.", left)
        return left

    async def close(self) -> None:
        """Stop every delivery that still runs. What it was delivering stays in the outbox."""
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        if turns:
            # Bounded: a plug-in may swallow its cancellation.
            await asyncio.wait(turns, timeout=CLOSE_S)

    async def backlog(self) -> Backlog | None:
        """
        Look at what waits in the outbox, and put it on the gauges; None without *read*.

        Raises:
            StoreUnavailableError: No answer came.
        """
        backlog = await self._outbox.backlog()
        if backlog is None:
            return None
        self._meters.gauge("outbox_backlog", backlog.events)
        self._meters.gauge("outbox_lag", backlog.lag_s)
        return backlog


async def _within(event: asyncio.Event, seconds: float) -> bool:
    """Whether *event* is set within *seconds*."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


def _check(sinks: Sequence[Sink], lease_s: float, timeout_s: float) -> None:
    names = [check_name(sink.name, "sink name") for sink in sinks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigurationError(f"Two sinks are named {twice!r}. Give each its own name.")
    if lease_s < 3 * timeout_s:
        raise ConfigurationError(
            f"The lease of {lease_s} s is shorter than three delivery timeouts of {timeout_s} s, so that a slow "
            f"delivery would outlive it. Choose at least {3 * timeout_s} s."
        )
