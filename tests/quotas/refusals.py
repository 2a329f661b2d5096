"""Bodies of refusals as providers sent them, beside the reference they were taken from."""

from __future__ import annotations

import json
from typing import Any


def body(payload: Any) -> bytes:
    """The bytes of one answer."""
    return json.dumps(payload).encode()


OPENAI_RATE = body(
    {
        "error": {
            "message": "Rate limit reached for gpt-4o in organization org-secret on tokens per min (TPM): Limit 30000, "
            "Used 29000, Requested 2000. Please try again in 2s.",
            "type": "tokens",
            "param": None,
            "code": "rate_limit_exceeded",
        }
    }
)
OPENAI_CREDIT = body(
    {
        "error": {
            "message": "You exceeded your current quota, please check your plan and billing details.",
            "type": "insufficient_quota",
            "param": None,
            "code": "insufficient_quota",
        }
    }
)
AZURE = body({"error": {"code": "429", "message": "You have exceeded token rate limit. Please retry after 6 seconds."}})
APIM = body({"statusCode": 403, "message": "Out of call volume quota. Quota will be replenished in 01:02:03."})
ANTHROPIC_RATE = body({"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}})
ANTHROPIC_BILLING = body({"type": "error", "error": {"type": "billing_error", "message": "pay"}})
ANTHROPIC_SPEND = body(
    {
        "type": "error",
        "error": {
            "type": "rate_limit_error",
            "message": "spent",
            "details": {"error_code": "enforced_spend_limit_reached"},
        },
    }
)
ANTHROPIC_LOW = body(
    {"type": "error", "error": {"type": "invalid_request_error", "message": "Your credit balance is too low to ..."}}
)
ANTHROPIC_OVERLOADED = body({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
OPENROUTER_DAILY = body(
    {
        "error": {
            "message": "Rate limit exceeded: free-models-per-day. ...",
            "code": 429,
            "metadata": {
                "headers": {
                    "X-RateLimit-Limit": "50",
                    "X-RateLimit-Remaining": "0",
                    "X-RateLimit-Reset": "1755820800000",
                },
                "limit_source": "openrouter_free_tier_daily",
            },
        },
        "user_id": "user_secret",
    }
)
OPENROUTER_IN_FLIGHT = body(
    {
        "error": {
            "code": 402,
            "message": "This request would exceed your available credits ...",
            "metadata": {"reason": "in_flight_budget_exhausted", "limit_source": "openrouter_in_flight_budget"},
        }
    }
)
OPENROUTER_CREDITS = body({"error": {"code": 402, "message": "no", "metadata": {"limit_source": "openrouter_credits"}}})
OPENROUTER_SHARED = body(
    {"error": {"code": 429, "message": "busy", "metadata": {"limit_source": "upstream_provider_shared_pool"}}}
)
DEEPSEEK = body(
    {"error": {"message": "Insufficient Balance", "type": "unknown_error", "code": "invalid_request_error"}}
)
GROQ_DAILY = body(
    {
        "error": {
            "message": "Rate limit reached for model `llama-3.3-70b-versatile` in organization `org_secret` service "
            "tier `on_demand` on tokens per day (TPD): Limit 100000, Used 97050, Requested 3619. Please try again in "
            "9m38.016s. Need more tokens?",
            "type": "tokens",
            "code": "rate_limit_exceeded",
        }
    }
)
MISTRAL = body({"object": "error", "message": "Rate limit exceeded", "type": "rate_limited", "code": "1300"})
XAI = body(
    "Too many tokens for team secret and model grok-4-0709. Your team's rate limit is — Tokens per Minute "
    "(actual/limit): 65605/16000. ..."
)
TOGETHER = body({"error": {"message": "slow", "error_type": "dynamic_token_limited"}})
FIREWORKS_SUSPENDED = body({"error": {"message": "Your account is suspended, possibly for unpaid invoices."}})
HUGGING_FACE = body({"error": "You have exceeded your monthly included credits for Inference Providers."})


def google(quota: str, value: str, delay: str | None) -> dict[str, Any]:
    """Google's error, with a violation of *quota*."""
    details: list[dict[str, Any]] = [
        {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [
                {
                    "quotaMetric": "generativelanguage.googleapis.com/generate_content_free_tier_input_token_count"
                    if "Token" in quota
                    else "generativelanguage.googleapis.com/generate_content_free_tier_requests",
                    "quotaId": quota,
                    "quotaDimensions": {"location": "global", "model": "gemini-2.5-flash"},
                    "quotaValue": value,
                }
            ],
        },
        {"@type": "type.googleapis.com/google.rpc.Help", "links": []},
    ]
    if delay is not None:
        details.append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay})
    return {
        "error": {
            "code": 429,
            "message": "You exceeded your current quota, ...",
            "status": "RESOURCE_EXHAUSTED",
            "details": details,
        }
    }


GOOGLE_MINUTE = body(google("GenerateContentInputTokensPerModelPerMinute-FreeTier", "250000", "26s"))
GOOGLE_DAY = body([google("GenerateRequestsPerDayPerProjectPerModel-FreeTier", "250", "0.5s")])
VERTEX = body({"error": {"code": 429, "message": "Resource exhausted.", "status": "RESOURCE_EXHAUSTED"}})
BEDROCK = body({"message": "Too many requests, please wait before trying again."})
