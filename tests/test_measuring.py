"""What a call has used: each answer judged by itself, whatever its shape, and priced without ever losing an end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from asgi_metering import Metering, TokenUsage, billable, current_call, metered_app, up_to
from asgi_metering.amounts import CREDITS, MAX_AMOUNT
from asgi_metering.asgi.tap import Tap
from asgi_metering.billing import observed_parts
from asgi_metering.prices import model_prices, per_token
from asgi_metering.receipts import Entry
from asgi_metering.rules.ending import Cause
from asgi_metering.tokens import count_tokens
from asgi_metering.usage import UsageReader
from tests.pitfalls.stage import PAYER, Stage, staged

pytestmark = pytest.mark.uncounted

WORDS = "hello wonderful world "
WEIGHT = count_tokens(WORDS).tokens
"""Tokens of the words alone."""

FIFTY = count_tokens(WORDS * 50).tokens
"""Tokens of the words fifty times."""

CREDIT = 10**6
MILLI = 10**3
"""Smallest parts of a thousandth of a credit, in which amounts are written here."""

PRICE = per_token(input="0.001", output=1)
HOLD = TokenUsage(input=7, output=5)


def event(payload: object) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


def delta(text: str = WORDS, **more: Any) -> bytes:
    """One event of a chat stream."""
    return event({"object": "chat.completion.chunk", "model": "m", "choices": [{"delta": {"content": text}}], **more})


def chat(given: int, written: int) -> dict[str, Any]:
    """A chat answer that reports."""
    usage = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
    return {"object": "chat.completion", "model": "m", "choices": [], "usage": usage}


def started(**usage: int) -> bytes:
    """The first event of an Anthropic stream."""
    message = {"type": "message", "model": "m", "content": [], "usage": usage}
    return event({"type": "message_start", "message": message})


def sending(media: str, chunks: Sequence[bytes], *, broken: bool = False, encoding: str = "") -> Any:
    """An app that sends *chunks*, and, if *broken*, is left by its client behind them."""
    fields = [(b"content-type", media.encode())] + ([(b"content-encoding", encoding.encode())] if encoding else [])

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(f"Unknown scope {scope['type']!r}.")
        await send({"type": "http.response.start", "status": 200, "headers": fields})
        for chunk in chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": broken})

    return app


def refusing(status: int, media: str, chunks: Sequence[bytes], *, broken: bool = False) -> Any:
    """The same app, with an error's status."""
    app = sending(media, chunks, broken=broken)

    async def refuse(scope: Any, receive: Any, send: Any) -> None:
        async def as_error(message: Any) -> None:
            await send({**message, "status": status} if message["type"] == "http.response.start" else message)

        await app(scope, receive, as_error)

    return refuse


async def charged(app: Any, chunks: int | None = None, **options: Any) -> list[Entry]:
    """What one request to *app* is charged; the client leaves behind *chunks* of the body if that is given."""
    async with staged(app) as stage:
        # The message behind the last chunk is the one that finds the client gone.
        left: dict[str, Any] = {} if chunks is None else {"raise_at": chunks + 2}
        await stage.drive(**left, **options)
        return await stage.charges()


def observed(media: str, chunks: Sequence[bytes], encoding: str = "", **policy: Any) -> tuple[int, bool]:
    """What a client that left behind *chunks* is charged, in thousandths, and whether it is an estimate."""
    policy = {"hold": HOLD, **policy}
    app = metered_app(sending(media, chunks, broken=True, encoding=encoding), billable(PRICE, **policy))
    entries = asyncio.run(charged(app, len(chunks)))
    assert [str(entry.basis) for entry in entries] == ["observed"] * len(entries)
    return sum(entry.amount for entry in entries) // MILLI, any(e.estimated for e in entries)


