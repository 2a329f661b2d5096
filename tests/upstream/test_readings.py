"""The latest reading per provider."""

from __future__ import annotations

import logging
import threading
from email.message import Message
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.errors import ConfigurationError
from asgi_metering.quotas import Dialect, DialectRegistry, QuotaLimit, Reading
from asgi_metering.upstream import QuotaReadings
from asgi_metering.upstream.readings import MAX_SERIES

NOW = 1000.0


def left(count: int) -> list[tuple[bytes, bytes]]:
    """Return headers that tell how many requests are left."""
    return [(b"X-RateLimit-Remaining-Requests", str(count).encode())]


WAIT = [(b"retry-after", b"30")]


class Clock:
    """A clock that stands where it is put."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        """Return the moment."""
        return self.now


def make() -> QuotaReadings:
    """Return readings whose clock stands at `NOW`."""
    return QuotaReadings(clock=Clock())


def remaining(reading: Reading | None) -> int | None:
    """Return the requests left according to *reading*."""
    assert reading is not None
    limit = reading.limit("requests")
    return None if limit is None else limit.remaining


CREDIT = b'{"error": {"code": "insufficient_quota", "message": "pay"}}'


TOLD = {
    "X-RateLimit-Limit-Requests": "60",
    "x-ratelimit-remaining-requests": "7",
    "Retry-After": "30",
    "Set-C\xe9": "\u2603",
}


@pytest.mark.parametrize(
    "headers",
    [
        TOLD,
        list(TOLD.items()),
        [(name.encode("latin-1", "replace"), value.encode("latin-1", "replace")) for name, value in TOLD.items()],
        tuple((name, value.encode("latin-1", "replace")) for name, value in TOLD.items()),
        (pair for pair in TOLD.items()),
        httpx2.Headers({name: value for name, value in TOLD.items() if name.isascii()}),
        Message(),
    ],
    ids=["dict", "texts", "bytes", "mixed", "iterator", "httpx", "http.client"],
)
def test_record_headers_as_any_library_has_them(headers: Any) -> None:
    """A response's own headers can be told as they are: a mapping, or pairs of texts or bytes, in any case (S1.46)."""
    if isinstance(headers, Message):
        for name, value in TOLD.items():
            headers[name] = value
    reading = make().record("openai", headers, 200)
    assert remaining(reading) == 7
    assert reading is not None
    assert reading.retry_after_s == 30


@pytest.mark.parametrize(
    "headers", [None, 3, "retry-after: 30", [None], ["x"], [(1, 2)], [(b"retry-after", 30)], object()]
)
def test_record_of_what_are_no_headers_raises_nothing(headers: Any) -> None:
    """An observer never disturbs who asks: what cannot be read says nothing (S1.39)."""
    assert make().record("openai", headers, 200) is None


@pytest.mark.parametrize("broken", [None, (), (b"x",), (b"x", 3), (3, b"x"), "xy z"])
def test_record_loses_no_header_for_a_broken_one(broken: Any) -> None:
    """What is no pair of texts costs no other field (S1.39)."""
    for headers in ([*left(5), broken], [broken, *left(5)]):
        assert remaining(make().record("openai", headers, 200)) == 5


def test_record_of_a_body_belongs_to_the_headers_of_its_answer() -> None:
    """A body adds to its own answer, whose waits count from the headers, and is told of only if it says more."""
    told: list[Reading] = []
    clock = Clock()
    readings = QuotaReadings(clock=clock, on_reading=[told.append])
    headers = [*left(0), *WAIT]
    readings.record("openai", headers, 429, 990.0)
    clock.now += 5
    assert readings.record("openai", headers, 429, 990.0, body=b"{}") is None
    readings.record("openai", headers, 429, 990.0, body=CREDIT)
    assert [(each.verdict, each.retry_at, remaining(each)) for each in told] == [
        ("rate_limited", NOW + 30, 0),
        ("out_of_credit", NOW + 30, 0),
    ]


def test_record_of_an_older_body_replaces_nothing() -> None:
    """A refusal whose body arrives after a newer answer changes nothing of it (S1.45)."""
    readings = make()
    readings.record("openai", left(5), 200, 995.0)
    readings.record("openai", WAIT, 429, 990.0, body=CREDIT)
    latest = readings.latest("openai")
    assert latest is not None
    assert (latest.status, latest.verdict, latest.retry_after_s) == (200, None, None)


