"""What slowapi's own public tests describe, on an adopted limiter: each behaviour, in our words (S2.29, S2.32)."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from slowapi import Limiter
from slowapi.util import get_ipaddr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from asgi_metering.integrations.slowapi import AdoptedLimiter, adopt
from tests.integrations.scenes import Scene, adopted, ask, codes, install, text

KINDS = {"starlette": Starlette, "fastapi": FastAPI}
NAMES = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "retry-after")


@pytest.fixture(params=["decorators", "middleware", "async handler"])
def installed(request: pytest.FixtureRequest) -> str:
    """Which middleware and handler the application has."""
    return str(request.param)


def route(scene: Scene, path: str, endpoint: Any) -> None:
    """Add *endpoint* to either kind of application."""
    scene.app.add_route(path, endpoint)


def shown(answer: Any) -> list[str | None]:
    """The values of slowapi's fields."""
    return [answer.headers.get(name) for name in NAMES]


@pytest.mark.parametrize("kind", list(KINDS))
def test_limit_async_endpoint_answers_429_above_it(installed: str, kind: str) -> None:
    """Five of ten requests to an async endpoint run, and the rest get slowapi's body with 429."""
    scene = adopted(installed, kind=KINDS[kind])

    @scene.limiter.limit("5/minute")
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    route(scene, "/t1", endpoint)
    answers = scene.get("/t1", 7)
    assert [answer.text for answer in answers[:5]] == ["test"] * 5
    assert {(answer.status_code, answer.text) for answer in answers[5:]} == {
        (429, '{"error":"Rate limit exceeded: 5 per 1 minute"}')
    }


@pytest.mark.parametrize("kind", list(KINDS))
def test_limit_sync_endpoint_answers_429_above_it(installed: str, kind: str) -> None:
    """The same for a sync endpoint, which runs in a thread."""
    scene = adopted(installed, kind=KINDS[kind])
    route(scene, "/t1", scene.limiter.limit("5/minute")(text))
    assert scene.codes("/t1", 7) == [200] * 5 + [429] * 2


def test_decorator_takes_an_endpoint_that_answers_no_response(installed: str) -> None:
    """A FastAPI endpoint that returns a dict is limited, with and without header fields."""
    for headers_enabled in (False, True):
        scene = adopted(installed, headers_enabled=headers_enabled)

        @scene.app.get("/t1")
        @scene.limiter.limit("2/minute")
        async def endpoint(request: Request, response: Response) -> dict[str, str]:
            return {"key": "value"}

        answers = scene.get("/t1", 3)
        assert [(answer.status_code, shown(answer)[1]) for answer in answers] == (
            [(200, "1"), (200, "0"), (429, "0")] if headers_enabled else [(200, None), (200, None), (429, None)]
        )


@pytest.mark.parametrize("kind", list(KINDS))
def test_headers_name_the_limit_and_what_is_left(installed: str, kind: str) -> None:
    """
    Limit, remaining, reset and wait stand on responses that run; of several limits the finest is shown.

    The reset is the second after the window's end.
    """
    scene = adopted(installed, kind=KINDS[kind], headers_enabled=True)
    route(scene, "/t1", scene.limiter.limit("10/minute")(text))

    @scene.limiter.limit("2/second; 5 per minute; 10/hour")
    def several(request: Request) -> Response:
        return PlainTextResponse("test")

    route(scene, "/t2", several)
    (one,), (two,) = scene.get("/t1"), scene.get("/t2")
    now = int(scene.clock())
    assert shown(one) == ["10", "9", str(now + 61), "60"]
    assert shown(two) == ["2", "1", str(now + 2), "1"]


def test_headers_of_a_refusal_name_the_limit_that_refused(installed: str) -> None:
    """Ten requests, one a second, spend the minute; the eleventh is told how long the rest of it lasts."""
    scene = adopted(installed, kind=Starlette, headers_enabled=True)
    route(scene, "/t1", scene.limiter.limit("2/second; 10 per minute; 20/hour")(text))
    for _ in range(10):
        assert scene.codes("/t1", 1) == [200]
        scene.clock.advance(1)
    (refused,) = scene.get("/t1")
    assert refused.status_code == 429
    assert shown(refused) == ["10", "0", str(int(scene.clock()) + 51), "50"]


