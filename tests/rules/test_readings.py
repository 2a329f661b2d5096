"""Readings that workers share: the newest of each part is kept, whatever order they come in (DESIGN 6, S1.45)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.operations import Share, Sweep
from asgi_metering.rules.readings import MAX_KEPT, MAX_SHARED, MAX_TOLD, PARTS
from asgi_metering.rules.state import SharedReading
from tests.rules.world import DAY_S, World

READING = SharedReading("openai/batch", "status", 1_000.0, "{}")

readings = st.lists(
    st.builds(
        SharedReading, st.sampled_from(["openai", "xai"]), st.sampled_from(PARTS), st.floats(0, 1e9), st.just("{}")
    ),
    max_size=12,
)


@pytest.mark.uncounted
@given(told=readings, data=st.data())
def test_share_in_any_order(told: list[SharedReading], data: st.DataObject) -> None:
    """In whatever order workers tell what they read, alone or together, the same is kept in the end (S1.45)."""
    together, apart = World(), World()
    together.run(Share(tuple(told)))
    for reading in data.draw(st.permutations(told)):
        apart.run(Share((reading,)))
    assert together.state.readings == apart.state.readings


def test_what_lies_ahead_is_of_now() -> None:
    """What a clock that is ahead told is not older than what was told before it, nor newer than what comes (S1.45)."""
    world = World()
    ahead = READING._replace(observed_at=world.now + 30.0, told="[]")
    (kept,) = world.run(Share((ahead,)))
    assert kept == ahead._replace(observed_at=world.now)
    assert world.run(Share((READING._replace(observed_at=world.now - 1.0),))) == (kept,)
    world.wait(1.0)
    new = READING._replace(observed_at=world.now)
    assert world.run(Share((new,))) == (new,)
    world.wait(-30.0)
    older = READING._replace(observed_at=world.now - 5.0)
    assert world.run(Share((older,))) == (older,)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"series": ""}, "The provider '' is not"),
        ({"series": "a b"}, "The provider 'a b' is not"),
        ({"series": "openai/"}, "The quota label '' is not"),
        ({"series": "openai/a/b"}, "The quota label 'a/b' is not"),
        ({"series": "openai/a@"}, "The model of a quota '' is not"),
        ({"series": "openai@a@b"}, "The model of a quota 'a@b' is not"),
        ({"part": "body"}, "'body' is no part of a reading"),
        ({"observed_at": float("inf")}, "is of inf, which is no time"),
        ({"observed_at": -0.5}, "is of -0.5, which is no time"),
        ({"told": ""}, f"of 1 to {MAX_TOLD} characters"),
        ({"told": "x" * (MAX_TOLD + 1)}, f"of 1 to {MAX_TOLD} characters"),
        ({"told": "\u00e9"}, "in ASCII"),
        ({"told": "\n"}, "in ASCII"),
    ],
)
def test_refuse_what_is_none(changed: dict[str, object], said: str) -> None:
    """What is no part of a reading is refused with a sentence, and what was told beside it is not kept."""
    world = World()
    with pytest.raises(ConfigurationError, match=said):
        world.run(Share((READING, READING._replace(**changed))))
    assert not world.state.readings


def test_refuse_too_many() -> None:
    """As many are told at once as a batch can have."""
    world = World()
    with pytest.raises(ConfigurationError, match=f"{MAX_SHARED + 1} parts .* {MAX_SHARED} can be"):
        world.run(Share((READING,) * (MAX_SHARED + 1)))
    assert world.run(Share((READING._replace(told="x" * MAX_TOLD),) * MAX_SHARED))


def test_make_room_for_a_new_one() -> None:
    """The oldest goes where there are as many as are kept; one that is told again takes no more room."""
    world = World()
    world.state.readings = {
        (f"p{number}", "limits"): SharedReading(f"p{number}", "limits", 1_000.0 + number, "{}")
        for number in range(MAX_KEPT)
    }
    world.run(Share((SharedReading("p1", "limits", 2_000.0, "{}"),)))
    assert len(world.state.readings) == MAX_KEPT
    world.run(Share((READING, READING._replace(part="limits", observed_at=1.0))))
    assert len(world.state.readings) == MAX_KEPT
    assert [f"p{number}" for number in range(4) if (f"p{number}", "limits") not in world.state.readings] == ["p0"]
    assert READING[:2] not in world.state.readings


def test_forget_after_a_week() -> None:
    """A reading goes a week after the answer that told it; one that was told again stays."""
    world = World()
    old = READING._replace(observed_at=world.now)
    world.run(Share((old, old._replace(part="limits"))))
    world.wait(7 * DAY_S - 0.5)
    world.run(Share((old._replace(observed_at=world.now),)))
    world.run(Sweep())
    assert len(world.state.readings) == 2
    world.wait(0.5)
    world.run(Sweep())
    assert list(world.state.readings) == [("openai/batch", "status")]
