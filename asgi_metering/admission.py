"""
Asking for admission: from a policy and the endpoint's arguments to one operation, and from the answer to a call.

Finds out who calls, and in which order all else is: what it costs (`pricing`), which limits count it (`counting`), what
providers must have left (`reserving`). Decides nothing itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asgi_metering.asking import (
    REQUESTS,
    by_identity,
    distinct,
    leveled,
    source_asks,
)
from asgi_metering.beside import Beside
from asgi_metering.continuing import continued, go_on
from asgi_metering.correlating import ids_around, ids_of
from asgi_metering.counting import count_by, counts, message_limits, needs_caller, of_everybody
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.dropping import without
from asgi_metering.errors import ConfigurationError, IdentityError, PayerError, StoreError
from asgi_metering.events.span import current_trace
from asgi_metering.keying import key_ask, once, shared_key
from asgi_metering.outage import in_doubt_of, without_store
from asgi_metering.policies import ChargePolicy, EndpointPolicy, RatePolicy
from asgi_metering.prices import FixedPrice
from asgi_metering.pricing import FREE, amounts_of, find_payer, find_price, pin
from asgi_metering.receipts import Basis
from asgi_metering.reserving import reserve
from asgi_metering.rules.operations import (
    Admit,
    Grow,
    LeaseAsk,
    LimitAsk,
    SourceAsk,
    WalletSource,
)

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.plans import Plan

__all__ = [
    "admit",
    "admit_now",
    "asked_of",
    "foresee",
    "hold_more",
    "leaves_hold",
    "would_ask",
]

log = logging.getLogger("asgi_metering")

_CHARGING = frozenset({"credits", "events"})
"""Layers that care for a price: one enforces it, the other reports it."""


async def admit(call: Call, arguments: Mapping[str, Any]) -> None:
    """
    Ask the store to admit *call* under its policy.

    Raises:
        CallRefused: Refused by the store, by the lack of an identity, or by the policy for a store that is down.
        CallClosedError: The request was over before the answer came; what was admitted is given back (pitfall 1).
    """
    policy = call.policy
    if policy is None:
        raise ConfigurationError("A call without a policy cannot be admitted. Decorate the endpoint.")
    features = call.opening.features
    charge = policy.charge if features & _CHARGING else None
    # Without the gate a billable call runs unenforced; its usage is still reported (S4.16).
    call.exempt = "credits" not in features
    rates = policy.gated if "rates" in features else ()
    messages = policy.messages if "rates" in features else ()
    if policy.has_beside or call.metering.shadow:
        call.beside = Beside(policy, charge, rates, everything=call.metering.shadow)
        charge, rates = call.beside.live_charge, call.beside.live_rates
        messages = () if call.metering.shadow else messages
    counted = rates if call.beside is None else (*rates, *call.beside.rates)
    if not call.opening.is_flat or any(map(needs_caller, counted)):
        asking = (*rates, *messages) if messages else rates
        await _identify(call, asking, charged=charge is not None and not call.exempt)
    if policy.charge is not None and not policy.charge.names(call.caller):
        # Before anything is computed, for it is none of this line's calls (S2.12).
        charge = None
        if call.beside is not None:
            call.beside.charge = None
    asked = _planned(call, call.metering.plans.of(policy, features))
    if asked is None:
        if call.caller is not None and call.caller.exempt:
            call.exempt = True
            rates = tuple([rate for rate in map(of_everybody, rates) if rate is not None])
            messages = tuple([rate for rate in map(of_everybody, messages) if rate is not None])
        if policy.is_selective:
            rates = tuple([rate for rate in rates if await counts(call, rate, arguments)])
        if messages:
            call.message_limits = await message_limits(call, messages, arguments)
        if charge is not None:
            await _charge(call, charge, arguments)
        elif call.beside is not None and call.beside.charge is not None:
            _free(call, call.beside.charge)
        asked = await _operation(call, charge, rates, arguments, time.time())
    # Whoever asks may outlive its request: a task of the endpoint, a thread.
    call.opening.check()
    try:
        if policy.upstreams and "quotas" in features:
            await reserve(call, policy, asked, arguments)
        await _ask(call, charge, rates, asked, arguments)
    except BaseException:
        if call.beside is not None:
            call.beside.release(call.metering.headroom)
        raise
    if call.continues is not None and call.decision is not None:
        go_on(call, call.decision)
    call.metering.admitted(call)


async def _ask(
    call: Call,
    charge: ChargePolicy | None,
    rates: tuple[RatePolicy, ...],
    asked: Admit | None,
    arguments: Mapping[str, Any],
) -> None:
    """Have the store decide on *asked*, if it is asked anything; raises as `admit`."""
    if asked is None:
        call.decision = Decision(call.id, time.time())
        return
    decided = await _decide(call, charge, rates, asked, arguments)
    if call.opening.closed:
        call.decision, call.has_hold = None, False
        if decided is not None:
            call.metering.runtime().give_back(asked, decided.now)
        call.opening.check()


def admit_now(call: Call, policy: EndpointPolicy, features: frozenset[str]) -> bool:
    """
    Admit *call* under its *policy* and the layers *features*, where nothing has to wait.

    Neither the store, nor who calls, nor its plan, which is plain. False where something has to: then `admit` does it,
    by the same id. Raises as that does.
    """
    metering = call.metering
    runtime = metering.runtime()
    store = runtime.at_hand
    if store is None:
        return False
    asked = _planned(call, metering.plans.of(policy, features))
    # Asked behind the plan, which may be the first to name its unit: the store has to be told of its scale before.
    if asked is None or metering.new_units:
        return False
    try:
        decision = store.run_now(asked)
    except Exception:  # noqa: BLE001 -- what is wrong is found and told on the way for everything else
        return False
    if type(decision) is not Decision or decision.stale_calendar:
        return False
    if decision.refusal is not None:
        raise call.refused(leveled(decision.refusal, _rates_of(call)), decision)
    # As `_mark` does. What a plain plan asks is nothing that was answered before, nobody but the call's own payer pays
    # it, and of its limits none is weighed.
    call.is_plain = True
    call.decision, call.held, call.ttl_s = decision, decision.held, asked.ttl_s
    if asked.sources or asked.leases:
        call.has_hold = True
        runtime.register(call)
    if call.charge is not None:
        # As `needs_end` says: what else it looks at, no plain call has.
        if not call.has_hold:
            runtime.register(call)
        if call.trace:
            metering.tell_span(call)
    return True


def _planned(call: Call, plan: Plan) -> Admit | None:
    """What a call with a plain plan asks, and the call told of it; None where more is to be found out."""
    if not plan.is_plain or not call.identify_now():
        return None
    caller = call.caller
    if caller is None or caller.exempt:
        return None
    call.payer = caller.payer
    charge, price = plan.charge, plan.price
    if charge is not None and price is not None:
        call.charge, call.line, call.unit = charge, charge.line, plan.unit
        call.price, call.estimate = price, price.amount
        call.trace = current_trace()
        call.facts = _facts(call)
    return plan.asked(call, caller, call.started_at)


def _free(call: Call, charge: ChargePolicy) -> None:
    """A call whose charge is in the shadow: it costs nothing, and is told of."""
    call.exempt = True
    try:
        pin(call, charge)
    except ConfigurationError as failure:
        # Of a unit that is known with another scale; its shadow meets the same.
        log.error("The shadow of %s cannot be told. %s", charge.line, failure)
        call.charge = None
        return
    call.trace = current_trace()
    call.facts = _facts(call)


async def would_ask(call: Call, beside: Beside, arguments: Mapping[str, Any], now: float) -> Admit | None:
    """
    What the twin *call* would ask of the store, around *now*, for the shadow parts of *beside*; None for nothing.

    Raises:
        CallRefused: It would have been refused without the store.

    And whatever the application's own functions raise.
    """
    charge, rates = beside.charge, beside.rates
    if beside.identity_down and (charge is not None or any(map(by_identity, rates))):
        raise call.refused(Refusal(Reason.IDENTITY_DOWN, "identify"))
    if charge is not None and call.caller is None:
        raise call.refused(Refusal(Reason.UNAUTHENTICATED, "identify"))
    if call.caller is not None and call.caller.exempt:
        call.exempt, charge = True, None
        rates = tuple([rate for rate in map(of_everybody, rates) if rate is not None])
    if any(rate.is_selective for rate in rates):
        rates = tuple([rate for rate in rates if await counts(call, rate, arguments)])
    if charge is not None and call.price is None:
        # Keys are not claimed: each call is told by itself.
        charge = replace(charge, idempotency=None, key=None, once=None)
        pin(call, charge)
        try:
            await find_payer(call, charge, arguments)
        except PayerError as failure:
            raise call.refused(Refusal(Reason.PAYER, charge.line)) from failure
        await find_price(call, charge, arguments)
    asked = await _operation(call, None if charge is None else call.charge, rates, arguments, now)
    # A row without facts tells no usage event, and without a line is in no statement.
    return None if asked is None else asked._replace(line="", facts={}, in_doubt=Basis.NONE)


async def _charge(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> None:
    """Who pays, what it costs, and what it is charged together with."""
    pin(call, charge)
    try:
        await find_payer(call, charge, arguments)
    except PayerError as failure:
        raise call.refused(Refusal(Reason.PAYER, charge.line)) from failure
    await find_price(call, charge, arguments)
    if "credits" in call.opening.features:
        call.once = await once(call, charge, arguments)
    if not call.exempt:
        call.shared = await shared_key(call, charge, arguments)
    if call.price is FREE and "credits" in call.opening.features:
        await continued(call, charge)
    call.trace = current_trace()
    call.facts = _facts(call, await ids_of(call, charge, arguments) if charge.correlates else None)


async def _decide(
    call: Call,
    charge: ChargePolicy | None,
    rates: tuple[RatePolicy, ...],
    asked: Admit,
    arguments: Mapping[str, Any],
) -> Decision | None:
    """The store's decision, and the call marked by it; None where it gave none and the layers let calls pass then."""
    try:
        decision = await _answered(call, charge, rates, asked, arguments, call.metering.decide)
    except StoreError as failure:
        await without_store(call, charge, rates, asked, failure)
        return None
    _mark(call, asked, decision)
    return decision


