"""The provider that these tests talk to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.upstream.provider import Provider, running_provider


@pytest.fixture(scope="module")
def served() -> Iterator[Provider]:
    """Serve one provider on loopback for all tests of a module."""
    with running_provider() as running:
        yield running


@pytest.fixture
def provider(served: Provider) -> Iterator[Provider]:
    """Give each test the provider without a script or a memory."""
    served.forget()
    yield served
    served.forget()
