"""
The startup audit: which route is metered how, and what is decorated in vain.

Walks the route tables of Starlette, FastAPI and Litestar, included routers and mounts too; other apps have none to
walk. Only looks, and never at request time.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from asgi_metering.amounts import Unit, exact_amount
from asgi_metering.errors import AmountError, ConfigurationError
from asgi_metering.guards import Guard, Part, decorated, guard_of
from asgi_metering.keying import check_shared
from asgi_metering.metering import ALL_FEATURES, Metering
from asgi_metering.outage import check_journal
from asgi_metering.policies import ChargePolicy, EndpointPolicy, misplaced
from asgi_metering.pricing import check_amounts
from asgi_metering.sources import Allowance, what_differs

__all__ = ["Layer", "Report", "Row", "audit", "has_routes", "layers_of", "routes_of"]

WEBSOCKET = "WEBSOCKET"
"""What stands where an HTTP route has its methods."""

HTTP_HANDLERS = {name: name.upper() for name in ("get", "post", "put", "patch", "delete", "head", "options")}
WEBSOCKET_HANDLERS = dict.fromkeys(("dispatch", "on_connect", "on_receive", "on_disconnect"), WEBSOCKET)
"""Methods of class endpoints, by the HTTP method that they answer."""

LATE_HANDLERS = frozenset({"on_receive", "on_disconnect"})
"""Those of a WebSocket's class that are called once it is open: whoever comes to them was let in."""

LIMITS = ("application_limits", "default_limits")
"""What a layer says of limits, as an argument and on itself."""

MAX_DEPTH = 32
"""Nested apps and routers that are walked: deeper is a loop."""


class Layer(NamedTuple):
    """One of our layers below the outermost: what it enables, its metering, and its limits, as far as can be seen."""

    features: frozenset[str]
    metering: Any
    application_limits: tuple[Any, ...] = ()
    default_limits: tuple[Any, ...] = ()
    name: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """
    One routed endpoint.

    Attributes:
        path: As far as prefixes can be told.
        methods: Sorted; empty for a mounted app, ``WEBSOCKET`` alone for a WebSocket.
        endpoint: The function, class or app behind it.
        policy: What the decorators said; None for an unmetered one.
        layers: Ours on the way to it, such as those of a mounted application.
        around: What a `metered_app` on the way to it asks for already.
        dependencies: Decorated functions that FastAPI calls before it, as dependencies of the route, of its routers or
            of the application.
    """

    path: str
    methods: tuple[str, ...]
    endpoint: Any
    policy: EndpointPolicy | None
    layers: tuple[Layer, ...] = ()
    around: EndpointPolicy | None = None
    dependencies: tuple[Guard, ...] = ()

    @property
    def policies(self) -> tuple[EndpointPolicy, ...]:
        """What the endpoint and its dependencies ask for."""
        own = () if self.policy is None else (self.policy,)
        return (*own, *(guard.policy for guard in self.dependencies))

    @property
    def is_websocket(self) -> bool:
        """Whether it answers a WebSocket."""
        return WEBSOCKET in self.methods


@dataclass(slots=True)
class Report:
    """
    What the audit found.

    Attributes:
        rows: Every route, in order.
        errors: Why the application must not start; a sentence each, with the mend.
        warnings: What looks wrong and may be meant.
    """

    rows: list[Row] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def audit(app: Any, features: frozenset[str], unenforced: frozenset[str], metering: Any = None) -> Report:
    """
    Check the application *app* against the layers that stand in front of it.

    Args:
        app: Any ASGI app; without a route table there is nothing to find.
        features: What the layers enable.
        unenforced: What may run without its layer.
        metering: Of the layers in front: layers further in must have the same, and its unit must be able to count the
            prices. None checks neither.
    """
    report = Report(rows=list(routes_of(app)))
    if metering is not None:
        report.errors.extend(_other_meterings(report.rows, metering))
    for row in report.rows:
        if isinstance(row.endpoint, Part):
            report.errors.append(f"{row.path} has a metering decorator for its endpoint. {row.endpoint.mend}")
        else:
            _check_row(row, report, features | unenforced, metering)
    report.errors.extend(_other_scales(report.rows, metering))
    report.errors.extend(_torn_allowances(report.rows, metering))
    if metering is not None and metering.shadow:
        report.warnings.extend(_unclaimed(report.rows))
    _check_reach(report)
    if metering is not None and not metering.identifies and not metering.shadow:
        report.warnings.extend(_nobody(report.rows, features))
    return report


