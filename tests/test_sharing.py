"""Readings of providers' quotas that the workers of one store share: off every path, newest first (DESIGN 6, S1.45)."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering import Metering, billable, requires_upstream
from asgi_metering.asgi.startup import examined
from asgi_metering.errors import ConfigurationError, StoreUnavailableError, UnwritableError
from asgi_metering.quotas import QuotaLimit, Reading
from asgi_metering.quotas.reading import MAX_LIMITS
from asgi_metering.rules.decide import Answer
from asgi_metering.rules.operations import Operation, Share
from asgi_metering.rules.readings import MAX_SHARED, MAX_TOLD
from asgi_metering.rules.state import SharedReading
from asgi_metering.sharing import LISTEN_EVERY_S, LISTEN_FOR_S, PAUSE_S, STUCK_S, TELL_EVERY_S, Sharing
from asgi_metering.stores.contract import Query, ReadingsKept, Snapshot
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import FakeClock
from asgi_metering.upstream.parts import parts_of
from asgi_metering.upstream.readings import MAX_SERIES, QuotaReadings
from tests.harness.drive import status
from tests.outage.gated import Gated, call, metered, until, used
from tests.quotas.refusals import GOOGLE_DAY

WITHIN_S = 5.0


class Worker:
    """One process: what it read, by a clock that may be ahead of the store's, and what shares that by the store."""

    def __init__(self, store: MemoryStore, clock: FakeClock, *, is_used: bool = True, ahead_s: float = 0.0) -> None:
        self.store = store
        self.readings = QuotaReadings(clock=lambda: clock() + ahead_s)
        self.sharing = Sharing(self.readings, lambda: is_used, clock)
        self.told: list[Share] = []
        self.looks = 0
        self.failure: Exception | None = None

    async def submit(self, operation: Operation, deadline_s: float) -> Answer:
        """Run one operation, unless it fails."""
        assert deadline_s == WITHIN_S
        if self.failure is not None:
            raise self.failure
        assert isinstance(operation, Share)
        self.told.append(operation)
        return self.store.run_now(operation)

    async def read(self, query: Query) -> Snapshot:
        """Read, unless it fails."""
        if self.failure is not None:
            raise self.failure
        self.looks += 1
        return await self.store.read(query)

    async def tell(self) -> None:
        """Tell what is new."""
        await self.sharing.tell(self.submit, WITHIN_S)

    async def listen(self) -> None:
        """Take what others told."""
        await self.sharing.listen(self.read, WITHIN_S)

    async def turn(self) -> bool:
        """Take a turn, if it is time; whether it was."""
        if not self.sharing.begins():
            return False
        await self.sharing.turn(self.submit, self.read, WITHIN_S)
        self.sharing.ended()
        return True

    def record(self, left: int, ago: float = 0.0, label: str | None = None) -> None:
        """An answer that told how many requests are left."""
        headers = [(b"x-ratelimit-remaining-requests", str(left).encode())]
        self.readings.record("openai", headers, 200, self.readings._clock() - ago, label=label)


def workers(count: int, **options: Any) -> tuple[FakeClock, list[Worker]]:
    """Workers of one store."""
    clock = FakeClock()
    store = MemoryStore(clock)
    return clock, [Worker(store, clock, **options) for _ in range(count)]


async def _kept(store: MemoryStore) -> list[SharedReading]:
    return list((await store.read(ReadingsKept())).state.readings.values())


def test_workers_have_what_others_were_told() -> None:
    """What one reads the others have, by label and model, as it was; it is told once, and nobody tells it back."""

    async def play() -> None:
        _, (here, there) = workers(2)
        here.record(9)
        here.readings.record("openai", [(b"retry-after", b"7")], 429, label="eu")
        here.readings.record("google", [], 429, body=GOOGLE_DAY)
        await here.tell()
        await there.listen()
        assert there.readings.all() == here.readings.all()
        assert there.readings.all().keys() == {"openai", "openai/eu", "google@gemini-2.5-flash"}
        for _ in range(2):
            for each in (here, there):
                await each.listen()
                await each.tell()
        assert (len(here.told), len(there.told)) == (1, 0)

    asyncio.run(play())


_events = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["limits", "wait", "tell", "listen", "pass"]),
        st.sampled_from([0.0, 0.25, 3.0, 50.0]),
        st.integers(0, 99),
    ),
    max_size=25,
)


