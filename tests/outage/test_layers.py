"""What each layer answers without the store, and what is charged for it afterwards (X.6)."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest

from asgi_metering import (
    Allowance,
    CallRefused,
    Metering,
    MeteringMiddleware,
    TokenUsage,
    Wallet,
    billable,
    current_call,
    metered_app,
    rate_limited,
    slices,
)
from asgi_metering.asgi.audit import audit
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.outage import MAX_LOCAL_KEYS, LocalLimits
from asgi_metering.policies import Idempotency
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.operations import Admit, End, WalletSource
from asgi_metering.sources import PaymentSource
from asgi_metering.stores.breaker import FAILURES
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import Drive, body, headers, http_scope, status
from tests.outage.gated import CREDIT, Gated, call, identify, metered, settled, until, used
from tests.pitfalls.streams import delta

QUEUE: dict[str, Literal["queue"]] = {"credits": "queue"}


async def is_empty(metering: Metering) -> bool:
    """Whether nothing waits in the journal."""
    assert metering.journal is not None
    return await metering.journal.counts() == (0, 0)


async def back(metering: Metering, store: Gated) -> None:
    """Bring the store back, and wait until all that waited is in the books."""
    store.down = False
    await until(lambda: is_empty(metering))


def test_deny_money_and_allow_rates_by_default() -> None:
    """X.6: a dead store is 503 for money, with a sentence and a Retry-After, and lets calls that are only counted in.

    The decision says that nobody was asked; unmetered routes do not notice.
    """
    decided: list[Any] = []

    async def work() -> None:
        decided.append(current_call().decision)

    async def play() -> None:
        store = Gated()
        async with used(store) as metering:
            store.down = True
            paid = await call(metered(metering, billable(1)))
            counted = await call(metered(metering, rate_limited("1/day"), work=work))
            both = await call(metered(metering, rate_limited("1/day"), billable(1)))
            assert [status(each.log) for each in (paid, counted, both)] == [503, 200, 503]
            told = json.loads(body(paid.log))
            assert told["code"] == "store_unavailable"
            assert "Nothing was charged" in told["detail"]
            assert 1 <= int(dict(headers(paid.log))["retry-after"]) <= 10
            assert status((await call(metered(metering))).log) == 200
            assert await settled(metering) == (0, 0)

    asyncio.run(play())
    assert [decision.fallback for decision in decided] == [("rates:allow",)]


def test_let_a_route_say_otherwise(tmp_path: Path) -> None:
    """A decorator's word counts more than the metering's, layer by layer; the strictest layer of the route answers."""
    routes: list[tuple[list[Any], int]] = [
        ([billable(1)], 503),
        ([billable(1, on_store_down="allow")], 200),
        ([billable(1, on_store_down="queue")], 200),
        ([rate_limited("9/day")], 200),
        ([rate_limited("9/day", on_store_down="deny")], 503),
        ([rate_limited("9/day", on_store_down="local"), rate_limited("9/day", on_store_down="deny", scope="b")], 503),
        ([rate_limited("9/day", on_store_down="deny"), billable(1, on_store_down="allow")], 503),
        ([rate_limited("9/day", on_store_down="local"), billable(1, on_store_down="queue")], 200),
    ]

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            store.down = True
            answered = [status((await call(metered(metering, *parts))).log) for parts, _ in routes]
            assert answered == [expected for _, expected in routes]
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"on_store_down": {"credits": "local"}}, "'credits': 'deny', 'queue', 'allow'; 'rates': 'deny', 'local', "),
        ({"on_store_down": {"rates": "queue"}}, "is not known"),
        ({"on_store_down": {"speed": "deny"}}, "is not known"),
        ({"journal": 7}, "journal=7 is no path"),
        ({"journal": ""}, "names no file"),
        ({"on_store_down": {"credits": "queue"}}, "lost with the process. Give the Metering a journal="),
    ],
)
def test_refuse_answers_that_a_layer_does_not_have(wrong: dict[str, Any], said: str) -> None:
    """An unknown layer or answer fails at import, and so does queueing without a journal (DESIGN "Store down")."""
    with pytest.raises(ConfigurationError, match=said):
        Metering(**wrong)


def test_refuse_routes_that_queue_without_a_journal() -> None:
    """DESIGN "Store down": a route that queues charges without a journal is found at startup, and refused outside HTTP.

    Unknown words fail at import.
    """
    with pytest.raises(ConfigurationError, match=r"'local' is not known here\. Choose one of 'deny', 'queue', 'allow'"):
        billable(1, on_store_down="local")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"'queue' is not known here\. Choose one of 'deny', 'local', 'allow'"):
        rate_limited("1/day", on_store_down="queue")  # type: ignore[arg-type]
    metering = Metering(sinks=())
    app = metered(metering, billable(1, on_store_down="queue"))
    (error,) = audit(app, app.features, frozenset(), metering).errors
    assert "on_store_down='queue'" in error
    assert "Give the Metering a journal=" in error

    async def outside() -> None:
        with pytest.raises(ConfigurationError, match="Give the Metering a journal="):
            async with metering.charge(payer="ann", line="job", price=1, on_store_down="queue"):
                raise AssertionError("It ran.")

    asyncio.run(outside())


# -- local limits ------------------------------------------------------------------------------------------


def test_limit_locally() -> None:
    """With "local" a process limits by itself, by the same rules: requests, tokens as they were used, and slots.

    Answers bear the same fields, refusals are exact, and other callers are not affected.
    """
    decided: list[Any] = []

    async def work() -> None:
        decided.append(current_call().decision)

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local"}) as metering:
            app = metered(metering, rate_limited("2/day", concurrency=1), work=work)
            assert status((await call(app)).log) == 200
            store.down = True
            ended = [await call(app) for _ in range(3)] + [await call(app, "bob")]
            assert [status(each.log) for each in ended] == [200, 200, 429, 200]
            assert [decision.fallback for decision in decided] == [(), *[("rates:local",)] * 3]
            fields = dict(headers(ended[1].log))
            assert fields["ratelimit"].startswith('"2-per-day";r=0')
            assert int(dict(headers(ended[2].log))["retry-after"]) > 0

    asyncio.run(play())


@pytest.mark.parametrize(
    ("limits", "policy"),
    [
        (rate_limited("2/day", strategy="moving"), '"2-per-day";q=2;w=86400'),
        (rate_limited("1/day burst 2"), '"1-per-day-burst-2";q=2;w=172800'),
        (rate_limited("2/week", strategy="calendar"), '"2-per-week";q=2;w=604800'),
    ],
    ids=["moving", "bucket", "calendar"],
)
def test_limit_locally_by_every_kind(limits: Any, policy: str) -> None:
    """Every kind of limit counts without the store as with it, and says the same of itself in both."""

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local"}) as metering:
            app = metered(metering, limits)
            for store.down in (False, True):
                ended = [await call(app) for _ in range(3)]
                assert [status(each.log) for each in ended] == [200, 200, 429]
                fields = [dict(headers(each.log)) for each in ended]
                assert {each["ratelimit-policy"] for each in fields} == {policy}
                left = [each["ratelimit"].partition(";t=")[0].rpartition("=")[2] for each in fields]
                assert left == ["1", "0", "0"]
                assert 0 < int(fields[2]["ratelimit"].rpartition("=")[2]) <= int(fields[2]["retry-after"])

    asyncio.run(play())


def test_free_local_slots_and_correct_local_tokens() -> None:
    """A call that ends frees its local slot, and gives back the tokens that it did not use."""
    inside, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        inside.set()
        await leave.wait()
        current_call().record(TokenUsage(input=1, output=1))

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local", "credits": "allow"}) as metering:
            app = metered(
                metering,
                rate_limited("100/day of tokens", concurrency=1),
                billable(per_token(input=1, output=1), hold=TokenUsage(input=30, output=30)),
                work=work,
            )
            store.down = True
            async with Drive(app, http_scope("/", "POST")) as first:
                await inside.wait()
                full = await call(app)
                assert (status(full.log), json.loads(body(full.log))["code"]) == (429, "concurrency")
                leave.set()
                await first.ended()
            await until(lambda: _booked(metering))
            # 60 each by estimate, 2 each in the end.
            assert [status((await call(app)).log) for _ in range(3)] == [200, 200, 200]

    asyncio.run(play())


async def _booked(metering: Metering) -> bool:
    return metering.runtime().busy == 0 and not metering.runtime().in_flight


def test_bound_what_is_counted_locally(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """More keys than a process may count by itself begin anew, loudly."""
    assert MAX_LOCAL_KEYS == 100_000
    monkeypatch.setattr("asgi_metering.outage.MAX_LOCAL_KEYS", 2)

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local"}) as metering:
            app = metered(metering, rate_limited("1/day"))
            store.down = True
            assert [status((await call(app, who)).log) for who in ("ann", "bob", "ann")] == [200, 200, 429]
            assert "counted anew" not in caplog.text
            assert [status((await call(app, who)).log) for who in ("eve", "ann", "ann")] == [200, 200, 429]
            assert "More than 2 keys are limited locally" in caplog.text

    asyncio.run(play())


def test_make_room_for_keys_whose_windows_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys whose windows are over give way to others, so that nobody is counted anew for them."""
    monkeypatch.setattr("asgi_metering.outage.MAX_LOCAL_KEYS", 4)

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local"}) as metering:
            now = [time.time()]
            metering.local = LocalLimits(lambda: now[0])
            short, long = metered(metering, rate_limited("1/second")), metered(metering, rate_limited("1/day"))
            store.down = True
            assert [status((await call(short, who)).log) for who in ("a", "b", "c")] == [200] * 3
            assert [status((await call(long)).log) for _ in range(2)] == [200, 429]
            now[0] += 5.0
            assert status((await call(short, "d")).log) == 200
            assert [status((await call(long)).log), "counted anew" in caplog.text] == [429, False]

    asyncio.run(play())


