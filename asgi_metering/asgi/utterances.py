"""
Utterances: what an application sends over a WebSocket, kept for reading its usage off the path of messages.

On the path it only appends a reference. Messages are read by the worker, at heartbeats, and when somebody asks; what
was read is an answer of a model, of which the latest are kept by themselves and all before them as sums. So a session
of any length is charged in full, and keeps little. Reads nothing that a client says.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from asgi_metering.asgi.types import Message
from asgi_metering.exchanges import Exchanges
from asgi_metering.folding import fold
from asgi_metering.growing import LEAST_ROOM
from asgi_metering.usage import UsageReader, UsageReport
from asgi_metering.usage.session import SessionReader

if TYPE_CHECKING:
    from asgi_metering.call import Call

__all__ = ["Utterances", "utterances_of"]

MAX_WAITING = 1_048_576
"""
Characters or bytes of messages that wait at most: beyond it they are read at once, so that nothing is dropped.

The worker reads four times a second, so that this is reached by what nobody listens to in real time.
"""

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

    __slots__ = ("_answers", "_call", "_lock", "_paced", "_reader", "_room", "_size", "_unpaced", "_waiting")

    def __init__(self, call: Call, dialect: str | None) -> None:
        self._call = weakref.ref(call)
        self._answers = _Answers()
        self._reader = SessionReader(dialect, self._begun)
        # Handlers may ask from threads what is left.
        self._lock = threading.RLock()
        self._waiting: list[str | bytes] = []
        self._size = self._unpaced = 0
        self._room = LEAST_ROOM
        # A price per message or second is held for by what comes in.
        self._paced = call.charge is not None and call.charge.measured

    async def sent(self, message: Message) -> None:
        """The server has taken *message*; a hold that grows gets its time."""
        data = message.get("text")
        data = message.get("bytes") if data is None else data
        if not data:
            return
        with self._lock:
            self._waiting.append(data)
            self._size += len(data)
        if self._size > MAX_WAITING:
            self._read()
        call = self._call() if self._paced else None
        if call is not None and call.growth is not None:
            self._unpaced += len(data)
            if self._unpaced >= self._room:
                passed, self._unpaced = self._unpaced, 0
                self._room = await call.growth.pace(passed)

    # -- as an observer of the call ------------------------------------------------------------------------

    @property
    def answers(self) -> Exchanges:
        """Each answer of a model in what was sent until now; or one of all of it, where nothing shows a model."""
        self._read()
        if self._answers or self._answers.sums is not None:
            return self._answers
        rest = Exchanges()
        rest.append(("", self._reader.rest, _ANSWERED))
        return rest

    def passed(self, count: int) -> None:
        """Messages are counted as they are sent."""

    def digest(self) -> None:
        """Read what waits."""
        self._read()

    def report(self) -> UsageReport | None:
        """Of a session nobody asks for one report."""
        return None

    def text_reader(self) -> UsageReader:
        """What shows no model."""
        return self._reader.rest

    def _read(self) -> None:
        with self._lock:
            waiting, self._waiting, self._size = self._waiting, [], 0
            for data in waiting:
                self._reader.feed(data)

    def _begun(self, dialect: str, reader: UsageReader) -> None:
        call = self._call()
        if self._answers.take((dialect, reader, _ANSWERED)) and call is not None:
            fold(call, self._answers)


def utterances_of(call: Call) -> Utterances | None:
    """Only calls whose price or limits depend on usage have their messages read."""
    if not call.counts_usage:
        return None
    return Utterances(call, None if call.charge is None else call.charge.dialect)
