"""Every example runs, on real input, and charges what it says."""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from asgi_metering.testing import Provider
from tests.harness.servers import serve_in_thread
from tests.harness.warm import preload

pytestmark = pytest.mark.uncounted

preload()

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import an example afresh, in an empty folder, so that its SQLite file is its own."""
    monkeypatch.chdir(tmp_path)

    def load(name: str) -> Any:
        sys.modules.pop(f"examples.{name}", None)
        return importlib.import_module(f"examples.{name}")

    return load


class Running:
    """An example behind a real server, and a way to run coroutines on the server's own loop."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._loop: asyncio.AbstractEventLoop | None = None
        self.url = ""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The app, noting the loop that it runs on."""
        self._loop = asyncio.get_running_loop()
        await self._app(scope, receive, send)

    def run(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Run *work* where the example's server runs."""
        assert self._loop is not None

        async def awaited() -> Any:
            return await work()

        return asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(20)


@contextmanager
def running(app: Any, **config: Any) -> Iterator[Running]:
    """Serve *app* until the block ends, so configured."""
    caught = Running(app)
    with serve_in_thread(caught, **config) as server:
        caught.url = server.url
        yield caught


async def settled(metering: Any) -> None:
    """Wait until every call has been booked."""
    for _ in range(400):
        if not await metering.holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("holds are still live")


def test_quickstart_charges_a_search_and_fits_on_a_screen(example: Callable[[str], Any]) -> None:
    """The quickstart grants, charges 2 credits a search, answers 401 to strangers, and has at most 30 lines."""
    module = example("quickstart")
    with running(module.app) as server, httpx2.Client(base_url=server.url) as client:
        key = {"x-api-key": "secret-of-ada"}
        answers = [client.get("/search", params={"q": "tea"}, headers=headers) for headers in (key, {})]
        server.run(lambda: settled(module.metering))
        balance = server.run(lambda: module.metering.balance("ada"))
    lines = [line for line in (EXAMPLES / "quickstart.py").read_text().splitlines() if line.strip()]
    assert [answer.status_code for answer in answers] == [200, 401]
    assert module.metering.unit.text(balance.available) == "98"
    assert len(lines) <= 30


def test_llm_gateway_charges_what_the_provider_reported(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway streams through the OpenAI SDK, charges the reported tokens, and knows the provider's quota."""
    with serve_in_thread(Provider()) as provider:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{provider.url}/v1")
        monkeypatch.setenv("METERING_STORE", "memory://")
        module = example("llm_gateway")
        with running(module.app) as server, httpx2.Client(base_url=server.url, timeout=20) as client:
            server.run(lambda: module.metering.grant("ada", 1, id="g"))
            body = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20}
            answer = client.post("/chat", json=body, headers={"x-api-key": "key-of-ada"})
            refused = client.post("/chat", json=body, headers={"x-api-key": "key-of-bob"})
            stranger = client.post("/chat", json=body, headers={"x-api-key": "ada", "x-user": "ada"})
            quota = client.get("/quota").json()
            server.run(lambda: settled(module.metering))
            lines = server.run(lambda: _statement(module.metering, "ada"))
    assert answer.status_code == 200
    assert len(answer.text.split()) == 20
    assert (refused.status_code, stranger.status_code) == (402, 401)
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert [line.basis for line in lines] == [None, "usage"]
    assert lines[1].amount >= 20 * 15
    assert quota["provider"] == "openai"


