"""
Money safety of usage: what is reported, observed, estimated and missing stays apart to the last line of the books.

Each call is a real request through a metered proxy: the answer of a provider comes through the upstream client and is
passed on as it comes, and what is asserted is the ledger's line, the receipt, and the usage event.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from asgi_metering import TokenUsage, billable, current_call
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.usage.dialects import DIALECTS
from asgi_metering.usage.notes import Json, Notes
from asgi_metering.usage.values import MAX_TOKENS
from tests.pitfalls.stage import staged
from tests.test_measuring import HOLD, MILLI, PRICE, WEIGHT, Models, Stream, agent, delta, event

pytestmark = pytest.mark.uncounted

ESTIMATE = 7 + 5_000
"""Thousandths that `HOLD` costs: what is held, and what is charged as estimated."""

OBSERVED = 7 + WEIGHT * 1_000
"""Thousandths of the words that passed, and of the input that was asked for."""


def answer(usage: Any, *, more: bytes = b"data: [DONE]\n\n") -> bytes:
    """A stream of a few words and a usage object, or what stands in its place."""
    raw = usage if isinstance(usage, bytes) else json.dumps(usage).encode()
    return delta() + b'data: {"object":"chat.completion.chunk","choices":[],"usage":' + raw + b"}\n\n" + more


class Provider(httpx2.AsyncBaseTransport):
    """A provider in process that answers what it was given, by number."""

    def __init__(self, bodies: Sequence[bytes], coding: str | None) -> None:
        self.bodies = bodies
        self.coding = coding

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        body = self.bodies[int(request.url.path.removeprefix("/"))]
        headers = {"content-type": "text/event-stream"} | ({"content-encoding": self.coding} if self.coding else {})
        return httpx2.Response(200, headers=headers, stream=Stream([body[:50], body[50:]]))


def proxy(*bodies: bytes, coding: str | None = None, seen: bool = True, **policy: Any) -> Any:
    """A gateway: *seen*, its answers come through the upstream client, otherwise only the body of its own tells."""

    @billable(PRICE, **{"hold": HOLD, **policy})
    async def endpoint(request: Request) -> StreamingResponse:
        provider: httpx2.AsyncBaseTransport = Provider(bodies, coding)
        transport = current_call().metering.upstream_transport("openai", wrap=provider) if seen else provider
        client = httpx2.AsyncClient(transport=transport, base_url="http://models")
        response = await client.send(client.build_request("GET", request.url.path), stream=True)

        async def passed() -> AsyncIterator[bytes]:
            async for chunk in response.aiter_raw():
                yield chunk
            await response.aclose()
            await client.aclose()

        headers = {"content-encoding": coding} if coding else {}
        return StreamingResponse(passed(), media_type="text/event-stream", headers=headers)

    return Starlette(routes=[Route("/{number:int}", endpoint, methods=["GET"])])


Line = tuple[int, str, bool]
"""Thousandths, basis, whether estimated."""


async def _run(app: Any, paths: Sequence[str], **options: Any) -> list[tuple[Line, Any, float]]:
    async with staged(app) as stage:
        refused: list[float] = []
        for path in paths:
            before = sum(stage.metering.meters.totals("usage_rejected").values())
            await stage.drive(path, **options)
            refused.append(sum(stage.metering.meters.totals("usage_rejected").values()) - before)
        entries = {entry.ref: entry for entry in await stage.charges()}
        await stage.outcomes()
        kept = (await stage.metering.store.read(EverythingKept())).state
        receipts = {hold.receipt.id: hold.receipt for hold in kept.holds.values() if hold.receipt is not None}
        found = []
        for told, count in zip(stage.events, refused, strict=True):
            receipt, entry = receipts[told.id], entries.get(told.id)
            line = told.amount, told.basis, told.estimated
            assert (receipt.amount, str(receipt.basis), receipt.estimated) == line
            assert (receipt.entry is None) is (entry is None) is (told.amount == 0)
            assert entry is None or (entry.amount, str(entry.basis), entry.estimated) == line
            found.append(((told.amount // MILLI, *line[1:]), told, count))
        return found


def plays(bodies: Sequence[bytes], **options: Any) -> list[tuple[Line, Any, float]]:
    """
    Have a client ask for each of *bodies* in turn: how it is charged, its event, and how often it was refused.

    The line of the ledger, the receipt and the event say the same, or this fails.
    """
    paths = [f"/{number}" for number in range(len(bodies))]
    return asyncio.run(_run(proxy(*bodies, **options), paths))


def play(app: Any, path: str = "/0", **options: Any) -> tuple[Line, Any, float]:
    """The same of one request to *app*."""
    (found,) = asyncio.run(_run(app, [path], **options))
    return found


GOOD = {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}
CONTRADICTORY: dict[str, Any] = {
    "a count that is negative": GOOD | {"completion_tokens": -2},
    "a count that is no number": GOOD | {"prompt_tokens": "9"},
    "a count that is a truth": GOOD | {"prompt_tokens": True},
    "a count with a fraction": GOOD | {"completion_tokens": 2.5},
    "a count beyond 2**53": GOOD | {"prompt_tokens": 2**53 + 1},
    "a count beyond the bound": GOOD | {"prompt_tokens": MAX_TOKENS + 1},
    "a count that is NaN": b'{"prompt_tokens":NaN,"completion_tokens":2}',
    "a count that is infinite": b'{"prompt_tokens":9,"completion_tokens":Infinity}',
    "a count without an end": b'{"prompt_tokens":9,"completion_tokens":' + b"9" * 6_000 + b"}",
    "more cached than read": GOOD | {"prompt_tokens_details": {"cached_tokens": 10}},
    "more reasoning than written": GOOD | {"completion_tokens_details": {"reasoning_tokens": 3}},
    "a total below its parts": GOOD | {"total_tokens": 10},
}


@pytest.mark.parametrize("seen", [True, False], ids=["upstream", "body"])
def test_charge_what_contradicts_itself_as_not_reported(seen: bool, caplog: pytest.LogCaptureFixture) -> None:
    """S3.20, S3.21: nonsense is refused to the estimate: counted each time, told on the event, logged once a kind."""
    with caplog.at_level(logging.ERROR, "asgi_metering"):
        found = plays([answer(usage) for usage in CONTRADICTORY.values()], seen=seen)
    kinds = set()
    for name, (line, told, refused) in zip(CONTRADICTORY, found, strict=True):
        assert (line, told.usage, refused) == ((ESTIMATE, "estimate", True), None, 1), name
        kinds.add(told.attributes["metering.usage.problems"])
    assert kinds == {"invalid_count", "part_exceeds_whole", "total_below_parts"}
    assert sum("is not believed" in record.getMessage() for record in caplog.records) == len(kinds)


@pytest.mark.parametrize("seen", [True, False], ids=["upstream", "body"])
def test_charge_what_a_dialect_fails_on_as_not_reported(seen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3.21: an answer on which a dialect raises is charged by the policy, and its end is never lost for it."""

    def fail(notes: Notes, payload: Json) -> None:
        if payload.get("usage"):
            raise TypeError("unhashable type")

    monkeypatch.setitem(DIALECTS, "openai-chat", replace(DIALECTS["openai-chat"], note=fail))
    line, told, refused = play(proxy(answer(GOOD), seen=seen))
    assert (line, told.usage, refused) == ((ESTIMATE, "estimate", True), None, 1)
    assert told.attributes["metering.usage.problems"] == "unreadable"


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        ("estimate", (ESTIMATE, "estimate", True)),
        ("observed", (OBSERVED, "observed", True)),
        ("hold", (ESTIMATE, "hold", False)),
        ("none", (0, "none", False)),
    ],
)
def test_charge_missing_usage_by_the_policy(policy: Any, line: Line) -> None:
    """DESIGN 4: usage that is refused is charged as usage that is missing, by each of the choices; only one alarms."""
    usages = [GOOD | {"completion_tokens": -2}, None, {}]
    found = plays([answer(usage) for usage in usages], on_missing_usage=policy)
    assert [(charged, refused) for charged, _, refused in found] == [(line, 1), (line, 0), (line, 0)]


