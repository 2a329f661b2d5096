"""
Checks: what users wrote in a decorator, read, and refused at import where it cannot work, with the mend.

Knows single arguments and pairs of them that contradict each other. Never puts a policy together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.arguments import From
from asgi_metering.computed import check_sync, name_of
from asgi_metering.errors import ConfigurationError, InvalidKeyError
from asgi_metering.holding import HoldPolicy, Slices
from asgi_metering.names import check_key, is_field_name
from asgi_metering.outage import CHOICES
from asgi_metering.policies import (
    ERROR_SHAPES,
    ChargeKey,
    ChargePer,
    ChargePolicy,
    EndpointPolicy,
    Idempotency,
    OnExcess,
    RatePolicy,
)
from asgi_metering.prices import MeasuredPrice
from asgi_metering.receipts import Basis
from asgi_metering.rules.calendars import zone as find_zone
from asgi_metering.rules.ending import DRAIN, DRAINABLE, END_OF_CALL, Drain, EndPolicy, Situation
from asgi_metering.sources import PERIODS, Allowance, PaymentSource, Wallet, check_allowances, check_payers, check_zone
from asgi_metering.usage import TokenUsage

__all__ = [
    "check_asked",
    "check_customise",
    "check_drain",
    "check_errors",
    "check_flag",
    "check_known",
    "check_measured",
    "check_messages",
    "check_new_id",
    "check_per",
    "check_scope",
    "check_seconds",
    "check_session",
    "check_shadow",
    "check_shadow_per",
    "check_slices",
    "check_store_down",
    "read_callers",
    "read_charge_key",
    "read_end",
    "read_idempotency",
    "read_sources",
]

EXCESS: tuple[OnExcess, ...] = ("close", "drop", "answer")


def check_shadow(charge: ChargePolicy) -> None:
    """Refuse a shadow of what a shadow cannot do; raises `ConfigurationError`, as all checks do."""
    check_flag(shadow=charge.shadow)
    if not charge.shadow:
        return
    check_shadow_per(charge.per)
    for name, given in {"idempotency": charge.idempotency, "charge_key": charge.key}.items():
        if given is not None:
            raise ConfigurationError(
                f"shadow=True claims no keys, so that {name}= would mean nothing: a repeat would run, and be told, "
                f"again. Leave {name}= out until the charge is live."
            )


def check_shadow_per(per: str) -> None:
    """Refuse a shadow that counts messages or seconds."""
    if per != "call":
        raise ConfigurationError(
            f"shadow=True tells of calls as a whole, and not per={per!r}. Leave one of the two out."
        )


def check_flag(**flags: object) -> None:
    """Refuse what is no bool: the text 'false', say, would be a shadow."""
    for name, flag in flags.items():
        if type(flag) is not bool:
            raise ConfigurationError(f"{name}={flag!r} is no bool. Use True or False.")


def check_per(what: str, per: str, known: Sequence[str]) -> None:
    """Refuse a *per* that is not *known* to *what*."""
    if per not in known:
        raise ConfigurationError(f"{what}(per={per!r}) is not known. Use one of {', '.join(map(repr, known))}.")


def check_session(price: Any, hold: Any, charge_key: Any, idempotency: Any, per: str) -> None:
    """Refuse what no session can be charged by that has a price for each message or second."""
    if isinstance(price, MeasuredPrice):
        raise ConfigurationError(
            f"The price {price!r} is measured by what a call uses, and not per={per!r}. Leave per= out, and report "
            f"usage with call.record(), or write an amount."
        )
    if charge_key is not None or idempotency:
        raise ConfigurationError(
            f"charge_key= and idempotency= count calls of one price, and what a session costs per={per!r} is known at "
            f"its end. Leave them out."
        )
    if hold is None:
        return
    sizes = (hold.estimate, hold.slices.step, hold.slices.low_water) if _is_sliced(hold) else (hold,)
    if not _is_sliced(hold) or any(isinstance(size, From | TokenUsage) for size in sizes):
        raise ConfigurationError(
            f"hold={hold!r} is no hold of a session that is charged per={per!r}: it grows by amounts. Write "
            f"hold=slices('0.5'), say, or leave it out."
        )


def _is_sliced(hold: Any) -> bool:
    return isinstance(hold, HoldPolicy) and hold.slices is not None


def check_slices(first: Any, slices: Slices, price: Any, sources: Sequence[PaymentSource]) -> None:
    """Refuse slices that could never grow, or would have to at once, by this price."""
    if exact_amount(slices.debt, "debt") and not any(isinstance(source, Wallet) for source in sources):
        raise ConfigurationError(
            f"slices(debt={slices.debt!r}) can be owed by no wallet: none is among the sources. Name one, or leave it "
            f"out."
        )
    computed = isinstance(first, From)
    known = {"first": None if computed else first, "step": slices.step}
    costs = {name: _cost(size, price) for name, size in known.items() if size is not None}
    for name, cost in costs.items():
        if not cost:
            raise ConfigurationError(
                f"slices({name}={known[name]!r}) holds nothing by the price {price!r}. Write a slice that costs "
                f"something."
            )
    mark = None if slices.low_water is None else _cost(slices.low_water, price)
    for name, cost in costs.items():
        if mark is not None and mark >= cost:
            raise ConfigurationError(
                f"slices(low_water={slices.low_water!r}) is no less than {name}={known[name]!r}, so that a hold would "
                f"have to grow as soon as it is made. Lower the mark, or hold more at once."
            )


def _cost(size: Amount | TokenUsage, price: Any) -> Decimal:
    """Whole units of a slice; tokens are of measured prices alone."""
    return price.cost(size) if isinstance(size, TokenUsage) else exact_amount(size, "slice")


def read_callers(callers: Collection[str] | None) -> frozenset[str] | None:
    """The types of callers that were written; None is everybody."""
    if callers is None:
        return None
    is_list = isinstance(callers, list | tuple | set | frozenset) and bool(callers)
    if not is_list or not all(isinstance(each, str) and each for each in callers):
        raise ConfigurationError(
            f"callers={callers!r} names no types of callers. Write ['production_agent'], say, or leave it out to "
            f"charge everybody."
        )
    return frozenset(callers)


def read_idempotency(given: Idempotency | bool | None) -> Idempotency | None:
    """The idempotency that was written; True is all of its defaults."""
    if given is None or isinstance(given, Idempotency):
        return given
    if type(given) is not bool:
        raise ConfigurationError(
            f"idempotency={given!r} is not known. Use True, or Idempotency(store_body=65_536), say."
        )
    return Idempotency() if given else None


MAX_FIELD_NAME = 64
"""Characters of a header field that carries a key: longer ones are not in use."""


MAX_WINDOW_S = 366 * 86_400
"""A year: what is counted once for longer is a subscription."""


def read_charge_key(
    key: str | Callable[..., Any] | None, per: ChargePer | float, zone: str, *, measured: bool
) -> ChargeKey | None:
    """The charge key that was written, with its window."""
    if key is None:
        if (per, zone) != ("day", "UTC"):
            raise ConfigurationError("charge_per= and charge_zone= say how a charge_key counts. Give one as well.")
        return None
    if measured:
        raise ConfigurationError(
            "A charge_key counts calls of one price, and what this one costs is measured. Use a fixed price."
        )
    if isinstance(per, bool) or not (per in PERIODS or (isinstance(per, int | float) and 0 < per <= MAX_WINDOW_S)):
        raise ConfigurationError(
            f"charge_per={per!r} is no window. Use 'day', 'week', 'month', or seconds above 0, up to {MAX_WINDOW_S}."
        )
    if not isinstance(per, str) and zone != "UTC":
        raise ConfigurationError(f"charge_zone={zone!r} means nothing to a window in seconds. Leave it out.")
    find_zone(check_zone(zone))
    if callable(key):
        return ChargeKey(From(key, "charge key"), per, zone)
    if not isinstance(key, str) or not is_field_name(key, MAX_FIELD_NAME):
        raise ConfigurationError(
            f"charge_key={key!r} is neither a function nor the name of a header field. Pass lambda body: "
            f"body.session_id, or 'X-Session-Id', say."
        )
    return ChargeKey(key.lower(), per, zone)


def check_customise(customise: Callable[..., Any]) -> None:
    """Refuse a hook that cannot be asked."""
    check_sync(customise, "customise=")
    if not _takes_one(customise):
        raise ConfigurationError(
            f"customise={customise!r} does not take one argument. Pass a function of the refusal's members."
        )


def check_asked(name: str, function: Any, of: str) -> None:
    """Refuse as *name* what is no function of one argument, *of* what it is asked; None is none."""
    if function is None:
        return
    if not callable(function):
        raise ConfigurationError(f"{name}={function!r} cannot be called. Pass a function of the {of}.")
    if not _takes_one(function):
        raise ConfigurationError(f"{name}={name_of(function)}() takes no one argument. Pass a function of the {of}.")


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether *function* can be called with one argument; without a signature to read the first call tells."""
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def check_measured(price: MeasuredPrice) -> None:
    """Refuse a measured price that cannot be asked."""
    if inspect.isclass(price):
        raise ConfigurationError(f"The price {price!r} is a class. Make one: {price.__name__}(...).")
    check_sync(price.cost, "The price's cost()")
    check_sync(price.affordable, "The price's affordable()")


