"""
Billing: what one ended call is charged, and on what basis.

Puts together what was seen of the end, the route's policy, the price and what was measured. Asks no store.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from asgi_metering.breakdown import unit_attributes, upstream_attributes
from asgi_metering.counting import usage_of
from asgi_metering.dropping import without
from asgi_metering.errors import AmountError, UsageError
from asgi_metering.itemised import DOUBTS, calls_of, costed, costing_attributes
from asgi_metering.measuring import (
    Metered,
    asked_upstream,
    failed_in_band,
    metered_usage,
    observed_usage,
    problems_of,
    read_session,
)
from asgi_metering.prices import Costing, FixedPrice, MeasuredPrice
from asgi_metering.prices.values import EXACT
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.ending import DEFAULT_END_POLICY, Cause, EndPolicy, Sighting, Situation, situation
from asgi_metering.rules.operations import End
from asgi_metering.rules.state import build
from asgi_metering.tokens import DEFAULT_ENCODING
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.values import AXES, REFUSING, UNREAD

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.call_state import Reply

__all__ = ["beyond_count", "bill", "bill_now", "observed_parts"]

log = logging.getLogger("asgi_metering")

PROBLEMS = "metering.usage.problems"
"""What a usage event says of reports that were odd: the codes of `UsageReport.problems`, with commas between them."""

PAYER_NAME, PAYER_SWITCHED = "metering.payer.name", "metering.payer.switched"
"""What it says of who pays, on routes that name payers."""

_ONE_PAYER: Mapping[str, Any] = {}


def sighting(call: Call, reported: bool) -> Sighting:
    """What was seen of the call's end; an error inside of the answer is a failure of the call."""
    failed = call.failure is not None or failed_in_band(call)
    return Sighting(_cause(call), call.status, call.first_byte, failed, reported)


def _cause(call: Call) -> Cause:
    """Why the call has ended, as far as its charge goes: what was done for a client that left was done."""
    return _COMPLETED if call.drained else call.cause or _COMPLETED


async def bill(call: Call) -> tuple[End, Metered]:
    """
    What to charge *call*, as the operation that ends its hold.

    Never raises for bad usage, nor for a price that raises, whatever it raises: what cannot be priced falls back to
    the policy for missing usage, with an alarm (DESIGN 2 "never a crash of a settlement").
    """
    price = call.price
    fixed = isinstance(price, FixedPrice)
    await read_session(call)
    known = _safe_usage(call)
    _tell_doubts(call)
    seen = sighting(call, reported=fixed or known.complete)
    row = situation(seen)
    policy = _policy(call)
    basis = policy.session_basis(row) if call.opening.is_session else policy.basis(row)
    if basis is Basis.USAGE and not fixed and not known.complete:
        basis = policy.basis(Situation.UNREPORTED)
    if price is None or isinstance(price, FixedPrice) or call.exempt:
        return _unmeasured(call, basis, await _counted(call, known), seen, row)
    amount, used, estimated, basis = await _measured_amount(call, basis, known, policy)
    if used.costing is not None and used.costing.flags:
        _doubt(call, used.costing)
    return _end(call, amount, basis, used, seen, row, estimated=estimated), used


def bill_now(call: Call) -> End | None:
    """The same, where nothing that passed has to be read for it: the price is fixed, and nobody watched. Else None."""
    if call.observer is not None or call.exchanges or call.reports or call.witnesses is not None:
        return None
    if call.is_plain and call.cause is _COMPLETED and call.price is not None:
        status = call.status
        # Of an end like nearly all: a whole answer, and nothing else to be told of it.
        if (status is None or status < 400) and not (call.failure is not None or call.attributes or call.drained):
            return _whole(call, status)
    price = call.price
    fixed = isinstance(price, FixedPrice)
    if not (fixed or price is None or call.exempt):
        return None
    # fmt: off
    seen = build(Sighting, (
        _cause(call), call.status, call.first_byte, call.failure is not None, fixed,
    ))
    # fmt: on
    row = situation(seen)
    policy = _policy(call)
    # Asked of the one row that differs: most calls are none of a session.
    is_apart = row is _FAILED_LATE and call.opening.is_session
    basis = policy.session_basis(row) if is_apart else policy.basis(row)
    return _unmeasured(call, basis, _NOTHING, seen, row)[0]


