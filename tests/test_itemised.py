"""Each call of a model behind one metered call is priced by itself, and the event says how."""

from __future__ import annotations

import asyncio
import json
import logging
from decimal import Decimal
from typing import Any

import pytest

from asgi_metering import Metering, TokenUsage, billable, metered_app, slices, up_to
from asgi_metering.breakdown import MAX_UNITS_TOLD
from asgi_metering.errors import AmountError, ConfigurationError, UsageError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.itemised import counted_call, model_call
from asgi_metering.prices import above, by_usage, model_prices, per_minute, per_token, per_unit
from asgi_metering.usage import UsageEvent, UsageReport
from tests.pitfalls.stage import staged, within

pytestmark = pytest.mark.uncounted

CREDIT = 1_000_000
MODELS = model_prices(
    {"acme/large": per_token(input=1, output=2), "small": per_token(input="0.1"), "painter": per_unit(images=3)},
    units_per_usd=1,
    published=False,
    fee="0.5",
    version="v7",
)


class Spent:
    """What one charge came to: the balance's parts, its event, and what was counted."""

    def __init__(self) -> None:
        self.settled = 0
        self.events: list[UsageEvent] = []
        self.doubts: dict[str, int] = {}

    @property
    def attributes(self) -> dict[str, Any]:
        """What the one event says besides its fields."""
        (event,) = self.events
        return dict(event.attributes)


def spent(work: Any, **options: Any) -> Spent:
    """What a charge of *work* comes to."""
    found = Spent()

    async def play() -> None:
        async with Metering(sinks=[CallbackSink(found.events.extend)]) as metering:
            await metering.grant("ann", 1_000, id="g")
            async with metering.charge(payer="ann", line="agent", **{"hold": 100, "price": MODELS, **options}) as call:
                await work(call)
            await within(5, lambda: bool(found.events))
            found.settled = (await metering.balance("ann")).settled
            found.doubts = {
                dict(attributes)["metering.problem"]: count  # type: ignore[misc]
                for attributes, count in metering.meters.totals("costs_doubtful").items()
            }

    asyncio.run(play())
    return found


def reporting(*reports: Any) -> Any:
    """Work that reports so."""

    async def work(call: Any) -> None:
        for report in reports:
            call.record(*report[:1], **report[1])

    return work


def test_sum_every_call_at_its_own_price() -> None:
    """A turn costs the sum of all of its calls, and the event tells the share of each model (S3.22, S3.27)."""
    found = spent(
        reporting(
            (TokenUsage(input=2, output=1), {"model": "large", "provider": "acme"}),
            (TokenUsage(input=5), {"model": "small"}),
            (TokenUsage(input=3, output=1), {"model": "large-2026-01-01", "cost": "2.25"}),
            (TokenUsage(input=1), {"model": "small"}),
        )
    )
    assert found.settled == int(Decimal("4.0") * CREDIT) + int(Decimal("0.6") * CREDIT) + 2_250_000 + 500_000
    assert found.attributes["metering.price.version"] == "v7"
    assert json.loads(found.attributes["metering.price.models"]) == {
        "large": {"calls": 1, "cost": "4", "input": 2, "output": 1},
        "large-2026-01-01": {"calls": 1, "cost": "2.25", "input": 3, "output": 1},
        "small": {"calls": 2, "cost": "0.6", "input": 6},
    }
    assert "metering.price.flags" not in found.attributes
    assert found.doubts == {}


def test_settle_nothing_where_nothing_was_used() -> None:
    """A success that used nothing settles 0, returns its hold, and is told of (S3.23)."""
    found = spent(reporting((TokenUsage(input=0, output=0), {"model": "large"})))
    assert (found.settled, found.events[0].amount, found.doubts) == (0, 0, {})


def test_alarm_of_a_model_that_nobody_knows(caplog: pytest.LogCaptureFixture) -> None:
    """A cost that nothing tells is charged as 0, with a warning, a flag on the event and an alarm (S3.20)."""
    with caplog.at_level(logging.ERROR):
        found = spent(reporting((TokenUsage(input=9), {"model": "nobody's"})))
    assert found.settled == 500_000
    assert found.attributes["metering.price.flags"] == "unknown_model,cost_unresolved"
    assert found.doubts == {"unknown_model": 1, "cost_unresolved": 1}
    assert "Nothing tells the cost of a model that it used, so that nothing is charged for that" in caplog.text
    assert "nobody's" in caplog.text


