"""
Dropping: what usage events of a billing line leave out, such as the thread of work in the background (S3.36).

Knows names of fields and attributes. Never knows a call, nor what is charged: that is told always.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name

__all__ = ["DROPPABLE", "read_drops", "without"]

DROPPABLE = frozenset(
    {"caller", "caller_type", "model", "provider", "request_id", "session_id", "span_id", "trace_flags", "trace_id"}
)
"""Fields of an event that may be left out; all others say what was charged, for what and to whom."""

_ALWAYS = frozenset(
    {
        "amount",
        "attributes",
        "basis",
        "ended_at",
        "estimated",
        "held",
        "id",
        "line",
        "outcome",
        "payer",
        "reason",
        "started_at",
        "status",
        "unit",
        "usage",
        "usage_source",
    }
)


def read_drops(given: object) -> Mapping[str, frozenset[str]]:
    """
    Read names of fields and attributes by line.

    Raises:
        ConfigurationError: It is no such mapping, or names what every event has.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"drop_fields={given!r} is no mapping of lines. Write {{'podcast': ['thread_id']}}.")
    drops: dict[str, frozenset[str]] = {}
    for line, names in given.items():
        check_name(line, "line")
        if not isinstance(names, list | tuple | Set) or not all(isinstance(name, str) for name in names):
            raise ConfigurationError(
                f"The fields {names!r} of line {line!r} are no list of names. Write {{{line!r}: ['thread_id']}}."
            )
        for name in names:
            if name in _ALWAYS:
                raise ConfigurationError(
                    f"Events of line {line!r} cannot leave out {name!r}, which every event has. Name an attribute, or "
                    f"one of {', '.join(sorted(DROPPABLE))}."
                )
        drops[line] = frozenset(names)
    return drops


def without(told: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """What is *told* of an event, without the fields and attributes that have one of *names*."""
    kept = {name: value for name, value in told.items() if name not in names}
    if "attributes" in kept:
        kept["attributes"] = {name: value for name, value in kept["attributes"].items() if name not in names}
    return kept
