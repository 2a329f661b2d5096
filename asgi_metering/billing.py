"""
Billing: what one ended call is charged, and on what basis.

Puts together what was seen of the end, the route's policy, the price and what was measured. Asks no store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from asgi_metering.counting import usage_of
from asgi_metering.errors import AmountError, UsageError
from asgi_metering.measuring import Metered, failed_in_band, metered_usage, observed_usage
from asgi_metering.prices import FixedPrice, MeasuredPrice
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.ending import DEFAULT_END_POLICY, Cause, EndPolicy, Sighting, Situation, situation
from asgi_metering.rules.operations import End
from asgi_metering.rules.state import build
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["beyond_count", "bill", "bill_now", "observed_parts"]

log = logging.getLogger("asgi_metering")


def sighting(call: Call, reported: bool) -> Sighting:
    """What was seen of the call's end; an error inside of the answer is a failure of the call."""
    failed = call.failure is not None or failed_in_band(call)
    return Sighting(call.cause or Cause.COMPLETED, call.status, call.first_byte, failed, reported)


async def bill(call: Call) -> tuple[End, Metered]:
    """
    What to charge *call*, as the operation that ends its hold.

    Never raises for bad usage, nor for a price that raises, whatever it raises: what cannot be priced falls back to
    the policy for missing usage, with an alarm (DESIGN 2 "never a crash of a settlement").
    """
    price = call.price
    fixed = isinstance(price, FixedPrice)
    known = _safe_usage(call)
    seen = sighting(call, reported=fixed or known.complete)
    row = situation(seen)
    policy = _policy(call)
    basis = policy.session_basis(row) if call.opening.is_session else policy.basis(row)
    if basis is Basis.USAGE and not fixed and not known.complete:
        basis = policy.basis(Situation.UNREPORTED)
    if price is None or isinstance(price, FixedPrice) or call.exempt:
        return _unmeasured(call, basis, await _counted(call, known), seen, row)
    amount, used, estimated, basis = await _measured_amount(call, basis, known, policy)
    return _end(call, amount, basis, used, seen, row, estimated=estimated), used


def bill_now(call: Call) -> End | None:
    """The same, where nothing that passed has to be read for it: the price is fixed, and nobody watched. Else None."""
    price = call.price
    if call.observer is not None or call.exchanges or call.reports:
        return None
    if not (price is None or isinstance(price, FixedPrice) or call.exempt):
        return None
    fixed = isinstance(price, FixedPrice)
    seen = Sighting(call.cause or Cause.COMPLETED, call.status, call.first_byte, call.failure is not None, fixed)
    row = situation(seen)
    policy = _policy(call)
    # Asked of the one row that differs: most calls are none of a session.
    is_apart = row is Situation.FAILED_LATE and call.opening.is_session
    basis = policy.session_basis(row) if is_apart else policy.basis(row)
    return _unmeasured(call, basis, _NOTHING, seen, row)[0]


_NOTHING = Metered()


def _unmeasured(call: Call, basis: Basis, used: Metered, seen: Sighting, row: Situation) -> tuple[End, Metered]:
    """What a call is charged whose usage says nothing of that: a fixed price, or nothing."""
    amount = None
    if call.exempt:
        # Its hold is of limits and slots alone, and what it used is nobody's charge.
        basis = Basis.NONE
    elif call.price is not None:
        amount = _fixed_amount(call, basis)
    return _end(call, amount, basis, used, seen, row), used


def _end(
    call: Call,
    amount: int | None,
    basis: Basis,
    used: Metered,
    seen: Sighting,
    row: Situation,
    *,
    estimated: bool = False,
) -> End:
    told, reply = _event(call, used, seen, row), _reply(call, seen)
    # fmt: off
    return build(End, (
        call.id, amount, basis, estimated, EndedBy.CALL, _actual(used, row), told, row not in DONE, reply,
    ))
    # fmt: on


def beyond_count(call: Call, end: End, failure: AmountError) -> End:
    """
    What to charge *call* instead, whose *end* is more than its account can count beside what it has spent and holds.

    By the policy for missing usage, as where usage cannot be believed: what is held can always be counted. With an
    alarm, and the amount that was not charged on the event (DESIGN "Amounts").
    """
    basis = _unbelieved(_policy(call))
    amount = None if basis is Basis.NONE else call.held
    log.error(
        "The end of call %s is charged by %s, %s instead of %s smallest parts: %s",
        call.id,
        basis.value,
        amount or 0,
        end.amount,
        failure,
        exc_info=failure,
    )
    _alarm(call)
    told = end.event
    if told is not None:
        uncharged = (end.amount or 0) - (amount or 0)
        known = {**call.facts, **told}.get("attributes", {})
        told = {**told, "attributes": {**known, "uncharged_amount": uncharged}}
    return end._replace(amount=amount, basis=basis, estimated=True, event=told)


def _policy(call: Call) -> EndPolicy:
    charge = call.charge
    return charge.end if charge is not None and isinstance(charge.end, EndPolicy) else DEFAULT_END_POLICY


def _unbelieved(policy: EndPolicy) -> Basis:
    """By what a call is charged whose usage cannot be priced: what would be, were it missing, without looking at it."""
    basis = policy.basis(Situation.UNREPORTED)
    return Basis.HOLD if basis in (Basis.OBSERVED, Basis.ESTIMATE) else basis


DONE = frozenset({Situation.REPORTED, Situation.UNREPORTED})
"""Ends of calls that did their work. After another one that charges nothing either, the request may be made again."""


def _reply(call: Call, seen: Sighting) -> Mapping[str, Any] | None:
    """The answer for repeats of the request: a whole one, and no other."""
    return call.reply.told() if call.reply is not None and seen.cause is Cause.COMPLETED else None


