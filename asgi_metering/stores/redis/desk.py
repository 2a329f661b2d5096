"""
The desk: what the operations of one batch ask of the partitions of a Cluster, put together.

Each operation takes its own steps; what several of them ask of one partition at the same time goes there together, in
the order of the operations. Does not know what is asked, nor why.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias, cast

from asgi_metering.errors import StoreUnavailableError
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation
from asgi_metering.stores.redis.parts import Part
from asgi_metering.stores.redis.shelf import Shelf

__all__ = ["Desk"]

_Asked: TypeAlias = "tuple[int, Operation | Part, asyncio.Future[Answer]]"


class Desk:
    """
    One batch's way to the partitions.

    Args:
        shelves: All of them.
    """

    def __init__(self, shelves: Sequence[Shelf]) -> None:
        self._shelves = shelves
        self._loop = asyncio.get_running_loop()
        self._asked: dict[int, list[_Asked]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, turn: int, place: int, operation: Operation | Part) -> asyncio.Future[Answer]:
        """
        Run *operation* in the partition *place*; *turn* is the place in the batch of the operation that wants it.

        The future has the answer, or the mistake.
        """
        answered: asyncio.Future[Answer] = self._loop.create_future()
        if not self._asked:
            # Whatever is able to take its next step takes it first.
            self._loop.call_soon(self._loop.call_soon, self._send)
        self._asked.setdefault(place, []).append((turn, operation, answered))
        return answered

    def _send(self) -> None:
        asked, self._asked = self._asked, {}
        for place, some in asked.items():
            task = self._loop.create_task(self._run(self._shelves[place], sorted(some, key=_turn)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, shelf: Shelf, some: Sequence[_Asked]) -> None:
        try:
            answers = await shelf.run([cast("Operation", operation) for _, operation, _ in some])
        except StoreUnavailableError as failure:
            answers = [StoreUnavailableError(str(failure)) for _ in some]
        except BaseException as failure:
            for _, _, answered in some:
                answered.cancel() if isinstance(failure, asyncio.CancelledError) else _tell(answered, failure)
            raise
        for (_, _, answered), answer in zip(some, answers, strict=True):
            _tell(answered, answer)


def _turn(asked: _Asked) -> int:
    return asked[0]


def _tell(answered: asyncio.Future[Answer], answer: Answer | BaseException) -> None:
    if answered.done():
        return
    if isinstance(answer, BaseException):
        answered.set_exception(answer)
    else:
        answered.set_result(answer)
