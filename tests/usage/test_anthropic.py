"""The Anthropic dialect: reference `usage-payloads`, sections 1, 3, 4 and "Seen in recorded traffic"."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering.usage import TokenUsage, UsageReport
from asgi_metering.usage.anthropic import MESSAGES
from tests.usage.test_openai import body, stream


def start(**usage: Any) -> dict[str, Any]:
    """A message_start with this usage."""
    return {"type": "message_start", "message": {"id": "m1", "model": "claude", "content": [], "usage": usage}}


def delta(stop: str | None = None, **usage: Any) -> dict[str, Any]:
    """A message_delta with this usage."""
    return {"type": "message_delta", "delta": {"stop_reason": stop}, "usage": usage}


STOP = {"type": "message_stop"}


def read(*events: dict[str, Any]) -> UsageReport:
    """Read the events as a stream."""
    report = stream(*events).report()
    assert report is not None
    return report


def test_add_cache_counts_to_the_input() -> None:
    """Anthropic counts cache reads and writes beside the input; the normal form includes them."""
    seed = start(input_tokens=25, cache_read_input_tokens=400, cache_creation_input_tokens=10, output_tokens=1)
    report = read(seed, delta("end_turn", output_tokens=15), STOP)
    assert report.usage == TokenUsage(435, 15, cached=400, cache_write=10)
    assert report.usage.total == 450
    assert (report.complete, report.partial, report.finish_reason) == (True, False, "end_turn")


@pytest.mark.parametrize("later", [10_682, 7])
def test_take_the_last_value_of_each_field(later: int) -> None:
    """The input may rise (server tools) and fall (compaction): the last value wins, never the largest."""
    seed = start(input_tokens=25, cache_read_input_tokens=400, output_tokens=1)
    report = read(seed, delta(input_tokens=later, output_tokens=9), delta("end_turn", output_tokens=15))
    assert report.usage == TokenUsage(later + 400, 15, cached=400)
    assert not report.complete


def test_keep_a_field_that_comes_as_null() -> None:
    """A null in a later event erases nothing."""
    report = read(start(input_tokens=25, output_tokens=1), delta(input_tokens=None, output_tokens=3))
    assert report.usage == TokenUsage(25, 3)


def test_treat_a_seed_as_no_output() -> None:
    """Without any message_delta the output is a seed: partial, and not reported; also if it is 0/0."""
    for count in (1, 0):
        report = read(start(input_tokens=count, output_tokens=count))
        assert report.usage == TokenUsage(count, count)
        assert report.partial
        assert report.reported == TokenUsage(count)


def test_stay_partial_until_an_output_is_counted() -> None:
    """A message_delta whose usage lacks the output leaves the seed a seed, and so does the end."""
    report = read(start(input_tokens=5, output_tokens=1), delta("end_turn", input_tokens=6), STOP)
    assert report.usage == TokenUsage(6, 1)
    assert report.partial
    assert report.complete


def test_start_without_usage() -> None:
    """A message_start without counts says nothing, and the later ones are taken."""
    assert read(start()).usage is None
    assert not read(start()).partial
    assert not read(start(service_tier="standard")).partial
    assert read(start(), delta(output_tokens=3)).usage == TokenUsage(None, 3)


def test_read_the_split_of_cache_writes_where_the_total_is_missing() -> None:
    """The split by lifetime stands in for a missing total, and never beats one."""
    split = {"ephemeral_5m_input_tokens": 88, "ephemeral_1h_input_tokens": 100}
    assert read(start(input_tokens=1, cache_creation=split)).usage == TokenUsage(
        189, cache_write=188, cache_write_1h=100
    )
    report = read(start(input_tokens=1, cache_creation=split), delta(cache_creation_input_tokens=300, output_tokens=2))
    assert report.usage == TokenUsage(301, 2, cache_write=300, cache_write_1h=300 - 88)


def test_report_parts_without_their_whole() -> None:
    """Cache reads alone, without input and output, are no report; without the input they are kept as a part."""
    assert read(start(cache_read_input_tokens=4), delta(output_tokens=2)).usage == TokenUsage(None, 2, cached=4)
    assert read(start(cache_read_input_tokens=4)).usage is None


def test_add_the_tokens_of_a_compaction() -> None:
    """The top level leaves compaction out though it is billed: its iterations are added, once, the last list wins."""
    compaction = {
        "type": "compaction",
        "input_tokens": 100,
        "output_tokens": 20,
        "cache_read_input_tokens": 3,
        "cache_creation_input_tokens": 4,
    }
    message = {"type": "message", "input_tokens": 10, "output_tokens": 5}
    usage = {
        "input_tokens": 10,
        "output_tokens": 5,
        "cache_read_input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "iterations": [compaction, message, compaction, None],
    }
    expected = TokenUsage(input=10 + 200 + 1 + 6 + 8, output=45, cached=7, cache_write=8)
    assert read(start(input_tokens=10, output_tokens=1), delta(**usage), delta(**usage)).usage == expected
    report = body({"type": "message", "content": [], "usage": usage}).report()
    assert report is not None
    assert report.usage == expected


def test_leave_an_advisors_tokens_out() -> None:
    """An advisor's tokens have another model and price: left out and flagged."""
    advisor = {"type": "advisor_message", "model": "other", "input_tokens": 50, "output_tokens": 60}
    report = read(start(), delta(input_tokens=1, output_tokens=2, iterations=[advisor]))
    assert report.usage == TokenUsage(1, 2)
    assert report.problems == ("other_model_tokens",)