def _check_row(row: Row, report: Report, covered: frozenset[str], metering: Any) -> None:
    covered = covered.union(*(layer.features for layer in row.layers))
    if len(row.policies) > 1:
        names = " and ".join(policy.name for policy in row.policies)
        report.errors.append(
            f"{row.path} is metered as {names}, and a call is metered once. Write all of it on the endpoint, or all of "
            f"it on one dependency."
        )
    report.errors.extend(_misplaced_inside(row))
    for policy in row.policies:
        report.errors.extend(_missing_layers(row, policy, covered))
        report.errors.extend(_nested(row, policy))
        report.errors.extend(_misplaced(row, policy))
        if metering is not None:
            report.errors.extend(_uncountable(row, policy, metering.unit))
            report.errors.extend(_unkept(row, policy, metering))
        report.warnings.extend(_one_for_all(row, policy))
    if row.policy is not None and row.policy.charge is not None and {"GET", "HEAD"} <= set(row.methods):
        report.warnings.append(
            f"{row.path} ({row.policy.name}) is billable, and answers HEAD by running the same handler, free of charge."
            f" If that spends money, answer HEAD by a route of its own before it, or make it a POST."
        )


def _other_scales(rows: list[Row], metering: Any) -> Iterator[str]:
    """One unit with two scales: each would read the other's amounts wrong by powers of ten."""
    known: dict[str, tuple[Unit, str]] = {}
    if metering is not None:
        known[metering.unit.name] = metering.unit, "the Metering"
    policies = [(row.path, policy) for row in rows for policy in row.policies]
    for path, policy in policies:
        unit = policy.charge.unit if policy.charge is not None else None
        if unit is None:
            continue
        where = f"{path} ({policy.name})"
        first, there = known.setdefault(unit.name, (unit, where))
        if first != unit:
            yield (
                f"{where} counts {unit.name!r} with scale {unit.scale}, and {there} with scale {first.scale}. Declare "
                f"the unit once and use that object, or give one of them another name."
            )
        elif metering is not None:
            try:
                metering.counted(unit)
            except ConfigurationError as failure:
                yield f"{where} cannot be charged. {failure}"


def _torn_allowances(rows: list[Row], metering: Any) -> Iterator[str]:
    """One bucket with two windows, or two limits: what one route counts there, the other would take for its own."""
    known: dict[tuple[object, ...], tuple[Allowance, str]] = {}
    for path, charge, name in [(row.path, policy.charge, policy.name) for row in rows for policy in row.policies]:
        if charge is None:
            continue
        unit = charge.unit or (metering.unit if metering is not None else None)
        for source in charge.sources:
            if not isinstance(source, Allowance):
                continue
            where = f"{path} ({name})"
            bucket = (unit, _whose(source, charge), source.name)
            first, there = known.setdefault(bucket, (source, where))
            differing = what_differs(first, source)
            if differing is not None:
                yield (
                    f"{where} has an allowance {source.name!r} with another {differing} than that of {there}, and both "
                    f"would count in one bucket. Declare it once and use that object, or name them apart: "
                    f"Allowance(..., name='monthly')."
                )


def _one_for_all(row: Row, policy: EndpointPolicy) -> Iterator[str]:
    """An allowance that differs by plan, and is one account's: the first who come use it up for all others."""
    for source in () if policy.charge is None else policy.charge.sources:
        if source.each or not isinstance(source, Allowance) or not isinstance(source.limit, Mapping):
            continue
        if (
            source.payer is not None
            and isinstance(source.payer.account, str)
            and len(set(map(exact_amount, source.limit.values()))) > 1
        ):
            yield (
                f"{row.path} ({policy.name}) has an allowance {source.name!r} by plan. It is one count of the account "
                f"{source.payer.account!r}, which callers of all plans use up together. If you mean one of each payer, "
                f"say each=True."
            )


def _unclaimed(rows: list[Row]) -> Iterator[str]:
    """A warning of each route whose keys mean nothing while all is in the shadow."""
    for row in rows:
        for policy in row.policies:
            if policy.charge is not None and (policy.charge.idempotency or policy.charge.key):
                yield (
                    f"{row.path} ({policy.name}) has keys, which Metering(shadow=True) does not claim: repeats run "
                    f"again, and each call is told by itself."
                )


