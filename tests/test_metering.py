"""The metering: its proof, and the clients for upstream calls, with the real SDKs against the bundled provider."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx
import httpx2
import openai
import pytest
from fastapi import FastAPI

from asgi_metering import Caller, Metering, MeteringMiddleware, billable
from asgi_metering.errors import ConfigurationError
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis, EntryKind
from asgi_metering.rules.operations import Admit, AllowanceSource, End
from asgi_metering.stores.memory import MemoryStore
from asgi_metering.testing import Provider
from asgi_metering.testing.clock import NOON, FakeClock
from asgi_metering.upstream.client import MeteredTransport, SyncMeteredTransport
from tests.harness.drive import drive, http_scope, lifespan, status
from tests.harness.servers import serve_in_thread

pytestmark = pytest.mark.uncounted

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
DIALECT = "openai-chat"

# -- the proof ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, None),
        ({"held": 8}, "allowance 'free' from 0.0 keeps 8 for holds that keep 2 of it."),
        ({"settled": -1}, "allowance 'free' from 0.0 has settled -1, which is negative."),
    ],
)
def test_check_finds_a_corrupted_allowance_window(change: dict[str, int], sentence: str | None) -> None:
    """A window that does not say what its calls hold, or that gave back more than it had, is named."""

    async def scene() -> list[str]:
        store = MemoryStore(FakeClock(start=5.0))
        async with Metering(store, sinks=()) as metering:
            source = AllowanceSource("free", 10, (-100.0, 0.0, 100.0, 200.0))
            for call in ("a", "b"):
                store.run_now(Admit(call, "p", "credits", 2, 2, (source,)))
            store.run_now(End("b", 1, Basis.USAGE))
            ((key, window),) = store._state.allowances.items()
            store._state.allowances[key] = window._replace(**change)
            return await metering.check()

    assert asyncio.run(scene()) == ([] if sentence is None else [f"'p' in 'credits': {sentence}"])


# -- upstream ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Upstream:
    """A running provider."""

    url: str

    def ask_openai(self, client: Any, **options: Any) -> None:
        """Chat through OpenAI's sync SDK, to the last chunk."""
        with openai.OpenAI(api_key="k", base_url=f"{self.url}/v1", http_client=client, max_retries=0) as sdk:
            answer = sdk.chat.completions.create(model="echo:usage-9-4", messages=MESSAGES, **options)
            if options.get("stream"):
                assert list(answer)

    def ask_anthropic(self, client: Any, **options: Any) -> None:
        """The same through Anthropic's."""
        with anthropic.Anthropic(api_key="k", base_url=self.url, http_client=client, max_retries=0) as sdk:
            answer = sdk.messages.create(model="echo:usage-9-4", max_tokens=50, messages=MESSAGES, **options)
            if options.get("stream"):
                assert list(answer)


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    """The bundled provider behind uvicorn."""
    with serve_in_thread(Provider()) as server:
        yield Upstream(server.url)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("vendor", ["openai", "anthropic"])
def test_book_a_sync_sdk_to_the_call_of_a_sync_endpoint(vendor: str, stream: bool, upstream: Upstream) -> None:
    """The SDK in an endpoint's thread shows quotas, and its usage is what the endpoint's own call is charged."""
    metering = Metering("memory://", identify=lambda connection: Caller("ann"), sinks=())
    app = FastAPI()
    threads: list[bool] = []

    @app.get("/ask")
    @billable(per_token(output=1), hold=100, line="chat")
    def ask() -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        threads.append(True)
        client = metering.upstream_client_sync(vendor, verify=False)
        getattr(upstream, f"ask_{vendor}")(client, stream=stream, **more)
        return "ok"

    more: dict[str, Any] = {"stream_options": {"include_usage": True}} if stream and vendor == "openai" else {}
    wrapped = MeteringMiddleware(app, metering=metering)

    async def scene() -> None:
        async with lifespan(wrapped):
            await metering.grant("ann", 1_000, id="g")
            ended = await drive(wrapped, http_scope("/ask"))
            assert status(ended.log) == 200
            await metering.drain()
            lines = [line async for line in metering.statement("ann")]
            assert [(line.line, line.amount, line.basis) for line in lines if line.kind is EntryKind.SETTLE] == [
                ("chat", 4_000_000, Basis.USAGE)
            ]
            reading = metering.quotas.latest(vendor)
            assert reading is not None
            assert reading.limits

    asyncio.run(scene())
    assert threads == [True]


