"""Sessions: which message belongs to which answer, and that each answer is counted once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError
from asgi_metering.usage import TokenUsage, UsageReader, dialects, register_dialect, session
from asgi_metering.usage.notes import Dialect
from asgi_metering.usage.session import MAX_OPEN, SessionReader
from asgi_metering.usage.skim import Marks
from tests.usage.test_openai import chunk, delta
from tests.usage.vectors import FOLDER, body


class Read:
    """What was read of these messages: a text or bytes as they are, all else as JSON."""

    def __init__(self, *messages: Any, dialect: str | None = None) -> None:
        self.begun: list[tuple[str, UsageReader]] = []
        self.reader = SessionReader(dialect, lambda name, reader: self.begun.append((name, reader)))
        self.say(*messages)

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.reader.feed(message if isinstance(message, str | bytes) else json.dumps(message))

    @property
    def usages(self) -> list[TokenUsage | None]:
        """Of each answer."""
        reports = [reader.report() for _, reader in self.begun]
        return [None if report is None else report.usage for report in reports]

    @property
    def ended(self) -> list[bool]:
        """Whether each answer has ended."""
        return [reader.ended for _, reader in self.begun]

    @property
    def models(self) -> list[str | None]:
        """Who gave each answer."""
        reports = [reader.report() for _, reader in self.begun]
        return [None if report is None else report.model for report in reports]

    @property
    def rest(self) -> TokenUsage | None:
        """What was told by nobody's marks."""
        report = self.reader.rest.report()
        return None if report is None else report.usage


def lines(name: str) -> list[str]:
    """The messages of a recorded session."""
    return (FOLDER / name).read_text().splitlines()


def used(asked: int, given: int) -> dict[str, Any]:
    """A usage object of a chat."""
    return {"prompt_tokens": asked, "completion_tokens": given, "total_tokens": asked + given}


def answer(key: str | None, asked: int, given: int, words: str = "Hi", **fields: Any) -> list[dict[str, Any]]:
    """The chunks of one chat completion."""
    chunks = [
        delta(role="assistant", content=""),
        delta(content=words),
        chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        chunk(choices=[], usage=used(asked, given)),
    ]
    return [{**each, "id": key, **fields} for each in chunks]


def response(number: int, kind: str, **fields: Any) -> dict[str, Any]:
    """An event of a realtime response."""
    told = {"object": "realtime.response", "id": f"resp_{number}", **fields}
    return {"type": f"response.{kind}", "event_id": "e", "response": told}


def counts(asked: int, given: int, **fields: Any) -> dict[str, Any]:
    """A usage object of a realtime response."""
    return {"usage": {"input_tokens": asked, "output_tokens": given, "total_tokens": asked + given, **fields}}


def turn(asked: int, given: int) -> dict[str, Any]:
    """A usage object of a Live session."""
    return {"promptTokenCount": asked, "responseTokenCount": given, "totalTokenCount": asked + given}


VOICE = {"modelTurn": {"parts": [{"inlineData": {"mimeType": "audio/pcm", "data": "AAEC"}}]}}


# -- OpenAI Realtime ---------------------------------------------------------------------------------------


def test_count_each_response_of_a_realtime_session_by_itself() -> None:
    """Every `response.done` is an answer of the session's model, every transcription one of its transcriber's."""
    read = Read(*lines("openai-realtime-session.ndjson"))
    assert read.usages == [
        TokenUsage(253, 121, cached=128, audio=148, audio_output=91, image_input=0),
        TokenUsage(13, 9, audio=13, audio_output=0),
        TokenUsage(340, 28, cached=256, audio=72, audio_output=20, image_input=0),
        TokenUsage(0, 0),
        None,
    ]
    assert read.models == [*["gpt-realtime", "gpt-4o-mini-transcribe"] * 2, "gpt-realtime"]
    assert read.ended == [True] * 5
    reports = [reader.report() for _, reader in read.begun]
    assert [each.seconds for each in reports if each is not None] == [None, None, None, Decimal("2.5"), None]
    assert [each.finish_reason for each in reports if each is not None] == [
        "completed",
        None,
        "cancelled",
        None,
        "failed",
    ]
    assert read.rest is None


