"""
The ``x-ratelimit-*`` names: OpenAI, and everybody who copied them.

Knows ``x-ratelimit-{limit,remaining,reset}[-RESOURCE]`` as Azure, Cerebras, DigitalOcean, Fireworks, GitHub,
Groq, Mistral, OpenRouter, SambaNova, Together and xAI send it too, whatever the resource. Never knows what
window a resource means: Groq's ``requests`` are per day, Azure's per few seconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from asgi_metering.quotas.reading import MAX_NAMES, LimitTable, QuotaLimit

__all__ = ["MARKS", "PRIVATE", "read_limits"]

MARKS = (b"x-ratelimit-", b"x-tokenlimit-")
"""Beginnings of the names that carry limits; ``x-tokenlimit-*`` is Together's."""

PRIVATE = (*MARKS, b"x-ratelimitbysize-", b"ratelimitbysize-", b"openai-organization", b"openai-project")
"""Beginnings of the names that tell a stranger about our account: limits, and whose account it is."""

_MAX_NAME = 120  # Bytes: more than the longest that is understood, and what is longer is known by nobody.

_NAME = re.compile(rb"x-ratelimit-(limit|remaining|reset)(?:-([a-z0-9_\-]{1,64}))?")
_TOKENS_NAME = re.compile(rb"x-tokenlimit-(limit|remaining|reset)")


def read_limits(headers: Iterable[tuple[bytes, bytes]], now: float) -> tuple[QuotaLimit, ...]:
    """
    Return the limits that *headers* (names in lower case) tell; *now* is when they came.

    An unsuffixed field is that of requests, unless the suffixed one was readable, also as ``0`` (S1.35).
    Mistral's ``req-minute`` becomes ``requests_minute``.
    """
    table = LimitTable(now)
    fallbacks: list[tuple[str, str, bytes]] = []
    for name, value in headers:
        named = _named(name[:_MAX_NAME])
        if named is None:
            continue
        resource, field, is_fallback = named
        if is_fallback:
            fallbacks.append((resource, field, value))
        else:
            table.put(resource, field, value)
    table.put_all(fallbacks)
    return table.limits()


@lru_cache(maxsize=MAX_NAMES)
def _named(name: bytes) -> tuple[str, str, bool] | None:
    """The resource and the field that a name says, and whether another name of the same may replace it."""
    if match := _NAME.fullmatch(name):
        field, suffix = match[1].decode(), match[2]
        return ("requests", field, True) if suffix is None else (_resource(suffix.decode()), field, False)
    match = _TOKENS_NAME.fullmatch(name)
    return None if match is None else ("tokens", match[1].decode(), True)


def _resource(suffix: str) -> str:
    resource = suffix.replace("-", "_")
    return "requests" + resource.removeprefix("req") if re.match(r"req(?:_|$)", resource) else resource
