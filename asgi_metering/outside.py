"""
Outside: calls that nobody asked for over HTTP, such as those of `Metering.charge`: who pays them, and their policy.

Knows what may be left out inside another call. Never knows how a call is admitted or ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from asgi_metering.call import Call
from asgi_metering.caller import Caller
from asgi_metering.correlating import IDS
from asgi_metering.errors import ConfigurationError, PayerError
from asgi_metering.guards import Part
from asgi_metering.holding import HoldPolicy, HoldSize
from asgi_metering.keying import check_shared
from asgi_metering.names import check_key
from asgi_metering.opening import ALL_FEATURES, CURRENT, Opening
from asgi_metering.outage import check_journal
from asgi_metering.policies import ChargeOptions, EndpointPolicy, Idempotency, Price
from asgi_metering.usage import TokenUsage

if TYPE_CHECKING:
    from asgi_metering.metering import Metering

__all__ = ["leave", "planned", "prepared"]


def prepared(
    metering: Metering,
    payer: str | None,
    caller: Caller | None,
    line: str,
    hold: HoldSize | None,
    price: Price | None,
    options: ChargeOptions,
) -> tuple[EndpointPolicy, Call]:
    """A call outside HTTP, and its policy. Raises as `Metering.charge`."""
    from asgi_metering.decorators import billable, gather
    from asgi_metering.pricing import check_amounts

    if price is None:
        price, hold = _price_of_hold(hold, line), None
    asked: dict[str, Any] = {**options}
    once, requires = asked.pop("idempotency_key", None), _requires(asked.pop("requires", None))
    parts = (*_limits(asked.pop("limits", None)), *requires)
    policy = gather((billable(price, hold=hold, line=line, **_with_charge_key(asked)), *parts), line, {})
    if policy.charge is not None:
        check_amounts(policy.charge, metering.counted(policy.charge.unit))
        if once is not None:
            if policy.charge.shadow:
                raise ConfigurationError(
                    f"charge(line={line!r}, idempotency_key=...) claims no key with shadow=True: the work would be "
                    f"done again. Leave the key out until the charge is live."
                )
            keyed = replace(policy.charge, idempotency=Idempotency(), once=check_key(once, "idempotency key"))
            policy = replace(policy, charge=keyed)
        check_journal(policy, has_journal=metering.journal is not None)
        check_shared(policy, metering.store)
    is_shadow = metering.shadow or (policy.charge is not None and policy.charge.shadow)
    return policy, _call_for(metering, payer, caller, line, is_shadow=is_shadow)


def _requires(given: object) -> tuple[Part, ...]:
    """What providers must have left."""
    parts = () if given is None else (given,) if isinstance(given, Part) else given
    if not isinstance(parts, list | tuple) or any(not isinstance(each, Part) or not each.upstream for each in parts):
        raise ConfigurationError(
            f"requires={given!r} is nothing to require. Write requires=requires_upstream('openai')."
        )
    return tuple(parts)


def _limits(given: object) -> tuple[Part, ...]:
    """How often such work may be done, and how much of it at once."""
    parts = () if given is None else (given,) if isinstance(given, Part) else given
    is_list = isinstance(parts, list | tuple) and (bool(parts) or given is None)
    if not is_list or any(not isinstance(each, Part) or each.rates is None for each in cast("tuple[Part]", parts)):
        raise ConfigurationError(f"limits={given!r} is no limit. Write limits=rate_limited('60/minute'), say.")
    # The last one is gathered first, as decorators are.
    return tuple(reversed(cast("tuple[Part, ...]", parts)))


def _with_charge_key(options: dict[str, Any]) -> dict[str, Any]:
    """*options* as `billable` takes them: keys and ids are said, and not looked for in a request."""
    said = {name: options[name] for name in ("charge_key", *IDS) if options.get(name) is not None}
    for name, key in said.items():
        check_key(key, name.replace("_", " "))
    return {**options, **{name: _always(key) for name, key in said.items()}} if said else options


def _always(key: Any) -> Callable[[], Any]:
    return lambda: key


def _call_for(metering: Metering, payer: str | None, caller: Caller | None, line: str, *, is_shadow: bool) -> Call:
    """A call of *payer*, or of whoever pays the call around this code."""
    if caller is not None and not isinstance(caller, Caller):
        raise ConfigurationError(f"caller={caller!r} is no Caller. Make one: Caller('bob', payer='org_7').")
    inherited = None
    if payer is None:
        outer = _paid_call(metering, line, is_shadow=is_shadow)
        caller = caller or outer.caller
        payer, inherited = _account_of(outer, line, is_free=caller is not None and caller.exempt), outer.bequeathed
    check_key(payer, "payer")
    # Whose balance pays is said here, whatever the caller's own would be.
    caller = Caller(payer) if caller is None else replace(caller, payer=payer)
    opening = Opening(metering, ALL_FEATURES)
    opening.around = CURRENT.get()
    call = opening.open_call()
    call.preset(caller, payer, inherited)
    return call


def _paid_call(metering: Metering, line: str, *, is_shadow: bool) -> Call:
    """
    The admitted call around this code whose payer pays; raises `PayerError` where there is none of this metering.

    What is in the shadow changes nothing for what is live (S4.16): a live charge looks past one of work. To one that is
    in the shadow itself, the call is what it would have been.
    """
    opening = CURRENT.get()
    call = _payer_call(metering, opening)
    while not is_shadow and call is not None and call.opening.origin is None and call.is_shadow:
        around = _payer_call(metering, call.opening.around)
        if around is None:
            # Whom the work itself names.
            return call
        call = around
    if call is None:
        raise PayerError(
            f"charge(line={line!r}) names no payer, and runs inside no admitted call that has one. Say who pays: "
            f"payer='org_7'."
        )
    twin = call.beside.twin if is_shadow and call.is_shadow and call.beside is not None else None
    return call if twin is None or not twin.admitted else twin


def _payer_call(metering: Metering, opening: Opening | None) -> Call | None:
    """The admitted call of *opening* that has a payer, if it is one of this metering and runs."""
    call = opening.call if opening is not None and not opening.closed and opening.metering is metering else None
    return call if call is not None and call.admitted and call.payer else None


def _account_of(outer: Call, line: str, *, is_free: bool) -> str:
    """
    Whose balance goes with `Call.paid_by`: of a call that nothing is held for, that of the first choice (S0.26). Of one
    that an allowance of each payer pays, its payer's (S0.27).

    Nobody has asked for the accounts of an exempt caller's payers. Where somebody else acts inside of its call, that is
    found out here, or told: never another's balance than that of the credential (S0.25).
    """
    payer, decision = outer.bequeathed, outer.decision
    is_counted_at_home = payer is not None and outer.counts_at_home(payer)
    if payer is None or (decision is not None and decision.payer and not is_counted_at_home):
        return outer.payer or ""
    account = outer.accounts.get(payer.name)
    if account is None and callable(payer.account) and not is_free:
        raise PayerError(
            f"charge(line={line!r}) is inside a call of an exempt caller, for which nobody has asked whose account "
            f"{payer.name!r} is. Say who pays: payer='org_7'."
        )
    if account is None and isinstance(payer.account, str):
        account = payer.account
    return account or outer.payer or ""


def planned(caller: Caller | None, payer: str, plan: str | None) -> Caller:
    """*caller*, or *payer* itself, with *plan* where it has none of its own."""
    if caller is None:
        return Caller(payer, plan=plan)
    if isinstance(caller, Caller) and caller.plan is None:
        return replace(caller, plan=plan)
    return caller


def _price_of_hold(hold: HoldSize | None, line: str) -> Price:
    """What a charge without a price costs: what it holds, where that is an amount."""
    if hold is None:
        raise ConfigurationError(f"charge(line={line!r}) has neither a price nor a hold. Give one.")
    if isinstance(hold, HoldPolicy | TokenUsage):
        raise ConfigurationError(
            f"charge(line={line!r}) holds {hold!r}, which says nothing of what is charged. Give a price= as well, such "
            f"as per_million_tokens(...), or a hold of whole units."
        )
    return hold


def leave(opening: Opening, outer: Opening | None) -> None:
    """End the block of a charge in whatever context it is left: a token could be used in the first one only."""
    opening.closed = True
    if CURRENT.get() is opening:
        CURRENT.set(outer)
