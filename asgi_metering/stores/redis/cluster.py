"""
The Redis store on a Cluster: one namespace over all nodes.

Each of its partitions is a `RedisStore` of its own, on one slot. What belongs to one partition goes there, and is as
exact as on one server; admissions over several are a `dance`, and the ends of their calls go to all of them. Knows
which partition is asked what; see `partitions` for what is where. Decides nothing.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from operator import itemgetter
from typing import Any, cast

from asgi_metering.errors import ConfigurationError, StoreUnavailableError
from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import (
    Acknowledge,
    Admit,
    Claim,
    Declare,
    Emit,
    End,
    Grow,
    Operation,
    Preview,
    Renew,
    Share,
    Sweep,
    Undo,
)
from asgi_metering.rules.state import Event, Hold
from asgi_metering.stores.contract import (
    AccountRows,
    AccountsAfter,
    Books,
    EntriesAfter,
    Filling,
    HoldRow,
    LinesOf,
    Query,
    ReadingsKept,
    Snapshot,
    Store,
)
from asgi_metering.stores.redis.checks import check_server
from asgi_metering.stores.redis.dance import Ask, Dance, Place
from asgi_metering.stores.redis.desk import Desk
from asgi_metering.stores.redis.gathering import merged
from asgi_metering.stores.redis.names import Names
from asgi_metering.stores.redis.nodes import Nodes
from asgi_metering.stores.redis.partitions import PARTITIONS, Partitions
from asgi_metering.stores.redis.parts import Part, What, call_of, part_of
from asgi_metering.stores.redis.places import ClusterPlace
from asgi_metering.stores.redis.scripts import Scripts
from asgi_metering.stores.redis.shelf import Shelf
from asgi_metering.stores.redis.volumes import Library, opened_volumes, refilled_volumes
from asgi_metering.stores.redis.waves import Wave, asked_by_id

__all__ = ["ClusterStore"]

MAX_PARTITIONS = 1_024

MAX_CALLS = 65_536
"""Calls and events whose partition is remembered; where others are, all partitions are asked."""

COMMON = 0
"""The partition of what is nobody's: units, readings, events of free work, and how many partitions there are."""


