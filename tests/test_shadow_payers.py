"""Who pays live charges inside of a call whose own charge is in the shadow, and who would have paid (S4.16)."""

from __future__ import annotations

import asyncio

import pytest

from asgi_metering import (
    Wallet,
    billable,
    current_call,
)
from asgi_metering.guards import Part
from asgi_metering.sources import Payer
from tests.harness.drive import status
from tests.outage.gated import CREDIT, call, metered, settled
from tests.pitfalls.stage import within
from tests.test_shadow import Told, house, idle, tallies


def owing(*, shadow: bool) -> tuple[Part, ...]:
    """Prices that somebody else than the caller pays: by a function, and by a payer object with an account."""
    org = Payer("org", account="org", credential=lambda: "key")
    return (
        billable(2, payer=lambda: "org", line="outer", shadow=shadow),
        billable(2, sources=[Wallet(payer=org)], line="outer", shadow=shadow),
    )


@pytest.mark.parametrize("part", owing(shadow=True), ids=["function", "object"])
def test_tell_who_would_have_paid(part: Part) -> None:
    """The event names the payer that was computed; live charges inside of the call are paid as without the shadow."""

    async def play() -> None:
        told, seen = Told(), []
        async with house("memory://", (told.sink,)) as metering:
            for payer in ("ann", "org"):
                await metering.grant(payer, 5, id=payer)

            async def work() -> None:
                async with metering.charge(line="inner", price=1) as inner:
                    seen.extend((current_call(), inner.payer, inner.paid_by))

            assert status((await call(metered(metering, part, work=work))).log) == 200
            assert seen[1:] == ["ann", None]
            await within(10, lambda: len(told.events) == 2)
            assert {(each.line, each.payer, each.amount) for each in told.events} == {
                ("outer", "ann", 0),
                ("inner", "ann", CREDIT),
            }
            (outer,) = [each for each in told.events if each.line == "outer"]
            assert outer.attributes["metering.shadow.payer"] == "org"
            assert (await settled(metering, "ann"), await settled(metering, "org")) == ((CREDIT, 0), (0, 0))

    asyncio.run(play())


@pytest.mark.parametrize("part", owing(shadow=False), ids=["function", "object"])
def test_tell_who_would_have_paid_what_is_inside_in_the_shadow_too(part: Part) -> None:
    """With `Metering(shadow=True)` a charge inside of a call would have been paid by who would have paid that one."""

    async def play() -> None:
        told = Told()
        async with house("memory://", (told.sink,), shadow=True) as metering:
            await metering.grant("org", 5, id="g")

            async def work() -> None:
                async with metering.charge(line="inner", price=1):
                    pass

            assert status((await call(metered(metering, part, work=work))).log) == 200
            await within(10, lambda: len(told.events) == 2)
            assert {each.attributes["metering.shadow.payer"] for each in told.events} == {"org"}
            assert tallies(metering) == {"admitted": {"": 2}}

    asyncio.run(play())


def test_look_past_work_in_the_shadow_for_who_pays() -> None:
    """A live charge inside of one in the shadow is paid by who pays around that; where nobody does, by who it names."""

    async def play() -> None:
        async with house("memory://") as metering:
            for payer in ("ann", "org"):
                await metering.grant(payer, 5, id=payer)

            async def work() -> None:
                async with (
                    metering.charge(line="shadow", payer="org", price=2, shadow=True),
                    metering.charge(line="inner", price=1),
                ):
                    pass

            assert status((await call(metered(metering, billable(1, line="outer"), work=work))).log) == 200
            await work()
            await idle(metering)
            assert (await settled(metering, "ann"), await settled(metering, "org")) == ((2 * CREDIT, 0), (CREDIT, 0))

    asyncio.run(play())
