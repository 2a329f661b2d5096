"""
Holding: how much a call with a measured price sets aside, at first and while it runs, as users write it.

Values only. Knows neither a balance nor what a call has used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from asgi_metering.amounts import Amount, exact_amount
from asgi_metering.arguments import From
from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import TokenUsage

__all__ = ["HoldPolicy", "HoldSize", "Slices", "read_hold", "slices", "up_to"]


@dataclass(frozen=True, slots=True)
class Slices:
    """
    How a hold grows while its call runs.

    Attributes:
        step: By how much: whole units or a `TokenUsage`. None: by the first slice.
        low_water: Once no more than this of the hold is left, in the same words. None: half a step.
        debt: Whole units that the payer may owe for it.
        in_use: Whether any were ever made in this process: what prepares for a cut is left out before.
    """

    in_use: ClassVar[bool] = False

    step: Amount | TokenUsage | None = None
    low_water: Amount | TokenUsage | None = None
    debt: Amount = 0

    def __post_init__(self) -> None:
        Slices.in_use = True


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """
    How much a measured price holds.

    Attributes:
        estimate: Whole units, a `TokenUsage`, or `From` one; None estimates from the request's own body.
        at_least: With ``up_to``: admit from here on, holding what there is. None: all or nothing.
        slices: With ``slices``: how it grows from *estimate* on. None: it never does.
    """

    estimate: Any = None
    at_least: Amount | None = None
    slices: Slices | None = None

    @property
    def reads_request(self) -> bool:
        """Whether something of it, or of what a hang-up pays for its input, is estimated from the request itself."""
        estimate = self.estimate
        return not isinstance(estimate, TokenUsage) or (self.slices is not None and estimate.input is None)

    def callables(self) -> tuple[From, ...]:
        """The arguments that are computed."""
        return (self.estimate,) if isinstance(self.estimate, From) else ()


def up_to(estimate: Amount | TokenUsage | Callable[..., Any] | None = None, *, at_least: Amount) -> HoldPolicy:
    """
    Hold the smaller of *estimate* and what is available, and refuse only below *at_least*.

    Args:
        estimate: Whole units, a `TokenUsage`, or a callable of the endpoint's arguments that answers one; None
            estimates from the request's own body.
        at_least: Whole units without which the call is refused.

    Raises:
        AmountError: *at_least* is not a usable amount (a float, say).
        ConfigurationError: A callable takes parameters by position.
    """
    exact_amount(at_least, "least hold")
    return HoldPolicy(_computed(estimate, "hold estimate"), at_least)


def slices(
    first: Amount | TokenUsage | Callable[..., Any],
    *,
    step: Amount | TokenUsage | None = None,
    low_water: Amount | TokenUsage | None = None,
    debt: Amount = 0,
) -> HoldPolicy:
    """
    Hold little at first, and more while the call runs: ``hold=slices(TokenUsage(output=500))``.

    Args:
        first: What the call is admitted by: whole units, a `TokenUsage`, or a callable of the endpoint's arguments that
            answers one. The input of a `TokenUsage` that names none is estimated from the request's own body.
        step: By how much the hold grows each time: whole units, or a `TokenUsage`. *first* by default, without an
            input that was estimated.
        low_water: It grows once no more than this of it is left, in the same words; half a step by default.
        debt: Whole units that the payer may owe once nothing is left, so that a call that runs may come to its end.
            The bound is of the payer's wallet, not of the call: several calls owe no more together. 0, the default,
            is no debt beyond the ``overdraft`` of the wallet itself.

    What was used so far is counted off the byte path, a few times a second and when usage is recorded; the store is
    asked for more at the low-water mark, once at a time, and from the payer object that admitted the call. When it has
    nothing more the call runs on as long as its hold lasts. Then it is cut: the application's next ``send`` raises
    `CallCut`, and so does `Call.record`; a handler that is silent for a second is cancelled, one in a thread as soon as
    the thread is done. The client gets the error of its protocol inside the stream, or a 402 if nothing was sent yet; a
    body that has no place for it, as a compressed one, ends by a broken connection. An answer that is whole by then is
    sent. What was observed is charged (``on_cut``), also where it is more than was held. Outside HTTP nothing but
    `Call.record` stops the work.

    A store that gives no answer cuts nobody: the call runs on, and is charged in full at its end. So does a call that
    was let in without the store (``on_store_down="queue"``): what it would hold grows all the same, and it is not cut.

    Raises:
        AmountError: An amount that is not usable (a float, say).
        ConfigurationError: A slice of nothing, a mark that a slice does not reach, or a callable that takes parameters
            by position.

    Source: DESIGN 4 "A hold's size".
    """
    if first is None:
        raise ConfigurationError("slices(None) says nothing of the first slice. Write slices('0.01'), say.")
    if not callable(first) and not isinstance(first, TokenUsage):
        exact_amount(first, "first slice")
    for size, what in ((step, "step"), (low_water, "low-water mark"), (debt, "debt")):
        if size is not None and not isinstance(size, TokenUsage):
            exact_amount(size, what)
    return HoldPolicy(_computed(first, "hold estimate"), slices=Slices(step, low_water, debt))


HoldSize: TypeAlias = Amount | TokenUsage | HoldPolicy | Callable[..., Any]
"""What a user may write as a hold."""


def _computed(value: Any, what: str) -> Any:
    return From(value, what) if callable(value) else value


def read_hold(hold: Any) -> HoldPolicy:
    """Read what a user wrote as ``hold=``; raises as `up_to`."""
    if isinstance(hold, HoldPolicy):
        return hold
    if hold is not None and not callable(hold) and not isinstance(hold, TokenUsage):
        exact_amount(hold, "hold")
    return HoldPolicy(_computed(hold, "hold estimate"))
