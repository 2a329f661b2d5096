"""
The dance: an admission whose parts are in several slots of a Cluster (DESIGN "Redis").

1. *Reserve.* Slots and counts of other partitions are taken there, partition by partition in the order of their
   numbers, as parts with a short life (see `parts`). Whoever asks meanwhile finds them taken: that is what may refuse
   capacity to others for a moment.
2. *Decide.* The partition of who pays decides all the rest in one step, and has the call's hold. Money is never in two
   partitions: one account pays a whole call. Payer objects in several partitions are asked in their order, each with
   everything else reserved.
3. *Keep, or take back.* Only when every part is known to be kept is the call admitted. A part that is not there any
   more, because all this took longer than its life, makes the call give back everything: nothing was decided.

So no call runs without all that it took, whatever dies when; what is counted may be too much, for `RESERVED_S`, and
never too little. Whoever dies in the middle leaves reservations, which expire, and perhaps a hold that nobody renews:
it goes in doubt, and ends as that of any call whose process died. A repeat with the same id finds what is there, and
completes it. Ends go to the hold and to all parts; each of them ends once, so that they are repeated until all have
answered.

Refused, the call is told the first reason in the order of the rules, over all partitions: they are asked once more for
that, without taking anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from asgi_metering.decisions import MONEY, Decision, Reason, Refusal
from asgi_metering.errors import ConfigurationError, StoreContendedError
from asgi_metering.rules.calendars import pick
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Admit, Preview, Undo
from asgi_metering.stores.redis.partitions import Plan, Run
from asgi_metering.stores.redis.parts import REQUESTS, Part, What, part_of, reservation, unmetered

__all__ = ["Ask", "Dance", "Place"]

Ask: TypeAlias = Callable[[int, Any], Awaitable[Answer]]
"""Runs one operation, or a `Part`, in one partition; a mistake is raised."""


class Place(NamedTuple):
    """
    Where a call is: its hold, and its parts.

    Attributes:
        home: Of its hold.
        parts: Of its parts.
        claim: Of the part that has its idempotency key.
        is_free: Nobody's account is at its home, so that nothing can be charged for it there.
    """

    home: int
    parts: tuple[int, ...] = ()
    claim: int | None = None
    is_free: bool = False


class Dance:
    """
    One admission over several partitions.

    Args:
        ask: What is asked.
        plan: Where.
        run: How a partition is asked, together with what others ask of it.
        look: How it is asked for what changes nothing.

    Raises:
        ConfigurationError: It is charged by key, which has one place, and others may pay than the one whose key it is.
    """

    def __init__(self, ask: Admit, plan: Plan, run: Ask, look: Ask) -> None:
        if plan.charged is not None and [plan.charged] != plan.homes:
            raise ConfigurationError(
                f"Call {ask.id!r} is charged by key, and its sources are in other partitions of the Cluster than the "
                f"key, which could be charged in each. Let the call's own payer pay for it, or use partitions=1."
            )
        self._ask = ask
        self._plan = plan
        self._run = run
        self._look = look

    # -- what each partition is asked ----------------------------------------------------------------------

    def part(self, place: int) -> Admit:
        """What is reserved at *place*."""
        ask, plan = self._ask, self._plan
        claim = ask.idempotency if place == plan.claim else None
        return reservation(ask, plan.limits.get(place, ()), plan.leases.get(place, ()), claim)

    def own(self, run: Run, *, is_reserved: bool = False) -> Admit:
        """What the home of *run* is asked; *is_reserved*: its limits are parts already."""
        ask, plan = self._ask, self._plan
        if is_reserved:
            return ask._replace(sources=run.sources, limits=(), leases=(), idempotency=None)
        return ask._replace(
            sources=run.sources,
            limits=plan.limits.get(run.home, ()),
            leases=plan.leases.get(run.home, ()),
            idempotency=ask.idempotency if run.home == plan.claim else None,
        )

    def beside(self, home: int) -> list[int]:
        """Where parts are, if the hold is at *home*."""
        return self._plan.foreign(home)

    # -- the steps -----------------------------------------------------------------------------------------

    async def admit(self) -> tuple[Decision, Place | None]:
        """
        Decide. Returns where the call is, if it is admitted.

        Raises:
            StoreContendedError: It took longer than reservations live; nothing was taken.
            MeteringError: It is a mistake; nothing was taken.
            StoreUnavailableError: No answer came: reservations expire.
        """
        reserved: dict[int, Decision] = {}
        try:
            for run in self._plan.runs:
                for other in self.beside(run.home):
                    if other not in reserved:
                        decision = _decision(await self._run(other, self.part(other)))
                        if not decision.admitted:
                            return await self._refused(decision, reserved), None
                        reserved[other] = decision
                own = self.own(run, is_reserved=run.home in reserved)
                decision = _decision(await self._run(run.home, own))
                if decision.admitted:
                    place = self._place(run.home, reserved)
                    await self._keep(own, decision, run.home, reserved)
                    return self._merged(decision, reserved.values()), place
                if not _is_dry(decision):
                    break
        except BaseException:
            # Also where no answer came: what cannot be taken back now expires.
            await asyncio.shield(self._take_back(reserved))
            raise
        return await self._refused(decision, reserved), None

    async def _refused(self, decision: Decision, reserved: dict[int, Decision]) -> Decision:
        await self._take_back(reserved)
        reserved.clear()
        told = await self.explained()
        # What refused may have gone meanwhile.
        return self._merged(decision, ()) if told.admitted else told

    def _place(self, home: int, reserved: Mapping[int, Decision]) -> Place:
        """Where the call is, without what was only counted: nothing of that ends."""
        plan = self._plan
        claim = plan.claim if plan.claim in reserved else None
        weighted = {at for at, some in plan.limits.items() if any(limit.meter != REQUESTS for limit in some)}
        return Place(home, tuple(at for at in reserved if at in plan.leases or at in weighted or at == claim), claim)

    async def _keep(self, own: Admit, decision: Decision, home: int, reserved: Iterable[int]) -> None:
        part = Part(part_of(own.id), What.KEEP, own.ttl_s, own.grace_s)
        kept = await asyncio.gather(*(self._run(at, part) for at in reserved))
        if not all(kept):
            await self._run(home, Undo(own, decision.now))
            raise StoreContendedError(
                f"Call {own.id!r} took longer to admit than its reservations live, and was given back. Try it again "
                f"with another id."
            )

    async def _take_back(self, reserved: Mapping[int, Decision]) -> None:
        part = Part(part_of(self._ask.id), What.TAKE_BACK)
        await asyncio.gather(*(self._run(place, part) for place in reserved), return_exceptions=True)

    # -- what is told --------------------------------------------------------------------------------------

    async def explained(self) -> Decision:
        """What the call would be told now, over all partitions; nothing is taken."""
        runs = self._plan.runs
        homes = {run.home for run in runs}
        asks = [(run.home, self.own(run)) for run in runs]
        asks += [(place, self.part(place)) for place in self.beside(runs[0].home) if place not in homes]
        told = [_decision(one) for one in await asyncio.gather(*(self._look(at, Preview(ask)) for at, ask in asks))]
        paying = next((at for at, decision in enumerate(told[: len(runs)]) if decision.admitted), len(runs))
        refused = [
            decision
            for at, decision in enumerate(told)
            # Nobody's sources are asked after who pays; limits are, wherever they are.
            if not decision.admitted and not _is_dry(decision) and (at < paying or self._rank(decision) < (5,))
        ]
        if refused:
            chosen = min(refused, key=self._rank)
        elif paying < len(runs):
            chosen = told[paying]
        else:
            chosen = _dry(told[: len(runs)])
        return self._merged(chosen, told if chosen.admitted else await self._untaken(asks, told))

    async def _untaken(self, asks: Sequence[tuple[int, Admit]], told: Sequence[Decision]) -> list[Decision]:
        """*told*, with the windows of limits as they are: of a call that is refused nothing is counted anywhere."""
        untold = [
            (at, _only_look(ask))
            for (at, ask), decision in zip(asks, told, strict=True)
            if ask.limits and (decision.admitted or not decision.windows)
        ]
        looks = await asyncio.gather(*(self._look(at, Preview(ask)) for at, ask in untold))
        return [*map(_decision, looks), *(one for one in told if not one.admitted)]

    def _rank(self, decision: Decision) -> tuple[float, ...]:
        """What is told first (DESIGN "Admission"): lower is earlier."""
        refusal, ask = decision.refusal, self._ask
        if refusal is None:
            return (0,) if decision.replay is not None else (1,) if self._is_stale(decision.now) else (5,)
        if refusal.reason in (Reason.IN_FLIGHT, Reason.FINGERPRINT):
            return (0,)
        if refusal.reason is Reason.CONCURRENCY:
            return (2, [(lease.name, lease.level) for lease in ask.leases].index((refusal.name, refusal.level or "")))
        if _is_dry(decision):
            return (5,)
        place = [limit.name for limit in ask.limits].index(refusal.name)
        if refusal.reason is Reason.EXCEEDS_LIMIT:
            return (3, place)
        return (4, -(refusal.retry_after_s or 0.0), place)

    def _is_stale(self, now: float) -> bool:
        """Whether a limit's calendar does not cover *now*; otherwise that of a source, which is looked at last."""
        return any(limit.boundaries and pick(limit.boundaries, now) is None for limit in self._ask.limits)

    def _merged(self, decision: Decision, others: Iterable[Decision]) -> Decision:
        """*decision*, with the windows of all, in the order of the limits."""
        if not decision.admitted and (decision.refusal is None or self._rank(decision) == (0,)):
            # Limits were not looked at, or are not told.
            return decision._replace(id=self._ask.id, windows=())
        windows = {window.name: window for other in (decision, *others) for window in other.windows}
        in_order = [windows[limit.name] for limit in self._ask.limits if limit.name in windows]
        told = tuple(window._replace(meter=unmetered(window.meter)) for window in in_order)
        return decision._replace(id=self._ask.id, windows=told)