def test_count_one_window_over_two_outages(caplog: pytest.LogCaptureFixture) -> None:
    """A store that comes and goes gives nobody a second window in the first: what was counted without it still is.

    Slots that calls took in an outage are theirs until they end, however often it answers meanwhile.
    """
    begun, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await leave.wait()

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local"}) as metering:
            app = metered(metering, rate_limited("3/day"))
            slow = metered(metering, rate_limited("99/day", concurrency=1), work=work)
            store.down = True
            assert [status((await call(app)).log) for _ in range(2)] == [200, 200]
            running = asyncio.create_task(call(slow))
            await begun.wait()
            for number in range(FAILURES):
                await call(app, f"other {number}")
            store.down = False
            await until(lambda: _is_told(app, caplog))
            store.down = True
            assert status((await call(slow)).log) == 429
            assert [status((await call(app)).log) for _ in range(2)] == [200, 429]
            leave.set()
            assert status((await running).log) == 200
            assert status((await call(slow)).log) == 200

    asyncio.run(play())


async def _is_told(app: Any, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether a request found that the store answers, and that was told."""
    await call(app, "dan")
    return "The gated store answers again." in caplog.text


async def _answers(app: Any, who: str, expected: int, store: Gated) -> bool:
    """Whether a request is decided by the store itself, as *expected*."""
    before = len(store.batches)
    return status((await call(app, who)).log) == expected and len(store.batches) > before


# -- queued charges ----------------------------------------------------------------------------------------


def test_charge_later_what_was_let_in(tmp_path: Path) -> None:
    """With "queue" a call runs while the store is down, and is charged once when it is back: line, event and receipt.

    The handler sees an admitted call with its hold; what is in the books stands under the call's own id.
    """
    seen: list[Any] = []
    events: list[Any] = []

    async def work() -> None:
        call = current_call()
        seen.append((call.id, call.decision, call.held))

    async def play() -> None:
        store = Gated()
        sinks = [CallbackSink(events.extend)]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, sinks=sinks) as metering:
            store.down = True
            app = metered(metering, billable(2, line="chat"), work=work)
            ended = await call(app, x_request_id="r-1")
            assert status(ended.log) == 200
            ((call_id, decision, held),) = seen
            assert (decision.admitted, decision.fallback, held) == (True, ("credits:queue",), 2 * CREDIT)
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)
            (line,) = [each async for each in metering.statement("ann") if each.kind is EntryKind.SETTLE]
            assert (line.ref, line.line, line.basis) == (call_id, "chat", Basis.USAGE)
            await until(lambda: _told(events))
            assert (events[0].id, events[0].line, events[0].request_id) == (call_id, "chat", "r-1")
            assert (await metering.refund(call_id, id="sorry")).returned == 2 * CREDIT

    asyncio.run(play())


async def _told(events: list[Any]) -> bool:
    return len(events) == 1


def test_charge_a_queued_call_by_what_it_used(tmp_path: Path) -> None:
    """A measured price is settled by usage, also above the estimate; failed work costs nothing, and nothing waits."""
    fails = False

    async def work() -> None:
        if fails:
            raise LookupError("gone")
        current_call().record(TokenUsage(input=1, output=6))

    async def play() -> None:
        nonlocal fails
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            app = metered(metering, billable(per_token(input=1, output=1), hold=3), work=work)
            store.down = True
            assert status((await call(app)).log) == 200
            fails = True
            assert (await call(app)).outcome == "raised"
            await back(metering, store)
            assert await settled(metering) == (7 * CREDIT, 0)
            assert [end.amount for end in store.seen(End) if end.amount] == [7 * CREDIT]

    asyncio.run(play())


def test_charge_queued_calls_by_the_route_s_own_sources(tmp_path: Path) -> None:
    """An allowance pays first, then grants; what nobody can pay is debt, and stands in the payer's statement."""
    sources: list[PaymentSource] = [Allowance(2, per="month"), Wallet()]

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            await metering.grant("bob", 1, id="b")
            app = metered(metering, billable(1, sources=sources))
            store.down = True
            for _ in range(4):
                assert status((await call(app, "bob")).log) == 200
            await back(metering, store)
            balance = await metering.balance("bob")
            assert (balance.settled, balance.debt) == (2 * CREDIT, 1 * CREDIT)
            (status_of,) = await metering.allowances("bob", sources=sources)
            assert status_of.used == 2 * CREDIT
            kinds = [each.kind async for each in metering.statement("bob")]
            assert kinds.count(EntryKind.SETTLE) == 4

    asyncio.run(play())


@pytest.mark.parametrize("payer", ["ann", "bob"])
@pytest.mark.parametrize("lost", [Admit, End])
def test_charge_a_queued_call_once_whatever_reply_is_lost(lost: type, payer: str, tmp_path: Path) -> None:
    """S3.15: a step whose reply was lost is done again and changes nothing twice, also where money came in between."""
    price = 2

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            await metering.grant("bob", 1, id="b")
            app = metered(metering, billable(price))
            store.down = True
            assert status((await call(app, payer)).log) == 200
            store.loses = [lost, lost, lost]
            store.down = False

            async def rich() -> bool:
                # Who could not pay before can now: the debt that was decided on stands all the same.
                if not store.loses:
                    await metering.grant("bob", 50, id="more")
                return await is_empty(metering)

            await until(rich)
            assert store.loses == []
            assert await settled(metering, payer) == (price * CREDIT, 0)

    asyncio.run(play())


def test_charge_a_queued_call_whose_first_admission_was_late(tmp_path: Path) -> None:
    """What the store admitted after the deadline is given back; what was queued instead is charged, once."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.silent = True
            assert status((await call(metered(metering, billable(2)))).log) == 200
            store.silent = False
            store.let.set()
            await until(lambda: is_empty(metering))
            await until(lambda: _is_settled(metering, 2))
            state = (await store.read(EverythingKept())).state
            assert sorted(hold.receipt.amount for hold in state.holds.values() if hold.receipt) == [0, 2 * CREDIT]

    asyncio.run(play())


def test_charge_a_queued_call_that_is_admitted_late_again(tmp_path: Path) -> None:
    """What the journal asks for is asked again until it is answered: a late answer undoes nothing of it."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            metering.end_timeout_s = 0.05
            assert metering.journal is not None
            store.silent = True
            ask = Admit("late", "ann", "credits", 2 * CREDIT, 2 * CREDIT, (WalletSource(),))
            await metering.journal.keep({"late": (ask, End("late", 2 * CREDIT, Basis.USAGE))})
            # Asked, and not answered within the deadline.
            await until(lambda: _is_alarmed(metering))
            store.silent = False
            store.let.set()
            await until(lambda: is_empty(metering))
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


def test_write_charges_that_come_together_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued calls that come while the disk is busy share its next write: none waits for all before it in turn."""
    writes = []

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            journal = metering.journal
            assert journal is not None
            keep = journal.keep

            async def counted(entries: Any, **options: Any) -> None:
                writes.append(len(entries))
                await keep(entries, **options)

            monkeypatch.setattr(journal, "keep", counted)
            store.down = True
            app = metered(metering, billable(1))
            ended = await asyncio.gather(*(call(app) for _ in range(40)))
            assert {status(each.log) for each in ended} == {200}
            await back(metering, store)
            assert await settled(metering) == (40 * CREDIT, 0)
            assert sum(writes) == 80
            assert len(writes) < 40

    asyncio.run(play())


@pytest.mark.parametrize("days", [3, 34])
def test_charge_a_queued_call_by_the_windows_of_a_later_day(days: int, tmp_path: Path) -> None:
    """An outage over midnight makes no debt of what an allowance pays, and calls of one key stay one charge."""
    sources = [Allowance(5, per="day")]

    async def play() -> None:
        store = Gated()
        now = [time.time()]
        store._clock = lambda: now[0]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            once = metered(metering, billable(1, sources=sources))
            shared = metered(metering, billable(2, sources=sources, charge_key=lambda: "s"))
            store.down = True
            for app in (once, shared, shared):
                assert status((await call(app, "bob")).log) == 200
            now[0] += days * 86_400
            await back(metering, store)
            balance = await metering.balance("bob")
            assert (balance.settled, balance.debt) == (0, 0)
            assert await _spent_by_allowance(store) == 3 * CREDIT

    asyncio.run(play())


async def _spent_by_allowance(store: Gated) -> int:
    return sum(window.settled for window in (await store.read(EverythingKept())).state.allowances.values())


@pytest.mark.parametrize("granted", [0, 2])
def test_charge_queued_calls_of_a_key_once(granted: int, tmp_path: Path) -> None:
    """S0.10: calls that share a key are one charge, also where nobody can pay it and it becomes debt."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            await metering.grant("bob", granted or 1, id="b")
            app = metered(metering, billable(2, charge_key=lambda: "session"))
            store.down = True
            for _ in range(3):
                assert status((await call(app, "bob")).log) == 200
            await back(metering, store)
            assert await settled(metering, "bob") == (2 * CREDIT, 0)

    asyncio.run(play())


@pytest.mark.parametrize("is_full", [False, True])
def test_keep_nothing_of_a_queued_call_that_failed(is_full: bool, tmp_path: Path) -> None:
    """A queued call that charges nothing is told of, and is not charged later by the policy for processes that died.

    Also where the store is back before its end, and where the journal takes nothing more.
    """
    told: list[Any] = []
    begun, leave = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await leave.wait()
        raise LookupError("gone")

    async def play() -> None:
        store = Gated()
        sinks = [CallbackSink(told.extend)]
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, sinks=sinks) as metering:
            store.down = True
            running = asyncio.create_task(call(metered(metering, billable(2, on_abort="hold"), work=work)))
            await begun.wait()
            assert metering.journal is not None
            # And what the store may hold for it all the same is given back.
            assert await metering.journal.counts() == (2, 0)
            if is_full:
                metering.journal._max_entries = 0
            store.down = False
            leave.set()
            assert (await running).outcome == "raised"
            await until(lambda: is_empty(metering))
            await until(lambda: _told(told))
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


