"""
Shared readings: what workers let each other know of their providers' answers. A newer one is never lost to an older.

Does not know what a reading says, nor who reads it.
"""

from __future__ import annotations

from math import isfinite

from asgi_metering.errors import ConfigurationError
from asgi_metering.names import check_name
from asgi_metering.rules.operations import Share
from asgi_metering.rules.state import Change, SharedReading, State, Table

__all__ = ["MAX_KEPT", "MAX_SHARED", "MAX_TOLD", "PARTS", "check", "share"]

PARTS = ("status", "limits")
"""The parts of a reading that are kept, each by itself."""

MAX_SHARED = 64
"""Parts that are told at once: some 32 providers."""

MAX_KEPT = 512
"""Parts that are kept. Names of providers come from code, so more of them means a name made from input."""

MAX_TOLD = 16_384
"""Characters of a part: with as many limits as a reading can have, of names that are as long as they can be."""


def share(state: State, ask: Share, now: float) -> tuple[tuple[SharedReading, ...], list[Change]]:
    """
    Keep each part of *ask* that is not older than what is kept of its series (S1.45); returns what is kept of each now.

    What claims to be of later than *now* counts as of *now*: the clock of a worker that is ahead does not keep others
    out. A kept part that lies ahead of *now* was told before the store's clock stepped back, and yields. Where there
    are `MAX_KEPT` parts already, the oldest one makes room for a new one.

    Raises:
        ConfigurationError: One of them is none, or there are too many; none is kept then.
    """
    check(ask)
    kept = dict(state.readings)
    answer: list[SharedReading] = []
    changes: list[Change] = []
    for reading in ask.readings:
        key = reading[:2]
        known = kept.get(key)
        if known is not None and reading.observed_at < known.observed_at <= now:
            answer.append(known)
            continue
        if known is None and len(kept) >= MAX_KEPT:
            oldest = min(kept, key=lambda key: (kept[key].observed_at, key))
            del kept[oldest]
            changes.append((Table.READING, oldest, None))
        newest = reading._replace(observed_at=min(reading.observed_at, now))
        kept[key] = newest
        answer.append(newest)
        changes.append((Table.READING, key, newest))
    return tuple(answer), changes


def check(ask: Share) -> None:
    """Raise `ConfigurationError` if `share` does."""
    if len(ask.readings) > MAX_SHARED:
        raise ConfigurationError(
            f"{len(ask.readings)} parts of readings were to be shared at once; {MAX_SHARED} can be. Share them in turn."
        )
    for reading in ask.readings:
        _check(reading)


def _check(reading: SharedReading) -> None:
    key, of_model, model = reading.series.partition("@")
    provider, slash, label = key.partition("/")
    check_name(provider, "provider")
    if slash:
        check_name(label, "quota label")
    if of_model:
        check_name(model, "model of a quota")
    if reading.part not in PARTS:
        raise ConfigurationError(f"{reading.part!r} is no part of a reading. Share one of {PARTS}.")
    if not (isfinite(reading.observed_at) and reading.observed_at >= 0):
        raise ConfigurationError(
            f"The reading of {reading.series!r} is of {reading.observed_at!r}, which is no time. Tell epoch seconds."
        )
    if not 0 < len(reading.told) <= MAX_TOLD or not (reading.told.isascii() and reading.told.isprintable()):
        raise ConfigurationError(
            f"What the reading of {reading.series!r} tells is no JSON text of 1 to {MAX_TOLD} characters in ASCII. "
            f"Tell Reading.to_dict."
        )
