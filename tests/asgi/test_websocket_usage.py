"""What a session used, read from the messages that the application sends: no handler reports it (DESIGN 6, X.4)."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest
from starlette.websockets import WebSocket

from asgi_metering import TokenUsage, billable, current_call, rate_limited, slices
from asgi_metering.asgi import cutting, utterances
from asgi_metering.billing import observed_parts
from asgi_metering.booking import UpstreamBooking
from asgi_metering.prices import above, model_prices, per_minute, per_token, per_unit
from asgi_metering.tokens import count_tokens
from asgi_metering.upstream.patient import PatientReader
from asgi_metering.usage.session import MAX_OPEN, SessionReader
from tests.asgi.sessions import CREDIT, Served, obedient, play, served
from tests.asgi.test_websocket_ends import ENDS, TOLD, client_closes, client_is_out_of_reach, client_vanishes
from tests.harness.sockets import Socket
from tests.usage.test_openai import chunk, delta
from tests.usage.test_session import answer, counts, lines, response, turn, used

PRICE = per_token(input=1, output=10)


def texts(*documents: Any) -> list[str]:
    """As they go over the wire."""
    return [json.dumps(each) for each in documents]


def relay(*decorators: Any, before: Callable[[], Any] = lambda: None) -> Any:
    """A new endpoint that sends each of the client's words as a message of its upstream's, decorated so."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        before()
        async for text in websocket.iter_text():
            await websocket.send_text(text)

    for decorate in reversed(decorators):
        talk = decorate(talk)
    return talk


async def said(scene: Served, *messages: str, code: int = 1000) -> Socket:
    """A session in which the application says these, and whose client leaves by *code*."""
    async with scene.socket() as socket:
        socket.say(*messages)
        await socket.heard(len(messages))
        socket.leave(code)
    return socket


