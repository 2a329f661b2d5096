"""
Asking for admission: from a policy and the endpoint's arguments to one operation, and from the answer to a call.

Resolves who calls, who pays, what it costs and which limits apply; decides nothing itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from asgi_metering.amounts import Unit, exact_amount
from asgi_metering.asking import (
    REQUESTS,
    by_identity,
    computed_key,
    distinct,
    key_of,
    lease_asks,
    limit_ask,
    limits_of,
    method_of,
    root_of_rate,
    source_asks,
)
from asgi_metering.beside import Beside
from asgi_metering.decisions import Decision, Reason, Refusal
from asgi_metering.errors import ConfigurationError, IdentityError, PayerError, StoreError
from asgi_metering.estimates import estimate_arguments
from asgi_metering.keying import key_ask, once, shared_key
from asgi_metering.messages import Counted, MessageLimits
from asgi_metering.names import check_key
from asgi_metering.outage import in_doubt_of, without_store
from asgi_metering.policies import (
    ESTIMATE,
    ChargePolicy,
    ComputedLimit,
    EndpointPolicy,
    From,
    RatePolicy,
    Slices,
    UpstreamPolicy,
)
from asgi_metering.prices import FixedPrice
from asgi_metering.quotas.headroom import Lack, Need
from asgi_metering.rates import RateLimit
from asgi_metering.receipts import Basis
from asgi_metering.rules.operations import (
    Admit,
    Grow,
    LeaseAsk,
    LimitAsk,
    SourceAsk,
    WalletSource,
)
from asgi_metering.rules.roots import rooted
from asgi_metering.sources import Wallet, check_payers
from asgi_metering.tally import first_slice
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.plans import Plan

__all__ = [
    "admit",
    "admit_now",
    "asked_of",
    "check_amounts",
    "foresee",
    "hold_more",
    "leaves_hold",
    "usage_of",
    "would_ask",
]

log = logging.getLogger("asgi_metering")

FREE = FixedPrice(Decimal(0))

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
    if not call.opening.is_flat or any(map(_needs_caller, counted)):
        asking = (*rates, *messages) if messages else rates
        await _identify(call, asking, charged=charge is not None and not call.exempt)
    asked = _planned(call, call.metering.plans.of(policy, features))
    if asked is None:
        if call.caller is not None and call.caller.exempt:
            call.exempt = True
            rates = tuple([rate for rate in map(_of_everybody, rates) if rate is not None])
            messages = tuple([rate for rate in map(_of_everybody, messages) if rate is not None])
        if policy.is_selective:
            rates = tuple([rate for rate in rates if await _counts(call, rate, arguments)])
        if messages:
            call.message_limits = await _message_limits(call, messages, arguments)
        if charge is not None:
            await _charge(call, charge, arguments)
        elif call.beside is not None and call.beside.charge is not None:
            _free(call, call.beside.charge)
        asked = await _operation(call, charge, rates, arguments, time.time())
    # Whoever asks may outlive its request: a task of the endpoint, a thread.
    call.opening.check()
    try:
        if policy.upstreams and "quotas" in features:
            await _reserve(call, policy, asked, arguments)
        await _ask(call, charge, rates, asked, arguments)
    except BaseException:
        if call.beside is not None:
            call.beside.release(call.metering.headroom)
        raise
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


def admit_now(call: Call) -> bool:
    """
    Admit *call*, where nothing about it has to wait: its plan is plain, it is known who calls, and so is the answer.

    Only for a store that answers at once. False where something has to: then `admit` does it, by the same id. Raises as
    that does.
    """
    metering, policy = call.metering, call.policy
    if policy is None:
        return False
    asked = _planned(call, metering.plans.of(policy, call.opening.features))
    # Asked behind the plan, which may be the first to name its unit: the store has to be told of its scale before.
    if asked is None or metering.has_new_units:
        return False
    try:
        decision = metering.store.run_now(asked)
    except Exception:  # noqa: BLE001 -- what is wrong is found and told on the way for everything else
        return False
    if not isinstance(decision, Decision) or decision.stale_calendar:
        return False
    _mark(call, asked, decision)
    return True


def _planned(call: Call, plan: Plan) -> Admit | None:
    """What a call with a plain plan asks, and the call told of it; None where more is to be found out."""
    if not plan.is_plain or not call.identify_now():
        return None
    caller = call.caller
    if caller is None or caller.exempt:
        return None
    call.payer = caller.payer
    charge = plan.charge
    if charge is not None and isinstance(charge.price, FixedPrice):
        call.charge, call.line, call.unit = charge, charge.line, plan.unit
        call.price, call.estimate = charge.price, charge.price.amount
        call.trace = call.metering.trace()
        call.facts = _facts(call)
    return plan.asked(call, call.started_at)


def _free(call: Call, charge: ChargePolicy) -> None:
    """A call whose charge is in the shadow: it costs nothing, and is told of."""
    call.exempt = True
    try:
        _pin(call, charge)
    except ConfigurationError as failure:
        # Of a unit that is known with another scale; its shadow meets the same.
        log.error("The shadow of %s cannot be told. %s", charge.line, failure)
        call.charge = None
        return
    call.trace = call.metering.trace()
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
        rates = tuple([rate for rate in map(_of_everybody, rates) if rate is not None])
    if any(rate.is_selective for rate in rates):
        rates = tuple([rate for rate in rates if await _counts(call, rate, arguments)])
    if charge is not None and call.price is None:
        # Keys are not claimed: each call is told by itself.
        charge = replace(charge, idempotency=None, key=None, once=None)
        _pin(call, charge)
        try:
            await _payer(call, charge, arguments)
        except PayerError as failure:
            raise call.refused(Refusal(Reason.PAYER, charge.line)) from failure
        await _price(call, charge, arguments)
    asked = await _operation(call, None if charge is None else call.charge, rates, arguments, now)
    # A row without facts tells no usage event, and without a line is in no statement.
    return None if asked is None else asked._replace(line="", facts={}, in_doubt=Basis.NONE)


async def _reserve(call: Call, policy: EndpointPolicy, asked: Admit | None, arguments: Mapping[str, Any]) -> None:
    """
    Count *call* as used of the providers that its policy requires.

    Raises:
        CallRefused: One has no room for it; or its idempotency key, which is looked for first, says something else.
    """
    metering, beside = call.metering, call.beside
    assert beside is not None  # noqa: S101 -- made for every policy with upstreams
    for upstream in policy.upstreams:
        is_shadow = upstream.shadow or metering.shadow
        try:
            need, label = await _need(call, upstream, arguments)
        except Exception:
            if not is_shadow:
                raise
            metering.meters.count("shadow_lost", line=beside.line, cause="computing")
            beside.tells_upstream = False
            continue
        lack, reservation = metering.headroom.reserve(upstream.provider, need, label=label, is_certain=is_shadow)
        if reservation is not None:
            beside.reserved.append(reservation)
        if lack is not None:
            refusal = _no_headroom(upstream, lack)
            if not is_shadow:
                await _known_key(call, asked)
                raise call.refused(refusal)
            metering.told_shadow(call, refusal)


async def _need(call: Call, upstream: UpstreamPolicy, arguments: Mapping[str, Any]) -> tuple[Need, str | None]:
    """What *call* takes of a provider, and under which label."""
    tokens, label = upstream.tokens, upstream.label
    if isinstance(tokens, From):
        tokens = await tokens.compute(call, arguments)
    if isinstance(label, From):
        label = await label.compute(call, arguments)
    if tokens == ESTIMATE:
        if call.asked is None:
            call.asked = await _expected(call, arguments)
        tokens = call.asked
    if isinstance(tokens, TokenUsage):
        return Need(upstream.requests, tokens.input or 0, tokens.output or 0, tokens.total or 0), label
    return Need(upstream.requests, tokens=tokens or 0), label


def _no_headroom(upstream: UpstreamPolicy, lack: Lack) -> Refusal:
    return Refusal(
        Reason.UPSTREAM,
        upstream.provider,
        lack.required,
        lack.available,
        limit=lack.limit,
        retry_after_s=lack.retry_after_s,
        detail=f"The provider {upstream.provider!r} has nothing left of {lack.resource!r}.",
    )


async def _known_key(call: Call, asked: Admit | None) -> None:
    """What is known of the idempotency key comes before a provider's headroom: a repeat needs none."""
    if asked is None or asked.idempotency is None:
        return
    try:
        decision = await call.metering.foresee(asked)
    except StoreError:
        return
    if decision.replay:
        raise call.refused(Refusal(Reason.REPLAYED, "idempotency"), decision)
    if decision.refusal is not None and decision.refusal.reason in (Reason.IN_FLIGHT, Reason.FINGERPRINT):
        raise call.refused(decision.refusal, decision)


