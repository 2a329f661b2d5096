"""
slowapi: an application that uses it goes on as it is, and its limits are counted by our admission.

    limiter = adopt(Limiter(key_func=get_remote_address))

put before the decorators. Imports slowapi, which only this package does. Knows nothing of how a limit is counted.
"""

from __future__ import annotations

from typing import Any

from asgi_metering.errors import ConfigurationError, MissingExtraError
from asgi_metering.metering import Metering

try:
    from slowapi import Limiter
except ImportError:
    raise MissingExtraError("asgi_metering.integrations.slowapi", "slowapi") from None

from asgi_metering.integrations.slowapi.limiter import AdoptedLimiter, become_adopted
from asgi_metering.integrations.slowapi.middleware import stand_in
from asgi_metering.integrations.slowapi.startup import bind_endpoints, check_middleware, decorated_before

__all__ = ["AdoptedLimiter", "adopt"]


def adopt(limiter: Limiter, metering: Metering | None = None, *, app: Any = None) -> AdoptedLimiter:
    """
    Have *limiter* enforce its limits by our admission; the same object is returned.

    Args:
        limiter: Of slowapi, or of a class of yours below it.
        metering: Counts; the one of the `MeteringMiddleware` in front, if there is one. By default a metering of
            rates alone, at the limiter's own ``storage_uri``.
        app: A Starlette or FastAPI application whose endpoints were decorated already. They keep their ``request``
            parameter then.

    Put before the decorators, everything else may stay as it is: ``app.state.limiter``, the handler of
    `RateLimitExceeded`, slowapi's middlewares (which an application with `default_limits` needs as ever; they no
    longer tear streams). A route may have decorators of both kinds, slowapi's and ours, in any order; with ours it
    needs our middleware, and all of them are asked for in one admission.

    Functions of yours (``key_func``, ``exempt_when``, ``cost``, limits) run where slowapi runs them: on the event loop
    for an async endpoint, in a thread for a sync one; async ones are awaited on the loop. The store never blocks it.

    Raises:
        ConfigurationError: No `Limiter`; a limit that is none; a storage or strategy that we have not; endpoints that
            were decorated before and are on no route of *app*.
        MissingExtraError: The driver of the storage is not installed.

    Source: S2.29 to S2.33.
    """
    if not isinstance(limiter, Limiter):
        raise ConfigurationError(f"{limiter!r} is no slowapi Limiter. Make one: adopt(Limiter(key_func=...)).")
    if isinstance(limiter, AdoptedLimiter):
        raise ConfigurationError("The Limiter was adopted before. Adopt it once, where it is made.")
    early = decorated_before(limiter)
    if early and app is None:
        raise ConfigurationError(
            f"slowapi has decorated {', '.join(early)} before its Limiter was adopted. Put adopt() before the "
            f"decorators, or pass it the application: adopt(limiter, app=app)."
        )
    adopted = become_adopted(limiter, metering)
    stand_in()
    if app is not None:
        bind_endpoints(adopted, app)
        check_middleware(adopted, app)
    return adopted