@settings(max_examples=40)
@given(_events)
def test_in_any_order_all_have_the_newest_in_the_end(events: list[tuple[int, str, float, int]]) -> None:
    """However answers, telling and listening come about, the newest answer of each part is everybody's in the end."""

    async def play() -> None:
        clock, three = workers(3)
        newest: dict[str, tuple[float, int]] = {}
        started: set[float] = set()
        for who, kind, seconds, number in events:
            worker, at = three[who], clock() - seconds
            if kind == "pass":
                clock.advance(seconds)
            elif kind == "tell":
                await worker.tell()
            elif kind == "listen":
                await worker.listen()
            elif at not in started:
                # At the same start the later to arrive counts, which is another one for each.
                started.add(at)
                name = b"x-ratelimit-remaining-requests" if kind == "limits" else b"retry-after"
                worker.readings.record("openai", [(name, str(number).encode())], 200, at)
                newest[kind] = max(newest.get(kind, (0.0, 0)), (at, number))
        for _ in range(2):
            for worker in three:
                await worker.tell()
            for worker in three:
                await worker.listen()
        latest = [worker.readings.latest("openai") for worker in three]
        if not newest:
            assert latest == [None] * 3
            return
        assert latest[0] is not None
        assert latest[1:] == [latest[0]] * 2
        assert latest[0].observed_at == max(at for at, _ in newest.values())
        if "limits" in newest:
            assert (latest[0].limits_observed_at, latest[0].limits[0].remaining) == newest["limits"]

    asyncio.run(play())


def test_clock_that_is_ahead_silences_nobody() -> None:
    """A worker whose clock is ahead tells its reading once, and not again over what others were told behind it."""

    async def play() -> None:
        clock, (right,) = workers(1)
        ahead = Worker(right.store, clock, ahead_s=30.0)
        ahead.record(9)
        await ahead.tell()
        right.record(5)
        await right.tell()
        for _ in range(3):
            await ahead.listen()
            await ahead.tell()
        assert len(ahead.told) == 1
        (fresh,) = workers(1)[1]
        fresh.store = right.store
        await fresh.listen()
        latest = fresh.readings.latest("openai")
        assert latest is not None
        assert latest.limits[0].remaining == 5

    asyncio.run(play())


def test_tell_seldom_and_listen_while_it_is_of_use() -> None:
    """Hundreds of readings are one telling; who neither decides by readings nor told any lately listens but once."""

    async def play() -> None:
        clock, (busy, idle) = workers(2, is_used=False)
        assert await busy.turn()
        assert (busy.looks, await busy.turn()) == (1, False)
        for left in range(9, 0, -1):
            clock.advance(TELL_EVERY_S / 10)
            busy.record(left)
            await busy.turn()
        assert len(busy.told) == 1
        clock.advance(TELL_EVERY_S)
        assert await busy.turn()
        assert [
            json.loads(part.told)["limits"][0]["remaining"] for share in busy.told for part in share.readings[1:]
        ] == [9, 1]
        assert not await busy.turn()
        clock.advance(LISTEN_EVERY_S)
        assert await busy.turn()
        assert busy.looks == 2
        clock.advance(LISTEN_FOR_S)
        assert not await busy.turn()
        assert (await idle.turn(), idle.looks) == (True, 1)
        for _ in range(2):
            clock.advance(1e6)
            await idle.turn()
        assert (idle.looks, idle.told) == (1, [])
        clock, (deciding,) = workers(1)
        for looks in (1, 2, 3):
            clock.advance(1e6)
            assert (await deciding.turn(), deciding.looks) == (True, looks)

    asyncio.run(play())


def test_one_loop_at_a_time() -> None:
    """Event loops take turns, and a turn whose loop has died is over after a while."""
    clock, (worker,) = workers(1)
    assert worker.sharing.begins()
    assert not worker.sharing.begins()
    clock.advance(STUCK_S)
    assert worker.sharing.begins()
    worker.sharing.ended()
    assert worker.sharing.begins()


@pytest.mark.parametrize("failure", [StoreUnavailableError("It is down."), TimeoutError()])
def test_store_that_does_not_answer_is_asked_again_later(failure: Exception) -> None:
    """Nothing is raised and nothing piles up; what was not told is told when it answers, as it is by then (X.6)."""

    async def play() -> None:
        clock, (worker,) = workers(1)
        worker.record(9)
        worker.failure = failure
        assert await worker.turn()
        assert not await worker.turn()
        clock.advance(PAUSE_S)
        worker.record(8)
        worker.failure = None
        assert await worker.turn()
        (share,) = worker.told
        assert [part.part for part in share.readings] == ["status", "limits"]
        assert json.loads(share.readings[1].told)["limits"][0]["remaining"] == 8

    asyncio.run(play())