def test_charge_a_reported_zero_as_zero() -> None:
    """S2.41, S3.23: a zero that was reported is zero, by usage, and no estimate takes its place."""
    line, told, rejected = play(proxy(answer({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})))
    assert line == (0, "usage", False)
    assert told.usage == TokenUsage(0, 0)
    assert (rejected, "metering.usage.problems" in told.attributes) == (0, False)


def test_never_take_a_missing_side_for_zero() -> None:
    """S2.41: of usage with one side only the other is missing: counted, or asked for, which is an estimate."""
    found = plays([answer({"prompt_tokens": 9}), answer({"completion_tokens": 2})], on_missing_usage="observed")
    assert [line for line, _, _ in found] == [
        (9 + WEIGHT * 1_000, "observed", False),
        (7 + 2_000, "observed", True),
    ]


def test_charge_an_output_that_fell_as_not_reported() -> None:
    """S3.21: running totals that end below an earlier one are refused."""

    def totals(*counts: int) -> bytes:
        usages = [GOOD | {"completion_tokens": count, "total_tokens": None} for count in counts]
        return b"".join(event({"choices": [], "usage": usage}) for usage in usages) + b"data: [DONE]\n\n"

    bodies = [answer(None, more=totals(*counts)) for counts in ((4, 2), (9, 3, 5), (1, 3, 2, 3))]
    *fell, rose = plays(bodies)
    for line, told, refused in fell:
        assert (line, refused) == ((ESTIMATE, "estimate", True), 1)
        assert told.attributes["metering.usage.problems"] == "output_fell"
    assert (rose[0], rose[2]) == ((9 + 3_000, "usage", False), 0)


def test_charge_a_client_that_left_before_a_refused_report_as_observed() -> None:
    """DESIGN 4: what passed before a client left is counted from its words, whatever was reported wrongly before."""
    body = event({"object": "chat.completion.chunk", "choices": [], "usage": GOOD | {"completion_tokens": -1}})
    line, _, rejected = play(proxy(body + delta() + b" " * 20), raise_at=3)
    assert (line, rejected) == ((OBSERVED, "observed", True), 1)


