"""
Why a provider refused a call: out of credit, rate, too large for the limit, or its own capacity.

Knows the statuses and words by which they say so. Never knows headers, waits or limits.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

__all__ = ["Verdict", "verdict_of"]


class Verdict(StrEnum):
    """
    What an answer means for the next call.

    ``OUT_OF_CREDIT``: somebody has to pay, so do not come back soon. ``RATE_LIMITED``: wait, as told. ``TOO_LARGE``:
    this one request never fits the limit. ``CAPACITY``: the provider's own trouble, no quota of ours.
    """

    OUT_OF_CREDIT = "out_of_credit"
    RATE_LIMITED = "rate_limited"
    TOO_LARGE = "too_large"
    CAPACITY = "capacity"


_WORDS = {
    # Looked at first: it comes with 402 and is over as soon as calls in flight end.
    "openrouter_in_flight_budget": Verdict.RATE_LIMITED,
    "in_flight_budget_exhausted": Verdict.RATE_LIMITED,
    "insufficient_quota": Verdict.OUT_OF_CREDIT,
    "billing_error": Verdict.OUT_OF_CREDIT,
    "enforced_spend_limit_reached": Verdict.OUT_OF_CREDIT,
    "contract_spend_limit_reached": Verdict.OUT_OF_CREDIT,
    "openrouter_credits": Verdict.OUT_OF_CREDIT,
    "openrouter_key_limit": Verdict.OUT_OF_CREDIT,
    "weight_exceeds_budget": Verdict.OUT_OF_CREDIT,
    "overloaded_error": Verdict.CAPACITY,
    "openrouter_shared_capacity": Verdict.CAPACITY,
    "upstream_provider_shared_pool": Verdict.CAPACITY,
    "modelnotreadyexception": Verdict.CAPACITY,
    "throttlingexception": Verdict.RATE_LIMITED,
    "servicequotaexceededexception": Verdict.RATE_LIMITED,
    "dynamic_request_limited": Verdict.RATE_LIMITED,
    "dynamic_token_limited": Verdict.RATE_LIMITED,
}
"""Codes, types and reasons in lower case; of several in one answer the first in this order counts."""

_SPEND_LIMIT = "_spend_limit_reached"

_PHRASES = (
    ("insufficient balance", Verdict.OUT_OF_CREDIT),  # DeepSeek, with 402
    ("credit balance is too low", Verdict.OUT_OF_CREDIT),  # Anthropic, with 400
    ("exceeded your monthly included credits", Verdict.OUT_OF_CREDIT),  # Hugging Face
    ("account is suspended", Verdict.OUT_OF_CREDIT),  # Fireworks, with 412
)

_STATUSES = {
    402: Verdict.OUT_OF_CREDIT,
    429: Verdict.RATE_LIMITED,
    503: Verdict.CAPACITY,
    529: Verdict.CAPACITY,
}

_TOO_LARGE = 413
_RATE_WORD = "rate_limit_exceeded"
_FORBIDDEN = 403


def verdict_of(status: int | None, words: Collection[str] = (), message: str = "") -> Verdict | None:
    """
    Classify an answer, or None where it says nothing of quotas.

    Args:
        status: HTTP status; None is not known.
        words: Codes, types and reasons of its body, in any case.
        message: Its sentence.

    Source: reference/provider-quota-headers.md, section 3. A gateway's 403 counts as a rate where it speaks of a quota
    or a rate limit (Azure API Management, GitHub's secondary limits).
    """
    known = {word.lower() for word in words}
    for word, verdict in _WORDS.items():
        if word in known:
            return verdict
    if any(word.endswith(_SPEND_LIMIT) for word in known):
        return Verdict.OUT_OF_CREDIT
    said = message.lower()
    for phrase, verdict in _PHRASES:
        if phrase in said:
            return verdict
    if status == _TOO_LARGE and _RATE_WORD in known:
        return Verdict.TOO_LARGE
    if status == _FORBIDDEN and ("quota" in said or "rate limit" in said):
        return Verdict.RATE_LIMITED
    return None if status is None else _STATUSES.get(status)
