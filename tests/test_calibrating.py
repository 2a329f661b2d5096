"""What calls use of what they hold, out of the books, so that estimates can be set right."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import Any

from asgi_metering import Metering, TokenUsage
from asgi_metering.calibrating import MAX_CALLS, hold_use, read_hold_use
from asgi_metering.prices import per_token
from asgi_metering.receipts import Basis, EndedBy, Receipt
from asgi_metering.rules.state import Hold, HoldState


def ended(used: int, held: int = 100, line: str = "chat", **end: Any) -> Hold:
    """A hold that was ended so."""
    told = {"basis": Basis.USAGE, "ended_by": EndedBy.CALL, **end}
    receipt = Receipt("c", "ann", "credits", used, held, told["basis"], False, told["ended_by"], (), 0, 0.0, 1)
    return Hold("c", "ann", "credits", held, (), HoldState.SETTLED, 0, 0, 0, 0, 0, "none", line, receipt=receipt)


def test_tell_what_calls_use_of_their_holds() -> None:
    """The ratio is of sums, the percentiles of calls, and the suggestion covers 95 of 100 with a tenth on top."""
    (use,) = hold_use([ended(used) for used in range(1, 101)])
    assert (use.line, use.unit, use.calls) == ("chat", "credits", 100)
    assert (round(use.ratio, 3), use.p50, use.p95, use.suggestion) == (1.98, 0.5, 0.95, Decimal("1.05"))
    assert use.sentence == (
        "holds are 1.98 x what is used, by 100 calls: p50 uses 0.50 of its hold, p95 0.95; "
        "suggestion: hold 1.05 x as much"
    )


def test_look_at_calls_whose_own_usage_was_charged() -> None:
    """Holds that live, that a policy ended, that were charged whole or nothing, tell nothing of an estimate."""
    live = ended(50)._replace(receipt=None)
    others = [live, ended(50, ended_by=EndedBy.POLICY), ended(100, basis=Basis.HOLD), ended(0), ended(5, held=0)]
    assert hold_use(others) == []
    (use,) = hold_use([*others, ended(150, basis=Basis.OBSERVED)])
    assert (use.calls, use.p95, use.suggestion) == (1, 1.5, None)
    assert use.sentence.endswith("too few for a suggestion")


def test_keep_to_the_latest_calls_of_each_line() -> None:
    """However many are kept, the latest of a line count, and lines stand apart."""
    many = [ended(10)] * MAX_CALLS + [ended(20)] * MAX_CALLS + [ended(30, line="other")] * 20
    uses = hold_use(many)
    assert [(use.line, use.calls, use.p50, use.suggestion) for use in uses] == [
        ("chat", MAX_CALLS, 0.2, Decimal("0.22")),
        ("other", 20, 0.3, Decimal("0.33")),
    ]


def test_read_the_books_of_a_store() -> None:
    """What a store keeps of ended calls tells it, whoever reads."""

    async def play() -> Any:
        async with Metering(sinks=()) as metering:
            await metering.grant("ann", 1_000, id="g")
            for used in (10, 30):
                async with metering.charge(payer="ann", line="chat", price=per_token(output=1), hold=40) as call:
                    call.record(TokenUsage(output=used))
            return await read_hold_use(metering.store)

    (use,) = asyncio.run(play())
    assert (use.line, use.calls, use.ratio, use.p50, use.p95) == ("chat", 2, 2.0, 0.25, 0.75)
