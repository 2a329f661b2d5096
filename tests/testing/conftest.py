"""A provider behind a real server."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.testing.support import Live


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One provider behind uvicorn for all tests of this module."""
    # pytest loads this file (its folder is called test*) before it starts other processes, which all wait for it: the
    # SDKs of providers, which take seconds, are for those that run tests.
    from asgi_metering.testing.provider import Provider
    from tests.harness.servers import serve_in_thread
    from tests.testing.support import Live

    provider = Provider()
    with serve_in_thread(provider) as server:
        yield Live(provider, server.url)
