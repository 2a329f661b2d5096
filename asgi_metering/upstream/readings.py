"""
The latest quota reading of each provider.

Knows how readings of one provider replace each other, and who wants to hear of new ones. Never knows a call, a
package or a raw header after it was read.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from asgi_metering.names import check_name
from asgi_metering.quotas import DIALECTS, DialectRegistry, Reading
from asgi_metering.quotas.reading import model_series

__all__ = ["MAX_SERIES", "QuotaReadings", "label_of", "newer_of"]

_REFUSED_FROM = 400

MAX_SERIES = 256
"""
Pairs of provider and label that are kept, and models of them: names come from code, so more of them means a name made
from input.
"""

_logger = logging.getLogger("asgi_metering.upstream")


class QuotaReadings:
    """
    Keeps the newest reading per provider and, where one provider is called with several keys, per label.

    Two responses seldom say the same amount, and they overtake each other. So a kept reading has two parts, and
    each is that of the newest response that told it: the limits, all from one response, because numbers of
    different models or endpoints do not belong together; and status, dialect and wait. A response that told only
    ``retry-after`` is kept (S1.40) and leaves the limits known before it as they are; `Reading.limits_observed_at`
    says how old they are. Newest is by the start of the request; at the same start, the later to arrive. In
    whatever order responses arrive, the end is the same (S1.45). Only when the clock steps back does a reading
    from its future yield.

    What a refusal told of one model alone (Gemini) is a reading of that model, beside that of the key as a whole:
    neither replaces the other.

    Safe for several threads and event loops (S1.41); readings are immutable.

    Args:
        clock: Epoch seconds.
        dialects: Header names that are understood.
        on_reading: See `on_reading`.

    Attributes:
        dialects: Of the header names that are understood.
        changes: How often a latest reading has changed: for whoever looks now and then.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.time,
        dialects: DialectRegistry = DIALECTS,
        on_reading: Iterable[Callable[[Reading], object]] = (),
    ) -> None:
        self._clock = clock
        self.dialects = dialects
        self._callbacks = tuple(on_reading)
        self._lock = threading.Lock()
        self._latest: dict[str, Reading] = {}
        # By provider and label, the series of those of its models that a refusal was of.
        self._of_models: dict[str, tuple[str, ...]] = {}
        self.changes = 0

    def record(
        self,
        provider: str,
        headers: Mapping[Any, Any] | Iterable[tuple[Any, Any]],
        status: int | None = None,
        started_at: float | None = None,
        *,
        label: str | None = None,
        body: bytes | None = None,
    ) -> Reading | None:
        """
        Read the headers of a response that just came, and keep what they say if it is new.

        Args:
            provider: Its name.
            headers: As they came, in any case: pairs of bytes or texts, or a mapping, such as ``response.headers`` of
                any library.
            status: HTTP status.
            started_at: Epoch seconds at which the request was started; `None` means now.
            label: Tells apart keys of one provider with quotas of their own. A name, never the key itself.
            body: Of a refusal, once it is known: its verdict, and limits that no header told (`quotas.bodies`).

        Returns:
            What is now the latest reading if this response told something new, else `None`.

        Raises:
            ConfigurationError: The provider or the label is no name. Headers never raise.
        """
        series = _series(provider, label)
        now = self._clock() if body is None else self._received_at(series, started_at)
        read = partial(self.dialects.read, provider=provider, status=status, now=now, started_at=started_at, body=body)
        try:
            # Nearly always from a client of ours, which has them as they came.
            reading = read(headers if type(headers) is list and _is_pair_of_bytes(headers[:1]) else _pairs(headers))
        except (AttributeError, LookupError, TypeError, ValueError):
            reading = read(_pairs(headers))
        if reading is None:
            if series in self._latest and status is not None and status < _REFUSED_FROM:
                self._let_in(series, status, now if started_at is None else started_at)
            return None
        return self._keep(_of_model(series, reading.model), reading, now)

    def take(self, reading: Reading, *, label: str | None = None) -> Reading | None:
        """
        Keep a reading that somebody else made, such as another worker, if it is newer than what is known.

        Returns what is now the latest reading if it told something new, else `None`.
        """
        return self._keep(_of_model(_series(reading.provider, label), reading.model), reading, self._clock())

    def _received_at(self, series: str, started_at: float | None) -> float:
        """When the headers of the answer came whose body is here now: its waits count from there."""
        known = self._latest.get(series)
        if known is None or known.received_at is None or known.observed_at != started_at:
            return self._clock()
        return known.received_at

    def _let_in(self, series: str, status: int, started_at: float) -> None:
        """A provider that tells nothing but answers is not out of credit any more."""
        with self._lock:
            known = self._latest.get(series)
            if known is None or known.verdict is None or started_at < known.observed_at:
                return
            latest = replace(known, status=status, verdict=None, retry_after_s=None, observed_at=started_at)
            self._latest[series] = latest
            self.changes += 1
        self._tell(latest)

    def _keep(self, series: str, reading: Reading, now: float) -> Reading | None:
        with self._lock:
            known = self._latest.get(series)
            latest = reading if known is None else newer_of(known, reading, now)
            if latest == known:
                return None
            if known is None:
                self._add(series)
            self._latest[series] = latest
            self.changes += 1
        self._tell(latest)
        return latest

    def _add(self, series: str) -> None:
        """Make room for a series that is new."""
        if len(self._latest) >= MAX_SERIES:
            oldest = min(self._latest, key=lambda name: self._latest[name].observed_at)
            del self._latest[oldest]
            key, of_model, _ = oldest.partition(OF_MODEL)
            if of_model:
                self._of_models[key] = tuple(each for each in self._of_models[key] if each != oldest)
        key, of_model, _ = series.partition(OF_MODEL)
        if of_model:
            self._of_models[key] = (*self._of_models.get(key, ()), series)

    def latest(self, provider: str, *, label: str | None = None, model: str | None = None) -> Reading | None:
        """
        Return the latest reading of *provider* under *label*, `None` if there is none.

        With a *model* that is what its own refusals told; without one, what was told of all models.
        """
        return self._latest.get(_of_model(_series(provider, label), model_series(model)))

    def of_models(self, provider: str, *, label: str | None = None) -> list[Reading]:
        """Return what refusals told of single models of *provider* under *label*."""
        with self._lock:
            return [self._latest[series] for series in self._of_models.get(_series(provider, label), ())]

    def telling(self, provider: str, resource: str, *, label: str | None = None) -> Reading | None:
        """Return the latest reading of the provider; where it is silent on *resource*, that of a model which is not."""
        latest = self.latest(provider, label=label)
        if latest is not None and latest.limit(resource) is not None:
            return latest
        telling = [each for each in self.of_models(provider, label=label) if each.limit(resource) is not None]
        return max(telling, key=lambda each: each.observed_at, default=latest)

    def all(self) -> dict[str, Reading]:
        """Return a copy of all latest readings, by ``"provider"`` or ``"provider/label"``, with ``"@model"`` behind."""
        with self._lock:
            return dict(self._latest)

    def on_reading(self, callback: Callable[[Reading], object]) -> Callable[[Reading], object]:
        """
        Call *callback* with each new latest reading, on the path of the response, so it must not block.

        What it raises is logged and disturbs neither the request nor other callbacks. With several threads two
        calls may overtake each other: compare `Reading.observed_at`. Returns *callback*, to serve as a decorator.
        """
        with self._lock:
            self._callbacks = (*self._callbacks, callback)
        return callback

    def _tell(self, reading: Reading) -> None:
        for callback in self._callbacks:
            try:
                callback(reading)
            except Exception:
                _logger.exception("The callback %r failed on a reading of %r.", callback, reading.provider)


