"""
The points at which a process can be killed: the published list, in the order of a call's life.

Knows the names, what is true at each, and which operation of the store a name speaks of. Never kills anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Backfill,
    Claim,
    Correct,
    Declare,
    Emit,
    End,
    Grow,
    PostGrant,
    Refund,
    Renew,
    ReverseGrant,
    Sweep,
    Undo,
)

__all__ = ["OPERATIONS", "POINTS", "check_point"]

OPERATIONS: Final[Mapping[str, type[object]]] = MappingProxyType(
    {
        "units": Declare,
        "admission": Admit,
        "undoing": Undo,
        "heartbeat": Renew,
        "growth": Grow,
        "end": End,
        "audit": Emit,
        "claim": Claim,
        "acknowledgement": Acknowledge,
        "sweep": Sweep,
        "grant": PostGrant,
        "reversal": ReverseGrant,
        "refund": Refund,
        "correction": Correct,
        "backfill": Backfill,
    }
)
"""What each word of the points below is to a store."""

_MOMENTS: Final = {
    "before": "the {} has not been sent to the store",
    "inside": "the store is in the transaction of the {}: its locks are held, nothing is written",
    "after": "the {} is committed, and nobody has the answer",
}


def _of(*words: str) -> dict[str, str]:
    return {f"{word}.{moment}": told.format(word) for word in words for moment, told in _MOMENTS.items()}


POINTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "opening.before": "the store has not been opened",
        "opening.after": "the store is open, with its tables",
        **_of("units", "admission", "undoing"),
        "endpoint.before": "the call is admitted, and its endpoint has not begun",
        "endpoint.after": "the endpoint has returned, and its response has not begun",
        "response.start": "the server has the start of the response, and no byte of its body",
        "response.first_byte": "the server has the first bytes of the body",
        **_of("heartbeat", "growth"),
        "response.cut": "nothing more could be held: the application has been stopped, and its call has not ended",
        "response.before_last": "the server has all but the last message of the body",
        "response.last": "the server has the whole response, and the end of the call is not queued",
        "response.returned": "the application has returned, and the end of the call is queued",
        **_of("end", "audit", "claim"),
        "delivery.before": "events are claimed, and the sink has not got them",
        "delivery.after": "the sink has taken the events, and they are not acknowledged",
        **_of("acknowledgement", "sweep", "grant", "reversal", "refund", "correction", "backfill"),
        "keeping.before": "calls that wait for a store that is down are not in the journal yet",
        "keeping.after": "they are in the journal, and nobody has the answer",
        "recovery.before": "a store that gave no answer is about to be asked again",
        "recovery.after": "it has answered again, and nobody has the answer",
        "reading.after": "what waits has been read off the journal, and none of it has been sent to the store",
        "removal.before": "the store has taken what waited, and it is still in the journal",
        "removal.after": "it is in the journal no more",
    }
)
"""
Every point, and what is true when a process is killed there.

Where an application runs without a lifespan (DESIGN 5), it returns only when its call's end is booked, so
``response.returned`` comes after ``end.after`` there.
"""


def check_point(point: str) -> str:
    """Return *point* if there is one of this name; raises `ConfigurationError`."""
    if point not in POINTS:
        raise ConfigurationError(f"There is no point {point!r}. Choose one of {', '.join(POINTS)}.")
    return point
