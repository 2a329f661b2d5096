"""Metered transports and clients of both libraries, against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import httpx2
import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.upstream import (
    LiveUpstreamListener,
    MeteredTransport,
    QuotaReadings,
    SyncMeteredTransport,
    UpstreamListener,
    upstream_client,
    upstream_client_sync,
    upstream_transport,
    upstream_transport_sync,
)
from asgi_metering.usage.reader import UsageReader
from tests.upstream.provider import (
    ANTHROPIC_STREAM,
    CURRENT,
    OPENAI_HEADERS,
    OPENAI_JSON,
    OPENAI_STREAM,
    Answer,
    Provider,
    Recorder,
    json_answer,
    stream_answer,
)

LIBRARIES = {"httpx2": httpx2, "httpx": httpx}


class Caller:
    """One way of calling: asynchronously or not, with one of the two libraries."""

    def __init__(self, library: str, asynchronous: bool) -> None:
        self.library = library
        self.module: Any = LIBRARIES[library]
        self.asynchronous = asynchronous

    def client(self, listener: Any, *args: Any, **options: Any) -> Any:
        """Return a metered client of the provider ``acme``."""
        make = upstream_client if self.asynchronous else upstream_client_sync
        return make("acme", listener, *args, library=self.library, **options)

    def fetch(self, client: Any, url: str, method: str = "GET", **options: Any) -> Any:
        """Send one request, read the whole answer, close the client, and return the answer."""
        if not self.asynchronous:
            with client:
                return client.request(method, url, **options)

        async def fetch() -> Any:
            async with client:
                return await client.request(method, url, **options)

        return asyncio.run(fetch())

    def chunks(self, client: Any, url: str, see: Callable[[bytes], bool | None]) -> None:
        """Stream one answer, hand each raw chunk to *see*, leave as soon as it answers True, and close the client."""
        if not self.asynchronous:
            with client, client.stream("GET", url) as response:
                for chunk in response.iter_raw():
                    if see(chunk):
                        return
            return

        async def read() -> None:
            async with (
                client,
                client.stream("GET", url) as response,
                contextlib.aclosing(response.aiter_raw()) as parts,
            ):
                async for chunk in parts:
                    if see(chunk):
                        return

        asyncio.run(read())


@pytest.fixture(params=["httpx2-async", "httpx2-sync", "httpx-async", "httpx-sync"])
def caller(request: pytest.FixtureRequest) -> Caller:
    """Go through both libraries, asynchronously and not."""
    library, _, kind = request.param.partition("-")
    return Caller(library, kind == "async")


@pytest.fixture
def call() -> Iterator[None]:
    """Run inside the call ``call-1``."""
    token = CURRENT.set("call-1")
    yield
    CURRENT.reset(token)


@pytest.mark.usefixtures("call")
def test_client_shows_headers_and_usage_of_an_answer(caller: Caller, provider: Provider) -> None:
    """A JSON answer is told once with its headers and once with its usage, under the call's token (S1.44, S1.46)."""
    recorder = Recorder()
    response = caller.fetch(caller.client(recorder), provider.url)
    assert response.json() == OPENAI_JSON
    assert recorder.events == ["started", "answered 200", "finished 200"]
    token, name, status, headers, started_at = recorder.answers[0]
    assert (token, name, status, headers[b"x-ratelimit-remaining-requests"]) == ("call-1", "acme", 200, b"59")
    assert started_at > 1.6e9
    assert [(ended.token, ended.provider, ended.counts) for ended in recorder.ended] == [("call-1", "acme", (9, 2))]


def test_client_captures_every_status(caller: Caller, provider: Provider) -> None:
    """Refusals and failures of the provider are readings as well, a body-less answer too (S1.44)."""
    for status in (429, 500, 529, 402, 204):
        recorder = Recorder()
        body = [] if status == 204 else [b'{"error": {"message": "no"}}']
        provider.script = [Answer(status, [(b"content-type", b"application/json"), (b"retry-after", b"3")], body)]
        assert caller.fetch(caller.client(recorder), provider.url).status_code == status
        assert recorder.events == ["started", f"answered {status}", f"finished {status}"]
        assert recorder.answers[0][3][b"retry-after"] == b"3"
        assert recorder.ended[0].counts is None