def test_take_what_is_read_from_a_cache_for_no_voice() -> None:
    """Cached voices and pictures are cached tokens: what remains of each is what has its own price."""
    details = {"audio_tokens": 50, "image_tokens": 30, "cached_tokens": 60}
    details["cached_tokens_details"] = {"audio_tokens": 40, "image_tokens": 20}  # type: ignore[assignment]
    read = Read(response(1, "done", **counts(100, 9, input_token_details=details)))
    assert read.usages == [TokenUsage(100, 9, cached=60, audio=10, audio_output=0, image_input=10)]


@pytest.mark.parametrize("kind", ["audio_tokens", "image_tokens"])
def test_refuse_more_cached_voice_than_there_is(kind: str) -> None:
    """S3.21: whoever contradicts himself is not believed, in any part of the details."""
    details = {kind: 5, "cached_tokens": 6, "cached_tokens_details": {kind: 6}}
    read = Read(response(1, "done", **counts(100, 9, input_token_details=details)))
    assert read.usages == [None]


def test_tell_responses_apart_that_run_side_by_side() -> None:
    """A response outside of the conversation may end before the one that began first."""
    words = {"type": "response.output_text.delta", "event_id": "e", "delta": "x"}
    read = Read(
        response(1, "created"),
        {**words, "response_id": "resp_1"},
        response(2, "created"),
        {**words, "response_id": "resp_2"},
        response(1, "done", status="completed", **counts(10, 1)),
        {**words, "response_id": "resp_2"},
        response(2, "done", status="completed", **counts(20, 2)),
    )
    assert read.usages == [TokenUsage(10, 1), TokenUsage(20, 2)]
    assert read.ended == [True, True]


def test_count_a_response_that_is_told_again_once() -> None:
    """An application that says everything twice is charged once, also for what was over long ago."""
    ends = [response(number, "done", **counts(10, number)) for number in range(MAX_OPEN + 3)]
    read = Read(*ends, *ends)
    assert read.usages == [TokenUsage(10, number) for number in range(MAX_OPEN + 3)]


def test_remember_so_many_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered of them is bounded."""
    monkeypatch.setattr(session, "MAX_SHOWN", 2)
    ends = [response(number, "done", **counts(10, number)) for number in range(9)]
    read = Read(*ends, *ends[4:])
    assert len(read.begun) == 9
    read.say(ends[0])
    assert len(read.begun) == 10


def test_read_a_realtime_session_without_ids() -> None:
    """Ends alone tell answers apart, where an application leaves all else out; events of Responses' look are of it."""
    done = {"type": "response.done", "event_id": "e", "response": {"status": "completed", **counts(10, 2)}}
    words = {"type": "response.output_text.delta", "delta": "x", "sequence_number": 1}
    read = Read(done, done, {**words, "event_id": "e"}, words)
    assert read.usages == [TokenUsage(10, 2), TokenUsage(10, 2), None]
    heard = {"type": "conversation.item.input_audio_transcription.completed", "event_id": "e"}
    read.say({**heard, **counts(3, 1)}, {**heard, "usage": {"type": "duration", "seconds": 4}})
    read.say({**heard, "usage": {}})
    assert read.usages[3:] == [TokenUsage(3, 1), TokenUsage(0, 0), None]
    assert read.begun[2][1].text() == "xx"


