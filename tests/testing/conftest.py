"""A provider behind a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from asgi_metering.testing.provider import Provider
from tests.harness.servers import serve_in_thread
from tests.testing.support import Live

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One provider behind uvicorn for all tests of this module."""
    provider = Provider()
    with serve_in_thread(provider) as server:
        yield Live(provider, server.url)
