"""Which dialect reads a response, what comes out of real captures, and what must not be passed on."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.quotas import DIALECTS, Dialect, DialectRegistry, QuotaLimit, Reading, is_quota_header, read_quota
from tests.quotas import captures
from tests.quotas.captures import NOW, parse_block


def read(block: str, status: int | None = 200) -> Reading:
    """Read a capture at `NOW`, and insist that it says something."""
    reading = read_quota(parse_block(block), provider="acme", status=status, now=NOW)
    assert reading is not None
    return reading


def limit(resource: str, **fields: object) -> QuotaLimit:
    """Build an expected limit."""
    return QuotaLimit(resource=resource, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("block", "dialect", "limits"),
    [
        (
            captures.OPENAI,
            "openai",
            [
                limit("requests", limit=60, remaining=59, reset_at=NOW + 1),
                limit("tokens", limit=150000, remaining=149984, reset_at=NOW + 360),
            ],
        ),
        (
            captures.OPENAI_PROJECT,
            "openai",
            [
                limit("project_tokens", limit=30000, remaining=0, reset_at=NOW + 2.5),
                limit("tokens_usage_based", remaining=77),
            ],
        ),
        (captures.AZURE, "openai", [limit("requests", remaining=19), limit("tokens", remaining=9000)]),
        (
            captures.ANTHROPIC,
            "anthropic",
            [
                limit("requests", limit=1000, remaining=999, reset_at=NOW + 59),
                limit("input_tokens", limit=80000, remaining=80000, reset_at=NOW + 59),
                limit("output_tokens", limit=16000, remaining=16000, reset_at=NOW + 60),
                limit("tokens", limit=96000, remaining=96000, reset_at=NOW + 59),
            ],
        ),
        (
            captures.ANTHROPIC_PRIORITY,
            "anthropic",
            [
                limit("priority_input_tokens", limit=10000, remaining=9618, reset_at=NOW + 60),
                limit("priority_output_tokens", remaining=6000),
                limit("fast_output_tokens", limit=4000),
            ],
        ),
        (
            captures.ANTHROPIC_UNIFIED,
            "anthropic",
            [
                limit("unified", state="allowed", reset_at=1776649200.0),
                limit("unified_5h", state="allowed", utilization=Decimal("0.42"), reset_at=1776649200.0),
                limit("unified_7d", state="allowed_warning", utilization=Decimal("0.17"), reset_at=NOW + 60),
                limit("unified_7d_oi", utilization=Decimal("1.02")),
                limit("unified_overage", state="rejected"),
            ],
        ),
        (captures.OPENROUTER_429, "openrouter", [limit("requests", limit=50, remaining=0, reset_at=1755820800.0)]),
        (
            captures.GROQ,
            "openai",
            [
                limit("requests", limit=14400, remaining=14370, reset_at=NOW + 179.56),
                limit("tokens", limit=18000, remaining=17997, reset_at=NOW + 7.66),
            ],
        ),
        (
            captures.MISTRAL,
            "openai",
            [
                limit("tokens_minute", limit=5000000, remaining=4999911),
                limit("requests_minute", limit=720, remaining=717, reset_at=NOW + 30),
            ],
        ),
        (
            captures.TOGETHER,
            "openai",
            [
                limit("dynamic", limit=12),
                limit("requests", limit=10, remaining=9, reset_at=NOW + 1),
                limit("tokens", limit=3000, remaining=2990),
            ],
        ),
        (
            captures.FIREWORKS,
            "openai",
            [
                limit("requests", limit=600, remaining=599),
                limit("tokens_prompt", limit=60000),
                limit("tokens_cache_adjusted_prompt", remaining=59000),
            ],
        ),
        (
            captures.CEREBRAS,
            "openai",
            [
                limit("requests_day", limit=1000000000, remaining=999997455, reset_at=NOW + 33011.382867097855),
                limit("tokens_minute", limit=1000000000, remaining=999998298, reset_at=NOW + 11.382867097854614),
            ],
        ),
        (
            captures.XAI,
            "openai",
            [
                limit("requests", limit=8, remaining=7),
                limit("tokens", limit=16000, remaining=15000, reset_at=NOW + 60),
            ],
        ),
        (
            captures.SAMBANOVA,
            "openai",
            [
                limit("requests", limit=60, remaining=59, reset_at=NOW + 60),
                limit("requests_day", limit=12000, remaining=11999, reset_at=1755820800.0),
            ],
        ),
        (
            captures.DIGITALOCEAN,
            "openai",
            [
                limit("requests", limit=300),
                limit("tokens_per_day", limit=1000000, remaining=990000),
                limit("tokens_per_minute", remaining=90000, reset_at=NOW + 30),
            ],
        ),
        (captures.GITHUB, "openai", [limit("requests", limit=5000, remaining=0, reset_at=1755783600.0)]),
        (captures.HUGGING_FACE, "ietf", [limit("api", remaining=0, reset_at=NOW + 55, limit=500)]),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_read_capture_gives_every_limit(block: str, dialect: str, limits: list[QuotaLimit]) -> None:
    """Each provider's capture gives all its limits under its dialect, and nothing else (S1.34, S1.35, S1.38)."""
    reading = read(block)
    assert reading.dialect == dialect
    assert list(reading.limits) == limits
    assert reading.useful
    assert reading.limits_observed_at == NOW