@pytest.mark.parametrize("seconds", [-1, True, "7", None, float("nan"), 10**9])
def test_believe_no_impossible_time(seconds: Any) -> None:
    """S3.21: seconds are numbers from zero on, and no more than there are."""
    heard = {"type": "conversation.item.input_audio_transcription.completed", "event_id": "e", "item_id": "i"}
    read = Read({**heard, "usage": {"type": "duration", "seconds": seconds}})
    report = read.begun[0][1].report()
    assert report is not None
    assert (report.usage, report.seconds, report.problems) == (None, None, ("invalid_count",))


def test_name_the_models_of_the_session_as_it_is_now() -> None:
    """A session may change its models; one that names none leaves its answers without."""
    settings = {"model": "a", "input_audio_transcription": {"model": "b"}}
    heard = {"type": "conversation.item.input_audio_transcription.completed", "event_id": "e", **counts(1, 1)}
    read = Read(
        response(0, "done", **counts(1, 1)),
        {"type": "session.created", "event_id": "e", "session": settings},
        response(1, "done", **counts(1, 1)),
        {**heard, "item_id": "i"},
        {"type": "session.updated", "event_id": "e", "session": {"model": "c"}},
        response(2, "done", model="own", status="incomplete", status_details={"reason": "max_output_tokens"}),
        {**heard, "item_id": "j"},
    )
    assert read.models == [None, "a", "b", "own", None]
    report = read.begun[3][1].report()
    assert report is not None
    assert report.truncated()


# -- Gemini Live -------------------------------------------------------------------------------------------


def test_add_the_turns_of_a_live_session() -> None:
    """Turns are added; of several counts in one turn the last is taken for all of it, and a lower one is another's."""
    read = Read(*lines("gemini-live-session.ndjson"))
    assert read.usages == [
        TokenUsage(143, 26, reasoning=7, audio=62, audio_output=19, image_input=0, image_output=0),
        TokenUsage(205, 24, audio=89, audio_output=24, image_input=0, image_output=0),
        TokenUsage(224, 12, audio=86, audio_output=12, image_input=0, image_output=0),
    ]
    assert read.ended == [True, True, True]
    assert {name for name, _ in read.begun} == {"gemini-live"}
    say = {"serverContent": VOICE}
    falls = Read(say, {"usageMetadata": turn(10, 9)}, {"usageMetadata": turn(20, 4)})
    assert falls.usages == [TokenUsage(10, 9), TokenUsage(20, 4)]


def test_read_a_live_session_as_the_sdk_writes_it() -> None:
    """The Python SDK's models have other names for the same fields."""
    usage = {"prompt_token_count": 9, "response_token_count": 4, "total_token_count": 13}
    usage["response_tokens_details"] = [{"modality": "AUDIO", "token_count": 3}]  # type: ignore[assignment]
    ground = {"grounding_metadata": {"web_search_queries": ["a", "b"]}, "turn_complete": True}
    read = Read(
        {"setup_complete": {}},
        {"server_content": {"model_turn": {"parts": [{"text": "Hi"}, {"text": 1}]}}},
        {"tool_call": {"function_calls": [{"args": {"q": 1}}, {"args": None}]}},
        {"server_content": {"output_transcription": {"text": "there"}}},
        {"usage_metadata": {"prompt_token_count": 9}},
    )
    assert read.begun[0][1].text() == 'Hi{"q":1}there'
    read.say({"server_content": ground, "usage_metadata": usage})
    assert read.usages == [TokenUsage(9, 4, audio=3, audio_output=3, image_output=0)]
    report = read.begun[0][1].report()
    assert report is not None
    assert report.searches == 2


def test_count_what_is_told_behind_a_turn_for_that_turn() -> None:
    """Where the counts come behind the end, and again, nothing is counted twice."""
    read = Read({"serverContent": VOICE}, {"serverContent": {"turnComplete": True}}, {"usageMetadata": turn(10, 4)})
    read.say({"usageMetadata": turn(10, 4)}, {"usageMetadata": {"promptTokenCount": 10, "totalTokenCount": 14}})
    assert read.usages == [TokenUsage(10, 4)]
    read.say({"toolCall": {"functionCalls": [{"name": "f"}]}, "usageMetadata": turn(30, 7)})
    assert read.usages == [TokenUsage(10, 4), TokenUsage(30, 7)]