def test_record_of_an_answer_without_headers_ends_a_verdict() -> None:
    """A provider without quota headers that lets us in again is not out of credit, unless that call is older."""
    told: list[Reading] = []
    readings = QuotaReadings(clock=Clock(), on_reading=[told.append])
    assert readings.record("deepseek", [], 200, 980.0) is None
    readings.record("deepseek", [], 402, 990.0, body=b"")
    readings.record("deepseek", [], 200, 989.0)
    readings.record("deepseek", [], 500, 991.0)
    latest = readings.latest("deepseek")
    assert latest is not None
    assert latest.verdict == "out_of_credit"
    readings.record("deepseek", [], 200, 992.0)
    readings.record("deepseek", [], 200, 993.0)
    latest = readings.latest("deepseek")
    assert latest is not None
    assert (latest.verdict, latest.status, latest.observed_at) == (None, 200, 992.0)
    assert len(told) == 2


def test_take_keeps_what_another_worker_read_if_it_is_newer() -> None:
    """A reading of somebody else is kept by the same rule as one's own (S1.41, S1.45)."""
    there, here = make(), make()
    old = there.record("openai", left(9), 200, 990.0, label="eu")
    new = there.record("openai", left(8), 200, 991.0, label="eu")
    assert old is not None
    assert new is not None
    assert here.take(new, label="eu") == new
    assert here.take(old, label="eu") is None
    assert here.latest("openai", label="eu") == new
    assert here.latest("openai") is None


def test_record_keeps_the_latest_per_provider() -> None:
    """Each provider has its own reading, and the newer response replaces the older (S1.41)."""
    readings = make()
    readings.record("openai", left(9), 200, 990.0)
    readings.record("openai", left(8), 429, 991.0)
    readings.record("groq", left(1), 200, 990.0)
    assert remaining(readings.latest("openai")) == 8
    assert remaining(readings.latest("groq")) == 1
    assert readings.latest("mistral") is None
    assert {name: reading.status for name, reading in readings.all().items()} == {"openai": 429, "groq": 200}


def test_record_without_known_header_keeps_nothing() -> None:
    """A response without quota headers, a 429 too, leaves no trace (S1.39, S1.47)."""
    readings = make()
    assert readings.record("openai", [(b"content-type", b"text/html")], 429) is None
    assert readings.all() == {}


def test_record_older_response_never_overwrites() -> None:
    """Of two responses that overtook each other the one whose request started later stays (S1.45)."""
    readings = make()
    assert remaining(readings.record("openai", left(5), 200, 992.0)) == 5
    assert readings.record("openai", left(9), 200, 991.0) is None
    assert remaining(readings.latest("openai")) == 5


def test_record_same_start_takes_the_later_arrival() -> None:
    """Two requests that started in the same instant are ordered by arrival."""
    readings = make()
    readings.record("openai", left(5), 200, 992.0)
    readings.record("openai", left(4), 200, 992.0)
    assert remaining(readings.latest("openai")) == 4


def test_record_wait_alone_keeps_the_known_limits() -> None:
    """A response that only says retry-after is stored and does not wipe limits, whose age stays visible (S1.40)."""
    readings = make()
    readings.record("openai", left(5), 200, 990.0)
    latest = readings.record("openai", WAIT, 429, 995.0)
    assert latest is not None
    assert (latest.status, latest.retry_after_s, latest.retry_at) == (429, 30.0, NOW + 30)
    assert (latest.observed_at, latest.limits_observed_at) == (995.0, 990.0)
    assert remaining(latest) == 5
    assert latest.useful


def test_record_late_limits_join_a_newer_wait() -> None:
    """Limits that arrive after a newer retry-after-only answer are taken, and do not lift its wait (S1.45)."""
    readings = make()
    readings.record("openai", WAIT, 429, 995.0)
    latest = readings.record("openai", left(5), 200, 990.0)
    assert latest is not None
    assert (latest.status, latest.retry_after_s, remaining(latest)) == (429, 30.0, 5)
    assert (latest.observed_at, latest.limits_observed_at) == (995.0, 990.0)