def test_client_passes_a_stream_without_delay(caller: Caller, provider: Provider) -> None:
    """Each chunk arrives before the provider sends the next one, so nothing is buffered, and no byte is changed."""
    gates = {index: threading.Event() for index in range(1, len(OPENAI_STREAM))}
    provider.script = [stream_answer(OPENAI_STREAM, OPENAI_HEADERS, gates=gates)]
    recorder = Recorder()
    seen: list[bytes] = []

    def see(chunk: bytes) -> None:
        seen.append(chunk)
        assert recorder.events == ["started", "answered 200"]
        if len(seen) in gates:
            gates[len(seen)].set()

    caller.chunks(caller.client(recorder), provider.url, see)
    assert seen == OPENAI_STREAM
    assert recorder.events == ["started", "answered 200", "finished 200"]
    assert recorder.ended[0].counts == (9, 2)


def test_client_left_early_shows_what_passed(caller: Caller, provider: Provider) -> None:
    """A consumer that leaves after the first event ends the exchange once, with the usage seen until then."""
    never = threading.Event()
    provider.script = [stream_answer(ANTHROPIC_STREAM, [], gates={1: never})]
    recorder = Recorder()
    caller.chunks(caller.client(recorder), provider.url, lambda chunk: True)
    assert recorder.events == ["started", "answered 200", "finished 200"]
    report = recorder.ended[0].reader.report()
    assert report is not None
    assert report.usage is not None
    assert (report.usage.input, report.partial, report.complete) == (425, True, False)


def test_client_closing_an_unread_answer_ends_it_and_frees_the_connection(caller: Caller, provider: Provider) -> None:
    """An answer closed before anybody read it ends once, and its connection serves the next request."""
    recorder = Recorder()
    client = caller.client(recorder, limits=caller.module.Limits(max_connections=1), timeout=20)
    request = client.build_request("GET", provider.url)

    async def run() -> None:
        async with client:
            response = await client.send(request, stream=True)
            await response.aclose()
            assert recorder.events == ["started", "answered 200", "finished 200"]
            assert (await client.get(provider.url)).json() == OPENAI_JSON

    if caller.asynchronous:
        asyncio.run(run())
    else:
        with client:
            client.send(request, stream=True).close()
            assert recorder.events == ["started", "answered 200", "finished 200"]
            assert client.get(provider.url).json() == OPENAI_JSON
    assert [ended.counts for ended in recorder.ended] == [None, (9, 2)]