# -- chats, and others -------------------------------------------------------------------------------------


def test_count_each_chat_by_itself() -> None:
    """Several answers in one session are several calls of a model, whatever their order of magnitude."""
    read = Read(*answer("a", 9, 2), *answer("b", 9, 2), *answer("c", 20, 5), "[DONE]")
    assert read.usages == [TokenUsage(9, 2), TokenUsage(9, 2), TokenUsage(20, 5)]
    assert read.ended == [True, True, True]
    assert [reader.text() for _, reader in read.begun] == ["", "", ""]


def test_tell_chats_apart_that_run_side_by_side() -> None:
    """Their chunks show whose they are, also where each of them has a running total."""
    pairs = zip(answer("a", 9, 2), answer("b", 9, 3), strict=True)
    assert Read(*(each for pair in pairs for each in pair)).usages == [TokenUsage(9, 2), TokenUsage(9, 3)]
    totals = [{**delta(role="assistant", content="x"), "usage": used(9, 1)}] * 2
    a, b = {"id": "a"}, {"id": "b", "usage": used(30, 1)}
    ends = {"choices": [{"finish_reason": "stop"}]}
    read = Read(totals[0] | a, totals[0] | b, totals[0] | a | {"usage": used(9, 2)}, totals[0] | b | ends)
    read.say(totals[0] | a | ends | {"usage": used(9, 3)})
    assert read.usages == [TokenUsage(9, 3), TokenUsage(30, 1)]


def test_add_no_running_totals_of_ids_that_change() -> None:
    """A gateway that gives each chunk an id of its own has one answer, also where each chunk looks like a first one."""
    totals = [
        {**delta(role="assistant", content="x"), "id": f"c{number}", "usage": used(9, number)} for number in range(1, 5)
    ]
    assert Read(*totals).usages == [TokenUsage(9, 4)]
    plain = [{**each, "id": f"d{at}"} for at, each in enumerate(answer("d", 9, 2))]
    assert Read(*plain).usages == [TokenUsage(9, 2)]


def test_count_an_answer_that_was_stopped_beside_the_next_one() -> None:
    """A user who stops an answer and asks again has two, of which the first one broke."""
    read = Read(*answer("a", 9, 2)[:2], *answer("b", 12, 3))
    assert read.usages == [None, TokenUsage(12, 3)]
    assert read.ended == [False, True]
    assert read.begun[0][1].text() == "Hi"


def test_begin_anew_where_an_id_says_nothing() -> None:
    """Servers that call all of their answers the same, or nothing, are read by where an answer begins and ends."""
    assert Read(*answer("same", 9, 2), *answer("same", 9, 2)).usages == [TokenUsage(9, 2)] * 2
    assert Read(*answer(None, 9, 2), *answer(None, 9, 2)).usages == [TokenUsage(9, 2)] * 2
    late = [*answer("a", 9, 2), {**chunk(choices=[], usage=used(9, 2)), "id": "z"}]
    unmarked = [{**each, "id": "b"} for each in answer("b", 7, 2)[1:]]
    assert Read(*late, *unmarked).usages == [TokenUsage(9, 2), TokenUsage(7, 2)]
    repeated = [*answer("a", 9, 2), {**delta(role="assistant"), "id": "a", "usage": used(9, 2)}]
    assert Read(*repeated).usages == [TokenUsage(9, 2)]


def test_take_no_late_count_for_another_answer() -> None:
    """What is told again of an answer that is over for long is not the usage of the one that goes on."""
    others = [each for number in range(4) for each in answer(f"b{number}", 7, 3)]
    read = Read(*answer("a", 9, 2), *others, {**chunk(choices=[], usage=used(9, 2)), "id": "a"})
    assert read.usages == [TokenUsage(9, 2), *[TokenUsage(7, 3)] * 4]
    read.say(*answer("a", 9, 4))
    assert read.usages[5:] == [TokenUsage(9, 4)]


