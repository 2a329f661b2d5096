"""
The startup audit: which route is metered how, and what is decorated in vain.

Walks the route tables of Starlette and FastAPI, included routers and mounts too; other apps have none to walk.
Only looks, and never at request time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from asgi_metering.decorators import Guard, decorated, guard_of
from asgi_metering.policies import EndpointPolicy

__all__ = ["Report", "Row", "audit", "routes_of"]

MAX_DEPTH = 32
"""Nested apps and routers that are walked: deeper is a loop."""


@dataclass(frozen=True, slots=True)
class Row:
    """
    One routed endpoint.

    Attributes:
        path: As far as prefixes can be told.
        methods: Sorted; empty for a mounted app.
        endpoint: The function, class or app behind it.
        policy: What the decorators said; None for an unmetered one.
    """

    path: str
    methods: tuple[str, ...]
    endpoint: Any
    policy: EndpointPolicy | None


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


def audit(app: Any, features: frozenset[str], unenforced: frozenset[str]) -> Report:
    """
    Check the application *app* against the layers that stand in front of it.

    Args:
        app: Any ASGI app; without a route table there is nothing to find.
        features: What the layers enable.
        unenforced: What may run without its layer.
    """
    report = Report(rows=list(routes_of(app)))
    reached = {id(guard) for row in report.rows for guard in _guards(row.endpoint)}
    for row in report.rows:
        if row.policy is not None:
            report.errors.extend(_missing_layers(row, features | unenforced))
    _check_reach(report, reached)
    return report


def _missing_layers(row: Row, covered: frozenset[str]) -> Iterator[str]:
    policy = row.policy
    if policy is not None and policy.charge is not None and "credits" not in covered:
        yield (
            f"{row.path} ({policy.name}) is @billable, but no layer enforces credits. Add CreditGateMiddleware or "
            f'MeteringMiddleware, or say unenforced="allow".'
        )
    if policy is not None and policy.rates and "rates" not in covered:
        yield (
            f"{row.path} ({policy.name}) is @rate_limited, but no layer enforces rates. Add RateLimitMiddleware or "
            f'MeteringMiddleware, or say unenforced="allow".'
        )


def _check_reach(report: Report, reached: set[int]) -> None:
    """Decorators that never see a request: above the route's decorator (pitfall 4), or on no route at all (X.5)."""
    routed = {id(row.endpoint): row for row in report.rows}
    modules = {getattr(row.endpoint, "__module__", None) for row in report.rows}
    for guard in decorated():
        if id(guard) in reached:
            continue
        row = routed.get(id(guard.endpoint))
        if row is not None:
            report.errors.append(
                f"{row.path} runs {guard.policy.name} ungated: its metering decorators stand above the route's own. "
                f"Put them below it."
            )
        elif getattr(guard.endpoint, "__module__", None) in modules:
            report.warnings.append(f"{guard.policy.name} is decorated, but no route reaches it.")


def _guards(endpoint: Any) -> Iterator[Guard]:
    guard = guard_of(endpoint)
    if guard is not None:
        yield guard
    if isinstance(endpoint, type):
        for name in dir(endpoint):
            method_guard = guard_of(getattr(endpoint, name, None))
            if method_guard is not None:
                yield method_guard


def routes_of(app: Any, prefix: str = "", depth: int = 0) -> Iterator[Row]:
    """Every routed endpoint of *app*, class endpoints by method, mounted apps with what they mount."""
    table = _table(app)
    if table is None or depth > MAX_DEPTH:
        return
    for route in table:
        yield from _route_rows(route, prefix, depth)


def _table(app: Any) -> Iterable[Any] | None:
    """The route table of *app*, through any middleware that keeps its app as ``app``."""
    for _ in range(MAX_DEPTH):
        routes = getattr(app, "routes", None)
        if isinstance(routes, list | tuple):
            return routes
        app = getattr(app, "app", None)
        if app is None:
            return None
    return None


def _route_rows(route: Any, prefix: str, depth: int) -> Iterator[Row]:
    included = getattr(route, "original_router", None)
    if included is not None:
        context = getattr(route, "include_context", None)
        yield from routes_of(included, prefix + (getattr(context, "prefix", "") or ""), depth + 1)
        return
    path = prefix + getattr(route, "path", "")
    endpoint = getattr(route, "endpoint", None)
    if endpoint is None:
        inner = getattr(route, "app", None)
        if inner is not None:
            yield Row(path, (), inner, getattr(inner, "policy", None))
            yield from routes_of(inner, path, depth + 1)
        return
    methods = tuple(sorted(getattr(route, "methods", None) or ()))
    if isinstance(endpoint, type):
        yield from _class_rows(path, endpoint)
        return
    guard = guard_of(endpoint)
    yield Row(path, methods, endpoint, guard.policy if guard is not None else None)


def _class_rows(path: str, endpoint: type) -> Iterator[Row]:
    for method in ("get", "post", "put", "patch", "delete", "head", "options"):
        function = getattr(endpoint, method, None)
        if function is not None:
            guard = guard_of(function)
            yield Row(path, (method.upper(),), function, guard.policy if guard is not None else None)