async def _charge(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> None:
    """Who pays, what it costs, and what it is charged together with."""
    _pin(call, charge)
    try:
        await _payer(call, charge, arguments)
    except PayerError as failure:
        raise call.refused(Refusal(Reason.PAYER, charge.line)) from failure
    await _price(call, charge, arguments)
    if "credits" in call.opening.features:
        call.once = await once(call, charge, arguments)
    if not call.exempt:
        call.shared = await shared_key(call, charge, arguments)
    call.trace = call.metering.trace()
    call.facts = _facts(call)


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
        raise call.refused(_leveled(call, decision.refusal), decision)
    if decision.replay is not None:
        raise call.refused(Refusal(Reason.REPLAYED, "idempotency"), decision)
    call.decision = decision
    call.held = decision.held
    call.has_hold = leaves_hold(asked)
    call.ttl_s = asked.ttl_s
    call.payer = decision.payer or call.payer


def _leveled(call: Call, refusal: Refusal) -> Refusal:
    """*refusal* with the level of the limit that refused, where its name says one (S0.42)."""
    rates = call.policy.rates if call.policy is not None else ()
    if refusal.reason not in _OF_RATES:
        return refusal
    levels = [rate.level for rate in rates if rate.level and refusal.name.startswith(f"{rate.level}-")]
    return refusal._replace(level=max(levels, key=len)) if levels else refusal


_OF_RATES = (Reason.RATE_LIMIT, Reason.EXCEEDS_LIMIT)


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
    _pin(call, charge)
    await _payer(call, charge, {})
    await _price(call, charge, {})
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
    _pin(call, charge)
    await _payer(call, charge, {})
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


def _needs_caller(rate: RatePolicy) -> bool:
    """Whether anything of *rate* may depend on who calls: what is flat is asked of every request, known or not."""
    return by_identity(rate) or bool(rate.chosen or rate.callables())


def _of_everybody(rate: RatePolicy) -> RatePolicy | None:
    """What of *rate* an exempt caller is counted by: nothing that is counted by who it is (S0.18)."""
    if not by_identity(rate):
        return rate
    shared = tuple([slots for slots in rate.concurrency if slots.level == "global"])
    return replace(rate, limits=(), chosen=(), concurrency=shared) if shared else None


async def _counts(call: Call, rate: RatePolicy, arguments: Mapping[str, Any]) -> bool:
    """Whether *call* is one of those that *rate* counts: by its method, and by what the application says of it."""
    if rate.methods and method_of(call) not in rate.methods and call.opening.origin is not None:
        return False
    return rate.exempt_when is None or not await rate.exempt_when.compute(call, arguments)


async def _payer(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> None:
    """Whose balances the sources of *charge* stand for: all of them, before the one decision among them."""
    try:
        if charge.payer is not None:
            call.payer = check_key(await charge.payer.compute(call, arguments), "payer")
        for source in charge.sources:
            if source.payer is not None and not call.exempt and source.payer.name not in call.accounts:
                account = await source.payer.account_of(call, arguments)
                call.accounts = {**call.accounts, source.payer.name: account}
    except Exception as failure:
        # Never somebody else's money, and never for free (S0.25, S3.38).
        log.error("The payer of %s could not be resolved.", charge.line, exc_info=failure)
        raise PayerError(f"The payer of {charge.line!r} could not be resolved: {failure!r}.") from failure


# -- how much ----------------------------------------------------------------------------------------------


def _pin(call: Call, charge: ChargePolicy) -> None:
    """Say what the call is charged by, before anybody is asked who pays."""
    call.charge = charge
    call.line = charge.line
    call.unit = call.metering.counted(charge.unit)


async def _price(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> None:
    """
    Pin the price to the call and size its hold.

    A computed price may be finer than the unit and is rounded once, half up (DESIGN 2); a constant one was refused at
    import. A hold given as an amount says nothing of the tokens: the request itself does (`Call.asked`).
    """
    price = charge.price
    if charge.skip_if is not None and await charge.skip_if.compute(call, arguments):
        # The continuation of a turn that was charged: free work, and audited as that (S0.16).
        call.price, call.estimate = FREE, FREE.amount
        return
    if isinstance(price, From):
        answered = call.unit.exact(await price.compute(call, arguments), "price")
        price = FixedPrice(call.unit.whole(call.unit.round(answered)))
    call.price = price
    if isinstance(price, FixedPrice):
        call.estimate = price.amount
        return
    estimate = charge.hold.estimate
    if isinstance(estimate, From):
        estimate = await estimate.compute(call, arguments)
    if estimate is None:
        estimate = await estimate_arguments(arguments)
    if isinstance(estimate, TokenUsage):
        call.estimate = call.asked = estimate
        if charge.hold.slices is not None and estimate.input is None:
            # A slice of the output, behind all of the input.
            call.asked = await estimate_arguments(arguments)
            call.estimate = replace(estimate, input=call.asked.input)
    else:
        call.estimate = exact_amount(estimate, "hold estimate")
        call.asked = await estimate_arguments(arguments)


def _amounts(call: Call) -> tuple[int, int]:
    """(amount to hold, least that admits), smallest parts."""
    estimate, price, charge = call.estimate, call.price, call.charge
    if charge is None or estimate is None or price is None or call.exempt:
        return 0, 0
    if charge.per != "call":
        return first_slice(call, charge, price)
    if isinstance(estimate, TokenUsage):
        exact = Decimal(0) if isinstance(price, FixedPrice) else price.cost(estimate)
    else:
        exact = estimate
    amount = _fixed_parts(call.unit, exact) if isinstance(price, FixedPrice) else call.unit.round(exact)
    if charge.hold.at_least is None:
        return amount, amount
    return amount, min(amount, call.unit.parts(charge.hold.at_least, "least hold"))


@lru_cache(maxsize=1024)
def _fixed_parts(unit: Unit, price: Decimal) -> int:
    """Prices are few, and the same for every call of a route."""
    return unit.parts(price)


def check_amounts(charge: ChargePolicy, unit: Unit) -> None:
    """
    Check that *unit* can count every amount that *charge* names: before the first paying request, not on it.

    Raises:
        AmountError: One is too fine or too large.
    """
    if isinstance(charge.price, FixedPrice):
        unit.parts(charge.price.amount, "price")
    estimate = charge.hold.estimate
    if estimate is not None and not isinstance(estimate, From | TokenUsage):
        unit.parts(estimate, "hold")
    if charge.hold.at_least is not None:
        unit.parts(charge.hold.at_least, "least hold")
    if charge.hold.slices is not None:
        _check_slices(charge.hold.slices, unit)
    check_payers(charge.sources)
    for source in charge.sources:
        source.warning_level(unit)
        if isinstance(source, Wallet):
            unit.parts(source.overdraft, "overdraft")
        else:
            limits = source.limit.values() if isinstance(source.limit, Mapping) else (source.limit,)
            for limit in limits:
                unit.parts(limit, f"allowance {source.name!r}")


def _check_slices(slices: Slices, unit: Unit) -> None:
    for amount, what in ((slices.step, "step"), (slices.low_water, "low-water mark"), (slices.debt, "debt")):
        if amount is not None and not isinstance(amount, TokenUsage):
            unit.parts(amount, what)


# -- the operation -----------------------------------------------------------------------------------------


async def _operation(
    call: Call,
    charge: ChargePolicy | None,
    rates: tuple[RatePolicy, ...],
    arguments: Mapping[str, Any],
    now: float,
) -> Admit | None:
    """What to ask the store; None when there is nothing to decide."""
    amount, minimum = _amounts(call)
    # A measured call holds even 0: a settlement above the hold posts in full (S3.7), and a debtor is not let in.
    holds = charge is not None and (amount or _is_measured(call))
    limits: list[LimitAsk] = []
    leases: list[LeaseAsk] = []
    for rate in rates:
        await _limits(call, rate, arguments, now, limits, leases)
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


def _facts(call: Call) -> dict[str, Any]:
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
    request_id = origin.request_id if origin is not None else None
    told["request_id"] = request_id or call.id
    return told


async def _limits(
    call: Call,
    rate: RatePolicy,
    arguments: Mapping[str, Any],
    now: float,
    limits: list[LimitAsk],
    leases: list[LeaseAsk],
) -> None:
    if rate.asker is not None:
        limits += await rate.asker.asks(call, arguments, now)
        return
    key, root, cost = await _counted_by(call, rate, arguments)
    for limit in rate.limits if not rate.chosen else await _chosen(call, rate, arguments):
        taken = cost if limit.meter == REQUESTS else await _weight(call, limit, arguments)
        limits.append(limit_ask(rate, limit, rooted(key, root), taken, now))
    leases += lease_asks(rate, key, root)


async def _counted_by(call: Call, rate: RatePolicy, arguments: Mapping[str, Any]) -> tuple[str, str, int]:
    """The key that *rate* counts *call* by, the payer beside whose accounts that is kept, and what is taken."""
    wanted, cost = rate.key, rate.cost
    key = await computed_key(call, rate, wanted, arguments) if isinstance(wanted, From) else key_of(call, rate)
    if rate.per_method:
        key = f"{method_of(call)} {key}"
    root = root_of_rate(call, rate)
    return key, root, await cost.compute(call, arguments) if isinstance(cost, From) else cost


async def _message_limits(
    call: Call, rates: tuple[RatePolicy, ...], arguments: Mapping[str, Any]
) -> MessageLimits | None:
    """What the messages of a session are let in by; all that is computed is, once, from what it began with."""
    counted: list[Counted] = []
    for rate in rates:
        if not rate.is_selective or await _counts(call, rate, arguments):
            key, root, cost = await _counted_by(call, rate, arguments)
            limits = rate.limits if not rate.chosen else await _chosen(call, rate, arguments)
            counted += [Counted(rate, limit, rooted(key, root), cost) for limit in limits]
    return MessageLimits(call, counted) if counted else None


async def _chosen(call: Call, rate: RatePolicy, arguments: Mapping[str, Any]) -> list[RateLimit]:
    """The limits of *rate* for *call*, those that are computed last."""
    limits = list(limits_of(call, rate))
    for each in rate.chosen:
        if isinstance(each, ComputedLimit):
            answered = await each.function.compute(call, arguments)
            for text in answered if isinstance(answered, list | tuple) else (answered,):
                limits += each.reading.read_all(text)
    return limits


async def _weight(call: Call, limit: RateLimit, arguments: Mapping[str, Any]) -> int:
    """What a weighted limit takes by estimate; the call's end corrects it."""
    if call.asked is None:
        call.asked = await _expected(call, arguments)
    return usage_of(limit.meter, call.asked) or 0


async def _expected(call: Call, arguments: Mapping[str, Any]) -> TokenUsage:
    """What a call is expected to use that no layer charges: as its route would hold for it, or as its request says."""
    charge = call.policy.charge if call.policy is not None else None
    if charge is not None and (call.beside is None or call.beside.charge is None):
        estimate = charge.hold.estimate
        if isinstance(estimate, From):
            estimate = await estimate.compute(call, arguments)
        if isinstance(estimate, TokenUsage) and (charge.hold.slices is None or estimate.input is not None):
            return estimate
    return await estimate_arguments(arguments)


def usage_of(meter: str, usage: TokenUsage) -> int | None:
    """What *usage* counts on a meter: ``tokens``, ``input_tokens`` or ``output_tokens``."""
    counts = {"tokens": usage.total, "input_tokens": usage.input, "output_tokens": usage.output}
    return counts.get(meter)
