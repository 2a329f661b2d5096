"""
Token usage: the value, reading it out of response bodies, and the event that reports a call.

A new provider is one module with a `Dialect`, one line in `dialects`, and one sample in the tests.
"""

from __future__ import annotations

from asgi_metering.usage.event import UsageEvent
from asgi_metering.usage.reader import UsageReader
from asgi_metering.usage.values import MAX_TOKENS, TokenUsage, UsageReport

__all__ = ["MAX_TOKENS", "TokenUsage", "UsageEvent", "UsageReader", "UsageReport"]
