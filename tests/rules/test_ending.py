"""End of call: each row of the table, each choice, and which row an end falls into."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest

from asgi_metering.errors import ConfigurationError
from asgi_metering.receipts import Basis
from asgi_metering.rules.ending import (
    DEFAULT_END_POLICY,
    DRAINABLE,
    END_OF_CALL,
    MAX_DRAIN_S,
    Cause,
    Drain,
    EndPolicy,
    Sighting,
    Situation,
    situation,
)

COMPLETED, ERROR, CLIENT_GONE, CUT, ABORTED = Cause

DESIGN = """
| completed, usage reported                          | usage    |                                           |
| completed, usage missing                           | estimate | observed, estimate, hold, none            |
| answered >= 400, or error before the first byte    | none     | any                                       |
| error after the first byte, or call.fail()         | none     | observed, hold                            |
| client gone before the first byte                  | observed | none, estimate, hold, drain               |
| client gone after the first byte                   | observed | none, usage, estimate, hold, drain        |
| cut                                                | observed | hold                                      |
| aborted, worker died                               | observed | none, hold                                |
"""
"""The table of DESIGN "End of call"; `drain` is a way to reach a row, not a basis."""


def table() -> dict[str, tuple[str, set[str]]]:
    """The rows of DESIGN: what happened, its default, and all that may be chosen."""
    rows = {}
    for line in DESIGN.strip().splitlines():
        happened, default, choices = (cell.strip() for cell in line.strip("|").split("|"))
        offered = {*Basis} if choices == "any" else {*filter(None, choices.split(", "))} - {"drain"}
        rows[happened] = (default, {str(choice) for choice in offered} | {default})
    return rows


def test_offer_what_the_design_offers() -> None:
    """Every row has the design's default and choices, and no row is missing."""
    assert {
        row.value: (str(bases[0]), {str(basis) for basis in bases}) for row, bases in END_OF_CALL.items()
    } == table()
    assert set(END_OF_CALL) == set(Situation)


def test_offer_each_basis_once() -> None:
    """No row names a basis twice, and nobody can change the table."""
    assert all(len(bases) == len(set(bases)) for bases in END_OF_CALL.values())
    with pytest.raises(TypeError):
        END_OF_CALL[Situation.CUT] = ()  # type: ignore[index]


@pytest.mark.parametrize(("row", "basis"), list(product(Situation, Basis)))
def test_choose_only_what_a_row_offers(row: Situation, basis: Basis) -> None:
    """A policy takes each basis that its row offers, and refuses any other with the list of those that it does."""
    if basis in END_OF_CALL[row]:
        assert EndPolicy({row: basis}).basis(row) is basis
        return
    with pytest.raises(ConfigurationError) as caught:
        EndPolicy({row: basis})
    message = str(caught.value)
    assert message.startswith(f"{basis.value!r} is no policy for a call that ends as {row.value!r}. Choose one of ")
    assert all(repr(choice.value) in message for choice in END_OF_CALL[row])


@pytest.mark.parametrize("row", Situation)
def test_fall_back_to_the_rows_default(row: Situation) -> None:
    """What a route does not choose is the row's default, whatever it chose elsewhere."""
    assert DEFAULT_END_POLICY.basis(row) is END_OF_CALL[row][0]
    other = Situation.CUT if row is not Situation.CUT else Situation.ABORTED
    assert EndPolicy({other: Basis.HOLD}).basis(row) is END_OF_CALL[row][0]


@pytest.mark.parametrize("row", Situation)
def test_charge_a_session_that_failed_late_by_what_was_observed(row: Situation) -> None:
    """A session's client can make most handlers fail: only there its default differs, and a choice goes before it."""
    expected = Basis.OBSERVED if row is Situation.FAILED_LATE else DEFAULT_END_POLICY.basis(row)
    assert DEFAULT_END_POLICY.session_basis(row) is expected
    assert EndPolicy({row: END_OF_CALL[row][-1]}).session_basis(row) is END_OF_CALL[row][-1]


def expected(seen: Sighting) -> Situation:
    """The precedence of DESIGN "End of call", read from the end: completed is what nothing else is."""
    early = not seen.first_byte
    answered_badly = seen.status is not None and seen.status >= 400
    rows = {
        COMPLETED: Situation.REPORTED if seen.reported else Situation.UNREPORTED,
        ERROR: Situation.FAILED_EARLY if early else Situation.FAILED_LATE,
    }
    row = rows.get(seen.cause, Situation.UNREPORTED)
    if seen.failed:
        row = Situation.FAILED_LATE
    if answered_badly:
        row = Situation.FAILED_EARLY
    if seen.cause is CLIENT_GONE:
        row = Situation.GONE_EARLY if early else Situation.GONE_LATE
    return {CUT: Situation.CUT, ABORTED: Situation.ABORTED}.get(seen.cause, row)


