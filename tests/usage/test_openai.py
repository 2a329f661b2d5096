"""The OpenAI dialects and their relatives: reference `usage-payloads`, sections 1, 3 and 4."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from asgi_metering.usage import TokenUsage, UsageReader, UsageReport
from tests.usage.vectors import read


def sse(*payloads: Any) -> bytes:
    """Write payloads as events."""
    return b"".join(
        b"data: " + (payload if isinstance(payload, bytes) else json.dumps(payload).encode()) + b"\n\n"
        for payload in payloads
    )


def stream(*payloads: Any, **options: Any) -> UsageReader:
    """Read payloads as a stream of events."""
    return read([sse(*payloads)], "text/event-stream", **options)


def body(payload: Any, **options: Any) -> UsageReader:
    """Read one payload as a whole body."""
    return read([json.dumps(payload).encode()], "application/json", **options)


def chat(usage: Any, **fields: Any) -> UsageReport:
    """Read a usage object within a chat completion."""
    report = body({"object": "chat.completion", "id": "c", "model": "m", "usage": usage, **fields}).report()
    assert report is not None
    return report


def chunk(**fields: Any) -> dict[str, Any]:
    """One chunk of a chat completion."""
    return {"object": "chat.completion.chunk", "id": "c", "model": "m", **fields}


def delta(**fields: Any) -> dict[str, Any]:
    """One chunk whose only choice has these fields."""
    return chunk(choices=[{"index": 0, "delta": fields, "finish_reason": None}])


@pytest.mark.parametrize(
    ("usage", "expected", "problems"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}, TokenUsage(9, 2), ()),
        ({"prompt_tokens": 9, "completion_tokens": 2}, TokenUsage(9, 2), ()),
        ({"prompt_tokens": 9}, TokenUsage(9), ()),
        ({"prompt_tokens": 9, "total_tokens": 9}, TokenUsage(9, 0), ()),
        ({"prompt_tokens": 9, "total_tokens": 11}, TokenUsage(9), ()),
        ({"completion_tokens": 2, "total_tokens": 11}, TokenUsage(None, 2), ()),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, TokenUsage(0, 0), ()),
        ({"prompt_tokens": 2**33, "completion_tokens": 1}, TokenUsage(2**33, 1), ()),
        ({"prompt_tokens": 5.0, "completion_tokens": 2.0}, TokenUsage(5, 2), ()),
        ({"total_tokens": 11}, None, ()),
        (None, None, ()),
        ({}, None, ()),
        ([], None, ()),
        ("12", None, ()),
        ({"type": "duration", "seconds": 27}, None, ()),
        ({"prompt_tokens": True, "completion_tokens": 2}, None, ("invalid_count",)),
        ({"prompt_tokens": -1, "completion_tokens": 2}, None, ("invalid_count",)),
        ({"prompt_tokens": 1.5, "completion_tokens": 2}, None, ("invalid_count",)),
        ({"prompt_tokens": "9", "completion_tokens": 2}, None, ("invalid_count",)),
        ({"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 10}, None, ("total_below_parts",)),
        ({"prompt_tokens": 9, "total_tokens": 8}, None, ("total_below_parts",)),
        ({"prompt_tokens": 10**13, "completion_tokens": -2}, None, ("invalid_count",)),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 12},
            TokenUsage(9, 2),
            ("total_mismatch",),
        ),
        # Reasoning beside the output (xAI), within it (OpenAI), and at the top level (Azure's DeepSeek).
        (
            {
                "prompt_tokens": 32,
                "completion_tokens": 9,
                "total_tokens": 135,
                "completion_tokens_details": {"reasoning_tokens": 94},
            },
            TokenUsage(32, 103, reasoning=94),
            (),
        ),
        (
            {
                "prompt_tokens": 32,
                "completion_tokens": 103,
                "total_tokens": 135,
                "completion_tokens_details": {"reasoning_tokens": 94},
            },
            TokenUsage(32, 103, reasoning=94),
            (),
        ),
        (
            {
                "prompt_tokens": 4,
                "completion_tokens": 6,
                "total_tokens": 10,
                "reasoning_tokens": 5,
                "completion_tokens_details": None,
                "prompt_tokens_details": None,
            },
            TokenUsage(4, 6, reasoning=5),
            (),
        ),
        # Cache reads: OpenAI, Moonshot, DeepSeek, LiteLLM.
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}, TokenUsage(9, cached=4), ()),
        ({"prompt_tokens": 9, "cached_tokens": 4}, TokenUsage(9, cached=4), ()),
        ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 4}, TokenUsage(9, cached=4), ()),
        (
            {"prompt_tokens": 9, "cache_read_input_tokens": 4, "cache_creation_input_tokens": 3},
            TokenUsage(9, cached=4, cache_write=3),
            (),
        ),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": 3}}, TokenUsage(9, cache_write=3), ()),
        # Cached, written and reasoning tokens are parts of a whole, or nothing is believed; modalities need not be.
        ({"prompt_tokens": 9, "completion_tokens": 2, "cached_tokens": 10}, None, ("part_exceeds_whole",)),
        ({"prompt_tokens": 9, "completion_tokens": 2, "reasoning_tokens": 3}, None, ("part_exceeds_whole",)),
        (
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 5}},
            None,
            ("part_exceeds_whole",),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 2,
                "prompt_tokens_details": {"audio_tokens": 20},
                "completion_tokens_details": {"audio_tokens": 30},
            },
            TokenUsage(9, 2, audio=50, audio_output=30),
            (),
        ),
        (
            {
                "prompt_tokens": 9,
                "completion_tokens": 2,
                "prompt_tokens_details": {"cached_tokens": 12, "cache_write_tokens": 10, "audio_tokens": 20},
                "completion_tokens_details": {"reasoning_tokens": 3, "audio_tokens": 30},
            },
            None,
            ("part_exceeds_whole",),
        ),
        ({"completion_tokens": 2, "cached_tokens": 5}, TokenUsage(None, 2, cached=5), ()),
        ({"prompt_tokens": 2, "reasoning_tokens": 5}, TokenUsage(2, reasoning=5), ()),
        (
            {
                "prompt_tokens": 1,
                "prompt_tokens_details": {"audio_tokens": 10**12},
                "completion_tokens_details": {"audio_tokens": 1},
            },
            None,
            ("invalid_count",),
        ),
    ],
)
def test_read_a_usage_object(usage: Any, expected: TokenUsage | None, problems: tuple[str, ...]) -> None:
    """Counts are normalised, reconciled with the total, and refused where they cannot be; None is no report (S2.43)."""
    report = chat(usage)
    assert report.usage == expected
    assert report.problems == problems


def test_read_a_usage_object_that_is_not_json() -> None:
    """NaN, Infinity, numbers of ten thousand digits and endless exponents are refused, with all that stands beside."""
    values = (b"NaN", b"Infinity", b"-Infinity", b"1e999999999", b"1e-999999999", b"9" * 10_000, b"1e" + b"9" * 23)
    for value in values:
        reader = read(
            [b'{"object":"chat.completion","usage":{"prompt_tokens":' + value + b',"completion_tokens":2}}'],
            "application/json",
        )
        report = reader.report()
        assert report is not None
        assert (report.usage, report.problems) == (None, ("invalid_count",))
        assert report.refused
        assert report.doubted == TokenUsage(None, 2)
    broken = b'{"object":"chat.completion","usage":{"prompt_tokens":' + b"9" * 10_000
    assert read([broken + b"}, no JSON"], "application/json").report() is None


@pytest.mark.parametrize(
    ("usage", "cost", "problems"),
    [
        (b'{"cost":0.00095}', "0.00095", ()),
        (b'{"cost":0.1}', "0.1", ()),
        (b'{"cost":3}', "3", ()),
        (b'{"cost":0}', "0", ()),
        (b'{"cost":0e-999999}', "0", ()),
        (b'{"cost":null}', None, ()),
        (b'{"cost":{"total_cost":1}}', None, ()),
        (b'{"cost_in_usd_ticks":37756000}', "0.0037756", ()),
        (b'{"cost_in_usd_ticks":10115500}', "0.00101155", ()),
        (b'{"cost_in_usd_ticks":1}', "0.0000000001", ()),
        (b'{"cost":0.05,"is_byok":true,"cost_details":{"upstream_inference_cost":0.95}}', "1", ()),
        (b'{"cost":0.05,"is_byok":false,"cost_details":{"upstream_inference_cost":0.05}}', "0.05", ()),
        (b'{"cost":0.05,"is_byok":true,"cost_details":{"upstream_inference_cost":null}}', None, ()),
        (b'{"cost":0.05,"is_byok":true}', None, ()),
        (
            b'{"cost":0.05,"is_byok":true,"cost_details":{"upstream_inference_cost":9e999999}}',
            None,
            ("invalid_cost",),
        ),
        (b'{"cost":true}', None, ("invalid_cost",)),
        (b'{"cost":"0.1"}', None, ("invalid_cost",)),
        (b'{"cost":-0.1}', None, ("invalid_cost",)),
        (b'{"cost":1000000001}', None, ("invalid_cost",)),
        (b'{"cost":1e99999}', None, ("invalid_cost",)),
        (b'{"cost":1e-99999}', None, ("invalid_cost",)),
        (b'{"cost":0.' + b"1" * 60 + b"}", None, ("invalid_cost",)),
    ],
)
def test_read_the_providers_own_cost(usage: bytes, cost: str | None, problems: tuple[str, ...]) -> None:
    """A cost is read exactly, as USD, from OpenRouter's and xAI's fields; an impossible one is flagged (S3.20)."""
    reader = read([b'{"object":"chat.completion","model":"m","usage":' + usage + b"}"], "application/json")
    report = reader.report()
    assert report is not None
    assert report.usage is None
    assert report.cost == (Decimal(cost) if cost is not None else None)
    assert report.problems == problems


def test_take_the_last_usage_of_a_stream() -> None:
    """Running totals replace one another; null, {} and an empty one replace nothing."""
    totals = [{"prompt_tokens": 5, "completion_tokens": count} for count in (1, 4, 9)]
    chunks = [chunk(choices=[], usage=usage) for usage in (*totals, None, {}, {"prompt_tokens": None})]
    report = stream(*chunks, b"[DONE]").report()
    assert report is not None
    assert report.usage == TokenUsage(5, 9)
    assert report.complete


@pytest.mark.parametrize(("counts", "believed"), [((1, 9, 4), None), ((1, 3, 2, 9), 9), ((0, 0), 0), ((4, 4), 4)])
def test_refuse_an_output_that_fell(counts: tuple[int, ...], believed: int | None) -> None:
    """An output whose last running total is below an earlier one is not believed (S3.21); one that recovered is."""
    totals = [{"prompt_tokens": 5, "completion_tokens": count} for count in counts]
    report = stream(*(chunk(choices=[], usage=usage) for usage in totals), b"[DONE]").report()
    assert report is not None
    assert report.usage == (None if believed is None else TokenUsage(5, believed))
    assert report.problems == (("output_fell",) if believed is None else ())
    assert report.complete


def test_prefer_the_top_level_usage() -> None:
    """Groq's and Moonshot's repeated usage counts once, the top level before the others."""
    top = {"prompt_tokens": 1, "completion_tokens": 1}
    groq = {"usage": {"prompt_tokens": 2, "completion_tokens": 2}}
    choices = [{"usage": {"prompt_tokens": 3, "completion_tokens": 3}}, {"usage": None}]
    for fields, expected in (
        ({"usage": top, "x_groq": groq, "choices": choices}, 1),
        ({"usage": None, "x_groq": groq, "choices": choices}, 2),
        ({"usage": {}, "x_groq": None, "choices": choices}, 3),
    ):
        report = stream(chunk(**fields)).report()
        assert report is not None
        assert report.usage == TokenUsage(expected, expected)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 8, "total_tokens": 8}, TokenUsage(8, 0)),
        ({"total_tokens": 8}, TokenUsage(8, 0)),
        ({"prompt_tokens": 8}, TokenUsage(8, 0)),
    ],
)
def test_read_embeddings(usage: dict[str, int], expected: TokenUsage) -> None:
    """Embeddings produce no output tokens; Voyage reports its input as the total only."""
    report = body({"object": "list", "data": [], "model": "e", "usage": usage}).report()
    assert report is not None
    assert report.usage == expected


@pytest.mark.parametrize("total", [7_196, 7_196 + 193_836, None])
def test_read_what_perplexity_counts_beside_its_answer(total: int | None) -> None:
    """
    A deep research counts reasoning and citations beside the answer's tokens, whatever its total says, and searches.

    Source: Perplexity's pricing of sonar-deep-research; the extractor of genai-prices adds them up alike.
    """
    usage = {"prompt_tokens": 33, "completion_tokens": 7_163, "total_tokens": total, "citation_tokens": 20_016}
    more = {"num_search_queries": 20, "reasoning_tokens": 193_836, "search_context_size": "low", "cost": {"total": 1}}
    report = body({"object": "chat.completion", "model": "sonar-deep-research", "usage": {**usage, **more}}).report()
    assert report is not None
    assert report.usage == TokenUsage(33, 7_163 + 193_836, reasoning=193_836)
    assert (report.searches, report.citations, report.cost, report.problems) == (20, 20_016, None, ())


@pytest.mark.parametrize("count", [-1, 1.5, 10**13])
def test_refuse_citations_that_are_no_count(count: object) -> None:
    """A count of citations that is none refuses the report, as any other one."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "citation_tokens": count}
    report = body({"object": "chat.completion", "model": "sonar", "usage": usage}).report()
    assert report is not None
    assert (report.usage, report.refused) == (None, True)


