"""
The life of a hold: one table of state, event and next state. Nothing else may decide it.

```
held ──────► settled | released | in_doubt
in_doubt ──► settled | released
```

A hold is *held* from admission on. When its heartbeats stop past its expiry it is *in doubt*: it still counts,
and whoever comes by may end it by its policy once its grace is over. An end that comes to an ended hold changes
nothing and is answered with the first receipt. Does not know amounts, accounts or time.
"""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType

__all__ = ["TRANSITIONS", "HoldEvent", "HoldState", "diagram", "is_live", "next_state"]


class HoldState(StrEnum):
    """Where a hold is in its life."""

    # That of its text, as its equality is: an enum's own is a function of Python, and the table is asked at each end.
    __hash__ = str.__hash__

    HELD = "held"
    IN_DOUBT = "in_doubt"
    SETTLED = "settled"
    RELEASED = "released"


class HoldEvent(StrEnum):
    """What may happen to a hold."""

    __hash__ = str.__hash__

    RENEW = "renew"
    EXPIRE = "expire"
    SETTLE = "settle"
    RELEASE = "release"


TRANSITIONS: MappingProxyType[HoldState, MappingProxyType[HoldEvent, HoldState]] = MappingProxyType(
    {
        HoldState.HELD: MappingProxyType(
            {
                HoldEvent.RENEW: HoldState.HELD,
                HoldEvent.EXPIRE: HoldState.IN_DOUBT,
                HoldEvent.SETTLE: HoldState.SETTLED,
                HoldEvent.RELEASE: HoldState.RELEASED,
            }
        ),
        # A heartbeat that comes late postpones the policy's end, but the doubt stays on record.
        HoldState.IN_DOUBT: MappingProxyType(
            {
                HoldEvent.RENEW: HoldState.IN_DOUBT,
                HoldEvent.SETTLE: HoldState.SETTLED,
                HoldEvent.RELEASE: HoldState.RELEASED,
            }
        ),
        HoldState.SETTLED: MappingProxyType({}),
        HoldState.RELEASED: MappingProxyType({}),
    }
)
"""Legal moves. What is not in the table changes nothing."""


def next_state(state: HoldState, event: HoldEvent) -> HoldState | None:
    """Return the state that *event* leads to, or None when *event* changes nothing in *state*."""
    return TRANSITIONS[state].get(event)


def is_live(state: HoldState) -> bool:
    """Whether the hold still keeps its units: every state with a way out."""
    return bool(TRANSITIONS[state])


def diagram() -> str:
    """Draw the table, for the README: one line per move, in the table's order, and one per state that has none."""
    lines = []
    width = max(len(state) for state in TRANSITIONS)
    for state, moves in TRANSITIONS.items():
        if not moves:
            lines.append(f"{state:<{width}}   (ended: every event answers the first receipt)")
        for event, target in moves.items():
            lines.append(f"{state:<{width}} ── {event:<7} ──► {target}")
    return "\n".join(lines)
