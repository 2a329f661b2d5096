"""
Billing: what one ended call is charged, and on what basis.

Puts together what was seen of the end, the route's policy, the price and the ranked sources of usage. Asks no store.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from asgi_metering.admission import usage_of
from asgi_metering.errors import AmountError, UsageError
from asgi_metering.prices import FixedPrice
from asgi_metering.receipts import Basis
from asgi_metering.rules.ending import Cause, EndPolicy, Sighting, Situation, situation
from asgi_metering.rules.operations import End
from asgi_metering.tokens import count_tokens_async
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["Metered", "bill", "metered_usage", "observed_parts"]

log = logging.getLogger("asgi_metering")


@dataclass(frozen=True, slots=True)
class Metered:
    """
    What is known of a call's usage, from the best source that said anything (DESIGN 6).

    Attributes:
        usage: The sum over the call's upstream calls, by that source; None if nobody reported.
        source: ``handler``, ``upstream``, ``body`` or ``tokenizer``.
        model, provider: As the source named them.
        complete: It is a final report, and not what had been seen until a stream broke.
        estimated: Something in it was estimated rather than counted.
    """

    usage: TokenUsage | None = None
    source: str | None = None
    model: str | None = None
    provider: str | None = None
    complete: bool = False
    estimated: bool = False


def metered_usage(call: Call) -> Metered:
    """The highest source that reported anything, for all of the call's upstream calls (S2.42)."""
    if call.reports:
        usage = TokenUsage()
        for report in call.reports:
            usage = usage + report.usage
        last = call.reports[-1]
        return Metered(usage, "handler", last.model, last.provider, complete=True)
    return _from_upstream(call) or _from_body(call) or Metered()


def _from_upstream(call: Call) -> Metered | None:
    usage: TokenUsage | None = None
    model = provider = None
    complete = True
    for name, reader, status in call.exchanges:
        report = reader.report() if status < 400 else None
        if report is None or report.usage is None:
            continue
        usage = report.usage if usage is None else usage + report.usage
        model, provider = report.model or model, name
        complete = complete and not report.partial
    return None if usage is None else Metered(usage, "upstream", model, provider, complete)


def _from_body(call: Call) -> Metered | None:
    report = call.observer.report() if call.observer is not None else None
    if report is None or report.usage is None:
        return None
    return Metered(report.usage, "body", report.model, report.dialect, complete=not report.partial)


async def _observed(call: Call, known: Metered) -> Metered:
    """
    What was delivered: a final report if there is one, else the input as far as it is known, and the output counted
    from the text that passed.
    """
    if known.complete:
        return known
    reader = call.observer.text_reader() if call.observer is not None else None
    text, extra_chars = "", 0
    if reader is not None:
        text = reader.text()
        extra_chars = max(0, reader.text_chars - len(text))
    counted = await count_tokens_async(text)
    output = counted.tokens + extra_chars // CHARS_PER_TOKEN
    seen = known.usage
    if seen is not None and seen.input is not None:
        given = seen.input
    else:
        given = (call.estimate.input or 0) if isinstance(call.estimate, TokenUsage) and call.first_byte else 0
    usage = TokenUsage(input=given, output=output, cached=seen.cached if seen is not None else None)
    model = reader_model(reader) or known.model
    return Metered(
        usage, "tokenizer", model, known.provider, estimated=counted.estimated or bool(extra_chars) or seen is None
    )


CHARS_PER_TOKEN = 4
"""What a token of usual text is long, for text past the bound of what is kept."""


def reader_model(reader: Any) -> str | None:
    """The model that a body named."""
    report = reader.report() if reader is not None else None
    return report.model if report is not None else None


def sighting(call: Call, reported: bool) -> Sighting:
    """What was seen of the call's end."""
    return Sighting(call.cause or Cause.COMPLETED, call.status, call.first_byte, call.failure is not None, reported)