def _mark(call: Call, asked: Admit, decision: Decision) -> None:
    """Tell *call* what was decided; raises `CallRefused`."""
    if decision.refusal is not None:
        raise call.refused(leveled(decision.refusal, _rates_of(call)), decision)
    if decision.replay is not None:
        raise call.refused(Refusal(Reason.REPLAYED, "idempotency"), decision)
    call.decision = decision
    call.held = decision.held
    call.ttl_s = asked.ttl_s
    if leaves_hold(asked):
        call.has_hold = True
    if decision.payer:
        call.payer = decision.payer


def _rates_of(call: Call) -> tuple[RatePolicy, ...]:
    return call.policy.rates if call.policy is not None else ()


def leaves_hold(asked: Admit) -> bool:
    """
    Whether an admission has something to end.

    Also of 0: what it uses is charged in full, and nothing but a hold can be settled.
    """
    return bool(
        asked.sources
        or asked.leases
        or asked.idempotency is not None
        or any(limit.meter != REQUESTS for limit in asked.limits)
    )


async def foresee(call: Call) -> Decision:
    """
    What the store would decide on the charge of *call* now; nothing is held, and its rates are not asked (S0.37).

    Raises:
        PayerError: Who pays could not be resolved.
        StoreError: No answer came.
    """
    charge = call.policy.charge if call.policy is not None else None
    if charge is None:
        raise ConfigurationError("A call without a price has nothing to foresee. Give it one.")
    call.exempt = call.caller is not None and call.caller.exempt
    pin(call, charge)
    await find_payer(call, charge, {})
    await find_price(call, charge, {})
    call.once = await once(call, charge, {})
    call.shared = await shared_key(call, charge, {})
    asked = await _operation(call, charge, (), {}, time.time())
    if asked is None:
        return Decision(call.id, time.time())
    return await _answered(call, charge, (), asked, {}, call.metering.foresee)