def test_waiting_as_long_as_told_lets_the_next_one_in(installed: str) -> None:
    """``Retry-After`` is above zero, and after so many seconds there is room again."""
    scene = adopted(installed, kind=Starlette, headers_enabled=True)
    route(scene, "/t1", scene.limiter.limit("1/minute")(text))
    (first,) = scene.get("/t1")
    assert scene.codes("/t1", 1) == [429]
    wait = int(first.headers["retry-after"])
    assert wait > 0
    scene.clock.advance(wait)
    assert scene.codes("/t1", 1) == [200]


def test_exempt_when_lets_requests_pass_uncounted(installed: str) -> None:
    """A function of nothing, or of the request, says which requests a limit does not count."""
    scene = adopted(installed, kind=Starlette)
    for path, exempt in {
        "/true": lambda: True,
        "/false": lambda: False,
        "/dynamic": lambda request: request.headers.get("user-agent") == "exempt",
    }.items():

        @scene.limiter.limit("1/minute", exempt_when=exempt)
        def endpoint(request: Request) -> Response:
            return PlainTextResponse("test")

        route(scene, path, endpoint)
    assert scene.codes("/true", 2) == [200, 200]
    assert scene.codes("/false", 2) == [200, 429]
    assert scene.codes("/dynamic", 2, headers={"user-agent": "exempt"}) == [200, 200]
    assert scene.codes("/dynamic", 2) == [200, 429]


def test_shared_limit_counts_several_endpoints_together(installed: str) -> None:
    """What one endpoint has spent is spent for the other one of the scope."""
    scene = adopted(installed, kind=Starlette)
    together = scene.limiter.shared_limit("5/minute", "somescope")

    @together
    def first(request: Request) -> Response:
        return PlainTextResponse("test")

    @together
    def second(request: Request) -> Response:
        return PlainTextResponse("test")

    route(scene, "/t1", first)
    route(scene, "/t2", second)
    assert scene.codes("/t1", 6) == [200] * 5 + [429]
    assert scene.codes("/t2", 1) == [429]


@pytest.mark.parametrize("dict_answer", [False, True])
@pytest.mark.parametrize("headers_enabled", [False, True])
def test_several_decorators_all_count(installed: str, dict_answer: bool, headers_enabled: bool) -> None:
    """A limit for everybody stands beside one per address, each with its own key."""
    scene = adopted(installed, key_func=get_ipaddr, headers_enabled=headers_enabled)

    @scene.app.get("/t1")
    @scene.limiter.limit("10 per minute", lambda: "test")
    @scene.limiter.limit("5/minute")
    async def endpoint(request: Request, response: Response) -> Any:
        return {"key": "value"} if dict_answer else PlainTextResponse("test")

    second, third = {"X_FORWARDED_FOR": "127.0.0.2"}, {"X_FORWARDED_FOR": "127.0.0.3"}
    answers = scene.get("/t1", 8, headers=second)
    assert [answer.status_code for answer in answers] == [200] * 5 + [429] * 3
    assert all(("retry-after" in answer.headers) is headers_enabled for answer in answers)
    assert scene.codes("/t1", 6) == [200] * 5 + [429]
    assert scene.codes("/t1", 1, headers=third) == [429]


@pytest.mark.parametrize("installed", ["middleware", "asgi", "async handler"])
def test_default_limits_count_endpoints_without_a_decorator(installed: str) -> None:
    """With one of slowapi's middlewares they count, exempt endpoints are free, and the fields are on both answers."""
    scene = adopted(installed, kind=Starlette, default_limits=["1/minute"], headers_enabled=True)

    @scene.limiter.exempt
    def free(request: Request) -> Response:
        return PlainTextResponse("test")

    @scene.limiter.exempt
    async def free_async(request: Request) -> Response:
        return PlainTextResponse("test")

    for path, endpoint in {"/t1": text, "/t2": free, "/t3": free_async}.items():
        route(scene, path, endpoint)
    answers = scene.get("/t1", 2)
    assert [(answer.status_code, shown(answer)[1]) for answer in answers] == [(200, "0"), (429, "0")]
    assert scene.codes("/t2", 2) + scene.codes("/t3", 2) == [200] * 4
    assert shown(scene.get("/t2")[0]) == [None] * 4


