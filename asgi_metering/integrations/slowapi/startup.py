"""
Startup: endpoints that slowapi has decorated before its limiter was adopted.

Its wrappers stay where frameworks have them, and go on as they are, but what they run asks us first. Knows what they
keep in their closures; the test of the extra's lower bound is that they still do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType
from typing import Any

import slowapi.extension
from slowapi import Limiter
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware

from asgi_metering.asgi.audit import routes_of
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import GUARD, Part, guard_of
from asgi_metering.integrations.slowapi.asking import ASKING, Asking
from asgi_metering.integrations.slowapi.endpoints import Limited, plain, request_of, wrapped, write_on
from asgi_metering.integrations.slowapi.limiter import GATED, AdoptedLimiter
from asgi_metering.integrations.slowapi.rules import read_group, read_limit

__all__ = ["bind_endpoints", "check_middleware", "decorated_before"]


def decorated_before(limiter: Limiter) -> dict[str, list[Any]]:
    """What slowapi has decorated for *limiter*, by its names for them: the functions below its wrappers."""
    kept: Any = limiter
    marked: dict[str, list[Any]] = kept._Limiter__marked_for_limiting
    return {name: list(dict.fromkeys(plain(each) for each in functions)) for name, functions in marked.items()}


def bind_endpoints(limiter: AdoptedLimiter, app: Any) -> None:
    """
    Have the endpoints of *app* that slowapi has decorated ask us for their limits.

    Raises:
        ConfigurationError: One is on none of its routes, or a generator, so that nobody would ask.
    """
    known = decorated_before(limiter)
    bound: set[Any] = set()
    for row in routes_of(app):
        if not row.is_websocket:
            bound.update(_bind(limiter, row.endpoint))
    missing = [name for name, functions in known.items() if any(each not in bound for each in functions)]
    if missing:
        raise ConfigurationError(
            f"slowapi has decorated {', '.join(missing)} before its Limiter was adopted, and no route of the "
            f"application has it. Put adopt() before the decorators, or after all routes were added."
        )
    for name, functions in known.items():
        if len(functions) > 1:
            limiter.logger.warning(
                "%d endpoints are called %s, and slowapi has put their limits together before it was adopted: each "
                "counts by all of them. Put adopt() before the decorators.",
                len(functions),
                name,
            )


def _bind(limiter: AdoptedLimiter, endpoint: Any) -> Iterator[Any]:
    """Have *endpoint* ask, if slowapi has decorated it; the function below its wrappers is answered then."""
    wrappers = [each for each in _layers(endpoint) if _runs(each, limiter) is not None]
    if not wrappers:
        return
    below = plain(endpoint)
    yield below
    if hasattr(wrappers[-1], GATED):
        # On several routes.
        return
    name = f"{below.__module__}.{below.__name__}"
    if inspect.isgeneratorfunction(below) or inspect.isasyncgenfunction(below):
        raise ConfigurationError(
            f"slowapi has decorated the generator {name} before its Limiter was adopted, and nobody can ask for its "
            f"limits before its response has begun. Put adopt() before the decorators."
        )
    rules = [read_limit(each) for each in limiter._route_limits.get(name, ())]
    rules += [read_group(each) for each in limiter._dynamic_route_limits.get(name, ())]
    limited = Limited(limiter, below, rules)
    cell = _runs(wrappers[-1], limiter)
    if cell is None:
        raise AssertionError(f"{wrappers[-1]!r} runs nothing")
    guard = guard_of(endpoint)
    if guard is None or guard_of(cell.cell_contents) is not None:
        gated = cell.cell_contents = _asking(limited, cell.cell_contents)
        guard = guard_of(gated)
    else:
        # Ours stand above: their gate asks, in one admission, before a wrapper of slowapi's is run.
        guard.add(Part(rates=limited.rate))
        cell.cell_contents = _told(cell.cell_contents)
    for each in wrappers:
        setattr(each, GATED, True)
        write_on(each, limited)
        if guard is not None:
            # So that the audit of a middleware finds it.
            setattr(each, GUARD, guard)


def _layers(endpoint: Any) -> Iterator[FunctionType]:
    """The functions from *endpoint* inwards, as far as `functools.wraps` tells."""
    while endpoint is not None:
        inner = getattr(endpoint, "__func__", endpoint)
        if isinstance(inner, FunctionType):
            yield inner
        endpoint = getattr(inner, "__wrapped__", None)


def _runs(function: FunctionType, limiter: Limiter) -> CellType | None:
    """Where a wrapper of slowapi's, for *limiter*, keeps what it runs; None for any other function."""
    code = function.__code__
    if code.co_filename != slowapi.extension.__file__ or function.__closure__ is None:
        return None
    kept = dict(zip(code.co_freevars, function.__closure__, strict=True))
    if "func" not in kept or "self" not in kept or kept["self"].cell_contents is not limiter:
        return None
    return kept["func"]


def _asking(limited: Limited, endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """*endpoint*, which a wrapper of slowapi's runs, behind the question for its limits."""
    if inspect.iscoroutinefunction(endpoint):
        gated = wrapped(limited, endpoint)
    else:
        gated = _asking_in_thread(limited, endpoint)
    setattr(gated, GATED, True)
    return gated


def _told(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """*endpoint*, for whose limits a gate above has asked: its request hears what may be shown."""

    @functools.wraps(endpoint)
    def told(*args: Any, **kwargs: Any) -> Any:
        asking = ASKING.get()
        request_of(args, kwargs).state.view_rate_limit = None if asking is None else asking.shown
        return endpoint(*args, **kwargs)

    setattr(told, GATED, True)
    return told


def _asking_in_thread(limited: Limited, endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a sync endpoint, which its framework runs in a thread: that waits, and no event loop does."""
    from anyio import from_thread

    @functools.wraps(endpoint)
    def gated(*args: Any, **kwargs: Any) -> Any:
        asking = Asking(limited, request_of(args, kwargs), ASKING.get())
        from_thread.run(limited.enforce, asking)
        return endpoint(*args, **kwargs)

    return gated


def check_middleware(limiter: AdoptedLimiter, app: Any) -> None:
    """Warn of limits that nobody asks for, since no middleware sees the requests that they are for (S2.30)."""
    installed: Iterable[Any] = getattr(app, "user_middleware", ())
    sees = any(getattr(each, "cls", None) in (SlowAPIMiddleware, SlowAPIASGIMiddleware) for each in installed)
    if (limiter.default_rules or limiter.application_rules) and not sees:
        limiter.logger.warning(
            "default_limits and application_limits count at decorated endpoints alone: the application has no "
            "SlowAPIMiddleware. Add it with app.add_middleware(SlowAPIMiddleware)."
        )