def _whole(call: Call, status: int | None) -> End:
    """
    The end of a plain call that was answered whole, with *status*.

    What the rest of this room finds out of such a call step by step, in one: its price is fixed, so that all of its
    usage counts as reported, and no policy may choose another basis for that (`END_OF_CALL`); it is charged what it
    holds, which nobody shares and nothing changed.
    """
    event = None
    if "events" in call.opening.features and call.metering.sinks:
        event = {**_TOLD_WHOLE, "status": status}
    return build(End, (call.id, call.held, _USAGE, False, _BY_CALL, {}, event, False, None))


_TOLD_WHOLE: Mapping[str, Any] = {
    "outcome": Cause.COMPLETED.value,
    "reason": Situation.REPORTED.value,
    "status": None,
    "usage_source": None,
    "model": None,
    "provider": None,
}
"""What a usage event says of such an end: as `_event` does."""

_NOTHING = Metered()

# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_COMPLETED, _FAILED_LATE = Cause.COMPLETED, Situation.FAILED_LATE
_NONE, _OBSERVED, _HOLD, _USAGE = Basis.NONE, Basis.OBSERVED, Basis.HOLD, Basis.USAGE
_BY_CALL = EndedBy.CALL


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
    reply = None if call.reply is None else _reply(call.reply, seen)
    # fmt: off
    return build(End, (
        call.id, amount, basis, estimated, _BY_CALL, _actual(used, row), _event(call, used, seen, row),
        row not in DONE, reply,
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


def _reply(reply: Reply, seen: Sighting) -> Mapping[str, Any] | None:
    """The answer for repeats of the request: a whole one, and no other."""
    return reply.told() if seen.cause is _COMPLETED else None


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
    if basis is _NONE or (basis is _OBSERVED and not call.first_byte):
        return None
    return call.held if basis is _HOLD and call.tally is not None else _due(call)


def _due(call: Call) -> int:
    """
    The fixed price, as it was held; of a session that is charged per message or second what it has used.

    Also of a call that joined others: whichever of them succeeds first pays for all, and the store knows which.
    """
    if call.tally is not None:
        return call.tally.due
    decision, price = call.decision, call.price
    if decision is not None and decision.joined and isinstance(price, FixedPrice):
        return call.unit.parts(price.amount)
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


def _tell_doubts(call: Call) -> None:
    """
    Raise the alarm over reports that are refused, and over bodies that nobody here can read.

    Each is counted; the log hears of each kind now and then, since every call of such a provider may bring one.
    """
    problems = problems_of(call)
    refused = [problem for problem in problems if problem in REFUSING]
    if refused:
        failure = UsageError(f"What was reported of call {call.id!r} is not believed: {', '.join(refused)}.")
        call.metering.alarms.raised(f"usage {refused}", f"{failure} It counts as not reported.", failure)
        _alarm(call)
    unread = [problem for problem in problems if problem in UNREAD]
    if unread:
        failure = UsageError(f"The body of call {call.id!r} cannot be decoded: {', '.join(unread)}.")
        mend = "Install asgi-metering[compression] for Brotli and Zstandard." if "no_decoder" in unread else ""
        call.metering.alarms.raised(f"usage {unread}", f"{failure} Its usage is not known. {mend}", failure)
        _alarm(call)


def _doubt(call: Call, costing: Costing) -> None:
    """Tell that a cost is not what it should be: money may be lost, or asked for in vain (S3.20, S3.21)."""
    for flag in costing.flags:
        call.metering.meters.count("costs_doubtful", line=call.line, problem=flag)
        models = sorted({str(each.call.model) for each in costing.calls if flag in each.flags})
        told = f"{DOUBTS.get(flag, flag)}: {', '.join((f'call {call.id} of line {call.line}', *models))}."
        call.metering.alarms.raised(f"cost {flag}", told, UsageError(flag))


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
        amount, seen = await _estimated(call, price, known)
        return amount, seen, True
    used = known if basis is Basis.USAGE else await observed_usage(call, known)
    if used.usage is None:
        return None, used, False
    costing = await costed(call, price, used)
    return call.unit.round(costing.amount), replace(used, costing=costing), used.estimated


async def _estimated(call: Call, price: MeasuredPrice, known: Metered) -> tuple[int, Metered]:
    """
    (smallest parts, what is known of the usage): the estimate, which stands for what nobody reported.

    It is never more than what is held, and never less than what was observed: what the call's answers reported, all of
    them or some, and the text of a model that passed. Text of a shape that nobody knows is a guess like the estimate,
    and no better one. What was observed is told as the usage where it is charged.
    """
    estimate = call.estimate
    # A first slice estimates nothing of the whole.
    is_slice = call.charge is not None and call.charge.hold.slices is not None
    amount = 0
    if not is_slice:
        amount = call.held
        if isinstance(estimate, TokenUsage):
            # Of `up_to` less may be held, and the work was capped to that: a guess makes no debt.
            amount = min(amount, call.unit.round(EXACT.multiply(price.cost(estimate), call.dearer)))
    seen = await observed_usage(call, known, guesses=is_slice or known.usage is not None)
    if seen.usage is None:
        return amount, known
    costing = await costed(call, price, seen)
    more = call.unit.round(costing.amount)
    return (more, replace(seen, costing=costing)) if more > amount else (amount, known)


async def observed_parts(call: Call) -> int:
    """Smallest parts that the call owes so far, for its heartbeat; 0, with an alarm, where it cannot be priced."""
    if call.exempt:
        return 0
    if isinstance(call.price, FixedPrice):
        return _due(call) if call.first_byte else 0
    try:
        await read_session(call)
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
        "outcome": Cause.CLIENT_GONE.value if call.drained else _outcome(seen),
        "reason": call.failure or row._value_,
        "status": call.status,
        "usage_source": used.source,
        "model": used.model,
        "provider": used.provider,
    }
    if used.usage is not None:
        told["usage"] = usage_dict(used.usage)
    more: dict[str, Any] = dict(call.attributes)
    if call.tally is not None:
        more.setdefault(f"{call.tally.per}s", call.tally.count)
    # Of most calls there is nothing to say: their price is fixed, and nobody counted.
    if used.usage is not None or type(call.price) is not FixedPrice:
        more.update(_price_attributes(call, used))
    if call.beside is not None:
        more.update(call.beside.told())
    if call.observer is not None or call.exchanges:
        problems = problems_of(call)
        if problems:
            more[PROBLEMS] = ",".join(problems)
    several = bool(call.exchanges) or call.witnesses is not None or len(call.reports) > 1
    if several or (call.opening.is_session and call.observer is not None):
        more.update(upstream_attributes(call, used))
    if call.exchanges and used.provider is None:
        # Nobody told what they used; whose calls they were is known all the same.
        _, model, told["provider"] = asked_upstream(call, used.source)
        told["model"] = used.model or model
    if used.usage is not None:
        more.update(unit_attributes(calls_of(call, used)))
    more.update(_payer_attributes(call))
    if more:
        # Beside what the caller brought along, which the admission has told.
        told["attributes"] = {**call.facts.get("attributes", {}), **more}
    drops = call.metering.drops.get(call.line) if call.metering.drops else None
    return told if drops is None else without(told, drops)


def _payer_attributes(call: Call) -> Mapping[str, Any]:
    """Which of its route's payers pays, and whether that is another than the first choice (S0.38)."""
    name = call.payer_name
    if name is None:
        return _ONE_PAYER
    told: dict[str, Any] = {PAYER_NAME: name} if name else {}
    return {**told, PAYER_SWITCHED: True} if call.payer_switched else told


def _price_attributes(call: Call, used: Metered) -> dict[str, Any]:
    """By what prices it is charged, and by what encoding it was counted, where it was (S2.34, S3.27)."""
    told = {} if used.costing is None else costing_attributes(used.costing)
    version = getattr(call.price, "version", None)
    if version is not None:
        told.setdefault("metering.price.version", version)
    if used.source == "tokenizer" and used.usage is not None:
        told["metering.usage.encoding"] = DEFAULT_ENCODING
    return told


def usage_dict(usage: TokenUsage) -> dict[str, int]:
    """The reported counts of *usage*, by name; what was not reported is absent."""
    return {name: count for name in AXES if (count := getattr(usage, name)) is not None}


def _outcome(seen: Sighting) -> str:
    cause, status, _, failed, _ = seen
    failed = failed or (status is not None and status >= 400)
    return Cause.ERROR.value if failed and cause is _COMPLETED else cause._value_
