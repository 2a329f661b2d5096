"""What the events of a stream repeat is passed over, and never what matters; each event alone is the oracle."""

from __future__ import annotations

import gzip
import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.usage import UsageReader, UsageReport
from asgi_metering.usage.boilerplate import FEW, LESSONS, LONG, MANY, MAX_KEPT, SHORT, SOME, Boilerplate, Search
from asgi_metering.usage.dialects import sieves
from asgi_metering.usage.frames import MAX_PAYLOAD, EventFrames
from asgi_metering.usage.reader import INTRODUCTION
from asgi_metering.usage.skim import DONE, find_mark
from tests.usage.test_skim import HOSTILE, Full

EVENTS = EventFrames.ends
MARKS = sieves().named["openai-chat"]
CHAT = Search(MARKS, partial(find_mark, marks=MARKS), escapes=False)
USAGE = b'data: {"object":"chat.completion.chunk","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2}}\n\n'
END = b"data: [DONE]\n\n"


def chat(text: str, **more: Any) -> bytes:
    """One event of a chat stream, as long as providers send them."""
    chunk = {
        "id": "chatcmpl-0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1_700_000_000,
        "model": "gpt-4o-2024-08-06",
        "choices": [{"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}],
        "usage": None,
        **more,
    }
    return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"


def words(count: int, start: int = 0) -> list[bytes]:
    """Events with another word each."""
    return [chat(f" word{number}") for number in range(start, start + count)]


def wanted(events: list[bytes], made: Boilerplate | None = None, search: Search = CHAT) -> list[bytes]:
    """What is left of the events."""
    places = (made or Boilerplate()).wanted(events, sum(map(len, events)), EVENTS, search)
    return events if places is None else [events[place] for place in places]


# -- what is passed over -------------------------------------------------------------------------------------


def test_pass_over_events_that_differ_in_their_text() -> None:
    """Of events that differ in their words alone none is wanted."""
    assert wanted(words(20)) == []


def test_pass_over_equal_events() -> None:
    """Events that are all the same are looked at once, long ones too."""
    assert wanted([chat("word")] * 20) == []
    assert wanted([chat('say "hi" ' * LONG)] * 20) == []


def test_pass_over_long_texts_without_a_quotation_mark() -> None:
    """Of events with long texts each text is looked at for a quotation mark; those with one are wanted."""
    events = [chat(f"{number} long text " * 200) for number in range(20)]
    events[3] = chat('and so he said: "usage" ' * 100)
    events[9] = chat("x" * 39)
    events[12] = chat("")
    assert wanted(events) == [events[3], events[9]]


def test_want_what_matters_in_its_order() -> None:
    """The first event, the last ones and each in between that has a mark are wanted, and no other."""
    first, stop = chat("", usage={"prompt_tokens": 9}), chat("", error={"message": "overloaded"})
    assert wanted([first, *words(20), stop, *words(20, 20), USAGE, END]) == [first, stop, USAGE, END]


@pytest.mark.parametrize("text", ["usage", "finish_reason", "error"])
def test_want_a_text_that_is_a_name(text: str) -> None:
    """A text that is nothing but a name may be one: it is looked at."""
    assert wanted([*words(20), chat(text), *words(20)]) == [chat(text)]
    assert wanted([*words(20), chat("error"), chat(text), *words(20)]) == [chat("error"), chat(text)]


def test_want_an_event_of_several_lines_and_an_end_mark_within_one() -> None:
    """Raw ends of lines within a text do not hide an end mark behind them."""
    torn = chat("X").replace(b"X", b'torn\n\ndata: [DONE]\n\ndata: {"a":"')
    assert wanted([*words(20), torn]) == [torn]
    long = [chat(f"{number} long text " * 200) for number in range(20)]
    torn = long[0].replace(b"long", b"long\n\ndata: [DONE]\n\ndata: long")
    assert wanted([*long, torn]) == [torn]


def test_want_an_escape_where_one_may_hide_a_name() -> None:
    """Before a dialect is known names may be written with escapes, which are looked at, too."""
    introducing = Search("any", lambda data, at: data.find(b"\\", at), escapes=True)
    long = [chat(f"{number} long text " * 200) for number in range(20)]
    hidden = chat("a line\n" + "and a long one" * 200)
    assert wanted([*long, hidden], search=introducing) == [hidden]
    assert wanted([*long, hidden]) == []


# -- when all of them are read -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "events",
    [
        [b"data: " + b"x" * SHORT + b"\n\n" for _ in range(3)],
        [b'data: {"a":"%d"}\n\n' % number for number in range(20)],
        [event.removesuffix(b"\n") for event in words(20)],
        [bytearray(event) for event in words(20)],
        [memoryview(event) for event in words(20)],
        [memoryview(event) for event in [chat("word")] * 20],
        [chat(f" word{number}", usage={"completion_tokens": number}) for number in range(20)],
        [b"data: " + bytes([65 + number]) * SHORT + b"\n\n" for number in range(20)],
        [chat('a "b" ' * MANY + str(number)) for number in range(20)],
        [chat(" word", extra={f"key{number}": chr(65 + number) * 2 * SHORT}) for number in range(20)],
        [*words(5), *(chat("w", extra={f"key{number}": chr(65 + number) * LONG}) for number in range(10)), *words(15)],
        [chat(f'" {number} "' * 9 + "long" * LONG) for number in range(20)],
    ],
    ids=[
        "few",
        "short",
        "torn",
        "bytearrays",
        "views",
        "equal views",
        "totals",
        "nothing quoted",
        "many quoted",
        "little repeated",
        "few repeat",
        "quotes",
    ],
)
def test_read_all_events_where_nothing_is_spared(events: list[bytes]) -> None:
    """Events that repeat too little, or all matter, or are cut anywhere, are all wanted, as they are."""
    assert Boilerplate().wanted(events, sum(map(len, events)), EVENTS, CHAT) is None


def test_read_all_events_where_many_matter() -> None:
    """More than one event of a few that matters makes all of them wanted."""
    events = [*words(4 * FEW), *[USAGE] * (FEW + 2)]
    assert Boilerplate().wanted(events, sum(map(len, events)), EVENTS, CHAT) is None


def test_learn_anew_when_a_stream_changes() -> None:
    """A stream that repeats something else from some time on is read whole once, and then passed over again."""
    made = Boilerplate()
    assert wanted(words(20), made) == []
    others = [event.replace(b"logprobs", b"thoughts").replace(b'"created"', b'"written"') for event in words(20)]
    assert wanted(others, made) == others
    assert wanted(others, made) == []


def test_forget_what_was_learned_for_another_search() -> None:
    """What matters decides what may be passed over: where something else matters, all is looked at anew."""
    made = Boilerplate()
    assert wanted(words(20), made) == []
    another = Search("logprobs", lambda data, at: data.find(b'"logprobs"', at), escapes=False)
    assert made.wanted(words(20), sum(map(len, words(20))), EVENTS, another) is None


def test_learn_nothing_from_equal_pieces_of_events() -> None:
    """What begins many pieces alike may end within a name, which is then whole in none of its parts."""
    made = Boilerplate()
    piece = chat("word", usage={"prompt_tokens": 9}).partition(b"age")[0]
    assert made.wanted([piece] * 20, 20 * len(piece), EVENTS, CHAT) is None
    events = [chat("word", usage={"prompt_tokens": 9}) for _ in range(20)]
    assert wanted(events, made) == events


def test_give_up_on_a_stream_that_repeats_nothing() -> None:
    """After some lessons in vain nothing is learned any more."""
    made = Boilerplate()
    for _ in range(LESSONS):
        assert wanted([USAGE.replace(b"9", b"%d" % number * 50) for number in range(20)], made)
    assert wanted(words(20), made) == words(20)


# -- beside a reader that looks at each event ----------------------------------------------------------------

TEXTS = st.sampled_from(
    [" word", "", "usage", "error", "finish_reason", ":null", '":null,"', '"', "\\", '\\"', "a\nb", "[DONE]", "x" * 50]
) | st.text(max_size=20)
SHAPES = [
    lambda text: chat(text),
    lambda text: chat("w", obfuscation=text),
    lambda text: chat(text, usage={"prompt_tokens": 1, "completion_tokens": 2}),
    lambda text: chat(" w", finish_reason=text),
    lambda text: chat(" w" * 700 + text),
    lambda text: chat("X").replace(b"X", text.encode("utf-8", "replace")),
    lambda text: chat("w").replace(b'"finish_reason":null', b'"finish_reason":' + text.encode("utf-8", "replace")),
    lambda text: chat("w").replace(b'"object"', b'"' + text.encode("utf-8", "replace") + b'"'),
    lambda text: chat("w").replace(b"usage", text.encode("utf-8", "replace") or b"usage"),
]
RUNS = st.lists(
    st.tuples(st.sampled_from(SHAPES), st.lists(TEXTS, min_size=1, max_size=8)).map(
        lambda run: [run[0](text) for text in run[1]]
    )
    | st.sampled_from(HOSTILE).map(lambda event: [event + b"\n\n"])
    | st.just([USAGE, END]),
    max_size=6,
)


@given(st.lists(RUNS, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_never_pass_over_what_an_event_alone_shows(lists: list[list[list[bytes]]]) -> None:
    """Whatever stands in the events: each in which something is found by itself is among those that are wanted."""
    made = Boilerplate()
    for runs in lists:
        events = [event for run in runs for event in run]
        places = made.wanted(events, sum(map(len, events)), EVENTS, CHAT)
        assert places is None or places == sorted({*places})
        for place, event in enumerate(events):
            if places is not None and place not in places:
                assert MARKS.search(event) is None
                assert DONE not in event or len(event) > LONG or b'"' in event.partition(DONE)[0]


@pytest.mark.uncounted
@given(st.lists(RUNS, min_size=1, max_size=4), st.integers(1, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_read_many_chunks_as_one_after_the_other(lists: list[list[list[bytes]]], at_once: int, text: bool) -> None:
    """Of streams of any events, in chunks of one or more, a reader reports what one reports that reads each payload."""
    made = UsageReader("text/event-stream", keep_text=text)
    full = Full("text/event-stream", keep_text=text)
    for runs in lists:
        events = [event for run in runs for event in run]
        chunks = [b"".join(events[at : at + at_once]) for at in range(0, len(events), at_once)]
        made.feed_many(chunks)
        for chunk in chunks:
            full.feed(chunk)
        assert made.report() == full.report()
        assert (made.text(), made.heard()) == (full.text(), full.heard())


def agree(*lists: list[bytes]) -> UsageReport:
    """What both readers report of lists of chunks, of which one reader takes many at once and the other each alone."""
    made, full = UsageReader("text/event-stream"), Full("text/event-stream")
    for chunks in lists:
        made.feed_many(chunks)
        for chunk in chunks:
            full.feed(chunk)
    report = made.report()
    assert report == full.report()
    assert made.heard() == full.heard()
    assert report is not None
    return report


def event(**fields: Any) -> bytes:
    """An event of any shape."""
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def strangers(count: int, size: int = 2 * SHORT) -> list[bytes]:
    """Events that show no dialect."""
    return [event(said=f" word{number}", pad="p" * size) for number in range(count)]


@pytest.mark.parametrize(
    "before",
    [strangers(2 * SOME), [b": PROCESSING\n\n"] * 20, [chat("a word")]],
    ids=["strangers", "comments", "another"],
)
def test_look_for_what_an_event_in_the_midst_made_matter(before: list[bytes]) -> None:
    """An event that tells the dialect, or another one, tells what matters in those behind it, of the same list too."""
    tells = event(usageMetadata={}, modelVersion="g", error=None)
    ends = event(candidates=[{"finishReason": "STOP"}])
    counts = event(usageMetadata={"promptTokenCount": 3, "candidatesTokenCount": 4})
    for lists in (
        [[*before, tells, *strangers(20), ends, *strangers(60), counts]],
        [before, [*strangers(20), tells, *strangers(20), ends, *strangers(60), counts, *strangers(20)]],
    ):
        report = agree(*lists)
        assert report.usage is not None
        assert (report.usage.input, report.usage.output, report.finish_reason) == (3, 4, "STOP")


def test_pass_over_no_event_whose_ends_would_be_searched() -> None:
    """An event above the bound of a payload names its model without any mark."""
    huge = [event(model="huge", x=str(number) * MAX_PAYLOAD) for number in range(SOME)]
    assert agree([event(type="mine")] * INTRODUCTION, huge).model == "huge"


def test_see_an_end_mark_between_other_ends_of_lines() -> None:
    """A lone carriage return ends a line, too: an end mark between two of them is seen within long texts."""
    long = [chat(f"{number} long text " * 200) for number in range(20)]
    words = b"7 long text " * 100
    torn = chat("X").replace(b"X", words + b"\r\rdata: [DONE]\r\rdata: " + words)
    assert agree([chat("")], [*long, torn, *long]).complete
    assert agree([chat("")], [torn + long[0]]).complete


def test_keep_no_more_than_a_bound_of_what_is_repeated() -> None:
    """Chunks that are larger than what is kept are read, however equal they are."""
    assert wanted([chat("w" * (MAX_KEPT // 2))] * 20) == []
    assert wanted([chat("w" * MAX_KEPT)] * 20) == [chat("w" * MAX_KEPT)] * 20


def test_count_what_was_passed_over_as_read() -> None:
    """What is dropped later counts as text as dense as all that was read, what was passed over included."""
    made, full = UsageReader("text/event-stream"), Full("text/event-stream")
    events = [*words(120), USAGE, *words(79)]
    made.feed_many(events)
    for one in events:
        full.feed(one)
    for each in (made, full):
        each.keep_text()
        each.feed_many([*words(50), USAGE, *words(50)])
        each.gap(10_000)
    assert made.heard() == full.heard()
    assert made.heard().more_chars > 0
    assert made.report() == full.report()


@pytest.mark.parametrize(
    ("events", "options"),
    [
        (words(40), {"keep_text": True}),
        ([gzip.compress(b"".join(words(40)))], {"content_encoding": "gzip"}),
        (words(40), {"content_encoding": "none that is known"}),
        ([b"data: nothing of the kind\n\n"] * 40, {"dialect": "openai-chat"}),
        ([event.replace(b'"model"', b'"maker"') for event in words(40)], {}),
        ([event[20:] + event[:20] for event in words(40)], {}),
        ([b"<html>" * 40] * 40, {"content_type": "image/png"}),
        ([b'data: {"object":"chat.completion.chunk","model":"m"}\n\n'] * 40, {}),
    ],
    ids=["text", "packed", "unknown coding", "fixed dialect", "no model", "cut", "no events", "short"],
)
def test_read_every_chunk_where_none_may_be_passed_over(events: list[bytes], options: dict[str, Any]) -> None:
    """Text that is kept, codings, events cut anywhere and a model that is not known: every chunk is read."""
    kind = {"content_type": "text/event-stream", **options}
    made, full = UsageReader(**kind), Full(**kind)
    made.feed_many(events)
    for event in events:
        full.feed(event)
    assert (made.report(), made.heard(), made.text()) == (full.report(), full.heard(), full.text())
    assert made._boilerplate._lessons == LESSONS
