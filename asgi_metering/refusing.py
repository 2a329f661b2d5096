"""
Refusing: what rises where a call may not run, or not run on.

Knows how a refusal and a cut are told, also to another process. Decides neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from asgi_metering.decisions import MONEY, Decision, Refusal

if TYPE_CHECKING:
    from asgi_metering.amounts import Unit
    from asgi_metering.call import Call

__all__ = ["CallCut", "CallFacts", "CallRefused"]


class CallFacts(NamedTuple):
    """What another process learns of a call, where its refusal or its cut has been sent there (pickled)."""

    id: str
    line: str
    payer: str | None
    unit: Unit
    held: int

    @classmethod
    def of(cls, call: Call) -> CallFacts:
        """Those of *call*."""
        return cls(call.id, call.line, call.payer, call.unit, call.held)


class CallRefused(Exception):  # noqa: N818 -- a refusal is an answer on its way to the edge, not an error
    """
    The call may not run. Carries the decision to the edge, which answers it; nothing was consumed.

    A plain `Exception`, so that every framework unwinds its dependencies on the way (pitfalls 13, 14). Its message
    says what the payer's own balance or allowance lacks, in whole units: a job's log has nothing else to tell by.

    It can be pickled, as whoever runs jobs in other processes does; there `call` is a `CallFacts`.

    Attributes:
        call: Which.
        refusal: Why, and what was lacking, in smallest parts; ``refusal.reason`` is a `Reason`.
        decision: The store's whole answer, with the receipt of a replay (``decision.replay``); None where it was not
            asked.
    """

    def __init__(self, call: Call, refusal: Refusal, decision: Decision | None = None) -> None:
        # What it is made of is no part of its message, nor of its repr. Not by `super`: what a framework joins to it
        # has arguments of its own.
        self.args = ()
        self.call = call
        self.refusal = refusal
        self.decision = decision

    def __str__(self) -> str:
        # Written when somebody reads it: nearly all are answered, and fall into nobody's log.
        call, refusal = self.call, self.refusal
        return f"Call {call.id!r} was refused: {refusal.reason.value} ({refusal.name}).{_lack(call, refusal)}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> tuple[object, ...]:
        # What a framework has joined to it stays behind.
        return CallRefused, (CallFacts.of(self.call), self.refusal, self.decision)


class CallCut(OSError):  # noqa: N818 -- an end, not an error
    """
    The call is cut: what it may use is used up, and nothing more can be held for it (see `slices`). Let it rise.

    Raised from ``send``, and by `Call.record`. An `OSError`, as from a client that left: what frameworks end a stream
    for. What was observed is charged.

    Attributes:
        call: Which.
    """

    def __init__(self, call: Call) -> None:
        held = f"{call.unit.whole(call.held):f} {call.unit.name}"
        super().__init__(f"Call {call.id!r} was cut: it has used up the {held} that could be held for it.")
        self.call = call

    def __reduce__(self) -> tuple[object, ...]:
        return CallCut, (CallFacts.of(self.call),)


def _lack(call: Call, refusal: Refusal) -> str:
    """What the payer's own account lacked; of limits and pools nothing, for others count in them as well."""
    if refusal.reason not in MONEY:
        return ""
    required, available = call.unit.whole(refusal.required or 0), call.unit.whole(refusal.available or 0)
    return f" It needs {required:f} {call.unit.name} and {available:f} are available."
