"""
Tallies: what is counted besides usage events, gathered in the process and handed to OpenTelemetry in batches.

Knows how to count without calling OpenTelemetry, and how to bound what may become an attribute. Never knows payers
or callers: the conventions name what a tally may be told apart by, and they are not among it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from asgi_metering._version import __version__
from asgi_metering.events.conventions import (
    ARGUMENTS,
    OTHER,
    OVERFLOW,
    SCOPE,
    TALLIES,
    GenAI,
    Instrument,
    Kind,
    schema_url,
)

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter, MeterProvider

__all__ = [
    "MAX_SETS",
    "MAX_VALUES",
    "Attributes",
    "Bounds",
    "Meters",
    "Value",
    "create_instrument",
    "get_meter",
    "sendable",
]

log = logging.getLogger("asgi_metering.events")

MAX_SETS: Final = 1_000
"""Attribute sets that one process tells apart, over all instruments: half of what the SDK keeps per stream."""

MAX_VALUES: Final = 200
"""Values of one attribute that are told apart. Lines and models are dozens; what is more came from a client."""

MAX_VALUE_LENGTH: Final = 128
"""Characters of an attribute value: more is no name."""

Value: TypeAlias = str | bool | int | float
"""What an attribute may be."""

Attributes: TypeAlias = tuple[tuple[str, Value], ...]
"""Attributes as a key: (name, value) in order of names."""

_Key: TypeAlias = tuple[str, Attributes]
"""(tally, attributes)."""


def get_meter(provider: MeterProvider | None, names: GenAI = GenAI.STABLE_SET, scope: str = SCOPE) -> Meter:
    """Return this package's meter; without *provider* that of the application, also if it is installed later."""
    from opentelemetry import metrics

    return metrics.get_meter(scope, __version__, provider, schema_url(names))


def create_instrument(meter: Meter, instrument: Instrument) -> Any:
    """Create *instrument* on *meter*; the SDK answers the same one again."""
    match instrument.kind:
        case Kind.COUNTER:
            return meter.create_counter(instrument.name, instrument.unit, instrument.description)
        case Kind.GAUGE:
            return meter.create_gauge(instrument.name, instrument.unit, instrument.description)
        case Kind.HISTOGRAM:
            return meter.create_histogram(
                instrument.name,
                instrument.unit,
                instrument.description,
                explicit_bucket_boundaries_advisory=instrument.buckets,
            )


