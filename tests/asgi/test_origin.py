"""Where a request came from: its id on the event, and its address as the key of a limit."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from asgi_metering import Caller, Metering, MeteringMiddleware, TokenUsage, billable, current_call, rate_limited
from asgi_metering.events.sinks import CallbackSink
from asgi_metering.stores.contract import EverythingKept
from tests.harness.drive import drive, http_scope, lifespan, status
from tests.pitfalls.stage import within


@pytest.mark.parametrize(
    ("fields", "told"),
    [([("x-request-id", "req 7\t")], "req7"), ([("x-request-id", "r" * 200)], "r" * 128), ([], "call-1")],
    ids=["cleaned", "bounded", "none"],
)
def test_tell_the_id_of_the_request(fields: list[tuple[str, str]], told: str) -> None:
    """The id that the client sent is on the event, printable and bounded; the call's own where it sent none (S2.13)."""
    events: list[Any] = []

    @billable(1)
    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def play() -> None:
        sinks = [CallbackSink(events.extend)]
        metering = Metering(identify=lambda _: Caller("ann"), sinks=sinks, new_id=lambda: "call-1")
        app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=metering)
        async with lifespan(app):
            await metering.grant("ann", 10, id="g")
            await drive(app, http_scope("/", headers=fields))
            await within(5, lambda: bool(events))

    asyncio.run(play())
    assert [event.request_id for event in events] == [told]


def test_count_an_address_by_its_hash_whatever_it_calls_itself() -> None:
    """Another user agent is no other client, and the store never has the address itself (S3.48)."""

    @rate_limited("2/day", key="address")
    async def endpoint(_request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    async def play() -> None:
        metering = Metering(sinks=())
        app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint)]), metering=metering)
        async with lifespan(app):
            scopes = [http_scope("/", headers=[("user-agent", agent)]) for agent in "abc"]
            answers = [await drive(app, scope | {"client": ("192.0.2.7", 5000 + n)}) for n, scope in enumerate(scopes)]
            assert [status(each.log) for each in answers] == [200, 200, 429]
            state = (await metering.store.read(EverythingKept())).state
        assert len(state.counters) == 1
        assert "192.0.2.7" not in str(state.counters)

    asyncio.run(play())


def test_hold_tokens_of_somebody_unknown_by_two_keys_at_once() -> None:
    """S3.44, S3.45: tokens of a session and of its address are held together; where one refuses, none has counted."""

    @rate_limited("500 per 30 days of tokens", key="address", scope="anonymous-address")
    @rate_limited("300 per 30 days of tokens", key=lambda request: request.headers["x-session"], scope="anonymous")
    async def endpoint(request: Request) -> PlainTextResponse:
        current_call().record(TokenUsage(input=40, output=60))
        return PlainTextResponse("ok")

    async def play() -> None:
        metering = Metering(identify=lambda _: None, sinks=())
        app = MeteringMiddleware(Starlette(routes=[Route("/", endpoint, methods=["POST"])]), metering=metering)

        async def asked(session: str, address: str, agent: str = "a") -> int:
            fields = [("x-session", session), ("user-agent", agent)]
            body = b'{"max_tokens": 100, "messages": []}'
            scope = http_scope("/", method="POST", headers=fields, client=(address, 1))
            found = status((await drive(app, scope, body=body)).log)
            await metering.runtime().booked()
            return found

        async with lifespan(app):
            assert [await asked("one", "192.0.2.1") for _ in range(4)] == [200, 200, 200, 429]
            # Another agent is nobody else (S3.48), and what was refused took nothing from the address.
            assert await asked("one", "192.0.2.1", "b") == 429
            assert [await asked("two", "192.0.2.1") for _ in range(3)] == [200, 200, 429]
            # What the address refused took nothing from the session.
            assert [await asked("two", "192.0.2.2") for _ in range(2)] == [200, 429]

    asyncio.run(play())
