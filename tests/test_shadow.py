"""Shadow mode: what limits, slots and prices would have done is told, and nothing of it is done (S4.16)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from asgi_metering import (
    Caller,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    billable,
    current_call,
    rate_limited,
    requires_upstream,
    slices,
    up_to,
)
from asgi_metering.decisions import Reason
from asgi_metering.errors import CallClosedError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.guards import Part
from asgi_metering.prices import per_token
from asgi_metering.rules.operations import Admit, End, Preview, Renew
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from asgi_metering.usage import UsageEvent
from tests.harness.drive import Drive, headers, status
from tests.outage.gated import CREDIT, Gated, call, identify, metered, settled, until, used
from tests.pitfalls.scene import Books
from tests.pitfalls.stage import within

pytestmark = pytest.mark.uncounted


class Told:
    """What a metering told: its events, and its tallies of the shadow."""

    def __init__(self) -> None:
        self.events: list[UsageEvent] = []
        self.sink = CallbackSink(self.events.extend)

    async def one(self) -> UsageEvent:
        """The event of the one call."""
        await within(10, lambda: bool(self.events))
        (event,) = self.events
        return event


def tallies(metering: Metering) -> dict[str, dict[str, int]]:
    """How many calls the shadow would have admitted, and refused, by reason; and of how many it is not known."""
    found = {}
    for name in ("admitted", "denied", "lost"):
        by: dict[str, int] = {}
        for attributes, count in metering.meters.totals(f"shadow_{name}").items():
            told = dict(attributes)
            key = str(told.get("metering.refusal.reason") or told.get("metering.cause") or "")
            by[key] = by.get(key, 0) + count
        found[name] = by
    return {name: by for name, by in found.items() if by}


def house(store: Any, sinks: tuple[Any, ...] = (), **options: Any) -> Metering:
    """A metering that knows who asks."""
    return Metering(store, identify=identify, sinks=sinks, **options)


async def idle(metering: Metering) -> None:
    """Wait until every end is booked, those of shadows too."""
    await within(10, lambda: not metering.runtime().in_flight and not metering.runtime().busy)


def fields(ended: Drive) -> dict[str, str]:
    """The header fields of an answer."""
    return dict(headers(ended.log))


def test_refuse_nothing_and_tell_by_reason_what_would_be() -> None:
    """S4.16: beside a live limit of 5 one of 2 lets everybody in, and counts that it would have refused the third."""

    async def play() -> None:
        seen: list[Any] = []

        async def work() -> None:
            seen.append(current_call().would_deny)

        async with house("memory://") as metering:
            app = metered(metering, rate_limited("5/minute"), rate_limited("2/minute", shadow=True), work=work)
            ended = [await call(app) for _ in range(6)]
            assert [status(each.log) for each in ended] == [200] * 5 + [429]
            assert [each and each.reason for each in seen] == [None, None, *[Reason.RATE_LIMIT] * 3]
            assert [each and each.name for each in seen][2:] == ["2-per-minute"] * 3
            assert tallies(metering) == {"admitted": {"": 2}, "denied": {"rate_limit": 3}}
            assert metering.meters.totals("refusals") == {
                (("metering.line", ""), ("metering.refusal.reason", "rate_limit")): 1
            }
            # Nothing of the shadow is told to the client.
            assert all("2-per-minute" not in str(fields(each)) for each in ended)

    asyncio.run(play())


def test_name_the_level_that_would_have_refused() -> None:
    """S0.42: of a hierarchy in the shadow it is told which level would have refused, as a live refusal says."""
    seen: list[Any] = []

    async def play() -> None:
        async def work() -> None:
            seen.append(current_call().would_deny)

        async with house("memory://") as metering:
            app = metered(metering, rate_limited(levels={"payer": "1/day", "caller": "9/day"}, shadow=True), work=work)
            for _ in range(2):
                assert status((await call(app)).log) == 200
            assert [each and each.level for each in seen] == [None, "payer"]

    asyncio.run(play())


def test_promote_by_taking_the_flag_away() -> None:
    """What the shadow counted counts on when it is live: of 3 a minute two were used, so that one is left."""

    async def play() -> None:
        async with house(MemoryStore(FakeClock())) as metering:
            shadow = metered(metering, rate_limited("3/minute", scope="api", shadow=True))
            live = metered(metering, rate_limited("3/minute", scope="api"))
            for _ in range(2):
                assert status((await call(shadow)).log) == 200
            assert [status((await call(live)).log) for _ in range(2)] == [200, 429]
            assert status((await call(shadow)).log) == 200
            # What it would have refused has taken nothing, as live.
            (counter,) = (await metering.store.read(EverythingKept())).state.counters.values()
            assert counter.used == 3

    asyncio.run(play())


def test_charge_nothing_and_tell_what_it_would_have_cost() -> None:
    """A gate in the shadow is free for who can pay and for who cannot, and the events say which was which."""

    async def play() -> None:
        told = Told()
        async with house("memory://", (told.sink,)) as metering:
            await metering.grant("ann", 3, id="g")
            app = metered(metering, billable(2, line="search", shadow=True))
            for who in ("ann", "ann", "bob"):
                ended = await call(app, who)
                assert status(ended.log) == 200
                assert "metering-available" not in fields(ended)
            await within(10, lambda: len(told.events) == 3)
            assert await settled(metering) == (0, 0)
            shown = [(event.payer, event.amount, event.basis, dict(event.attributes)) for event in told.events]
            rich = {"outcome": "admitted", "payer": "ann", "amount_parts": 2 * CREDIT, "basis": "usage"}
            poor = {**rich, "outcome": "denied", "payer": "bob", "reason": "insufficient_credits", "name": "credits"}
            assert shown == [
                (who, 0, "none", {f"metering.shadow.{name}": fact for name, fact in facts.items()})
                for who, facts in (("ann", rich), ("ann", rich), ("bob", poor))
            ]
            assert tallies(metering) == {"admitted": {"": 2}, "denied": {"insufficient_credits": 1}}

    asyncio.run(play())


@pytest.mark.parametrize(
    "hold", [TokenUsage(output=9), up_to(TokenUsage(output=9), at_least=1), slices(TokenUsage(output=9))]
)
def test_tell_the_real_cost_of_a_measured_call(hold: Any) -> None:
    """By a price per token the event says what the real usage would have cost, whatever would have been held for it."""

    async def play() -> None:
        told = Told()

        async def work() -> None:
            running = current_call()
            assert running.affordable("output") >= 1_000
            running.record(TokenUsage(input=3, output=5), model="m")
            running.attributes["tier"] = "gold"

        async with house("memory://", (told.sink,)) as metering:
            await metering.grant("ann", 100, id="g")
            app = metered(metering, billable(per_token(output=1), hold=hold, shadow=True), work=work)
            assert status((await call(app)).log) == 200
            event = await told.one()
            assert event.amount == 0
            assert event.usage == TokenUsage(input=3, output=5)
            assert event.attributes["metering.shadow.amount_parts"] == 5 * CREDIT
            assert event.attributes["tier"] == "gold"

    asyncio.run(play())


def test_put_everything_in_the_shadow_at_once() -> None:
    """`Metering(shadow=True)`: a stranger, a spent limit and an empty account are all let in, and told by reason."""

    async def play() -> None:
        async with house("memory://", shadow=True) as metering:
            paid = metered(metering, rate_limited("1/minute", global_concurrency=0, scope="a"), billable(2))
            free = metered(metering, rate_limited("1/minute", key="caller", scope="b"))
            for app in (paid, free, free):
                assert status((await call(app)).log) == 200
            assert tallies(metering) == {"denied": {"concurrency": 1, "rate_limit": 1}, "admitted": {"": 1}}
            async with metering.charge(payer="nobody", line="job", price=2) as work:
                assert work.would_deny is not None
                assert work.would_deny.reason is Reason.CREDITS
            assert await metering.holds() == []

    asyncio.run(play())


def test_let_a_stranger_in() -> None:
    """Who is nobody would have met a 401, and one whose identity is down a 503: both are told, and served."""

    def nobody(_: Any) -> Caller | None:
        return None

    def down(_: Any) -> Caller | None:
        raise OSError("the directory is down")

    async def play() -> None:
        for who, reason in ((nobody, "unauthenticated"), (down, "identity_unavailable")):
            async with Metering("memory://", identify=who, sinks=()) as metering:
                assert status((await call(metered(metering, billable(2, shadow=True)))).log) == 200
                assert tallies(metering) == {"denied": {reason: 1}}

    asyncio.run(play())


def test_take_nothing_where_the_payer_would_be_refused() -> None:
    """A refusal for the price consumes no limit of the shadow, as live: nothing of it is asked of the store."""

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            app = metered(metering, rate_limited("5/minute", concurrency=1, shadow=True), billable(2, shadow=True))
            await call(app, "poor")
            assert books.admissions == []
            assert [type(each) for each in books.asked if isinstance(each, Preview | Admit)] == [Preview]

    asyncio.run(play())


def test_end_what_the_shadow_has_taken_with_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots of the shadow are taken under an id of their own, renewed while the call runs, and free at its end."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)

    async def play() -> None:
        store = Gated()
        async with used(store, ttl_s=0.05) as metering:

            async def work() -> None:
                await within(10, lambda: len(store.seen(Renew)) >= 2)

            app = metered(metering, rate_limited("9000/minute of tokens", concurrency=1, shadow=True), work=work)
            assert status((await call(app)).log) == 200
            await idle(metering)
            (ask,) = store.seen(Admit)
            assert ask.id.endswith(".shadow")
            assert {each.id for each in (*store.seen(Renew), *store.seen(End))} == {ask.id}
            assert (await metering.store.read(EverythingKept())).state.leases == {}
            assert tallies(metering) == {"admitted": {"": 1}}

    asyncio.run(play())


def test_count_running_calls_of_the_shadow() -> None:
    """With one slot in the shadow the second of two calls at once would have been refused, and a third is not."""

    async def play() -> None:
        both, leave = asyncio.Barrier(2), asyncio.Event()

        async def work() -> None:
            if not leave.is_set():
                await both.wait()

        async with house("memory://") as metering:
            app = metered(metering, rate_limited(concurrency=1, shadow=True), work=work)
            await asyncio.gather(call(app), call(app))
            await idle(metering)
            leave.set()
            await call(app)
            assert tallies(metering) == {"admitted": {"": 2}, "denied": {"concurrency": 1}}

    asyncio.run(play())


@pytest.mark.parametrize("state", ["down", "silent"])
def test_serve_while_the_store_gives_no_answer(state: str) -> None:
    """A store that refuses, or says nothing, costs calls in the shadow neither wait nor error; they count as lost."""

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=0.01) as metering:
            app = metered(metering, rate_limited("1/minute", concurrency=1, shadow=True), billable(2, shadow=True))
            setattr(store, state, True)
            assert [status((await call(app)).log) for _ in range(3)] == [200] * 3
            await within(10, lambda: sum(tallies(metering).get("lost", {}).values()) == 3)
            store.down = store.silent = False
            store.let.set()
            await idle(metering)
            assert tallies(metering) == {"lost": {"store": 3}}
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


def test_wait_for_no_answer() -> None:
    """The endpoint runs, and its answer is whole, before the store has said what the shadow would have done."""

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=30) as metering:
            app = metered(metering, rate_limited("1/minute", shadow=True), billable(2, shadow=True))
            store.silent = True
            assert status((await call(app)).log) == 200
            assert tallies(metering) == {}
            async with metering.charge(payer="ann", line="job", price=2, shadow=True) as work:
                assert work.would_deny is None
            store.let.set()
            await within(10, lambda: tallies(metering) == {"admitted": {"": 2}})

    asyncio.run(play())


def test_survive_what_its_own_functions_raise() -> None:
    """A key, a price or a payer that cannot be computed is lost with its shadow alone, an unresolved payer is told."""

    def broken() -> Any:
        raise LookupError("no such thing")

    async def play() -> None:
        async with house("memory://") as metering:
            for part in (
                rate_limited("1/minute", key=broken, shadow=True),
                billable(broken, shadow=True),
                requires_upstream("acme", tokens=broken, shadow=True),
                billable(2, payer=broken, shadow=True),
            ):
                assert status((await call(metered(metering, part, rate_limited("9/minute")))).log) == 200
            assert tallies(metering) == {"lost": {"computing": 3}, "denied": {"payer_unresolved": 1}}

    asyncio.run(play())


def test_give_the_live_hold_back_where_the_request_ends_in_between() -> None:
    """A call that is cancelled while its shadow is computed leaves nothing held, neither live nor beside."""

    async def play() -> None:
        reached = asyncio.Event()

        async def slow() -> str:
            reached.set()
            await asyncio.Event().wait()
            return "key"

        async with house("memory://") as metering:
            await metering.grant("ann", 5, id="g")
            app = metered(metering, billable(2), rate_limited("3/minute", concurrency=1, key=slow, shadow=True))
            running = asyncio.create_task(call(app))
            await reached.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await idle(metering)
            assert await settled(metering) == (0, 0)
            assert await metering.holds() == []

    asyncio.run(play())


@pytest.mark.parametrize("where", range(12))
def test_leave_no_slot_behind_wherever_a_call_is_cancelled(where: int) -> None:
    """Pitfall 29: after a cancellation at any turn of the loop all slots are free, live ones and the shadow's."""

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=5) as metering:

            async def work() -> None:
                for _ in range(3):
                    await asyncio.sleep(0)

            live, shadow = (
                rate_limited(concurrency=1, scope="live"),
                rate_limited(concurrency=1, scope="s", shadow=True),
            )
            app = metered(metering, live, shadow, billable(2), work=work)
            running = asyncio.create_task(call(app))
            for _ in range(where):
                await asyncio.sleep(0)
            running.cancel()
            await asyncio.wait([running])

            async def free() -> bool:
                state = (await metering.store.read(EverythingKept())).state
                return not metering.runtime().busy and not state.leases and (await settled(metering))[1] == 0

            await until(free)

    asyncio.run(play())


