"""Each kind of server, started once for all tests of this folder, with books of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.servers import SERVER_KINDS
from tests.servers.house import House, house


@pytest.fixture(scope="package", params=SERVER_KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Every kind of server in turn."""
    # hypercorn waits for what hangs in its own `send`, as some of these tests let it.
    grace_s = 1 if request.param == "hypercorn" else None
    # uvicorn chooses the library `websockets` by itself, where that is installed.
    extra = ("--ws", "wsproto") if request.param == "uvicorn-httptools" else ()
    folder = tmp_path_factory.mktemp(request.param)
    with house(request.param, folder, graceful_timeout_s=grace_s, extra_args=extra) as running:
        yield running
