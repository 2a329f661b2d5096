"""How each rule of shared readings is switched off, and which test must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

RULE = "asgi_metering.rules.readings"
SHARING = "asgi_metering.sharing"
PARTS = "asgi_metering.upstream.parts"


def _sharing(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_sharing.py::{name}" for name in names)


MUTATIONS = (
    Mutation(
        0,
        "an older reading replaces a newer one",
        RULE,
        "        if known is not None and reading.observed_at < known.observed_at <= now:\n",
        "        if known is not None and reading.observed_at < known.observed_at <= now - 1e9:\n",
        ("tests/rules/test_readings.py::test_share_in_any_order",),
    ),
    Mutation(
        0,
        "what is ahead of the time stays ahead",
        RULE,
        "        newest = reading._replace(observed_at=min(reading.observed_at, now))\n",
        "        newest = reading\n",
        ("tests/rules/test_readings.py::test_what_lies_ahead_is_of_now",),
    ),
    Mutation(
        0,
        "a part is told again and again",
        SHARING,
        "            self._told.update((part[:2], part.told) for part in some)\n",
        "            pass\n",
        _sharing("test_clock_that_is_ahead_silences_nobody"),
    ),
    Mutation(
        0,
        "limits are lost beside a newer status",
        PARTS,
        "    if limits is None:\n",
        "    if limits is None or limits.observed_at < status.observed_at:\n",
        _sharing("test_in_any_order_all_have_the_newest_in_the_end"),
    ),
)
