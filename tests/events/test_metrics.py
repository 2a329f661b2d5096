"""Tallies in the process, and their way to OpenTelemetry."""

from __future__ import annotations

import ast
import sys
import threading
from pathlib import Path

import pytest

import asgi_metering
from asgi_metering.events import metrics
from asgi_metering.events.conventions import ARGUMENTS, TALLIES, Kind
from asgi_metering.events.metrics import Bounds, Meters, create_instrument, sendable
from tests.events.providers import telemetry

CHAT = (("metering.line", "chat"), ("metering.refusal.reason", "rate_limit"))


def test_write_tallies_at_the_flush_and_not_before() -> None:
    """Counting calls no OpenTelemetry; the flush adds once for each attribute set."""
    with telemetry() as seen:
        meters = Meters(seen.meters)
        for _ in range(3):
            meters.count("refusals", line="chat", reason="rate_limit")
        meters.count("refusals", 2, reason="policy", line="chat")
        assert seen.points() == []
        meters.flush()
        assert seen.values("metering.refusals") == {CHAT: 3, (CHAT[0], ("metering.refusal.reason", "policy")): 2}
        assert seen.points("metering.refusals")[0].unit == "{refusal}"


def test_write_each_count_once() -> None:
    """A second flush adds only what came since the first."""
    with telemetry() as seen:
        meters = Meters(seen.meters)
        for _ in range(2):
            meters.count("ends_retried")
            meters.flush()
        meters.flush()
        assert seen.values("metering.ends.retried") == {(): 2}


def test_count_the_same_set_in_any_order_of_arguments() -> None:
    """The order of arguments makes no second set."""
    meters = Meters()
    meters.count("refusals", line="chat", reason="rate_limit")
    meters.count("refusals", reason="rate_limit", line="chat")
    assert meters.totals("refusals") == {CHAT: 2}


def test_total_what_was_counted_since_the_beginning() -> None:
    """Totals count what was flushed and what was not, of one tally."""
    meters = Meters()
    meters.count("refusals", line="chat", reason="rate_limit")
    meters.count("ends_lost")
    meters.flush()
    meters.count("refusals", 4, line="chat", reason="rate_limit")
    assert meters.totals("refusals") == {CHAT: 5}
    assert meters.totals("ends_lost") == {(): 1}
    assert meters.totals("usage_rejected") == {}


def test_write_the_newest_value_of_a_gauge_at_every_flush() -> None:
    """A gauge keeps its value over flushes until it gets another."""
    with telemetry() as seen:
        meters = Meters(seen.meters)
        meters.gauge("holds", 3)
        meters.gauge("holds", 5)
        for _ in range(2):
            meters.flush()
            assert seen.values("metering.holds") == {(): 5}
        meters.gauge("outbox_lag", 1.5)
        meters.flush()
        assert [point.unit for point in seen.points("metering.outbox.lag")] == ["s"]


def test_make_no_attribute_of_payers_callers_or_anything_undeclared() -> None:
    """Only declared arguments become attributes, so a payer cannot, even by mistake (X.9)."""
    meters = Meters()
    meters.count("refusals", line="chat", payer="org_7", caller="key_9", reason="rate_limit")
    assert meters.totals("refusals") == {CHAT: 1}
    assert not {"payer", "caller", "account", "user"} & set(ARGUMENTS)


def test_count_what_nobody_declared_under_its_own_name() -> None:
    """An undeclared tally on a failing path is counted, never raised."""
    with telemetry() as seen:
        meters = Meters(seen.meters)
        meters.count("new_thing", line="chat")
        meters.gauge("new_level", 2)
        meters.flush()
        assert seen.values("metering.new_thing") == {(CHAT[0],): 1}
        assert seen.values("metering.new_level") == {(): 2}


