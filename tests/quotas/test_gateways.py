"""Names that gateways put on a provider's answers."""

from __future__ import annotations

import pytest

from asgi_metering.quotas import QuotaLimit, is_quota_header, read_quota
from tests.quotas.captures import NOW, parse_block

LITELLM = """
    llm_provider-x-ratelimit-remaining-tokens: 9
    llm_provider-x-ratelimit-limit-tokens: 10
    llm_provider-openai-organization: org-secret
"""
LITELLM_ANTHROPIC = """
    llm_provider-anthropic-ratelimit-requests-remaining: 3
    llm_provider-retry-after: 7
"""
LITELLM_IETF = 'llm_provider-ratelimit: "api";r=4;t=9'
APISIX = """
    X-AI-RateLimit-Limit-main-eu: 1000
    X-AI-RateLimit-Remaining-main-eu: 10
    X-AI-RateLimit-Reset-main-eu: 60
    X-AI-RateLimit-Remaining-spare: 5
"""
MISTRAL_OLD = """
    ratelimitbysize-limit: 500000
    ratelimitbysize-remaining: 499000
    ratelimitbysize-reset: 12
    ratelimitbysize-query-cost: 52
    x-ratelimitbysize-limit-month: 10,000,000
    x-ratelimitbysize-remaining-minute: 4000
    ratelimit-limit: 5
    ratelimit-remaining: 4
"""


@pytest.mark.parametrize(
    ("block", "dialect", "limits"),
    [
        (LITELLM, "litellm", [QuotaLimit(resource="tokens", remaining=9, limit=10)]),
        (LITELLM_ANTHROPIC, "litellm", [QuotaLimit(resource="requests", remaining=3)]),
        (LITELLM_IETF, "litellm", [QuotaLimit(resource="api", remaining=4, reset_at=NOW + 9)]),
        (
            APISIX,
            "apisix",
            [
                QuotaLimit(resource="tokens_main_eu", limit=1000, remaining=10, reset_at=NOW + 60),
                QuotaLimit(resource="tokens_spare", remaining=5),
            ],
        ),
        (
            MISTRAL_OLD,
            "mistral",
            [
                QuotaLimit(resource="tokens", limit=500000, remaining=499000, reset_at=NOW + 12),
                QuotaLimit(resource="tokens_month", limit=10_000_000),
                QuotaLimit(resource="tokens_minute", remaining=4000),
                QuotaLimit(resource="requests", limit=5, remaining=4),
            ],
        ),
    ],
    ids=["litellm openai", "litellm anthropic", "litellm ietf", "apisix", "mistral old"],
)
def test_read_gateway_gives_every_limit(block: str, dialect: str, limits: list[QuotaLimit]) -> None:
    """Copied, per-instance and older names give the limits of what stands behind (S1.34), and are all stripped."""
    headers = parse_block(block)
    reading = read_quota(headers, provider="acme", status=200, now=NOW)
    assert reading is not None
    assert (reading.dialect, list(reading.limits)) == (dialect, limits)
    assert all(is_quota_header(name) for name, _ in headers if name != b"llm_provider-retry-after")


def test_read_prefers_the_providers_own_names_to_copies() -> None:
    """LiteLLM sends both: then OpenAI's own names are read."""
    both = parse_block(LITELLM + "x-ratelimit-remaining-tokens: 8")
    reading = read_quota(both, provider="acme", status=200, now=NOW)
    assert reading is not None
    assert (reading.dialect, reading.limits[0].remaining) == ("openai", 8)


def test_read_gateway_without_a_limit_is_no_reading() -> None:
    """Names that only begin like these say nothing."""
    names = ("llm_provider-date", "x-ai-ratelimit-limit-", "ratelimitbysize-query-cost", "x-ratelimitbysize-limit-year")
    for name in names:
        assert read_quota([(name.encode(), b"1")], provider="acme", status=200, now=NOW) is None