def test_look_into_no_message_that_tells_only_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words of the answer that goes on are its words, whose usage nobody looks for; what tells more is looked into."""
    seen: list[Any] = []
    parse = session._parse
    monkeypatch.setattr(session, "_parse", lambda data: seen.append(data) or parse(data))
    a, b = (answer(key, 9, 2, words) for key, words in (("a", "Hi"), ("b", "Ho")))
    read = Read(a[0], a[1], a[1], a[1], b[0], b[1], a[1], a[1], b[1], b[1])
    assert len(seen) == 6
    assert [reader.text() for _, reader in read.begun] == ["Hi" * 5, "Ho" * 3]
    read.say(*a[2:], *b[2:])
    assert read.usages == [TokenUsage(9, 2)] * 2
    read.say(a[1], {**a[1], "id": "c"}, {**a[1], "error": {"message": "No."}, "id": "c"})
    assert read.usages == [TokenUsage(9, 2), TokenUsage(9, 2), None]
    last = read.begun[-1][1].report()
    assert last is not None
    assert last.error


def test_count_each_answer_of_an_array() -> None:
    """Several events in one message are as good as one by one; a Gemini answer is one array, and its last count all."""
    done = [response(number, "done", **counts(9, number)) for number in range(3)]
    expected = [TokenUsage(9, number) for number in range(3)]
    assert Read(done).usages == expected
    assert Read(json.dumps([*done, 7, [done[0]], None], indent=1)).usages == expected
    assert Read(json.dumps(done).encode("utf-16-le")).usages == expected
    assert Read("\ufeff" + json.dumps(done)).usages == expected
    whole = [{"object": "chat.completion", "id": key, "choices": [], "usage": used(9, 2)} for key in "ab"]
    assert Read(whole).usages == [TokenUsage(9, 2)] * 2
    parts = [{"candidates": [], "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": n}} for n in (1, 2)]
    assert Read(parts).usages == [TokenUsage(9, 2)]
    assert Read(parts, dialect="gemini").usages == [TokenUsage(9, 2)]
    assert Read(json.dumps(done)[:-1]).usages == []


def test_count_whole_bodies_as_one_answer_each() -> None:
    """Bodies that are sent as messages are whole, and so is what has nothing but input."""
    whole = {"object": "chat.completion", "id": "same", "model": "m", "choices": [], "usage": used(9, 2)}
    vectors = {"object": "list", "data": [], "model": "e", "usage": {"prompt_tokens": 8, "total_tokens": 8}}
    read = Read(whole, {**whole, "id": "b"}, vectors, vectors, {**whole, "id": "c", "usage": None})
    assert read.usages == [TokenUsage(9, 2), TokenUsage(9, 2), TokenUsage(8, 0), TokenUsage(8, 0), None]
    assert read.ended == [True] * 4 + [False]


def test_read_anthropic_in_messages() -> None:
    """Its events have an id at the beginning alone; a seed is no total that another one falls below."""
    start = {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 9, "output_tokens": 5}}}
    words = {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hi"}}
    ends = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 2}}
    one = [start, words, ends, {"type": "message_stop"}]
    read = Read(*one, *({**each, "message": {**start["message"], "id": "n"}} for each in one))  # type: ignore[dict-item]
    assert read.usages == [TokenUsage(9, 2), TokenUsage(9, 2)]
    assert read.ended == [True, True]


def test_read_responses_in_messages() -> None:
    """One answer may have an id at its beginning and another one at its end, and the next one begins anew."""

    def event(kind: str, key: str, **fields: Any) -> dict[str, Any]:
        return {
            "type": f"response.{kind}",
            "sequence_number": 1,
            "response": {"id": key, "object": "response", **fields},
        }

    words = {"type": "response.output_text.delta", "sequence_number": 2, "delta": "Hi"}
    read = Read(event("created", "a"), words, event("completed", "b", **counts(9, 2)))
    read.say(event("created", "c"), words, event("completed", "c", **counts(9, 2)))
    assert read.usages == [TokenUsage(9, 2), TokenUsage(9, 2)]
    picture = {"type": "image_generation.completed", "b64_json": "A" * 2_000_000, **counts(5, 700)}
    assert Read(picture, picture).usages == [TokenUsage(5, 700)] * 2


def test_read_gemini_and_ollama_in_messages() -> None:
    """Without ids an answer ends where it says so, and what is told behind it is told again."""
    part = {"candidates": [{"content": {"parts": [{"text": "Hi"}]}}], "modelVersion": "g"}
    ends = {
        "candidates": [{"finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 2},
    }
    again = {"usageMetadata": ends["usageMetadata"]}
    assert Read(part, ends, again, part, ends).usages == [TokenUsage(9, 2)] * 2
    say = {"model": "o", "message": {"content": "Hi"}, "done": False}
    done = {"model": "o", "done": True, "prompt_eval_count": 9, "eval_count": 2}
    assert Read(say, done, say, done).usages == [TokenUsage(9, 2)] * 2


def test_speak_two_dialects_in_one_session() -> None:
    """Each dialect has its own answers: a chat beside a conversation, a whole answer of Gemini beside a turn."""
    chat = answer("a", 9, 2)
    read = Read(*chat[:2], response(1, "done", **counts(5, 1)), *chat[2:])
    assert read.usages == [TokenUsage(9, 2), TokenUsage(5, 1)]
    whole = {
        "candidates": [{"finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 2},
    }
    read = Read({"serverContent": VOICE}, whole, {"serverContent": {"turnComplete": True}, "usageMetadata": turn(3, 1)})
    assert read.usages == [TokenUsage(3, 1), TokenUsage(9, 2)]


@pytest.mark.uncounted
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 500), st.integers(1, 500), st.integers(0, 2)), min_size=1, max_size=6
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_count_every_answer_once_in_any_order(asked: list[tuple[bool, int, int, int]], random: Any) -> None:
    """However answers of two dialects are mixed, side by side, told again or not, their sum is what they told."""
    waiting: list[list[Any]] = []
    for at, (is_chat, into, out, again) in enumerate(asked):
        if is_chat:
            waiting.append(answer(f"c{at}", into, out))
        else:
            done = response(at, "done", status="completed", **counts(into, out))
            waiting.append([response(at, "created"), *[done] * (1 + again)])
    read = Read()
    while waiting:
        messages = random.choice(waiting)
        read.say(messages.pop(0))
        waiting = [each for each in waiting if each]
    assert TokenUsage.sum(read.usages) == TokenUsage(sum(each[1] for each in asked), sum(each[2] for each in asked))
    assert all(read.ended)


# -- messages that are no single object --------------------------------------------------------------------

STREAM = body("openai-chat-include-usage.sse").decode()
SAID = TokenUsage(9, 2, cached=0, reasoning=0, audio=0)


def cut(data: str, size: int) -> Iterable[str]:
    """Pieces of so many characters."""
    return (data[at : at + size] for at in range(0, len(data), size))


@pytest.mark.uncounted
@pytest.mark.parametrize("size", [*range(5, 40), 100, 5_000])
def test_read_a_stream_of_events_in_pieces(size: int) -> None:
    """An upstream's bytes may be passed on as they come, however they are cut, as texts or as bytes."""
    assert Read(*cut(STREAM, size), *cut(STREAM, size)).usages == [SAID] * 2
    read = Read(*(each.encode() for each in cut(STREAM, size)))
    assert read.usages == [SAID]
    assert read.ended == [True]


