"""
The breaker: whether a store is worth asking, judged by how it answered those who asked before.

One per store and process; event loops and threads share it. Knows seconds and outcomes, and neither stores nor
operations; awaits nothing. Who asks reports what came of it.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

from asgi_metering.errors import MeteringError, StoreAvoidedError, StoreUnavailableError

__all__ = ["Breaker", "BreakerState"]

log = logging.getLogger("asgi_metering.stores")

FAILURES: Final = 5
"""So many in a row are no hiccup. Calls that waited together fail together: under load one stalled batch is enough."""

FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 5.0
"""Between two probes, doubling: a store that came back is found within these."""

SPREAD: Final = (0.5, 1.0)
"""What part of a pause is waited, drawn each time: the processes of a service do not probe together."""

PROBE_S: Final = 30.0
"""A probe that says nothing for so long has died with its event loop; another one may go."""


class BreakerState(StrEnum):
    """``closed``: everybody asks. ``open``: nobody does. ``half-open``: one does, for all others."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """
    A table of three states. It opens after `FAILURES` failures in a row; after a pause it lets one probe through, which
    closes it, or opens it again for twice as long.

    Args:
        clock: Steady seconds.
        draw: Answers a number between its two arguments.
        told: Called with the new state after each change but that to half-open and back; a store that stays down is
            told of once. Whatever it raises is logged.

    Each permission has a number. What is reported under the number of an older state counts for nothing: of a thousand
    calls that were under way when it opened none makes it open again.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[float, float], float] = random.uniform,
        told: Callable[[BreakerState], None] | None = None,
    ) -> None:
        self._clock = clock
        self._draw = draw
        self._told = told
        self._lock = threading.Lock()
        self._state = BreakerState.CLOSED
        self._number = 0
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._until = 0.0

    @property
    def state(self) -> BreakerState:
        """As it is now; ``open`` also when its pause is over and nobody has asked since."""
        return self._state

    def ask(self) -> int | None:
        """Return a permission to ask the store, to be reported under; None where it is not to be asked."""
        with self._lock:
            if self._state is not BreakerState.CLOSED:
                now = self._clock()
                if now < self._until:
                    return None
                self._state = BreakerState.HALF_OPEN
                self._number += 1
                self._until = now + PROBE_S
            return self._number

    def answered(self, number: int) -> None:
        """The store answered in time."""
        with self._lock:
            if number != self._number:
                return
            self._failures = 0
            if self._state is BreakerState.CLOSED:
                return
            self._state = BreakerState.CLOSED
            self._number += 1
            self._pause_s = FIRST_PAUSE_S
        self._tell(BreakerState.CLOSED)

    def failed(self, number: int) -> None:
        """No answer came in time."""
        with self._lock:
            if number != self._number:
                return
            self._failures += 1
            is_news = self._state is BreakerState.CLOSED
            if is_news and self._failures < FAILURES:
                return
            self._state = BreakerState.OPEN
            self._number += 1
            self._until = self._clock() + self._pause_s * self._draw(*SPREAD)
            self._pause_s = min(2 * self._pause_s, LAST_PAUSE_S)
        if is_news:
            self._tell(BreakerState.OPEN)

    def left(self, number: int) -> None:
        """Who asked did not wait for the answer. A probe that is lost so is the next one's to make."""
        with self._lock:
            if number == self._number and self._state is BreakerState.HALF_OPEN:
                self._state = BreakerState.OPEN
                self._number += 1
                self._until = self._clock()

    @contextmanager
    def attempt(self, store: str) -> Iterator[None]:
        """
        Ask the store called *store* in this block, if it is worth it; what the block raises says what came of it.

        Raises:
            StoreAvoidedError: At once: the store has not answered of late, and is asked again later.
        """
        number = self.ask()
        if number is None:
            raise StoreAvoidedError(
                f"The {store} store has not answered of late and is left alone for a moment. It is asked again soon."
            )
        try:
            yield
        except StoreUnavailableError:
            self.failed(number)
            raise
        except MeteringError:
            # It said no, or could not do this one thing: it is there.
            self.answered(number)
            raise
        except BaseException:
            self.left(number)
            raise
        self.answered(number)

    def _tell(self, state: BreakerState) -> None:
        if self._told is not None:
            try:
                self._told(state)
            except Exception:
                # It stands on the path of a request.
                log.exception("What was told of the breaker's state raised.")
