"""What every test of the gate starts with."""

from __future__ import annotations

import pytest

from tests.pitfalls.scene import Scene


@pytest.fixture
def scene() -> Scene:
    """Empty books but for ann's credits."""
    return Scene()


@pytest.fixture
def ran() -> list[str]:
    """Where endpoints say that their bodies run."""
    return []