def test_use_or_lose_moves_calls_to_credits_that_would_expire(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fuller provider is asked first; once the other's credits have a burn and would outlive it, those are used."""
    soon = (datetime.now(UTC) + timedelta(days=10)).date().isoformat()
    packages = {
        "prepaid": {"provider_id": "deepseek", "total_credits": 25},
        "bonus": {"provider_id": "kilo", "total_credits": 25, "used_credits": 12, "expiry_date": soon},
    }
    Path("quotas.json").write_text(json.dumps({"packages": packages}))
    deepseek, kilo = Provider(requests_per_minute=1), Provider()
    with serve_in_thread(deepseek) as first, serve_in_thread(kilo) as second:
        monkeypatch.setenv("DEEPSEEK_URL", f"{first.url}/v1")
        monkeypatch.setenv("KILO_URL", f"{second.url}/v1")
        monkeypatch.setenv("METERING_STORE", "memory://")
        monkeypatch.setenv("STAFF_KEY", "staff")
        module = example("use_or_lose")
        body = {"model": "echo:words-2:no-quota", "messages": [{"role": "user", "content": "Hi"}]}
        user = {"x-api-key": "key-of-ada"}
        with running(module.app) as server, httpx2.Client(base_url=server.url, timeout=20) as client:
            server.run(lambda: module.metering.grant("ada", 1, id="g"))
            asked = [client.post("/chat", json=body, headers=user).json()["provider"] for _ in range(2)]
            server.run(lambda: _burning(module.tracker, "bonus"))
            asked.append(client.post("/chat", json=body, headers=user).json()["provider"])
            shown = client.get("/quotas/", headers={"x-staff": "staff"}).json()
            hidden = client.get("/quotas/").status_code
        module.tracker.log.close()
    assert asked == ["deepseek", "kilo", "kilo"]
    assert [seen.status for seen in deepseek.requests] == [200, 429]
    assert [seen.status for seen in kilo.requests] == [200, 200]
    assert {each["package_id"]: each["alert"] for each in shown["packages"]} == {
        "prepaid": "ok",
        "bonus": "use_or_lose",
    }
    assert hidden == 403


async def _burning(tracker: Any, package_id: str) -> None:
    """Wait until the usage of a call has been counted for a package."""
    for _ in range(400):
        if tracker.status(package_id).burn_per_day is not None:
            return
        await asyncio.sleep(0.01)
    raise AssertionError("no usage event was counted")


def test_two_providers_are_charged_as_one_call(example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three answers of two providers are one charge, and its event says what each model used (S3.22, S3.27)."""
    provider = Provider()
    with serve_in_thread(provider) as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream.url}/v1")
        monkeypatch.setenv("ANTHROPIC_BASE_URL", upstream.url)
        monkeypatch.setenv("METERING_STORE", "memory://")
        module = example("two_providers")
        with running(module.app) as server, httpx2.Client(base_url=server.url, timeout=20) as client:
            server.run(lambda: module.metering.grant("ada", 1, id="g"))
            answer = client.post("/essays", json={"text": "rivers"}, headers={"x-api-key": "key-of-ada"})
            server.run(lambda: settled(module.metering))
    assert answer.status_code == 200
    counts = [seen.counts for seen in provider.requests if seen.counts is not None]
    assert len(counts) == 3
    (event,) = module.events
    assert (event.usage.input, event.usage.output) == (sum(each.input for each in counts), 60)
    assert event.attributes["metering.models"].count('"calls"') == 2


def test_growing_hold_streams_until_nothing_is_left(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SDK reads every word that was paid for, then raises its own error; the provider is stopped, a book cut."""
    provider = Provider()
    with serve_in_thread(provider) as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream.url}/v1")
        monkeypatch.setenv("METERING_STORE", "memory://")
        module = example("growing_hold")
        with running(module.app) as server, openai.OpenAI(api_key="-", base_url=server.url, max_retries=0) as client:
            server.run(lambda: module.metering.grant("ada", "0.0061", id="g"))
            server.run(lambda: module.metering.grant("bob", "0.004", id="g"))
            words: list[Any] = []
            with pytest.raises(openai.APIError) as cut:
                words.extend(
                    client.chat.completions.create(
                        model="echo:endless:slow-1",
                        messages=[{"role": "user", "content": "Hi"}],
                        stream=True,
                        extra_headers={"x-api-key": "key-of-ada"},
                    )
                )
            (seen,) = provider.requests
            assert seen.ended.wait(20)
            server.run(lambda: settled(module.metering))
            (_, line) = server.run(lambda: _statement(module.metering, "ada"))
            chapters = server.run(lambda: module.write_chapters("bob", ["one", "two"] * 20))
            book = server.run(lambda: _statement(module.metering, "bob"))[-1]
    assert cut.value.code == "insufficient_quota"
    assert 400 <= len(words) < 800
    assert seen.client_disconnected
    assert (str(line.basis), str(book.basis)) == ("observed", "observed")
    assert 2 <= len(chapters) < 40
    assert chapters[-1].startswith("To be continued")


async def _statement(metering: Any, payer: str) -> list[Any]:
    return [entry async for entry in metering.statement(payer)]


def test_plain_asgi_is_metered_as_a_whole_and_at_a_point_of_its_choosing(example: Callable[[str], Any]) -> None:
    """Without a framework, a whole app costs a fixed price, and another asks for admission itself."""
    module = example("plain_asgi")
    with running(module.app) as server, httpx2.Client(base_url=server.url) as client:
        server.run(lambda: module.metering.grant("ada", 4, id="g"))
        user = {"x-api-key": "key-of-ada"}
        statuses = [
            client.get(path, headers=user).status_code for path in ("/thumbnails/1", "/reports?3", "/reports?2")
        ]
        server.run(lambda: settled(module.metering))
        balance = server.run(lambda: module.metering.balance("ada"))
    assert statuses == [200, 200, 402]
    assert module.metering.unit.text(balance.available) == "0.5"


def test_websocket_chat_charges_each_message_and_closes_who_runs_dry(example: Callable[[str], Any]) -> None:
    """Three credits are three messages; the fourth closes the chat with 4402, and nobody known is refused with 401."""
    module = example("websocket_chat")
    with running(module.app, ws="websockets-sansio") as server:
        url = server.url.replace("http://", "ws://")
        with connect(f"{url}/chat?key=key-of-ada", proxy=None) as chat:
            for text in "abc":
                chat.send(text)
                assert chat.recv(10) == f"You said {text!r}."
            chat.send("d")
            with pytest.raises(ConnectionClosed) as closed:
                chat.recv(10)
        with pytest.raises(InvalidStatus) as refused, connect(f"{url}/voice", proxy=None):
            pass
        server.run(lambda: settled(module.metering))
        balance = server.run(lambda: module.metering.balance("ada"))
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 4402
    assert refused.value.response.status_code == 401
    assert balance.settled == module.metering.unit.parts(3)


def test_background_job_charges_who_can_pay_and_refuses_who_cannot(
    example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The job charges recorded tokens to the payer that has credits, and does not run for the other."""
    asyncio.run(example("background_job").main())
    assert capsys.readouterr().out.splitlines() == [
        "org_7 Welcome to the show.",
        "org_8 cannot pay: insufficient_credits",
        "org_7 has 0.8173 credits left",
    ]


def test_topup_webhook_grants_each_payment_once(example: Callable[[str], Any]) -> None:
    """The same webhook grants once, the same id with another amount is a conflict, a forged one is refused."""
    module = example("topup_webhook")
    payment = {"id": "pay_1", "customer": "ada", "credits": "12.5", "paid_at": "2026-11-22T10:00:00Z"}
    good, forged = {"x-signature": module.SECRET}, {"x-signature": "x"}
    with running(module.app) as server, httpx2.Client(base_url=server.url) as client:
        answers = [
            client.post("/webhooks/payments", json={**payment, **change}, headers=headers)
            for change, headers in (({}, good), ({}, good), ({"credits": "99"}, good), ({}, forged))
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 409, 401]
    assert [answer.json() for answer in answers[:2]] == [
        {"granted": True, "available": "12.5"},
        {"granted": False, "available": "12.5"},
    ]


def test_from_slowapi_limits_as_before_and_charges_beside_it(example: Callable[[str], Any]) -> None:
    """Adopted limits count old, new, included and streamed routes; what a limit refuses is not charged."""
    module = example("from_slowapi")
    with (
        running(module.app) as server,
        httpx2.Client(base_url=server.url, headers={"x-api-key": "key-of-ada"}) as client,
    ):
        server.run(lambda: module.metering.grant("ada", 100, id="g"))
        statuses = {
            path: [client.get(path).status_code for _ in range(4)]
            for path in ("/old", "/answers?q=tea", "/v1/words", "/v1/health")
        }
        module.limiter.reset()
        answer, stranger = client.get("/old"), client.get("/answers?q=tea", headers={"x-api-key": ""})
        streamed = client.get("/v1/words").text
        server.run(lambda: settled(module.metering))
        balance = server.run(lambda: module.metering.balance("ada"))
    assert statuses == {
        "/old": [200, 200, 429, 429],
        "/answers?q=tea": [200, 200, 429, 429],
        "/v1/words": [200, 200, 200, 429],
        "/v1/health": [200] * 4,
    }
    assert (answer.headers["x-ratelimit-remaining"], streamed, stranger.status_code) == ("1", "one two three", 401)
    assert module.metering.unit.text(balance.available) == "96"


def test_faults_in_tests_are_tests_that_pass(example: Callable[[str], Any], tmp_path: Path) -> None:
    """The tests that show the fault kit pass: after a killed worker, a client that left, and a store that was down."""
    module = example("faults_in_tests")
    module.test_killed_worker_costs_nobody_anything(tmp_path)
    module.test_client_that_hangs_up_pays_for_what_it_got()
    module.test_store_that_is_down_lets_nobody_in_for_free()


def test_priced_by_model_charges_each_model_its_own_price(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is charged its own price with the markup, clamped to what is held, and images by what is asked for."""
    provider = Provider()
    with serve_in_thread(provider) as upstream:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{upstream.url}/v1")
        monkeypatch.setenv("METERING_STORE", "memory://")
        module = example("priced_by_model")
        with running(module.app) as server, httpx2.Client(base_url=server.url, timeout=20) as client:
            server.run(lambda: module.metering.grant("ada", "0.3", id="g"))
            body = {"model": "echo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 15}
            answer = client.post("/v1/chat/completions", json=body, headers={"x-api-key": "key-of-ada"})
            server.run(lambda: settled(module.metering))
            image = {"prompt": "a cat", "size": "1024x1024", "n": 2}
            drawn = [
                client.post("/v1/images/generations", json=image, headers={"x-api-key": "key-of-ada"}) for _ in range(2)
            ]
            server.run(lambda: settled(module.metering))
            lines = server.run(lambda: _statement(module.metering, "ada"))
    usage = answer.json()["usage"]
    cost = (usage["prompt_tokens"] * 100 + usage["completion_tokens"] * 400) * 120
    # Six tokens of the prompt were expected at 0.012 each; what is left of 0.3 pays four at 0.048.
    assert usage["completion_tokens"] == 4
    assert [(line.line, line.amount) for line in lines[1:]] == [("chat", cost)]
    assert [each.status_code for each in drawn] == [402, 402]
