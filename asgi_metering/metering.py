"""
`Metering`: the composition root. Puts a store, an identity, a unit and sinks together, and is what users operate.

Knows every room of the floors below by name, and no HTTP.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from asgi_metering import ids
from asgi_metering.admission import admit, admit_now
from asgi_metering.alarms import Alarms
from asgi_metering.amounts import CREDITS, Unit
from asgi_metering.call import Call
from asgi_metering.caller import Caller
from asgi_metering.checks import check_asked, check_flag, check_new_id
from asgi_metering.clients import UpstreamClients
from asgi_metering.computed import is_async
from asgi_metering.decisions import Decision, Refusal
from asgi_metering.dropping import read_drops
from asgi_metering.errors import ConfigurationError, IdentityError, StoreAvoidedError, StoreError
from asgi_metering.events.exporter import DELIVERY_TIMEOUT_S, MAX_DELIVERY_S
from asgi_metering.events.metrics import Meters
from asgi_metering.events.outbox import OnDrop
from asgi_metering.events.records import whole_units
from asgi_metering.events.sinks import Sink
from asgi_metering.events.span import annotate_span, is_recording
from asgi_metering.ledger import Ledger
from asgi_metering.named import NamedKeys, NamedLimits
from asgi_metering.opening import ALL_FEATURES, Opening, Origin
from asgi_metering.outage import LocalLimits, check_choices, read_choices
from asgi_metering.plans import Plans
from asgi_metering.policies import EndpointPolicy, misplaced
from asgi_metering.portal import Portal
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Declare, Grow, Operation, Preview
from asgi_metering.runtime import Runtime
from asgi_metering.shadow import ask_shadow, would_deny
from asgi_metering.sharing import Sharing
from asgi_metering.standing import Standing
from asgi_metering.stores.breaker import Breaker, BreakerState
from asgi_metering.stores.contract import Store
from asgi_metering.stores.urls import store_from_url
from asgi_metering.stores.use import StoreUse
from asgi_metering.tracking import tracked, with_log
from asgi_metering.upstream.headroom import Headroom
from asgi_metering.upstream.readings import QuotaReadings
from asgi_metering.work import Work

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from asgi_metering.journal import Journal
    from asgi_metering.quotas.packages import Package
    from asgi_metering.upstream.tracker import QuotaTracker

__all__ = ["ALL_FEATURES", "Metering"]

log = logging.getLogger("asgi_metering")

StoreDown: TypeAlias = Literal["deny", "queue", "local", "allow"]

Identify: TypeAlias = "Callable[[HTTPConnection], Awaitable[Caller | None] | Caller | None]"
"""Who is behind a connection; None is nobody."""


class Metering(Ledger, Work, Standing, UpstreamClients):
    """
    One metering: a store, who calls, in what unit, and where events go.

    Args:
        store: A URL (``memory://``, ``sqlite:///metering.db``, ``postgresql://host/database``, ``redis://host`` and its
            relatives, whose schemes an error lists) or a `Store`.
        identify: Gets the connection (headers, path, client) and answers a `Caller`, or None for nobody; sync or
            async. Runs lazily, once per call, never on unmetered routes.
        unit: What routes count that name no unit.
        sinks: Where usage events go; OpenTelemetry, through its API alone, by default.
        store_timeout_s: Deadline of a store call before the first byte. After some failures in a row nobody waits for
            it any more, until a probe is answered (`Breaker`).
        on_store_down: What a layer does without an answer (X.6): ``"credits"`` ``"deny"`` with 503 (the default),
            ``"queue"`` (let in, and charged later out of the journal) or ``"allow"`` (let in for nothing);
            ``"rates"`` ``"allow"`` (the default), ``"local"`` (each process counts by itself) or ``"deny"``. The
            strictest layer of a route answers; routes may say otherwise.
        journal: A local file that keeps the ends of calls while the store does not take them, across restarts; several
            processes of one machine may share it. With one, the application also starts while the store is down. A
            `Journal` is taken as well, such as one of the fault kit.
        ttl_s: Seconds that a hold lives without a heartbeat, where a route does not say.
        grace_s: Seconds in doubt before the policy ends a hold, where a route does not say.
        max_call_s: A call older than this is ended as it is (pitfall 27), unless it is a WebSocket's.
        drain_s: What a shutdown waits for calls in flight.
        max_draining: Handlers of an event loop that may go on for clients that left, by ``on_disconnect="drain"``; the
            calls of others are charged what was observed.
        run_sync: Runs sync endpoints off the loop: an async function of a callable without arguments; anyio's
            threads by default (pitfall 9).
        new_id: Makes call ids; random ones by default (X.8).
        on_hold_lost: Gets a `Call` that runs on although its policy has ended its hold and freed its slots, because no
            heartbeat came through for so long: time to stop what relies on them (S0.57). Sync or async, on the event
            loop of the call, once per call.
        on_event_dropped: Gets a `Dropped` for each usage event that no sink gets, or not all: the last chance to keep
            it elsewhere (S2.7). Sync or async; it is also counted, as ``metering.events.dropped``, and logged.
        keys: Functions that compute what is counted together, for ``rate_limited(key="named:tenant")``; each may be
            replaced while the application runs: ``metering.keys["tenant"] = other`` (S2.32).
        limits: Limits of requests by name, for ``rate_limited(configured="search")``, replaced in the same way: a text,
            a mapping of plans to texts, or a list of these. One that no endpoint uses is an error at startup (S2.30).
        shadow: Refuse and charge nothing anywhere, and tell what would have been (S4.16; `asgi_metering.shadow`):
            metering that is new to an application, before it is let loose. Routes can say it for their parts.
        packages: What providers sold or allow us, for `tracker`: the name of a catalogue file, packages, or a
            `QuotaTracker`, whose readings are those of `quotas` then, and whose log is one more sink.
        share_readings: Whether the processes that use one store let each other know what providers answer about their
            quotas: `quotas` of each then has the newest of all, a second or two later, and so have `requires_upstream`
            and `tracker`. Off the path of any response, while it is open; not on the memory store, which is of one
            process.
        drop_fields: What usage events of a line leave out: names of attributes, or of fields that say who and where
            (`dropping.DROPPABLE`), by line (S3.36): ``{"podcast": ["thread_id"]}``. It is never written.
        delivery_timeout_s: For one delivery to one sink, off the path of any response (S3.35).

    Raises:
        ConfigurationError: An argument or URL that cannot work; the sentence says what can.
        MissingExtraError: The store's driver is not installed.

    Used as ``async with metering:``, or by the middleware's lifespan, or lazily by the first call; by several of them
    at once, of which the last one drains and stops it, and a block inside of a running application never does; in
    several event loops at once if need be, whose backgrounds are apart and whose store is one: the last to stop closes
    it.
    """

    def __init__(
        self,
        store: str | Store = "memory://",
        *,
        identify: Identify | None = None,
        unit: Unit = CREDITS,
        sinks: Sequence[Sink] | None = None,
        store_timeout_s: float = 1.0,
        on_store_down: Mapping[str, StoreDown] | None = None,
        journal: str | os.PathLike[str] | Journal | None = None,
        ttl_s: float = 60.0,
        grace_s: float = 30.0,
        max_call_s: float = 3_600.0,
        drain_s: float = 10.0,
        max_draining: int = 100,
        run_sync: Callable[[Callable[[], Any]], Coroutine[Any, Any, Any]] | None = None,
        new_id: Callable[[], str] | None = None,
        on_hold_lost: Callable[[Call], Any] | None = None,
        on_event_dropped: OnDrop | None = None,
        keys: Mapping[str, Callable[..., Any]] | None = None,
        limits: Mapping[str, Any] | None = None,
        shadow: bool = False,
        packages: str | os.PathLike[str] | Iterable[Package] | QuotaTracker | None = None,
        share_readings: bool = True,
        drop_fields: Mapping[str, Collection[str]] | None = None,
        delivery_timeout_s: float = DELIVERY_TIMEOUT_S,
    ) -> None:
        check_asked("identify", identify, "connection")
        check_asked("on_hold_lost", on_hold_lost, "call")
        check_asked("on_event_dropped", on_event_dropped, "dropped event")
        if not isinstance(unit, Unit):
            raise ConfigurationError(f"unit={unit!r} is no Unit. Declare one: Unit('credits', scale=6).")
        if new_id is not None:
            check_new_id(new_id)
        if run_sync is not None and not is_async(run_sync):
            raise ConfigurationError(
                f"run_sync={run_sync!r} is no async function. Write one: async def run_sync(work): ..., and await in "
                f"it whatever runs work() elsewhere."
            )
        for name, seconds in {
            "store_timeout_s": store_timeout_s,
            "ttl_s": ttl_s,
            "grace_s": grace_s,
            "max_call_s": max_call_s,
            "drain_s": drain_s,
        }.items():
            if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not seconds >= 0:
                raise ConfigurationError(f"{name}={seconds!r} is not a number of seconds from 0 up.")
        if not isinstance(delivery_timeout_s, int | float) or not 0 < delivery_timeout_s <= MAX_DELIVERY_S:
            raise ConfigurationError(f"delivery_timeout_s={delivery_timeout_s!r} is outside 0 to {MAX_DELIVERY_S} s.")
        if type(max_draining) is not int or max_draining < 0:
            raise ConfigurationError(f"max_draining={max_draining!r} is no int from 0 up. 0 lets no handler go on.")
        self.keys = NamedKeys(keys)
        self.limits = NamedLimits(limits)
        check_flag(shadow=shadow)
        check_flag(share_readings=share_readings)
        self._shadow = shadow
        self._shares_readings = share_readings
        self.plans = Plans(self)
        self.store: Store = store if isinstance(store, Store) else store_from_url(store)
        self.unit = unit
        self.store_timeout_s = store_timeout_s
        self.end_timeout_s = max(5.0, store_timeout_s)
        self.on_store_down = read_choices(on_store_down)
        check_choices(self.on_store_down, has_journal=journal is not None)
        self.ttl_s, self.grace_s, self.max_call_s, self.drain_s = ttl_s, grace_s, max_call_s, drain_s
        self.max_draining = max_draining
        self.run_sync = run_sync or _run_in_thread
        self.new_id = new_id or ids.new_id
        self.drops = read_drops(drop_fields)
        self.delivery_timeout_s = delivery_timeout_s
        self.tracker = None if packages is None else tracked(packages, unit)
        self.quotas = QuotaReadings() if self.tracker is None else self.tracker.readings
        self.meters = Meters()
        self._units = {unit.name: unit}
        given: tuple[Sink, ...] = _default_sinks(self._units.values()) if sinks is None else _checked_sinks(sinks)
        self.sinks: tuple[Sink, ...] = with_log(given, self.tracker)
        self._identify = identify
        self._on_hold_lost = on_hold_lost
        self.on_event_dropped = on_event_dropped
        # Those that the store has not been told of.
        self.new_units = dict(self._units)
        self._runtimes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Runtime] = weakref.WeakKeyDictionary()
        self._latest: Runtime | None = None
        self._lock = threading.Lock()
        self.alarms = Alarms(log)
        self._journal_given = journal
        self._join_process()
        _living.add(self)

    # -- life ----------------------------------------------------------------------------------------------

    def runtime(self) -> Runtime:
        """The background of the running event loop; `ConfigurationError` where asyncio runs none (pitfall 34)."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise ConfigurationError(
                "No event loop of asyncio runs here. Serve the application by a worker of asyncio or uvloop, not of "
                "trio; in code without a loop use metering.charge_sync()."
            ) from None
        latest = self._latest
        if latest is not None and latest.loop is loop:
            return latest
        with self._lock:
            runtime = self._runtimes.get(loop)
            if runtime is None:
                runtime = self._runtimes[loop] = Runtime(self, loop)
            # Nearly always there is one loop; an ended one may stay until the next comes.
            self._latest = runtime
        return runtime

    def forked(self) -> None:
        """Forget what belongs to the parent of this process; called in each child after a fork."""
        self._lock = threading.Lock()
        if self.journal is not None and self.journal is self._journal_given:
            self.journal.forked()
        self._join_process()

    def _join_process(self) -> None:
        """Make what belongs to one process: who uses the store, and what there is for the time without it."""
        self.local = LocalLimits()
        self.headroom = Headroom(self.quotas)
        is_shared = self._shares_readings and self.store.shared
        self.sharing = Sharing(self.quotas, self._reads_quotas) if is_shared else None
        self.store_use = StoreUse(self.store)
        self.breaker = Breaker(told=self._told_of_store)
        self.journal = _journal(self._journal_given)
        self.journal_use = None if self.journal is None else StoreUse(self.journal)
        self._portal = Portal(self.stop)

    def _reads_quotas(self) -> bool:
        return self.headroom.is_used or self.tracker is not None

    def _told_of_store(self, state: BreakerState) -> None:
        is_up = state is BreakerState.CLOSED
        self.meters.gauge("store_up", int(is_up))
        if is_up:
            log.warning("The %s store answers again.", self.store.name)
        else:
            self.meters.count("store_outages")
            log.error(
                "The %s store does not answer. Admissions are decided without it, as on_store_down says, until a "
                "probe is answered.",
                self.store.name,
            )

    async def start(self) -> None:
        """Open the store and start the background of this event loop. Raises as `Store.open`."""
        await self.runtime().start()

    async def begin(self) -> None:
        """The same for an application: with a journal it goes on without a store that may come later."""
        try:
            await self.start()
        except StoreError:
            if self.journal is None:
                raise

    async def drain(self) -> int:
        """Wait, bounded, until calls in flight have ended and are booked; how many were not."""
        return await self.runtime().drain(self.drain_s)

    async def stop(self) -> None:
        """Drain, export, and give everything back that this event loop uses; others go on."""
        await self.runtime().drain(self.drain_s)
        await self.runtime().stop()

    async def __aenter__(self) -> Self:
        await self.begin()
        self.runtime().blocks += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runtime = self.runtime()
        runtime.blocks -= 1
        if not (runtime.blocks or runtime.lifespans):
            await self.stop()

    # -- what calls and layers use -------------------------------------------------------------------------

    def calls_in_flight(self) -> list[Call]:
        """The admitted calls that have not ended, of every event loop of this process; any thread may ask."""
        with self._lock:
            runtimes = list(self._runtimes.values())
        return [call for runtime in runtimes for call in list(runtime.in_flight.values())]

    @property
    def identifies(self) -> bool:
        """Whether there is an `identify`; without one nobody is known, and billable routes answer 401."""
        return self._identify is not None

    def counted(self, unit: Unit | None) -> Unit:
        """
        The unit to count in: *unit*, or the metering's own. Every unit that anybody names passes here.

        Raises:
            ConfigurationError: It is no `Unit`, or its name is known with another scale: amounts written with one and
                read with the other differ by powers of ten.
        """
        if unit is None:
            return self.unit
        if not isinstance(unit, Unit):
            raise ConfigurationError(f"unit={unit!r} is no Unit. Declare one: Unit('credits', scale=6).")
        known = self._units.get(unit.name) or self._learned(unit)
        if known.scale != unit.scale:
            raise ConfigurationError(
                f"The unit {unit.name!r} has scale {unit.scale} here, and is known to this Metering with scale "
                f"{known.scale}. Declare the unit once and use that object, or give one of them another name."
            )
        return unit

    @property
    def shadow(self) -> bool:
        """Whether everything is in the shadow; fixed, for what endpoints ask is worked out once."""
        return self._shadow

    @property
    def tells(self) -> bool:
        """Whether anybody wants usage events."""
        return bool(self.sinks)

    def _learned(self, unit: Unit) -> Unit:
        """What is known by the name of *unit* from here on: *unit* itself, unless another thread was faster."""
        with self._lock:
            if unit.name not in self._units:
                # First: whoever finds it known must not ask a store that was not told of it.
                self.new_units[unit.name] = self._units[unit.name] = unit
            return self._units[unit.name]

    async def declare_units(self, deadline_s: float) -> None:
        """
        Tell the store, within so many seconds, the scales of all units that are known here, once each.

        Raises:
            ConfigurationError: One is counted with another scale there.
            StoreError: No answer came.
        """
        new = [(unit.name, unit.scale) for unit in tuple(self.new_units.values())]
        if new:
            await self.runtime().pump.submit(Declare(tuple(new)), deadline_s)
            for name, _ in new:
                self.new_units.pop(name, None)

    async def foresee(self, ask: Admit) -> Decision:
        """Ask the store what it would decide on *ask* now. Raises `StoreError`."""
        return await self._ask(Preview(ask), Decision)

    async def grow(self, ask: Grow) -> Decision:
        """Ask the store for more of a hold that is live. Raises `StoreError`."""
        return await self._ask(ask, Decision)

    async def _submit(self, operation: Operation) -> Answer:
        if self.new_units:
            await self.runtime().opened()
            await self.declare_units(self.end_timeout_s)
        return await self.runtime().submit(operation, self.end_timeout_s)

    async def decide(self, ask: Admit | Preview) -> Decision:
        """Ask the store for an admission, or a look at one, within the deadline, if worth it. Raises `StoreError`."""
        runtime = self.runtime()
        if self.store.immediate and not self.new_units:
            answer = await runtime.submit(ask, self.store_timeout_s)
        else:
            with self.breaker.attempt(self.store.name):
                answer = await runtime.submit_known(ask, self.store_timeout_s)
        if not isinstance(answer, Decision):
            raise AssertionError(f"an admission was answered with {answer!r}")
        return answer

    # The very function: one more between a call and it would cost every request.
    admit_now = staticmethod(admit_now)

    async def admit(self, call: Call, arguments: Mapping[str, Any]) -> None:
        """Admit *call* with the *arguments* of its endpoint; raises as `admission.admit`."""
        await admit(call, arguments)
        if call.beside is not None:
            await ask_shadow(call, arguments)
            call.opening.check()

    async def decide_beside(self, ask: Admit | Preview) -> Decision:
        """
        As `decide`, for what no call waits for: only of a store that is well, and whatever comes of it tells nothing of
        how that is.
        """
        if self.breaker.state is not BreakerState.CLOSED:
            raise StoreAvoidedError(f"The {self.store.name} store has not answered of late.")
        answer = await self.runtime().submit_known(ask, self.store_timeout_s)
        if not isinstance(answer, Decision):
            raise AssertionError(f"an admission was answered with {answer!r}")
        return answer

    def told_shadow(self, call: Call, refusal: Refusal) -> None:
        """Count what would have been a refusal of *call*."""
        if call.beside is not None:
            would_deny(call, call.beside, refusal)

    def admitted(self, call: Call) -> None:
        """Look after an admitted call, and say so on the server's span while it still records."""
        if call.needs_end:
            self.runtime().register(call)
        if call.charge is not None:
            self.tell_span(call)

    def tell_span(self, call: Call) -> None:
        """Say of a call that is admitted what it is charged, on the server's span while it still records."""
        if is_recording():
            # The same words as on the log record, in the same measure.
            annotate_span(
                {
                    "metering.line": call.line,
                    "metering.held": whole_units(call.held, call.unit),
                    "metering.unit": call.unit.name,
                }
            )

    def refused(self, call: Call, refusal: Refusal) -> None:
        """Count a refusal, and say so on the server's span, in the same words."""
        reason = refusal.reason.value
        self.meters.count("refusals", reason=reason, line=call.line)
        annotate_span({"metering.line": call.line or None, "metering.refusal.reason": reason})

    def who(self, origin: Origin | None) -> Caller | Awaitable[object] | None:
        """
        Ask `identify`; what it answers by waiting is for `identified` to wait for.

        Raises:
            IdentityError: It raised, or answered something that is no `Caller`.
        """
        if self._identify is None or origin is None:
            return None
        try:
            caller: object = self._identify(origin.connection)
        except Exception as failure:
            raise _unidentified(failure) from failure
        # Most answer one at once, and to ask anything whether it can be awaited takes longer than all else here.
        if type(caller) is Caller or caller is None:
            return caller
        return caller if inspect.isawaitable(caller) else _as_caller(caller)

    async def identified(self, asked: Awaitable[object]) -> Caller | None:
        """Wait for what `who` was answered; raises as that."""
        try:
            caller = await asked
        except Exception as failure:
            raise _unidentified(failure) from failure
        return _as_caller(caller)

    async def hold_lost(self, call: Call) -> None:
        """Tell the application that *call* has lost its hold; raises what its function does."""
        if self._on_hold_lost is not None:
            answer = self._on_hold_lost(call)
            if inspect.isawaitable(answer):
                await answer

    def check_features(self, policy: EndpointPolicy, opening: Opening) -> None:
        """
        Refuse a policy whose layer is absent, unless its layer says ``unenforced="allow"``.

        Raises:
            ConfigurationError: With the layer to add; or it asks for what this kind of connection does not have.
        """
        if policy.needs and (policy.needs == "websocket") is not opening.is_session:
            raise ConfigurationError(f"{policy.name} {misplaced(policy)}")
        if "credits" not in opening.unenforced and policy.charge is not None and "credits" not in opening.features:
            raise ConfigurationError(
                f"{policy.name} is @billable, but no layer enforces credits here. Add CreditGateMiddleware or "
                f'MeteringMiddleware, or say unenforced="allow".'
            )
        if "rates" not in opening.unenforced and policy.rates and "rates" not in opening.features:
            raise ConfigurationError(
                f"{policy.name} is @rate_limited, but no layer enforces rates here. Add RateLimitMiddleware or "
                f'MeteringMiddleware, or say unenforced="allow".'
            )
        if "quotas" not in opening.unenforced and policy.upstreams and "quotas" not in opening.features:
            raise ConfigurationError(
                f"{policy.name} requires_upstream, but no layer captures quotas here. Add QuotaCaptureMiddleware or "
                f'MeteringMiddleware, or say unenforced="allow".'
            )


