"""The poller, against a server on loopback that answers as providers do."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.balances import ENDPOINTS
from asgi_metering.testing import FakeClock
from asgi_metering.testing.provider.balances import Balances
from asgi_metering.tracking import Endpoint, Found
from asgi_metering.upstream.poller import MAX_ANSWER, QuotaPoller
from asgi_metering.upstream.tracker import QuotaTracker
from asgi_metering.upstream.turns import Turn
from tests.harness.servers import serve_in_thread
from tests.upstream.test_usage_log import clock

KEY = "sk-very-secret"


class House:
    """A provider of balances behind a server, and a catalogue that names it."""

    def __init__(self, app: Balances, url: str, folder: Path) -> None:
        self.app, self.url, self.path = app, url, folder / "quotas.json"

    def package(self, path: str, **fields: Any) -> dict[str, Any]:
        """An entry that is polled at *path*."""
        return {"source": "api_poll", "poll": "deepseek", "url": self.url + path, "total_credits": 20, **fields}

    def poller(self, packages: dict[str, Any], **options: Any) -> QuotaPoller:
        """A poller of these packages, with a key for all of them."""
        self.path.write_text(json.dumps({"schema_version": "1.1", "_notes": ["mine"], "packages": packages}))
        environ = {endpoint.key_env: KEY for endpoint in ENDPOINTS.values()}
        return QuotaPoller(QuotaTracker(self.path, clock=clock), **{"environ": environ, "verify": False, **options})

    def written(self) -> Any:
        """The packages as they stand in the file."""
        return json.loads(self.path.read_text())["packages"]


class Wire:
    """A body as it goes over the wire, in one chunk."""

    def __init__(self, body: bytes) -> None:
        self.body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self.body


class Street:
    """One server for all tests, and whose house stands behind it."""

    def __init__(self) -> None:
        self.app = Balances(key=KEY)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.app(scope, receive, send)


@pytest.fixture(scope="module")
def street() -> Iterator[tuple[Street, str]]:
    """Serve until the last test has ended."""
    app = Street()
    with serve_in_thread(app) as server:
        yield app, server.url


@pytest.fixture
def house(street: tuple[Street, str], tmp_path: Path) -> House:
    """A provider of the test's own."""
    served, url = street
    served.app = Balances(key=KEY)
    return House(served.app, url, tmp_path)


KINDS = {
    "deepseek": ("/user/balance", (25, 10)),
    "openrouter": ("/api/v1/credits", (25, 10)),
    "moonshot": ("/v1/users/me/balance", (20, 5)),
    "siliconflow": ("/v1/user/info", (20, 5)),
    "kilocode": ("/api/profile/balance", (20, 5)),
    "novita": ("/openapi/v1/billing/balance/detail", (20, 5)),
    "vercel": ("/v1/credits", (25, 10)),
    "deepinfra": ("/payment/checklist?compute_owed=true", (20, 5)),
    "poe": ("/usage/current_balance", (20, 5)),
    "elevenlabs": ("/v1/user/subscription", (25, 10)),
    "minimax": ("/v1/token_plan/remains", (100, 85)),
    "generic": ("/generic", (15, 0)),
}