def _safe_usage(call: Call) -> Metered:
    try:
        return metered_usage(call)
    except UsageError as failure:
        log.error("The usage of call %s adds up to nonsense: %s", call.id, failure)
        _alarm(call)
        return Metered()


async def _counted(call: Call, known: Metered) -> Metered:
    """What limits count of a call that is not charged by usage: of an answer that broke what was observed."""
    if known.complete or known.usage is None or not call.counts_usage:
        return known
    try:
        return await observed_usage(call, known)
    except UsageError:
        return known


def _fixed_amount(call: Call, basis: Basis) -> int | None:
    """A fixed price is observed in full once a byte went out, zero before."""
    if basis is Basis.NONE or (basis is Basis.OBSERVED and not call.first_byte):
        return None
    return call.held if basis is Basis.HOLD and call.tally is not None else _due(call)


def _due(call: Call) -> int:
    """
    The fixed price, as it was held; of a session that is charged per message or second what it has used.

    Also of a call that joined others: whichever of them succeeds first pays for all, and the store knows which.
    """
    if call.tally is not None:
        return call.tally.due
    if call.joined and isinstance(call.price, FixedPrice):
        return call.unit.parts(call.price.amount)
    return call.held


async def _measured_amount(
    call: Call, basis: Basis, known: Metered, policy: EndPolicy
) -> tuple[int | None, Metered, bool, Basis]:
    try:
        amount, used, estimated = await _priced(call, basis, known)
    except Exception as failure:
        log.error("Call %s cannot be charged by %s: %r", call.id, basis.value, failure, exc_info=failure)
        _alarm(call)
        basis = _unbelieved(policy)
        amount, used, estimated = await _priced(call, basis, Metered())
    return amount, used, estimated, basis


def _alarm(call: Call) -> None:
    call.metering.meters.count("usage_rejected", line=call.line)


async def _priced(call: Call, basis: Basis, known: Metered) -> tuple[int | None, Metered, bool]:
    """(smallest parts or None for nothing, the usage behind them, whether anything was estimated)."""
    price = call.price
    if basis is Basis.NONE or price is None or isinstance(price, FixedPrice):
        return None, known, False
    if basis is Basis.HOLD:
        return call.held, known, False
    if basis is Basis.ESTIMATE:
        return await _estimated(call, price, known), known, True
    used = known if basis is Basis.USAGE else await observed_usage(call, known)
    if used.usage is None:
        return None, used, False
    return call.unit.round(price.cost(used.usage)), used, used.estimated


async def _estimated(call: Call, price: MeasuredPrice, known: Metered) -> int:
    """
    The estimate; it stands for what nobody reported.

    So where some of the call's answers reported and others did not, it is never less than what was observed.
    """
    estimate = call.estimate
    if call.charge is not None and call.charge.hold.slices is not None:
        # A first slice estimates nothing of the whole.
        used = (await observed_usage(call, known)).usage
        return 0 if used is None else call.unit.round(price.cost(used))
    amount = call.unit.round(price.cost(estimate)) if isinstance(estimate, TokenUsage) else call.held
    if known.complete or known.usage is None:
        return amount
    seen = await observed_usage(call, known)
    return amount if seen.usage is None else max(amount, call.unit.round(price.cost(seen.usage)))


async def observed_parts(call: Call) -> int:
    """Smallest parts that the call owes so far, for its heartbeat; 0, with an alarm, where it cannot be priced."""
    if call.exempt:
        return 0
    if isinstance(call.price, FixedPrice):
        return _due(call) if call.first_byte else 0
    try:
        amount, _, _ = await _priced(call, Basis.OBSERVED, metered_usage(call))
    except Exception as failure:
        log.error("What call %s has used cannot be priced: %r", call.id, failure, exc_info=failure)
        _alarm(call)
        return 0
    return amount or 0


def _actual(used: Metered, row: Situation) -> dict[str, int]:
    """What weighted limits should have counted: nothing for work that failed, the usage where it is known."""
    usage = used.usage
    if usage is None:
        if row not in (Situation.FAILED_EARLY, Situation.GONE_EARLY):
            return {}
        usage = TokenUsage(input=0, output=0)
    meters = ("tokens", "input_tokens", "output_tokens")
    return {meter: count for meter in meters if (count := usage_of(meter, usage)) is not None}


def _event(call: Call, used: Metered, seen: Sighting, row: Situation) -> dict[str, Any] | None:
    """What the usage event says of the end; None where nobody wants events of this call."""
    if call.charge is None or "events" not in call.opening.features or not call.metering.sinks:
        return None
    told: dict[str, Any] = {
        "outcome": _outcome(seen),
        "reason": call.failure or row.value,
        "status": call.status,
        "usage_source": used.source,
        "model": used.model,
        "provider": used.provider,
    }
    if used.usage is not None:
        told["usage"] = usage_dict(used.usage)
    if call.attributes or call.tally is not None:
        told["attributes"] = dict(call.attributes)
    if call.tally is not None:
        told["attributes"].setdefault(f"{call.tally.per}s", call.tally.count)
    shadow = None if call.beside is None else call.beside.told()
    if shadow:
        told["attributes"] = {**(call.attributes or call.facts.get("attributes", {})), **shadow}
    return told


def usage_dict(usage: TokenUsage) -> dict[str, int]:
    """The reported counts of *usage*, by name; what was not reported is absent."""
    names = ("input", "output", "cached", "cache_write", "reasoning", "audio")
    return {name: count for name in names if (count := getattr(usage, name)) is not None}


def _outcome(seen: Sighting) -> str:
    failed = seen.failed or (seen.status is not None and seen.status >= 400)
    return Cause.ERROR.value if seen.cause is Cause.COMPLETED and failed else seen.cause.value
