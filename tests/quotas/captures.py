"""Headers as providers sent them, written as they appear on the wire."""

from __future__ import annotations

NOW = 1755780000.0
"""2025-08-21T12:40:00Z: the moment at which the captures are read."""


def parse_block(block: str) -> list[tuple[bytes, bytes]]:
    """Return the (name, value) pairs of a block of ``name: value`` lines."""
    lines = (line.strip().partition(": ") for line in block.strip().splitlines())
    return [(name.encode(), value.encode()) for name, _, value in lines]


OPENAI = """
    date: Thu, 21 Aug 2025 12:40:00 GMT
    content-type: application/json
    openai-organization: org-secret
    openai-project: proj_secret
    openai-processing-ms: 812
    openai-version: 2020-10-01
    x-ratelimit-limit-requests: 60
    x-ratelimit-limit-tokens: 150000
    x-ratelimit-remaining-requests: 59
    x-ratelimit-remaining-tokens: 149984
    x-ratelimit-reset-requests: 1s
    x-ratelimit-reset-tokens: 6m0s
    x-request-id: req_1
    set-cookie: __cf_bm=secret; path=/
    cf-ray: 1-FRA
    alt-svc: h3=":443"; ma=86400
"""

OPENAI_PROJECT = """
    x-ratelimit-limit-project-tokens: 30000
    x-ratelimit-remaining-project-tokens: 0
    x-ratelimit-reset-project-tokens: 2.5s
    x-ratelimit-remaining-tokens_usage_based: 77
    retry-after: 3
    retry-after-ms: 2500
"""

AZURE = """
    x-ratelimit-remaining-requests: 19
    x-ratelimit-remaining-tokens: 9,000
    x-ms-region: East US
    apim-request-id: 1
"""

ANTHROPIC = """
    anthropic-ratelimit-requests-limit: 1000
    anthropic-ratelimit-requests-remaining: 999
    anthropic-ratelimit-requests-reset: 2025-08-21T12:40:59Z
    anthropic-ratelimit-input-tokens-limit: 80000
    anthropic-ratelimit-input-tokens-remaining: 80000
    anthropic-ratelimit-input-tokens-reset: 2025-08-21T12:40:59Z
    anthropic-ratelimit-output-tokens-limit: 16000
    anthropic-ratelimit-output-tokens-remaining: 16000
    anthropic-ratelimit-output-tokens-reset: 2025-08-21T12:41:00Z
    anthropic-ratelimit-tokens-limit: 96000
    anthropic-ratelimit-tokens-remaining: 96000
    anthropic-ratelimit-tokens-reset: 2025-08-21T12:40:59Z
    retry-after: 12
    request-id: req_011
    anthropic-organization-id: 36562039-secret
"""

ANTHROPIC_PRIORITY = """
    anthropic-priority-input-tokens-limit: 10000
    anthropic-priority-input-tokens-remaining: 9618
    anthropic-priority-input-tokens-reset: 2025-08-21T12:41:00Z
    anthropic-priority-output-tokens-remaining: 6000
    anthropic-fast-output-tokens-limit: 4000
"""

ANTHROPIC_UNIFIED = """
    anthropic-ratelimit-unified-status: allowed
    anthropic-ratelimit-unified-reset: 1776649200
    anthropic-ratelimit-unified-representative-claim: five_hour
    anthropic-ratelimit-unified-5h-status: allowed
    anthropic-ratelimit-unified-5h-utilization: 0.42
    anthropic-ratelimit-unified-5h-reset: 1776649200
    anthropic-ratelimit-unified-7d-status: allowed_warning
    anthropic-ratelimit-unified-7d-utilization: 0.17
    anthropic-ratelimit-unified-7d-reset: 2025-08-21T12:41:00Z
    anthropic-ratelimit-unified-7d_oi-utilization: 1.02
    anthropic-ratelimit-unified-overage-status: rejected
    anthropic-ratelimit-unified-overage-disabled-reason: org_level_disabled
    anthropic-ratelimit-unified-fallback-percentage: 0.5
"""

OPENROUTER_429 = """
    X-RateLimit-Limit: 50
    X-RateLimit-Remaining: 0
    X-RateLimit-Reset: 1755820800000
    X-OpenRouter-Provider: acme
"""

GROQ = """
    retry-after: 2
    x-ratelimit-limit-requests: 14400
    x-ratelimit-limit-tokens: 18000
    x-ratelimit-remaining-requests: 14370
    x-ratelimit-remaining-tokens: 17997
    x-ratelimit-reset-requests: 2m59.56s
    x-ratelimit-reset-tokens: 7.66s
"""

MISTRAL = """
    x-ratelimit-limit-tokens-minute: 5000000
    x-ratelimit-remaining-tokens-minute: 4999911
    x-ratelimit-tokens-query-cost: 52
    x-ratelimit-limit-req-minute: 720
    x-ratelimit-remaining-req-minute: 717
    x-ratelimit-reset-req-minute: 30
"""

TOGETHER = """
    x-ratelimit-limit: 10
    x-ratelimit-remaining: 9
    x-ratelimit-reset: 1
    x-tokenlimit-limit: 3000
    x-tokenlimit-remaining: 2990
    x-ratelimit-limit-dynamic: 12
"""

FIREWORKS = """
    x-ratelimit-limit-requests: 600
    x-ratelimit-remaining-requests: 599
    x-ratelimit-limit-tokens-prompt: 60000
    x-ratelimit-remaining-tokens-cache-adjusted-prompt: 59000
    x-ratelimit-over-limit: no
"""

CEREBRAS = """
    x-ratelimit-limit-requests-day: 1000000000
    x-ratelimit-limit-tokens-minute: 1000000000
    x-ratelimit-remaining-requests-day: 999997455
    x-ratelimit-remaining-tokens-minute: 999998298
    x-ratelimit-reset-requests-day: 33011.382867097855
    x-ratelimit-reset-tokens-minute: 11.382867097854614
"""

XAI = """
    x-ratelimit-limit-requests: 8
    x-ratelimit-remaining-requests: 7
    x-ratelimit-limit-tokens: 16000
    x-ratelimit-remaining-tokens: 15000
    x-ratelimit-reset-tokens: 1755780060
"""

SAMBANOVA = """
    x-ratelimit-limit-requests: 60
    x-ratelimit-remaining-requests: 59
    x-ratelimit-reset-requests: 1755780060
    x-ratelimit-limit-requests-day: 12000
    x-ratelimit-remaining-requests-day: 11999
    x-ratelimit-reset-requests-day: 1755820800
"""

DIGITALOCEAN = """
    x-ratelimit-limit-requests: 300
    x-ratelimit-limit-tokens-per-day: 1000000
    x-ratelimit-remaining-tokens-per-day: 990000
    x-ratelimit-remaining-tokens-per-minute: 90000
    x-ratelimit-reset-tokens-per-minute: 1755780030
"""

GITHUB = """
    x-ratelimit-limit: 5000
    x-ratelimit-remaining: 0
    x-ratelimit-used: 5000
    x-ratelimit-reset: 1755783600
    x-ratelimit-resource: core
"""

HUGGING_FACE = """
    ratelimit: "api";r=0;t=55
    ratelimit-policy: "fixed window";"api";q=500;w=300
"""
