"""Token usage as a value."""

from __future__ import annotations

import dataclasses
import math
from decimal import Decimal

import pytest

from asgi_metering.errors import UsageError
from asgi_metering.usage import MAX_TOKENS, TokenUsage, UsageReport
from asgi_metering.usage.values import AXES, read_count


def test_show_what_was_reported_alone() -> None:
    """A usage in a log or a table is as short as what is known of it; it can be read back."""
    usage = TokenUsage(input=7, output=0)
    assert repr(usage) == "TokenUsage(input=7, output=0)"
    assert eval(repr(usage)) == usage
    assert repr(TokenUsage()) == "TokenUsage()"


def test_leave_out_every_axis() -> None:
    """A usage of nothing has observed nothing, has no total, and is false (S2.42)."""
    usage = TokenUsage()
    assert [getattr(usage, axis) for axis in AXES] == [None] * 10
    assert usage.total is None
    assert not usage.observed
    assert not usage


@pytest.mark.parametrize("axis", AXES)
def test_report_zero_on_one_axis(axis: str) -> None:
    """A zero that was reported is an observation, and true (S2.41)."""
    usage = TokenUsage(**{axis: 0})
    assert usage.observed
    assert usage


@pytest.mark.parametrize(
    ("usage", "total"),
    [
        (TokenUsage(input=3), 3),
        (TokenUsage(output=4), 4),
        (TokenUsage(input=3, output=4), 7),
        (TokenUsage(input=100, output=20, cached=80, cache_write=10, reasoning=15, audio=5), 120),
        (TokenUsage(cached=80), None),
        (TokenUsage(input=0), 0),
    ],
)
def test_total_leaves_parts_out(usage: TokenUsage, total: int | None) -> None:
    """The total is input and output; cached, written, reasoning and audio tokens are parts of them (S2.43)."""
    assert usage.total == total


def test_keep_a_part_larger_than_its_whole() -> None:
    """What a handler reports is kept as it is given, also where a part is larger than its whole."""
    assert TokenUsage(input=1, cached=5, audio=9).cached == 5


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("value", [True, 1.0, "1", Decimal(1), math.nan, -1, MAX_TOKENS + 1])
def test_refuse_an_impossible_count(axis: str, value: object) -> None:
    """A count that is not an int from 0 to the bound is refused, and the error names the axis and the value."""
    with pytest.raises(UsageError, match=axis) as caught:
        TokenUsage(**{axis: value})  # type: ignore[arg-type]
    assert str(value) in str(caught.value)
    with pytest.raises(UsageError, match=axis):
        TokenUsage(**{**dict.fromkeys(AXES, 5), axis: value})  # type: ignore[arg-type]


def test_accept_the_bound() -> None:
    """The largest count that is believed is a count."""
    assert TokenUsage(input=MAX_TOKENS).input == MAX_TOKENS


def test_add_each_axis_on_its_own() -> None:
    """None adds nothing, two of them stay None, and numbers add (S2.39)."""
    one = TokenUsage(input=1, cached=0, reasoning=2)
    other = TokenUsage(input=2, output=5, reasoning=3)
    assert one + other == TokenUsage(input=3, output=5, cached=0, reasoning=5)
    assert one + None == one
    assert TokenUsage() + TokenUsage() == TokenUsage()


def test_add_something_else() -> None:
    """Only a usage, or a missing one, can be added."""
    with pytest.raises(TypeError):
        TokenUsage() + 1  # type: ignore[operator]


def test_add_beyond_the_bound() -> None:
    """A sum that nobody can have used is refused, like a single count."""
    with pytest.raises(UsageError, match="input"):
        TokenUsage(input=MAX_TOKENS) + TokenUsage(input=1)


def test_sum_with_missing_turns() -> None:
    """A sum passes over missing and empty turns, and of nothing it observed nothing (S2.39)."""
    turns = [None, TokenUsage(), TokenUsage(input=2), None, TokenUsage(input=3, output=0)]
    assert TokenUsage.sum(turns) == TokenUsage(input=5, output=0)
    assert not TokenUsage.sum([])


def test_change_a_usage() -> None:
    """A usage is frozen and has no other attributes."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TokenUsage().input = 1  # type: ignore[misc]
    assert not hasattr(TokenUsage(), "__dict__")


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (None, None),
        (0, 0),
        (2**31, 2**31),
        (5.0, 5),
        (Decimal("7.000"), 7),
        (Decimal("1E+3"), 1000),
        (MAX_TOKENS, MAX_TOKENS),
    ],
)
def test_read_a_count(value: object, count: int | None) -> None:
    """Ints and integral floats and Decimals are counts, beyond 32 bits too; null is none."""
    assert read_count(value) == count
    assert type(read_count(value)) in (int, type(None))


@pytest.mark.parametrize(
    "value",
    [
        True,
        "5",
        [],
        {},
        -1,
        -0.5,
        0.5,
        Decimal("0.5"),
        Decimal("1e-999999999"),
        Decimal("1e999999999"),
        math.nan,
        math.inf,
        MAX_TOKENS + 1,
        10**4000,
    ],
)
def test_refuse_to_read_a_count(value: object) -> None:
    """Booleans, other types, fractions, negatives, NaN and absurd numbers are no counts, however long they are."""
    with pytest.raises(UsageError):
        read_count(value)


def test_take_the_reported_part_of_a_final_report() -> None:
    """A report that is not partial reports its whole usage."""
    usage = TokenUsage(input=1, output=2)
    assert UsageReport(usage=usage).reported is usage
    assert UsageReport().reported is None


def test_take_the_reported_part_of_a_partial_report() -> None:
    """A seed is no count of the output: a partial report reports its input side only."""
    usage = TokenUsage(input=425, output=1, cached=400, cache_write=0, reasoning=0)
    assert UsageReport(usage=usage, partial=True).reported == TokenUsage(input=425, cached=400, cache_write=0)
    assert UsageReport(usage=TokenUsage(output=1), partial=True).reported is None


@pytest.mark.parametrize(
    ("report", "limit", "truncated"),
    [
        (UsageReport(finish_reason="length"), None, True),
        (UsageReport(finish_reason="max_tokens"), None, True),
        (UsageReport(finish_reason="max_output_tokens"), None, True),
        (UsageReport(finish_reason="MAX_TOKENS"), None, True),
        (UsageReport(finish_reason="stop", usage=TokenUsage(output=9)), 9, False),
        (UsageReport(usage=TokenUsage(output=9)), 9, True),
        (UsageReport(usage=TokenUsage(output=8)), 9, False),
        (UsageReport(usage=TokenUsage(output=9)), None, False),
        (UsageReport(usage=TokenUsage(input=9)), 9, False),
        (UsageReport(usage=TokenUsage(output=9), partial=True), 9, False),
        (UsageReport(), 9, False),
    ],
)
def test_tell_whether_an_answer_was_truncated(report: UsageReport, limit: int | None, truncated: bool) -> None:
    """The finish reason decides; without one, an output that reached the limit (S3.28)."""
    assert report.truncated(limit) is truncated
