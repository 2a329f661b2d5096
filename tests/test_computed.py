"""Computed prices, holds, keys and costs: what happens when a callable raises, or answers what cannot be used."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.routing import Route

from asgi_metering import MeteringMiddleware, billable, current_call, metered_app, rate_limited, up_to
from asgi_metering.errors import AmountError, ConfigurationError, MeteringError
from asgi_metering.prices import per_token
from asgi_metering.usage import TokenUsage
from tests.harness.drive import Drive, body, drive, lifespan, status
from tests.pitfalls.apps import installed
from tests.pitfalls.scene import CREDIT, Scene, Visit, visit

pytestmark = pytest.mark.uncounted

NOTHING = "The endpoint did not run, and nothing was charged."


class Answers:
    """A callable that answers what a test tells it to."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class AsyncAnswers(Answers):
    """The same, async."""

    async def __call__(self) -> Any:
        await asyncio.sleep(0)
        return super().__call__()


POLICIES: dict[str, Callable[[Any], Any]] = {
    "price": lambda function: billable(function),
    "hold": lambda function: billable(per_token(output=1), hold=function),
    "up-to": lambda function: billable(per_token(output=1), hold=up_to(function, at_least=1)),
    "key": lambda function: rate_limited("5/day", concurrency=1, key=function, scope="shared"),
    "cost": lambda function: rate_limited("5/day", concurrency=1, cost=function, scope="shared"),
}
WORDS = {"price": "price", "hold": "hold estimate", "up-to": "hold estimate", "key": "key", "cost": "cost"}
GOOD = {"price": "2.5", "hold": TokenUsage(output=2), "up-to": 3, "key": "a", "cost": 2}

FLOAT = "is a float. Write it as a str or a Decimal, so that it is exact."
WRONG: dict[str, tuple[str, Any, str]] = {
    "price-float": ("price", 0.25, f"The price 0.25 {FLOAT}"),
    "price-nan": ("price", Decimal("NaN"), "The price Decimal('NaN') is not finite. Write whole units"),
    "price-negative": ("price", -1, "The price -1 is negative. Amounts start at 0."),
    "price-none": ("price", None, "The price None is a NoneType. Use int, Decimal or str."),
    "price-large": ("price", 10**5_000, "The price has 5001 digits before the point"),
    "hold-float": ("hold", 0.5, f"The hold estimate 0.5 {FLOAT}"),
    "hold-negative": ("hold", "-1", "The hold estimate '-1' is negative."),
    "hold-large": ("hold", 10**12, "The hold estimate 1000000000000 is more than unit 'credits' can count"),
    "up-to-text": ("up-to", "many", "The hold estimate 'many' is not a number."),
    "key-none": ("key", None, "The key is None. It has to be a non-empty str or an int: an empty key would put every"),
    "key-empty": ("key", "", "The key is ''. It has to be"),
    "key-bytes": ("key", b"sk-secret", "The key is a bytes. It has to be"),
    "key-bool": ("key", True, "The key is a bool. It has to be"),
    "cost-float": ("cost", 1.5, "The cost 1.5 is not an int from 0 up. Round it up first."),
    "cost-negative": ("cost", -1, "The cost -1 is not an int from 0 up."),
    "cost-bool": ("cost", True, "The cost True is not an int from 0 up."),
    "cost-long": ("cost", "x" * 999, "The cost '" + "x" * 59 + " is not an int"),
}


def application(scene: Scene, part: Any, ran: list[str]) -> FastAPI:
    """One route under *part*, and a handler for the user's own mistakes that tells nobody."""
    app = FastAPI()

    @app.exception_handler(ValueError)
    async def quiet(request: Request, failure: Exception) -> JSONResponse:
        return JSONResponse({"quiet": True}, status_code=400)

    @app.get("/")
    @part
    async def work() -> dict[str, int]:
        ran.append("work")
        return {}

    app.add_middleware(MeteringMiddleware, metering=scene.metering)
    return app


