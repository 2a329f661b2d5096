"""
End of call: what happened, what the route's policy makes of it, and what is charged.

The whole table of DESIGN "End of call" as one table. Does not know how an end was noticed, nor prices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from asgi_metering.errors import ConfigurationError
from asgi_metering.receipts import Basis

__all__ = [
    "DEFAULT_END_POLICY",
    "DRAIN",
    "DRAINABLE",
    "END_OF_CALL",
    "SESSION_DEFAULTS",
    "Cause",
    "Drain",
    "EndPolicy",
    "Sighting",
    "Situation",
    "situation",
]


class Cause(StrEnum):
    """Why a call ended. Of several, the first one seen wins."""

    COMPLETED = "completed"
    ERROR = "error"
    CLIENT_GONE = "client_gone"
    CUT = "cut"
    ABORTED = "aborted"


class Situation(StrEnum):
    """A row of the table."""

    # That of its text, as its equality is: an enum's own is a function of Python, and each end looks itself up.
    __hash__ = str.__hash__

    REPORTED = "completed, usage reported"
    UNREPORTED = "completed, usage missing"
    FAILED_EARLY = "answered >= 400, or error before the first byte"
    FAILED_LATE = "error after the first byte, or call.fail()"
    GONE_EARLY = "client gone before the first byte"
    GONE_LATE = "client gone after the first byte"
    CUT = "cut"
    ABORTED = "aborted, worker died"


END_OF_CALL: Mapping[Situation, tuple[Basis, ...]] = MappingProxyType(
    {
        Situation.REPORTED: (Basis.USAGE,),
        Situation.UNREPORTED: (Basis.ESTIMATE, Basis.OBSERVED, Basis.HOLD, Basis.NONE),
        Situation.FAILED_EARLY: (Basis.NONE, Basis.USAGE, Basis.OBSERVED, Basis.ESTIMATE, Basis.HOLD),
        Situation.FAILED_LATE: (Basis.NONE, Basis.OBSERVED, Basis.HOLD),
        Situation.GONE_EARLY: (Basis.OBSERVED, Basis.NONE, Basis.ESTIMATE, Basis.HOLD),
        Situation.GONE_LATE: (Basis.OBSERVED, Basis.NONE, Basis.USAGE, Basis.ESTIMATE, Basis.HOLD),
        Situation.CUT: (Basis.OBSERVED, Basis.HOLD),
        Situation.ABORTED: (Basis.OBSERVED, Basis.NONE, Basis.HOLD),
    }
)
"""For each situation the bases that a route may choose; the first is the default."""


SESSION_DEFAULTS: Mapping[Situation, Basis] = MappingProxyType({Situation.FAILED_LATE: Basis.OBSERVED})
"""
What differs for a session, such as a WebSocket: its client can make most handlers fail, by a message that they cannot
read, and would have everything that was done for it before for nothing.
"""


DRAINABLE = frozenset({Situation.GONE_EARLY, Situation.GONE_LATE})
"""Where the application may go on although its client has left."""

MAX_DRAIN_S = 3_600.0
"""An hour: whatever goes on for longer is no answer any more, and belongs into a `charge()` of its own."""

DRAIN = "drain"
"""How the choice is written."""


@dataclass(frozen=True, slots=True)
class Drain:
    """
    Let the handler finish although its client has left, and charge what it used, as if it had been there.

    Beyond the bounds, or where the server cancels the handler, the call is charged what was observed of it by then.

    Args:
        within_s: Seconds from the disconnect on, up to an hour.
        most_bytes: Of the body that nobody gets.

    Raises:
        ConfigurationError: A bound that is no positive number, or no bound.
    """

    within_s: float = 60.0
    most_bytes: int = 16_777_216

    def __post_init__(self) -> None:
        if not isinstance(self.within_s, int | float) or isinstance(self.within_s, bool):
            raise ConfigurationError(f"within_s={self.within_s!r} is no number. Write seconds, up to {MAX_DRAIN_S}.")
        if not 0 < self.within_s <= MAX_DRAIN_S:
            raise ConfigurationError(f"within_s={self.within_s!r} is not above 0 and up to {MAX_DRAIN_S} seconds.")
        if type(self.most_bytes) is not int or self.most_bytes < 1:
            raise ConfigurationError(f"most_bytes={self.most_bytes!r} is no int from 1 up. Write bytes.")


@dataclass(frozen=True, slots=True)
class EndPolicy:
    """
    What one route charges in each situation: a basis per row of `END_OF_CALL`.

    Attributes:
        chosen: By row; the row's default elsewhere.
        drains: Where the handler may finish, and how far it may go for that; its end is a row of its own then.

    Raises:
        ConfigurationError: A basis that its row does not offer, or a row that nothing can be drained in.
    """

    chosen: Mapping[Situation, Basis]
    drains: Mapping[Situation, Drain] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.drains:
            if row not in DRAINABLE:
                raise ConfigurationError(f"Nothing can be drained of a call that ends as {row.value!r}.")
        for row, basis in self.chosen.items():
            if basis not in END_OF_CALL[row]:
                offered = ", ".join(repr(str(choice)) for choice in END_OF_CALL[row])
                raise ConfigurationError(
                    f"{str(basis)!r} is no policy for a call that ends as {row.value!r}. Choose one of {offered}."
                )

    def basis(self, row: Situation) -> Basis:
        """The basis for *row*: the chosen one, else the row's default."""
        return self.chosen.get(row, END_OF_CALL[row][0])

    def session_basis(self, row: Situation) -> Basis:
        """The same for a session, whose defaults differ."""
        return self.chosen.get(row) or SESSION_DEFAULTS.get(row) or self.basis(row)


DEFAULT_END_POLICY = EndPolicy(MappingProxyType({}))
"""Every row at its default."""


# Read once: on Python 3.11 to look up the member of an enum costs as much as a small function.
_COMPLETED, _REPORTED = Cause.COMPLETED, Situation.REPORTED


class Sighting(NamedTuple):
    """
    What is known when a call has ended.

    Attributes:
        cause: The first cause seen.
        status: The response's status; None when none was sent.
        first_byte: Whether a byte of the body went out.
        failed: Whether the application called ``call.fail()``.
        reported: Whether usage was reported; a report of zero is one. Fixed prices always count as reported.
    """

    cause: Cause
    status: int | None = None
    first_byte: bool = False
    failed: bool = False
    reported: bool = False


def situation(seen: Sighting) -> Situation:
    """The row of the table that *seen* falls into."""
    cause, status, first_byte, failed, reported = seen
    if cause is not _COMPLETED and cause is not Cause.ERROR:
        if cause is Cause.CLIENT_GONE:
            return Situation.GONE_LATE if first_byte else Situation.GONE_EARLY
        return Situation.CUT if cause is Cause.CUT else Situation.ABORTED
    if status is not None and status >= 400:
        return Situation.FAILED_EARLY
    if failed:
        return Situation.FAILED_LATE
    if cause is not _COMPLETED:
        return Situation.FAILED_LATE if first_byte else Situation.FAILED_EARLY
    return _REPORTED if reported else Situation.UNREPORTED