def test_body_closed_early_closes_the_generator_below_at_once() -> None:
    """Closing our stream's generator closes the wrapped one before it returns, not when the loop gets to it."""
    closed: list[bool] = []

    class Stream(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            try:
                yield b"a"
                yield b"b"
            finally:
                closed.append(True)

    async def run() -> None:
        mock = httpx2.MockTransport(lambda request: httpx2.Response(200, stream=Stream()))
        response = await upstream_transport("acme", Recorder(), mock).handle_async_request(
            httpx2.Request("GET", "http://acme.test/")
        )
        parts: Any = aiter(response.stream)
        assert await anext(parts) == b"a"
        await parts.aclose()
        assert closed == [True]

    asyncio.run(run())


def test_client_with_a_broken_body_shows_what_passed(caller: Caller, provider: Provider) -> None:
    """A connection that breaks amid the body raises the library's own error, and the exchange ends once."""
    provider.script = [stream_answer(OPENAI_STREAM[:3], [], length=100_000)]
    recorder = Recorder()
    with pytest.raises(caller.module.RemoteProtocolError):
        caller.chunks(caller.client(recorder), provider.url, lambda chunk: None)
    assert recorder.events == ["started", "answered 200", "finished 200"]
    assert recorder.ended[0].counts == (9, 2)


def test_client_without_an_answer_only_starts(caller: Caller) -> None:
    """A refused connection raises the library's own error; nothing was answered, so nothing else is told."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        recorder = Recorder()
        with pytest.raises(caller.module.ConnectError):
            caller.fetch(caller.client(recorder), url)
    assert recorder.events == ["started"]


def test_client_reads_a_compressed_answer(caller: Caller, provider: Provider) -> None:
    """Usage is read out of a gzip body in pieces, while the consumer decodes it as ever."""
    packed = gzip.compress(b"".join(OPENAI_STREAM))
    pieces = [packed[index : index + 7] for index in range(0, len(packed), 7)]
    provider.script = [stream_answer(pieces, [(b"content-encoding", b"gzip")])]
    recorder = Recorder()
    assert caller.fetch(caller.client(recorder), provider.url).content == b"".join(OPENAI_STREAM)
    assert recorder.ended[0].counts == (9, 2)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("gzip, deflate, br, zstd", "gzip, deflate"),
        ("gzip;q=1.0, identity; q=0.5, *;q=0", "gzip;q=1.0, identity; q=0.5"),
        ("br", "identity"),
        ("gzip", "gzip"),
    ],
)
def test_client_asks_only_for_codings_it_can_read(caller: Caller, provider: Provider, asked: str, sent: str) -> None:
    """Brotli and Zstandard, which would hide the usage, are not asked for."""
    caller.fetch(caller.client(Recorder()), provider.url, headers={"accept-encoding": asked})
    assert provider.requests[0]["headers"]["accept-encoding"] == sent


def test_client_without_accept_encoding_sends_none(caller: Caller, provider: Provider) -> None:
    """A request that asks for no coding is not made to."""
    client = caller.client(Recorder())
    del client.headers["accept-encoding"]
    caller.fetch(client, provider.url)
    assert "accept-encoding" not in provider.requests[0]["headers"]


def test_client_follows_redirects_as_exchanges_of_their_own(caller: Caller, provider: Provider) -> None:
    """A redirect is followed, as the SDKs do, and each hop is told."""
    provider.script = [Answer(307, [(b"location", b"/moved")])]
    recorder = Recorder()
    response = caller.fetch(caller.client(recorder), provider.url, "POST", json={})
    assert (response.status_code, provider.requests[1]["path"]) == (200, "/moved")
    assert recorder.events == ["started", "answered 307", "finished 307", "started", "answered 200", "finished 200"]


def test_client_passes_extensions_and_keeps_sockets_alive(caller: Caller, provider: Provider) -> None:
    """The response's extensions come through, and its socket has TCP keep-alive on, as Anthropic's SDK sets it."""
    client = caller.client(Recorder())
    probes: list[int] = []

    def look(response: Any) -> None:
        found = response.extensions["network_stream"].get_extra_info("socket")
        probes.append(found.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        probes.append(found.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT))

    async def look_async(response: Any) -> None:
        look(response)

    client.event_hooks["response"].append(look_async if caller.asynchronous else look)
    caller.fetch(client, provider.url)
    assert probes == [1, 5]


def test_client_with_a_wrapped_transport_uses_it(caller: Caller) -> None:
    """An answer made in memory by the caller's own transport is read as well, packed or not."""
    packed = gzip.compress(str(OPENAI_JSON).replace("'", '"').encode())
    answers = [
        caller.module.Response(200, json=OPENAI_JSON),
        caller.module.Response(
            200, content=packed, headers={"content-type": "application/json", "content-encoding": "gzip"}
        ),
    ]
    for answer in answers:
        recorder = Recorder()
        mock = caller.module.MockTransport(lambda request, answer=answer: answer)
        response = caller.fetch(caller.client(recorder, mock), "http://acme.test/")
        assert response.json() == OPENAI_JSON
        assert recorder.events == ["started", "answered 200", "finished 200"]
        assert recorder.ended[0].counts == (9, 2)


def test_client_meters_the_mounts_it_is_given(caller: Caller) -> None:
    """A transport mounted for some hosts is metered, a metered or empty one is left as it is."""
    recorder, other = Recorder(), Recorder()
    mock = caller.module.MockTransport(lambda request: caller.module.Response(200, json=OPENAI_JSON))
    metered = (MeteredTransport if caller.asynchronous else SyncMeteredTransport)("other", other, mock)
    mounts = {"all://one.test": mock, "all://two.test": metered, "all://three.test": None}
    for host in ("one", "two", "three"):
        caller.fetch(caller.client(recorder, mock, mounts=mounts), f"http://{host}.test/")
    assert [ended.provider for ended in recorder.ended] == ["acme", "acme"]
    assert [ended.provider for ended in other.ended] == ["other"]


@pytest.mark.parametrize("source", ["environment", "option", "environment-not-trusted", "environment-with-wrap"])
def test_client_goes_through_a_proxy_and_is_metered_there(
    caller: Caller, provider: Provider, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """A proxy of the environment or of the options is used as without us, and what comes through it is told."""
    options: dict[str, Any] = {}
    args: list[Any] = []
    recorder = Recorder()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if source == "option":
        options["proxy"] = provider.url
    else:
        monkeypatch.setenv("HTTP_PROXY", provider.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if source == "environment-not-trusted":
        options["trust_env"] = False
    if source == "environment-with-wrap":
        args.append(caller.module.MockTransport(lambda request: caller.module.Response(200, json=OPENAI_JSON)))
    through = source in ("environment", "option")
    url = "http://acme.invalid/v1" if through or args else f"{provider.url}/v1"
    response = caller.fetch(caller.client(recorder, *args, **options), url)
    assert response.json() == OPENAI_JSON
    assert recorder.ended[0].counts == (9, 2)
    assert [request["headers"]["host"] for request in provider.requests] == (
        [] if args else ["acme.invalid"] if through else [provider.url.removeprefix("http://")]
    )


def test_client_heeds_no_proxy(caller: Caller, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that NO_PROXY exempts is called directly, and is metered all the same."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    recorder = Recorder()
    assert caller.fetch(caller.client(recorder), provider.url).status_code == 200
    assert recorder.ended[0].counts == (9, 2)


def test_client_with_transport_option_is_refused(caller: Caller) -> None:
    """The option that would leave out the metering is refused, with the one that wraps."""
    with pytest.raises(ConfigurationError, match="wrap="):
        caller.client(Recorder(), transport=caller.module.MockTransport(lambda request: None))


def test_transport_works_in_a_client_of_ones_own(caller: Caller, provider: Provider) -> None:
    """A transport with its own default inside, or around one of the caller's, serves a client of either library."""
    make: Any = upstream_transport if caller.asynchronous else upstream_transport_sync
    names = ("AsyncClient", "AsyncHTTPTransport") if caller.asynchronous else ("Client", "HTTPTransport")
    client, inner = (getattr(caller.module, name) for name in names)
    for wrap in (None, inner()):
        recorder = Recorder()
        transport = make("acme", recorder, wrap, library=caller.library)
        assert caller.fetch(client(transport=transport), provider.url).json() == OPENAI_JSON
        assert recorder.ended[0].counts == (9, 2)


def test_transport_opens_and_closes_the_wrapped_one(caller: Caller) -> None:
    """Entering, leaving and closing reach the wrapped transport."""
    steps: list[str] = []

    class Inner:
        def __enter__(self) -> None:
            steps.append("enter")

        def __exit__(self, *exc: object) -> None:
            steps.append("exit")

        def close(self) -> None:
            steps.append("close")

        def handle_request(self, request: Any) -> Any:
            return caller.module.Response(200)

        async def __aenter__(self) -> None:
            steps.append("enter")

        async def __aexit__(self, *exc: object) -> None:
            steps.append("exit")

        async def aclose(self) -> None:
            steps.append("close")

        async def handle_async_request(self, request: Any) -> Any:
            return caller.module.Response(200)

    caller.fetch(caller.client(Recorder(), Inner()), "http://acme.test/")
    assert steps == ["enter", "exit"]
    if caller.asynchronous:
        asyncio.run(caller.client(Recorder(), Inner()).aclose())
    else:
        caller.client(Recorder(), Inner()).close()
    assert steps == ["enter", "exit", "close"]


@pytest.mark.parametrize(
    ("name", "listener", "wrap", "dialect", "message"),
    [
        ("no name", Recorder(), httpx2.AsyncHTTPTransport(), None, "provider 'no name'"),
        ("acme", object(), httpx2.AsyncHTTPTransport(), None, "lacks a method"),
        ("acme", Recorder(), httpx2.HTTPTransport(), None, "has no handle_async_request"),
        ("acme", Recorder(), None, None, "has no handle_async_request"),
        ("acme", Recorder(), httpx2.AsyncHTTPTransport(), "klingon", "klingon"),
        ("acme", Recorder(), MeteredTransport("a", Recorder(), httpx2.AsyncHTTPTransport()), None, "count twice"),
    ],
)
def test_transport_refuses_misuse_at_construction(
    name: str, listener: Any, wrap: Any, dialect: str | None, message: str
) -> None:
    """A wrong name, listener, transport or dialect is told when the transport is made, not on the first response."""
    with pytest.raises(ConfigurationError, match=message):
        MeteredTransport(name, listener, wrap, usage_dialect=dialect)


def test_transport_with_usage_dialect_overrides_detection(provider: Provider) -> None:
    """An OpenAI-shaped gateway in front of another provider is read as the transport was told."""
    recorder = Recorder()
    provider.script = [
        json_answer({"usage": {"input_tokens": 5, "cache_read_input_tokens": 3, "output_tokens": 1}}, [])
    ]
    with upstream_client_sync("acme", recorder, usage_dialect="anthropic") as client:
        client.get(provider.url)
    report = recorder.ended[0].reader.report()
    assert report is not None
    assert report.dialect == "anthropic"


def test_transport_clock_orders_by_the_start() -> None:
    """The start that listeners are told is the moment before the request was sent (S1.45)."""
    ticks = iter([100.0, 200.0])
    recorder = Recorder()
    mock = httpx2.MockTransport(lambda request: httpx2.Response(200))
    transport = SyncMeteredTransport("acme", recorder, mock, clock=lambda: next(ticks))
    with httpx2.Client(transport=transport) as client:
        client.get("http://acme.test/")
    assert recorder.answers[0][4] == 100.0


def test_cancelled_stream_ends_once(provider: Provider) -> None:
    """A task that is cancelled while it waits for the next chunk ends the exchange, before the client is closed."""
    never = threading.Event()
    provider.script = [stream_answer(ANTHROPIC_STREAM, [], gates={1: never})]
    recorder = Recorder()

    async def run() -> None:
        first = asyncio.Event()

        async def consume(client: httpx2.AsyncClient) -> None:
            async with client.stream("GET", provider.url) as response:
                async for _ in response.aiter_raw():
                    first.set()

        async with upstream_client("acme", recorder) as client:
            task = asyncio.create_task(consume(client))
            await first.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert recorder.events == ["started", "answered 200", "finished 200"]

    asyncio.run(run())
    assert recorder.events == ["started", "answered 200", "finished 200"]


def test_concurrent_exchanges_keep_their_tokens(provider: Provider) -> None:
    """Calls that share a client each hear of their own exchange."""
    recorder = Recorder()

    async def one(client: httpx2.AsyncClient, name: str) -> None:
        CURRENT.set(name)
        await client.get(provider.url)

    async def run() -> None:
        async with upstream_client("acme", recorder) as client:
            await asyncio.gather(*(one(client, f"call-{number}") for number in range(20)))

    asyncio.run(run())
    assert sorted(str(ended.token) for ended in recorder.ended) == sorted(f"call-{number}" for number in range(20))
    assert {answer[0] for answer in recorder.answers} == {f"call-{number}" for number in range(20)}


class Live(Recorder):
    """A listener that wants the reader early."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: list[UsageReader] = []

    def body_started(self, token: object, provider: str, reader: UsageReader, status: int) -> None:
        """Keep the reader."""
        self.events.append(f"body_started {status}")
        self.readers.append(reader)


def test_live_listener_sees_usage_while_the_body_passes(caller: Caller, provider: Provider) -> None:
    """A listener that asks for it reads what was observed so far, before the stream ends."""
    live = Live()
    assert isinstance(live, LiveUpstreamListener)
    assert isinstance(live, UpstreamListener)
    assert not isinstance(Recorder(), LiveUpstreamListener)
    gate = threading.Event()
    provider.script = [stream_answer(ANTHROPIC_STREAM, [], gates={1: gate})]
    inputs: list[int | None] = []

    def see(chunk: bytes) -> None:
        report = live.readers[0].report()
        assert report is not None
        assert report.usage is not None
        inputs.append(report.usage.input)
        gate.set()

    caller.chunks(caller.client(live), provider.url, see)
    assert inputs[0] == 425
    assert live.events == ["started", "answered 200", "body_started 200", "finished 200"]
    assert live.ended[0].reader is live.readers[0]
    assert live.ended[0].counts == (425, 15)


class Broken(Live):
    """A listener of which one method raises."""

    def __init__(self, method: str) -> None:
        super().__init__()

        def fail(*args: object) -> None:
            raise RuntimeError(f"broken {method}")

        setattr(self, method, fail)


@pytest.mark.parametrize("method", ["started", "answered", "body_started", "finished"])
def test_broken_listener_never_reaches_the_request(
    caller: Caller, provider: Provider, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    """What a listener raises is logged, its other methods are still called, and the answer is whole (S1.39)."""
    broken = Broken(method)
    with caplog.at_level(logging.ERROR, logger="asgi_metering.upstream"):
        assert caller.fetch(caller.client(broken), provider.url).json() == OPENAI_JSON
    assert f"broken {method}" in caplog.text
    assert len(broken.events) == 3
    if method != "finished":
        assert broken.ended[0].counts == (9, 2)


class Hostile(bytes):
    """A chunk that no reader can copy."""

    __slots__ = ()

    def __bytes__(self) -> bytes:
        raise RuntimeError("broken chunk")


def test_broken_reader_is_dropped_once(caller: Caller, caplog: pytest.LogCaptureFixture) -> None:
    """When reading fails, the body passes on unread, one line is logged, and the end is told."""
    parts = [Hostile(b"a"), Hostile(b"b"), b"c"]

    class Stream(caller.module.AsyncByteStream, caller.module.SyncByteStream):  # type: ignore[misc, name-defined]
        def __iter__(self) -> Iterator[bytes]:
            yield from parts

        async def __aiter__(self) -> AsyncIterator[bytes]:
            for part in parts:
                yield part

    recorder = Recorder()
    mock = caller.module.MockTransport(
        lambda request: caller.module.Response(200, headers={"content-type": "text/event-stream"}, stream=Stream())
    )
    with caplog.at_level(logging.ERROR, logger="asgi_metering.upstream"):
        assert caller.fetch(caller.client(recorder, mock), "http://acme.test/").content == b"abc"
    assert [record.exc_info is not None for record in caplog.records] == [True]
    assert recorder.events == ["started", "answered 200", "finished 200"]


def test_stream_that_is_no_generator_is_read() -> None:
    """A transport of one's own may answer with any kind of iterator, and is read and closed all the same."""
    closed: list[bool] = []

    class Stream(httpx2.AsyncByteStream):
        def __init__(self) -> None:
            self.parts = iter(OPENAI_STREAM)

        def __aiter__(self) -> AsyncIterator[bytes]:
            return self

        async def __anext__(self) -> bytes:
            part = next(self.parts, None)
            if part is None:
                raise StopAsyncIteration
            return part

        async def aclose(self) -> None:
            closed.append(True)

    recorder = Recorder()
    headers = {"content-type": "text/event-stream"}
    mock = httpx2.MockTransport(lambda request: httpx2.Response(200, headers=headers, stream=Stream()))
    caller = Caller("httpx2", asynchronous=True)
    assert caller.fetch(caller.client(recorder, mock), "http://acme.test/").content == b"".join(OPENAI_STREAM)
    assert recorder.ended[0].counts == (9, 2)
    assert closed == [True]


def test_client_on_a_system_without_every_socket_option(
    caller: Caller, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system does not know a keep-alive option, the others are set and calls work."""
    monkeypatch.delattr(socket, "TCP_KEEPIDLE")
    assert caller.fetch(caller.client(Recorder()), provider.url).status_code == 200


def test_unreadable_response_is_left_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """A response whose body was used up by somebody else is passed on, logged, and its end is told."""
    used = httpx2.Response(200, stream=httpx2.ByteStream(b"gone"))
    for _ in used.iter_raw():
        pass
    recorder = Recorder()
    transport = SyncMeteredTransport("acme", recorder, httpx2.MockTransport(lambda request: used))
    with caplog.at_level(logging.ERROR, logger="asgi_metering.upstream"):
        assert transport.handle_request(httpx2.Request("GET", "http://acme.test/")) is used
    assert "not fully observed" in caplog.text
    assert recorder.events == ["started", "answered 200", "finished 200"]


def test_end_told_from_many_threads_counts_once(provider: Provider) -> None:
    """A response that many threads close at once ends once."""
    provider.script = [stream_answer(OPENAI_STREAM, [], gates={1: threading.Event()})]
    recorder = Recorder()
    with upstream_client_sync("acme", recorder) as client:
        request = client.build_request("GET", provider.url)
        response = client.send(request, stream=True)
        barrier = threading.Barrier(8)

        def close() -> None:
            barrier.wait(30)
            response.stream.close()  # type: ignore[union-attr]

        threads = [threading.Thread(target=close) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        response.close()
    assert recorder.events.count("finished 200") == 1


def test_readings_fed_by_a_listener(provider: Provider) -> None:
    """A listener of three lines makes readings of every answer, the refused one included (S1.44)."""
    readings = QuotaReadings()

    class Feed(Recorder):
        def answered(self, token: object, provider: str, status: int, headers: Any, started_at: float) -> None:
            readings.record(provider, headers, status, started_at)

    provider.script = [
        json_answer(OPENAI_JSON, [(b"X-RateLimit-Remaining-Requests", b"1")]),
        json_answer({}, [(b"x-ratelimit-remaining-requests", b"0"), (b"retry-after", b"7")], status=429),
    ]
    with upstream_client_sync("openai", Feed()) as client:
        client.get(provider.url)
        client.get(provider.url)
    latest = readings.latest("openai")
    assert latest is not None
    assert (latest.status, latest.retry_after_s, latest.limits[0].remaining) == (429, 7.0, 0)