def test_read_a_stream_of_events_line_by_line() -> None:
    """Lines without their ends, with the blank ones between or not, and one event for each message."""
    found = [SAID]
    assert Read(*STREAM.splitlines()).usages == found
    assert Read(*filter(None, STREAM.splitlines())).usages == found
    assert Read(*(each + "\n" for each in STREAM.split("\n\n"))).usages == found
    named = ["event: message_start", 'data: {"type":"message_start","message":{"usage":{"input_tokens":9}}}']
    assert Read(*named, ": ping", "data: broken", *named, "retry: 5", "data: [DONE]").usages == [TokenUsage(9)] * 2


def test_read_objects_between_pieces_of_events() -> None:
    """What is whole by itself is no piece of an event, whatever stands before it."""
    whole = {"object": "chat.completion", "id": "a", "usage": used(9, 2)}
    assert Read('data: {"x": "', whole, "the rest").usages == [TokenUsage(9, 2)]
    assert Read("data: ", whole).usages == [TokenUsage(9, 2)]


def test_read_several_objects_in_one_message() -> None:
    """Lines of JSON, an indented document, and an array."""
    chat = answer("a", 9, 2)
    assert Read("\n".join(map(json.dumps, chat)) + "\n").usages == [TokenUsage(9, 2)]
    assert Read(*(json.dumps(each, indent=2) for each in chat)).usages == [TokenUsage(9, 2)]
    assert Read("\r\n".join(json.dumps(each, indent=1) for each in chat[:1])).usages == [None]
    gemini = {
        "candidates": [{"finishReason": "STOP"}],
        "usageMetadata": {"promptTokenCount": 9, "candidatesTokenCount": 2},
    }
    assert Read([gemini]).usages == [TokenUsage(9, 2)]


