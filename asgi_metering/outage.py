"""
Outage: what becomes of an admission that the store does not answer, layer by layer (X.6).

Reads what was chosen for each layer and carries it out; the strictest layer of the route answers. Knows no store but
the one in memory that limits fall back on, and no HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from asgi_metering.asking import leveled
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import ConfigurationError, StoreAvoidedError, StoreError, StoreUnavailableError
from asgi_metering.policies import ChargePolicy, EndpointPolicy, RatePolicy
from asgi_metering.receipts import Basis
from asgi_metering.rules.calendars import Period, boundaries_until
from asgi_metering.rules.ending import EndPolicy, Situation
from asgi_metering.rules.operations import Admit, AllowanceSource, End, LimitAsk
from asgi_metering.sources import Allowance
from asgi_metering.stores.memory import MemoryStore

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = [
    "CHOICES",
    "LocalLimits",
    "check_journal",
    "hold_more_locally",
    "in_doubt_of",
    "read_choices",
    "without_store",
]

log = logging.getLogger("asgi_metering")

CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "credits": ("deny", "queue", "allow"),
    "rates": ("deny", "local", "allow"),
}
"""What each layer may do, the strictest first."""

DEFAULTS: Final[Mapping[str, str]] = {"credits": "deny", "rates": "allow"}
"""Fail closed for money, open for rates (X.6)."""

CALENDAR_S: Final = 35 * 86_400.0
"""A queued charge finds the windows of its allowances for so long: a month, and some days to mend things in."""

MAX_LOCAL_KEYS: Final = 100_000
"""
Keys of limits that one process counts by itself: tens of MB. With more those are forgotten whose windows are over; if
more than `LOCAL_KEYS_LEFT` of them are left then, it begins anew, and says so.
"""

LOCAL_KEYS_LEFT: Final = 0.9
"""So that looking for those that are over, which looks at all, is worth it: each time finds a tenth at least."""


SESSION_S: Final = 7 * 86_400.0
"""
The slot of a session that is counted locally is free at its end, or after so long: no age ends a session, and one that
a process has lost sight of shall not keep its slot until that is restarted.
"""


def read_choices(given: Mapping[str, str] | None) -> Mapping[str, str]:
    """
    Read what a user wrote as ``on_store_down=`` of a `Metering`.

    Raises:
        ConfigurationError: No mapping, or a layer or an answer that is not known.
    """
    chosen = dict(DEFAULTS)
    if given is None:
        return chosen
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"on_store_down={given!r} is no mapping. Say it per layer: {{'rates': 'deny'}}.")
    for layer, answer in given.items():
        if layer not in chosen or answer not in CHOICES[layer]:
            known = "; ".join(f"{name!r}: {', '.join(map(repr, answers))}" for name, answers in CHOICES.items())
            raise ConfigurationError(
                f"on_store_down={{{layer!r}: {answer!r}}} is not known. Layers and their answers are {known}."
            )
        chosen[layer] = answer
    return chosen


def check_journal(policy: EndpointPolicy, *, has_journal: bool) -> None:
    """
    Refuse a route that queues charges where nothing would keep them.

    Raises:
        ConfigurationError: With the mend.
    """
    if policy.charge is not None and policy.charge.on_store_down == "queue" and not has_journal:
        raise ConfigurationError(f"{policy.name} has on_store_down='queue', {_NO_JOURNAL}")


_NO_JOURNAL = (
    "and a charge that waits in memory alone is lost with the process. Give the Metering a journal='metering.journal'."
)


def check_choices(chosen: Mapping[str, str], *, has_journal: bool) -> None:
    """The same for what a `Metering` says for all its routes."""
    if chosen["credits"] == "queue" and not has_journal:
        raise ConfigurationError(f"on_store_down={{'credits': 'queue'}} queues charges, {_NO_JOURNAL}")


_NOTHING: Final[Mapping[str, int]] = MappingProxyType({})


class LocalLimits:
    """
    Rate and concurrency limits of one process by itself, by the same rules, while the store does not answer.

    Each process allows the whole limit, once in each window: what was counted in one outage counts in the next one as
    well. It is never told to the store, nor looked at while that answers. Safe from several threads.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._store = MemoryStore(clock)
        self._until: dict[str, float] = {}

    def decide(self, ask: Admit) -> Decision:
        """Decide the limits and leases of *ask*."""
        now = self._clock()
        # A window that slides weighs in the next one as well, and a full bucket counts for as long as it took to fill.
        self._until.update((limit.key, now + 2 * _span_s(limit)) for limit in ask.limits)
        self._until.update((lease.pool, now + ask.ttl_s) for lease in ask.leases)
        if len(self._until) > MAX_LOCAL_KEYS:
            self._make_room(now)
        decision = self._store.run_now(ask)
        if not isinstance(decision, Decision):
            raise AssertionError(f"an admission was answered with {decision!r}")
        return decision

    def end(self, call: Call, actual: Mapping[str, int] = _NOTHING) -> None:
        """Free the leases of *call*, if it has any here, and correct what its weighted limits took."""
        if call.local:
            self._store.run_now(End(call.local, None, actual=actual, failed=True))
            call.local = ""

    def _make_room(self, now: float) -> None:
        """Forget keys whose windows are over; where nearly none are, all."""
        self._until = {key: until for key, until in self._until.items() if until > now}
        if len(self._until) > LOCAL_KEYS_LEFT * MAX_LOCAL_KEYS:
            log.error("More than %d keys are limited locally; all of them are counted anew.", MAX_LOCAL_KEYS)
            self._store, self._until = MemoryStore(self._clock), {}


