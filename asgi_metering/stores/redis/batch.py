"""
Batches: which operations go to the server together, and what its replies leave to be done.

Operations of calls share a script, in chunks; the others have one each. What a script could not run, and what it
stopped before, is tried again in order. Knows what replies mean for the batch; what they say is for `Calls`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, End, Operation, Renew
from asgi_metering.stores.redis.calls import Call, Calls
from asgi_metering.stores.redis.link import Command, Reply
from asgi_metering.stores.redis.parts import Part

__all__ = ["Batch", "lone_answer"]

MOST = 96
"""Calls in one script: enough that its beginning and its end cost nothing, few enough that nobody waits for long."""

_HALTED, _BUSY, _SPLIT = b"H", b"B", b"T"
"""A command was not run: one before it stopped; somebody else works alone; its calls have to go one by one."""

_RULES, _LATER = b"S", b"N"
"""A call was not run: the whole rules are needed; a script of its own is."""


_CALLED = (Admit, End, Renew, Part)


def lone_answer(calls: Calls, operation: Operation, reply: Reply) -> Answer | None:
    """What *reply* to a command for *operation* alone says about it; None if it has to be tried again in a batch."""
    if not isinstance(reply, list) or reply[0] in (_RULES, _LATER):
        return None
    return calls.answer(operation, reply[0])


class Batch:
    """
    Operations on their way.

    Args:
        calls: How they are packed.
        operations: In their order.

    Attributes:
        answers: By place, as they come in.
        alone: Place of the operation that the rules have to run before anything else goes on; None if none has to.
        is_busy: Somebody else works alone on the server.
    """

    def __init__(self, calls: Calls, operations: Sequence[Operation]) -> None:
        self._calls = calls
        self._operations = operations
        self._waiting: list[int] = list(range(len(operations)))
        self._sent: list[list[int]] = []
        self._singly = False
        self.answers: dict[int, Answer | Exception] = {}
        self.alone: int | None = None
        self.is_busy = False

    @property
    def waiting(self) -> list[int]:
        """Places of the operations that have no answer yet."""
        return self._waiting

    def commands(self, now: str, token: str) -> list[Command]:
        """
        The commands for what waits, up to an operation that no script runs; none if that is the first, `alone`.

        What cannot be packed is answered at once.

        Args:
            now: The time of tests; empty for the server's.
            token: What no other commands of this store on their way have.
        """
        # A few more than fit would else be a script of their own, which costs as much as several calls.
        chunks = self._chunks(1 if self._singly else _even(len(self._waiting)))
        if len(chunks) < 2:
            token = ""
        return [self._command(chunk, now, token) for chunk in chunks]

    def _chunks(self, size: int) -> list[Call | Operation]:
        """What is sent: up to *size* calls together, or one operation that has a script of its own."""
        chunks: list[Call | Operation] = []
        sent: list[list[int]] = []
        keys, told, places = _nothing()
        answered, calls, operations = len(self.answers), self._calls, self._operations
        known = calls.tell
        for place in self._waiting:
            operation = operations[place]
            if len(places) == size:
                keys, told, places = _nothing()
            try:
                tell = known.get(type(operation))
                if tell is not None and tell(operation, keys, told):
                    if not places:
                        chunks.append(Call(keys, told))
                        sent.append(places)
                    places.append(place)
                    continue
                if calls.command(operation, "", "") is None:
                    if not chunks:
                        self.alone = place
                    break
            except Exception as mistake:  # noqa: BLE001 -- the answer of one operation, and no neighbour's
                self.answers[place] = mistake
                continue
            chunks.append(operation)
            sent.append([place])
            keys, told, places = _nothing()
        self._sent = sent
        if len(self.answers) > answered:
            self._left()
        return chunks

    def _left(self) -> None:
        answers = self.answers
        if len(answers) == len(self._operations):
            self._waiting = []
        else:
            self._waiting = [place for place in self._waiting if place not in answers]

    def _command(self, chunk: Call | Operation, now: str, token: str) -> Command:
        if isinstance(chunk, Call):
            return self._calls.together(chunk, now, token)
        command = self._calls.command(chunk, now, token)
        if command is None:
            raise AssertionError(f"{chunk!r} has no script")
        return command

    def take(self, replies: Sequence[Reply], meaning: Callable[[Exception], Exception]) -> None:
        """
        Take in replies.

        Args:
            replies: To the last `commands`.
            meaning: Makes the answer of an operation out of an error reply.
        """
        self._singly = self.is_busy = False
        self.alone = None
        for places, reply in zip(self._sent, replies, strict=True):
            if isinstance(reply, Exception):
                self._take_error(places, meaning(reply))
            elif reply == _BUSY:
                self.is_busy = True
            elif reply == _SPLIT:
                self._singly = True
            elif reply != _HALTED:
                self._take_replies(places, reply)
        self._left()

    def settle(self, place: int, answer: Answer | Exception) -> None:
        """Take in the answer of the operation that was `alone`."""
        self.answers[place] = answer
        self.alone = None
        self._waiting.remove(place)

    def give_up(self, failure: Callable[[], Exception]) -> None:
        """Answer whatever waits with a *failure* of its own."""
        self.answers |= {place: failure() for place in self._waiting}
        self._waiting = []

    def _take_error(self, places: list[int], error: Exception) -> None:
        if len(places) > 1 and not isinstance(error, StoreUnavailableError):
            # One of them is the guilty one, and its neighbours shall not suffer.
            self._singly = True
            return
        for place in places:
            self.answers[place] = error

    def _take_replies(self, places: list[int], reply: Reply) -> None:
        operations, answers, answer = self._operations, self.answers, self._calls.answer
        if not isinstance(operations[places[0]], _CALLED):
            answers[places[0]] = answer(operations[places[0]], reply)
            return
        if reply[-1] in (_RULES, _LATER):
            # What follows it was not run.
            if reply[-1] == _RULES:
                self.alone = places[len(reply) - 1]
            reply = reply[:-1]
        for place, one in zip(places, reply, strict=False):
            answers[place] = answer(operations[place], one)


def _nothing() -> tuple[list[str], list[bytes], list[int]]:
    """Keys, words and places of a script that has no calls yet."""
    return [], [], []


def _even(number: int) -> int:
    """How many of *number* calls a script gets, so that all get as many."""
    return ceil(number / ceil(number / MOST)) if number else MOST
