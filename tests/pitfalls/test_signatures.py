"""What frameworks read of a decorated function is what they read of the bare one (pitfall 6)."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Annotated, Any

import pytest
from fastapi import APIRouter, Depends, FastAPI, Query
from fastapi.sse import EventSourceResponse
from pydantic import BaseModel

from asgi_metering import (
    billable,
    rate_limited,
)
from tests.harness.drive import body, status
from tests.pitfalls.apps import (
    HOW,
    PRICE,
    How,
    installed,
)
from tests.pitfalls.scene import Scene, Visit, visit

# -- pitfall 6: what frameworks read of a function ---------------------------------------------------------


class Item(BaseModel):
    """A body."""

    name: str
    price: int = 1


class Found(BaseModel):
    """A response."""

    items: list[Item]


async def principal(limit: Annotated[int, Query(ge=1)] = 10) -> int:
    """A dependency."""
    return limit


def documented(metered: bool) -> FastAPI:
    """An application with everything that FastAPI reads from signatures, metered or not."""
    guard: Callable[[Any], Any] = (
        (lambda function: rate_limited("60/minute")(billable(PRICE)(function)))
        if metered
        else (lambda function: function)
    )
    app = FastAPI()
    router = APIRouter(prefix="/v1", tags=["items"])

    @router.post("/items/{item_id}", response_model=Found)
    @guard
    async def create(
        item_id: int, item: Item, q: Annotated[str | None, Query(max_length=5)] = None, who: int = Depends(principal)
    ) -> Any:
        """Create an item."""
        return {"items": [item]}

    @router.get("/items")
    @guard
    def find(who: Annotated[int, Depends(principal)], q: str = "x") -> Found:
        """Find items."""
        return Found(items=[Item(name=q, price=who)])

    @router.get("/stream", response_class=EventSourceResponse)
    @guard
    async def stream(q: str = "x") -> AsyncIterator[Item]:
        yield Item(name=q)

    @router.get("/lines")
    @guard
    def lines(q: str = "x") -> Iterator[Item]:
        yield Item(name=q)

    app.include_router(router, prefix="/api")
    return app


def test_leave_the_openapi_document_as_it_was() -> None:
    """Pitfall 6: a decorated application's document is byte for byte the bare one's, with string annotations too."""
    assert json.dumps(documented(metered=True).openapi()) == json.dumps(documented(metered=False).openapi())


def test_resolve_string_annotations_in_the_signature() -> None:
    """Pitfall 6: the wrapper's own signature has the types, for frameworks that look names up in its module."""

    @billable(PRICE)
    async def create(item: Item, q: Annotated[str, Query()] = "x") -> Found: ...

    signature = create.__signature__
    assert signature.parameters["item"].annotation is Item
    assert signature.return_annotation is Found


def test_keep_annotations_that_cannot_be_resolved() -> None:
    """Pitfall 6: a name that exists for type checkers only stays a string, and decorating does not fail."""

    @billable(PRICE)
    async def create(item: OnlyForCheckers) -> None: ...  # noqa: F821

    assert create.__signature__.parameters["item"].annotation == "OnlyForCheckers"


@pytest.mark.parametrize("how", HOW)
def test_serve_a_documented_application(how: How, scene: Scene) -> None:
    """Pitfall 6: body models, dependencies and response models work the same behind the decorators."""
    ask = Visit(
        "/api/v1/items/3", "POST", query="q=abc", body=b'{"name":"n"}', headers=(("content-type", "application/json"),)
    )
    metered, bare = (
        visit(installed(documented(metered), Scene().metering, how), ask, Visit("/api/v1/items"))
        for metered in (True, False)
    )
    for one, other in zip(metered, bare, strict=True):
        assert (status(one.log), body(one.log)) == (status(other.log), body(other.log)) == (200, body(one.log))
