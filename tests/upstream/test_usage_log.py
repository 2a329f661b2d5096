"""The usage log: calls by provider, model and minute."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from pathlib import Path

import pytest

from asgi_metering import Unit
from asgi_metering.errors import ConfigurationError
from asgi_metering.events.sinks import Sink
from asgi_metering.upstream.usage_log import KEEP_DAYS, SEEN_S, UsageLog
from asgi_metering.usage import UsageEvent

NOW = 1_755_780_000.0
"""A full minute."""


def clock() -> float:
    """It stands."""
    return NOW


def event(number: int, provider: str | None = "acme", at: float = NOW, **fields: object) -> UsageEvent:
    """A call of a provider."""
    given: dict[str, object] = {"model": "m", "amount": 2_000_000, "unit": "credits", **fields}
    return UsageEvent(
        id=f"e{number}",
        line="chat",
        payer="ann",
        outcome="completed",
        basis="usage",
        started_at=at,
        ended_at=at + 1,
        provider=provider,
        **given,  # type: ignore[arg-type]
    )


@pytest.fixture(params=["memory", "file"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> UsageLog:
    """A log of each kind."""
    return UsageLog(clock=clock) if request.param == "memory" else UsageLog(tmp_path / "log.db", clock=clock)


def test_count_calls_of_a_window_by_their_weights(log: UsageLog) -> None:
    """Calls of several names are summed from a moment on, by the weights of their models (S1.11, S1.20)."""
    assert isinstance(log, Sink)
    events = [
        event(1, at=NOW - 3600),
        event(2, at=NOW - 120, model="opus"),
        event(3, "other", at=NOW - 30),
        event(4, "third", at=NOW),
        event(5, None),
        event(6, model=None),
    ]
    asyncio.run(log.deliver(events))
    counted = log.counted(("acme", "other"), NOW - 600, {"opus": 5})
    assert (counted.used, counted.first_at) == (5 + 1 + 1, NOW - 120)
    assert log.counted(("acme",), NOW - 3600, {}).used == 3
    assert log.counted(("nobody",), 0, {}) == (0, None)
    log.close()


def test_weights_of_models_go_by_their_other_names_too(log: UsageLog) -> None:
    """Providers answer with a date or a prefix in the name: the weight is that of the model (S1.11, S3.27)."""
    names = ["opus-5", "opus-5-20260101", "anthropic/opus-5", "Opus-5-latest", "opus-5-mini", "haiku-20260101", "haiku"]
    log.add([event(number, model=name) for number, name in enumerate(names)])
    assert log.counted(("acme",), 0, {"opus-5": 5, "haiku": 2, "haiku-20260101": 3}).used == 4 * 5 + 1 + 3 + 2
    log.close()


def test_count_an_event_once(log: UsageLog) -> None:
    """Events are delivered at least once, and counted once."""
    log.add([event(1), event(1), event(2)])
    log.add([event(1)])
    assert log.counted(("acme",), 0, {}).used == 2
    log.close()


def test_cost_is_what_calls_were_charged(log: UsageLog) -> None:
    """Whole units of the log's unit are the costs; other units have none (S1.7)."""
    log.add([event(1), event(2, unit="messages"), event(3, "other", at=NOW - 86_400 * 8)])
    assert log.cost(("acme", "other"), NOW - 86_400 * 7) == 2
    log.close()


def test_cost_of_a_call_divides_among_its_models(log: UsageLog) -> None:
    """By what providers charge where all of them say it, else by tokens, else by calls (S1.7, S1.11)."""

    def several(*rows: tuple[str | None, int, dict[str, int], int | None]) -> dict[str, str]:
        told = [
            {"model": "m", "provider": provider, "calls": calls, "usage": usage}
            | ({} if cost is None else {"cost_usd_micros": cost})
            for provider, calls, usage, cost in rows
        ]
        return {"metering.models": json.dumps(told)}

    log.add(
        [
            event(1, attributes=several(("acme", 2, {"input": 9}, 1), ("other", 1, {"input": 1}, 3))),
            event(2, attributes=several(("acme", 1, {"input": 2, "output": 1}, 1), ("third", 1, {"input": 1}, None))),
            event(3, attributes=several(("fourth", 3, {}, None), (None, 1, {}, None))),
        ]
    )
    names = ("acme", "other", "third", "fourth")
    assert [log.counted((name,), 0, {}).used for name in names] == [2 + 1 + 1, 1, 1, 3]
    assert [log.cost((name,), 0) for name in names] == [0.5 + 1.5 + 0.5, 1.5, 0.5, 1.5]
    log.close()