def _whose(source: Allowance, charge: ChargePolicy) -> object:
    """Whose account the bucket is in, as far as that can be told before anybody calls."""
    account = source.payer.account if source.payer is not None and not source.each else None
    return account if account is not None else charge.payer and charge.payer.function


def _nobody(rows: list[Row], features: frozenset[str]) -> Iterator[str]:
    """A warning where every paying call would meet a 401."""
    for row in rows:
        covered = features.union(*(layer.features for layer in row.layers))
        if "credits" in covered and any(policy.charge is not None for policy in row.policies):
            yield (
                f"{row.path} is billable, but Metering has no identify: every call of billable routes will be 401. "
                f"Pass identify=, a function of the connection that answers a Caller."
            )
            return


def _other_meterings(rows: list[Row], metering: Any) -> Iterator[str]:
    """A sentence about the first route that is behind two."""
    for row in rows:
        if any(layer.metering not in (None, metering) for layer in row.layers):
            yield (
                f"{row.path} is behind layers that do not share one Metering. Make one, and pass the same object to "
                f"all of them."
            )
            return


def _misplaced(row: Row, policy: EndpointPolicy) -> Iterator[str]:
    """What means nothing to this kind of connection; a mounted application may have both."""
    if policy.needs and row.methods and (policy.needs == "websocket") is not row.is_websocket:
        yield f"{row.path} ({policy.name}) {misplaced(policy)}"
    if row.is_websocket and _is_late(row.endpoint):
        yield (
            f"{row.path} ({policy.name}) decorates what is called again and again while its WebSocket is open, and a "
            f'WebSocket is one call. Decorate on_connect, or dispatch, and write per="message" for each message.'
        )


def _is_late(endpoint: Any) -> bool:
    """Whether *endpoint* is a method of a class of Starlette's that is called once its WebSocket is open."""
    _, _, name = getattr(endpoint, "__qualname__", "").rpartition(".<locals>.")
    owner, _, method = name.rpartition(".")
    return bool(owner) and method in LATE_HANDLERS and not inspect.ismethod(endpoint) and guard_of(endpoint) is not None


def _misplaced_inside(row: Row) -> Iterator[str]:
    """The same of what a `metered_app` around *row* asks for."""
    around = row.around
    if around is not None and around.needs and row.methods and (around.needs == "websocket") is not row.is_websocket:
        yield f"{row.path} is inside {around.name}, which {misplaced(around)}"


def _missing_layers(row: Row, policy: EndpointPolicy, covered: frozenset[str]) -> Iterator[str]:
    if policy.charge is not None and "credits" not in covered:
        yield (
            f"{row.path} ({policy.name}) is @billable, but no layer enforces credits. Add CreditGateMiddleware or "
            f'MeteringMiddleware, or say unenforced="allow".'
        )
    if policy.rates and "rates" not in covered:
        yield (
            f"{row.path} ({policy.name}) is @rate_limited, but no layer enforces rates. Add RateLimitMiddleware or "
            f'MeteringMiddleware, or say unenforced="allow".'
        )
    if policy.upstreams and "quotas" not in covered:
        yield (
            f"{row.path} ({policy.name}) requires_upstream, but no layer captures quotas. Add QuotaCaptureMiddleware "
            f'or MeteringMiddleware, or say unenforced="allow".'
        )


def _uncountable(row: Row, policy: EndpointPolicy, unit: Unit) -> Iterator[str]:
    charge = policy.charge
    if charge is None:
        return
    try:
        check_amounts(charge, charge.unit or unit)
    except AmountError as failure:
        yield f"{row.path} ({policy.name}) cannot be charged. {failure}"


def _unkept(row: Row, policy: EndpointPolicy, metering: Metering) -> Iterator[str]:
    """What the metering has no place for: charges that wait, keys that several may pay for."""
    try:
        check_journal(policy, has_journal=metering.journal is not None)
        check_shared(policy, metering.store)
    except ConfigurationError as failure:
        yield f"{row.path}: {failure}"


def _nested(row: Row, policy: EndpointPolicy) -> Iterator[str]:
    if row.around is not None:
        yield (
            f"{row.path} ({policy.name}) is metered inside {row.around.name}, and a call is metered once. Write all of "
            f"it in one of the two places."
        )


