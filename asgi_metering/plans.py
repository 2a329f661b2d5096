"""
Plans: what the policy of an endpoint asks of the store, worked out once and not for every call.

A plan is *plain* where everything is known as soon as it is known who calls: a fixed price, sources and limits of the
call's own payer, and nothing that anybody computes. Such a call is asked for without one step that waits. Decides
nothing, and asks nobody.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from asgi_metering.arguments import ATTRIBUTE
from asgi_metering.asking import (
    REQUESTS,
    attribute_of,
    by_identity,
    distinct,
    key_of,
    lease_asks,
    limit_ask,
    limits_of,
    root_of_rate,
    source_asks,
)
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan
from asgi_metering.outage import in_doubt_of
from asgi_metering.policies import ChargePolicy, ComputedLimit, EndpointPolicy, RatePolicy
from asgi_metering.prices import FixedPrice
from asgi_metering.rules.operations import Admit, AllowanceSource, LeaseAsk, LimitAsk
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import NEVER, build
from asgi_metering.sources import Allowance

if TYPE_CHECKING:
    from asgi_metering.amounts import Unit
    from asgi_metering.call import Call
    from asgi_metering.caller import Caller
    from asgi_metering.metering import Metering

__all__ = ["Plan", "Plans"]

MAX_PLANS = 1_024
"""Policies whose plans are remembered, as long as they live: those that handlers make for each request come and go."""

MAX_CALLERS = 4_096
"""Callers whose asks one plan remembers: some megabytes at the most."""


_Place: TypeAlias = tuple[object, ...]
"""Who asks, by all that its asks depend on: the ids of caller and payer, its plan, and what that is allowed."""


class _Asks(NamedTuple):
    """
    What one caller asks of a plan, up to a time.

    Attributes:
        settled: What of an `Admit` is the same for all of its calls: from the unit to the line.
        until: When other windows are to be asked for.
    """

    settled: tuple[object, ...]
    until: float


class Plan:
    """
    What one policy asks under certain layers.

    Args:
        metering, policy, features: Of `Plans.of`.
        gone: Called when nobody keeps the policy any more.

    Attributes:
        policy: Whose plan it is, as long as that lives.
        charge: What is charged; None where nothing is, and of a plan that is not plain: what that computes may refer to
            anything, such as the request that it was made for.
        rates: The limits that count here; likewise.
        price: What the charge asks; likewise.
        unit: Of the amounts.
        amount: Smallest parts of a fixed price; 0 where there is none.
        is_plain: Whether a call can be asked for by `asked`.
    """

    __slots__ = (
        "_asks",
        "_grace_s",
        "_in_doubt",
        "_ttl_s",
        "_varying",
        "amount",
        "charge",
        "is_plain",
        "policy",
        "price",
        "rates",
        "unit",
    )

    def __init__(
        self,
        metering: Metering,
        policy: EndpointPolicy,
        features: frozenset[str],
        gone: Callable[[object], object] | None = None,
    ) -> None:
        self.policy = weakref.ref(policy, gone)
        self.charge = policy.charge if "credits" in features else None
        self.rates = policy.gated if "rates" in features else ()
        charge = self.charge
        self.price = charge.price if charge is not None and isinstance(charge.price, FixedPrice) else None
        self.unit: Unit = metering.counted(None if charge is None else charge.unit)
        self.amount = 0
        if self.price is not None:
            self.amount = self.unit.parts(self.price.amount)
        self._ttl_s = metering.ttl_s if charge is None else charge.ttl_s
        self._grace_s = metering.grace_s if charge is None else charge.grace_s
        self._in_doubt = in_doubt_of(charge)
        self._asks: dict[_Place, _Asks] = {}
        # Whoever declared limits by plan may change them while we run: they are looked up for each call.
        self._varying: list[Callable[[Caller], object]] = [
            *_varying_sources(charge),
            *_varying_rates(self.rates, metering),
        ]
        # Without the gate a priced call is reported all the same, and that is not told here.
        is_enforced = policy.charge is None or charge is not None or "events" not in features
        asks_anything = bool(self.amount or any(rate.limits or rate.chosen or rate.concurrency for rate in self.rates))
        # What counts everybody together has nobody to ask for.
        asks_who = charge is not None or any(map(by_identity, self.rates))
        is_alone = not policy.has_beside and not metering.shadow
        self.is_plain = is_alone and is_enforced and asks_anything and asks_who and _is_plain_charge(charge)
        # What each message of a session is let in by is worked out before the session is.
        self.is_plain = self.is_plain and _are_plain_rates(self.rates) and not policy.messages
        if not self.is_plain:
            self.charge, self.price, self.rates, self._varying = None, None, (), []

    def asked(self, call: Call, caller: Caller, now: float) -> Admit:
        """What *call* of *caller*, whose payer is known, asks around *now*."""
        place: _Place = (caller.id, caller.payer, caller.plan)
        for each in self._varying:
            place += (each(caller),)
        asks = self._asks.get(place)
        if asks is None or now >= asks.until:
            asks = self._remember(place, self._asked_by(call, now))
        return build(Admit, (call.id, call.payer, *asks.settled[:10], call.facts, None, None))

    def _remember(self, place: _Place, asks: _Asks) -> _Asks:
        if len(self._asks) >= MAX_CALLERS:
            # All at once: those that call will be known again after their next call.
            self._asks.clear()
        self._asks[place] = asks
        return asks

    def _asked_by(self, call: Call, now: float) -> _Asks:
        limits: list[LimitAsk] = []
        leases: list[LeaseAsk] = []
        for rate in self.rates:
            key, root = key_of(call, rate), root_of_rate(call, rate)
            cost = rate.cost
            assert isinstance(cost, int)  # noqa: S101 -- that is what plain means
            place = rooted(key, root)
            limits += [limit_ask(rate, limit, place, cost, now) for limit in limits_of(call, rate)]
            leases += lease_asks(rate, key, root)
        sources = () if self.charge is None or not self.amount else source_asks(call, self.charge, now)
        calendars = [limit.boundaries for limit in limits if limit.boundaries]
        calendars += [each.boundaries for each in sources if isinstance(each, AllowanceSource) and each.boundaries]
        # When the window that is the current one by our clock is over, others are to be sent along with it.
        until = min((edges[2] for edges in calendars), default=NEVER)
        # fmt: off
        return _Asks((
            self.unit.name, self.amount, self.amount, sources, tuple(distinct(limits)), tuple(leases),
            self._ttl_s, self._grace_s, self._in_doubt, "" if self.charge is None else self.charge.line,
        ), until)
        # fmt: on


def _is_plain_charge(charge: ChargePolicy | None) -> bool:
    return charge is None or (
        isinstance(charge.price, FixedPrice)
        and all(each is None for each in (charge.skip_if, charge.payer, charge.idempotency, charge.key, charge.once))
        and all(source.payer is None for source in charge.sources)
        and not any(isinstance(source, Allowance) and source.is_computed for source in charge.sources)
        and charge.hold.at_least is None
        and charge.per == "call"
        and charge.callers is None
        and not charge.correlates
    )


def _are_plain_rates(rates: tuple[RatePolicy, ...]) -> bool:
    """Addresses are not among them: there is no end of them, so that nothing is to be remembered of each."""
    return all(
        isinstance(rate.key, str)
        and rate.key != "address"
        and rate.asker is None
        and isinstance(rate.cost, int)
        and not rate.is_selective
        and all(limit.meter == REQUESTS for limit in rate.limits)
        and not any(isinstance(each, ComputedLimit) for each in rate.chosen)
        and all(each.meter == REQUESTS for each in rate.chosen if isinstance(each, LimitByPlan))
        for rate in rates
    )


def _varying_sources(charge: ChargePolicy | None) -> Iterator[Callable[[Caller], object]]:
    """What the sources of *charge* allow a caller, of those that say so by plan."""
    for source in () if charge is None else charge.sources:
        if isinstance(source, Allowance) and isinstance(source.limit, Mapping):
            yield lambda caller, source=source: source.limit_for(caller.plan)  # type: ignore[misc]


def _varying_rates(rates: tuple[RatePolicy, ...], metering: Metering) -> Iterator[Callable[[Caller], object]]:
    """What *rates* count a caller by, and what they allow it, of those that do not say so for ever."""
    for rate in rates:
        if isinstance(rate.key, str) and rate.key.startswith(ATTRIBUTE):
            yield lambda caller, key=rate.key: attribute_of(caller, key)  # type: ignore[misc]
        for each in rate.chosen:
            if isinstance(each, LimitByPlan):
                yield lambda caller, each=each: each.text_for(caller.plan)  # type: ignore[misc]
            elif isinstance(each, ConfiguredLimits):
                yield lambda caller, each=each: metering.limits.texts_for(each.name, caller.plan)  # type: ignore[misc]


class Plans:
    """
    The plans of one metering.

    Args:
        metering: Whose.
    """

    __slots__ = ("_known", "_metering")

    def __init__(self, metering: Metering) -> None:
        self._metering = metering
        self._known: dict[tuple[int, frozenset[str]], Plan] = {}

    def of(self, policy: EndpointPolicy, features: frozenset[str]) -> Plan:
        """The plan of *policy* under the layers *features*, worked out once; raises as `Metering.counted`."""
        # By the object and not by what it says: to compare two policies takes longer than to work one out. The plan
        # goes before its policy does, so that no other one can have its id.
        place = (id(policy), features)
        plan = self._known.get(place)
        if plan is None:
            if len(self._known) >= MAX_PLANS:
                self._known.clear()
            plan = self._known[place] = Plan(self._metering, policy, features, partial(self._known.pop, place))
        return plan