# -- the body ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("media", "piece"),
    [
        pytest.param("text/plain", WORDS.encode(), id="plain text"),
        pytest.param("text/html; charset=utf-8", WORDS.encode(), id="html"),
        pytest.param("application/x-ndjson", json.dumps({"type": "t", "token": WORDS}).encode() + b"\n", id="lines"),
        pytest.param("text/event-stream", event({"id": "1", "type": "token", "t": {"is": [WORDS]}}), id="events"),
        pytest.param("text/event-stream", b"event: t\ndata: " + WORDS.encode() + b"\n\n", id="events of text"),
        pytest.param("text/event-stream", event(WORDS), id="events of strings"),
    ],
)
def test_observe_the_text_of_a_body_of_unknown_shape(media: str, piece: bytes) -> None:
    """DESIGN 4 "Observed": a client that leaves a stream of no known dialect pays its text, as an estimate, not 0."""
    amount, estimated = observed(media, [piece] * 50)
    assert amount == pytest.approx(7 + FIFTY * 1_000, rel=0.02)
    assert estimated


def test_read_a_broken_stream_between_turns_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text is read slice by slice before its end is charged, and is charged as if it was read at once."""
    pieces = [delta(f" word {number}") for number in range(50)]
    expected = observed("text/event-stream", pieces)
    waiting: list[int] = []
    text_reader = Tap.text_reader

    def watched(tap: Tap) -> UsageReader:
        waiting.append(tap._waiting())
        return text_reader(tap)

    monkeypatch.setattr(Tap, "text_reader", watched)
    monkeypatch.setattr("asgi_metering.asgi.tap.SLICE", 500)
    assert observed("text/event-stream", pieces) == expected
    assert waiting
    assert max(waiting) <= 500


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    ("status", "media", "chunks", "amount"),
    [
        pytest.param(500, "text/html", [WORDS.encode()] * 50, 0, id="a page"),
        pytest.param(422, "application/json", [json.dumps({"detail": WORDS * 50}).encode()], 0, id="a problem"),
        pytest.param(404, "text/event-stream", [delta()] * 3, 0, id="a stream"),
        pytest.param(400, "application/json", [json.dumps(chat(8, 3)).encode()], 3_008, id="a report"),
        pytest.param(502, "text/event-stream", [started(input_tokens=8, output_tokens=2)], 2_008, id="half a report"),
    ],
)
def test_observe_no_text_of_an_error(status: int, media: str, chunks: list[bytes], amount: int, broken: bool) -> None:
    """DESIGN 4 "Observed": the body of an error is no model's output; only what it reports counts, whoever left."""
    policy = billable(PRICE, hold=HOLD, on_error="observed")
    app = metered_app(refusing(status, media, chunks, broken=broken), policy)
    entries = asyncio.run(charged(app, len(chunks) if broken else None))
    assert sum(entry.amount for entry in entries) == amount * MILLI


@pytest.mark.parametrize("media", ["image/png", "audio/mpeg", "application/octet-stream"])
def test_observe_no_tokens_in_binary_media(media: str) -> None:
    """Nobody can tell tokens from the bytes of an image: beside the input nothing was observed."""
    assert observed(media, [b"\x89PNG" * 1_000] * 5) == (7, True)


def test_observe_a_body_that_cannot_be_decoded_by_its_wire_bytes() -> None:
    """DESIGN 4: of a body that nobody decodes only the bytes are known: characters of text, four to a token."""
    assert observed("text/event-stream", [b"\x8b" * 400] * 10, encoding="compress") == (7 + 1_000 * 1_000, True)


def test_observe_cache_writes_of_a_stream_that_broke() -> None:
    """A stream that broke before its final usage pays the cache writes and reads of its first event (DESIGN 6)."""
    price = per_token(input=1, output=0, cached=5, cache_write=100)
    first = started(input_tokens=1, cache_creation_input_tokens=3, cache_read_input_tokens=2, output_tokens=1)
    app = metered_app(sending("text/event-stream", [first], broken=True), billable(price, hold=HOLD))
    assert [entry.amount for entry in asyncio.run(charged(app, 1))] == [(1 + 2 * 5 + 3 * 100) * CREDIT]


ZEROS = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


def test_take_no_placeholder_for_a_final_report() -> None:
    """Zeros in each chunk of a stream whose end was never seen are no report: its text was observed (S2.41)."""
    assert observed("text/event-stream", [delta(usage=ZEROS)] * 20) == (
        7 + count_tokens(WORDS * 20).tokens * 1_000,
        True,
    )


