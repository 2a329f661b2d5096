"""What an endpoint returned, counted: `billable(count=)`, for prices of what comes out of a call (S2.11)."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel

from asgi_metering import Caller, Metering, MeteringMiddleware, billable, current_call, metered_app
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.prices import per_unit
from asgi_metering.usage import UsageEvent
from tests.harness.drive import Drive, body, drive, http_scope, status

PRICE = per_unit(items=2)
NAMES = ["profiles", "playbooks", "interactions"]
FOUND = {"profiles": [1, 2], "playbooks": [], "interactions": [3]}


class Unified(BaseModel):
    """An answer of three lists."""

    profiles: list[int]
    playbooks: list[int]
    interactions: list[int]


class Search(BaseModel):
    """A request."""

    top_k: int = 2


class Said:
    """What the requests of one application came to."""

    def __init__(self) -> None:
        self.events: list[UsageEvent] = []
        self.answers: list[Drive] = []
        self.settled = ""
        self.rejected = 0.0

    @property
    def counted(self) -> list[Any]:
        """The items of each event; None where it tells of none."""
        return [event.attributes.get("metering.units.items") for event in self.events]


def search(endpoint: Any, *sent: bytes, method: str = "POST", exempt: bool = False, **options: Any) -> Said:
    """Ask an application whose one *endpoint* is charged by *options* for each of the bodies *sent*."""
    said = Said()
    price = options.pop("price", PRICE)
    if price is PRICE:
        options.setdefault("hold", 8)
    api = FastAPI()
    api.api_route("/", methods=["POST", "GET", "HEAD"])(billable(price, **options)(endpoint))

    async def run() -> None:
        metering = Metering(
            identify=lambda connection: Caller("ann", "acme", exempt=exempt), sinks=(CallbackSink(said.events.extend),)
        )
        app = MeteringMiddleware(api, metering=metering)
        async with metering:
            await metering.grant("acme", 100, id="g")
            for each in sent or (b"{}",):
                scope = http_scope("/", method, headers=[("content-type", "application/json")])
                said.answers.append(await drive(app, scope, body=each))
            await metering.runtime().booked()
            said.settled = metering.unit.text((await metering.balance("acme")).settled)
            said.rejected = sum(metering.meters.totals("usage_rejected").values())
            assert await metering.check() == []

    asyncio.run(run())
    return said


async def unified() -> Unified:
    """Three lists."""
    return Unified(**FOUND)


def plain() -> dict[str, Any]:
    """The same, of a sync function."""
    return FOUND


async def answered() -> JSONResponse:
    """The same, as a response that was made already."""
    return JSONResponse(FOUND)


def of_model(result: Unified) -> dict[str, int]:
    """The sum of three lists."""
    return {"items": sum(len(getattr(result, name)) for name in NAMES)}


async def of_dict(result: dict[str, Any]) -> int:
    """The same, as a number: the price has one unit."""
    await asyncio.sleep(0)
    return sum(len(result[name]) for name in NAMES)


def of_response(result: JSONResponse) -> str:
    """The same, from the body of a response."""
    return str(sum(len(found) for found in json.loads(bytes(result.body)).values()))


@pytest.mark.parametrize(
    ("endpoint", "count"),
    [(unified, of_model), (plain, of_dict), (answered, of_response)],
    ids=["model", "sync", "response"],
)
def test_charge_what_was_returned(endpoint: Any, count: Any) -> None:
    """Each endpoint says how its own answer is counted, and one event tells the count (S2.10, S2.11)."""
    said = search(endpoint, count=count)
    assert json.loads(body(said.answers[0].log)) == FOUND
    assert (said.settled, said.counted) == ("6", [3])


def test_count_by_the_arguments_too() -> None:
    """What was asked, and the call itself, are at hand beside what was returned."""

    async def endpoint(asked: Search) -> list[int]:
        return list(range(asked.top_k))

    def count(asked: Search, result: list[int], call: Any) -> dict[str, int]:
        assert call.caller.id == "ann"
        return {"items": max(len(result), asked.top_k)}

    assert search(endpoint, b'{"top_k": 4}', b"{}", count=count).counted == [4, 2]


def test_bill_results_or_requests() -> None:
    """An answer without a result is free where results are billed, and a request where these are (S2.9, S2.20)."""

    async def endpoint() -> list[int]:
        return []

    results = search(endpoint, count=lambda result: len(result))
    assert (results.settled, results.counted, results.events[0].amount) == ("0", [0], 0)
    requests = search(endpoint, price=2, count=lambda result: {"items": len(result)})
    assert (requests.settled, requests.counted) == ("2", [0])


def test_add_to_what_the_handler_reports() -> None:
    """A handler may report beside it; reports of one call add up, here as anywhere."""

    async def endpoint() -> list[int]:
        current_call().record(units={"items": 2})
        return [1]

    assert search(endpoint, count=lambda result: len(result)).settled == "6"


@pytest.mark.parametrize("left_out", ["type", "method", "error"])
def test_count_nothing_that_is_not_charged(left_out: str) -> None:
    """A call that this line does not charge is not counted, and one that fails has returned nothing (S2.12)."""
    asked: list[Any] = []

    async def endpoint() -> list[int]:
        if left_out == "error":
            raise ValueError
        return [1]

    options: dict[str, Any] = {
        "type": {"callers": ["other"]},
        "method": {"method": "HEAD"},
    }.get(left_out, {})
    said = search(endpoint, count=lambda result: asked.append(result), **options)
    assert (asked, said.settled) == ([], "0")


@pytest.mark.parametrize("who", ["skipped", "exempt"])
def test_tell_the_count_of_free_work(who: str) -> None:
    """What a customer's own model did is free, and recorded: a call that is free tells its count (S2.15)."""
    options: dict[str, Any] = {"skip_if": lambda: True} if who == "skipped" else {"exempt": True}
    said = search(unified, count=of_dict_or_model, **options)
    assert (said.settled, said.counted, said.events[0].amount) == ("0", [3], 0)


