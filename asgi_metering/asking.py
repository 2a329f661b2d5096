"""
Asking: the parts of an admission in the words of the store, from a policy and what is known of a call.

Sources, limits and slots, with the keys that they are counted by. Computes nothing that is not known already, and
asks nobody.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv6Address
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.arguments import ATTRIBUTE, From, NamedKey
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan
from asgi_metering.decisions import Reason, Refusal
from asgi_metering.errors import MeteringError
from asgi_metering.policies import ChargePolicy, RatePolicy
from asgi_metering.rates import BUCKET, RateLimit
from asgi_metering.rules.calendars import Period, boundaries
from asgi_metering.rules.operations import AllowanceSource, LeaseAsk, LimitAsk, SourceAsk, WalletSource, WindowKind
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import build
from asgi_metering.sources import Allowance

if TYPE_CHECKING:
    from asgi_metering.amounts import Amount
    from asgi_metering.attributes import Scalar
    from asgi_metering.call import Call
    from asgi_metering.caller import Caller

__all__ = [
    "REQUESTS",
    "attribute_of",
    "by_identity",
    "computed_key",
    "counted_as",
    "distinct",
    "hashed",
    "key_of",
    "lease_asks",
    "leveled",
    "limit_allowed",
    "limit_ask",
    "limits_of",
    "method_of",
    "network_of",
    "root_of_rate",
    "source_asks",
]

REQUESTS = "requests"
DAY_S = 86_400.0

NEVER_FITS: Final = MAX_AMOUNT + 1
"""A cost that no limit ever has room for, and that every store computes with exactly."""


def source_asks(call: Call, charge: ChargePolicy, now: float) -> tuple[SourceAsk, ...]:
    """What *call* asks of the sources of *charge* around *now*."""
    asks: list[SourceAsk] = []
    for payer, members in groupby(charge.sources, key=attrgetter("payer")):
        group = list(members)
        split = any(source.split for source in group)
        place = ("", "", split)
        if payer is not None:
            # Of each payer: counted at home, at somebody's expense.
            place = ("" if group[0].each else call.accounts.get(payer.name, ""), payer.name, split)
        for source in group:
            if isinstance(source, Allowance):
                limit = call.unit.parts(limit_allowed(call, source), f"allowance {source.name!r}")
                if source.days is not None:
                    asks.append(AllowanceSource(source.name, limit, (), source.days * DAY_S, *place))
                    continue
                edges = boundaries(Period(source.per), source.zone, now, source.anchor)
                asks.append(AllowanceSource(source.name, limit, edges, 0.0, *place))
            else:
                overdraft = call.unit.parts(source.overdraft, "overdraft") if source.overdraft else 0
                asks.append(WalletSource(overdraft, *place))
    return tuple(asks)


def limit_allowed(call: Call, source: Allowance) -> Amount:
    """What a window of *source* allows to *call*, in whole units, once its payer is known."""
    if source.is_computed:
        return call.allowed[id(source)]
    return source.limit_for(call.caller.plan if call.caller is not None else None)


def lease_asks(rate: RatePolicy, key: str, root: str) -> list[LeaseAsk]:
    """The slots of *rate* that a call with this *key* asks for."""
    asks = []
    for slots in rate.concurrency:
        if slots.level == "global":
            asks.append(LeaseAsk(rate.scope, f"{rate.scope}|global", slots.limit, slots.level))
        else:
            pool = rooted(f"{rate.scope}|{key}", root)
            asks.append(LeaseAsk(rate.scope, pool, slots.limit, rate.level or slots.level))
    return asks


def root_of_rate(call: Call, rate: RatePolicy) -> str:
    """
    The payer beside whose accounts a rate's counters are kept, so that most calls ask one place.

    That of a caller is the one that `identify` names, whoever pays this call: one caller has one counter. What callers
    of several payers may be counted by together, such as an attribute of theirs, is kept beside none.
    """
    if rate.key == "payer" and call.payer:
        return call.payer
    if rate.key in ("caller", "payer") and call.caller is not None:
        return call.caller.payer
    return ""


def limit_ask(rate: RatePolicy, limit: RateLimit, key: str, cost: int, now: float) -> LimitAsk:
    """What a call that is counted by *key* asks of *limit*, one of those of *rate*, around *now*."""
    window_s: float = limit.window_s
    edges: tuple[float, ...] = ()
    if limit.period:
        edges = boundaries(Period(limit.period), limit.zone, now)
        window_s = edges[2] - edges[1]
    if cost > MAX_AMOUNT:
        # A function may have it from the client: what no store can compute with must not look like one that is down.
        cost = NEVER_FITS
    kind = _KINDS[limit.strategy]
    counted = f"{rate.scope}|{counted_as(rate, limit)}|{key}"
    if limit.burst:
        return LimitAsk(limit.name, counted, kind, limit.burst, window_s, cost, limit.meter, refill=limit.amount)
    return build(LimitAsk, (limit.name, counted, kind, limit.amount, window_s, cost, limit.meter, edges, 0))


def distinct(limits: list[LimitAsk]) -> list[LimitAsk]:
    """
    *limits*, of which no two take from one count: of those the smallest, at the highest cost.

    What is chosen for a call may be what is written beside it, and limits of a middleware may share a scope.
    """
    if len({limit.key for limit in limits}) == len(limits):
        return limits
    found: dict[str, LimitAsk] = {}
    for limit in limits:
        other = found.setdefault(limit.key, limit)
        smallest = min(other, limit, key=attrgetter("limit"))
        found[limit.key] = smallest._replace(cost=max(other.cost, limit.cost))
    return list(found.values())


def limits_of(call: Call, rate: RatePolicy) -> tuple[RateLimit, ...]:
    """The limits of *rate* for *call*, but for those that are computed."""
    if not rate.chosen:
        return rate.limits
    plan = call.caller.plan if call.caller is not None else None
    limits = list(rate.limits)
    for each in rate.chosen:
        if isinstance(each, LimitByPlan):
            limits.append(each.limit_for(plan))
        elif isinstance(each, ConfiguredLimits):
            call.metering.limits.used_by(each)
            for text in call.metering.limits.texts_for(each.name, plan):
                limits += each.reading.read_all(text)
    return tuple(limits)


def counted_as(rate: RatePolicy, limit: RateLimit) -> str:
    """
    What tells the counts of *limit* from those of others in the scope of *rate*.

    In a scope that endpoints share, and for a limit that changes from call to call, that is its window and not its
    amount: what is counted by one of them counts for all (S4.11). Windows that move otherwise, or begin in another
    zone, are no window of each other: whoever finds the count of such a one begins at nothing, again and again.
    """
    told = limit.name
    if rate.shares or (rate.chosen and limit not in rate.limits):
        # What flows back at another rate is another bucket.
        rate_of = f"{limit.amount}/" if limit.burst else ""
        told = f"{limit.strategy}:{limit.meter}/{rate_of}{limit.period or ''}{_span_of(limit.window_s)}"
    elif limit.strategy not in _TOLD_BY_NAME:
        told = f"{limit.strategy}:{told}"
    if limit.period:
        told = f"{told}:{limit.zone}"
    return f"{told} {'+'.join(sorted(rate.methods))}" if rate.methods else told


def leveled(refusal: Refusal, rates: Iterable[RatePolicy]) -> Refusal:
    """*refusal* with the level of that of *rates* which refused, where the name of its limit says one (S0.42)."""
    if refusal.reason not in _OF_RATES:
        return refusal
    levels = [rate.level for rate in rates if rate.level and refusal.name.startswith(f"{rate.level}-")]
    return refusal._replace(level=max(levels, key=len)) if levels else refusal


_OF_RATES = (Reason.RATE_LIMIT, Reason.EXCEEDS_LIMIT)

_TOLD_BY_NAME = ("fixed", BUCKET)
"""Strategies that the names of limits tell apart: those of buckets have their burst."""


def _span_of(window_s: float) -> str:
    """*window_s* as counts have it, which is short where six digits are all of it."""
    short = f"{window_s:g}"
    return short if float(short) == window_s else repr(window_s)


_KINDS = {str(kind): kind for kind in WindowKind}
"""How windows move, by the name of their strategy: to ask the enum itself takes as long as all the rest of an ask."""


def key_of(call: Call, rate: RatePolicy) -> str:
    """
    What is counted together, of a rate whose key is not computed. Addresses and attributes are hashed (S3.48); ids are
    not personal by contract.

    Raises:
        MeteringError: Nobody is known.
    """
    wanted, caller = rate.key, call.caller
    if wanted == "caller" and caller is not None:
        return f"caller:{caller.id}"
    if wanted == "payer" and call.payer:
        return f"payer:{call.payer}"
    if wanted in _OF_EVERYBODY:
        # A route is told apart by its name, in a scope that it may share with others.
        return "everybody" if wanted == "global" or call.policy is None else f"everybody:{call.policy.name}"
    if wanted != "address" and caller is not None:
        value = attribute_of(caller, str(wanted))
        return f"caller:{caller.id}" if value is None else hashed(f"{wanted}:{value}")
    origin = call.opening.origin
    address = origin.address if origin is not None else None
    if not address:
        raise MeteringError(
            f"The limits of {rate.scope!r} have nobody to count: no caller is known and the server reports no "
            f"address. Give rate_limited() a key, or Metering an identify function."
        )
    return hashed(network_of(address))


_OF_EVERYBODY = ("route", "global")


def by_identity(rate: RatePolicy) -> bool:
    """Whether *rate* counts by what `identify` answers."""
    return isinstance(rate.key, str) and (rate.key in _BY_IDENTITY or rate.key.startswith(ATTRIBUTE))


_BY_IDENTITY = ("caller", "payer")


def attribute_of(caller: Caller, key: str) -> Scalar | None:
    """The attribute that *key* names, ``"attribute:team"`` for one; None where it names none, or *caller* has none."""
    return caller.attributes.get(key.removeprefix(ATTRIBUTE)) if key.startswith(ATTRIBUTE) else None


def network_of(address: str) -> str:
    """
    What of an address is counted together: of IPv6 its /64, all of which one client has to choose from.

    A port is no part of it, in none of the forms in which proxies tell one: with each connection comes another.

    Source: RFC 6177 (an end site gets a /64 at the least), RFC 4291 section 2.5.5.2 (IPv4 as seen by an IPv6 socket),
    RFC 7239 section 6 (an address with a port).
    """
    if ":" not in address:
        return address
    told = _WITH_PORT.match(address)
    if told is not None:
        address = told[1] or told[2]
        if told[2]:
            return address
    try:
        known = IPv6Address(address)
    except ValueError:
        # Of whatever a server says instead, all.
        return address
    if known.ipv4_mapped is not None:
        return str(known.ipv4_mapped)
    return f"{IPv6Address(int(known) >> 64 << 64)}/64"


_WITH_PORT = re.compile(r'"?(?:\[([^\]]+)\](?::[^:"]*)?|([0-9]+(?:\.[0-9]+){3}):[^:"]*)"?\Z')
"""``192.0.2.1:4711``, ``[2001:db8::1]`` and ``[2001:db8::1]:4711``, or these in quotes."""


async def computed_key(call: Call, rate: RatePolicy, wanted: From, arguments: Mapping[str, Any]) -> str:
    """The key that is computed for *call*, apart from what functions of other levels answer; raises as they do."""
    answered = await wanted.compute(call, arguments)
    if isinstance(wanted, NamedKey):
        return hashed(f"{wanted}:{answered}")
    # Clients may choose what is answered here: it is nobody's address, and no attribute.
    return hashed(f"{rate.level}={answered}")


def method_of(call: Call, known: Collection[str] = ()) -> str:
    """
    The HTTP method of *call*, in capitals; of those that nobody knows, which clients may invent, one name.

    Empty outside HTTP. Frameworks that take ``post`` for POST, as Django and Quart do, must not take it past a limit of
    POST.
    """
    origin = call.opening.origin
    if origin is None:
        return ""
    method = origin.target[0].decode("latin-1").upper()
    return method if method in known or method in _METHODS else "OTHER"


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "QUERY"})
"""RFC 9110 section 9, RFC 5789, and draft-ietf-httpbis-safe-method-w-body."""


def hashed(value: object) -> str:
    """*value* as it may be kept."""
    return hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
