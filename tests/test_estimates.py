"""How many tokens a request asks for, read from the request."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from asgi_metering import TokenUsage
from asgi_metering.estimates import DEFAULT_OUTPUT_TOKENS, estimate_arguments, estimate_body


@pytest.mark.parametrize("key", ["input", "prompt"])
@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        ([1, 2, 3], 3),
        ([[1, 2], [3, 4, 5]], 5),
        ((1, 2), 2),
        ([[1], "hello", [True, None]], 2),
        ([], 0),
        (b"123", 0),
    ],
)
def test_count_token_ids_as_tokens(key: str, ids: Any, tokens: int) -> None:
    """An embeddings request that sends token ids instead of text asks for as many tokens: its hold is not 0."""
    assert asyncio.run(estimate_body({key: ids, "max_tokens": 0})) == TokenUsage(input=tokens, output=0)


def test_count_no_numbers_elsewhere() -> None:
    """Numbers of other fields are no token ids."""
    body = {"messages": [1, 2], "system": [3], "dimensions": [4]}
    assert asyncio.run(estimate_body(body)) == TokenUsage(input=6, output=DEFAULT_OUTPUT_TOKENS)


@pytest.mark.parametrize(
    ("media", "read"),
    [
        (None, True),
        ("application/json; charset=utf-8", True),
        ("application/vnd.api+json", True),
        ("text/plain", True),
        ("multipart/form-data; boundary=x", False),
        ("audio/mpeg", False),
    ],
)
def test_read_no_uploads(media: str | None, read: bool) -> None:
    """A body that is no JSON by its own words stays unread, for the endpoint to take piece by piece."""
    taken: list[str] = []

    async def receive() -> Any:
        taken.append("body")
        return {"type": "http.request", "body": b'{"input": [1, 2], "max_tokens": 1}'}

    headers = [] if media is None else [(b"content-type", media.encode())]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    found = asyncio.run(estimate_arguments({"request": request}))
    assert bool(taken) is read
    assert found == (TokenUsage(input=2, output=1) if read else TokenUsage(input=0, output=DEFAULT_OUTPUT_TOKENS))