def of_dict_or_model(result: Unified) -> int:
    """The sum of three lists, as a number."""
    return of_model(result)["items"]


def _raises(result: Any) -> int:
    raise KeyError("items")


@pytest.mark.parametrize(
    "count",
    [
        _raises,
        lambda result: None,
        lambda result: -1,
        lambda result: 0.5,
        lambda result: {"items": -1},
        lambda: [0],
        lambda result: {},
    ],
    ids=["raises", "none", "negative", "float", "negative unit", "list", "nothing"],
)
def test_a_count_that_fails_breaks_no_response(count: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The answer goes out, the call is charged as one of missing usage, and there is an alarm (S2.5, S2.7)."""
    with caplog.at_level(logging.ERROR, "asgi_metering"):
        said = search(unified, count=count)
    assert (status(said.answers[0].log), json.loads(body(said.answers[0].log))) == (200, FOUND)
    assert (said.settled, said.events[0].basis, said.rejected) == ("8", "estimate", 1)
    assert "The count of tests.test_counts.unified" in caplog.text
    assert "charged as missing" in caplog.text


def test_a_number_counts_one_unit() -> None:
    """Of a price that has several units a number could be any: the alarm says what to answer instead."""
    said = search(unified, price=per_unit(items=2, pages=1), hold=8, count=lambda: 3)
    assert (said.events[0].basis, said.rejected) == ("estimate", 1)


async def generated() -> Any:
    """A stream."""
    yield b""


def gated(price: Any) -> Any:
    """A whole application, metered."""
    return metered_app(PlainTextResponse("ok"), price)


@pytest.mark.parametrize(
    ("decorate", "mend"),
    [
        (lambda: billable(PRICE, hold=1, count=3), "count=3 cannot be called. Pass a function"),
        (lambda: billable(PRICE, hold=1, count=lambda *found: 1), "by position"),
        (lambda: billable(PRICE, hold=1, count=lambda found: 1)(unified), "It can have 'result', 'call'"),
        (lambda: billable(PRICE, hold=1, count=of_model)(generated), r"returns nothing. .*record\(units="),
        (lambda: gated(billable(PRICE, hold=1, count=of_model)), r"no function that returns.*record\(units="),
        (lambda: billable(1, per="message", count=of_model), r"no function that returns.*"),
    ],
    ids=["no function", "position", "parameter", "generator", "application", "session"],
)
def test_refuse_a_count_of_what_is_not_returned(decorate: Callable[[], Any], mend: str) -> None:
    """What cannot be counted is a mistake at import, and the sentence names what works."""
    with pytest.raises(ConfigurationError, match=mend):
        decorate()
