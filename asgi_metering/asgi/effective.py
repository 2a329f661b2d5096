"""
Effective limits: everything that limits each route of an application, and where it was said.

Reads what the audit finds; asks no store and counts nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from asgi_metering.arguments import From, NamedKey
from asgi_metering.asgi.audit import Layer, Row, layers_of, routes_of
from asgi_metering.asgi.flat import FlatLimits
from asgi_metering.chosen import ConfiguredLimits, LimitByPlan
from asgi_metering.computed import name_of
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import decorated
from asgi_metering.limiting import FREE_METHODS
from asgi_metering.named import NamedLimits
from asgi_metering.policies import RatePolicy

__all__ = ["ANY_OTHER", "EffectiveLimit", "Origin", "check_names", "distinct", "effective_limits", "limits_of_row"]

Origin: TypeAlias = Literal["decorator", "metered_app", "default", "application"]
"""Where a limit was said: on the endpoint or a dependency of it, around an app, or in a middleware."""

ANY_OTHER = "*"
"""The path of requests whose route cannot be told."""


@dataclass(frozen=True, slots=True)
class EffectiveLimit:
    """
    One limit, as it applies to one route.

    Attributes:
        path: Of the route, as far as prefixes can be told; ``"*"`` for requests whose route cannot be told.
        methods: Of the route; empty for an app.
        endpoint: What it runs, by name.
        limit: As it was written: ``"60/minute"``, ``"free: 20/minute, pro: 200/minute"``, ``"4 at once"``; and
            ``"60/minute (shadow)"`` where it only tells.
        source: Where it was said.
        key: What is counted together, as it was written; a function by its name.
        level: What the key is called in refusals; empty where it has no name.
        strategy: How its window moves; empty for calls at once.
        cost: What a call takes of it; a function by its name.
        scope: The name of its counts: routes with the same scope and key are counted together.
        applies: Which requests it counts, in words; empty for all.
    """

    path: str
    methods: tuple[str, ...]
    endpoint: str
    limit: str
    source: Origin
    key: str
    level: str
    strategy: str
    cost: str
    scope: str
    applies: str


def effective_limits(app: Any) -> list[EffectiveLimit]:
    """
    Everything that limits the routes of *app*, in their order, and last what limits requests of no known route.

    Args:
        app: Any ASGI app with the middleware on it or around it; one whose routes cannot be read shows the last alone.

    Source: S2.30.
    """
    found = [limit for row in routes_of(app) for limit in limits_of_row(row)]
    return found + list(limits_of_row(Row(ANY_OTHER, (), None, None, layers_of(app)), is_known=False))


def limits_of_row(row: Row, *, is_known: bool = True) -> Iterator[EffectiveLimit]:
    """What limits one route, its own first; *is_known*: whether it is one, and no stand-in for those that are not."""
    if row.methods and not set(row.methods) - set(FREE_METHODS):
        return
    for policy in row.policies:
        yield from _told(row, "decorator", policy.rates)
    if row.around is not None and row.around not in row.policies:
        yield from _told(row, "metered_app", row.around.rates)
    for limits in _flat(row.layers):
        # Of a WebSocket the application's own count the handshake.
        if not row.is_websocket:
            yield from _told(row, "default", limits.default(row if is_known else None))
        yield from _told(row, "application", limits.application)


def _flat(layers: Iterable[Layer]) -> Iterator[FlatLimits]:
    for layer in layers:
        if layer.application_limits or layer.default_limits:
            yield FlatLimits(layer.application_limits, layer.default_limits)


def _told(row: Row, source: Origin, policies: Sequence[RatePolicy]) -> Iterator[EffectiveLimit]:
    for rate in policies:
        for limit, strategy, is_weighed in _limits(rate):
            yield EffectiveLimit(
                path=row.path,
                methods=row.methods,
                endpoint="" if row.endpoint is None else name_of(row.endpoint),
                limit=f"{limit}{_unusual(rate)}",
                source=source,
                key=_key(rate),
                level=rate.level,
                strategy=strategy,
                cost="" if is_weighed else _computed(rate.cost),
                scope=rate.scope,
                applies=_applies(rate),
            )


def _unusual(rate: RatePolicy) -> str:
    """What is not said by the limit's text."""
    told = "" if rate.per == "call" else f" per {rate.per}"
    return f"{told} (shadow)" if rate.shadow else told


def _limits(rate: RatePolicy) -> Iterator[tuple[str, str, bool]]:
    """(text, strategy, whether something else than its cost is taken) of each limit."""
    for limit in rate.limits:
        yield limit.text, limit.strategy, limit.meter != "requests"
    for each in rate.chosen:
        strategy = each.reading.strategy
        if isinstance(each, LimitByPlan):
            text = ", ".join(f"{plan}: {limit}" for plan, limit in each.texts.items())
            yield text, strategy, each.meter != "requests"
        elif isinstance(each, ConfiguredLimits):
            yield f"configured as {each.name!r}", strategy, False
        else:
            yield _computed(each.function), strategy, False
    for told, moves in rate.asker.texts() if rate.asker is not None else ():
        yield told, moves, False
    for slots in rate.concurrency:
        yield f"{slots.limit} at once{' of everybody' if slots.level == 'global' else ''}", "", True