def _unidentified(failure: Exception) -> IdentityError:
    return IdentityError(f"identify() failed: {failure!r}. It should answer a Caller or None.")


def _as_caller(answer: object) -> Caller | None:
    if answer is not None and not isinstance(answer, Caller):
        raise IdentityError(f"identify() answered a {type(answer).__name__}. It should answer a Caller or None.")
    return answer


_living: weakref.WeakSet[Metering] = weakref.WeakSet()
"""Every metering of this process."""


def _after_fork() -> None:
    """A child has none of its parent's event loops, and a lock that one of them held would never be free."""
    for metering in list(_living):
        metering.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _default_sinks(units: Iterable[Unit]) -> tuple[Sink, ...]:
    # OpenTelemetry is imported only where events go to it.
    from asgi_metering.events.otel import OTelSink

    return (OTelSink(units=units),)


def _checked_sinks(sinks: Sequence[Sink]) -> tuple[Sink, ...]:
    if not isinstance(sinks, list | tuple):
        raise ConfigurationError(f"sinks={sinks!r} is no list of sinks. Pass a list; an empty one keeps events here.")
    checked = tuple(sinks)
    for sink in checked:
        if inspect.isclass(sink) or not isinstance(sink, Sink) or not is_async(sink.deliver):
            raise ConfigurationError(
                f"The sink {sink!r} is none. Pass an object with a name and an async deliver(events), or a "
                f"CallbackSink(function)."
            )
    return checked


def _journal(given: str | os.PathLike[str] | Journal | None) -> Journal | None:
    if given is None:
        return None
    # The driver is imported only where it is used.
    from asgi_metering.journal import Journal

    if isinstance(given, Journal):
        return given
    if not isinstance(given, str | os.PathLike):
        raise ConfigurationError(f"journal={given!r} is no path. Name a file on a local disk.")
    return Journal(given)


async def _run_in_thread(work: Callable[[], Any]) -> Any:
    import anyio.to_thread

    return await anyio.to_thread.run_sync(work)
