"""The IETF RateLimit fields as a provider sends them."""

from __future__ import annotations

import pytest

from asgi_metering.quotas import QuotaLimit, openai
from asgi_metering.quotas.ietf import read_limits
from tests.quotas.captures import NOW, parse_block


@pytest.mark.parametrize(
    ("block", "limits"),
    [
        ('ratelimit: "default";r=50;t=30', [QuotaLimit(resource="default", remaining=50, reset_at=NOW + 30)]),
        ('ratelimit: "default";r=999;pk=:dHJpYWwxMjEzMjM=:', [QuotaLimit(resource="default", remaining=999)]),
        (
            'ratelimit-policy: "burst";q=100;w=60,"daily";q=1000;w=86400\nratelimit: "daily";r=1',
            [QuotaLimit(resource="burst", limit=100), QuotaLimit(resource="daily", limit=1000, remaining=1)],
        ),
        (
            'ratelimit-policy: "peruser";q=65535;qu="content-bytes";w=10;pk=:sdfjLJUOUH==:',
            [QuotaLimit(resource="peruser", limit=65535)],
        ),
        (
            'ratelimit: "Per-Minute";r=0, "b";r=2',
            [QuotaLimit(resource="per_minute", remaining=0), QuotaLimit(resource="b", remaining=2)],
        ),
        (
            'ratelimit: "a";r=1\nratelimit: "b";r=2',
            [QuotaLimit(resource="a", remaining=1), QuotaLimit(resource="b", remaining=2)],
        ),
        (
            "ratelimit-limit: 100\nratelimit-remaining: 50\nratelimit-reset: 50",
            [QuotaLimit(resource="requests", limit=100, remaining=50, reset_at=NOW + 50)],
        ),
        (
            "ratelimit: limit=10, remaining=1, reset=7\nratelimit-policy: 10;w=10",
            [QuotaLimit(resource="requests", limit=10, remaining=1, reset_at=NOW + 7)],
        ),
    ],
)
def test_read_fields_of_every_revision(block: str, limits: list[QuotaLimit]) -> None:
    """The vectors of drafts -06, -07 and -10, also split over lines, give limits by policy name."""
    assert list(read_limits(parse_block(block), NOW)) == limits


@pytest.mark.parametrize(
    "block",
    [
        'ratelimit: "two words";limit=5',
        'ratelimit: "<script>";r=1',
        r'ratelimit: "not \"b";r=5;t=1',
        'ratelimit: "two words";r=1',
        'ratelimit: "a";r=-1;t=x',
        'ratelimit: "a", r=5',
        'ratelimit: x="a";r=5',
        'ratelimit: "unended;r=5',
        "ratelimit: r=1",
        "ratelimit-policy: 100;w=10",
        "ratelimitbysize-limit: 4",
    ],
)
def test_read_malformed_fields_are_ignored(block: str) -> None:
    """A field that is not of the draft's form, or whose policy has no plain name, gives nothing."""
    assert read_limits(parse_block(block), NOW) == ()


def test_read_parameters_beside_a_text_of_any_kind() -> None:
    """What a quoted text says, with commas and escaped quotes, belongs to no limit and hides none (RFC 9651)."""
    block = r'ratelimit: "default";note="so, \"b\";r=0";r=50, "c";pk=:a,b=:;r=2'
    limits = (QuotaLimit(resource="default", remaining=50), QuotaLimit(resource="c", remaining=2))
    assert read_limits(parse_block(block), NOW) == limits


@pytest.mark.parametrize("value", [b"100, 100;w=60", b"100;w=60", b'100, 100;w=60;name="of each address", 5000;w=3600'])
def test_read_a_limit_that_lists_its_policies(value: bytes) -> None:
    """Drafts before -06, and Envoy still, list the policies behind the limit that is nearest: that one is told."""
    assert read_limits([(b"ratelimit-limit", value)], NOW) == (QuotaLimit(resource="requests", limit=100),)
    assert openai.read_limits([(b"x-ratelimit-limit", value)], NOW) == (QuotaLimit(resource="requests", limit=100),)


def test_read_overlong_field_is_cut() -> None:
    """Only the beginning of an absurdly long field is read."""
    block = b", ".join(b'"p%d";r=1' % number for number in range(1000))
    limits = read_limits([(b"ratelimit", block)], NOW)
    assert 1 <= len(limits) <= 32
