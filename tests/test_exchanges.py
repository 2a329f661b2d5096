"""Very many upstream exchanges in one call: details are bounded, sums are not, and each costs what it costs alone."""

from __future__ import annotations

import asyncio
import contextvars
import json
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest

from asgi_metering import Metering, TokenUsage, folding, witnesses
from asgi_metering.booking import UpstreamBooking
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.exchanges import Exchanges, Sum
from asgi_metering.measuring import committed_usage
from asgi_metering.prices import ModelCall, above, by_usage, model_prices, per_token
from asgi_metering.tokens import count_tokens
from asgi_metering.upstream.patient import PatientReader
from asgi_metering.usage import UsageEvent
from asgi_metering.usage.values import MAX_TOKENS
from asgi_metering.witnesses import LITELLM, Told, Witness
from tests.pitfalls.stage import within

MICRO = 10**6
"""Smallest parts of a credit."""

MANY = 90
"""Far more than are kept by themselves here."""


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums begin early, so that these tests need few exchanges."""
    monkeypatch.setattr(Exchanges, "most", 20)
    monkeypatch.setattr(Exchanges, "spare", 5)
    monkeypatch.setattr(Exchanges, "most_sums", 10)
    monkeypatch.setattr(witnesses, "MAX_WATCHED", 40)


TIERED = per_token(input="0.001", output="0.01", tiers=[above(100, input="0.002")])
BY_NAME = model_prices(
    {"small": [TIERED, "0.003"], "large": per_token(input="0.005", output="0.05")},
    units_per_usd=1,
    published=False,
    fee="0.5",
    believed_usd=2,
)


class Spent:
    """What one charge came to."""

    def __init__(self) -> None:
        self.settled = 0
        self.kept = 0
        self.events: list[UsageEvent] = []
        self.late = 0


def spent(work: Callable[[Metering, Any], None], price: Any = TIERED, hold: Any = 1) -> Spent:
    """What a charge of *work*, which gets the metering and its call, comes to."""
    found = Spent()

    async def play() -> None:
        async with Metering(sinks=[CallbackSink(found.events.extend)]) as metering:
            await metering.grant("ann", 10**9, id="g")
            async with metering.charge(payer="ann", line="agent", price=price, hold=hold) as call:
                work(metering, call)
                found.kept = len(call.exchanges)
            await within(5, lambda: bool(found.events))
            found.settled = (await metering.balance("ann")).settled
            found.late = sum(metering.meters.totals("usage_late").values())

    asyncio.run(play())
    return found


def chat(given: int, written: int, model: str = "small", **more: Any) -> bytes:
    """A chat answer that reports."""
    usage = {"prompt_tokens": given, "completion_tokens": written, "total_tokens": given + written}
    return json.dumps({"object": "chat.completion", "model": model, "usage": usage | more}).encode()


def broken(text: str) -> bytes:
    """The beginning of a stream."""
    delta = {"object": "chat.completion.chunk", "model": "small", "choices": [{"delta": {"content": text}}]}
    return b"data: " + json.dumps(delta).encode() + b"\n\n"


def exchange(metering: Metering, body: bytes, status: int = 200, *, ends: bool = True, fetched: bool = False) -> None:
    """One exchange of the current call, as the upstream client tells of it."""
    booking = UpstreamBooking(metering)
    token = booking.started("acme")
    reader = PatientReader("application/json" if ends else "text/event-stream")
    reader.fetched = fetched
    booking.body_started(token, "acme", reader, status)
    reader.feed(body)
    if ends:
        reader.end()
    booking.finished(token, "acme", reader, status)


@pytest.mark.parametrize(
    ("price", "amount"),
    [
        # 3 kinds of answers: below the tier, above it, and of another model with a cost of its own.
        pytest.param(TIERED, 50 * 1_000 + 200 * 2_000 + 9 * 1_000 + 3 * 10_000, id="tiers"),
        pytest.param(BY_NAME, 50 * 1_000 + 200 * 2_000 + 2 * 13_000 + 2_000_000, id="by name"),
        pytest.param(by_usage(lambda usage: Decimal(usage.input or 0) / 1000), 259_000, id="a function"),
    ],
)
def test_charge_each_of_very_many_exchanges(price: Any, amount: int) -> None:
    """
    DESIGN 4: one charge per call however many upstream calls it made, each at what it costs by itself (S3.22).

    Only so many bodies' readers are kept meanwhile, and nothing counts as late.
    """

    def work(metering: Metering, call: Any) -> None:
        for number in range(MANY):
            bodies = chat(50, 1), chat(200, 1), chat(9, 1, "large", cost=2)
            exchange(metering, bodies[number % 3])
        exchange(metering, b'{"error": {"message": "busy"}}', 429)

    found = spent(work, price)
    fee = 500_000 if price is BY_NAME else 0
    assert found.settled == amount * (MANY // 3) + fee
    assert found.kept <= 25
    assert found.late == 0
    (event,) = found.events
    assert event.basis == "usage"
    assert event.usage == TokenUsage(input=259 * (MANY // 3), output=MANY)
    assert sum(row["calls"] for row in json.loads(str(event.attributes["metering.models"]))) == MANY


@pytest.mark.parametrize("share", [1, 2], ids=["one", "half"])
def test_refuse_a_cost_by_itself_and_not_in_its_sum(share: int) -> None:
    """S3.21: an answer whose tokens cost more than is believed is refused alone, and makes no other one doubtful."""
    odd = MANY // 2 if share == 2 else 1

    def work(metering: Metering, call: Any) -> None:
        for number in range(MANY):
            exchange(metering, chat(5_000 if number < odd else 500, 0, cost=3))

    found = spent(work, BY_NAME)
    assert found.settled == (MANY - odd) * 1_003_000 + 500_000
    assert found.events[0].attributes["metering.price.flags"] == "cost_refused,cost_unresolved"


def test_sum_no_exchange_that_ends_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """DESIGN 4: an answer that ends in another thread between two looks at it counts as it ended, and not as it was."""
    running: list[tuple[UpstreamBooking, Any, PatientReader]] = []
    look = folding.parts_in

    def ends_behind_the_look(exchanges: Any) -> Any:
        parts = look(exchanges)
        while running:
            booking, token, reader = running.pop()
            reader.feed(chat(50, 7))
            reader.end()
            booking.finished(token, "acme", reader, 200)
        return parts

    def work(metering: Metering, call: Any) -> None:
        booking = UpstreamBooking(metering)
        token, reader = booking.started("acme"), PatientReader("application/json")
        booking.body_started(token, "acme", reader, 200)
        running.append((booking, token, reader))
        for _ in range(29):
            exchange(metering, chat(50, 1))

    monkeypatch.setattr(folding, "parts_in", ends_behind_the_look)
    (event,) = spent(work).events
    assert event.usage == TokenUsage(input=30 * 50, output=29 + 7)


def test_count_very_many_answers_that_broke_by_their_text() -> None:
    """DESIGN 4 "Observed": what is summed of answers that broke counts by the length of its text, as an estimate."""
    text = "hello wonderful world " * 10

    def work(metering: Metering, call: Any) -> None:
        for _ in range(MANY):
            exchange(metering, broken(text), ends=False)
        exchange(metering, chat(50, 1))

    found = spent(work, per_token(output="0.01"), hold=TokenUsage(input=7, output=1))
    counted, guessed = count_tokens(text).tokens, -(-len(text) // 4)
    assert found.settled >= MANY * min(counted, guessed) * 10_000
    assert found.settled <= MANY * max(counted, guessed) * 10_000 + 10_000
    assert [(event.basis, event.estimated) for event in found.events] == [("estimate", True)]


def test_fetch_an_answer_that_was_summed() -> None:
    """DESIGN 6: an answer that is read again has used nothing, however long ago it was given."""
    first = json.loads(chat(50, 1)) | {"id": "r"}

    def work(metering: Metering, call: Any) -> None:
        exchange(metering, json.dumps(first).encode())
        for _ in range(MANY):
            exchange(metering, json.dumps({"object": "response", "id": "p", "usage": None}).encode(), fetched=True)
        exchange(metering, json.dumps(first).encode(), fetched=True)

    assert spent(work).settled == 50 * 1_000 + 10_000


def test_keep_what_still_runs() -> None:
    """An exchange whose body still passes is summed by nobody, however many there are, and counts when it ends."""

    def work(metering: Metering, call: Any) -> None:
        booking = UpstreamBooking(metering)
        running = [PatientReader("application/json") for _ in range(MANY)]
        for reader in running:
            booking.body_started(booking.started("acme"), "acme", reader, 200)
        for reader in running:
            reader.feed(chat(50, 1))
            reader.end()
            booking.finished(call, "acme", reader, 200)

    found = spent(work)
    assert (found.settled, found.kept) == (60_000 * MANY, MANY)


@pytest.mark.uncounted
def test_sum_exchanges_of_several_threads() -> None:
    """Answers that come in several threads are counted once each, whoever looks meanwhile (DESIGN 6)."""

    def work(metering: Metering, call: Any) -> None:
        seen: list[int] = []

        def ask() -> None:
            for _ in range(MANY):
                exchange(metering, chat(50, 1))
                seen.append(committed_usage(call, TIERED, expected=False).output or 0)

        threads = [threading.Thread(target=contextvars.copy_context().run, args=(ask,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(seen) <= 4 * MANY

    assert spent(work).settled == 60_000 * 4 * MANY


def test_sum_models_beyond_the_bound_as_of_none() -> None:
    """Names of models come from upstream: those beyond the bound are charged as an answer that names none."""

    def work(metering: Metering, call: Any) -> None:
        for number in range(MANY):
            exchange(metering, chat(50, 1, f"model-{number}"))
        assert len(call.exchanges.sums) <= 11

    assert spent(work).settled == 60_000 * MANY


def test_refuse_a_sum_that_cannot_be_counted() -> None:
    """S3.21: what adds up to nonsense is not reported, with an alarm; the call is charged by its policy."""

    def work(metering: Metering, call: Any) -> None:
        for _ in range(MANY):
            exchange(metering, chat(MAX_TOKENS, 0))

    found = spent(work)
    assert found.settled == MICRO
    assert "invalid_count" in str(found.events[0].attributes["metering.usage.problems"])


def test_sum_of_a_sum_keeps_what_was_odd() -> None:
    """A sum tells of a token limit and of problems as each of its parts did (S3.28)."""
    call = ModelCall(TokenUsage(input=1, output=1), "m", "acme")
    cut = Sum(call, ("clipped",), truncated=True, counted=False, unreported=False)
    both = Sum(call, (), truncated=False, counted=False, unreported=False).plus(cut).report()
    assert (both.truncated(), both.problems, both.usage) == (True, ("clipped",), TokenUsage(input=2, output=2))


def test_charge_very_many_calls_that_a_library_told_of() -> None:
    """DESIGN 6: what LiteLLM tells of an agent loop is charged to its end, each call in its own tier."""

    def work(metering: Metering, call: Any) -> None:
        witness = Witness(metering.meters, LITELLM)
        for number in range(MANY):
            usage = TokenUsage(input=50 if number % 2 else 200, output=1)
            assert witness.begin().tell(Told(usage, f"m-{number % 2}", "acme"))

    found = spent(work)
    assert found.settled == (50 * 1_000 + 200 * 2_000 + 20_000) * MANY // 2
    assert found.late == 0
    rows = json.loads(str(found.events[0].attributes["metering.models"]))
    assert sum(row["calls"] for row in rows) == MANY


@pytest.mark.parametrize("tokens", [50, MAX_TOKENS])
def test_keep_the_sums_of_what_a_library_told_few(tokens: int) -> None:
    """Names that an application makes up cost no memory, and sums that cannot be counted are refused at the end."""

    def work(metering: Metering, call: Any) -> None:
        witness = Witness(metering.meters, LITELLM)
        for number in range(MANY):
            model = "m" if tokens == MAX_TOKENS else f"m-{number}"
            witness.begin().tell(Told(TokenUsage(input=tokens, output=0), model, "acme"))
        assert tokens == MAX_TOKENS or len(call.witnesses.told(LITELLM)) <= 40

    assert spent(work).settled == (MICRO if tokens == MAX_TOKENS else 50_000 * MANY)