async def _answered(
    call: Call,
    charge: ChargePolicy | None,
    rates: tuple[RatePolicy, ...],
    asked: Admit,
    arguments: Mapping[str, Any],
    ask: Callable[[Admit], Awaitable[Decision]],
) -> Decision:
    """What the store decides on *asked*, by *ask*; raises `StoreError` without an answer that fits its own time."""
    decision = await ask(asked)
    if decision.stale_calendar:
        # Our clock and the store's disagree about the day: once more, around the store's time.
        again = await _operation(call, charge, rates, arguments, decision.now)
        decision = await ask(again or asked)
    return _fitting(decision)


def _fitting(decision: Decision) -> Decision:
    if decision.stale_calendar:
        raise StoreError(f"The store's time {decision.now} does not fit any calendar around it.")
    return decision


async def hold_more(call: Call, charge: ChargePolicy, to: int, debt: int) -> Decision:
    """
    Ask the store for a hold of *to* smallest parts for a call that runs, or of whatever more there is.

    Only the sources of the payer object that admitted it are asked (DESIGN 4 "Sources"), its wallet with *debt* beyond
    its own overdraft. A refusal changes nothing. Raises `StoreError` without an answer; the same may be asked again.
    """
    group = call.decision.group if call.decision is not None else ""

    async def decided(now: float) -> Decision:
        own = tuple(
            source._replace(overdraft=source.overdraft + debt) if isinstance(source, WalletSource) else source
            for source in source_asks(call, charge, now)
            if source.group == group
        )
        return await call.metering.grow(Grow(call.id, to, call.held + 1, own))

    decision = await decided(time.time())
    if decision.stale_calendar:
        decision = await decided(decision.now)
    return _fitting(decision)