def visited(app: FastAPI, times: int = 1, between: Callable[[], None] = lambda: None) -> list[Drive]:
    """Make so many visits one after the other, whatever the endpoint raises."""

    async def story() -> list[Drive]:
        ended = []
        async with lifespan(app):
            for _ in range(times):
                ended.append(await drive(app, Visit().scope()))
                between()
        return ended

    return asyncio.run(story())


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What the package has told."""
    return [record for record in caplog.records if record.name == "asgi_metering"]


@pytest.mark.parametrize("kind", [Answers, AsyncAnswers])
@pytest.mark.parametrize("wrong", WRONG)
def test_tell_a_wrong_answer(wrong: str, kind: type[Answers], caplog: pytest.LogCaptureFixture) -> None:
    """DESIGN 2: a wrong answer is told in the log with endpoint, argument, callable, value and mend, also where the
    framework hides the error; the endpoint does not run, and the next right answer is served as ever.
    """
    argument, answer, sentence = WRONG[wrong]
    scene, ran, answers = Scene(), [], kind(answer)

    def mend() -> None:
        answers.answer = GOOD[argument]

    first, second = visited(application(scene, POLICIES[argument](answers), ran), 2, mend)
    assert (status(first.log), body(first.log)) == (400, b'{"quiet":true}')
    (told,) = logged(caplog)
    what, function = f"{WORDS[argument]} of {__name__}.application.work", f"{__name__}.{kind.__name__}"
    beginning = f"The {what}, computed by {function}, cannot be used. "
    assert told.levelno == logging.ERROR
    assert re.sub(r"#\d+,", ",", told.getMessage()).startswith(beginning + sentence)
    assert told.getMessage().endswith(NOTHING)
    assert "sk-secret" not in caplog.text
    assert (status(second.log), ran) == (200, ["work"])
    assert len(scene.books.admissions) == 1


@pytest.mark.parametrize("kind", [Answers, AsyncAnswers])
@pytest.mark.parametrize("argument", POLICIES)
def test_raise_what_a_callable_raises(argument: str, kind: type[Answers], caplog: pytest.LogCaptureFixture) -> None:
    """What a callable raises rises as it is, with a note in its traceback and a line in the log; nothing was asked."""
    failure = KeyError("gpt-9")
    scene, ran = Scene(), []
    (ended,) = visited(application(scene, POLICIES[argument](kind(failure)), ran))
    assert ended.exception is failure
    (told,) = logged(caplog)
    assert told.levelno == logging.WARNING
    assert failure.__notes__ == [told.getMessage()]
    what = f"{WORDS[argument]} of {__name__}.application.work"
    assert re.sub(r"#\d+ ", " ", told.getMessage()) == (
        f"The {what} could not be computed: {__name__}.{kind.__name__} raised KeyError('gpt-9'). {NOTHING} "
        f"Answer every call, or raise your framework's own answer, such as its HTTPException."
    )
    assert (ran, scene.books.admissions, scene.settled()) == ([], [], 0)


@pytest.mark.parametrize("argument", POLICIES)
def test_answer_as_a_callable_answers(argument: str) -> None:
    """The mend works: a framework's own answer that a callable raises reaches the client, and nothing is charged."""
    scene, ran = Scene(), []
    refuse = Answers(HTTPException(422, "no such model"))
    (ended,) = visited(application(scene, POLICIES[argument](refuse), ran))
    assert (status(ended.log), body(ended.log)) == (422, b'{"detail":"no such model"}')
    assert (ran, scene.books.admissions, scene.settled()) == ([], [], 0)


@pytest.mark.parametrize("argument", POLICIES)
def test_leak_nothing_of_a_wrong_answer(argument: str) -> None:
    """A second computed argument that fails takes nothing along: no hold, no slot, no count of the first."""
    scene, ran, answers = Scene(), [], Answers(ValueError("no"))
    both = POLICIES["price"](Answers("2")) if argument in ("key", "cost") else rate_limited("5/day", concurrency=1)

    def parts(function: Any) -> Any:
        return both(POLICIES[argument](answers)(function))

    def mend() -> None:
        if len(seen) == 3:
            answers.answer = GOOD[argument]
        seen.append(None)

    seen: list[None] = []
    ended = visited(application(scene, parts, ran), 5, mend)
    assert [status(each.log) for each in ended] == [400, 400, 400, 400, 200]
    assert ran == ["work"]
    balance = asyncio.run(scene.balance())
    assert (balance.held, len(scene.books.admissions)) == (0, 1)


def test_tell_which_endpoint_of_two() -> None:
    """One decorator on two endpoints tells of the one that was called, and keeps no trace of the other."""
    priced, app = billable(Answers(0.5)), FastAPI()

    @app.get("/one")
    @priced
    async def one() -> None: ...

    @app.get("/two")
    @priced
    async def two() -> None: ...

    app.add_middleware(MeteringMiddleware, metering=Scene().metering)

    async def story() -> list[BaseException | None]:
        return [(await drive(app, Visit(path).scope())).exception for path in ("/one", "/two")]

    failures = [str(failure) for failure in asyncio.run(story())]
    places = [re.search(r"endpoint_of_two\.(\w+), computed by", failure) for failure in failures]
    assert [place and place[1] for place in places] == ["one", "two"]


def free_of(scope: Any) -> float:
    """A price of an app, as a float."""
    return 0.5


