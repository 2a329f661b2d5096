"""
Pricing a call: who pays it, by what price, and how much is held for it.

Works out what the policy leaves open, by the endpoint's arguments. Holds nothing and decides nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from asgi_metering.amounts import Unit, exact_amount
from asgi_metering.arguments import From
from asgi_metering.errors import PayerError
from asgi_metering.estimates import estimate_arguments
from asgi_metering.estimates.bodies import asked_searches, asked_service, body_of, model_of
from asgi_metering.holding import Slices
from asgi_metering.names import check_key
from asgi_metering.policies import ChargePolicy
from asgi_metering.prices import FixedPrice
from asgi_metering.prices.values import EXACT, reads_request
from asgi_metering.sources import Allowance, Wallet, check_payers
from asgi_metering.tally import first_slice
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["FREE", "amounts_of", "check_amounts", "find_payer", "find_price", "pin"]


log = logging.getLogger("asgi_metering")

FREE = FixedPrice(Decimal(0))
"""The price of a call that skips its charge, known by this very object."""


async def find_payer(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> None:
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
    if not call.exempt:
        await _find_limits(call, charge)


async def _find_limits(call: Call, charge: ChargePolicy) -> None:
    """What allowances allow whose limits are computed, pinned for the one decision (S4.17)."""
    plan = call.caller.plan if call.caller is not None else None
    for source in charge.sources:
        if isinstance(source, Allowance) and source.is_computed:
            payer = None if source.each else source.payer
            account = "" if payer is None else call.accounts.get(payer.name, "")
            limit = await source.limit_of(call, account or call.payer or "", plan)
            call.allowed = {**call.allowed, id(source): limit}


def pin(call: Call, charge: ChargePolicy) -> None:
    """Say what the call is charged by, before anybody is asked who pays."""
    call.charge = charge
    call.line = charge.line
    call.unit = call.metering.counted(charge.unit)


async def find_price(call: Call, charge: ChargePolicy, arguments: Mapping[str, Any]) -> None:
    """
    Pin the price to the call and size its hold.

    A computed price may be finer than the unit and is rounded once, half up (DESIGN 2); a constant one was refused at
    import. A hold given as an amount says nothing of the tokens: the request itself does (`Call.asked`), with all of
    its input as written to a cache where it asks for that: what a handler may still spend must be in the hold.
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
    pinned = getattr(price, "pin", None)
    body = await body_of(arguments) if reads_request(price) else None
    if pinned is not None:
        call.price = pinned(call.started_at, model_of(body))
    dearer = getattr(call.price, "dearer", None)
    if dearer is not None and body is not None:
        # Else whoever asks for a tier that costs several times as much is let in for the usual.
        service = asked_service(body)
        call.dearer = dearer(service)
        call.asked_service = service if call.dearer > 1 else None
    searching = getattr(call.price, "searching", None)
    if searching is not None and body is not None:
        call.searching = searching(asked_searches(body))
    estimate = charge.hold.estimate
    if isinstance(estimate, From):
        estimate = await estimate.compute(call, arguments)
    if estimate is None:
        call.asked = await estimate_arguments(arguments, at_most=True)
        call.estimate = _usual(call.asked)
    elif isinstance(estimate, TokenUsage):
        call.estimate = call.asked = estimate
        if charge.hold.slices is not None and estimate.input is None:
            # A slice of the output, behind all of the input.
            call.asked = await estimate_arguments(arguments, at_most=True)
            call.estimate = replace(estimate, input=call.asked.input)
    else:
        call.estimate = exact_amount(estimate, "hold estimate")
        call.asked = await estimate_arguments(arguments, at_most=True)


def _usual(asked: TokenUsage) -> TokenUsage:
    """What a request uses as a rule: nothing of it is written to a cache, and its answer is no voice."""
    heard = (asked.audio or 0) - (asked.audio_output or 0)
    told = {"audio": heard, "audio_output": 0} if heard else {"audio": None, "audio_output": None}
    return replace(asked, cache_write=None, cache_write_1h=None, **told)


def amounts_of(call: Call) -> tuple[int, int]:
    """(amount to hold, least that admits), smallest parts."""
    estimate, price, charge = call.estimate, call.price, call.charge
    if charge is None or estimate is None or price is None or call.exempt:
        return 0, 0
    if charge.per != "call":
        return first_slice(call, charge, price)
    if isinstance(estimate, TokenUsage):
        exact = Decimal(0) if isinstance(price, FixedPrice) else EXACT.multiply(price.cost(estimate), call.dearer)
        if charge.hold.estimate is None:
            # By the request alone, which allows them: what a handler may still spend must be in the hold.
            exact = EXACT.add(exact, call.searching)
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
        if isinstance(source, Wallet):
            source.warning_level(unit)
            unit.parts(source.overdraft, "overdraft")
        elif not source.is_computed:
            limits = source.limit.values() if isinstance(source.limit, Mapping) else (source.limit_for(None),)
            for limit in limits:
                unit.parts(limit, f"allowance {source.name!r}")


def _check_slices(slices: Slices, unit: Unit) -> None:
    for amount, what in ((slices.step, "step"), (slices.low_water, "low-water mark"), (slices.debt, "debt")):
        if amount is not None and not isinstance(amount, TokenUsage):
            unit.parts(amount, what)
