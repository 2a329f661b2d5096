"""
Quotas: the limits that somebody else puts on us, read from the headers of their responses.

Knows header names, value formats and the shape of a reading. Never knows a clock, a network or who is asking.
"""

from __future__ import annotations

from asgi_metering.quotas.dialects import DIALECTS, Dialect, DialectRegistry, is_quota_header, read_quota
from asgi_metering.quotas.reading import QuotaLimit, Reading

__all__ = [
    "DIALECTS",
    "Dialect",
    "DialectRegistry",
    "QuotaLimit",
    "Reading",
    "is_quota_header",
    "read_quota",
]