def test_keep_quotas_outside_of_a_call(upstream: Upstream) -> None:
    """Without a call around it, a sync client tells of quotas all the same."""
    metering = Metering("memory://", sinks=())
    upstream.ask_openai(metering.upstream_client_sync("openai", verify=False))
    assert metering.quotas.latest("openai") is not None


def test_pass_options_on_to_the_client() -> None:
    """Library, dialect, transport and the client's own options reach the client that is made."""
    metering = Metering("memory://", sinks=())
    mock = httpx.MockTransport(lambda request: httpx.Response(200))
    with metering.upstream_client_sync("a", library="httpx", usage_dialect=DIALECT, timeout=3.0) as client:
        transport: Any = client._transport
        assert isinstance(client, httpx.Client)
        assert client.timeout == httpx.Timeout(3.0)
        assert transport._source.usage_dialect == DIALECT
    wrapping: Any = metering.upstream_client_sync("a", mock)  # type: ignore[arg-type]
    assert wrapping._transport._wrapped is mock
    wrapping.close()
    asynchronous: Any = metering.upstream_client("a", library="httpx", usage_dialect=DIALECT, timeout=3.0)
    assert isinstance(asynchronous, httpx.AsyncClient)
    assert asynchronous._transport._source.usage_dialect == DIALECT
    asyncio.run(asynchronous.aclose())


def test_pass_options_on_to_the_transport() -> None:
    """The transports take the same, each for its kind of client."""
    metering = Metering("memory://", sinks=())
    mock = httpx2.MockTransport(lambda request: httpx2.Response(200))
    made: list[Any] = [
        metering.upstream_transport("a", mock, usage_dialect=DIALECT),
        metering.upstream_transport_sync("a", mock, usage_dialect=DIALECT),
    ]
    assert [type(each) for each in made] == [MeteredTransport, SyncMeteredTransport]
    assert all(each._wrapped is mock and each._source.usage_dialect == DIALECT for each in made)
    own: Any = metering.upstream_transport_sync("a", library="httpx")
    assert isinstance(own._wrapped, httpx.HTTPTransport)
    own.close()
    for make in (metering.upstream_client, metering.upstream_client_sync):
        with pytest.raises(ConfigurationError, match="klingon"):
            make("a", usage_dialect="klingon")
    for transport in (metering.upstream_transport, metering.upstream_transport_sync):
        with pytest.raises(ConfigurationError, match="klingon"):
            transport("a", usage_dialect="klingon")


def test_name_calls_in_the_order_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself a metering makes ids that never meet, those of a later millisecond behind those of an earlier one."""
    milliseconds = itertools.count(1_700_000_000_000)
    monkeypatch.setattr("asgi_metering.ids.time.time_ns", lambda: next(milliseconds) * 1_000_000)
    new_id = Metering(sinks=()).new_id
    ids = [new_id() for _ in range(1_000)]
    assert ids == sorted(ids)
    assert {len(each) for each in ids} == {32}
    monkeypatch.setattr("asgi_metering.ids.time.time_ns", lambda: 1_700_000_000_000_000_000)
    assert len({new_id() for _ in range(1_000)}) == 1_000


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_draw_other_ids_in_a_forked_child() -> None:
    """What a process has drawn for its ids is none of its children's: two calls never share an id (X.8)."""
    new_id = Metering(sinks=()).new_id
    new_id()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, " ".join(new_id()[12:] for _ in range(8)).encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as told:
        theirs = told.read().split()
    assert len(theirs) == 8
    assert not {new_id()[12:] for _ in range(8)} & set(theirs)


def test_take_ids_and_times_from_what_is_injected() -> None:
    """Calls are named by `new_id` and dated by the store's clock, so that books are told to the letter (X.8)."""
    names = itertools.count(1)
    clock = FakeClock()

    async def play() -> None:
        store = MemoryStore(clock)
        async with Metering(store, sinks=(), new_id=lambda: f"call-{next(names)}") as metering:
            await metering.grant("ann", 10, id="g")
            for _ in range(2):
                clock.advance(60)
                async with metering.charge(payer="ann", line="job", price=1):
                    pass
            lines = [(line.ref, line.at) async for line in metering.statement("ann")]
        assert lines == [("g", NOON), ("call-1", NOON + 60), ("call-2", NOON + 120)]

    asyncio.run(play())