def test_refuse_live_without_asking_the_shadow() -> None:
    """What a live part refuses never reaches the shadow: its counts are those of calls that ran."""

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            app = metered(metering, rate_limited("0/minute"), rate_limited("5/minute", shadow=True))
            assert status((await call(app)).log) == 429
            assert len(books.admissions) == 1
            assert tallies(metering) == {}

    asyncio.run(play())


def test_say_nothing_of_who_is_exempt() -> None:
    """A caller of the operator's own is charged nothing in the shadow either, and counted by no limit of its own."""

    async def play() -> None:
        async with Metering("memory://", identify=lambda _: Caller("probe", exempt=True), sinks=()) as metering:
            app = metered(metering, rate_limited("0/minute", shadow=True), billable(2, shadow=True))
            assert status((await call(app)).log) == 200
            assert tallies(metering) == {"admitted": {"": 1}}

    asyncio.run(play())


def test_hold_no_money_beside_limits() -> None:
    """With a price and slots in the shadow only the slots are taken at the store; the price is looked at."""

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            await metering.grant("ann", 5, id="g")

            async def work() -> None:
                assert (await metering.balance("ann")).held == 0
                (ask,) = books.admissions
                assert (ask.amount, ask.sources, len(ask.leases)) == (0, (), 1)

            app = metered(metering, rate_limited(concurrency=1, shadow=True), billable(2, shadow=True), work=work)
            assert status((await call(app)).log) == 200
            await idle(metering)
            assert [entry.kind.value async for entry in metering.statement("ann")] == ["grant"]

    asyncio.run(play())