def test_override_defaults_false_counts_by_both(installed: str) -> None:
    """A decorator that does not override the defaults leaves them in force beside its own limit."""
    scene = adopted(installed, kind=Starlette, key_func=lambda: "test", default_limits=["10/minute"])

    @scene.limiter.limit("5 per minute", key_func=get_ipaddr, override_defaults=False)
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    route(scene, "/t1", endpoint)
    assert scene.codes("/t1", 7, headers={"X_FORWARDED_FOR": "127.0.0.2"}) == [200] * 5 + [429] * 2
    assert scene.codes("/t1", 6) == [200] * 5 + [429]
    assert scene.codes("/t1", 1, headers={"X_FORWARDED_FOR": "127.0.0.3"}) == [429]


@pytest.mark.parametrize("kind", list(KINDS))
def test_cost_is_what_a_request_takes(installed: str, kind: str) -> None:
    """A cost of 10 fits 50 five times, one of 15 three times, one of 7.5 six times; it may be a function."""
    scene = adopted(installed, kind=KINDS[kind])
    for path, cost in {
        "/ten": 10,
        "/fifteen": 15,
        "/told": lambda request: int(request.headers["foo"]),
        "/half": lambda request: int(request.headers["foo"]) * 0.75,
    }.items():

        @scene.limiter.limit("50/minute", cost=cost)
        async def endpoint(request: Request) -> Response:
            return PlainTextResponse("test")

        route(scene, path, endpoint)
    runs = {
        path: scene.codes(path, 8, headers={"foo": "10"}).count(200) for path in ("/ten", "/fifteen", "/told", "/half")
    }
    assert runs == {"/ten": 5, "/fifteen": 3, "/told": 5, "/half": 6}


@pytest.mark.parametrize("kind", list(KINDS))
def test_key_style_says_what_is_counted_together(installed: str, kind: str) -> None:
    """By URL two values of a path parameter are two counts; by endpoint they are one."""
    seen = {}
    for style in ("url", "endpoint"):
        scene = adopted(installed, kind=KINDS[kind], key_func=lambda: "mock", key_style=style)

        @scene.limiter.limit("1/minute")
        async def endpoint(request: Request) -> Response:
            return PlainTextResponse("test")

        route(scene, "/t1/{my_param}", endpoint)
        seen[style] = [*scene.codes("/t1/param_one", 1), *scene.codes("/t1/param_two", 1)]
    assert seen == {"url": [200, 200], "endpoint": [200, 429]}


def test_limit_that_a_function_answers_may_depend_on_the_key(installed: str) -> None:
    """A limit of ``key`` is asked with what the key function says of each request."""

    def who(request: Request) -> str:
        return "admin" if request.headers.get("token") == "secret" else "user"

    def provider(key: str) -> str:
        return "10/minute" if key == "admin" else "5/minute"

    scene = adopted(installed, key_func=who)

    @scene.app.get("/t1")
    @scene.limiter.limit(provider)
    async def endpoint(request: Request, response: Response) -> dict[str, str]:
        return {"key": "value"}

    assert scene.codes("/t1", 7) == [200] * 5 + [429] * 2
    assert scene.codes("/t1", 12, headers={"token": "secret"}) == [200] * 10 + [429] * 2


