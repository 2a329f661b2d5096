"""What each layer answers without the store, and what is limited locally meanwhile (X.6)."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from asgi_metering import (
    Metering,
    TokenUsage,
    billable,
    current_call,
    rate_limited,
)
from asgi_metering.asgi.audit import audit
from asgi_metering.errors import ConfigurationError
from asgi_metering.outage import MAX_LOCAL_KEYS, LocalLimits
from asgi_metering.prices import per_token
from asgi_metering.stores.breaker import FAILURES
from tests.harness.drive import Drive, body, headers, http_scope, status
from tests.outage.gated import CREDIT, Gated, back, call, identify, metered, settled, until, used


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


def test_name_the_level_that_refused_locally() -> None:
    """S0.42, X.6: a hierarchy names the level that refused without the store as with it."""

    async def play() -> None:
        store = Gated()
        async with used(store, on_store_down={"rates": "local"}) as metering:
            app = metered(metering, rate_limited(levels={"payer": "1/day", "caller": "9/day"}))
            for store.down in (False, True):
                ended = [await call(app) for _ in range(2)]
                assert [status(each.log) for each in ended] == [200, 429]
                assert json.loads(body(ended[1].log))["level"] == "payer"

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


def test_identify_is_what_these_tests_use() -> None:
    """The caller that a request names pays."""
    assert identify(type("C", (), {"headers": {"x-who": "bob"}})()).payer == "bob"
