"""Units: a scale is fixed by its first use."""

from __future__ import annotations

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.operations import Declare
from asgi_metering.rules.state import DeclaredUnit
from tests.rules.world import World


def test_declare_units() -> None:
    """New units are noted, known ones again are none; the answer says how many were new."""
    world = World()
    assert world.run(Declare((("credits", 6), ("usd_micros", 0), ("credits", 6)))) == 2
    assert world.run(Declare((("credits", 6), ("tokens", 0)))) == 1
    assert world.state.units["credits"] == DeclaredUnit("credits", 6)


@pytest.mark.parametrize("units", [(("credits", 2),), (("new", 1), ("credits", 2)), (("new", 1), ("new", 2))])
def test_refuse_another_scale(units: tuple[tuple[str, int], ...]) -> None:
    """A unit under another scale would move every amount: it is refused with both, and nothing is noted (X.7)."""
    world = World()
    world.run(Declare((("credits", 6),)))
    with pytest.raises(ConfigurationError, match=r"digits after the point here, and was given with 2"):
        world.run(Declare(units))
    assert list(world.state.units) == ["credits"]