def test_poll_asks_every_kind_of_endpoint(house: House) -> None:
    """Each kind's answer, over real HTTP and with its key field, is what its package shows then (S1.21 to S1.29)."""
    packages = {kind: house.package(path, poll=kind) for kind, (path, _) in KINDS.items()}
    poller = house.poller(packages)
    results = asyncio.run(poller.poll())
    assert {each.package_id: (each.total, each.used) for each in results} == {
        kind: told for kind, (_, told) in KINDS.items()
    }
    assert all(each.is_ok and each.error is None for each in results)
    fields = dict(house.app.seen)
    assert fields["/v1/user/subscription"]["xi-api-key"] == KEY
    assert fields["/user/balance"]["authorization"] == f"Bearer {KEY}"
    entry = house.written()["deepseek"]
    assert (entry["total_credits"], entry["used_credits"], entry["confidence"]) == (25, 10, "high")
    assert entry["last_updated"] == "2025-08-21T12:40:00Z"
    assert json.loads(house.path.read_text())["_notes"] == ["mine"]


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity"])
def test_poll_reads_what_is_compressed(house: House, coding: str) -> None:
    """A balance may come compressed, whatever was asked for; in a coding that nobody here can undo it is none."""
    plain = json.dumps(
        {"balance_infos": [{"currency": "USD", "total_balance": "5", "topped_up_balance": "20"}]}
    ).encode()
    body = {"gzip": gzip.compress(plain), "deflate": zlib.compress(plain), "identity": plain}[coding]

    class Body(Wire, httpx2.AsyncByteStream):
        pass

    def answer(_request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, headers={"content-encoding": coding}, stream=Body(body))

    transport = httpx2.MockTransport(answer)
    (result,) = asyncio.run(house.poller({"d": house.package("/user/balance")}, transport=transport).poll())
    assert (result.total, result.used, result.error) == (20, 15, None)


@pytest.mark.parametrize("library", [httpx, httpx2])
@pytest.mark.parametrize(("coding", "told"), [("gzip", "more than 1048576 bytes"), ("compress", "cannot be decoded")])
def test_poll_never_expands_beyond_its_bound(house: House, coding: str, told: str, library: Any) -> None:
    """S1.31: an answer that expands to far more than a balance is given up at the bound, and never held as a whole."""
    bomb = gzip.compress(bytes(24 << 20))

    class Body(Wire, library.AsyncByteStream):  # type: ignore[misc,name-defined]
        pass

    def answer(_request: Any) -> Any:
        return library.Response(200, headers={"content-encoding": coding}, stream=Body(bomb))

    options = {"library": library.__name__, "transport": library.MockTransport(answer)}
    poller = house.poller({"d": house.package("/user/balance")}, **options)
    tracemalloc.start()
    try:
        (result,) = asyncio.run(poller.poll())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert told in str(result.error)
    assert most < 8 << 20


def test_refuse_a_catalogue_that_polls_cannot_be_written_into(tmp_path: Path) -> None:
    """A catalogue in TOML whose packages are polled fails when the poller is made, not after a poll (S1.30)."""
    path = tmp_path / "quotas.toml"
    entry = 'package_type = "credits"\nprovider_id = "deepseek"\n'
    path.write_text(f"[packages.d]\n{entry}source = 'api_poll'\n")
    with pytest.raises(ConfigurationError, match=r"quotas.toml is TOML.*'d'.*Keep it as JSON"):
        QuotaPoller(QuotaTracker(path, clock=clock))
    path.write_text(f"[packages.d]\n{entry}source = 'manual'\n")
    assert QuotaPoller(QuotaTracker(path, clock=clock)).pollable() == []


def test_poll_picks_up_a_top_up(house: House) -> None:
    """A success replaces total and use, whatever they were (S1.29)."""
    poller = house.poller({"d": house.package("/user/balance")})
    asyncio.run(poller.poll())
    house.app.total += 75
    asyncio.run(poller.poll())
    status = poller.tracker.status("d")
    assert status is not None
    assert (status.total, status.used, status.source, status.confidence) == (100, 10, "api_poll", "high")