def test_record_newer_answer_lifts_the_wait() -> None:
    """An answer to a request that started after the 429 and says nothing of waiting ends the wait."""
    readings = make()
    readings.record("openai", WAIT, 429, 995.0)
    latest = readings.record("openai", left(5), 200, 996.0)
    assert latest is not None
    assert (latest.status, latest.retry_after_s) == (200, None)


def test_record_limits_of_one_response_stay_together() -> None:
    """Limits that a newer response does not mention are not mixed with those it tells."""
    readings = make()
    readings.record("openai", [(b"x-ratelimit-remaining-tokens", b"0")], 429, 990.0)
    latest = readings.record("openai", left(5), 200, 991.0)
    assert latest is not None
    assert latest.limits == (QuotaLimit(resource="requests", remaining=5),)


@given(
    st.lists(
        st.tuples(st.sampled_from([WAIT, left(1), left(2), left(3) + WAIT]), st.sampled_from([200, 429, 503])),
        min_size=1,
        max_size=6,
    ).flatmap(lambda responses: st.permutations(list(enumerate(responses))))
)
def test_record_order_of_arrival_does_not_matter(
    arrivals: list[tuple[int, tuple[list[tuple[bytes, bytes]], int]]],
) -> None:
    """In whatever order responses arrive, what is kept at the end is the same (S1.45)."""
    mixed, sorted_ = make(), make()
    for start, (headers, status) in arrivals:
        mixed.record("openai", headers, status, 900.0 + start)
    for start, (headers, status) in sorted(arrivals, key=lambda arrival: arrival[0]):
        sorted_.record("openai", headers, status, 900.0 + start)
    assert mixed.all() == sorted_.all()


def test_record_after_the_clock_stepped_back_replaces_the_future() -> None:
    """A reading from the clock's own future does not block those that come after the step."""
    clock = Clock()
    readings = QuotaReadings(clock=clock)
    readings.record("openai", left(5))
    clock.now = 500.0
    assert remaining(readings.record("openai", left(4))) == 4


def test_record_counts_relative_values_from_the_answer() -> None:
    """A reset is counted from the moment the headers came, not from the request's start."""
    readings = make()
    latest = readings.record("openai", [(b"x-ratelimit-reset-requests", b"6s")], 200, 970.0)
    assert latest is not None
    assert (latest.observed_at, latest.received_at, latest.limits[0].reset_at) == (970.0, NOW, NOW + 6)


def test_record_with_labels_keeps_series_apart() -> None:
    """Keys of one provider with their own quotas do not overwrite each other."""
    readings = make()
    readings.record("openai", left(1), label="eu")
    readings.record("openai", left(2), label="us")
    readings.record("openai", left(3))
    assert [remaining(readings.latest("openai", label=label)) for label in ("eu", "us", None)] == [1, 2, 3]
    assert set(readings.all()) == {"openai/eu", "openai/us", "openai"}


@pytest.mark.parametrize(("provider", "label"), [("open ai", None), ("", None), ("openai", "sk-secret/1")])
def test_record_refuses_what_is_no_name(provider: str, label: str | None) -> None:
    """A provider or label that is no name is refused where it is used, loudly."""
    readings = make()
    with pytest.raises(ConfigurationError):
        readings.record(provider, left(1), label=label)
    with pytest.raises(ConfigurationError):
        readings.latest(provider, label=label)


def test_record_is_bounded() -> None:
    """Names made from input cannot fill memory: the reading that is oldest gives way."""
    readings = make()
    for number in range(MAX_SERIES):
        readings.record("made-up", left(number), 200, 100.0 + number, label=str(number))
    readings.record("openai", left(1), 200, 990.0)
    assert len(readings.all()) == MAX_SERIES
    assert readings.latest("made-up", label="0") is None
    assert readings.latest("made-up", label="1") is not None
    assert remaining(readings.latest("openai")) == 1


def test_all_returns_a_copy() -> None:
    """What a reader does to the mapping does not reach the readings (S1.41)."""
    readings = make()
    readings.record("openai", left(1))
    readings.all().clear()
    assert readings.latest("openai") is not None


