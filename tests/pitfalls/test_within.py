"""Charges inside of a request: what they are refused by is its answer, where the handler lets it rise."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_metering import Allowance, CallRefused, Metering, billable, rate_limited
from tests.harness.drive import Drive, body, drive, headers, lifespan, status, websocket_scope
from tests.pitfalls.apps import HOW, PRICE, How, installed
from tests.pitfalls.scene import ANN, POOR, Scene, Visit, field_of, problem, visit

REFUSED = Visit(caller=POOR)
START, BODY = "http.response.start", "http.response.body"


def answered(ended: Drive, code: int = 402) -> dict[str, Any]:
    """The client got one refusal, whole, and the server no exception; its problem details."""
    assert [message["type"] for message in ended.log] == [START, BODY]
    assert (status(ended.log), ended.exception) == (code, None)
    return problem(ended)


def app_of(endpoint: Any) -> Starlette:
    """An application of this one endpoint."""
    return Starlette(routes=[Route("/", endpoint)])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["limited", "free", "priced"])
def test_answer_by_the_refusal_of_a_charge_inside(kind: str, how: How, scene: Scene) -> None:
    """A handler whose charge is refused answers 402, by any price of its own, which is not charged (DESIGN 4, 5)."""

    async def endpoint(request: Request) -> PlainTextResponse:
        async with scene.metering.charge(payer=request.headers["x-api-key"], line="inner", price=1):
            return PlainTextResponse("ok")

    part = {"limited": rate_limited("60/minute"), "free": billable(0), "priced": billable(PRICE)}[kind]
    if kind == "priced":
        scene.grant(POOR, PRICE)
    app = installed(app_of(part(endpoint)), scene.metering, how)
    poor, ann = visit(app, REFUSED, Visit())
    told = answered(poor)
    assert (told["code"], told["line"], told["required"], told["available"]) == (
        "insufficient_credits",
        "inner",
        "1",
        "0",
    )
    assert status(ann.log) == 200
    assert scene.settled(POOR) == 0


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("decorated", [False, True])
def test_tell_no_numbers_of_another_payer(decorated: bool, how: How, scene: Scene) -> None:
    """What a payer has whom the handler names is not told to a caller who is not known to be it (DESIGN 10)."""

    async def endpoint(request: Request) -> PlainTextResponse:
        async with scene.metering.charge(payer=POOR, line="inner", price=1):
            return PlainTextResponse("ok")

    app = installed(app_of(billable(0)(endpoint) if decorated else endpoint), scene.metering, how)
    (ended,) = visit(app, Visit())
    told = answered(ended)
    assert told["code"] == "insufficient_credits"
    assert told["required"] == "1"
    assert not {"available", "held"} & told.keys()
    assert POOR not in json.dumps(told)


def test_answer_by_a_spent_allowance_as_it_says(scene: Scene) -> None:
    """Status, reset and waiting time are those of the charge's own sources; what others have is not told of it."""

    async def endpoint(request: Request) -> PlainTextResponse:
        sources = [Allowance(1, per="day")]
        async with scene.metering.charge(payer=request.headers["x-api-key"], line="in", price=2, sources=sources):
            return PlainTextResponse("ok")

    (ended,) = visit(installed(app_of(endpoint), scene.metering, "added"), REFUSED)
    assert answered(ended, 429)["code"] == "allowance"


@pytest.mark.parametrize("kind", ["dependency", "sync", "group", "translated"])
def test_answer_whatever_the_charge_is_made_in(kind: str, scene: Scene) -> None:
    """So it is of a dependency, of a thread, of a task group, and of a charge inside of a charge (pitfall 13)."""
    app = FastAPI()

    async def paid() -> AsyncIterator[None]:
        async with scene.metering.charge(payer=POOR, line="inner", price=1):
            yield

    @app.get("/dependency", dependencies=[Depends(paid)])
    async def dependency() -> str:
        return "ok"

    @app.get("/sync")
    def sync() -> str:
        with scene.metering.charge_sync(payer=POOR, line="inner", price=1):
            return "ok"

    async def work() -> None:
        async with (
            scene.metering.charge(payer=ANN, line="outer", price=1),
            scene.metering.charge(payer=POOR, line="inner", price=1),
        ):
            pass

    @app.get("/group")
    async def group() -> str:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(work())
        return "ok"

    @app.get("/translated")
    async def translated() -> str:
        try:
            await work()
        except CallRefused as refused:
            raise RuntimeError("no money") from refused
        return "ok"

    (ended,) = visit(installed(app, scene.metering, "added"), Visit(f"/{kind}"))
    assert answered(ended)["code"] == "insufficient_credits"
    scene.metering.portal().close()
    assert scene.settled() == 0