@pytest.mark.parametrize("failure", [UnwritableError("Share is unknown."), KeyError("Share"), ConfigurationError("no")])
def test_store_that_has_no_readings_is_left_alone(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """A store of somebody's own that does not know the operation is asked once, and one warning says so."""

    async def play() -> None:
        clock, (worker,) = workers(1)
        worker.record(9)
        worker.failure = failure
        assert await worker.turn()
        clock.advance(1e6)
        worker.record(8)
        assert not await worker.turn()
        assert not worker.sharing.has_news

    with caplog.at_level(logging.WARNING, "asgi_metering.quotas"):
        asyncio.run(play())
    (said,) = caplog.messages
    assert said.startswith("The readings of upstream quotas are not shared: ")


def test_many_series_are_told_in_parts() -> None:
    """As many as there can be are told in as many operations as they take, and all of them arrive."""

    async def play() -> None:
        _, (here, there) = workers(2)
        for number in range(MAX_SERIES):
            here.record(number, ago=float(number), label=f"key_{number}")
        await here.tell()
        assert [len(share.readings) for share in here.told] == [MAX_SHARED] * (2 * MAX_SERIES // MAX_SHARED)
        await there.listen()
        assert there.readings.all() == here.readings.all()

    asyncio.run(play())


def test_largest_reading_fits() -> None:
    """As many limits as a reading can have, with names and words as long as they can be, are kept (S1.40)."""
    limit = QuotaLimit(
        resource="r" * 64,
        limit=2**53 - 1,
        remaining=2**53 - 1,
        reset_at=1_800_000_000.123456,
        state="s" * 64,
    )
    largest = Reading(
        provider="p" * 64, dialect="openai", observed_at=1.0, limits=(limit,) * MAX_LIMITS, limits_observed_at=1.0
    )
    parts = parts_of(f"{'p' * 64}/{'l' * 64}", largest)
    assert [part.part for part in parts] == ["status", "limits"]
    assert len(parts[1].told) < MAX_TOLD


def test_what_no_store_keeps_is_not_told() -> None:
    """A reading of a time that is none stays in its process, and costs the others nothing."""

    async def play() -> None:
        _, (here, there) = workers(2)
        here.record(9, ago=float("inf"))
        here.record(7, label="eu")
        await here.tell()
        await there.listen()
        assert there.readings.all().keys() == {"openai/eu"}

    asyncio.run(play())


def test_rows_of_another_version_are_passed_over() -> None:
    """What cannot be read is left alone; limits without the answer that brought them are nothing yet (S1.39)."""

    async def play() -> None:
        clock, (worker,) = workers(1)
        odd = SharedReading("odd", "status", clock(), '{"provider":1}')
        named = SharedReading("acme", "status", clock(), parts_of("x", _reading(provider="no name"))[0].told)
        deep = SharedReading("deep", "status", clock(), "[" * MAX_TOLD)
        alone = SharedReading("groq", "limits", clock(), '{"limits":[]}')
        other = parts_of("xai", _reading(provider="xai"))[0]
        worker.store.run_now(Share((odd, named, deep, alone, other, other._replace(part="limits", told="[1]"))))
        worker.store.run_now(Share((other._replace(series="xai/eu"),)))
        await worker.listen()
        assert worker.readings.all().keys() == {"xai/eu"}

    asyncio.run(play())


def _reading(**changed: Any) -> Reading:
    return Reading(**{"provider": "acme", "dialect": "openai", "observed_at": 1.0, "status": 200, **changed})


def test_nothing_but_what_a_reading_shows_is_told() -> None:
    """A header that is no quota, and whatever it says, is in no row (S1.50, X.9)."""

    async def play() -> None:
        _, (worker,) = workers(1)
        secret = [(b"set-cookie", b"s3cret"), (b"openai-organization", b"s3cret"), (b"authorization", b"s3cret")]
        worker.readings.record("openai", [*secret, (b"x-ratelimit-remaining-requests", b"7")], 200)
        await worker.tell()
        kept = await _kept(worker.store)
        assert len(kept) == 2
        assert "s3cret" not in str(kept)

    asyncio.run(play())


# -- in a metering -----------------------------------------------------------------------------------------


class Shared(Gated):
    """The gated store as if other processes used it, too."""

    shared = True


def tell(metering: Metering, left: int) -> None:
    """A provider's answer that came just now."""
    fields = [(b"x-ratelimit-remaining-requests", str(left).encode()), (b"x-ratelimit-reset-requests", b"30s")]
    metering.quotas.record("openai", fields, 200)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have everybody share at every tick, and tick often."""
    monkeypatch.setattr("asgi_metering.heartbeats.TICK_S", 0.001)
    for name in ("TELL_EVERY_S", "LISTEN_EVERY_S", "PAUSE_S"):
        monkeypatch.setattr(f"asgi_metering.sharing.{name}", 0.0)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["down", "silent"])
def test_store_that_is_down_reaches_no_request(how: str) -> None:
    """Requests are answered while readings cannot be told, nothing waits in a row, and it is told afterwards (X.6)."""

    async def play() -> None:
        store = Shared()
        async with used(store) as metering:
            metering.end_timeout_s = 0.02
            app = metered(metering, requires_upstream("openai"))
            setattr(store, how, True)
            for left in range(20, 0, -1):
                tell(metering, left)
                assert status((await call(app)).log) == 200
                await asyncio.sleep(0.001)
            assert metering.runtime().pump.waiting == 0
            setattr(store, how, False)
            store.let.set()

            async def is_told() -> bool:
                return any('"remaining":1,' in row.told for row in await _kept(store))

            await until(is_told)

    asyncio.run(play())


def test_shutdown_tells_the_last_readings() -> None:
    """What came since the last telling is kept when the process stops; a store that is silent keeps nobody (S2.21)."""

    async def play() -> None:
        store = Shared()
        async with used(store) as metering:
            tell(metering, 3)
        assert [row.part for row in await _kept(store)] == ["status", "limits"]

    asyncio.run(play())


def test_shutdown_waits_for_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is down or silent holds no shutdown for a reading's sake."""
    monkeypatch.setattr("asgi_metering.runtime.LAST_READINGS_S", 0.01)
    monkeypatch.setattr("asgi_metering.runtime.BOOK_S", 0.05)

    async def play(how: str) -> None:
        store = Shared()
        metering = Metering(store, sinks=(), drain_s=0.05)
        await metering.start()
        setattr(store, how, True)
        tell(metering, 3)
        await metering.stop()
        assert await _kept(store) == []

    asyncio.run(play("down"))
    asyncio.run(play("silent"))


@pytest.mark.usefixtures("quick")
def test_open_metering_shares_without_a_call() -> None:
    """A process that only calls providers tells others as long as its metering is open, and before that nobody."""

    async def play() -> None:
        store = Shared()
        metering = Metering(store, sinks=())

        async def told() -> bool:
            return bool(await _kept(store))

        answer = httpx2.Response(200, headers={"x-ratelimit-remaining-requests": "3"}, json={})
        async with metering.upstream_client("openai", wrap=httpx2.MockTransport(lambda _: answer)) as client:
            await client.get("http://provider/")
            assert metering.quotas.latest("openai") is not None
            assert await _kept(store) == []
            async with metering:
                await until(told)

    asyncio.run(play())


@pytest.mark.usefixtures("quick")
def test_share_nothing_where_that_is_said() -> None:
    """``share_readings=False`` keeps readings in their process; so does the memory store, which is of one process."""

    async def play() -> None:
        store = Shared()
        async with used(store, share_readings=False) as metering:
            assert metering.sharing is None
            tell(metering, 3)
            app = metered(metering, billable("0.1"))
            for _ in range(10):
                assert status((await call(app)).log) == 200
        assert await _kept(store) == []
        assert Metering(sinks=()).sharing is None
        with pytest.raises(ConfigurationError, match="share_readings"):
            Metering(share_readings="no")  # type: ignore[arg-type]

    asyncio.run(play())


def test_endpoints_that_require_an_upstream_listen_from_the_start() -> None:
    """Whoever decides by readings listens before the first request asks; nobody else does for ever."""

    async def play() -> None:
        for parts, is_used in (((requires_upstream("openai"),), True), ((billable("0.1"),), False)):
            metering = Metering(Shared(), sinks=())
            app = metered(metering, *parts)
            examined({"type": "lifespan"}, [app])
            assert metering._reads_quotas() is is_used
        metering.headroom.look("openai")
        assert metering._reads_quotas()
        assert Metering(Shared(), sinks=(), packages=[])._reads_quotas()

    asyncio.run(play())
