"""Anthropic's names."""

from __future__ import annotations

from decimal import Decimal

import pytest

from asgi_metering.quotas import QuotaLimit
from asgi_metering.quotas.anthropic import read_limits
from tests.quotas.captures import ANTHROPIC_UNIFIED, NOW, parse_block


def test_read_unified_keeps_utilization_and_status() -> None:
    """Spent shares and states are limits too; a reader of limit, remaining and reset alone would lose them."""
    limits = {limit.resource: limit for limit in read_limits(parse_block(ANTHROPIC_UNIFIED), NOW)}
    assert limits["unified_5h"].utilization == Decimal("0.42")
    assert limits["unified_overage"].state == "rejected"
    assert limits["unified_5h"].useful
    assert not limits["unified_overage"].useful


@pytest.mark.parametrize("value", [b"1776649200", b"2026-04-20T01:40:00Z"])
def test_read_unified_reset_in_both_forms(value: bytes) -> None:
    """A unified reset is read as epoch seconds and as RFC 3339."""
    (found,) = read_limits([(b"anthropic-ratelimit-unified-reset", value)], NOW)
    assert found == QuotaLimit(resource="unified", reset_at=1776649200.0)


@pytest.mark.parametrize("window", ["5h", "7d", "7d_oi", "30d"])
def test_read_unified_takes_any_window(window: str) -> None:
    """A window that nobody has seen yet is read as well."""
    (found,) = read_limits([(f"anthropic-ratelimit-unified-{window}-utilization".encode(), b"0.5")], NOW)
    assert found.resource == f"unified_{window}"


@pytest.mark.parametrize(
    "name",
    [
        b"anthropic-organization-id",
        b"anthropic-ratelimit-limit",
        b"anthropic-ratelimit-unified-overage-disabled-reason",
    ],
)
def test_read_other_names_are_ignored(name: bytes) -> None:
    """Names without a resource or without a known field give nothing."""
    assert read_limits([(name, b"1")], NOW) == ()