def test_ask_no_store_where_a_provider_would_have_refused() -> None:
    """The order of reasons holds in the shadow: behind a provider without room no limit is counted."""

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            metering.quotas.record("acme", [(b"retry-after", b"30")], 429)
            app = metered(metering, requires_upstream("acme", shadow=True), rate_limited("9/minute", shadow=True))
            assert status((await call(app)).log) == 200
            assert books.admissions == []
            assert tallies(metering) == {"denied": {"upstream_headroom": 1}}

    asyncio.run(play())


def test_free_what_was_answered_after_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot of the shadow that the store gave when the call was over already is given back; nobody waited for it."""
    monkeypatch.setattr("asgi_metering.shadow.ANSWER_S", 0.0)

    async def play() -> None:
        store = Gated()
        async with used(store, store_timeout_s=30) as metering:
            store.silent = True
            assert status((await call(metered(metering, rate_limited(concurrency=1, shadow=True)))).log) == 200
            monkeypatch.setattr("asgi_metering.shadow.ANSWER_S", 60.0)
            async with asyncio.timeout(10), metering.charge(payer="ann", line="job", price=2, shadow=True):
                pass
            store.silent = False
            store.let.set()
            await idle(metering)
            assert (await metering.store.read(EverythingKept())).state.leases == {}
            assert len(store.seen(End)) == 1

    asyncio.run(play())


def test_stand_back_when_live_calls_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where more live admissions wait for the store than it can take soon, the shadow asks nothing and is lost."""
    monkeypatch.setattr("asgi_metering.shadow.MAX_WAITING", -1)

    async def play() -> None:
        books = Books()
        async with house(books) as metering:
            assert status((await call(metered(metering, rate_limited("9/minute", shadow=True)))).log) == 200
            assert books.admissions == []
            assert tallies(metering) == {"lost": {"store": 1}}

    asyncio.run(play())