def test_poll_asks_credits_that_are_polled_alone(house: House) -> None:
    """Packages of other sources and types are left alone (S1.21)."""
    poller = house.poller(
        {
            "manual": house.package("/user/balance", source="manual"),
            "window": house.package("/user/balance", package_type="daily"),
        }
    )
    assert poller.pollable() == asyncio.run(poller.poll()) == []
    assert house.app.seen == []


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"url": "/status/500"}, "/status/500 answered 500. Look at the key, and at the kind."),
        ({"url": "/redirect"}, "/redirect answered 307. Look at the key, and at the kind."),
        ({"url": "/text"}, "/text answered what is no JSON. Look at the address."),
        ({"url": "/huge"}, f"/huge answered more than {MAX_ANSWER} bytes. It is no balance."),
        ({"url": "/empty"}, "The answer has no 'balance_infos'. Look whether the key is one of DeepSeek."),
        ({"url": "http://127.0.0.1:1/closed"}, "127.0.0.1/closed was not reached: ConnectError. Look at the network."),
        ({"url": "http://example.com/x"}, "example.com/x is no https address"),
        ({"url": "http://[::1/x"}, "is no address"),
        ({"poll": "acme"}, "'acme' is no kind of balance endpoint. Set poll to one of deepseek, openrouter,"),
        ({"poll": "xai", "url": None}, "The kind 'xai' has no address of its own. Set the package's url."),
    ],
)
def test_poll_that_fails_keeps_the_numbers(
    house: House, caplog: pytest.LogCaptureFixture, change: dict[str, Any], error: str
) -> None:
    """Each way to fail keeps total, use and time, lowers the confidence, and writes nothing (S1.27, S1.28, S1.30)."""
    house.app.failures = {"/status/500": 500, "/redirect": 307}
    house.app.answers = {"/text": b"<html>", "/huge": b"1" * (MAX_ANSWER + 1), "/empty": {"balance_infos": []}}
    url = change.get("url", "/user/balance")
    if url is not None and url.startswith("/"):
        url = house.url + url
    known = {"total_credits": 20, "used_credits": 7, "confidence": "high", "last_updated": "2025-08-01T00:00:00Z"}
    poller = house.poller({"d": house.package("", **{**known, **change, "url": url})})
    before = house.path.read_bytes()
    with caplog.at_level(logging.WARNING):
        (result,) = asyncio.run(poller.poll())
    assert not result.is_ok
    assert error in str(result.error)
    assert (result.total, result.used) == (20, 7)
    status = poller.tracker.status("d")
    assert status is not None
    assert (status.used, status.confidence, status.last_updated) == (7, "low", "2025-08-01T00:00:00Z")
    assert house.path.read_bytes() == before
    assert KEY not in caplog.text
    assert all(path != "/elsewhere" for path, _ in house.app.seen)


def test_poll_with_a_key_that_is_no_header_value_says_nothing_of_it(house: House) -> None:
    """A transport's complaint about a header repeats its value, which stays out of the error."""
    poller = house.poller({"d": house.package("/user/balance")}, environ={"DEEPSEEK_API_KEY": "sk\nsecret"})
    unicode = house.poller({"d": house.package("/user/balance")}, environ={"DEEPSEEK_API_KEY": "sk\u2013secret"})
    for each in (poller, unicode):
        (result,) = asyncio.run(each.poll())
        assert not result.is_ok
        assert "secret" not in repr(result)


