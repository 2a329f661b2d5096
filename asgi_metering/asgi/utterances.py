"""
Utterances: what an application sends over a WebSocket, kept for reading its usage off the path of messages.

On the path it only appends a reference. Messages are read when somebody asks, at heartbeats say, and before too many of
them wait; what was read is an answer of a model, of which the latest are kept by themselves and all before them as
sums. So a session of any length is charged in full, and keeps little. Reads nothing that a client says.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from asgi_metering.asgi.types import Message
from asgi_metering.exchanges import Exchanges, Sum
from asgi_metering.folding import fold
from asgi_metering.growing import LEAST_ROOM
from asgi_metering.usage import UsageReader, UsageReport
from asgi_metering.usage.session import SessionReader

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["Utterances", "utterances_of"]

MAX_WAITING = 65_536
"""
Work that waits at most, in characters or bytes of messages: beyond it whoever sends waits until it is read, so that
nothing is dropped, and that nobody who asks has to read for longer than some milliseconds.
"""

EACH = 1_024
"""To look at one object takes as long as to parse so many characters."""

SLICE = 16_384
"""Work between two turns of the event loop, a millisecond or two: many sessions share it with all else."""

_ANSWERED = 200


class _Answers(Exchanges):
    """The answers of one session: few by themselves, since all of them are looked at each time that it is measured."""

    most, spare = 4, 2


class Utterances:
    """
    Watches what the application sends in one session.

    Args:
        call: Whose session it is; admitted. Not kept alive by this.
        dialect: The usage dialect where the shape would mislead; None detects it.
    """

    __slots__ = (
        "_answers",
        "_call",
        "_is_reading",
        "_lock",
        "_paced",
        "_reader",
        "_room",
        "_steps",
        "_unpaced",
        "_waiting",
        "_work",
    )

    def __init__(self, call: Call, dialect: str | None) -> None:
        self._call = weakref.ref(call)
        self._answers = _Answers()
        self._reader = SessionReader(dialect, self._begun)
        # Handlers may ask from threads what is left.
        self._lock = threading.RLock()
        self._waiting: deque[str | bytes] = deque()
        # Of the message that is being read; and whether somebody is at it, higher up in the same thread.
        self._steps: Iterator[int] | None = None
        self._is_reading = False
        self._work = self._unpaced = 0
        self._room = LEAST_ROOM
        # A price per message or second is held for by what comes in.
        self._paced = call.charge is not None and call.charge.measured

    async def sent(self, message: Message) -> None:
        """The server has taken *message*; a hold that grows gets its time."""
        data = message.get("text")
        data = message.get("bytes") if data is None else data
        if not data:
            return
        if not isinstance(data, str | bytes):
            # The application may write over it before it is read.
            data = bytes(data)
        with self._lock:
            self._waiting.append(data)
            self._work += len(data) + EACH
        if self._work > MAX_WAITING:
            await self.read_on()
        call = self._call() if self._paced else None
        if call is not None and call.growth is not None:
            self._unpaced += len(data)
            if self._unpaced >= self._room:
                passed, self._unpaced = self._unpaced, 0
                self._room = await call.growth.pace(passed)

    # -- as an observer of the call ------------------------------------------------------------------------

    @property
    def answers(self) -> Exchanges:
        """
        Each answer of a model in what was sent until now; or one of all of it, where nothing shows a model.

        Or only words of one, whose usage the application tells in a shape of its own.
        """
        self._read()
        answers = self._answers
        if (answers or answers.sums is not None) and (not _told(self._reader.rest) or _tell(answers)):
            return answers
        rest = Exchanges()
        rest.append(("", self._reader.rest, _ANSWERED))
        return rest

    def passed(self, count: int) -> None:
        """Messages are counted as they are sent."""

    def digest(self) -> bool:
        """Nothing: so little waits that it may wait until somebody asks, and whoever looks after it has many others."""
        return False

    def report(self) -> UsageReport | None:
        """Of a session nobody asks for one report."""
        return None

    async def read_on(self) -> None:
        """Read what waits, with a turn of the event loop behind each slice; it never raises."""
        left = self._read(SLICE)
        while left:
            await asyncio.sleep(0)
            left = self._read(SLICE)

    def text_reader(self) -> UsageReader:
        """What shows no model."""
        return self._reader.rest

    def _read(self, most: int | None = None) -> bool:
        """Read what waits, or *most* of it; whether some is left."""
        with self._lock:
            if self._is_reading:
                # By whom it read for: a price of the application's own that asks what its call has left, say.
                return False
            self._is_reading = True
            try:
                done = 0
                while (most is None or done < most) and (more := self._step()) is not None:
                    done += more
            finally:
                self._is_reading = False
            return self._steps is not None or bool(self._waiting)

    def _step(self) -> int | None:
        """Read one object more, and answer what work that was; None where nothing waits."""
        if self._steps is None:
            if not self._waiting:
                return None
            data = self._waiting.popleft()
            self._work -= len(data) + EACH
            self._steps = self._reader.read(data)
        try:
            size = next(self._steps, None)
        except Exception as failure:  # noqa: BLE001 -- nothing that is wrong here may break a session, nor its end
            size = None
            self._alarm("What it was sent could not be read, so that it does not count", failure)
        if size is None:
            self._steps = None
            return 0
        return size + EACH

    def _begun(self, dialect: str, reader: UsageReader) -> None:
        call = self._call()
        if not self._answers.take((dialect, reader, _ANSWERED)) or call is None:
            return
        try:
            fold(call, self._answers)
        except Exception as failure:  # noqa: BLE001 -- a price of the application's own; its session goes on
            self._alarm("Its answers could not be summed, so that all of them are kept", failure)

    def _alarm(self, told: str, failure: Exception) -> None:
        call = self._call()
        if call is not None:
            call.metering.alarms.raised("session", f"Call {call.id} is a session. {told}.", failure)


def _told(reader: UsageReader | Sum) -> bool:
    """Whether it counted anything, be it what nobody can believe."""
    if isinstance(reader, Sum):
        return not reader.unreported
    report = reader.report()
    return report is not None and (report.usage is not None or report.refused)


def _tell(answers: Exchanges) -> bool:
    return any(_told(reader) for _, reader, _ in answers.entries())


def utterances_of(call: Call) -> Utterances | None:
    """Only calls whose price or limits depend on usage have their messages read."""
    if not call.counts_usage:
        return None
    return Utterances(call, None if call.charge is None else call.charge.dialect)
