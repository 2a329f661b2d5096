"""What bodies of refusals say: verdicts, waits and limits, whatever the provider."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.quotas import QuotaLimit, read_quota
from asgi_metering.quotas.bodies import MAX_BODY, Told, read_body, status_in_band
from asgi_metering.quotas.google import next_day_at
from asgi_metering.quotas.verdicts import Verdict
from tests.quotas import refusals as r
from tests.quotas.captures import ANTHROPIC, GROQ, NOW, parse_block

CREDIT, RATE = Verdict.OUT_OF_CREDIT, Verdict.RATE_LIMITED
LARGE, CAPACITY = Verdict.TOO_LARGE, Verdict.CAPACITY

MIDNIGHT = 1755846000.0
"""2025-08-22T07:00:00Z: the midnight after `NOW` in Los Angeles."""


def limit(resource: str, limit: int | None, remaining: int | None, wait: float | None) -> QuotaLimit:
    """A limit whose units return after *wait* seconds."""
    reset_at = None if wait is None else NOW + wait
    return QuotaLimit(resource=resource, limit=limit, remaining=remaining, reset_at=reset_at)


TABLE = {
    "openai rate": (429, r.OPENAI_RATE, RATE, 2.0, [limit("tokens_minute", 30000, 1000, 2)]),
    "openai credit": (429, r.OPENAI_CREDIT, CREDIT, None, []),
    "azure": (429, r.AZURE, RATE, 6.0, []),
    "azure api management": (403, r.APIM, RATE, 3723.0, []),
    "anthropic rate": (429, r.ANTHROPIC_RATE, RATE, None, []),
    "anthropic billing": (400, r.ANTHROPIC_BILLING, CREDIT, None, []),
    "anthropic spend limit": (429, r.ANTHROPIC_SPEND, CREDIT, None, []),
    "any spend limit": (429, r.body({"error": {"code": "team_spend_limit_reached"}}), CREDIT, None, []),
    "anthropic low balance": (400, r.ANTHROPIC_LOW, CREDIT, None, []),
    "anthropic overloaded": (529, r.ANTHROPIC_OVERLOADED, CAPACITY, None, []),
    "openrouter in flight": (402, r.OPENROUTER_IN_FLIGHT, RATE, None, []),
    "openrouter credits": (402, r.OPENROUTER_CREDITS, CREDIT, None, []),
    "openrouter shared": (429, r.OPENROUTER_SHARED, CAPACITY, None, []),
    "deepseek": (402, r.DEEPSEEK, CREDIT, None, []),
    "groq day": (429, r.GROQ_DAILY, RATE, 578.016, [limit("tokens_day", 100000, 2950, 578.016)]),
    "groq too large": (413, r.GROQ_DAILY, LARGE, 578.016, [limit("tokens_day", 100000, 2950, 578.016)]),
    "mistral": (429, r.MISTRAL, RATE, None, []),
    "xai": (429, r.XAI, RATE, None, [limit("tokens_minute", 16000, 0, None)]),
    "together": (429, r.TOGETHER, RATE, None, []),
    "fireworks suspended": (412, r.FIREWORKS_SUSPENDED, CREDIT, None, []),
    "hugging face": (402, r.HUGGING_FACE, CREDIT, None, []),
    "google minute": (429, r.GOOGLE_MINUTE, RATE, 26.0, [limit("input_tokens_minute", 250000, 0, 26)]),
    "google day": (429, r.GOOGLE_DAY, RATE, MIDNIGHT - NOW, [limit("requests_day", 250, 0, MIDNIGHT - NOW)]),
    "vertex": (429, r.VERTEX, RATE, None, []),
    "bedrock": (429, r.BEDROCK, RATE, None, []),
    "any 402": (402, b"<html>", CREDIT, None, []),
    "any 503": (503, b"", CAPACITY, None, []),
}


@pytest.mark.parametrize("name", TABLE)
def test_read_body_tells_verdict_wait_and_limits(name: str) -> None:
    """Each provider's refusal is classified as the reference does, with its wait and its limits (S1.44)."""
    status, body, verdict, wait, limits = TABLE[name]
    told = read_body(status, body, NOW)
    assert (told.verdict, told.retry_after_s, list(told.limits)) == (verdict, wait, limits)


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (400, r.body({"error": {"message": "max_tokens is too large", "type": "invalid_request_error"}})),
        (413, r.body({"error": {"message": "Request Entity Too Large"}})),
        (403, r.body({"error": {"message": "Not allowed"}})),
        (401, b""),
        (500, b"[]"),
        (None, b"{}"),
    ],
)
def test_read_body_of_another_failure_tells_nothing(status: int | None, body: bytes) -> None:
    """What is no matter of quotas has no verdict, and its numbers are not taken for limits."""
    assert read_body(status, body, NOW) == Told(None)