def _check_reach(report: Report) -> None:
    """Decorators that never see a request: above the route's decorator (pitfall 4), or on no route at all (X.5)."""
    found = [_guard_on(row.endpoint) for row in report.rows]
    found.extend(guard for row in report.rows for guard in row.dependencies)
    reached = {guard.policy.name: guard for guard in found if guard is not None}
    bare = {id(inspect.unwrap(row.endpoint)): row for row in report.rows if row.policy is None}
    modules = {getattr(row.endpoint, "__module__", None) for row in report.rows}
    # An application that a function builds may have been built before: those endpoints are the other one's.
    twins = {name.partition("#")[0] for name in reached}
    for guard in decorated():
        name = guard.policy.name
        row = bare.get(id(inspect.unwrap(guard.endpoint)))
        if reached.get(name) is guard:
            if row is not None:
                report.warnings.append(_free_too(row, name))
        elif row is not None:
            report.errors.append(
                f"{row.path} runs {name} ungated: its metering decorators stand above the route's own. Put them below "
                f"it."
            )
        elif getattr(guard.endpoint, "__module__", None) in modules and name.partition("#")[0] not in twins:
            report.warnings.append(f"{name} is decorated, but no route reaches it.")


def _free_too(row: Row, name: str) -> str:
    """Metering decorators between two routes: the upper one is gated, the lower one has the plain function."""
    return (
        f"{row.path} runs {name} ungated and free, although another route has it metered. If that is not meant, put "
        f"the metering decorators below the decorators of both routes."
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """How far a walk has come."""

    prefix: str = ""
    depth: int = 0
    layers: tuple[Layer, ...] = ()
    around: EndpointPolicy | None = None
    dependencies: tuple[Guard, ...] = ()

    def row(self, path: str, methods: Iterable[str], endpoint: Any, policy: EndpointPolicy | None) -> Row:
        found = tuple({guard.policy.name: guard for guard in self.dependencies}.values())
        return Row(path, tuple(sorted(methods)), endpoint, policy, self.layers, self.around, found)

    def below(self, prefix: str, policy: EndpointPolicy | None = None) -> _Place:
        return _Place(prefix, self.depth + 1, self.layers, policy or self.around, self.dependencies)


def routes_of(app: Any) -> Iterator[Row]:
    """Every routed endpoint of *app*, class endpoints by method, mounted apps with what they mount."""
    return _walk(app, _Place())


def layers_of(app: Any) -> tuple[Layer, ...]:
    """Our layers around all that *app* answers, also where its routes cannot be read; the outermost first."""
    found: tuple[Layer, ...] = ()
    for _ in range(MAX_DEPTH):
        found = (*found, *_layers_on(app))
        if app is None or isinstance(getattr(app, "routes", None), list | tuple):
            break
        app = getattr(app, "app", None)
    return found


def has_routes(app: Any) -> bool:
    """Whether *app* has a route table, or anything else that the audit can see."""
    return next(routes_of(app), None) is not None


def _walk(app: Any, place: _Place) -> Iterator[Row]:
    """Through middleware, which keeps its app as ``app``, down to a route table."""
    while app is not None and place.depth <= MAX_DEPTH:
        place = replace(place, layers=(*place.layers, *_layers_on(app)))
        policy = _policy_of(app)
        if policy is not None:
            yield place.row(place.prefix or "/", (), app, policy)
        routes = getattr(app, "routes", None)
        if isinstance(routes, list | tuple):
            for route in routes:
                yield from _route_rows(route, place)
            return
        place = place.below(place.prefix, policy)
        app = getattr(app, "app", None)


def _layers_on(app: Any) -> Iterator[Layer]:
    """What *app* is as one of our layers, or what an application has added of them."""
    said = ("metering", *LIMITS)
    found: list[tuple[Any, Any, dict[str, Any]]] = [(app, type(app), {name: getattr(app, name, None) for name in said})]
    for added in getattr(app, "user_middleware", ()):
        # Of what stands there without a name only the metering comes first.
        kept = {**dict(zip(said, getattr(added, "args", ())[:1], strict=False)), **getattr(added, "kwargs", {})}
        found.append((getattr(added, "cls", None), getattr(added, "cls", None), kept))
    for layer, kind, kept in found:
        features = getattr(layer, "features", None)
        if isinstance(features, frozenset) and features <= ALL_FEATURES:
            application, default = (tuple(kept.get(name) or ()) for name in LIMITS)
            yield Layer(features, kept.get("metering"), application, default, getattr(kind, "__name__", ""))


def _policy_of(app: Any) -> EndpointPolicy | None:
    """What a `metered_app` asks for, or a guarded function."""
    guard = _guard_on(app)
    policy = guard.policy if guard is not None else getattr(app, "policy", None)
    return policy if isinstance(policy, EndpointPolicy) else None


def _guard_on(called: Any) -> Guard | None:
    """The guard of a decorated function, of one in a `functools.partial`, or of an object's decorated ``__call__``."""
    while isinstance(called, functools.partial):
        called = called.func
    # To call a class makes an object, and runs what is decorated on it only later.
    return guard_of(called) or guard_of(
        None if isinstance(called, type) else inspect.getattr_static(type(called), "__call__", None)
    )


def _route_rows(route: Any, place: _Place) -> Iterator[Row]:
    included = getattr(route, "original_router", None)
    if included is not None:
        context = getattr(route, "include_context", None)
        place = replace(place, dependencies=(*place.dependencies, *_included_guards(context)))
        yield from _walk(included, place.below(place.prefix + (getattr(context, "prefix", "") or "")))
        return
    path = place.prefix + getattr(route, "path", "")
    handlers = getattr(route, "route_handlers", None)
    if handlers is not None:
        # Litestar's: several for the methods of one path.
        for handler in handlers:
            yield place.row(path, map(str, handler.http_methods), handler.fn, _policy_of(handler.fn))
        return
    endpoint = getattr(route, "endpoint", None)
    inner = getattr(route, "app", None)
    if endpoint is None and inner is not None and not isinstance(inner, type):
        if _policy_of(inner) is None:
            yield place.row(path, (), inner, None)
        # Dependencies of an application or router are not those of what it mounts.
        yield from _walk(inner, replace(place.below(path), dependencies=()))
        return
    dependencies = (*place.dependencies, *_guards_of(getattr(route, "dependant", None)))
    place = replace(place, layers=(*place.layers, *_layers_around(inner)), dependencies=dependencies)
    endpoint = endpoint or inner
    is_websocket = _is_websocket(route)
    if isinstance(endpoint, type):
        yield from _class_rows(path, endpoint, place, is_websocket=is_websocket)
        return
    policy = _policy_of(endpoint)
    methods = (WEBSOCKET,) if is_websocket else getattr(route, "methods", None) or ()
    yield place.row(path, methods, endpoint, policy)
    if policy is not None and _guard_on(endpoint) is None:
        yield from _walk(getattr(endpoint, "app", None), place.below(path, policy))


def _layers_around(app: Any) -> Iterator[Layer]:
    """What the middleware of one route is."""
    for _ in range(MAX_DEPTH):
        if app is None:
            return
        yield from _layers_on(app)
        app = getattr(app, "app", None)


def _guards_of(dependant: Any, depth: int = 0) -> Iterator[Guard]:
    """What is decorated among the functions that FastAPI calls before an endpoint, theirs included."""
    for each in getattr(dependant, "dependencies", ()) if depth <= MAX_DEPTH else ():
        guard = _guard_on(each.call)
        if guard is not None:
            yield guard
        yield from _guards_of(each, depth + 1)


def _included_guards(context: Any) -> Iterator[Guard]:
    """The same of what a router was included with."""
    depends = getattr(context, "dependencies", None)
    if not depends:
        return
    # Only FastAPI includes routers with dependencies.
    from fastapi.dependencies.utils import get_parameterless_sub_dependant

    for each in depends:
        dependant = get_parameterless_sub_dependant(depends=each, path="/")
        guard = _guard_on(dependant.call)
        if guard is not None:
            yield guard
        yield from _guards_of(dependant)


def _is_websocket(route: Any) -> bool:
    # Imported late: applications without a framework have no routes.
    from starlette.routing import WebSocketRoute

    return isinstance(route, WebSocketRoute)


def _class_rows(path: str, endpoint: type, place: _Place, *, is_websocket: bool) -> Iterator[Row]:
    """A row per method that answers; of a WebSocket, which is one connection, per decorated method or one."""
    handlers = WEBSOCKET_HANDLERS if is_websocket else HTTP_HANDLERS
    found = [(getattr(endpoint, name, None), method) for name, method in handlers.items()]
    rows = [place.row(path, (method,), each, _policy_of(each)) for each, method in found if each is not None]
    if not is_websocket and not hasattr(endpoint, "head"):
        # Starlette answers HEAD by its `get` then.
        rows = [replace(row, methods=("GET", "HEAD")) if row.methods == ("GET",) else row for row in rows]
    if is_websocket:
        rows = [row for row in rows if row.policy is not None] or [place.row(path, (WEBSOCKET,), endpoint, None)]
    yield from rows