class ClusterStore(Store):
    """
    Metering state on a Redis or Valkey Cluster.

    Args:
        place: Its nodes.
        namespace, timeout_s, clock: As of `RedisStore`.
        partitions: How many shards the namespace can use; fixed with its first use. 1 keeps all of it in one slot.

    Raises:
        ConfigurationError: The namespace is not usable in keys, or *partitions* is not 1 to 1024.

    What one payer's accounts, and the limits counted for it, decide together is exact, and one round trip. A call that
    also takes from another partition, an address, a pool for all, another owner's wallet, takes a trip for each of
    them, one to decide, and one to keep what it took; it is never admitted beyond any of them, but while it is being
    decided others may be refused what it gives back then. A receipt, a ledger and a sweep are of one partition each;
    what reads several of them is not of one instant.

    Four things are not as on other stores. A charge key has one place, that of the payer whose key it is: a call that
    others may pay for as well is refused as a `ConfigurationError`. And an id is known where its call is paid: one that
    comes again for a payer of another partition is another call, while other stores answer the first one's decision.
    Its end is that of the call that this process admitted last; the other one goes in doubt, as if its process had
    died. Within one partition, and for the same payers, a repeat is one everywhere. And a call that was admitted
    without sources, and has a slot or a count elsewhere than its payer's account, cannot be charged at its end: that is
    a `ConfigurationError` too. And a request that was given up, and repeated under its idempotency key, is charged
    beside its repeat if its own end comes late after all, before the repeat or behind it, and somebody else pays than
    the one whose key it is: the key is not where the hold is. With partitions=1 nothing of this is so.

    Where failover is asynchronous it can lose what was acknowledged
    last. While a slot moves to another node, its calls wait, and are told that the store is unavailable when that takes
    longer than about a second.
    """

    name = "redis"

    def __init__(
        self,
        place: ClusterPlace,
        *,
        namespace: str = "metering",
        partitions: int = PARTITIONS,
        timeout_s: float = 5.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if not 1 <= partitions <= MAX_PARTITIONS:
            raise ConfigurationError(
                f"A namespace of {partitions!r} partitions cannot be kept. Give partitions=1 to {MAX_PARTITIONS}."
            )
        Names(namespace)
        self.place = place
        self._timeout_s = timeout_s
        self._clock = clock
        self.namespace = namespace
        self._scripts = Scripts()
        self.partitions = Partitions(partitions)
        self.one_place = partitions == 1
        any_node = place.node(place.seeds[0])
        self.shelves = [Shelf(self._nodes, any_node, f"{namespace}:{n}", clock) for n in range(partitions)]
        self._own_nodes: dict[asyncio.AbstractEventLoop, Nodes] = {}
        self._calls: OrderedDict[str, Place] = OrderedDict()
        self._events: OrderedDict[str, int] = OrderedDict()
        self._is_known = False
        self._next_claim = 0

    # -- life ----------------------------------------------------------------------------------------------

    def _nodes(self) -> Nodes:
        loop = asyncio.get_running_loop()
        nodes = self._own_nodes.get(loop)
        if nodes is None:
            for other in [other for other in self._own_nodes if other.is_closed()]:
                del self._own_nodes[other]
            nodes = self._own_nodes[loop] = Nodes(self.place, self._scripts, self._timeout_s)
        return nodes

    async def open(self) -> None:
        """
        See `Store.open`. Connects to every node and looks at its settings.

        Raises:
            MissingExtraError: redis-py is not installed.
            ConfigurationError: A node refuses our credentials or scripts, is too old, or may evict money; or the
                namespace has another number of partitions.
            StoreUnavailableError: One cannot be reached.
        """
        for link in await self._nodes().every():
            await check_server(link)
        await self._known()

    async def _known(self) -> None:
        """Note how many partitions the namespace has, or see that it is as many."""
        if self._is_known:
            return
        shelf = self.shelves[COMMON]
        # Beside its books, and none of them: they may be empty.
        key, count = f"{shelf.names.prefix[:-1]}.partitions", self.partitions.count
        _, found = await shelf.ask([("SET", key, str(count), "NX"), ("GET", key)])
        if int(found) != count:
            raise ConfigurationError(
                f"The namespace {self.namespace!r} has {int(found)} partitions, and was opened with {count}. "
                f"Write partitions={int(found)}, or move its books to a namespace with {count}."
            )
        self._is_known = True

    async def close(self) -> None:
        """See `Store.close`. Waits for what is on its way in this loop; other loops close their own soon."""
        own, self._own_nodes = self._own_nodes, {}
        for loop, nodes in own.items():
            if loop is asyncio.get_running_loop():
                await nodes.close()
            elif not loop.is_closed():
                asyncio.run_coroutine_threadsafe(nodes.close(), loop)

    # -- running -------------------------------------------------------------------------------------------

    async def run(self, operations: Sequence[Operation]) -> list[Answer | Exception]:
        """
        See `Store.run`. What belongs to one partition goes there together; all partitions are asked at once.

        In order where operations share a call or a partition; an operation whose node cannot be reached is answered
        with that, and its neighbours are not harmed.
        """
        await self._known()
        await self._find(asked_by_id(operations))
        answers: list[Answer | Exception] = [_UNANSWERED] * len(operations)
        wave = Wave()
        for at, operation in enumerate(operations):
            single, homes = self._where(operation)
            if not wave.takes(operation, single, homes):
                await self._run_wave(wave, answers)
                wave = Wave()
                # What ran may have told where a call is.
                single, homes = self._where(operation)
            if type(operation) is Admit and single is not None:
                # Known before it is answered, for what follows of the same call.
                self._note(operation.id, self._settled(Place(single), operation.payer))
            wave.add(at, operation, single, homes)
        await self._run_wave(wave, answers)
        return answers

    def _where(self, operation: Operation) -> tuple[int | None, set[int]]:
        """The partition that alone runs *operation*; or None, and those that are to be asked in order."""
        single = self._single(operation)
        return single, self._home(operation) if single is None else set()

    def _single(self, operation: Operation) -> int | None:
        """The partition that alone runs *operation*; None if several have to."""
        if self.partitions.count == 1:
            return COMMON
        match operation:
            case Admit():
                return self.partitions.single(operation)
            case Preview(ask):
                return self.partitions.single(ask)
            case Undo(ask, _):
                return self.partitions.single(ask)
            case End() | Renew():
                place = self._place_of(operation.id)
                is_owed = place.is_free and type(operation) is End and operation.amount
                return None if place.parts or is_owed else place.home
            case Grow():
                return self._place_of(operation.id).home
            case Declare() | Emit() | Share():
                return COMMON
            case Claim() | Acknowledge() | Sweep():
                return None
            case _:
                return self.partitions.of(operation.payer)

    def _home(self, operation: Operation) -> set[int]:
        match operation:
            case End() | Renew() | Grow():
                return {self._place_of(operation.id).home}
            case Admit() as ask:
                return {run.home for run in self.partitions.plan(ask).runs}
            case Preview(ask) | Undo(ask):
                return {run.home for run in self.partitions.plan(ask).runs}
            case _:
                return set()

    async def _run_wave(self, wave: Wave, answers: list[Answer | Exception]) -> None:
        if len(wave.single) == 1 and not wave.several:
            # Of one partition: nothing has to be put together.
            ((place, some),) = wave.single.items()
            found = await self._together(place, [operation for _, operation in some])
            for (at, _), answer in zip(some, found, strict=True):
                answers[at] = answer
        else:
            await self._spread(wave, answers)

    async def _together(self, place: int, some: Sequence[Operation]) -> Sequence[Answer | Exception]:
        try:
            return await self.shelves[place].run(some)
        except StoreUnavailableError as failure:
            return [failure] * len(some)

    async def _spread(self, wave: Wave, answers: list[Answer | Exception]) -> None:
        desk = Desk(self.shelves)
        work: dict[int, Awaitable[Answer]] = {}
        for place, some in wave.single.items():
            for at, operation in some:
                work[at] = desk.ask(at, place, operation)
        for at, operation in wave.several:
            work[at] = _ALONE[type(operation)](self, operation, partial(desk.ask, at))
        found = await asyncio.gather(*work.values(), return_exceptions=True)
        for at, answer in zip(work, found, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, Exception):
                raise answer
            answers[at] = answer

    async def _one(self, place: int, operation: Operation) -> Answer:
        """Run one operation that no others wait with."""
        (answer,) = await self._together(place, [operation])
        if isinstance(answer, Exception):
            raise answer
        return answer

    # -- where calls are -----------------------------------------------------------------------------------

    def _place_of(self, call: str) -> Place:
        return self._calls.get(call) or Place(self.partitions.of(call))

    def _settled(self, place: Place, payer: str) -> Place:
        """*place*, which knows whether the account of *payer*, who pays, is there."""
        return place._replace(is_free=self.partitions.of(payer) != place.home)

    def _note(self, call: str, place: Place) -> None:
        self._calls[call] = place
        if len(self._calls) > MAX_CALLS:
            self._calls.popitem(last=False)

    async def _find(self, calls: Iterable[str]) -> None:
        """Look for calls that are not remembered, in all partitions; one trip to each node."""
        unknown = [call for call in dict.fromkeys(calls) if call not in self._calls]
        if not unknown or self.partitions.count == 1:
            return
        found = await asyncio.gather(*(shelf.calls(unknown) for shelf in self.shelves))
        for call, has in zip(unknown, zip(*found, strict=True), strict=True):
            homes = {place: hold for place, (hold, _) in enumerate(has) if hold is not None}
            parts = {place: part for place, (_, part) in enumerate(has) if part is not None}
            claims = [place for place, part in parts.items() if part.idempotency_key]
            if homes or parts:
                home, hold = next(iter(homes.items()), (self.partitions.of(call), None))
                place = Place(home, tuple(parts), claims[0] if claims else None)
                self._note(call, place if hold is None else self._settled(place, hold.payer))

    # -- what several partitions run -----------------------------------------------------------------------

    def _dance(self, ask: Admit, run: Ask) -> Dance:
        return Dance(ask, self.partitions.plan(ask), run, self._one)

    async def _admit(self, ask: Admit, run: Ask) -> Answer:
        plan = self.partitions.plan(ask)
        _, *others = plan.homes
        if others:
            # A repeat: whoever pays its call already pays it, also where one who comes first could by now.
            found = await asyncio.gather(*(self.shelves[home].calls([ask.id]) for home in others))
            paying = [home for home, [(hold, _)] in zip(others, found, strict=True) if hold is not None]
            plan = plan.first_at(paying[0]) if paying else plan
        decision, place = await Dance(ask, plan, run, self._one).admit()
        if place is not None:
            # A call that asked nobody to pay has no payer; all others are where their payer is.
            self._note(ask.id, self._settled(place, decision.payer or ask.payer))
        return decision

    async def _preview(self, ask: Preview, run: Ask) -> Answer:
        return await self._dance(ask.ask, run).explained()

    async def _undo(self, ask: Undo, run: Ask) -> Answer:
        known = self._calls.pop(ask.ask.id, None)
        plan, dance = self.partitions.plan(ask.ask), self._dance(ask.ask, run)
        home = next((run for run in plan.runs if known is not None and run.home == known.home), plan.runs[0])
        parts = dance.beside(home.home)
        own = dance.own(home, is_reserved=known is not None and home.home in known.parts)
        undone = await run(home.home, Undo(own, ask.at))
        if undone:
            taken = await asyncio.gather(*(run(at, Part(part_of(ask.ask.id), What.UNDO)) for at in parts))
            # What was only counted has left no part: the time of the decision says where.
            counted = [at for at, was_there in zip(parts, taken, strict=True) if not was_there]
            await asyncio.gather(*(run(at, Undo(dance.part(at), ask.at)) for at in counted))
        return undone

    async def _renew(self, beat: Renew, run: Ask) -> Answer:
        place = self._place_of(beat.id)
        parts = [run(at, Renew(part_of(beat.id))) for at in place.parts]
        lives, *_ = await asyncio.gather(run(place.home, beat), *parts)
        return lives

    async def _end(self, ask: End, run: Ask) -> Answer:
        place = self._place_of(ask.id)
        if place.is_free and ask.amount:
            raise ConfigurationError(
                f"Call {ask.id!r} named no sources when it was admitted, and on a Cluster nothing can be charged for "
                f"it then. Name who pays, with the amount 0 if nothing is to be held."
            )
        part = Part(part_of(ask.id), What.END, actual=ask.actual)
        parts = [at for at in place.parts if at != place.claim]
        if ask.by is EndedBy.CALL:
            first, *_ = await asyncio.gather(run(place.home, ask), *(run(at, part) for at in parts))
        else:
            first = await run(place.home, ask)
            if isinstance(first, Receipt) and first.ended_by is not ask.by:
                # Somebody else was first: only the call's own end may still correct what was counted.
                return first
            await asyncio.gather(*(run(at, part) for at in parts))
        if place.claim is not None and isinstance(first, Receipt):
            told = ask if first.ended_by is ask.by else _of_another(ask, first)
            await self.shelves[place.claim].answer(told, first._replace(applied=True, late=None))
        return first

    # -- what all partitions run ---------------------------------------------------------------------------

    async def _claim(self, ask: Claim, _: Ask) -> Answer:
        """Partition by partition, of those that have some; each time another one is the first."""
        sizes = await asyncio.gather(*(shelf.pending() for shelf in self.shelves))
        waiting = [place for place, size in enumerate(sizes) if size]
        first = self._next_claim
        self._next_claim = (first + 1) % self.partitions.count
        claimed: list[tuple[float, int, Event]] = []
        for place in sorted(waiting, key=lambda place: (place - first) % self.partitions.count):
            if len(claimed) == ask.limit:
                break
            some = await self._one(place, Claim(ask.limit - len(claimed), ask.lease_s))
            for event in cast("tuple[Event, ...]", some):
                claimed.append((event.at, place, event))
                self._events[event.id] = place
        while len(self._events) > MAX_CALLS:
            self._events.popitem(last=False)
        # Of one instant in the order in which books have them.
        return tuple(event for *_, event in sorted(claimed, key=itemgetter(0, 1)))

    async def _acknowledge(self, ask: Acknowledge, run: Ask) -> Answer:
        by_place: dict[int, list[str]] = {}
        for event in ask.ids:
            known = self._events.get(event)
            for place in range(self.partitions.count) if known is None else (known,):
                by_place.setdefault(place, []).append(event)
        counts = await asyncio.gather(*(run(place, Acknowledge(tuple(ids))) for place, ids in by_place.items()))
        for event in ask.ids:
            self._events.pop(event, None)
        return sum(cast("list[int]", counts))

    async def _sweep(self, ask: Sweep, _: Ask) -> Answer:
        """Each partition that may have something, in turn; what its calls did is told to parts that wait for it."""
        touched = 0
        due = await asyncio.gather(*(shelf.is_due(ask) for shelf in self.shelves))
        places = [place for place, is_due in enumerate(due) if is_due]
        for place in places:
            touched += cast("int", await self._one(place, ask))
        for place in places:
            touched += await self._answer_waiting(place)
        return touched

    async def _answer_waiting(self, place: int) -> int:
        """A part that has the idempotency key of a call whose process died learns what became of the call."""
        shelf, done = self.shelves[place], 0
        for part in await shelf.waiting_parts():
            call = call_of(part.id)
            self._calls.pop(call, None)
            await self._find([call])
            home = await self.shelves[self._place_of(call).home].read(HoldRow(call))
            hold = home.state.holds.get(call)
            receipt = _nothing(part, home.now) if hold is None else hold.receipt
            if receipt is not None:
                await shelf.answer(End(call, None, by=EndedBy.POLICY, failed=not receipt.amount), receipt)
                done += 1
        return done

    # -- reading -------------------------------------------------------------------------------------------

    async def read(self, query: Query) -> Snapshot:
        """See `Store.read`. What is in several partitions is not of one instant."""
        await self._known()
        if self.partitions.count == 1:
            return await self.shelves[0].read(query)
        if isinstance(query, HoldRow):
            await self._find([query.id])
            return await self.shelves[self._place_of(query.id).home].read(query)
        if isinstance(query, AccountRows | EntriesAfter | LinesOf):
            return await self.shelves[self.partitions.of(query.payer)].read(query)
        if isinstance(query, AccountsAfter):
            return await self._accounts(query)
        if isinstance(query, ReadingsKept):
            return await self.shelves[COMMON].read(query)
        found = await asyncio.gather(*(shelf.read(query) for shelf in self.shelves))
        return merged(query, found)

    @asynccontextmanager
    async def books(self) -> AsyncIterator[Books]:
        """
        See `RedisStore.books`. Of all partitions; looks at the names of all keys on all nodes.

        Memory: a page of each partition, and what calls in flight have in other partitions than who pays.
        """
        await self._known()
        async with opened_volumes(self._library()) as books:
            yield books

    @asynccontextmanager
    async def fill(self) -> AsyncIterator[Filling]:
        """See `RedisStore.fill`. Keeps other writers out of all partitions."""
        await self._known()
        async with refilled_volumes(self._library()) as filling:
            yield filling

    def _library(self) -> Library:
        return Library(self.namespace, self.partitions, self.shelves, self._nodes())

    async def _accounts(self, query: AccountsAfter) -> Snapshot:
        """Names first: of each partition's next accounts most are not among the next of all."""
        names = await asyncio.gather(*(shelf.accounts_after(query) for shelf in self.shelves))
        first = sorted((name, place) for place, some in enumerate(names) for name in some)[: query.limit]
        by_place: dict[int, list[bytes]] = {}
        for name, place in first:
            by_place.setdefault(place, []).append(name)
        found = await asyncio.gather(*(self.shelves[place].accounts(some) for place, some in by_place.items()))
        return merged(query, found or [await self.shelves[COMMON].accounts([])])


_UNANSWERED = StoreUnavailableError("The operation was not run.")


def _of_another(ask: End, first: Receipt) -> End:
    """The end that won: what the call brought with its own is nobody's answer."""
    return End(ask.id, None, by=first.ended_by, failed=not first.amount, actual=ask.actual)


def _nothing(part: Hold, now: float) -> Receipt:
    """The receipt of a call whose hold is nowhere: nothing was ever charged for it."""
    return Receipt(call_of(part.id), "", "", 0, 0, Basis.NONE, False, EndedBy.POLICY, (), None, now, None)


_ALONE: Mapping[type, Callable[[ClusterStore, Any, Ask], Awaitable[Answer]]] = {
    Admit: ClusterStore._admit,
    Preview: ClusterStore._preview,
    Undo: ClusterStore._undo,
    Renew: ClusterStore._renew,
    End: ClusterStore._end,
    Claim: ClusterStore._claim,
    Acknowledge: ClusterStore._acknowledge,
    Sweep: ClusterStore._sweep,
}