def test_end_as_perplexity_does() -> None:
    """Perplexity ends with a chat.completion.done object instead of [DONE]."""
    first = chunk(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 1})
    report = stream(first).report()
    assert report is not None
    assert not report.complete
    report = stream(
        first, {"object": "chat.completion.done", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    ).report()
    assert report is not None
    assert report.complete
    assert report.usage == TokenUsage(1, 2)


@pytest.mark.parametrize(
    "payload",
    [
        {"error": {"message": "no"}},
        {"error": "no"},
        {"type": "error", "code": "server_error", "message": "no"},
        {"type": "error", "error": {"type": "overloaded_error"}},
        chunk(choices=[{"error": {"code": 502}}]),
        chunk(choices=[{"delta": {}, "finish_reason": "error"}]),
        chunk(choices=[], x_groq={"error": "no"}),
        {"type": "response.failed", "response": {"error": {"code": "server_error"}}},
    ],
)
def test_see_an_error(payload: dict[str, Any]) -> None:
    """Every family's error is seen, flat or nested, as the first event or after many without usage."""
    report = stream(payload).report()
    assert report is not None
    assert report.error
    assert report.usage is None
    report = stream(*[delta(content="x")] * 50, payload).report()
    assert report is not None
    assert report.error


def test_see_no_error_where_it_is_null() -> None:
    """An error field that is null is no error."""
    report = body({"object": "response", "model": "m", "error": None, "usage": None}).report()
    assert report is not None
    assert not report.error


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"content": "a"}, "a"),
        ({"role": "assistant", "content": None}, ""),
        ({"content": [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": [{"text": "b"}]}, "c"]}, "ab"),
        ({"reasoning_content": "a", "content": "b"}, "ab"),
        ({"reasoning": "a"}, "a"),
        ({"reasoning": "a", "reasoning_content": "a", "content": ""}, "a"),
        ({"refusal": "no"}, "no"),
        (
            {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": '{"x":'}}, {"function": None}, 3]},
            '{"x":',
        ),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "{}"),
        ({"audio": {"data": "AAAA", "transcript": "hi"}}, "hi"),
        ({"content": 7, "tool_calls": "x", "audio": []}, ""),
    ],
)
def test_gather_the_text_of_chat(fields: dict[str, Any], text: str) -> None:
    """Content, reasoning, refusals, arguments and transcripts are text, each once, in streams and bodies alike."""
    assert stream(delta(**fields), keep_text=True).text() == text
    whole = {"object": "chat.completion", "choices": [{"message": fields}, None, {"message": "x"}]}
    assert body(whole, keep_text=True).text() == text


def test_gather_the_text_of_legacy_completions() -> None:
    """A legacy completion has its text in the choice itself."""
    assert stream({"object": "text_completion", "choices": [{"text": "a"}]}, keep_text=True).text() == "a"


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"type": "response.output_text.delta", "delta": "a"}, "a"),
        ({"type": "response.refusal.delta", "delta": "a"}, "a"),
        ({"type": "response.reasoning_text.delta", "delta": "a"}, "a"),
        ({"type": "response.reasoning_summary_text.delta", "delta": "a"}, "a"),
        ({"type": "response.function_call_arguments.delta", "delta": "a"}, "a"),
        ({"type": "response.mcp_call_arguments.delta", "delta": "a"}, "a"),
        ({"type": "response.custom_tool_call_input.delta", "delta": "a"}, "a"),
        ({"type": "response.code_interpreter_call_code.delta", "delta": "a"}, "a"),
        ({"type": "response.audio.transcript.delta", "delta": "a"}, "a"),
        ({"type": "response.audio.delta", "delta": "QUFB"}, ""),
        ({"type": "response.output_audio.delta", "delta": "QUFB"}, ""),
        ({"type": "response.shell_call_output_content.delta", "delta": {"stdout": "a"}}, ""),
        ({"type": "response.output_text.done", "text": "a"}, ""),
        ({"type": "response.completed", "response": {"output": [{"content": [{"text": "a"}]}]}}, ""),
    ],
)
def test_gather_the_text_of_responses_events(payload: dict[str, Any], text: str) -> None:
    """Every kind of text delta counts once; audio, outputs of tools and repetitions at the end do not."""
    assert stream(payload, keep_text=True).text() == text


