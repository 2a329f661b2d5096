"""
Credits, rate limits, upstream quotas and usage events for ASGI APIs that charge for their calls.

The names below are all that an application needs. Each is imported when it is first used, so that importing the
package imports no driver, no framework and no SDK.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asgi_metering._version import __version__ as __version__
    from asgi_metering.amounts import CREDITS as CREDITS
    from asgi_metering.amounts import Unit as Unit
    from asgi_metering.asgi.app import metered_app as metered_app
    from asgi_metering.asgi.middleware import CreditGateMiddleware as CreditGateMiddleware
    from asgi_metering.asgi.middleware import MeteringMiddleware as MeteringMiddleware
    from asgi_metering.asgi.middleware import QuotaCaptureMiddleware as QuotaCaptureMiddleware
    from asgi_metering.asgi.middleware import RateLimitMiddleware as RateLimitMiddleware
    from asgi_metering.asgi.middleware import UsageEventsMiddleware as UsageEventsMiddleware
    from asgi_metering.call import Call as Call
    from asgi_metering.call import CallCut as CallCut
    from asgi_metering.call import CallRefused as CallRefused
    from asgi_metering.caller import Caller as Caller
    from asgi_metering.decorators import billable as billable
    from asgi_metering.decorators import rate_limited as rate_limited
    from asgi_metering.decorators import unlimited as unlimited
    from asgi_metering.holding import slices as slices
    from asgi_metering.holding import up_to as up_to
    from asgi_metering.metering import Metering as Metering
    from asgi_metering.opening import current_call as current_call
    from asgi_metering.policies import Idempotency as Idempotency
    from asgi_metering.requiring import requires_upstream as requires_upstream
    from asgi_metering.rules.ending import Drain as Drain
    from asgi_metering.sources import Allowance as Allowance
    from asgi_metering.sources import Payer as Payer
    from asgi_metering.sources import Wallet as Wallet
    from asgi_metering.usage import TokenUsage as TokenUsage
    from asgi_metering.usage import UsageEvent as UsageEvent

_HOMES = {
    "CREDITS": "amounts",
    "Allowance": "sources",
    "Call": "call",
    "CallCut": "call",
    "CallRefused": "call",
    "Caller": "caller",
    "CreditGateMiddleware": "asgi.middleware",
    "Drain": "rules.ending",
    "Idempotency": "policies",
    "Metering": "metering",
    "MeteringMiddleware": "asgi.middleware",
    "Payer": "sources",
    "QuotaCaptureMiddleware": "asgi.middleware",
    "RateLimitMiddleware": "asgi.middleware",
    "TokenUsage": "usage",
    "Unit": "amounts",
    "UsageEvent": "usage",
    "UsageEventsMiddleware": "asgi.middleware",
    "Wallet": "sources",
    "__version__": "_version",
    "billable": "decorators",
    "current_call": "opening",
    "metered_app": "asgi.app",
    "rate_limited": "decorators",
    "requires_upstream": "requiring",
    "slices": "holding",
    "unlimited": "decorators",
    "up_to": "holding",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
