"""
`unmetered()`: call a decorated endpoint as the plain function that it is, in a unit test of it alone.

Knows calls as the edge opens them. Never a store with money in it: nothing is asked, nothing is charged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from asgi_metering.call import Call
from asgi_metering.metering import ALL_FEATURES, Metering
from asgi_metering.opening import CURRENT, Opening

__all__ = ["unmetered"]


@contextmanager
def unmetered(metering: Metering | None = None) -> Iterator[Call]:
    """
    Let decorated endpoints run without a middleware, free, as HEAD requests do.

    Args:
        metering: Whose units and threads the call has; one of its own, in memory and without sinks, by default.

    Yields the call that `current_call` answers inside: what the endpoint reported stands in ``call.reports``. Inside,
    ``current_call().admit(...)`` lets everything in. Afterwards the call is over, as a request's is (pitfalls 1, 3).
    Around ``asyncio.run(...)`` or inside a coroutine alike.
    """
    opening = Opening(metering or Metering("memory://", sinks=()), ALL_FEATURES, free=True)
    token = CURRENT.set(opening)
    try:
        yield opening.open_call()
    finally:
        CURRENT.reset(token)
        opening.closed = True
