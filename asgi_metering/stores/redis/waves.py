"""
Waves: which operations of one batch may run at the same time, on a Cluster, and which have to wait for others.

Operations of one partition stay in order. Those of several partitions run beside them, and wait where they share a
call, or the partition of who pays. Does not know how anything is run.
"""

from __future__ import annotations

from collections.abc import Sequence

from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Claim,
    End,
    Grow,
    Operation,
    Preview,
    Renew,
    Sweep,
    Undo,
)

__all__ = ["Wave", "asked_by_id"]

_FOR_ALL = frozenset((Claim, Acknowledge, Sweep))
"""They concern all partitions."""


def _call_of(operation: Operation) -> str | None:
    """The call that an operation is about; postings have ids of their own."""
    match operation:
        case Admit() | End() | Renew() | Grow():
            return operation.id
        case Preview(ask) | Undo(ask):
            return ask.id
        case _:
            return None


def asked_by_id(operations: Sequence[Operation]) -> list[str]:
    """The calls that operations name by nothing but their ids, unless they begin here."""
    begun: set[str] = set()
    asked = []
    for operation in operations:
        if type(operation) is Admit:
            begun.add(operation.id)
        elif isinstance(operation, End | Renew | Grow | Undo):
            call = _call_of(operation)
            if call is not None and call not in begun:
                asked.append(call)
    return asked


class Wave:
    """
    Operations that run at the same time: those of one partition in order, those of several beside them.

    Attributes:
        single: By partition, what it runs alone; each with its place in the batch.
        several: The others.
    """

    def __init__(self) -> None:
        self.single: dict[int, list[tuple[int, Operation]]] = {}
        self.several: list[tuple[int, Operation]] = []
        self._calls: dict[str, int | None] = {}
        self._homes: set[int] = set()
        self._is_full = False

    def takes(self, operation: Operation, single: int | None, homes: set[int]) -> bool:
        """Whether *operation* may run beside those that are here: its order to them does not matter, or is kept."""
        if self._is_full:
            return False
        if single is None and type(operation) in _FOR_ALL:
            return not (self.single or self.several)
        call = _call_of(operation)
        if call is not None and call in self._calls and (single is None or self._calls[call] != single):
            return False
        return not homes & self.single.keys() if single is None else single not in self._homes

    def add(self, at: int, operation: Operation, single: int | None, homes: set[int]) -> None:
        """Add the operation at the place *at*."""
        if single is None:
            self.several.append((at, operation))
            self._homes |= homes
        else:
            self.single.setdefault(single, []).append((at, operation))
        call = _call_of(operation)
        if call is not None:
            self._calls[call] = single
        self._is_full = single is None and type(operation) in _FOR_ALL
