"""Each kind of server, started once for all tests of this folder, with books of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness.servers import SERVER_KINDS
from tests.servers.house import House, house


@pytest.fixture(scope="package", params=SERVER_KINDS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Every kind of server in turn."""
    with house(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running