@pytest.mark.parametrize("value", [-1, True, "9", 10**13, 0.5])
def test_refuse_an_impossible_count(value: object) -> None:
    """After an impossible count nothing is believed, what was known before neither; it is kept apart."""
    report = read(start(input_tokens=5, output_tokens=1), delta(output_tokens=7), delta(output_tokens=value))
    assert report.usage is None
    assert report.doubted == TokenUsage(5, 7)
    assert report.problems == ("invalid_count",)


def test_refuse_an_impossible_sum() -> None:
    """Counts whose sum nobody can have used are refused, all of them."""
    report = read(start(input_tokens=10**12, cache_read_input_tokens=1), delta(output_tokens=7))
    assert report.usage is None
    assert report.problems == ("invalid_count",)


def test_refuse_thinking_beyond_the_output() -> None:
    """Thinking is a part of the output: where it is more, neither is believed."""
    usage = {"input_tokens": 1, "output_tokens": 5, "output_tokens_details": {"thinking_tokens": 9}}
    report = read(start(), delta(**usage))
    assert report.usage is None
    assert report.problems == ("part_exceeds_whole",)


def test_ignore_a_count_of_tokens() -> None:
    """The answer of count_tokens is no usage, and must not be billed."""
    assert body({"input_tokens": 2095}).report() is None
    assert body({"input_tokens": 2095}, dialect="anthropic").report() is None


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}}, "a"),
        ({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "a"}}, "a"),
        ({"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": '{"a'}}, '{"a'),
        ({"type": "content_block_delta", "delta": {"type": "compaction_delta", "content": "a"}}, "a"),
        ({"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "xyz"}}, ""),
        ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": None}}, ""),
        ({"type": "content_block_delta", "delta": {"type": ["x"], "text": "a"}}, ""),
        ({"type": "content_block_delta", "delta": "a"}, ""),
        ({"type": "content_block_start", "content_block": {"type": "text", "text": "a"}}, "a"),
        ({"type": "content_block_start", "content_block": {"type": "tool_use", "input": {}}}, ""),
        ({"type": "content_block_stop", "index": 0}, ""),
    ],
)
def test_gather_the_text_of_events(payload: dict[str, Any], text: str) -> None:
    """Text, thinking and tool input are text; signatures and other marks are not."""
    assert stream(payload, keep_text=True).text() == text


def test_gather_the_text_of_a_body() -> None:
    """A body's blocks give their text, their thinking, and the input of tools as JSON."""
    content = [
        {"type": "thinking", "thinking": "a", "signature": "s"},
        {"type": "text", "text": "b"},
        {"type": "tool_use", "name": "f", "input": {"x": [1.5, "ä"]}},
        {"type": "text", "text": 3},
        None,
    ]
    assert body({"type": "message", "content": content}, keep_text=True).text() == 'ab{"x":["1.5","ä"]}'


def test_gather_nothing_from_a_tool_input_without_end() -> None:
    """A tool input nested deeper than can be written gives no text instead of an error."""
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"a": deep}
    assert list(MESSAGES.text({"type": "message", "content": [{"input": deep}]})) == [""]


def test_leave_another_message_alone() -> None:
    """An application's own event of type "message" is no message of this family."""
    assert stream({"type": "message", "text": "hello"}).report() is None


def test_read_the_service_tier_and_the_searches() -> None:
    """The tier, or the fast mode, and the searches so far stand in the usage; the largest number counts."""
    used = {"server_tool_use": {"web_search_requests": 2}, "service_tier": "standard"}
    report = read(start(input_tokens=1, **used), {"type": "message_delta", "usage": {"output_tokens": 2}})
    assert (report.service, report.searches) == ("standard", 2)
    later = {"output_tokens": 2, "speed": "fast", "server_tool_use": {"web_search_requests": 3}}
    report = read(start(input_tokens=1, **used), {"type": "message_delta", "usage": later})
    assert (report.service, report.searches) == ("fast", 3)