def test_report_what_is_no_token() -> None:
    """A handler reports images, seconds, and costs of its own; floats are refused where they are reported (S3.21)."""
    found = spent(reporting((TokenUsage(), {"model": "painter", "units": {"images": 2}})))
    assert found.settled == 6_500_000
    minutes = spent(reporting((TokenUsage(), {"units": {"seconds": "90"}})), price=per_minute(2))
    assert minutes.settled == 3_000_000

    async def wrong(call: Any) -> None:
        for told in ({"cost": 0.5}, {"cost": "NaN"}, {"cost": -1}, {"units": {"seconds": 0.5}}):
            with pytest.raises(AmountError):
                call.record(**told)
        assert call.reports == []
        call.record(TokenUsage())

    assert spent(wrong).settled == 0


def test_charge_calls_in_their_own_tiers() -> None:
    """Two short contexts are not one long one, and the event tells both models (S3.22)."""
    tiered = per_token(input=1, tiers=[above(5, input=10)])
    found = spent(reporting((TokenUsage(input=4), {"model": "a"}), (TokenUsage(input=3), {"model": "b"})), price=tiered)
    assert found.settled == 7 * CREDIT
    assert [row["model"] for row in json.loads(found.attributes["metering.models"])] == ["a", "b"]
    assert "metering.price.models" not in found.attributes


def test_charge_by_a_function_of_the_call() -> None:
    """A function, also an async one, is asked with the call, what it used and each call of a model."""

    async def by_call(call: Any, usage: TokenUsage, calls: Any) -> Decimal:
        await asyncio.sleep(0)
        return Decimal(len(calls)) + (usage.input or 0) + (7 if call.line == "agent" else 0)

    report = (TokenUsage(input=2), {"model": "a"})
    assert spent(reporting(report, report), price=by_usage(by_call)).settled == (2 + 4 + 7) * CREDIT


@pytest.mark.parametrize("kind", ["raises", "hangs", "nonsense"])
def test_fall_back_where_a_function_fails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A price that raises, hangs or answers nonsense never loses an end: the hold is charged, with an alarm (S3.21)."""
    monkeypatch.setattr("asgi_metering.itemised.PRICE_TIMEOUT_S", 0.01)

    async def broken(usage: TokenUsage) -> Any:
        if kind == "raises":
            raise ValueError("mine")
        if kind == "hangs":
            await asyncio.Event().wait()
        return "NaN"

    found = spent(reporting((TokenUsage(input=2), {})), price=by_usage(broken), hold=3)
    assert found.settled == 3 * CREDIT


@pytest.mark.parametrize(
    ("model", "is_media"),
    [("gpt-image-1", True), ("openai/dall-e-3", True), ("black-forest-labs/flux-pro", True), ("gpt-4o", False)],
)
def test_know_models_that_answer_with_images(model: str, is_media: bool) -> None:
    """Tokens that were counted here never price an image, so its models are known by their names (S3.20)."""
    report = UsageReport(usage=TokenUsage(input=1), model=model)
    assert (model_call(report, None).is_media, counted_call(TokenUsage(), model, None).is_media) == (is_media,) * 2
    assert not counted_call(TokenUsage(), None, None).is_media
    with pytest.raises(UsageError, match="told no usage"):
        model_call(UsageReport(model=model), None)


def test_refuse_a_bill_that_is_none() -> None:
    """A price of somebody's own that bills something else falls back likewise (S3.21)."""

    class Odd:
        def cost(self, usage: TokenUsage) -> Decimal:
            return Decimal(1)

        def affordable(self, kind: str, units: Decimal, used: TokenUsage) -> int:
            return 1

        def bill(self, calls: Any, context: Any = None) -> Any:
            return 7

    assert spent(reporting((TokenUsage(input=2), {})), price=Odd(), hold=3).settled == 3 * CREDIT


def test_refuse_a_hold_that_no_price_tells() -> None:
    """A price that is known at the end alone needs a hold in amounts, which is told where both are written."""

    async def slow(usage: TokenUsage) -> int:
        return 1

    price = by_usage(slow)
    for hold in (None, TokenUsage(output=5), up_to(at_least=1), slices(2, step=TokenUsage(output=1))):
        with pytest.raises(ConfigurationError, match="Hold an amount"):
            billable(price, hold=hold)
    for known in (2, up_to(2, at_least=1), lambda: 1, slices(2, step=1)):
        assert billable(price, hold=known).charge is not None
    assert billable(by_usage(lambda usage: 1)).charge is not None


@pytest.mark.parametrize("price", [per_unit(items=2), 7], ids=["priced", "fixed"])
def test_tell_how_much_of_each_unit_was_used(price: Any) -> None:
    """The event has the counts that were reported, beside tokens and what else the handler saw (S2.8, S2.19)."""

    async def work(call: Any) -> None:
        call.attributes["raw_results"] = 9
        call.record(TokenUsage(input=900), units={"items": 3})
        call.record(TokenUsage(input=100), units={"items": 1, "seconds": "93.5"})

    hold: dict[str, Any] = {"hold": 8} if price != 7 else {"hold": None}
    found = spent(work, price=price, **hold)
    assert found.settled == (8 if price != 7 else 7) * CREDIT
    assert found.events[0].usage == TokenUsage(input=1_000)
    counts = {"metering.units.items": 4, "metering.units.seconds": 93.5}
    assert found.attributes == {"raw_results": 9, "metering.upstream.calls": 2, **counts}
    assert type(found.attributes["metering.units.items"]) is int