@pytest.mark.parametrize(
    ("names", "dialect"),
    [
        (["x-ratelimit-limit-requests", "anthropic-ratelimit-requests-limit", "x-goog-a"], "anthropic"),
        (["x-ratelimit-limit-requests", "openrouter-provider", "x-goog-a"], "google"),
        (["x-ratelimit-limit-requests", "openrouter-provider"], "openrouter"),
        (["x-ratelimit-limit-requests", "X-OpenRouter-Provider"], "openrouter"),
        (["ratelimit-limit", "X-RATELIMIT-LIMIT"], "openai"),
        (["RateLimit-Limit"], "ietf"),
    ],
)
def test_read_mixed_names_takes_the_first_dialect(names: list[str], dialect: str) -> None:
    """The order is Anthropic, Google, OpenRouter, OpenAI, then the IETF fields, whatever the case (S1.34)."""
    headers = [(name.encode(), b"7") for name in names]
    reading = read_quota(headers, provider=None, status=None, now=NOW)
    assert reading is not None
    assert (reading.dialect, reading.provider, reading.limits[0].limit) == (dialect, "unknown", 7)


def test_read_dialect_of_the_first_mark_ignores_other_names() -> None:
    """Under Anthropic's names the x-ratelimit-* of a gateway in between are not mixed in."""
    reading = read(captures.ANTHROPIC + captures.OPENAI)
    assert [found.limit for found in reading.limits] == [1000, 80000, 16000, 96000]


@pytest.mark.parametrize(
    ("block", "wait"),
    [
        ("retry-after: 30", 30.0),
        ("Retry-After: Thu, 21 Aug 2025 12:41:00 GMT", 60.0),
        ("Retry-After: 0", 0.0),
        ("retry-after-ms: 1500", 1.5),
        ("retry-after: 2\nretry-after-ms: 1500", 1.5),
        ("retry-after: 2\nretry-after-ms: soon", 2.0),
        ("retry-after: soon\nretry-after: 4", 4.0),
    ],
)
def test_read_retry_after_alone_is_kept_but_not_useful(block: str, wait: float) -> None:
    """A wait is read in any dialect, also the unknown one, as seconds or as a date (S1.36, S1.40)."""
    reading = read(block, status=503)
    assert (reading.dialect, reading.status, reading.retry_after_s) == ("unknown", 503, wait)
    assert reading.retry_at == NOW + wait
    assert (reading.useful, reading.limits, reading.limits_observed_at) == (False, (), None)


@pytest.mark.parametrize(
    "block",
    [
        "content-type: application/json",
        "retry-after: soon",
        "x-ratelimit-limit-requests: many\nx-ratelimit-reset-requests: -5",
        "x-goog-request-id: 1",
        "openrouter-provider: acme",
        "x-ratelimit-over-limit: no",
        "anthropic-ratelimit-unified-representative-claim: five_hour",
    ],
)
def test_read_nothing_readable_is_no_reading(block: str) -> None:
    """Unknown names, and known names with nothing readable, make no snapshot (S1.39, S1.47)."""
    assert read_quota(parse_block(block), provider="acme", status=200, now=NOW) is None


def test_read_no_headers_is_no_reading() -> None:
    """Empty headers, and a header without a name, make no snapshot (S1.39)."""
    assert read_quota([], provider="acme", status=429, now=NOW) is None
    assert read_quota([(b"", b"1")], provider="acme", status=429, now=NOW) is None


def test_read_garbled_field_keeps_the_others() -> None:
    """One unreadable value is unknown and costs no other (S1.39)."""
    reading = read("x-ratelimit-limit-requests: lots\nx-ratelimit-remaining-requests: 0\nretry-after: nan")
    assert reading.limits == (limit("requests", remaining=0),)
    assert reading.retry_after_s is None


def test_read_for_a_provider_that_nobody_named() -> None:
    """A provider without a name is "unknown", always the same id (S1.5)."""
    reading = read_quota([(b"x-ratelimit-remaining-requests", b"3")], provider="", status=200, now=NOW)
    assert reading is not None
    assert (reading.provider, reading.dialect) == ("unknown", "openai")


def test_read_counts_waits_from_the_answer_and_orders_by_the_request() -> None:
    """A reset of 6 s after a call of 30 s lies ahead of the answer, while the order is that of the starts (S1.45)."""
    block = "x-ratelimit-remaining-tokens: 0\nx-ratelimit-reset-tokens: 6s\nretry-after: 6"
    reading = read_quota(parse_block(block), provider="acme", status=429, now=NOW + 30, started_at=NOW)
    assert reading is not None
    assert (reading.observed_at, reading.received_at, reading.limits_observed_at) == (NOW, NOW + 30, NOW)
    assert reading.limits[0].reset_at == reading.retry_at == NOW + 36


