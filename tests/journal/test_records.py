"""Records: what the journal writes of an operation is what it reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asgi_metering.journal.records import Steps, decode, encode
from asgi_metering.receipts import Basis, EndedBy
from asgi_metering.rules.operations import (
    Admit,
    AllowanceSource,
    Backfill,
    Emit,
    End,
    IdempotencyAsk,
    KeyAsk,
    LeaseAsk,
    LimitAsk,
    WalletSource,
    WindowKind,
)
from asgi_metering.rules.state import NEVER

names = st.text(min_size=1, max_size=8)
amounts = st.integers(0, 2**53 - 1)
times = st.floats(0, 4e9) | st.just(NEVER)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=8)
# Also names that the records themselves use.
keys = names | st.sampled_from(["row", "mapping", "id"])
mappings: st.SearchStrategy[Mapping[str, Any]] = st.dictionaries(
    keys, scalars | st.lists(scalars, max_size=2) | st.dictionaries(keys, scalars, max_size=2), max_size=3
)
edges = st.just(()) | st.tuples(times, times, times, times)
sources = st.builds(WalletSource, amounts, names, names, st.booleans()) | st.builds(
    AllowanceSource, names, amounts, edges, times, names, names, st.booleans()
)
limits = st.builds(LimitAsk, names, names, st.sampled_from(WindowKind), amounts, times, amounts, names, edges)
asks = st.builds(
    Admit,
    names,
    names,
    names,
    amounts,
    amounts,
    st.lists(sources, max_size=2).map(tuple),
    st.lists(limits, max_size=2).map(tuple),
    st.lists(st.builds(LeaseAsk, names, names, amounts, names), max_size=2).map(tuple),
    times,
    times,
    st.sampled_from(Basis),
    names,
    mappings,
    st.none() | st.builds(KeyAsk, names, edges, times),
    st.none() | st.builds(IdempotencyAsk, names, names, times),
)
ends = st.builds(
    End,
    names,
    st.none() | amounts,
    st.sampled_from(Basis),
    st.booleans(),
    st.sampled_from(EndedBy),
    st.dictionaries(names, amounts, max_size=2),
    st.none() | mappings,
    st.booleans(),
    st.none() | mappings,
)
emits = st.builds(Emit, st.lists(st.tuples(names, mappings), min_size=1, max_size=2).map(tuple))
backfills = st.builds(Backfill, names, names, names, amounts, names, names, st.none() | mappings)


def kinds(value: Any) -> Any:
    """The types of a value and of everything in it: equal text is no enum yet, and a list no tuple."""
    inner = [kinds(each) for each in value] if isinstance(value, tuple) else []
    return type(value), inner


@settings(max_examples=150, deadline=None)
@given(st.lists(asks | ends | emits | backfills, min_size=1, max_size=2).map(tuple))
def test_read_what_was_written(steps: Steps) -> None:
    """Every operation that may wait comes back equal, and of equal types, whatever is in it."""
    read = decode(encode(steps))
    assert read == steps
    assert kinds(read) == kinds(steps)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        "7",
        "[7]",
        '[{"row":"Admit"}]',
        '[{"row":"Sweep"}]',
        '[{"row":"LimitAsk","name":"n","key":"k","kind":"fixed","limit":1,"window_s":1.0}]',
        '[{"row":"End","id":"a","amount":1,"colour":"red"}]',
        '[{"row":"End","id":"a","amount":1,"basis":"guess"}]',
        "[" * 100_000,
    ],
)
def test_refuse_what_it_does_not_know(text: str) -> None:
    """Text of another version, or of nobody, is an error of one kind, and nothing is guessed."""
    with pytest.raises(ValueError, match=r"record|Expecting|guess"):
        decode(text)


def test_read_records_without_newer_fields() -> None:
    """What an older version wrote lacks fields that have come since; they are as if nobody had said them (S0.36)."""
    assert decode(json.dumps([{"row": "End", "id": "a", "amount": 4}])) == (End("a", 4),)