def test_poll_tries_addresses_in_order(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first address that tells wins; where none does, the failure is that of the last (S1.25)."""
    urls = (house.url + "/api/v1/credits", house.url + "/api/v1/key")
    both = {**ENDPOINTS, "openrouter": ENDPOINTS["openrouter"]._replace(urls=urls)}
    monkeypatch.setattr("asgi_metering.upstream.poller.ENDPOINTS", both)
    poller = house.poller({"o": house.package("", poll="openrouter", url=None)})
    house.app.failures = {"/api/v1/credits": 403}
    (result,) = asyncio.run(poller.poll())
    assert (result.is_ok, result.used) == (True, 10)
    house.app.failures["/api/v1/key"] = 500
    (result,) = asyncio.run(poller.poll())
    assert "/api/v1/key answered 500" in str(result.error)
    assert [path for path, _ in house.app.seen] == ["/api/v1/credits", "/api/v1/key"] * 2


def told_by_acme(payload: Any) -> Found:
    """A parser of one's own."""
    return Found(total=Decimal(payload["balance_infos"][1]["granted_balance"]), used=3.0)


def test_poll_asks_kinds_of_ones_own(house: House) -> None:
    """A kind with addresses, parser and key of one's own is polled as any other, before a known one (S1.21, S1.24)."""
    urls = (house.url + "/nowhere", house.url + "/user/balance")
    mine = {"acme": Endpoint(urls, told_by_acme, "ACME_KEY"), "deepseek": Endpoint((), told_by_acme, "OTHER_KEY")}
    packages = {
        "a": house.package("", provider_id="acme", poll=None, url=None),
        "d": house.package("/user/balance"),
    }
    poller = house.poller(packages, environ={"ACME_KEY": KEY}, keys={"deepseek": KEY}, endpoints=mine)
    results = asyncio.run(poller.poll())
    assert [(each.is_ok, each.used, each.error) for each in results] == [(True, 3, None)] * 2
    (result,) = asyncio.run(house.poller({"z": house.package("", poll="zeta", url=None)}, endpoints=mine).poll())
    assert "'zeta' is no kind of balance endpoint" in str(result.error)
    assert "acme" in str(result.error)


@pytest.mark.parametrize(
    ("parse", "error"),
    [
        (lambda payload: payload["no such field"], "could not be read: KeyError('no such field')"),
        (lambda payload: 12, "answered 12, and no Found"),
        (lambda payload: Found(), "neither what is used nor what is left"),
        (lambda payload: Found(total=Decimal(12)), "neither what is used nor what is left"),
        (lambda payload: Found(total=Decimal("NaN"), used=Decimal(1)), "the total NaN, which is no number"),
        (lambda payload: Found(used=-1), "the used -1, which is no number"),
        (lambda payload: Found(remaining="much"), "the remaining much, which is no number"),
    ],
    ids=["raises", "else", "empty", "total alone", "nan", "negative", "text"],
)
def test_poll_outlives_a_parser_of_ones_own(house: House, parse: Any, error: str) -> None:
    """Whatever such a parser raises or answers, its package keeps its numbers and no other is disturbed (S1.28)."""
    mine = {"acme": Endpoint((house.url + "/user/balance",), parse, "ACME_KEY")}
    packages = {"a": house.package("", poll="acme", url=None, used_credits=7), "d": house.package("/user/balance")}
    poller = house.poller(packages, keys={"acme": KEY}, endpoints=mine)
    failed, other = asyncio.run(poller.poll())
    assert other.is_ok
    assert (failed.is_ok, failed.total, failed.used) == (False, 20, 7)
    assert error in str(failed.error)


@pytest.mark.parametrize("endpoints", [{"acme": "https://acme.example"}, ["acme"], {3: None}])
def test_refuse_kinds_that_are_none(house: House, endpoints: Any) -> None:
    """A sentence says what may be passed (S1.21)."""
    with pytest.raises(ConfigurationError, match="Write endpoints="):
        house.poller({}, endpoints=endpoints)


def test_poll_without_a_key_is_skipped_with_one_warning(house: House, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody is asked, the package stays as it is, and the warning names the variable, once (S1.27)."""
    poller = house.poller({"d": house.package("/user/balance")}, environ={"DEEPSEEK_API_KEY": " "}, keys={})
    with caplog.at_level(logging.WARNING):
        results = [asyncio.run(poller.poll()) for _ in range(2)]
    assert [(each.is_ok, each.is_skipped) for (each,) in results] == [(False, True)] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "The package 'd' is not polled: there is no DEEPSEEK_API_KEY in the environment."
    ]
    status = poller.tracker.status("d")
    assert status is not None
    assert status.confidence == "medium"
    assert house.app.seen == []


@pytest.mark.parametrize(
    ("environ", "keys", "is_ok"),
    [
        ({"DEEPSEEK_API_KEY": KEY}, {"deepseek": "wrong"}, True),
        ({"DEEPSEEK_API_KEY": "wrong"}, {"deepseek": KEY}, False),
        ({}, {"deepseek": KEY}, True),
        ({}, {"deepseek": "wrong", "d": KEY}, True),
    ],
)
def test_key_of_the_environment_comes_first(
    house: House, environ: dict[str, str], keys: dict[str, str], is_ok: bool
) -> None:
    """The environment's, then the configured one of the package, then that of the kind (S1.27)."""
    poller = house.poller({"d": house.package("/user/balance")}, environ=environ, keys=keys)
    (result,) = asyncio.run(poller.poll())
    assert result.is_ok is is_ok
    own = house.poller({"d": house.package("/user/balance", api_key_env="MINE")}, environ={"MINE": KEY})
    assert asyncio.run(own.poll())[0].is_ok


def test_poll_writes_all_of_a_round_if_one_succeeded(house: House) -> None:
    """The failed one's confidence is written with it; one that was skipped stays as it was (S1.28, S1.30)."""
    house.app.failures = {"/bad": 500}
    packages = {
        "good": house.package("/user/balance"),
        "bad": house.package("/bad", used_credits=3, confidence="high"),
        "keyless": house.package("/user/balance", api_key_env="NOT_THERE"),
    }
    asyncio.run(house.poller(packages).poll())
    written = house.written()
    assert (written["good"]["used_credits"], written["good"]["confidence"]) == (10, "high")
    assert (written["bad"]["used_credits"], written["bad"]["confidence"]) == (3, "low")
    assert written["bad"]["last_updated"] is None
    assert written["keyless"] == packages["keyless"]


def test_poll_asks_at_most_four_at_a_time(house: House) -> None:
    """Of nine packages four are under way together, and never five (S1.31)."""
    running, most = 0, 0
    full = asyncio.Event()

    async def before(path: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 4:
            full.set()
        await full.wait()
        # A turn of the loop in which a fifth would come in.
        await asyncio.sleep(0.02)
        running -= 1

    house.app.before = before
    packages = {f"p{number}": house.package("/user/balance") for number in range(9)}
    results = asyncio.run(house.poller(packages).poll())
    assert all(each.is_ok for each in results)
    assert most == 4


def test_poll_that_trickles_is_given_up(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package has so many seconds in all (S1.31)."""
    monkeypatch.setattr("asgi_metering.upstream.poller.WHOLE_S", 0.05)

    async def before(path: str) -> None:
        await asyncio.sleep(0.3)

    house.app.before = before
    (result,) = asyncio.run(house.poller({"d": house.package("/user/balance")}).poll())
    assert result.error == "There was no answer within 0.05 s."


class Nap:
    """Sleeping on a clock that a test moves: notes each sleep, and ends after some."""

    def __init__(self, rounds: int) -> None:
        self.clock = FakeClock(0.0)
        self.slept: list[float] = []
        self._rounds = rounds

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) >= self._rounds:
            raise asyncio.CancelledError
        self.clock.advance(seconds)


def polled(house: House, packages: dict[str, Any], rounds: int, **options: Any) -> tuple[list[float], list[str]]:
    """Run so many rounds; the sleeps between them, and the paths that were asked."""
    nap = Nap(rounds)
    poller = house.poller(packages, clock=nap.clock, sleep=nap, **options)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(poller.run())
    return nap.slept, [path for path, _ in house.app.seen]


def test_run_polls_each_package_at_its_own_pace(house: House) -> None:
    """What expires within 14 days is asked every quarter of an hour, the other once an hour (S1.22, S1.23)."""
    house.app.answers = {path: {"total": 5, "used": 1} for path in ("/soon", "/today", "/late", "/never", "/gone")}
    dates = {
        "/soon": "2025-09-04",
        "/today": "2025-08-21",
        "/late": "2025-09-05",
        "/never": None,
        "/gone": "2025-08-20",
    }
    packages = {path: house.package(path, poll="generic", expiry_date=date) for path, date in dates.items()}
    slept, asked = polled(house, packages, 5)
    assert slept == [900.0] * 5
    assert {path: asked.count(path) for path in dates} == {
        "/soon": 5,
        "/today": 5,
        "/late": 2,
        "/never": 2,
        "/gone": 2,
    }


def test_run_with_intervals_of_ones_own(house: House) -> None:
    """Other intervals are kept as they are; without a startup poll the first comes an interval later (S1.22, S1.23)."""
    packages = {"d": house.package("/user/balance")}
    slept, asked = polled(house, packages, 3, interval_s=100.0, fast_lane_interval_s=7.0, on_startup=False)
    assert slept == [100.0] * 3
    assert len(asked) == 2
    with pytest.raises(ConfigurationError, match="interval_s=0 is no number of seconds from 1 up"):
        house.poller({}, interval_s=0)


def test_run_without_a_key_does_not_spin(house: House) -> None:
    """A package that cannot be asked is looked at once an interval, as the others."""
    slept, asked = polled(house, {"d": house.package("/user/balance")}, 3, environ={})
    assert (slept, asked) == ([3600.0] * 3, [])


def test_run_goes_on_after_a_failing_round(
    house: House, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that fails as a whole, the first included, is logged, and the next one comes (S1.32)."""
    nap = Nap(3)
    poller = house.poller({"d": house.package("/user/balance")}, clock=nap.clock, sleep=nap)

    def full(_source: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        asyncio.run(poller.run())
    assert "A round of polls failed" in caplog.text
    assert len(nap.slept) == 3


def test_poller_lives_as_long_as_its_block(house: House) -> None:
    """The block's end cancels and awaits it, amid an answer too; disabled it never starts (S1.22, S1.32)."""

    async def play(**options: Any) -> set[str]:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        async def before(path: str) -> None:
            loop.call_soon_threadsafe(begun.set)
            await asyncio.sleep(0.2)

        house.app.before = before
        async with house.poller({"d": house.package("/user/balance")}, **options) as poller:
            async with poller:
                pass
            if options.get("enabled"):
                async with poller:
                    await begun.wait()
        return {task.get_name() for task in asyncio.all_tasks()} & {"asgi_metering polls"}

    assert asyncio.run(play()) == set()
    assert house.app.seen == []
    assert asyncio.run(play(enabled=True)) == set()
    assert house.app.seen


def test_one_of_several_workers_polls(house: House) -> None:
    """Two pollers of one file ask once in a round, and the second goes on when the first has stopped (S1.30, S1.41)."""
    packages = {"d": house.package("/user/balance")}
    first = house.poller(packages)
    second = house.poller(packages)

    async def play() -> None:
        async with first, second:
            await first._round()
            assert await second._round() == 900.0
            assert len(house.app.seen) == 1
            status = second.tracker.status("d")
            assert status is not None
            assert (status.used, status.confidence) == (10, "high")
        await second._round()
        assert len(house.app.seen) == 2
        await second.__aexit__(None, None, None)

    asyncio.run(play())


def test_turn_is_everybodys_where_no_lock_can_be_had(tmp_path: Path) -> None:
    """In a folder that cannot be written each process polls by itself."""
    turn = Turn(tmp_path / "missing" / "quotas.json")
    assert turn.take()
    assert turn.take()
    turn.give_back()


def test_poll_of_packages_without_a_file_writes_nowhere(house: House) -> None:
    """Packages of the code are polled too, and are known to the tracker alone."""
    known = house.poller({"d": house.package("/user/balance")})
    tracker = QuotaTracker(known.tracker.packages().values(), clock=clock)
    poller = QuotaPoller(tracker, environ={"DEEPSEEK_API_KEY": KEY}, verify=False)
    (result,) = asyncio.run(poller.poll())
    assert (result.total, result.used) == (25, 10)
    assert house.written()["d"]["total_credits"] == 20
