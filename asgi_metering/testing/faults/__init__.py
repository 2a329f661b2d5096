"""
The fault kit: a worker that is killed, a client that leaves, a store that is down, each at an exact point.

`crash_after` kills the process at one of `POINTS`; `until_killed` runs what is killed in a process of its own.
`disconnect_at` is a client that leaves at one of `PHASES`. `store_down` is a store with a switch. All of them stand
around what is handed to the package anyway, and nothing in the package knows of them.
"""

from __future__ import annotations

from asgi_metering.testing.faults.crashes import Crash, crash_after, kill, until_killed
from asgi_metering.testing.faults.departures import PHASES, Departed, disconnect_at
from asgi_metering.testing.faults.outages import StoreDown, store_down
from asgi_metering.testing.faults.points import POINTS

__all__ = [
    "PHASES",
    "POINTS",
    "Crash",
    "Departed",
    "StoreDown",
    "crash_after",
    "disconnect_at",
    "kill",
    "store_down",
    "until_killed",
]
