"""The x-ratelimit-* names."""

from __future__ import annotations

import pytest

from asgi_metering.quotas import QuotaLimit
from asgi_metering.quotas.openai import read_limits
from tests.quotas.captures import NOW, parse_block


def test_read_zero_does_not_fall_back_to_the_unsuffixed_field() -> None:
    """A literal 0 is a value, so the unsuffixed field does not replace it; an unreadable one is replaced (S1.35)."""
    block = """
        x-ratelimit-remaining: 9
        x-ratelimit-remaining-requests: 0
        x-ratelimit-limit: 10
        x-ratelimit-limit-requests: many
        x-ratelimit-reset: 5
    """
    assert read_limits(parse_block(block), NOW) == (
        QuotaLimit(resource="requests", remaining=0, limit=10, reset_at=NOW + 5),
    )


def test_read_repeated_field_takes_the_first_readable() -> None:
    """Of two lines with the same name the first one that can be read counts."""
    block = "x-ratelimit-limit-tokens: ?\nx-ratelimit-limit-tokens: 5\nx-ratelimit-limit-tokens: 6"
    assert read_limits(parse_block(block), NOW) == (QuotaLimit(resource="tokens", limit=5),)


@pytest.mark.parametrize(
    ("suffix", "resource"),
    [
        ("req", "requests"),
        ("req-minute", "requests_minute"),
        ("requests-day", "requests_day"),
        ("reqs", "reqs"),
        ("tokens-per-minute", "tokens_per_minute"),
        ("tokens_usage_based", "tokens_usage_based"),
    ],
)
def test_read_names_the_resource_by_its_suffix(suffix: str, resource: str) -> None:
    """Any resource is understood; Mistral's req means requests."""
    (found,) = read_limits([(f"x-ratelimit-remaining-{suffix}".encode(), b"1")], NOW)
    assert found == QuotaLimit(resource=resource, remaining=1)


@pytest.mark.parametrize(
    "name", [b"x-ratelimit-used", b"x-ratelimit-limit-", b"x-ratelimit-limit-\xff", b"x-ratelimit"]
)
def test_read_other_names_are_ignored(name: bytes) -> None:
    """Names that only look alike give nothing."""
    assert read_limits([(name, b"1")], NOW) == ()
