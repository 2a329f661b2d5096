"""
The decorators: what an endpoint charges and how often it may be called, written on the endpoint.

What users write and nothing else: each function checks its arguments and answers a `Part`, so that mistakes fail at
import, with the mend. Knows neither how an endpoint is guarded (`guards`) nor how it is called (`wrappers`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from asgi_metering.amounts import Unit, exact_amount
from asgi_metering.arguments import From
from asgi_metering.checks import (
    check_customise,
    check_drain,
    check_errors,
    check_flag,
    check_known,
    check_measured,
    check_messages,
    check_per,
    check_scope,
    check_seconds,
    check_session,
    check_shadow,
    check_shadow_per,
    check_slices,
    check_store_down,
    read_callers,
    read_charge_key,
    read_end,
    read_idempotency,
    read_sources,
)
from asgi_metering.chosen import LimitReading
from asgi_metering.correlating import read_id
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import BARE_MEND, Part, guard_of, merged
from asgi_metering.holding import HoldSize, read_hold
from asgi_metering.limiting import Key, Levels, Limit, check_level, read_key, read_levels, read_methods
from asgi_metering.policies import (
    ChargePer,
    ChargePolicy,
    CreditsDown,
    EndpointPolicy,
    ErrorShape,
    Idempotency,
    OnAbort,
    OnCut,
    OnDisconnect,
    OnEarlyDisconnect,
    OnError,
    OnExcess,
    OnLateError,
    OnMissingUsage,
    Per,
    Price,
    RatePolicy,
    RatesDown,
    check_line,
    read_price,
)
from asgi_metering.prices import MeasuredPrice
from asgi_metering.pricing import check_amounts
from asgi_metering.rates import Strategy
from asgi_metering.returned import check_count
from asgi_metering.rules.calendars import zone as find_zone
from asgi_metering.rules.ending import Drain, Situation
from asgi_metering.sources import PaymentSource, check_zone
from asgi_metering.usage import TokenUsage
from asgi_metering.usage.dialects import named

__all__ = ["billable", "check_flag", "gather", "is_unlimited", "rate_limited", "unlimited"]

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])


def billable(
    price: Price,
    *,
    hold: HoldSize | None = None,
    line: str | None = None,
    unit: Unit | None = None,
    sources: Sequence[PaymentSource] | None = None,
    payer: Callable[..., Any] | None = None,
    on_missing_usage: OnMissingUsage | None = None,
    on_error: OnError | None = None,
    on_late_error: OnLateError | None = None,
    on_disconnect: OnDisconnect | Drain | None = None,
    on_early_disconnect: OnEarlyDisconnect | Drain | None = None,
    on_cut: OnCut | None = None,
    on_abort: OnAbort | None = None,
    errors: ErrorShape = "problem",
    customise: Callable[[Mapping[str, Any]], tuple[Mapping[str, Any], Mapping[str, str]]] | None = None,
    usage: str | None = None,
    forward_quota_headers: bool = False,
    ttl_s: float = 60.0,
    grace_s: float = 30.0,
    idempotency: Idempotency | bool | None = None,
    charge_key: str | Callable[..., Any] | None = None,
    charge_per: ChargePer | float = "day",
    charge_zone: str = "UTC",
    skip_if: Callable[..., Any] | None = None,
    on_store_down: CreditsDown | None = None,
    per: Per = "call",
    callers: Collection[str] | None = None,
    count: Callable[..., Any] | None = None,
    request_id: str | Callable[..., Any] | None = None,
    session_id: str | Callable[..., Any] | None = None,
    shadow: bool = False,
) -> Part:
    """
    Charge for an endpoint; without the money it answers 402 before its first line runs.

    Args:
        price: Whole units (int, Decimal or str), a measured price such as `per_million_tokens`, or a sync or async
            callable of the endpoint's arguments that answers an amount.
        hold: For measured prices: whole units, a `TokenUsage`, a callable of the endpoint's arguments, `up_to`, or
            `slices`; estimated from the request's own body by default. A hold of 0 admits a payer with nothing left,
            but not one in debt; what the call uses is charged in full.
        line: The billing line; the endpoint's name by default.
        unit: The metering's by default.
        sources: Where the units come from, in order; the payer's wallet by default.
        payer: Computes who pays from the endpoint's arguments.
        on_missing_usage: Completed, but no usage was reported: ``estimate``, ``observed``, ``hold`` or ``none``.
        on_error: Answered with 400 or above, or failed before the first byte: ``none``, or any basis.
        on_late_error: Failed after the first byte, or ``call.fail()``: ``none``, ``observed`` or ``hold``.
        on_disconnect: The client left: ``observed``, ``none``, ``usage``, ``estimate``, ``hold`` or ``drain``, which
            lets the handler finish for nobody and charges it as if somebody had been there; `Drain` gives it other
            bounds than a minute and 16 MiB.
        on_early_disconnect: The same before the first byte; as *on_disconnect* where that is a choice there.
        on_cut: We cut the stream: ``observed`` or ``hold``.
        on_abort: The process stopped or died: ``observed``, ``none`` or ``hold``.
        errors: Shape of refusals: ``problem``, ``openai`` or ``anthropic``.
        customise: Rewrites a refusal's body and adds header fields, for clients that expect others (S4.4): a function
            of the problem's members (``code``, ``unit``, ``required``...) that answers a tuple of the body and a
            mapping of fields. Not async: nobody waits while a refusal is written. Where it fails the log says so, and
            the standard body is sent.
        usage: Names the dialect of the response body, where its shape alone would mislead.
        forward_quota_headers: Let a provider's own quota fields pass to the client. ``RateLimit``, and
            ``X-RateLimit-Limit``, ``-Remaining`` and ``-Reset`` that come alone, are the endpoint's own and pass,
            unless *usage* is named.
        ttl_s: Seconds that a hold lives without a heartbeat.
        grace_s: Seconds in doubt before the policy ends a hold.
        idempotency: True, or an `Idempotency`, runs requests with an ``Idempotency-Key`` once per payer, endpoint and
            key, and answers repeats from what the first one did. Without it the field means nothing here.
        charge_key: Counts several requests once (S0.3): a callable of the endpoint's arguments, or the name of a
            request header field. The first call holds, those that come while it runs or after it was charged are
            free, and the first success is charged. For fixed and computed prices.
        charge_per: The window of a charge key: ``"day"``, ``"week"``, ``"month"``, or seconds from its first call on.
        charge_zone: Where the days of that window begin.
        skip_if: Answers True, from the endpoint's arguments, for a call that is not charged: the continuation of a
            turn that was (S0.16). It is counted by limits, and audited with an amount of 0. With a *charge_key*, on a
            route that names payers, it goes on with whoever pays its session, and is looked up for that.
        on_store_down: The store gives no answer: ``deny`` with 503, ``queue`` (let in, and charged later out of the
            metering's journal) or ``allow`` (let in for nothing); what the `Metering` says by default (X.6).
        per: ``"message"`` charges a WebSocket the price for each message that comes in, ``"second"`` for each second
            that it is open; ``"call"``, the default, once. Held in slices ahead of what is used: of ten messages, or a
            minute, unless ``hold=slices(...)`` says amounts. A session begins with one of them, and is closed with 4402
            before the first that cannot be paid.
        callers: Types of callers that are charged (`Caller.type`, S2.10); everybody by default. For all others, and for
            callers without a type, the endpoint is as if it had no price: nothing is computed, held or told, and keys
            mean nothing. Its limits count them, and somebody has to be known.
        count: Says how much was used, for prices such as `per_unit` (S2.11): a sync or async function of ``result``,
            what the endpoint returned, and of the endpoint's arguments, that answers a mapping of units to numbers, or
            the number alone where the price has one unit. Reported as by `Call.record`. Where it fails, or names no
            unit of `per_unit`, the answer goes out all the same, and the call is one of missing usage, with an alarm.
        request_id: The application's own id of the request, for the usage event (S2.13): a callable of the endpoint's
            arguments, or the name of a header field. ``X-Request-ID`` where it finds none, else the call's id.
        session_id: The same of a session; None where it finds none. Charges inside of the call have both too.
        shadow: Charge and refuse nothing, and tell what it would have: see `asgi_metering.shadow` (S4.16). Not with
            keys: nothing is claimed, so that nobody could tell which of several calls pays.

    Raises:
        AmountError: A price or hold that is a float, negative, NaN or too large, or too fine for *unit*. Without a
            *unit* the metering's own is asked when the application starts.
        ConfigurationError: Anything else that cannot work, at import.

    A computed price or hold that is no amount (a float, NaN, negative, a price of None, too fine for the unit) raises
    `AmountError` on that request, and what a callable raises rises as it is, an HTTPException for instance. Either
    way the endpoint does not run, nothing is held or charged, and the log names endpoint, argument and callable. A
    payer that cannot be computed is refused with 503.
    """
    chosen = {
        Situation.UNREPORTED: on_missing_usage,
        Situation.FAILED_EARLY: on_error,
        Situation.FAILED_LATE: on_late_error,
        Situation.GONE_EARLY: on_early_disconnect,
        Situation.GONE_LATE: on_disconnect,
        Situation.CUT: on_cut,
        Situation.ABORTED: on_abort,
    }
    if guard_of(price) is not None:
        raise ConfigurationError(f"The price {price!r} is a metered endpoint. {BARE_MEND}")
    read = read_price(price)
    check_per("billable", per, ("call", "message", "second"))
    if per != "call":
        check_session(read, hold, charge_key, idempotency, per)
        if count is not None:
            check_count(From(count, "count"), f"billable(per={per!r})", None, {})
    elif hold is not None and not isinstance(read, MeasuredPrice):
        what = "price that a function computes" if isinstance(read, From) else "fixed price"
        raise ConfigurationError(f"A {what} holds itself. Leave out hold=, or use a measured price.")
    check_errors(errors)
    check_store_down("credits", on_store_down)
    check_seconds(ttl_s=ttl_s, grace_s=grace_s)
    for name, function in {"payer": payer, "customise": customise, "skip_if": skip_if, "count": count}.items():
        if function is not None and not callable(function):
            raise ConfigurationError(f"{name}={function!r} cannot be called. Pass a function.")
    if customise is not None:
        check_customise(customise)
    if isinstance(read, MeasuredPrice):
        check_measured(read)
    if unit is not None and not isinstance(unit, Unit):
        raise ConfigurationError(f"unit={unit!r} is no Unit. Declare one: Unit('credits', scale=6).")
    held = read_hold(hold)
    if held.estimate is not None and not isinstance(held.estimate, From | TokenUsage):
        exact_amount(held.estimate, "hold estimate")
    if isinstance(read, MeasuredPrice):
        check_known(read, held)
    paid_from = read_sources(sources)
    if held.slices is not None and (per != "call" or isinstance(read, MeasuredPrice)):
        check_slices(held.estimate, held.slices, read, paid_from)
    charge = ChargePolicy(
        price=read,
        line="" if line is None else check_line(line),
        end=read_end(chosen),
        unit=unit,
        hold=held,
        sources=paid_from,
        payer=None if payer is None else From(payer, "payer"),
        errors=errors,
        customise=customise,
        dialect=None if usage is None else named(usage).name,
        forward_quota_headers=forward_quota_headers,
        ttl_s=float(ttl_s),
        grace_s=float(grace_s),
        idempotency=read_idempotency(idempotency),
        key=read_charge_key(charge_key, charge_per, charge_zone, measured=isinstance(read, MeasuredPrice)),
        skip_if=None if skip_if is None else From(skip_if, "skip_if"),
        on_store_down=on_store_down,
        per=per,
        callers=read_callers(callers),
        count=None if count is None else From(count, "count"),
        request_id=read_id(request_id, "request_id"),
        session_id=read_id(session_id, "session_id"),
        shadow=shadow,
    )
    check_shadow(charge)
    check_drain(charge)
    if unit is not None:
        check_amounts(charge, unit)
    return Part(charge=charge)


def rate_limited(
    *limits: Limit,
    concurrency: int | Mapping[str, int] | None = None,
    global_concurrency: int | None = None,
    key: Key = "caller",
    levels: Levels | None = None,
    level: str | None = None,
    configured: str | None = None,
    cost: int | Callable[..., Any] = 1,
    strategy: Strategy = "fixed",
    zone: str = "UTC",
    scope: str | None = None,
    methods: Sequence[str] | None = None,
    per_method: bool = False,
    exempt_when: Callable[..., Any] | None = None,
    override_defaults: bool = True,
    errors: ErrorShape = "problem",
    on_store_down: RatesDown | None = None,
    per: Per = "call",
    on_excess: OnExcess | None = None,
    shadow: bool = False,
) -> Part:
    """
    Limit how often and how many at once.

    Args:
        limits: ``"60/minute"``, ``"100/hour; 1000/day"``, ``"200000/minute of tokens"``, ``"10/second burst 50"``, or
            items of the `limits` package: see `parse_limit`; a mapping of plans to such limits, of which a plan that
            it does not have, or none, gets the smallest; or a callable of the endpoint's arguments that answers one
            text or a list of them (S4.17). The last two are looked up for each call.
        concurrency: Calls at once, per key; or a mapping of keys to such numbers.
        global_concurrency: Calls at once, of everybody together.
        key: ``"caller"`` (the address where nobody is known), ``"payer"``, ``"address"``, ``"route"`` (everybody's
            calls of this endpoint), ``"global"`` (everybody's in the scope), ``"attribute:team"`` (of the caller; who
            has none is counted as a caller), ``"named:tenant"`` (whatever `Metering.keys` has as ``tenant`` when the
            call comes, S2.32), or a callable of the endpoint's arguments.
        levels: Limits by key, decided together with all others: ``{"payer": "1000/minute", "attribute:user":
            ["100/minute", "2000/day"], "caller": "20/minute"}``. Each is named by its key, in refusals too (S0.42).
        level: Names this key in refusals and limits.
        configured: Name of limits in `Metering.limits`, which may change while the application runs; a name there that
            no endpoint uses is an error at startup, and so is one here that is not there (S2.30).
        cost: What a call takes of each request limit; an int or a callable.
        strategy: ``"fixed"``, ``"calendar"``, ``"sliding"`` or ``"moving"`` (at a cost of 1 only). A limit with a burst
            is a token bucket beside any of them.
        zone: Where calendar windows begin.
        scope: Endpoints with the same scope share their counts of a window and key, each by its own limit (S4.11); the
            endpoint's own by default. Windows of another strategy or *zone* are others. A request that
            ``application_limits`` count in a scope of its endpoint is counted there twice, once by each.
        methods: Count these HTTP methods alone.
        per_method: Count each HTTP method apart.
        exempt_when: Answers True, from the endpoint's arguments, for a call that is not counted.
        override_defaults: False: the ``default_limits`` of a middleware apply as well. True stands for them on all
            calls of the route, also on those that these limits do not count: of other *methods*, *exempt_when*, or
            where there is *concurrency* alone.
        errors: Shape of refusals where no `billable` says.
        on_store_down: The store gives no answer: ``deny`` with 503, ``local`` (each process counts by itself, by the
            same rules) or ``allow``; what the `Metering` says by default (X.6).
        shadow: Refuse nothing, and tell what it would have: see `asgi_metering.shadow` (S4.16). Its counts are those
            that it has when it is live.

        per: ``"message"`` counts the messages that come in over a WebSocket; ``"call"``, the default, requests, and
            WebSockets as they are opened. *concurrency* is always of calls: of open WebSockets.
        on_excess: What becomes of a message over the limit: the WebSocket is closed with 4429 (``close``, the default),
            or goes on without that message (``drop``), and tells the client so in a text frame (``answer``).

    Raises:
        ConfigurationError: No limit at all, a text that is not in the grammar, or another argument that cannot work.

    A computed key that is neither a non-empty str nor an int, a computed cost that is not an int from 0 up, a computed
    limit that is not in the grammar, or an exemption that is no bool raises `ConfigurationError` on that request, and
    what a callable raises rises as it is. Either way the endpoint does not run, nothing is counted, and the log names
    endpoint, argument and callable.
    """
    if not (limits or levels or configured) and concurrency is None and global_concurrency is None:
        raise ConfigurationError("rate_limited() limits nothing. Give it '60/minute', say, or concurrency=4.")
    check_errors(errors)
    check_flag(shadow=shadow)
    if shadow:
        check_shadow_per(per)
    check_store_down("rates", on_store_down)
    # Unknown zones are refused here; windows are made when a call comes.
    find_zone(check_zone(zone))
    if not callable(cost) and (type(cost) is not int or cost < 0):
        raise ConfigurationError(f"cost={cost!r} is not an int from 0 up.")
    if scope is not None:
        check_scope(scope)
    for name, flag in {"per_method": per_method, "override_defaults": override_defaults}.items():
        if type(flag) is not bool:
            raise ConfigurationError(f"{name}={flag!r} is no bool. Use True or False.")
    if exempt_when is not None and not callable(exempt_when):
        raise ConfigurationError(f"exempt_when={exempt_when!r} cannot be called. Pass a function.")
    if level == "global" and key != "global":
        raise ConfigurationError("level='global' is that of key='global', everybody together. Choose another name.")
    check_per("rate_limited", per, ("call", "message"))
    base = RatePolicy(
        limits=(),
        scope=scope or "",
        key=read_key(key),
        cost=From(cost, "cost") if callable(cost) else cost,
        errors=errors,
        on_store_down=on_store_down,
        level="" if level is None else check_level(level),
        shares=scope is not None,
        methods=read_methods(methods),
        per_method=per_method,
        exempt_when=None if exempt_when is None else From(exempt_when, "exempt_when"),
        # What only tells stands for nothing that counts.
        overrides=override_defaults and not shadow,
        shadow=shadow,
        per=per,
        on_excess=on_excess or "close",
    )
    first, *more = read_levels(
        base,
        limits,
        levels=levels,
        configured=configured,
        concurrency=concurrency,
        global_concurrency=global_concurrency,
        reading=LimitReading(strategy, zone),
    )
    check_messages((first, *more), per, on_excess)
    return Part(rates=first, more=tuple(more))


UNLIMITED = "__asgi_metering_unlimited__"


def unlimited(endpoint: Endpoint) -> Endpoint:
    """
    Mark *endpoint* as one that the ``default_limits`` of a middleware do not count; its own decorators still do.

    The ``application_limits`` of a middleware, which are counted before a route is known, leave requests out by
    ``exempt_when=``.

    Raises:
        ConfigurationError: *endpoint* is no function.
    """
    if isinstance(endpoint, Part) or not callable(endpoint):
        raise ConfigurationError(f"{endpoint!r} is no endpoint. Write @unlimited above its function.")
    try:
        setattr(getattr(endpoint, "__func__", endpoint), UNLIMITED, True)
    except AttributeError:
        raise ConfigurationError(f"{endpoint!r} takes no mark. Write @unlimited above its function.") from None
    return endpoint


def is_unlimited(endpoint: object) -> bool:
    """Whether *endpoint* is marked as `unlimited`."""
    return getattr(endpoint, UNLIMITED, None) is True


def gather(
    parts: Sequence[Part | Price], name: str, offered: Iterable[str], *, line: str | None = None
) -> EndpointPolicy:
    """
    One policy from parts, for what is no function: an app, an explicit gate. A bare amount is a fixed price.

    Args:
        parts: What the decorators take.
        name: Names it in answers and audits.
        offered: Names that callables of the parts may ask for, besides ``call``.
        line: Names the billing line where the parts do not; *name* by default.

    Raises:
        ConfigurationError: No part at all, or parts that contradict each other.
    """
    if not parts:
        raise ConfigurationError(f"{name} got no policy. Give it billable(...) or rate_limited(...).")
    policy = EndpointPolicy(name)
    parameters = {each: inspect.Parameter(each, inspect.Parameter.KEYWORD_ONLY) for each in offered}
    for part in parts:
        policy = merged(policy, part if isinstance(part, Part) else billable(part), parameters, line or name)
    if policy.charge is not None and policy.charge.count is not None:
        check_count(policy.charge.count, name, None, parameters)
    return policy
