"""
Ids: what tells calls apart, drawn at random.

Knows how an id is made, and that a fork must not make one twice. Never knows what has one.
"""

from __future__ import annotations

import os
import re
import time

__all__ = ["new_id"]

RANDOM_PARTS = 256
"""Of ids that are drawn at once: to ask the system for each takes longer than all else that makes an id."""

_random_parts: list[str] = []

_PART = re.compile(".{20}")


def new_id() -> str:
    """128 bits, milliseconds first as in UUIDv7 (RFC 9562): rows of one time are neighbours in a store's index."""
    try:
        # In one step, so that no two threads get the same.
        part = _random_parts.pop()
    except IndexError:
        part, *others = _PART.findall(os.urandom(10 * RANDOM_PARTS).hex())
        _random_parts.extend(others)
    return (time.time_ns() // 1_000_000).to_bytes(6).hex() + part


if hasattr(os, "register_at_fork"):
    # What the parent of a process has drawn is the parent's.
    os.register_at_fork(after_in_child=_random_parts.clear)