def sendable(value: Value, most: int) -> Value:
    """
    Return *value* as an exporter can encode it: itself, or a text of at most *most* characters.

    One lone surrogate, or one integer above 64 bits, makes an exporter drop the whole batch that it is in.
    """
    if isinstance(value, str):
        if len(value) > most:
            value = value[:most]
        return value if value.isascii() else _encodable(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return f"{value:.3e}" if abs(value) < 1e300 else OTHER
    return value


def _encodable(text: str) -> str:
    cleaned = text.encode("utf-8", "replace").decode("utf-8")
    return text if cleaned == text else cleaned


class Bounds:
    """
    How many different things metric attributes may say.

    A model's name may come from a request, so without a bound any client could fill the collector.
    """

    def __init__(self) -> None:
        self._values: dict[str, set[object]] = {}
        self._sets: set[Attributes] = set()
        self._found: dict[tuple[tuple[str, Value | None], ...], Attributes] = {}

    def value(self, attribute: str, value: Value | None) -> Value:
        """Return *value*, or ``_OTHER`` where it is missing, too long, or beyond the first `MAX_VALUES`."""
        if value is None:
            return OTHER
        known = self._values.setdefault(attribute, set())
        if value in known:
            return value
        if len(known) >= MAX_VALUES or sendable(value, MAX_VALUE_LENGTH) is not value:
            return OTHER
        known.add(value)
        return value

    def attributes(self, attributes: Mapping[str, Value | None]) -> Attributes:
        """Return a set with bounded values, or, beyond the first `MAX_SETS`, the one that stands for all others."""
        given = tuple(attributes.items())
        found = self._found.get(given)
        if found is not None:
            return found
        bounded = tuple(sorted((name, self.value(name, value)) for name, value in given))
        if bounded not in self._sets:
            if len(self._sets) >= MAX_SETS:
                return ((OVERFLOW, True),)
            self._sets.add(bounded)
        if len(self._found) < MAX_SETS:
            self._found[given] = bounded
        return bounded


class Meters:
    """
    Counts and gauges of one process.

    Args:
        meter_provider: Where `flush` writes; without it the application's, and nowhere if it has none.

    `count` and `gauge` may be called from any thread, touch no OpenTelemetry and never raise: they stand on the paths
    of requests and of their failures. `flush` belongs to a worker.
    """

    def __init__(self, meter_provider: MeterProvider | None = None) -> None:
        self._provider = meter_provider
        self._lock = threading.Lock()
        self._tallies: dict[_Key, int] = {}
        self._gauges: dict[_Key, float] = {}
        self._totals: dict[_Key, int] = {}
        self._keys: dict[_Key, _Key] = {}
        self._bounds = Bounds()
        self._instruments: dict[str, Any] = {}

    def count(self, name: str, amount: int = 1, /, **attributes: Value) -> None:
        """
        Add *amount* to a tally: one dict entry, no call of OpenTelemetry (DESIGN "Budgets").

        Args:
            name: A counter of `conventions.TALLIES`. Another one is counted as ``metering.<name>``.
            amount: What to add, from 0 up.
            attributes: By the names of `conventions.ARGUMENTS`; others are left out.
        """
        given = (name, tuple(attributes.items()))
        with self._lock:
            key = self._keys.get(given) or self._key(given)
            self._tallies[key] = self._tallies.get(key, 0) + amount

    def gauge(self, name: str, value: float, /, **attributes: Value) -> None:
        """Keep the newest *value* of a gauge; every `flush` writes it until it is replaced. Arguments as `count`."""
        given = (name, tuple(attributes.items()))
        with self._lock:
            self._gauges[self._keys.get(given) or self._key(given)] = value

    def totals(self, name: str) -> dict[Attributes, int]:
        """Return what a counter counted since the process began, by its attributes: for dashboards without an SDK."""
        with self._lock:
            summed = {key[1]: value for key, value in self._totals.items() if key[0] == name}
            for (counted, attributes), value in self._tallies.items():
                if counted == name:
                    summed[attributes] = summed.get(attributes, 0) + value
        return summed

    def flush(self) -> None:
        """Write every tally since the last flush, one ``add`` for each attribute set, and every gauge."""
        with self._lock:
            tallies, self._tallies = self._tallies, {}
            gauges = dict(self._gauges)
            for key, value in tallies.items():
                self._totals[key] = self._totals.get(key, 0) + value
        for (name, attributes), value in tallies.items():
            self._write(name, Kind.COUNTER, value, attributes)
        for (name, attributes), level in gauges.items():
            self._write(name, Kind.GAUGE, level, attributes)

    def _key(self, given: _Key) -> _Key:
        """Name and bound a set of arguments that is seen for the first time."""
        name, arguments = given
        told = {ARGUMENTS[argument]: value for argument, value in arguments if argument in ARGUMENTS}
        key = (name, self._bounds.attributes(told))
        if len(self._keys) < MAX_SETS:
            self._keys[given] = key
        return key

    def _write(self, name: str, kind: Kind, value: float, attributes: Attributes) -> None:
        try:
            instrument = self._instruments.get(name)
            if instrument is None:
                declared = TALLIES.get(name) or Instrument(f"metering.{name}", kind, "1", "")
                instrument = self._instruments[name] = create_instrument(get_meter(self._provider), declared)
            if kind is Kind.GAUGE:
                instrument.set(value, dict(attributes))
            else:
                instrument.add(value, dict(attributes))
        except Exception:
            # The worker that flushes also delivers usage events, which an SDK's fault must not stop (S2.5).
            log.exception("The metric %r could not be written. Look at the OpenTelemetry set-up.", name)
