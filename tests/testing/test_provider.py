"""How the bundled provider behaves: models that fail on demand, clients that leave, and its life."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from typing import TYPE_CHECKING, Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

import asgi_metering.testing
from asgi_metering.testing import provider as provider_package
from asgi_metering.testing.provider import BEHAVIOURS, Provider, SeenRequest, answer_text
from asgi_metering.testing.provider.behaviour import UnknownBehaviourError, read_model
from asgi_metering.tokens import ENCODINGS, count_tokens
from tests.harness.clients import HttpClient
from tests.harness.drive import body, drive, http_scope, lifespan, status, websocket_scope
from tests.harness.servers import serve
from tests.harness.waiting import wait_until

if TYPE_CHECKING:
    pass
from tests.testing.support import ANTHROPIC, CHAT, KEYS, NOW, PROMPT, RESPONSES, Live, ask, payload, streamed


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("words", [1, 2, 44, 45, 500])
def test_each_word_is_one_token(encoding: str, words: int) -> None:
    """The text has as many tokens as words in both encodings, so that counted deltas and reported usage agree."""
    assert count_tokens(answer_text(words), encoding).tokens == words


def test_count_with_another_tokenizer() -> None:
    """`count` replaces the tokenizer for prompt and answer alike."""
    usage = ask(Provider(count=len), CHAT, payload(CHAT, "echo:words-2")).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(f"Be brief.\n{PROMPT}"), len(answer_text(2)))


def test_a_maximum_smaller_than_the_thought_leaves_no_text() -> None:
    """Reasoning counts towards the maximum: nothing is left to say, and the answer was truncated."""
    answer = ask(Provider(), CHAT, payload(CHAT, "echo:reasoning-30", max_tokens=12)).json()
    assert (answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"]) == ("", "length")
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == 12


# Model names


def test_the_table_names_every_behaviour() -> None:
    """The docstring's table and the grammar know the same names."""
    names = re.findall(r"^``([a-z-]+?)(?:-[A-Z]+)*``", provider_package.__doc__ or "", re.MULTILINE)
    assert sorted(set(names)) == sorted(BEHAVIOURS)


def test_behaviours_combine_in_any_order() -> None:
    """Parts combine, numbers have defaults, and the base name stays what it was."""
    one, other = read_model("gpt-5.5:slow:cut-after-3:words-9"), read_model("gpt-5.5:words-9:cut-after-3:slow-50")
    assert one == other
    assert (one.model, one.pause_s, one.words) == ("gpt-5.5", 0.05, 9)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "has no base name"),
        (":slow", "has no base name"),
        ("echo:", "No behaviour is called ''"),
        ("echo:fast", "Choose from: words, slow"),
        ("ft:gpt-4o:org", "No behaviour is called 'gpt-4o'"),
        ("echo:words", "needs a number from 0 to 30000 here, not None"),
        ("echo:words-30001", "needs a number from 0 to 30000 here, not 30001"),
        ("echo:error-200", "needs a number from 400 to 599"),
        ("echo:slow-1-2", "takes 1 numbers"),
        ("echo:usage-1", "needs a number"),
        ("echo:cut-after-1:stall-after-2", "contradicts"),
        ("echo:slow:slow", "contradicts"),
        ("echo:words-99999999999999999999", "No behaviour is called"),
    ],
)
def test_refuse_model_names_that_mean_nothing(name: str, reason: str) -> None:
    """An unknown, unbounded or contradicting part is an error that says what is wrong and what there is."""
    with pytest.raises(UnknownBehaviourError, match=re.escape(reason)):
        read_model(name)


# Clients that leave, pauses, scopes


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize("fault", ["disconnect_at", "raise_at"])
def test_see_the_client_leave_a_stream(spec_version: str, fault: str) -> None:
    """A disconnect is seen as a message and as an `OSError` of `send`; the stream stops at once."""
    provider = Provider()
    fault_at: Any = {fault: 6}
    run = streamed(CHAT, "echo:endless", provider=provider, spec_version=spec_version, **fault_at)
    seen = provider.requests[0]
    assert (run.outcome, seen.client_disconnected, seen.finished) == ("returned", True, False)
    assert len(run.log) <= 8
    assert seen.ended.is_set()


def test_refuse_a_client_that_is_gone() -> None:
    """A refusal that nobody reads ends quietly, also where `send` raises."""
    provider = Provider()
    run = streamed(CHAT, "echo:error-500", provider=provider, raise_at=2)
    assert (run.outcome, status(run.log)) == ("returned", 500)
    assert provider.requests[0].ended.is_set()


@pytest.mark.parametrize("model", ["echo:stall-after-0", "echo:slow-60000"])
def test_see_the_client_leave_before_the_answer(live: Live, model: str) -> None:
    """A client that gives up on a JSON answer that does not come is seen, though nothing was sent yet."""
    with HttpClient(_port(live)) as client:
        count = len(live.provider.requests)
        client.send_request("POST", CHAT, headers=list(KEYS.items()), body=json.dumps(payload(CHAT, model)).encode())
        wait_until(lambda: len(live.provider.requests) > count and live.provider.requests[-1].counts)
        client.leave_fin()
    assert live.last().client_disconnected
    assert live.last().status is None


