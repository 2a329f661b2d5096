"""
What this process has let in for its providers and no reading shows yet.

Keeps reservations beside the readings, and asks `quotas.headroom` whether one more fits. Knows when a request was sent
and when a reading was made; never knows a call, a store or what other processes do.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection

from asgi_metering.quotas.headroom import Lack, Need, lack_of, longest_of
from asgi_metering.quotas.reading import Reading, model_series
from asgi_metering.upstream.readings import QuotaReadings

__all__ = ["Headroom", "Reservation"]

_NOTHING = Need(0, 0, 0, 0)


class _Share:
    """What one request of a reservation takes: counted until a reading shows it, or its call is over."""

    __slots__ = ("counts", "need", "sent_at")

    def __init__(self, need: Need) -> None:
        self.need = need
        self.sent_at: float | None = None
        self.counts = True


class Reservation:
    """
    What one call takes of one provider, as far as no reading shows it. Made by `Headroom.reserve`.

    Attributes:
        provider, label: Of the readings.
    """

    __slots__ = ("_shares", "label", "provider")

    def __init__(self, provider: str, label: str | None, need: Need) -> None:
        self.provider, self.label = provider, label
        self._shares = [_Share(each) for each in _spread(need)]


class _Series:
    """The reservations of one provider and label."""

    __slots__ = ("running", "sent")

    def __init__(self) -> None:
        self.running = _NOTHING
        self.sent: deque[_Share] = deque()


class Headroom:
    """
    Whether providers have room for one more call, by the newest readings and what runs already.

    A reservation counts until a reading shows it: one of a request that was sent at the same time or later (S1.45), or
    its own answer; at last until its call is over. A call that makes several requests is shown one by one.

    Args:
        readings: Of the same process.
        clock: Epoch seconds.

    Attributes:
        is_used: Whether anybody decides by it: an endpoint requires it, or a call has asked.

    Safe from several threads and event loops; awaits nothing, asks nobody.
    """

    def __init__(self, readings: QuotaReadings, clock: Callable[[], float] = time.time) -> None:
        self._readings = readings
        self._clock = clock
        self._lock = threading.Lock()
        self._series: dict[tuple[str, str | None], _Series] = {}
        self.is_used = False

    def reserve(
        self,
        provider: str,
        need: Need,
        *,
        label: str | None = None,
        models: Collection[str] = (),
        is_certain: bool = False,
    ) -> tuple[Lack | None, Reservation | None]:
        """
        Look whether *need* fits, and count it as used if so, in one step.

        Args:
            provider: Of the readings.
            label: Likewise.
            need: Of the call.
            models: That it asks for; none: it may be any that was ever refused.
            is_certain: The call comes whatever is left, and is counted.

        Returns:
            Why it does not fit, or None; and what is reserved, or None.
        """
        self.is_used = True
        with self._lock:
            series = self._known(provider, label)
            reading = self._latest(provider, label, series)
            lack = self._lack(reading, need, series.running, (provider, label), models)
            if lack is not None and not is_certain:
                self._forget((provider, label), series)
                return lack, None
            series.running = series.running.plus(need)
        return lack, Reservation(provider, label, need)

    def look(
        self, provider: str, need: Need = _NOTHING, *, label: str | None = None, models: Collection[str] = ()
    ) -> Lack | None:
        """Why *need* would not fit now; None where it would. Reserves nothing."""
        self.is_used = True
        with self._lock:
            series = self._series.get((provider, label)) or _Series()
            reading = self._latest(provider, label, series)
            return self._lack(reading, need, series.running, (provider, label), models)

    def _lack(
        self,
        reading: Reading | None,
        need: Need,
        running: Need,
        place: tuple[str, str | None],
        models: Collection[str],
    ) -> Lack | None:
        """By what was told of the key as a whole, and of the models."""
        now, (provider, label) = self._clock(), place
        lack = lack_of(reading, need, running, now)
        named = [self._readings.latest(provider, label=label, model=each) for each in models if model_series(each)]
        own = named or ([] if models else self._readings.of_models(provider, label=label))
        if not own:
            return lack
        # Of what is told by refusals alone nothing is left, so nothing that runs has to be taken off it.
        lacks = [lack, *(lack_of(each, need, _NOTHING, now) for each in own)]
        return longest_of(each for each in lacks if each is not None)

    def running(self, provider: str, *, label: str | None = None) -> Need:
        """What was let in and no reading shows yet."""
        with self._lock:
            series = self._series.get((provider, label)) or _Series()
            self._latest(provider, label, series)
            return series.running

    def sent(self, reservation: Reservation) -> None:
        """Note that one request of *reservation* is being sent: readings from here on show it."""
        with self._lock:
            share = next((each for each in reservation._shares if each.sent_at is None), None)
            if share is not None and share.counts:
                share.sent_at = self._clock()
                self._known(reservation.provider, reservation.label).sent.append(share)

    def shown(self, reservation: Reservation) -> None:
        """Note that the provider has told its limits in the answer to a request of *reservation*, which they show."""
        with self._lock:
            for share in reservation._shares:
                if share.counts and share.sent_at is not None:
                    self._drop(reservation, share)
                    return

    def release(self, reservation: Reservation) -> None:
        """The call is over: what no reading has shown of it by now is not waited for."""
        with self._lock:
            for share in reservation._shares:
                self._drop(reservation, share)

    def _drop(self, reservation: Reservation, share: _Share) -> None:
        place = reservation.provider, reservation.label
        series = self._known(*place)
        if share.counts:
            share.counts = False
            series.running = _less(series.running, share.need)
        self._forget(place, series)

    def _known(self, provider: str, label: str | None) -> _Series:
        return self._series.setdefault((provider, label), _Series())

    def _forget(self, place: tuple[str, str | None], series: _Series) -> None:
        while series.sent and not series.sent[0].counts:
            series.sent.popleft()
        if series.running == _NOTHING:
            # Labels may be computed: what runs is all that is kept of one.
            self._series.pop(place, None)

    def _latest(self, provider: str, label: str | None, series: _Series) -> Reading | None:
        """The newest reading, and what it shows taken out of what runs."""
        reading = self._readings.latest(provider, label=label)
        if reading is not None and reading.limits_observed_at is not None:
            # In order of their sending, and each is looked at once.
            while series.sent and (not series.sent[0].counts or _shows(reading, series.sent[0])):
                share = series.sent.popleft()
                if share.counts:
                    share.counts = False
                    series.running = _less(series.running, share.need)
        return reading


def _shows(reading: Reading, share: _Share) -> bool:
    seen, sent = reading.limits_observed_at, share.sent_at
    return seen is not None and sent is not None and seen >= sent


def _less(running: Need, need: Need) -> Need:
    return Need(*(max(0, all_ - one) for all_, one in zip(running, need, strict=True)))


def _spread(need: Need) -> list[Need]:
    """What each of the requests of *need* takes: tokens in equal parts, the first ones taking what is left over."""
    count = max(1, need.requests)
    shares = []
    for at in range(count):
        parts = (tokens // count + (1 if at < tokens % count else 0) for tokens in need[1:])
        shares.append(Need(1 if need.requests else 0, *parts))
    return shares
