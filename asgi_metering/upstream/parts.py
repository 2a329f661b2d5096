"""
Readings as rows: what a store keeps of them for all workers, and readings again.

A reading has two parts, each that of the newest answer that told it, and a row for each. Knows the rows and their text;
no store, and not when anybody looks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas.reading import Reading
from asgi_metering.rules.operations import Share
from asgi_metering.rules.readings import PARTS, check
from asgi_metering.rules.state import ReadingKey, SharedReading
from asgi_metering.upstream.readings import QuotaReadings, label_of

__all__ = ["parts_of", "take_parts"]

log = logging.getLogger("asgi_metering.quotas")

_STATUS, _LIMITS = PARTS

_OF_LIMITS = ("limits", "limits_observed_at")


def parts_of(series: str, reading: Reading) -> list[SharedReading]:
    """
    The rows of *reading*, with nothing in them but what `Reading.to_dict` tells (S1.50, X.9).

    What no store would keep, such as a time that is none, is left out.
    """
    told = reading.to_dict()
    limits = {name: told.pop(name) for name in _OF_LIMITS}
    parts = [SharedReading(series, _STATUS, reading.observed_at, _text(told))]
    if reading.limits_observed_at is not None:
        parts.append(SharedReading(series, _LIMITS, reading.limits_observed_at, _text(limits)))
    return [part for part in parts if _is_kept(part)]


def _text(told: Mapping[str, Any]) -> str:
    return json.dumps(told, separators=(",", ":"))


def _is_kept(part: SharedReading) -> bool:
    try:
        check(Share((part,)))
    except ConfigurationError as failure:
        log.debug("A reading of %r is not shared: %s", part.series, failure)
        return False
    return True


def take_parts(readings: QuotaReadings, rows: Mapping[ReadingKey, SharedReading], series: Iterable[str]) -> None:
    """
    Take into *readings* what *rows* tell of each of *series*, if it is newer than what is known (S1.45).

    What another version wrote and this one cannot read is passed over.
    """
    for each in series:
        status, limits = (rows.get((each, part)) for part in PARTS)
        if status is None:
            continue
        try:
            readings.take(_reading(status, limits), label=label_of(each))
        except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, ConfigurationError):
            log.debug("The shared reading of %r cannot be read.", each)


def _reading(status: SharedReading, limits: SharedReading | None) -> Reading:
    none = {"limits": (), "limits_observed_at": None}
    told = Reading.from_dict({**json.loads(status.told), **none})
    if limits is None:
        return told
    known = Reading.from_dict({**told.to_dict(), **json.loads(limits.told)})
    return replace(told, limits=known.limits, limits_observed_at=known.limits_observed_at)
