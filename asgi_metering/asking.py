"""
Asking: the parts of an admission in the words of the store, from a policy and what is known of a call.

Sources, limits and slots, with the keys that they are counted by. Computes nothing that is not known already, and
asks nobody.
"""

from __future__ import annotations

import hashlib
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

from asgi_metering.errors import MeteringError
from asgi_metering.policies import ChargePolicy, RatePolicy
from asgi_metering.rates import RateLimit
from asgi_metering.rules.calendars import Period, boundaries
from asgi_metering.rules.operations import AllowanceSource, LeaseAsk, LimitAsk, SourceAsk, WalletSource, WindowKind
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import build
from asgi_metering.sources import Allowance

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["REQUESTS", "hashed", "key_of", "lease_asks", "limit_ask", "root_of_rate", "source_asks"]

REQUESTS = "requests"
DAY_S = 86_400.0


def source_asks(call: Call, charge: ChargePolicy, now: float) -> tuple[SourceAsk, ...]:
    """What *call* asks of the sources of *charge* around *now*."""
    asks: list[SourceAsk] = []
    plan = call.caller.plan if call.caller is not None else None
    for payer, members in groupby(charge.sources, key=attrgetter("payer")):
        group = list(members)
        split = any(source.split for source in group)
        place = ("", "", split) if payer is None else (call.accounts.get(payer.name, ""), payer.name, split)
        for source in group:
            if isinstance(source, Allowance):
                limit = call.unit.parts(source.limit_for(plan), f"allowance {source.name!r}")
                if source.days is not None:
                    asks.append(AllowanceSource(source.name, limit, (), source.days * DAY_S, *place))
                    continue
                edges = boundaries(Period(source.per), source.zone, now, source.anchor)
                asks.append(AllowanceSource(source.name, limit, edges, 0.0, *place))
            else:
                overdraft = call.unit.parts(source.overdraft, "overdraft") if source.overdraft else 0
                asks.append(WalletSource(overdraft, *place))
    return tuple(asks)


def lease_asks(rate: RatePolicy, key: str, root: str) -> list[LeaseAsk]:
    """The slots of *rate* that a call with this *key* asks for."""
    asks = []
    for slots in rate.concurrency:
        if slots.level == "global":
            asks.append(LeaseAsk(rate.scope, f"{rate.scope}|global", slots.limit, slots.level))
        else:
            asks.append(LeaseAsk(rate.scope, rooted(f"{rate.scope}|{key}", root), slots.limit, slots.level))
    return asks


def root_of_rate(call: Call, rate: RatePolicy) -> str:
    """
    The payer beside whose accounts a rate's counters are kept, so that most calls ask one place.

    That of a caller is the one that `identify` names, whoever pays this call: one caller has one counter.
    """
    if rate.key == "payer" and call.payer:
        return call.payer
    if isinstance(rate.key, str) and rate.key != "address" and call.caller is not None:
        return call.caller.payer
    return ""


def limit_ask(scope: str, limit: RateLimit, key: str, cost: int, now: float) -> LimitAsk:
    """What a call that is counted by *key* asks of *limit* around *now*."""
    window_s: float = limit.window_s
    edges: tuple[float, ...] = ()
    if limit.period:
        edges = boundaries(Period(limit.period), limit.zone, now)
        window_s = edges[2] - edges[1]
    name, kind = limit.name, _KINDS[limit.strategy]
    counted = f"{scope}|{name}|{key}"
    if limit.burst:
        return LimitAsk(name, counted, kind, limit.burst, window_s, cost, limit.meter, refill=limit.amount)
    return build(LimitAsk, (name, counted, kind, limit.amount, window_s, cost, limit.meter, edges, 0))


_KINDS = {str(kind): kind for kind in WindowKind}
"""How windows move, by the name of their strategy: to ask the enum itself takes as long as all the rest of an ask."""


def key_of(call: Call, rate: RatePolicy) -> str:
    """
    What is counted together, of a rate whose key is not computed. Addresses are hashed (S3.48); ids are not personal
    by contract.

    Raises:
        MeteringError: Nobody is known.
    """
    wanted = rate.key
    if wanted == "payer" and call.payer:
        return f"payer:{call.payer}"
    if wanted != "address" and call.caller is not None:
        return f"caller:{call.caller.id}"
    origin = call.opening.origin
    address = origin.address if origin is not None else None
    if not address:
        raise MeteringError(
            f"The limits of {rate.scope!r} have nobody to count: no caller is known and the server reports no "
            f"address. Give rate_limited() a key, or Metering an identify function."
        )
    return hashed(address)


def hashed(value: object) -> str:
    """*value* as it may be kept."""
    return hashlib.blake2b(str(value).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