def test_callbacks_hear_each_new_latest_reading() -> None:
    """A callback gets what is now the latest, and nothing for an older or unknown response."""
    heard: list[Reading] = []
    readings = QuotaReadings(clock=Clock(), on_reading=[heard.append])
    readings.record("openai", left(5), 200, 990.0)
    readings.record("openai", WAIT, 429, 995.0)
    readings.record("openai", left(9), 200, 980.0)
    readings.record("openai", [], 500, 996.0)
    assert [(reading.status, remaining(reading)) for reading in heard] == [(200, 5), (429, 5)]


def test_callbacks_are_isolated(caplog: pytest.LogCaptureFixture) -> None:
    """A callback that raises is logged, and neither the others nor whoever records notice (S1.39)."""
    readings = make()
    heard: list[Reading] = []

    @readings.on_reading
    def fail(reading: Reading) -> None:
        raise RuntimeError("broken callback")

    readings.on_reading(heard.append)
    with caplog.at_level(logging.ERROR, logger="asgi_metering.upstream"):
        assert readings.record("openai", left(5)) is not None
    assert len(heard) == 1
    assert "broken callback" in caplog.text


def of_model(model: str, at: float = NOW) -> Reading:
    """A reading of one model alone, of which nothing is left."""
    spent = QuotaLimit(resource="requests_day", remaining=0, reset_at=NOW + 30)
    return Reading(
        provider="google", dialect="unknown", observed_at=at, limits=(spent,), limits_observed_at=at, model=model
    )


def test_models_and_their_key_replace_nothing_of_each_other() -> None:
    """Of each model, and of all together, the newest is kept; a resource is looked for wherever it was told."""
    readings = make()
    readings.take(of_model("flash", NOW - 3), label="eu")
    assert readings.telling("google", "requests_day", label="eu") == of_model("flash", NOW - 3)
    readings.take(of_model("pro", NOW - 1), label="eu")
    readings.take(of_model("pro", NOW - 2), label="eu")
    readings.record("google", left(5), 200, label="eu")
    assert remaining(readings.latest("google", label="eu")) == 5
    assert readings.latest("google", label="eu", model="models/flash") == of_model("flash", NOW - 3)
    assert readings.of_models("google", label="eu") == [of_model("flash", NOW - 3), of_model("pro", NOW - 1)]
    assert (readings.of_models("google"), readings.latest("google", model="flash")) == ([], None)
    assert readings.all().keys() == {"google/eu@flash", "google/eu@pro", "google/eu"}
    assert readings.telling("google", "requests_day", label="eu") == of_model("pro", NOW - 1)
    assert readings.telling("google", "requests", label="eu") == readings.latest("google", label="eu")


def test_models_make_room_as_any_series() -> None:
    """Names of models come from bodies: where there are too many the oldest are forgotten, as models too."""
    readings = make()
    for number in range(MAX_SERIES + 2):
        readings.take(of_model(f"m{number}", NOW + number))
    assert len(readings.all()) == len(readings.of_models("google")) == MAX_SERIES
    assert readings.latest("google", model="m1") is None


def test_record_from_many_threads_ends_with_the_newest() -> None:
    """Threads that record at once leave the response with the latest start, whoever was last (S1.41)."""
    readings = make()
    barrier = threading.Barrier(8)

    def record(offset: int) -> None:
        barrier.wait(30)
        for number in range(offset, 400, 8):
            readings.record("openai", left(number), 200, 100.0 + number)

    threads = [threading.Thread(target=record, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    latest = readings.latest("openai")
    assert remaining(latest) == 399
    assert latest is not None
    assert latest.observed_at == 499.0


def test_record_with_own_dialects() -> None:
    """Readings understand the dialects that they were given (S1.34)."""
    mine = Dialect(
        name="acme",
        marks=(b"acme-",),
        read=lambda lines, now: tuple(QuotaLimit(resource="calls", remaining=int(value)) for _, value in lines),
    )
    readings = QuotaReadings(clock=Clock(), dialects=DialectRegistry(mine))
    latest = readings.record("acme", [(b"Acme-Left", b"3")])
    assert latest is not None
    assert latest.limit("calls") == QuotaLimit(resource="calls", remaining=3)