def test_tell_that_nothing_of_a_unit_was_used() -> None:
    """A count of zero is told as zero, and charged as that; one that nobody reported is not told (S2.9, S2.41)."""

    async def none_found(call: Any) -> None:
        call.record(units={"items": 0})

    found = spent(none_found, price=per_unit(items=2), hold=8)
    assert (found.settled, found.events[0].amount, found.attributes) == (0, 0, {"metering.units.items": 0})

    async def silent(call: Any) -> None: ...

    assert spent(silent, price=per_unit(items=2), hold=8).attributes == {}


def test_tell_of_units_without_a_price(caplog: pytest.LogCaptureFixture) -> None:
    """Units of which none has a price cost nothing, and not in silence: a name may be misspelt (S2.11)."""

    async def misspelt(call: Any) -> None:
        call.record(units={"item": 3})

    found = spent(misspelt, price=per_unit(items=2), hold=8)
    assert (found.settled, found.attributes["metering.price.flags"]) == (0, "unpriced_units")
    assert "None of the units that it reported has a price" in caplog.text

    async def beside(call: Any) -> None:
        call.record(units={"items": 3, "looked_at": 90})

    assert "metering.price.flags" not in spent(beside, price=per_unit(items=2), hold=8).attributes


def test_tell_of_as_many_units_as_an_event_has_room_for() -> None:
    """Names come from handlers: an event tells of the first `MAX_UNITS_TOLD`, and all of them are charged."""

    async def work(call: Any) -> None:
        call.record(units={f"unit-{number}": 1 for number in range(MAX_UNITS_TOLD)})
        call.record(units={"one-more": 1})

    found = spent(work, price=per_unit({"one-more": 2, "unit-0": 1}), hold=8)
    assert found.settled == 3 * CREDIT
    assert len(found.attributes) == MAX_UNITS_TOLD
    assert "metering.units.one-more" not in found.attributes


def test_record_the_encoding_that_was_counted_by() -> None:
    """An answer that nobody reported is counted by one encoding, which its event names (S2.34)."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            raise ValueError(scope["type"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": b"hello world", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": True})

    async def play() -> Any:
        priced = billable(MODELS, hold=TokenUsage(input=1, output=9), on_disconnect="observed")
        async with staged(metered_app(app, priced)) as stage:
            await stage.drive(raise_at=3)
            await stage.outcomes()
            return stage.events[-1]

    event = asyncio.run(play())
    assert (event.usage_source, event.usage.output) == ("tokenizer", 2)
    assert event.attributes["metering.usage.encoding"] == "cl100k_base"
    assert event.attributes["metering.price.version"] == "v7"


def test_pin_the_prices_of_the_admission() -> None:
    """Prices that are replaced while a call runs are those of the next call; the event names its own."""
    events: list[UsageEvent] = []

    async def play() -> None:
        async with Metering(sinks=[CallbackSink(events.extend)]) as metering:
            await metering.grant("ann", 100, id="g")
            current = [MODELS, model_prices({"small": 9}, units_per_usd=1, published=False, version="v8")]
            for prices in current:
                async with metering.charge(payer="ann", line="job", hold=9, price=prices) as call:
                    current[0] = current[1]
                    call.record(TokenUsage(input=10), model="small")
            await within(5, lambda: len(events) == 2)

    asyncio.run(play())
    assert [(event.amount, event.attributes["metering.price.version"]) for event in events] == [
        (1_500_000, "v7"),
        (9_000_000, "v8"),
    ]


def test_price_what_an_answer_tells_besides_its_tokens() -> None:
    """The service tier and the searches of an answer reach its price, also where its tokens were counted here."""
    report = UsageReport(usage=TokenUsage(input=1), service="flex", searches=2)
    price = per_token(input=10, services={"flex": "0.5"}, web_search=3)
    assert price.cost_of(model_call(report, None)) == 5 + 6
    assert price.cost_of(counted_call(TokenUsage(input=1), None, None, report)) == 5 + 6
    assert price.cost_of(counted_call(TokenUsage(input=1), None, None, UsageReport(service="flex"))) == 5
    cited = model_call(UsageReport(usage=TokenUsage(input=1), citations=7), None)
    assert dict(cited.units) == {"citation_tokens": 7}
