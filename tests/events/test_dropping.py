"""What usage events of a line leave out, and how long a sink may take, as a metering is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_million_tokens
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.usage import UsageEvent
from tests.harness.drive import drive, http_scope, lifespan
from tests.pitfalls.stage import within

PRICE = per_million_tokens(input=1)
DROPS = {"podcast": ["thread_id", "caller", "plan"], "image": {"request_id", "model"}}


def test_leave_out_what_events_of_a_line_do_not_carry() -> None:
    """Field-drop rules per usage type: work in the background names no thread, and all else is as ever (S3.36)."""
    told: list[UsageEvent] = []

    async def play() -> None:
        async with Metering(sinks=[CallbackSink(told.extend)], drop_fields=DROPS) as metering:
            await metering.grant("ann", 100, id="g")
            caller = Caller("bob", attributes={"plan": "pro", "region": "eu"})
            for line in ("chat", "podcast", "image"):
                async with metering.charge(payer="ann", line=line, hold=7, price=PRICE, caller=caller) as call:
                    call.attributes.update({"thread_id": "t1", "message_id": "m1"})
                    for model in ("m", "n"):
                        call.record(TokenUsage(input=1_000_000), model=model, provider="acme")
            await within(5, lambda: len(told) == 3)
            # What a worker that dies leaves behind tells none of it either.
            held = (await metering.store.read(EverythingKept())).state.holds.values()
            facts = {hold.line: hold.facts for hold in held}
            assert facts["chat"]["attributes"] == {"plan": "pro", "region": "eu"}
            assert facts["podcast"]["attributes"] == {"region": "eu"}
            assert "caller" not in facts["podcast"]

    asyncio.run(play())
    chat, podcast, image = told
    assert (chat.caller, chat.attributes["thread_id"], chat.attributes["plan"]) == ("bob", "t1", "pro")
    assert (podcast.caller, podcast.attributes.keys() & {"thread_id", "plan"}) == (None, set())
    assert (podcast.attributes["message_id"], podcast.attributes["region"]) == ("m1", "eu")
    assert (image.request_id, image.model, image.attributes["thread_id"]) == (None, None, "t1")
    for event in told:
        # What was settled, the totals and each model of it are told whatever is left out.
        assert event.amount == 2_000_000
        assert event.usage is not None
        assert event.usage.input == 2_000_000
        assert event.attributes["metering.models"].count('"calls":1') == 2  # type: ignore[union-attr]


def test_leave_it_out_of_what_a_request_tells() -> None:
    """It is the line that counts, also over HTTP, and in what the admission has told for a worker that dies (S3.36)."""
    told: list[UsageEvent] = []

    @billable(1, line="podcast")
    async def endpoint(_request: Request) -> PlainTextResponse:
        current_call().attributes["thread_id"] = "t1"
        raise RuntimeError("no")

    async def play() -> None:
        metering = Metering(
            identify=lambda _: Caller("ann", attributes={"plan": "pro"}),
            sinks=[CallbackSink(told.extend)],
            drop_fields=DROPS,
        )
        app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint, methods=["POST"])]), metering=metering)
        async with lifespan(app):
            await metering.grant("ann", 10, id="g")
            await drive(app, http_scope("/", method="POST"))
            await within(5, lambda: bool(told))

    asyncio.run(play())
    (event,) = told
    assert (event.outcome, event.caller, dict(event.attributes)) == ("error", None, {})


@pytest.mark.parametrize(
    ("drops", "sentence"),
    [
        (["thread_id"], "is no mapping of lines"),
        ({"podcast": "thread_id"}, "of line 'podcast' are no list of names"),
        ({"podcast": [3]}, "of line 'podcast' are no list of names"),
        ({"podcast": ["amount"]}, "'amount', which every event has"),
        ({"pod cast": ["a"]}, "Choose another"),
    ],
)
def test_refuse_rules_that_are_none(drops: Any, sentence: str) -> None:
    """A sentence says what may be left out; what was charged may not (S3.36)."""
    with pytest.raises(ConfigurationError, match=sentence):
        Metering(drop_fields=drops)


class Hanging:
    """A sink that does not answer."""

    name = "hanging"

    def __init__(self) -> None:
        self.asked = 0
        self.answers = False

    async def deliver(self, events: Sequence[UsageEvent]) -> None:
        """Wait for ever, until it answers."""
        self.asked += 1
        if not self.answers:
            await asyncio.Event().wait()


def test_bound_what_a_sink_may_take(caplog: pytest.LogCaptureFixture) -> None:
    """The audit is bounded by the metering's own seconds, ten by default, and undoes no settlement (S3.35)."""
    sink = Hanging()

    async def play() -> None:
        async with Metering(sinks=[sink], delivery_timeout_s=0.02) as metering:
            await metering.grant("ann", 10, id="g")
            async with metering.charge(payer="ann", line="job", price=2):
                pass
            await within(5, lambda: "within 0.02 s" in caplog.text)
            assert (await metering.balance("ann")).settled == 2_000_000
            sink.answers = True

    asyncio.run(play())
    assert sink.asked > 1
    for wrong in (0, -1, "10", 10**6):
        with pytest.raises(ConfigurationError, match="delivery_timeout_s="):
            Metering(delivery_timeout_s=wrong)  # type: ignore[arg-type]
