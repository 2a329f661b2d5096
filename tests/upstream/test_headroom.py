"""Reservations: what was let in counts until a reading shows it, or its call is over."""

from __future__ import annotations

import threading

import pytest

from asgi_metering.quotas.headroom import Need
from asgi_metering.testing import FakeClock
from asgi_metering.upstream.headroom import Headroom, Reservation
from asgi_metering.upstream.readings import QuotaReadings


class House:
    """Readings and reservations at one clock."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.readings = QuotaReadings(clock=self.clock)
        self.headroom = Headroom(self.readings, self.clock)

    def tell(self, remaining: int, *, at: float, label: str | None = None, reset: str = "30s") -> None:
        """The answer to a request that was sent *at* that time says what is left."""
        fields = {"limit": "60", "remaining": str(remaining), "reset": reset}
        headers = [(f"x-ratelimit-{name}-requests".encode(), value.encode()) for name, value in fields.items()]
        self.readings.record("acme", headers, 200, at, label=label)

    def reserve(self, requests: int = 1, **options: object) -> Reservation | None:
        return self.headroom.reserve("acme", Need(requests, tokens=100 * requests), **options)[1]  # type: ignore[arg-type]

    def running(self) -> int:
        return self.headroom.running("acme").requests


def test_let_in_no_more_than_is_left_before_any_new_reading() -> None:
    """With three left, three of five are let in, although no reading changes meanwhile."""
    house = House()
    house.tell(3, at=house.clock())
    assert [house.reserve() is not None for _ in range(5)] == [True, True, True, False, False]
    assert house.running() == 3
    lack, _ = house.headroom.reserve("acme", Need())
    assert lack is not None
    assert (lack.available, lack.limit, lack.retry_after_s) == (0, 60, 30.0)


def test_forget_what_a_reading_shows() -> None:
    """A reading of a request that was sent later shows what was sent before it; an older one shows nothing (S1.45)."""
    house = House()
    began = house.clock()
    first, second = house.reserve(), house.reserve()
    assert first is not None
    assert second is not None
    house.clock.advance(1)
    house.headroom.sent(first)
    house.clock.advance(1)
    house.tell(50, at=began)
    assert house.running() == 2
    house.tell(40, at=began + 2)
    assert house.running() == 1
    house.headroom.sent(second)
    house.headroom.shown(second)
    assert house.running() == 0
    for each in (first, second):
        house.headroom.release(each)
    assert house.running() == 0


def test_forget_a_call_that_is_over() -> None:
    """What a call never sent is not waited for when it is over, once."""
    house = House()
    kept, gone = house.reserve(2), house.reserve(3)
    assert kept is not None
    assert gone is not None
    for _ in range(2):
        house.headroom.release(gone)
    assert house.headroom.running("acme") == Need(2, tokens=200)
    house.headroom.sent(gone)
    house.headroom.shown(gone)
    assert house.running() == 2


def test_show_a_call_of_several_requests_one_by_one() -> None:
    """A call of three requests is shown in thirds, its tokens with them, whatever comes first."""
    house = House()
    call = house.reserve(3)
    assert call is not None
    for left in (2, 1, 0):
        house.headroom.sent(call)
        house.headroom.shown(call)
        assert house.headroom.running("acme") == Need(left, tokens=100 * left)
    house.headroom.sent(call)
    house.headroom.shown(call)
    assert house.running() == 0


def test_keep_labels_apart() -> None:
    """One key of a provider is full and another one is not (S1.45)."""
    house = House()
    house.tell(0, at=house.clock(), label="eu")
    house.tell(5, at=house.clock(), label="us")
    assert house.headroom.look("acme", Need(), label="eu") is not None
    assert house.headroom.look("acme", Need(), label="us") is None
    assert house.headroom.look("acme", Need()) is None


def test_count_a_certain_call_although_nothing_is_left() -> None:
    """What comes whatever is left is counted, and what lacks is told."""
    house = House()
    house.tell(0, at=house.clock())
    lack, reservation = house.headroom.reserve("acme", Need(), is_certain=True)
    assert lack is not None
    assert reservation is not None
    assert house.running() == 1


def test_keep_nothing_of_what_is_over() -> None:
    """Labels may be computed: of one whose calls are over nothing is left, refused or not."""
    house = House()
    house.tell(1, at=house.clock(), label="a")
    for label in ("a", "b"):
        call = house.reserve(label=label)
        assert call is not None
        assert house.reserve(2, label="a") is None
        house.headroom.release(call)
    assert house.headroom._series == {}


@pytest.mark.parametrize("threads", [4])
def test_let_in_exactly_what_is_left_from_several_threads(threads: int) -> None:
    """Looking and counting are one step: of 40 left, 40 of 200 are let in, whatever thread asks."""
    house = House()
    house.tell(40, at=house.clock())
    let: list[Reservation] = []

    def ask() -> None:
        for _ in range(200 // threads):
            reservation = house.reserve()
            if reservation is not None:
                let.append(reservation)

    workers = [threading.Thread(target=ask) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (len(let), house.running()) == (40, 40)