def test_gather_the_text_of_a_responses_body() -> None:
    """A body's items give their text: summaries, contents, refusals, arguments, inputs and code."""
    output = [
        {"type": "reasoning", "summary": [{"text": "a"}], "content": [{"text": "b"}]},
        {"type": "message", "content": [{"text": "c"}, {"refusal": "d"}, None]},
        {"type": "function_call", "arguments": "e"},
        {"type": "custom_tool_call", "input": "f"},
        {"type": "code_interpreter_call", "code": "g"},
        "h",
    ]
    payload = {"object": "response", "text": {"format": {"type": "text"}}, "output": output}
    assert body(payload, keep_text=True).text() == "abcdefg"


def test_take_responses_usage_from_the_terminal_event_only() -> None:
    """An early event's usage is no result, even where a gateway fills it in."""
    early = {
        "type": "response.in_progress",
        "response": {"id": "r", "usage": {"input_tokens": 1, "output_tokens": 0}},
    }
    report = stream(early).report()
    assert report is not None
    assert report.usage is None
    assert not report.complete


@pytest.mark.parametrize("event", ["response.completed", "response.incomplete", "response.failed", "response.done"])
def test_end_a_responses_stream(event: str) -> None:
    """Every terminal event ends the stream and may carry usage; rotated response ids are one exchange."""
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7, "input_tokens_details": None}
    started = {"type": "response.created", "response": {"id": "r1", "model": "m"}}
    ended = {"type": event, "response": {"id": "r2", "model": "m2", "usage": usage, "status": "done"}}
    report = stream(started, ended).report()
    assert report is not None
    assert (report.usage, report.complete, report.response_id, report.model) == (TokenUsage(3, 4), True, "r1", "m2")