def test_see_the_client_leave_in_its_body(live: Live) -> None:
    """A client that leaves half-way through its own request is recorded without a body."""
    count = len(live.provider.requests)
    client = HttpClient(_port(live))
    client.send_request("POST", CHAT, headers=list(KEYS.items()), body=b" " * 1_000, stop_after=500)
    wait_until(lambda: len(live.provider.requests) > count)
    client.leave_rst()
    seen = live.last()
    assert (seen.client_disconnected, seen.body, seen.status) == (True, None, None)


def test_cut_a_json_answer_in_its_middle(live: Live) -> None:
    """A cut JSON answer announces its length and ends before it; no usage went out."""
    with HttpClient(_port(live)) as client:
        content = json.dumps(payload(CHAT, "echo:cut-after-1")).encode()
        client.send_request("POST", CHAT, headers=list(KEYS.items()), body=content)
        head = client.read_head()
        half = client.read_rest()
    assert (head.status, client.ended) == (200, "eof")
    assert len(half) == int(head.get("content-length") or 0) // 2
    assert (live.last().finished, live.last().usage_sent) == (False, False)


def test_cut_a_stream_after_its_last_delta() -> None:
    """A cut after as many deltas as there are words leaves out everything that would have followed them."""
    run = streamed(CHAT, "echo:words-2:cut-after-2")
    assert (run.outcome, run.complete.is_set()) == ("returned", False)
    assert b" river" in body([run.log[-1]])


def _port(live: Live) -> int:
    return int(live.url.rpartition(":")[2])


def test_slow_answers_pause_by_the_given_sleep() -> None:
    """A stream pauses before each delta, a JSON answer once for all its words; other answers never."""
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    provider = Provider(sleep=sleep)
    ask(provider, CHAT, payload(CHAT, "echo:slow-20:words-3", stream=True))
    ask(provider, CHAT, payload(CHAT, "echo:slow-250:words-4"))
    ask(provider, CHAT, payload(CHAT, "echo", stream=True))
    assert pauses == [0.02, 0.02, 0.02, 1.0]


def test_answers_are_the_same_for_the_same_requests() -> None:
    """Ids, times and texts follow from the requests alone: two providers with one clock answer alike."""
    logs = []
    for _ in range(2):
        provider = Provider(clock=lambda: NOW)
        logs.append([streamed(path, "echo", provider=provider).log for path in (CHAT, RESPONSES, ANTHROPIC)])
    assert logs[0] == logs[1]
    assert b"chatcmpl-000001" in body(logs[0][0])
    assert status(logs[0][0]) == 200


def test_remember_a_bounded_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest requests are forgotten beyond the bound, and numbers go on."""
    monkeypatch.setattr("asgi_metering.testing.provider.app.MAX_SEEN", 2)
    provider = Provider()
    for _ in range(3):
        ask(provider, CHAT, b"")
    assert [seen.number for seen in provider.requests] == [2, 3]
    assert isinstance(provider.requests[0].ended, threading.Event)


def test_answer_a_lifespan_and_close_a_websocket() -> None:
    """The provider starts and stops with its server, and takes no WebSocket."""

    async def run() -> None:
        async with lifespan(Provider()):
            pass
        closed = await drive(Provider(), websocket_scope(), messages=[{"type": "websocket.connect"}])
        assert [message["type"] for message in closed.log] == ["websocket.close"]

    asyncio.run(run())


def test_answer_below_a_mount() -> None:
    """Mounted in another application, the provider finds its paths below the mount."""
    outer = Starlette(routes=[Mount("/upstream", Provider())])
    scope = http_scope(f"/upstream{CHAT}", "POST", headers=KEYS.items())
    run = asyncio.run(drive(outer, scope, body=json.dumps(payload(CHAT, "echo")).encode()))
    assert json.loads(body(run.log))["model"] == "echo"


def test_serve_the_provider_from_the_command_line() -> None:
    """The class is a factory for a server's command line, as its docstring shows."""
    factory = "asgi_metering.testing.provider:Provider"
    with serve(factory, "uvicorn-h11", extra_args=["--factory"]) as server, HttpClient(server.port) as client:
        content = json.dumps(payload(ANTHROPIC, "echo:words-3")).encode()
        client.send_request("POST", ANTHROPIC, headers=list(KEYS.items()), body=content)
        assert client.read_head().status == 200
        assert json.loads(client.read_rest())["content"][0]["text"] == answer_text(3)


def test_names_of_the_testing_package_are_found_on_use() -> None:
    """The testing package hands out its parts on first use, and knows no other name."""
    assert asgi_metering.testing.Provider is Provider
    assert asgi_metering.testing.SeenRequest is SeenRequest
    assert set(asgi_metering.testing.__all__) >= {"Provider", "SeenRequest"}
    with pytest.raises(AttributeError, match="Nothing"):
        asgi_metering.testing.Nothing  # noqa: B018