def session(*messages: str, granted: int = 10_000, code: int = 1000, price: Any = PRICE, **options: Any) -> Any:
    """The usage event of a session in which the application says these; its books are proven."""
    events: list[Any] = []

    async def story() -> None:
        async with served(relay(billable(price, **{"hold": 500, **options})), granted=granted) as scene:
            await said(scene, *messages, code=code)
            found.extend((await scene.books(), await scene.charges()))
        events.extend(scene.events)

    found: list[Any] = []
    play(story)
    (event,), (books, charges) = events, found
    assert books == (event.amount // CREDIT, 0)
    assert charges in ([], [(event.basis, event.amount // CREDIT)])
    return event


# -- what is charged ---------------------------------------------------------------------------------------


def test_charge_a_realtime_session_for_what_its_responses_told() -> None:
    """Each response counts one use of the model, transcriptions theirs, and their sum is charged at the end."""
    event = session(*lines("openai-realtime-session.ndjson"))
    assert (event.amount // CREDIT, event.basis, event.usage_source) == (253 + 13 + 340 + 1_580, "usage", "body")
    assert (event.usage.input, event.usage.output, event.usage.cached) == (606, 158, 384)
    assert (event.outcome, event.model, event.provider) == ("completed", "gpt-4o-mini-transcribe", "openai-realtime")
    rows = json.loads(event.attributes["metering.models"])
    assert [(row["model"], row["calls"], row["usage"]["input"]) for row in rows] == [
        ("gpt-realtime", 2, 593),
        ("gpt-4o-mini-transcribe", 2, 13),
    ]


def test_charge_a_live_session_for_its_turns() -> None:
    """The turns of a Live session are added."""
    event = session(*lines("gemini-live-session.ndjson"))
    assert event.amount // CREDIT == 143 + 205 + 224 + 10 * (26 + 24 + 12)
    assert event.usage_source == "body"


def test_price_each_response_by_its_own_model_and_length() -> None:
    """Tiers by the length of the context and prices by name are those of each response, and not of the session."""
    short, long = per_token(input=1, output=0, tiers=[above(300, input=2)]), per_token(input=7, output=0)
    prices = model_prices(
        {"gpt-realtime": short, "gpt-4o-mini-transcribe": [long, per_minute(60)]}, units_per_usd=1, published=False
    )
    event = session(*lines("openai-realtime-session.ndjson"), price=prices)
    assert event.amount / CREDIT == 253 + 340 * 2 + 13 * 7 + 2.5


def test_price_the_seconds_of_a_transcription() -> None:
    """What is counted by duration is charged by a price per time."""
    event = session(*lines("openai-realtime-session.ndjson"), price=per_minute(6_000))
    assert event.amount // CREDIT == 250


def test_say_that_a_price_of_tokens_leaves_seconds_free() -> None:
    """S3.20: what is counted by duration alone costs nothing by the token, which is not silent."""
    event = session(*lines("openai-realtime-session.ndjson"))
    assert event.attributes["metering.price.flags"] == "cost_unresolved"
    event = session(*texts(response(1, "done", status="completed", **counts(9, 2))))
    assert "metering.price.flags" not in event.attributes


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
def test_charge_what_was_told_however_a_session_ends(end: Any) -> None:
    """Conformance of end rows: answers that were told whole are charged as told, whoever ends the session, and how."""

    async def story() -> None:
        async with served(obedient(billable(PRICE, hold=500)), granted=1_000) as scene:
            async with scene.socket(spec_version="2.4") as socket:
                messages = texts(*answer("a", 9, 2), *answer("b", 20, 3))
                socket.say(*messages)
                await socket.heard(len(messages))
                await end(scene, socket)
            assert await scene.books() == (79, 0)
            assert await scene.charges() == [(ENDS[end][1], 79)]
        assert [(event.outcome, event.usage_source) for event in scene.events] == [(ENDS[end][0], "body")]

    play(story)


@pytest.mark.parametrize("end", [each for each in ENDS if each not in (client_is_out_of_reach, *TOLD)])
def test_charge_what_was_seen_of_an_answer_that_broke(end: Any) -> None:
    """An answer that a session broke off is observed: its text is counted, beside what the others told."""
    words = "Once upon a time there was a meter."
    events: list[Any] = []

    async def story() -> None:
        async with served(obedient(billable(PRICE, hold=500)), granted=1_000) as scene:
            async with scene.socket(spec_version="2.4") as socket:
                messages = texts(*answer("a", 9, 2), *answer("b", 20, 3, words)[:2])
                socket.say(*messages)
                await socket.heard(len(messages))
                await end(scene, socket)
            await scene.books()
        events.extend(scene.events)

    play(story)
    (event,) = events
    if ENDS[end][0] == "completed":
        # As of any answer whose usage is missing; never less than what was observed.
        assert (event.amount // CREDIT, event.basis) == (500, "estimate")
    else:
        assert event.amount // CREDIT == 9 + 20 + 10 * count_tokens(words).tokens
        assert (event.basis, event.usage_source, event.usage.input) == ("observed", "tokenizer", 9)


def test_charge_texts_that_nobody_claims_as_observed() -> None:
    """Words that are sent bare are counted where their client vanishes, with the input that was estimated once."""
    hold = TokenUsage(input=30, output=50)
    event = session("Once upon a time ", "there was a meter.", code=1006, hold=hold)
    assert (event.basis, event.usage_source) == ("observed", "tokenizer")
    assert event.amount // CREDIT == 30 + 10 * count_tokens("Once upon a time there was a meter.").tokens
    marked = session("Once upon a time ", "[DONE]", "there was a meter.", code=1006, hold=hold)
    assert (marked.basis, marked.amount) == (event.basis, event.amount)
    silent = session("Once upon a time ", code=1000, hold=hold)
    assert (silent.basis, silent.amount // CREDIT) == ("estimate", 530)


def test_charge_the_input_of_a_session_once() -> None:
    """Where no answer of a session told any input, the estimate's is that of all of them."""
    hold = TokenUsage(input=30, output=50)
    broken = [each for key in "abc" for each in answer(key, 9, 2, "Hello")[:2]]
    event = session(*texts(*broken), code=1006, hold=hold)
    assert (event.usage.input, event.basis) == (30, "observed")


def test_take_usage_of_ones_own_shape_for_a_running_total() -> None:
    """A usage object in messages that are nobody's is read as of a body: of several the last one counts."""
    event = session(*texts({"said": "Hi"}, {"usage": used(9, 2)}, {"said": "Ho"}, {"usage": used(20, 4)}))
    assert (event.amount // CREDIT, event.basis) == (60, "usage")
    both = session(*texts(*answer("a", 9, 2), {"total": True, "usage": used(20, 4)}))
    assert both.amount // CREDIT == 29


# -- which source counts -----------------------------------------------------------------------------------


def test_let_the_handler_outrank_its_messages() -> None:
    """What the handler records itself is all that counts, and the event says so."""

    async def story() -> None:
        reports = relay(billable(PRICE, hold=500), before=lambda: current_call().record(TokenUsage(1, 1)))
        async with served(reports, granted=1_000) as scene:
            await said(scene, *texts(*answer("a", 9, 2)))
            assert await scene.books() == (11, 0)
        assert [event.usage_source for event in scene.events] == ["handler"]

    play(story)


def test_let_an_upstream_client_outrank_the_messages() -> None:
    """What the application makes of its upstream's answers is not counted beside them."""

    async def story() -> None:
        def asks() -> None:
            booking = UpstreamBooking(scene.metering)
            token, reader = booking.started("acme"), PatientReader("application/json")
            booking.body_started(token, "acme", reader, 200)
            reader.feed(json.dumps({"object": "chat.completion", "choices": [], "usage": used(5, 1)}).encode())
            reader.end()
            booking.finished(token, "acme", reader, 200)

        async with served(relay(billable(PRICE, hold=500), before=asks), granted=1_000) as scene:
            await said(scene, *texts(*answer("a", 9, 2)))
            assert await scene.books() == (15, 0)
        assert [event.usage_source for event in scene.events] == ["upstream"]

    play(story)


def test_read_nothing_that_a_client_says() -> None:
    """A client makes neither itself nor others pay more or less by what it sends."""

    @billable(PRICE, hold=500)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for message in texts(*answer("a", 9, 2)):
            await websocket.send_text(message)
        async for _ in websocket.iter_text():
            await websocket.send_bytes(b"\x00\x01")

    async def story() -> None:
        async with served(talk, granted=1_000) as scene:
            async with scene.socket() as socket:
                socket.say(*texts(*answer("b", 900, 200), response(1, "done", **counts(0, 0)), {"error": True}))
                await socket.until(lambda: len(socket.log) == 11)
                socket.leave()
            assert await scene.books() == (29, 0)

    play(story)


def test_end_nothing_by_an_error_among_the_messages() -> None:
    """A mistake of the client's own, which its session survives, is no failure of the call: it would be free by one."""
    error = {"type": "error", "event_id": "e", "error": {"type": "invalid_request_error", "message": "No."}}
    event = session(*texts(response(1, "done", **counts(9, 2)), error), on_late_error="none")
    assert (event.outcome, event.amount // CREDIT) == ("completed", 29)


def test_count_no_message_that_the_server_did_not_take() -> None:
    """What was refused by the server, or sent behind our close, has reached nobody."""

    @billable(PRICE, hold=500)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        first, *others = texts({"usage": used(9, 2)}, {"usage": used(90, 20)})
        await websocket.send_text(first)
        await websocket.receive_text()
        for other in others:
            await websocket.send_text(other)

    async def story() -> None:
        async with served(talk, granted=1_000) as scene:
            async with scene.socket() as socket:
                await socket.heard(1)
                socket.is_gone = True
                socket.say("go on")
            await scene.books()
        assert [(event.usage.input, event.outcome) for event in scene.events] == [(9, "client_gone")]

    play(story)


def test_count_no_message_of_a_call_that_was_not_let_in() -> None:
    """What is sent before the session asks for admission is free, and so is all of one that is refused."""

    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(texts(response(1, "done", **counts(9, 2)))[0])
        await current_call().admit(billable(PRICE, hold=500))
        await websocket.send_text(texts(response(2, "done", **counts(20, 3)))[0])

    async def story() -> None:
        async with served(talk, granted=1_000) as scene:
            async with scene.socket(), scene.socket(key="bob") as refused:
                pass
            assert len(refused.texts) == 1
            assert await scene.books() == (50, 0)

    play(story)


# -- usage that cannot be ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"input_tokens": -9}, {"output_tokens": 10**15}, {"input_tokens": 2.5}])
def test_refuse_usage_that_cannot_be(bad: dict[str, Any]) -> None:
    """S3.21: an absurd count refuses its answer, with an alarm, and the policy says what is charged instead."""
    told = counts(9, 2)
    told["usage"] |= bad
    event = session(*texts(response(1, "done", **counts(9, 2)), response(2, "done", **told)))
    assert (event.basis, event.amount // CREDIT) == ("estimate", 500)
    assert "invalid_count" in event.attributes["metering.usage.problems"]
    observed = session(*texts(response(1, "done", **told)), on_missing_usage="none")
    assert observed.amount == 0


def test_alarm_over_usage_that_cannot_be() -> None:
    """The operator's meters count it."""

    async def story() -> None:
        async with served(relay(billable(PRICE, hold=500)), granted=1_000) as scene:
            await said(scene, *texts(response(1, "done", **counts(-9, 2))))
            await scene.books()
            assert sum(scene.metering.meters.totals("usage_rejected").values()) == 1

    play(story)


# -- holds that grow, limits, and bounds -------------------------------------------------------------------


def test_cut_a_session_that_its_messages_have_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hold in slices grows by what was told, before a heartbeat comes, and the session is closed where it cannot."""
    monkeypatch.setattr(cutting, "SILENT_S", 0.01)

    @billable(PRICE, hold=slices(50))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for number in range(1_000):
            await websocket.send_text(texts(response(number, "done", status="completed", **counts(9, 2)))[0])
            await asyncio.sleep(0)

    async def story() -> None:
        async with served(talk, granted=300) as scene:
            async with scene.socket() as socket:
                pass
            assert socket.closed == (4402, "insufficient_credits: Insufficient credits")
            heard = len(socket.texts)
            assert 10 <= heard < 30
            assert await scene.books() == (heard * 29, 0)
            assert await scene.charges() == [("observed", heard * 29)]
        assert [event.outcome for event in scene.events] == ["cut"]

    play(story)


def test_grow_a_hold_with_what_was_told() -> None:
    """A session that can pay goes on, held for ahead of what it uses."""

    async def story() -> None:
        async with served(relay(billable(PRICE, hold=slices(50))), granted=1_000) as scene:
            async with scene.socket() as socket:
                for number in range(20):
                    socket.say(*texts(response(number, "done", status="completed", **counts(9, 2))))
                    await socket.heard(number + 1)
                    await asyncio.sleep(0)
                _, held = await scene.account()
                assert held >= 19 * 29
                socket.leave()
            assert await scene.books() == (580, 0)

    play(story)


def test_tell_a_heartbeat_what_was_used() -> None:
    """What a killed worker leaves behind is what its last heartbeat knew of the messages."""

    async def story() -> None:
        async with served(relay(billable(PRICE, hold=500)), granted=1_000) as scene:
            async with scene.socket() as socket:
                socket.say(*texts(*answer("a", 9, 2)))
                await socket.heard(4)
                (call,) = scene.metering.runtime().in_flight.values()
                assert await observed_parts(call) == 29 * CREDIT
                socket.leave()
            assert await scene.books() == (29, 0)

    play(story)


def test_count_the_tokens_of_messages_by_a_limit() -> None:
    """A limit of tokens counts what was told, and lets the next session in or not."""
    route = [rate_limited("100/hour of tokens"), billable(PRICE, hold=TokenUsage(10, 1))]

    async def story() -> None:
        async with served(relay(*route), granted=1_000) as scene:
            await said(scene, *texts(*answer("a", 90, 9)))
            assert await scene.books() == (180, 0)
            async with scene.socket() as refused:
                pass
            assert "accept" not in refused.kinds

    play(story)


@pytest.mark.parametrize("price", [{"price": 2}, {"price": 1, "per": "message"}])
def test_keep_no_message_where_usage_does_not_matter(price: dict[str, Any]) -> None:
    """A fixed price watches nothing."""
    watched: list[Any] = []

    async def story() -> None:
        watches = relay(billable(**price), before=lambda: watched.append(current_call().observer))
        async with served(watches) as scene:
            await said(scene, "a")
            await scene.books()

    play(story)
    assert watched == [None]


def test_read_nothing_on_the_path_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are kept as they are until somebody asks; beyond a bound they are read at once, and none is dropped."""
    fed: list[int] = []
    read = SessionReader.read

    def counts_them(reader: SessionReader, message: str | bytes) -> Iterator[int]:
        fed.append(len(message))
        return read(reader, message)

    monkeypatch.setattr(SessionReader, "read", counts_them)
    monkeypatch.setattr(utterances, "EACH", 0)

    def play_(messages: list[str]) -> list[int]:
        async def story() -> None:
            async with served(talks, granted=1_000) as scene:
                async with scene.socket():
                    pass
                assert await scene.books() == (29, 0)

        seen: list[int] = []

        @billable(PRICE, hold=500)
        async def talks(websocket: WebSocket) -> None:
            await websocket.accept()
            for message in messages:
                await websocket.send_text(message)
                seen.append(len(fed))

        fed.clear()
        play(story)
        return seen

    messages = texts(*answer("a", 9, 2))
    assert play_(messages) == [0] * 4
    monkeypatch.setattr(utterances, "MAX_WAITING", len(messages[0]) + len(messages[1]) - 1)
    assert play_(messages) == [0, 2, 2, 2]


@pytest.mark.parametrize("many", ["messages", "lines", "events", "array"])
def test_let_others_have_their_turns_while_messages_are_read(many: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much an application sends at once, the event loop is not held up by what is read of it."""
    number, done = 600, texts(response(1, "done", status="completed", **counts(9, 2)))[0]
    word = texts({"type": "response.output_text.delta", "event_id": "e", "response_id": "resp_1", "delta": "x"})[0]
    sent = {
        "messages": [word] * number,
        "lines": ["\n".join([word] * number)],
        "events": ["".join([f"data: {word}\n\n"] * number)],
        "array": [f"[{','.join([word] * number)}]"],
    }[many]
    turns, reads = [0], dict[int, int]()
    take = SessionReader._take

    def counts_them(reader: SessionReader, data: bytes) -> None:
        reads[turns[0]] = reads.get(turns[0], 0) + 1
        take(reader, data)

    monkeypatch.setattr(SessionReader, "_take", counts_them)

    @billable(PRICE, hold=500)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for message in (*sent, done):
            await websocket.send_text(message)

    async def others() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def story() -> None:
        task = asyncio.ensure_future(others())
        async with served(talk, granted=1_000) as scene:
            async with scene.socket():
                pass
            assert await scene.books() == (29, 0)
        task.cancel()

    play(story)
    assert sum(reads.values()) == number + 1
    assert max(reads.values()) <= 70


def test_survive_a_price_that_raises_where_answers_are_summed(caplog: pytest.LogCaptureFixture) -> None:
    """What reads the messages breaks no session; all of its answers are kept then, and charged."""

    class Peculiar:
        def cost(self, usage: TokenUsage) -> Decimal:
            return Decimal(usage.total or 0)

        def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
            return 0

        def kind_of(self, call: Any) -> Any:
            raise RuntimeError("no kind")

    many = 40
    done = [response(number, "done", status="completed", **counts(9, 2)) for number in range(many)]
    event = session(*texts(*done), price=Peculiar())
    assert (event.amount // CREDIT, event.basis) == (11 * many, "usage")
    assert "could not be summed" in caplog.text


def test_survive_a_reader_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A message that cannot be read, for whatever reason, is passed over with an alarm, and no other one."""
    take = SessionReader._take

    def fails(reader: SessionReader, data: bytes) -> None:
        if b"resp_1" in data:
            raise RuntimeError("odd")
        take(reader, data)

    monkeypatch.setattr(SessionReader, "_take", fails)
    monkeypatch.setattr(utterances, "MAX_WAITING", 0)
    event = session(*texts(*(response(number, "done", status="completed", **counts(9, 2)) for number in range(3))))
    assert (event.amount // CREDIT, event.outcome) == (58, "completed")
    assert "could not be read" in caplog.text


def test_read_what_was_sent_and_not_what_became_of_its_buffer() -> None:
    """A buffer that the application writes over is read as it was when it was sent."""

    @billable(PRICE, hold=500)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for number in range(2):
            message = bytearray(texts(response(number, "done", status="completed", **counts(9, 2)))[0].encode())
            await websocket.send({"type": "websocket.send", "bytes": memoryview(message)})
            message[:] = b" " * len(message)

    async def story() -> None:
        async with served(talk, granted=1_000) as scene:
            async with scene.socket():
                pass
            assert await scene.books() == (58, 0)

    play(story)


def test_count_words_by_the_usage_that_the_application_tells_of_them() -> None:
    """Usage of one's own shape is that of words in a provider's; where their answers told any it is not added."""
    words = [{"type": "text-delta", "id": "t", "delta": "Hello"}, {"type": "done", "usage": used(9, 2)}]
    event = session(*texts(*words))
    assert (event.amount // CREDIT, event.basis) == (29, "usage")
    event = session(*texts(*words, *answer("a", 20, 3)))
    assert (event.amount // CREDIT, event.basis) == (500, "estimate")
    refused = response(1, "done", status="completed", **counts(-9, 2))
    assert session(*texts(refused, {"type": "done", "usage": used(9, 2)})).basis == "estimate"


def test_keep_little_of_a_session_of_hours() -> None:
    """Of thousands of answers a few are kept, the others are a sum, and all of them are charged, each in its tier."""
    price = per_token(input=1, output=0, tiers=[above(100, input=2)])
    many = 200
    kept: list[Any] = []

    @billable(price, hold=slices(100))
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        for number in range(many):
            done = response(number, "done", status="completed", **counts(200 if number % 2 else 50, 1))
            for message in texts({**response(number, "created")}, done):
                await websocket.send_text(message)
        observer = current_call().observer
        assert observer is not None
        assert observer.answers is not None
        kept.append((len(observer.answers), len(observer.answers.sums or {})))

    async def story() -> None:
        async with served(talk, granted=10**9) as scene:
            async with scene.socket():
                pass
            assert await scene.books() == (many // 2 * 450, 0)
        (event,) = scene.events
        assert event.usage == TokenUsage(many // 2 * 250, many)

    play(story)
    ((answers, sums),) = kept
    assert answers <= MAX_OPEN
    assert sums == 2


@pytest.mark.parametrize("many", [1, 40])
def test_charge_all_that_answers_told_besides_tokens(many: int) -> None:
    """Searches, citations and service tiers of a session's answers are priced, by themselves and in their sum."""
    tokens = per_token(input=1, output=1, services={"priority": 2}, web_search=100)
    prices = model_prices({"m": [tokens, per_unit(citation_tokens=3)]}, units_per_usd=1, published=False)
    told = {**used(10, 2), "citation_tokens": 5, "num_search_queries": 2}
    end = chunk(choices=[{"finish_reason": "stop"}], model="m", service_tier="priority", usage=told)
    messages = [{**each, "id": f"a{number}"} for number in range(many) for each in (delta(role="assistant"), end)]
    event = session(*texts(*messages), price=prices, granted=10**5)
    assert (event.amount // CREDIT, event.basis) == (many * (2 * 12 + 200 + 15), "usage")


def test_sum_answers_that_never_ended() -> None:
    """Of very many that were stopped the text is counted when they are given up, and the input of none is made up."""
    many = 40
    started = [each for number in range(many) for each in answer(f"a{number}", 9, 2, "Hello there")[:2]]
    event = session(*texts(*started, *answer("z", 9, 2)), code=1006, hold=TokenUsage(input=50, output=5))
    assert event.usage.input == 9
    assert many * 2 <= event.usage.output <= many * 4
    assert event.basis == "observed"


def test_leave_no_session_behind() -> None:
    """What watches a session keeps its call no longer than anybody else does."""
    calls: list[Any] = []

    async def story() -> None:
        watches = relay(billable(PRICE, hold=500), before=lambda: calls.append(current_call().observer))
        async with served(watches, granted=1_000) as scene:
            await said(scene, *texts(*answer("a", 9, 2)))
            await scene.books()

    contextvars.Context().run(play, story)
    (watcher,) = calls
    assert watcher._call() is None


def test_name_the_dialect_of_a_session() -> None:
    """``usage=`` says whose messages they are where their shape would mislead."""
    event = session(*texts({"choices": [{"finish_reason": "stop"}], "usage": used(9, 2)}), usage="openai-chat")
    assert (event.usage.input, event.provider) == (9, "openai-chat")


def test_charge_bytes_and_texts_alike() -> None:
    """A JSON text may be sent as bytes."""

    @billable(PRICE, hold=500)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_json({"serverContent": {"turnComplete": True}, "usageMetadata": turn(9, 2)}, mode="binary")
        await websocket.send_text("")

    async def story() -> None:
        async with served(talk, granted=1_000) as scene:
            async with scene.socket():
                pass
            assert await scene.books() == (29, 0)

    play(story)


def test_afford_what_the_messages_have_left() -> None:
    """`affordable` and `remaining` count what the session's messages told."""
    left: list[Any] = []

    @billable(PRICE, hold=100)
    async def talk(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text(texts(chunk(choices=[{"finish_reason": "stop"}], usage=used(10, 2)))[0])
        left.extend((current_call().affordable("output"), current_call().remaining))

    async def story() -> None:
        async with served(talk, granted=1_000) as scene:
            async with scene.socket():
                pass
            await scene.books()

    play(story)
    assert left == [7, 70]


@pytest.mark.parametrize("options", [{"hold": slices(50)}, {"hold": 50, "on_missing_usage": "observed"}])
@pytest.mark.parametrize("end", [client_closes, client_vanishes])
def test_count_bare_words_whoever_ends_the_session(end: Any, options: dict[str, Any]) -> None:
    """Nothing else tells of them, so that a client which closes in good order pays what one does that vanishes."""
    words = ["Once upon a time", " there was", " a meter."]

    async def story() -> None:
        async with served(obedient(billable(per_token(output=1), **options))) as scene:
            async with scene.socket() as socket:
                socket.say(*words)
                await socket.heard(3)
                await end(scene, socket)
            assert await scene.books() == (count_tokens("".join(words)).tokens, 0)

    play(story)


@pytest.mark.parametrize("end", [client_closes, client_vanishes])
def test_charge_nothing_for_a_model_that_nobody_asked(end: Any) -> None:
    """A session in slices that used nothing costs nothing."""

    async def story() -> None:
        async with served(obedient(billable(PRICE, hold=slices(50)))) as scene:
            async with scene.socket() as socket:
                socket.say(lines("openai-realtime-session.ndjson")[0])
                await socket.heard(1)
                await end(scene, socket)
            assert await scene.books() == (0, 0)

    play(story)
