"""
Calls over several partitions of a Cluster: what is promised of them, and that no more is given up than that.

Never is anything admitted beyond what there is, whoever races and whatever dies; others may be refused while a call is
being decided; each slot costs its trips; a process that dies leaves nothing that does not go away by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import accumulate, count
from typing import Any

import pytest

from asgi_metering.decisions import Decision, Reason
from asgi_metering.errors import ConfigurationError, StoreContendedError, StoreUnavailableError
from asgi_metering.receipts import Basis, EndedBy, GrantReceipt
from asgi_metering.rules.operations import (
    Admit,
    End,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    Operation,
    PostGrant,
    Preview,
    Renew,
    Sweep,
    Undo,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.roots import rooted
from asgi_metering.rules.state import State
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.redis import ClusterPlace, ClusterStore
from asgi_metering.stores.redis.desk import Desk
from asgi_metering.stores.redis.parts import RESERVED_S, Part
from asgi_metering.testing.clock import FakeClock
from tests.harness.servers import HOST
from tests.harness.valkey import ValkeyServer
from tests.stores.proofs import assert_conserved
from tests.stores.redis.racing import SLOTS, Span, race
from tests.stores.redis.test_partitions import SEEDS

_numbers = count()

PARTITIONS = 5


class Books:
    """A namespace of its own on the nodes: stores on it, and names that are in other partitions than the payer."""

    def __init__(self, nodes: list[ValkeyServer], **more: Any) -> None:
        self.clock = FakeClock()
        self._place = ClusterPlace([(HOST, nodes[0].port)], {}, 5.0)
        self._namespace = f"dance{next(_numbers)}"
        self._more = more
        self._stores: list[ClusterStore] = []
        self.store = self.fellow()
        of = self.store.partitions.of
        names = [f"x{number}" for number in range(100)]
        by_place = {of(name): name for name in reversed(names)}
        own, *others = [by_place[place] for place in range(PARTITIONS)]
        self.payer, (self.address, self.pool, self.owner, self.other) = own, others

    def fellow(self) -> ClusterStore:
        """Another process's store."""
        options = {"partitions": PARTITIONS, "clock": self.clock, **self._more}
        store = ClusterStore(self._place, namespace=self._namespace, **options)
        self._stores.append(store)
        return store

    async def close(self) -> None:
        """Close all stores."""
        for store in self._stores:
            await store.close()

    def limit(self, limit: int = 1, **more: Any) -> LimitAsk:
        """A limit on an address."""
        return LimitAsk("calls", self.address, WindowKind.FIXED, limit, 1_000.0, **more)

    def ask(self, call: str, **more: Any) -> Admit:
        """A call of 10 units that counts for an address and has a slot of a pool, each in a partition of its own."""
        asked = {"limits": (self.limit(),), "leases": (LeaseAsk("at once", self.pool, 1),), **more}
        return Admit(call, self.payer, "credits", 10, 10, asked.pop("sources", (WalletSource(),)), **asked)

    def theirs(self) -> tuple[WalletSource, ...]:
        """Somebody else's wallet in another partition first, then the payer's own."""
        return (WalletSource(payer=self.owner, group="theirs"), WalletSource(group="own"))

    async def one(self, operation: Operation) -> Any:
        """Run one operation, and raise what it raises."""
        (answer,) = await self.store.run([operation])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def state(self) -> State:
        """Everything, which is conserved."""
        state = (await self.store.read(EverythingKept())).state
        assert_conserved(state)
        return state

    async def grant(self, amount: int = 100, payer: str | None = None) -> None:
        """Give units."""
        await self.one(PostGrant(f"g{next(_numbers)}", payer or self.payer, "credits", amount))


def play(nodes: list[ValkeyServer], story: Callable[[Books], Awaitable[None]], **more: Any) -> None:
    """Tell *story* on books of its own."""

    async def told() -> None:
        books = Books(nodes, **more)
        try:
            await story(books)
        finally:
            await books.close()

    asyncio.run(told())


class DeathError(Exception):
    """The process is dead from now on: it asks nothing any more."""


