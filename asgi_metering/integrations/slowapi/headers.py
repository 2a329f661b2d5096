"""
Headers: slowapi's fields of a response, by the names and in the form that its limiter was told.

Knows what may be shown of a limit. Never asks anybody for it.
"""

from __future__ import annotations

import time
from datetime import UTC
from email.utils import formatdate, parsedate_to_datetime
from math import floor
from typing import TYPE_CHECKING, Any

from slowapi.extension import HEADERS
from starlette.datastructures import MutableHeaders

from asgi_metering.integrations.slowapi.asking import Shown

if TYPE_CHECKING:
    from slowapi import Limiter

__all__ = ["write_fields"]


def write_fields(limiter: Limiter, headers: MutableHeaders, shown: Any) -> None:
    """
    Set the fields of *shown* in *headers*, each once; nothing where they are not enabled, or nothing counts.

    The reset is an epoch second, the one after the window's last, and ``Retry-After`` the seconds until then: also on
    responses that were let in, as slowapi sends it. One that the endpoint set itself stays if it is later.
    """
    if not (limiter.enabled and limiter._headers_enabled and isinstance(shown, Shown) and shown.settle()):
        return
    names = limiter._header_mapping
    headers[names[HEADERS.LIMIT]] = str(shown.limit)
    headers[names[HEADERS.REMAINING]] = str(shown.remaining)
    headers[names[HEADERS.RESET]] = str(shown.reset_at)
    given = headers.get(names[HEADERS.RETRY_AFTER]) or headers.get("Retry-After")
    wait_s = max(shown.retry_s, _seconds(given))
    is_date = limiter._retry_after == "http-date"
    told = formatdate(floor(time.time()) + 1 + wait_s, usegmt=True) if is_date else str(wait_s)
    headers[names[HEADERS.RETRY_AFTER]] = told


def _seconds(given: str | None) -> int:
    """Seconds that a ``Retry-After`` says, in either of its forms; 0 for none."""
    if given is None:
        return 0
    if given.strip().isdecimal():
        return int(given)
    try:
        date = parsedate_to_datetime(given)
    except (TypeError, ValueError):
        return 0
    at = date.replace(tzinfo=UTC) if date.tzinfo is None else date
    return max(0, int(at.timestamp() - time.time()))