@pytest.mark.parametrize("name", TABLE)
def test_read_body_tells_of_which_model_it_is(name: str) -> None:
    """A quota whose dimensions name a model is of that one alone; sentences and others name none."""
    status, body, *_ = TABLE[name]
    assert read_body(status, body, NOW).model == ("gemini-2.5-flash" if name.startswith("google") else None)


def violation(quota: str, **dimensions: object) -> dict[str, object]:
    """That a quota of Google's is spent."""
    return {"quotaId": quota, "quotaValue": "7", "quotaDimensions": dimensions}


@pytest.mark.parametrize(
    ("violations", "model", "resources"),
    [
        (
            [violation("PerDay", model="a"), violation("TokensPerMinute", model="a")],
            "a",
            ["requests_day", "tokens_minute"],
        ),
        ([violation("PerDay", model="a"), violation("PerMinute")], None, ["requests_minute"]),
        ([violation("PerDay", model="a"), violation("PerMinute", model="b")], "a", ["requests_day"]),
        ([violation("PerDay", model="models/A")], "a", ["requests_day"]),
        ([violation("PerDay", model="no name")], None, ["requests_day"]),
        ([violation("PerDay", model=7)], None, ["requests_day"]),
        ([{"quotaId": "PerDay", "quotaDimensions": []}], None, ["requests_day"]),
    ],
    ids=["one", "one and all", "two", "spelt otherwise", "none", "no text", "no dimensions"],
)
def test_read_body_keeps_a_model_apart_from_all(violations: Any, model: str | None, resources: list[str]) -> None:
    """Where limits of all models are spent too only these are told: a model's own are told by its next refusal."""
    details = [{"@type": "google.rpc.QuotaFailure", "violations": violations}]
    told = read_body(429, r.body({"error": {"code": 429, "details": details}}), NOW)
    assert (told.model, [each.resource for each in told.limits]) == (model, resources)
    assert (told.retry_after_s is not None) is ("requests_day" in resources)


def test_read_quota_keeps_headers_out_of_what_is_of_a_model() -> None:
    """Headers say of no model, and were read when they came; who has to pay first has to for every model."""
    reading = read_quota([(b"retry-after", b"9")], provider="google", status=429, now=NOW, body=r.GOOGLE_MINUTE)
    assert reading is not None
    assert (reading.model, reading.retry_after_s, len(reading.limits)) == ("gemini-2.5-flash", 26.0, 1)
    assert read_body(402, r.GOOGLE_MINUTE, NOW).model is None


def test_read_body_of_a_service_quota_by_its_header() -> None:
    """Bedrock names the error in a header, also where the status is 400."""
    headers = [(b"x-amzn-ErrorType", b"ServiceQuotaExceededException:http://internal.amazon.com/")]
    with_body = read_quota(headers, provider="bedrock", status=400, now=NOW, body=r.BEDROCK)
    throttled = [(b"X-Amzn-Errortype", b"ThrottlingException"), (b"retry-after", b"3")]
    without = read_quota(throttled, provider="bedrock", status=400, now=NOW)
    assert with_body is not None
    assert without is not None
    assert (with_body.verdict, without.verdict, without.retry_after_s) == (RATE, RATE, 3.0)
    assert read_quota(headers, provider="bedrock", status=400, now=NOW) is None


