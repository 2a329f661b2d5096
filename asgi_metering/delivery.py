"""
Delivery: how the ends of calls reach a store that may be down, of one event loop.

At once where the store answers; else by the journal, durable, or out of bounded memory, again and again. Every step is
idempotent by its call's id, so that what was answered by silence is simply done again. Decides nothing about money.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.decisions import Decision
from asgi_metering.errors import (
    AmountError,
    JournalError,
    MeteringError,
    StoreError,
    StoreUnavailableError,
    UnwritableError,
)
from asgi_metering.events.outbox import Dropped, tell_of_drop
from asgi_metering.receipts import Basis, Receipt
from asgi_metering.rules.calendars import around
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    Backfill,
    Emit,
    End,
    KeyAsk,
    Operation,
    SourceAsk,
    WalletSource,
)
from asgi_metering.stores.breaker import BreakerState

if TYPE_CHECKING:
    from asgi_metering.journal import Journal, JournalEntry
    from asgi_metering.journal.records import Step, Steps
    from asgi_metering.metering import Metering

__all__ = ["Delivery"]

log = logging.getLogger("asgi_metering")

RETRY_FIRST_S: Final = 0.1
RETRY_LAST_S: Final = 5.0
"""A store that did not take an end is asked again after these, doubling."""

RETRY_SPREAD: Final = (0.5, 1.0)
"""What part of them is waited, drawn each time, so that processes do not ask together."""

MAX_QUEUED_ENDS: Final = 100_000
"""Ends that may wait for a dead store in memory; beyond it they are left to their holds' expiry, with an alarm."""

LEAST_WINDOW_S: Final = 60.0
"""
How long the window of a charge key lasts at least that a queued call begins, although it would be over by now: as long
as it takes to book the other calls of it that were queued as well.
"""

IDLE_S: Final = 5.0
"""How often the journal is looked at for what other processes left in it."""

READ_OFF: Final = 128
"""Entries of the journal that are under way at once: a batch of the pump."""


def _ignore(_failure: StoreError) -> None:
    """Whoever does not ask why."""