@pytest.mark.parametrize(
    "attributes",
    [
        {"metering.models": "no JSON"},
        {"metering.models": "[]"},
        {"metering.models": "[1, 2]"},
        {"metering.models": '{"a": 1}'},
        {"metering.models": '[{"model": "m", "provider": "acme", "calls": 0, "usage": {}}]'},
        {"metering.upstream.calls": -3},
        {"metering.upstream.calls": "many"},
    ],
)
def test_attributes_of_somebody_else_count_one_call(attributes: dict[str, object], log: UsageLog) -> None:
    """What is not written by us keeps no batch from being counted (S1.15)."""
    log.add([event(1, attributes=attributes)])
    assert (log.counted(("acme",), 0, {}).used, log.cost(("acme",), 0)) == (1, 2)
    log.close()


def test_cost_by_a_function_of_ones_own() -> None:
    """What a call costs us may be told by a function, and be unknown."""
    log = UsageLog(unit=Unit("usd", 0), cost=lambda event: 0.5 if event.model == "m" else None, clock=clock)
    log.add([event(1), event(2, model="n")])
    assert log.cost(("acme",), 0) == 0.5
    log.close()
    with pytest.raises(ConfigurationError, match="cost=3 cannot be called"):
        UsageLog(cost=3)  # type: ignore[arg-type]


def test_log_of_two_processes_is_one(tmp_path: Path) -> None:
    """A file is shared: what one writes, another reads, also while the first is amid a write (S1.15, S1.41)."""
    path = tmp_path / "log.db"
    here, there = UsageLog(path, clock=clock), UsageLog(path, clock=clock)
    here.add([event(1)])
    writer = sqlite3.connect(path)
    writer.execute("BEGIN IMMEDIATE")
    assert there.counted(("acme",), 0, {}).used == 1
    writer.rollback()
    writer.close()
    there.add([event(2)])
    assert here.counted(("acme",), 0, {}).used == 2
    here.close()
    there.close()


def test_log_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    """Another file in its place is another log, and none is none."""
    here, there = UsageLog(tmp_path / "log.db", clock=clock), UsageLog(tmp_path / "other.db", clock=clock)
    here.add([event(1), event(2)])
    there.add([event(3)])
    assert here.counted(("acme",), 0, {}).used == 2
    reader = UsageLog(tmp_path / "log.db")
    assert reader.counted(("acme",), 0, {}).used == 2
    here.close()
    there.close()
    for part in ("", "-wal", "-shm"):
        (tmp_path / f"log.db{part}").unlink(missing_ok=True)
    (tmp_path / "other.db").rename(tmp_path / "log.db")
    assert reader.counted(("acme",), 0, {}).used == 1
    (tmp_path / "log.db").unlink()
    assert reader.counted(("acme",), 0, {}) == (0, None)
    reader.close()


def test_reading_makes_and_changes_nothing(tmp_path: Path) -> None:
    """A log that is missing or broken counts nothing, raises nothing, and is not made by reading it (S1.15)."""
    missing, broken = tmp_path / "missing.db", tmp_path / "broken.db"
    broken.write_bytes(b"this is no database at all, " * 100)
    for path in (missing, broken):
        log = UsageLog(path)
        assert log.counted(("acme",), 0, {}) == (0, None)
        assert log.cost(("acme",), 0) == 0
    assert not missing.exists()
    assert broken.read_bytes() == b"this is no database at all, " * 100


def test_log_that_cannot_be_written_refuses_the_batch(tmp_path: Path) -> None:
    """The exporter then delivers it again: nothing of a batch is counted, or all of it."""
    log = UsageLog(tmp_path / "nowhere" / "log.db")
    with pytest.raises(sqlite3.Error):
        asyncio.run(log.deliver([event(1)]))
    seen: list[str] = []

    def failing(event: UsageEvent) -> float:
        seen.append(event.id)
        if len(seen) == 2:
            raise ValueError("what does it cost?")
        return 1

    log = UsageLog(cost=failing, clock=clock)
    with pytest.raises(ValueError, match="what does it cost"):
        log.add([event(1), event(2)])
    log.add([event(1), event(2)])
    assert log.counted(("acme",), 0, {}).used == 2
    log.close()


def test_log_forgets_what_is_too_old(tmp_path: Path) -> None:
    """Minutes go after a month, ids after a day: the file does not grow with the calls."""
    now = [NOW]
    log = UsageLog(tmp_path / "log.db", clock=lambda: now[0])
    log.add([event(1), event(2)])
    now[0] += KEEP_DAYS * 86_400 + 60
    for number in range(1_000):
        log.add([event(3 + number, at=now[0])])
    assert log.counted(("acme",), 0, {}).used == 1_000
    now[0] += SEEN_S + 1
    log.close()
    again = UsageLog(tmp_path / "log.db", clock=lambda: now[0])
    again.add([event(2_000, at=now[0])])
    file = sqlite3.connect(tmp_path / "log.db")
    assert file.execute("SELECT count(*) FROM seen").fetchone() == (1,)
    file.close()
    again.close()
