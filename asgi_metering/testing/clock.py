"""
A clock that a test moves. Nothing waits: time passes when the test says so.

Knows nothing of who reads it.
"""

from __future__ import annotations

__all__ = ["NOON", "FakeClock"]

NOON = 1_728_043_200.0
"""12:00 UTC of 2024-10-04: neither a minute, an hour nor a day begins or ends soon after it."""


class FakeClock:
    """
    Answers epoch seconds when it is called, for every ``clock=`` of this package.

    Args:
        start: The first answer.

    Safe to read from other threads while the test moves it.
    """

    def __init__(self, start: float = NOON) -> None:
        self._now = start

    def __call__(self) -> float:
        """The time, epoch seconds."""
        return self._now

    def advance(self, seconds: float) -> float:
        """Let *seconds* pass and return the time; a negative number steps back, as clocks do when they are set."""
        self._now += seconds
        return self._now

    def __repr__(self) -> str:
        return f"FakeClock({self._now!r})"