def test_read_quota_reads_headers_that_a_body_repeats() -> None:
    """OpenRouter's 429 repeats its headers in the body, in epoch milliseconds; ids of users are not kept (S1.38)."""
    reading = read_quota([], provider="openrouter", status=429, now=NOW, body=r.OPENROUTER_DAILY)
    assert reading is not None
    assert reading.limits == (QuotaLimit(resource="requests", limit=50, remaining=0, reset_at=1755820800.0),)
    assert (reading.verdict, reading.dialect) == (RATE, "openai")
    assert "secret" not in json.dumps(reading.to_dict())


def test_read_quota_prefers_headers_to_a_sentence() -> None:
    """The header's wait and limits stay, and the sentence adds what no header tells: Groq's day of tokens."""
    reading = read_quota(parse_block(GROQ), provider="groq", status=429, now=NOW, body=r.GROQ_DAILY)
    assert reading is not None
    assert reading.retry_after_s == 2
    assert [each.resource for each in reading.limits] == ["requests", "tokens", "tokens_day"]
    minute = read_quota(parse_block(GROQ), provider="groq", status=429, now=NOW, body=r.OPENAI_RATE)
    assert minute is not None
    assert [each.resource for each in minute.limits] == ["requests", "tokens"]


def test_read_quota_of_a_success_has_no_verdict() -> None:
    """An answer that was let in is never classified, whatever its body."""
    reading = read_quota(parse_block(ANTHROPIC), provider="anthropic", status=200, now=NOW, body=r.OPENAI_CREDIT)
    assert reading is not None
    assert reading.verdict is None


def test_read_quota_without_headers_and_with_a_silent_body_is_none() -> None:
    """A failure of another kind makes no reading (S1.39)."""
    assert read_quota([], provider="acme", status=500, now=NOW, body=b"oops") is None
    assert read_quota([], provider="acme", status=429, now=NOW) is None


@pytest.mark.parametrize(
    ("now", "midnight"),
    [
        ("2025-03-09T09:30:00+00:00", "2025-03-10T07:00:00+00:00"),
        ("2025-11-02T08:30:00+00:00", "2025-11-03T08:00:00+00:00"),
        ("2025-08-22T07:00:00+00:00", "2025-08-23T07:00:00+00:00"),
    ],
)
def test_next_day_of_google_through_a_change_of_its_clock(now: str, midnight: str) -> None:
    """The daily reset is the next midnight in Los Angeles, on the days with 23 and 25 hours too."""
    from datetime import datetime

    assert next_day_at(datetime.fromisoformat(now).timestamp()) == datetime.fromisoformat(midnight).timestamp()


PIECES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.floats(allow_nan=False), st.text(max_size=20), st.just("insufficient_quota")
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(
                ["error", "message", "code", "type", "metadata", "headers", "details", "@type", "violations"]
            ),
            inner,
            max_size=5,
        ),
    ),
    max_leaves=12,
)


@given(st.sampled_from([400, 402, 403, 413, 429, 503]), st.one_of(PIECES.map(r.body), st.binary(max_size=200)))
def test_read_body_never_raises(status: int, body: bytes) -> None:
    """Whatever a body holds, what comes out is bounded plain JSON (S1.39)."""
    reading = read_quota([], provider="acme", status=status, now=NOW, body=body)
    if reading is not None:
        json.dumps(reading.to_dict(), allow_nan=False)


def test_read_body_looks_at_its_beginning_alone() -> None:
    """A body that is larger than any refusal is classified by its status, and not parsed."""
    huge = r.body({"error": {"code": "insufficient_quota", "padding": "x" * MAX_BODY}})
    assert read_body(429, huge, NOW).verdict is RATE
    nested = b"[" * 50_000
    assert read_body(402, nested, NOW).verdict is CREDIT


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"code": 429, "message": "slow down"}}, 429),
        ({"error": {"code": 200}}, None),
        ({"type": "error", "error": {"type": "overloaded_error"}}, 529),
        ({"type": "error", "code": "rate_limit_exceeded"}, 429),
        ({"error": {"type": "insufficient_quota"}}, 429),
        ({"error": {"status": "UNAVAILABLE"}}, 503),
        ({"error": {"type": "server_error"}}, None),
        ([], None),
    ],
)
def test_read_the_status_of_an_error_behind_a_success(body: Any, status: int | None) -> None:
    """An error behind a success tells by its code, or its words, which status it would have had."""
    assert status_in_band(json.dumps(body).encode()) == status
