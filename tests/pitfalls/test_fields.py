"""The names of header fields, on admitted responses and on refusals alike: as the layer says, and no others."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from asgi_metering import MeteringMiddleware, billable, rate_limited
from asgi_metering.asgi.answers import AnswerOptions
from asgi_metering.asgi.fields import HeaderNames
from tests.harness.drive import Drive, headers, status
from tests.pitfalls.scene import Scene, Visit, field_of, visit

LEGACY = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")
LIMIT = 2

OWN = HeaderNames(
    policy=None,
    state="Acme-RateLimit",
    limit="Acme-Limit",
    remaining="Acme-Remaining",
    reset=None,
    retry_after="Acme-Retry-After",
    available="Acme-Credits",
)


@rate_limited(f"{LIMIT}/hour")
@billable(1)
async def whole(request: Request) -> JSONResponse:
    """An answer in one piece, with a field of its own that an application may want to be ours."""
    return JSONResponse({}, headers={"Acme-Limit": "own"})


@rate_limited(f"{LIMIT}/hour")
@billable(1)
async def streamed(request: Request) -> StreamingResponse:
    """An answer in two."""

    async def parts() -> Any:
        yield b"one"
        yield b"two"

    return StreamingResponse(parts(), headers={"Acme-Limit": "own"})


def answered(scene: Scene, path: str, **options: Any) -> list[Drive]:
    """Two admitted responses and the refusal after them."""
    app = Starlette(routes=[Route("/whole", whole), Route("/streamed", streamed)])
    ended = visit(MeteringMiddleware(app, scene.metering, **options), *(Visit(path),) * (LIMIT + 1))
    assert [status(each.log) for each in ended] == [200] * LIMIT + [429]
    return ended


def names_of(ended: Drive) -> set[str]:
    """Every name of the response's fields."""
    return {name for name, _ in headers(ended.log)}


@pytest.mark.parametrize("path", ["/whole", "/streamed"])
def test_send_the_legacy_fields_where_they_are_asked_for(path: str, scene: Scene) -> None:
    """S2.33: with `with_legacy` admitted responses and the 429 have them, once, and they say what RateLimit says."""
    began = int(time.time())
    ended = answered(scene, path, answers=AnswerOptions(names=HeaderNames.with_legacy()))
    for number, each in enumerate(ended, 1):
        state = re.fullmatch(r'"[^"]+";r=(\d+);t=(\d+)', field_of(each, "ratelimit") or "")
        assert state is not None
        remaining, seconds = map(int, state.groups())
        limit, shown, reset = (int(field_of(each, name) or "-1") for name in LEGACY)
        assert (limit, shown) == (LIMIT, remaining) == (LIMIT, max(0, LIMIT - number))
        # Epoch seconds: both are rounded up, from one moment of which the time of the visit is the earliest.
        assert began + seconds <= reset <= time.time() + seconds + 1


@pytest.mark.parametrize("path", ["/whole", "/streamed"])
def test_call_the_fields_as_the_application_does(path: str, scene: Scene) -> None:
    """S2.33: names of the application's own replace ours on both, and what it switched off is on neither."""
    *admitted, refused = answered(scene, path, answers=AnswerOptions(names=OWN))
    ours = {"acme-ratelimit", "acme-limit", "acme-remaining"}
    for number, each in enumerate(admitted, 1):
        assert ours | {"acme-credits"} <= names_of(each)
        assert (field_of(each, "acme-limit"), field_of(each, "acme-remaining")) == (str(LIMIT), str(LIMIT - number))
    assert ours | {"acme-retry-after"} <= names_of(refused)
    assert field_of(refused, "acme-remaining") == "0"
    for each in (*admitted, refused):
        default = {"ratelimit", "ratelimit-policy", "retry-after", "metering-available", *LEGACY}
        assert not names_of(each) & default


@pytest.mark.parametrize("path", ["/whole", "/streamed"])
def test_send_no_legacy_fields_by_default(path: str, scene: Scene) -> None:
    """S2.33: without the choice there are the draft's fields alone, and what the application wrote itself stays."""
    *admitted, refused = answered(scene, path)
    for each in admitted:
        assert {"ratelimit", "ratelimit-policy", "metering-available"} <= names_of(each)
        assert not names_of(each) & set(LEGACY)
        assert field_of(each, "acme-limit") == "own"
    assert {"ratelimit", "ratelimit-policy", "retry-after"} <= names_of(refused)
    assert not names_of(refused) & set(LEGACY)
