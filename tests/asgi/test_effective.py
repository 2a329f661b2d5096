"""What limits which route and why, and names that limits refer to, as the startup sees them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from asgi_metering import Metering, MeteringMiddleware, metered_app, rate_limited, unlimited
from asgi_metering.asgi.effective import EffectiveLimit, effective_limits
from tests.asgi.halls import answer_of, inner_app, starlette_app
from tests.harness.drive import drive, http_scope, lifespan, status


def told(limit: EffectiveLimit) -> tuple[str, ...]:
    """A limit in short."""
    return limit.path, limit.limit, limit.source, limit.key, limit.level, limit.applies


def team(call: Any) -> str:
    """A key."""
    return str(call)


def test_list_everything_that_applies() -> None:
    """S2.30: effective limits can be listed: each route's own, the default ones and the application's."""
    own = rate_limited({"free": "1/day", "pro": "2/day"}, team, levels={"attribute:team": "5/day"}, configured="c")
    selective = rate_limited("9/day", key=team, methods=["POST"], per_method=True, exempt_when=team, concurrency=3)
    app = Starlette(
        routes=[
            Route("/own", own(answer_of("own"))),
            Route("/both", rate_limited("1/hour", override_defaults=False, global_concurrency=2)(answer_of("both"))),
            Route("/free", unlimited(answer_of("free"))),
            Mount("/sub", metered_app(inner_app, selective)),
        ]
    )
    app.add_middleware(
        MeteringMiddleware,
        metering=Metering(sinks=()),
        application_limits=[rate_limited("90/minute", key="address")],
        default_limits=["10/minute", rate_limited("3/second", key="named:x", cost=2)],
    )
    everywhere = ("90/minute", "application", "address", "", "")
    default = [("10/minute", "default", "caller", "", ""), ("3/second", "default", "named:x", "", "")]
    module = __name__
    assert [told(limit) for limit in effective_limits(app)] == [
        ("/own", "free: 1/day, pro: 2/day", "decorator", "caller", "caller", ""),
        ("/own", f"{module}.team()", "decorator", "caller", "caller", ""),
        ("/own", "configured as 'c'", "decorator", "caller", "caller", ""),
        ("/own", "5/day", "decorator", "attribute:team", "team", ""),
        ("/own", *everywhere),
        ("/both", "1/hour", "decorator", "caller", "", ""),
        ("/both", "2 at once of everybody", "decorator", "caller", "", ""),
        *(("/both", *each) for each in default),
        ("/both", *everywhere),
        ("/free", *everywhere),
        (
            "/sub",
            "9/day",
            "decorator",
            f"{module}.team()",
            "",
            f"POST alone; each method apart; not when {module}.team()",
        ),
        (
            "/sub",
            "3 at once",
            "decorator",
            f"{module}.team()",
            "",
            f"POST alone; each method apart; not when {module}.team()",
        ),
        ("/sub", *everywhere),
        *(("*", *each) for each in default),
        ("*", *everywhere),
    ]


def test_list_what_is_around_a_route() -> None:
    """S2.30: what a metered_app around a route limits is listed at that route; costs and scopes are told too."""
    inner = Starlette(routes=[Route("/x", answer_of("x"))])
    gate = metered_app(inner, rate_limited("9/day", "8/day of tokens", cost=3, scope="s", strategy="sliding"), name="g")
    found = effective_limits(Starlette(routes=[Mount("/sub", gate)]))
    assert [(limit.path, limit.source, limit.cost, limit.scope, limit.strategy) for limit in found] == [
        ("/sub", "decorator", "3", "s", "sliding"),
        ("/sub", "decorator", "", "s", "sliding"),
        ("/sub/x", "metered_app", "3", "s", "sliding"),
        ("/sub/x", "metered_app", "", "s", "sliding"),
    ]


def test_list_what_counts_an_app_without_routes() -> None:
    """S2.30: of an app whose routes nobody can read the middleware's limits are listed, for any path."""
    app = MeteringMiddleware(
        inner_app, Metering(sinks=()), application_limits=["9/minute"], default_limits=["5/minute"]
    )
    assert [told(limit) for limit in effective_limits(app)] == [
        ("*", "5/minute", "default", "caller", "", ""),
        ("*", "9/minute", "application", "caller", "", ""),
    ]


def test_list_what_limits_a_websocket() -> None:
    """S2.30, X.1: a WebSocket is listed with its own limits, and with those that its handshake is counted by."""

    @rate_limited("9/minute", per="message")
    @rate_limited("3/minute", concurrency=2)
    async def socket(websocket: WebSocket) -> None: ...

    app = Starlette(routes=[WebSocketRoute("/ws", socket)])
    app.add_middleware(
        MeteringMiddleware,
        metering=Metering(sinks=()),
        application_limits=["90/minute"],
        default_limits=["5/minute"],
    )
    assert [told(limit) for limit in effective_limits(app) if limit.path == "/ws"] == [
        ("/ws", "9/minute per message", "decorator", "caller", "", ""),
        ("/ws", "3/minute", "decorator", "caller", "", ""),
        ("/ws", "2 at once", "decorator", "caller", "", ""),
        ("/ws", "90/minute", "application", "caller", "", ""),
    ]