def _span_s(limit: LimitAsk) -> float:
    return limit.limit * limit.window_s / limit.refill if limit.refill else limit.window_s


async def without_store(
    call: Call, charge: ChargePolicy | None, rates: tuple[RatePolicy, ...], asked: Admit, failure: StoreError
) -> None:
    """
    Decide *call* without the store; its decision says how in ``fallback``.

    Raises:
        CallRefused: A layer of the route denies, its own limits are spent, or its charge could not be kept.
    """
    metering = call.metering
    metering.meters.count("store_failures", line=call.line)
    metering.alarms.raised("store", f"The store decided on no admission: {failure}", failure)
    _take_back(call, asked, failure)
    money = None if charge is None or call.exempt else charge.on_store_down or metering.on_store_down["credits"]
    if money == "queue" and (asked.idempotency is not None or metering.journal is None):
        # Whether a request of that key ran before cannot be told.
        money = "deny"
    answers = [(rate, rate.on_store_down or metering.on_store_down["rates"]) for rate in rates]
    if money == "deny":
        raise call.refused(Refusal(Reason.STORE_DOWN, "credits")) from failure
    if any(answer == "deny" for _, answer in answers):
        raise call.refused(Refusal(Reason.STORE_DOWN, "rates")) from failure
    local = [rate for rate, answer in answers if answer == "local"]
    decision = _decided_locally(call, local, asked) if local else Decision(call.id, time.time())
    chosen = {f"rates:{answer}" for _, answer in answers} | ({f"credits:{money}"} if money else set())
    if money == "queue" and asked.sources and charge is not None:
        await _queue(call, _lasting(asked, charge), failure)
        decision = decision._replace(id=call.id, held=asked.amount)
    else:
        call.exempt = True
    call.decision = decision._replace(fallback=tuple(sorted(chosen)))
    if call.opening.closed:
        # Its request was over meanwhile: nobody will end it.
        metering.local.end(call)


def _take_back(call: Call, asked: Admit, failure: StoreError) -> None:
    """
    Have the journal keep that *asked*, which the store may have admitted, is given back.

    Where its policy charges what was held this must outlive the process: the expiry would not give it back.
    """
    was_asked = isinstance(failure, StoreUnavailableError) and not isinstance(failure, StoreAvoidedError)
    if was_asked and asked.sources and asked.in_doubt is Basis.HOLD and call.metering.journal is not None:
        call.metering.runtime().take_back(asked)


def _decided_locally(call: Call, rates: list[RatePolicy], asked: Admit) -> Decision:
    scopes = tuple(f"{rate.scope}|" for rate in rates)
    # What somebody else says of a call is said of it here as well.
    others = tuple(f"{rate.scope}|" for rate in rates if rate.asker is not None)
    own = [limit for limit in asked.limits if limit.key.startswith(scopes) and not limit.key.startswith(others)]
    told = [limit for rate in rates if rate.asker is not None for limit in rate.asker.locally(call)]
    ask = Admit(
        call.id,
        asked.payer,
        asked.unit,
        0,
        0,
        limits=(*own, *told),
        leases=tuple(lease for lease in asked.leases if lease.pool.startswith(scopes)),
        # Nobody beats for it: it lives as long as a call may.
        ttl_s=SESSION_S if call.opening.is_session else call.metering.max_call_s,
    )
    decision = call.metering.local.decide(ask)
    if decision.refusal is not None:
        raise call.refused(leveled(decision.refusal, rates), decision)
    call.local = ask.id
    return decision