def test_leave_a_store_alone_that_is_known_to_be_down() -> None:
    """The shadow is no probe: it asks nothing of a store that nobody asks, and says nothing of how that is."""

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            before = len(store.batches)
            for _ in range(5):
                number = metering.breaker.ask()
                assert number is not None
                metering.breaker.failed(number)
            assert status((await call(metered(metering, rate_limited("9/minute", shadow=True)))).log) == 200
            await within(10, lambda: tallies(metering) == {"lost": {"store": 1}})
            assert len(store.batches) == before
            assert metering.breaker.state == "open"

    asyncio.run(play())


def test_run_nothing_behind_a_request_that_is_over() -> None:
    """Pitfall 1: code that waits for its shadow's own function while its request ends does not go on."""

    async def play() -> None:
        reached, go_on = asyncio.Event(), asyncio.Event()
        late: list[asyncio.Task[None]] = []

        async def slow() -> str:
            reached.set()
            await go_on.wait()
            return "key"

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            parts = rate_limited("9/minute"), rate_limited("9/hour", key=slow, shadow=True)
            late.append(asyncio.create_task(current_call().admit(*parts)))
            await reached.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        async with house("memory://") as metering:
            await call(MeteringMiddleware(app, metering))
            go_on.set()
            with pytest.raises(CallClosedError):
                await late[0]

    asyncio.run(play())