def dies(store: ClusterStore, after: int, *, unheard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the process of *store* die after it has asked *after* times; *unheard*: with the last answer on its way."""
    asked = count(1)
    really = Desk.ask

    def ask(desk: Desk, turn: int, place: int, operation: Operation | Part) -> Any:
        number = next(asked)
        answered = really(desk, turn, place, operation) if number <= after else None
        return answered if answered is not None and (number < after or not unheard) else _dead(answered)

    async def _dead(answered: Awaitable[Any] | None) -> Any:
        if answered is not None:
            await answered
        raise DeathError

    monkeypatch.setattr(Desk, "ask", ask)


STEPS = 5
"""Questions of `Books.ask`: two reservations, the decision, and two parts that are kept."""


@pytest.mark.parametrize("unheard", [False, True])
@pytest.mark.parametrize("after", range(1, STEPS + 1))
def test_die_at_any_step(nodes: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch, after: int, unheard: bool) -> None:
    """What a dead process reserved is refused to others until it expires, and then everything is there again."""

    async def story(books: Books) -> None:
        await books.grant()
        with monkeypatch.context() as patch:
            dies(books.store, after, unheard=unheard, monkeypatch=patch)
            (answer,) = await books.store.run([books.ask("dead")])
        is_whole = after == STEPS and not unheard
        assert isinstance(answer, Decision if is_whole else DeathError)
        books.store = books.fellow()
        assert not (await books.one(books.ask("early"))).admitted
        await books.state()
        # The call's own life is longer than a reservation's: kept parts and holds go with it.
        books.clock.advance(60.0 + 30.0 + RESERVED_S)
        await books.one(Sweep())
        await books.one(Sweep())
        state = await books.state()
        assert (state.accounts[books.payer, "credits"].held, state.live, state.leases) == (0, {}, {})
        books.clock.advance(1_000.0)
        assert (await books.one(books.ask("late"))).admitted

    play(nodes, story)


@pytest.mark.parametrize("after", range(1, 3))
def test_reservation_expires_whole(nodes: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A reservation whose process died gives back slots and counts after seconds, long before the window ends."""

    async def story(books: Books) -> None:
        await books.grant()
        with monkeypatch.context() as patch:
            dies(books.store, after, unheard=True, monkeypatch=patch)
            await books.store.run([books.ask("dead")])
        books.store = books.fellow()
        refused = await books.one(books.ask("early"))
        assert refused.refusal.reason in (Reason.RATE_LIMIT, Reason.CONCURRENCY)
        books.clock.advance(RESERVED_S)
        await books.one(Sweep())
        assert (await books.state()).counters == {}
        assert (await books.one(books.ask("late"))).admitted

    play(nodes, story)


@pytest.mark.parametrize("dead", [False, True])
def test_window_of_others_goes_on(nodes: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch, dead: bool) -> None:
    """A window that counts nothing now ends when it would have, though a call that was refused, or died, counted."""

    async def story(books: Books) -> None:
        await books.grant(15)
        limit = books.limit(100, cost=5, meter="tokens")
        await books.one(books.ask("a", limits=(limit,), leases=()))
        began = (await books.state()).counters[books.address].start
        await books.one(End("a", 9, Basis.USAGE, actual={"tokens": 0}))
        books.clock.advance(50.0)
        ask = books.ask("b", limits=(limit,), leases=())
        if dead:
            with monkeypatch.context() as patch:
                dies(books.store, 1, unheard=True, monkeypatch=patch)
                await books.store.run([ask])
            books.clock.advance(RESERVED_S)
            await books.one(Sweep())
        else:
            assert (await books.one(ask)).refusal.reason is Reason.CREDITS
        counter = (await books.state()).counters[books.address]
        assert (counter.start, counter.used) == (began, 0)

    play(nodes, story)


@pytest.mark.parametrize("after", range(1, STEPS + 1))
def test_repeat_completes_what_was_begun(
    nodes: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Whoever repeats an admission whose answer was lost is admitted once: one slot, one count, one hold."""

    async def story(books: Books) -> None:
        await books.grant()
        with monkeypatch.context() as patch:
            dies(books.store, after, unheard=True, monkeypatch=patch)
            await books.store.run([books.ask("a")])
        books.store = books.fellow()
        assert (await books.one(books.ask("a"))).admitted
        state = await books.state()
        assert (state.accounts[books.payer, "credits"].held, state.counters[books.address].used) == (10, 1)
        assert list(state.leases[books.pool]) == ["a"]
        await books.one(End("a", 4, Basis.USAGE))
        state = await books.state()
        assert (state.accounts[books.payer, "credits"].settled, state.leases) == (4, {})

    play(nodes, story)


def test_repeat_finds_who_pays(nodes: list[ValkeyServer]) -> None:
    """A repeat is answered by the owner who pays the call, also where one who comes first could pay by now."""

    async def story(books: Books) -> None:
        await books.grant()
        ask = books.ask("a", sources=books.theirs())
        assert (await books.one(ask)).payer == books.payer
        await books.grant(100, books.owner)
        books.store = books.fellow()
        again = await books.one(ask)
        assert (again.payer, again.held) == (books.payer, 10)
        state = await books.state()
        assert [state.accounts[payer, "credits"].held for payer in (books.payer, books.owner)] == [10, 0]

    play(nodes, story)


def test_id_comes_again_with_another_payer(nodes: list[ValkeyServer]) -> None:
    """In another partition an id is another call; the end is that of the call that was admitted last here."""

    async def story(books: Books) -> None:
        await books.grant()
        await books.grant(100, books.owner)
        for payer in (books.payer, books.owner):
            ask = Admit("a", payer, "credits", 10, 10, (WalletSource(),))
            assert (await books.one(ask)).payer == payer
        assert (await books.one(End("a", 4, Basis.USAGE))).payer == books.owner
        books.clock.advance(100.0)
        await books.one(Sweep())
        state = await books.state()
        accounts = [state.accounts[payer, "credits"] for payer in (books.payer, books.owner)]
        assert [(account.settled, account.held) for account in accounts] == [(0, 0), (4, 0)]

    play(nodes, story)


@pytest.mark.parametrize("by", [EndedBy.CALL, EndedBy.PERSON])
def test_end_after_the_policy_did(nodes: list[ValkeyServer], by: EndedBy) -> None:
    """What was counted elsewhere is corrected by the call's own late end, and by nobody else's."""

    async def story(books: Books) -> None:
        await books.grant()
        once = IdempotencyAsk(rooted("key", books.owner), "print")
        ask = books.ask("a", limits=(books.limit(100, cost=40, meter="tokens"),), leases=(), idempotency=once)
        await books.one(ask)
        await books.one(Renew("a", 6))
        books.clock.advance(100.0)
        # An admission on its way ends what is overdue.
        await books.one(books.ask("b", limits=(), leases=()))
        for _ in range(2):
            receipt = await books.one(End("a", 5, Basis.USAGE, by=by, actual={"tokens": 3}, reply={"status": 200}))
            assert (receipt.ended_by, receipt.applied) == (EndedBy.POLICY, False)
        await books.one(Sweep())
        state = await books.state()
        assert state.counters[books.address].used == (3 if by is EndedBy.CALL else 40)
        again = await books.one(ask._replace(id="again"))
        assert (again.replay.amount, again.replay.late, again.replay.applied, again.reply) == (6, None, True, None)

    play(nodes, story)


@pytest.mark.parametrize("found", [False, True])
def test_charge_a_call_that_named_nobody(nodes: list[ValkeyServer], found: bool) -> None:
    """A call without sources has its hold where its slot is: what its payer owed there is refused, and not lost."""

    async def story(books: Books) -> None:
        await books.grant()
        for call, more in (("a", ()), ("b", (books.limit(9, cost=1, meter="tokens"),))):
            await books.one(books.ask(call, limits=more, sources=())._replace(amount=0, minimum=0))
            if found:
                books.store = books.fellow()
            with pytest.raises(ConfigurationError, match="named no sources when it was admitted"):
                await books.one(End(call, 4, Basis.USAGE))
            assert (await books.one(End(call, 0, Basis.USAGE))).applied
        state = await books.state()
        assert (state.leases, [account.settled for account in state.accounts.values()]) == ({}, [0])

    play(nodes, story)


def test_end_by_a_person(nodes: list[ValkeyServer]) -> None:
    """Who ends a call by hand frees what it has everywhere; the call's own end changes nothing of that."""

    async def story(books: Books) -> None:
        await books.grant()
        await books.one(books.ask("a", limits=(books.limit(100, cost=40, meter="tokens"),)))
        for by, used in ((EndedBy.PERSON, 7), (EndedBy.PERSON, 8), (EndedBy.CALL, 9)):
            receipt = await books.one(End("a", 5, Basis.USAGE, by=by, actual={"tokens": used}))
            assert (receipt.amount, receipt.ended_by) == (5, EndedBy.PERSON)
        state = await books.state()
        assert (state.counters[books.address].used, state.leases) == (7, {})

    play(nodes, story)


def test_take_longer_than_reservations_live(nodes: list[ValkeyServer], monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that was decided too late does not run: what others may have had meanwhile, it gives back everything."""

    async def story(books: Books) -> None:
        await books.grant()
        really = Desk.ask

        def ask(desk: Desk, turn: int, place: int, operation: Operation | Part) -> Any:
            if isinstance(operation, Admit) and operation.payer:
                books.clock.advance(RESERVED_S)
            return really(desk, turn, place, operation)

        with monkeypatch.context() as patch:
            patch.setattr(Desk, "ask", ask)
            with pytest.raises(StoreContendedError, match="took longer to admit"):
                await books.one(books.ask("a"))
        state = await books.state()
        assert (state.accounts[books.payer, "credits"].held, state.leases, state.counters) == (0, {}, {})
        assert (await books.one(books.ask("b"))).admitted

    play(nodes, story)


def asked(nodes: list[ValkeyServer]) -> int:
    """How often the nodes have run scripts of calls, or were asked on a new connection whether they can."""
    stats = b"".join(node.ask("INFO", "commandstats") for node in nodes).decode()
    lines = [line for line in stats.splitlines() if line.startswith(("cmdstat_fcall:", "cmdstat_evalsha:"))]
    return sum(int(line.partition("calls=")[2].partition(",")[0]) for line in lines)


def test_trips_by_slots(nodes: list[ValkeyServer]) -> None:
    """One trip for what is one payer's; for others one for each slot, one to decide, one for each to keep it."""

    async def story(books: Books) -> None:
        await books.grant()
        # All connections are there.
        await books.state()
        own = LimitAsk("own", rooted("route", books.payer), WindowKind.FIXED, 9, 60.0)
        asks = {
            "one payer's": (books.ask("a", limits=(own,), leases=()), 1),
            "one more": (books.ask("b", leases=()), 3),
            "two more": (books.ask("c", limits=(own, books.limit(9))), 5),
        }
        for what, (ask, trips) in asks.items():
            before = asked(nodes)
            assert (await books.one(ask)).admitted, what
            assert asked(nodes) - before == trips, what
        for call, trips in (("a", 1), ("b", 1), ("c", 2)):
            before = asked(nodes)
            await books.one(End(call, 1, Basis.USAGE))
            assert asked(nodes) - before == trips

    play(nodes, story)


def test_what_waits_together_goes_together(nodes: list[ValkeyServer]) -> None:
    """Sixty calls over three partitions are as many scripts as one."""

    async def story(books: Books) -> None:
        await books.grant(1_000)
        leases = (LeaseAsk("at once", books.pool, 100),)
        calls = [books.ask(f"c{number}", limits=(books.limit(100),), leases=leases) for number in range(60)]
        # All connections are there.
        await books.state()
        before = asked(nodes)
        assert all(decision.admitted for decision in await books.store.admit(calls))
        assert asked(nodes) - before == 5
        await books.store.end([End(call.id, 10, Basis.USAGE) for call in calls])
        state = await books.state()
        assert (state.accounts[books.payer, "credits"].settled, state.leases) == (600, {})

    play(nodes, story)


def test_somebody_else_pays_from_another_slot(nodes: list[ValkeyServer]) -> None:
    """The first owner who can pays the whole call, wherever; its idempotency key stays with the one who asked."""

    async def story(books: Books) -> None:
        await books.grant(10, books.owner)
        await books.grant(20)
        once = [IdempotencyAsk(f"key {call}", "print") for call in "abc"]
        asks = [books.ask(f"c{n}", sources=books.theirs(), limits=(), leases=(), idempotency=once[n]) for n in range(3)]
        decisions = [await books.one(ask) for ask in asks]
        assert [decision.payer for decision in decisions] == [books.owner, books.payer, books.payer]
        again = await books.one(asks[0]._replace(id="again"))
        assert again.refusal.reason is Reason.IN_FLIGHT
        dry = (await books.one(asks[0]._replace(id="dry", idempotency=None))).refusal
        assert (dry.reason, dry.transient) == (Reason.CREDITS, True)
        receipt = await books.one(End("c0", 7, Basis.USAGE, event={"outcome": "completed"}))
        assert (receipt.payer, receipt.amount) == (books.owner, 7)
        replay = (await books.one(asks[0]._replace(id="again"))).replay
        assert (replay.amount, replay.payer) == (7, books.owner)
        await books.one(End("c1", None, failed=True))
        assert (await books.one(asks[1]._replace(id="another"))).admitted
        state = await books.state()
        assert state.accounts[books.owner, "credits"].settled == 7
        assert [event.payload["payer"] for event in state.events.values()] == [books.owner]

    play(nodes, story)


@pytest.mark.parametrize("observed", [0, 6])
def test_key_learns_what_became_of_a_dead_call(nodes: list[ValkeyServer], observed: int) -> None:
    """While a call is in doubt its key is taken; then it is free if nothing was charged, or else has the receipt."""

    async def story(books: Books) -> None:
        await books.grant(100, books.owner)
        ask = books.ask("a", sources=books.theirs(), limits=(), leases=(), idempotency=IdempotencyAsk("key", "print"))
        await books.one(ask)
        await books.one(Renew("a", observed))
        books.clock.advance(70.0)
        await books.one(Sweep())
        assert (await books.one(ask._replace(id="b"))).refusal.reason is Reason.IN_FLIGHT
        books.clock.advance(30.0)
        books.store = books.fellow()
        await books.one(Sweep())
        decision = await books.one(ask._replace(id="b"))
        if observed:
            assert (decision.replay.amount, decision.replay.ended_by) == (6, EndedBy.POLICY)
        else:
            assert decision.admitted
        assert (await books.state()).accounts[books.owner, "credits"].settled == observed

    play(nodes, story)


def test_key_of_a_call_that_is_nowhere_is_free(nodes: list[ValkeyServer]) -> None:
    """A key whose call never came to be, because its process died before the decision, is free again."""

    async def story(books: Books) -> None:
        await books.grant(100, books.owner)
        ask = books.ask("a", sources=books.theirs(), limits=(), leases=(), idempotency=IdempotencyAsk("key", "print"))
        await books.one(ask)
        place = books.store.partitions.of(books.owner)
        # What a crash leaves after the hold was undone, and before its parts were.
        await books.store.shelves[place].run([Undo(ask._replace(idempotency=None), books.clock())])
        await books.store.shelves[place].run([Sweep(keep_holds_s=0.0)])
        books.clock.advance(100.0)
        books.store = books.fellow()
        await books.one(Sweep())
        assert (await books.one(ask._replace(id="b"))).admitted

    play(nodes, story)


def test_end_by_another_process(nodes: list[ValkeyServer]) -> None:
    """A process that did not admit a call finds it, and all that it took, by its id."""

    async def story(books: Books) -> None:
        await books.grant()
        tokens = books.limit(100, cost=40, meter="tokens")
        await books.one(books.ask("a", limits=(tokens,)))
        books.store = books.fellow()
        books.clock.advance(50.0)
        assert await books.one(Renew("a", 3))
        books.clock.advance(50.0)
        assert not (await books.one(books.ask("b", limits=()))).admitted
        receipt = await books.one(End("a", 5, Basis.USAGE, actual={"tokens": 12}))
        assert (receipt.amount, receipt.applied) == (5, True)
        state = await books.state()
        assert (state.counters[books.address].used, state.leases) == (12, {})
        assert not (await books.one(End("nobody", 5, Basis.USAGE))).known

    play(nodes, story)


def test_undo_takes_everything_back(nodes: list[ValkeyServer]) -> None:
    """An admission that nobody learned of leaves no trace in any partition, whether it left parts or only counts."""

    async def story(books: Books) -> None:
        await books.grant()
        asks = books.ask("a"), books.ask("b", leases=()), books.ask("c", sources=books.theirs(), leases=())
        for ask in asks:
            decision = await books.one(ask)
            assert decision.admitted
            assert await books.one(Undo(ask, decision.now))
            state = await books.state()
            assert (state.accounts[books.payer, "credits"].held, state.leases) == (0, {})
            assert [counter.used for counter in state.counters.values()] in ([], [0])

    play(nodes, story)


def test_refusals_tell_the_first_reason_of_all(nodes: list[ValkeyServer]) -> None:
    """Concurrency before rates before credits, whichever partition says so; a preview tells the same, takes nothing."""

    async def story(books: Books) -> None:
        full, spent = (LeaseAsk("at once", books.pool, 0),), (books.limit(0),)
        cases = (
            (books.ask("a", leases=full, limits=spent), Reason.CONCURRENCY),
            (books.ask("b", limits=(books.limit(5, cost=9),)), Reason.EXCEEDS_LIMIT),
            (
                books.ask("c", limits=(books.limit(5), books.limit(0)._replace(name="d", key="own"))),
                Reason.EXCEEDS_LIMIT,
            ),
            (books.ask("e"), Reason.CREDITS),
            (books.ask("f", sources=books.theirs()), Reason.CREDITS),
        )
        before = await books.state()
        for ask, reason in cases:
            decision, preview = await books.one(ask), await books.one(Preview(ask))
            assert (decision.refusal.reason, preview.refusal) == (reason, decision.refusal)
            assert [window.name for window in decision.windows] == [limit.name for limit in ask.limits]
        assert (await books.state()).counters == before.counters == {}
        await books.grant()
        assert (await books.one(Preview(books.ask("g")))).admitted

    play(nodes, story)


def test_key_of_several_owners_is_a_mistake(nodes: list[ValkeyServer]) -> None:
    """A charge key has one place: with owners in several partitions it would be charged in each."""

    async def story(books: Books) -> None:
        ask = books.ask("a", sources=books.theirs(), charge_key=KeyAsk("session", window_s=60.0))
        with pytest.raises(ConfigurationError, match="in other partitions of the Cluster than the key"):
            await books.one(ask)
        # What costs nothing is charged in none.
        assert (await books.one(ask._replace(amount=0, minimum=0, sources=()))).admitted

    play(nodes, story)


def test_another_number_of_partitions(nodes: list[ValkeyServer]) -> None:
    """A namespace keeps the number of partitions that it began with."""

    async def story(books: Books) -> None:
        await books.grant()
        books._more["partitions"] = 7
        with pytest.raises(ConfigurationError, match="has 5 partitions, and was opened with 7"):
            await books.fellow().open()

    play(nodes, story)


def test_one_node_is_down(nodes: list[ValkeyServer]) -> None:
    """Operations whose node gives no answer are told so; those of other nodes are answered."""

    async def story(books: Books) -> None:
        names = [f"p{number}" for number in range(30)]
        await books.store.post([PostGrant(f"g {name}", name, "credits", 1) for name in names])
        nodes[1].freeze()
        try:
            answers = await books.store.run([PostGrant(f"h {name}", name, "credits", 1) for name in names])
        finally:
            nodes[1].thaw()
        assert {type(answer) for answer in answers} == {StoreUnavailableError, GrantReceipt}
        again = await books.store.post([PostGrant(f"h {name}", name, "credits", 1) for name in names])
        assert len(again) == 30
        assert {account.granted for account in (await books.state()).accounts.values()} == {2}

    play(nodes, story, timeout_s=0.5)


def most_at_once(spans: list[Span]) -> int:
    """How many of *spans* there were at the same time."""
    edges = sorted([*((start, 1) for start, _ in spans), *((end, -1) for _, end in spans)])
    return max(accumulate((step for _, step in edges), initial=0))


@pytest.mark.parametrize(("limit", "wallet"), [(20, 12), (12, 20), (20, 30), (25, 20)][: len(SEEDS)])
def test_processes_race_over_slots(nodes: list[ValkeyServer], limit: int, wallet: int) -> None:
    """Processes that race for a limit, a pool and a wallet in three slots get never more than there is, and no less."""
    namespace = f"race{next(_numbers)}"
    url = f"redis+cluster://{HOST}:{nodes[0].port}?namespace={namespace}&partitions=8"
    store = ClusterStore(ClusterPlace([(HOST, nodes[0].port)], {}, 5.0), namespace=namespace, partitions=8)
    assert len({store.partitions.of(name) for name in ("payer", "everybody", "slots")}) == 3

    async def begin() -> None:
        await store.run([PostGrant("g", "payer", "credits", wallet)])
        await store.close()

    asyncio.run(begin())
    spans = race(url, 4, limit)
    assert len(spans) == min(limit, wallet)
    assert most_at_once(spans) <= SLOTS

    async def look() -> State:
        found = (await store.read(EverythingKept())).state
        await store.close()
        return found

    state = asyncio.run(look())
    assert_conserved(state)
    account = state.accounts["payer", "credits"]
    assert (account.settled, account.held) == (len(spans), 0)
    assert state.counters["everybody"].used == len(spans)
    assert (state.leases, state.live) == ({}, {})