def test_disabled_limiter_lets_everything_pass(installed: str) -> None:
    """``enabled=False`` limits neither decorated endpoints nor others, and may be switched while it runs."""
    scene = adopted(installed, enabled=False, default_limits=["1/minute"], headers_enabled=True)

    @scene.app.get("/t1")
    @scene.limiter.limit("1/minute")
    async def decorated(request: Request) -> Response:
        return PlainTextResponse("test")

    @scene.app.get("/t2")
    @scene.limiter.limit("1/minute")
    def decorated_sync(request: Request) -> Response:
        return PlainTextResponse("test")

    scene.app.add_route("/t3", text)
    assert [scene.codes(path, 3) for path in ("/t1", "/t2", "/t3")] == [[200] * 3] * 3
    assert shown(scene.get("/t1")[0]) == [None] * 4
    scene.limiter.enabled = True
    assert scene.codes("/t1", 2) == [200, 429]
    scene.limiter.enabled = False
    assert scene.codes("/t1", 1) == [200]


def test_adopted_limiter_is_slowapis_and_its_class_is_kept() -> None:
    """`adopt` answers the very object, still a `Limiter`, and still of the application's own class of limiters."""

    class Own(Limiter):
        def said(self) -> str:
            return "own"

    scene = adopted()
    assert isinstance(scene.limiter, AdoptedLimiter)
    assert isinstance(scene.limiter, Limiter)
    own = Own(key_func=get_ipaddr)
    assert adopt(own) is own  # type: ignore[comparison-overlap]
    assert isinstance(own, AdoptedLimiter)
    assert own.said() == "own"