def _key(rate: RatePolicy) -> str:
    if rate.asker is not None:
        return f"as {rate.scope} says"
    return str(rate.key) if isinstance(rate.key, NamedKey) else _computed(rate.key)


def _computed(value: Any) -> str:
    return f"{name_of(value.function)}()" if isinstance(value, From) else str(value)


def _applies(rate: RatePolicy) -> str:
    told = []
    if rate.methods:
        told.append(f"{', '.join(sorted(rate.methods))} alone")
    if rate.per_method:
        told.append("each method apart")
    if rate.exempt_when is not None:
        told.append(f"not when {_computed(rate.exempt_when)}")
    return "; ".join(told)


def check_names(rows: Sequence[Row], layers: Iterable[Layer], metering: Any) -> tuple[list[str], list[str]]:
    """
    Compare the names that limits refer to with those that *metering* knows, and those of their scopes with each other.

    Args:
        rows: Of the audit.
        layers: In front of all of them.
        metering: Of these layers.

    Returns errors, a sentence each with the mend, and warnings: without rows other endpoints of this process may
    belong to another application.
    """
    used = [(f"{row.path} ({policy.name})", rate) for row in rows for policy in _all(row) for rate in policy.rates]
    for limits in _flat(distinct((*layers, *(layer for row in rows for layer in row.layers)))):
        told = "The middleware's limit"
        used += [(told, rate) for rate in (*limits.application, *limits.default(None))]
    others = [(guard.policy.name, rate) for guard in decorated() for rate in guard.policy.rates]
    errors = [*_unknown(used, metering), *_torn(used), *(_unused([*used, *others], metering.limits) if rows else ())]
    return errors, [] if rows else list(_unknown(others, metering))


def distinct(layers: Iterable[Layer]) -> list[Layer]:
    """Each of *layers* once; compared, for what a user wrote into one may have no hash."""
    seen: list[Layer] = []
    for layer in layers:
        if layer not in seen:
            seen.append(layer)
    return seen


def _all(row: Row) -> Iterator[Any]:
    yield from row.policies
    if row.around is not None:
        yield row.around


def _unknown(used: Iterable[tuple[str, RatePolicy]], metering: Any) -> Iterator[str]:
    told = set()
    for where, rate in used:
        for failure in _failures(rate, metering):
            if (where, failure) not in told:
                told.add((where, failure))
                yield f"{where} cannot be limited. {failure}"


def _torn(used: Iterable[tuple[str, RatePolicy]]) -> Iterator[str]:
    """
    One scope of live limits and of some in the shadow: the latter would take what the former give.

    Whether two of them are one count is not asked: functions compute keys and limits, and configured ones change. A
    scope may also be that which others have by themselves: the name of an endpoint, or ``"application"``. Where nobody
    says a scope, an endpoint has live limits beside those that it tries out.
    """
    known: dict[str, dict[bool, str]] = {}
    shared = set()
    for where, rate in used:
        known.setdefault(rate.scope, {}).setdefault(rate.shadow, where)
        if rate.shares:
            shared.add(rate.scope)
    for scope, places in known.items():
        if scope in shared and len(places) > 1:
            yield (
                f"{places[False]} has limits in the scope {scope!r}, and {places[True]} has some with shadow=True in "
                f"it, whose calls would take what the live ones may use. Put all of them in the shadow, or give those "
                f"another scope."
            )


def _failures(rate: RatePolicy, metering: Any) -> Iterator[str]:
    if isinstance(rate.key, NamedKey) and rate.key.name not in metering.keys:
        yield (
            f"It is counted by {str(rate.key)!r}, which the Metering does not know. Pass "
            f"Metering(keys={{{rate.key.name!r}: function}})."
        )
    for each in rate.chosen:
        if isinstance(each, ConfiguredLimits):
            try:
                metering.limits.used_by(each)
            except ConfigurationError as failure:
                yield str(failure)


def _unused(used: Iterable[tuple[str, RatePolicy]], limits: NamedLimits) -> Iterator[str]:
    """A cap that was configured and would be dead (S2.30)."""
    named = {each.name for _, rate in used for each in rate.chosen if isinstance(each, ConfiguredLimits)}
    for name in limits:
        if name not in named:
            yield (
                f"The limits {name!r} are configured, and no endpoint uses them. Write "
                f"rate_limited(configured={name!r}) on it, or take them out of Metering(limits=)."
            )
