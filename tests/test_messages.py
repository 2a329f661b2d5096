"""Messages of a session that several limits count by one window: each count is taken from once."""

from __future__ import annotations

from typing import Any

import pytest

from asgi_metering import rate_limited
from tests.asgi.sessions import Slow, echo, play, served

TIGHT = rate_limited("9/minute", per="message", scope="s", cost=3)
NAMED = rate_limited(configured="wide", per="message", scope="s")


@pytest.mark.parametrize("route", [(TIGHT, NAMED), (NAMED, TIGHT)], ids=["below", "above"])
def test_count_a_message_once_by_limits_of_one_window(route: tuple[Any, ...]) -> None:
    """S4.11: of limits that share a count the smallest is asked, at the highest cost, whichever was written first."""

    async def story() -> None:
        async with served(echo(*route), limits={"wide": "100/minute"}) as scene:
            async with scene.socket() as socket:
                socket.say("a", "b", "c", "d")
                await socket.until(lambda: socket.closed)
            assert (socket.texts, socket.closed) == (["a!", "b!", "c!"], (4429, "rate_limit: Quota exceeded"))

    play(story)


@pytest.mark.parametrize("choices", [("allow", "local"), ("local", "allow")])
def test_count_shared_windows_without_the_store(choices: tuple[Any, Any]) -> None:
    """X.6: without an answer one limit of a count that is kept by this process is enough to keep it there."""
    tight, named = choices
    route = (
        rate_limited("2/minute", per="message", scope="s", on_store_down=tight),
        rate_limited(configured="wide", per="message", scope="s", on_store_down=named),
    )

    async def story() -> None:
        books = Slow()
        async with served(echo(*route), store=books, limits={"wide": "100/minute"}) as scene:
            async with scene.socket() as socket:
                await socket.opened()
                books.down = True
                socket.say("a", "b", "c")
                await socket.until(lambda: socket.closed)
            assert (socket.texts, socket.closed) == (["a!", "b!"], (4429, "rate_limit: Quota exceeded"))

    play(story)