def test_tell_of_apps_and_explicit_gates(scene_of: Callable[[Any], list[Drive]]) -> None:
    """`metered_app` tells by its own name, and the explicit gate by that of the function that asks."""

    async def explicit(scope: Any, receive: Any, send: Any) -> None:
        await current_call().admit(rate_limited("1/day", key=functools.partial(Answers(None))))

    (app,) = scene_of(metered_app(explicit, billable(free_of), name="the-app"))
    assert isinstance(app.exception, AmountError)
    assert str(app.exception) == (
        f"The price of the-app, computed by {__name__}.free_of, cannot be used. The price 0.5 {FLOAT}"
    )
    (gate,) = scene_of(explicit)
    assert isinstance(gate.exception, ConfigurationError)
    asking = f"{__name__}.test_tell_of_apps_and_explicit_gates.explicit"
    assert str(gate.exception).startswith(f"The key of {asking}, computed by {__name__}.Answers, cannot be")


@pytest.fixture
def scene_of() -> Callable[[Any], list[Drive]]:
    """Visit an ASGI app behind the whole stack once."""

    def visit_once(app: Any) -> list[Drive]:
        async def http_only(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                await app(scope, receive, send)

        async def story() -> list[Drive]:
            return [await drive(MeteringMiddleware(http_only, Scene().metering), Visit().scope())]

        return asyncio.run(story())

    return visit_once


PRICES = {"premium": 3, "free": 0}
TIERS = {"gpt-5.5": "premium", "own-key": "free"}


def tier_price(model: str) -> int:
    """What a model costs by its tier; of one that nobody configured nothing is known."""
    return PRICES[TIERS[model]]


def test_price_by_tier() -> None:
    """S3.39, S3.40: a tier that is free is free, and audited; what has no tier does not run, and is nobody's gift."""
    scene, ran = Scene(tells=True), list[str]()

    @billable(tier_price)
    async def endpoint(model: str) -> PlainTextResponse:
        ran.append(model)
        return PlainTextResponse(model)

    async def chosen(request: Request) -> PlainTextResponse:
        return await endpoint(model=request.headers["x-model"])

    models = ("gpt-5.5", "own-key", "unheard-of")
    app = Starlette(routes=[Route("/", chosen)])
    ended = visit(installed(app, scene.metering, "added"), *(Visit(headers=(("x-model", model),)) for model in models))
    assert [status(each.log) for each in ended] == [200, 200, 500]
    assert ran == ["gpt-5.5", "own-key"]
    assert isinstance(ended[2].exception, KeyError)
    assert scene.settled() == 3
    assert [event.amount for event in scene.told] == [3 * CREDIT, 0]


class Turn(BaseModel):
    """A request that may leave its model to the application."""

    model: str = "gpt-5.5"


def choice(turn: Turn) -> str:
    """The model of a turn: what the caller chose, or the default, unless that costs: then a free one."""
    if "model" in turn.model_fields_set or not tier_price(turn.model):
        return turn.model
    return "own-key"


def test_price_what_was_chosen() -> None:
    """S0.15: a price sees what a dependency made of a request: a default that would cost gives way to a free one."""
    scene, ran, api = Scene(), list[str](), FastAPI()

    @api.post("/")
    @billable(tier_price)
    async def endpoint(model: Annotated[str, Depends(choice)]) -> None:
        ran.append(model)

    bodies = (b"{}", b'{"model": "gpt-5.5"}', b'{"model": "own-key"}')
    visits = [Visit(method="POST", body=sent, headers=(("content-type", "application/json"),)) for sent in bodies]
    ended = visit(installed(api, scene.metering, "added"), *visits)
    assert [status(each.log) for each in ended] == [200, 200, 200]
    assert ran == ["own-key", "gpt-5.5", "own-key"]
    assert scene.settled() == 3
    assert len(scene.books.admissions) == 1


def test_take_what_can_be_used() -> None:
    """Every right answer of every argument is served, and charged as it was computed."""
    for argument, answer in GOOD.items():
        for kind in (Answers, AsyncAnswers):
            scene, ran = Scene(), []
            (ended,) = visited(application(scene, POLICIES[argument](kind(answer)), ran))
            assert (status(ended.log), ran) == (200, ["work"])
            if argument == "price":
                assert scene.books.admissions[0].amount == 2.5 * CREDIT


def test_keep_errors_of_the_package() -> None:
    """STYLE "Errors": a wrong answer is a `MeteringError` and a `ValueError`, as at import."""
    for error in (AmountError, ConfigurationError):
        assert issubclass(error, MeteringError)
        assert issubclass(error, ValueError)
