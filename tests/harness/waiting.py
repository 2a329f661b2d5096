"""
Waiting for something that another thread or process does.

Knows how to poll within a bound. Never knows what is waited for: a test asks for a fact, not for a time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DEFAULT_TIMEOUT_S", "wait_until"]

DEFAULT_TIMEOUT_S = 20.0
"""A bound for broken code, not a measurement: two busy cores may stall a healthy process for seconds."""

_POLL_S = 0.01

T = TypeVar("T")


def wait_until(fact: Callable[[], T], *, timeout_s: float = DEFAULT_TIMEOUT_S, what: str = "") -> T:
    """
    Call *fact* until it answers something true, and return that.

    In a coroutine run it in a thread: ``await asyncio.to_thread(wait_until, fact)``.

    Raises:
        TimeoutError: *fact* stayed false for *timeout_s* seconds.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        answer = fact()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            raise TimeoutError(f"Not so after {timeout_s} s: {what or repr(fact)}; the last answer was {answer!r}.")
        time.sleep(_POLL_S)
