"""
Warm processes: what the server of `multiprocessing` imports once, so that each process that it forks begins at once.

Knows names of modules alone: importing this imports none of them.
"""

from __future__ import annotations

import multiprocessing

__all__ = ["PRELOADED", "preload"]

PRELOADED = (
    "anyio._backends._asyncio",
    "asgi_metering.testing.faults",
    "limits",
    "opentelemetry.metrics",
    "opentelemetry.trace",
    "psycopg",
    "psycopg.adapt",
    # What each process imports as the main module of its parent.
    "pytest",
    "asgi_metering.testing.faults.journals",
    "tests.stores.crashes.growth",
    "tests.stores.crashes.house",
    "tests.stores.crashes.outage",
    "tests.stores.takers",
    # Last: it gives nothing but what the others need.
    "tests.harness.warmed",
)
"""Imported before the fork: together they take longer than most of what is run behind it."""


def preload() -> None:
    """Have the server import them when the first process is asked for; again changes nothing."""
    multiprocessing.set_forkserver_preload(list(PRELOADED))