def check_known(price: MeasuredPrice, hold: HoldPolicy) -> None:
    """Refuse a hold in tokens where the price says nothing of them before the call has ended."""
    sizes = [hold.estimate] if hold.slices is None else [hold.estimate, hold.slices.step, hold.slices.low_water]
    in_tokens = hold.estimate is None or any(isinstance(size, TokenUsage) for size in sizes)
    if getattr(price, "is_known_before", True) or not in_tokens:
        return
    raise ConfigurationError(
        f"The price {price!r} is known at the end of a call alone, since it is async or needs the call, so that no "
        f"hold can be estimated by it. Hold an amount: hold='0.2', say."
    )


MAX_TTL_S = 86_400
"""A day: a hold that lives longer without a sign of life is not a hold."""


def check_errors(errors: str) -> None:
    """Refuse a shape of errors that is not known."""
    if errors not in ERROR_SHAPES:
        raise ConfigurationError(f"errors={errors!r} is not a shape. Use one of {', '.join(ERROR_SHAPES)}.")


def check_store_down(layer: str, answer: str | None) -> None:
    """Refuse an answer that *layer* cannot give without the store."""
    if answer is not None and answer not in CHOICES[layer]:
        offered = ", ".join(map(repr, CHOICES[layer]))
        raise ConfigurationError(f"on_store_down={answer!r} is not known here. Choose one of {offered}.")


