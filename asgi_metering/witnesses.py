"""
Witnesses: libraries that watch a call's upstream calls, and tell afterwards what these used.

LiteLLM's callback is one, OpenTelemetry's spans of instrumented SDKs are another. Knows which upstream calls of a call
are watched, what was told of them, and how long the end of the call waits to hear it. Never knows the libraries, nor
which source counts: that is `measuring`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from asgi_metering.errors import ConfigurationError, UsageError
from asgi_metering.exchanges import kind_of
from asgi_metering.opening import CURRENT, Opening
from asgi_metering.prices.costing import ModelCall

if TYPE_CHECKING:
    from asgi_metering.call import Call
    from asgi_metering.events.metrics import Meters
    from asgi_metering.usage import TokenUsage

__all__ = ["LITELLM", "TELEMETRY", "WAIT_S", "WITNESSES", "Told", "Watched", "Witness", "Witnesses", "current_opening"]

LITELLM = "litellm"
"""What LiteLLM told its callback."""

TELEMETRY = "telemetry"
"""What OpenTelemetry GenAI spans said when they ended."""

WITNESSES = (LITELLM, TELEMETRY)
"""
The sources of this kind, the higher one first.

Both rank below the upstream client, which saw the bytes, and above the body, which may be what the application made of
its answers (DESIGN 6). LiteLLM is the client of the providers itself, so it ranks above spans, which it writes too.
"""

WAIT_S = 2.0
"""
What the end of a call waits, at most, for a library that tells of an answer only after it has given it away.

LiteLLM logs in the background, some milliseconds later; what it never logs (a stream that is left early) costs an end,
which no client waits for, this much.
"""

MAX_WATCHED = 1_000
"""
Upstream calls of one call that are watched at a time, and that are kept by themselves when they were told of: an agent
loop may go on, and then the oldest are summed.
"""

log = logging.getLogger("asgi_metering.upstream")


@dataclass(frozen=True, slots=True)
class Told:
    """
    What was told of one upstream call.

    Attributes:
        usage: What it used.
        model, provider: As the library names them.
        cost: What it says that the call costs, in USD; None if it does not.
        estimated: The library counted, rather than the provider.
        truncated: A token limit cut the answer (S3.28).
        answer: The id of the provider's answer, where the library tells the same one more than once.
        count: Of how many calls it is the sum.
        longest: Input of the longest of these; None for a single one.
    """

    usage: TokenUsage
    model: str | None = None
    provider: str | None = None
    cost: Decimal | None = None
    estimated: bool = False
    truncated: bool = False
    answer: str | None = None
    count: int = 1
    longest: int | None = None

    def as_call(self) -> ModelCall:
        """As one call of a model: a library's own reckoning of its cost, and no provider's (S3.20)."""
        return ModelCall(
            self.usage,
            self.model,
            self.provider,
            hidden_cost=self.cost,
            estimated=self.estimated,
            count=self.count,
            longest=self.longest,
        )

    def plus(self, other: Told) -> Told:
        """
        Both, which are of one kind.

        Raises:
            UsageError: It adds up to more than can be counted.
        """
        both = self.as_call().plus(other.as_call())
        return replace(
            self, usage=both.usage, cost=both.hidden_cost, answer=None, count=both.count, longest=both.longest
        )

    def repeats(self, other: Told) -> bool:
        """Whether both tell of the same answer; not by its id alone, for some servers make up ids of three digits."""
        return self.answer is not None and self.answer == other.answer and self.usage == other.usage


class Witnesses:
    """What libraries have told of one call's upstream calls. Safe for several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._told: dict[str, list[Told]] = {}
        self._open: dict[Watched, None] = {}
        self._lacking: set[str] = set()
        self._is_closed = False
        self._waiting: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def told(self, source: str) -> list[Told]:
        """What *source* has told so far, in its order."""
        with self._lock:
            return list(self._told.get(source, ()))

    def is_whole(self, source: str) -> bool:
        """Whether *source* has told of every upstream call that it watches, or watched."""
        with self._lock:
            watching = any(each.source == source and not each.is_retry for each in self._open)
            return not watching and source not in self._lacking

    def opened(self, watched: Watched) -> bool:
        """Note that an upstream call begins; False where `MAX_WATCHED` of them run, or behind the call's end."""
        with self._lock:
            if self._is_closed or len(self._open) >= MAX_WATCHED:
                return False
            self._open[watched] = None
            return True

    def ended(self, watched: Watched, told: Told | None, *, lacks: bool = False) -> bool:
        """Take what is told of an upstream call that has ended; False if the call has ended before."""
        with self._lock:
            if self._is_closed:
                return False
            self._open.pop(watched, None)
            if told is not None:
                known = self._told.setdefault(watched.source, [])
                if not any(map(told.repeats, known)):
                    known.append(told)
                if len(known) > MAX_WATCHED:
                    known[:] = _summed(known, watched.price)
            elif lacks:
                self._lacking.add(watched.source)
            waiting = None if self._awaits() else self._waiting
        if waiting is not None:
            _tell(*waiting)
        return True

    async def settled(self, wait_s: float = WAIT_S) -> None:
        """Wait, at most so many seconds, until nobody is awaited any more; from then on nothing is taken."""
        loop = asyncio.get_running_loop()
        with self._lock:
            waiting = loop.create_future() if self._awaits() else None
            self._waiting = None if waiting is None else (loop, waiting)
            self._is_closed = waiting is None
        if waiting is not None:
            await asyncio.wait({waiting}, timeout=wait_s)
            with self._lock:
                self._is_closed = True

    def _awaits(self) -> bool:
        return any(each.is_awaited for each in self._open)