def test_read_an_event_that_is_too_large_to_be_kept() -> None:
    """Of one with a picture in it the end is searched for its usage."""
    created = {"type": "response.created", "response": {"id": "a", "object": "response"}}
    done = {"type": "response.completed", "response": {"id": "a", "output": ["A" * 1_200_000], **counts(9, 2)}}
    event = "data: " + json.dumps(done) + "\n\n"
    read = Read("data: " + json.dumps(created) + "\n\n", event[:700_000], event[700_000:])
    assert read.usages == [TokenUsage(9, 2)]
    assert read.ended == [True]


def test_pass_over_what_is_too_large_to_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a message belongs to the answer that went on last."""
    monkeypatch.setattr(session, "MAX_LOOKED_INTO", 300)
    read = Read(*answer("a", 9, 2)[:2], {**chunk(choices=[], usage=used(9, 2)), "id": "a", "pad": "x" * 300})
    assert read.usages == [TokenUsage(9, 2)]


@pytest.mark.parametrize("message", ["", " ", "Hello", "{", "[", "[1]", "null", b"\x00\xff", "\ud800", "[" * 9_999])
def test_survive_any_message(message: Any) -> None:
    """Nothing that an application sends raises, and none of it is an answer of a model."""
    read = Read(message, *answer("a", 9, 2), message)
    assert read.usages == [TokenUsage(9, 2)]


def test_survive_any_field() -> None:
    """Fields of any type are no ids and no marks."""
    odd: list[Any] = [None, 7, [], {}, [{}], {"a": []}, "", "x" * 300]
    names = ("id", "object", "type", "response", "message", "response_id", "choices", "session", "serverContent")
    read = Read()
    for value in odd:
        for name in names:
            for kind in ("response.done", "message_start", "chat.completion.chunk", "session.created"):
                read.say({"type": kind, "event_id": "e", "object": kind, name: value})
    assert not any(read.usages)


def test_keep_texts_of_nobody_apart() -> None:
    """What shows no model is one answer: its words may be one's, and its usage is a running total."""
    read = Read("Hel", "lo", {"type": "note", "text": "world"}, b"\x00\x01")
    assert (read.begun, read.reader.rest.heard().text) == ([], "Helloworld")
    read.say({"usage": used(9, 2)}, {"usage": used(12, 5)})
    assert (read.begun, read.rest) == ([], TokenUsage(12, 5))
    read.say({"usage": used(12, 4)})
    assert read.rest is None