SIGHTINGS = [
    Sighting(cause, status, first_byte, failed, reported)
    for cause, status, first_byte, failed, reported in product(
        Cause, (None, 200, 399, 400, 404, 500), (False, True), (False, True), (False, True)
    )
]


@pytest.mark.uncounted
@pytest.mark.parametrize("seen", SIGHTINGS, ids=str)
def test_find_the_row_of_every_end(seen: Sighting) -> None:
    """Each combination of what can be seen falls into the row that the design gives it precedence to."""
    assert situation(seen) is expected(seen)


@pytest.mark.parametrize(
    ("seen", "row"),
    [
        (Sighting(COMPLETED, 200, True, reported=True), Situation.REPORTED),
        (Sighting(COMPLETED, 200, True), Situation.UNREPORTED),
        (Sighting(COMPLETED, 399, True, reported=True), Situation.REPORTED),
        (Sighting(COMPLETED, 400, True, reported=True), Situation.FAILED_EARLY),
        (Sighting(COMPLETED, 200, True, failed=True, reported=True), Situation.FAILED_LATE),
        (Sighting(ERROR, 200, True), Situation.FAILED_LATE),
        (Sighting(ERROR, None, False), Situation.FAILED_EARLY),
        (Sighting(ERROR, 500, True), Situation.FAILED_EARLY),
        (Sighting(CLIENT_GONE, 500, True, failed=True, reported=True), Situation.GONE_LATE),
        (Sighting(CLIENT_GONE, None, False), Situation.GONE_EARLY),
        (Sighting(CUT, 500, False, failed=True), Situation.CUT),
        (Sighting(ABORTED, 200, True, reported=True), Situation.ABORTED),
    ],
)
def test_give_precedence_to_the_stronger_sign(seen: Sighting, row: Situation) -> None:
    """The cases of DESIGN "End of call" and S4.10, each named: a clean 200 that was marked as failed is a failure."""
    assert situation(seen) is row


@pytest.mark.parametrize(("value", "field"), [(Sighting(COMPLETED), "status"), (DEFAULT_END_POLICY, "chosen")])
def test_never_change_what_was_seen_or_chosen(value: Sighting | EndPolicy, field: str) -> None:
    """Sightings and policies are values; the default policy is everybody's."""
    with pytest.raises(AttributeError):
        setattr(value, field, None)
    assert not hasattr(value, "__dict__")


def test_assume_nothing_of_an_end_that_was_not_seen() -> None:
    """A sighting of a cause alone is one without answer, byte, failure and report."""
    assert Sighting(COMPLETED) == Sighting(COMPLETED, None, False, False, False)


@pytest.mark.parametrize(
    ("bounds", "mend"),
    [
        ({"within_s": "60"}, "within_s='60' is no number. Write seconds"),
        ({"within_s": True}, "within_s=True is no number. Write seconds"),
        ({"within_s": 0}, "within_s=0 is not above 0"),
        ({"within_s": MAX_DRAIN_S + 1}, "is not above 0 and up to 3600.0 seconds"),
        ({"most_bytes": 0}, "most_bytes=0 is no int from 1 up. Write bytes"),
        ({"most_bytes": True}, "most_bytes=True is no int from 1 up. Write bytes"),
        ({"most_bytes": 1.5}, "most_bytes=1.5 is no int from 1 up. Write bytes"),
    ],
)
def test_bound_what_goes_on_without_a_client(bounds: dict[str, Any], mend: str) -> None:
    """A drained handler has a bound in time and in bytes, and a bound that is none is refused with its value."""
    assert Drain(within_s=MAX_DRAIN_S, most_bytes=1).within_s == MAX_DRAIN_S
    with pytest.raises(ConfigurationError, match=re.escape(mend)):
        Drain(**bounds)


@pytest.mark.parametrize("row", sorted(set(Situation) - DRAINABLE))
def test_drain_only_calls_whose_client_has_left(row: Situation) -> None:
    """Where nobody has left there is nothing to drain, and a policy that says so is refused."""
    assert EndPolicy({}, dict.fromkeys(DRAINABLE, Drain()))
    with pytest.raises(ConfigurationError, match="Nothing can be drained"):
        EndPolicy({}, {row: Drain()})