def test_what_a_class_of_limiters_changes_stays_changed() -> None:
    """A class of the application's own that limits everything by its tenant still does, through ``super()``."""

    class ByTenant(Limiter):
        def limit(self, limit_value: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return super().limit(limit_value, *args, key_func=lambda request: request.headers["x-tenant"], **kwargs)

    def build(app: Any, limiter: Limiter) -> None:
        app.add_route("/t1", limiter.limit("1/minute")(text))

    answers = []
    for limiter in (ByTenant(key_func=get_ipaddr), adopt(ByTenant(key_func=get_ipaddr))):
        app = Starlette()
        install(app, limiter, "decorators")
        build(app, limiter)
        answers.append([codes(ask(app, ("GET", "/t1"), headers={"x-tenant": tenant})) for tenant in ("a", "b", "a")])
    assert answers == [[[200], [200], [429]]] * 2


def test_limits_by_method_and_for_methods(installed: str) -> None:
    """``per_method`` counts each method apart; ``methods`` leaves the others uncounted."""
    scene = adopted(installed, kind=Starlette)

    @scene.limiter.limit("1/minute", per_method=True)
    def apart(request: Request) -> Response:
        return PlainTextResponse("test")

    @scene.limiter.limit("1/minute", methods=["POST"])
    def posts(request: Request) -> Response:
        return PlainTextResponse("test")

    scene.app.add_route("/apart", apart, methods=["GET", "POST"])
    scene.app.add_route("/posts", posts, methods=["GET", "POST"])
    assert scene.codes("/apart", 2) + scene.codes("/apart", 2, method="POST") == [200, 429, 200, 429]
    assert scene.codes("/posts", 2) + scene.codes("/posts", 2, method="POST") == [200, 200, 200, 429]


def test_error_message_stands_in_the_body(installed: str) -> None:
    """A text, or a function that answers one, is what the handler tells instead of the limit."""
    scene = adopted(installed, kind=Starlette)
    for path, message in {"/text": "slow down", "/told": lambda: "please"}.items():

        @scene.limiter.limit("1/minute", error_message=message)
        async def endpoint(request: Request) -> Response:
            return PlainTextResponse("test")

        route(scene, path, endpoint)
    assert [scene.get(path, 2)[1].json()["error"] for path in ("/text", "/told")] == [
        "Rate limit exceeded: slow down",
        "Rate limit exceeded: please",
    ]


def test_header_names_and_the_form_of_the_wait_are_the_limiters(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names from the environment, and ``retry_after="http-date"``, are used (config file and variables)."""
    monkeypatch.setenv("RATELIMIT_HEADER_LIMIT", "X-Limit")
    monkeypatch.setenv("RATELIMIT_HEADERS_ENABLED", "1")
    monkeypatch.setenv("RATELIMIT_DEFAULT", "7/minute")
    scene = adopted(installed, kind=Starlette, retry_after="http-date")
    route(scene, "/t1", scene.limiter.limit("2/minute", override_defaults=False)(text))
    (answer,) = scene.get("/t1")
    assert answer.headers["x-limit"] == "2"
    assert answer.headers["retry-after"].endswith(" GMT")
    assert answer.headers["x-ratelimit-remaining"] == "1"


def test_own_handler_sees_slowapis_exception_and_state(installed: str) -> None:
    """
    A handler of `RateLimitExceeded` answers with any status, 5xx too, and has the limit, the detail and the state.

    What slowapi's own handler calls, ``_inject_headers`` with ``view_rate_limit``, works there.
    """
    from slowapi.errors import RateLimitExceeded

    seen: list[Any] = []

    def handler(request: Request, failure: RateLimitExceeded) -> Response:
        assert failure.limit is not None
        seen.append((failure.detail, str(failure.limit.limit), request.state.view_rate_limit[1][1]))
        answer = PlainTextResponse("busy", 503)
        return request.app.state.limiter._inject_headers(answer, request.state.view_rate_limit)  # type: ignore[no-any-return]

    scene = adopted(installed, kind=Starlette, headers_enabled=True, default_limits=["1/minute"])
    scene.app.add_exception_handler(RateLimitExceeded, handler)
    route(scene, "/t1", scene.limiter.limit("1/minute")(text))
    answer = scene.get("/t1", 2)[1]
    assert (answer.status_code, answer.text, shown(answer)[0]) == (503, "busy", "1")
    assert seen == [("1 per 1 minute", "1 per 1 minute", "/t1")]


def test_without_a_handler_the_framework_answers_429() -> None:
    """It is an HTTPException of slowapi's: FastAPI makes its own 429 of it."""
    scene = adopted("decorators")
    del scene.app.exception_handlers[next(k for k in scene.app.exception_handlers if getattr(k, "limit", 0) is None)]

    @scene.app.get("/t1")
    @scene.limiter.limit("1/minute")
    async def endpoint(request: Request) -> Response:
        return PlainTextResponse("test")

    assert [(answer.status_code, answer.text) for answer in scene.get("/t1", 2)] == [
        (200, "test"),
        (429, '{"detail":"1 per 1 minute"}'),
    ]


def test_reset_begins_all_counts_anew_in_memory() -> None:
    """What tests of applications call between two of them works, as often as it is called."""
    scene = adopted(kind=Starlette)
    route(scene, "/t1", scene.limiter.limit("1/minute")(text))
    for _ in range(3):
        assert scene.codes("/t1", 2) == [200, 429]
        scene.limiter.reset()


def test_request_filters_and_auto_check_are_heard(installed: str) -> None:
    """A filter that says so lets requests pass, and with ``auto_check=False`` nobody asks."""
    scene = adopted(installed, kind=Starlette, default_limits=["1/minute"])
    route(scene, "/t1", scene.limiter.limit("1/minute")(text))
    scene.limiter._request_filters.append(lambda: True)
    assert scene.codes("/t1", 3) == [200] * 3
    unasked = adopted(installed, kind=Starlette, auto_check=False, headers_enabled=True)
    route(unasked, "/t1", unasked.limiter.limit("1/minute")(text))
    assert unasked.codes("/t1", 3) == [200] * 3


def test_strategy_of_the_limiter_moves_the_windows() -> None:
    """``sliding-window-counter`` weighs the window before, and a fixed one begins with the first request."""
    seen = {}
    for strategy in ("fixed-window", "sliding-window-counter"):
        scene = adopted(kind=Starlette, strategy=strategy)
        route(scene, "/t1", scene.limiter.limit("4/minute")(text))
        scene.clock.advance(59)
        first = scene.codes("/t1", 5)
        scene.clock.advance(11)
        seen[strategy] = first.count(200), scene.codes("/t1", 5).count(200)
    assert seen == {"fixed-window": (4, 0), "sliding-window-counter": (4, 1)}
