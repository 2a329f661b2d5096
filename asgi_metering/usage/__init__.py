"""
Token usage: the value, reading it out of response bodies, and the event that reports a call.

A new provider is one module with a `Dialect`, one line in `dialects`, and one sample in the tests; one of your own is
a `dialect_of_fields`, or a `Dialect`, and `register_dialect`.
"""

from __future__ import annotations

from asgi_metering.usage.dialects import register_dialect
from asgi_metering.usage.event import UsageEvent
from asgi_metering.usage.fields import dialect_of_fields
from asgi_metering.usage.notes import Dialect
from asgi_metering.usage.reader import UsageReader
from asgi_metering.usage.values import MAX_TOKENS, TokenUsage, UsageReport

__all__ = [
    "MAX_TOKENS",
    "Dialect",
    "TokenUsage",
    "UsageEvent",
    "UsageReader",
    "UsageReport",
    "dialect_of_fields",
    "register_dialect",
]