def test_take_no_slot_behind_a_request_that_is_over() -> None:
    """Pitfall 1: a shadow whose own function outlives its request takes nothing that nobody would give back."""

    async def play() -> None:
        reached, go_on = asyncio.Event(), asyncio.Event()
        late: list[asyncio.Task[None]] = []

        async def slow() -> str:
            reached.set()
            await go_on.wait()
            return "key"

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            shadow = rate_limited("9/hour", concurrency=2, key=slow, shadow=True)
            late.append(asyncio.create_task(current_call().admit(shadow)))
            await reached.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"done"})

        async with house("memory://") as metering:
            await call(MeteringMiddleware(app, metering))
            go_on.set()
            with pytest.raises(CallClosedError):
                await late[0]
            await idle(metering)
            assert not (await metering.store.read(EverythingKept())).state.leases

    asyncio.run(play())


async def cancelled() -> Any:
    """Wait for a future that somebody has cancelled."""
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    future.cancel()
    return await future


@pytest.mark.parametrize(
    "part",
    [
        rate_limited("9/minute", key=cancelled, shadow=True),
        requires_upstream("acme", tokens=cancelled, shadow=True),
        requires_upstream("acme", label=cancelled, shadow=True),
    ],
    ids=["key", "tokens", "label"],
)
def test_survive_a_future_that_its_own_function_cancelled(part: Part) -> None:
    """S4.16: a cancelled future inside of a shadow's own function is lost, and cancels no call."""

    async def play() -> None:
        async with house("memory://") as metering:
            await metering.grant("ann", 5, id="g")
            assert status((await call(metered(metering, part, billable(2)))).log) == 200
            assert tallies(metering) == {"lost": {"computing": 1}}
            await idle(metering)
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


def test_cancel_a_call_whose_shadow_waits_for_its_own_function() -> None:
    """A real cancellation goes through what a shadow waits for: the call is over, and nothing of it is lost or held."""

    async def play() -> None:
        reached = asyncio.Event()

        async def slow() -> int:
            reached.set()
            await asyncio.Event().wait()
            return 1

        async with house("memory://") as metering:
            await metering.grant("ann", 5, id="g")
            app = metered(metering, requires_upstream("acme", tokens=slow, shadow=True), billable(2))
            running = asyncio.create_task(call(app))
            await reached.wait()
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            await idle(metering)
            assert tallies(metering) == {}
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


def test_keep_the_shadow_of_a_metering_fixed() -> None:
    """Half of what a metering does is worked out by its first calls, so its flag cannot be changed later."""
    with pytest.raises(AttributeError):
        setattr(house("memory://"), "shadow", True)  # noqa: B010 -- a type checker refuses the plain way
