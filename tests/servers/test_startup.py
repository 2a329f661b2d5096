"""Mistakes that a real server does not start with, and the sentence that it prints."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest

from tests.harness.servers import ServerKind, serve

MISTAKES = {
    "above": "/search runs tests.servers.broken.search ungated: its metering decorators stand above the route's own. "
    "Put them below it.",
    "absent": "/paint (tests.servers.broken.paint) is @billable, but no layer enforces credits. Add "
    'CreditGateMiddleware or MeteringMiddleware, or say unenforced="allow".',
    "two": "The layers CreditGateMiddleware, RateLimitMiddleware do not share one Metering. Make one, and pass the "
    "same object to all of them.",
}
"""By application, the mistake and its mend."""


KINDS: tuple[ServerKind, ...] = ("uvicorn-h11", "hypercorn", "granian")
CASES = [(name, kind) for kind in KINDS for name in MISTAKES]

ENDS = {
    "uvicorn-h11": "Application startup failed. Exiting.",
    "hypercorn": "Lifespan failure in startup.",
    "granian": "Unexpected exit from worker-1",
}
"""How each server says that it does not serve."""


def start(name: str, kind: ServerKind) -> str:
    """Try to serve the application, and return what is told of it."""
    with pytest.raises(RuntimeError) as failed, serve(f"tests.servers.broken:{name}", kind):
        raise AssertionError(f"{name} serves.")
    return str(failed.value)


@pytest.fixture(scope="module")
def told() -> Iterator[dict[tuple[str, ServerKind], Future[str]]]:
    """What each application's server told; they are tried at once."""
    with ThreadPoolExecutor(len(MISTAKES)) as pool:
        yield {(name, kind): pool.submit(start, name, kind) for name, kind in CASES}


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_do_not_start_with_a_mistake(
    name: str, kind: ServerKind, told: dict[tuple[str, ServerKind], Future[str]]
) -> None:
    """The process ends before it served, and its output has the mistake with its mend, in a sentence of its own."""
    output = told[name, kind].result()
    assert f"{kind} ended with " in output
    assert f"The application cannot start: {MISTAKES[name]}" in output.splitlines()
    assert ENDS[kind] in output


@pytest.mark.parametrize("name", MISTAKES)
def test_start_uvicorn_with_no_traceback(name: str, told: dict[tuple[str, ServerKind], Future[str]]) -> None:
    """Uvicorn exits with 3, and has no traceback to tell; granian and hypercorn add one of their own."""
    output = told[name, "uvicorn-h11"].result()
    assert "uvicorn-h11 ended with 3 before it served." in output
    assert "Traceback" not in output


def test_serve_nothing_where_no_lifespan_comes() -> None:
    """Daphne has no lifespan: it serves, and every request of the mistaken application is answered 500, with a log."""
    with serve("tests.servers.broken:above", "daphne") as server:
        for path in ("/search", "/nowhere"):
            assert httpx.get(server.url + path).status_code == 500
        assert f"The application cannot serve: {MISTAKES['above']}" in server.output()