@pytest.mark.parametrize("first", [": yes", "id: seven", "data: x", "event: x", 'data: {"a": "x', "data: [", "data:"])
def test_take_words_that_look_like_events_for_words(first: str) -> None:
    """A client that has a model begin so hides nothing of what it writes then."""
    more = [f"of the word number {number} " for number in range(20)]
    heard = Read(first, *more, *more).reader.rest.heard()
    assert all(heard.text.count(each.strip()) >= 2 for each in more)
    assert len(heard.text) <= 1.2 * len("".join([first, *more, *more]))
    read = Read(first, *more, *(f"data: {json.dumps(each)}\n\n" for each in answer("a", 9, 2)))
    assert read.usages == [TokenUsage(9, 2)]


def test_tell_what_a_dialect_cannot_read() -> None:
    """A dialect of somebody's own that fails takes no message with it, and what it failed on is not believed."""
    before = dict(dialects.DIALECTS)

    def fails(_: Any) -> Any:
        raise RuntimeError("mine")

    mine = Dialect(
        name="mine",
        claims=lambda payload: payload["mine"],
        claims_usage=lambda usage: False,
        note=lambda notes, payload: fails(payload),
        note_usage=lambda notes, usage: False,
        text=fails,
        telling=Marks(["mine"]),
        texty=dialects.DIALECTS["gemini"].texty,
        shows=("mine",),
    )
    try:
        register_dialect(mine)
        read = Read({"yours": 1, "usage": used(9, 2)})
        assert (read.usages, read.rest) == ([], None)
        assert Read([{"yours": 1}, {"yours": 2}]).usages == []
        read = Read({"mine": True}, {"mine": True})
        assert [name for name, _ in read.begun] == ["mine"]
        report = read.begun[0][1].report()
        assert report is not None
        assert report.problems == ("unreadable",)
        assert session._says(mine, {}) is None
    finally:
        dialects.DIALECTS.clear()
        dialects.DIALECTS.update(before)
        dialects._SIEVES[:] = [dialects.Sieves(before)]


# -- dialects that are named, and bounds -------------------------------------------------------------------


def test_take_the_dialect_that_the_route_names() -> None:
    """What shows nobody is of the dialect that the route says, whose usage is then a running total."""
    read = Read({"usage": used(9, 2)}, {"usage": used(12, 5)}, dialect="openai-chat")
    assert read.usages == [TokenUsage(12, 5)]
    with pytest.raises(ConfigurationError, match="no usage dialect 'nobody'"):
        Read(dialect="nobody")


def test_await_a_few_answers_at_a_time() -> None:
    """Of so many that never end the oldest are over, and so is one whose name another one takes."""
    read = Read(*(each for number in range(MAX_OPEN + 2) for each in answer(f"a{number}", 9, 2)[:2]))
    assert [reader.over for _, reader in read.begun] == [True] * 2 + [False] * MAX_OPEN
    again = Read(*answer("a", 9, 2), *answer("a", 9, 2))
    assert [reader.over for _, reader in again.begun] == [True, False]
    ended = Read(*answer("a", 9, 2)[:2], *(each for number in range(9) for each in answer(f"b{number}", 9, 2)))
    assert [at for at, (_, reader) in enumerate(ended.begun) if not reader.over] == [0, 7, 8, 9]
    touched = Read(*(answer(f"a{number}", 9, 2)[0] for number in range(MAX_OPEN)))
    touched.say(answer("a0", 9, 2)[1], answer("b", 9, 2)[0])
    assert [at for at, (_, reader) in enumerate(touched.begun) if reader.over] == [1]