def test_take_a_reported_zero_of_a_completed_call() -> None:
    """A call that completed and reported zero is charged zero (S2.41)."""
    app = metered_app(sending("text/event-stream", [delta(usage=ZEROS)] * 3), billable(PRICE, hold=HOLD))
    assert asyncio.run(charged(app)) == []


# -- the input of a hold that is an amount ------------------------------------------------------------------


@pytest.mark.parametrize("hold", [100, "100", up_to(100, at_least=1), up_to(lambda: 100, at_least=1)])
def test_observe_the_input_that_the_request_asked_for(hold: Any) -> None:
    """A client that leaves pays the input also where the hold is an amount: what the request shows, as an estimate."""
    asked = WORDS * 10

    async def endpoint(request: Request) -> Response:
        return ended

    ended: Response = sending("text/event-stream", [delta("hi")], broken=True)
    app = Starlette(routes=[Route("/", billable(PRICE, hold=hold)(endpoint), methods=["POST"])])
    body = json.dumps({"model": "m", "prompt": asked}).encode()
    entries = asyncio.run(charged(app, 1, method="POST", body=body))
    assert [(entry.amount, entry.estimated) for entry in entries] == [
        ((count_tokens(asked).tokens + 1_000) * MILLI, True)
    ]


# -- several upstream calls --------------------------------------------------------------------------------


class Stream(httpx2.AsyncByteStream):
    """An answer that comes in chunks."""

    def __init__(self, chunks: Sequence[bytes]) -> None:
        self.chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            yield chunk


class Models(httpx2.AsyncBaseTransport):
    """A provider in process: a small answer, one in events, and another shape for each path."""

    answers: dict[str, tuple[str, list[bytes]]] = {  # noqa: RUF012 -- nobody writes it
        "/small": ("application/json", [json.dumps(chat(10, 1)).encode()]),
        "/stream": ("text/event-stream", [delta()] * 50),
        "/claude": ("text/event-stream", [started(input_tokens=20, output_tokens=1)]),
        "/own": ("text/event-stream", [event({"t": WORDS})] * 50),
        "/search": ("application/json", [json.dumps({"results": [WORDS]}).encode()]),
        "/zeros": ("text/event-stream", [delta(usage=ZEROS)]),
        "/error": ("text/event-stream", [delta(), event({"error": {"message": "overloaded"}})]),
    }

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        media, chunks = self.answers[request.url.path]
        return httpx2.Response(200, headers={"content-type": media}, stream=Stream(chunks))


