"""Alarms: a failure that comes with every request is told of seldom."""

from __future__ import annotations

import logging

import pytest

from asgi_metering.alarms import EVERY_S, Alarms
from asgi_metering.testing.clock import FakeClock


def test_tell_seldom_of_each_kind(caplog: pytest.LogCaptureFixture) -> None:
    """Each kind is told of with its traceback, then not for a while, then with the number that was left out."""
    clock = FakeClock(start=0.0)
    alarms = Alarms(logging.getLogger("asgi_metering.tests"), clock)
    for kind in ("a", "a", "b", "a"):
        alarms.raised(kind, f"{kind} failed.", ValueError(kind))
    clock.advance(EVERY_S)
    for _ in range(2):
        alarms.raised("a", "a failed.", ValueError("a"))
    clock.advance(2 * EVERY_S)
    alarms.raised("b", "b failed.", ValueError("b"))
    assert [record.getMessage() for record in caplog.records] == [
        "a failed.",
        "b failed.",
        "a failed. (2 more of these since the last record.)",
        "b failed.",
    ]
    assert all(record.exc_info and record.exc_info[0] is ValueError for record in caplog.records)
