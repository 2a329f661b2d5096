"""The tests of the pitfalls fail when the handling of their pitfall is switched off, and pass when it is not."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutations import (
    capture,
    completion,
    denial,
    fast_path,
    gate,
    growing,
    keys,
    limiting,
    limits,
    outage,
    sharing,
    telling,
    websockets,
)
from tests.mutations.entries import Mutation
from tests.mutations.running import Runs

MUTATIONS: tuple[Mutation, ...] = (
    *gate.MUTATIONS,
    *denial.MUTATIONS,
    *completion.MUTATIONS,
    *keys.MUTATIONS,
    *limiting.MUTATIONS,
    *capture.MUTATIONS,
    *telling.MUTATIONS,
    *outage.MUTATIONS,
    *growing.MUTATIONS,
    *fast_path.MUTATIONS,
    *limits.MUTATIONS,
    *websockets.MUTATIONS,
    *sharing.MUTATIONS,
)

CALLS = "tests/pitfalls/test_calls.py::"
ENOUGH = f"{CALLS}test_say_that_no_call_runs"
"""A test of a few lines, for the runs that try the runs themselves."""


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    """One server for all."""
    with Runs() as server:
        yield server


def names() -> list[str]:
    """One name per entry; of equal ones the later are numbered."""
    seen: list[str] = []
    for mutation in MUTATIONS:
        seen.append(mutation.id if mutation.id not in seen else f"{mutation.id}-{len(seen)}")
    return seen


NAMES = names()


ALL = os.environ.get("METERING_TEST_MUTATIONS") == "all"
"""Whether every mutation is played, by each of its tests: four minutes on two cores."""

SHARE = 4
"""Else one of so many is, by the first of its tests; of the others it is seen that they still change what is there."""

PLAYED = NAMES if ALL else NAMES[::SHARE]


def played(mutation: Mutation) -> tuple[str, ...]:
    """The tests that have to fail."""
    return mutation.tests if ALL else mutation.tests[:1]


def test_change_what_is_there() -> None:
    """The text of every mutation occurs once in its module, and what stands there instead is Python."""
    sources: dict[str, str] = {}
    for mutation in MUTATIONS:
        spec = importlib.util.find_spec(mutation.module)
        assert spec is not None
        assert spec.origin is not None
        source = sources.setdefault(mutation.module, Path(spec.origin).read_text(encoding="utf-8"))
        assert source.count(mutation.old) == 1, mutation.what
        compile(source.replace(mutation.old, mutation.new), mutation.module, "exec")


def test_name_tests_that_are_there() -> None:
    """Every test that a mutation names stands in the file that it names, also of mutations that are not played."""
    root = Path(__file__).parents[2]
    sources: dict[str, str] = {}
    for mutation in MUTATIONS:
        for test in mutation.tests:
            file, _, name = test.partition("::")
            source = sources.setdefault(file, (root / file).read_text(encoding="utf-8"))
            assert f"def {name.partition('[')[0]}(" in source, test


@pytest.mark.parametrize("name", PLAYED)
def test_turn_red_without_the_handling(name: str, runs: Runs) -> None:
    """The named test fails, in its body and not by accident, in code that does not handle its pitfall."""
    at = NAMES.index(name)
    mutation = MUTATIONS[at]
    runs.begin(name, mutation, played(mutation))
    after = NAMES.index(PLAYED[min(PLAYED.index(name) + 1, len(PLAYED) - 1)])
    if after != at and "PYTEST_XDIST_WORKER" not in os.environ:
        # The one after, meanwhile; among several workers it may be another's.
        runs.begin(NAMES[after], MUTATIONS[after], played(MUTATIONS[after]))
    run = runs.result(name, mutation, played(mutation))
    assert run.why_not_red() == ""


def test_stay_green_with_all_handling(runs: Runs) -> None:
    """Every test that a mutation names passes in the code as it is, in the same kind of run."""
    chosen = (MUTATIONS[NAMES.index(name)] for name in PLAYED)
    tests = tuple(sorted({test for mutation in chosen for test in played(mutation)}))
    run = runs.result("unchanged", None, tests)
    assert run.is_green, run.output[-3000:]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("no such text anywhere", "pass", "occurs 0 times in asgi_metering.opening, not once"),
        ("self", "pass", "times in asgi_metering.opening, not once"),
        ("def current_call() -> Call:", "def current_call() -> Call", "SyntaxError"),
        ("    opening = CURRENT.get()\n", "    opening = nowhere\n", "Failed for another reason"),
        ("in whose context the code runs", "in whose thread the code runs", "Not noticed by"),
    ],
    ids=["absent", "ambiguous", "no-python", "no-name", "harmless"],
)
def test_tell_a_mutation_that_proves_nothing(
    old: str, new: str, reason: str, runs: Runs, request: pytest.FixtureRequest
) -> None:
    """A snippet that is not there once, that breaks the module, or that changes nothing is no proof of any test."""
    mutation = Mutation(0, "nothing", "asgi_metering.opening", old, new, (ENOUGH,))
    run = runs.result(request.node.callspec.id, mutation, mutation.tests)
    assert reason in run.why_not_red()
    assert not (run.is_green and reason != "Not noticed by")


def test_tell_a_module_that_no_test_imports(runs: Runs) -> None:
    """A change of a module that the named test never imports is no proof either."""
    mutation = Mutation(0, "elsewhere", "asgi_metering.cli", '"""', "'''", (ENOUGH,))
    run = runs.result("elsewhere", mutation, mutation.tests)
    assert not run.applied
    assert "It did not run as it should" in run.why_not_red()


def test_cover_every_pitfall_of_the_gate_and_of_ends() -> None:
    """Each pitfall of the list that this package handles by itself has at least one mutation."""
    adapters_and_other_protocols = {10, 11, 19}
    wanted = set(range(1, 40)) - adapters_and_other_protocols
    assert wanted - {mutation.pitfall for mutation in MUTATIONS} == set()
