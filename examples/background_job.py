"""
A job outside HTTP: set units aside, work, charge what was used.

    python -m examples.background_job

If the work fails, or the task is cancelled, the hold is released and the error rises as it was.
"""

from __future__ import annotations

import asyncio

from asgi_metering import CallRefused, Metering, TokenUsage
from asgi_metering.prices import per_million_tokens

PRICE = per_million_tokens(input=3, output=15)


async def make_podcast(metering: Metering, payer: str) -> str:
    """One episode; the hold is the most that it may cost."""
    async with metering.charge(payer=payer, line="podcast", price=PRICE, hold="0.2") as call:
        script = await write_script()
        call.record(TokenUsage(input=900, output=12_000), model="gpt-5.5")
    return script


async def write_script() -> str:
    """Stands for the model call."""
    await asyncio.sleep(0)
    return "Welcome to the show."


async def main() -> None:
    """Two listeners: one has paid, one has not."""
    async with Metering("sqlite:///metering.db") as metering:
        await metering.grant("org_7", 1, id="invoice-2231")
        for payer in ("org_7", "org_8"):
            try:
                print(payer, await make_podcast(metering, payer))
            except CallRefused as refused:
                print(payer, "cannot pay:", refused.refusal.reason.value)
        balance = await metering.balance("org_7")
        print("org_7 has", metering.unit.text(balance.available), "credits left")


if __name__ == "__main__":
    asyncio.run(main())
