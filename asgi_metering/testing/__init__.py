"""
What helps a user's own tests: a model provider without a network or a bill.

Knows where each part lives and imports it on first use. Never imported by the package itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from asgi_metering.testing.provider import Provider, SeenRequest

__all__ = ["Provider", "SeenRequest"]

_HOMES = {
    "Provider": "asgi_metering.testing.provider",
    "SeenRequest": "asgi_metering.testing.provider",
}


def __getattr__(name: str) -> object:
    """Import a part on first use, so that one part's extras are not needed for another."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