def check_seconds(**spans: float) -> None:
    """Refuse seconds that are none, or too many."""
    for name, seconds in spans.items():
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= MAX_TTL_S:
            raise ConfigurationError(f"{name}={seconds!r} is not a number of seconds above 0, up to {MAX_TTL_S}.")


def check_messages(policies: Sequence[RatePolicy], per: str, on_excess: str | None) -> None:
    """Refuse limits of messages that mean nothing."""
    if on_excess is not None and on_excess not in EXCESS:
        raise ConfigurationError(f"on_excess={on_excess!r} is not known. Use one of {', '.join(map(repr, EXCESS))}.")
    if per == "call":
        if on_excess is not None:
            raise ConfigurationError('on_excess= says what becomes of messages. Write per="message" as well.')
        return
    if any(policy.concurrency for policy in policies):
        raise ConfigurationError(
            'A message takes no slot, so that concurrency= means nothing per="message". Write it into a '
            "rate_limited() of its own, which counts open WebSockets."
        )
    if EndpointPolicy("", rates=tuple(policies)).weighs:
        raise ConfigurationError(
            'A limit "of tokens" counts what calls use, and messages are counted per="message". Write it into a '
            "rate_limited() of its own."
        )


def check_scope(scope: str) -> None:
    """Refuse a scope that cannot be a key."""
    try:
        check_key(scope, "scope of the limits")
    except InvalidKeyError as failure:
        raise ConfigurationError(str(failure)) from None


def read_end(chosen: Mapping[Situation, str | Drain | None]) -> EndPolicy:
    """What is charged however a call ends, as it was written; None is a row's default."""
    written = {row: choice for row, choice in chosen.items() if choice is not None}
    late = written.get(Situation.GONE_LATE)
    if late in _choices(Situation.GONE_EARLY) or isinstance(late, Drain):
        # Also for a client that left before the first byte, where it is a choice there.
        written.setdefault(Situation.GONE_EARLY, late)
    drains = {
        row: choice if isinstance(choice, Drain) else Drain()
        for row, choice in written.items()
        if row in DRAINABLE and (isinstance(choice, Drain) or choice == DRAIN)
    }
    return EndPolicy({row: _basis(row, choice) for row, choice in written.items() if row not in drains}, drains)


def _choices(row: Situation) -> list[str]:
    """What may be written for *row*."""
    return [*(basis.value for basis in END_OF_CALL[row]), *([DRAIN] if row in DRAINABLE else [])]


def _basis(row: Situation, choice: Any) -> Basis:
    try:
        return Basis(choice)
    except (TypeError, ValueError):  # of another type even without a hash
        offered = ", ".join(map(repr, _choices(row)))
        raise ConfigurationError(
            f"{choice!r} is no policy for a call that ends as {row.value!r}. Choose one of {offered}."
        ) from None


def check_drain(charge: ChargePolicy) -> None:
    """Refuse to let a handler go on whose hold grows: nobody is left whom a cut could be told to."""
    if charge.drains and charge.hold.slices is not None:
        raise ConfigurationError(
            'on_disconnect="drain" lets a handler finish on what it holds, and slices() hold a part of that. Hold an '
            'estimate, such as up_to(...), or leave the disconnect to "observed".'
        )


def read_sources(sources: Sequence[PaymentSource] | None) -> tuple[PaymentSource, ...]:
    """The sources that were written; the wallet by default."""
    if sources is None:
        return (Wallet(),)
    if not isinstance(sources, list | tuple):
        raise ConfigurationError(f"sources={sources!r} is no list of sources. Write [Wallet()], say.")
    if not sources:
        raise ConfigurationError("sources=[] leaves nothing to pay with. Leave it out, or name a source.")
    for source in sources:
        if not isinstance(source, PaymentSource):
            raise ConfigurationError(f"{source!r} is no source. Use Wallet() or Allowance(...).")
        if isinstance(source, Allowance):
            find_zone(source.zone)
    check_payers(sources)
    check_allowances(sources)
    return tuple(sources)


def check_new_id(new_id: Callable[[], str]) -> None:
    """Refuse what makes no ids."""
    if not callable(new_id):
        raise ConfigurationError(
            f"new_id={new_id!r} cannot be called. Pass a function that answers a new id each time."
        )
    check_sync(new_id, "new_id=")