async def bill(call: Call) -> tuple[End, Metered]:
    """
    What to charge *call*, as the operation that ends its hold.

    Never raises for bad usage: what cannot be priced falls back to the policy for missing usage, with an alarm.
    """
    charge = call.charge
    fixed = isinstance(call.price, FixedPrice)
    known = _safe_usage(call)
    seen = sighting(call, reported=fixed or known.complete)
    row = situation(seen)
    policy = charge.end if charge is not None and isinstance(charge.end, EndPolicy) else EndPolicy({})
    basis = policy.basis(row)
    if basis is Basis.USAGE and not fixed and not known.complete:
        basis = policy.basis(Situation.UNREPORTED)
    if fixed:
        amount, used, estimated = _fixed_amount(call, basis), known, False
    else:
        amount, used, estimated, basis = await _measured_amount(call, basis, known, policy)
    end = End(call.id, amount, basis, estimated, actual=_actual(used, row), event=_event(call, used, seen, row))
    return end, used


def _safe_usage(call: Call) -> Metered:
    try:
        return metered_usage(call)
    except UsageError as failure:
        log.error("The usage of call %s adds up to nonsense: %s", call.id, failure)
        call.metering.meters.count("usage_rejected", line=call.line)
        return Metered()


def _fixed_amount(call: Call, basis: Basis) -> int | None:
    """A fixed price is observed in full once a byte went out, zero before."""
    if basis is Basis.NONE or (basis is Basis.OBSERVED and not call.first_byte):
        return None
    return call.held


async def _measured_amount(
    call: Call, basis: Basis, known: Metered, policy: EndPolicy
) -> tuple[int | None, Metered, bool, Basis]:
    try:
        amount, used, estimated = await _priced(call, basis, known)
    except (AmountError, UsageError, ArithmeticError, ValueError) as failure:
        log.error("Call %s cannot be charged by %s: %s", call.id, basis.value, failure)
        call.metering.meters.count("usage_rejected", line=call.line)
        basis = policy.basis(Situation.UNREPORTED)
        if basis in (Basis.OBSERVED, Basis.ESTIMATE):
            basis = Basis.HOLD
        amount, used, estimated = await _priced(call, basis, Metered())
    return amount, used, estimated, basis


async def _priced(call: Call, basis: Basis, known: Metered) -> tuple[int | None, Metered, bool]:
    """(smallest parts or None for nothing, the usage behind them, whether anything was estimated)."""
    price = call.price
    if basis is Basis.NONE or price is None or isinstance(price, FixedPrice):
        return None, known, False
    if basis is Basis.HOLD:
        return call.held, known, False
    if basis is Basis.ESTIMATE:
        if not isinstance(call.estimate, TokenUsage):
            return call.held, known, True
        return call.unit.round(price.cost(call.estimate)), known, True
    used = known if basis is Basis.USAGE else await _observed(call, known)
    if used.usage is None:
        return None, used, False
    return call.unit.round(price.cost(used.usage)), used, used.estimated


async def observed_parts(call: Call) -> int:
    """Smallest parts that the call has used so far, for its heartbeat; 0 where nothing can be told."""
    if isinstance(call.price, FixedPrice):
        return call.held if call.first_byte else 0
    try:
        amount, _, _ = await _priced(call, Basis.OBSERVED, metered_usage(call))
    except (AmountError, UsageError, ArithmeticError, ValueError):
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
    if call.attributes:
        told["attributes"] = dict(call.attributes)
    return told


def usage_dict(usage: TokenUsage) -> dict[str, int]:
    """The reported counts of *usage*, by name; what was not reported is absent."""
    names = ("input", "output", "cached", "cache_write", "reasoning", "audio")
    return {name: count for name in names if (count := getattr(usage, name)) is not None}


def _outcome(seen: Sighting) -> str:
    failed = seen.failed or (seen.status is not None and seen.status >= 400)
    return Cause.ERROR.value if seen.cause is Cause.COMPLETED and failed else seen.cause.value