def test_read_keeps_no_secret() -> None:
    """Organisation ids, cookies and other headers are nowhere in a reading (S1.50, X.9)."""
    for block in (captures.OPENAI, captures.ANTHROPIC):
        reading = read(block)
        assert "secret" not in repr(reading) + json.dumps(reading.to_dict())


def test_read_with_an_own_dialect_first() -> None:
    """A dialect put first reads its names and has them stripped, and the shipped registry stays as it is (S1.34)."""

    def read_acme(headers: object, now: float) -> tuple[QuotaLimit, ...]:
        return (limit("acme", remaining=3),)

    mine = Dialect(name="acme", marks=(b"acme-left",), read=read_acme, private=(b"acme-",))
    registry = DialectRegistry(mine, *DIALECTS.dialects)
    both = parse_block("Acme-Left: 3\nx-ratelimit-limit: 1")
    reading = registry.read(both, provider=None, status=None, now=NOW)
    assert reading is not None
    assert (reading.dialect, reading.limits) == ("acme", (limit("acme", remaining=3),))
    assert registry.is_quota_header(b"ACME-Account")
    assert not is_quota_header(b"ACME-Account")


@pytest.mark.parametrize(
    "name",
    [
        *(
            name
            for block in (captures.ANTHROPIC_UNIFIED, captures.MISTRAL, captures.FIREWORKS, captures.GITHUB)
            for name, _ in parse_block(block)
        ),
        b"X-RateLimit-Limit",
        b"x-tokenlimit-remaining",
        b"openai-organization",
        b"OpenAI-Project",
        b"anthropic-organization-id",
        b"anthropic-priority-input-tokens-limit",
        b"anthropic-fast-input-tokens-limit",
        b"ratelimit-limit",
        b"ratelimitbysize-remaining",
        b"x-ratelimitbysize-limit-minute",
        b"llm_provider-x-ratelimit-remaining-tokens",
        b"llm_provider-anthropic-organization-id",
        b"x-litellm-key-spend",
        b"X-AI-RateLimit-Limit-main",
    ],
)
def test_quota_header_is_recognised(name: bytes) -> None:
    """What tells a client about the operator's account at a provider is to be taken off, in any case."""
    assert is_quota_header(name)
    assert is_quota_header(name.upper())


@pytest.mark.parametrize(
    "name",
    [
        b"ratelimit",
        b"RateLimit-Policy",
        b"retry-after",
        b"retry-after-ms",
        b"content-type",
        b"x-request-id",
        b"openai-processing-ms",
        b"anthropic-version",
        b"x-goog-hash",
        b"",
    ],
)
def test_other_header_is_passed(name: bytes) -> None:
    """Our own fields, Retry-After, request ids and everything else stay on the response."""
    assert not is_quota_header(name)


def test_quota_header_covers_every_limit_that_is_read() -> None:
    """No name out of which a limit is read escapes the stripping, but the two fields that we send ourselves."""
    blocks = [value for name, value in vars(captures).items() if name.isupper() and isinstance(value, str)]
    assert len(blocks) > 10
    for name, value in (pair for block in blocks for pair in parse_block(block)):
        reading = read_quota([(name, value)], provider=None, status=None, now=NOW)
        if reading is not None and reading.limits and name not in (b"ratelimit", b"ratelimit-policy"):
            assert is_quota_header(name), name


NAMES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"retry-after", b"retry-after-ms", b"ratelimit", b"ratelimit-policy", b"x-goog-a"]),
    st.builds(
        lambda begin, end: begin + end,
        st.sampled_from(
            [b"x-ratelimit-", b"X-RateLimit-limit-", b"anthropic-ratelimit-", b"anthropic-fast-", b"ratelimit-"]
        ),
        st.one_of(
            st.binary(max_size=80), st.from_regex(rb"[a-z_-]{1,70}-(limit|reset|status|utilization)", fullmatch=True)
        ),
    ),
)
VALUES = st.one_of(
    st.binary(max_size=100),
    st.from_regex(rb"[0-9.,:;=\"a-zTZ+-]{0,70}", fullmatch=True),
    st.sampled_from([b"1s", b"0", b"2025-08-21T12:40:59Z", b"1788220800000", b"allowed"]),
)


@pytest.mark.uncounted
@given(st.lists(st.tuples(NAMES, VALUES), max_size=60), st.floats(min_value=0, max_value=4e9))
def test_read_never_raises(headers: list[tuple[bytes, bytes]], now: float) -> None:
    """Whatever headers come, the answer is None or a bounded reading that is plain JSON (S1.39)."""
    reading = read_quota(headers, provider="acme", status=200, now=now)
    for name, _ in headers:
        is_quota_header(name)
    if reading is not None:
        json.dumps(reading.to_dict(), allow_nan=False)
        assert len(reading.limits) <= 32
        assert all(0 < len(found.resource) <= 73 for found in reading.limits)
