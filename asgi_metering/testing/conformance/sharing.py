"""What a store must do about readings of providers' quotas, which workers share."""
# ruff: noqa: S101 -- a suite asserts

from __future__ import annotations

from collections.abc import Mapping

from asgi_metering.errors import ConfigurationError
from asgi_metering.rules.operations import Share, Sweep
from asgi_metering.rules.readings import MAX_KEPT, MAX_SHARED, MAX_TOLD
from asgi_metering.rules.state import SharedReading
from asgi_metering.stores.contract import ReadingsKept
from asgi_metering.testing.conformance.scene import DAY_S, Scene, Suite, scenario

__all__ = ["SharingReadings"]

TOLD = '{"provider":"openai","n":[null,"\\u00e9","\\"",0.1]}'


async def _kept(scene: Scene) -> Mapping[tuple[str, str], SharedReading]:
    return (await scene.store.read(ReadingsKept())).state.readings


class SharingReadings(Suite):
    """What one worker learned of its providers' quotas, for all of them (S1.45)."""

    @scenario
    async def test_share_readings(self, scene: Scene) -> None:
        """Each part of each series is kept as it was told, read alone and with everything, and answered."""
        now = scene.clock()
        status = SharedReading("openai", "status", now - 0.1, TOLD)
        told = (status, status._replace(part="limits", observed_at=0.0), status._replace(series="openai/batch.2@m-2.5"))
        assert await scene.one(Share(told)) == told
        assert await _kept(scene) == {reading[:2]: reading for reading in told}
        state = await scene.state()
        assert state.readings == {reading[:2]: reading for reading in told}
        assert (await scene.store.read(ReadingsKept())).now == now
        assert await scene.one(Share(())) == ()

    @scenario
    async def test_share_older_readings(self, scene: Scene) -> None:
        """An older one never replaces a newer one, part by part; of one instant the later to come is kept (S1.45)."""
        now = scene.clock()
        new = SharedReading("openai", "status", now - 1.0, TOLD)
        old = new._replace(observed_at=now - 1.25, told="{}")
        assert await scene.run(Share((new, new._replace(part="limits", observed_at=now - 9.0))), Share((old,))) == [
            (new, new._replace(part="limits", observed_at=now - 9.0)),
            (new,),
        ]
        async with scene.nothing_changes():
            assert await scene.one(Share((old, old))) == (new, new)
        limits, again = old._replace(part="limits"), new._replace(told="[]")
        assert await scene.one(Share((old, limits, again, old))) == (new, limits, again, again)
        assert set((await _kept(scene)).values()) == {limits, again}

    @scenario
    async def test_share_what_lies_ahead(self, scene: Scene) -> None:
        """What claims to be of later is of now; what was kept before the clock stepped back yields."""
        now = scene.clock()
        ahead = SharedReading("openai", "status", now + 3_600.0, TOLD)
        assert await scene.one(Share((ahead,))) == (ahead._replace(observed_at=now),)
        scene.clock.advance(-60.0)
        older = ahead._replace(observed_at=now - 90.0)
        assert await scene.one(Share((older,))) == (older,)
        assert list((await _kept(scene)).values()) == [older]

    @scenario
    async def test_refuse_what_is_no_reading(self, scene: Scene) -> None:
        """One that is none is refused with a sentence, and all that were told beside it; nothing has changed."""
        good = SharedReading("openai", "status", scene.clock(), TOLD)
        wrong = (
            good._replace(series=""),
            good._replace(series="no name"),
            good._replace(series="openai/"),
            good._replace(series="openai/a/b"),
            good._replace(part="all"),
            good._replace(observed_at=float("nan")),
            good._replace(observed_at=-1.0),
            good._replace(told=""),
            good._replace(told="\u00e9"),
            good._replace(told="\0"),
            good._replace(told="x" * (MAX_TOLD + 1)),
        )
        asked = [Share((good, reading)) for reading in wrong]
        async with scene.nothing_changes():
            answers = await scene.run(*asked, Share((good,) * (MAX_SHARED + 1)))
        assert [type(answer) for answer in answers] == [ConfigurationError] * (len(wrong) + 1)

    @scenario
    async def test_keep_so_many_readings(self, scene: Scene) -> None:
        """As many are kept as providers can have; the oldest makes room for a new one."""
        now = scene.clock()
        all_of_them = [
            SharedReading(f"p{number}", "status", now - MAX_KEPT + number // 2, "{}") for number in range(MAX_KEPT)
        ]
        told = [Share(tuple(all_of_them[at : at + MAX_SHARED])) for at in range(0, MAX_KEPT, MAX_SHARED)]
        await scene.run(*reversed(told))
        new = SharedReading("another", "limits", 7.0, "{}")
        assert await scene.one(Share((all_of_them[2], new, new._replace(series="third", observed_at=now)))) == (
            all_of_them[2],
            new,
            new._replace(series="third", observed_at=now),
        )
        kept = await _kept(scene)
        assert len(kept) == MAX_KEPT
        assert new[:2] not in kept
        assert [each.series for each in all_of_them if each[:2] not in kept] == ["p0"]

    @scenario
    async def test_forget_old_readings(self, scene: Scene) -> None:
        """A reading that nobody renews for a week is forgotten, so many at a time, the oldest first."""
        now = scene.clock()
        told = [SharedReading(f"p{number}", "status", now - number, "{}") for number in range(4)]
        await scene.one(Share(tuple(told)))
        scene.clock.advance(7 * DAY_S - 1.5)
        await scene.one(Sweep(1))
        assert set(await _kept(scene)) == {each[:2] for each in told[:3]}
        await scene.one(Sweep())
        assert set(await _kept(scene)) == {told[0][:2], told[1][:2]}
        scene.clock.advance(1.5)
        await scene.one(Share((told[1]._replace(observed_at=scene.clock()),)))
        await scene.one(Sweep(1))
        assert set(await _kept(scene)) == {told[1][:2]}
        scene.clock.advance(60.0)
        await scene.one(Sweep(keep_readings_s=61.0))
        assert len(await _kept(scene)) == 1
        await scene.one(Sweep(keep_readings_s=60.0))
        assert await _kept(scene) == {}
