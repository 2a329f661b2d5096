"""How each handling of holds that grow, and of cuts, is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

CALL = "asgi_metering.call"
CUTTING = "asgi_metering.asgi.cutting"
EXCHANGE = "asgi_metering.asgi.exchange"
GROWING = "asgi_metering.growing"
RULES = "asgi_metering.rules.admission"


def _growth(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_growing.py::{name}" for name in names)


def _cuts(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/pitfalls/test_cuts.py::{name}" for name in names)


IN_BAND = "test_end_a_stream_of_events_with_the_error_of_the_route[openai]"

MUTATIONS = (
    Mutation(
        0,
        "holds do not grow",
        GROWING,
        "                while self.left <= self._low and await self._grow():\n",
        "                while False:\n",
        _growth("test_let_a_block_complete_that_asks_no_more"),
    ),
    Mutation(
        0,
        "a cut is booked as completed",
        CALL,
        "            self.see(Cause.CUT)\n",
        "            self.see(Cause.COMPLETED)\n",
        _growth("test_use_up_what_there_is_before_the_cut"),
    ),
    Mutation(
        0,
        "a cut ends without its error",
        CUTTING,
        '                await send({"type": "http.response.body", "body": error})\n',
        '                await send({"type": "http.response.body", "body": b""})\n',
        _cuts(IN_BAND, "test_end_a_stream_of_lines_with_a_line"),
    ),
    Mutation(
        0,
        "an answer runs ahead of its hold",
        EXCHANGE,
        "            self.room = await call.growth.pace(passed)\n",
        "            self.room = CHECKPOINT_BYTES\n",
        _cuts(IN_BAND),
    ),
    Mutation(
        0,
        "a call that has ended grows",
        RULES,
        "    if hold is None or hold.receipt is not None:\n        return Decision(ask.id, now, Refusal(",
        "    if hold is None:\n        return Decision(ask.id, now, Refusal(",
        ("tests/rules/test_growing.py::test_grow_nothing_that_has_ended",),
    ),
)