def _is_pair_of_bytes(first: list[Any]) -> bool:
    return not first or (type(first[0]) is tuple and type(first[0][0]) is bytes)


def _pairs(headers: Any) -> list[tuple[bytes, bytes]]:
    """Headers of any library as pairs of bytes, without what is none (S1.39)."""
    items = getattr(headers, "items", None)
    found = []
    with suppress(TypeError):
        for pair in headers if items is None else items():
            with suppress(TypeError, ValueError):
                name, value = pair
                found.append((_bytes(name), _bytes(value)))
    return found


def _bytes(text: object) -> bytes:
    return text.encode("latin-1", "replace") if isinstance(text, str) else bytes(memoryview(text))  # type: ignore[arg-type]


OF_MODEL = "@"
"""Before the model in the name of a series; no name contains it, nor a slash."""


def label_of(series: str) -> str | None:
    """The label in the name of a series."""
    return series.partition(OF_MODEL)[0].partition("/")[2] or None


def _of_model(series: str, model: str | None) -> str:
    return series if model is None else f"{series}{OF_MODEL}{check_name(model, 'model of a quota')}"


def _series(provider: str, label: str | None) -> str:
    check_name(provider, "provider")
    return provider if label is None else f"{provider}/{check_name(label, 'quota label')}"


def newer_of(known: Reading, new: Reading, now: float) -> Reading:
    """
    Return the newer part of each of two readings of one series; see `QuotaReadings`.

    Args:
        known: What was kept.
        new: What came.
        now: Epoch seconds: what lies ahead of it was told by a clock that has stepped back since, and yields.
    """
    newest = new if _replaces(new.observed_at, known.observed_at, now) else known
    if new.limits_observed_at is None:
        limits_of = known
    elif known.limits_observed_at is None or _replaces(new.limits_observed_at, known.limits_observed_at, now):
        limits_of = new
    else:
        limits_of = known
    return replace(newest, limits=limits_of.limits, limits_observed_at=limits_of.limits_observed_at)


def _replaces(new: float, known: float, now: float) -> bool:
    return new >= known or known > now
