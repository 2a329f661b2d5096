"""
The fields of the IETF RateLimit draft, as a provider sends them (Hugging Face, other gateways of this kind).

Knows ``RateLimit`` and ``RateLimit-Policy`` of the current draft, read leniently, the three fields of its early
revisions, and the one dictionary that stood between them. Never knows our own fields: what we send to our clients is
made elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from asgi_metering.quotas.reading import LimitTable, QuotaLimit

__all__ = ["MARKS", "PRIVATE", "read_limits"]

MARKS = (b"ratelimit",)
"""Beginnings of the names that carry limits."""

PRIVATE = (b"ratelimit-limit", b"ratelimit-remaining", b"ratelimit-reset", b"ratelimit-query-cost")
"""
The early names, which only upstreams send. ``RateLimit`` and ``RateLimit-Policy`` are not among them: these are
the names that a metered route answers with itself.
"""

_MAX_FIELD = 1024  # Bytes of one field line that are read: a dozen policies.

# A quoted text is passed over as a whole, escapes and all: what stands in it is nobody's parameter.
_PART = re.compile(
    rb'(?P<comma>,)|(?<!=)"(?P<name>(?:[^"\\]|\\.)*)"'
    rb'|(?P<key>[a-z*][a-z0-9_.*\-]*)=(?P<value>"(?:[^"\\]|\\.)*"|:[^:]*:|[^;,"\s]*)'
)
_RESOURCE = re.compile(rb"[a-z0-9_.\-]{1,64}")
_FIELDS = {b"r": "remaining", b"t": "reset", b"q": "limit"}
_MEMBERS = frozenset((b"limit", b"remaining", b"reset"))
_EARLY_NAME = re.compile(rb"ratelimit-(limit|remaining|reset)")


def read_limits(headers: Iterable[tuple[bytes, bytes]], now: float) -> tuple[QuotaLimit, ...]:
    """
    Return the limits that *headers* (names in lower case) tell; *now* is when they came.

    The resource is the policy's name in lower case; a policy whose name is no plain word is left out. Early
    names, and the members of the dictionary, count requests, their default unit.

    Source: draft-ietf-httpapi-ratelimit-headers-10, -07 (many Node.js servers send it) and -06; `huggingface_hub`
    2.4.0 for the deviating policy.
    """
    table = LimitTable(now)
    for name, value in headers:
        if match := _EARLY_NAME.fullmatch(name):
            table.put("requests", match[1].decode(), value)
        elif name in (b"ratelimit", b"ratelimit-policy"):
            _read_list(value[:_MAX_FIELD], table)
    return table.limits()


def _read_list(value: bytes, table: LimitTable) -> None:
    resource: str | None = None
    is_named = False
    for part in _PART.finditer(value):
        key = part["key"]
        if part["comma"]:
            resource, is_named = None, False
        elif part["name"] is not None:
            word = part["name"].lower()
            resource = word.decode().replace("-", "_") if _RESOURCE.fullmatch(word) else None
            is_named = True
        elif resource is not None and key in _FIELDS:
            table.put(resource, _FIELDS[key], part["value"])
        elif key in _MEMBERS and not is_named:
            table.put("requests", key.decode(), part["value"])