def agent(*paths: str, seen: bytes = b"made of it", price: Any = PRICE, **policy: Any) -> Any:
    """An endpoint that reads an answer of each path, the last one of two or more broken off, and sends its own."""

    @billable(price, **{"hold": HOLD, **policy})
    async def endpoint(_request: Request) -> Any:
        return sent

    async def sent(_scope: Any, _receive: Any, send: Any) -> None:
        metering = current_call().metering
        media = [(b"content-type", b"application/octet-stream" if seen == b"made of it" else b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": media})
        await send({"type": "http.response.body", "body": seen, "more_body": True})
        transport = metering.upstream_transport("openai", wrap=Models())
        async with httpx2.AsyncClient(transport=transport, base_url="http://models") as client:
            for path in paths:
                part = path.removesuffix("!")
                async with client.stream("GET", part) as response:
                    chunks = response.aiter_raw()
                    async for _ in chunks:
                        if path.endswith("!") and response.num_bytes_downloaded >= _all_of(part):
                            break
                    await chunks.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return Starlette(routes=[Route("/", endpoint)])


def _all_of(path: str) -> int:
    return sum(len(chunk) for chunk in Models.answers[path][1])


@pytest.mark.parametrize(
    ("paths", "amount"),
    [
        pytest.param(("/stream!",), 7 + FIFTY * 1_000, id="a stream that broke"),
        pytest.param(("/small", "/stream!"), 10 + 1_000 + 7 + FIFTY * 1_000, id="behind a complete one"),
        pytest.param(("/stream!", "/small"), 10 + 1_000 + 7 + FIFTY * 1_000, id="before a complete one"),
        pytest.param(("/small", "/claude!"), 10 + 1_000 + 20, id="partial behind a complete one"),
        pytest.param(("/small", "/own!"), 10 + 1_000 + 7 + FIFTY * 1_000, id="of unknown shape"),
        pytest.param(("/small", "/search"), 10 + 1_000, id="a search is no model"),
        pytest.param(("/small", "/zeros!"), 10 + 1_000 + 7 + WEIGHT * 1_000, id="placeholders behind a complete one"),
        pytest.param(("/small", "/zeros"), 10 + 1_000, id="a zero that was reported"),
    ],
)
def test_judge_each_upstream_exchange_by_itself(paths: tuple[str, ...], amount: int) -> None:
    """
    DESIGN 6: what reported to its end counts as reported, what broke as it was observed, and nothing hides another.

    The application transforms the answers, so that its own body shows none of their text.
    """
    entries = asyncio.run(charged(agent(*paths), 1))
    assert [str(entry.basis) for entry in entries] == ["observed"]
    assert entries[0].amount == pytest.approx(amount * MILLI, rel=0.001)


def test_take_the_body_where_no_upstream_exchange_reported() -> None:
    """DESIGN 6: the highest source that reported anything wins, and an exchange that reported nothing is none."""
    app = agent("/stream!", seen=json.dumps(chat(3, 2)).encode())
    assert [entry.amount for entry in asyncio.run(charged(app, 1))] == [2_003 * MILLI]


def test_estimate_never_less_than_what_was_observed() -> None:
    """A completed call whose answers reported in part is estimated, but never below what they show."""
    entries = asyncio.run(charged(agent("/small", "/stream")))
    assert [(entry.amount, str(entry.basis)) for entry in entries] == [
        ((10 + 1_000 + 7 + FIFTY * 1_000) * MILLI, "estimate")
    ]


@pytest.mark.parametrize(
    ("paths", "seen", "amount"),
    [
        pytest.param(("/stream",), b"made of it", 7 + FIFTY * 1_000, id="an exchange"),
        pytest.param((), delta() * 50, 7 + FIFTY * 1_000, id="the body"),
        pytest.param((), json.dumps({"results": [WORDS] * 50}).encode(), 7 + 5_000, id="no model's"),
    ],
)
def test_estimate_never_less_than_the_text_of_a_model(paths: tuple[str, ...], seen: bytes, amount: int) -> None:
    """DESIGN 4: where nobody reported the estimate stands, unless more of a model's own text passed than it expects."""
    entries = asyncio.run(charged(agent(*paths, seen=seen)))
    assert [(entry.amount, str(entry.basis), entry.estimated) for entry in entries] == [
        (amount * MILLI, "estimate", True)
    ]


@pytest.mark.parametrize(
    ("paths", "amount"),
    [
        pytest.param((), 1_000 * CREDIT, id="nothing was seen"),
        pytest.param(("/stream",), 10 * FIFTY * CREDIT, id="more was observed"),
    ],
)
def test_estimate_no_more_than_was_held(paths: tuple[str, ...], amount: int) -> None:
    """DESIGN "A hold's size": who was let in by `up_to` with less owes no guess beyond it, but all that was seen."""
    hold = up_to(TokenUsage(input=0, output=5_000), at_least=1)
    entries = asyncio.run(charged(agent(*paths, price=per_token(input=0, output=10), hold=hold)))
    assert [(entry.amount, str(entry.basis)) for entry in entries] == [(amount, "estimate")]


def test_charge_a_completed_call_by_the_reports_of_all_its_exchanges() -> None:
    """A completed call whose exchanges reported to their ends is charged by usage; other traffic changes nothing."""
    entries = asyncio.run(charged(agent("/small", "/search", "/small")))
    assert [(entry.amount, str(entry.basis)) for entry in entries] == [(2_020 * MILLI, "usage")]


def polled(*answers: tuple[str, str | None, dict[str, Any] | None], price: Any = PRICE) -> Any:
    """What a charge comes to that sends these: a method, the id of the response, and what it says of its usage."""
    told = iter(answers)

    def answer(_request: httpx2.Request) -> httpx2.Response:
        _, name, usage = next(told)
        return httpx2.Response(200, json={"id": name, "object": "response", "model": "m", "usage": usage})

    async def play() -> int:
        async with Metering() as metering:
            await metering.grant("ann", 1_000, id="g")
            client = metering.upstream_client("openai", wrap=httpx2.MockTransport(answer))
            async with client, metering.charge(payer="ann", line="agent", price=price, hold=100):
                for method, _, _ in answers:
                    await client.request(method, "http://models/v1/responses")
            return (await metering.balance("ann")).settled

    return asyncio.run(play())


DONE = {"input_tokens": 10, "output_tokens": 1, "total_tokens": 11}


@pytest.mark.parametrize(
    ("answers", "times"),
    [
        pytest.param([("POST", "r", None), ("GET", "r", None), *[("GET", "r", DONE)] * 3], 1, id="in the background"),
        pytest.param([("POST", "r", DONE), ("GET", "r", DONE)], 1, id="read again"),
        pytest.param([("GET", "r", DONE), ("GET", "s", DONE), ("GET", "r", None)], 2, id="several"),
        pytest.param([("GET", None, DONE)] * 2, 2, id="without an id"),
        pytest.param([("POST", "r", DONE)] * 2, 2, id="an id that is used again"),
    ],
)
@pytest.mark.parametrize("price", [PRICE, model_prices({"m": PRICE}, units_per_usd=1, published=False)])
def test_charge_an_answer_once_however_often_it_is_fetched(answers: Any, times: int, price: Any) -> None:
    """DESIGN 6: a poll shows the answer of another exchange, and has used nothing itself."""
    assert polled(*answers, price=price) == times * (10 + 1_000) * MILLI


# -- errors inside of an answer -----------------------------------------------------------------------------

ERRORS = {
    "anthropic": event({"type": "error", "error": {"type": "overloaded_error"}}),
    "openai": event({"error": {"message": "server had an error"}}),
    "behind usage": event(chat(9, 2)) + event({"error": {"message": "late"}}),
    "before usage": event({"error": {"message": "early"}}) + event(chat(9, 2)),
}


@pytest.mark.parametrize("chunk", ERRORS.values(), ids=list(ERRORS))
def test_error_inside_of_a_stream_is_a_failed_call(chunk: bytes) -> None:
    """DESIGN "End of call": an error behind a 200 is an error after the first byte, free by default, usage or not."""
    app = metered_app(sending("text/event-stream", [delta(), chunk]), billable(PRICE, hold=HOLD))

    async def play() -> None:
        async with staged(app) as stage:
            await stage.drive()
            assert await stage.charges() == []
            assert await stage.outcomes() == ["error"]

    asyncio.run(play())


def test_error_as_a_whole_body_is_a_failed_call() -> None:
    """A JSON body that is an error is one whatever its status says."""
    body = json.dumps({"error": {"message": "no capacity"}}).encode()
    assert asyncio.run(charged(metered_app(sending("application/json", [body]), billable(PRICE, hold=HOLD)))) == []


def test_error_inside_of_a_stream_is_charged_as_observed_by_choice() -> None:
    """A route that charges failures as observed gets what was written before the error."""
    app = metered_app(
        sending("text/event-stream", [delta(), ERRORS["openai"]]), billable(PRICE, hold=HOLD, on_late_error="observed")
    )
    assert [(e.amount, str(e.basis)) for e in asyncio.run(charged(app))] == [((7 + WEIGHT * 1_000) * MILLI, "observed")]


@pytest.mark.parametrize(
    ("paths", "amounts"),
    [
        pytest.param(("/error",), [], id="failed"),
        pytest.param(("/error", "/small"), [7 + WEIGHT * 1_000 + 1_010], id="tried again"),
    ],
)
def test_error_of_an_upstream_exchange_counts_unless_another_answered(
    paths: tuple[str, ...], amounts: list[int]
) -> None:
    """An error that only the upstream client saw fails the call; one that another answer made good does not."""
    entries = asyncio.run(charged(agent(*paths)))
    assert [entry.amount for entry in entries] == [amount * MILLI for amount in amounts]


@pytest.mark.parametrize("seen", [b'{"error": true}', b'{"object": "chat.completion", "error": "no"}'])
def test_error_that_a_model_was_asked_to_write_is_none(seen: bytes) -> None:
    """DESIGN 6: the upstream client ranks above the body, whose words may be its client's: nobody is free by them."""
    entries = asyncio.run(charged(agent("/small", "/small", seen=seen)))
    assert [(entry.amount, str(entry.basis)) for entry in entries] == [(2_020 * MILLI, "usage")]
    assert asyncio.run(charged(agent("/small", "/error", seen=seen))) == []


def test_handler_that_reports_says_itself_whether_it_failed() -> None:
    """The handler outranks the body (S2.42): what it reported is charged although the body speaks of an error."""

    @billable(PRICE, hold=HOLD)
    async def endpoint(_request: Request) -> JSONResponse:
        current_call().record(TokenUsage(input=1, output=0))
        return JSONResponse({"error": "of a tool, told to the user"})

    entries = asyncio.run(charged(Starlette(routes=[Route("/", endpoint)])))
    assert [(entry.amount, str(entry.basis)) for entry in entries] == [(MILLI, "usage")]


# -- prices that raise --------------------------------------------------------------------------------------


class Broken:
    """A custom price that knows one usage only."""

    def __init__(self, failure: Exception) -> None:
        self.failure = failure

    def cost(self, usage: TokenUsage) -> Decimal:
        if usage != HOLD:
            raise self.failure
        return Decimal(12)

    def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
        return 1


FAILURES = [TypeError("None"), KeyError("tier"), AttributeError("x"), RuntimeError("odd"), ZeroDivisionError()]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
@pytest.mark.parametrize(("policy", "amount"), [("estimate", 12), ("hold", 12), ("none", 0)])
def test_price_that_raises_falls_back_to_the_policy(
    failure: Exception, policy: Literal["estimate", "hold", "none"], amount: int, caplog: pytest.LogCaptureFixture
) -> None:
    """DESIGN 2: whatever a price raises, the call ends by the policy for missing usage, with an alarm."""

    async def play(stage: Stage) -> None:
        await stage.drive()
        assert sum(entry.amount for entry in await stage.charges()) == amount * CREDIT
        assert sum(stage.metering.meters.totals("usage_rejected").values()) == 1

    async def run() -> None:
        price = billable(Broken(failure), hold=HOLD, on_missing_usage=policy)
        async with staged(metered_app(sending("application/json", [json.dumps(chat(9, 2)).encode()]), price)) as stage:
            await play(stage)

    with caplog.at_level(logging.ERROR, "asgi_metering"):
        asyncio.run(run())
    assert "cannot be charged by usage" in caplog.text


@pytest.mark.parametrize("store", ["memory://", "sqlite"])
@pytest.mark.parametrize(
    ("policy", "basis", "amount"),
    [("estimate", "hold", 5_007), ("observed", "hold", 5_007), ("hold", "hold", 5_007), ("none", None, 0)],
)
def test_charge_beyond_what_is_counted_falls_back_to_the_policy(
    policy: Literal["estimate", "observed", "hold", "none"],
    basis: str | None,
    amount: int,
    store: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """DESIGN "Amounts": usage that no account can count is charged as if it was missing, with an alarm."""

    async def play(stage: Stage) -> None:
        await stage.metering.grant(PAYER, CREDITS.whole(MAX_AMOUNT - 1_000 * CREDIT), id="rest")
        await stage.metering.backfill(PAYER, CREDITS.whole(MAX_AMOUNT - 15 * CREDIT), id="b", line="l")
        await stage.drive()
        charges = [(str(entry.basis), entry.amount) for entry in (await stage.charges())[1:]]
        assert charges == ([] if basis is None else [(basis, amount * MILLI)])
        assert sum(stage.metering.meters.totals("usage_rejected").values()) == 1
        assert sum(stage.metering.meters.totals("events_dropped").values()) == 0
        assert await stage.outcomes() == ["corrected", "completed"]
        assert stage.events[1].attributes == {"uncharged_amount": 200_009 * MILLI - amount * MILLI}

    async def run() -> None:
        price = billable(PRICE, hold=HOLD, on_missing_usage=policy)
        app = metered_app(sending("application/json", [json.dumps(chat(9, 200)).encode()]), price)
        async with staged(app, store=store if ":" in store else f"sqlite:///{tmp_path / 'books.db'}") as stage:
            await play(stage)

    with caplog.at_level(logging.ERROR, "asgi_metering"):
        asyncio.run(run())
    assert "smallest parts: Account 'ada' would have spent and held" in caplog.text


def test_price_that_raises_does_not_stop_a_heartbeat(caplog: pytest.LogCaptureFixture) -> None:
    """DESIGN 4: a heartbeat whose observation cannot be priced carries 0, with an alarm, and renews the hold."""

    async def play() -> None:
        async with Metering(sinks=[]) as metering:
            await metering.grant("ada", 100, id="g")
            async with metering.charge(payer="ada", line="l", price=Broken(KeyError("tier")), hold=HOLD) as call:
                call.record(TokenUsage(output=1))
                assert await observed_parts(call) == 0

    with caplog.at_level(logging.ERROR, "asgi_metering"):
        asyncio.run(play())
    assert "cannot be priced" in caplog.text


def test_charge_no_less_than_was_told_where_the_policy_estimates() -> None:
    """A client that leaves when all of its answer was told pays no less than one that leaves before (DESIGN 4)."""

    @billable(per_token(input=1, output=1), hold=TokenUsage(input=1, output=4), on_disconnect="estimate")
    async def endpoint(_request: Request) -> StreamingResponse:
        current_call().record(TokenUsage(input=9, output=90))

        async def words() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b"word "

        return StreamingResponse(words())

    entries = asyncio.run(charged(Starlette(routes=[Route("/", endpoint)]), 2))
    assert [(entry.amount // 10**6, str(entry.basis)) for entry in entries] == [(99, "estimate")]


def test_aborted_call_before_its_first_byte_pays_what_was_reported() -> None:
    """DESIGN "End of call": before the first byte upstreams count as they reported, and their text does not."""

    async def play() -> None:
        async with Metering(sinks=[]) as metering:
            await metering.grant("ada", 10_000, id="g")
            transport = metering.upstream_transport("openai", wrap=Models())
            async with (
                httpx2.AsyncClient(transport=transport, base_url="http://models") as client,
                metering.charge(payer="ada", line="l", price=PRICE, hold=HOLD) as call,
            ):
                await client.get("/small")
                async with client.stream("GET", "/stream") as response:
                    async for _ in response.aiter_raw():
                        assert await observed_parts(call) == 1_010 * MILLI
                        break
                call.see(Cause.ABORTED)
                call.record(TokenUsage(input=1, output=0))

    asyncio.run(play())


@pytest.mark.parametrize(("price", "parts"), [("0.0000015", 2), ("0.0000014", 1), ("0.0000004", 0), ("2", 2 * CREDIT)])
def test_computed_price_is_rounded_once_half_up(price: str, parts: int) -> None:
    """DESIGN 2: a computed price that is finer than its unit is rounded to the smallest part, half up, and no error."""

    @billable(lambda: price)
    async def endpoint(_request: Request) -> JSONResponse:
        return JSONResponse({})

    entries = asyncio.run(charged(Starlette(routes=[Route("/", endpoint)])))
    assert sum(entry.amount for entry in entries) == parts


def test_give_up_the_text_of_an_answer_that_reported() -> None:
    """Text is kept while it may be needed: an agent's many answers that reported to their ends keep none."""
    kept: list[int] = []

    @billable(PRICE, hold=HOLD)
    async def endpoint(_request: Request) -> JSONResponse:
        call = current_call()
        transport = call.metering.upstream_transport("openai", wrap=Models())
        async with httpx2.AsyncClient(transport=transport, base_url="http://models") as client:
            for path in ("/whole", "/stream"):
                await client.get(path)
        kept.extend(reader.text_chars for _, reader, _ in call.exchanges)
        return JSONResponse({})

    whole = [delta(), event(chat(9, 2)), b"data: [DONE]\n\n"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Models.answers, "/whole", ("text/event-stream", whole))
        asyncio.run(charged(Starlette(routes=[Route("/", endpoint)])))
    assert kept == [0, 50 * len(WORDS)]
