"""Pauses that a service can afford are too long for a test: here they are short, and nothing else is changed."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again within milliseconds."""
    for name in (
        "stores.breaker.FIRST_PAUSE_S",
        "stores.breaker.LAST_PAUSE_S",
        "delivery.RETRY_FIRST_S",
        "delivery.RETRY_LAST_S",
        "delivery.IDLE_S",
    ):
        monkeypatch.setattr(f"asgi_metering.{name}", 0.02)
