"""Correlation: by what ids of its own an application finds a call again on its usage event (S2.13)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call, rate_limited
from asgi_metering.errors import ConfigurationError, InvalidKeyError
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.stores.contract import EverythingKept
from asgi_metering.usage import UsageEvent
from tests.harness.drive import drive, http_scope, status

OF_BODY: dict[str, Any] = {"request_id": lambda body: body.request_id, "session_id": lambda body: body.session_id}


class Search(BaseModel):
    """A request."""

    request_id: str | int | None = None
    session_id: str | int | None = None


class Desk:
    """An application with one endpoint, its events, and what its store had of a call that ran."""

    def __init__(self, drop_fields: Any = None, **options: Any) -> None:
        self.told: list[UsageEvent] = []
        self.facts: list[Any] = []
        self.metering = Metering(
            identify=lambda connection: Caller("ann"),
            sinks=(CallbackSink(self.told.extend),),
            drop_fields=drop_fields,
            new_id=iter(f"call-{number}" for number in range(99)).__next__,
        )
        api = FastAPI()

        @api.post("/")
        @billable(**{"price": 1, "line": "search", **options})
        async def endpoint(body: Search) -> None:
            _, state = await self.metering.store.read(EverythingKept())
            self.facts = [hold.facts for hold in state.holds.values()]
            for line in ("embed", "rank"):
                async with self.metering.charge(line=line, price=1):
                    pass
            async with self.metering.charge(line="own", price=1, payer="ann", request_id="r-own", session_id="s-own"):
                pass

        @api.post("/free")
        @rate_limited("9/minute")
        async def free(body: Search) -> None:
            current_call().record(TokenUsage(input=1))
            async with self.metering.charge(line="inside", price=1, payer="ann"):
                pass

        self.app = MeteringMiddleware(api, metering=self.metering)

    def play(self, body: bytes = b"{}", *fields: tuple[str, str], path: str = "/", said: int = 200) -> dict[str, Any]:
        """Ask once; what the event of each line says."""

        async def run() -> None:
            async with self.metering as metering:
                await metering.grant("ann", 100, id="g")
                scope = http_scope(path, "POST", headers=[("content-type", "application/json"), *fields])
                assert status((await drive(self.app, scope, body=body)).log) == said
                await metering.runtime().booked()

        asyncio.run(run())
        return {event.line: (event.request_id, event.session_id) for event in self.told}


@pytest.mark.parametrize(
    ("body", "fields", "told"),
    [
        (b'{"request_id": "r1", "session_id": "s1"}', [], ("r1", "s1")),
        (b'{"request_id": "r1"}', [("x-request-id", "h1")], ("r1", None)),
        (b'{"session_id": 7}', [("x-request-id", "h1")], ("h1", "7")),
        (b"{}", [], ("call-0", None)),
        (b'{"request_id": "a b\\n", "session_id": " "}', [], ("ab", None)),
        (b'{"session_id": "%s"}' % (b"s" * 300), [], ("call-0", "s" * 128)),
    ],
    ids=["body", "body first", "header", "generated", "cleaned", "bounded"],
)
def test_tell_the_ids_that_a_body_has(body: bytes, fields: list[tuple[str, str]], told: tuple[str, str | None]) -> None:
    """Ids come from the body, else from the header, else the request's is generated; none is dropped (S2.13)."""
    desk = Desk(**OF_BODY)
    assert desk.play(body, *fields)["search"] == told
    # With the hold, so that a call whose worker dies is told of by them too.
    assert (desk.facts[0]["request_id"], desk.facts[0].get("session_id")) == told


def test_leave_out_ids_that_a_line_does_not_carry() -> None:
    """What events of a line leave out is neither on them nor with the hold, wherever it came from (S3.36)."""
    desk = Desk(drop_fields={"search": ["session_id"], "rank": ["request_id"]}, **OF_BODY)
    told = desk.play(b'{"request_id": "r1", "session_id": "s1"}')
    assert (told["search"], told["rank"], "session_id" in desk.facts[0]) == (("r1", None), (None, None), False)


def test_tell_the_ids_of_header_fields() -> None:
    """A name is that of a header field."""
    desk = Desk(request_id="X-Correlation-ID", session_id="x-session")
    told = desk.play(b"{}", ("x-correlation-id", "r 1"), ("x-session", "s1"), ("x-request-id", "h1"))
    assert told["search"] == ("r1", "s1")
    assert Desk(request_id="X-Correlation-ID").play(b"{}", ("x-request-id", "h1"))["search"] == ("h1", None)


@pytest.mark.parametrize("price", [0, 1])
def test_inherit_the_ids_of_the_request(price: int) -> None:
    """Charges inside of a request have its ids, unless they have their own (S0.29); whatever the request costs."""
    told = Desk(price=price, **OF_BODY).play(b'{"request_id": "r1", "session_id": "s1"}')
    assert told["embed"] == told["rank"] == told["search"] == ("r1", "s1")
    assert told["own"] == ("r-own", "s-own")


def test_inherit_the_id_of_a_request_without_a_price() -> None:
    """Where the request itself is not charged its header counts, and without one the id of its call, if it has one."""
    assert Desk().play(b"{}", ("x-request-id", "h1"), path="/free")["inside"] == ("h1", None)
    assert Desk().play(b"{}", path="/free")["inside"] == ("call-0", None)


def test_generate_an_id_outside_of_requests() -> None:
    """A job's event has the id of its call, and charges inside of it have that too."""
    told: list[UsageEvent] = []

    async def play() -> None:
        async with Metering(sinks=(CallbackSink(told.extend),)) as metering:
            await metering.grant("ann", 9, id="g")
            async with (
                metering.charge(payer="ann", line="job", price=1, session_id="s1"),
                metering.charge(line="step", price=1),
            ):
                pass
            await metering.runtime().booked()

    asyncio.run(play())
    step, job = told
    assert (step.line, step.session_id, job.session_id) == ("step", "s1", "s1")
    assert step.request_id == job.request_id == job.id != step.id


@pytest.mark.parametrize("answer", [True, 1.5, ["a"]])
def test_refuse_an_id_that_is_none(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An id is a text or a number; what is neither is a mistake of the endpoint's, and nothing is charged."""
    desk = Desk(session_id=lambda: answer)
    assert desk.play(said=500) == {}
    assert "The id is a" in caplog.text
    assert "nothing was charged" in caplog.text


def test_refuse_ids_that_cannot_be_read() -> None:
    """What names neither a function nor a header field is told at import, and of a job what is no id."""
    with pytest.raises(ConfigurationError, match="request_id='a b' is neither a function nor the name of a header"):
        billable(1, request_id="a b")
    with pytest.raises(ConfigurationError, match="asks for 'nothing'"):
        Desk(session_id=lambda nothing: 1)

    async def play() -> None:
        async with Metering(sinks=()) as metering:
            with pytest.raises(InvalidKeyError, match="session id"):
                async with metering.charge(payer="ann", line="job", price=1, session_id=""):
                    raise AssertionError("It ran.")

    asyncio.run(play())