def test_declare_every_tally_that_the_package_counts() -> None:
    """Each name and argument given to count() or gauge() of meters anywhere in the package is declared."""
    found: set[str] = set()
    for path in Path(asgi_metering.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            of_meters = "meters" in ast.unparse(owner)
            if node.func.attr in ("count", "gauge") and of_meters and isinstance(node.args[0], ast.Constant):
                found.add(node.args[0].value)
                assert {keyword.arg for keyword in node.keywords} <= set(ARGUMENTS), f"{path}: {ast.unparse(node)}"
    assert {"deliveries_failed", "events_delivered", "events_dropped", "outbox_lag"} <= found
    assert found <= set(TALLIES)


def test_bound_the_sets_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound everything goes into one overflow set, and nothing is lost."""
    monkeypatch.setattr(metrics, "MAX_SETS", 2)
    meters = Meters()
    for number in range(5):
        meters.count("refusals", line=f"line-{number}")
        meters.count("refusals", line=f"line-{number}")
    totals = meters.totals("refusals")
    assert totals[(("otel.metric.overflow", True),)] == 6
    assert sum(totals.values()) == 10
    assert len(meters._keys) == 2


def test_count_from_many_threads_without_losing_any() -> None:
    """Sync endpoints count from their threads, also while a flush runs."""
    meters, switch = Meters(), sys.getswitchinterval()

    def count() -> None:
        for _ in range(2_000):
            meters.count("refusals", line="chat")

    threads = [threading.Thread(target=count) for _ in range(4)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(50):
            meters.flush()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switch)
    assert meters.totals("refusals") == {(CHAT[0],): 8_000}


def test_go_on_when_a_metric_cannot_be_written(caplog: pytest.LogCaptureFixture) -> None:
    """A name that the SDK refuses is logged; the other metrics are written (S2.5)."""
    with telemetry() as seen:
        meters = Meters(seen.meters)
        meters.count("not a name")
        meters.count("ends_lost")
        meters.flush()
        assert seen.values("metering.ends.lost") == {(): 1}
    assert "'not a name' could not be written" in caplog.text


def test_create_each_kind_once_for_a_provider(caplog: pytest.LogCaptureFixture) -> None:
    """Two Meters of one provider share instruments, and the SDK has nothing to complain about."""
    with telemetry() as seen:
        for _ in range(2):
            meters = Meters(seen.meters)
            meters.count("refusals", line="chat")
            meters.gauge("holds", 1)
            meters.flush()
        assert seen.values("metering.refusals") == {(CHAT[0],): 2}
    assert caplog.text == ""


def test_declare_names_units_and_kinds_that_the_sdk_accepts() -> None:
    """Every declared instrument can be created, and counts things in the singular, in braces."""
    with telemetry() as seen:
        meter = seen.meters.get_meter("test")
        for instrument in TALLIES.values():
            create_instrument(meter, instrument)
            assert instrument.unit == "s" or instrument.unit[0] + instrument.unit[-1] == "{}"
            assert instrument.kind in (Kind.COUNTER, Kind.GAUGE)


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        ("chat", "chat"),
        ("Zürich", "Zürich"),
        ("lone \ud800", "lone ?"),
        ("x" * 20, "x" * 10),
        (True, True),
        (2**63 - 1, 2**63 - 1),
        (2**63, "9.223e+18"),
        (10**400, "_OTHER"),
        (1.5, 1.5),
    ],
    ids=repr,
)
def test_send_only_what_can_be_encoded(value: str | float, sent: str | float) -> None:
    """One value that cannot be encoded would cost an exporter the whole batch around it."""
    assert sendable(value, 10) == sent


def test_hide_values_that_cannot_be_encoded_behind_other() -> None:
    """In a metric such a value is _OTHER: it could not be read anyway."""
    bounds = Bounds()
    assert bounds.value("metering.line", "lone \ud800") == "_OTHER"
    assert bounds.value("metering.line", None) == "_OTHER"
    assert bounds.attributes({"b": 1, "a": "x"}) == (("a", "x"), ("b", 1))
    assert bounds.attributes({"b": 1, "a": "x"}) == (("a", "x"), ("b", 1))
    assert bounds.attributes({"a": "x", "b": 1}) == (("a", "x"), ("b", 1))
