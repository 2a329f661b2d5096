"""What may be in the shadow: refused at import or at startup where it means nothing, or is live elsewhere (S4.16)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from asgi_metering import (
    Metering,
    MeteringMiddleware,
    billable,
    rate_limited,
    requires_upstream,
)
from asgi_metering.asgi.audit import Layer, Row, audit, routes_of
from asgi_metering.asgi.effective import check_names
from asgi_metering.errors import ConfigurationError
from asgi_metering.guards import Part, guard_of
from asgi_metering.opening import ALL_FEATURES
from tests.harness.drive import status
from tests.outage.gated import call
from tests.test_shadow import house, idle, tallies

pytestmark = pytest.mark.uncounted


@pytest.mark.parametrize(
    "make",
    [
        lambda: billable(2, shadow="yes"),  # type: ignore[arg-type]
        lambda: rate_limited("1/minute", shadow=1),  # type: ignore[arg-type]
        lambda: requires_upstream("acme", shadow=None),  # type: ignore[arg-type]
        lambda: Metering(shadow="no"),  # type: ignore[arg-type]
        lambda: billable(2, idempotency=True, shadow=True),
        lambda: billable(2, charge_key="X-Session", shadow=True),
        lambda: billable(2, per="message", shadow=True),
        lambda: rate_limited("9/minute", per="message", shadow=True),
    ],
)
def test_refuse_a_shadow_that_makes_no_sense(make: Callable[[], object]) -> None:
    """What is no bool is refused at import, and so is a shadow of keys, which claims none."""
    with pytest.raises(ConfigurationError):
        make()


def test_refuse_a_key_of_work_in_the_shadow() -> None:
    """Work outside HTTP with an idempotency key is refused in the shadow: it would be done again."""

    async def play() -> None:
        async with house("memory://") as metering:
            with pytest.raises(ConfigurationError, match="claims no key"):
                async with metering.charge(payer="a", line="l", price=1, idempotency_key="k", shadow=True):
                    pass

    asyncio.run(play())


SHADOWED = rate_limited("6/hour", scope="api", shadow=True)


@pytest.mark.parametrize(
    "live",
    [
        rate_limited("5/minute", scope="api"),
        rate_limited(global_concurrency=2, scope="api"),
        rate_limited(configured="api", scope="api"),
        rate_limited(lambda: "6/hour", scope="api"),
        rate_limited("6/hour", scope="api", key=lambda: "ann"),
    ],
    ids=["other", "slots", "configured", "computed", "keyed"],
)
@pytest.mark.parametrize("place", ["endpoint", "same endpoint", "application_limits", "default_limits"])
def test_refuse_a_scope_that_is_live_elsewhere(place: str, live: Part) -> None:
    """Limits in the shadow may take from live ones of their scope, by whatever they count: refused at startup."""

    def route(*parts: Part) -> Row:
        async def endpoint(request: Any) -> None: ...

        for part in parts:
            endpoint = part(endpoint)
        return next(routes_of(Starlette(routes=[Route("/", endpoint, methods=["POST"])])))

    metering = house("memory://", limits={"api": "6/hour"})
    layers = [Layer(ALL_FEATURES, metering, **{place: (SHADOWED,)})] if place.endswith("limits") else []
    inside = (live, SHADOWED) if place == "same endpoint" else (live,)
    rows = [route(*inside), *([route(SHADOWED)] if place == "endpoint" else [])]
    errors, _ = check_names(rows, layers, metering)
    (told,) = [each for each in errors if "shadow=True" in each]
    assert "in the scope 'api'" in told


@pytest.mark.parametrize("is_live", [False, True], ids=["shadow", "live"])
@pytest.mark.parametrize("scope", ["endpoint", "application"])
def test_refuse_a_scope_that_others_have_by_themselves(scope: str, is_live: bool) -> None:
    """A ``scope=`` that is the name of another endpoint, or "application", is theirs: their slots would be one."""

    async def endpoint(request: Request) -> Response:
        return Response(b"done")

    own = rate_limited("5/minute", concurrency=2, key="address", shadow=is_live)
    other = own(endpoint)
    guard = guard_of(other)
    assert guard is not None
    named = guard.policy.name if scope == "endpoint" else scope

    async def sharing(request: Request) -> Response:
        return Response(b"done")

    shared = rate_limited("9/hour", concurrency=2, key="address", scope=named, shadow=not is_live)(sharing)
    routes = [Route("/", shared, methods=["POST"])]
    routes += [Route("/own", other, methods=["POST"])] if scope == "endpoint" else []
    metering = house("memory://")
    layers = [Layer(ALL_FEATURES, metering, application_limits=(own,))] if scope == "application" else []
    errors, _ = check_names(list(routes_of(Starlette(routes=routes))), layers, metering)
    (told,) = [each for each in errors if "shadow=True" in each]
    assert f"in the scope {named!r}" in told


def test_leave_an_endpoint_what_it_tries_out() -> None:
    """Of limits without a ``scope=`` an endpoint may have live ones and some in the shadow."""

    async def endpoint(request: Request) -> Response:
        return Response(b"done")

    tried = rate_limited("5/minute")(rate_limited("2/minute", shadow=True)(endpoint))
    rows = list(routes_of(Starlette(routes=[Route("/", tried, methods=["POST"])])))
    assert check_names(rows, [], house("memory://"))[0] == []


def test_warn_of_keys_in_the_shadow() -> None:
    """Where all is in the shadow keys are not claimed, and the audit says so."""

    @billable(1, idempotency=True)
    async def endpoint(request: Any) -> None: ...

    keyed = Starlette(routes=[Route("/", endpoint, methods=["POST"])])
    warned = audit(keyed, ALL_FEATURES, frozenset(), house("memory://", shadow=True)).warnings
    assert any("has keys, which Metering(shadow=True) does not claim" in told for told in warned)


def test_leave_default_limits_to_live_ones() -> None:
    """Limits of a middleware may be in the shadow as well; one of an endpoint that only tells stands for no default."""

    async def endpoint(request: Any) -> Response:
        return Response(b"done")

    async def play() -> None:
        async with house("memory://") as metering:
            route = Route("/", rate_limited("9/minute", shadow=True)(endpoint), methods=["POST"])
            app: Any = MeteringMiddleware(
                Starlette(routes=[route]),
                metering,
                application_limits=[rate_limited("0/minute", key="global", concurrency=1, shadow=True)],
                default_limits=[rate_limited("1/minute")],
            )
            assert [status((await call(app)).log) for _ in range(2)] == [200, 429]
            await idle(metering)
            assert tallies(metering) == {"denied": {"exceeds_limit": 1}, "admitted": {"": 1}}

    asyncio.run(play())
