"""How each rule of moving logs and token buckets is switched off, and which test of it must turn red."""

from __future__ import annotations

from tests.mutations.entries import Mutation

__all__ = ["MUTATIONS"]

WINDOWS = "asgi_metering.rules.windows"
BUCKETS = "asgi_metering.rules.buckets"
LOGS = "asgi_metering.rules.logs"


def _log(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/rules/test_logs.py::test_{name}" for name in names)


def _bucket(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/rules/test_buckets.py::test_{name}" for name in names)


MUTATIONS = (
    Mutation(
        0,
        "a log forgets calls that are exactly as old as its window",
        LOGS,
        "    return bisect_left(_Times(log), text_of(time)) if time > 0 else 0\n",
        "    return bisect_left(_Times(log), text_of(time + 1e-6)) if time > 0 else 0\n",
        _log("count_each_call_for_a_window_of_its_own"),
    ),
    Mutation(
        0,
        "a log goes back with the clock",
        WINDOWS,
        "        at = max(now, counter.start)\n",
        "        at = now\n",
        _log("stay_where_a_clock_stepped_back"),
    ),
    Mutation(
        0,
        "whoever looks at a log is in it",
        WINDOWS,
        "        if counter is not None and used and not cost:\n",
        "        if False:\n",
        _log("look_without_taking"),
    ),
    Mutation(
        0,
        "all calls of an instant leave a log together",
        LOGS,
        "    while end < first + some and log",
        "    while log",
        _log("take_back_one_call_of_its_time"),
    ),
    Mutation(
        0,
        "a bucket goes back with the clock",
        BUCKETS,
        "    at = max(now, seen)\n",
        "    at = now\n",
        _bucket("change_nothing_where_a_clock_stepped_back"),
    ),
    Mutation(
        0,
        "a bucket flows over",
        BUCKETS,
        "    if at < due(counter.start, counter.used, refill, window_s):\n",
        "    if True:\n",
        _bucket("begin_full_and_flow_back_evenly", "give_nothing_back_into_a_bucket_that_was_full_since"),
    ),
    Mutation(
        0,
        "what came back late fills a bucket",
        BUCKETS,
        " or (delta < 0 and counter.start != start):\n",
        ":\n",
        _bucket("give_nothing_back_into_a_bucket_that_was_full_since"),
    ),
    Mutation(
        0,
        "a bucket that is over is corrected",
        BUCKETS,
        "    if now >= counter.end or ",
        "    if ",
        _bucket("drop_what_comes_when_the_bucket_has_been_full_for_long"),
    ),
    Mutation(
        0,
        "a bucket that owes is forgotten",
        BUCKETS,
        "    return _row(counter.key, counter.start, taken, kept, prior)\n",
        "    return counter._replace(used=taken)\n",
        _bucket("forget_a_bucket_that_is_full"),
    ),
)
