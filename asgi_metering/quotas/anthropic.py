"""
Anthropic's names: the standard, priority, fast and unified families.

Knows ``anthropic-ratelimit-RESOURCE-FIELD``, the two families without the word ratelimit, and the unified ones
of subscription accounts, which tell spent shares and states where the others tell counts; a reader that only
knows limit, remaining and reset would drop them. Never knows what a window's name means: any is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from asgi_metering.quotas.reading import MAX_NAMES, LimitTable, QuotaLimit

__all__ = ["MARKS", "PRIVATE", "read_limits"]

MARKS = (b"anthropic-ratelimit-", b"anthropic-priority-", b"anthropic-fast-")
"""Beginnings of the names that carry limits."""

PRIVATE = (*MARKS, b"anthropic-organization-id")
"""Beginnings of the names that tell a stranger about our account: limits, and whose account it is."""

_MAX_NAME = 120  # Bytes: more than the longest that is understood, and what is longer is known by nobody.

_NAME = re.compile(
    rb"anthropic-(?:ratelimit-|(?=priority-|fast-))([a-z0-9_\-]{1,64})-(limit|remaining|reset|utilization|status)"
)


def read_limits(headers: Iterable[tuple[bytes, bytes]], now: float) -> tuple[QuotaLimit, ...]:
    """
    Return the limits that *headers* (names in lower case) tell; *now* is when they came.

    Resources: ``requests``, ``tokens`` (the most restrictive in effect), ``input_tokens``, ``output_tokens``;
    ``priority_input_tokens`` and so on; ``fast_input_tokens`` and so on; ``unified`` and ``unified_WINDOW``.
    """
    table = LimitTable(now)
    for name, value in headers:
        named = _named(name[:_MAX_NAME])
        if named is not None:
            table.put(*named, value)
    return table.limits()


@lru_cache(maxsize=MAX_NAMES)
def _named(name: bytes) -> tuple[str, str] | None:
    """The resource and the field that a name says."""
    match = _NAME.fullmatch(name)
    return None if match is None else (match[1].decode().replace("-", "_"), match[2].decode())