def _lasting(asked: Admit, charge: ChargePolicy) -> Admit:
    """*asked* with the calendars of many windows to come: nobody knows when it will be read."""
    now = time.time()
    until = now + CALENDAR_S
    sources = tuple(
        ask._replace(boundaries=boundaries_until(Period(source.per), source.zone, now, until, source.anchor))
        if isinstance(ask, AllowanceSource) and isinstance(source, Allowance) and ask.boundaries
        else ask
        for ask, source in zip(asked.sources, charge.sources, strict=True)
    )
    key = asked.charge_key
    if key is not None and charge.key is not None and isinstance(charge.key.per, str):
        edges = boundaries_until(Period(charge.key.per), charge.key.zone, now, until)
        key = key._replace(boundaries=edges)
    return asked._replace(sources=sources, charge_key=key)


async def _queue(call: Call, asked: Admit, failure: StoreError) -> None:
    """
    Let *call* in, and keep its charge in the journal: from here on it is charged, whatever happens to this process.

    It goes on under a new id. Under the old one the store may have admitted it without our knowing, and what it holds
    there is given back.
    """
    journal = call.metering.journal
    assert journal is not None  # noqa: S101 -- asked before
    was, call.id = call.id, call.metering.new_id()
    if call.facts.get("request_id") == was:
        call.facts = {**call.facts, "request_id": call.id}
    ask = asked._replace(id=call.id, limits=(), leases=(), in_doubt=Basis.NONE, facts=call.facts)
    try:
        is_kept = await keep_in_doubt(call, ask, asked.in_doubt)
    except BaseException:
        # Whoever asked has gone while it was written, and it stands there all the same: for work that never began.
        call.metering.local.end(call)
        call.metering.runtime().forget(call.id)
        raise
    if not is_kept:
        call.metering.local.end(call)
        raise call.refused(Refusal(Reason.STORE_DOWN, "credits")) from failure
    if call.opening.closed:
        await journal.drop(call.id)
    call.queued = ask
    call.held, call.ttl_s = asked.amount, asked.ttl_s


async def keep_in_doubt(call: Call, ask: Admit, policy: Basis) -> bool:
    """Have the journal keep how *policy* ends *call*, should its process die with what it holds by *ask* now."""
    return await call.metering.runtime().remember(call.id, (ask, _lost(ask, policy, call.observed_parts)))


async def beat_locally(call: Call) -> None:
    """
    Have the journal keep what a queued call was seen to use so far, as its heartbeats would tell the store.

    Of a session whatever its policy is: it is read off later by that, for no age ends a session.
    """
    policy = in_doubt_of(call.charge)
    # Once it has ended, the journal keeps how.
    if call.queued is not None and not call.closed and (policy is Basis.OBSERVED or call.opening.is_session):
        await keep_in_doubt(call, call.queued, policy)


async def hold_more_locally(call: Call, to: int) -> None:
    """
    Hold *to* smallest parts for a queued call, as the store would: nobody can tell yet whether the payer has them.

    Where the journal takes nothing more, what it kept before stands for a process that dies.
    """
    if call.queued is not None and call.charge is not None:
        call.held = to
        call.queued = call.queued._replace(amount=to, minimum=to)
        await keep_in_doubt(call, call.queued, in_doubt_of(call.charge))


def in_doubt_of(charge: ChargePolicy | None) -> Basis:
    """On what basis the policy of *charge* ends a call whose process died."""
    end = charge.end if charge is not None else None
    return (end if isinstance(end, EndPolicy) else EndPolicy({})).basis(Situation.ABORTED)


def _lost(ask: Admit, policy: Basis, observed: int) -> End:
    """How the policy ends a queued call whose process has died: by what it held, or was seen to use."""
    amounts = {Basis.HOLD: ask.amount, Basis.OBSERVED: observed}
    amount = amounts.get(policy) or None
    event = {"outcome": "aborted", "reason": "in_doubt"} if ask.facts else None
    return End(ask.id, amount, policy, event=event, failed=amount is None)
