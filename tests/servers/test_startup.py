"""Mistakes that a real server does not start with, and the sentence that it prints."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from tests.harness.servers import serve

MISTAKES = {
    "above": "/search runs tests.servers.broken.search ungated: its metering decorators stand above the route's own. "
    "Put them below it.",
    "absent": "/paint (tests.servers.broken.paint) is @billable, but no layer enforces credits. Add "
    'CreditGateMiddleware or MeteringMiddleware, or say unenforced="allow".',
    "two": "The layers CreditGateMiddleware, RateLimitMiddleware do not share one Metering. Make one, and pass the "
    "same object to all of them.",
}
"""By application, the mistake and its mend."""


def start(name: str) -> str:
    """Try to serve the application, and return what is told of it."""
    with pytest.raises(RuntimeError) as failed, serve(f"tests.servers.broken:{name}", "uvicorn-h11"):
        raise AssertionError(f"{name} serves.")
    return str(failed.value)


@pytest.fixture(scope="module")
def told() -> Iterator[dict[str, Future[str]]]:
    """What each application's server told; they are tried at once."""
    with ThreadPoolExecutor(len(MISTAKES)) as pool:
        yield {name: pool.submit(start, name) for name in MISTAKES}


@pytest.mark.parametrize("name", MISTAKES)
def test_do_not_start_with_a_mistake(name: str, told: dict[str, Future[str]]) -> None:
    """The process exits with 3 before it served, and its output has the mistake with its mend, and no traceback."""
    output = told[name].result()
    assert "uvicorn-h11 ended with 3 before it served." in output
    assert MISTAKES[name] in output
    assert "Application startup failed. Exiting." in output
    assert "Traceback" not in output