def test_charge_a_queued_call_by_more_than_its_first_slice(tmp_path: Path) -> None:
    """Without reported usage a call whose hold would have grown is charged by what was observed, as any other."""
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send(head)
        await send({"type": "http.response.body", "body": delta(" word" * 20), "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.down = True
            price = per_token(input=0, output=1)
            part = billable(price, hold=slices(TokenUsage(output=3)))
            assert status((await call(MeteringMiddleware(metered_app(app, part), metering=metering))).log) == 200
            await back(metering, store)
            assert await settled(metering) == (20 * CREDIT, 0)

    asyncio.run(play())


def test_leave_nothing_of_a_caller_that_left(tmp_path: Path) -> None:
    """Whoever leaves while its charge is written is not charged for work that never began; its local slot is free."""

    async def play() -> None:
        store = Gated()
        down = {"credits": "queue", "rates": "local"}
        async with used(store, journal=tmp_path / "j", on_store_down=down) as metering:
            journal = metering.journal
            assert journal is not None
            store.down = True
            app = metered(metering, billable(2, on_abort="hold"), rate_limited("9/day", concurrency=1))
            disk, waits = threading.Event(), threading.Event()

            def stall(_: Any) -> None:
                waits.set()
                disk.wait(10)

            slow = asyncio.create_task(journal._in_thread(stall))
            await asyncio.to_thread(waits.wait, 10)
            leaving = asyncio.create_task(call(app))
            await until(lambda: _is_local(metering))
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
            disk.set()
            await slow
            # Nothing but what the store may hold for it all the same.
            await until(lambda: _has_entries(metering, 1))
            assert status((await call(app)).log) == 200
            await back(metering, store)
            assert await settled(metering) == (2 * CREDIT, 0)

    asyncio.run(play())


async def _is_local(metering: Metering) -> bool:
    return bool(metering.local._store._state.leases)


async def _is_alarmed(metering: Metering) -> bool:
    return "replay" in metering.alarms._told


async def _is_settled(metering: Metering, amount: int) -> bool:
    return await settled(metering) == (amount * CREDIT, 0)


@pytest.mark.parametrize(("policy", "charged"), [("hold", 2), ("observed", 0)])
def test_end_a_queued_call_whose_process_died(
    policy: Literal["hold", "observed"], charged: int, tmp_path: Path
) -> None:
    """A call that began while the store was down, and whose process did not see its end, is ended by its policy."""
    begun, never = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        await never.wait()

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE, max_call_s=0.3) as metering:
            store.down = True
            metering.runtime().finish = lambda call: None  # type: ignore[method-assign]
            async with Drive(metered(metering, billable(2, on_abort=policy), work=work), http_scope("/")):
                await begun.wait()
                entries = 2 if policy == "hold" else 1
                await until(lambda: _has_entries(metering, entries))
                assert metering.journal is not None
                assert len(await metering.journal.due(9)) == entries - 1
            await back(metering, store)
            assert await settled(metering) == (charged * CREDIT, 0)

    asyncio.run(play())


async def _has_entries(metering: Metering, number: int) -> bool:
    assert metering.journal is not None
    return await metering.journal.counts() == (number, 0)


def test_queue_no_charge_that_cannot_be_kept(tmp_path: Path) -> None:
    """Where the journal is full, or a key says that the request may have run before, the call is refused with 503.

    Its slots are free again.
    """

    async def play() -> None:
        store = Gated()
        down = {"credits": "queue", "rates": "local"}
        async with used(store, journal=tmp_path / "j", on_store_down=down) as metering:
            assert metering.journal is not None
            metering.journal._max_entries = 1
            app = metered(metering, billable(2), rate_limited("9/day", concurrency=1))
            store.down = True
            # Ends of calls without an answer may wait there too, so that the first one may be refused as well.
            await metering.journal.keep({"other": (End("other", 1),)})
            for _ in range(2):
                ended = await call(app)
                assert (status(ended.log), json.loads(body(ended.log))["code"]) == (503, "store_unavailable")
            metering.journal._max_entries = 10
            assert status((await call(app)).log) == 200
            keyed = metered(metering, billable(2, idempotency=Idempotency()))
            assert status((await call(keyed, idempotency_key='"k"')).log) == 503
            assert status((await call(keyed)).log) == 200

    asyncio.run(play())


def test_queue_charges_outside_http(tmp_path: Path) -> None:
    """`metering.charge()` runs and is charged later as well; with "deny" it is refused, and its block does not run."""

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j") as metering:
            store.down = True
            async with metering.charge(payer="ann", line="job", price=3, on_store_down="queue"):
                pass
            with pytest.raises(CallRefused, match="store_unavailable"):
                async with metering.charge(payer="ann", line="job", price=3):
                    raise AssertionError("It ran.")
            await back(metering, store)
            assert await settled(metering) == (3 * CREDIT, 0)

    asyncio.run(play())


def test_give_a_queued_call_up_whose_request_is_over(tmp_path: Path) -> None:
    """Pitfall 1: code that outlives its request is not let in by the journal either, and nothing is charged for it."""
    late: list[asyncio.Task[Any]] = []

    async def play() -> None:
        store = Gated()
        async with used(store, journal=tmp_path / "j", on_store_down=QUEUE) as metering:
            store.silent = True

            async def work() -> None:
                late.append(asyncio.create_task(current_call().admit(billable(2))))
                await asyncio.sleep(0)

            assert status((await call(metered(metering, work=work))).log) == 200
            (failure,) = await asyncio.gather(*late, return_exceptions=True)
            assert type(failure).__name__ == "CallClosedError"
            store.silent = False
            store.let.set()
            await until(lambda: is_empty(metering))
            assert await settled(metering) == (0, 0)

    asyncio.run(play())


def test_identify_is_what_these_tests_use() -> None:
    """The caller that a request names pays."""
    assert identify(type("C", (), {"headers": {"x-who": "bob"}})()).payer == "bob"