class Delivery:
    """
    Brings ends to the store.

    Args:
        metering: Whose journal, breaker, alarms and tallies.
        submit: Runs one operation within so many seconds.
        delivered: Called when the store has taken something out of the journal: there may be events.

    Attributes:
        waiting: Ends that wait in memory for the store.
    """

    def __init__(
        self,
        metering: Metering,
        submit: Callable[[Operation, float | None], Awaitable[Answer]],
        delivered: Callable[[], None] = lambda: None,
    ) -> None:
        self._metering = metering
        self._submit = submit
        self._delivered_some = delivered
        self.waiting = 0
        self._back: asyncio.Future[None] | None = None
        self._to_keep: list[_Entry] = []
        self._writer: asyncio.Task[None] | None = None
        self._kept_more = asyncio.Event()

    @property
    def _journal(self) -> Journal | None:
        return self._metering.journal

    @property
    def takes_now(self) -> bool:
        """Whether what the store is asked goes to it at once, where there is a journal that it could go to first."""
        return self._metering.breaker.state is BreakerState.CLOSED

    async def book(
        self,
        call: str,
        steps: Steps,
        *,
        begun: bool = False,
        durable: bool = True,
        failed: Callable[[StoreError], object] = _ignore,
    ) -> Answer | None:
        """
        Do *steps* for *call*, however long the store takes; the last one's answer is returned.

        None where the journal keeps them: then they are done later, by this process or by another.

        Args:
            call: The call's id.
            steps: What its end asks of the store.
            begun: The journal keeps something of the call already, which these replace.
            durable: Whether it is worth the journal: what a hold's expiry does as well is not.
            failed: Called with the first reason why they wait.

        Raises:
            StoreUnavailableError: Too many wait already.
            MeteringError: The store refuses them as a mistake.
        """
        journal = self._journal if durable else None
        if journal is not None and begun:
            if await self.keep(call, steps):
                return None
            answer = await self.book(call, steps, durable=False, failed=failed) if steps else None
            # What the journal says of it is what was to be done if its end had not been seen.
            await self.keep(call, ())
            return answer
        is_down = self._metering.breaker.state is not BreakerState.CLOSED
        # A store that is known to be down is not waited for.
        if journal is not None and is_down and await self.keep(call, steps):
            return None
        within_s = self._metering.end_timeout_s if journal is None else self._metering.store_timeout_s
        try:
            # Nearly every end has one step, and no time to lose.
            return await (self._taken(steps[0], within_s) if len(steps) == 1 else self._do(steps, within_s))
        except UnwritableError:
            raise
        except StoreError as failure:
            failed(failure)
            self._metering.meters.count("ends_queued")
            self._metering.alarms.raised("ends", f"The store takes no ends; they wait: {failure}", failure)
        if journal is not None and await self.keep(call, steps):
            return None
        return await self._again(steps)

    # -- the store -----------------------------------------------------------------------------------------

    async def _do(self, steps: Steps, within_s: float) -> Answer | None:
        if len(steps) == 1:
            return await self._taken(steps[0], within_s)
        ask, end = steps
        if not isinstance(ask, Admit) or not isinstance(end, End):
            raise AssertionError(f"{steps!r} are no admission and its end")
        return await self._charge(ask, end, within_s)

    async def _taken(self, step: Step, within_s: float) -> Answer:
        """What the store refuses as a mistake it would refuse for ever; then the charge matters more than its event."""
        try:
            return self.looked_at(step, await self._submit(step, within_s))
        except AmountError:
            # Its event is not what is wrong with it.
            raise
        except MeteringError as failure:
            if isinstance(failure, StoreError) and not isinstance(failure, UnwritableError):
                raise
            if not isinstance(step, End | Backfill) or step.event is None:
                raise
            self._metering.meters.count("events_dropped")
            log.error(
                "The store cannot write the end of call %s. It is charged without its usage event, which said: %r",
                step.id,
                dict(step.event),
                exc_info=failure,
            )
            dropped = Dropped(step.id, dict(step.event), "unwritable")
            await tell_of_drop(self._metering.on_event_dropped, dropped, self._metering.end_timeout_s)
            return self.looked_at(step, await self._submit(step._replace(event=None), within_s))

    def looked_at(self, step: Step, answer: Answer) -> Answer:
        """A charge for a call that the store knows nothing of, as after a failover that lost it, is told of."""
        if isinstance(step, End) and step.amount and isinstance(answer, Receipt) and not answer.known:
            self._metering.meters.count("ends_lost")
            log.error(
                "The store does not know call %s, whose end charges %d smallest parts: nothing was charged. Look "
                "whether it was, and metering.backfill() it if not.",
                step.id,
                step.amount,
            )
        return answer

    async def _charge(self, ask: Admit, end: End, within_s: float) -> Answer | None:
        """
        Charge a call that was let in while the store was down: admit it now, for what it cost, and end it.

        What no source of its can pay becomes debt, by an admission under the same id: who is refused now may be able to
        pay when all of this is repeated, and the store finds what it did before.
        """
        if not end.amount:
            return None if end.event is None else await self._taken(Emit(((ask.id, _told(ask, end)),)), within_s)
        owing = _on_debt(ask)
        # Without its key only where no calendar fits any more: it would be charged beside its siblings.
        for wanted in (ask, owing, owing._replace(charge_key=None)):
            if (await self._admitted(wanted, end.amount, within_s)).admitted:
                return await self._taken(end, within_s)
        raise UnwritableError(
            f"The charge of call {ask.id!r}, {end.amount} smallest parts of {ask.unit!r}, is more than an account can "
            f"owe. Look at what it used."
        )

    async def _admitted(self, ask: Admit, amount: int, within_s: float) -> Decision:
        decision = await self._taken(_of_its_time(ask, amount, time.time()), within_s)
        if isinstance(decision, Decision) and decision.stale_calendar:
            # The store's clock is another one.
            decision = await self._taken(_of_its_time(ask, amount, decision.now), within_s)
        if not isinstance(decision, Decision):
            raise AssertionError(f"an admission was answered with {decision!r}")
        return decision

    async def _again(self, steps: Steps) -> Answer | None:
        """Wait in memory. One end asks for all: when the store takes it, the others come."""
        if self.waiting >= MAX_QUEUED_ENDS:
            raise StoreUnavailableError(
                f"{self.waiting} ends wait in memory for the store already. Bring it back, or give the Metering a "
                f"journal."
            )
        self.waiting += 1
        try:
            while True:
                if self._back is not None:
                    await asyncio.shield(self._back)
                    with suppress(_Down):
                        return await self._once_more(steps)
                else:
                    return await self._until_taken(steps)
        finally:
            self.waiting -= 1

    async def _until_taken(self, steps: Steps) -> Answer | None:
        back = self._back = asyncio.get_running_loop().create_future()
        wait_s = RETRY_FIRST_S
        try:
            while True:
                await asyncio.sleep(_drawn(wait_s))
                wait_s = min(2 * wait_s, RETRY_LAST_S)
                with suppress(_Down):
                    return await self._once_more(steps)
        finally:
            # Also when this one goes without an answer: another one asks then.
            self._back = None
            back.set_result(None)

    async def _once_more(self, steps: Steps) -> Answer | None:
        self._metering.meters.count("ends_retried")
        try:
            return await self._do(steps, self._metering.end_timeout_s)
        except UnwritableError:
            raise
        except StoreError as failure:
            self._metering.alarms.raised("ends", f"The store still takes no ends; {self.waiting} wait.", failure)
            raise _Down from failure

    # -- the journal ---------------------------------------------------------------------------------------

    async def keep(self, call: str, steps: Steps, *, due_in_s: float = 0.0) -> bool:
        """Write *steps* to the journal, together with what else waits for that; False where it cannot be done."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._to_keep.append(_Entry(call, steps, due_in_s, future))
        if self._writer is None:
            self._writer = asyncio.get_running_loop().create_task(
                self._write(), name="asgi_metering journal", context=contextvars.Context()
            )
        return await future

    async def _write(self) -> None:
        try:
            while self._to_keep:
                batch, self._to_keep = self._to_keep, []
                if not await self._written(batch) and len(batch) > 1:
                    # One that cannot be written shall harm no neighbour.
                    for each in batch:
                        await self._written([each])
                for entry in batch:
                    if not entry.future.done():
                        entry.future.set_result(False)
                self._kept_more.set()
        finally:
            self._writer = None

    async def _written(self, batch: list[_Entry]) -> bool:
        journal = self._journal
        assert journal is not None  # noqa: S101 -- asked before
        # The last word on each call: what it holds grows, and then it ends.
        last = {entry.call: entry for entry in batch}.values()
        try:
            # One write for all that is due at once, and one for what calls that begin leave for the worst case.
            for due_in_s in sorted({entry.due_in_s for entry in last if entry.steps}):
                kept = {entry.call: entry.steps for entry in last if entry.steps and entry.due_in_s == due_in_s}
                await journal.keep(kept, due_in_s=due_in_s)
            for entry in last:
                if not entry.steps:
                    await journal.drop(entry.call)
        except MeteringError as failure:
            self._metering.alarms.raised("journal", str(failure), failure)
            return False
        self._metering.meters.count("ends_queued", sum(not entry.due_in_s for entry in batch))
        for entry in batch:
            if not entry.future.done():
                entry.future.set_result(True)
        return True

    async def replay(self) -> None:
        """Read the journal off for ever: its entries go to the store in order, and are forgotten when it took them."""
        journal = self._journal
        assert journal is not None  # noqa: S101 -- started only with one
        wait_s = RETRY_FIRST_S
        while True:
            self._kept_more.clear()
            try:
                is_read_off = await self._read_off(journal)
            except MeteringError as failure:
                self._metering.alarms.raised("journal", str(failure), failure)
                is_read_off = False
            if is_read_off:
                wait_s = RETRY_FIRST_S
                # Not wait_for(): before Python 3.12 it loses a cancellation that comes together with its result.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_drawn(IDLE_S)):
                        await self._kept_more.wait()
            else:
                await asyncio.sleep(_drawn(wait_s))
                wait_s = min(2 * wait_s, RETRY_LAST_S)

    async def _read_off(self, journal: Journal) -> bool:
        """Deliver what is due; False where the store does not take it."""
        if not await journal.take_turn():
            return True
        try:
            return await self.deliver(journal)
        finally:
            # First: whatever else fails, others may read it off.
            await journal.give_turn_back()
            await self._tell_of(journal)

    async def deliver(self, journal: Journal) -> bool:
        """
        Hand what is due in *journal* to the store; False where that does not take it. Whose turn it is has been asked.

        Raises:
            JournalError: The journal cannot be used.
        """
        while entries := await journal.due(READ_OFF):
            # One goes ahead: a dead store is asked for one thing and not for a hundred.
            done = [entries[0]] if await self._delivered(journal, entries[0]) else []
            failures: list[BaseException] = []
            if done:
                # All of them come to an end before the turn is anybody else's.
                others = (self._delivered(journal, entry) for entry in entries[1:])
                rest = await asyncio.gather(*others, return_exceptions=True)
                done += [entry for entry, taken in zip(entries[1:], rest, strict=True) if taken is True]
                failures = [failure for failure in rest if isinstance(failure, BaseException)]
            if done:
                self._delivered_some()
            await journal.done(done)
            for failure in failures:
                raise failure
            if len(done) < len(entries):
                return False
        return True

    async def _tell_of(self, journal: Journal) -> None:
        waiting, aside = await journal.counts()
        self._metering.meters.gauge("journal_backlog", waiting)
        self._metering.meters.gauge("journal_set_aside", aside)

    async def _delivered(self, journal: Journal, entry: JournalEntry) -> bool:
        """Whether *entry* is dealt with: done, or set aside for a person since the store will never take it."""
        try:
            if entry.fault:
                await self._set_aside(journal, entry, entry.fault)
            else:
                await self._do(entry.steps, self._metering.end_timeout_s)
                return True
        except JournalError:
            raise
        except StoreError as failure:
            if not isinstance(failure, UnwritableError):
                told = f"The store does not take what the journal {str(journal.path)!r} keeps: {failure}"
                self._metering.alarms.raised("replay", told, failure)
                return False
            await self._set_aside(journal, entry, str(failure))
        except Exception as failure:
            log.exception("What the journal keeps of call %s cannot be done.", entry.id)
            await self._set_aside(journal, entry, repr(failure))
        return True

    async def _set_aside(self, journal: Journal, entry: JournalEntry, why: str) -> None:
        await journal.set_aside(entry, why)
        log.error(
            "Entry %d of the journal %r, of call %s, is set aside: %s Look at it, then await journal.restore().",
            entry.number,
            str(journal.path),
            entry.id,
            why,
        )


class _Entry(NamedTuple):
    """What somebody waits for to be written; no steps forget what is kept of the call."""

    call: str
    steps: Steps
    due_in_s: float
    future: asyncio.Future[bool]


class _Down(Exception):  # noqa: N818 -- turns a loop
    """The store did not take it this time either."""


def _drawn(seconds: float) -> float:
    return seconds * random.uniform(*RETRY_SPREAD)  # noqa: S311 -- spreads retries, no secret


def _of_its_time(ask: Admit, amount: int, now: float) -> Admit:
    """*ask* for *amount*, with the calendars that the time *now* asks for of all that were kept with it."""
    sources = tuple(
        source._replace(boundaries=around(source.boundaries, now)) if isinstance(source, AllowanceSource) else source
        for source in ask.sources
    )
    key = None if ask.charge_key is None else _of_the_call(ask.charge_key, ask, now)
    return ask._replace(amount=amount, minimum=amount, sources=sources, charge_key=key)


def _of_the_call(key: KeyAsk, ask: Admit, now: float) -> KeyAsk:
    """
    *key* with the window in which the call was made, also where that is over: a later one has calls of its own.

    A calendar's window is told by its start; here it lasts until after *now*, and a window longer for a store whose
    clock is ahead of ours.
    """
    if key.boundaries:
        later = [edge for edge in key.boundaries if edge > now][1:3]
        return key._replace(boundaries=tuple(sorted({*key.boundaries[:2], *later})))
    age_s = max(0.0, now - float(ask.facts.get("started_at", now)))
    return key._replace(window_s=max(key.window_s - age_s, min(key.window_s, LEAST_WINDOW_S)))


def _debtor(ask: Admit) -> SourceAsk:
    """Whose debt it is that nobody can pay: of the source of last resort, preferably a wallet."""
    return next((source for source in reversed(ask.sources) if isinstance(source, WalletSource)), ask.sources[-1])


def _on_debt(ask: Admit) -> Admit:
    """*ask* to be paid by its debtor, whatever that owes."""
    debtor = _debtor(ask)
    return ask._replace(sources=(WalletSource(MAX_AMOUNT // 2, debtor.payer, debtor.group),))


def _told(ask: Admit, end: End) -> dict[str, Any]:
    """What the usage event says of a queued call that died and is charged nothing."""
    return {
        **ask.facts,
        **(end.event or {}),
        "id": ask.id,
        "payer": ask.payer,
        "unit": ask.unit,
        "line": ask.line,
        "amount": 0,
        "held": 0,
        "basis": Basis.NONE.value,
        "estimated": False,
        "ended_at": time.time(),
    }