def _only_look(ask: Admit) -> Admit:
    limits = tuple(limit._replace(cost=0) for limit in ask.limits)
    return ask._replace(amount=0, minimum=0, sources=(), limits=limits, leases=(), charge_key=None, idempotency=None)


def _decision(answer: Answer) -> Decision:
    if not isinstance(answer, Decision):
        raise AssertionError(f"an admission was answered with {answer!r}")
    return answer


def _is_dry(decision: Decision) -> bool:
    """Whether only the sources said no: others may pay."""
    refusal = decision.refusal
    return refusal is not None and refusal.reason in MONEY


def _dry(told: Sequence[Decision]) -> Decision:
    """What is told where nobody pays: as `rules.admission` puts it together from all sources."""
    refusals: list[Refusal] = [decision.refusal for decision in told if decision.refusal is not None]
    chosen = next((refusal for refusal in refusals if refusal.reason is Reason.CREDITS), refusals[-1])
    now = max(decision.now for decision in told)
    resets_at = min((refusal.resets_at for refusal in refusals if refusal.resets_at is not None), default=None)
    transient = any(refusal.transient for refusal in refusals)
    chosen = chosen._replace(transient=transient, resets_at=resets_at)
    if resets_at is not None and chosen.reason is not Reason.CREDITS:
        chosen = chosen._replace(retry_after_s=resets_at - now)
    return told[0]._replace(now=now, refusal=chosen)