@pytest.mark.parametrize("coding", ["br", "zstd", "compress"])
def test_never_take_an_unreadable_body_for_zero(
    coding: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S3.20: where no decoder is installed usage is missing: counted and told each time, and logged once."""
    for name in ("brotli", "compression.zstd", "backports.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with caplog.at_level(logging.ERROR, "asgi_metering"):
        found = plays([b"\x1b" * 400] * 2, coding=coding)
    for line, told, refused in found:
        assert (line, refused) == ((ESTIMATE, "estimate", True), 1)
        assert told.attributes["metering.usage.problems"] == "no_decoder"
    assert sum("Install asgi-metering[compression]" in record.getMessage() for record in caplog.records) == 1
    ((line, _, _),) = plays([b"\x1b" * 400], coding=coding, seen=False, on_missing_usage="observed")
    assert line == (7 + 100 * 1_000, "observed", True)


def test_tell_a_body_that_broke_apart_from_one_without_a_decoder() -> None:
    """A coding that breaks midway is told by its own name, and what was reported before it counts."""
    packed = gzip.compress(answer(GOOD)) + b"garbage"
    line, told, rejected = play(proxy(packed, coding="gzip"))
    assert (line, rejected) == ((9 + 2_000, "usage", False), 1)
    assert told.attributes["metering.usage.problems"] == "undecodable"


def test_believe_a_total_that_is_larger() -> None:
    """A total above its parts holds what we do not know: the parts are charged, and the event tells it."""
    line, told, rejected = play(proxy(answer(GOOD | {"total_tokens": 15})))
    assert (line, rejected) == ((9 + 2_000, "usage", False), 0)
    assert told.attributes["metering.usage.problems"] == "total_mismatch"


def test_let_the_handlers_own_report_stand_beside_nonsense() -> None:
    """S2.42: what the handler reported is the one source, and what bodies say beside it alarms nobody."""

    @billable(PRICE, hold=HOLD)
    async def endpoint(_request: Request) -> StreamingResponse:
        current_call().record(TokenUsage(input=1, output=2))
        return StreamingResponse(iter([answer(GOOD | {"completion_tokens": -2})]), media_type="text/event-stream")

    line, told, rejected = play(Starlette(routes=[Route("/0", endpoint)]))
    assert (line, rejected, told.usage_source) == ((1 + 2_000, "usage", False), 0, "handler")


def test_never_hide_a_refused_exchange_behind_one_that_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3.22: a turn pays for all its calls: one whose report is refused leaves the whole not reported."""
    refused = json.dumps({"object": "list", "usage": {"prompt_tokens": -1, "total_tokens": 1}}).encode()
    monkeypatch.setitem(Models.answers, "/refused", ("application/json", [refused]))
    line, _, rejected = play(agent("/small", "/refused"), "/")
    assert (line, rejected) == ((ESTIMATE, "estimate", True), 1)


COUNTS = st.one_of(
    st.integers(0, 20),
    st.sampled_from([None, 0, -1, 2**53, 2**53 + 1, MAX_TOKENS + 1, 1e400, float("nan"), 2.0, 2.5, True, "2"]),
)
REPORTS = st.fixed_dictionaries(
    {"prompt_tokens": COUNTS, "completion_tokens": COUNTS},
    optional={"total_tokens": COUNTS, "cached_tokens": COUNTS, "reasoning_tokens": COUNTS},
)


def believable(usage: dict[str, Any]) -> bool:
    """Whether every count is one, and none contradicts another: said apart from the code that is tested."""
    for count in usage.values():
        if count is None:
            continue
        if isinstance(count, bool | str) or count != count or not 0 <= count <= MAX_TOKENS or count % 1:
            return False
    asked, given = usage["prompt_tokens"], usage["completion_tokens"]
    total, cached, thought = (usage.get(name) for name in ("total_tokens", "cached_tokens", "reasoning_tokens"))
    if total is not None and asked is not None and total < asked + (given or 0):
        return False
    apart = bool(thought) and None not in (asked, given, total) and total == asked + given + thought
    over = thought is not None and given is not None and thought > given and not apart
    return not over and not (cached is not None and asked is not None and cached > asked)


@given(st.lists(REPORTS, min_size=10, max_size=20))
@settings(max_examples=4)
def test_charge_no_report_that_cannot_be(usages: list[dict[str, Any]]) -> None:
    """S3.21: whatever a provider reports, the books hold its exact price, or the fallback; an alarm tells nonsense."""
    for usage, (line, told, refused) in zip(usages, plays([answer(usage) for usage in usages]), strict=True):
        if not believable(usage):
            assert (line, refused, told.usage) == ((ESTIMATE, "estimate", True), 1, None)
            continue
        asked, given = usage["prompt_tokens"], usage["completion_tokens"]
        if line[1] == "usage":
            assert (refused, told.usage.input) == (0, asked)
            assert told.usage.output - (given or 0) in (0, usage.get("reasoning_tokens"))
            assert line[0] == told.usage.input + 1_000 * told.usage.output
        else:
            assert None in (asked, given)
            assert (refused, line[0] >= ESTIMATE) == (0, True)