def _summed(known: list[Told], price: Any) -> list[Told]:
    """*known*, the oldest of them as sums of those whose sum costs what they cost apart."""
    sums: dict[Hashable, Told] = {}
    for told in known[: MAX_WATCHED // 2]:
        key: Hashable = (kind_of(price, told.as_call()), told.model, told.provider, told.estimated, told.truncated)
        if key not in sums and len(sums) >= MAX_WATCHED // 4:
            # Names come from the application's requests: beyond so many they are summed as of none.
            key, told = (told.estimated, told.truncated), replace(told, model=None)
        before = sums.get(key)
        try:
            sums[key] = told if before is None else before.plus(told)
        except UsageError:
            # What cannot be counted together is refused as a whole at the end; one of them shows that it cannot.
            sums["beyond"] = told
    return [*sums.values(), *known[MAX_WATCHED // 2 :]]


def _tell(loop: asyncio.AbstractEventLoop, waiting: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(_resolve, waiting)
    except RuntimeError:
        # The loop was closed meanwhile: nobody waits any more.
        log.debug("An end that waited for usage is over.")


def _resolve(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class Watched:
    """
    One upstream call, as one library sees it.

    Args:
        witness: Which library.
        opening: The request or charge in whose context it began; None where there is none.
        is_retry: It repeats one that failed, so that nothing may ever be told of it.
        is_awaited: The library tells after its answer is given away, so an end waits for it.

    Attributes:
        source: The library's name.
    """

    __slots__ = ("__weakref__", "_call", "_is_late", "_witness", "is_awaited", "is_retry", "source")

    def __init__(
        self, witness: Witness, opening: Opening | None, *, is_retry: bool = False, is_awaited: bool = False
    ) -> None:
        self._witness = witness
        self.source = witness.source
        self.is_retry = is_retry
        self.is_awaited = is_awaited
        call = None if opening is None or opening.closed else opening.call
        self._is_late = opening is not None and (opening.closed or (call is not None and call.closed))
        self._call: Call | None = None
        if call is not None and not self._is_late:
            if _witnesses(call).opened(self):
                self._call = call
            else:
                self._is_late = True

    @property
    def price(self) -> Any:
        """By which its call is charged."""
        return None if self._call is None else self._call.price

    @property
    def has_call(self) -> bool:
        """Whether it began in a call, whether or not that has ended."""
        return self._call is not None or self._is_late

    def tell(self, told: Told) -> bool:
        """
        Take what it used, once it has ended; any thread may.

        Returns:
            Whether it was taken. What comes when its call has ended is refused and counted (``metering.usage.late``),
            what began in no call is ignored and counted (``metering.usage.unscoped``, S3.26).
        """
        call = self._call
        if call is not None and call.witnesses is not None:
            if call.witnesses.ended(self, told):
                if call.growth is not None:
                    call.growth.nudge()
                return True
            self._is_late = True
        self._witness.refused(is_late=self._is_late, line=None if call is None else call.line)
        return False

    def drop(self, *, lacks: bool = False) -> None:
        """Note that it has ended without usage: it failed and used none, or it *lacks* what it used."""
        if self._call is not None and self._call.witnesses is not None:
            self._call.witnesses.ended(self, None, lacks=lacks)


def _witnesses(call: Call) -> Witnesses:
    with _making:
        if call.witnesses is None:
            call.witnesses = Witnesses()
        return call.witnesses


_making = threading.Lock()
"""Held while a call gets its first witness: two threads of one call may begin at once."""


class Witness:
    """
    A library that watches upstream calls.

    Args:
        meters: Counts what cannot be booked.
        source: One of `WITNESSES`.

    Raises:
        ConfigurationError: The source is none of them, so that nobody would look at what it tells.
    """

    def __init__(self, meters: Meters, source: str) -> None:
        if source not in WITNESSES:
            raise ConfigurationError(f"The source {source!r} has no rank. Choose one of {', '.join(WITNESSES)}.")
        self._meters = meters
        self.source = source

    def begin(self, *, is_retry: bool = False, is_awaited: bool = False) -> Watched:
        """Watch an upstream call that begins in the current context."""
        return self.begin_in(current_opening(), is_retry=is_retry, is_awaited=is_awaited)

    def begin_in(self, opening: Opening | None, *, is_retry: bool = False, is_awaited: bool = False) -> Watched:
        """Watch an upstream call that began in the request or charge of *opening*; None: in none."""
        return Watched(self, opening, is_retry=is_retry, is_awaited=is_awaited)

    def refused(self, *, is_late: bool, line: str | None) -> None:
        """Count usage that no call takes."""
        if is_late:
            if line is None:
                self._meters.count("usage_late")
            else:
                self._meters.count("usage_late", line=line)
            log.warning("Usage told by %s came when its call had ended; it is not charged.", self.source)
        else:
            self._meters.count("usage_unscoped")
            log.debug("Usage told by %s belongs to no call; it is not charged.", self.source)


def current_opening() -> Opening | None:
    """The request or charge in whose context this code runs."""
    return CURRENT.get()
