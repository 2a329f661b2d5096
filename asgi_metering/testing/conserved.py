"""
`assert_conserved()`: the proof of the books as an assertion, for the end of a user's own test.

Reads what the store keeps, and changes nothing.
"""

from __future__ import annotations

import asyncio
import time

from asgi_metering.metering import Metering

__all__ = ["assert_conserved"]

STEP_S = 0.005
"""Between two looks at what is still held."""


async def assert_conserved(metering: Metering, *, held: bool = False, within_s: float = 2.0) -> None:
    """
    Assert that the books of *metering* balance, and that nothing is held any more.

    Await it where the application runs: with Starlette's TestClient ``client.portal.call(assert_conserved, metering)``.

    Args:
        metering: Whose books.
        held: Whether calls may still hold something, those that run or are in doubt.
        within_s: How long ends may take that nobody waits for: a call is settled behind its response.

    Raises:
        AssertionError: With a sentence for each account that does not balance, and each call that holds something.
        StoreUnavailableError: No answer came.
    """
    until = time.monotonic() + within_s
    live = await metering.holds()
    while live and not held and time.monotonic() < until:
        await asyncio.sleep(STEP_S)
        live = await metering.holds()
    wrong = list(await metering.check())
    for hold in () if held else live:
        wrong.append(
            f"Call {hold.id!r} of line {hold.line!r} has not ended: it holds {hold.amount} smallest parts of "
            f"{hold.unit!r} of {hold.payer!r}, and is {hold.state}."
        )
    if wrong:
        raise AssertionError("\n".join(wrong))