def test_answer_in_the_shape_of_the_route(scene: Scene) -> None:
    """The shape of errors is that which the request's own route chose, for its SDK (S4.5)."""

    @billable(0, errors="openai")
    async def endpoint(request: Request) -> PlainTextResponse:
        async with scene.metering.charge(line="inner", price=1):
            return PlainTextResponse("ok")

    (ended,) = visit(installed(app_of(endpoint), scene.metering, "added"), REFUSED)
    assert (status(ended.log), json.loads(body(ended.log))["error"]["code"]) == (402, "insufficient_quota")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("decorated", [False, True])
@pytest.mark.parametrize("answer", [200, 503, "broken"])
def test_leave_what_the_handler_answers_itself(answer: int | str, decorated: bool, how: How, scene: Scene) -> None:
    """A handler that catches the refusal has its own answer, a degraded one or 503, and its own errors (pitfall 15)."""

    async def endpoint(request: Request) -> Response:
        try:
            async with scene.metering.charge(payer=POOR, line="inner", price=1):
                pass
        except CallRefused:
            pass
        if isinstance(answer, str):
            raise ValueError(answer)
        return PlainTextResponse("less", answer)

    app = installed(app_of(billable(0)(endpoint) if decorated else endpoint), scene.metering, how)
    (ended,) = visit(app, Visit())
    if answer == "broken":
        assert (status(ended.log), type(ended.exception)) == (500, ValueError)
    else:
        assert (status(ended.log), body(ended.log), ended.exception) == (answer, b"less", None)


@pytest.mark.parametrize("decorated", [False, True])
def test_change_nothing_behind_the_first_byte(decorated: bool, scene: Scene) -> None:
    """What is refused in the middle of an answer breaks it, as any other failure there."""

    async def endpoint(request: Request) -> StreamingResponse:
        async def chunks() -> AsyncIterator[str]:
            yield "one"
            async with scene.metering.charge(payer=POOR, line="inner", price=1):
                yield "two"

        return StreamingResponse(chunks())

    app = installed(app_of(billable(0)(endpoint) if decorated else endpoint), scene.metering, "added")
    (ended,) = visit(app, Visit())
    assert (status(ended.log), body(ended.log)) == (200, b"one")
    assert isinstance(ended.exception, CallRefused)


def test_leave_the_refusals_of_another_metering(scene: Scene) -> None:
    """What another metering refuses, whose units and names nobody knows here, is an error of the handler."""
    other = Metering("memory://", sinks=())

    async def endpoint(request: Request) -> PlainTextResponse:
        async with other.charge(payer=POOR, line="inner", price=1):
            return PlainTextResponse("ok")

    (ended,) = visit(installed(app_of(endpoint), scene.metering, "added"), Visit())
    assert (status(ended.log), type(ended.exception)) == (500, CallRefused)


def test_answer_to_head_without_a_body(scene: Scene) -> None:
    """A free HEAD whose handler charges all the same is answered as GET would be, without the body (X.4)."""

    async def endpoint(request: Request) -> PlainTextResponse:
        async with scene.metering.charge(payer=POOR, line="inner", price=1):
            return PlainTextResponse("ok")

    (ended,) = visit(installed(app_of(endpoint), scene.metering, "added"), Visit(method="HEAD"))
    assert (status(ended.log), body(ended.log), ended.exception) == (402, b"", None)
    assert int(dict(headers(ended.log))["content-length"]) > 0
    assert field_of(ended, "cache-control") == "no-store"


@pytest.mark.parametrize("decorated", [False, True])
@pytest.mark.parametrize("accepts", [False, True])
@pytest.mark.parametrize("extension", [False, True])
def test_close_a_websocket_by_the_refusal_of_a_charge_inside(
    extension: bool, accepts: bool, decorated: bool, scene: Scene
) -> None:
    """A session whose handler lets such a refusal rise is closed by 4402 and the code, or denied before its accept."""

    async def endpoint(websocket: WebSocket) -> None:
        if accepts:
            await websocket.accept()
        async with scene.metering.charge(payer=websocket.headers["x-api-key"], line="turn", price=1):
            pass

    app = Starlette(routes=[WebSocketRoute("/", billable(0)(endpoint) if decorated else endpoint)])
    scope = websocket_scope(
        "/", headers=[("x-api-key", POOR)], extensions={"websocket.http.response": {}} if extension else None
    )

    async def story() -> Drive:
        async with lifespan(installed(app, scene.metering, "added")):
            return await drive(app, scope, messages=[{"type": "websocket.connect"}])

    ended = asyncio.run(story())
    last = ended.log[-1]
    assert ended.exception is None
    if extension and not accepts:
        assert ended.log[0]["status"] == 402
        assert ("available" in json.loads(last["body"])) is decorated
    else:
        assert (last["code"], last["reason"]) == (4402, "insufficient_credits: Insufficient credits")
