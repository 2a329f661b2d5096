"""The usage event and its stored form (S2.2)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi_metering.amounts import MAX_AMOUNT
from asgi_metering.errors import UsageError
from asgi_metering.usage import TokenUsage, UsageEvent
from asgi_metering.usage.event import EVENT_VERSION, ordinary_events

LEAST: dict[str, Any] = {
    "id": "call_1",
    "line": "chat",
    "payer": "org_7",
    "unit": "credits",
    "amount": 12_000,
    "outcome": "completed",
    "basis": "usage",
    "started_at": 1_763_760_000.25,
    "ended_at": 1_763_760_002.75,
}
FULL: dict[str, Any] = LEAST | {
    "held": 20_000,
    "caller": "key_3",
    "caller_type": "service",
    "usage": TokenUsage(input=9, output=0, cached=4),
    "usage_source": "body",
    "model": "gpt-4o",
    "provider": "openai",
    "estimated": True,
    "reason": "client_gone",
    "status": 200,
    "trace_id": "0af7651916cd43dd8448eb211c80319c",
    "span_id": "b7ad6b7169203331",
    "trace_flags": "01",
    "request_id": "req_1",
    "session_id": "s_1",
    "attributes": {"items": 3, "ratio": 0.5, "cached": False, "pipeline": "learn"},
}


@pytest.mark.parametrize("fields", [LEAST, FULL])
def test_store_an_event_and_read_it_back(fields: dict[str, Any]) -> None:
    """One shape: the stored form survives JSON, names every field and its version, and gives the same event (S2.3)."""
    event = UsageEvent(**fields)
    stored = json.loads(json.dumps(event.to_dict(), allow_nan=False))
    assert stored["version"] == EVENT_VERSION
    assert set(stored) == {field.name for field in dataclasses.fields(UsageEvent)} | {"version"}
    assert UsageEvent.from_dict(stored) == event


def test_keep_zero_and_none_apart_when_stored() -> None:
    """A zero that was reported comes back as zero, and what was not reported as None (S2.41)."""
    usage = UsageEvent.from_dict(UsageEvent(**FULL).to_dict()).usage
    assert usage == TokenUsage(input=9, output=0, cached=4)


def test_read_what_a_later_version_stored() -> None:
    """Fields that this version does not know are passed over, in the event and in its usage."""
    stored = UsageEvent(**FULL).to_dict() | {"version": 99, "colour": "blue"}
    stored["usage"]["video"] = 3
    assert UsageEvent.from_dict(stored) == UsageEvent(**FULL)


def made(make: Callable[[dict[str, Any]], UsageEvent], fields: dict[str, Any]) -> UsageEvent | str:
    """The event, or the sentence that refuses it."""
    try:
        return make(fields)
    except UsageError as refused:
        return str(refused)


ODD = st.sampled_from(
    [None, "", "01", "0af7651916cd43dd8448eb211c80319c", 0, 7, -1, MAX_AMOUNT + 1, 1.5, math.nan, True]
)


@given(drop=st.sets(st.sampled_from(sorted(FULL))), odd=st.dictionaries(st.sampled_from(sorted(FULL)), ODD, max_size=2))
def test_read_as_if_made_anew(drop: set[str], odd: dict[str, Any]) -> None:
    """Whatever was stored, the event is the one that its constructor makes of it, or refused as that refuses it."""
    stored = {name: value for name, value in (FULL | odd).items() if name not in drop or name in LEAST}
    assert made(UsageEvent.from_dict, stored) == made(lambda fields: UsageEvent(**fields), stored)


@pytest.mark.parametrize(
    "odd", [None, MappingProxyType(LEAST), LEAST | {"status": "200"}, LEAST | {"usage": 3}], ids=str
)
def test_read_many_together(odd: Mapping[str, Any] | None) -> None:
    """A batch in which each is as nearly all are gives the events that each gives; with any other it gives none."""
    usage = {"input": 9, "output": 0}
    batch = [LEAST, UsageEvent(**FULL).to_dict(), LEAST | {"id": "c", "usage": usage, "attributes": {"a": 1.5}}]
    events = ordinary_events(batch if odd is None else [*batch, odd])
    assert events == (None if odd else [UsageEvent.from_dict(each) for each in batch])


@pytest.mark.parametrize("name", sorted(LEAST))
def test_read_what_is_no_event(name: str) -> None:
    """A stored form that lacks a field which every event has is refused by the field's name."""
    stored = UsageEvent(**LEAST).to_dict()
    del stored[name]
    with pytest.raises(UsageError, match=name):
        UsageEvent.from_dict(stored)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 3) for name in ("id", "line", "payer", "unit", "outcome", "basis")),
        *((name, None) for name in ("id", "line", "payer", "unit", "outcome", "basis", "amount", "started_at")),
        *((name, 3) for name in ("caller", "caller_type", "usage_source", "model", "provider", "reason")),
        *((name, b"x") for name in ("request_id", "session_id")),
        ("amount", 1.5),
        ("amount", True),
        ("amount", MAX_AMOUNT + 1),
        ("amount", -MAX_AMOUNT - 1),
        ("held", "1"),
        ("started_at", math.nan),
        ("ended_at", math.inf),
        ("ended_at", True),
        ("usage", {"input": 1}),
        ("usage", 3),
        ("estimated", 1),
        ("status", "200"),
        ("status", True),
        ("trace_id", "0AF7651916CD43DD8448EB211C80319C"),
        ("trace_id", "0af765"),
        ("trace_id", 5),
        ("span_id", "b7ad6b716920333z"),
        ("trace_flags", "1"),
        ("attributes", {1: "x"}),
        ("attributes", {"x": None}),
        ("attributes", {"x": [1]}),
        ("attributes", {"x": math.nan}),
        ("attributes", {"x": b"1"}),
    ],
)
def test_refuse_a_field_that_cannot_be_stored(name: str, value: object) -> None:
    """A value that JSON, SQL or a sink could not carry is refused by the field's name."""
    with pytest.raises(UsageError, match=name):
        UsageEvent(**(FULL | {name: value}))


def test_repeat_no_value_in_an_error() -> None:
    """What an attribute held stays out of the error, which somebody may log."""
    with pytest.raises(UsageError) as caught:
        UsageEvent(**(FULL | {"attributes": {"authorization": ["Bearer s3cret"]}}))
    assert "s3cret" not in str(caught.value)


def test_charge_less_than_before() -> None:
    """A correction may be negative."""
    assert UsageEvent(**(LEAST | {"amount": -5})).amount == -5


def test_change_an_event() -> None:
    """An event and its attributes cannot be changed, also not through the mapping they were made of."""
    attributes = {"items": 3}
    event = UsageEvent(**(LEAST | {"attributes": attributes}))
    attributes["items"] = 4
    assert event.attributes == {"items": 3}
    with pytest.raises(TypeError):
        event.attributes["items"] = 4  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.amount = 1  # type: ignore[misc]
    assert dataclasses.replace(event, amount=1).attributes == {"items": 3}


def test_measure_an_event() -> None:
    """The duration is in seconds, and never negative where a clock stepped back."""
    event = UsageEvent(**LEAST)
    assert event.duration_s == 2.5
    assert dataclasses.replace(event, ended_at=0.0).duration_s == 0.0
