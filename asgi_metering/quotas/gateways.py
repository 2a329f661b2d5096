"""
Names that gateways in front of a provider use: LiteLLM's copies, APISIX's own, and Mistral's older ones.

Knows how each of them says what another family says. Never knows which provider stands behind a gateway.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from asgi_metering.quotas import anthropic, ietf, openai
from asgi_metering.quotas.reading import LimitTable, QuotaLimit

__all__ = ["APISIX_MARKS", "LITELLM_MARKS", "MISTRAL_MARKS", "read_apisix", "read_litellm", "read_mistral"]

LITELLM_MARKS = (b"llm_provider-",)
"""LiteLLM puts this before the provider's own names."""

APISIX_MARKS = (b"x-ai-ratelimit-",)
"""Followed by the field and the name of the instance behind the gateway; it counts tokens."""

MISTRAL_MARKS = (b"x-ratelimitbysize-", b"ratelimitbysize-")
"""Mistral's older names for limits of tokens."""

_APISIX = re.compile(rb"x-ai-ratelimit-(limit|remaining|reset)-([a-z0-9_.\-]{1,57})")
_BY_SIZE = re.compile(rb"(?:x-)?ratelimitbysize-(limit|remaining|reset)(?:-(minute|month))?")


def read_litellm(headers: Iterable[tuple[bytes, bytes]], now: float) -> tuple[QuotaLimit, ...]:
    """Return the limits of the first family that the copied names speak; *now* is when they came."""
    (prefix,) = LITELLM_MARKS
    copied = [(name.removeprefix(prefix), value) for name, value in headers if name.startswith(prefix)]
    return anthropic.read_limits(copied, now) or openai.read_limits(copied, now) or ietf.read_limits(copied, now)


def read_apisix(headers: Iterable[tuple[bytes, bytes]], now: float) -> tuple[QuotaLimit, ...]:
    """Return one limit ``tokens_INSTANCE`` for each instance; *now* is when they came."""
    table = LimitTable(now)
    for name, value in headers:
        if match := _APISIX.fullmatch(name):
            table.put("tokens_" + match[2].decode().replace("-", "_"), match[1].decode(), value)
    return table.limits()


def read_mistral(headers: Iterable[tuple[bytes, bytes]], now: float) -> tuple[QuotaLimit, ...]:
    """Return ``tokens``, ``tokens_minute`` and ``tokens_month``, and the requests beside them."""
    lines = list(headers)
    table = LimitTable(now)
    for name, value in lines:
        if match := _BY_SIZE.fullmatch(name):
            table.put("tokens" if match[2] is None else f"tokens_{match[2].decode()}", match[1].decode(), value)
    return (*table.limits(), *ietf.read_limits(lines, now))
