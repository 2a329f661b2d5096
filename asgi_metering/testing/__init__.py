"""
What helps a user's own tests: a model provider, a clock, the suite that a store has to pass, a gate that stays open,
faults, the proof of the books.

Knows where each part lives and imports it on first use. Never imported by the package itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_metering.testing.alone import unmetered
    from asgi_metering.testing.clock import FakeClock
    from asgi_metering.testing.conformance import StoreConformance
    from asgi_metering.testing.conserved import assert_conserved
    from asgi_metering.testing.faults import crash_after, disconnect_at, store_down, until_killed
    from asgi_metering.testing.provider import Provider, SeenRequest

__all__ = [
    "FakeClock",
    "Provider",
    "SeenRequest",
    "StoreConformance",
    "assert_conserved",
    "crash_after",
    "disconnect_at",
    "store_down",
    "unmetered",
    "until_killed",
]

_HOMES = {
    "FakeClock": "asgi_metering.testing.clock",
    "Provider": "asgi_metering.testing.provider",
    "SeenRequest": "asgi_metering.testing.provider",
    "StoreConformance": "asgi_metering.testing.conformance",
    "assert_conserved": "asgi_metering.testing.conserved",
    "crash_after": "asgi_metering.testing.faults",
    "disconnect_at": "asgi_metering.testing.faults",
    "store_down": "asgi_metering.testing.faults",
    "unmetered": "asgi_metering.testing.alone",
    "until_killed": "asgi_metering.testing.faults",
}


def __getattr__(name: str) -> object:
    """Import a part on first use, so that one part's extras are not needed for another."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