# -- names -------------------------------------------------------------------------------------------------


def started(app: Any, metering: Metering, **middleware: Any) -> None:
    """Start *app* behind the middleware, and stop it."""

    async def run() -> None:
        async with lifespan(MeteringMiddleware(app, metering, **middleware)):
            pass

    asyncio.run(run())


def app_of(*policies: Any) -> Starlette:
    """One route under *policies*."""
    endpoint = answer_of("x")
    for policy in policies:
        endpoint = policy(endpoint)
    return Starlette(routes=[Route("/x", endpoint)])


MISNAMED: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str]] = {
    "unused": (
        app_of(rate_limited("1/day")),
        {"limits": {"search-unused": "1/minute"}},
        {},
        "The limits 'search-unused' are configured, and no endpoint uses them. Write rate_limited(configured='search",
    ),
    "unknown": (
        app_of(rate_limited(configured="serach")),
        {},
        {},
        "configured='serach' are not known to this Metering. Pass Metering(limits={'serach': '60/minute'}).",
    ),
    "unknown-key": (
        app_of(rate_limited("1/day", key="named:tenant")),
        {},
        {},
        "It is counted by 'named:tenant', which the Metering does not know. Pass Metering(keys={'tenant': function}).",
    ),
    "unknown-around": (
        Starlette(routes=[Mount("/", metered_app(app_of(), rate_limited(levels={"named:t": "1/day"})))]),
        {},
        {},
        "It is counted by 'named:t', which the Metering does not know.",
    ),
    "unknown-default": (
        app_of(),
        {},
        {"default_limits": [rate_limited(configured="gone")]},
        "The middleware's limit cannot be limited. The limits configured='gone' are not known",
    ),
    "unknown-application": (
        app_of(),
        {},
        {"application_limits": [rate_limited("1/day", key="named:t")]},
        "It is counted by 'named:t', which the Metering does not know.",
    ),
    "strategy": (
        app_of(rate_limited(configured="odd", strategy="calendar")),
        {"limits": {"odd": "5 per 2 days"}},
        {},
        "The limit '5 per 2 days' cannot follow the calendar.",
    ),
}


@pytest.mark.parametrize("case", MISNAMED)
def test_refuse_to_start_with_names_that_nobody_knows(case: str) -> None:
    """S2.30: a configured limit that no route uses is an error at startup, and so is a name that nothing is said of."""
    app, metering, middleware, expected = MISNAMED[case]
    with pytest.raises(RuntimeError, match=r"startup\.failed") as caught:
        started(app, Metering(sinks=(), **metering), **middleware)
    assert expected in str(caught.value)


def test_start_with_names_that_are_known() -> None:
    """S2.30: limits that an endpoint, a mount or the middleware uses are no mistake, and count."""
    limits = {"a": "1/minute", "b": {"free": "9/day"}, "c": ["9/day"]}
    app = app_of(rate_limited(configured="a", key="named:all"))
    app.router.routes.append(Mount("/sub", metered_app(inner_app, rate_limited(configured="b"))))
    metering = Metering(sinks=(), keys={"all": lambda: 1}, limits=limits)
    started(app, metering, default_limits=[rate_limited(configured="c")])


def test_refuse_unknown_names_where_no_lifespan_comes() -> None:
    """S2.30: the first request is answered 500 where no startup could refuse."""

    async def run() -> None:
        app = MeteringMiddleware(app_of(rate_limited(configured="nowhere")), Metering(sinks=()))
        assert status((await drive(app, http_scope("/x"))).log) == 500

    asyncio.run(run())


def test_warn_of_unknown_names_where_routes_cannot_be_read(caplog: pytest.LogCaptureFixture) -> None:
    """S2.30: of an app without a route table the decorated functions of this process are looked at, with a warning."""

    @rate_limited(configured="unread")
    async def endpoint() -> None: ...

    started(inner_app, Metering(sinks=(), limits={"unused": "1/day"}))
    assert any("configured='unread'" in record.message for record in caplog.records)
    assert endpoint


def test_serve_what_was_listed() -> None:
    """S2.30: what is listed for a route is what counts there: as many requests pass as its smallest limit says."""
    app = MeteringMiddleware(
        starlette_app(), Metering(sinks=()), default_limits=[rate_limited("2/minute", key="address")]
    )
    for path in ("/plain", "/own", "/free", "/items"):
        limits = [limit.limit for limit in effective_limits(app) if limit.path == path and "GET" in limit.methods]
        smallest = min((int(limit.partition("/")[0]) for limit in limits), default=5)

        async def passed(path: str = path) -> int:
            return [status((await drive(app, http_scope(path))).log) for _ in range(6)].count(200)

        assert asyncio.run(passed()) == (6 if smallest == 5 else smallest)