async def asked_of(call: Call, charge: ChargePolicy, now: float) -> tuple[SourceAsk, ...]:
    """
    What *call* would ask of its sources around *now*.

    Raises:
        PayerError: Who pays could not be resolved.
    """
    pin(call, charge)
    await find_payer(call, charge, {})
    return source_asks(call, charge, now)


# -- who ---------------------------------------------------------------------------------------------------


async def _identify(call: Call, rates: tuple[RatePolicy, ...], *, charged: bool) -> None:
    """
    Who calls. Where `identify` fails, nobody is charged in the caller's place, and nobody is counted by another key.

    Limits per address, or by a computed key, and reports without the gate do without an identity.
    """
    try:
        caller = await call.identify()
    except IdentityError as failure:
        call.metering.alarms.raised("identify", str(failure), failure)
        if not charged and not any(map(by_identity, rates)):
            if call.beside is not None:
                call.beside.identity_down = True
            return
        raise call.refused(Refusal(Reason.IDENTITY_DOWN, "identify")) from failure
    if caller is None and charged:
        raise call.refused(Refusal(Reason.UNAUTHENTICATED, "identify"))
    if caller is not None:
        call.payer = caller.payer


# -- the operation -----------------------------------------------------------------------------------------


async def _operation(
    call: Call,
    charge: ChargePolicy | None,
    rates: tuple[RatePolicy, ...],
    arguments: Mapping[str, Any],
    now: float,
) -> Admit | None:
    """What to ask the store; None when there is nothing to decide."""
    amount, minimum = amounts_of(call)
    # A measured call holds even 0: a settlement above the hold posts in full (S3.7), and a debtor is not let in.
    holds = charge is not None and (amount or _is_measured(call))
    limits: list[LimitAsk] = []
    leases: list[LeaseAsk] = []
    for rate in rates:
        await count_by(call, rate, arguments, now, limits, leases)
    if not holds and not limits and not leases and call.once is None:
        return None
    return Admit(
        call.id,
        call.payer or "",
        call.unit.name,
        amount,
        minimum,
        source_asks(call, charge, now) if holds and charge is not None else (),
        tuple(distinct(limits) if len(limits) > 1 else limits),
        tuple(leases),
        charge.ttl_s if charge is not None else call.metering.ttl_s,
        charge.grace_s if charge is not None else call.metering.grace_s,
        in_doubt_of(charge),
        call.line,
        call.facts,
        key_ask(call, charge.key, now) if holds and charge is not None else None,
        call.once,
    )


def _is_measured(call: Call) -> bool:
    """Whether what *call* costs is known only at its end."""
    return call.price is not None and not isinstance(call.price, FixedPrice) and not call.exempt


def _facts(call: Call, ids: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What the usage event says of the admission: enough to write it when this process is gone."""
    caller = call.caller
    told: dict[str, Any] = {"line": call.line, "started_at": call.started_at, **call.trace}
    if caller is not None:
        told["caller"] = caller.id
        if caller.type is not None:
            told["caller_type"] = caller.type
        if caller.attributes:
            told["attributes"] = dict(caller.attributes)
    origin = call.opening.origin
    if origin is None:
        told.update(ids_around(call))
    else:
        told["request_id"] = origin.request_id or call.id
    if ids is not None:
        told.update(ids)
    drops = call.metering.drops.get(call.line) if call.metering.drops else None
    return told if drops is None else without(told, drops)