@pytest.mark.parametrize("event", ["image_generation.completed", "image_edit.completed", "transcript.text.done"])
def test_read_typed_events_with_a_usage_of_their_own(event: str) -> None:
    """Streamed images and transcriptions carry usage at the top level of their last event."""
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7, "input_token_details": {"audio_tokens": 2}}
    report = stream({"type": event, "b64_json": "AA==", "usage": usage}).report()
    assert report is not None
    assert (report.usage, report.complete) == (TokenUsage(3, 4, audio=2, audio_output=0), True)


def test_read_the_tokens_of_images() -> None:
    """Tokens of images are told apart from text where the provider does (GPT image models)."""
    usage = {"input_tokens": 30, "output_tokens": 1_300, "total_tokens": 1_330}
    usage |= {"input_tokens_details": {"image_tokens": 20}, "output_tokens_details": {"image_tokens": 1_290}}  # type: ignore[dict-item]
    report = stream({"type": "image_generation.completed", "b64_json": "AA==", "usage": usage}).report()
    assert report is not None
    assert report.usage == TokenUsage(30, 1_300, image_input=20, image_output=1_290)


def test_read_the_service_tier_and_the_searches() -> None:
    """The tier that answered is told in each chunk; searches are counted in the output, or by a gateway."""
    report = stream(chunk(service_tier="Flex"), chunk(usage={"prompt_tokens": 3, "completion_tokens": 4})).report()
    assert report is not None
    assert (report.service, report.searches) == ("flex", None)
    found = [{"type": "web_search_call", "action": {"type": kind}} for kind in ("search", "open_page")]
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    response = {"service_tier": "priority", "output": [*found, {"type": "web_search_call"}], "usage": usage}
    report = stream({"type": "response.completed", "response": response}).report()
    assert report is not None
    assert (report.service, report.searches) == ("priority", 2)
    report = stream(chunk(usage={"prompt_tokens": 3, "server_tool_use": {"web_search_requests": 5}})).report()
    assert report is not None
    assert report.searches == 5


def test_refuse_searches_that_nobody_makes() -> None:
    """S3.21: a number of searches that cannot be makes the whole report doubtful."""
    report = stream(chunk(usage={"prompt_tokens": 3, "server_tool_use": {"web_search_requests": 10**9}})).report()
    assert report is not None
    assert (report.usage, report.problems) == (None, ("invalid_count",))


def test_finish_for_a_reason() -> None:
    """The finish reason is the provider's own word, and a null one does not erase it."""
    ended = chunk(choices=[{"delta": {}, "finish_reason": "length"}])
    report = stream(ended, chunk(choices=[{"delta": {}, "finish_reason": None}])).report()
    assert report is not None
    assert report.finish_reason == "length"
    assert report.truncated()


@pytest.mark.parametrize(
    "payload",
    [
        {"input_tokens": 11},
        {"object": "response.input_tokens", "input_tokens": 11},
        {"usage": {"input_tokens": None}},
        {"total": 3},
        [],
        "text",
        3,
        None,
    ],
)
def test_read_nothing_from_other_bodies(payload: Any) -> None:
    """A count of input tokens alone is no usage, nor is any other JSON."""
    report = body(payload).report()
    assert report is None or report.usage is None
