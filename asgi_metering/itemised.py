"""
Itemised: each call of a model behind one metered call, and what all of them cost.

Puts what was measured before the price. Never decides what counts as used, nor what becomes of a cost.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Iterator
from dataclasses import replace
from decimal import Decimal
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asgi_metering.errors import UsageError
from asgi_metering.exchanges import Exchanges, Sum
from asgi_metering.prices.costing import CITATIONS, WEB_SEARCHES, Costing, ModelCall, breakdown
from asgi_metering.prices.units import SECONDS
from asgi_metering.prices.values import MeasuredPrice
from asgi_metering.usage import TokenUsage, UsageReader, UsageReport
from asgi_metering.witnesses import WITNESSES

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.measuring import Metered

__all__ = [
    "DOUBTS",
    "ERRORS",
    "answers_in",
    "answers_of",
    "calls_of",
    "costed",
    "costing_attributes",
    "counted_call",
    "model_call",
]

_NOTHING = Decimal(0)

Answer: TypeAlias = "tuple[str, UsageReader | Sum, UsageReport | None]"
"""(provider, who has read the body, what it reported so far)."""

ERRORS = 400
"""From here on a status says that an answer is an error."""

PRICE_TIMEOUT_S = 5.0
"""How long an async price may take: an end waits for it, and what takes longer falls back to the policy."""

MEDIA = re.compile(r"(?:^|[/.-])(?:gpt-image|dall-e|imagen|flux|stable-diffusion|sdxl|recraft|ideogram|sora|veo)\b")
"""Names of models that answer with images or films, whose tokens cannot be counted by their text (S3.20)."""

DOUBTS = {
    "unknown_model": "No price is known by the name of a model that it used",
    "default_price": "A model that it used is charged by the default price",
    "dearest_kind": "Nobody says what of its output is an image, so that all of it is charged as what costs most",
    "unknown_service": "The service tier of a model that it used has no factor, so that its tokens cost the usual",
    "unpriced_citations": "What a model cites has no price, so that it costs nothing",
    "cost_refused": "A cost that was reported cannot be believed, and was passed over",
    "cost_unresolved": "Nothing tells the cost of a model that it used, so that nothing is charged for that",
    "unpriced_units": "None of the units that it reported has a price, so that they cost nothing",
}
"""What may be wrong with a cost, by the flags of `Costing`."""


def answers_of(call: Call) -> list[Answer]:
    """Who answered each upstream exchange of *call* that succeeded, its reader, and what it reported so far."""
    return answers_in(call.exchanges)


def answers_in(exchanges: Exchanges) -> list[Answer]:
    """
    The same of any *exchanges*.

    Of very many exchanges the oldest are there as sums.

    An answer that was fetched (`UsageReader.fetched`) is there once, however often it was asked for, with what told
    most of it: background responses are polled, and stored ones are read again.
    """
    found = [(name, reader, reader.report()) for name, reader, status in exchanges.entries() if status < ERRORS]
    if not any(reader.fetched for _, reader, _ in found):
        return found
    kept: dict[object, Answer] = {}
    places: dict[tuple[str, str], object] = {}
    for each in found:
        name, reader, report = each
        shown = None if report is None or report.response_id is None else (name, report.response_id)
        if shown is not None and reader.fetched and exchanges.was_summed(*shown):
            continue
        place = places.get(shown) if shown is not None and reader.fetched else None
        if place is None:
            place = object()
            kept[place] = each
        elif _tells_more(report, kept[place][2]):
            kept[place] = each
        if shown is not None:
            places[shown] = place
    return list(kept.values())


def _tells_more(report: UsageReport | None, known: UsageReport | None) -> bool:
    if report is None or report.usage is None:
        return False
    return known is None or known.usage is None or (report.complete and not known.complete)


def model_call(report: UsageReport, provider: str | None, reader: UsageReader | Sum | None = None) -> ModelCall:
    """One exchange that told its usage, or the sum of several."""
    if isinstance(reader, Sum):
        return reader.call
    if report.usage is None:
        raise UsageError(f"The exchange {report!r} told no usage. Count it first.")
    return _called(
        report, ModelCall(report.usage, report.model, provider, report.cost, is_media=_is_media(report.model))
    )


def _called(report: UsageReport | None, call: ModelCall) -> ModelCall:
    """*call* with what its answer told besides tokens."""
    if report is None:
        return call
    told = ((WEB_SEARCHES, report.searches), (CITATIONS, report.citations))
    units = {name: Decimal(count) for name, count in told if count}
    if report.seconds is not None:
        units[SECONDS] = report.seconds
    if report.service is None and not units:
        return call
    return replace(call, service=report.service, units=MappingProxyType(units) if units else call.units)


def counted_call(
    usage: TokenUsage, model: str | None, provider: str | None, report: UsageReport | None = None
) -> ModelCall:
    """One exchange that did not tell all of its usage, so that it was counted here."""
    return _called(report, ModelCall(usage, model, provider, is_media=_is_media(model), estimated=True))


UNTOLD: Final = (None, "auto")
"""What an answer says of its service tier while nobody knows which one serves."""


def as_asked(call: Call, used: ModelCall) -> ModelCall:
    """
    *used*, of an answer that has not ended, as served by the tier that *call* asks for, if that is dearer.

    Until the answer says which one serves: else a stream would be observed, and cut, at the usual price to its end.
    """
    if call.asked_service is None or used.service not in UNTOLD:
        return used
    return replace(used, service=call.asked_service)


def _is_media(model: str | None) -> bool:
    return model is not None and MEDIA.search(model) is not None


def calls_of(call: Call, used: Metered) -> tuple[ModelCall, ...]:
    """Each call of a model behind *call*, by the source that counts, as far as that tells them apart."""
    if used.calls or used.usage is None:
        return used.calls
    found = tuple(_reported(call, used))
    return found or (ModelCall(used.usage, used.model, used.provider, estimated=used.estimated),)


def _reported(call: Call, used: Metered) -> Iterator[ModelCall]:
    if used.source == "handler":
        for said in call.reports:
            yield ModelCall(said.usage, said.model, said.provider, said.cost, None, said.units)
    elif used.source in WITNESSES and call.witnesses is not None:
        for told in call.witnesses.told(used.source):
            # A library's own reckoning, and no provider's (S3.20).
            yield told.as_call()
    elif used.source == "upstream":
        for provider, reader, report in answers_of(call):
            if report is not None and report.usage is not None:
                yield model_call(report, provider, reader)
    elif used.source == "body" and call.observer is not None:
        answers = call.observer.answers
        for provider, reader, report in [] if answers is None else answers_in(answers):
            if report is not None and report.usage is not None:
                yield model_call(report, provider or used.provider, reader)
        report = call.observer.report()
        if report is not None and report.usage is not None:
            yield model_call(report, used.provider)


async def costed(call: Call, price: MeasuredPrice, used: Metered) -> Costing:
    """
    What *used* costs by *price*: each call of a model by itself, where the price looks at them so.

    Raises whatever the price does; an async one that takes longer than `PRICE_TIMEOUT_S` raises `TimeoutError`.
    """
    bill = getattr(price, "bill", None)
    if bill is None or used.usage is None:
        return Costing(price.cost(used.usage)) if used.usage is not None else Costing(_NOTHING)
    answer = bill(calls_of(call, used), call)
    costing = await asyncio.wait_for(answer, PRICE_TIMEOUT_S) if isinstance(answer, Awaitable) else answer
    if not isinstance(costing, Costing):
        raise UsageError(f"The price {price!r} billed {costing!r:.60}, which is no Costing. Return one.")
    return costing


def costing_attributes(costing: Costing) -> dict[str, Any]:
    """What a usage event says of a cost: its prices' version, what is wrong with it, and what each model cost.

    By name, in the currency of these prices; tokens by model are told of every call (`breakdown.MODELS`).
    """
    told: dict[str, Any] = {}
    if costing.version is not None:
        told["metering.price.version"] = costing.version
    if costing.flags:
        told["metering.price.flags"] = ",".join(costing.flags)
    if costing.version is not None:
        told["metering.price.models"] = breakdown(costing.calls)
    return told
